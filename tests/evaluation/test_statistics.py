"""Differences of arms: hand-worked numbers, an independent bootstrap, and how often they say what is not so."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from ifd_trainer.errors import UserError
from ifd_trainer.evaluation.statistics import ALPHA, difference


def drawn(rng, seeds, rows, of_seeds, of_rows, of_both, effect=0.0):
    """Losses of two arms with the variances given, of seeds, of rows and of both, and a difference."""
    base = rng.normal(2.5, 0.8, (1, rows)) + rng.normal(0, 0.1, (seeds, 1))
    delta = rng.normal(0, of_seeds, (seeds, 1)) + rng.normal(0, of_rows, (1, rows))
    return base + effect + delta + rng.normal(0, of_both, (seeds, rows)), np.repeat(base, 1, axis=0)


def test_by_hand():
    # d = [[1, 3], [2, 4]]: D = 2 and 3, r = 1.5 and 3.5, theta = 2.5. var(D)/2 = 0.5/2 = 0.25; the rows' residuals are
    # -1 and 1, halved by their weights: 2 * (0.25 + 0.25) = 1. V = 1.25; Satterthwaite: 1.5625 / (0.0625 + 1), with
    # S - 1 = 1 the harmonic mean of 1.470588 and 1.
    found = difference(np.array([[1.0, 3.0], [2.0, 4.0]]), np.zeros((2, 2)))
    assert found.mean == 2.5
    assert (found.of_seeds, found.of_rows) == (0.25, 1.0)
    freedom = 2 / (1 / (1.5625 / 1.0625) + 1)
    half = stats.t.ppf(0.975, freedom) * np.sqrt(1.25)
    assert (found.low, found.high) == pytest.approx((2.5 - half, 2.5 + half))
    assert found.p == pytest.approx(2 * stats.t.sf(2.5 / np.sqrt(1.25), freedom))
    assert found.smallest == pytest.approx(half + stats.t.ppf(0.8, freedom) * np.sqrt(1.25))
    assert not found.shown


def test_weights_are_as_rows_that_stand_there_so_often():
    one, other = drawn(np.random.default_rng(0), 3, 12, 0.02, 0.1, 0.05)
    weights = np.random.default_rng(1).integers(1, 4, 12)
    weighed = difference(one, other, weights)
    assert weighed.mean == pytest.approx(difference(*(np.repeat(a, weights, axis=1) for a in (one, other))).mean)


def test_rows_of_groups_count_as_their_groups():
    """Copies of each row in its group say nothing more than the row alone."""
    one, other = drawn(np.random.default_rng(0), 3, 10, 0.02, 0.1, 0.05)
    alone = difference(one, other)
    groups = np.repeat(np.arange(10), 4)
    copied = difference(np.repeat(one, 4, axis=1), np.repeat(other, 4, axis=1), groups=groups)
    assert (copied.low, copied.high) == pytest.approx((alone.low, alone.high))
    assert (copied.boot_low, copied.boot_high) == pytest.approx((alone.boot_low, alone.boot_high))
    assert copied.rows == 40
    careless = difference(np.repeat(one, 4, axis=1), np.repeat(other, 4, axis=1))
    assert careless.high - careless.low < copied.high - copied.low


def test_the_bootstrap_agrees_with_one_written_out():
    rng = np.random.default_rng(0)
    one, other = drawn(rng, 8, 60, 0.02, 0.2, 0.05, effect=0.03)
    delta, values = one - other, []
    for _ in range(4000):
        seeds, rows = rng.integers(0, 8, 8), rng.integers(0, 60, 60)
        values.append(delta[np.ix_(seeds, rows)].mean())
    found = difference(one, other)
    low, high = np.percentile(values, [2.5, 97.5])  # BCa is near the percentiles where all is symmetric
    assert (found.boot_low, found.boot_high) == pytest.approx((low, high), abs=0.1 * (high - low))


@pytest.mark.parametrize(
    ("of_seeds", "of_rows", "of_both"), [(0.02, 0.0, 0.03), (0.02, 0.1, 0.05), (0.0, 0.1, 0.03), (0.0, 0.0, 0.1)]
)
@pytest.mark.parametrize("arms", [1, 4])
def test_like_arms_differ_in_at_most_the_stated_share(of_seeds, of_rows, of_both, arms):
    rng, trials = np.random.default_rng(7), 60
    shown = [difference(*drawn(rng, 3, 40, of_seeds, of_rows, of_both), arms=arms).shown for _ in range(trials)]
    assert sum(shown) <= stats.binom.ppf(0.999, trials, ALPHA / arms)


def test_a_difference_of_the_size_that_could_be_shown_mostly_is():
    rng, shown = np.random.default_rng(3), []
    for _ in range(60):
        found = difference(*drawn(rng, 5, 40, 0.02, 0.05, 0.03))
        shown.append(difference(*drawn(rng, 5, 40, 0.02, 0.05, 0.03, effect=found.smallest)).shown)
    assert sum(shown) > 0.65 * len(shown)


def test_what_it_would_take_is_enough():
    one, other = drawn(np.random.default_rng(5), 3, 40, 0.03, 0.01, 0.02, effect=0.02)
    found = difference(one, other)
    assert not found.shown
    assert found.seeds_needed > 3
    rng, shown = np.random.default_rng(6), []
    for _ in range(40):
        seeds = (found.seeds_needed, 40, 0.03, 0.01, 0.02, found.mean)
        shown.append(difference(*drawn(rng, *seeds)).shown)
    assert sum(shown) > 0.6 * len(shown)
    assert found.rows_needed is None  # no number of rows makes up for seeds that differ so much


def test_equal_arms_show_nothing_and_a_constant_difference_is_one():
    same = np.random.default_rng(0).normal(size=(3, 5))
    assert not difference(same, same).shown
    found = difference(same - 0.25, same)
    assert found.shown
    assert found.mean == pytest.approx(-0.25)


@pytest.mark.parametrize(
    ("one", "message"),
    [
        (np.zeros((1, 4)), "at least 2 seeds and 2 rows to vary over, got 1 and 4"),
        (np.zeros((3, 1)), "got 3 and 1"),
        (np.full((2, 3), np.nan), "finite losses"),
    ],
)
def test_what_says_nothing_is_refused(one, message):
    with pytest.raises(UserError, match=message):
        difference(one, np.zeros_like(one))


def test_one_group_is_refused():
    with pytest.raises(UserError, match="All rows belong to one group"):
        difference(np.arange(6.0).reshape(2, 3), np.zeros((2, 3)), groups=np.zeros(3))
