"""Data sets in and out: JSON, JSON lines, CSV, Parquet files and hub names.

What is read is written back as it was: text stays text (also "NA", "007" or a date), null and the empty text stay
apart, nested values stay nested, and each of several types in a column stays of its type. CSV has no nested values: a
list or a mapping is written there as JSON. Reading and writing a file take memory for some rows, however many it holds.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from datasets import Dataset, Features, Value, concatenate_datasets, load_from_disk
from datasets.exceptions import DatasetGenerationError, DatasetsError

from ..errors import FileAccessError, NotFoundError, UserError, one_line
from .arrow_files import file_digest, python_values, read_csv, read_json, read_parquet, record_blocks
from .atomic import write_atomically
from .paths import COMPRESSIONS, ENDINGS, check_rows, data_ending, ending_of
from .paths import check_writable as check_writable  # a name of this module too

logger = logging.getLogger(__name__)
READERS = {".json": read_json, ".jsonl": read_json, ".csv": read_csv, ".parquet": read_parquet}
_CHUNK_ROWS = 10_000  # rows in memory at a time
_ROW_GROUP_BYTES = 100 * 10**6


def load_rows(source: str, split: str = "train", config: str | None = None) -> Dataset:
    """A data set from a file (by its ending), a folder of files or of `save_to_disk`, or from a hub, by name.

    JSON and CSV may be compressed (`.jsonl.gz`, `.csv.bz2`, `.json.zst`).

    Raises:
        FileNotFoundError: when `source` looks like a file and is none, for a folder without data, and for a name that
            the hub does not know.
        ValueError: for an ending that cannot be read, an empty file, or a folder of unlike files.
        FileAccessError: when a hub cannot be reached.
    """
    check_rows(source)
    path = Path(source)
    if path.is_file():
        return READERS[data_ending(path)](path)
    if (path / f"{split}.parquet").is_file():
        return read_parquet(path / f"{split}.parquet")
    saved = _saved(path, split)
    if saved is not None:
        return load_from_disk(saved).with_format(None)
    if path.is_dir():
        _check_folder(path)
        source = str(path.resolve())  # `load_dataset` cannot read "."
    try:
        return datasets.load_dataset(source, config, split=split)
    except DatasetGenerationError as error:
        why = one_line(error.__cause__ or error)[:300]
        raise UserError(f"The files in {source} cannot be read as one data set: {why}. Name one of them.") from error
    except (FileNotFoundError, ConnectionError) as error:  # all that `datasets` raises for what it does not find
        why = one_line(error)[:300]
        if path.is_dir():
            raise NotFoundError(f"No data set in {source}: {why}") from error
        kind = FileAccessError if isinstance(error, ConnectionError) else NotFoundError
        raise kind(
            f"There is no file or folder {source!r} here, and as the name of a data set on a hub it cannot be read "
            f"({why}). Check the name and the network."
        ) from error
    except (DatasetsError, OSError, ValueError) as error:  # an unknown split or configuration, with those there are
        raise UserError(f"Cannot read {source}: {one_line(error)[:300]}") from error


def _saved(path: Path, split: str) -> Path | None:
    """The folder of `save_to_disk` in or at this path."""
    saved = path / split if (path / "dataset_dict.json").is_file() else path
    return saved if (saved / "state.json").is_file() and (saved / "dataset_info.json").is_file() else None


def _check_folder(path: Path) -> None:
    """Raise ValueError for a folder without files, or with a file and the same one compressed: rows come twice."""
    files = [file for file in path.rglob("*") if file.is_file() and not file.name.startswith(".")]
    if not files:
        raise NotFoundError(f"The folder {path} holds no files. Name a file ending in {ENDINGS}, or a folder of them.")
    plain: dict[Path, Path] = {}
    for file in sorted(files):
        name = file.with_suffix("") if file.suffix.lower() in COMPRESSIONS else file
        if (twin := plain.setdefault(name, file)) != file:
            raise UserError(f"{path} holds {twin.name} and {file.name}: rows would come twice. Name one of them.")


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
    write = _WRITERS[ending_of(path)]
    check_features(features, path)
    # A set without rows has columns too.
    tables = chain([pa.Table.from_batches([], features.arrow_schema)], tables)
    write_atomically(path, lambda temporary: write(tables, features, temporary), folder)


def tables_of(dataset: Dataset, rows: int) -> Iterator[pa.Table]:
    """A data set as tables of so many rows, the last one of fewer.

    >>> [table.num_rows for table in tables_of(Dataset.from_dict({"a": [1, 2, 3]}), 2)]
    [2, 1]
    """
    return dataset.with_format("arrow").iter(rows)


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


def check_apart(output: str | os.PathLike, source: str, split: str = "train") -> None:
    """Raise ValueError now if rows would be written over the file, or into the folder, that they are read from.

    What is read could not be scored again, with `--limit` rows would be lost, and a folder would hold them twice.
    """
    read, written = Path(source), Path(output)
    whole = read / f"{split}.parquet"
    file = whole if whole.is_file() else read
    if file.is_file() and written.exists() and written.samefile(file):
        raise UserError(f"--output {output} is the file that is read ({file}). Write to another file.")
    if file.is_dir() and Path(os.path.realpath(written)).is_relative_to(Path(os.path.realpath(read))):
        raise UserError(f"--output {output} is in the folder that is read ({source}). Write to another folder.")


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


def source_digest(source: str, rows: Dataset) -> str:
    """A digest of a file's bytes, or the fingerprint of a hub data set."""
    path = Path(source)
    return file_digest(path) if path.is_file() else rows._fingerprint


def _has_bytes(type: pa.DataType) -> bool:
    """Whether a type of Arrow is, or has inside, one of bytes."""
    kinds = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary, pa.types.is_binary_view)
    return any(kind(type) for kind in kinds) or any(_has_bytes(type.field(i).type) for i in range(type.num_fields))


def _write_parquet(tables: Iterable[pa.Table], features: Features, path: Path) -> None:
    """Row groups of about 100 MB in memory, as data hubs like them, cut so that equal rows make equal pages."""
    waiting: list[pa.Table] = []
    size = 0
    options = {"use_content_defined_chunking": True, "write_page_index": True, "write_page_checksum": True}
    with pq.ParquetWriter(path, features.arrow_schema, **options) as writer:
        for table in tables:
            waiting.append(table)
            size += table.nbytes
            if size >= _ROW_GROUP_BYTES:
                writer.write_table(pa.concat_tables(waiting))
                waiting, size = [], 0
        if waiting:
            writer.write_table(pa.concat_tables(waiting))


def _dumps(value: Any) -> str:
    """JSON in which text stays readable."""
    return json.dumps(value, ensure_ascii=False, default=str)


def _slices(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    for table in tables:
        for start in range(0, max(len(table), 1), _CHUNK_ROWS):
            yield table.slice(start, _CHUNK_ROWS)


def _write_json(
    tables: Iterable[pa.Table], features: Features, path: Path, begin: str = "[\n", between: str = ",\n"
) -> None:
    """A list of objects; a missing score is null."""
    with path.open("w", encoding="utf-8") as file:
        file.write(begin)
        separator = ""
        for table in _slices(tables):
            columns = [python_values(table[name], feature) for name, feature in features.items()]
            for values in zip(*columns, strict=True):
                file.write(separator + _dumps(dict(zip(features, values, strict=True))))
                separator = between
        file.write("\n]\n" if begin else "\n")


def _write_csv(tables: Iterable[pa.Table], features: Features, path: Path) -> None:
    """Some rows at a time; texts in quotes, a null and NaN without."""
    writer = None
    for table in _slices(tables):
        for i, (name, feature) in enumerate(features.items()):
            column = table[name]
            if not isinstance(feature, Value) or pa.types.is_nested(feature.pa_type):
                values = python_values(column, feature)
                column = pa.array([None if value is None else _dumps(value) for value in values], pa.string())
            elif pa.types.is_floating(column.type):
                column = pc.if_else(pc.is_nan(column), pa.scalar(None, column.type), column)
            table = table.set_column(i, name, column)
        writer = writer or pa.csv.CSVWriter(path, table.schema)
        writer.write_table(table)
    writer.close()


_WRITERS = {
    ".json": _write_json,
    ".jsonl": partial(_write_json, begin="", between="\n"),  # one object a line
    ".csv": _write_csv,
    ".parquet": _write_parquet,
}
