"""What a difference between two arms is worth: intervals over rows and seeds, and what could have been shown.

Two arms are trained with the same seeds and evaluated on the same rows. What is left of a difference if other seeds
were drawn, and other rows? Both vary, crossed with one another:

    d[s, i]   loss of one arm less that of the other, of row i with seed s; a row has the weight w[i], its tokens
    D[s]      sum_i w[i] d[s, i] / sum_i w[i], the difference with seed s
    r[i]      mean_s d[s, i], that of row i
    theta     mean_s D[s], the difference

The variance of theta is what seeds add and what rows add, V = var(D) / S + V_rows, where V_rows is that of a ratio
(linearised) and, where rows come in groups, clustered by them (arXiv 2411.00640). What both share, a seed's effect on
a row, is counted twice, which is on the safe side. Few seeds are few degrees of freedom: the interval is that of
Student's t, with the harmonic mean of Satterthwaite's degrees and of S - 1. Satterthwaite's alone give false alarms
where seeds matter most: at levels of 5 and 0.5 %, 7 and 2.3 % with three seeds in simulations of two like arms, and
4.6 and 0.4 % with the mean (6,000 draws). Beside it stands a bootstrap (BCa) that draws rows and seeds anew. It asks
for no distribution, but takes three seeds for all there are (19 % false alarms there), so a difference is shown where
both leave zero out.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from ..errors import UserError

ALPHA = 0.05  # of all arms of a comparison together
POWER = 0.8  # with which the smallest difference is one that would have been shown
_RESAMPLES = 2000
_MOST = 10**6  # of seeds or rows that are worth naming


@dataclass(frozen=True)
class Difference:
    """A difference between two arms, and how well it is known.

    Attributes:
        mean: theta, below 0 where the first arm has the lower loss.
        low, high: the interval at the level asked for.
        boot_low, boot_high: that of the bootstrap.
        p: of no difference, two-sided, before any correction for several arms.
        smallest: the smallest difference that would have been shown in `POWER` of such comparisons.
        seeds, rows: how many there were.
        seeds_needed, rows_needed: how many of one, the other as it is, would show a difference of this size; None
            where no number would.
        of_seeds, of_rows: what each adds to the variance.
    """

    mean: float
    low: float
    high: float
    boot_low: float
    boot_high: float
    p: float
    smallest: float
    seeds: int
    rows: int
    seeds_needed: int | None
    rows_needed: int | None
    of_seeds: float
    of_rows: float

    @property
    def shown(self) -> bool:
        """Whether both intervals leave zero out."""
        return self.low * self.high > 0 and self.boot_low * self.boot_high > 0


def difference(
    one: np.ndarray,
    other: np.ndarray,
    weights: np.ndarray | None = None,
    groups: np.ndarray | None = None,
    arms: int = 1,
    seed: int = 0,
) -> Difference:
    """What is known of the difference of two arms.

    Args:
        one, other: (S, n) losses of n rows with S seeds; at least two of both.
        weights: (n,) of the rows, such as their tokens; all alike by default.
        groups: (n,) what rows belong to, where some are more alike than others; each to itself by default.
        arms: how many differences are asked about in one comparison: the level is 1 - ALPHA / arms (Bonferroni).
        seed: of the bootstrap.

    Raises:
        UserError: for fewer than two seeds or rows, or losses that are not finite.

    >>> one = np.array([[1.0, 2.0], [1.2, 2.2]])
    >>> found = difference(one, one + 0.5)
    >>> round(found.mean, 6), found.shown
    (-0.5, True)
    """
    delta = np.asarray(one, dtype=float) - np.asarray(other, dtype=float)
    seeds, rows = delta.shape
    if seeds < 2 or rows < 2:
        raise UserError(f"A difference wants at least 2 seeds and 2 rows to vary over, got {seeds} and {rows}.")
    if not np.isfinite(delta).all():
        raise UserError("A difference is made of finite losses; leave rows out that an arm has no loss of.")
    weights = np.ones(rows) if weights is None else np.asarray(weights, dtype=float)
    of = np.arange(rows) if groups is None else np.unique(np.asarray(groups).astype(str), return_inverse=True)[1]
    share = weights / weights.sum()
    by_seed, by_row = delta @ share, delta.mean(axis=0)
    mean = float(by_seed.mean())
    of_seeds = float(by_seed.var(ddof=1) / seeds)
    of_rows, clusters = _of_rows(np.bincount(of, weights=share * (by_row - mean)))
    level = ALPHA / arms
    width, freedom = _width(of_seeds, of_rows, seeds, clusters, 1 - level / 2)
    error = np.sqrt(of_seeds + of_rows)
    p = 2 * stats.t.sf(abs(mean) / error, freedom) if error > 0 else float(mean == 0)
    boot = _bootstrapped(delta * weights, weights, of, 1 - level, seed)
    needed = [_needed(abs(mean), of_seeds, of_rows, seeds, clusters, level, more_seeds) for more_seeds in (True, False)]
    rows_needed = None if needed[1] is None else int(np.ceil(needed[1] * rows / clusters))
    return Difference(
        mean,
        mean - width,
        mean + width,
        *boot,
        float(p),
        float(width + error * stats.t.ppf(POWER, freedom)),
        seeds,
        rows,
        needed[0],
        rows_needed,
        of_seeds,
        of_rows,
    )


def _of_rows(residuals: np.ndarray) -> tuple[float, int]:
    """The variance that rows add, of the weighted residuals of groups (their sum is 0), and the number of groups."""
    count = len(residuals)
    if count < 2:
        raise UserError("All rows belong to one group: nothing tells how much other rows would differ.")
    return float((residuals**2).sum() * count / (count - 1)), count


def _width(of_seeds: float, of_rows: float, seeds: float, rows: float, quantile: float) -> tuple[float, float]:
    """Half of an interval, and the degrees of freedom of its t."""
    total = of_seeds + of_rows
    if total == 0:
        return 0.0, seeds - 1.0
    satterthwaite = total**2 / (of_seeds**2 / (seeds - 1) + of_rows**2 / (rows - 1))
    freedom = 2 / (1 / satterthwaite + 1 / (seeds - 1))
    return float(stats.t.ppf(quantile, freedom) * np.sqrt(total)), float(freedom)


def _needed(
    wanted: float, of_seeds: float, of_rows: float, seeds: int, rows: int, level: float, more_seeds: bool
) -> int | None:
    """So many seeds, or rows, would show a difference of this size with `POWER`; None where no number would."""

    def shows(count: int) -> bool:
        of = (of_seeds * seeds / count, of_rows) if more_seeds else (of_seeds, of_rows * rows / count)
        counts = (count, rows) if more_seeds else (seeds, count)
        width, freedom = _width(*of, *counts, 1 - level / 2)
        return width + np.sqrt(sum(of)) * stats.t.ppf(POWER, freedom) <= wanted

    if not shows(_MOST):
        return None
    low, high = 2, _MOST  # `shows` goes from False to True
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if shows(middle) else (middle + 1, high)
    return low


def _bootstrapped(
    weighted: np.ndarray, weights: np.ndarray, of: np.ndarray, level: float, seed: int
) -> tuple[float, float]:
    """The BCa interval of theta with seeds and groups of rows drawn anew, of weighted differences (S, n)."""
    weighted = np.stack([np.bincount(of, weights=line) for line in weighted])
    weights = np.bincount(of, weights=weights)
    if np.ptp(weighted / weights) == 0:  # nothing varies, which BCa divides by
        value = float(weighted[0, 0] / weights[0])
        return value, value

    def theta(seeds: np.ndarray, rows: np.ndarray, axis: int = -1) -> np.ndarray:
        # Indices, (..., S) and (..., n); scipy draws them, and leaves one out.
        seeds, rows = seeds.astype(int), rows.astype(int)
        sums = weighted[seeds[..., :, None], rows[..., None, :]].sum(axis=(-1, -2))
        return sums / (weights[rows].sum(axis=-1) * seeds.shape[-1])

    return bca(theta, (len(weighted), len(weights)), _RESAMPLES, level, seed, vectorized=True, batch=100)


def bca(
    statistic: Callable[..., Any], counts: tuple[int, ...], resamples: int, level: float, seed: int, **options: Any
) -> tuple[float, float]:
    """The BCa interval of a statistic of indices, which are drawn anew from so many of each kind.

    Args:
        statistic: of an array of indices for each of `counts`.
        level: of confidence.
        options: of `scipy.stats.bootstrap`, such as `vectorized`.

    Returns:
        Its ends, nan where the distribution is degenerate.

    >>> values = np.array([1.0, 2.0, 3.0, 4.0])
    >>> low, high = bca(lambda rows: values[rows.astype(int)].mean(), (4,), 200, 0.9, seed=0, vectorized=False)
    >>> bool(low < values.mean() < high)
    True
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a degenerate distribution
        found = stats.bootstrap(
            tuple(map(np.arange, counts)),
            statistic,
            n_resamples=resamples,
            confidence_level=level,
            method="BCa",
            rng=np.random.default_rng(seed),
            **options,
        ).confidence_interval
    return float(found.low), float(found.high)
