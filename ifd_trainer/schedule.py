"""Epoch to budget, and the plan of steps.

Budgets are known before training: a Trainer fixes its number of steps, its learning rate schedule and its progress
bar before the first epoch, so an epoch cannot be found shorter later on without ending the schedule early.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol


class Schedule(Protocol):
    """Anything that says how many rows of a pool an epoch trains on."""

    def budget(self, epoch: int, pool: int) -> int: ...


@dataclass(frozen=True)
class Constant:
    """The same budget in every epoch: a float is a fraction of the pool, an int a number of rows.

    >>> Constant(0.1).budget(epoch=3, pool=52002)
    5200
    """

    keep: float | int

    def __post_init__(self) -> None:
        _check(self.keep)

    def budget(self, epoch: int, pool: int) -> int:
        return _rows(self.keep, pool)


@dataclass(frozen=True)
class PerEpoch:
    """One budget for each epoch; the last one stands for all epochs after it.

    >>> [PerEpoch((1.0, 0.5, 10)).budget(epoch, pool=100) for epoch in range(4)]
    [100, 50, 10, 10]
    """

    keep: tuple[float | int, ...]

    def __post_init__(self) -> None:
        if not self.keep:
            raise ValueError("keep is an empty list; give one entry per epoch, e.g. keep=[1.0, 0.5, 0.1].")
        for entry in self.keep:
            _check(entry)

    def budget(self, epoch: int, pool: int) -> int:
        return _rows(self.keep[min(epoch, len(self.keep) - 1)], pool)


def as_schedule(keep: float | int | Sequence[float | int] | Schedule) -> Schedule:
    """The schedule for a fraction, a count, a list with one entry per epoch, or a schedule."""
    if hasattr(keep, "budget"):
        return keep
    return PerEpoch(tuple(keep)) if isinstance(keep, (list, tuple)) else Constant(keep)


@dataclass(frozen=True)
class EpochPlan:
    """One epoch: rows to train on, batches per process, optimizer updates."""

    epoch: int
    budget: int
    batches: int
    updates: int


@dataclass(frozen=True)
class TrainingPlan:
    """All epochs of a run, and the number of optimizer updates in total (the last epoch may be cut short)."""

    epochs: tuple[EpochPlan, ...]
    max_steps: int

    @property
    def rows(self) -> int:
        """Rows that the planned epochs train on, repeats counted."""
        return sum(epoch.budget for epoch in self.epochs)

    def position(self, step: int) -> tuple[int, int]:
        """(epoch, updates done in it) after `step` updates; a finished epoch counts as the next one at 0."""
        for plan in self.epochs:
            if step < plan.updates:
                return plan.epoch, step
            step -= plan.updates
        return len(self.epochs), step

    def __str__(self) -> str:
        epochs = "; ".join(f"epoch {p.epoch}: {p.budget} rows, {p.updates} updates" for p in self.epochs)
        return f"{self.max_steps} updates ({epochs})"


def plan_epoch(epoch: int, budget: int, batches: int, accumulation: int) -> EpochPlan:
    """The plan of one epoch; the last update may gather fewer than `accumulation` batches."""
    return EpochPlan(epoch, budget, batches, max(math.ceil(batches / accumulation), 1))


def plan_training(of_epoch: Callable[[int], EpochPlan], num_train_epochs: float, max_steps: int = -1) -> TrainingPlan:
    """The plan of a run.

    Args:
        of_epoch: the plan of the given epoch.
        num_train_epochs: epochs, may be fractional; used when max_steps is not positive.
        max_steps: total updates, as in `TrainingArguments`; the run takes as many epochs as that needs.
    """
    if max_steps > 0:
        epochs, total = [], 0
        while total < max_steps:
            epochs.append(of_epoch(len(epochs)))
            total += epochs[-1].updates
        return TrainingPlan(tuple(epochs), max_steps)
    epochs = [of_epoch(epoch) for epoch in range(math.ceil(num_train_epochs))]
    whole = int(num_train_epochs)
    total = sum(plan.updates for plan in epochs[:whole])
    if len(epochs) > whole:
        # 2.1 - 2 is a little more than 0.1: without rounding, a tenth of ten updates would be two.
        total += math.ceil(round((num_train_epochs - whole) * epochs[whole].updates, 6))
    return TrainingPlan(tuple(epochs), total)


def _check(keep: float | int) -> None:
    ok = (isinstance(keep, int) and keep >= 1) or (isinstance(keep, float) and 0 < keep <= 1)
    if not ok or isinstance(keep, bool):
        raise ValueError(
            f"keep must be a fraction in (0, 1] given as a float, or a number of rows given as an int, got {keep!r}."
        )


def _rows(keep: float | int, pool: int) -> int:
    """Rows for `keep` of a pool: the denominator of a fraction is the whole pool, scorable or not."""
    if isinstance(keep, int):
        if keep > pool:
            raise ValueError(f"keep={keep} rows were asked for, but the pool has only {pool}.")
        return keep
    return max(1, round(keep * pool))
