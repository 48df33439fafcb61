"""The hooks of a Trainer that selection stands on, asked of the transformers that is installed.

They are the same in transformers 5.5 to 5.24, and partly others in 4.57. A later release is tried: where a hook is
missing, takes something else or gives something else, attaching a callback is an error; where all are as they were, a
warning.
"""

from __future__ import annotations

import copy
import inspect

import transformers
from accelerate.logging import get_logger
from packaging.version import Version
from torch.utils.data import DataLoader
from transformers import Trainer

from ..errors import NotInstalledError

logger = get_logger(__name__)  # speaks in the main process alone

OLDEST, NEWEST = "5.5", "5.24"  # of the releases that the tests ran with
TRL = "0.24 to 1.16"
_FOUND = Version(transformers.__version__)
ONE_LOOP = _FOUND.release[:2] == (4, 57)  # the one before 5.0 that works; see `one_loop`
# The methods of a Trainer that selection overrides, and what they take.
HOOKS = {
    "_get_train_sampler": "train_dataset",
    "_get_dataloader": "dataset, description, batch_size, sampler_fn, is_training, dataloader_key",
    "set_initial_training_values": "args, dataloader",
    "create_scheduler": "num_training_steps, optimizer",
    "_init_training_state": "max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial",
    "_run_epoch": "model, epoch, train_dataloader, steps_in_epoch, num_update_steps_per_epoch, trial, "
    "ignore_keys_for_eval, start_time, resume_from_checkpoint, epochs_trained, steps_trained_in_current_epoch",
    "_save_checkpoint": "model, trial",
    "_load_callback_state": "",
    "_push_from_checkpoint": "checkpoint_folder",
}
if ONE_LOOP:
    del HOOKS["_init_training_state"], HOOKS["_run_epoch"]
    HOOKS["set_initial_training_values"] += ", total_train_batch_size"
    HOOKS["_inner_training_loop"] = "batch_size, args, resume_from_checkpoint, trial, ignore_keys_for_eval"
    HOOKS["_load_rng_state"] = "checkpoint"


def check_hooks(trainer: Trainer) -> None:
    """Raise unless the hooks are the ones that selection was written for; warn once of a release that is newer.

    Raises:
        ImportError: which names the hook and the releases that have it.
    """
    missing = [name for name in HOOKS if not hasattr(Trainer, name)]
    if missing:
        raise _unsupported(f"Trainer has no {', '.join(missing)}")
    for name, wanted in HOOKS.items():
        found = ", ".join(list(inspect.signature(getattr(Trainer, name)).parameters)[1:])
        if found != wanted:
            raise _unsupported(f"Trainer.{name} takes ({found}), not ({wanted}),")
    args = copy.copy(trainer.args)
    args.max_steps, args.num_train_epochs, args.gradient_accumulation_steps = -1, 3, 2
    loader = DataLoader(range(22), batch_size=2)
    batch = trainer.get_total_train_batch_size(args)
    wanted = (3, 6, 22, 66, True if ONE_LOOP else batch, 11, 18)
    found = Trainer.set_initial_training_values(trainer, args, loader, *([batch] if ONE_LOOP else []))
    if found != wanted:
        raise _unsupported(
            f"For 3 epochs of 11 batches, Trainer.set_initial_training_values returns {found}, not {wanted},"
        )
    if Version(transformers.__version__).release[:2] > Version(NEWEST).release:
        logger.warning_once(
            f"transformers {transformers.__version__} is newer than the releases that selection was tested with, "
            f"{OLDEST} to {NEWEST}. The methods of its Trainer that selection builds on are the same, so it is tried."
        )


def _unsupported(what: str) -> NotInstalledError:
    return NotInstalledError(
        f"{what} in transformers {transformers.__version__}; selection works with transformers 4.57 and {OLDEST} to "
        f"{NEWEST}. Install one of those."
    )
