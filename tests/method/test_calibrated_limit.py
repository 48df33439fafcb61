"""The calibrated limit keeps its promise: at most a share alpha of exchangeable pairs scores below it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ifd_trainer.method.calibrated_limit import CalibratedLimit
from ifd_trainer.method.error_rate import least_measured

alphas = st.floats(0.01, 0.5)


@given(alphas, st.integers(100, 300), st.integers(0, 2**32))
def test_the_limit_is_the_order_statistic_of_split_conformal_prediction(alpha, pairs, seed):
    scores = np.random.default_rng(seed).permutation(np.arange(1.0, pairs + 1))  # the k-th smallest is k
    limit = CalibratedLimit(alpha, pairs).limit(scores)
    assert limit <= alpha * (pairs + 1) + 1e-6
    assert limit + 1 > alpha * (pairs + 1) - 1e-6


def test_at_most_alpha_of_new_pairs_is_below_the_limit_and_not_much_less():
    rng, alpha, below = np.random.default_rng(0), 0.05, []
    for _ in range(2000):
        draws = rng.lognormal(size=160)  # 150 to calibrate, 10 new ones of the same distribution
        below.append(np.mean(draws[150:] < CalibratedLimit(alpha, 150).limit(draws[:150])))
    # exactly floor(0.05 * 151) / 151 = 0.0464; four standard errors are 0.0055
    assert abs(np.mean(below) - 7 / 151) < 0.0055


@given(
    st.lists(st.booleans(), min_size=2, max_size=60).filter(lambda scored: sum(scored) > 1),
    st.integers(20, 90),
    st.integers(0, 2**32),
)
def test_pairs_are_of_two_scored_rows_and_each_is_used_once_in_a_round(scored, pairs, seed):
    scored, ids = np.array(scored), np.random.default_rng(seed).permutation(len(scored))
    limit = CalibratedLimit(pairs=pairs)
    drawn, rows = limit.draw(ids, scored, seed), np.flatnonzero(scored)
    assert limit.wanted(len(rows)) == min(pairs, len(rows))
    assert len(drawn) >= 2 * len(rows)
    assert (drawn[:, 0] != drawn[:, 1]).all()
    for start in range(0, len(drawn), len(rows)):
        for side in (0, 1):
            assert sorted(drawn[start : start + len(rows), side]) == rows.tolist()


@given(st.integers(2, 40), st.integers(0, 2**32))
def test_the_same_rows_make_the_same_pairs_wherever_they_stand(rows, seed):
    ids, limit = np.arange(100, 100 + rows), CalibratedLimit(pairs=30)
    order = np.random.default_rng(seed).permutation(rows)
    here = limit.draw(ids, np.ones(rows, bool), seed)
    there = limit.draw(ids[order], np.ones(rows, bool), seed)
    assert ids[here].tolist() == ids[order][there].tolist()


def test_a_pool_of_one_row_makes_no_pair():
    assert CalibratedLimit().draw(np.arange(3), np.array([False, True, False]), 0).shape == (0, 2)


def test_scores_that_are_missing_do_not_count():
    limit = CalibratedLimit(alpha=0.25, pairs=3)
    assert limit.limit(np.array([np.nan, 0.9, 0.7, np.inf, 0.8])) == 0.7
    with pytest.raises(
        ValueError, match=r"takes at least 3 answers under a wrong prompt; the pool gave 2 .*Raise alpha"
    ):
        limit.limit(np.array([0.5, np.nan, 0.6]))


@pytest.mark.parametrize("alpha", [0.01, 0.02, 0.05, 0.07, 0.1, 0.2, 0.25, 1 / 3, 0.5])
def test_the_least_number_of_pairs_is_enough_and_one_fewer_is_not(alpha):
    least = least_measured(alpha)
    assert math.floor(round(alpha * (least + 1), 9)) == 1
    assert CalibratedLimit(alpha, least).limit(np.linspace(1, 2, least)) == 1.0
    with pytest.raises(ValueError, match=f"at least {least} with alpha={alpha}, got {least - 1}"):
        CalibratedLimit(alpha, least - 1)


@pytest.mark.parametrize("alpha", [0, 1, -0.1, "a", None])
def test_an_alpha_that_is_no_share_is_refused(alpha):
    with pytest.raises(ValueError, match="alpha must be a share"):
        CalibratedLimit(alpha)
