"""Which column tells rows apart, and what is said of those that cannot."""

from __future__ import annotations

import logging
import math
import re

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, Features, Value
from tiny_runs import INF, raw_rows, select, sft_trainer, text_rows, train

from ifd_trainer.data.row_ids import as_array, find_ids
from ifd_trainer.data.table_reader import TableReader
from ifd_trainer.errors import UserError
from ifd_trainer.publish.select import tie_ids
from ifd_trainer.training.pool import Pool

LONG = "x" * 10_000
# Columns that cannot tell three rows apart, and what is said of them.
UNFIT = {
    "null": (["a", None, "c"], "1 of 3 values are null, the first in row 1"),
    "nulls alone": ([None, None, None], "3 of 3 values are null, the first in row 0"),
    "twice": (["a", "b", "a"], "1 of 3 values are there more than once, such as 'a'"),
    "number twice": ([7, 7, 8], "1 of 3 values are there more than once, such as 7"),
    "NaN": ([0.5, math.nan, 1.5], r"1 of 3 values are no numbers, the first \(nan\) in row 1"),
    "list": ([[0], [1], [2]], r"neither numbers nor texts but list<.*>, such as \[0\]"),
    "dict": ([{"a": 1}, {"a": 2}, {"a": 3}], "neither numbers nor texts but struct<.*>, such as {'a': 1}"),
    "truth": ([True, False, True], "neither numbers nor texts but bool, such as True"),
    "long": (["a", LONG, "c"], r"a value has 10,000 characters \(row 1: 'xxx.*\.\.\.\), an id has at most 1,000"),
}


def found_in(columns: dict[str, list], column: str | None = None) -> tuple:
    return find_ids(columns, lambda name: pa.chunked_array([pa.array(columns[name])]), column)


@pytest.mark.parametrize("name", ["row_id", "id"])
@pytest.mark.parametrize("kind", UNFIT)
def test_a_column_that_is_merely_called_so_gives_way_to_positions(name, kind, caplog):
    values, problem = UNFIT[kind]
    with caplog.at_level(logging.WARNING):
        assert found_in({name: values}) == (None, None)
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("Rows are known by their positions, not by a column that cannot tell them apart ('" + name)
    assert re.search(problem, said)


@pytest.mark.parametrize("kind", UNFIT)
def test_a_column_that_the_user_named_is_an_error_with_the_value(kind):
    values, problem = UNFIT[kind]
    with pytest.raises(UserError, match=f"The column 'key', named with id_column, cannot tell rows apart: .*{problem}"):
        found_in({"key": values, "id": [1, 2, 3]}, "key")


def test_the_first_column_that_serves_is_taken_and_the_others_are_told(caplog):
    with caplog.at_level(logging.WARNING):
        name, ids = found_in({"id": [5, 3, 4], "row_id": [1, None, 2]})
    assert (name, ids.tolist()) == ("id", [5, 3, 4])
    assert "known by the column 'id', not by a column" in caplog.text
    assert "'row_id': 1 of 3 values are null" in caplog.text


def test_nothing_is_said_where_a_column_serves_or_none_is_there(caplog):
    with caplog.at_level(logging.WARNING):
        assert found_in({"row_id": [5, 3, 4], "id": [None] * 3})[0] == "row_id"
        assert found_in({"text": ["a", "b", "a"]}) == (None, None)
    assert caplog.records == []


def test_one_long_id_does_not_widen_the_others():
    _, ids = found_in({"key": ["a" * 1000, "b"]}, "key")
    assert as_array(ids).dtype == object
    assert as_array(ids).tolist() == ["a" * 1000, "b"]


def test_texts_that_arrow_keeps_as_codes_are_texts():
    columns = {"id": pa.chunked_array([pa.array(["b", "a"]).dictionary_encode()])}
    name, ids = find_ids(columns, columns.get)
    assert (name, ids.to_pylist()) == ("id", ["b", "a"])


def test_no_rows_have_ids():
    assert found_in({"id": np.zeros(0, dtype=np.int64)})[0] == "id"


@pytest.mark.parametrize("kind", UNFIT)
def test_the_callback_and_select_have_one_rule(kind):
    rows = Dataset.from_dict({"id": UNFIT[kind][0], "input_ids": [[1, 2]] * 3, "labels": [[-100, 2]] * 3})
    assert tie_ids(TableReader(rows)) == (None, None)
    assert Pool(rows).ids(None).tolist() == [0, 1, 2]
    for named in (lambda: tie_ids(TableReader(rows), "id"), lambda: Pool(rows).ids("id")):
        with pytest.raises(UserError, match=r"The column 'id', named with .* cannot tell rows apart"):
            named()


@pytest.mark.parametrize("kind", ["numpy", "torch", "pandas", None])
def test_ids_do_not_depend_on_the_format_of_a_data_set(kind):
    rows = Dataset.from_dict({"row_id": ["b", "a"], "input_ids": [[1], [2]], "labels": [[1], [2]]}).with_format(kind)
    assert Pool(rows).ids(None).tolist() == ["b", "a"]


@pytest.mark.parametrize(
    ("ids", "expected"),
    [([f"x{i // 2}" for i in range(12)], list(range(12))), ([f"x{i}" for i in range(12)], None), (range(7, 19), None)],
    ids=["twice", "texts", "numbers"],
)
def test_a_history_names_its_rows_by_what_was_found(tmp_path, ids, expected):
    rows = text_rows(raw_rows(12)).remove_columns("row_id").add_column("id", list(ids))
    trainer = sft_trainer(tmp_path, rows, num_train_epochs=1)
    callback = select(trainer, keep=4, max_ifd=INF)
    train(trainer)
    assert callback.history.rows(0)["row_id"].tolist() == (expected or list(ids))
    assert callback.history.pool()["row_id"].tolist() == (expected or list(ids))


def test_a_null_column_of_any_type_is_no_id():
    rows = Dataset.from_dict({"id": [None, None]}, features=Features({"id": Value("null")}))
    assert tie_ids(TableReader(rows)) == (None, None)
