"""A limit on IFD with a stated error rate, in the place of the paper's 1.

A wrong prompt is better context than the bare response header, so answers that belong to no prompt in particular have
IFDs around and below 1, and the highest IFDs below 1 are full of them. How such answers score can be measured: answers
of the pool under the prompts of other rows,

    w_k = s(A_i | Q_j) / s(A_i)    for n pairs i != j, drawn at random.

The limit is the floor(alpha (n + 1))-th smallest of them. Where a mismatched row is like such a pair (exchangeable with
it), its IFD is below the limit with a probability of at most alpha, whatever the model: the argument of split conformal
prediction. That holds for one scoring: a row that is judged in several has as many chances. It says nothing about rows
that the model has been trained on, nor about answers that were moved within one topic, which are harder to tell.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..errors import UserError
from .choices import CALIBRATED as CALIBRATED  # a name of this module too
from .choices import WRONG_PAIRS, WrongPrompts
from .error_rate import check_error_rate, check_prompts, least_measured, rank_of

_ROUNDS = 4  # of pairs that are tried, until as many as are wanted can be scored


@dataclass(frozen=True)
class CalibratedLimit:
    """How the limit is measured.

    Args:
        alpha: the share of mismatched rows that may stay below the limit, in (0, 1).
        pairs: answers that are scored under a wrong prompt; the limit of a smaller alpha needs more.
        prompts: "random" ones of other rows, or "near" ones: the prompts of the pool that are most like the row's own.
            Rows that were shuffled within a topic are like the second kind, whose limit is lower: fewer of them pass,
            and more clean rows are lost.

    >>> CalibratedLimit(alpha=0.2).limit(np.array([0.9, 1.1, 0.8, 1.0]))
    0.8
    """

    alpha: float = 0.05
    pairs: int = WRONG_PAIRS
    prompts: WrongPrompts = "random"

    def __post_init__(self) -> None:
        check_error_rate(self.alpha, self.pairs, "pairs")
        check_prompts(self.prompts)

    @classmethod
    def of(cls, alpha: float) -> CalibratedLimit:
        """With as many pairs as are usual, or as an alpha this small needs.

        >>> CalibratedLimit.of(0.05).pairs, CalibratedLimit.of(0.001).pairs
        (256, 999)
        """
        cls(alpha, sys.maxsize)  # says what is wrong with an alpha
        return cls(alpha, max(cls.pairs, least_measured(alpha)))

    def draw(
        self,
        ids: np.ndarray,
        scored: np.ndarray,
        seed: int,
        nearest: Callable[[np.ndarray, int], np.ndarray] | None = None,
    ) -> np.ndarray:
        """Rows whose answer and prompt may make a wrong pair, (m, 2) positions: answer of, prompt of.

        In rounds, each of which has every scored row once as an answer and once as a prompt; the first pairs are to be
        taken, and those that follow stand for pairs that turn out to be none (of equal prompts, or too long). Wanted
        are `wanted` of them, so that no answer counts twice unless others have none.

        Args:
            ids: (n,) by which rows are known, wherever they stand.
            scored: (n,) whether a row has a score.
            nearest: of near prompts, gives the positions (m, k) of the k rows with the prompts most like those of m
                rows, nearest first.
        """
        rows = np.flatnonzero(scored)
        rows = rows[np.argsort(np.asarray(ids)[rows], kind="stable")]
        if len(rows) < 2:
            return np.empty((0, 2), dtype=np.int64)
        rng, pairs = np.random.default_rng(seed), []
        if self.prompts == "near":
            answers = rows[rng.permutation(len(rows))[: self.pairs]]
            return np.concatenate([np.column_stack([answers, near]) for near in nearest(answers, _ROUNDS).T])
        for _ in range(_ROUNDS):
            order = rng.permutation(len(rows))
            pairs.append(np.column_stack([rows[order], rows[np.roll(order, int(rng.integers(1, len(rows))))]]))
        return np.concatenate(pairs)

    def wanted(self, scored: int) -> int:
        """How many pairs are scored, of so many rows with a score: an answer that counts twice is not more evidence."""
        return min(self.pairs, scored)

    def limit(self, wrong: np.ndarray) -> float:
        """The limit, of the scores of wrong pairs (m,); those that are NaN do not count.

        Raises:
            ValueError: for fewer finite scores than an alpha this small needs.
        """
        wrong = np.sort(np.asarray(wrong, dtype=np.float64)[np.isfinite(wrong)])
        if not rank_of(self.alpha, len(wrong)):
            raise UserError(
                f"A limit with alpha={self.alpha} takes at least {least_measured(self.alpha)} answers under a wrong "
                f"prompt; the pool gave {len(wrong)} (rows with a score, whose prompts and answers are not those of "
                "all others). Raise alpha, or set a limit of your own: max_ifd=1.0."
            )
        return float(wrong[rank_of(self.alpha, len(wrong)) - 1])
