"""Tokens and labels of a training set's rows: masks of all kinds, and padding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from ifd_trainer.errors import UserError
from ifd_trainer.training.row_tokens import Padding, RowTokens, lists_of

PAD, BOS = 0, 3


def read(rows, padding: Padding | None = None, at=None) -> tuple[list[list[int]], list[list[int]]]:
    ids, labels, sizes = RowTokens(rows, padding or Padding())(slice(0, len(rows)) if at is None else np.array(at))
    return lists_of(ids, sizes), lists_of(labels, sizes)


def own(rows: list[dict]) -> list[dict]:
    return [{name: torch.tensor(values) for name, values in row.items()} for row in rows]


KINDS = pytest.mark.parametrize(
    "kind",
    [Dataset.from_list, lambda rows: Dataset.from_list(rows).with_format("torch"), list, own],
    ids=["stored", "torch", "list", "tensors"],
)


@KINDS
def test_without_labels_all_tokens_are_trained_on(kind):
    assert read(kind([{"input_ids": [5, 6]}, {"input_ids": [7]}])) == ([[5, 6], [7]], [[5, 6], [7]])


@KINDS
def test_what_a_mask_leaves_out_is_no_answer_whether_or_not_there_are_labels(kind):
    row = {"input_ids": [5, 6, 7, 8], "completion_mask": [0, 1, 1, 1], "assistant_masks": [0, 0, 1, 1]}
    expected = ([[5, 6, 7, 8]], [[-100, -100, 7, 8]])
    assert read(kind([row])) == expected
    assert read(kind([row | {"labels": [5, 6, 7, 8]}])) == expected
    assert read(kind([row | {"labels": [-100, 6, 7, -100]}])) == ([[5, 6, 7, 8]], [[-100, -100, 7, -100]])


@pytest.mark.parametrize(("cut_at_start", "labels"), [(False, [-100, -100, 7]), (True, [-100, 6, 7])])
def test_a_mask_that_was_not_cut_with_its_row_is_read_from_the_end_that_is_left(cut_at_start, labels):
    """TRL cuts input_ids and labels at max_length, and leaves the completion mask of rows that are trained on whole."""
    rows = [
        {"input_ids": [5, 6, 7], "labels": [5, 6, 7], "completion_mask": [0, 0, 1, 1]},
        {"input_ids": [8], "labels": [8], "completion_mask": [1]},
    ]
    assert read(Dataset.from_list(rows), Padding(cut_at_start=cut_at_start))[1] == [labels, [8]]
    assert read(Dataset.from_list(rows), Padding(cut_at_start=cut_at_start), at=[1, 0])[1] == [[8], labels]


@KINDS
@pytest.mark.parametrize("masked", [True, False])
def test_padding_at_either_end_is_no_part_of_a_row(kind, masked):
    rows = [
        {"input_ids": [PAD, PAD, 5, 6], "labels": [-100, -100, -100, 6], "attention_mask": [0, 0, 1, 1]},
        {"input_ids": [5, 6, PAD, PAD], "labels": [-100, 6, -100, -100], "attention_mask": [1, 1, 0, 0]},
        {"input_ids": [5, PAD, 6, 7], "labels": [-100, -100, 6, 7], "attention_mask": [1, 1, 1, 1]},
    ]
    if not masked:
        rows = [{name: row[name] for name in ("input_ids", "labels")} for row in rows]
    expected = ([[5, 6], [5, 6], [5, PAD, 6, 7]], [[-100, 6], [-100, 6], [-100, -100, 6, 7]])
    assert read(kind(rows), Padding(PAD)) == expected
    assert read(kind(rows), Padding(PAD), at=[2, 0]) == tuple([part[2], part[0]] for part in expected)


def test_a_padding_token_that_is_trained_on_or_begins_the_text_is_part_of_it():
    rows = [
        {"input_ids": [BOS, BOS, BOS, 5, 6], "labels": [-100, -100, -100, -100, 6]},
        {"input_ids": [BOS, 5, 6, BOS], "labels": [-100, -100, 6, BOS]},
        {"input_ids": [5, 6, BOS], "labels": [-100, 6, -100]},
    ]
    found = read(Dataset.from_list(rows), Padding(BOS, begins=True))
    assert found == (
        [[BOS, 5, 6], [BOS, 5, 6, BOS], [5, 6]],
        [[-100, -100, 6], [-100, -100, 6, BOS], [-100, 6]],
    )


def stripped(ids: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
    """One token at a time."""
    pairs = list(zip(ids, labels, strict=True))
    while pairs and pairs[0] == (PAD, -100):
        pairs.pop(0)
    while pairs and pairs[-1] == (PAD, -100):
        pairs.pop()
    return [token for token, _ in pairs], [label for _, label in pairs]


tokens = st.lists(st.tuples(st.sampled_from([PAD, 5, 6]), st.booleans()), max_size=6)


@given(rows=st.lists(tokens, min_size=1, max_size=6))
def test_any_rows_are_read_as_one_token_at_a_time_says(rows):
    made = [
        {"input_ids": [token for token, _ in row], "labels": [token if on else -100 for token, on in row]}
        for row in rows
    ]
    expected = [stripped(row["input_ids"], row["labels"]) for row in made]
    assert read(made, Padding(PAD)) == ([ids for ids, _ in expected], [labels for _, labels in expected])


@pytest.mark.parametrize("name", ["labels", "completion_mask", "attention_mask"])
def test_a_row_with_too_few_values_is_named(name):
    rows = [{"input_ids": [5], name: [1]}, {"input_ids": [5, 6], name: [1]}]
    for kind in (list, Dataset.from_list):
        with pytest.raises(UserError, match=f"Row 1 of the training set has 2 input_ids, but 1 {name}"):
            read(kind(rows))
        with pytest.raises(UserError, match=f"Row 1 of the training set has 2 input_ids, but 1 {name}"):
            read(kind(rows), at=[1, 0])


def test_a_data_set_without_tokens_is_told():
    with pytest.raises(UserError, match=r"Selection reads input_ids, but the prepared training set has \['text'\]"):
        RowTokens(Dataset.from_dict({"text": ["x"]}), Padding())
