"""Which rows of a pool are scored anew under a budget, and what is thought of the others until they are.

To score all rows anew costs several times as much as an epoch on a tenth of them. Losses of one training state cannot
be held against those of another, though: they fall with training, so that a row that is scored anew would lose its
place to rows that were not. So some rows are drawn at random, scored, and tell how far losses have moved; the others'
last losses are moved by what these tell, and what is left of the budget goes to the rows nearest to the cut. Rows that
were trained on in between move several times as far as others; how far a loss moves depends on what it was, and on how
long the answer is (see `moves`).

What a forward over t tokens costs is t, a backward is as dear as two forwards: training on t tokens costs 3 t, scoring
a row the tokens of prompt and answer, and again those of the answer and what precedes it when it stands alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import UserError
from .number_types import is_number

TRAINED = 3  # forwards that a token costs in training: one, and a backward
_FEWEST = 2  # rows that tell how far losses of rows of their kind have moved
_PENALTY = 5.0  # of slopes: the best of 2, 5 and 20 in the runs of tests/benchmarks/README.md, by little


@dataclass(frozen=True)
class Rescoring:
    """How much is scored anew, and of what.

    Args:
        budget: share of what training on the epoch's rows costs, above 0.
        explored: share of the budget for rows drawn at random, half of it for rows that were trained on.
        stale: share of the budget for the rows whose scores are the oldest; the rest is for rows near the cut.

    >>> Rescoring(0.2, explored=0.5, stale=0.5)
    Rescoring(budget=0.2, explored=0.5, stale=0.5)
    """

    budget: float = 0.10
    explored: float = 0.25
    stale: float = 0.10

    def __post_init__(self) -> None:
        check_budget(self.budget)

    @staticmethod
    def of_training(trained_tokens: float) -> float:
        """What training on so many tokens costs, in tokens of forwards."""
        return TRAINED * trained_tokens

    def allowance(self, trained_tokens: float) -> float:
        """Tokens of forwards that an epoch on so many tokens may spend.

        >>> Rescoring(0.1).allowance(trained_tokens=1000)
        300.0
        """
        return self.budget * self.of_training(trained_tokens)

    def drawn(
        self,
        able: np.ndarray,
        trained: np.ndarray,
        scored_at: np.ndarray,
        cost: np.ndarray,
        allowance: float,
        ids: np.ndarray,
        seed: int | list[int],
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rows drawn at random, and of the others those whose scores are the oldest; positions, in their order.

        Args:
            able: (n,) bool, rows that have a score.
            trained: (n,) bool, rows that were trained on since scores were made.
            scored_at: (n,) when each row's was made.
            cost: (n,) tokens to make it anew.
            allowance: tokens of the whole budget.
            ids: (n,) by which rows are known, wherever they stand.
            seed: the same rows are drawn again by the same one.
        """
        rows = np.flatnonzero(able)
        rows = rows[np.argsort(np.asarray(ids)[rows], kind="stable")]
        rows = rows[np.random.default_rng(seed).permutation(len(rows))]
        share = self.explored * allowance
        explored = affordable(rows[trained[rows]], cost, share / 2)
        others = affordable(rows[~trained[rows]], cost, share - cost[explored].sum())
        explored = np.concatenate([explored, others])
        rest = rows[~np.isin(rows, explored)]
        rest = rest[np.argsort(scored_at[rest], kind="stable")]
        return explored, affordable(rest, cost, self.stale * allowance)

    def near(self, order: np.ndarray, cost: np.ndarray, left: float) -> np.ndarray:
        """The first of `order`, nearest to the cut, that what is left of the allowance pays for."""
        return affordable(order, cost, left)


def affordable(rows: np.ndarray, cost: np.ndarray, allowance: float) -> np.ndarray:
    """The first rows that together cost no more than an allowance; one that alone costs more is passed over.

    >>> affordable(np.array([2, 0, 1]), np.array([3.0, 2.0, 9.0]), allowance=4.0).tolist()
    [0]
    """
    rows = rows[cost[rows] <= allowance]
    return rows[: int(np.searchsorted(np.cumsum(cost[rows]), allowance, side="right"))]


def moves(old: np.ndarray, new: np.ndarray, trained: np.ndarray, features: np.ndarray) -> np.ndarray:
    """How far losses have moved, the logarithm of a factor for each row, (n,), by the rows that were measured again.

        log(new_i / old_i)  =  a + b . x_i  +  what only a forward of row i tells

    a is one number for the rows that were trained on in between and one for the others, as long as two of a kind were
    measured; b, the same for all rows, is by least squares with a penalty of `5 |b|^2`, so that a few rows say little.

    Args:
        old: (n,) the last losses.
        new: (n,) those measured again, NaN for the other rows; a pair that is not finite and above 0 does not count.
        trained: (n,) bool.
        features: (n, f) what is known of the rows; put on one scale here.

    >>> nothing = np.empty((3, 0))
    >>> moves(np.full(3, 2.0), np.array([1.0, np.nan, 1.0]), np.array([False, True, False]), nothing).round(3).tolist()
    [-0.693, -0.693, -0.693]
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        moved = np.log(new / old)
    known = np.isfinite(moved)
    if not known.any():
        return np.zeros(len(old))
    told = np.column_stack([moved, _on_one_scale(features)])
    centre = np.empty_like(told)
    for kind in (False, True):
        of_kind = known & (trained == kind)
        centre[trained == kind] = told[of_kind if of_kind.sum() >= _FEWEST else known].mean(axis=0)
    apart = told - centre
    x = apart[known, 1:]
    slopes = np.linalg.solve(x.T @ x + _PENALTY * np.eye(x.shape[1]), x.T @ apart[known, 0])
    return centre[:, 0] + apart[:, 1:] @ slopes


def _on_one_scale(features: np.ndarray) -> np.ndarray:
    """Features (n, f) with mean 0 and standard deviation 1 over the rows that have them; 0 for a row without."""
    known = np.where(np.isfinite(features), features, np.nan)
    with np.errstate(invalid="ignore", divide="ignore"):
        scaled = (known - np.nanmean(known, axis=0)) / np.nanstd(known, axis=0)
    return np.where(np.isfinite(scaled), scaled, 0.0)


def nearest(values: np.ndarray, able: np.ndarray, kept: int, known: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Positions of the rows nearest to the cut first, above and below it, ties by id.

    Args:
        values: (n,) what rows are ranked by.
        able: (n,) bool, rows that may be kept; the `kept`-th highest of them is at the cut.
        known: (n,) bool, rows that are left out, since their values are exact.
        ids: (n,) by which rows are known.

    >>> everything, nothing = np.full(4, True), np.full(4, False)
    >>> nearest(np.array([0.9, 0.1, 0.5, 0.6]), everything, kept=2, known=nothing, ids=np.arange(4)).tolist()
    [3, 2, 0, 1]
    """
    rows = np.flatnonzero(able & ~known)
    if not len(rows):
        return rows
    cut = np.sort(values[able])[-min(kept, int(able.sum()))]
    return rows[np.lexsort((np.asarray(ids)[rows], np.abs(values[rows] - cut)))]


def check_budget(budget: float) -> None:
    """Raise for what is no share of the cost of training."""
    number = is_number(budget)
    if not number or not 0 < budget < float("inf"):
        raise UserError(f"rescore_budget is a share of what training costs, above 0, such as 0.1, got {budget!r}.")
