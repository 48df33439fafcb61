"""The sample for the brief experience: rows of every kind of prompt, none too easy and none too odd.

k-means over the rows' prompt embeddings; in each cluster the rows between two percentiles of that cluster's prompt
perplexity; of these, evenly spaced ones. With 100 clusters and 10 rows of each, 1,000 rows on which one epoch gives
the pre-experienced model. Source: arXiv 2308.12032, section 2.1.

Where we differ from the published program: it takes the middle rows of a cluster in the order of the file, with a
step rounded down, so that the end of the file is left out where the step does not divide; here they are taken in the
order of their perplexity, over its whole range.

Measured on clustered rows of 576 numbers, 100 clusters, two seeds each: seconds of `KMeans` with one start on two
threads of a busy machine; those of `MiniBatchKMeans` and its inertia relative to `KMeans`; seconds of `brief_sample`,
one thread, once the machine was idle:

    rows                1,000         5,000         20,000         52,000
    KMeans              0.3           0.5           9.3            11
    MiniBatchKMeans     0.4, 0.994    0.8, 1.007    3.7, 1.002     2.1, 0.997
    brief_sample        0.1           0.5           2.8            5.7 (one seed)
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import numpy as np

from ..errors import UserError
from .choices import BRIEF_ROWS, BriefRows
from .number_words import many

LARGEST_KMEANS = 100_000  # rows, some ten seconds by what was measured; above, batches, which are hardly worse


@dataclass(frozen=True)
class Brief:
    """Which rows give the brief experience, and how many: a policy that maps prompts to exactly `rows(n)` of n rows.

    Args:
        method: "kmeans", as in the paper (`brief_sample`), or "random" rows.
        clusters, per_cluster, max_share: of a large pool 100 x 10 rows, of a small one fewer; see `sample_shape`.
        low, high: percentiles of a cluster's prompt perplexities between which rows are taken.

    >>> Brief().rows(52_002), Brief().rows(300)
    (1000, 30)
    """

    method: BriefRows = "kmeans"
    clusters: int = 100
    per_cluster: int = 10
    low: float = 25
    high: float = 75
    max_share: float = 0.1

    def __post_init__(self) -> None:
        if self.method not in BRIEF_ROWS:
            raise UserError(f"method must be 'kmeans' or 'random', got {self.method!r}.")
        _check_percentiles(self.low, self.high)
        sample_shape(1, self.clusters, self.per_cluster, self.max_share)  # says what is wrong with these

    def rows(self, pool: int) -> int:
        """Rows of the sample of so large a pool."""
        return math.prod(sample_shape(pool, self.clusters, self.per_cluster, self.max_share))

    def __call__(
        self, embeddings: np.ndarray | None, perplexity: np.ndarray, *, ids: np.ndarray | None = None, seed: int = 0
    ) -> np.ndarray:
        """Choose `rows(n)` of n rows.

        k-means may give fewer (small clusters, unusable rows): the rest are then other usable rows, drawn by the
        seed; if there are none, rows of the sample again.

        Args:
            embeddings: (n, d) of the prompts; not looked at by "random".
            perplexity: (n,) of the prompts; a row with NaN is not chosen.
            ids: (n,) unique row ids, on which the choice depends in place of the rows' order; positions by default.
            seed: of k-means and of what is drawn.

        Returns:
            (rows(n),) positions.

        Raises:
            ValueError: when no row is usable.
        """
        shape = sample_shape(len(perplexity), self.clusters, self.per_cluster, self.max_share)
        count = math.prod(shape)
        ids = np.arange(len(perplexity)) if ids is None else np.asarray(ids)
        usable = np.isfinite(perplexity)
        if self.method == "kmeans":
            chosen = brief_sample(
                embeddings,
                perplexity,
                clusters=shape[0],
                per_cluster=shape[1],
                low=self.low,
                high=self.high,
                seed=seed,
                ids=ids,
                max_share=1.0,
            )
            usable &= np.isfinite(embeddings).all(axis=1)
        elif not usable.any():
            raise UserError(f"None of {many(len(usable), 'row')} has a prompt, so none can be sampled.")
        else:
            chosen = np.empty(0, dtype=np.int64)
        others = np.setdiff1d(np.flatnonzero(usable), chosen)
        others = others[np.argsort(ids[others], kind="stable")]
        drawn = np.random.default_rng(seed).permutation(others)[: max(count - len(chosen), 0)]
        return np.resize(np.concatenate([chosen, drawn]), count)


def brief_sample(
    embeddings: np.ndarray,
    perplexity: np.ndarray,
    *,
    clusters: int = 100,
    per_cluster: int = 10,
    low: float = 25,
    high: float = 75,
    seed: int = 0,
    ids: np.ndarray | None = None,
    max_share: float = 0.1,
) -> np.ndarray:
    """Choose up to clusters x per_cluster of n rows for the brief experience.

    A row whose perplexity or embedding is not finite takes no part. A cluster with fewer than `per_cluster` rows gives
    them all (as published); any other gives rows from its middle, one at least, and all if they are fewer than
    `per_cluster`. So the sample can be smaller than asked for, but never larger. Rows with equal embeddings share a
    cluster; where fewer embeddings are distinct than clusters are asked for, there are only as many clusters.

    Args:
        embeddings: (n, d), compared by Euclidean distance.
        perplexity: (n,) of the prompts; NaN for rows without one.
        clusters, per_cluster: for a large pool; a small one gets fewer of both, see `sample_shape`.
        low, high: percentiles of a cluster's perplexities, both included; 0 <= low < high <= 100.
        seed: of k-means. Global random states are neither read nor changed.
        ids: (n,) unique row ids. k-means depends on the order of its rows, so they are put in the order of their
            ids: with ids, the same rows are chosen wherever they stand. Without, positions are the ids.
        max_share: the largest share of the usable rows that the sample may have, in (0, 1].

    Returns:
        (m,) positions, ascending, each once. The same for the same arguments, on one machine: k-means runs on one
        thread, since the last bits of its centres depend on the number of threads. On another machine, a row halfway
        between two clusters may fall to the other one.

    Raises:
        ValueError: for no usable row, arrays that do not belong together, or options out of range.

    >>> brief_sample(np.array([[0.0], [0.1], [0.2], [9.0]]), np.array([3.0, 7.0, 5.0, np.nan]), max_share=0.3).tolist()
    [2]
    """
    _check_percentiles(low, high)
    embeddings, perplexity = np.asarray(embeddings), np.asarray(perplexity, dtype=np.float64)
    ids = np.arange(len(perplexity)) if ids is None else np.asarray(ids)
    if embeddings.ndim != 2 or perplexity.ndim != 1 or not len(embeddings) == len(perplexity) == len(ids):
        raise UserError(
            "embeddings must be (n, d), perplexity and ids (n,); got shapes "
            f"{embeddings.shape}, {perplexity.shape} and {ids.shape}."
        )
    usable = np.isfinite(perplexity) & np.isfinite(embeddings).all(axis=1)
    rows = np.flatnonzero(usable)
    if not len(rows):
        raise UserError(
            f"None of {many(len(usable), 'row')} can be sampled: {np.isfinite(perplexity).sum()} have a finite "
            f"perplexity, {np.isfinite(embeddings).all(axis=1).sum()} a finite embedding. Look at the "
            "prompts: are they empty?"
        )
    rows = rows[np.argsort(ids[rows], kind="stable")]
    clusters, per_cluster = sample_shape(len(rows), clusters, per_cluster, max_share)
    labels = _cluster(embeddings[rows], clusters, seed)
    members = [rows[labels == label] for label in range(clusters)]
    return np.sort(np.concatenate([m[_middle(perplexity[m], per_cluster, low, high)] for m in members]))


def sample_shape(rows: int, clusters: int = 100, per_cluster: int = 10, max_share: float = 0.1) -> tuple[int, int]:
    """(clusters, rows of each) for a pool of so many usable rows.

    A pool whose `max_share` is less than clusters x per_cluster gets fewer of both, in the same proportion as far as
    whole numbers go: per_cluster is multiplied by the square root of what is allowed over what is asked for and
    rounded, and there are as many clusters as then fit. At a tenth of the pool, an average cluster has ten times, and
    its middle half five times as many rows as are taken of it.

    >>> [sample_shape(rows) for rows in (52_002, 10_000, 5_000, 1_000, 300, 10)]
    [(100, 10), (100, 10), (71, 7), (33, 3), (15, 2), (1, 1)]
    """
    if clusters < 1 or per_cluster < 1:
        raise UserError(f"clusters and per_cluster must be at least 1, got {clusters} and {per_cluster}.")
    if not 0 < max_share <= 1:
        raise UserError(f"max_share must be in (0, 1], got {max_share}.")
    allowed = max(1, int(rows * max_share + 1e-9))  # 0.29 * 100 is a little less than 29
    if clusters * per_cluster <= allowed:
        return clusters, per_cluster
    per_cluster = max(1, round(per_cluster * math.sqrt(allowed / (clusters * per_cluster))))
    per_cluster = min(per_cluster, allowed)
    return min(clusters, allowed // per_cluster), per_cluster


def _check_percentiles(low: float, high: float) -> None:
    if not 0 <= low < high <= 100:
        raise UserError(f"low and high are percentiles with 0 <= low < high <= 100, got {low} and {high}.")


def _cluster(embeddings: np.ndarray, clusters: int, seed: int) -> np.ndarray:
    """(n,) labels by k-means."""
    from sklearn.cluster import KMeans, MiniBatchKMeans  # takes a second to import, and not every run needs it
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    if len(embeddings) <= LARGEST_KMEANS:
        means = KMeans(clusters, n_init=1, random_state=seed)
    else:
        means = MiniBatchKMeans(clusters, n_init=3, random_state=seed)
    with warnings.catch_warnings(), threadpool_limits(1):
        # It warns where fewer rows are distinct than clusters are asked for; the others stay empty, as documented.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return means.fit(embeddings.astype(np.float32)).labels_


def _middle(perplexity: np.ndarray, count: int, low: float, high: float) -> np.ndarray:
    """Positions of `count` evenly spaced values between two percentiles, ties in order; all of fewer than `count`.

    Where no value lies between the percentiles, as of two values, it is the lower median.
    """
    if len(perplexity) < count:
        return np.arange(len(perplexity))
    ordered = np.argsort(perplexity, kind="stable")
    least, most = np.percentile(perplexity, [low, high])
    middle = ordered[(perplexity[ordered] >= least) & (perplexity[ordered] <= most)]
    if not len(middle):
        return ordered[(len(ordered) - 1) // 2, None]
    if len(middle) <= count:
        return middle
    return middle[(2 * np.arange(count) + 1) * len(middle) // (2 * count)]  # the middles of `count` equal stretches
