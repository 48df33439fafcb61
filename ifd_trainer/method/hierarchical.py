"""Choose in two stages: rows with a high score, and of these the ones whose score stays when they are disturbed.

A high score may be due to a wording: with a little noise on its embeddings the row has another. So of the rows with the
highest mean over neighbours the ones are kept whose neighbours differ least (T-SHIRT, arXiv 2506.01317).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..errors import UserError
from .choices import Shortfall
from .number_types import is_number
from .number_words import many
from .reasons import ABOVE_LIMIT, BELOW_CUT, KEPT, NO_VALUE, UNSTABLE, Status
from .selection import Selection, ShortfallError, check_rows_wanted, repeats


@dataclass(frozen=True)
class Hierarchical:
    """Of the rows with the highest mean S-IFD of their neighbours, keep those with the lowest spread.

    A row is eligible when its status is `ok`, it has both numbers, and its mean is below `max_ifd`. The
    ceil(gamma * budget) eligible rows with the highest mean are candidates; the `budget` of them with the lowest spread
    are kept. Equal means are told apart by row id, lowest first, equal spreads by the higher mean. With fewer eligible
    rows than the budget, rows are repeated, each as often as any other give or take one.

    Both are columns of the data set, as `IFDScorer.neighbourhood` attaches them: the callback does not score a pool for
    this policy. Source: arXiv 2506.01317.

    Args:
        gamma: how many candidates there are for each row that is kept, at least 1; 1 ranks by the mean alone.
        score: the column with the mean of each row.
        spread: the column with its spread.
        max_ifd: rows with a mean at or above are dropped, their prompt does not help; `float("inf")` for no limit.

    Raises:
        UserError: for numbers that cannot be, and, when called, for columns that are not there.
        ShortfallError: when called, and no row is eligible.

    >>> columns = {"sifd_mean": np.array([0.9, 0.8, 0.7, 0.1]), "sifd_std": np.array([0.3, 0.1, 0.2, 0.0])}
    >>> selection = Hierarchical(gamma=1.5)(columns | {"ifd_status": np.full(4, "ok")}, budget=2)
    >>> selection.kept.tolist(), selection.reasons.tolist()
    ([1, 2], ['unstable', 'kept', 'kept', 'below_cut'])
    """

    reads_scores: ClassVar[bool] = False
    on_shortfall: ClassVar[Shortfall] = "repeat"

    gamma: float = 2.0
    score: str = "sifd_mean"
    spread: str = "sifd_std"
    max_ifd: float = 1.0

    def __post_init__(self) -> None:
        if not is_number(self.gamma) or not 1 <= self.gamma < math.inf:
            raise UserError(
                f"gamma is how many candidates there are for each kept row, at least 1, got {self.gamma!r}."
            )
        if not is_number(self.max_ifd) or not self.max_ifd > 0:
            raise UserError(f"max_ifd must be a positive number, inf for no limit, got {self.max_ifd!r}.")

    def __call__(
        self,
        columns: Mapping[str, np.ndarray],
        budget: int,
        *,
        ids: np.ndarray | None = None,
        rng: np.random.Generator | None = None,
    ) -> Selection:
        """Select `budget` of n rows; see `Policy`."""
        check_rows_wanted(budget)
        score, spread = (self._column(columns, name) for name in (self.score, self.spread))
        status = np.asarray(columns["ifd_status"], dtype=object)
        ids = np.arange(len(score)) if ids is None else np.asarray(ids)
        ok = status == Status.OK.value
        scored = ok & np.isfinite(score) & np.isfinite(spread)
        eligible = scored & (score < self.max_ifd)
        reasons = status.copy()
        reasons[ok], reasons[scored], reasons[eligible] = NO_VALUE, ABOVE_LIMIT, BELOW_CUT
        rows = np.flatnonzero(eligible)
        if not len(rows):
            raise ShortfallError(self._explain(budget, ok, scored))
        candidates = rows[np.lexsort((ids[rows], -score[rows]))][: math.ceil(self.gamma * budget)]
        reasons[candidates] = UNSTABLE
        steady = np.sort(np.argsort(spread[candidates], kind="stable")[:budget])  # the highest mean first again
        kept = candidates[steady]
        reasons[kept] = KEPT
        missing = budget - len(kept)
        kept = np.concatenate([kept, repeats(kept, missing, rng)])
        return Selection(kept, reasons, float(score[kept].min()), len(rows), missing)

    def _column(self, columns: Mapping[str, np.ndarray], name: str) -> np.ndarray:
        try:
            return np.asarray(columns[name], dtype=np.float64)
        except KeyError as error:
            raise UserError(
                f"There is no column {name!r}, which Hierarchical ranks by: IFDScorer.neighbourhood attaches it."
            ) from error

    def _explain(self, budget: int, ok: np.ndarray, scored: np.ndarray) -> str:
        return (
            f"{many(budget, 'row is', 'rows are')} to be kept, but none of {len(ok)} is eligible: "
            f"{many(int((~ok).sum()), 'has', 'have')} no score, {many(int((ok & ~scored).sum()), 'has', 'have')} no "
            f"{self.score} or {self.spread}, and {many(int(scored.sum()), 'has', 'have')} {self.score} >= "
            f"{self.max_ifd}. Raise max_ifd (float('inf') switches the limit off), or look at the prompt format."
        )
