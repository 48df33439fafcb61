"""What samples say of a row: shares, intervals and names against numbers worked out by hand, and against scipy's."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from ifd_trainer.errors import UserError
from ifd_trainer.method.knowledge import compared, hard_or_wrong, known_share, wilson_interval

NAN = math.nan


def test_the_share_counts_the_samples_that_reach_the_threshold():
    agreements = [[0.5, 0.49, 1.0, 0.0], [0.0] * 4, [1.0] * 4, [0.6, NAN, 0.6, 0.6]]
    np.testing.assert_array_equal(known_share(agreements), [0.5, 0, 1, NAN])
    np.testing.assert_array_equal(known_share(agreements, threshold=1.0), [0.25, 0, 1, NAN])
    assert known_share([0.2, 0.9]) == 0.5


@given(st.lists(st.floats(0, 1), min_size=1, max_size=9), st.floats(0.01, 1))
def test_more_is_known_at_a_lower_threshold(agreements, threshold):
    share = known_share(agreements, threshold)
    assert share == sum(value >= threshold for value in agreements) / len(agreements)
    assert known_share(agreements, threshold / 2) >= share


@pytest.mark.parametrize("threshold", [0, -1, 1.5, NAN, True, "0.5"])
def test_a_threshold_is_a_share(threshold):
    with pytest.raises(UserError, match="threshold must be a number above 0 and at most 1"):
        known_share([0.5], threshold)


def test_each_answer_is_compared_with_the_reference_and_with_each_other_one():
    with_reference, among = compared(["red cat", "a red dog", "blue"], "The red cat.")
    assert with_reference.tolist() == [1.0, 0.5, 0.0]
    np.testing.assert_array_equal(among, [[NAN, 0.5, 0], [0.5, NAN, 0], [0, 0, NAN]])


def test_a_function_of_ones_own_is_asked_both_ways():
    starts = lambda one, other: other.startswith(one)  # noqa: E731
    with_reference, among = compared(["a", "ab"], "abc", starts)
    assert with_reference.tolist() == [1.0, 1.0]
    np.testing.assert_array_equal(among, [[NAN, 1], [0, NAN]])


def test_blank_answers_agree_with_nothing():
    with_reference, among = compared(["", " \n", "x"], "x", lambda one, other: 1.0)
    assert with_reference.tolist() == [0.0, 0.0, 1.0]
    np.testing.assert_array_equal(among, [[NAN, 0, 0], [0, NAN, 0], [0, 0, NAN]])


def test_one_answer_has_no_other():
    with_reference, among = compared(["x"], "x")
    assert (with_reference.tolist(), among.shape) == ([1.0], (1, 1))
    assert np.isnan(among).all()


@given(st.integers(1, 40), st.data(), st.sampled_from([0.5, 0.9, 0.95, 0.999]))
def test_the_interval_is_wilsons(samples, data, confidence):
    known = data.draw(st.integers(0, samples))
    low, high = wilson_interval(known / samples, samples, confidence)
    expected = binomtest(known, samples).proportion_ci(confidence, method="wilson")
    assert (float(low), float(high)) == pytest.approx((expected.low, expected.high), abs=1e-9)
    assert 0 <= low <= known / samples <= high <= 1


def test_the_interval_of_eight_samples_by_hand():
    # z = 1.96, n = 8, p = 1/4: (0.25 + 0.2401 -+ 1.96 sqrt(0.1875/8 + 0.015006)) / 1.4802
    low, high = wilson_interval([0.25, NAN, 0.25], [8, 8, 0])
    np.testing.assert_allclose(low, [0.0715, NAN, NAN], atol=1e-4)
    np.testing.assert_allclose(high, [0.5907, NAN, NAN], atol=1e-4)


@pytest.mark.parametrize("confidence", [0, 1, 1.5, NAN])
def test_a_confidence_is_between_0_and_1(confidence):
    with pytest.raises(UserError, match="confidence must be a number between 0 and 1"):
        wilson_interval(0.5, 8, confidence)


TABLE = [
    # known, ifd, consistency, name
    (0.5, 0.8, 0.9, "doubtful"),  # knows it, and its words surprise
    (0.5, 0.79, 0.9, "known"),
    (1.0, 0.1, 0.0, "known"),
    (0.4, 0.8, 0.5, "doubtful"),  # one answer of its own
    (0.4, 0.1, 0.5, "doubtful"),
    (0.4, 0.8, 0.49, "hard"),
    (0.0, 0.8, NAN, "hard"),
    (0.0, 0.79, 0.2, "unclear"),
    (NAN, 0.8, 0.2, None),
    (0.0, NAN, 0.2, None),
]


def test_every_line_of_the_table_and_its_limits():
    known, ifd, consistency, names = zip(*TABLE, strict=True)
    assert hard_or_wrong(known, ifd, consistency, high_ifd=0.8).tolist() == list(names)


def test_without_a_consistency_nothing_is_an_answer_of_its_own():
    assert hard_or_wrong([0.0, 0.0, 1.0], [0.9, 0.1, 0.9], high_ifd=0.5).tolist() == ["hard", "unclear", "doubtful"]


def test_an_ifd_is_high_from_the_median_on_of_rows_with_both():
    known, ifd = [0.0, 0.0, 0.0, NAN, 0.0], [0.2, 0.4, 0.6, 9.0, NAN]
    assert hard_or_wrong(known, ifd).tolist() == ["unclear", "hard", "hard", None, None]


def test_rows_without_numbers_and_none_at_all_have_no_name():
    assert hard_or_wrong([NAN], [NAN]).tolist() == [None]
    assert hard_or_wrong([], []).tolist() == []


def test_limits_are_those_that_were_asked_for():
    names = hard_or_wrong([0.3, 0.3], [0.1, 0.1], [0.0, 0.3], known_from=0.4, consistent_from=0.3, high_ifd=1)
    assert names.tolist() == ["unclear", "doubtful"]
    assert hard_or_wrong([0.3], [0.1], known_from=0.3, high_ifd=1).tolist() == ["known"]


def test_numbers_of_other_rows_are_told():
    with pytest.raises(UserError, match=r"numbers of the same rows.*\(2,\), \(3,\) and \(2,\)"):
        hard_or_wrong([0.1, 0.2], [0.1, 0.2, 0.3])
    with pytest.raises(UserError, match="known_from must be"):
        hard_or_wrong([0.1], [0.1], known_from=0)


def test_columns_with_nulls_are_taken_as_a_data_set_gives_them():
    assert hard_or_wrong([0.0, None], [0.9, None], [None, None], high_ifd=0.5).tolist() == ["hard", None]
