"""Is an answer finished? A threshold on the loss of its end of turn.

An answer that was cut off in the middle is followed by an end of turn that surprises the model:

    e_i = -log P(end of turn | Q_i, A_i)    nats; SmolLM2-135M-Instruct: about 1.3 for whole answers, 20 for cut ones

How surprised it is by answers that end too early can be measured on the pool itself: answers of the pool, each cut off
behind a token chosen at random, and what ends a turn behind that, losses c_k. The threshold t is the one of them at
which the two errors together are smallest (Youden's index, with the pool, which is mostly whole, in the place of whole
answers):

    t = argmin_t  share of c_k < t  +  share of e_i >= t

An answer that was cut off like these is missed with about the probability that one of them is below t. How many whole
answers are lost depends on how well the model knows where turns end. A base model that has never seen this end-of-turn
token does not: whole answers then score as high as cut ones, and nothing is dropped.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .error_rate import check_error_rate, least_measured
from .number_words import many

MOST_LOST = 0.1  # of the whole answers: a signal that costs more says too little
_LEAST_LOSS = 1e-6  # of a model that is sure


@dataclass(frozen=True)
class Unfinished:
    """Drop rows whose answers stop before their end.

    Args:
        alpha: the most of the cut answers that may pass for finished, in (0, 1); a signal that misses more says too
            little, and nothing is dropped.
        cuts: answers that are cut to measure the threshold; a smaller alpha needs more.

    >>> Unfinished(alpha=0.2).threshold(eot_loss=np.full(50, 1.0), cut=np.array([9.0, 20.0, 14.0, 30.0]))
    9.0
    """

    alpha: float = 0.1
    cuts: int = 128

    def __post_init__(self) -> None:
        check_error_rate(self.alpha, self.cuts, "cuts")

    def draw(self, ids: np.ndarray, tokens: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Which answers are cut, (m,) positions, and how many tokens are left of each, (m,), at least one.

        Args:
            ids: (n,) by which rows are known, wherever they stand.
            tokens: (n,) of the answers whose end of turn has a loss, 0 for others; those of one token cannot be cut.
        """
        rows = np.flatnonzero(tokens > 1)
        rows = rows[np.argsort(np.asarray(ids)[rows], kind="stable")]
        rng = np.random.default_rng(seed)
        rows = rows[rng.permutation(len(rows))[: self.cuts]]
        return rows, rng.integers(1, tokens[rows])

    def threshold(self, eot_loss: np.ndarray, cut: np.ndarray) -> float:
        """The loss from which on an answer is unfinished; infinity where the signal says too little.

        It says too little where more than alpha of the cut answers are missed, where most rows would be dropped, or
        more than a tenth of the whole ones. How many these are is not known; were the logarithms of their losses
        normal, with the median and the lower quartile of the losses below t, it would be

            1 - Phi((log t - log median) / sigma),    sigma = (log median - log lower quartile) / 0.674

        Args:
            eot_loss: (n,) of the pool's rows, NaN for rows without one.
            cut: (m,) of cut answers.
        """
        eot_loss, cut = (np.sort(values[np.isfinite(values)]) for values in (eot_loss, cut))
        if len(cut) < least_measured(self.alpha) or not len(eot_loss):
            return float("inf")
        missed = np.searchsorted(cut, cut) / len(cut)  # (m,) of the cuts, at each of them as the threshold
        found = 1 - np.searchsorted(eot_loss, cut) / len(eot_loss)  # (m,) of the pool
        best = len(cut) - 1 - int(np.argmin((missed + found)[::-1]))  # of equals the highest: it drops fewest
        if missed[best] > self.alpha or found[best] > 0.5:
            return float("inf")
        quartile, median = np.log(np.maximum(np.percentile(eot_loss[eot_loss < cut[best]], [25, 50]), _LEAST_LOSS))
        deviations = 0.674 * (np.log(cut[best]) - median) / max(median - quartile, _LEAST_LOSS)
        whole_lost = math.erfc(deviations / math.sqrt(2)) / 2
        return float(cut[best]) if whole_lost <= MOST_LOST else float("inf")


def too_little(eot_loss: np.ndarray, cut: np.ndarray) -> str:
    """Why no row is dropped as unfinished, for a user: what was measured where the threshold is infinite.

    Args:
        eot_loss: (n,) of the pool's rows, NaN for rows without one; not all of them are.
        cut: (m,) of cut answers.

    >>> print(too_little(np.array([19.0, 20.0, np.nan]), np.array([21.0])))  # doctest: +ELLIPSIS
    the end-of-turn token tells ... (its loss is 19.5 nats behind the rows' answers, 21.0 behind 1 answer cut off ...
    """
    medians = f"{np.nanmedian(eot_loss):.1f} nats behind the rows' answers"
    if len(cut):
        medians += f", {np.median(cut):.1f} behind {many(len(cut), 'answer')} cut off at random, medians"
    return (
        f"the end-of-turn token tells too little about which answers are finished (its loss is {medians}). A base "
        "model that has not learned this token is like that, and a pool of few rows."
    )
