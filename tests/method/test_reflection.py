"""Which version of a row is taken: cases worked by hand, a loop over single rows, what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ifd_trainer import choose_rewritten
from ifd_trainer.errors import UserError
from ifd_trainer.method.reflection import VERSIONS

NAN = math.nan
# IFD and r-IFD of the original, and of the versions with another instruction, another answer, and both.
CASES = [
    ("original", {"original": (0.5, 0.8)}),
    ("instruction", {"original": (0.5, 0.8), "instruction": (0.6, 0.9)}),  # r-IFD may rise
    ("original", {"original": (0.5, 0.8), "instruction": (0.5, 0.1)}),  # the same is no rise
    ("original", {"original": (0.5, 0.8), "instruction": (1.0, 0.1)}),
    ("original", {"original": (0.5, 0.8), "instruction": (0.6, 1.0)}),
    ("original", {"original": (1.2, 0.8), "instruction": (0.9, 0.7)}),  # IFD falls, though below 1
    ("answer", {"original": (0.5, 0.8), "answer": (0.1, 0.7)}),  # IFD may fall
    ("original", {"original": (0.5, 0.8), "answer": (0.6, 0.8)}),
    ("original", {"original": (0.5, 0.8), "answer": (1.0, 0.7)}),
    ("answer", {"original": (1.5, 1.5), "answer": (0.9, 0.7)}),
    ("original", {"original": (0.5, 1.3), "answer": (0.6, 1.1)}),
    ("instruction", {"original": (0.5, 0.8), "instruction": (0.6, 0.9), "answer": (0.5, 0.1)}),  # it comes first
    ("answer", {"original": (0.5, 0.8), "instruction": (0.4, 0.1), "answer": (0.5, 0.7)}),
    ("both", {"original": (0.5, 0.8), "instruction": (0.6, 0.9), "answer": (0.5, 0.1), "both": (0.2, 0.8)}),
    ("instruction", {"original": (0.5, 0.8), "instruction": (0.6, 0.9), "both": (0.2, 0.9)}),
    ("instruction", {"original": (0.5, 0.8), "instruction": (0.6, 0.9), "both": (1.2, 0.1)}),
    ("original", {"original": (0.5, 0.8), "instruction": (0.4, 0.9), "both": (0.9, 0.1)}),  # not without it
    ("original", {"original": (NAN, NAN), "instruction": (0.6, 0.9), "answer": (0.5, 0.1)}),
    ("original", {"original": (0.5, 0.8), "instruction": (NAN, NAN), "answer": (NAN, NAN)}),
    ("answer", {"original": (0.5, 0.8), "instruction": (NAN, NAN), "answer": (0.5, 0.7)}),
    ("original", {"original": (0.5, NAN), "answer": (0.5, 0.7)}),
    ("instruction", {"original": (0.5, NAN), "instruction": (0.6, 0.7)}),
]


def columns(rows: list[dict]) -> dict:
    """Rows of versions as arrays, NaN where a row has no such version."""
    return {
        name: tuple([row.get(name, (NAN, NAN))[i] for row in rows] for i in range(2))
        for name in VERSIONS
        if name == "original" or any(name in row for row in rows)
    }


@pytest.mark.parametrize(("taken", "row"), CASES)
def test_cases_worked_by_hand(taken, row):
    assert choose_rewritten(columns([row])).tolist() == [taken]


def test_rows_are_chosen_one_by_one():
    assert choose_rewritten(columns([row for _, row in CASES])).tolist() == [taken for taken, _ in CASES]


def test_the_limit_is_a_number_of_the_users():
    row = {"original": ([0.5], [0.8]), "instruction": ([1.4], [1.1])}
    assert choose_rewritten(row, limit=math.inf).tolist() == ["instruction"]
    assert choose_rewritten(row, limit=1.4).tolist() == ["original"]
    assert choose_rewritten({"original": ([], []), "answer": ([], [])}).tolist() == []


@pytest.mark.parametrize(
    ("scores", "limit", "words"),
    [
        ({"answer": ([0.5], [0.5])}, 1.0, "scores are of 'original' and of any of instruction, answer, both"),
        ({"original": ([0.5], [0.5]), "better": ([0.5], [0.5])}, 1.0, "got ['better', 'original']"),
        ({"original": ([0.5], [0.5]), "answer": ([0.5, 0.6], [0.5, 0.6])}, 1.0, "of the same rows"),
        ({"original": ([0.5], [0.5, 0.6])}, 1.0, "of the same rows"),
        ({"original": ([[0.5]], [[0.5]])}, 1.0, "of the same rows"),
        ({"original": ([0.5], [0.5])}, 0, "limit must be a number above 0"),
        ({"original": ([0.5], [0.5])}, NAN, "limit must be a number above 0"),
        ({"original": ([0.5], [0.5])}, True, "limit must be a number above 0"),
    ],
)
def test_what_is_no_choice_is_refused(scores, limit, words):
    with pytest.raises(UserError) as caught:
        choose_rewritten(scores, limit)
    assert words in str(caught.value)


SCORE = st.sampled_from([0.2, 0.5, 0.8, 1.0, 1.3, NAN])


@given(st.lists(st.fixed_dictionaries({name: st.tuples(SCORE, SCORE) for name in VERSIONS}), max_size=12))
def test_every_row_is_that_of_the_rule_told_in_words(rows):
    def one(row: dict) -> str:
        def below(name: str) -> bool:
            return row[name][0] < 1 and row[name][1] < 1

        if row["instruction"][0] > row["original"][0] and below("instruction"):
            return "both" if row["both"][1] < row["instruction"][1] and below("both") else "instruction"
        return "answer" if row["answer"][1] < row["original"][1] and below("answer") else "original"

    found = choose_rewritten(columns(rows))
    assert found.tolist() == [one(row) for row in rows]
    assert isinstance(found, np.ndarray)
