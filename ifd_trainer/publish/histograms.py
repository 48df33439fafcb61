"""What a site shows of its scored rows: a histogram, made where the rows are (see `method.score_histogram`)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..data.table_reader import TableReader
from ..errors import UserError
from ..method.choices import RANKED_BY, ROWS_TOGETHER
from ..method.reasons import Status
from ..method.score_histogram import EDGES, ScoreHistogram
from .provenance import READ_COLUMNS, find_scores
from .select import numbers_of


def site_histogram(
    data: str,
    score: str,
    *,
    split: str = "train",
    edges: Sequence[float] | None = None,
    least: int = ROWS_TOGETHER,
    max_ifd: float | None = None,
) -> ScoreHistogram:
    """Count the rows of a scored data set by one of their scores.

    Args:
        data: rows that were scored.
        score: a column of numbers.
        split: of a folder or a hub data set.
        edges: the lowest edge, the highest one, and the number of bins between; `EDGES` by default.
        least: rows of a bin that is shown.
        max_ifd: rows with an IFD of this or more are in no bin; of an IFD 1 by default, of other scores none.

    Raises:
        UserError: for a column that is not there, a score without usual edges, and too few rows.
    """
    if edges is None and score not in EDGES:
        raise UserError(
            f"--score {score} has no usual edges: give the lowest, the highest and the number of bins, which all sites "
            "agree on, with --edges LOW HIGH BINS."
        )
    low, high, bins = EDGES[score] if edges is None else edges
    if not (low < high and float(bins).is_integer() and bins >= 1):
        raise UserError(f"--edges are a lowest one, a highest one and a number of bins, got {low:g} {high:g} {bins:g}.")
    rows = TableReader(data, split)
    scores, _, provenance = find_scores(rows.coded_frame(READ_COLUMNS), data)
    values = numbers_of(score, rows, scores)
    limited = score if score in RANKED_BY else RANKED_BY[0]
    limit = (1.0 if score in RANKED_BY else None) if max_ifd is None else max_ifd
    limit = limit if limit is not None and np.isfinite(limit) else None
    counted = (scores["ifd_status"] == Status.OK.value).to_numpy() & np.isfinite(values)
    if limit is not None:
        counted &= ~(scores[limited].to_numpy(dtype=float, na_value=np.nan) >= limit)
    if not counted.any():
        raise UserError(f"No row of {data} has a {score} to count: score it with `ifd-trainer score --scores {score}`.")
    grid = np.linspace(low, high, int(bins) + 1)
    told = {"score": score, "least": least, "max_ifd": limit, "weights": provenance.weights}
    return ScoreHistogram.of(values[counted], grid, len(rows), **told)
