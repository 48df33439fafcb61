"""A data set read as Arrow tables: a few columns in memory, all others in passing, some rows at a time.

Choosing a part of ten million rows needs their scores, not their texts. A Parquet file is read as it is, without the
copy that a cache of Arrow files would make of it; all else is what `load_rows` gives.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features

from .arrow_files import parquet_features, parquet_tables
from .files import load_rows, tables_of


class TableReader:
    """The rows of a data set, to be read in passing as often as needed.

    Args:
        source: a file, a folder of files or a hub name, as for `load_rows`; or a data set.
        split: split of a folder or a hub data set.
        table_rows: rows in memory at a time.

    Attributes:
        features: the types of all columns.

    Raises:
        FileNotFoundError: when `source` looks like a file and is none.
        ValueError: for an ending that cannot be read.

    >>> rows = TableReader(Dataset.from_dict({"a": [1, 2], "b": ["x", "y"]}))
    >>> len(rows), [table.to_pydict() for table in rows.tables(["a"])]
    (2, [{'a': [1, 2]}])
    """

    def __init__(self, source: str | Dataset, split: str = "train", table_rows: int = 2**16) -> None:
        self._table_rows = table_rows
        self._file = None if isinstance(source, Dataset) else _parquet_file(Path(source), split)
        if self._file is None:
            self._dataset = source if isinstance(source, Dataset) else load_rows(source, split)
            self.features, self._rows = self._dataset.features, len(self._dataset)
        else:
            self.features = parquet_features(self._file)
            self._rows = pq.read_metadata(self._file).num_rows

    def __len__(self) -> int:
        return self._rows

    @property
    def column_names(self) -> list[str]:
        """Names of all columns, in their order."""
        return list(self.features)

    def tables(self, names: Collection[str] | None = None) -> Iterator[pa.Table]:
        """The columns with these names, all by default, in the order of the data set; some rows at a time."""
        if self._file is not None:
            return parquet_tables(self._file, self.features, self._table_rows, names)
        names = [name for name in self.column_names if names is None or name in names]
        return tables_of(self._dataset.select_columns(names), self._table_rows)

    def column(self, name: str) -> pa.ChunkedArray:
        """One column in memory."""
        return self._in_memory([name])[name]

    def frame(self, names: Collection[str]) -> pd.DataFrame:
        """Columns in memory as they are."""
        return Dataset(self._in_memory(names)).to_pandas()

    def _in_memory(self, names: Collection[str]) -> pa.Table:
        schema = Features({name: feature for name, feature in self.features.items() if name in names}).arrow_schema
        return pa.concat_tables([pa.Table.from_batches([], schema), *self.tables(names)])

    def coded_frame(self, names: Collection[str]) -> pd.DataFrame:
        """Columns in memory, the texts among them categorical: of few different ones, no Python object for each row."""
        columns = {}
        for name in filter(names.__contains__, self.column_names):
            values = self.column(name)
            if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
                values = values.dictionary_encode()
            columns[name] = values.to_pandas()
        return pd.DataFrame(columns, copy=False)


def _parquet_file(path: Path, split: str) -> Path | None:
    path = path if path.is_file() else path / f"{split}.parquet"
    return path if path.suffix.lower() == ".parquet" and path.is_file() else None


def selected_tables(rows: TableReader, added: pd.DataFrame, kept: np.ndarray) -> tuple[Iterator[pa.Table], Features]:
    """The rows of a data set, all or some, with further columns at the end, in the place of old ones of the same names.

    Args:
        rows: n rows.
        added: (n rows) columns of numbers (NaN becomes null) and of texts, categorical ones as what they stand for.
        kept: (n,) bool, the rows wanted.

    Returns:
        The rows, some at a time, and the types of their columns.

    >>> rows, added = TableReader(Dataset.from_dict({"a": [1, 2]})), pd.DataFrame({"b": [0.5, 0.7]})
    >>> tables, features = selected_tables(rows, added, kept=np.array([False, True]))
    >>> [table.to_pydict() for table in tables], list(features)
    ([{'a': [2], 'b': [0.7]}], ['a', 'b'])
    """
    columns = {
        name: pa.array(values, None if isinstance(values.dtype, pd.CategoricalDtype) else arrow_type(values.dtype))
        for name, values in added.items()
    }
    old = [name for name in rows.column_names if name not in columns]
    types = {name: arrow_type(values.dtype) for name, values in added.items()}
    features = Features(
        {name: rows.features[name] for name in old} | Features.from_arrow_schema(pa.schema(types.items()))
    )

    def tables() -> Iterator[pa.Table]:
        start = 0
        for table in rows.tables(old or None):  # without a column, a table has no rows
            wanted = pa.array(kept[start : start + len(table)])
            new = [columns[name].slice(start, len(table)).filter(wanted).cast(type) for name, type in types.items()]
            start += len(table)
            if wanted.true_count:
                yield pa.table([*table.select(old).filter(wanted).columns, *new], schema=features.arrow_schema)

    return tables(), features


@dataclass(frozen=True)
class Lists:
    """A column of lists.

    Attributes:
        values: numbers or texts of all rows, one row's behind another's.
        counts: (n,) how many of them each row has.

    >>> Lists(np.array([0.5, np.nan, 2.0]), [2, 1]).arrow().to_pylist()
    [[0.5, None], [2.0]]
    """

    values: np.ndarray
    counts: Sequence[int]

    def arrow(self) -> pa.ListArray:
        """As Arrow has it; NaN is null."""
        offsets = np.concatenate([[0], np.cumsum(self.counts)])
        return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), arrow_array(self.values))


def arrow_array(values: np.ndarray | Lists | pa.Array) -> pa.Array:
    """A column of scores, or lists of them, as Arrow has it; NaN is null."""
    if isinstance(values, pa.Array):
        return values
    return values.arrow() if isinstance(values, Lists) else pa.array(values, arrow_type(values.dtype), from_pandas=True)


def arrow_type(dtype: Any) -> pa.DataType:
    """Arrow's type for a column of scores: floats, whole numbers, or texts (of objects and categories)."""
    return {"f": pa.float64(), "i": pa.int64()}.get(dtype.kind, pa.string())
