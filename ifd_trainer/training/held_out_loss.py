"""The held-out loss of the model before it is trained: without it, nobody sees what training changed.

It is no evaluation of the trainer's: no callback hears of it, no metric is logged, early stopping and
`load_best_model_at_end` do not see it, and modules, random states and data loaders are as if it had not been. It takes
one pass over the evaluation sets, for the loss alone, as each evaluation of the trainer does.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

import numpy as np
from accelerate.utils.memory import should_reduce_batch_size
from tqdm.auto import tqdm
from transformers import Trainer
from transformers.trainer_utils import has_length

from ..errors import RunError
from ..scoring.eval_guard import eval_mode
from .trainer_hooks import metrics_set_aside

_PREFIX = "eval"


def evaluates_later(trainer: Trainer) -> bool:
    """Whether a trainer will evaluate, but not before its first step, by itself or because it was told to wait."""
    args = trainer.args
    evaluates = trainer.eval_dataset is not None and args.eval_strategy != "no"
    return evaluates and not args.eval_on_start and not args.eval_delay


def losses_of(metrics: Mapping[str, Any], sets: Any) -> dict[str, Any]:
    """The losses in an evaluation's metrics as a history's record has them: `eval_loss`, `eval_losses` by set.

    >>> losses_of({"eval_loss": 2.5, "eval_runtime": 0.1}, sets=None)
    {'eval_loss': 2.5}
    >>> losses_of({"eval_code_loss": 1.5}, sets={"code": ..., "chat": ...})
    {'eval_losses': {'code': 1.5}}
    """
    names = [name for name in (sets if isinstance(sets, dict) else ()) if f"{_PREFIX}_{name}_loss" in metrics]
    found = {"eval_loss": float(metrics[f"{_PREFIX}_loss"])} if f"{_PREFIX}_loss" in metrics else {}
    return found | ({"eval_losses": {n: float(metrics[f"{_PREFIX}_{n}_loss"]) for n in names}} if names else {})


def losses_before(trainer: Trainer, when: str = "before training") -> dict[str, Any]:
    """The losses of the evaluation sets with the model as it is, as `losses_of` gives them; on every process.

    `when`: how the bar and an error call that time.

    Raises:
        RunError: without memory for it, where the trainer would lower the batch size of training for that.
    """
    sets = trainer.eval_dataset
    found = {}
    try:
        for name in sets if isinstance(sets, dict) else (None,):
            prefix = _PREFIX if name is None else f"{_PREFIX}_{name}"
            with _unnoticed(trainer):
                loader = trainer.get_eval_dataloader(name)
                with _progress(trainer, loader, f"Held-out loss {when}"):
                    output = trainer.evaluation_loop(
                        loader, f"Held-out loss {when}", prediction_loss_only=True, metric_key_prefix=prefix
                    )
            found |= output.metrics
    except RuntimeError as error:
        if not trainer.args.auto_find_batch_size or not should_reduce_batch_size(error):
            raise
        raise RunError(
            f"The held-out loss {when} found too little memory. auto_find_batch_size changes the batch size of "
            "training alone: lower per_device_eval_batch_size."
        ) from error
    return losses_of(found, sets)


@contextlib.contextmanager
def _unnoticed(trainer: Trainer) -> Iterator[None]:
    """Let the trainer evaluate without a trace."""
    handler = trainer.callback_handler
    states, loader = (random.getstate(), np.random.get_state()), handler.eval_dataloader  # noqa: NPY002
    # A loader whose workers persist is kept by the trainer, and has drawn its seed already when it is used again.
    anew = mock.patch.object(trainer.args, "dataloader_persistent_workers", False)
    try:
        with metrics_set_aside(trainer), eval_mode(trainer.model_wrapped, trainer.args.device), anew:
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        handler.eval_dataloader = loader


@contextlib.contextmanager
def _progress(trainer: Trainer, loader: Any, words: str) -> Iterator[None]:
    """Show the batches in a bar of their own, in the place of what callbacks make of them."""
    show = trainer.is_local_process_zero() and not trainer.args.disable_tqdm
    total = len(loader) if has_length(loader) else None
    with tqdm(total=total, desc=words, disable=not show, leave=False) as bar:

        def noted(args: Any, state: Any, control: Any) -> Any:
            bar.update()
            return control

        with mock.patch.object(trainer.callback_handler, "on_prediction_step", noted):
            yield
