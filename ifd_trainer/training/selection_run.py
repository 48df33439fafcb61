"""What a trainer and its selection callback share about a run, and the sampler that yields the rows of its epochs.

The order of an epoch lives here, in the main process: data loader workers, persistent or not, only see indices. What a
sampler has drawn is kept and held against it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Sampler
from transformers.trainer_utils import has_length

from ..data.chat_template import common_prefix_length
from ..errors import RunError
from ..method.number_words import many
from ..method.parts import Part
from ..method.schedule import TrainingPlan
from .pool import Pool, TrainingRow
from .row_weights import RowLosses


@dataclass
class SelectionRun:
    """What a trainer and its selection callback share about a run; the trainer writes, both read.

    Attributes:
        folder: where the run's output goes: `output_dir`, or in a hyperparameter search the trial's folder in it.
        plan: the steps of all epochs.
        order: the training rows of the epoch that runs, in the order in which they are trained on; of an epoch in
            parts, those up to the end of the part that runs.
        parts: of the epoch that runs; one, if it is not divided.
        part: which of them runs, counted from 0.
        strategy: how the trainer orders rows by itself, see `trainer_checks.sampling_strategy`.
        sampler: the one whose rows the epoch that runs is trained on; of several, that of the loop's own loader.
        epoch: the epoch that runs.
        first_step: the number of updates before its first one.
        batch: rows of a batch of all processes together.
        accumulation: batches of an update.
        starts_anew: whether the epoch that runs begins with the original weights, and a random state of its own.
        coming: rows of the epoch that is about to begin, where the loop asks for its length before they are selected.
        called: whether `train` has just been called: auto_find_batch_size begins a run again, with the weights as they
            then are.
        losses: what rows weigh in the loss, and what their losses were in training.
    """

    folder: Path = Path()
    plan: TrainingPlan | None = None
    order: list[TrainingRow] = field(default_factory=list, repr=False)
    parts: tuple[Part, ...] = ()
    part: int = 0
    strategy: str = "random"
    sampler: SelectionSampler | None = None
    epoch: int = 0
    first_step: int = 0
    batch: int = 1
    accumulation: int = 1
    starts_anew: bool = False
    coming: int | None = None
    called: bool = False
    losses: RowLosses = field(default_factory=RowLosses, repr=False)
    _selected: list[TrainingRow] = field(default_factory=list, repr=False)
    _samplers: weakref.WeakSet[SelectionSampler] = field(default_factory=weakref.WeakSet, repr=False)

    def select(self, order: list[TrainingRow], weights: np.ndarray | None = None) -> None:
        """The rows of the epoch that begins, in their order; kept twice, since others can reach `order`.

        When another part of an epoch begins, the rows of the parts before stand before its own.

        `weights`, (n,), are what pool rows weigh in the loss, those of the part; None where all weigh 1.
        """
        self.order, self._selected, self.coming = order, list(order), None
        self.losses.weights = weights

    def begin(self, parts: tuple[Part, ...], part: int = 0) -> None:
        """An epoch with these parts begins, or goes on in one of them."""
        self.parts, self.part = parts, part

    @property
    def this_part(self) -> Part:
        """The part that runs: the whole epoch, if it is not divided."""
        return self.parts[self.part]

    @property
    def next_part(self) -> Part | None:
        """The part after the one that runs; None at an epoch's end."""
        return self.parts[self.part + 1] if self.part + 1 < len(self.parts) else None

    def new_sampler(self, pool: Pool) -> SelectionSampler:
        """A sampler for a loader over the rows of a pool."""
        sampler = SelectionSampler(self, pool)
        self._samplers.add(sampler)
        return sampler

    def sampler_of(self, dataloader: Any) -> SelectionSampler | None:
        """The sampler in a loader, however it is wrapped: the one whose length is the loader's; None without one."""
        if not has_length(dataloader):
            return None
        return next((s for s in self._samplers if s.batches(dataloader, 0) == 0 < s.batches(dataloader, 2**30)), None)

    def trained(self, step: int) -> list[TrainingRow]:
        """The rows of this epoch that were drawn and trained on when `step` updates were done in all.

        The last batch of an epoch that `dataloader_drop_last` drops, and what comes after the end of a run by
        `max_steps`, is not among them.

        Raises:
            RunError: when the loader drew other rows than the ones that were selected.
        """
        batches = min((step - self.first_step) * self.accumulation, self.plan.epochs[self.epoch].batches)
        drawn, trained = self.sampler.drawn, min(batches * self.batch, len(self._selected))
        if drawn != self._selected[: len(drawn)] or len(drawn) < trained:
            raise RunError(
                f"In epoch {self.epoch} the train data loader drew {many(len(drawn), 'row')}, and "
                f"{many(trained, 'was', 'were')} trained on, but they are not the {len(self._selected)} selected ones: "
                f"they part after "
                f"{common_prefix_length(drawn, self._selected)}. Something else changed the rows of the loader or its "
                "sampler while training ran; with a selection callback they have to stay."
            )
        return drawn[:trained]


class SelectionSampler(Sampler[TrainingRow]):
    """Yields the rows of the epoch that runs, and keeps what it has yielded. Not a RandomSampler: accelerate replaces
    those.

    Attributes:
        pool: what its loader's rows are.
        drawn: what it has yielded in its first pass since `watch` was called, the loop's own, behind the rows of the
            epoch's parts before.
    """

    def __init__(self, run: SelectionRun, pool: Pool) -> None:
        self.run, self.pool = run, pool
        self.drawn: list[TrainingRow] = []
        self._watching = False
        self._planned: int | None = None

    @property
    def order(self) -> list[TrainingRow]:
        """The rows of the epoch that runs, as in all samplers of this run."""
        return self.run.order

    @order.setter
    def order(self, rows: list[TrainingRow]) -> None:
        self.run.order = rows

    def watch(self) -> None:
        """The next pass is the loop's, over the part that runs; those that others make beside it are not kept."""
        self.drawn, self._watching = self.order[: self.run.this_part.first_row], True

    def __iter__(self) -> Iterator[TrainingRow]:
        drawn, self._watching = self.drawn if self._watching else [], False
        return self._draw(self.order[len(drawn) :], drawn)  # a copy: workers go on while the next epoch is selected

    @staticmethod
    def _draw(order: list[TrainingRow], drawn: list[TrainingRow]) -> Iterator[TrainingRow]:
        for row in order:
            drawn.append(row)
            yield row

    def __len__(self) -> int:
        divided = self.run.parts[-1] if len(self.run.parts) > 1 else None
        told = (self._planned, self.run.coming, divided and divided.first_row + divided.rows)
        return next((rows for rows in told if rows is not None), len(self.order))

    def batches(self, dataloader: Any, rows: int) -> int:
        """Batches that this process runs for so many rows, asked of the prepared loader itself."""
        self._planned = rows
        try:
            return len(dataloader)
        finally:
            self._planned = None
