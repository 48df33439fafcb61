"""Parts of an epoch: so many updates each, whose rows are chosen when the part begins and not when the epoch does.

An epoch of B training rows in batches of b (of all processes together), a of them an update, has U updates. With
`every_steps` = s it is divided into ceil(U / s) parts; all but the last have s updates on s * a * b rows, the last has
the rest. Every part but the last is so of whole batches and whole updates, and the sizes add up to those of the epoch:
number of steps, learning rate schedule and budget are as without parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from .schedule import EpochPlan

_Row = TypeVar("_Row")


@dataclass(frozen=True)
class Part:
    """One part of an epoch, in training rows, batches of a process and updates, each with how many come before it.

    Attributes:
        number: 1 for the first one.
        of: how many parts its epoch has; 1 for an epoch that is not divided.
    """

    number: int
    of: int
    first_row: int
    rows: int
    first_batch: int
    batches: int
    first_update: int
    updates: int

    @property
    def end(self) -> int:
        """Updates of the epoch that are done when the part is."""
        return self.first_update + self.updates


def divide(plan: EpochPlan, every_steps: int | None = None, accumulation: int = 1, batch: int = 1) -> tuple[Part, ...]:
    """The parts of an epoch, in their order; one where its updates are no more than `every_steps`, or that is None.

    Args:
        accumulation: batches of an update.
        batch: training rows of a batch of all processes together.

    >>> [(part.rows, part.updates) for part in divide(EpochPlan(0, 25, 13, 7), 3, accumulation=2, batch=2)]
    [(12, 3), (12, 3), (1, 1)]
    """
    size = plan.updates if every_steps is None else min(every_steps, plan.updates)
    count = -(-plan.updates // size)
    parts = []
    for number in range(count):
        update = number * size
        first_batch = update * accumulation
        first_row = first_batch * batch
        last = number == count - 1
        parts.append(
            Part(
                number + 1,
                count,
                first_row,
                plan.budget - first_row if last else size * accumulation * batch,
                first_batch,
                plan.batches - first_batch if last else size * accumulation,
                update,
                plan.updates - update if last else size,
            )
        )
    return tuple(parts)


def scored_rows(parts: Sequence[Part], pool: int) -> int:
    """Training rows that the scorings of all parts of an epoch read: each reads the rows that are left of the pool.

    >>> scored_rows(divide(EpochPlan(0, 20, 10, 10), 5, batch=2), pool=100)
    190
    """
    return sum(pool - part.first_row for part in parts)


def repeated(trained: Sequence[_Row], missing: int, rng: np.random.Generator) -> list[_Row]:
    """`missing` of the rows that an epoch has trained on, for one more time: those trained on least often come first.

    Args:
        trained: in the order of training; a row that was repeated already is there more than once.
        rng: chooses among rows that were trained on equally often.

    >>> repeated([7, 8, 9, 8], 2, np.random.default_rng(0))
    [7, 9]
    """
    rows = list(dict.fromkeys(trained))
    places = {row: place for place, row in enumerate(rows)}
    times = np.bincount([places[row] for row in trained], minlength=len(rows))
    chosen: list[_Row] = []
    while len(chosen) < missing:
        least = np.flatnonzero(times == times.min())
        least = least[np.sort(rng.permutation(len(least))[: missing - len(chosen)])]
        times[least] += 1
        chosen += [rows[place] for place in least.tolist()]
    return chosen
