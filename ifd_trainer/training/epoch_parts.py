"""Epochs in parts: the rows of the next so many updates are chosen while an epoch runs (`Timing.every_steps`).

Three ways were weighed. Parts that are epochs of the loop would each have an iterator of its own, but all that is by
epoch would then have to be translated: `state.epoch`, evaluations and checkpoints at the end of epochs,
`num_train_epochs`, `on_epoch_begin` and `on_epoch_end` of other callbacks. A sampler that asks for the next part when
it has no more rows would be asked too early: accelerate fetches one batch ahead, and workers several, so that rows
would be chosen by a model that has not made its last updates. What is done here needs neither: the loop's epoch stays
one epoch, and the iterator that it takes its batches from is exchanged between two updates.

`get_batch_samples` is where the loop takes the batches of an update. Where the update is the first of a part, the rows
of the part are chosen, by the model as it is, and a new pass over the loader begins, which yields these rows alone:
whatever fetches ahead comes to the end of a part and no further. Everything else that sees the loop sees true epochs.

On a resume the loop goes past the batches of the epoch that were trained on. Here the pass begins at the part that
runs, so only those of the part are gone past. Where a checkpoint was written at the end of a part, the random state is
put back before the next part's pass begins and not after its first batches: a pass draws a seed for its workers from
that state, as it did in the run that went through.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from accelerate import skip_first_batches


class InParts:
    """Overrides of a trainer, beside those of `trainer_hooks.SelectiveTrainer`."""

    _part_loader: Any = None
    _part_batches: Iterator | None = None  # of the part that runs; None until the first of them is asked for
    _resumed_inside: str | None = None  # the checkpoint from which the epoch that runs goes on
    _random_state_is_back = False

    def begin_parts(self, loader: Any, checkpoint: str | None) -> None:
        """An epoch begins on this loader, or goes on with a checkpoint that was written inside it."""
        self._part_loader, self._part_batches, self._resumed_inside = loader, None, checkpoint
        self._random_state_is_back = False

    def end_parts(self) -> None:
        """The epoch has ended: its loader may go, and so may its workers."""
        self._part_loader = self._part_batches = None

    def get_batch_samples(self, epoch_iterator: Iterator, *args: Any, **kwargs: Any) -> Any:
        """The batches of an update, those of the next part where that begins."""
        selector = self._selector
        if selector is not None and len(selector.run.parts) > 1:
            epoch_iterator = self._batches_of_part(epoch_iterator)
        return super().get_batch_samples(epoch_iterator, *args, **kwargs)

    def _batches_of_part(self, of_loop: Iterator) -> Iterator:
        run = self._selector.run
        done, checkpoint = self.state.global_step - run.first_step, self._resumed_inside
        if done == run.this_part.end and run.next_part is not None:
            if checkpoint is not None and self._part_batches is None:
                super()._load_rng_state(checkpoint)
                self._random_state_is_back = True
                run.sampler.drawn = list(run.order)  # by the run that wrote the checkpoint
            self._selector.begin_part(run.next_part)
            self.check_batches(self._part_loader)
            run.losses.begin(self._part_loader, run.this_part.first_batch, self.selection_pool)
            run.sampler.watch()
            self._part_batches = iter(self._part_loader)
        elif self._part_batches is None and checkpoint is None:
            self._part_batches = of_loop
        elif self._part_batches is None:
            past = (done - run.this_part.first_update) * run.accumulation
            self._part_batches = iter(skip_first_batches(self._part_loader, past))
        return self._part_batches

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self._random_state_is_back:
            self._random_state_is_back = False
        else:
            super()._load_rng_state(checkpoint)
