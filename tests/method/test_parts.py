"""Parts of an epoch against a simulation of the loop, and what a `Timing` with them refuses."""

from __future__ import annotations

from collections import Counter
from itertools import chain

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ifd_trainer.method.brief_experience import Brief
from ifd_trainer.method.parts import divide, repeated, scored_rows
from ifd_trainer.method.schedule import Anneal, Constant, EpochPlan, Timing, TrainingPlan, plan_epoch


def simulated(budget: int, batch: int, accumulation: int, drop_last: bool) -> list[list[int]]:
    """The rows of each update of an epoch: batches of `batch` rows in their order, `accumulation` of them an update."""
    batches = [list(range(first, min(first + batch, budget))) for first in range(0, budget, batch)]
    if drop_last and len(batches[-1]) < batch:
        del batches[-1]
    return [list(chain(*batches[first : first + accumulation])) for first in range(0, len(batches), accumulation)]


@given(
    budget=st.integers(1, 200),
    batch=st.integers(1, 7),
    accumulation=st.integers(1, 5),
    every=st.integers(1, 40),
    drop_last=st.booleans(),
)
@example(budget=12, batch=2, accumulation=1, every=3, drop_last=False)  # parts of equal size
@example(budget=13, batch=2, accumulation=1, every=6, drop_last=False)  # a last part of one row
@example(budget=13, batch=2, accumulation=1, every=6, drop_last=True)  # whose only batch is dropped: no part
@example(budget=12, batch=2, accumulation=1, every=6, drop_last=False)  # as many updates as the epoch has
def test_parts_are_the_updates_of_the_epoch_so_many_at_a_time(budget, batch, accumulation, every, drop_last):
    updates = simulated(budget, batch, accumulation, drop_last)
    if not updates:
        return
    plan = plan_epoch(0, budget, (budget // batch if drop_last else -(-budget // batch)), accumulation)
    parts = divide(plan, every, accumulation, batch)
    chunks = [updates[first : first + every] for first in range(0, len(updates), every)]
    assert [part.updates for part in parts] == [len(chunk) for chunk in chunks]
    assert [part.number for part in parts] == list(range(1, len(chunks) + 1))
    assert {part.of for part in parts} == {len(chunks)}
    for part, chunk, following in zip(parts, chunks, [*parts[1:], None], strict=True):
        trained = list(chain(*chunk))
        assert trained == list(range(part.first_row, part.first_row + len(trained)))
        # A last part may have rows that drop_last drops.
        assert part.rows == (len(trained) if following is not None else budget - part.first_row)
        assert following is None or following.first_update == part.end
    assert sum(part.rows for part in parts) == budget
    assert sum(part.batches for part in parts) == plan.batches
    assert parts[-1].end == plan.updates


@given(budget=st.integers(1, 50), updates=st.integers(1, 50), more=st.integers(0, 9))
def test_an_epoch_of_no_more_updates_is_one_part(budget, updates, more):
    plan = EpochPlan(0, budget, updates, updates)
    [part] = divide(plan, updates + more)
    assert part == divide(plan)[0]
    assert (part.first_row, part.rows, part.batches, part.updates, part.of) == (0, budget, updates, updates, 1)


def test_each_part_scores_the_rows_that_are_left():
    parts = divide(EpochPlan(0, 200, 100, 100), 25, batch=2)
    assert scored_rows(parts, 1000) == 1000 + 950 + 900 + 850
    assert scored_rows(divide(EpochPlan(0, 200, 100, 100)), 1000) == 1000


@given(
    trained=st.lists(st.integers(0, 9), min_size=1, max_size=30),
    missing=st.integers(0, 40),
    seed=st.integers(0, 5),
)
def test_repeats_even_out_how_often_rows_were_trained_on(trained, missing, seed):
    again = repeated(trained, missing, np.random.default_rng(seed))
    assert again == repeated(trained, missing, np.random.default_rng(seed))
    assert len(again) == missing
    before, after = Counter(trained), Counter([*trained, *again])
    assert after.keys() == before.keys()
    # No row is repeated while another one was trained on two times less.
    raised = [row for row in after if after[row] > before[row]]
    assert all(after[row] <= min(after.values()) + 1 for row in raised)


def test_rows_that_were_trained_on_equally_often_take_turns_by_the_seed():
    draws = {tuple(repeated(range(8), 3, np.random.default_rng(seed))) for seed in range(20)}
    assert len(draws) > 5
    assert repeated([(1, 2), (3,), (3,)], 1, np.random.default_rng(0)) == [(1, 2)]  # packed rows


# ---- when an epoch is divided -----------------------------------------------------------------------------------


def steps_of(timing, epoch, schedule=None):
    return timing.part_steps(timing.rows_of(epoch, schedule or Constant(10), 100, 4))


def test_epochs_that_score_nothing_are_not_divided():
    timing = Timing(warmup_epochs=1, freeze_after=3, every_steps=5)
    assert [steps_of(timing, epoch) for epoch in range(5)] == [None, 5, 5, None, None]
    assert [steps_of(Timing(every_steps=5), epoch, Anneal(10, 0.25)) for epoch in range(4)] == [5, 5, 5, None]
    anew = Timing(1, 1, 2, Brief(), True, every_steps=5)
    assert [steps_of(anew, epoch) for epoch in range(4)] == [None, 5, None, None]
    assert steps_of(Timing(), 0) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_steps": 0}, "every_steps counts optimizer updates: a whole number of at least 1, got 0"),
        ({"every_steps": 2.5}, "every_steps counts optimizer updates"),
        ({"every_steps": True}, "every_steps counts optimizer updates"),
        ({"every_steps": 5, "every": 2}, "every=2 trains epochs on the rows of the one before"),
        ({"every_steps": 5, "freeze_after": 0}, "rows are scored once, when epoch 0 begins"),
        ({"every_steps": 5, "freeze_after": 1, "warmup_epochs": 1}, "rows are scored once, when epoch 1 begins"),
    ],
)
def test_what_contradicts_parts(options, message):
    with pytest.raises(ValueError, match=message):
        Timing(**options)


def test_the_papers_method_scores_once():
    with pytest.raises(ValueError, match="every_steps=5 scores again within an epoch, and with freeze_after=0"):
        Timing.cherry(Brief(), every_steps=5)
    assert Timing.cherry(Brief(), every_steps=5, freeze_after=2).every_steps == 5


def test_a_plan_says_how_its_epochs_are_divided():
    plan = TrainingPlan((EpochPlan(0, 1000, 500, 500), EpochPlan(1, 100, 50, 50)), 550, None, (100, 100))
    assert str(plan) == (
        "550 updates (epoch 0: 1,000 rows, 500 updates in 5 parts of 100; epoch 1: 100 rows, 50 updates)"
    )
