"""Selection in a framework that wants its callbacks before it makes its trainer."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from transformers import Trainer, TrainerCallback

from ..errors import RunError
from .callback import IFDSelectionCallback
from .options import check_names

_WITH_TRAINER = "Make the callback with the trainer: trainer.add_callback(IFDSelectionCallback(trainer, ...))."


class SelectLater(TrainerCallback):
    """Takes the place of an `IFDSelectionCallback` until the trainer that it is handed to begins to train.

        run_exp(callbacks=[SelectLater(keep=0.10)])  # LLaMA-Factory

    When `trainer.train()` is called, it adds the callback to that trainer, with its options, and goes. What the
    callback refuses is refused then, before the first step. Where the trainer is there, give it to the callback itself,
    which refuses at once.

    Args:
        make: what makes the callback of a trainer and the options: `IFDSelectionCallback`, or its `cherry`.
        options: the callback's arguments other than the trainer.

    Attributes:
        made: the callback, once training began.

    Raises:
        TypeError: for an option that the callback does not know.
        RunError: if it was handed to anything that is no Trainer.
    """

    def __init__(self, make: Callable[..., IFDSelectionCallback] = IFDSelectionCallback, **options: Any) -> None:
        named = {name for one in (make, IFDSelectionCallback) for name in inspect.signature(one).parameters}
        check_names(options.keys() - named)
        self.make, self.options = make, options
        self.made: IFDSelectionCallback | None = None

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The trainer is nearly made: what a class derived from Trainer still sets up may follow."""
        self.follow(self._trainer())

    def follow(self, trainer: Trainer) -> None:
        """Let `trainer.train()` begin with making the callback."""
        self.made = None

        def train(*args: Any, **kwargs: Any) -> Any:
            if vars(trainer).get("train") is train:
                del trainer.train
            if self.made is None:
                self.made = self.make(trainer, **self.options)
                trainer.remove_callback(self)
                trainer.add_callback(self.made)
            return type(trainer).train(trainer, *args, **kwargs)

        trainer.train = train

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Reached where nothing made the callback: without an error, all rows would be trained on."""
        raise RunError(f"SelectLater was handed to a trainer that was made before. {_WITH_TRAINER}")

    def _trainer(self) -> Trainer:
        """The one that calls: events tell their callbacks of everything but it."""
        frame = inspect.currentframe()
        while frame is not None:
            caller = frame.f_locals.get("self")
            if isinstance(caller, Trainer) and any(c is self for c in caller.callback_handler.callbacks):
                return caller
            frame = frame.f_back
        raise RunError(f"SelectLater found no Trainer that it was handed to. {_WITH_TRAINER}")
