"""Weights of rows in the training loss from a column of the data set, on top of any policy.

    loss of a batch  =  sum_i w_i sum_t l_it / N        l_it: the loss of token t of row i;  N: as without weights

A weight of 2 counts a row as if it stood twice in its batch, one of 0 takes its gradient away and leaves its place.
N stays the number of trained tokens, so weights whose mean is not 1 make steps that much larger or smaller.

Source: users' requests (trl#5761, LLaMA-Factory#5033).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np

from ..errors import UserError
from .selection import Cherry, Policy, Selection


@dataclass(frozen=True)
class Weighted:
    """The rows of another policy, with weights in the loss that a column says.

    In a run, epochs that train on all rows, or on the sample of a brief experience, have these weights too. Where the
    other policy gives weights itself, as `InfoBatch` does, they are multiplied.

    Args:
        by: the column, of numbers of at least 0.
        policy: what chooses the rows; any that the callback takes.

    >>> columns = {"ifd": np.array([0.2, 0.9]), "ifd_status": np.full(2, "ok"), "trust": np.array([1.0, 0.5])}
    >>> selection = Weighted("trust")(columns, budget=2)
    >>> selection.kept.tolist(), selection.weights.tolist()
    ([1, 0], [0.5, 1.0])
    """

    gives_weights: ClassVar[bool] = True

    by: str
    policy: Policy = field(default_factory=Cherry)

    def __post_init__(self) -> None:
        if not (isinstance(self.by, str) and self.by):
            raise UserError(f"by is the name of a column of weights, got {self.by!r}.")
        if not callable(self.policy) or isinstance(self.policy, (type, Weighted)):
            raise UserError(f"policy is what chooses the rows, such as Cherry(); got {self.policy!r}.")

    def __call__(
        self,
        columns: Mapping[str, np.ndarray],
        budget: int,
        *,
        ids: np.ndarray | None = None,
        rng: np.random.Generator | None = None,
    ) -> Selection:
        """Select `budget` of n rows; see `Policy`."""
        selection = self.policy(columns, budget, ids=ids, rng=rng)
        return self.weigh(selection, columns[self.by], ids)

    def weigh(self, selection: Selection, values: np.ndarray, ids: np.ndarray | None = None) -> Selection:
        """A selection from n rows with the weights that a column of (n,) values gives them.

        Raises:
            UserError: for a kept row whose weight is no number, or below 0; it names the row by its id.
        """
        try:
            weights = np.asarray(values, dtype=np.float64)[selection.kept]
        except (TypeError, ValueError) as error:
            raise UserError(f"The column {self.by!r} holds no numbers, which weights have to be.") from error
        wrong = ~(np.isfinite(weights) & (weights >= 0))
        if wrong.any():
            row = selection.kept[np.argmax(wrong)]
            raise UserError(
                f"Row {row if ids is None else np.asarray(ids)[row]} has {self.by} {np.asarray(values)[row]}: a weight "
                "is a number of at least 0. Fill in 1 for rows that are to count as others do."
            )
        return replace(selection, weights=weights if selection.weights is None else weights * selection.weights)
