"""Data sets read in passing: the same rows, columns and types as those of the data set in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, Json

from ifd_trainer.data.files import load_rows, write_rows, write_tables
from ifd_trainer.data.readable_text import answers_of
from ifd_trainer.data.refused_answers import looks_like_refusal, refused_rows
from ifd_trainer.data.table_reader import TableReader, selected_tables

ROWS = Dataset.from_list(
    [
        {
            "nested": {"b": [i], "a": None if i % 3 else "x"},
            "instruction": f"Ask {i}.",
            "output": None if i == 4 else f"Answer {i}.",
            "n": None if i % 4 == 1 else i,
            "ifd": float("nan") if i == 2 else i / 10,
            "ifd_status": ["ok", "failed", None][i % 3],
        }
        for i in range(11)
    ]
)


@pytest.fixture(params=["rows.parquet", "rows.jsonl", "rows", "in memory"])
def source(request, tmp_path: Path) -> str | Dataset:
    """The rows as a file, a folder, and a data set."""
    if request.param == "in memory":
        return ROWS
    path = tmp_path / request.param
    write_rows(ROWS, path if path.suffix else path / "test.parquet")
    return str(path)


def test_columns_and_types_are_those_of_the_data_set(source):
    found = TableReader(source, "test", table_rows=4)
    rows = source if isinstance(source, Dataset) else load_rows(source, split="test")
    assert (len(found), found.column_names, found.features) == (11, rows.column_names, rows.features)
    tables = list(found.tables())
    assert [len(table) for table in tables] == [4, 4, 3]
    assert all(table.schema.equals(rows.features.arrow_schema) for table in tables)
    expected = rows.with_format("arrow")[:]
    np.testing.assert_equal(pa.concat_tables(tables).to_pylist(), expected.to_pylist())  # equal, also NaN
    assert found.column("output").equals(expected["output"])
    pd.testing.assert_frame_equal(found.frame(["n", "nested"]), expected.select(["nested", "n"]).to_pandas())


def test_texts_are_coded_and_numbers_are_not(source):
    found = TableReader(source, "test", table_rows=4).coded_frame(["ifd", "ifd_status", "n", "absent"])
    assert list(found) == ["n", "ifd", "ifd_status"]
    assert found["ifd_status"].cat.categories.tolist() == ["ok", "failed"]
    assert found["ifd_status"].astype(object).where(found["ifd_status"].notna(), None).tolist() == ROWS["ifd_status"][:]
    np.testing.assert_array_equal(found["ifd"], [float("nan") if i == 2 else i / 10 for i in range(11)])
    np.testing.assert_array_equal(found["n"], [float("nan") if i % 4 == 1 else i for i in range(11)])


@pytest.mark.parametrize("kept", [[1, 2, 9], [], list(range(11))])
def test_selected_rows_have_the_new_columns_at_their_end(source, tmp_path, kept):
    added = pd.DataFrame(
        {
            "ifd": np.where(np.arange(11) % 2, np.arange(11.0), np.nan),
            "rank": pd.array([None if i % 2 else i for i in range(11)], dtype="Int64"),
            "why": pd.Categorical.from_codes(np.arange(11) % 3 - 1, ["kept", "dropped"]),
            "text": pd.Series([f"text {i}" for i in range(11)], dtype=object),
        }
    )
    tables, features = selected_tables(TableReader(source, "test", table_rows=4), added, np.isin(np.arange(11), kept))
    write_tables(tables, features, tmp_path / "out.parquet")
    old = ["nested", "instruction", "output", "n", "ifd_status"]
    assert pq.read_schema(tmp_path / "out.parquet").names == [*old, "ifd", "rank", "why", "text"]
    types = {name: pq.read_schema(tmp_path / "out.parquet").field(name).type for name in added}
    assert types == {"ifd": pa.float64(), "rank": pa.int64(), "why": pa.string(), "text": pa.string()}
    new = [
        {
            "ifd": float(i) if i % 2 else None,
            "rank": None if i % 2 else i,
            "why": [None, "kept", "dropped"][i % 3],
            "text": f"text {i}",
        }
        for i in range(11)
    ]
    expected = [{name: ROWS[i][name] for name in old} | new[i] for i in kept]
    assert pq.read_table(tmp_path / "out.parquet").to_pylist() == expected


def test_all_columns_may_be_new(tmp_path):
    write_rows(Dataset.from_dict({"ifd": [1.0] * 9}), tmp_path / "rows.parquet")
    for source in (str(tmp_path / "rows.parquet"), Dataset.from_dict({"ifd": [1.0] * 9})):
        added = pd.DataFrame({"ifd": np.arange(9.0)})
        tables, _ = selected_tables(TableReader(source, table_rows=4), added, np.arange(9) % 2 == 1)
        assert pa.concat_tables(tables).to_pydict() == {"ifd": [1.0, 3.0, 5.0, 7.0]}


TEXTS = [
    "Paris.",
    "I\N{NO-BREAK SPACE}cannot help with it",
    None,
    "",
    ": I am unable to.",
    "She: I cannot help with it.",
]


@pytest.mark.parametrize(
    "columns",
    [
        {"instruction": ["Ask."] * 6, "output": TEXTS},
        {"prompt": ["### Response"] * 6, "completion": TEXTS},
        {
            "messages": [
                [{"role": "user", "content": "Ask."}, {"role": "assistant", "content": text or ""}] for text in TEXTS
            ]
        },
    ],
)
def test_refusals_are_those_of_the_answers_one_by_one(columns):
    rows = Dataset.from_dict(columns)
    expected = [looks_like_refusal(answer) for answer in answers_of(rows.to_pandas())]
    assert refused_rows(TableReader(rows, table_rows=4)).tolist() == expected
    assert expected.count(True) == (2 if "prompt" in columns else 1)


def test_values_of_several_types_inside_mappings_come_into_memory_too():
    rows = Dataset.from_list([{"a": {"b": 1}}, {"a": {"b": "x"}}], features=Features({"a": {"b": Json()}}))
    assert TableReader(rows).frame(["a"])["a"].tolist() == rows.to_pandas()["a"].tolist()


def test_refusals_without_texts_are_an_error():
    with pytest.raises(ValueError, match=r"No answers among the columns \['n'\]"):
        refused_rows(TableReader(Dataset.from_dict({"n": [1]})))
