"""Choose the rows of a scored data file by a budget: the policy `Cherry`, with what a published set has to tell.

A fraction is one of all rows of the pool, scorable or not, refused or not; the number of kept rows is exact; equal
scores are told apart by row id. Where training fills a budget by repeats, here fewer eligible rows than asked for are a
warning with counts, or an error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pandas as pd
import pyarrow as pa

from ..data.row_ids import find_ids, ranks
from ..data.table_reader import TableReader
from ..method.number_words import many, rounded_below
from ..method.reasons import ABOVE_LIMIT, BELOW_CUT, DUPLICATE, KEPT, MISMATCHED, REFUSAL, UNFINISHED, Status
from ..method.schedule import as_schedule
from ..method.selection import Cherry, Selection, ShortfallError, coded, counted

# The options of `ifd-trainer select` that drop rows.
_DROPPED_BY = {
    REFUSAL: "--drop-refusals",
    UNFINISHED: "--drop-unfinished",
    DUPLICATE: "--drop-duplicates",
    MISMATCHED: "--drop-mismatched",
}


@dataclass(frozen=True)
class PoolSelection:
    """The `Selection` of a published pool, and what was asked for: what its files and its card tell.

    Attributes:
        selection: what the policy decided; its reasons are categorical, not an object for each row.
        policy: the score that was ranked by, and the limit.
        keep: the budget as it was given, a fraction of the pool or a number of rows.
        alpha: of a limit that was measured; see `CalibratedLimit`.
    """

    selection: Selection
    policy: Cherry
    keep: float | int
    alpha: float | None = None

    @property
    def pool_rows(self) -> int:
        """Number of rows that were chosen from, the denominator of every share."""
        return len(self.selection.reasons)

    @property
    def kept_rows(self) -> int:
        """Number of rows kept."""
        return len(self.selection.kept)

    @property
    def asked_rows(self) -> int:
        """The budget in rows."""
        return self.kept_rows + self.selection.shortfall

    @cached_property
    def counts(self) -> dict[str, int]:
        """Rows by reason, `kept` first, then the most frequent; they add up to the pool."""
        counts = Counter(counted(self.selection.reasons))
        rest = sorted((item for item in counts.items() if item[0] != KEPT), key=lambda item: (-item[1], item[0]))
        return {KEPT: counts[KEPT], **dict(rest)}

    @property
    def is_kept(self) -> np.ndarray:
        """(n,) whether each row is kept."""
        mask = np.zeros(self.pool_rows, dtype=bool)
        mask[self.selection.kept] = True
        return mask

    @property
    def ranks(self) -> pd.Series:
        """(n,) Int64, 1 for the highest score, null for rows that are not kept."""
        ranks = np.zeros(self.pool_rows, dtype=np.int64)
        ranks[self.selection.kept] = np.arange(1, self.kept_rows + 1)
        return pd.Series(pd.arrays.IntegerArray(ranks, ~self.is_kept))

    @property
    def summary(self) -> str:
        """What became of the rows, in a line."""
        others = ", ".join(f"{count:,} {reason}" for reason, count in self.counts.items() if reason != KEPT) or "none"
        share = 100 * self.kept_rows / self.pool_rows
        limit = f" and < {self.policy.max_ifd:.4f} (calibrated, alpha {self.alpha:g})" if self.alpha else ""
        return (
            f"{many(self.kept_rows, 'row')} kept, {share:.2f} % of all {many(self.pool_rows, 'row')} in the pool "
            f"({self.asked_rows:,} asked for), {self.policy.score} >= "
            f"{rounded_below(self.selection.cut, self.policy.number, 4)}{limit}. Not kept: {others}."
        )

    @property
    def warning(self) -> str | None:
        """What to tell a user who asked for more rows than are eligible."""
        if not self.selection.shortfall:
            return None
        dropped = [(reason, count) for reason, count in self.counts.items() if reason not in (KEPT, BELOW_CUT)]
        why = ", ".join(f"{count:,} {reason}" for reason, count in dropped) or "none is dropped"
        share = f"{100 * self.keep:g} % of all " if isinstance(self.keep, float) else "of "
        return (
            f"{many(self.asked_rows, 'row')} asked for ({share}{many(self.pool_rows, 'row')} in the pool), only "
            f"{many(self.selection.eligible, 'is', 'are')} eligible ({why}). {_way_out(self)}"
        )


def choose(
    score: np.ndarray,
    status: np.ndarray | pd.Series,
    keep: float | int,
    *,
    name: str = "ifd",
    max_ifd: float = 1.0,
    ids: np.ndarray | pa.ChunkedArray | None = None,
    dropped: Mapping[str, np.ndarray] | None = None,
    alpha: float | None = None,
    strict: bool = False,
) -> PoolSelection:
    """Keep the rows with the highest score under the limit.

    Args:
        score: (n,) the score to rank by, NaN where there is none.
        status: (n,) `ifd_status`.
        keep: a fraction of the n rows, or a number of rows.
        name: name of the score, "ifd" or "ifd_ppl".
        max_ifd: rows with a score of this or more are dropped.
        ids: (n,) row ids that break ties, lowest first, numbers or texts; positions by default.
        dropped: (n,) bool, rows to drop whatever their score and status, by reason; of several the first one counts.
        alpha: how `max_ifd` was measured, if it was: for the card.
        strict: a shortfall is an error.

    Raises:
        ShortfallError: when no row is eligible, or fewer than asked for with `strict`.

    >>> chosen = choose(np.array([0.2, 0.9, 1.3, np.nan]), np.array(["ok", "ok", "ok", "too_short"]), 0.25)
    >>> chosen.counts
    {'kept': 1, 'above_limit': 1, 'below_cut': 1, 'too_short': 1}
    >>> choose(np.array([0.2, 0.9]), np.array(["ok", "ok"]), 1, dropped={"duplicate": np.array([False, True])}).counts
    {'kept': 1, 'duplicate': 1}
    """
    policy = Cherry(max_ifd, name, "error")
    score = np.asarray(score, dtype=np.float64)
    names, codes = coded(status)
    for reason, rows in reversed((dropped or {}).items()):
        names, codes = np.append(names, reason), np.where(rows, len(names), codes)
    status = _categorical(names, codes)
    asked = as_schedule(keep).budget(0, len(score))
    ok = np.asarray(status == Status.OK.value)
    eligible = ok & (score < policy.number)
    count = int(eligible.sum())
    if count == 0 or (strict and count < asked):
        reasons = np.where(ok & np.isfinite(score), ABOVE_LIMIT, names[codes])
        reasons[eligible] = BELOW_CUT
        none = Selection(np.arange(0), pd.Categorical(reasons), float("nan"), count, asked)
        raise ShortfallError(PoolSelection(none, policy, keep, alpha).warning)
    budget = min(asked, count)
    if ids is not None and not isinstance(ids, np.ndarray):
        ids = _ranks_in_ties(score, ids, eligible, budget)
    selection = policy({name: score, "ifd_status": status}, budget, ids=ids)
    reasons = _categorical(*coded(selection.reasons))
    return PoolSelection(replace(selection, reasons=reasons, shortfall=asked - budget), policy, keep, alpha)


def _categorical(names: np.ndarray, codes: np.ndarray) -> pd.Categorical:
    """Texts by their numbers, at a byte each; of names that are equal, the first stands for all."""
    first, unique = pd.factorize(names)
    return pd.Categorical.from_codes(first.astype(np.min_scalar_type(-len(names) - 1))[codes], unique)


def _ranks_in_ties(score: np.ndarray, ids: pa.ChunkedArray, eligible: np.ndarray, budget: int) -> np.ndarray:
    """Ranks of the ids among the rows that may be kept and share their score with another one; 0 elsewhere."""
    rows = np.flatnonzero(eligible)
    rows = rows[score[rows] >= np.partition(score[rows], len(rows) - budget)[len(rows) - budget]]
    rows = rows[pd.Series(score[rows]).duplicated(keep=False).to_numpy()]
    tied = np.zeros(len(score), dtype=bool)
    tied[rows] = True
    return ranks(ids, tied)


def tie_ids(rows: TableReader, column: str | None = None) -> tuple[str | None, np.ndarray | pa.ChunkedArray | None]:
    """The column that tells n rows apart, and its values for `choose`; see `find_ids`.

    Raises:
        ValueError: when the named column is missing, or has nulls, equal values, or values that are no plain ids.

    >>> from datasets import Dataset
    >>> tie_ids(TableReader(Dataset.from_dict({"row_id": ["a", None], "id": [7, 5]})))
    ('id', array([7, 5]))
    """
    return find_ids(rows.column_names, rows.column, column, "--id-column")


def _way_out(chosen: PoolSelection) -> str:
    """What gives a user more rows, or fewer to ask for: a limit that dropped none is not to be raised."""
    ways = ["lower --keep"] if chosen.selection.eligible else []
    if ABOVE_LIMIT in chosen.counts and chosen.policy.max_ifd < float("inf"):
        calibrated = "raise --alpha, or give --max-ifd a number (inf: no limit)"
        ways.append(calibrated if chosen.alpha else "raise --max-ifd (inf: no limit)")
    if ways:
        text = ", or ".join(ways)
        return f"{text[0].upper()}{text[1:]}."
    if by := [option for reason, option in _DROPPED_BY.items() if chosen.counts.get(reason)]:
        return f"No row that may be kept has a score: leave out {' or '.join(by)}, or look at the data."
    return (
        f"No row has a score ({chosen.policy.score}) to rank by, and ifd_status says why: mend that, and score the "
        "rows again with `ifd-trainer score`."
    )
