"""Training sets with images, whose rows a collator makes tokens and pixels of as they are trained on.

TRL prepares no row with images: its collator does, batch by batch, and so do collators that users write. What is
scored has to be what is trained on, so each row is put through the trainer's own collator once, for its tokens and
labels; pixels are made again whenever a row is scored, or trained on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from accelerate.utils import gather_object
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import Trainer

from ..data.image_rows import IMAGE_CELLS
from ..errors import UserError, with_kind
from ..method.reasons import Status
from ..scoring.image_forwards import unpadded
from .pool import FindAnswers, Pool
from .row_tokens import Padding

Row = dict[str, Any]


def collates_images(trainer: Trainer) -> bool:
    """Whether a trainer's collator makes tokens of rows with images."""
    names = getattr(trainer.train_dataset, "column_names", None) or []
    return "input_ids" not in names and any(name in names for name in IMAGE_CELLS)


@dataclass(frozen=True)
class Collated:
    """Rows of a training set as its trainer's collator leaves them.

    Attributes:
        tokens: input_ids and labels of each; none of a row that could not be collated.
        problems: why, by their positions: a status, and what is wrong in words.
    """

    tokens: Dataset
    problems: Mapping[int, tuple[Status, str]]


def collated(trainer: Trainer, change: Callable[[Row], Row] | None = None) -> Collated:
    """All rows, each collated alone; several processes share the work.

    Args:
        change: makes another row of each before.

    Raises:
        UserError: where no row can be collated.
    """
    rank, processes = trainer.accelerator.process_index, trainer.accelerator.num_processes
    rows, read = as_trained(trainer), []
    hidden = trainer.args.disable_tqdm or not trainer.is_local_process_zero()
    for position in tqdm(range(rank, len(rows), processes), "Reading rows with images", disable=hidden, leave=False):
        try:
            row = rows[position]
            [ids], [labels] = _tokens(trainer.data_collator([row if change is None else change(row)]))
            read.append((position, ids, labels, None))
        except ImportError:
            raise
        except Exception as error:  # a damaged image, a template that cannot render it: whatever a collator raises
            read.append((position, [], [], (_status(error), with_kind(error))))
    read = sorted(gather_object(read) if processes > 1 else read, key=lambda row: row[0])
    problems = {position: problem for position, *_, problem in read if problem}
    if problems and len(problems) == len(rows):
        raise UserError(
            f"The trainer's collator can read none of {len(rows)} rows with images; the first one: {problems[0][1]}. "
            "Training would stop there, too."
        )
    columns = {"input_ids": [ids for _, ids, *_ in read], "labels": [labels for *_, labels, _ in read]}
    lists = {name: pa.array(values, pa.list_(pa.int32())) for name, values in columns.items()}
    return Collated(Dataset(pa.table(lists)), problems)


def _status(error: Exception) -> Status:
    """Whether an error is of an image: one of those that PIL and the file system raise."""
    of_image = isinstance(error, (OSError, SyntaxError)) or type(error).__name__ == "DecompressionBombError"
    return Status.UNREADABLE_IMAGE if of_image else Status.MALFORMED


def as_trained(trainer: Trainer) -> Dataset:
    """The training set with the columns that reach the collator."""
    return trainer._remove_unused_columns(trainer.train_dataset, description="training")


def _tokens(batch: Mapping[str, Any]) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids and labels of the rows of a batch, without padding."""
    missing = [name for name in ("input_ids", "attention_mask", "labels") if name not in batch]
    if missing:
        raise UserError(f"The trainer's collator gives no {' and no '.join(missing)}, which selection reads.")
    labels = unpadded({"input_ids": batch["labels"], "attention_mask": batch["attention_mask"]})
    return unpadded(batch), labels


class ImagePool(Pool):
    """The rows of a training set with images, as the trainer's collator leaves them.

    Args:
        trainer: the trainer.
        answers, padding: as of `Pool`.

    Attributes:
        problems: why rows could not be collated, by their positions: a status, and what is wrong in words.
    """

    def __init__(self, trainer: Trainer, answers: FindAnswers | None, padding: Padding) -> None:
        read = collated(trainer)
        super().__init__(trainer.train_dataset, answers, padding, read.tokens)
        self.problems = read.problems
        processor = getattr(trainer.data_collator, "processor", trainer.processing_class)
        self._placeholder = getattr(processor, "image_token_id", None)

    @cached_property
    def images(self) -> np.ndarray:
        """How many images each row has in its own columns, (n,)."""
        counts = np.zeros(len(self), dtype=np.int64)
        for name in self._image_columns:
            column = self._column(name)
            if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
                counts += pc.fill_null(pc.list_value_length(column), 0).to_numpy()
            else:
                counts += pc.is_valid(column).to_numpy(zero_copy_only=False) if len(column) else 0
        return counts

    def status(self, position: int) -> Status | None:
        """Why a row that could not be collated has no score; None for one that could."""
        return self.problems[position][0] if position in self.problems else None

    def segments(self, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """As of `Pool`, with one placeholder for an image: that is what stands in the texts of reports."""
        for ids, bounds in super().segments(size):
            if self._placeholder is None or not len(ids):
                yield ids, bounds
                continue
            kept = (ids != self._placeholder) | (np.append(-1, ids[:-1]) != self._placeholder)
            before = np.append(0, np.cumsum(kept))
            yield ids[kept], before[bounds]

    def columns(self, start: int, stop: int, without: Any) -> dict[str, pa.ChunkedArray]:
        """As of `Pool`, without the images."""
        return super().columns(start, stop, {*without, *self._image_columns})

    def _packed_into(self) -> bytes:
        """The images are a part of what the rows say: a digest of them, as they are stored."""
        digest = hashlib.blake2b(digest_size=16)
        for start in range(0, len(self), 1000):
            part = self.examples.select_columns(self._image_columns).with_format("arrow")[start : start + 1000]
            for name in self._image_columns:
                for cell in part[name]:
                    digest.update(repr(cell.as_py()).encode())
        return digest.digest()

    @property
    def _image_columns(self) -> list[str]:
        return [name for name in IMAGE_CELLS if name in self.examples.column_names]
