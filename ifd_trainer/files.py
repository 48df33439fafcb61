"""Data sets in and out: JSON, JSON lines, CSV, Parquet files and hub names; and parts of a job that can be resumed.

What is read is written back as it was: text stays text (also "NA", "007" or a date), null and the empty text stay
apart, nested values stay nested, and each of several types in a column stays of its type. CSV has no nested values: a
list or a mapping is written there as JSON. Reading and writing a file take memory for some rows, however many it holds.
"""

from __future__ import annotations

import errno
import json
import os
import platform
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
from datasets import Dataset, DatasetInfo, Features, Value, concatenate_datasets, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError

from .arrow_files import (
    file_digest,
    holds_json,
    one_line,
    python_values,
    read_csv,
    read_json,
    read_parquet,
    record_blocks,
)
from .errors import NotFoundError, UserError
from .history import write_atomically
from .paths import check_rows, ending_of
from .paths import check_writable as check_writable  # a name of this module too

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

READERS = {".json": read_json, ".jsonl": read_json, ".csv": read_csv, ".parquet": read_parquet}
_CHUNK_ROWS = 10_000  # rows in memory at a time
_ROW_GROUP_BYTES = 100 * 10**6


def load_rows(source: str, split: str = "train", config: str | None = None) -> Dataset:
    """A data set from a file (by its ending), a folder of files or of `save_to_disk`, or from a hub, by name.

    Raises:
        FileNotFoundError: when `source` looks like a file and is none.
        ValueError: for an ending that cannot be read, or a folder of unlike files.
    """
    check_rows(source)
    path = Path(source)
    if path.is_file():
        return READERS[ending_of(path)](path)
    if (path / f"{split}.parquet").is_file():
        return read_parquet(path / f"{split}.parquet")
    saved = path / split if (path / "dataset_dict.json").is_file() else path
    if (saved / "state.json").is_file() and (saved / "dataset_info.json").is_file():
        return load_from_disk(saved).with_format(None)
    if path.is_dir():
        try:
            return load_dataset(str(path.resolve()), config, split=split)  # which cannot read "."
        except (DatasetsError, OSError, ValueError) as error:
            why = one_line(error.__cause__ or error)[:300]
            raise UserError(f"The files in {path} cannot be read as one data set: {why}. Name one of them.") from error
    try:
        return load_dataset(source, config, split=split)
    except (DatasetsError, OSError, ValueError) as error:  # no hub, or no such name, config or split
        raise NotFoundError(
            f"There is no file or folder {source!r} here, and as the name of a data set on a hub it cannot be read "
            f"({one_line(error)[:300]}). Check the name, the split ({split}) and the network."
        ) from error


def write_rows(dataset: Dataset, path: str | os.PathLike, folder: Path | None = None) -> None:
    """Write a data set in the format of the path's ending, atomically; nulls stay nulls. See `write_tables`."""
    write_tables(tables_of(dataset, _CHUNK_ROWS), dataset.features, path, folder)


def write_tables(
    tables: Iterable[pa.Table], features: Features, path: str | os.PathLike, folder: Path | None = None
) -> None:
    """Write tables one after another, as `write_rows` does a data set; few of them are in memory at a time.

    Args:
        tables: parts of a data set.
        features: the types of its columns.
        path: the file; its ending says the format.
        folder: where the file is until it is complete, on the same file system; by default beside its place.

    Raises:
        ValueError: see `check_features`.
    """
    path = Path(path)
    ending = ending_of(path)
    check_features(features, path)
    # A set without rows has columns too.
    tables = chain([pa.Table.from_batches([], features.arrow_schema)], tables)

    def write(temporary: Path) -> None:
        if ending == ".parquet":
            _write_parquet(tables, features.arrow_schema, temporary)
            return
        info = DatasetInfo(features=features)
        # A fingerprint that is given is not computed from the rows.
        parts = (Dataset(part, info, fingerprint="part") for table in tables for part in _slices(table))
        if ending == ".csv":
            _write_csv(parts, temporary)
        else:
            _write_json(parts, temporary, lines=ending == ".jsonl")

    write_atomically(path, write, folder)


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


def check_features(features: Features, path: str | os.PathLike) -> None:
    """Raise ValueError now for columns that the format of this path cannot hold: bytes are in Parquet files only."""
    names = [field.name for field in features.arrow_schema if _has_bytes(field.type)]
    if names and (ending := ending_of(Path(path))) != ".parquet":
        raise UserError(
            f"Cannot write {path}: {ending} is text, and the column {names[0]!r} holds bytes. Write to a .parquet "
            "file, or drop the column."
        )


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
        job: what the parts depend on, by name; parts of another job are not taken over.
        main: whether this is the process of the job that writes the output. It keeps other jobs out of the folder until
            it ends, and makes the folder its own when an earlier job has finished no part there.

    Raises:
        ValueError: when the folder holds parts of another job, or such of which nothing says whose they are, and when
            another job is at work in it.
    """

    def __init__(
        self, output: str | os.PathLike, job: Mapping[str, str | int | float | None], main: bool = False
    ) -> None:
        self.folder = Path(f"{os.fspath(output)}.parts")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(self.folder / "lock", output) if main else None
        self._done: set[int] = set()
        path = self.folder / "job.json"
        begun = any(self.folder.glob("part-*.parquet"))
        try:
            if begun or (path.exists() and not main):
                _check_job(path, job)
            else:
                write_atomically(path, lambda temporary: temporary.write_text(json.dumps(dict(job)), encoding="utf-8"))
        except BaseException:
            self.close()
            raise

    def path(self, part: int) -> Path:
        return self.folder / f"part-{part:06d}.parquet"

    def done(self, part: int, rows: int) -> bool:
        """Whether a part is there, of so many rows; a file that is empty or cut off is none. Each is read once."""
        if part not in self._done and self.path(part).exists():
            try:
                found = pq.read_metadata(self.path(part)).num_rows
            except (OSError, pa.ArrowInvalid):
                return False
            if found == rows:
                self._done.add(part)
        return part in self._done

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
                waiting.append(self._read(part))
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

    def _read(self, part: int) -> pa.Table:
        try:
            return pq.read_table(self.path(part))
        except (OSError, pa.ArrowInvalid) as error:
            raise UserError(
                f"{self.path(part)} is damaged ({one_line(error)}). Delete it, and run the same command again to score "
                "its rows."
            ) from error

    def remove(self) -> None:
        """Delete the folder; one that is interrupted leaves no parts that a later job could take for its own."""
        gone = self.folder.with_name(f"{self.folder.name}-removed")
        shutil.rmtree(gone, ignore_errors=True)
        self.folder.rename(gone)
        self.close()  # on network file systems an open file keeps its folder
        shutil.rmtree(gone)

    def close(self) -> None:
        """Let other jobs into the folder; they go on with the parts that are there. One without parts is deleted."""
        if self._lock is not None:
            if not any(self.folder.glob("part-*.parquet")):
                shutil.rmtree(self.folder, ignore_errors=True)
            os.close(self._lock)
            self._lock = None


def _lock(path: Path, output: str | os.PathLike) -> int | None:
    """A lock that ends with this process, also when it is killed; None on systems that have no locks.

    Raises:
        ValueError: when another process has it.
    """
    if fcntl is None:
        return None
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)  # never closed by the garbage collector, which ends the lock
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.pread(file, 1000, 0).decode()
        os.close(file)
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return None
        raise UserError(
            f"Another job is making {os.fspath(output)} ({holder}). Wait until it is done, end it, or write to another "
            "file."
        ) from error
    os.truncate(file, 0)
    os.write(file, f"process {os.getpid()} on {platform.node()}".encode())
    return file


def _check_job(path: Path, job: Mapping[str, str | int | float | None]) -> None:
    """Raise ValueError if the parts beside this file are not known to be of the job."""
    folder, remedy = path.parent, "Delete the folder to start anew, or write to another file."
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        differs = [key for key in {**job, **found} if found.get(key) != job.get(key)]
    except FileNotFoundError as error:
        raise UserError(f"{folder} holds parts, but no {path.name} to say of which job. {remedy}") from error
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}), so the parts may be of another job. {remedy}") from error
    if differs:
        changes = "; ".join(f"{key}: {_shown(found.get(key))} there, {_shown(job.get(key))} now" for key in differs)
        raise UserError(f"{folder} holds parts of another job: {changes}. {remedy}")


def _shown(option: str | int | float | None) -> str:
    return "not set" if option is None else str(option)


def source_digest(source: str, rows: Dataset) -> str:
    """A digest of a file's bytes, or the fingerprint of a hub data set."""
    path = Path(source)
    return file_digest(path) if path.is_file() else rows._fingerprint


def _has_bytes(type: pa.DataType) -> bool:
    """Whether a type of Arrow is, or has inside, one of bytes."""
    kinds = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary, pa.types.is_binary_view)
    return any(kind(type) for kind in kinds) or any(_has_bytes(type.field(i).type) for i in range(type.num_fields))


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
