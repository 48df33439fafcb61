"""What a run selects from, in a line: how many rows of how many, and what became of the others."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset
from transformers import Trainer

from ..data.atomic import write_atomically
from ..method.number_words import many
from .history import FOLDER
from .pool import Pool

LEFT_OUT = "left_out.jsonl"


@dataclass(frozen=True)
class RowsBefore:
    """A training set before its trainer prepared it.

    Attributes:
        rows: how many rows it had.
        unread: what is wrong with those of them that could not be rendered, by their ids.
        refusals: the ids of those that were left out as refusals.
        cut: the ids of those of which max_length has left no token to train on; empty where rows have no ids.
        below: the ids of those that were left out for a score below a threshold, or for none.
    """

    rows: int
    unread: Mapping[Any, str] = field(default_factory=dict)
    refusals: Sequence[Any] = ()
    cut: Sequence[Any] = ()
    below: Sequence[Any] = ()


def rows_before(trainer: Trainer, pool: Pool, id_column: str | None) -> RowsBefore:
    """The rows that a trainer was given, as far as its prepared set tells.

    TRL leaves out rows of which max_length has left nothing to train on, by an index of those that stay: the table
    behind it has all of them.
    """
    dataset, args = trainer.train_dataset, trainer.args
    cuts = getattr(args, "max_length", None) is not None and hasattr(args, "completion_only_loss")
    skips = (getattr(args, "dataset_kwargs", None) or {}).get("skip_prepare_dataset", False)
    if pool.packed or not cuts or skips or not isinstance(dataset, Dataset) or dataset.data.num_rows == len(dataset):
        return RowsBefore(len(pool))
    lost = ids_lost(dataset.data.column, dataset, pool.id_name(id_column))
    return RowsBefore(dataset.data.num_rows, cut=lost)


def ids_lost(before: Callable[[str], pa.ChunkedArray], after: Dataset, name: str | None) -> list[Any]:
    """The ids of the rows that a data set has lost.

    Args:
        before: reads a column of the set as it was.
        after: the rows that are left.
        name: of the column of ids; without one, no row can be named.
    """
    if name is None:
        return []
    left = set(column_of(after)(name).to_pylist())
    return [each for each in before(name).to_pylist() if each not in left]


def column_of(rows: Dataset) -> Callable[[str], pa.ChunkedArray]:
    """What reads a column of a data set."""
    return lambda name: rows.select_columns([name]).with_format("arrow")[:][name]


def save_left_out(folder: Path, before: RowsBefore, max_length: int | None) -> None:
    """Name the rows that were left out, with the reason, in a file of the history; an older one goes."""
    reasons = [*before.unread.items(), *((each, "its answer looks like a refusal") for each in before.refusals)]
    reasons += [(each, "its score is not at or above the threshold") for each in before.below]
    reasons += [(each, f"no token of its answer is within max_length={max_length}") for each in before.cut]
    path = folder / LEFT_OUT
    if not reasons:
        path.unlink(missing_ok=True)
        return
    lines = [json.dumps({"row_id": each, "reason": why}, ensure_ascii=False, default=str) for each, why in reasons]
    write_atomically(path, lambda part: part.write_text("\n".join(lines) + "\n", encoding="utf-8"))


def pool_line(trainer: Trainer, pool: Pool, before: RowsBefore, turns: str | None = None) -> str:
    """How many rows are selected from, and what became of the others.

    `turns`: how the scores of several answers become one; None where none are scored.
    """
    text = f"{len(pool):,} of {many(before.rows, 'row')}"
    if before.unread:
        text += f", {len(before.unread):,} that cannot be rendered"
    if before.refusals:
        text += f", {len(before.refusals):,} left out as refusals"
    if before.below:
        text += f", {len(before.below):,} not at or above the threshold"
    if lost := before.rows - len(before.unread) - len(before.refusals) - len(before.below) - len(pool):
        text += f", {lost:,} lost to max_length={trainer.args.max_length} (no token of their answers is left)"
    if before.unread or before.refusals or before.below or before.cut:
        text += f", named in {FOLDER}/{LEFT_OUT}"
    if pool.packed:
        text += f", in {many(pool.training_rows, 'packed row')}"
    if without := int((~pool.has_answer()).sum()):
        text += f"; {without:,} of them have no answer that can be scored"
    return f"pool: {text}{_how_read(pool)}{_how_scored(pool, turns)}"


def _how_read(pool: Pool) -> str:
    if pool.whole:
        return "; all of a row is taken for its answer"
    if pool.finder is None:
        return ""
    return f"; every token is trained on, and a row's answer is {pool.finder.words}"


def _how_scored(pool: Pool, turns: str | None) -> str:
    several = 0 if pool.whole or turns is None else int((pool.answer_counts() > 1).sum())
    if not several:
        return ""
    which = "the last one alone is scored" if turns == "last" else f"all of which are scored (turns={turns!r})"
    return f"; {several:,} of them have several answers, {which}"
