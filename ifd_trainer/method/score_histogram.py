"""Histograms of a score that sites may show one another, and the threshold that they agree on by them.

A site's rows never leave it. It counts how many of them score between fixed edges, e_0 < e_1 < ... < e_k, the same for
all sites, and shows the counts c_1 ... c_k alone: bins with fewer than `least` rows are merged with their neighbours,
so that each holds no row or at least so many. Of all sites together, the number of rows at or above t is then

    S(t) = sum over sites and bins of c * (the part of the bin at or above t),   and the threshold for K rows is

    t = the highest value with S(t) >= K,

which takes rows for evenly spread within a bin. How far that can be off is known exactly, and is a part of the result:
the K-th highest of all scores lies in the same stretch between two edges, one bin where none was merged.

Source: federated filtering by IRA, FedDQC (arXiv 2410.11540); there each client keeps a share of its own rows, here the
threshold is one for all, so that a client with poor rows keeps fewer.

Histograms of almost the same rows tell of the rows in which they differ: a site that shows one again after it gained or
lost a few rows tells of these few.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any

import numpy as np

from ..errors import UserError
from .choices import ROWS_TOGETHER
from .number_words import many

# Lowest and highest edge and number of bins, by the score: the same for every site, whatever its rows.
EDGES = {"ifd": (0.0, 2.0, 200), "ifd_ppl": (0.0, 2.0, 200), "ira": (-2.0, 8.0, 400)}


@dataclass(frozen=True)
class ScoreHistogram:
    """How many rows of a site score between edges; nothing else of them.

    Attributes:
        score: the name of the score.
        edges: (k + 1,) ascending; a bin is from its lower edge to below its upper one. Scores beyond the first and the
            last edge are counted in the outermost bins.
        counts: (k,) rows in each bin: none, or `least` and more.
        rows: all rows of the site, those without a score too; without them where they are fewer than `least`.
        least: rows of a bin that is shown.
        max_ifd: rows with an IFD of this or more are not counted in any bin; None for no limit.
        weights: what tells the model that scored from others; None where it is not known.

    Raises:
        UserError: for counts and edges that are none, or bins with fewer rows than `least`.
    """

    score: str
    edges: tuple[float, ...]
    counts: tuple[int, ...]
    rows: int
    least: int = ROWS_TOGETHER
    max_ifd: float | None = None
    weights: str | None = None

    def __post_init__(self) -> None:
        edges, counts = np.asarray(self.edges, dtype=np.float64), np.asarray(self.counts)
        if edges.ndim != 1 or len(edges) < 2 or not np.isfinite(edges).all() or (np.diff(edges) <= 0).any():
            raise UserError(f"edges are at least two ascending numbers, got {self.edges!r}.")
        if counts.shape != (len(edges) - 1,) or counts.dtype.kind not in "iu" or (counts < 0).any():
            raise UserError(f"counts are {len(edges) - 1} numbers of rows, one for each bin, got {self.counts!r}.")
        if ((counts > 0) & (counts < self.least)).any():
            raise UserError(f"A bin has {counts[counts > 0].min()} rows, and none or at least {self.least} are shown.")
        if not counts.sum() <= self.rows:
            raise UserError(f"The bins hold {counts.sum()} rows, and there are {self.rows}.")

    @classmethod
    def of(
        cls,
        values: np.ndarray,
        edges: Sequence[float],
        rows: int | None = None,
        *,
        score: str = "ira",
        least: int = ROWS_TOGETHER,
        max_ifd: float | None = None,
        weights: str | None = None,
    ) -> ScoreHistogram:
        """Count (m,) scores, and merge bins until each holds no row or at least `least`.

        Bins are merged from the highest down, since thresholds lie high; what is left at the lower end goes to the bin
        above it.

        Args:
            values: the scores of all rows that have one, none of them NaN.
            edges: of the bins before any is merged.
            rows: of the site, those without a score too; so many as there are scores by default.

        Raises:
            UserError: for fewer than `least` scores: nothing can be shown of them.

        >>> histogram = ScoreHistogram.of(np.array([0.1, 0.2, 0.6, 0.7, 0.9]), [0, 0.25, 0.5, 0.75, 1], least=2)
        >>> histogram.edges, histogram.counts
        ((0.0, 0.25, 0.5, 1.0), (2, 0, 3))
        """
        if len(values) < least:
            raise UserError(
                f"{many(len(values), 'row has', 'rows have')} a score, and bins of at least {least} are shown: so few "
                "rows would be told one by one. Lower --least only if that may be known of them."
            )
        edges = np.asarray(edges, dtype=np.float64)
        places = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, len(edges) - 2)
        lower, counts, waiting = [], [], 0  # of bins from the highest down
        of_bins = np.bincount(places, minlength=len(edges) - 1)
        for edge, count in zip(edges[-2::-1].tolist(), of_bins[::-1].tolist(), strict=True):
            waiting += count
            if waiting == 0 or waiting >= least:
                lower.append(edge)
                counts.append(waiting)
                waiting = 0
        while waiting:
            waiting += counts.pop()
            lower.pop()
            if waiting >= least:
                lower.append(float(edges[0]))
                counts.append(waiting)
                waiting = 0
        without = (len(values) if rows is None else rows) - len(values)
        shown = len(values) + (without if without >= least else 0)
        edges = (*reversed(lower), float(edges[-1]))
        return cls(score, edges, tuple(reversed(counts)), shown, least, max_ifd, weights)

    @property
    def above(self) -> np.ndarray:
        """Rows at or above each edge, (k + 1,): all at the first, none at the last."""
        return np.append(np.cumsum(self.counts[::-1])[::-1], 0)

    def expected(self, value: float) -> float:
        """About how many rows are at or above a value, taken for evenly spread within a bin.

        >>> ScoreHistogram("ira", (0.0, 1.0, 2.0), (10, 20), rows=30).expected(0.5)
        25.0
        """
        return float(np.interp(value, self.edges, self.above))

    def between(self, value: float) -> tuple[int, int]:
        """The fewest and the most rows that can be at or above a value.

        >>> ScoreHistogram("ira", (0.0, 1.0, 2.0), (10, 20), rows=30).between(0.5)
        (20, 30)
        """
        fewest = self.above[min(np.searchsorted(self.edges, value, side="left"), len(self.counts))]
        return int(fewest), int(self.above[max(np.searchsorted(self.edges, value, side="right") - 1, 0)])


@dataclass(frozen=True)
class SiteShare:
    """What a threshold keeps at a site.

    Attributes:
        name: of the site.
        rows: of the site.
        expected: about how many rows are at or above the threshold.
        fewest, most: between these that number lies; the site counts it.
    """

    name: str
    rows: int
    expected: float
    fewest: int
    most: int


@dataclass(frozen=True)
class Threshold:
    """A threshold that sites agreed on: a row with `score` at or above `value` is kept.

    Attributes:
        value: the threshold.
        score: the name of the score; None for a number that nobody agreed on by histograms.
        max_ifd, weights: as in the histograms.
        between: the K-th highest of all scores is at or above the first, and below the second number; infinite at an
            end where scores beyond the edges are counted.
        budget: K, the rows that all sites are to keep together.
        rows: of all sites.
        keep: as it was asked for: a fraction of `rows`, or K.
        sites: what it keeps at each site.
    """

    value: float
    score: str | None = None
    max_ifd: float | None = None
    weights: str | None = None
    between: tuple[float, float] = (-math.inf, math.inf)
    budget: int | None = None
    rows: int | None = None
    keep: float | int | None = None
    sites: tuple[SiteShare, ...] = ()


def agreed_threshold(sites: Mapping[str, ScoreHistogram], budget: int, keep: float | int | None = None) -> Threshold:
    """The threshold at or above which about `budget` rows of all sites lie, and how exactly that is known.

    Args:
        sites: their histograms by name.
        budget: K, at least 1.
        keep: what was asked for, if it was a fraction.

    Raises:
        UserError: without a site, for histograms of different scores, models, limits or ranges, and for more rows than
            have a score.

    >>> histogram = ScoreHistogram("ira", (0.0, 1.0, 2.0), (10, 20), rows=30)
    >>> found = agreed_threshold({"a": histogram, "b": histogram}, budget=10)
    >>> found.value, found.between, found.sites[0].expected
    (1.75, (1.0, inf), 5.0)
    """
    _check_alike(sites)
    histograms = list(sites.values())
    scored = sum(sum(histogram.counts) for histogram in histograms)
    rows = sum(histogram.rows for histogram in histograms)
    if not 1 <= budget <= scored:
        raise UserError(
            f"{many(budget, 'row is', 'rows are')} to be kept of {many(rows, 'row')} at {many(len(sites), 'site')}, of "
            f"which {scored} have a score below the limit: ask for at least 1 and at most {scored}, with --keep."
        )
    edges = np.unique(np.concatenate([histogram.edges for histogram in histograms]))
    above = sum(np.interp(edges, histogram.edges, histogram.above) for histogram in histograms)
    place = int(np.flatnonzero(above >= budget - 1e-9)[-1])  # sums of parts of bins are rounded
    part = max(above[place] - budget, 0.0) / (above[place] - above[place + 1])
    value = float(edges[place] + part * (edges[place + 1] - edges[place]))
    bounds = np.array([[histogram.between(edge) for edge in edges.tolist()] for histogram in histograms]).sum(axis=0)
    low = float(edges[np.flatnonzero(bounds[:, 0] >= budget)[-1]])
    high = float(edges[np.flatnonzero(bounds[:, 1] < budget)[0]])
    first = histograms[0]
    return Threshold(
        value,
        first.score,
        first.max_ifd,
        next((histogram.weights for histogram in histograms if histogram.weights), None),
        (-math.inf if low == edges[0] else low, math.inf if high == edges[-1] else high),
        budget,
        rows,
        budget if keep is None else keep,
        tuple(
            SiteShare(name, histogram.rows, histogram.expected(value), *histogram.between(value))
            for name, histogram in sites.items()
        ),
    )


def of_other_models(one: str | None, other: str | None) -> bool:
    """Whether two weights are known not to be the same.

    Where one is the commit of a hub name and the other a digest of files, they say nothing of each other.

    >>> of_other_models("12ab", "34cd"), of_other_models("12ab", "org/model@34cd"), of_other_models("12ab", None)
    (True, False, False)
    """
    return None not in (one, other) and ("@" in one) == ("@" in other) and one != other


def _check_alike(sites: Mapping[str, ScoreHistogram]) -> None:
    """Raise for histograms whose counts mean different things."""
    if not sites:
        raise UserError("A threshold is agreed from the histograms of one site or more; there is none.")

    def told(histogram: ScoreHistogram) -> dict[str, Any]:
        return {
            "The score": histogram.score,
            "The limit of IFD": histogram.max_ifd,
            "The range of edges": (histogram.edges[0], histogram.edges[-1]),
        }

    for (one, before), (other, after) in pairwise(sites.items()):
        for what, value in told(before).items():
            if value != told(after)[what]:
                raise UserError(
                    f"{what} is {value} in {one} and {told(after)[what]} in {other}: histograms are added where they "
                    "were made with the same --score, --max-ifd and --edges."
                )
    known = [(name, histogram.weights) for name, histogram in sites.items() if histogram.weights is not None]
    for (one, before), (other, after) in combinations(known, 2):
        if of_other_models(before, after):
            raise UserError(
                f"{one} was scored by the weights {before} and {other} by {after}: scores of different models have no "
                "common threshold. Score the rows of all sites with one model."
            )
