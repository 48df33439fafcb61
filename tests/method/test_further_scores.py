"""Further scores: their names, and their equations against numbers worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ifd_trainer.errors import UserError
from ifd_trainer.method.columns import OWN_COLUMNS
from ifd_trainer.method.equations import OF_LOSSES, further_scores, ifd_ppl, ira, loss_change, perplexity, rifd
from ifd_trainer.method.further_scores import (
    FURTHER,
    OF_A_RUN,
    SCORED_BY_MODEL,
    further_names,
    losses_read,
    replaced_columns,
)

NAN, INF = math.nan, math.inf


def test_each_score_of_a_scoring_has_an_equation_and_no_column_is_named_twice():
    assert OF_LOSSES.keys() == set(SCORED_BY_MODEL) == set(FURTHER) - set(OF_A_RUN)
    assert set(FURTHER) & set(OWN_COLUMNS) == set()
    assert {other for score in FURTHER.values() for other in score.brings} <= set(FURTHER)


def test_scores_of_token_probabilities_worked_by_hand():
    # Two answer tokens: 1/2 and 1/8 given the prompt, 1/4 and 1/16 alone.
    cas, das = (math.log(2) + math.log(8)) / 2, (math.log(4) + math.log(16)) / 2  # 2 ln 2 and 3 ln 2
    # Three tokens of a prompt after the first: 1/2, 1/4 and 1/8, so a geometric mean of 1/4.
    prompt = (math.log(2) + math.log(4) + math.log(8)) / 3
    # Two tokens of an instruction: 1/2 and 1/2 given the answer, 1/4 and 1/64 alone.
    rcas, rdas = math.log(2), (math.log(4) + math.log(64)) / 2  # ln 2 and 4 ln 2
    found = further_scores(SCORED_BY_MODEL, {"cas": cas, "das": das, "prompt": prompt, "rcas": rcas, "rdas": rdas})
    expected = {
        "ira": math.log(2),
        "answer_ppl": 4,  # sqrt(2 * 8)
        "direct_ppl": 8,  # sqrt(4 * 16)
        "prompt_ppl": 4,  # cube root of 2 * 4 * 8
        "rifd": 1 / 4,
        "rcas": math.log(2),
        "rdas": 4 * math.log(2),
    }
    assert {name: float(value) for name, value in found.items()} == pytest.approx(expected, rel=1e-15)


def test_a_loss_that_falls_has_a_change_below_zero():
    np.testing.assert_array_equal(loss_change([1.5, 2.0, NAN, 3.0], [2.0, 1.0, 1.0, NAN]), [-0.5, 1.0, NAN, NAN])


@pytest.mark.parametrize("equation", [ira, rifd, loss_change])
@pytest.mark.parametrize(("one", "other"), [(NAN, 1.0), (1.0, NAN), (INF, 1.0), (1.0, INF), (INF, INF)])
def test_a_loss_that_is_not_finite_gives_no_score(equation, one, other):
    assert math.isnan(equation(one, other))


@pytest.mark.parametrize("loss", [NAN, INF, 1000.0])
def test_a_perplexity_that_is_not_finite_is_none(loss):
    assert math.isnan(perplexity(loss))


def test_an_instruction_that_the_model_knows_by_heart_has_no_reversed_ifd():
    assert math.isnan(rifd(1.0, 0.0))


@given(cas=st.floats(1e-3, 20), das=st.floats(1e-3, 20))
def test_ira_is_the_logarithm_of_the_ratio_of_perplexities(cas, das):
    assert float(ira(cas, das)) == pytest.approx(-math.log(ifd_ppl(cas, das)), rel=1e-9, abs=1e-12)
    assert float(perplexity(cas)) >= 1


# ---- names ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "names"),
    [
        (None, ()),
        ((), ()),
        ("ira", ("ira",)),
        (["prompt_ppl", "ira", "ira"], ("ira", "prompt_ppl")),
        ("rifd,ira", ("ira", "rifd", "rcas", "rdas")),
        (("rdas",), ("rdas",)),
        (("ifd", "cas", "ifd_status"), ()),
        (("ifd", "ira"), ("ira",)),
    ],
)
def test_names_are_put_in_one_order_with_what_they_bring(asked, names):
    assert further_names(asked) == names


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("rfid", "'rfid' is no score, did you mean 'rifd'?"),
        (["prompt_pll"], "'prompt_pll' is no score, did you mean 'prompt_ppl'?"),
        (["ifd_pll"], "did you mean 'ifd_ppl'?"),
        (["xyzzy"], r"'xyzzy' is no score. Known are ira, .*rifd.*; always there are cas, das, ifd, "),
        ([3], "3 is no score"),
        ("loss_change", "loss_change compares the scorings of a run"),
    ],
)
def test_an_unknown_name_is_refused_with_the_known_ones(asked, words):
    with pytest.raises(UserError, match=words.replace("?", r"\?")):
        further_names(asked)


def test_a_run_has_one_more():
    assert further_names("ifd loss_change", in_training=True) == ("loss_change",)


def test_losses_that_are_read_for_scores():
    assert losses_read(["ira", "answer_ppl", "direct_ppl", "loss_change"]) == set()
    assert losses_read(["rifd"]) == {"rcas", "rdas"}
    assert losses_read(["rcas", "prompt_ppl"]) == {"rcas", "prompt"}


def test_a_column_of_the_data_set_is_replaced_only_by_a_scoring_that_gives_it_or_gave_it():
    assert replaced_columns(["ira", "rifd", "text"], ["ira"]) == ["ira"]
    assert replaced_columns(["ira", "rifd", "text", "ifd_status"], ["ira"]) == ["ira", "rifd"]
    assert replaced_columns(["ira", "text"], []) == []
