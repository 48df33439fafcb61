"""LEAD: which rows of which group, and what is learned from losses."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ifd_trainer import Lead
from ifd_trainer.errors import UserError
from ifd_trainer.method.lead import chances, learned, rewarded
from ifd_trainer.method.selection import ShortfallError

NAN = math.nan


def columns_of(utility, group, times=None) -> dict[str, np.ndarray]:
    rows = len(utility)
    return {
        "cas": np.zeros(rows),
        "ifd_status": np.full(rows, "ok"),
        "lead_utility": np.array(utility, dtype=float),
        "lead_group": np.array(group),
        "lead_times": np.zeros(rows, dtype=int) if times is None else np.array(times),
    }


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(-1, 2), st.integers(0, 3)), min_size=1, max_size=30),
    st.integers(1, 40),
    st.integers(0, 10**6),
)
def test_the_groups_are_emptied_in_the_order_in_which_they_are_drawn(rows, budget, seed):
    utility, group, times = (np.array(part) for part in zip(*rows, strict=True))
    policy = Lead(groups=3, most=2, chances=(0.2, 0.5, 0.3))
    able = np.flatnonzero(group >= 0)
    if not len(able):
        with pytest.raises(ShortfallError, match="has a loss"):
            policy(columns_of(utility, group, times), budget)
        return
    found = policy(columns_of(utility, group, times), budget, rng=np.random.default_rng(seed))
    drawn = np.random.default_rng(seed).choice(3, 3, replace=False, p=(0.2, 0.5, 0.3)).tolist()
    # Written out: group by group, the highest first; then those that had two turns, the fewest turns first.
    order = []
    for turns in (0, 2, 3):
        for number in drawn:
            of = [row for row in able if group[row] == number and (times[row] if times[row] >= 2 else 0) == turns]
            order += sorted(of, key=lambda row: (-utility[row], row))
    first = order[:budget]
    assert found.kept[: len(first)].tolist() == first
    assert len(found.kept) == budget
    assert found.shortfall == max(budget - len(able), 0)
    assert (found.reasons[first] == "kept").all()
    left = [row for row in able if row not in first]
    reached = {group[row] for row in first}
    for row in left:
        expected = "trained_enough" if times[row] >= 2 else "below_cut" if group[row] in reached else "other_group"
        assert found.reasons[row] == expected
    assert (found.reasons[group < 0] == "nonfinite").all()


def test_a_group_is_first_as_often_as_its_chance_says():
    policy = Lead(groups=3, chances=(0.1, 0.6, 0.3))
    columns = columns_of([1.0, 1.0, 1.0], [0, 1, 2])
    firsts = [policy(columns, 1, rng=np.random.default_rng(seed)).kept[0] for seed in range(2000)]
    assert np.bincount(firsts) / 2000 == pytest.approx([0.1, 0.6, 0.3], abs=0.035)  # three standard errors


def test_losses_are_carried_on_to_the_end_of_the_epoch():
    utility = np.array([2.0, 4.0, 3.0, NAN])
    losses = np.array([1.5, 3.7, NAN, 1.0])  # 0.5 and 0.3 lower, halfway through: 0.4 more to come
    assert learned(utility, losses, 0.0)[:3] == pytest.approx([1.1, 3.3, 3.0])
    assert learned(utility, losses, 0.25)[:3] == pytest.approx([0.75 * 1.1 + 0.5, 0.75 * 3.3 + 1.0, 3.0])
    assert np.isnan(learned(utility, losses, 0.25)[3])
    nothing = np.full(4, NAN)
    np.testing.assert_array_equal(learned(utility, nothing, 0.25), utility)


def test_a_group_that_gains_is_drawn_more_often():
    weights = np.ones(4)
    for _ in range(200):
        of = chances(weights, 0.2)
        assert of.sum() == pytest.approx(1)
        assert of.min() >= 0.05 - 1e-12
        weights = rewarded(weights, of, np.array([-1.0, 1.0, NAN, 0.0]), 0.2)
    assert np.isfinite(weights).all()
    assert chances(weights, 0.2).argmax() == 1
    assert chances(weights, 0.2)[1] > 0.8
    # EXP3 by hand: w exp(e r / (K p)), up to a factor.
    grown = rewarded(np.array([1.0, 2.0]), np.array([0.4, 0.6]), np.array([1.0, -0.5]), 0.3)
    assert grown[1] / grown[0] == pytest.approx(2 * math.exp(0.3 * -0.5 / (2 * 0.6)) / math.exp(0.3 / (2 * 0.4)))


def test_groups_are_of_equal_size_by_ifd_or_the_values_of_a_column():
    ifd = np.array([0.9, 0.1, NAN, 0.5, 0.3, 0.7])
    names, codes = Lead(groups=2).divided(ifd)
    assert (names, codes.tolist()) == (["1", "2"], [1, 0, -1, 0, 0, 1])
    assert Lead(groups=9).divided(ifd)[1].tolist() == [4, 0, -1, 2, 1, 3]  # no more groups than rows
    names, codes = Lead("source").divided(ifd, np.array(["b", "a", "b", "a", "c", "b"]))
    assert [names[code] if code >= 0 else None for code in codes] == ["b", "a", None, "a", "c", "b"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"groups": 1}, "groups is a whole number of at least 2, got 1"),
        ({"most": 0}, "most is a whole number of at least 1, got 0"),
        ({"explore": 0}, "explore is a share above 0 and at most 1, got 0"),
        ({"smoothing": 1}, "smoothing is a share from 0 to below 1, got 1"),
        ({"by": ""}, "by is the name of a column, or None"),
    ],
)
def test_what_is_no_option_is_refused(options, words):
    with pytest.raises(UserError, match=words):
        Lead(**options)
