"""Scores and a budget to the part of a data set that is kept, with numbers that mean what they say.

A fraction is one of all rows of the pool, scorable or not, refused or not; the number of kept rows is exact; equal
scores are told apart by row id; fewer eligible rows than asked for are a warning with counts, or an error.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from ..data.row_ids import find_ids
from ..data.table_reader import TableReader
from ..method.reasons import ABOVE_LIMIT, BELOW_CUT, KEPT, REFUSAL, Status
from ..method.schedule import as_schedule
from ..method.selection import Cherry, ShortfallError, coded


@dataclass(frozen=True)
class Subset:
    """What was kept of a pool.

    Attributes:
        keep: the budget as it was given, a fraction of the pool or a number of rows.
        asked: the budget in rows.
        reasons: (n,) `kept`, or why not; categorical, not an object for each row.
        ranks: (n,) Int64, 1 for the highest score, null for rows that are not kept.
        cut: lowest score kept.
        eligible: rows with a score under the limit that are no refusals.
        score, max_ifd: the column that was ranked by, and the limit.
    """

    keep: float | int
    asked: int
    reasons: pd.Categorical
    ranks: pd.Series
    cut: float
    eligible: int
    score: str
    max_ifd: float

    @property
    def pool(self) -> int:
        """Number of rows that were chosen from, the denominator of every share."""
        return len(self.reasons)

    @property
    def kept(self) -> int:
        """Number of rows kept."""
        return self.counts[KEPT]

    @cached_property
    def counts(self) -> dict[str, int]:
        """Rows by reason, `kept` first, then the most frequent; they add up to the pool."""
        names, codes = coded(self.reasons)
        counts = Counter(dict(zip(names.tolist(), np.bincount(codes, minlength=len(names)).tolist(), strict=True)))
        rest = sorted((item for item in counts.items() if item[0] != KEPT), key=lambda item: (-item[1], item[0]))
        return {KEPT: counts[KEPT], **dict(rest)}

    @property
    def shortfall(self) -> str | None:
        """What to tell a user who asked for more rows than are eligible."""
        return _shortfall(self) if self.kept < self.asked else None


def choose(
    score: np.ndarray,
    status: np.ndarray | pd.Series,
    keep: float | int,
    *,
    name: str = "ifd",
    max_ifd: float = 1.0,
    ids: np.ndarray | pa.ChunkedArray | None = None,
    refusals: np.ndarray | None = None,
    strict: bool = False,
) -> Subset:
    """Keep the rows with the highest score under the limit.

    Args:
        score: (n,) the score to rank by, NaN where there is none.
        status: (n,) `ifd_status`.
        keep: a fraction of the n rows, or a number of rows.
        name: name of the score, "ifd" or "ifd_ppl".
        max_ifd: rows with a score of this or more are dropped.
        ids: (n,) row ids that break ties, lowest first, numbers or texts; positions by default.
        refusals: (n,) rows to drop as refusals, whatever their score.
        strict: a shortfall is an error.

    Raises:
        ShortfallError: when no row is eligible, or fewer than asked for with `strict`.

    >>> subset = choose(np.array([0.2, 0.9, 1.3, np.nan]), np.array(["ok", "ok", "ok", "too_short"]), 0.25)
    >>> subset.counts
    {'kept': 1, 'above_limit': 1, 'below_cut': 1, 'too_short': 1}
    """
    policy = Cherry(max_ifd, name, "error")
    score = np.asarray(score, dtype=np.float64)
    names, codes = coded(status)
    if refusals is not None:
        names, codes = np.append(names, REFUSAL), np.where(refusals, len(names), codes)
    status = _categorical(names, codes)
    asked = as_schedule(keep).budget(0, len(score))
    ok = np.asarray(status == Status.OK.value)
    eligible = ok & (score < max_ifd)
    count = int(eligible.sum())
    ranks, unranked = np.zeros(len(score), dtype=np.int64), np.ones(len(score), dtype=bool)
    if count == 0 or (strict and count < asked):
        reasons = np.where(ok & np.isfinite(score), ABOVE_LIMIT, names[codes])
        reasons[eligible] = BELOW_CUT
        none = pd.Series(pd.arrays.IntegerArray(ranks, unranked))
        reasons = pd.Categorical(reasons)
        raise ShortfallError(_shortfall(Subset(keep, asked, reasons, none, float("nan"), count, name, max_ifd)))
    budget = min(asked, count)
    if ids is not None and not isinstance(ids, np.ndarray):
        ids = _ranks_in_ties(score, ids, eligible, budget)
    selection = policy({name: score, "ifd_status": status}, budget, ids=ids)
    ranks[selection.kept] = np.arange(1, len(selection.kept) + 1)
    unranked[selection.kept] = False
    ranks = pd.Series(pd.arrays.IntegerArray(ranks, unranked))
    reasons = _categorical(*coded(selection.reasons))
    return Subset(keep, asked, reasons, ranks, selection.cut, count, name, max_ifd)


def _categorical(names: np.ndarray, codes: np.ndarray) -> pd.Categorical:
    """Texts by their numbers, at a byte each; of names that are equal, the first stands for all."""
    first, unique = pd.factorize(names)
    return pd.Categorical.from_codes(first.astype(np.min_scalar_type(-len(names) - 1))[codes], unique)


def _ranks_in_ties(score: np.ndarray, ids: pa.ChunkedArray, eligible: np.ndarray, budget: int) -> np.ndarray:
    """Ranks of the ids among the rows that may be kept and share their score with another one; 0 elsewhere.

    To sort ten million texts would take longer than all the rest.
    """
    rows = np.flatnonzero(eligible)
    rows = rows[score[rows] >= np.partition(score[rows], len(rows) - budget)[len(rows) - budget]]
    rows = rows[pd.Series(score[rows]).duplicated(keep=False).to_numpy()]
    ranks, tied = np.zeros(len(score), dtype=np.int64), np.zeros(len(score), dtype=bool)
    tied[rows] = True
    ranks[rows[pc.sort_indices(ids.filter(pa.array(tied))).to_numpy()]] = np.arange(len(rows))
    return ranks


def tie_ids(rows: TableReader, column: str | None = None) -> tuple[str | None, np.ndarray | pa.ChunkedArray | None]:
    """The column that tells n rows apart, and its values for `choose`; see `find_ids`.

    Raises:
        ValueError: when the named column is missing, or has nulls, equal values, or values that are no plain ids.

    >>> from datasets import Dataset
    >>> tie_ids(TableReader(Dataset.from_dict({"row_id": ["a", None], "id": [7, 5]})))
    ('id', array([7, 5]))
    """
    return find_ids(rows.column_names, rows.column, column, "--id-column")


def _shortfall(subset: Subset) -> str:
    dropped = [(reason, count) for reason, count in subset.counts.items() if reason not in (KEPT, BELOW_CUT)]
    why = ", ".join(f"{count} {reason}" for reason, count in dropped) or "none is dropped"
    share = f"{subset.keep:g} of all " if isinstance(subset.keep, float) else "of "
    return (
        f"{subset.asked} rows asked for ({share}{subset.pool} rows in the pool), only {subset.eligible} are eligible "
        f"({why}). {_way_out(subset)}"
    )


def _way_out(subset: Subset) -> str:
    """What gives a user more rows, or fewer to ask for: a limit that dropped none is not to be raised."""
    ways = ["lower --keep"] if subset.eligible else []
    if ABOVE_LIMIT in subset.counts and subset.max_ifd < float("inf"):
        ways.append("raise --max-ifd (inf: no limit)")
    if ways:
        text = ", or ".join(ways)
        return f"{text[0].upper()}{text[1:]}."
    if subset.counts.get(REFUSAL):
        return "No row that may be kept has a score: leave out --drop-refusals, or look at the data."
    return (
        f"No row has a score ({subset.score}) to rank by, and ifd_status says why: mend that, and score the rows again "
        "with `ifd-trainer score`."
    )
