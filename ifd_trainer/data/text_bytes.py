"""How long the texts of rows are, told from Arrow without a Python object for each of them."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from .files import tables_of

_ROWS = 10_000  # in memory at a time


def text_bytes(rows: Dataset, columns: Collection[str] | None = None) -> np.ndarray:
    """(n,) int64, the bytes of all texts of each row, also of those inside lists and mappings.

    Args:
        rows: n rows.
        columns: names of the columns to look at; None for all.

    >>> text_bytes(Dataset.from_list([{"a": "xyz", "b": ["x", "yz"], "c": 1}, {"a": None, "b": [], "c": 2}])).tolist()
    [6, 0]
    """
    names = [name for name in rows.column_names if columns is None or name in columns]
    parts = [np.zeros(0, dtype=np.int64)]
    for table in tables_of(rows.select_columns(names), _ROWS):
        parts.append(sum((_bytes(table[name].combine_chunks()) for name in names), np.zeros(len(table), np.int64)))
    return np.concatenate(parts)


def _bytes(array: pa.Array) -> np.ndarray:
    if isinstance(array, pa.ChunkedArray):
        return np.concatenate([np.zeros(0, np.int64), *map(_bytes, array.chunks)])
    if isinstance(array, pa.ExtensionArray):
        return _bytes(array.storage)
    kind = array.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return pc.fill_null(pc.binary_length(array), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(_bytes(array.values))])[array.offsets.to_numpy()]
        return np.diff(ends)
    if pa.types.is_struct(kind):
        return sum(map(_bytes, array.flatten()), np.zeros(len(array), np.int64))
    return np.zeros(len(array), np.int64)
