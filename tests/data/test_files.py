"""Data in and out: every file format gives back what was put in."""

from __future__ import annotations

import bz2
import csv
import errno
import gzip
import json
import lzma
import os
import re
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from decimal import Decimal
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, Features, Json, List, Value, load_dataset
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ifd_trainer.data.arrow_files import read_parquet, record_blocks
from ifd_trainer.data.files import (
    READERS,
    check_apart,
    check_features,
    check_writable,
    load_rows,
    output_file,
    read_records,
    with_columns,
    write_rows,
    write_tables,
)
from ifd_trainer.data.paths import data_ending
from ifd_trainer.errors import FileAccessError, NotFoundError, UserError

ROWS = [
    {
        "instruction": "Übersetze: „naïve\u2028café“ 😀",
        "input": None,
        "output": "NA",
        "date": "2024-01-01",
        "zip": "007",
        "count": 3,
        "share": 0.1,
        "messages": [{"role": "user", "content": "a\r\nb"}, {"role": "assistant", "content": "2024-01-01"}],
        "meta": {"tags": ["x", None], "on": True},
    },
    {
        "instruction": 'He said: "no", twice,\nthen left.',
        "input": "",
        "output": "None",
        "date": "2024-02-30",
        "zip": "10",
        "count": None,
        "share": None,
        "messages": [],
        "meta": None,
    },
]
ROWS[1]["date"] = "2024-02-28"  # both are dates, so that a reader may take the column for one
FLAT = ["instruction", "input", "output", "date", "zip", "count", "share"]


@contextmanager
def reading_blocks_of(size: int) -> Iterator[Callable[[Path], Dataset]]:
    """Files are read in blocks of this size, and anew: not from what an earlier test has put into the cache."""
    with tempfile.TemporaryDirectory() as cache, mock.patch("datasets.config.HF_DATASETS_CACHE", cache):
        yield lambda path: READERS[data_ending(path)](path, size)


def source(folder: Path, ending: str) -> Path:
    path = folder / f"in{ending}"
    if ending == ".json":
        path.write_text(json.dumps(ROWS, ensure_ascii=False), encoding="utf-8")
    elif ending == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8")
    elif ending == ".parquet":
        Dataset.from_list(ROWS).to_parquet(path)
    else:
        cells = [[None if row[name] is None else str(row[name]) for name in FLAT] for row in ROWS]
        quoted = [",".join("" if c is None else '"' + c.replace('"', '""') + '"' for c in line) for line in cells]
        path.write_bytes(("\n".join([",".join(FLAT), *quoted]) + "\n").encode())
    return path


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".parquet", ".csv"])
def test_rows_are_read_as_they_are(tmp_path, ending):
    rows = load_rows(str(source(tmp_path, ending)))
    names = FLAT if ending == ".csv" else list(ROWS[0])
    assert rows.column_names == names
    assert rows.to_list() == [{name: row[name] for name in names} for row in ROWS]


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".parquet", ".csv"])
@pytest.mark.parametrize("other", [".json", ".jsonl", ".parquet", ".csv"])
def test_rows_are_written_as_they_were_read(tmp_path, ending, other):
    rows = load_rows(str(source(tmp_path, ending)))
    write_rows(rows, tmp_path / f"out{other}")
    again = load_rows(str(tmp_path / f"out{other}"))
    if other == ".csv" and ending != ".csv":
        assert json.loads(again["messages"][0]) == ROWS[0]["messages"]
        assert json.loads(again["meta"][0]) == ROWS[0]["meta"]
        assert again["meta"][1] is None
        rows, again = rows.select_columns(FLAT), again.select_columns(FLAT)
    assert again.to_list() == rows.to_list()


CELLS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
LIKE_NUMBERS = st.from_regex(r"\A[-+]?0{0,2}[0-9]{0,19}(\.[0-9]{0,3})?(e[0-9])?\Z")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(
    st.lists(
        st.tuples(st.none() | CELLS, st.none() | LIKE_NUMBERS, st.sampled_from(["NA", "nan", "null", "", "True", "1"])),
        min_size=1,
        max_size=20,
    ),
    st.sampled_from([150, 400, 2**22]),  # a row has at most 130 bytes
)
def test_csv_loses_no_character(tmp_path, cells, block):
    columns = dict(zip(("text", "number", "word"), map(list, zip(*cells, strict=True)), strict=True))
    write_rows(Dataset.from_pandas(pd.DataFrame(columns, dtype=object).astype("string")), tmp_path / "a.csv")
    with reading_blocks_of(block) as read:
        rows = read(tmp_path / "a.csv")
        write_rows(rows, tmp_path / "b.csv")
        written = read(tmp_path / "b.csv")
    first, second = ((tmp_path / name).open(encoding="utf-8", newline="") for name in ("a.csv", "b.csv"))
    with first, second:
        assert list(csv.reader(first)) == list(csv.reader(second))
    for name, values in columns.items():
        shown = [None if value is None else value if isinstance(value, str) else None for value in rows[name]]
        if any(isinstance(value, (int, float)) for value in rows[name]):  # a number only where no character is lost
            assert [None if v is None else float(v) for v in values] == rows[name][:]
        else:
            assert shown == values
        assert written[name][:] == rows[name][:]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(
    st.lists(
        st.fixed_dictionaries({"instruction": CELLS, "input": st.none() | CELLS, "n": st.none() | st.integers(0, 9)}),
        min_size=1,
        max_size=5,
    ),
    st.sampled_from([".json", ".jsonl", ".parquet"]),
)
def test_any_text_survives_json_and_parquet(tmp_path, rows, ending):
    path = tmp_path / f"rows{ending}"
    write_rows(Dataset.from_list(rows), path)
    assert load_rows(str(path)).to_list() == rows


def test_a_csv_column_is_of_numbers_only_if_all_its_blocks_are(tmp_path):
    path = tmp_path / "a.csv"
    lines = [f'{n},{n},{n / 4},"text,\n{n}",' for n in range(100)]
    lines += ["100,007,NA,,"] + [f"{n},1,0.5,x," for n in range(101, 150)]
    path.write_text("\n".join(["id,zip,share,text,empty", *lines]) + "\n", encoding="utf-8")
    with reading_blocks_of(64) as read:
        rows = read(path)
        assert len(rows.data.column("id").chunks) > 10
        assert [rows.features[name].dtype for name in rows.features] == ["int64", *["string"] * 4]
        assert rows["id"][:] == list(range(150))
        assert rows["zip"][:] == [*map(str, range(100)), "007", *["1"] * 49]
        assert rows["share"][98:102] == ["24.5", "24.75", "NA", "0.5"]
        assert rows["text"][98:102] == ["text,\n98", "text,\n99", None, "x"]
        assert rows["empty"][:] == [None] * 150


def test_a_csv_file_of_a_header_alone_has_columns_and_no_rows(tmp_path):
    (tmp_path / "a.csv").write_text("a,b\n", encoding="utf-8")
    rows = load_rows(str(tmp_path / "a.csv"))
    assert (rows.column_names, len(rows)) == (["a", "b"], 0)


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | CELLS
    | st.sampled_from(["2024-01-01", "1", "null", "[1]", '{"a": 1}', 0, 1, 0.1 + 0.2]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from("ab/"), inner, max_size=2)
        | st.fixed_dictionaries({"role": CELLS, "content": inner})
    ),
    max_leaves=6,
)


def typed(value):
    """The value with its types, in which an integer and a float of the same number are the same."""
    if isinstance(value, dict):
        return {key: typed(item) for key, item in value.items()}
    if isinstance(value, list):
        return [typed(item) for item in value]
    return (
        ("number", value) if isinstance(value, (int, float)) and not isinstance(value, bool) else (type(value), value)
    )


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    st.lists(st.dictionaries(st.sampled_from(["x", "y", "z"]), JSON_VALUES), min_size=1, max_size=12),
    st.sampled_from([".json", ".jsonl"]),
    st.sampled_from([1, 30, 2**22]),
)
@example([{"x": [None, None], "y": {"a": [None], "b": {}}}], ".json", 1)
def test_any_values_survive_json(tmp_path, rows, ending, block):
    rows = [{"id": i, **row} for i, row in enumerate(rows)]
    text = json.dumps(rows, indent=1) if ending == ".json" else "\n".join(map(json.dumps, rows))
    (tmp_path / f"a{ending}").write_text(text, encoding="utf-8")
    names = list(dict.fromkeys(name for row in rows for name in row))
    expected = [typed({name: row.get(name) for name in names}) for row in rows]
    with reading_blocks_of(block) as read:
        found = read(tmp_path / f"a{ending}")
        assert found.column_names == names
        write_rows(found, tmp_path / f"b{ending}")
        assert [typed(row) for row in read_records(tmp_path / f"b{ending}")] == expected
        write_rows(found, tmp_path / "c.parquet")
        write_rows(load_rows(str(tmp_path / "c.parquet")), tmp_path / "d.jsonl")
        assert [typed(row) for row in read_records(tmp_path / "d.jsonl")] == expected
        write_rows(found, tmp_path / "e.csv")
        with (tmp_path / "e.csv").open(encoding="utf-8", newline="") as file:
            cells = list(csv.DictReader(file))
        nested = [name for name, feature in found.features.items() if not isinstance(feature, Value)]
        for name in nested:
            values = [None if row[name] == "" else json.loads(row[name]) for row in cells]
            assert [typed(value) for value in values] == [row[name] for row in expected]


def test_a_json_column_may_change_its_type_or_appear_after_many_rows(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"id": n, "mixed": n, "share": n, "meta": {"a": n}, "tags": []} for n in range(50)]
    rows += [{"id": 50, "mixed": "50", "share": 0.1 + 0.2, "meta": {"b": 1.5}, "tags": ["x"], "late": ["2024-01-01"]}]
    rows += [{"id": n, "late": None} for n in range(51, 60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with reading_blocks_of(100) as read:
        found = read(path)
        assert found.features == {
            "id": Value("int64"),
            "mixed": Json(),
            "share": Value("float64"),
            "meta": Json(),
            "tags": List(Value("string")),
            "late": List(Value("string")),
        }
        names = list(found.features)
        assert found.to_list() == [{name: row.get(name) for name in names} for row in rows]
        assert [type(value) for value in found["mixed"][49:52]] == [int, str, type(None)]


@settings(max_examples=150)
@given(
    st.lists(JSON_VALUES, max_size=6),
    st.booleans(),
    st.none() | st.integers(0, 3),
    st.sampled_from(["", " \n\t", "\ufeff", "\n" * 40]),
    st.integers(1, 60),
)
def test_values_are_read_over_the_borders_of_blocks(values, listed, indent, around, block):
    text = json.dumps(values, indent=indent) if listed else "\n".join(json.dumps(value) for value in values)
    if not listed and text.startswith("["):
        return  # a list of rows, then
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.json")
        path.write_text(around + text + around.replace("\ufeff", ""), encoding="utf-8")
        found = [value for values in record_blocks(path, block) for value in values]
    assert json.dumps(found) == json.dumps(values)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('{"a": 1}\n{"a": 2},\n{"a": 3}\n', 2),
        ('[{"a": 1},\n\n{"a" 2}]', 3),
        ('[{"a": 1}]\n{"a": 2}', 1),
        ('[{"a": 1}\n{"a": 2}]', 1),
        ('{"a": "x\ny"}\n', 1),
    ],
)
@pytest.mark.parametrize("block", [1, 7, 2**22])
def test_what_is_no_json_is_named_with_its_line(tmp_path, text, line, block):
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8")
    with reading_blocks_of(block) as read, pytest.raises(ValueError, match=f"a.json, line {line}, is not JSON"):
        read(path)


CUT = [
    ('{"a": 1}\n{"a": \n{"a": 3}\n', 2),
    ('[{"a": 1},\n{"a": 2}', 2),
    ('[{"a": 1},\n\n\n', 1),
    ('{"a": "x', 1),
    ('{"a": 1}\n\n{"a": "x\\', 3),
    ('{"a": 1}\n{"a": "x\\ud8', 2),
    ('{"a": 1}\n{"a": tru', 2),
    ('{"a": 1}\n{"a"', 2),
    ('{"a": 1}\n{"a": [1, 2', 2),
    ('{"a": 1}\n{"a": -', 2),
]


# A line break inside a text is no JSON, wherever the file ends.
CUT += [(text + "\n", line) for text, line in CUT if not text.endswith(("x", "\\", "ud8"))]


@pytest.mark.parametrize(("text", "line"), CUT)
@pytest.mark.parametrize("block", [1, 7, 2**22])
def test_json_that_is_cut_off_is_told_from_what_is_none(tmp_path, text, line, block):
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8")
    with (
        reading_blocks_of(block) as read,
        pytest.raises(ValueError, match=f"a.json ends inside a value, line {line}: the file"),
    ):
        read(path)


@pytest.mark.parametrize("text", ['{"a": 1}\n{"a": 2},', '{"a": 1}\n{"a": x', '{"a": 1}\n}', '{"a": 1}\n{"a": "x"]'])
def test_what_is_wrong_in_the_last_characters_is_not_cut_off(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="line 2, is not JSON"):
        load_rows(str(path))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "a.json is empty: it has no bytes"),
        ("[]", "holds no rows"),
        ('[{"a": 1}, 3]', "row 2, is not an object but of type int"),
        (f'{{"a": {2**64}}}', "integers of more than 64 bits; write them as text"),
    ],
)
def test_json_that_holds_no_rows_is_refused(tmp_path, text, words):
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=words):
        load_rows(str(path))


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet"])
def test_a_file_is_made_into_arrow_once_and_again_when_it_changes(tmp_path, monkeypatch, ending):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    path = tmp_path / f"a{ending}"
    for n in (1, 1, 2):
        write_rows(Dataset.from_dict({"n": [n]}), path)
        assert load_rows(str(path))["n"][:] == [n]
    assert len(list((tmp_path / "cache").rglob("*.arrow"))) == 2


def test_a_row_group_is_never_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rng = np.random.default_rng(0)
    table = pa.table({"text": [rng.bytes(400).hex() for _ in range(40_000)]})
    pq.write_table(table, tmp_path / "one.parquet", row_group_size=len(table))
    pool, default = pa.proxy_memory_pool(pa.default_memory_pool()), pa.default_memory_pool()
    pa.set_memory_pool(pool)
    try:
        rows = read_parquet(tmp_path / "one.parquet", 1000)
    finally:
        pa.set_memory_pool(default)
    assert 0 < pool.max_memory() < table.nbytes / 4
    assert rows.with_format("arrow")[:].equals(table)


@pytest.mark.parametrize(
    "frame",
    [
        pd.DataFrame({"a": pd.Categorical(["x", "y", "x"]), "b": [1, 2, 3]}),
        pd.DataFrame({"a": pd.date_range("2020", periods=2), "b": [Decimal("1.5"), None]}),
        pd.DataFrame({"a": [1, 2]}, index=["x", "y"]),
        pd.DataFrame({"a": [[{"r": "u", "c": None}], []], "b": [None, None]}),
    ],
    ids=["categories", "dates", "index", "nested"],
)
def test_a_parquet_file_is_what_datasets_makes_of_it(tmp_path, frame):
    path = tmp_path / "a.parquet"
    frame.to_parquet(path)
    found, expected = load_rows(str(path)), load_dataset("parquet", data_files=str(path), split="train")
    assert found.features == expected.features
    assert found.to_list() == expected.to_list()


def test_a_parquet_file_without_rows_has_its_columns(tmp_path):
    pq.write_table(pa.table({"a": pa.array([], pa.string())}), tmp_path / "a.parquet")
    found = load_rows(str(tmp_path / "a.parquet"))
    assert (len(found), found.features) == (0, Features({"a": Value("string")}))


def test_what_is_no_parquet_file_and_a_name_that_comes_twice(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_text("instruction,output\n")
    with pytest.raises(ValueError, match=f"{path} is not a Parquet file, or damaged: Parquet magic bytes"):
        load_rows(str(path))
    pq.write_table(pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"]), path)
    with pytest.raises(ValueError, match=f"{path} has more than one column named 'a'"):
        load_rows(str(path))


def test_columns_take_the_place_of_old_ones():
    rows = Dataset.from_dict({"a": [1, 2], "ifd": [9.0, 9.0]}).select([1, 0])
    found = with_columns(rows, Dataset.from_dict({"ifd": [0.5, None], "why": ["x", None]}))
    assert found.to_dict() == {"a": [2, 1], "ifd": [0.5, None], "why": ["x", None]}


def test_columns_stay_in_the_order_of_the_source(tmp_path):
    path = tmp_path / "rows.jsonl"  # texts and all else are read separately
    path.write_text('{"a": "x", "b": 0.5, "c": "y", "d": [1]}\n', encoding="utf-8")
    found = with_columns(load_rows(str(path)), Dataset.from_dict({"c": ["z"], "e": [1]}))
    assert found.to_list() == [{"a": "x", "b": 0.5, "d": [1], "c": "z", "e": 1}]
    for ending in (".csv", ".jsonl", ".parquet"):
        write_rows(found, tmp_path / f"out{ending}")
        assert load_rows(str(tmp_path / f"out{ending}")).column_names == ["a", "b", "d", "c", "e"]


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".parquet", ".csv"])
def test_tables_are_written_as_the_rows_that_they_are_parts_of(tmp_path, ending):
    rows = load_rows(str(source(tmp_path, ".parquet")))
    table = pa.concat_tables([rows.with_format("arrow")[:]] * 5001)  # more than are written at a time
    write_tables([table], rows.features, tmp_path / f"whole{ending}")
    parts = iter([table.slice(0, 5), table.slice(5, 0), table.slice(5)])
    write_tables(parts, rows.features, tmp_path / f"parts{ending}")
    if ending == ".parquet":
        whole, found = (pq.ParquetFile(tmp_path / f"{name}.parquet") for name in ("whole", "parts"))
        assert Features.from_arrow_schema(found.schema_arrow) == rows.features
        assert found.read().equals(whole.read())
    else:
        assert (tmp_path / f"parts{ending}").read_bytes() == (tmp_path / f"whole{ending}").read_bytes()


def test_a_row_group_holds_about_a_hundred_megabytes(tmp_path):
    table = pa.table({"text": ["x" * 10**6] * 60})
    write_tables([table] * 3, Features({"text": Value("string")}), tmp_path / "a.parquet")
    found = pq.read_metadata(tmp_path / "a.parquet")
    assert [found.row_group(i).num_rows for i in range(found.num_row_groups)] == [120, 60]


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".parquet", ".csv"])
def test_no_rows_are_written_with_their_columns(tmp_path, ending):
    rows = Dataset.from_dict({"a": ["x"], "n": [1]}).select([])
    for number, write in enumerate(
        (lambda path: write_rows(rows, path), lambda path: write_tables([], rows.features, path))
    ):
        write(tmp_path / f"{number}{ending}")
    assert (tmp_path / f"0{ending}").read_bytes() == (tmp_path / f"1{ending}").read_bytes()
    if ending == ".parquet":
        assert pq.read_schema(tmp_path / "0.parquet").names == ["a", "n"]
    if ending == ".csv":
        assert (tmp_path / "0.csv").read_text(encoding="utf-8") == '"a","n"\n'


def test_a_folder_is_read(tmp_path):
    write_rows(Dataset.from_list(ROWS), tmp_path / "out" / "train.parquet")
    assert load_rows(str(tmp_path / "out")).to_list() == ROWS
    assert pq.read_table(tmp_path / "out" / "train.parquet").num_rows == 2


@pytest.mark.parametrize(
    ("output", "file", "folder"),
    [
        ("cherry", "cherry/train.parquet", True),
        ("v1.0/", "v1.0/train.parquet", True),
        ("cherry.csv", "cherry.csv", False),
        ("cherry.txt", "cherry.txt", False),
    ],
)
def test_what_an_output_is(output, file, folder):
    assert output_file(output) == (Path(file), folder)


def test_a_folder_with_a_point_in_its_name_is_one(tmp_path):
    (tmp_path / "v1.0").mkdir()
    assert output_file(str(tmp_path / "v1.0")) == (tmp_path / "v1.0" / "train.parquet", True)


def test_records_with_nan_and_a_line_that_is_none(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"a": NaN, "b": "x\u2028y"}\n\n{}\n', encoding="utf-8")
    first, second = read_records(path)
    assert np.isnan(first["a"])
    assert (first["b"], second) == ("x\u2028y", {})
    path.write_text('{"a": 1}\n{"a"\n', encoding="utf-8")
    with pytest.raises(ValueError, match="ends inside a value, line 2"):
        read_records(path)


# ---- what a reader says -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".json", ".csv"])
@pytest.mark.parametrize("block", [3, 2**22])
@pytest.mark.parametrize("last", ["", "\n2"])
def test_a_file_that_is_not_utf8_is_named_with_its_line(tmp_path, ending, block, last):
    path = tmp_path / f"a{ending}"
    text = f"a\n1\n\u20ac\n\xe9{last}" if ending == ".csv" else f'[{{"a":\n1}},\n\n{{"a": "\u20ac\xe9"{last}'
    path.write_bytes(text.encode().replace("\xe9".encode(), b"\xe9"))
    with (
        reading_blocks_of(block) as read,
        pytest.raises(ValueError, match=f"{path}, line 4, is not UTF-8: it has the byte 0xe9. Convert .*iconv"),
    ):
        read(path)


def test_names_of_csv_columns_that_are_not_utf8(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"a,caf\xe9\n1,2\n")
    with pytest.raises(ValueError, match=r"a\.csv, line 1, is not UTF-8: it has the byte 0xe9"):
        load_rows(str(tmp_path / "a.csv"))


@pytest.mark.parametrize(
    "row", ['{"a": "\\ud83d"}', '{"a": {"b": ["\\ud83d"]}}', '{"\\ud83d": 1}'], ids=["text", "nested", "name"]
)
def test_half_of_a_character_is_named_with_its_row(tmp_path, row):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": "\\ud83d\\ude00"}\n\n' + row + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match="half of a character") as raised:
        load_rows(str(path))
    wanted = (
        f"{path}, row 2, has '\\ud83d', which is half of a character: write both halves, as in '\\ud83d\\ude00', or"
    )
    assert str(raised.value).startswith(wanted)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty: it has no bytes. Write or download it again"),
        ("\ufeff", "cannot be read as CSV: .*Wanted: the names of the columns in the first line"),
        ("a,b\n1,2\n1,2,3\n", "cannot be read as CSV: .*Expected 2 columns, got 3: 1,2,3. Wanted: .*as many"),
        ("a,b,a\n1,2,3\n", "has more than one column named 'a'; rename all but one"),
    ],
)
def test_what_is_no_csv_is_named(tmp_path, text, words):
    path = tmp_path / "a.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=f"{path} {words}"):
        load_rows(str(path))


# ---- places and endings -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".JSON", ".Jsonl", ".CSV", ".PARQUET"])
def test_an_ending_may_be_of_capitals(tmp_path, ending):
    rows = Dataset.from_dict({"a": ["x", None], "n": [1, 2]})
    check_writable(tmp_path / f"a{ending}")
    write_rows(rows, tmp_path / f"a{ending}")
    write_rows(rows, tmp_path / f"b{ending.lower()}")
    assert (tmp_path / f"a{ending}").read_bytes() == (tmp_path / f"b{ending.lower()}").read_bytes()
    assert load_rows(str(tmp_path / f"a{ending}")).to_list() == rows.to_list()
    with pytest.raises(FileNotFoundError, match="No such file"):
        load_rows(f"missing{ending}")


def test_a_folder_of_save_to_disk_is_read(tmp_path):
    rows = Dataset.from_list(ROWS)
    rows.save_to_disk(tmp_path / "saved")
    found = load_rows(str(tmp_path / "saved"))
    assert found.features == rows.features
    assert found.to_list() == ROWS


def test_a_split_of_save_to_disk_is_read_whatever_its_format(tmp_path):
    splits = {name: Dataset.from_dict({"n": [number], "m": [0]}) for name, number in (("train", 1), ("test", 2))}
    DatasetDict(splits).with_format("pandas", columns=["n"]).save_to_disk(tmp_path / "saved")
    assert load_rows(str(tmp_path / "saved"))[:] == {"n": [1], "m": [0]}
    assert load_rows(str(tmp_path / "saved"), split="test")[:] == {"n": [2], "m": [0]}


def test_the_folder_one_is_in_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    write_rows(Dataset.from_dict({"n": [1, 2]}), tmp_path / "in" / "rows.jsonl")
    monkeypatch.chdir(tmp_path / "in")
    assert load_rows(".")["n"][:] == [1, 2]


def test_an_output_that_cannot_be_written_is_refused_at_once(tmp_path, monkeypatch):
    (tmp_path / "dir.csv").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"dir\.csv: it is a folder. Name a file, such as .*dir.csv/scored.csv"):
        check_writable(tmp_path / "dir.csv")
    with pytest.raises(ValueError, match=f"{tmp_path / 'file'} is a file, not a folder"):
        check_writable(tmp_path / "file" / "new" / "a.csv")

    def refuse(**_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(
        ValueError, match=rf"the folder {tmp_path} is not writable \(Permission denied\). Write to anoth"
    ):
        check_writable(tmp_path / "new" / "a.csv")


@pytest.mark.parametrize(
    "feature",
    [Value("binary"), Value("large_binary"), List(Value("binary")), {"a": Value("string"), "b": Value("binary")}],
)
def test_bytes_are_refused_before_anything_is_written_as_text(tmp_path, feature):
    features = Features({"a": Json(), "n": List(Value("int64")), "raw": feature})
    check_features(features, "a.parquet")
    check_features(Features({name: features[name] for name in ("a", "n")}), "a.csv")
    for ending in (".csv", ".JSONL", ".json"):
        with pytest.raises(ValueError, match=f"a{ending}: {ending.lower()} is text, and the column 'raw' holds bytes"):
            write_tables([], features, tmp_path / f"a{ending}")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_unlike_files_is_told_in_a_sentence(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n')
    (tmp_path / "b.jsonl").write_text('{"b": [1]}\n')
    with pytest.raises(ValueError, match=r"The files in .* cannot be read as one data set: .*Name one of them"):
        load_rows(str(tmp_path))


# ---- compressed files, other encodings --------------------------------------------------------------------------


def compressed(data: bytes, ending: str) -> bytes:
    if ending == ".zst":
        return pa.compress(data, "zstd", asbytes=True)
    return {".gz": gzip, ".bz2": bz2, ".xz": lzma}[ending].compress(data)


@pytest.mark.parametrize("compression", [".gz", ".bz2", ".ZST", ".xz"])
@pytest.mark.parametrize("ending", [".json", ".jsonl", ".csv"])
@pytest.mark.parametrize("block", [100, 2**22])
def test_a_compressed_file_is_read_as_what_is_in_it(tmp_path, ending, compression, block):
    plain = source(tmp_path, ending)
    path = tmp_path / f"in{ending}{compression}"
    whole = plain.read_bytes()
    # Two streams one after another, as `cat a.gz b.gz` makes them, are one file.
    path.write_bytes(b"".join(compressed(part, compression.lower()) for part in (whole[:40], whole[40:])))
    with reading_blocks_of(block if ending != ".csv" else 2**22) as read:
        assert read(path).to_list() == read(plain).to_list()
    assert read_records(path) == ROWS if ending != ".csv" else True


@pytest.mark.parametrize("compression", [".gz", ".bz2", ".zst", ".xz"])
@pytest.mark.parametrize("ending", [".jsonl", ".csv"])
@pytest.mark.parametrize("damage", ["cut off", "plain", "other"])
def test_a_compressed_file_that_is_none_is_told(tmp_path, ending, compression, damage):
    whole, path = source(tmp_path, ending).read_bytes() * 50, tmp_path / f"b{ending}{compression}"
    other = ".gz" if compression != ".gz" else ".bz2"
    path.write_bytes(
        {"cut off": compressed(whole, compression)[:-9], "plain": whole, "other": compressed(whole, other)}[damage]
    )
    with pytest.raises(
        FileAccessError, match=f"{path} cannot be decompressed as .*: .* It is cut off or damaged, or of"
    ):
        load_rows(str(path))


def test_errors_in_a_compressed_file_name_it_and_the_line(tmp_path):
    for name, text, words in (
        ("a.jsonl.gz", b'{"a": 1}\n{"a" 2}\n', "a.jsonl.gz, line 2, is not JSON"),
        ("b.jsonl.gz", b'{"a": 1}\n{"a": "x', "b.jsonl.gz ends inside a value, line 2"),
        ("c.csv.gz", b"a\n\xe9\n", "c.csv.gz, line 2, is not UTF-8: it has the byte 0xe9"),
        ("d.json.gz", b"", "d.json.gz holds no rows"),
    ):
        (tmp_path / name).write_bytes(gzip.compress(text))
        with pytest.raises(ValueError, match=re.escape(words)):
            load_rows(str(tmp_path / name))
    (tmp_path / "e.parquet.gz").write_bytes(gzip.compress(b"PAR1", mtime=0))
    with pytest.raises(ValueError, match=r"e\.parquet\.gz cannot be read in passing\. Decompress it"):
        load_rows(str(tmp_path / "e.parquet.gz"))
    (tmp_path / "f.txt.gz").write_bytes(gzip.compress(b"x", mtime=0))
    with pytest.raises(
        ValueError, match=r"format of .*f\.txt\.gz .*\.csv, \.parquet \(all but \.parquet also with \.gz"
    ):
        load_rows(str(tmp_path / "f.txt.gz"))
    with pytest.raises(ValueError, match=r"out\.jsonl\.gz.* use one of \.json, \.jsonl, \.csv, \.parquet\.$"):
        check_writable(tmp_path / "out.jsonl.gz")
    with pytest.raises(FileNotFoundError, match=r"No such file: 'missing\.jsonl\.gz'"):
        load_rows("missing.jsonl.gz")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", gzip.compress(b'{"a": 1}\n', mtime=0), "is compressed: give it the ending .gz."),
        ("a.csv", bz2.compress(b"a\n1\n"), "is compressed: give it the ending .bz2."),
        ("a.json", lzma.compress(b"[1]"), "is compressed: give it the ending .xz."),
        ("a.jsonl", pa.compress(b'{"a": 1}\n', "zstd", asbytes=True), "is compressed: give it the ending .zst."),
        ("a.jsonl", b"PAR1\x15\x04", "is a Parquet file: give it the ending .parquet."),
        (
            "a.csv",
            b"PK\x03\x04\x14\x00",
            "is a ZIP archive, as Excel's files are too: unpack it, or save the table as CSV.",
        ),
        ("a.jsonl", POINTER, "is a pointer of Git LFS and not the file itself: get that with `git lfs pull`."),
        ("a.csv", POINTER, "is a pointer of Git LFS and not the file itself: get that with `git lfs pull`."),
        ("a.parquet", POINTER, "is a pointer of Git LFS and not the file itself: get that with `git lfs pull`."),
        ("a.json", b"\n<!doctype html><html>", "is an HTML page, perhaps an error in the place of a download: get the"),
        ("a.csv", b'[{"a": 1}, {"a": 2}]', "holds JSON: give it the ending .json or .jsonl."),
        ("a.csv", b'\xef\xbb\xbf{"a": 1}\n', "holds JSON: give it the ending .json or .jsonl."),
        ("a.csv", b"a;b\n1;2\n", "has one column, 'a;b': its values are separated by ';'. Write it with commas."),
        ("a.csv", b"a\tb\n1\t2\n", "has one column, 'a\\tb': its values are separated by '\\t'. Write it with commas."),
        ("a.csv", b'a,b\n1,"2\n3', "ends inside a value, line 3: the file is cut off, or a quote is not closed."),
        ("a.jsonl", b'{"a": 1}\n{"a": 2\0\0\0', "line 2, has a NUL byte: the file is UTF-16 without its mark, or it"),
        (
            "a.json",
            '{"a": 1}'.encode("utf-16-le"),
            "line 1, has a NUL byte: the file is UTF-16 without its mark, or it",
        ),
    ],
)
def test_a_file_of_another_kind_than_its_ending_says_is_told(tmp_path, name, content, words):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        load_rows(str(path))
    assert words in str(caught.value)


@pytest.mark.parametrize("text", [b'a,b\n5" pipe,x\n', b'a,b\n"x ""y"" z",w\n"u\nv",w\n5",w\n'])
def test_a_quote_inside_a_value_is_no_end_of_the_file(tmp_path, text):
    (tmp_path / "a.csv").write_bytes(text)
    assert load_rows(str(tmp_path / "a.csv")).column_names == ["a", "b"]


def test_memory_does_not_grow_with_what_is_in_a_compressed_file(tmp_path):
    line = json.dumps({"text": "x" * 990}).encode() + b"\n"
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(line * 40_000, 1))  # 40 MB of text
    tracemalloc.start()
    before = pa.total_allocated_bytes()
    try:
        rows = sum(len(block) for block in record_blocks(tmp_path / "a.jsonl.gz", 2**14))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert rows == 40_000
    assert peak + pa.total_allocated_bytes() - before < 4 * 10**6


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32", "utf-32-be", "utf-8-sig"])
@pytest.mark.parametrize("ending", [".json", ".jsonl", ".csv"])
def test_an_encoding_is_told_by_the_first_bytes(tmp_path, ending, encoding):
    plain = source(tmp_path, ending)
    path = tmp_path / f"other{ending}"
    mark = "\ufeff" if encoding.endswith("-be") else ""
    path.write_bytes((mark + plain.read_bytes().decode()).encode(encoding))
    assert load_rows(str(path)).to_list() == load_rows(str(plain)).to_list()


@pytest.mark.parametrize("ending", [".jsonl", ".csv"])
def test_what_is_not_in_the_encoding_of_its_first_bytes_is_told(tmp_path, ending):
    path = tmp_path / f"a{ending}"
    text = '{"a": 1}\n\n{"a": 2}\n' if ending == ".jsonl" else "a\n1\n2\n"
    path.write_bytes(text.encode("utf-16")[:-1])
    with pytest.raises(ValueError, match=f"a{ending}, line 3, is not UTF-16: truncated data. Its first bytes say so"):
        load_rows(str(path))


# ---- places that hold no data -----------------------------------------------------------------------------------


def test_places_without_data_are_told_in_a_sentence(tmp_path, monkeypatch):
    (tmp_path / "empty" / "inner").mkdir(parents=True)
    (tmp_path / "empty" / ".hidden.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(NotFoundError, match=f"The folder {tmp_path}/empty holds no files. Name a file ending in .json"):
        load_rows(str(tmp_path / "empty"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.xyz").write_text("x")
    with pytest.raises(NotFoundError, match=f"No data set in {tmp_path}/other: "):
        load_rows(str(tmp_path / "other"))
    write_rows(Dataset.from_dict({"n": [1]}), tmp_path / "rows" / "a.jsonl")
    with pytest.raises(UserError, match=r"Cannot read .*rows: .*test"):
        load_rows(str(tmp_path / "rows"), split="test")
    for error, kind in (
        (ConnectionError("no route"), FileAccessError),
        (FileNotFoundError("not there"), NotFoundError),
    ):

        def fails(*_: object, error: Exception = error, **__: object) -> None:
            raise error

        monkeypatch.setattr("datasets.load_dataset", fails)
        with pytest.raises(kind, match=r"someone/rows.*(no route|not there)"):
            load_rows("someone/rows")


def test_a_file_and_the_same_one_compressed_are_not_read_as_twice_the_rows(tmp_path):
    write_rows(Dataset.from_dict({"n": [1, 2]}), tmp_path / "rows" / "a.jsonl")
    (tmp_path / "rows" / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "rows" / "a.jsonl").read_bytes()))
    with pytest.raises(ValueError, match=r"rows holds a\.jsonl and a\.jsonl\.gz: rows would come twice\. Name"):
        load_rows(str(tmp_path / "rows"))
    (tmp_path / "rows" / "a.jsonl").unlink()
    assert load_rows(str(tmp_path / "rows"))["n"][:] == [1, 2]


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".csv", ".parquet"])
def test_rows_are_not_written_over_what_is_read_however_it_is_spelled(tmp_path, monkeypatch, ending):
    monkeypatch.chdir(tmp_path)
    path = source(tmp_path, ending)
    (tmp_path / f"link{ending}").symlink_to(path)
    os.link(path, tmp_path / f"hard{ending}")
    (tmp_path / "far").symlink_to(tmp_path)
    for output in (path, f"in{ending}", f"./far/in{ending}", f"link{ending}", f"hard{ending}"):
        for read in (str(path), f"link{ending}"):
            with pytest.raises(UserError, match=r"is the file that is read .*Write to another file"):
                check_apart(output, read)
    check_apart(tmp_path / f"out{ending}", str(path))
    check_apart(tmp_path / f"out{ending}", "someone/rows")


def test_rows_are_not_written_into_the_folder_that_is_read(tmp_path):
    write_rows(Dataset.from_dict({"n": [1]}), tmp_path / "rows" / "a.jsonl")
    (tmp_path / "link").symlink_to(tmp_path / "rows")
    for output in ("rows/new.jsonl", "rows/new/b.parquet", "link/new.jsonl"):
        with pytest.raises(UserError, match=r"is in the folder that is read"):
            check_apart(tmp_path / output, str(tmp_path / "rows"))
    check_apart(tmp_path / "rows.jsonl", str(tmp_path / "rows"))
    # Of a folder with train.parquet that one file is read: another one beside it does no harm.
    write_rows(Dataset.from_dict({"n": [1]}), tmp_path / "rows" / "train.parquet")
    check_apart(tmp_path / "rows" / "new.jsonl", str(tmp_path / "rows"))
    with pytest.raises(UserError, match="is the file that is read"):
        check_apart(tmp_path / "link" / "train.parquet", str(tmp_path / "rows"))


# ---- damage -----------------------------------------------------------------------------------------------------


def test_a_flipped_bit_in_the_pages_of_a_written_parquet_file_is_told(tmp_path):
    path = tmp_path / "a.parquet"
    rng = np.random.default_rng(0)
    write_rows(Dataset.from_dict({"ifd": rng.random(2000), "text": [rng.bytes(9).hex() for _ in range(2000)]}), path)
    whole = path.read_bytes()
    expected = load_rows(str(path)).to_dict()
    told = 0
    pages = sum(pq.read_metadata(path).row_group(0).column(i).total_compressed_size for i in range(2))
    for at in rng.integers(4, pages, 60):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        found = None
        with suppress(FileAccessError):
            found = load_rows(str(path)).to_dict()
        assert found in (None, expected)  # in a page's header, a bit may mean nothing
        told += found is None
    assert told > 50


def test_a_full_cache_says_how_to_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    path = source(tmp_path, ".jsonl")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pa.ipc, "new_stream", full)
    with pytest.raises(
        FileAccessError, match=r"Cannot write .*/cache/.*: No space .*Make room, or set HF_DATASETS_CACHE"
    ):
        load_rows(str(path))
