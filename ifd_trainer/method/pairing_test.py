"""Does this answer belong to this prompt? A test of a single row, with a stated error rate.

The loss of an answer under its own prompt is held against that under the prompts of K other rows, its anchors:

    p_i = (1 + #{k: s(A_i | Q_k) <= s(A_i | Q_i)}) / (K + 1)

The answer of a mismatched row fits its prompt no better than any other: the K + 1 prompts are exchangeable, p is
uniform on 1/(K + 1), ..., 1, and p <= alpha with a probability of at most alpha. A row passes where p <= alpha. As for
the calibrated limit, this holds as long as the model has not been trained on the pair, and whatever part of answers the
losses are of.

They are of the first `tokens` of each, since the beginning of a long answer tells as much as all of it. With 24 of them
as many untouched rows passed as with 32, with 20 a few less (tests/benchmarks/README.md). Nearly all of the cost is
that of these tokens, K times, in the products of the layers. A row fails with the first anchor under which its answer
does as well, and need not be held against the others: but nine in ten rows pass and need all of them, and a p-value of
the anchors up to that one (Besag and Clifford, 1991: one over their number) ranks worse, with near anchors by far.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from ..errors import UserError
from .choices import WrongPrompts
from .error_rate import check_error_rate, check_prompts, least_measured
from .number_types import is_whole

_SHARING = 32  # rows that have the same anchors
_AMONG = 256  # at least so many prompts, if there are as many, that the near ones of some rows are looked for among


@dataclass(frozen=True)
class PairingTest:
    """Drop rows whose answers fit other prompts as well as their own.

    Only rows that would be trained on are tested, once, before they are.

    Args:
        alpha: the share of mismatched rows that may pass, in (0, 1).
        anchors: other prompts that a row's own is held against; a smaller alpha needs more.
        tokens: of an answer, from its first, whose loss is compared.
        prompts: "random" anchors, or the "near" ones: the prompts of the pool that are most like the row's own. Rows
            that were shuffled within a topic are found by these alone; clean rows whose prompt is like another's are
            lost.

    >>> test = PairingTest(alpha=0.25, anchors=3)
    >>> p = test.p_values(own=np.array([1.0, 2.0]), others=np.array([[1.5, 1.2, 3.0], [1.5, 2.5, 3.0]]))
    >>> p.tolist(), test.passes(p).tolist()
    ([0.25, 0.5], [True, False])
    """

    alpha: float = 0.1
    anchors: int = 9
    tokens: int = 24
    prompts: WrongPrompts = "random"

    def __post_init__(self) -> None:
        check_error_rate(self.alpha, self.anchors, "anchors")
        check_prompts(self.prompts)
        if not (is_whole(self.tokens) and self.tokens >= 1):
            raise UserError(f"tokens must be a whole number of at least 1, got {self.tokens!r}.")

    def draw(
        self,
        rows: np.ndarray,
        pool: np.ndarray,
        seed: int,
        nearest: Callable[[np.ndarray, int, np.ndarray], np.ndarray] | None = None,
    ) -> np.ndarray:
        """Rows whose prompts may be anchors of m rows, (m, C) positions, to be tried in this order.

        A prompt is computed once for all answers behind it. So random ones are drawn for each 32 rows together: each of
        these is held against prompts drawn at random. And near ones are looked for among as many prompts as rows are
        tested: of more, drawn at random (256, if there are as many), those that are nearest to one of these rows. C is
        twice `anchors`, since some turn out to be none, or as many as there are.

        Args:
            rows: (m,) positions, in the order of their ids.
            pool: positions that anchors are drawn from, in the order of their ids.
            nearest: of near prompts, gives the positions (m, k) of the k rows with the prompts most like those of m
                rows, nearest first, of those at some positions, which ascend.
        """
        tried, rng = 2 * self.anchors, np.random.default_rng(seed)
        if self.prompts == "near":
            among = rng.permutation(len(pool))[: max(len(rows), _AMONG)]
            found = nearest(rows, tried, np.sort(pool[among]))  # (m, C)
            shared = pd.unique(found.T.ravel())[: max(len(rows), 2 * tried)]  # the nearest of each row first
            return nearest(rows, tried, np.sort(shared)) if len(shared) else found
        tried = min(tried, len(pool))  # one that is tried twice would be no more evidence
        groups = [rng.choice(pool, tried, replace=False) for _ in range(0, len(rows), _SHARING)]
        return np.repeat(np.array(groups).reshape(-1, tried), _SHARING, axis=0)[: len(rows)]

    def p_values(self, own: np.ndarray, others: np.ndarray) -> np.ndarray:
        """(n,) p-values of answers with the losses `own` (n,) under their own prompt, and `others` (n, K) under others.

        NaN in `others` stands for a prompt under which the answer could not be scored. With fewer than 1/alpha - 1
        others nothing can be told, and p is NaN.
        """
        scored = np.isfinite(others)
        known = scored.sum(axis=1)
        at_most = (scored & (others <= own[:, None])).sum(axis=1)
        return np.where(known >= least_measured(self.alpha), (1 + at_most) / (known + 1), np.nan)

    def passes(self, p: np.ndarray) -> np.ndarray:
        """(n,) whether rows with these p-values pass; those of which nothing can be told do."""
        return ~(p > self.alpha + 1e-9)
