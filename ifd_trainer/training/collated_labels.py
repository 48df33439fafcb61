"""The labels of a prepared training set where TRL makes them, or cuts them, only as it collates a batch.

TRL 1.7 and later keep labels in the prepared set. Before, it holds `completion_mask` (prompt-completion rows) and
`assistant_masks` (assistant_only_loss), and the collator lets those tokens be trained on whose masks all are 1:
`assistant_masks` always, `completion_mask` unless completion_only_loss=False. From TRL 1.0 to 1.7 it is the collator,
too, that cuts rows at max_length. `trained_tokens` does both beforehand, for what is scored to be what is trained on.
"""

from __future__ import annotations

from functools import partial
from importlib.metadata import version
from typing import Any

import numpy as np
import pyarrow as pa
from packaging.version import Version
from transformers import Trainer

from ..data.encoding import IGNORE
from ..errors import NotInstalledError, UserError
from .row_tokens import flat
from .trainer_version import ONE_LOOP, TRL

_CHATS = "0.27"  # the first TRL that reads what transformers 5 makes of a chat
_LOOKED_AT = 8  # rows that are collated, to see whether what is trained on is what is scored


def trained_tokens(trainer: Trainer) -> Any:
    """input_ids and labels of the training set as the collator of the trainer leaves them; with packing, seq_lengths.

    None where they are trained on as the training set holds them.

    Raises:
        UserError: for a row whose input_ids and masks differ in length.
    """
    dataset, collator = trainer.train_dataset, trainer.data_collator
    names = getattr(dataset, "column_names", None) or []
    if not fills_labels(collator) or "input_ids" not in names:
        return None
    reads_masks = makes_labels(collator)
    applied = {"completion_mask": reads_masks and collator.completion_only_loss, "assistant_masks": reads_masks}
    masks = [name for name, applies in applied.items() if applies and name in names]
    cut = None if collator.padding_free else getattr(collator, "max_length", None)
    unlabelled = "labels" not in names and (reads_masks or getattr(trainer.args, "packing", False))
    if cut is None and not masks and not unlabelled:
        return None
    kept = [name for name in ("labels", "seq_lengths", *sorted(set(applied) - set(masks))) if name in names]
    at_end = getattr(collator, "truncation_mode", None) == "keep_end"
    stored = dataset.select_columns(["input_ids", *kept, *masks]).with_format("arrow")
    collate = partial(label, masks=masks, max_length=cut, keep_end=at_end)
    with trainer.args.main_process_first(desc="labelling the training set"):  # the others read it in the cache
        return stored.map(collate, batched=True, remove_columns=masks, desc="Labelling train dataset").with_format(None)


def label(table: pa.Table, masks: list[str], max_length: int | None = None, keep_end: bool = False) -> pa.Table:
    """Rows with labels where all masks are 1, cut at `max_length` tokens; `keep_end` keeps the last ones.

    >>> rows = pa.table({"input_ids": [[5, 6, 7], [8]], "completion_mask": [[0, 1, 1], [1]]})
    >>> label(rows, ["completion_mask"], max_length=2).to_pydict()
    {'input_ids': [[5, 6], [8]], 'labels': [[-100, 6], [8]]}
    """
    ids, sizes = flat(table["input_ids"])
    labels = ids
    for name in (*(["labels"] if "labels" in table.column_names else []), *masks):
        values, others = flat(table[name])
        if not np.array_equal(sizes, others):
            row = np.flatnonzero(sizes != others)[0]
            raise UserError(
                f"A row of the training set has {sizes[row]} input_ids, but {others[row]} values in {name}. Tokenise "
                "the data set anew: each token needs one."
            )
        labels = values if name == "labels" else np.where(values == 0, IGNORE, labels)
    columns = {name: table[name] for name in table.column_names if name not in masks}
    if max_length is not None:
        places = np.arange(len(ids)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        first = np.repeat(np.maximum(sizes - max_length, 0) if keep_end else np.zeros_like(sizes), sizes)
        kept = (places >= first) & (places < first + max_length)
        ids, labels, sizes = ids[kept], labels[kept], np.minimum(sizes, max_length)
    offsets = pa.array(np.concatenate([[0], np.cumsum(sizes)]), pa.int32())
    made = {"input_ids": ids, "labels": labels}
    return pa.table(columns | {name: pa.ListArray.from_arrays(offsets, pa.array(made[name])) for name in made})


def makes_labels(collator: Any) -> bool:
    """Whether it is a collator of TRL before 1.7, which makes labels itself."""
    return fills_labels(collator) and hasattr(collator, "completion_only_loss")


def check_collated(trainer: Trainer, pool: Any) -> None:
    """Raise where a collator of TRL leaves other tokens to train on than the labels of the pool say.

    A few rows are collated as they would be for training. The first token of a row does not count: nothing predicts it.
    """
    if not fills_labels(trainer.data_collator):
        return
    if _reads_no_chats(trainer.train_dataset):
        raise UserError(
            f"trl {version('trl')} takes every chat for a prompt of two tokens with transformers 5, and would train on "
            f"what stands in the prompts. Install trl {_CHATS} or later, or tokenise the rows with labels yourself."
        )
    first = np.arange(min(len(pool), _LOOKED_AT))
    rows = pool.arrange(first, len(first))  # with packing, each alone in a bin
    for row, labels in zip(rows, pool.trained_labels(np.ravel(rows)), strict=True):
        collated = trainer.data_collator([pool.dataset[row]])["labels"][0].tolist()
        trained, read = ([token for token in part[1:] if token != IGNORE] for part in (collated, labels))
        if trained != read:
            raise NotInstalledError(
                f"The collator of trl {version('trl')} trains on {len(trained)} tokens of row {np.ravel(row)[0]}, but "
                f"selection would score {len(read)}. It works with trl {TRL}: install one of those, or give the data "
                "set a labels column."
            )


def _reads_no_chats(dataset: Any) -> bool:
    names = set(getattr(dataset, "column_names", None) or [])
    masked = {"prompt", "completion_mask"} <= names and Version(version("trl")) < Version(_CHATS)
    return masked and not ONE_LOOP and not isinstance(dataset[0]["prompt"], str)


def fills_labels(collator: Any) -> bool:
    """Whether it is a collator of TRL, which takes all tokens for labels where rows have none."""
    return type(collator).__module__.startswith("trl.") and hasattr(collator, "padding_free")
