"""Facility location: few rows that stand for many, and the policy that selects with it (Superfiltering.D); k-centre.

    f(S) = sum_i max(0, max_{j in S} cos(x_i, x_j)),    |S| = k

Greedy choice reaches at least 1 - 1/e of the largest f that k rows can have. A row that is dissimilar to all chosen
rows counts as 0, as does no row at all: so f never falls when a row is added, from the first row on, and the
guarantee holds. Sources: Superfiltering (arXiv 2402.00530); Nemhauser, Wolsey and Fisher (1978).

Where we differ from the published program: its similarity of two unit vectors is exp(-distance / d), Euclidean and
without the square, which for some hundred dimensions d is nearly 1 - distance / d; here it is the cosine.

Libraries, on 5,000 x 576 with k = 500: apricot-select 0.6.1 (2021, needs the discontinued nose) finds the same rows as
plain greedy from a float64 matrix, and always holds that matrix (22 GB at 52,000 rows); submodlib-py 0.0.3 (2025)
passes the matrix through Python lists, took 15 s before the first choice, and found 495 of the 500 rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from ..errors import UserError
from .calibrated_limit import CalibratedLimit
from .choices import Score, Shortfall, Spread
from .number_types import check_rows_share, rows_of_share
from .reasons import REDUNDANT
from .selection import AmongCandidates, OwnScore, Selection, score_values

EMBEDDING = "embedding"  # the column of the rows' embeddings


def facility_location(
    embeddings: np.ndarray,
    k: int,
    *,
    memory_bytes: int = 2 << 30,
    block: int = 256,
    progress: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Choose k of n rows greedily by facility location; exactly what plain greedy chooses.

    Each step takes the row with the largest gain f(S + j) - f(S), ties to the lowest position. Gains are kept up to
    date instead of computed anew: a step only changes what a row i contributes if the new row stands for i better
    than all before. If that is so r_i times for row i, the cost is n d (n + sum_i r_i) multiplications, at most
    n^2 d (k + 1); sum_i r_i / n was 5.7 on 10,400 clustered rows with k = 1,040. (Lazy greedy, which re-evaluates
    the best candidates against all rows, needed 10.5 n evaluations there, each as dear as one row here.) With 576
    dimensions on two cores that took 3 s and 0.5 GB; 9 s if similarities are not held. 26,000 rows and k = 1,000,
    not held, took 83 s while the cores were shared; expect four times that at twice the rows.

    Unit vectors are rounded to integers just small enough that every dot product is exact in float32. So sums, ties
    and the rows chosen depend on no block size, thread count or linear algebra library. It moves a cosine by about
    1e-4, at most by about sqrt(d) / 4,000.

    Args:
        embeddings: (n, d) finite numbers. A row of zeros is similar to none, itself included.
        k: rows to choose, 1 to n. The first k' of them are what k' alone would choose.
        memory_bytes: the (n, n) similarities are held if they fit, 4 n^2 bytes; otherwise computed when needed.
        block: rows of similarities at a time, 4 n bytes each; only speed and memory depend on it.
        progress: called with the number of rows chosen so far, after each.

    Returns:
        (k,) positions in the order chosen. Once all gains are 0, the rest by position.

    Raises:
        ValueError: for embeddings that are not a finite matrix, or k outside 1 to n.

    >>> facility_location(np.array([[1.0, 0.1], [1.0, 0.0], [1.0, -0.1], [-0.2, 1.0]]), k=2).tolist()
    [1, 3]
    """
    units = _units_for(embeddings, k)  # (n, d)
    n = len(units)
    if block < 1:
        raise UserError(f"block must be at least one row, got {block}.")
    held = units @ units.T if 4 * n * n <= memory_bytes else None
    buffer = np.empty((min(block, n), n), dtype=np.float32)

    def contribution(rows: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """(n,) for each column j: sum over `rows` of clip(similarity to j, low, high) - low."""
        total = np.zeros(n)
        for start in range(0, len(rows), block):
            part = slice(start, start + block)
            similar = buffer[: len(rows[part])]  # (rows of the block, n)
            if held is None:
                np.matmul(units[rows[part]], units.T, out=similar)
            else:
                np.take(held, rows[part], axis=0, out=similar)
            np.maximum(similar, low[part, None], out=similar)
            np.minimum(similar, high[part, None], out=similar)
            total += similar.sum(axis=0, dtype=np.float64) - low[part].sum(dtype=np.float64)
        return total

    covered = np.zeros(n, dtype=np.float32)  # max_{j in S} similarity, at least 0
    gain = contribution(np.arange(n), covered, np.full(n, np.inf, dtype=np.float32))
    chosen = np.empty(k, dtype=np.int64)
    for step in range(k):
        best = chosen[step] = int(gain.argmax())  # integers: equal gains are equal, and the first one wins
        closer = np.maximum(covered, units @ units[best])
        changed = np.flatnonzero(closer > covered)
        gain -= contribution(changed, covered[changed], closer[changed])
        gain[best] = -np.inf
        covered = closer
        if progress is not None:
            progress(step + 1)
    return chosen


def k_center(embeddings: np.ndarray, k: int) -> np.ndarray:
    """Choose k of n rows greedily so that the row that is least like all chosen ones is as like them as may be.

        minimise over S, |S| = k:   max_i min_{j in S} d(x_i, x_j),    d: distance of unit vectors

    The first row is chosen first, then again and again the one that is farthest from all that are chosen, ties to the
    lowest position: at most twice the smallest such distance (Gonzalez 1985). It seeks out the edges of the data, where
    facility location seeks the middle of its clusters; so it is the choice where rare rows matter, and noise is gone.
    One pass over the n rows for each of the k, n * d numbers held.

    Args:
        embeddings, k: as for `facility_location`, whose exact integers are compared.

    Returns:
        (k,) positions in the order chosen.

    >>> k_center(np.array([[1.0, 0.1], [1.0, 0.0], [1.0, -0.1], [-0.2, 1.0]]), k=2).tolist()
    [0, 3]
    """
    units = _units_for(embeddings, k)  # (n, d)
    chosen = np.zeros(k, dtype=np.int64)
    closest = units @ units[0]  # (n,) similarity to the most similar chosen row; infinite for a chosen one
    closest[0] = np.inf
    for step in range(1, k):
        best = chosen[step] = int(closest.argmin())
        np.maximum(closest, units @ units[best], out=closest)
        closest[best] = np.inf
    return chosen


_CHOOSERS = {"facility_location": facility_location, "k_center": k_center}


@dataclass(frozen=True)
class Diverse(AmongCandidates):
    """Of the rows with the highest IFD under a limit, keep those that stand best for all of them: Superfiltering.D.

    The candidates are what `Cherry` would keep at a budget of `share`; of these, `budget` are chosen by
    `facility_location`, or by `k_center`, ties to the higher score, then to the lower row id. With fewer eligible rows
    than the budget all are kept, and `on_shortfall` decides as for `Cherry`. Source: arXiv 2402.00530, which keeps 2 %
    of the top 20 %, 1,040 of 10,400 of the 52,002 Alpaca rows: `share=10_400` to the row.

    Args:
        share: the candidates: a float in (0, 1] is a fraction of the eligible rows, an int a number of rows. Never
            fewer than the budget; with no more than that, there is nothing to choose and the result is `Cherry`'s.
        max_ifd, score, on_shortfall: as for `Cherry`.
        by: "facility_location" for rows in the middle of what they stand for, "k_center" for rows far from one another.

    >>> columns = {"ifd": np.array([0.9, 0.8, 0.7, 0.1]), "ifd_status": np.full(4, "ok")}
    >>> columns["embedding"] = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    >>> selection = Diverse(share=3)(columns, budget=2)
    >>> selection.kept.tolist(), selection.reasons.tolist()
    ([0, 2], ['kept', 'redundant', 'kept', 'below_cut'])
    """

    share: float | int = 0.2
    max_ifd: float | CalibratedLimit = 1.0
    score: Score | OwnScore = "ifd"
    on_shortfall: Shortfall = "repeat"
    by: Spread = "facility_location"

    def __post_init__(self) -> None:
        if self.by not in _CHOOSERS:
            raise UserError(f"by must be {' or '.join(map(repr, _CHOOSERS))}, got {self.by!r}.")
        check_rows_share("share", self.share)
        self.check_candidates()

    def among(self, columns: Mapping[str, np.ndarray], budget: int, *, ids: np.ndarray | None = None) -> np.ndarray:
        """Positions of the candidates, highest score first: the rows whose embeddings are looked at.

        Raises:
            ShortfallError: when no row is eligible.
        """
        eligible = self.candidates(columns, 1, ids=ids).eligible
        of = rows_of_share(self.share, eligible)
        # By score, then id: so neither the result nor a tie depends on where rows stand.
        return self.candidates(columns, max(1, min(max(of, budget), eligible)), ids=ids).kept

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
            columns: arrays (n,): the score column, NaN for none, and `ifd_status`; and `embedding`, (n, d), of which
                only the candidates' rows are looked at.
            budget, ids, rng: as for `Cherry`.

        Returns:
            The selection, highest score first; `redundant` is the reason of candidates that were not chosen.

        Raises:
            ShortfallError: as for `Cherry`.
            ValueError: without embeddings, or with some that are not finite among the candidates.
        """
        if EMBEDDING not in columns:
            raise UserError(f"Diverse compares embeddings, but there is no column {EMBEDDING!r} in {sorted(columns)}.")
        embeddings, rows = np.asarray(columns[EMBEDDING]), len(columns["ifd_status"])
        if embeddings.ndim != 2 or len(embeddings) != rows:
            raise UserError(f"{EMBEDDING!r} must be ({rows}, d), one row per score; got shape {embeddings.shape}.")
        selection = self.candidates(columns, budget, ids=ids, rng=rng)
        candidates = self.among(columns, budget, ids=ids)
        if len(candidates) <= budget:
            return selection
        selection = self.candidates(columns, len(candidates), ids=ids)
        kept = candidates[np.sort(_CHOOSERS[self.by](embeddings[candidates], budget))]
        reasons = selection.reasons.copy()
        reasons[np.setdiff1d(candidates, kept)] = REDUNDANT
        return Selection(kept, reasons, float(score_values(columns, self.score)[kept[-1]]), selection.eligible, 0)


def _units_for(embeddings: np.ndarray, k: int) -> np.ndarray:
    """What `_integer_units` gives of n embeddings, of which k can be chosen."""
    units = _integer_units(_checked(embeddings))
    if not 1 <= k <= len(units):
        raise UserError(f"k={k} rows cannot be chosen of {len(units)}; k must be 1 to {len(units)}.")
    return units


def _checked(embeddings: np.ndarray) -> np.ndarray:
    embeddings = np.asarray(embeddings)
    if embeddings.ndim != 2 or not embeddings.size or embeddings.dtype.kind not in "fiu":
        raise UserError(
            f"Embeddings must be numbers (n, d), n and d at least 1; got {embeddings.dtype} {embeddings.shape}."
        )
    bad = np.flatnonzero(~np.isfinite(embeddings).all(axis=1))
    if len(bad):
        raise UserError(
            f"{len(bad)} of {len(embeddings)} embeddings are not finite, the first in row {bad[0]}. Leave these rows "
            "out, or look at the model that made them: NaN often comes from float16."
        )
    return embeddings


def _integer_units(embeddings: np.ndarray) -> np.ndarray:
    """(n, d) float32: unit vectors times a scale, rounded to integers; zero rows stay zero.

    A float32 holds every integer up to 2^24 = 4096^2. Rounding lengthens a row by at most sqrt(d) / 2, so rows are at
    most 4096 long, and by Cauchy and Schwarz no partial sum of a dot product, in whatever order, is above 4096^2.
    """
    scale = 4095 - math.sqrt(embeddings.shape[1]) / 2
    assert scale > 0, f"{embeddings.shape[1]} dimensions are too many"
    units = np.empty(embeddings.shape, dtype=np.float32)
    for start in range(0, len(embeddings), 4096):
        part = embeddings[start : start + 4096].astype(np.float64)
        largest = np.abs(part).max(axis=1, keepdims=True)
        part /= np.where(largest > 0, largest, 1.0)  # the square of a large number would overflow
        length = np.sqrt((part * part).sum(axis=1, keepdims=True))
        units[start : start + 4096] = np.rint(scale * part / np.where(length > 0, length, 1.0))
    return units
