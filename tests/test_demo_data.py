"""The bundled demo data: as many rows, and bad rows of each kind, as its README says."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

DATA = Path(__file__).resolve().parents[1] / "recipes" / "data"
QUALITIES = {"clean": 240, "shuffled": 13, "truncated": 11, "one_word": 10, "empty": 9, "duplicated": 9}


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def train() -> list[dict]:
    return rows("demo_train.jsonl")


def test_counts_of_rows_and_of_bad_rows(train: list[dict]) -> None:
    assert Counter(row["quality"] for row in train) == QUALITIES
    assert 0.15 <= 1 - QUALITIES["clean"] / len(train) <= 0.20
    assert len(rows("demo_heldout.jsonl")) == 40


def test_bad_rows_are_what_their_label_says(train: list[dict]) -> None:
    clean = set()  # so far: a duplicate is the later one of two equal rows
    for row in train:
        if row["quality"] == "clean":
            clean.add((row["instruction"], row["input"], row["output"]))
        words = row["output"].split()
        if row["quality"] == "empty":
            assert not words
        elif row["quality"] == "one_word":
            assert len(words) == 1
        elif row["quality"] == "truncated":
            assert row["output"][-1] not in ".!?"
        elif row["quality"] == "duplicated":
            assert (row["instruction"], row["input"], row["output"]) in clean
        else:
            assert len(words) > 2


def test_clean_and_held_out_rows_are_all_different_and_no_instruction_leaks(train: list[dict]) -> None:
    seen = [(row["instruction"], row["input"]) for row in train if row["quality"] != "duplicated"]
    held_out = [(row["instruction"], row["input"]) for row in rows("demo_heldout.jsonl")]
    assert len(set(seen + held_out)) == len(seen) + len(held_out)
    assert all(row["quality"] == "clean" for row in rows("demo_heldout.jsonl"))


def test_rows_with_and_without_input_and_at_least_seven_kinds(train: list[dict]) -> None:
    assert 0.2 < sum(bool(row["input"]) for row in train) / len(train) < 0.8
    assert len({row["kind"] for row in train}) >= 7
    assert len({row["row_id"] for row in train}) == len(train)
