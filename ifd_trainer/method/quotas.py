"""How many rows of each value of a column are kept, such as each source of a mixture: quotas and floors.

A quota is exact: the best rows of the value, so many of them. A floor is the least: the best rows of the value, so many
of them, come before the best of all others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ..errors import UserError

Amount = float | int  # a fraction of a value's rows, or a number of them
REST = None  # the key of all values that are not named


class ValueCounts(NamedTuple):
    """What became of the rows with one value.

    Attributes:
        value: the value as a text.
        pool: rows with it.
        least: so many were asked for, 0 for none.
        exact: whether that is all that may be kept.
        eligible: rows that might be kept.
        kept: rows that are.
    """

    value: str
    pool: int
    least: int
    exact: bool
    eligible: int
    kept: int


@dataclass(frozen=True)
class Quotas:
    """Quotas and floors of the values of a column.

    Args:
        column: its name.
        quotas, floors: by value; `REST` (None) for all values that are not named. A value has one of them at most.

    >>> quotas = Quotas("source", quotas={"web": 1}, floors={REST: 0.5})
    >>> quotas.budgets(["books", "web"], [4, 9])
    (array([2, 1]), array([False,  True]))
    """

    column: str
    quotas: Mapping[str | None, Amount] = field(default_factory=dict)
    floors: Mapping[str | None, Amount] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, amount in [*self.quotas.items(), *self.floors.items()]:
            whole = isinstance(amount, int) and amount >= 0
            if not whole and not (isinstance(amount, float) and 0 <= amount <= 1):
                of = "" if name is None else f" of {name!r}"
                raise UserError(f"A quota or floor{of} is a number of rows or a fraction up to 1.0, got {amount!r}.")
        for name in self.quotas.keys() & self.floors.keys():
            who = "A value that is not named" if name is REST else repr(name)
            raise UserError(f"{who} has a quota, which is exact, and a floor, too: leave one of them out.")

    def check_values(self, values: Sequence[str]) -> None:
        """Raise UserError for a value that the column does not hold."""
        unknown = [name for name in (*self.quotas, *self.floors) if name is not REST and name not in values]
        if unknown:
            shown = ", ".join(sorted(values)[:20]) + (", ..." if len(values) > 20 else "")
            raise UserError(f"The column {self.column!r} has no value {unknown[0]!r}; it has {shown}.")

    def budgets(self, values: Sequence[str], rows: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """The least number of rows of each of k values, (k,), and whether it is all that may be kept, (k,) bool.

        Args:
            values: the k values.
            rows: how many rows of the pool have each of them.
        """
        amounts, exact = [], []
        for value in values:
            quota = self.quotas.get(value)
            if quota is None and value not in self.floors:
                quota = self.quotas.get(REST)
            exact.append(quota is not None)
            amounts.append(quota if quota is not None else self.floors.get(value, self.floors.get(REST, 0)))
        least = [
            amount if isinstance(amount, int) else round(amount * n) for amount, n in zip(amounts, rows, strict=True)
        ]
        return np.array(least, dtype=np.int64), np.array(exact, dtype=bool)


def within_bounds(groups: np.ndarray, least: np.ndarray, most: np.ndarray, budget: int | None) -> np.ndarray:
    """Which of n eligible rows are kept, (n,) bool.

    Args:
        groups: (n,) the number of each row's value, the best row first.
        least, most: (k,) rows of each value that come before all others, and that may be kept in all.
        budget: how many rows are kept, of which the best rows of values that may have more fill what is left; None for
            the least ones alone.

    Raises:
        UserError: for a budget that the least ones exceed.

    >>> within_bounds(np.array([0, 0, 1, 0, 1]), np.array([0, 1]), np.array([9, 9]), budget=2).tolist()
    [True, False, True, False, False]
    """
    first = np.argsort(groups, kind="stable")
    ordered = groups[first]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]]) if len(ordered) else np.zeros(0, np.int64)
    within = np.empty(len(groups), dtype=np.int64)  # each row's place among those of its value
    within[first] = np.arange(len(groups)) - np.repeat(starts, np.diff(np.r_[starts, len(groups)]))
    kept = within < least[groups]
    if budget is None:
        return kept
    if kept.sum() > budget:
        raise UserError(
            f"Quotas and floors ask for {kept.sum()} rows, and --keep for {budget} in all: raise --keep, or lower them."
        )
    rest = np.flatnonzero(~kept & (within < most[groups]))[: budget - kept.sum()]
    kept[rest] = True
    return kept


def parse_amounts(entries: Sequence[str] | None, name: str) -> dict[str | None, Amount]:
    """Amounts from texts `VALUE=NUMBER`, or `NUMBER` for all values that are not named (`REST`).

    Args:
        name: of the option or key, for errors.

    >>> parse_amounts(["web=500", "code=0.1"], "--quota")
    {'web': 500, 'code': 0.1}
    """
    amounts: dict[str | None, Amount] = {}
    for entry in entries or ():
        value, equals, number = entry.rpartition("=")
        try:
            amount = int(number) if number.strip().isdecimal() else float(number)
        except ValueError as error:
            raise UserError(f"{name} {entry}: wants a number or VALUE=NUMBER, got {number!r}.") from error
        value = value if equals else REST
        if value in amounts:
            raise UserError(f"{name} is given twice for {'all values' if value is REST else repr(value)}.")
        amounts[value] = amount
    return amounts
