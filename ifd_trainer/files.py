"""Data sets in and out: JSON, JSON lines, CSV, Parquet files and hub names; and parts of a job that can be resumed.

What is read is written back as it was: text stays text (also "NA", "007" or a date), null and the empty text stay
apart, nested values stay nested, and each of several types in a column stays of its type. CSV has no nested values: a
list or a mapping is written there as JSON. Reading and writing a file take memory for some rows, however many it holds.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from datasets import Dataset, DatasetInfo, Features, Value, concatenate_datasets, load_dataset

from .arrow_files import file_digest, holds_json, python_values, read_csv, read_json, read_parquet, record_blocks
from .history import write_atomically

READERS = {".json": read_json, ".jsonl": read_json, ".csv": read_csv, ".parquet": read_parquet}
_CHUNK_ROWS = 10_000  # rows in memory at a time
_ROW_GROUP_BYTES = 100 * 10**6


def load_rows(source: str, split: str = "train", config: str | None = None) -> Dataset:
    """A data set from a file (by its ending), from a folder of files, or from a hub, by name.

    Raises:
        FileNotFoundError: when `source` looks like a file and is none.
        ValueError: for an ending that cannot be read.
    """
    path = Path(source)
    if path.is_file():
        return READERS[_ending(path)](path)
    if (path / f"{split}.parquet").is_file():
        return read_parquet(path / f"{split}.parquet")
    if path.is_dir():
        return load_dataset(str(path), config, split=split)
    if path.suffix in READERS or source.startswith((".", "/")):
        raise FileNotFoundError(
            f"No such file: {source}. Files end in {', '.join(READERS)}; other names are hub names."
        )
    return load_dataset(source, config, split=split)


def write_rows(dataset: Dataset, path: str | os.PathLike) -> None:
    """Write a data set in the format of the path's ending, atomically; nulls stay nulls."""
    write_tables(tables_of(dataset, _CHUNK_ROWS), dataset.features, path)


def write_tables(tables: Iterable[pa.Table], features: Features, path: str | os.PathLike) -> None:
    """Write tables one after another, as `write_rows` does a data set; few of them are in memory at a time.

    Args:
        tables: parts of a data set.
        features: the types of its columns.
        path: the file; its ending says the format.
    """
    path = Path(path)
    _ending(path)
    # A set without rows has columns too.
    tables = chain([pa.Table.from_batches([], features.arrow_schema)], tables)

    def write(temporary: Path) -> None:
        if path.suffix == ".parquet":
            _write_parquet(tables, features.arrow_schema, temporary)
            return
        info = DatasetInfo(features=features)
        # A fingerprint that is given is not computed from the rows.
        parts = (Dataset(part, info, fingerprint="part") for table in tables for part in _slices(table))
        if path.suffix == ".csv":
            _write_csv(parts, temporary)
        else:
            _write_json(parts, temporary, lines=path.suffix == ".jsonl")

    write_atomically(path, write)


def tables_of(dataset: Dataset, rows: int) -> Iterator[pa.Table]:
    """A data set as tables of so many rows, the last one of fewer.

    >>> [table.num_rows for table in tables_of(Dataset.from_dict({"a": [1, 2, 3]}), 2)]
    [2, 1]
    """
    return dataset.with_format("arrow").iter(rows)


def _slices(table: pa.Table) -> Iterator[pa.Table]:
    return (table.slice(start, _CHUNK_ROWS) for start in range(0, max(len(table), 1), _CHUNK_ROWS))


def with_columns(dataset: Dataset, columns: Dataset) -> Dataset:
    """The data set with these columns at its end, in the place of old ones of the same names."""
    kept = [name for name in dataset.column_names if name not in columns.column_names]
    both = concatenate_datasets([dataset.select_columns(kept), columns], axis=1)
    return both.select_columns([*kept, *columns.column_names])  # joined, columns come in the order of their files


def read_records(path: str | os.PathLike) -> list:
    """The values of a JSON list, or of JSON lines, whatever the file's ending; NaN and Infinity are read too.

    Raises:
        ValueError: for a file that is neither; the message names the line of the value that cannot be read.
    """
    return list(chain.from_iterable(record_blocks(Path(path))))


def check_writable(path: str | os.PathLike) -> None:
    """Raise ValueError now if `write_rows` could not write to this path after hours of work."""
    _ending(Path(path))
    if not os.access(_existing_parent(Path(path)), os.W_OK):
        raise ValueError(f"Cannot write to {path}: the folder is not writable.")


def output_file(output: str) -> tuple[Path, bool]:
    """The data file for an output, and whether the output is a folder: a name without an ending, or one that is there.

    >>> output_file("cherry")[0].as_posix(), output_file("cherry.jsonl")[0].as_posix()
    ('cherry/train.parquet', 'cherry.jsonl')
    """
    path = Path(output)
    folder = path.is_dir() or output.endswith(("/", os.sep)) or not path.suffix
    return (path / "train.parquet" if folder else path), folder


class Parts:
    """Finished parts of a job beside its output file, so that it can be interrupted and run again.

    Args:
        output: the file that the job makes; parts are kept in `<output>.parts`.
        job: what the parts depend on; parts of another job are not taken over.

    Raises:
        ValueError: when the folder holds parts of another job.
    """

    def __init__(self, output: str | os.PathLike, job: dict[str, str | int]) -> None:
        self.folder = Path(f"{os.fspath(output)}.parts")
        path = self.folder / "job.json"
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            differs = sorted(key for key in job if found.get(key) != job[key])
            if differs:
                raise ValueError(
                    f"{self.folder} holds parts of another job: {', '.join(differs)} differ. Delete the folder to "
                    "start anew, or write to another file."
                )
        else:
            write_atomically(path, lambda temporary: temporary.write_text(json.dumps(job), encoding="utf-8"))

    def path(self, part: int) -> Path:
        return self.folder / f"part-{part:06d}.parquet"

    def done(self, part: int) -> bool:
        return self.path(part).exists()

    def save(self, part: int, columns: Mapping[str, np.ndarray]) -> None:
        """Write the columns of a part, numbers or texts; NaN becomes null."""
        types = {"O": pa.string(), "f": pa.float64(), "i": pa.int64()}
        table = pa.table(
            {name: pa.array(values, types[values.dtype.kind], from_pandas=True) for name, values in columns.items()}
        )
        write_atomically(self.path(part), lambda temporary: pq.write_table(table, temporary))

    def join(self, count: int) -> Dataset:
        """The parts one after another, on disk: valid until `remove`."""

        def write(path: Path) -> None:
            writer, waiting = None, []
            for part in range(count):
                waiting.append(pq.read_table(self.path(part)))
                if part + 1 < count and sum(table.num_rows for table in waiting) < _CHUNK_ROWS:
                    continue
                table = pa.concat_tables(waiting).combine_chunks()
                writer = writer or pa.ipc.new_stream(path, table.schema)
                writer.write_table(table)
                waiting = []
            writer.close()

        path = self.folder / "joined.arrow"
        write_atomically(path, write)
        return Dataset.from_file(str(path))

    def remove(self) -> None:
        """Delete the folder; one that is interrupted leaves no parts that a later job could take for its own."""
        gone = self.folder.with_name(f"{self.folder.name}-removed")
        shutil.rmtree(gone, ignore_errors=True)
        self.folder.rename(gone)
        shutil.rmtree(gone)


def source_digest(source: str, rows: Dataset) -> str:
    """A digest of a file's bytes, or the fingerprint of a hub data set."""
    path = Path(source)
    return file_digest(path) if path.is_file() else rows._fingerprint


def _ending(path: Path) -> str:
    if path.suffix not in READERS:
        raise ValueError(f"Cannot tell the format of {path} from its ending; use one of {', '.join(READERS)}.")
    return path.suffix


def _existing_parent(path: Path) -> Path:
    parent = path.resolve().parent
    while not parent.exists():
        parent = parent.parent
    return parent


def _write_parquet(tables: Iterable[pa.Table], schema: pa.Schema, path: Path) -> None:
    """Row groups of about 100 MB in memory, as data hubs like them, cut so that equal rows make equal pages."""
    waiting: list[pa.Table] = []
    size = 0
    with pq.ParquetWriter(path, schema, use_content_defined_chunking=True, write_page_index=True) as writer:
        for table in tables:
            waiting.append(table)
            size += table.nbytes
            if size >= _ROW_GROUP_BYTES:
                writer.write_table(pa.concat_tables(waiting))
                waiting, size = [], 0
        if waiting:
            writer.write_table(pa.concat_tables(waiting))


def _python_columns(part: Dataset, names: list[str]) -> dict[str, list]:
    """These columns as Python values, with every digit of the floats that `Json` holds."""
    exact = [name for name in names if holds_json(part.features[name])]
    others = [name for name in names if name not in exact]
    found = part.with_format(None).select_columns(others)[:] if others else {}
    table = part.with_format("arrow").select_columns(exact)[:] if exact else None
    found |= {name: python_values(table[name], part.features[name]) for name in exact}
    return {name: found[name] for name in names}


def _dumps(value: Any) -> str:
    """JSON in which text stays readable."""
    return json.dumps(value, ensure_ascii=False, default=str)


def _write_json(parts: Iterable[Dataset], path: Path, lines: bool) -> None:
    """One object a line, or a list of them; a missing score is null."""
    with path.open("w", encoding="utf-8") as file:
        separator = first = "" if lines else "[\n"
        for part in parts:
            columns = _python_columns(part, part.column_names)
            for values in zip(*columns.values(), strict=True):
                file.write(separator + _dumps(dict(zip(columns, values, strict=True))))
                separator = "\n" if lines else ",\n"
        if lines:
            file.write("\n")
        else:
            file.write("[\n\n]\n" if separator == first else "\n]\n")


def _write_csv(parts: Iterable[Dataset], path: Path) -> None:
    """Some rows at a time; texts in quotes, a null and NaN without."""
    writer = None
    for part in parts:
        nested = [
            name
            for name, feature in part.features.items()
            if not isinstance(feature, Value) or pa.types.is_nested(feature.pa_type)
        ]
        table, values = part.with_format("arrow")[:], _python_columns(part, nested)
        for i, field in enumerate(table.schema):
            if field.name in nested:
                texts = [None if cell is None else _dumps(cell) for cell in values[field.name]]
                table = table.set_column(i, field.name, pa.array(texts, pa.string()))
            elif pa.types.is_floating(field.type):
                table = table.set_column(
                    i, field, pc.if_else(pc.is_nan(table[i]), pa.scalar(None, field.type), table[i])
                )
        writer = writer or pa.csv.CSVWriter(path, table.schema)
        writer.write_table(table)
    writer.close()
