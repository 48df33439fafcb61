"""S-IFD and its threshold: numbers worked by hand, a sort of all tokens, and data sets cut and ordered in any way."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ifd_trainer.method.selective_ifd import delta_threshold, selected_scores, selective_ifd, token_deltas

NAN, INF = math.nan, math.inf
LN2 = math.log(2)
losses = st.floats(0, 30, width=32)
deltas_of_rows = st.lists(hnp.arrays(np.float32, st.integers(0, 12), elements=st.floats(-9, 9, width=32)), max_size=12)
shares = st.sampled_from([0.01, 0.07, 0.25, 0.5, 0.75, 0.999, 1.0]) | st.floats(1e-6, 1)


def sorted_threshold(deltas: np.ndarray, share: float) -> float:
    """By the definition: the last of the share of the tokens that come first in order."""
    largest = sorted(np.abs(deltas[np.isfinite(deltas)]).tolist(), reverse=True)
    return largest[math.ceil(Fraction(str(share)) * len(largest)) - 1] if largest else NAN


def rows_of(deltas: list[np.ndarray], seed: int = 0) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Losses with these differences, but for rounding."""
    rng = np.random.default_rng(seed)
    das = [rng.uniform(0, 9, len(row)).astype(np.float32) for row in deltas]
    return [of - row for of, row in zip(das, deltas, strict=True)], das


# ---- by hand ----------------------------------------------------------------------------------------------------


def test_sifd_of_token_probabilities_worked_by_hand():
    # Row 0: given the prompt 1/2, 1/4, 1/2, alone 1/8, 1/4, 1/4: Delta = 2 ln 2, 0, ln 2. Row 1: 1/4 and 1/2: -ln 2, 0.
    cas = [[LN2, 2 * LN2, LN2], [2 * LN2, LN2]]
    das = [[3 * LN2, 2 * LN2, 2 * LN2], [LN2, LN2]]
    deltas, counts = token_deltas(cas, das)
    np.testing.assert_allclose(deltas, [2 * LN2, 0, LN2, -LN2, 0], rtol=1e-6)
    assert counts.tolist() == [3, 2]
    # Of the 5 tokens 20 % are 1: the first one of row 0.
    assert delta_threshold(lambda: [deltas], 0.2) == pytest.approx(2 * LN2)
    np.testing.assert_allclose(selective_ifd(cas, das, 2 * LN2 - 1e-6), [2**-2, NAN], rtol=1e-6)
    # 40 % are 2: the second one is ln 2 large, and so is the token of row 1, which passes too.
    tie = delta_threshold(lambda: [np.float32([2 * LN2, 0, LN2, -LN2, 0])], 0.4)
    assert tie == pytest.approx(LN2)
    np.testing.assert_allclose(selective_ifd(cas, das, tie - 1e-6), [2**-1.5, 2], rtol=1e-6)
    # All of them: the ratio of the perplexities of the answers.
    np.testing.assert_allclose(selective_ifd(cas, das, 0), [2**-1, 2**0.5], rtol=1e-6)


def test_tokens_that_say_nothing_hide_in_ifd_what_sifd_shows():
    # Both answers have one word that the prompt gives; one of them in a long sentence that follows from itself.
    cas, das = [[0.5], [0.5, *[1.0] * 99]], [[4.5], [4.5, *[1.01] * 99]]
    plain = np.exp([np.mean(given) - np.mean(alone) for given, alone in zip(cas, das, strict=True)])
    assert plain[0] < 0.02
    assert plain[1] > 0.9
    np.testing.assert_allclose(selective_ifd(cas, das, 1.0), [math.exp(-4)] * 2, rtol=1e-6)


def test_equal_tokens_pass_together_and_at_the_threshold():
    deltas = np.float32([0.5, -0.5, 0.5, 0.1])
    assert delta_threshold(lambda: [deltas], 0.25) == 0.5
    np.testing.assert_allclose(selected_scores(deltas, np.array([4]), np.abs(deltas) >= 0.5), [math.exp(-0.5 / 3)])


def test_a_share_in_decimals_means_the_decimals():
    deltas = np.arange(1, 101, dtype=np.float32)
    assert 0.07 * 100 > 7
    assert delta_threshold(lambda: [deltas], 0.07) == 94  # the 7 largest, 94 to 100


def test_without_tokens_there_is_neither_a_threshold_nor_a_score():
    for parts in ([], [np.empty(0)], [np.float32([NAN, INF])]):
        assert math.isnan(delta_threshold(lambda parts=parts: parts, 0.5))
    assert selective_ifd([], [], 0.5).shape == (0,)
    np.testing.assert_array_equal(selective_ifd([None, [], [1.0]], [None, [], [2.0]], NAN), [NAN] * 3)
    np.testing.assert_allclose(selective_ifd([None, [], [1.0]], [None, [], [2.0]], 0.5), [NAN, NAN, math.exp(-1)])


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_token_that_is_not_finite_takes_the_score_of_its_row_alone(bad):
    cas, das = [[1.0, bad], [1.0], [bad]], [[2.0, 1.0], [3.0], [bad]]
    np.testing.assert_allclose(selective_ifd(cas, das, 0), [NAN, math.exp(-2), NAN])
    deltas = token_deltas(cas, das)[0]
    assert delta_threshold(lambda: [deltas], 1.0) == 1.0  # of the two that are finite


def test_a_score_that_overflows_is_none():
    np.testing.assert_array_equal(selective_ifd([[1e4]], [[1.0]], 0), [NAN])


def test_losses_of_other_tokens_are_refused():
    with pytest.raises(ValueError, match=r"row 1 has 2 of the one and 1 of the other\. Score the rows again"):
        selective_ifd([[1.0], [1.0, 2.0]], [[1.0], [1.0]], 0)
    with pytest.raises(ValueError, match="same rows, got 1 and 2 of them"):
        selective_ifd([[1.0]], [[1.0], [1.0]], 0)


@pytest.mark.parametrize("share", [0, -0.1, 1.01, NAN, True, None, "half", 50])
def test_what_is_no_share_is_refused(share):
    with pytest.raises(ValueError, match="share is a share of all tokens, above 0 and at most 1, got"):
        delta_threshold(list, share)


def test_parts_that_can_be_read_once_are_refused():
    parts = iter([np.float32([1.0, 2.0])])
    with pytest.raises(ValueError, match="same tokens each time that it is called"):
        delta_threshold(lambda: parts, 0.5)


# ---- in any order, cut anywhere -----------------------------------------------------------------------------------


@given(rows=deltas_of_rows, share=shares, cut=st.integers(1, 5), seed=st.integers(0, 99))
def test_the_threshold_is_that_of_a_sort_however_the_tokens_are_cut_and_ordered(rows, share, cut, seed):
    deltas = np.concatenate([np.empty(0, np.float32), *rows])
    expected = sorted_threshold(deltas, share)
    moved = np.random.default_rng(seed).permutation(deltas)
    for parts in ([deltas], rows, [moved[i : i + cut] for i in range(0, len(moved), cut)]):
        found = delta_threshold(lambda parts=parts: parts, share)
        assert found == expected or (math.isnan(found) and math.isnan(expected))
    if deltas.size:  # the share passes, and no more but for equal ones
        passing, wanted = int((np.abs(deltas) >= expected).sum()), math.ceil(Fraction(str(share)) * deltas.size)
        assert passing >= wanted
        assert (np.abs(deltas) > expected).sum() < wanted


@given(exponents=st.lists(st.integers(-140, 120), min_size=1, max_size=40), share=shares)
def test_the_threshold_is_exact_from_the_smallest_to_the_largest_floats(exponents, share):
    deltas = np.ldexp(np.float32(1.1), exponents).astype(np.float32)
    assert delta_threshold(lambda: [deltas], share) == sorted_threshold(deltas, share)


@given(rows=st.lists(st.lists(st.tuples(losses, losses), min_size=1, max_size=20), min_size=1, max_size=8))
def test_all_tokens_give_the_ratio_of_perplexities(rows):
    cas, das = ([np.float32([token[side] for token in row]) for row in rows] for side in (0, 1))
    deltas = token_deltas(cas, das)[0]
    found = selective_ifd(cas, das, delta_threshold(lambda: [deltas], 1.0))
    expected = [np.exp(np.float64(c).mean() - np.float64(d).mean()) for c, d in zip(cas, das, strict=True)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@given(rows=deltas_of_rows, threshold=st.floats(0, 9, width=32), seed=st.integers(0, 99))
def test_a_row_has_the_same_score_to_the_bit_wherever_it_stands(rows, threshold, seed):
    cas, das = rows_of(rows)
    together = selective_ifd(cas, das, threshold)
    order = np.random.default_rng(seed).permutation(len(rows))
    moved = selective_ifd([cas[i] for i in order], [das[i] for i in order], threshold)
    np.testing.assert_array_equal(moved, together[order])
    alone = [selective_ifd([c], [d], threshold)[0] for c, d in zip(cas, das, strict=True)]
    np.testing.assert_array_equal(together, alone)
    for score, c, d in zip(together, cas, das, strict=True):
        delta = d - c
        chosen = delta[np.abs(delta) >= np.float32(threshold)]
        assert (
            score == pytest.approx(math.exp(-np.float64(chosen).mean()), rel=1e-12) if chosen.size else score != score
        )
