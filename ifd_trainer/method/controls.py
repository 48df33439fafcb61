"""Simple policies that every selection should be held against: papers find random and longest rows hard to beat.

Sources: random and balanced random, arXiv 2503.01807 and 2410.09335; longest answers, arXiv 2402.04833 and 2506.01317;
a middle band, since neither the easiest nor the hardest rows are best for all budgets.

Each chooses among the rows that can be scored (status `ok`), so that all of them have the same pool; with fewer than
the budget, rows are repeated, each as often as any other give or take one. Random rows and longest answers read no
score: the callback does not score a pool for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..errors import UserError
from .choices import Score
from .number_words import many
from .reasons import HIGHER_SCORE, KEPT, NOT_DRAWN, OUTSIDE_BAND, SHORTER_ANSWER, Status
from .selection import OwnScore, Selection, ShortfallError, check_score, coded, repeats, score_values

Columns = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class RandomRows:
    """Rows at random, others in each epoch.

    >>> columns = {"ifd": np.array([0.2, 0.9, 0.5]), "ifd_status": np.array(["ok", "ok", "truncated"])}
    >>> RandomRows()(columns, 1, rng=np.random.default_rng(0)).reasons.tolist()
    ['kept', 'not_drawn', 'truncated']
    """

    reads_scores: ClassVar[bool] = False

    def __call__(
        self, columns: Columns, budget: int, *, ids: np.ndarray | None = None, rng: np.random.Generator | None = None
    ) -> Selection:
        """Select `budget` of n rows; see `Policy`."""
        return _first(_shuffled(columns, ids, rng), columns, budget, NOT_DRAWN, rng)


@dataclass(frozen=True)
class BalancedRandom:
    """Rows at random, as many of each value of a column of the data set as there are, or as of any other.

    Args:
        column: its name, for example "source" or "category".

    >>> columns = {"ifd": np.ones(5), "ifd_status": np.full(5, "ok"), "source": np.array(["a", "a", "a", "a", "b"])}
    >>> kept = BalancedRandom("source")(columns, 2, rng=np.random.default_rng(0)).kept
    >>> sorted(columns["source"][kept].tolist())
    ['a', 'b']
    """

    reads_scores: ClassVar[bool] = False

    column: str

    def __call__(
        self, columns: Columns, budget: int, *, ids: np.ndarray | None = None, rng: np.random.Generator | None = None
    ) -> Selection:
        """Select `budget` of n rows; see `Policy`."""
        order = _shuffled(columns, ids, rng)
        groups = coded(columns[self.column])[1][order]
        starts = np.argsort(groups, kind="stable")  # the rows of a group, in their random order
        sizes = np.bincount(groups)
        turns = np.empty(len(order), dtype=np.int64)
        turns[starts] = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return _first(order[np.argsort(turns, kind="stable")], columns, budget, NOT_DRAWN, rng)


@dataclass(frozen=True)
class LongestAnswers:
    """The rows with the most answer tokens; ties by id.

    >>> columns = {"answer_tokens": np.array([3, 9, 5]), "ifd_status": np.array(["ok", "ok", "ok"])}
    >>> LongestAnswers()(columns, 2).kept.tolist()
    [1, 2]
    """

    reads_scores: ClassVar[bool] = False

    def __call__(
        self, columns: Columns, budget: int, *, ids: np.ndarray | None = None, rng: np.random.Generator | None = None
    ) -> Selection:
        """Select `budget` of n rows; see `Policy`."""
        return _first(_along(-columns["answer_tokens"], columns, ids), columns, budget, SHORTER_ANSWER, rng)


@dataclass(frozen=True)
class LowestScores:
    """The rows with the lowest IFD: the easiest; ties by id.

    >>> LowestScores()({"ifd": np.array([0.2, 0.9]), "ifd_status": np.array(["ok", "ok"])}, 1).kept.tolist()
    [0]
    """

    score: Score | OwnScore = "ifd"

    def __post_init__(self) -> None:
        check_score(self.score)

    def __call__(
        self, columns: Columns, budget: int, *, ids: np.ndarray | None = None, rng: np.random.Generator | None = None
    ) -> Selection:
        """Select `budget` of n rows; see `Policy`."""
        return _first(_along(score_values(columns, self.score), columns, ids), columns, budget, HIGHER_SCORE, rng)


@dataclass(frozen=True)
class MiddleBand:
    """The rows with the highest IFD between two percentiles of all scores, the rows at them included; ties by id.

    Args:
        low, high: percentiles, 0 <= low < high <= 100.
        score: the column that is ranked by.

    >>> columns = {"ifd": np.arange(1.0, 6.0), "ifd_status": np.full(5, "ok")}
    >>> MiddleBand(25, 75)(columns, 2).kept.tolist()
    [3, 2]
    """

    low: float = 25
    high: float = 75
    score: Score | OwnScore = "ifd"

    def __post_init__(self) -> None:
        check_score(self.score)
        if not 0 <= self.low < self.high <= 100:
            raise UserError(f"low and high are percentiles with 0 <= low < high <= 100, got {self.low}, {self.high}.")

    def __call__(
        self, columns: Columns, budget: int, *, ids: np.ndarray | None = None, rng: np.random.Generator | None = None
    ) -> Selection:
        """Select `budget` of n rows; see `Policy`."""
        order = _along(-score_values(columns, self.score), columns, ids)
        values = score_values(columns, self.score)[order]
        if len(values):
            least = np.percentile(values, self.low, method="lower")
            most = np.percentile(values, self.high, method="higher")
            order = order[(values >= least) & (values <= most)]
        return _first(order, columns, budget, OUTSIDE_BAND, rng)


def _scored(columns: Columns) -> np.ndarray:
    return np.flatnonzero(np.asarray(columns["ifd_status"]) == Status.OK.value)


def _by_id(columns: Columns, ids: np.ndarray | None) -> np.ndarray:
    """Positions of the rows with a score, in the order of their ids, wherever they stand."""
    rows = _scored(columns)
    return rows if ids is None else rows[np.argsort(np.asarray(ids)[rows], kind="stable")]


def _shuffled(columns: Columns, ids: np.ndarray | None, rng: np.random.Generator | None) -> np.ndarray:
    rows = _by_id(columns, ids)
    return rows[(rng or np.random.default_rng(0)).permutation(len(rows))]


def _along(values: np.ndarray, columns: Columns, ids: np.ndarray | None) -> np.ndarray:
    """Positions of the rows with a score, the lowest value first, ties by id."""
    rows = _by_id(columns, ids)
    return rows[np.argsort(values[rows], kind="stable")]


def _first(order: np.ndarray, columns: Columns, budget: int, reason: str, rng: np.random.Generator | None) -> Selection:
    """The first rows of an order; of those with a score, the others are dropped for one reason."""
    if not len(order):
        raise ShortfallError(
            f"{many(budget, 'row is', 'rows are')} to be kept, but none of {len(columns['ifd_status'])} can be."
        )
    reasons = np.asarray(columns["ifd_status"], dtype=object).copy()
    reasons[_scored(columns)] = reason
    kept = order[:budget]
    reasons[kept] = KEPT
    missing = budget - len(kept)
    return Selection(np.concatenate([kept, repeats(kept, missing, rng)]), reasons, float("nan"), len(order), missing)
