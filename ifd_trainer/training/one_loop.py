"""The hooks of transformers 4.57, whose training loop is one function.

It has no `_init_training_state` and no `_run_epoch`. But it asks for what it needs at places that can be reached from
outside, which is enough for epochs of planned sizes:

- the batches of an epoch are `len(train_dataloader)`, asked anew before `on_epoch_begin`: the sampler is told how many
  rows the coming epoch has as soon as the one before has ended;
- epoch and updates of a checkpoint are `global_step // n` and `global_step % n`, where n is what
  `set_initial_training_values` returned: a number that answers both from the plan (`Position`);
- the events of the callback handler come where `_init_training_state` and `_run_epoch` begin in later releases.

Read and measured on transformers 4.57.6; `trainer_version` refuses other 4.x releases.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any


class Position(int):
    """The updates of an epoch, of which the loop asks where a checkpoint stands in the plan of all epochs.

    >>> n = Position(6, lambda: (3, 1))
    >>> n, 100 // n, 100 % n
    (6, 3, 1)
    """

    def __new__(cls, updates: int, position: Callable[[], tuple[int, int]]) -> Position:
        number = super().__new__(cls, updates)
        number.position = position
        return number

    def __rfloordiv__(self, step: int) -> int:
        return self.position()[0]

    def __rmod__(self, step: int) -> int:
        return self.position()[1]


class OneLoop:
    """Overrides beside those of `SelectiveTrainer`, mixed in before it by `attach`."""

    _checkpoint: str | None = None
    _first: tuple[int, int] = (0, 0)  # epoch and updates where the run begins
    _epoch: int = 0

    def set_initial_training_values(self, *arguments: Any) -> tuple:
        values = list(super().set_initial_training_values(*arguments))
        if self._selector is not None:
            values[1] = Position(values[1], self.resumed_position)
        return tuple(values)

    def _inner_training_loop(
        self,
        batch_size: int | None = None,
        args: Any = None,
        resume_from_checkpoint: str | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        self._checkpoint = resume_from_checkpoint
        return super()._inner_training_loop(batch_size, args, resume_from_checkpoint, trial, ignore_keys_for_eval)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        selector = self._selector
        if selector is None or not selector.run.starts_anew:
            super()._load_rng_state(checkpoint)


def follow_events(trainer: Any) -> None:
    """Let the trainer begin its run and its epochs at the events of its callback handler."""
    handler = trainer.callback_handler
    handler.on_train_begin = partial(_train_begins, trainer, handler.on_train_begin)
    handler.on_epoch_begin = partial(_epoch_begins, trainer, handler.on_epoch_begin)
    handler.on_epoch_end = partial(_epoch_ends, trainer, handler.on_epoch_end)


def _train_begins(trainer: Any, event: Callable, *arguments: Any) -> Any:
    selector = trainer._selector
    if selector is not None:
        epoch, updates = trainer.start_run(trainer._checkpoint)
        trainer._first, trainer._epoch = (epoch, 0 if trainer.args.ignore_data_skip else updates), epoch
        _expect(selector, epoch)
    return event(*arguments)


def _epoch_begins(trainer: Any, event: Callable, *arguments: Any) -> Any:
    control = event(*arguments)
    if trainer._selector is not None:
        epoch, updates = trainer._first
        loader = trainer.callback_handler.train_dataloader
        trainer.begin_epoch(trainer._epoch, loader, updates if trainer._epoch == epoch else 0)
    return control


def _epoch_ends(trainer: Any, event: Callable, *arguments: Any) -> Any:
    control = event(*arguments)
    if trainer._selector is not None:
        trainer._epoch += 1
        _expect(trainer._selector, trainer._epoch)
    return control


def _expect(selector: Any, epoch: int) -> None:
    """The loop asks for the batches of an epoch before its rows are selected."""
    if epoch < len(selector.plan.epochs):
        selector.run.coming = selector.budget(epoch)
