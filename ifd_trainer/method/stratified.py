"""Selection within the values of a column: shares of each, a mixture that changes by epoch, one value after another.

Each takes the order of another policy, `policy`, and says how many rows of each value may be taken in that order; a
value is a source, a category, a cluster, or a bucket of a number, such as answers of about one length.

    floors and shares first, each from the top of the order;  then the best of all others below their caps

Sources: users' requests (LLaMA-Factory#6350: sets A, B, C in this order in one run; #10672: a mixture by epoch), and
balanced samples as a control that is hard to beat (arXiv 2503.01807).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..errors import UserError
from .facility_location import Diverse
from .hierarchical import Hierarchical
from .iterit import IterIT
from .number_words import many
from .quotas import within_bounds
from .reasons import BELOW_CUT, KEPT, OTHER_STAGE, OVER_QUOTA, Status
from .selection import Cherry, Policy, Selection, ShortfallError, check_rows_wanted, coded, repeats, score_values
from .target_set import TargetSet

Columns = Mapping[str, np.ndarray]
Shares = Mapping[str, float | int]  # by value, a fraction of the rows that are kept, or a number of them


@dataclass(frozen=True)
class Within:
    """What a policy has that takes the order of another one.

    Args:
        by: the column within whose values it chooses.
    """

    by: str

    @property
    def score(self) -> Any:
        """What rows are ranked by."""
        return getattr(self.policy, "score", "ifd")

    @property
    def max_ifd(self) -> Any:
        """The limit of the other policy, if it has one."""
        return getattr(self.policy, "max_ifd", None)

    @property
    def on_shortfall(self) -> str:
        """What is done with too few rows: "repeat" or "error"; see `Cherry`."""
        return getattr(self.policy, "on_shortfall", "repeat")

    @property
    def reads_scores(self) -> bool:
        """Whether the other policy needs the scores of rows."""
        return getattr(self.policy, "reads_scores", True)

    def _check(self) -> None:
        if not (isinstance(self.by, str) and self.by):
            raise UserError(f"by is the name of a column, such as 'source', got {self.by!r}.")
        weighs_others = isinstance(self.policy, (type, Within, Diverse, Hierarchical, IterIT, TargetSet))
        weighs_others = weighs_others or getattr(self.policy, "gives_weights", False)  # of rows that it draws itself
        if not callable(self.policy) or weighs_others:
            raise UserError(
                "policy is one that ranks each row by itself, such as Cherry(), RandomRows() or LongestAnswers(); got "
                f"{self.policy!r}."
            )
        if self.on_shortfall == "relax":
            raise UserError(
                f"on_shortfall='relax' fills with rows above the limit, whatever their {self.by}: use 'repeat' or "
                "'error'."
            )


@dataclass(frozen=True)
class Stratified(Within):
    """So many rows of each value of a column, in the order of another policy.

    Of n kept rows a value with a share s has round(s * n) of them, neither more nor fewer; with a floor at least as
    many, with a cap at most. Shares that add up to 1 give n rows together, rounded to the largest remainders. What is
    left goes to the best rows of the values that may have more. A value with fewer eligible rows than its share or
    floor asks for has them repeated, each as often as any other give or take one, or with on_shortfall="error" ends
    the run.

    Args:
        by: the column.
        shares, at_least, at_most: by value (as text), a fraction of the kept rows (float) or a number of them (int).
            "equal" for `shares` gives each value as many rows as any other, as far as it has them.
        buckets: of a column of numbers, how many buckets of equally many rows; their values are "1" (lowest), "2", ...
        policy: what says which rows are eligible, and in which order they are taken.

    Raises:
        UserError: for amounts that contradict one another; when called, for a value that no row has, and for floors and
            shares that ask for more rows than are kept.
        ShortfallError: when called, and a value that is asked for has no eligible row, or caps leave too few.

    >>> columns = {"ifd": np.array([0.9, 0.8, 0.7, 0.6]), "ifd_status": np.full(4, "ok")}
    >>> columns["source"] = np.array(["web", "web", "web", "code"])
    >>> selection = Stratified("source", at_least={"code": 0.5})(columns, budget=2)
    >>> selection.kept.tolist(), selection.reasons.tolist()
    ([0, 3], ['kept', 'below_cut', 'below_cut', 'kept'])
    """

    shares: Shares | str = field(default_factory=dict)
    at_least: Shares = field(default_factory=dict)
    at_most: Shares = field(default_factory=dict)
    buckets: int | None = None
    policy: Policy = field(default_factory=Cherry)

    def __post_init__(self) -> None:
        self._check()
        if self.buckets is not None and (not _whole(self.buckets) or self.buckets < 2):
            raise UserError(f"buckets is a number of at least 2, or None, got {self.buckets!r}.")
        if isinstance(self.shares, str):
            if self.shares != "equal" or self.at_least or self.at_most:
                raise UserError("shares is 'equal', alone, or a mapping from values to amounts.")
            return
        amounts = {name: _amounts(getattr(self, name), name) for name in ("shares", "at_least", "at_most")}
        for name, values in amounts.items():
            object.__setattr__(self, name, values)
        for value in amounts["shares"].keys() & (amounts["at_least"].keys() | amounts["at_most"].keys()):
            raise UserError(f"{value!r} has a share, which is exact, and a floor or cap too: leave one of them out.")
        for value in amounts["at_least"].keys() & amounts["at_most"].keys():
            low, high = amounts["at_least"][value], amounts["at_most"][value]
            if isinstance(low, float) == isinstance(high, float) and low > high:
                raise UserError(f"{value!r} is to have at least {low} and at most {high}: lower the floor.")
        fractions = sum(a for a in (*amounts["shares"].values(), *amounts["at_least"].values()) if isinstance(a, float))
        if fractions > 1 + 1e-9:
            raise UserError(f"Shares and floors add up to {fractions:g} of the rows: they may be 1 together.")

    def __call__(
        self, columns: Columns, budget: int, *, ids: np.ndarray | None = None, rng: np.random.Generator | None = None
    ) -> Selection:
        """Select `budget` of n rows; see `Policy`."""
        check_rows_wanted(budget)
        values, groups = self._groups(columns)
        eligible = self.policy(columns, 1, ids=ids, rng=rng).eligible
        ranked = self.policy(columns, max(eligible, 1), ids=ids, rng=rng)
        order = ranked.kept[: max(eligible, 1)]  # the best row first
        there = np.bincount(groups[order], minlength=len(values))
        least, most = self._bounds(values, there, budget)
        short = least - there
        if (short > 0).any() and (self.on_shortfall == "error" or (there[short > 0] == 0).any()):
            raise ShortfallError(self._explain(values, least, there, np.argmax(short)))
        kept = order[within_bounds(groups[order], np.minimum(least, there), most, budget - int(short[short > 0].sum()))]
        again = [repeats(kept[groups[kept] == group], short[group], rng) for group in np.flatnonzero(short > 0)]
        missing = budget - len(kept) - sum(map(len, again))
        open_rows = kept[most[groups[kept]] >= budget]  # of values without a cap
        if missing and (self.on_shortfall == "error" or not len(open_rows)):
            raise ShortfallError(
                f"{many(budget, 'row is', 'rows are')} to be kept, but shares and caps of {self.by!r} leave "
                f"{budget - missing} of {len(order)} that are eligible: raise them, or lower `keep`."
            )
        again.append(repeats(open_rows, missing, rng))
        reasons = ranked.reasons.copy()
        full = np.bincount(groups[kept], minlength=len(values)) >= most
        reasons[order] = np.where(full[groups[order]], OVER_QUOTA, BELOW_CUT)
        reasons[kept] = KEPT
        return Selection(
            np.concatenate([kept, *again]), reasons, _lowest(columns, self.score, kept), len(order), budget - len(kept)
        )

    def _groups(self, columns: Columns) -> tuple[list[str], np.ndarray]:
        """The k values, and which of them each row has, (n,)."""
        if self.buckets is None:
            values, groups = coded(columns[self.by])
            return values.tolist(), groups
        numbers = np.asarray(columns[self.by], dtype=np.float64)
        known = np.isfinite(numbers)
        if not known.any():
            raise UserError(f"The column {self.by!r} holds no numbers, of which buckets could be made.")
        inner = np.quantile(numbers[known], np.arange(1, self.buckets) / self.buckets)
        groups = np.where(known, np.searchsorted(inner, numbers, side="left"), self.buckets)
        return [*(str(number + 1) for number in range(self.buckets)), "none"], groups

    def _bounds(self, values: Sequence[str], there: np.ndarray, budget: int) -> tuple[np.ndarray, np.ndarray]:
        """The least and the most rows of each of k values, (k,)."""
        if self.shares == "equal":
            even = _equal(there, budget)
            return even, np.where(even < there, even, budget)
        named = {*self.shares, *self.at_least, *self.at_most}
        if unknown := sorted(named - set(values)):
            shown = ", ".join(sorted(values)[:20]) + (", ..." if len(values) > 20 else "")
            raise UserError(f"The column {self.by!r} has no value {unknown[0]!r}; it has {shown}.")
        exact = _counts(self.shares, budget)
        least, most = np.zeros(len(values), dtype=np.int64), np.full(len(values), budget)
        for place, value in enumerate(values):
            if value in exact:
                least[place] = most[place] = exact[value]
            if value in self.at_least:
                least[place] = _count(self.at_least[value], budget, np.ceil)
            if value in self.at_most:
                most[place] = max(_count(self.at_most[value], budget, np.floor), 0)
        if least.sum() > budget:
            raise UserError(
                f"Shares and floors of {self.by!r} ask for {least.sum()} rows, and {budget} are kept: lower them, or "
                "raise `keep`."
            )
        if (least > most).any():
            place = int(np.argmax(least - most))
            raise UserError(f"{values[place]!r} is to have at least {least[place]} rows and at most {most[place]}.")
        return least, most

    def _explain(self, values: Sequence[str], least: np.ndarray, there: np.ndarray, place: int) -> str:
        return (
            f"{many(int(least[place]), 'row')} with {self.by} {values[place]!r} are to be kept, and {there[place]} of "
            "them are eligible: lower its share or floor, or look at why its rows are not."
        )


@dataclass(frozen=True)
class Mixture(Within):
    """Shares of the values of a column that change from epoch to epoch: a `Stratified` for each.

    Args:
        by: the column.
        shares: for each epoch, by value, a fraction of its rows or a number of them; the last entry stands for all
            epochs after it. Epochs are counted as entries of `keep` are.
        policy: as for `Stratified`.

    >>> mixture = Mixture("source", [{"web": 0.9, "code": 0.1}, {"web": 0.5, "code": 0.5}])
    >>> mixture.in_epoch(3).shares
    {'web': 0.5, 'code': 0.5}
    """

    shares: Sequence[Shares] = ()
    policy: Policy = field(default_factory=Cherry)

    def __post_init__(self) -> None:
        self._check()
        if isinstance(self.shares, (str, Mapping)) or not len(self.shares):
            raise UserError(
                f"shares has an entry for each epoch, a mapping from values to shares; got {self.shares!r}."
            )
        object.__setattr__(self, "shares", tuple(self.shares))
        for epoch in range(len(self.shares)):
            self.in_epoch(epoch)  # refuses what `Stratified` refuses

    def in_epoch(self, epoch: int) -> Stratified:
        """The policy of an epoch."""
        return Stratified(self.by, self.shares[min(epoch, len(self.shares) - 1)], policy=self.policy)

    def __call__(
        self, columns: Columns, budget: int, *, ids: np.ndarray | None = None, rng: np.random.Generator | None = None
    ) -> Selection:
        """Select `budget` of n rows as in the first epoch; see `Policy`."""
        return self.in_epoch(0)(columns, budget, ids=ids, rng=rng)


@dataclass(frozen=True)
class Stages(Within):
    """Rows of one value of a column after those of another, in one run: a curriculum by a column of one's own.

    `keep` of the callback is of the rows of a stage: 1.0 trains on all that are eligible.

    Args:
        by: the column.
        order: its values, in the order in which they are trained on. Rows with another value are not.
        epochs: how many epochs each stage takes, one for all or one for each; the last stage takes all that remain.
        growing: whether a stage keeps the values of those before it.
        policy: as for `Stratified`.

    >>> stages = Stages("level", ["easy", "hard"])
    >>> stages.in_epoch(1).values, stages.rows(0, *coded(np.array(["hard", "easy", "easy"])))
    (('hard',), 2)
    """

    order: Sequence[str] = ()
    epochs: int | Sequence[int] = 1
    growing: bool = False
    policy: Policy = field(default_factory=Cherry)

    def __post_init__(self) -> None:
        self._check()
        if isinstance(self.order, str) or not len(self.order) or len(set(self.order)) < len(self.order):
            raise UserError(f"order lists the values of {self.by!r}, each once, got {self.order!r}.")
        lengths = [self.epochs] * len(self.order) if _whole(self.epochs) else list(self.epochs)
        if len(lengths) != len(self.order) or not all(_whole(length) and length >= 1 for length in lengths):
            raise UserError(
                f"epochs is a number of at least 1, or one for each of {len(self.order)} stages, got {self.epochs!r}."
            )
        object.__setattr__(self, "order", tuple(map(str, self.order)))
        object.__setattr__(self, "epochs", self.epochs if _whole(self.epochs) else tuple(self.epochs))

    def in_epoch(self, epoch: int) -> OneOf:
        """The policy of an epoch."""
        lengths = [self.epochs] * len(self.order) if _whole(self.epochs) else self.epochs
        stage = min(int(np.searchsorted(np.cumsum(lengths), epoch, side="right")), len(self.order) - 1)
        return OneOf(self.by, self.order[0 if self.growing else stage : stage + 1], policy=self.policy)

    def rows(self, epoch: int, texts: np.ndarray, codes: np.ndarray) -> int:
        """How many of n rows an epoch has to choose from.

        Args:
            texts, codes: the values of the rows, as `coded` gives them.

        Raises:
            UserError: for a stage that has none.
        """
        wanted = self.in_epoch(epoch).values
        count = int(np.isin(texts, wanted)[codes].sum())
        if missing := [value for value in wanted if value not in texts]:
            raise UserError(
                f"The column {self.by!r} has no value {missing[0]!r}; it has {', '.join(sorted(texts)[:20])}."
            )
        return count

    def __call__(
        self, columns: Columns, budget: int, *, ids: np.ndarray | None = None, rng: np.random.Generator | None = None
    ) -> Selection:
        """Select `budget` of n rows as in the first stage; see `Policy`."""
        return self.in_epoch(0)(columns, budget, ids=ids, rng=rng)


@dataclass(frozen=True)
class OneOf(Within):
    """Rows with some values of a column, as another policy chooses among them; the others wait for their stage.

    >>> columns = {"ifd": np.array([0.9, 0.8]), "ifd_status": np.full(2, "ok"), "level": np.array(["hard", "easy"])}
    >>> OneOf("level", ("easy",))(columns, budget=1).reasons.tolist()
    ['other_stage', 'kept']
    """

    values: Sequence[str] = ()
    policy: Policy = field(default_factory=Cherry)

    def __call__(
        self, columns: Columns, budget: int, *, ids: np.ndarray | None = None, rng: np.random.Generator | None = None
    ) -> Selection:
        """Select `budget` of n rows; see `Policy`."""
        texts, codes = coded(columns[self.by])
        rows = np.flatnonzero(np.isin(texts, self.values)[codes])
        ids = np.arange(len(codes)) if ids is None else np.asarray(ids)
        status = np.asarray(columns["ifd_status"], dtype=object)
        if not len(rows):
            raise ShortfallError(f"No row has {self.by} {' or '.join(map(repr, self.values))}.")
        selection = self.policy(_Part(columns, rows), budget, ids=ids[rows], rng=rng)
        reasons = np.where(status == Status.OK.value, OTHER_STAGE, status)
        reasons[rows] = selection.reasons
        return replace(selection, kept=rows[selection.kept], reasons=reasons)


class _Part(dict):
    """Columns of some rows, read as they are asked for."""

    def __init__(self, columns: Columns, rows: np.ndarray) -> None:
        super().__init__({name: np.asarray(values)[rows] for name, values in columns.items()})
        self._columns, self._rows = columns, rows

    def __missing__(self, name: str) -> np.ndarray:
        self[name] = np.asarray(self._columns[name])[self._rows]
        return self[name]


def _whole(number: Any) -> bool:
    return isinstance(number, (int, np.integer)) and not isinstance(number, bool)


def _amounts(amounts: Any, name: str) -> dict[str, float | int]:
    """A mapping of amounts, its values as texts."""
    if not isinstance(amounts, Mapping):
        raise UserError(f"{name} is a mapping from values to amounts, such as {{'code': 0.1}}, got {amounts!r}.")
    for value, amount in amounts.items():
        fraction = isinstance(amount, float) and 0 <= amount <= 1
        if not fraction and not (_whole(amount) and amount >= 0):
            raise UserError(
                f"{name} of {value!r} is a fraction of the kept rows up to 1.0, or a number of rows, got {amount!r}."
            )
    return {str(value): amount for value, amount in amounts.items()}


def _count(amount: float | int, budget: int, rounded: Any) -> int:
    # 0.1 of 30 rows are 3, though 0.1 * 30 is above 3.
    return int(rounded(round(amount * budget, 6))) if isinstance(amount, float) else int(amount)


def _counts(shares: Shares, budget: int) -> dict[str, int]:
    """Rows of each share: what fractions give is rounded so that they give together what they add up to."""
    fractions = {value: amount * budget for value, amount in shares.items() if isinstance(amount, float)}
    counts = {value: _count(amount, budget, np.floor) for value, amount in shares.items()}
    left = round(sum(fractions.values())) - sum(counts[value] for value in fractions)
    remainders = sorted(fractions, key=lambda value: counts[value] - fractions[value])
    for value in remainders[: max(left, 0)]:
        counts[value] += 1
    return counts


def _equal(there: np.ndarray, budget: int) -> np.ndarray:
    """As many rows of each of k values as of any other, or all that there are, (k,); together `budget` at most.

    >>> _equal(np.array([5, 1, 9]), 9).tolist()
    [4, 1, 4]
    """
    given = np.zeros(len(there), dtype=np.int64)
    left = min(budget, int(there.sum()))
    while left:
        open_values = np.flatnonzero(given < there)
        each = max(left // len(open_values), 1)
        more = np.minimum(there[open_values] - given[open_values], each)[:left]
        given[open_values[: len(more)]] += more
        left -= int(more.sum())
    return given


def _lowest(columns: Columns, score: Any, kept: np.ndarray) -> float:
    """The lowest score kept; NaN where rows have none."""
    try:
        return float(score_values(columns, score)[kept].min())
    except (KeyError, ValueError):
        return float("nan")
