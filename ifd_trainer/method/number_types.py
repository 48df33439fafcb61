"""What counts as a number in an option: True and False, which Python has among the whole numbers, do not."""

from __future__ import annotations

from numbers import Integral, Real

from ..errors import UserError


def is_number(value: object) -> bool:
    """Whether a value is a real number, of Python or of NumPy.

    >>> [is_number(value) for value in (0.5, 3, True, "3", None)]
    [True, True, False, False, False]
    """
    return isinstance(value, Real) and not isinstance(value, bool)


def is_whole(value: object) -> bool:
    """Whether a value is a whole number by its type.

    >>> [is_whole(value) for value in (3, 3.0, True)]
    [True, False, False]
    """
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_rows_share(name: str, value: object) -> None:
    """Raise unless a value is a fraction of rows, or a number of them.

    >>> check_rows_share("share", 0.5), check_rows_share("share", 100)
    (None, None)
    """
    part = is_number(value) and not is_whole(value) and 0 < value <= 1
    if not part and not (is_whole(value) and value >= 1):
        raise UserError(f"{name} must be a fraction in (0, 1], such as 0.5, or a number of rows, got {value!r}.")


def rows_of_share(value: float | int, rows: int) -> int:
    """How many of these rows such a value is.

    >>> rows_of_share(0.5, 7), rows_of_share(100, 7)
    (4, 100)
    """
    return int(value) if is_whole(value) else round(value * rows)
