"""The arithmetic of verdicts, by hand, and the length-controlled score against what made the verdicts."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize

from ifd_trainer.errors import UserError
from ifd_trainer.evaluation.statistics import difference
from ifd_trainer.judge.scores import (
    SLOPE_DEVIATION,
    judged_documents,
    length_controlled,
    paired,
    winning_score,
)

SCORES = st.integers(1, 10)


@pytest.mark.parametrize(
    ("orders", "value", "contradicts"),
    [
        ([(8, 7), (9, 3)], 1, False),  # wins both
        ([(8, 7), (6, 6)], 1, False),  # wins one, ties the other
        ([(6, 6), (8, 7)], 1, False),
        ([(5, 5), (6, 6)], 0, False),
        ([(8, 7), (1, 10)], 0, True),  # wins one, loses the other, by however much
        ([(6, 7), (6, 6)], -1, False),
        ([(6, 7), (2, 3)], -1, False),
    ],
)
def test_win_tie_and_loss(orders, value, contradicts):
    found = paired(orders)
    assert (found.value, found.contradicts) == (value, contradicts)
    assert (found.own, found.other) == tuple(sum(order[n] for order in orders) / 2 for n in (0, 1))


@given(st.tuples(SCORES, SCORES), st.tuples(SCORES, SCORES))
def test_the_other_arm_sees_the_mirror_and_the_order_of_orders_is_nothing(one, two):
    value = paired([one, two]).value
    assert paired([two, one]).value == value
    assert paired([one[::-1], two[::-1]]).value == -value


def test_the_winning_score():
    assert winning_score([1, 1, 1, 0, -1]) == 1 + 2 / 5
    assert winning_score([-1, -1, float("nan"), 0]) == pytest.approx(1 - 2 / 3)
    assert np.isnan(winning_score([]))


def frame_of(values, longer=None, group="all", set_name="v"):
    """Lines of one arm, of (S, n) values."""
    lines = [
        {
            "set": set_name,
            "seed": seed,
            "document": str(document),
            "group": group,
            "value": value,
            "own_length": 100 + (0 if longer is None else longer[seed][document]),
            "other_length": 100,
        }
        for seed, row in reversed(list(enumerate(values)))
        for document, value in enumerate(row)
    ]
    return pd.DataFrame(lines)


def test_documents_without_all_verdicts_are_left_out_and_counted():
    nan = float("nan")
    values, longer = [[1, 0, nan, -1], [1, nan, 0, 0]], [[5, 1, 1, -7], [6, 1, 1, -8]]
    found = judged_documents(frame_of(values, longer))
    assert found.values.tolist() == [[1, -1], [1, 0]]
    assert found.longer.tolist() == [[5, -7], [6, -8]]
    assert (found.seeds, found.documents, found.left_out) == ([0, 1], ["v: 0", "v: 3"], 2)
    assert found.groups.tolist() == ["all", "all"]
    assert (found.wins, found.losses, found.winning_score) == (2, 1, 1.25)
    both = judged_documents(pd.concat([frame_of(values), frame_of([[1], [1]], group=None, set_name="w")]))
    assert (both.documents, both.groups, both.left_out) == (["v: 0", "v: 3", "w: 0"], None, 2)


def test_the_difference_is_the_winning_score_less_1():
    values = np.random.default_rng(0).integers(-1, 2, (3, 30)).astype(float)
    found = judged_documents(frame_of(values, group=None)).difference(arms=2)
    assert found.mean == pytest.approx(winning_score(values) - 1)
    assert found == difference(values, np.zeros((3, 30)), arms=2)


def test_equal_lengths_change_nothing():
    values = np.random.default_rng(0).choice([1.0, 1.0, 1.0, 0.0, -1.0], (3, 30))
    plain, controlled = difference(values, np.zeros_like(values)), length_controlled(values, np.zeros((3, 30)))
    assert controlled.mean == pytest.approx(plain.mean)
    assert plain.shown
    assert (controlled.low, controlled.high) == pytest.approx((plain.low, plain.high))
    width = plain.boot_high - plain.boot_low
    assert (controlled.boot_low, controlled.boot_high) == pytest.approx(
        (plain.boot_low, plain.boot_high), abs=width / 8
    )


def test_the_fit_is_the_one_of_the_model_as_stated():
    """Its likelihood and prior written out, and left to another minimiser."""
    rng = np.random.default_rng(1)
    longer, values = rng.normal(40, 90, (2, 40)), rng.integers(-1, 2, (2, 40)).astype(float)
    x = np.tanh(longer / np.sqrt((longer**2).mean()))
    y = (values + 1) / 2

    def loss(parameters):
        p = 1 / (1 + np.exp(-(parameters[0] + parameters[1] * x)))
        likelihood = (y * np.log(p) + (1 - y) * np.log(1 - p)).sum()
        return -likelihood + parameters[1] ** 2 / (2 * SLOPE_DEVIATION**2)

    a, _ = minimize(loss, [0, 0], tol=1e-10).x
    assert length_controlled(values, longer, resamples=10).mean == pytest.approx(2 / (1 + np.exp(-a)) - 1, abs=1e-5)


def drawn(rng, shift, slope, quality, seeds=3, documents=60):
    """Outcomes of a judge that likes length by `slope`, and quality by `quality`, of answers longer by `shift`."""
    longer = rng.normal(shift, 100, (1, documents)) + rng.normal(0, 30, (seeds, documents))
    liking = quality + slope * np.tanh(longer / 100) + rng.logistic(0, 1, (seeds, documents))
    return np.sign(liking), longer


def test_where_the_longer_answer_always_wins_and_no_answer_is_better():
    rng, covered = np.random.default_rng(0), []
    for _ in range(2):
        longer = np.rint(rng.normal(100, 100, (1, 60)) + rng.normal(0, 30, (3, 60)))
        values = np.sign(longer)  # separable: the slope would go to infinity
        assert winning_score(values) > 1.5
        assert difference(values, np.zeros_like(values)).shown
        found = length_controlled(values, longer, resamples=100)
        covered += [found.low < 0 < found.high, not found.shown]
        assert abs(found.mean) < 0.3
    assert all(covered)


def test_where_quality_wins_at_equal_lengths():
    values, longer = drawn(np.random.default_rng(0), shift=0, slope=0, quality=1.5)
    plain, controlled = difference(values, np.zeros_like(values)), length_controlled(values, longer, resamples=200)
    assert controlled.shown
    assert controlled.mean == pytest.approx(plain.mean, abs=0.05)


def test_a_better_arm_with_shorter_answers_is_seen():
    values, longer = drawn(np.random.default_rng(1), shift=-80, slope=3, quality=1.5, seeds=6, documents=120)
    assert difference(values, np.zeros_like(values)).mean < 0
    found = length_controlled(values, longer, resamples=200)
    assert found.shown
    assert found.mean == pytest.approx(2 / (1 + np.exp(-1.5)) - 1, abs=0.15)


def test_outcomes_that_are_all_alike():
    longer = np.random.default_rng(0).normal(0, 9, (2, 8))
    for value in (1.0, -1.0):
        found = length_controlled(np.full((2, 8), value), longer)
        assert (found.mean, found.low, found.high, found.boot_low, found.boot_high) == (value,) * 5
    found = length_controlled(np.zeros((2, 8)), longer)
    assert (found.mean, found.boot_low, found.boot_high) == pytest.approx((0, 0, 0), abs=1e-9)


def test_documents_of_groups_count_as_their_groups():
    values, longer = drawn(np.random.default_rng(2), shift=20, slope=1, quality=0.5, documents=20)
    copies, groups = (np.repeat(each, 3, axis=1) for each in (values, longer)), np.repeat(np.arange(20), 3)
    alone = length_controlled(values, longer, resamples=200)
    copied = length_controlled(*copies, groups=groups, resamples=200)
    assert (copied.boot_low, copied.boot_high) == pytest.approx((alone.boot_low, alone.boot_high), abs=0.1)
    assert copied.high - copied.low == pytest.approx(alone.high - alone.low, rel=0.1)


def test_one_seed_is_too_few():
    with pytest.raises(UserError, match="at least 2 seeds"):
        length_controlled(np.ones((1, 5)), np.ones((1, 5)))
