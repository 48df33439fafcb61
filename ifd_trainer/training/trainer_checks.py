"""What a selection cannot be exact with, each refused with a sentence before the first step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import transformers
from torch.utils.data import IterableDataset, RandomSampler, SequentialSampler
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import LengthGroupedSampler

from ..data.image_rows import IMAGE_CELLS
from ..errors import UserError
from ..method.schedule import Timing
from ..scoring.engine import check_causal_lm
from .collated_labels import fills_labels
from .image_pool import collates_images
from .row_tokens import flat
from .trainer_version import HOOKS, OLDEST, ONE_LOOP

# What trainers of TRL other than the SFTTrainer train on, by a part of their names; the first that fits.
_TRAINED_ON = {
    "OnlineDPO": "answers that the model makes in training",
    "DPO": "pairs of a chosen and a rejected answer",
    "CPO": "pairs of a chosen and a rejected answer",
    "ORPO": "pairs of a chosen and a rejected answer",
    "TPO": "pairs of a chosen and a rejected answer",
    "Reward": "pairs of a chosen and a rejected answer",
    "KTO": "answers labelled as good or bad",
    "RPO": "answers that the model makes in training",
    "RLOO": "answers that the model makes in training",
    "": "answers of a model or a teacher, or with another loss than that of the rows' answers",
}


# Columns of what is no text, and their content.
_NOT_TEXT = {
    **dict.fromkeys(("image", "images", "pixel_values"), "images"),
    **dict.fromkeys(("video", "videos"), "videos"),
    **dict.fromkeys(("audio", "audios"), "sounds"),
}

# Samplers of torch and transformers, and what `train_sampling_strategy` calls their orders.
_STRATEGIES = {
    RandomSampler: "random",
    SequentialSampler: "sequential",
    LengthGroupedSampler: "group_by_length",
}


def check_kind(trainer: Trainer) -> None:
    """Raise for trainers that do not train on the answers of their rows, and for those whose methods hide the hooks.

    Raises:
        UserError: with a sentence about that kind.
    """
    for cls in type(trainer).__mro__:
        name = cls.__name__.removeprefix("Unsloth")
        of_trl = cls.__module__.startswith(("trl.", "Unsloth"))  # Unsloth writes TRL's trainers anew
        if of_trl and issubclass(cls, Trainer) and name[0] != "_" and name not in ("BaseTrainer", "SFTTrainer"):
            raise UserError(
                f"{cls.__name__} trains on {next(what for key, what in _TRAINED_ON.items() if key in name)}; "
                "IFD scores the one answer that a row has. Use the callback with an SFTTrainer or a Trainer, or select "
                "rows beforehand with `ifd-trainer score` and `ifd-trainer select`."
            )
    assigned = sorted(HOOKS.keys() & vars(trainer).keys())
    if assigned:
        raise UserError(
            f"The trainer has {' and '.join(assigned)} assigned on the instance, which stands before what selection "
            "does there. Define it in a subclass, or leave it out."
        )
    check_causal_lm(trainer.model)
    for name in getattr(trainer.train_dataset, "column_names", None) or []:
        if name in _NOT_TEXT and not _is_empty(trainer.train_dataset, name):
            if name in IMAGE_CELLS and collates_images(trainer):
                continue
            raise UserError(
                f"The training set has {_NOT_TEXT[name]} (column {name!r}), which are not scored yet: answers would be "
                "scored without what they are about. Train without the callback, or on rows of text alone; images are "
                "scored where the trainer's collator reads them, as in TRL's SFTTrainer, and rows are not tokenised."
            )
    row = None if getattr(trainer.args, "packing", False) else _row_of_several(trainer.train_dataset)
    if row is not None:
        raise UserError(
            f"Row {row} of the training set holds several examples: its position_ids begin anew inside it. Only the "
            "last one would be scored. Prepare the rows without packing (LLaMA-Factory: packing and neat_packing)."
        )


def _is_empty(dataset: Any, name: str) -> bool:
    """Whether no row has anything in a column: frameworks write such columns for every set."""
    for batch in dataset.select_columns([name]).with_format("arrow").iter(1000):
        values = batch.column(name).drop_null()
        listed = pa.types.is_list(values.type) or pa.types.is_large_list(values.type)
        if len(values) and not (listed and not pc.any(pc.greater(pc.list_value_length(values), 0)).as_py()):
            return False
    return True


def _row_of_several(dataset: Any) -> int | None:
    """The first row into which a framework packed examples by itself, None if no row tells of any.

    The second token of an example has position 1; a 0 may be padding.
    """
    if "position_ids" not in (getattr(dataset, "column_names", None) or []):
        return None
    done = 0
    for batch in dataset.select_columns(["position_ids"]).with_format("arrow").iter(1000):
        column = batch["position_ids"]
        if column.null_count or not pa.types.is_integer(getattr(column.type, "value_type", None) or pa.null()):
            return None  # positions of another kind
        positions, sizes = flat(column)
        begun = np.bincount(np.repeat(np.arange(len(sizes)), sizes)[positions == 1], minlength=len(sizes))
        if (begun > 1).any():
            return done + int(np.argmax(begun > 1))
        done += len(sizes)
    return None


def check_supported(trainer: Trainer) -> None:
    """Raise for what selection cannot do exactly, before the first step."""
    args, dataset = trainer.args, trainer.train_dataset
    if dataset is None:
        raise UserError("The trainer has no train_dataset to select from.")
    if hasattr(dataset, "__len__") and not len(dataset):
        raise UserError(
            "The prepared training set has no rows. A trainer leaves out rows without an answer, and those whose "
            f"answer does not begin within max_length={getattr(args, 'max_length', None)} tokens: raise max_length, or "
            "look at the data set's answers."
        )
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise UserError(
            "Selection needs a data set with a length, got a streaming one. Load it with streaming=False, or score and "
            "select it beforehand with `ifd-trainer score` and `ifd-trainer select`."
        )
    if getattr(args, "packing", False):
        _check_packing(args.packing_strategy, dataset, fills_labels(trainer.data_collator))
    if args.accelerator_config.dispatch_batches:
        raise UserError(
            "dispatch_batches=True sends batches from one process, which fails on rows of unequal length. Set "
            "accelerator_config={'dispatch_batches': False}."
        )
    if args.world_size > 1 and not (args.accelerator_config.even_batches or args.dataloader_drop_last):
        raise UserError(
            "even_batches=False gives some processes a batch more than others, which then wait for ever. Leave "
            "accelerator_config['even_batches'] at True, or set dataloader_drop_last=True."
        )
    split = {
        name: getattr(trainer, size, lambda: 1)()
        for name, size in (("tensor", "get_tp_size"), ("context", "get_cp_size"), ("sequence", "get_sp_size"))
    }
    parallel = getattr(args, "parallelism_config", None)  # what transformers 4.57 knows of context parallelism
    split["context"] = max(split["context"], getattr(parallel, "cp_size", 1) or 1)
    shared = [f"{name} parallelism over {size} processes" for name, size in split.items() if size > 1]
    if shared:
        raise UserError(
            f"Selection scores each row on one process, but this run has {' and '.join(shared)}, where several "
            "processes share a row. Use data parallelism (DDP, FSDP or DeepSpeed ZeRO) alone, or score and select "
            "beforehand with `ifd-trainer score` and `ifd-trainer select`."
        )
    if trainer.is_fsdp_xla_enabled:
        raise UserError("FSDP through XLA is not supported. Set fsdp_config={'xla': False}, or use DDP.")


def sampling_strategy(trainer: Trainer) -> str:
    """How a trainer orders its rows without selection: "random", "sequential" or "group_by_length".

    `train_sampling_strategy` of its arguments says so (`group_by_length` in transformers 4.57), unless its class has a
    `_get_train_sampler` of its own: then what that returns.

    Raises:
        UserError: for any other order, which the selection's would replace.
    """
    args = trainer.args
    grouped = "group_by_length" if getattr(args, "group_by_length", False) else "random"
    strategy = getattr(args, "train_sampling_strategy", grouped)
    owner = next(cls for cls in type(trainer).__mro__ if "_get_train_sampler" in vars(cls) and not _is_ours(cls))
    if owner is not Trainer:
        sampler = owner._get_train_sampler(trainer, trainer.train_dataset)
        strategy = _STRATEGIES.get(type(sampler), "")
        if not strategy or getattr(sampler, "replacement", False) or len(sampler) != len(trainer.train_dataset):
            raise UserError(
                f"{owner.__name__} has a _get_train_sampler of its own, which orders rows by a "
                f"{type(sampler).__name__}; the selection's order would replace it. Let it return what the Trainer's "
                "returns: `order` and `schedule` of the callback say in which order rows are trained on."
            )
    if strategy == "batch_rebalance":
        raise UserError(
            "train_sampling_strategy='batch_rebalance' orders rows by itself. Use 'random' or 'group_by_length'."
        )
    return strategy


def _is_ours(cls: type) -> bool:
    return cls.__module__.startswith(f"{__package__}.")


def check_timing(trainer: Trainer, timing: Timing) -> None:
    """Raise for a warm-up that this trainer cannot do."""
    if timing.start_anew and trainer.is_deepspeed_enabled:
        raise UserError(
            "Training cannot start anew from the original weights under DeepSpeed, which keeps copies of them in its "
            "optimizer. Use DDP or FSDP, or go without the brief experience (brief=None)."
        )
    if timing.every_steps is not None:
        _check_steps(trainer)
    if timing.warmup is not None and getattr(trainer.args, "packing", False):
        raise UserError(
            "The brief experience is a sample of examples, whose number of packed rows is not known before training. "
            "Set packing=False, or go without the brief experience (brief=None)."
        )


def _check_steps(trainer: Trainer) -> None:
    """Raise where the rows of an epoch cannot be chosen part by part."""
    if ONE_LOOP:
        raise UserError(
            f"every_steps needs transformers {OLDEST} or later; this is {transformers.__version__}. Leave it out to "
            "choose the rows of each epoch when it begins."
        )
    if not hasattr(Trainer, "get_batch_samples") or "get_batch_samples" in vars(trainer):
        raise UserError(
            "every_steps takes the batches of each update from get_batch_samples, which this trainer has replaced on "
            "the instance, or does not have. Define it in a subclass, or leave every_steps out."
        )
    if trainer.args.ignore_data_skip:
        raise UserError(
            "ignore_data_skip=True lets a resumed epoch begin again, and with every_steps the rows that it has trained "
            "on would be chosen a second time. Set ignore_data_skip=False, or leave every_steps out."
        )


def _check_packing(strategy: str, dataset: Any, without_labels: bool) -> None:
    if strategy != "bfd":
        raise UserError(
            f"packing_strategy={strategy!r} cuts examples into pieces, which cannot be scored and selected one by one. "
            "Set packing_strategy='bfd', which keeps them whole, or packing=False."
        )
    columns = getattr(dataset, "column_names", None) or []
    wanted = ("input_ids", "seq_lengths") if without_labels else ("input_ids", "labels", "seq_lengths")
    missing = [name for name in wanted if name not in columns]
    if missing:
        raise UserError(
            f"packing=True, but the prepared training set has no {' and no '.join(missing)}: it has {columns}, so the "
            "examples in its rows cannot be told apart. Do not use skip_prepare_dataset, or set packing=False."
        )


def check_complete(checkpoint: Path) -> None:
    """Raise unless `trainer_state.json`, the last file of a checkpoint to be written, is there and whole."""
    path = checkpoint / TRAINER_STATE_NAME
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        what = "has no" if isinstance(error, FileNotFoundError) else f"has a damaged ({error})"
        raise UserError(
            f"The checkpoint {checkpoint} {what} {TRAINER_STATE_NAME}, so what it had selected is not known: it was "
            "probably cut off while it was written. Delete it and resume from the one before, or start training anew."
        ) from error
