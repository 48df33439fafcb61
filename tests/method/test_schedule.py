"""Budgets, what each epoch does (tiers, warm-up, freezing), and plans of steps against a simulation of the run."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ifd_trainer.method.brief_experience import Brief
from ifd_trainer.method.schedule import (
    Anneal,
    Constant,
    Curriculum,
    EpochPlan,
    PerEpoch,
    Timing,
    TrainingPlan,
    as_schedule,
    plan_epoch,
    plan_training,
)

updates_of_epochs = st.lists(st.integers(1, 12), min_size=1, max_size=6)


def plans(updates: list[int]):
    """The plan of an epoch; the last entry stands for all epochs after it."""
    return lambda epoch: EpochPlan(epoch, budget=2 * (n := updates[min(epoch, len(updates) - 1)]), batches=n, updates=n)


# ---- budgets ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "pool", "rows"),
    [(0.1, 52002, 5200), (0.05, 100, 5), (1.0, 7, 7), (0.5, 3, 2), (0.001, 10, 1), (1, 10, 1), (10, 10, 10)],
)
def test_a_fraction_or_a_count_of_the_pool(keep, pool, rows):
    assert [Constant(keep).budget(epoch, pool) for epoch in (0, 5)] == [rows, rows]


@given(keep=st.floats(min_value=1e-9, max_value=1.0), pool=st.integers(1, 10**6))
def test_a_fraction_is_at_least_one_row_and_at_most_the_pool(keep, pool):
    assert 1 <= Constant(keep).budget(0, pool) <= pool


def test_one_budget_for_each_epoch_and_the_last_for_all_that_follow():
    schedule = PerEpoch((1.0, 0.5, 10))
    assert [schedule.budget(epoch, pool=40) for epoch in range(5)] == [40, 20, 10, 10, 10]


@pytest.mark.parametrize("keep", [0, -1, 0.0, -0.5, 1.5, float("nan"), True, False, "0.1", None])
@pytest.mark.parametrize(
    "build", [Constant, lambda keep: PerEpoch((0.5, keep)), as_schedule], ids=["one", "list", "as"]
)
def test_what_is_neither_a_fraction_nor_a_count(build, keep):
    with pytest.raises(ValueError, match=rf"keep must be a fraction in \(0, 1\].*got {keep!r}"):
        build(keep)


def test_a_count_larger_than_the_pool():
    with pytest.raises(ValueError, match="keep=11 rows were asked for, but the pool has only 10"):
        Constant(11).budget(0, 10)


@pytest.mark.parametrize("build", [lambda: PerEpoch(()), lambda: as_schedule([])])
def test_an_empty_list(build):
    with pytest.raises(ValueError, match="empty list"):
        build()


def test_as_schedule():
    assert as_schedule(0.1) == Constant(0.1)
    assert as_schedule(3) == Constant(3)
    assert as_schedule([1.0, 5]) == as_schedule((1.0, 5)) == PerEpoch((1.0, 5))
    schedule = PerEpoch((0.5,))
    assert as_schedule(schedule) is schedule


def test_as_schedule_takes_a_schedule_of_ones_own():
    class Halving:
        def budget(self, epoch: int, pool: int) -> int:
            return max(pool >> epoch, 1)

    assert [as_schedule(Halving()).budget(epoch, 8) for epoch in range(3)] == [8, 4, 2]


# ---- what each epoch does ----------------------------------------------------------------------------------------


def trained_ranks(curriculum, epoch, pool):
    """Ranks (0 is the highest score) that an epoch of a curriculum trains on."""
    tiers = curriculum.divide(epoch, pool)
    numbers = [number for number, rows, _ in tiers for _ in range(rows)]
    trained = {tier.number for tier in tiers if tier.trained}
    ranks = [rank for rank, number in enumerate(numbers) if number in trained]
    assert ranks == list(range(ranks[0], ranks[-1] + 1))  # tiers that are trained together are neighbours
    assert len(ranks) == curriculum.budget(epoch, pool)
    return range(ranks[0], ranks[-1] + 1)


@given(
    tiers=st.integers(1, 9),
    more=st.integers(0, 490),
    left_out=st.integers(0, 490),
    direction=st.sampled_from(["easy_to_hard", "hard_to_easy"]),
    epochs_per_tier=st.integers(1, 3),
)
def test_tiers_partition_the_kept_ranks_and_differ_by_one_row_at_most(
    tiers, more, left_out, direction, epochs_per_tier
):
    keep = tiers + more
    pool = keep + left_out
    curriculum = Curriculum(keep, tiers, direction, "tiers", epochs_per_tier)
    stages = [curriculum.divide(stage * epochs_per_tier, pool) for stage in range(tiers)]
    ranks = [trained_ranks(curriculum, stage * epochs_per_tier, pool) for stage in range(tiers)]
    assert [[tier.number for tier in stage if tier.trained] for stage in stages] == [[s] for s in range(tiers)]
    assert sorted(rank for part in ranks for rank in part) == list(range(keep))
    assert max(map(len, ranks)) - min(map(len, ranks)) <= 1
    assert (ranks[0].start <= ranks[-1].start) is (direction == "hard_to_easy" or tiers == 1)
    assert {sum(tier.rows for tier in stage) for stage in stages} == {keep}
    for mode, expected in (("growing", ranks[: tiers // 2 + 1]), ("shrinking", ranks[tiers // 2 :])):
        other = Curriculum(keep, tiers, direction, mode, epochs_per_tier)
        trained = trained_ranks(other, tiers // 2 * epochs_per_tier, pool)
        assert sorted(rank for part in expected for rank in part) == list(trained)


def test_the_last_tier_takes_all_epochs_that_remain():
    curriculum = Curriculum(keep=9, tiers=3, direction="hard_to_easy", epochs_per_tier=2)
    assert [trained_ranks(curriculum, epoch, 20)[0] for epoch in range(8)] == [0, 0, 3, 3, 6, 6, 6, 6]


@pytest.mark.parametrize(("share", "epochs", "first"), [(0.2, 3, 2), (0.5, 4, 2), (1.0, 3, 0), (0.01, 10, 9)])
def test_annealing_takes_the_last_share_of_the_epochs(share, epochs, first):
    rows = [Timing().rows_of(epoch, Anneal(0.25, share), 100, epochs) for epoch in range(epochs)]
    assert [of_epoch.source for of_epoch in rows] == ["selected"] * first + ["all"] * (epochs - first)
    assert [of_epoch.budget for of_epoch in rows] == [25] * first + [100] * (epochs - first)


def test_after_a_brief_experience_annealing_counts_the_epochs_of_the_training_proper():
    brief = Brief(clusters=1, per_cluster=2)
    timing = Timing(warmup_epochs=2, warmup=brief, start_anew=True)
    rows = [timing.rows_of(epoch, Anneal(0.25, 0.4), 100, epochs=5) for epoch in range(7)]
    assert [epoch.source for epoch in rows] == ["brief"] * 2 + ["selected"] * 3 + ["all"] * 2


def test_annealing_needs_a_number_of_epochs():
    with pytest.raises(ValueError, match="set num_train_epochs, not max_steps"):
        Timing().rows_of(0, Anneal(0.5), 100, None)


def test_every_warmup_and_freeze_together():
    timing, schedule = Timing(every=2, warmup_epochs=1, freeze_after=4), PerEpoch((10, 20, 30, 40, 50, 60, 70))
    rows = [timing.rows_of(epoch, schedule, 100, 7) for epoch in range(7)]
    assert [epoch.source for epoch in rows] == ["all", "selected", "same", "selected", "same", "selected", "same"]
    assert [epoch.scored for epoch in rows] == [False, True, False, True, False, False, False]
    assert [epoch.budget for epoch in rows] == [100, 20, 20, 40, 40, 60, 60]
    assert [epoch.selected_in for epoch in rows[1:]] == [1, 1, 3, 3, 5, 5]


def test_the_first_epoch_that_selects_scores_even_if_frozen_from_the_start():
    timing = Timing(freeze_after=0, warmup_epochs=1)
    assert [timing.rows_of(epoch, Constant(0.5), 10, 3).scored for epoch in range(3)] == [False, True, False]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Timing(every=0), "every counts epochs: a whole number of at least 1, got 0"),
        (
            lambda: Timing(warmup_epochs=-1),
            "warmup_epochs counts epochs: a whole number of at least 0, got -1",
        ),
        (lambda: Timing(every=1.5), "every counts epochs: .* got 1.5"),
        (lambda: Timing(every=True), "every counts epochs: .* got True"),
        (lambda: Timing(freeze_after=0.5), "freeze_after counts epochs: .* got 0.5"),
        (lambda: Curriculum(tiers=0), "at least 1"),
        (lambda: Curriculum(direction="up"), "easy_to_hard"),
        (lambda: Curriculum(mode="all"), "growing"),
        (lambda: Curriculum(keep=2, tiers=3).budget(0, 100), "cannot be divided into 3 tiers"),
        (lambda: Anneal(0.5, share=0.0), r"share must be in \(0, 1\]"),
    ],
)
def test_what_cannot_be_is_an_error(make, words):
    with pytest.raises(ValueError, match=words):
        make()


# ---- plans ------------------------------------------------------------------------------------------------------


@given(batches=st.integers(0, 100), accumulation=st.integers(1, 9))
def test_updates_of_an_epoch(batches, accumulation):
    updates = waiting = 0
    for _ in range(batches):
        waiting += 1
        if waiting == accumulation:
            updates, waiting = updates + 1, 0
    updates += waiting > 0  # the last update gathers what is left
    plan = plan_epoch(3, budget=50, batches=batches, accumulation=accumulation)
    assert plan == EpochPlan(3, 50, batches, max(updates, 1))


@given(updates=updates_of_epochs, tenths=st.integers(1, 60))
@example(updates=[10], tenths=21)
@example(updates=[10], tenths=11)
@example(updates=[3, 5], tenths=18)
def test_plan_for_a_number_of_epochs(updates, tenths):
    plan = plan_training(plans(updates), tenths / 10)
    # Step by step: after update i of n in epoch e, the run is at epoch e + i/n, and ends once that is reached.
    steps, epoch = 0, 0
    wanted = Fraction(tenths, 10)
    while epoch < wanted:
        n = plans(updates)(epoch).updates
        for i in range(1, n + 1):
            steps += 1
            if epoch + Fraction(i, n) >= wanted:
                break
        epoch += 1
    assert plan.max_steps == steps
    assert [p.epoch for p in plan.epochs] == list(range(math.ceil(wanted)))
    assert plan.rows == sum(plans(updates)(e).budget for e in range(math.ceil(wanted)))


@given(updates=updates_of_epochs, max_steps=st.integers(1, 60), epochs=st.integers(1, 9))
def test_plan_for_a_number_of_steps(updates, max_steps, epochs):
    plan = plan_training(plans(updates), epochs, max_steps)
    taken, epoch = 0, -1
    while taken < max_steps:
        epoch += 1
        for _ in range(plans(updates)(epoch).updates):
            taken += 1
            if taken == max_steps:
                break
    assert plan.max_steps == max_steps
    assert [p.epoch for p in plan.epochs] == list(range(epoch + 1))


@pytest.mark.parametrize("max_steps", [-1, 0])
def test_epochs_count_where_max_steps_is_not_positive(max_steps):
    assert plan_training(plans([4]), 2, max_steps).max_steps == 8


@given(updates=updates_of_epochs)
def test_position_after_each_step(updates):
    plan = plan_training(plans(updates), len(updates))
    expected = [(epoch, i) for epoch, n in enumerate(updates) for i in range(n)] + [(len(updates), 0)]
    assert [plan.position(step) for step in range(plan.max_steps + 1)] == expected


def test_a_plan_reads_as_a_sentence():
    plan = TrainingPlan((EpochPlan(0, 10, 5, 5), EpochPlan(1, 4, 2, 2)), 7)
    assert str(plan) == "7 updates (epoch 0: 10 rows, 5 updates; epoch 1: 4 rows, 2 updates)"
    assert plan.rows == 14
