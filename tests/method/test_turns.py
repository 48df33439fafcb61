"""One score of a conversation from those of its answers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ifd_trainer.errors import UserError
from ifd_trainer.method.choices import TURN_RULES
from ifd_trainer.method.turns import check_turns, row_scores

OK = "ok"


def columns(*turns):
    """Of answers (cas, das, tokens, status, end-of-turn loss)."""
    cas, das, tokens, status, eot = (np.array(values) for values in zip(*turns, strict=True))
    blank = status != OK
    cas, das = np.where(blank, np.nan, cas.astype(float)), np.where(blank, np.nan, das.astype(float))
    scores = {"cas": cas, "das": das, "ifd": cas / das, "ifd_ppl": np.exp(cas - das), "eot_loss": eot.astype(float)}
    return scores | {"answer_tokens": tokens.astype(np.int64), "ifd_status": status.astype(object)}


# Three rows: two answers and one that is empty; none; one that does not fit, behind one that has a score.
TURNS = columns(
    (1.0, 2.0, 1, OK, 0.1),
    (2.0, 2.5, 3, OK, 0.2),
    (0.0, 0.0, 0, "empty_answer", 0.3),
    (3.0, 2.0, 5, OK, 0.4),
    (0.0, 0.0, 0, "truncated", np.nan),
)
COUNTS, EMPTY = [3, 0, 2], ["ok", "malformed", "ok"]


@pytest.mark.parametrize(
    ("rule", "cas", "das", "ifd", "tokens"),
    [
        ("tokens", (1 + 3 * 2) / 4, (2 + 3 * 2.5) / 4, (1 + 6) / (2 + 7.5), 4),
        ("mean", 1.5, 2.25, (0.5 + 0.8) / 2, 4),
        ("min", 1.0, 2.0, 0.5, 1),
        ("max", 2.0, 2.5, 0.8, 3),
    ],
)
def test_rules_worked_by_hand(rule, cas, das, ifd, tokens):
    found = row_scores(TURNS, COUNTS, rule, EMPTY)
    assert found["ifd_status"].tolist() == [OK, "malformed", OK]
    assert [found[name][0] for name in ("cas", "das", "ifd", "answer_tokens")] == pytest.approx([cas, das, ifd, tokens])
    assert [found[name][2] for name in ("cas", "das", "ifd", "answer_tokens")] == pytest.approx([3, 2, 1.5, 5])
    ppl = {"tokens": np.exp(cas - das), "mean": (np.exp(-1) + np.exp(-0.5)) / 2}.get(rule, np.exp(cas - das))
    assert found["ifd_ppl"][0] == pytest.approx(ppl)
    assert found["eot_loss"][0] == 0.3  # of the last answer
    assert np.isnan([found[name][1] for name in ("cas", "das", "ifd", "ifd_ppl", "eot_loss")]).all()
    assert found["answer_tokens"][1] == 0


def test_the_last_answer_is_the_rows_whether_or_not_it_has_a_score():
    found = row_scores(TURNS, COUNTS, "last", EMPTY)
    assert found["ifd_status"].tolist() == ["empty_answer", "malformed", "truncated"]
    assert np.isnan(found["ifd"]).all()
    found = row_scores(TURNS, [2, 0, 2, 1], "last", [*EMPTY, OK])
    assert found["ifd"][0] == 0.8
    assert found["answer_tokens"].tolist() == [3, 0, 5, 0]


@given(
    st.lists(
        st.lists(st.tuples(st.floats(0.1, 9), st.floats(0.1, 9), st.integers(1, 99), st.booleans()), max_size=4),
        min_size=1,
        max_size=5,
    ),
    st.sampled_from(TURN_RULES),
)
def test_a_row_does_not_depend_on_others_and_one_answer_is_its_own_score(rows, rule):
    flat = [(cas, das, n, OK if ok else "empty_answer", 0.5) for row in rows for cas, das, n, ok in row]
    turns = columns(*flat) if flat else {name: values[:0] for name, values in TURNS.items()}
    found = row_scores(turns, [len(row) for row in rows], rule, ["malformed"] * len(rows))
    start = 0
    for number, row in enumerate(rows):
        part = {name: values[start : start + len(row)] for name, values in turns.items()}
        start += len(row)
        alone = row_scores(part, [len(row)], rule, ["malformed"])
        for name, values in alone.items():
            np.testing.assert_array_equal(found[name][number : number + 1], values)
        scored = [i for i, turn in enumerate(row) if turn[3]]
        if len(row) == 1 and scored:
            for name in ("cas", "das", "ifd", "ifd_ppl", "answer_tokens"):
                assert alone[name][0] == pytest.approx(part[name][0], rel=1e-12)
        elif scored and rule != "last":
            low, high = (extreme(part["ifd"][scored]) for extreme in (np.min, np.max))
            assert low * (1 - 1e-9) <= alone["ifd"][0] <= high * (1 + 1e-9)


def test_further_scores_are_of_the_answers_that_have_them_by_the_tokens_of_their_own_losses():
    rcas, rdas = np.array([1.0, np.nan, np.nan, 6.0, np.nan]), np.array([2.0, np.nan, np.nan, 3.0, np.nan])
    turns = TURNS | {"rifd": rcas / rdas, "ira": TURNS["das"] - TURNS["cas"]}
    # Row 0 has two more answers here, one with a question of 3 tokens and one with another of 1.
    counts, read = [4, 1], {"rcas": (rcas, np.array([3, 0, 0, 1, 0])), "rdas": (rdas, np.array([3, 0, 0, 1, 0]))}
    by_tokens, mean, least, last = (
        row_scores(turns, counts, rule, [OK, OK], ["ira", "rifd"], read) for rule in ("tokens", "mean", "min", "last")
    )
    assert by_tokens["rifd"][0] == pytest.approx((3 * 1 + 6) / (3 * 2 + 3))
    assert by_tokens["ira"][0] == pytest.approx(by_tokens["das"][0] - by_tokens["cas"][0])
    assert mean["rifd"][0] == pytest.approx((0.5 + 2) / 2)
    assert mean["ira"][0] == pytest.approx((1 + 0.5 - 1) / 3)
    assert (least["rifd"][0], last["rifd"][0]) == (0.5, 2.0)
    assert np.isnan([found["rifd"][1] for found in (by_tokens, mean, least, last)]).all()  # no answer has a score


def test_no_rule_but_those():
    check_turns(None)
    with pytest.raises(UserError, match=r"turns must be one of tokens, mean, min, max, last, or None .* got 'all'"):
        check_turns("all")
