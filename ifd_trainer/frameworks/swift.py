"""Selection in ms-swift: one line of a plugin, for a callback that it makes before its trainer.

    # plugin.py
    from swift.callbacks import callbacks_map
    from ifd_trainer.frameworks.swift import selection
    callbacks_map["ifd"] = selection(keep=0.1)

    swift sft --external_plugins plugin.py --callbacks ifd ...

swift encodes a row when it is batched, and draws another one where that fails; it batches rows by itself. With
selection the rows are encoded before training, by the same template, and the loader is transformers' own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch.utils.data import RandomSampler, Sampler, SequentialSampler
from transformers import Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler

from ..errors import UserError, one_line
from ..training.callback import IFDSelectionCallback
from ..training.later import SelectLater

# Columns of an encoded row of text.
_OF_TEXT = {"input_ids", "labels", "loss_scale", "length", "lengths", "channel", "token_type_ids", "_extra_kwargs"}


def selection(
    make: Callable[..., IFDSelectionCallback] = IFDSelectionCallback, **options: Any
) -> Callable[[Any, Trainer], SelectLater]:
    """What `callbacks_map` calls with a trainer's arguments and the trainer, for the callback to be there in training.

        callbacks_map["ifd"] = selection(keep=0.10)

    Args:
        make: what makes the callback of a trainer and the options: `IFDSelectionCallback`, or its `cherry`.
        options: the callback's arguments other than the trainer.

    Raises:
        TypeError: for an option that the callback does not know, when the plugin is imported.
        UserError: for values that it does not take, and for a configuration in which selection cannot be exact, before
            the first step.
    """

    @wraps(make, updated=())
    def made(trainer: Trainer, *args: Any, **kwargs: Any) -> IFDSelectionCallback:
        _prepare(trainer)
        return make(trainer, *args, **kwargs)

    SelectLater(made, **options)  # refuses unknown options
    return lambda args, trainer: SelectLater(made, **options)


class TransformersLoaders:
    """Mixed in before a trainer of swift: the train loader of transformers, in the order that swift's would have."""

    def get_train_dataloader(self) -> Any:
        """The loader that selection's sampler is in."""
        return Trainer.get_train_dataloader(self)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
        args, rows = self.args, self.train_dataset
        if not args.train_dataloader_shuffle:
            return SequentialSampler(rows)
        if args.group_by_length:
            lengths = [len(ids) for ids in rows["input_ids"]]
            return LengthGroupedSampler(args.train_batch_size, lengths=lengths)
        return RandomSampler(rows)


def _prepare(trainer: Trainer) -> None:
    """Let a trainer of swift load its rows as selection needs it."""
    from swift.dataset.utils import LazyLLMDataset

    template = trainer.template
    if getattr(template, "packing", False):
        raise UserError(
            "--packing true packs the whole training set into rows once, so its examples cannot be selected one by "
            "one. Set --packing false (--padding_free true or --group_by_length true keep padding low)."
        )
    if getattr(template, "sequence_parallel_size", 1) > 1:
        raise UserError(
            f"--sequence_parallel_size {template.sequence_parallel_size} lets several processes share a row, but "
            "selection scores each on one process. Set --sequence_parallel_size 1, or select rows beforehand with "
            "`ifd-trainer score` and `ifd-trainer select`."
        )
    if trainer.task_type != "causal_lm":
        raise UserError(
            f"--task_type {trainer.task_type} does not train on answers; IFD scores the one answer that a row has. "
            "Train without --callbacks ifd, or with --task_type causal_lm."
        )
    if getattr(trainer.args, "predict_with_generate", False):
        raise UserError(
            "--predict_with_generate true evaluates texts that the model makes, but with selection the held-out loss "
            "before the first epoch is measured too. Set --predict_with_generate false."
        )
    if isinstance(trainer.train_dataset, LazyLLMDataset) and template.mode == "train":
        trainer.train_dataset = _encoded(trainer.train_dataset.dataset, template)
    cls = type(trainer)
    trainer.__class__ = type(cls.__name__, (TransformersLoaders, cls), {"__module__": cls.__module__})


def _encoded(rows: Any, template: Any) -> Any:
    """Rows as the template encodes them, on disk in the cache of `datasets`.

    Raises:
        UserError: for a row that cannot be encoded, and for rows that are not text alone.
    """
    from swift.dataset.utils import EncodePreprocessor

    model, template.model = template.model, None  # the map's fingerprint is made of the template
    try:
        encoded = EncodePreprocessor(template=template)(rows, strict=True)
    except Exception as error:
        raise UserError(
            f"A row of the training set cannot be encoded ({one_line(error)}), and swift would train on another one in "
            "its place. Set --lazy_tokenize false, which leaves such rows out beforehand, or remove it."
        ) from error
    finally:
        template.model = model
    if others := sorted(set(encoded.column_names) - _OF_TEXT):
        raise UserError(
            f"The encoded training set has {', '.join(others)}: rows of images, videos or sounds are not scored yet, "
            "answers would be scored without what they are about. Train without --callbacks ifd, or on text alone."
        )
    return encoded
