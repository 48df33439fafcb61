"""The tokens of a training set's rows, and which of them are answers, as far as its columns tell.

A trainer's prepared rows have `input_ids`, and beside them any of

    labels            -100 where a token is not trained on; without this column, all are
    completion_mask,  which tokens are a completion, or an assistant's: what TRL's collators before 1.7 read in place of
    assistant_masks   labels, and what stays of rows that are trained on whole (completion_only_loss=False)
    attention_mask    0 where a row is padded

Padding is no part of a row: where no mask tells, tokens that are not trained on and are the tokenizer's padding, at
either end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..data.encoding import IGNORE
from ..errors import UserError

TOKEN_COLUMNS = ("input_ids", "labels", "attention_mask", "completion_mask", "assistant_masks", "seq_lengths")
_ANSWER_MASKS = ("completion_mask", "assistant_masks")
_READ = ("input_ids", "labels", *_ANSWER_MASKS, "attention_mask")


@dataclass(frozen=True)
class Padding:
    """What is added to rows so that they are equally long.

    Attributes:
        token: the tokenizer's padding token; None for none.
        begins: whether that token begins texts, too: the last one of those at a row's start is then not padding.
        cut_at_start: whether rows are cut at their start (truncation_mode="keep_end"): masks that were not cut with
            them then begin with what was cut off.
    """

    token: int | None = None
    begins: bool = False
    cut_at_start: bool = False


class RowTokens:
    """Reads rows by their positions.

    Args:
        dataset: the trainer's prepared training set.
        padding: see there.

    Raises:
        UserError: for a `datasets.Dataset` without input_ids.

    >>> rows = [{"input_ids": [0, 5, 6], "labels": [-100, -100, 6]}, {"input_ids": [7], "labels": [7]}]
    >>> [part.tolist() for part in RowTokens(rows, Padding(token=0))(slice(0, 2))]
    [[5, 6, 7], [-100, 6, 7], [2, 1]]
    """

    def __init__(self, dataset: Any, padding: Padding) -> None:
        self._padding, self._dataset = padding, dataset
        names = getattr(dataset, "column_names", None)
        self._stored, self._plain = None, False
        if names is not None:
            if "input_ids" not in names:
                raise UserError(
                    f"Selection reads input_ids, but the prepared training set has {names}. Do not use "
                    "skip_prepare_dataset, or tokenise the data set yourself."
                )
            stored = dataset.select_columns([name for name in _READ if name in names])
            self._plain = stored.format["type"] != "custom"
            # As they are stored: no Python object for each token.
            self._stored = stored.with_format("arrow") if self._plain else stored

    def __call__(self, rows: slice | np.ndarray, trained: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of m rows, one after the other: token ids, labels (-100 where there is no answer), and the size of each row.

        Args:
            trained: as they are trained on, whatever masks say of answers.

        Raises:
            UserError: for a row whose labels or masks are fewer or more than its tokens.
        """
        columns = self._columns(rows)
        ids, sizes = columns.pop("input_ids")
        labels = self._of_tokens("labels", columns, sizes, rows)
        labels = ids.copy() if labels is None else labels.copy()
        for name in () if trained else _ANSWER_MASKS:
            mask = self._of_tokens(name, columns, sizes, rows)
            if mask is not None:
                labels[mask == 0] = IGNORE
        attended = self._of_tokens("attention_mask", columns, sizes, rows)
        kept = ~self._padded(ids, labels, sizes) if attended is None else attended != 0
        if kept.all():
            return ids, labels, sizes
        number = np.repeat(np.arange(len(sizes)), sizes)
        return ids[kept], labels[kept], np.bincount(number[kept], minlength=len(sizes))

    def _columns(self, rows: slice | np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """By column, all values, and the size of each row."""
        if self._plain:
            return {name: flat(column) for name, column in _arrow(self._stored[rows]).items()}
        if self._stored is not None:
            part = self._stored[rows]
            lists = {name: [np.asarray(row).tolist() for row in values] for name, values in part.items()}
        else:
            positions = range(*rows.indices(len(self._dataset))) if isinstance(rows, slice) else rows.tolist()
            part = [self._dataset[position] for position in positions]
            names = [name for name in _READ if part and name in part[0]]
            lists = {name: [np.asarray(row[name]).tolist() for row in part] for name in names or _READ[:1]}
        return {name: flat(pa.array(values, pa.list_(pa.int64()))) for name, values in lists.items()}

    def _of_tokens(
        self, name: str, columns: dict[str, tuple[np.ndarray, np.ndarray]], sizes: np.ndarray, rows: slice | np.ndarray
    ) -> np.ndarray | None:
        """A column with a value for each token; a mask that a cut row has more of, in part."""
        if name not in columns:
            return None
        values, found = columns[name]
        wrong = found != sizes if name == "labels" else found < sizes
        if wrong.any():
            at = int(np.flatnonzero(wrong)[0])
            row = (rows.start or 0) + at if isinstance(rows, slice) else rows[at]
            raise UserError(
                f"Row {row} of the training set has {sizes[at]} input_ids, but {found[at]} {name}. Tokenise the data "
                "set anew: each token needs a label, -100 in the prompt."
            )
        if (found == sizes).all():
            return values
        begin = np.cumsum(found) - found + (found - sizes if self._padding.cut_at_start else 0)
        within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return values[np.repeat(begin, sizes) + within]

    def _padded(self, ids: np.ndarray, labels: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """Which tokens are padding by themselves, (t,) bool."""
        if self._padding.token is None or not len(ids):
            return np.zeros(len(ids), dtype=bool)
        said = (ids != self._padding.token) | (labels != IGNORE)
        place, firsts = np.arange(len(ids)), np.cumsum(sizes) - sizes
        some = sizes > 0
        first, last = np.zeros(len(sizes), np.int64), np.zeros(len(sizes), np.int64)
        first[some] = np.minimum.reduceat(np.where(said, place, len(ids)), firsts[some])
        last[some] = np.maximum.reduceat(np.where(said, place, -1), firsts[some])
        if self._padding.begins:
            first = np.where(first > firsts, first - 1, first)
        return (place < np.repeat(first, sizes)) | (place > np.repeat(last, sizes))


def _arrow(table: Any) -> dict[str, Any]:
    return {name: table[name] for name in table.column_names}


def flat(column: Any) -> tuple[np.ndarray, np.ndarray]:
    """The values of a column of lists, and how many each row has."""
    values = pc.list_flatten(column)
    if pa.types.is_boolean(values.type):
        values = pc.cast(values, pa.int8())
    return values.to_numpy().astype(np.int64), pc.list_value_length(column).to_numpy().astype(np.int64)


def lists_of(flat: np.ndarray, sizes: np.ndarray) -> Sequence[list[int]]:
    """Rows of so many values each.

    >>> lists_of(np.array([5, 6, 7]), np.array([2, 1]))
    [[5, 6], [7]]
    """
    return [part.tolist() for part in np.split(flat, np.cumsum(sizes)[:-1])] if len(sizes) else []
