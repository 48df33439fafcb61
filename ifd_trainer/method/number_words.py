"""Numbers in sentences: one row and two rows, and a score that stays below its limit when it is rounded."""

from __future__ import annotations

import math
from collections.abc import Iterable


def many(count: int, one: str, more: str | None = None) -> str:
    """A count with its noun.

    >>> many(1, "row"), many(2000, "row"), many(0, "batch", "batches")
    ('1 row', '2,000 rows', '0 batches')
    """
    return f"{count:,} {one if count == 1 else more or f'{one}s'}"


def listed(parts: Iterable[str]) -> str:
    """Parts of a sentence, one after the other.

    >>> listed(["1"]), listed(["1", "2"]), listed(["1", "2", "3"])
    ('1', '1 and 2', '1, 2 and 3')
    """
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last


def rounded_below(value: float, limit: float | None, digits: int) -> str:
    """A number with so many digits, and with more where it would else be rounded to a limit that it is below.

    >>> rounded_below(0.99998, 1.0, 4), rounded_below(0.99998, None, 4), rounded_below(0.8741, 1.0, 3)
    ('0.99998', '1.0000', '0.874')
    """
    text = f"{value:.{digits}f}"
    if limit is None or not value < limit < math.inf or float(text) < limit:
        return text
    # As many digits as a float has tell it from every other one.
    return next((text for more in range(digits + 1, 18) if float(text := f"{value:.{more}f}") < limit), repr(value))
