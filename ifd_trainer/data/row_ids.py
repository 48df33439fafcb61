"""Which column tells rows apart: one rule for the callback, for `select` and for the recipe runner.

A column that the user names has to serve: plain, no null, no value twice. One that is merely called `row_id` or `id` is
used where it serves; else rows are known by their positions, and one line says so.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import UserError, shown_value

logger = logging.getLogger(__name__)

NAMES = ("row_id", "id")  # the first that serves
MOST_CHARACTERS = 1000  # of an id: longer ones are texts, and would be compared and stored for each row

Ids = np.ndarray | pa.ChunkedArray


def find_ids(
    names: Collection[str], read: Callable[[str], pa.ChunkedArray], column: str | None = None, option: str = "id_column"
) -> tuple[str | None, Ids | None]:
    """The column that tells rows apart, and its values.

    Args:
        names: columns of the data set.
        read: the values of a column.
        column: the column that the user named.
        option: what the user named it with, for messages.

    Returns:
        The name, and the values: numbers as an array, texts as an Arrow array. None twice where positions are all
        there is.

    Raises:
        ValueError: when the named column is missing, or does not serve.

    >>> columns = {"row_id": ["a", "a"], "id": [7, 5]}
    >>> find_ids(columns, lambda name: pa.chunked_array([columns[name]]))
    ('id', array([7, 5]))
    """
    if column is not None and column not in names:
        raise UserError(f"There is no column {column!r} of row ids ({option}); the columns are {sorted(names)}.")
    found, ids, passed = None, None, []
    for name in filter(names.__contains__, NAMES) if column is None else [column]:
        plain = _plain(read(name))
        problem = plain if isinstance(plain, str) else _problem(plain)
        if not problem:
            found, ids = name, plain
            break
        if column is not None:
            raise UserError(
                f"The column {column!r}, named with {option}, cannot tell rows apart: {problem}. Name another one, or "
                "leave it out: rows are then known by their positions."
            )
        passed.append(f"{name!r}: {problem}")
    if passed:
        known_by = f"the column {found!r}" if found else "their positions"
        what = "Rows are known by %s, not by a column that cannot tell them apart (%s)."
        logger.warning(what, known_by, "; ".join(passed))
    return found, ids


def named_ids(names: Collection[str]) -> str | None:
    """The column that is called like one of row ids, whether it serves or not: what a report shows and matches by.

    >>> named_ids(["id", "row_id", "text"])
    'row_id'
    """
    return next((name for name in NAMES if name in names), None)


def as_array(ids: Ids) -> np.ndarray:
    """Ids as an array: numbers, or texts as objects (of one fixed width, a long id would widen all others)."""
    return ids if isinstance(ids, np.ndarray) else ids.to_numpy().astype(object)


def ranks(ids: pa.ChunkedArray, among: np.ndarray | None = None) -> np.ndarray:
    """The places of texts in their order, (n,) int64: numbers that sort as they do.

    Args:
        ids: n texts.
        among: (n,) bool, the rows to rank, all by default; the others get 0. To sort ten million texts takes longer
            than all the rest of a selection.

    >>> ranks(pa.chunked_array([["b", "a", "c"]])).tolist()
    [1, 0, 2]
    """
    among = np.ones(len(ids), dtype=bool) if among is None else among
    rows, places = np.flatnonzero(among), np.zeros(len(ids), dtype=np.int64)
    places[rows[pc.sort_indices(ids.filter(pa.array(among))).to_numpy()]] = np.arange(len(rows))
    return places


def _plain(values: pa.ChunkedArray) -> Ids | str:
    """Numbers as an array and texts as Arrow texts; of other columns, what is wrong with them."""
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    kind = values.type
    if values.null_count:
        row = pc.index(pc.is_null(values), True)
        return f"{values.null_count} of {len(values)} values are null, the first in row {row}"
    if pa.types.is_integer(kind):
        return values.to_numpy()
    if pa.types.is_floating(kind):
        numbers = values.to_numpy().astype(np.float64)
        unlike = np.flatnonzero(~np.isfinite(numbers))
        if not len(unlike):
            return numbers
        first = f"the first ({numbers[unlike[0]]}) in row {unlike[0]}"
        return f"{len(unlike)} of {len(numbers)} values are no numbers, {first}"
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        shown = shown_value(values[0].as_py()) if len(values) else "none"
        return f"its values are neither numbers nor texts but {kind}, such as {shown}"
    lengths = pc.utf8_length(values)
    longest = pc.max(lengths).as_py() or 0
    if longest > MOST_CHARACTERS:
        row = pc.index(lengths, longest).as_py()
        shown = shown_value(values[row].as_py())
        return f"a value has {longest:,} characters (row {row}: {shown}), an id has at most {MOST_CHARACTERS:,}"
    return values


def _problem(ids: Ids) -> str | None:
    """What is wrong with plain ids."""
    if _unique(ids):
        return None
    again = pd.Series(as_array(ids)).duplicated().to_numpy()
    shown = shown_value(as_array(ids)[again][:1].tolist()[0])
    return f"{again.sum()} of {len(again)} values are there more than once, such as {shown}"


def _unique(ids: Ids) -> bool:
    """Whether no value occurs twice. Of texts, digests tell; those that share one are compared themselves."""
    if isinstance(ids, np.ndarray):
        return not len(_repeated(ids))
    digests = [pd.util.hash_array(chunk.to_numpy(zero_copy_only=False), categorize=False) for chunk in ids.chunks]
    digests = np.concatenate([np.zeros(0, np.uint64), *digests])
    doubtful = ids.filter(pa.array(np.isin(digests, _repeated(digests))))
    return pc.count_distinct(doubtful).as_py() == len(doubtful)


def _repeated(values: np.ndarray) -> np.ndarray:
    ordered = np.sort(values)
    return ordered[1:][ordered[1:] == ordered[:-1]]
