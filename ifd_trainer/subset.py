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

from .encoding import Status
from .refusals import REFUSAL
from .schedule import as_schedule
from .selection import ABOVE_LIMIT, BELOW_CUT, KEPT, Cherry, ShortfallError, coded


@dataclass(frozen=True)
class Subset:
    """What was kept of a pool.

    Attributes:
        keep: the budget as it was given, a fraction of the pool or a number of rows.
        asked: the budget in rows.
        reasons: (n,) `kept`, or why not.
        ranks: (n,) Int64, 1 for the highest score, null for rows that are not kept.
        cut: lowest score kept.
        eligible: rows with a score under the limit that are no refusals.
        score, max_ifd: the column that was ranked by, and the limit.
    """

    keep: float | int
    asked: int
    reasons: np.ndarray
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
    ids: np.ndarray | None = None,
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
        ids: (n,) ranks of the row ids, see `tie_ids`; positions by default.
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
    status = names[codes]  # shared texts, and an array of our own
    if refusals is not None:
        status[refusals] = REFUSAL
    asked = as_schedule(keep).budget(0, len(score))
    ok = status == Status.OK.value
    eligible = int((ok & (score < max_ifd)).sum())
    ranks, unranked = np.zeros(len(score), dtype=np.int64), np.ones(len(score), dtype=bool)
    if eligible == 0 or (strict and eligible < asked):
        reasons = np.where(ok & np.isfinite(score), ABOVE_LIMIT, status)
        reasons[ok & (score < max_ifd)] = BELOW_CUT
        none = pd.Series(pd.arrays.IntegerArray(ranks, unranked))
        raise ShortfallError(_shortfall(Subset(keep, asked, reasons, none, float("nan"), eligible, name, max_ifd)))
    selection = policy({name: score, "ifd_status": status}, min(asked, eligible), ids=ids)
    ranks[selection.kept] = np.arange(1, len(selection.kept) + 1)
    unranked[selection.kept] = False
    ranks = pd.Series(pd.arrays.IntegerArray(ranks, unranked))
    return Subset(keep, asked, selection.reasons, ranks, selection.cut, eligible, name, max_ifd)


def tie_ids(rows: pd.DataFrame, column: str | None = None) -> tuple[str | None, np.ndarray]:
    """The column that tells rows apart, and for each row the rank of its id, smallest first.

    Args:
        rows: all columns that may hold ids.
        column: the column; by default `row_id`, then `id`, if its values are unique, else the position.

    Raises:
        ValueError: when the column is missing, or has nulls or equal values.

    >>> tie_ids(pd.DataFrame({"id": ["b", "a"]}))
    ('id', array([1, 0]))
    """
    for name in [column] if column else ["row_id", "id"]:
        if name not in rows:
            if column:
                raise ValueError(f"There is no column {column!r} of row ids; the columns are {sorted(rows.columns)}.")
            continue
        values = rows[name]
        if values.dtype == object and not values.map(pd.api.types.is_hashable).all():
            values = values.astype(str)
        if values.notna().all() and values.is_unique:
            keys = values if values.dtype.kind in "iuf" else values.astype(str)
            order = np.argsort(keys.to_numpy(), kind="stable")
            ranks = np.empty(len(values), dtype=np.int64)
            ranks[order] = np.arange(len(values))
            return name, ranks
        if column:
            raise ValueError(
                f"The column {name!r} cannot tell rows apart: {values.isna().sum()} of {len(values)} values are null "
                f"and {values.duplicated().sum()} are repeated. Name another with --id-column, or leave it out."
            )
    return None, np.arange(len(rows))


def _shortfall(subset: Subset) -> str:
    dropped = [(reason, count) for reason, count in subset.counts.items() if reason not in (KEPT, BELOW_CUT)]
    why = ", ".join(f"{count} {reason}" for reason, count in dropped) or "none is dropped"
    share = f"{subset.keep:g} of all " if isinstance(subset.keep, float) else "of "
    return (
        f"{subset.asked} rows asked for ({share}{subset.pool} rows in the pool), only {subset.eligible} are eligible "
        f"({why}). Lower --keep, or raise --max-ifd (inf: no limit)."
    )
