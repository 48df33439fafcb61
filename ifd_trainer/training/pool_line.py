"""What a run selects from, in a line: how many rows of how many, and what became of the others."""

from __future__ import annotations

from dataclasses import dataclass

from datasets import Dataset
from transformers import Trainer

from ..method.number_words import many
from .pool import Pool


@dataclass(frozen=True)
class RowsBefore:
    """A training set before its trainer prepared it.

    Attributes:
        rows: how many rows it had.
        unread: those of them that could not be rendered.
        refusals: those that were left out as refusals.
    """

    rows: int
    unread: int = 0
    refusals: int = 0


def rows_before(trainer: Trainer) -> RowsBefore:
    """The rows that a trainer was given, as far as its prepared set tells.

    TRL leaves out rows of which max_length has left nothing to train on, by an index of those that stay: the table
    behind it has all of them.
    """
    dataset, args = trainer.train_dataset, trainer.args
    cuts = getattr(args, "max_length", None) is not None and hasattr(args, "completion_only_loss")
    prepared = cuts and not getattr(args, "packing", False) and isinstance(dataset, Dataset)
    skips = (getattr(args, "dataset_kwargs", None) or {}).get("skip_prepare_dataset", False)
    return RowsBefore(dataset.data.num_rows if prepared and not skips else len(dataset))


def pool_line(trainer: Trainer, pool: Pool, before: RowsBefore | None = None) -> str:
    """How many rows are selected from, and what became of the others.

    Args:
        before: the rows before they were prepared, where more is known than the trainer tells.
    """
    if before is None:
        before = RowsBefore(len(pool)) if pool.packed else rows_before(trainer)
    text = f"{len(pool):,} of {many(before.rows, 'row')}"
    if before.unread:
        text += f", {before.unread:,} that cannot be rendered"
    if before.refusals:
        text += f", {before.refusals:,} left out as refusals"
    if lost := before.rows - before.unread - before.refusals - len(pool):
        text += f", {lost:,} lost to max_length={trainer.args.max_length} (no token of their answers is left)"
    if pool.packed:
        text += f", in {many(pool.training_rows, 'packed row')}"
    if without := int((~pool.has_answer()).sum()):
        text += f"; {without:,} of them have no answer that can be scored"
    return f"pool: {text}{_how_read(pool)}"


def _how_read(pool: Pool) -> str:
    if pool.whole:
        return "; all of a row is taken for its answer"
    if pool.finder is None:
        return ""
    behind = "its chat template's header" if pool.finder.known else repr(pool.finder.texts.headers[0])
    return f"; every token is trained on, and a row's answer is what stands behind {behind}"
