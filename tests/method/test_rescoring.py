"""Which rows are scored anew under a budget, and how far the losses of the others are moved."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

from ifd_trainer.errors import UserError
from ifd_trainer.method.rescoring import Rescoring, affordable, moves, nearest
from ifd_trainer.method.schedule import Timing

SIZES = st.lists(st.integers(1, 50), min_size=1, max_size=40)


@given(SIZES, st.floats(0, 2000), st.floats(0.01, 3), st.integers(0, 10**6), st.randoms(use_true_random=False))
def test_the_rows_cost_no_more_than_the_budget_and_no_further_one_would_fit(sizes, tokens, budget, seed, random):
    cost, rows = np.array(sizes, dtype=float), len(sizes)
    able = np.array([random.random() < 0.8 for _ in sizes])
    ages = np.array([random.randint(0, 3) for _ in sizes])
    values, trained = np.array([random.random() for _ in sizes]), np.array([random.random() < 0.3 for _ in sizes])
    rule, ids = Rescoring(budget), np.arange(rows)
    allowance = rule.allowance(tokens)
    assert allowance == pytest.approx(3 * budget * tokens)
    drawn, stale = rule.drawn(able, trained, ages, cost, allowance, ids, seed)
    again = rule.drawn(able, trained, ages, cost, allowance, ids, seed)
    assert [part.tolist() for part in again] == [drawn.tolist(), stale.tolist()]
    fully = np.concatenate([drawn, stale])
    order = nearest(values, able, 5, np.isin(ids, fully), ids)
    left = allowance - cost[fully].sum()
    near = rule.near(order, cost, left)
    chosen = np.concatenate([fully, near])
    assert len(set(chosen.tolist())) == len(chosen)
    assert able[chosen].all()
    assert cost[drawn].sum() <= rule.explored * allowance + 1e-9
    assert cost[drawn[trained[drawn]]].sum() <= rule.explored * allowance / 2 + 1e-9
    assert cost[stale].sum() <= rule.stale * allowance + 1e-9
    assert cost[chosen].sum() <= allowance + 1e-9
    others = [row for row in order.tolist() if row not in near and cost[row] <= left]
    assert not others or cost[near].sum() + cost[others[0]] > left
    # The stale ones are the oldest of those that were not drawn, as far as each of them fits.
    left_out = np.flatnonzero(able & ~np.isin(ids, fully) & (cost <= rule.stale * allowance))
    assert not len(stale) or not len(left_out) or ages[stale].max() <= ages[left_out].min()


@given(SIZES, st.integers(0, 10**6))
def test_rows_are_drawn_by_their_ids_wherever_they_stand(sizes, seed):
    cost, ids = np.array(sizes, dtype=float), np.arange(len(sizes)) + 100
    order = np.random.default_rng(seed).permutation(len(sizes))
    rule, same, everything, trained = Rescoring(), np.zeros(len(ids), dtype=int), np.full(len(ids), True), ids % 3 == 0
    here = rule.drawn(everything, trained, same, cost, 2 * cost.sum(), ids, seed)
    there = rule.drawn(everything, trained[order], same, cost[order], 2 * cost.sum(), ids[order], seed)
    for one, other in zip(here, there, strict=True):
        assert ids[one].tolist() == ids[order][other].tolist()


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.integers(1, 25))
def test_the_nearest_rows_are_those_at_the_cut_first(scores, kept):
    values, able, ids = np.array(scores), np.arange(len(scores)) % 3 != 2, np.arange(len(scores))
    cut = sorted(values[able])[-min(kept, able.sum())]
    for known in (ids < 0, ids % 2 == 1):
        order = nearest(values, able, kept, known, ids)
        assert sorted(order.tolist()) == np.flatnonzero(able & ~known).tolist()
        assert (np.diff(np.abs(values[order] - cut)) >= 0).all()


def test_a_row_that_alone_costs_more_is_passed_over():
    assert affordable(np.array([0, 1, 2]), np.array([9.0, 2.0, 2.0]), 4.0).tolist() == [1, 2]
    assert affordable(np.array([0, 1, 2]), np.array([9.0, 2.0, 2.0]), 1.9).tolist() == []
    assert affordable(np.array([], dtype=int), np.array([9.0]), 10.0).tolist() == []


NOTHING = np.empty((7, 0))
OLD, NONE = np.full(7, 2.0), np.nan


def test_without_features_losses_are_moved_by_the_mean_factor_of_rows_of_their_kind():
    trained = np.array([True, True, True, False, False, False, False])
    new = np.array([1.0, 0.25, NONE, 4.0, 1.0, NONE, NONE])
    expected = np.where(trained, np.sqrt(1.0 * 0.25) / 2, np.sqrt(4.0 * 1.0) / 2)
    assert np.exp(moves(OLD, new, trained, NOTHING)) == pytest.approx(expected)
    # One of a kind tells nothing of it: all go by all.
    new[0] = NONE
    all_of_them = np.exp(np.log([0.25 / 2, 4.0 / 2, 1.0 / 2]).mean())
    assert np.exp(moves(OLD, new, trained, NOTHING)) == pytest.approx(np.where(trained, all_of_them, 1.0))
    assert moves(OLD, np.full(7, NONE), trained, NOTHING).tolist() == [0.0] * 7
    odd = np.array([0.0, 1.0, *OLD[2:]]), np.array([1.0, 0.0, *[NONE] * 5])
    assert moves(*odd, trained, NOTHING).tolist() == [0.0] * 7


@given(st.integers(0, 10**6), st.integers(1, 60), st.integers(1, 4))
def test_rows_are_moved_as_a_ridge_regression_says(seed, measured, width):
    rng, rows = np.random.default_rng(seed), 60
    features, trained = rng.normal(3, 2, (rows, width)), rng.random(rows) < 0.3
    features[rng.random(rows) < 0.1] = np.nan  # rows without a score
    old, new = rng.uniform(0.5, 3, rows), rng.uniform(0.2, 3, rows)
    new[rng.permutation(rows)[measured:]] = np.nan
    known = np.isfinite(new)
    x = np.nan_to_num(StandardScaler().fit_transform(features))
    y = np.log(new / old)
    x_mean, y_mean = np.empty_like(x), np.empty(rows)
    for kind in (True, False):
        of = known & (trained == kind)
        of = of if of.sum() >= 2 else known
        x_mean[trained == kind], y_mean[trained == kind] = x[of].mean(axis=0), y[of].mean()
    model = Ridge(alpha=5.0, fit_intercept=False).fit((x - x_mean)[known], (y - y_mean)[known])
    expected = y_mean + model.predict(x - x_mean)
    np.testing.assert_allclose(moves(old, new, trained, features), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("budget", [0, -0.1, float("inf"), float("nan"), True, "much"])
def test_a_budget_is_a_share_above_0(budget):
    with pytest.raises(UserError, match="rescore_budget is a share of what training costs, above 0"):
        Timing(rescore="candidates", rescore_budget=budget)
    with pytest.raises(UserError, match="rescore must be 'all' or 'candidates', got 'some'"):
        Timing(rescore="some")
