"""CSV, JSON and Parquet files as data sets on disk, made some rows at a time: memory does not grow with the file.

Values stay what they are. CSV and JSON are read twice, once for the types of their columns, which no row but the last
one settles, and once for their values. The rows are kept as Arrow in the cache of `datasets`, under a digest of the
file. A place that holds values of several types, or mappings of unlike keys, has the type `Json` of `datasets`: each
value is a JSON text in the file, and a Python value again in the data set's rows.

`datasets.load_dataset` was tried for each format, with 773,000 Alpaca rows (1 GB of JSON lines); what is lost with it
is written at each reader. The Arrow file has the same size, 0.9 GB.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import json
import lzma
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from io import BufferedReader, TextIOWrapper
from itertools import chain
from pathlib import Path
from typing import Any

import datasets.config
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from datasets import Dataset, Features, List, Value
from datasets.table import table_cast

from ..errors import FileAccessError, UserError, one_line
from .atomic import write_atomically
from .json_feature import Json
from .paths import COMPRESSIONS

# By the first bytes of a file; the longer ones first. UTF-8 is what is read otherwise.
_BYTE_ORDER_MARKS = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16"}
_BYTE_ORDER_MARKS |= {codecs.BOM_UTF16_BE: "UTF-16"}
# What a file is that is no text, by its first bytes, and what is to be done with it.
_FOREIGN = {
    b"\x1f\x8b": "is compressed: give it the ending .gz",
    b"BZh": "is compressed: give it the ending .bz2",
    b"\xfd7zXZ\x00": "is compressed: give it the ending .xz",
    b"\x28\xb5\x2f\xfd": "is compressed: give it the ending .zst",
    b"PAR1": "is a Parquet file: give it the ending .parquet",
    b"PK\x03\x04": "is a ZIP archive, as Excel's files are too: unpack it, or save the table as CSV",
    b"version https://git-lfs": "is a pointer of Git LFS and not the file itself: get that with `git lfs pull`",
    b"<!DOCTYPE": "is an HTML page, perhaps an error in the place of a download: get the file again",
    b"<html": "is an HTML page, perhaps an error in the place of a download: get the file again",
}
_BEGUN = ("true", "false", "null", "NaN", "Infinity", "-Infinity", ".", "e+", "e-", "E+", "E-")  # in JSON, cut off
_BLOCK = 2**22  # characters of JSON, bytes of CSV: some times that much is in memory
_PARQUET_ROWS = 10_000  # in memory at a time
_VERSION = 2  # raised when the same file would give other rows
_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\r\n]*")
_WHOLE_FLOAT = 2**53  # integers up to here are floats too


def read_csv(path: Path, block: int = _BLOCK) -> Dataset:
    """The rows of a CSV file: columns of text, and of numbers where these are written back as they were read.

    Args:
        path: the file.
        block: bytes that are read at a time; no row may be longer.

    Raises:
        ValueError: for a file that is no CSV or not UTF-8, names of columns that a data set cannot have, or a row of
            more than a block.
    """
    # load_dataset("csv") takes less (2.3 s of processor time and 65 MiB, not 4.1 s and 215 MiB), but makes 7 of "007",
    # null of "NA" and of the empty text, and a.1 of the second of two columns a; as it is it reads no UTF-16.
    return _cached(path, "csv", lambda: _csv_tables(path, block))


def read_json(path: Path, block: int = _BLOCK) -> Dataset:
    """The rows of a JSON list or of JSON lines, whatever the file's ending; a list of texts is a column `text`.

    Columns are in the order in which they first appear; a row without one has null there.

    Args:
        path: the file.
        block: characters that are read at a time.

    Raises:
        ValueError: for a file that is neither or not UTF-8, for one without columns, and for half of a character.
    """
    # load_dataset("json") is faster (2.8 s of processor time, not 22.5; 171 MiB, not 132), but makes dates of texts
    # that look so, 1 of the text "1" beside a number, other numbers of some floats (it reads them with ujson), and an
    # error of a new column behind 10 MB. It takes 7.0 GiB for a list of as many rows (130 MiB here), names no line that
    # cannot be read, and as it is reads no UTF-16.
    try:
        return _cached(path, "json", lambda: _json_tables(path, block))
    except UnicodeEncodeError:
        _check_characters(path, block)
        raise


def read_parquet(path: Path, rows: int = _PARQUET_ROWS) -> Dataset:
    """The rows of a Parquet file, so many of them in memory at a time.

    Raises:
        ValueError: for a file that is none, and for types or names of columns that a data set cannot have.
    """

    def tables() -> tuple[pa.Schema, Iterator[pa.Table]]:
        features = parquet_features(path)
        return features.arrow_schema, parquet_tables(path, features, rows)

    # load_dataset("parquet") holds a row group, of which pandas writes one for a million rows: 2.0 GiB, 1.5 GiB with
    # batches of 10,000 rows and a buffer of 1 MiB; here 155 MiB.
    return _cached(path, "parquet", tables)


def file_digest(path: Path) -> str:
    """A digest of a file's bytes."""
    digest = hashlib.blake2b(digest_size=16)
    for block in blocks(path):
        digest.update(block)
    return digest.hexdigest()


def blocks(path: Path) -> Iterator[bytes]:
    """A file's bytes, 16 MiB at a time."""
    with path.open("rb") as file:
        while block := file.read(2**24):
            yield block


def _check_kind(path: Path, kind: str) -> None:
    """Raise ValueError for a file that is of another kind than its ending says."""
    with _opened(path) as file:
        start = file.read(200).removeprefix(codecs.BOM_UTF8)
    text = start.lstrip()
    foreign = next((what for mark, what in _FOREIGN.items() if text[: len(mark)].lower() == mark.lower()), None)
    if foreign is not None and not (kind == "parquet" and start.startswith(b"PAR1")):
        raise UserError(f"{path} {foreign}.")
    if kind == "csv" and re.match(rb'(\{\s*"|\[\s*\{)', text):
        raise UserError(f"{path} holds JSON: give it the ending .json or .jsonl.")


def _cached(path: Path, kind: str, read: Callable[[], tuple[pa.Schema, Iterable[pa.Table]]]) -> Dataset:
    target = Path(datasets.config.HF_DATASETS_CACHE) / "ifd_trainer" / f"{kind}-{_VERSION}-{file_digest(path)}.arrow"

    def write(temporary: Path) -> None:
        _check_kind(path, kind)
        schema, tables = read()
        with pa.ipc.new_stream(temporary, schema) as writer:
            for table in tables:
                writer.write_table(table)

    if not target.exists():
        try:
            write_atomically(target, write)
        except FileAccessError as error:
            if str(target.parent) not in str(error):  # about what is read
                raise
            raise FileAccessError(
                f"{error} The rows of {path} are kept there as Arrow. Make room, or set HF_DATASETS_CACHE to a folder "
                "with more."
            ) from error
    return Dataset.from_file(str(target))


def _check_names(path: Path, names: Sequence[str]) -> None:
    twice = [name for name, times in Counter(names).items() if times > 1]
    if twice:
        raise UserError(f"{path} has more than one column named {twice[0]!r}; rename all but one.")


def _stream(path: Path, compression: str | None) -> pa.NativeFile:
    if compression == "xz":  # which Arrow does not read
        return pa.PythonFile(lzma.open(path), mode="r")
    return pa.input_stream(path, compression=compression)


@contextmanager
def _opened(path: Path) -> Iterator[pa.NativeFile]:
    """A file's bytes, in passing; those of a compressed one (by its ending) decompressed.

    Raises:
        FileAccessError: for one that cannot be decompressed, or read at all.
    """
    compression = COMPRESSIONS.get(path.suffix.lower())
    try:
        with _stream(path, compression) as file:
            yield file
    except UserError:
        raise
    except (OSError, lzma.LZMAError, EOFError) as error:
        if compression is None or getattr(error, "errno", None) is not None:
            raise FileAccessError(f"Cannot read {path}: {one_line(error)}.") from error
        raise FileAccessError(
            f"{path} cannot be decompressed as {compression}: {one_line(error)}. It is cut off or damaged, or of "
            "another kind than its ending says; download or write it again."
        ) from error


def _encoding(path: Path) -> str:
    """What encoding the first bytes of a file stand for."""
    with _opened(path) as file:
        start = file.read(4)
    return next((name for mark, name in _BYTE_ORDER_MARKS.items() if start.startswith(mark)), "UTF-8")


def _check_encoding(path: Path, size: int) -> None:
    """Raise ValueError for a file that is not in the encoding of its first bytes, with the line that shows it."""
    encoding, line, block = _encoding(path), 1, b"-"
    decoder = codecs.getincrementaldecoder(encoding)()
    with _opened(path) as file:
        while block:
            block = file.read(size)
            try:
                line += decoder.decode(block, final=not block).count("\n")
            except UnicodeDecodeError as error:
                line += error.object.count(b"\n", 0, error.start)
                problem = f"it has the byte 0x{error.object[error.start]:02x}"
                advice = "Convert the file, if it is Latin-1 with `iconv -f LATIN1 -t UTF-8`."
                if encoding != "UTF-8":
                    problem, advice = error.reason, "Its first bytes say so; it may be cut off or damaged."
                raise UserError(f"{path}, line {line}, is not {encoding}: {problem}. {advice}") from error


# ---- Parquet ----------------------------------------------------------------------------------------------------


def parquet_features(path: Path) -> Features:
    """The types of a Parquet file's columns; errors as for `read_parquet`."""
    try:
        schema = pq.read_schema(path)
    except (OSError, pa.ArrowInvalid) as error:
        _check_kind(path, "parquet")
        raise UserError(f"{path} is not a Parquet file, or damaged: {one_line(error)}.") from error
    _check_names(path, schema.names)
    return Features.from_arrow_schema(schema)


def parquet_tables(
    path: Path, features: Features, rows: int, names: Collection[str] | None = None
) -> Iterator[pa.Table]:
    """The rows of a Parquet file, up to so many at a time; all columns, or those with these names.

    Pages are read as they are wanted, never a whole row group.
    """
    schema = Features({name: type for name, type in features.items() if names is None or name in names}).arrow_schema
    try:
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=2**20, page_checksum_verification=True) as file:
            for batch in file.iter_batches(rows, columns=schema.names):
                yield table_cast(pa.Table.from_batches([batch]).select(schema.names), schema)
    except UserError:
        raise
    except (OSError, pa.ArrowInvalid) as error:
        raise FileAccessError(f"{path} is damaged: {one_line(error)}. Write or download it again.") from error


# ---- CSV --------------------------------------------------------------------------------------------------------


def _csv_tables(path: Path, size: int) -> tuple[pa.Schema, Iterator[pa.Table]]:
    _check_quotes(path, size)
    types: dict[str, list[pa.DataType]] = {}  # of each column, the numbers as which no character was lost so far
    filled = set()
    for table in _csv_blocks(path, size):
        for name in table.schema.names:
            texts = table[name]
            types[name] = [type for type in types.get(name, (pa.int64(), pa.float64())) if _is_lossless(texts, type)]
            if texts.null_count < len(texts):
                filled.add(name)
    if len(types) == 1 and (apart := re.search("[;\t]", next(iter(types)))):
        raise UserError(
            f"{path} has one column, {next(iter(types))!r}: its values are separated by {apart[0]!r}. Write it with "
            "commas."
        )
    schema = pa.schema([(name, types[name][0] if types[name] and name in filled else pa.string()) for name in types])
    return schema, (table.cast(schema) for table in _csv_blocks(path, size))


def _check_quotes(path: Path, size: int) -> None:
    """Raise ValueError for a file that ends inside a value in quotes, which Arrow takes for the end of the value."""
    quotes = 0
    with _opened(path) as file:
        while block := file.read(size):
            quotes += block.count(b'"')
    if quotes % 2 == 0:
        return
    # A quote inside a value without quotes is a character like any other.
    with _opened(path) as stream, TextIOWrapper(BufferedReader(stream), _encoding(path), "replace", newline="") as file:
        rows = csv.reader(file, strict=True)
        try:
            for _ in rows:
                pass
        except csv.Error as error:
            if "end of data" in str(error):
                raise UserError(
                    f"{path} ends inside a value, line {rows.line_num}: the file is cut off, or a quote is not closed. "
                    "Write or download it again, or delete what follows the last whole row."
                ) from error


def _csv_blocks(path: Path, size: int) -> Iterator[pa.Table]:
    """Tables of text; `,,` is null, `,"",` the empty text. One table without rows where the file has none."""
    read = pa.csv.ReadOptions(block_size=size, encoding=_encoding(path))
    parse = pa.csv.ParseOptions(newlines_in_values=True)
    text = pa.csv.ConvertOptions(null_values=[""], strings_can_be_null=True, quoted_strings_can_be_null=False)
    try:
        with _opened(path) as file, pa.csv.open_csv(file, read, parse) as blocks:
            names = blocks.schema.names
        _check_names(path, names)
        text.column_types = dict.fromkeys(names, pa.string())
        with _opened(path) as file, pa.csv.open_csv(file, read, parse, text) as blocks:
            yield blocks.schema.empty_table()
            for block in blocks:
                yield pa.Table.from_batches([block])
    except (pa.ArrowInvalid, UnicodeDecodeError) as error:
        _check_encoding(path, size)
        why = one_line(error)
        raise UserError(
            f"{path} cannot be read as CSV: {why}. Wanted: the names of the columns in the first line, as many "
            "values in each row, values with commas or line breaks in double quotes, and no row of more than "
            f"{size / 2**20:g} MiB."
        ) from error


def _is_lossless(texts: pa.ChunkedArray, type: pa.DataType) -> bool:
    """Whether the texts lose no character as integers or floats."""
    try:
        numbers = pc.cast(texts, type)
    except pa.ArrowInvalid:
        return False
    if pa.types.is_floating(type) and not pc.all(pc.is_finite(numbers), min_count=0).as_py():
        return False
    return pc.cast(numbers, pa.string()).equals(texts)


# ---- JSON -------------------------------------------------------------------------------------------------------


def _json_tables(path: Path, size: int) -> tuple[pa.Schema, Iterator[pa.Table]]:
    columns: dict[str, _InferredType] = {}
    for rows in _row_blocks(path, size):
        for name in dict.fromkeys(chain.from_iterable(rows)):
            columns.setdefault(name, _InferredType()).add([row.get(name) for row in rows])
    if not columns:
        raise UserError(f"{path} holds no rows: it is to be a JSON list of objects, or one object on each line.")
    try:
        features = Features({name: column.feature(Json) for name, column in columns.items()})
    except ValueError as error:
        raise UserError(f"{path} cannot be read: {error}.") from error
    # Arrow makes nested arrays of texts, not of its type for JSON: at first, text is in the place of JSON.
    texts = Features({name: column.feature(_text) for name, column in columns.items()}).arrow_schema

    def tables() -> Iterator[pa.Table]:
        for rows in _row_blocks(path, size):
            columns = {
                name: pa.array(_map_json([row.get(name) for row in rows], of, _dumps), texts.field(name).type)
                for name, of in features.items()
            }
            yield pa.table(columns, texts).cast(features.arrow_schema)

    return features.arrow_schema, tables()


def _row_blocks(path: Path, size: int) -> Iterator[list[dict]]:
    first = 1
    for values in record_blocks(path, size):
        kinds = set(map(type, values))
        if kinds == {str}:
            values = [{"text": value} for value in values]
        elif kinds != {dict}:
            i = next(i for i, value in enumerate(values) if not isinstance(value, dict))
            raise UserError(f"{path}, row {first + i}, is not an object but of type {type(values[i]).__name__}.")
        yield values
        first += len(values)


def _check_characters(path: Path, size: int) -> None:
    """Raise ValueError for a row with one half of a surrogate pair, for which UTF-8 has no bytes."""
    for number, row in enumerate(chain.from_iterable(_row_blocks(path, size)), 1):
        try:
            _dumps(row).encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{path}, row {number}, has {error.object[error.start]!r}, which is half of a character: write both "
                "halves, as in '\\ud83d\\ude00', or leave it out."
            ) from error


class _InferredType:
    """What the values of a column, or of a place inside its values, have been so far."""

    def __init__(self) -> None:
        self.kinds: set[type] = set()
        self.least = self.most = 0  # of integers
        self.items: _InferredType | None = None  # of lists
        self.fields: dict[str, _InferredType] | None = None  # of mappings; empty where these have not all the same keys

    def add(self, values: list) -> None:
        """Take note of further values."""
        kinds = set(map(type, values)) - {type(None)}
        self.kinds |= kinds
        if int in kinds:
            numbers = [value for value in values if type(value) is int]
            self.least, self.most = min(self.least, min(numbers)), max(self.most, max(numbers))
        if list in kinds:
            self.items = self.items or _InferredType()
            self.items.add([item for value in values if type(value) is list for item in value])
        if dict in kinds:
            rows = [value for value in values if type(value) is dict]
            self.fields = {key: _InferredType() for key in rows[0]} if self.fields is None else self.fields
            if any(row.keys() != self.fields.keys() for row in rows):
                self.fields = {}
            for key, place in self.fields.items():
                place.add([row[key] for row in rows])

    def feature(self, mixed: Callable[[], Any]) -> Any:
        """The type that holds them all as they are; `mixed()` for values of several types.

        Raises:
            ValueError: for integers that `datasets` cannot read.
        """
        if self.least < -(2**63) or self.most >= 2**64:
            raise UserError("it has integers of more than 64 bits; write them as text")
        if self.kinds == {list}:
            return List(self.items.feature(mixed) if self.items.kinds else _text())  # Arrow casts no lists of null
        if self.kinds == {dict} and self.fields:
            return {key: place.feature(mixed) for key, place in self.fields.items()}
        if self.kinds == {int}:
            return Value("int64") if self.most < 2**63 else mixed()
        if self.kinds == {int, float} and max(-self.least, self.most) <= _WHOLE_FLOAT:
            return Value("float64")
        if len(self.kinds) > 1 or dict in self.kinds:
            return mixed()
        return Value({bool: "bool", float: "float64", str: "string"}[next(iter(self.kinds))] if self.kinds else "null")


def _text() -> Value:
    return Value("string")


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def python_values(column: pa.Array | pa.ChunkedArray, feature: Any) -> list:
    """The values of a column, also those of the type `Json`.

    `datasets` reads JSON texts with ujson, which rounds some floats otherwise, 1e-320 for example.
    """
    return _map_json(column.to_pylist(), feature, json.loads)


def holds_json(feature: Any) -> bool:
    """Whether a feature is, or has inside, the type `Json`."""
    if isinstance(feature, dict):
        return any(map(holds_json, feature.values()))
    return holds_json(feature.feature) if isinstance(feature, List) else isinstance(feature, Json)


def _map_json(values: list, feature: Any, function: Callable[[Any], Any]) -> list:
    """The values of a feature, those at its places of the type `Json` replaced by `function(value)`."""
    if not holds_json(feature):
        return values
    if isinstance(feature, Json):
        return [None if value is None else function(value) for value in values]
    if isinstance(feature, List):
        return [None if value is None else _map_json(value, feature.feature, function) for value in values]
    places = (
        _map_json([None if value is None else value[name] for value in values], place, function)
        for name, place in feature.items()
    )
    rows = (dict(zip(feature, row, strict=True)) for row in zip(*places, strict=True))
    return [None if value is None else row for value, row in zip(values, rows, strict=True)]


# ---- JSON text --------------------------------------------------------------------------------------------------


def record_blocks(path: Path, size: int = _BLOCK) -> Iterator[list]:
    """The values of a JSON list or of JSON lines, some at a time, whatever the file's ending; NaN and Infinity too.

    Args:
        path: the file.
        size: characters that are read at a time.

    Raises:
        ValueError: for a file that is neither, or not in its encoding; the message names the line that cannot be read.
    """
    encoding = _encoding(path)
    codec = "utf-8-sig" if encoding == "UTF-8" else encoding
    with _opened(path) as stream, TextIOWrapper(BufferedReader(stream, 2**18), codec) as file:
        text, line, listed, ended = "", 1, None, False
        while not ended:
            try:
                block = file.read(max(size, len(text)))  # for a value longer than a block, twice as much each time
            except UnicodeDecodeError:
                _check_encoding(path, size)
                raise
            ended = not block
            text += block
            start = 0
            if listed is None and (start := _SPACE.match(text).end()) < len(text):
                listed = text[start] == "["
                start += listed
            values, start, error = _parsed(text, start, listed, ended)
            line += text.count("\n", 0, start)
            text = text[start:]
            if error is not None and (ended or not _unfinished(error)):
                if text.strip():
                    line += text.count("\n", 0, _SPACE.match(text).end())
                if "\0" in text:
                    raise UserError(
                        f"{path}, line {line}, has a NUL byte: the file is UTF-16 without its mark, or it was not "
                        "written to its end. Write or download it again, as UTF-8."
                    )
                if not _unfinished(error):
                    raise UserError(f"{path}, line {line}, is not JSON: {error.msg}.")
                raise UserError(
                    f"{path} ends inside a value, line {line}: the file is cut off, or a quote or bracket there is not "
                    "closed. Write or download it again, or delete what follows the last whole row."
                )
            if values:
                yield values


def _parsed(text: str, start: int, listed: bool | None, ended: bool) -> tuple[list, int, json.JSONDecodeError | None]:
    """The values from `start` on, where the next one begins, and why it cannot be read, if there is to be one."""
    values = []
    try:
        while True:
            value_start = _SPACE.match(text, start).end()
            if value_start == len(text) and not listed:
                return values, value_start, None
            if listed and text.startswith("]", value_start):  # stays in the text: nothing may follow it
                if (end := _SPACE.match(text, value_start + 1).end()) < len(text):
                    raise json.JSONDecodeError("Extra data", text, end)
                return values, value_start, None
            value, end = _DECODER.raw_decode(text, value_start)
            follows = _SPACE.match(text, end).end()
            if listed and text[follows : follows + 1] not in (",", "]"):
                raise json.JSONDecodeError("Expecting ',' delimiter", text, follows)
            if not listed and follows == end and not (ended and end == len(text)):
                raise json.JSONDecodeError("Extra data", text, end)
            values.append(value)
            start = follows + text.startswith(",", follows) if listed else follows
    except json.JSONDecodeError as error:
        return values, start, error


def _unfinished(error: json.JSONDecodeError) -> bool:
    """Whether a text cannot be read only because it ends too early."""
    rest = error.doc[error.pos :].rstrip()
    return (
        error.msg.startswith("Unterminated string")
        or any(word.startswith(rest) for word in _BEGUN)
        or (error.msg.startswith("Invalid \\") and len(rest) < 6)
    )
