"""KAKURENBO (arXiv 2310.10102): hide the rows with the lowest loss, and move back those that are not learnt yet.

A row is ready to be hidden when the model is confident of its answer, exp(-cas) >= tau (the geometric mean of the
probabilities of its tokens), and its loss has not risen since the scoring before. Of n eligible rows b are kept, so
n - b are hidden: first those that are ready, from the lowest loss upwards; and only where these are too few, from the
lowest loss upwards, others as well.

Where we differ: the paper hides a fixed share of the rows with the lowest loss and puts back those that are not ready,
so that its epochs are of another size each time; here the next ready rows are hidden in their places, since budgets are
planned (a share that shrinks from epoch to epoch, as in the paper, is a list of `keep`). Its confidence is that of a
class, which has to be the right one; a loss that rose is our sign of a row that is being forgotten. It raises the
learning rate by 1/(1 - the share that is hidden) in each epoch; here the schedule stays as the trainer has it, over the
steps that are planned. And it goes by the losses of the last time that rows were trained on, here all are scored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..errors import UserError
from .further_scores import RECENT_CHANGE
from .number_types import is_number
from .reasons import HIDDEN
from .selection import Selection, reasons_of, repeats, rows_with_loss


@dataclass(frozen=True)
class Kakurenbo:
    """All rows but those with the lowest loss of which the model is confident, and whose loss did not rise.

    Args:
        tau: how probable the tokens of an answer have to be, in their geometric mean, for its row to be ready to be
            hidden; from 0 (always) to 1. 0.7 is the paper's, for classes.

    >>> columns = {"cas": np.array([0.1, 0.2, 0.3, 2.0]), "ifd_status": np.full(4, "ok")}
    >>> columns["recent_loss_change"] = np.array([-0.1, 0.05, -0.2, -0.5])  # the second row's has risen
    >>> Kakurenbo()(columns, budget=2).reasons.tolist()
    ['hidden', 'kept', 'hidden', 'kept']
    """

    score: ClassVar[str] = "cas"
    reads: ClassVar[tuple[str, ...]] = (RECENT_CHANGE,)

    tau: float = 0.7

    def __post_init__(self) -> None:
        number = is_number(self.tau)
        if not (number and 0 <= self.tau <= 1):
            raise UserError(f"tau must be a probability from 0 to 1, got {self.tau!r}.")

    def __call__(
        self,
        columns: Mapping[str, np.ndarray],
        budget: int,
        *,
        ids: np.ndarray | None = None,
        rng: np.random.Generator | None = None,
    ) -> Selection:
        """Select `budget` of n rows.

        Args:
            columns: arrays (n,): `cas`, `ifd_status` and `recent_loss_change`, which is NaN for a row that was not
                scored before: of these, no loss has risen.
            budget, ids, rng: as for `Cherry`.

        Returns:
            The selection, highest loss first; `hidden` is the reason of the others.

        Raises:
            ShortfallError: when no row is eligible.
        """
        status, loss = np.asarray(columns["ifd_status"], dtype=object), np.asarray(columns["cas"], dtype=np.float64)
        rows = rows_with_loss(status, loss, budget)
        ids = np.arange(len(status)) if ids is None else np.asarray(ids)
        risen = np.asarray(columns[RECENT_CHANGE], dtype=np.float64)[rows] > 0
        ready = (np.exp(-loss[rows]) >= self.tau) & ~risen
        hidden = np.lexsort((ids[rows], loss[rows], ~ready))[: max(len(rows) - budget, 0)]
        left = np.delete(rows, hidden)
        kept = left[np.lexsort((ids[left], -loss[left]))]
        again = repeats(kept, budget - len(kept), rng)
        reasons = reasons_of(status, rows, HIDDEN, kept)
        return Selection(np.concatenate([kept, again]), reasons, float(loss[kept].min()), len(rows), len(again))
