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
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from ..data.row_ids import find_ids, ranks
from ..data.table_reader import TableReader
from ..errors import UserError
from ..method.choices import RANKED_BY
from ..method.number_words import many, rounded_below
from ..method.quotas import Quotas, ValueCounts, within_bounds
from ..method.ranking import Ranking
from ..method.reasons import (
    ABOVE_LIMIT,
    BELOW_CUT,
    DUPLICATE,
    GATE_REASONS,
    KEPT,
    LESS_ALIKE,
    MISMATCHED,
    NO_VALUE,
    OVER_QUOTA,
    REFUSAL,
    UNFINISHED,
    Status,
)
from ..method.schedule import as_schedule
from ..method.selection import ROW_LIMIT, Cherry, Selection, ShortfallError, coded, counted
from ..method.target_set import SIMILARITIES, TargetSet
from .provenance import Provenance

# The options of `ifd-trainer select` that drop rows.
_DROPPED_BY = {
    REFUSAL: "--drop-refusals",
    UNFINISHED: "--drop-unfinished",
    DUPLICATE: "--drop-duplicates",
    MISMATCHED: "--drop-mismatched",
    **dict.fromkeys(GATE_REASONS, "--gates"),
}


@dataclass(frozen=True)
class PoolSelection:
    """The `Selection` of a published pool, and what was asked for: what its files and its card tell.

    Attributes:
        selection: what the policy decided; its reasons are categorical, not an object for each row.
        ranking: what was ranked by.
        limit: scores of `limited` at or above it were dropped; infinity for no limit.
        limited: the name of an IFD.
        keep: the budget as it was given, a fraction of the pool or a number of rows; None for that of quotas, and for
            all rows that may be kept.
        alpha: of a limit that was measured; see `CalibratedLimit`.
        column: whose values have quotas or floors, if any do.
        values: what became of the rows with each of its values.
        targets: of a selection by a target set, what rows were held against, in words.
    """

    selection: Selection
    ranking: Ranking
    limit: float
    limited: str
    keep: float | int | None
    alpha: float | None = None
    column: str | None = None
    values: tuple[ValueCounts, ...] = ()
    targets: str | None = None

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
        by_ifd = self.limited == self.ranking.label
        of, below = ("", self.limit) if by_ifd else (f"{self.limited} ", None)
        limit = f" and {of}< {self.limit:.4f} (calibrated, alpha {self.alpha:g})" if self.alpha else ""
        cut = f"{self.ranking.label} >= {rounded_below(self.selection.cut, below, 4)}"
        if self.ranking.lowest is not None:
            cut = f"{self.ranking.lowest} <= {-self.selection.cut:.4f}"
        return (
            f"{many(self.kept_rows, 'row')} kept, {share:.2f} % of all {many(self.pool_rows, 'row')} in the pool "
            f"({self.asked_rows:,} asked for), {cut}{limit}. Not kept: {others}."
        )

    @property
    def warning(self) -> str | None:
        """What to tell a user who asked for more rows than are eligible."""
        short = ", ".join(f"{each.kept} of {each.least} {each.value}" for each in self.values if each.kept < each.least)
        if not self.selection.shortfall:
            fewer = f"Fewer rows than asked for are eligible by {self.column}: {short}. Lower the quotas or floors."
            return fewer if short else None
        passed = (KEPT, BELOW_CUT, LESS_ALIKE, OVER_QUOTA)
        dropped = [(reason, count) for reason, count in self.counts.items() if reason not in passed]
        why = ", ".join(f"{count:,} {reason}" for reason, count in dropped) or "none is dropped"
        share = f"{100 * self.keep:g} % of all " if isinstance(self.keep, float) else "of "
        of_values = f"; by {self.column}: {short}" if short else ""
        if self.keep is None and self.column is None:
            return f"None of {many(self.pool_rows, 'row')} in the pool may be kept ({why}). {_way_out(self)}"
        return (
            f"{many(self.asked_rows, 'row')} asked for ({share}{many(self.pool_rows, 'row')} in the pool), only "
            f"{many(self.selection.eligible, 'is', 'are')} eligible ({why}{of_values}). {_way_out(self)}"
        )


def choose(
    score: np.ndarray,
    status: np.ndarray | pd.Series,
    keep: float | int | None,
    *,
    ranking: Ranking | None = None,
    max_ifd: float = 1.0,
    limited: tuple[str, np.ndarray] | None = None,
    ids: np.ndarray | pa.ChunkedArray | None = None,
    dropped: Mapping[str, np.ndarray] | None = None,
    alpha: float | None = None,
    strict: bool = False,
    quotas: Quotas | None = None,
    groups: np.ndarray | pd.Series | None = None,
    targets: tuple[TargetSet, np.ndarray] | None = None,
) -> PoolSelection:
    """Keep the rows with the highest score under the limit.

    Args:
        score: (n,) what to rank by, NaN where there is none.
        status: (n,) `ifd_status`.
        keep: a fraction of the n rows, or a number of rows; None for what the quotas of all values add up to, and
            without quotas for all rows that may be kept.
        ranking: what `score` is; the column `ifd` by default.
        max_ifd: rows with an IFD of this or more are dropped.
        limited: name and values (n,) of that IFD, where it is not what is ranked by.
        ids: (n,) row ids that break ties, lowest first, numbers or texts; positions by default.
        dropped: (n,) bool, rows to drop whatever their score and status, by reason; of several the first one counts.
        alpha: how `max_ifd` was measured, if it was: for the card.
        strict: a shortfall is an error.
        quotas: how many rows of each value of a column are kept.
        groups: (n,) the values of that column as texts.
        targets: a policy, and (n, m) the cosines of rows with its targets, which take rows in turn; `score` is then the
            highest of a row.

    Raises:
        ShortfallError: when no row is eligible, or fewer than asked for with `strict`.
        UserError: for quotas and floors that exceed `keep`.

    >>> chosen = choose(np.array([0.2, 0.9, 1.3, np.nan]), np.array(["ok", "ok", "ok", "too_short"]), 0.25)
    >>> chosen.counts
    {'kept': 1, 'above_limit': 1, 'below_cut': 1, 'too_short': 1}
    >>> choose(np.array([0.2, 0.9]), np.array(["ok", "ok"]), 1, dropped={"duplicate": np.array([False, True])}).counts
    {'kept': 1, 'duplicate': 1}
    """
    ranking = ranking or Ranking({"ifd": 1.0})
    name, values = limited or (ranking.label, score)
    policy = Cherry(max_ifd, name, "error")
    score, values = np.asarray(score, dtype=np.float64), np.asarray(values, dtype=np.float64)
    names, codes = coded(status)
    if targets is not None:  # rows above the limit are not held against targets
        above = (names == Status.OK.value)[codes] & (values >= policy.number)
        names, codes = np.append(names, ABOVE_LIMIT), np.where(above, len(names), codes)
    if ranking.plain is None or ranking.ifd is None:  # a score of this program that is none has its status
        none = (names == Status.OK.value)[codes] & ~np.isfinite(score)
        names, codes = np.append(names, NO_VALUE), np.where(none, len(names), codes)
    for reason, rows in reversed((dropped or {}).items()):
        names, codes = np.append(names, reason), np.where(rows, len(names), codes)
    status = _categorical(names, codes)
    ok = np.asarray(status == Status.OK.value)
    eligible = ok & np.isfinite(score) & ~(values >= policy.number)
    count = int(eligible.sum())
    found = {"ranking": ranking, "limit": policy.number, "limited": name, "keep": keep, "alpha": alpha}
    if quotas is not None:
        group_names, of_rows = coded(groups)
        quotas.check_values(group_names.tolist())
        least, exact = quotas.budgets(group_names.tolist(), np.bincount(of_rows, minlength=len(group_names)))
    if keep is None:
        asked = max(count, 1) if quotas is None else int(least.sum())
    else:
        asked = as_schedule(keep).budget(0, len(score))
    if count == 0 or (strict and quotas is None and count < asked):
        reasons = np.where(ok & np.isfinite(score), ABOVE_LIMIT, names[codes])
        reasons[eligible] = BELOW_CUT
        none = Selection(np.arange(0), pd.Categorical(reasons), float("nan"), count, asked)
        raise ShortfallError(PoolSelection(none, **found).warning)
    budget = min(asked, count) if quotas is None else count
    if ids is not None and not isinstance(ids, np.ndarray):
        ids = _ranks_in_ties(score, ids, eligible, budget) if targets is None else ranks(ids, eligible)
    # The limit of the IFD is one of single rows, since the policy's own is of what it ranks by.
    columns = {name: score, "ifd_status": status, ROW_LIMIT: np.where(eligible, np.inf, -np.inf)}
    if targets is not None:
        policy, similarities = targets
        columns |= {"ifd": score, SIMILARITIES: similarities}
    selection = policy(columns, budget, ids=ids)
    selection = replace(selection, cut=float(score[selection.kept].min()))
    reasons = _categorical(*coded(selection.reasons))
    if quotas is None:
        return PoolSelection(replace(selection, reasons=reasons, shortfall=asked - budget), **found)
    order = selection.kept  # all eligible rows, the best first
    most = np.where(exact, least, len(order))
    taken = within_bounds(of_rows[order], least, most, None if keep is None else asked)
    names, codes = coded(reasons)
    left = order[~taken]
    codes[left] = np.where(exact[of_rows[left]], len(names), len(names) + 1)
    reasons = _categorical(np.append(names, [OVER_QUOTA, BELOW_CUT if targets is None else LESS_ALIKE]), codes)
    kept = order[taken]
    counts = [np.bincount(of_rows[rows], minlength=len(group_names)) for rows in (slice(None), order, kept)]
    by_value = map(ValueCounts, group_names, counts[0], least, exact, counts[1], counts[2])
    chosen = PoolSelection(
        replace(
            selection,
            kept=kept,
            reasons=reasons,
            cut=float(score[kept].min()) if len(kept) else float("nan"),
            shortfall=asked - len(kept),
        ),
        **found,
        column=quotas.column,
        values=tuple(sorted(by_value, key=lambda each: (-each.pool, each.value))),
    )
    if not len(kept) or (strict and chosen.warning):
        raise ShortfallError(chosen.warning or f"No row is kept by the quotas of {quotas.column!r}.")
    return chosen


def choose_above(
    threshold: float,
    score: np.ndarray,
    status: np.ndarray | pd.Series,
    dropped: Mapping[str, np.ndarray],
    **choice: Any,
) -> PoolSelection:
    """Keep all rows with a score at or above a threshold that nothing else drops; `choice` is that of `choose`.

    Raises:
        ShortfallError: when there is none.

    >>> choose_above(0.9, np.array([0.2, 0.9, 0.95, np.nan]), np.array(["ok", "ok", "ok", "too_short"]), {}).counts
    {'kept': 2, 'below_cut': 1, 'too_short': 1}
    """
    names, codes = coded(status)
    _, limited = choice.get("limited") or ("", score)
    free = (names == Status.OK.value)[codes] & (score >= threshold)
    free &= ~(limited >= choice.get("max_ifd", 1.0))
    for rows in dropped.values():
        free &= ~rows
    if not free.any():
        raise ShortfallError(
            f"No row that may be kept has a score at or above {threshold:g}: this site has none to train on. Leave it "
            "out, or agree on another threshold."
        )
    return choose(score, status, int(free.sum()), dropped={**dropped, BELOW_CUT: score < threshold}, **choice)


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
    if ABOVE_LIMIT in chosen.counts and chosen.limit < float("inf"):
        calibrated = "raise --alpha, or give --max-ifd a number (inf: no limit)"
        ways.append(calibrated if chosen.alpha else "raise --max-ifd (inf: no limit)")
    if ways:
        text = ", or ".join(ways)
        return f"{text[0].upper()}{text[1:]}."
    if by := dict.fromkeys(option for reason, option in _DROPPED_BY.items() if chosen.counts.get(reason)):
        return f"No row that may be kept has a score: leave out {' or '.join(by)}, or look at the data."
    if chosen.counts.get(NO_VALUE):
        return f"No row with a score has a number to rank by ({chosen.ranking.label}): name other columns with --score."
    return (
        f"No row has a score ({chosen.ranking.label}) to rank by, and ifd_status says why: mend that, and score the "
        "rows again with `ifd-trainer score`."
    )


def numbers_of(name: str, rows: TableReader, scores: pd.DataFrame) -> np.ndarray:
    """A column to rank by, (n,) float64, NaN for null: of the scores, else of the rows.

    Raises:
        UserError: for a column that is not there, or holds no numbers.
    """
    if name in scores and name != "ifd_status":
        return scores[name].to_numpy(dtype=float, na_value=np.nan)
    values = _values_of(name, rows, "--score")
    if pa.types.is_boolean(values.type):
        values = values.cast(pa.int8())
    if not (pa.types.is_integer(values.type) or pa.types.is_floating(values.type) or pa.types.is_decimal(values.type)):
        raise UserError(f"--score {name}: the column holds no numbers, but {values.type}.")
    return values.cast(pa.float64(), safe=False).to_pandas().to_numpy(float)  # integers beyond 2**53 are rounded


def texts_of(name: str, rows: TableReader) -> pd.Series:
    """The values of a column as texts, (n,) categorical; "null" where there is none.

    Raises:
        UserError: for a column that is not there, or holds lists, mappings or bytes.
    """
    values = _values_of(name, rows, "--per")
    kind = values.type
    binary = pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)
    if pa.types.is_nested(kind) or binary or isinstance(kind, pa.ExtensionType):
        raise UserError(f"--per {name}: the column holds {kind}, and quotas are of texts or numbers.")
    return pd.Series(values.cast(pa.string()).fill_null("null").dictionary_encode().to_pandas())


def _values_of(name: str, rows: TableReader, option: str) -> pa.ChunkedArray:
    if name not in rows.column_names:
        raise UserError(f"{option} {name}: there is no such column; the columns are {sorted(rows.column_names)}.")
    return rows.column(name)


def no_scores(rows: int, source: str) -> tuple[pd.DataFrame, pd.DataFrame, Provenance]:
    """What `find_scores` gives, of rows that are ranked by a column of their own and were not scored."""
    missing = dict.fromkeys((*RANKED_BY, "answer_tokens"), np.full(rows, np.nan))
    status = pd.Categorical.from_codes(np.zeros(rows, np.int8), [Status.OK.value])
    scores = pd.DataFrame(missing | {"ifd_status": status}, copy=False)
    return scores, pd.DataFrame(index=scores.index), Provenance(source=source)
