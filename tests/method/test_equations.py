"""The equations against numbers worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ifd_trainer.method.equations import MIN_DIRECT_SCORE, ifd, ifd_ppl

NAN, INF = math.nan, math.inf
losses = st.floats(min_value=1e-3, max_value=20)


def test_ifd_of_token_probabilities_worked_by_hand():
    # Two answer tokens: 1/2 and 1/8 given the prompt, 1/4 and 1/16 alone.
    cas = (math.log(2) + math.log(8)) / 2  # = 2 ln 2
    das = (math.log(4) + math.log(16)) / 2  # = 3 ln 2
    assert float(ifd(cas, das)) == pytest.approx(2 / 3, rel=1e-15)
    # Perplexities: sqrt(2 * 8) = 4 and sqrt(4 * 16) = 8.
    assert float(ifd_ppl(cas, das)) == pytest.approx(4 / 8, rel=1e-15)


def test_a_prompt_that_misleads_has_ifd_above_one():
    assert float(ifd(3.0, 2.0)) == 1.5
    assert float(ifd_ppl(3.0, 2.0)) == pytest.approx(math.e)


def test_a_prompt_that_changes_nothing_has_ifd_one():
    assert float(ifd(2.5, 2.5)) == 1.0
    assert float(ifd_ppl(2.5, 2.5)) == 1.0


def test_an_answer_that_the_prompt_gives_away_has_ifd_zero():
    assert float(ifd(0.0, 2.0)) == 0.0


def test_the_two_ratios_can_rank_rows_differently():
    cas, das = np.array([0.5, 4.0]), np.array([1.0, 5.0])
    assert ifd(cas, das).argmax() == 1  # 0.5 and 0.8
    assert ifd_ppl(cas, das).argmax() == 0  # exp(-0.5) and exp(-1)


@pytest.mark.parametrize("das", [0.0, MIN_DIRECT_SCORE / 2, -1.0])
def test_a_direct_score_of_zero_has_no_ifd(das):
    assert math.isnan(ifd(1.0, das))


@pytest.mark.parametrize("equation", [ifd, ifd_ppl])
@pytest.mark.parametrize(("cas", "das"), [(NAN, 1.0), (1.0, NAN), (INF, 1.0), (1.0, INF), (INF, INF), (1.0, -INF)])
def test_what_is_not_finite_gives_nan_without_a_warning(equation, cas, das):
    assert math.isnan(equation(cas, das))


def test_a_ratio_of_perplexities_that_overflows_is_nan():
    assert math.isnan(ifd_ppl(1000.0, 1.0))


def test_one_bad_element_leaves_the_others_alone():
    np.testing.assert_array_equal(ifd([1.0, NAN, 3.0, 1.0], [2.0, 1.0, 4.0, 0.0]), [0.5, NAN, 0.75, NAN])


@pytest.mark.parametrize("equation", [ifd, ifd_ppl])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3)])
def test_shape_and_dtype(equation, shape):
    out = equation(np.ones(shape, dtype=np.float32), np.ones(shape, dtype=np.float32))
    assert out.shape == shape
    assert out.dtype == np.float64


@pytest.mark.parametrize("equation", [ifd, ifd_ppl])
def test_shapes_that_differ_are_an_error(equation):
    with pytest.raises(ValueError, match=r"same shape, got \(2,\) and \(1,\)"):
        equation([1.0, 2.0], [1.0])


@given(cas=losses, das=losses)
def test_both_ratios_agree_on_whether_the_prompt_helps(cas, das):
    assert (float(ifd(cas, das)) < 1) == (cas < das)
    assert float(ifd_ppl(cas, das)) == pytest.approx(math.exp(cas) / math.exp(das), rel=1e-12)
