"""What a run selects from: the rows of a training set, or the examples inside its packed rows.

Two things are counted. Examples are scored and selected. Training rows are what the loop batches and what a budget
is given in: an example each, or with packing a bin of examples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow.compute as pc

from .packing import PackedRows, best_fit_decreasing, largest, spread, unpack
from .selection import Selection, ShortfallError

_TOKEN_COLUMNS = {"input_ids", "labels", "attention_mask", "completion_mask", "assistant_masks", "seq_lengths"}
TrainingRow = int | tuple[int, ...]


class Pool:
    """The rows of a training set; each is an example and a training row.

    Args:
        dataset: the trainer's prepared training set, with input_ids and labels.
    """

    packed = False

    def __init__(self, dataset: Any) -> None:
        self.source = self.examples = dataset

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.examples)

    @property
    def training_rows(self) -> int:
        """Training rows that all examples make: the whole of which `keep` is a fraction."""
        return len(self)

    @property
    def dataset(self) -> Any:
        """What the train loader reads by the training rows that the sampler yields."""
        return self.examples

    # ---- what examples hold -------------------------------------------------------------------------------------

    def tokens(self, positions: np.ndarray | None = None) -> Iterator[tuple[list[int], list[int]]]:
        """(input_ids, labels) of the examples at `positions`, of all by default; read a thousand at a time."""
        positions = np.arange(len(self)) if positions is None else positions
        examples = self.examples
        for start in range(0, len(positions), 1000):
            part = positions[start : start + 1000].tolist()
            if hasattr(examples, "column_names"):
                missing = [name for name in ("input_ids", "labels") if name not in examples.column_names]
                if missing:
                    raise ValueError(
                        "Selection reads input_ids and labels, but the prepared training set has "
                        f"{examples.column_names}. Do not use skip_prepare_dataset, or tokenise the data set with "
                        "labels yourself."
                    )
                rows = examples.select_columns(["input_ids", "labels"])[part]
                yield from zip(rows["input_ids"], rows["labels"], strict=True)
            else:
                for position in part:
                    row = examples[position]
                    yield list(row["input_ids"]), list(row["labels"])

    def lengths(self, positions: np.ndarray) -> np.ndarray:
        """Tokens of the examples at `positions`."""
        return np.array([len(ids) for ids, _ in self.tokens(positions)])

    def ids(self, column: str | None) -> np.ndarray:
        """Row ids: those in `column`, else in "row_id" or "id" if there is one, else positions.

        Raises:
            ValueError: when there is no such column, or its values are not unique.
        """
        columns = getattr(self.examples, "column_names", None) or []
        if column is not None and column not in columns:
            raise ValueError(f"id_column {column!r} is not among the training set's columns {sorted(columns)}.")
        name = column or next((name for name in ("row_id", "id") if name in columns), None)
        if name is None:
            return np.arange(len(self))
        ids = np.asarray(self.examples[name])
        if len(np.unique(ids)) != len(ids):
            raise ValueError(f"The row ids in column {name!r} are not unique. Rename the column, or pass id_column.")
        return ids

    def columns(self, without: Collection[str]) -> dict[str, list[Any]]:
        """Columns other than token ids and `without`."""
        names = getattr(self.examples, "column_names", None) or []
        return {name: list(self.examples[name]) for name in names if name not in _TOKEN_COLUMNS | set(without)}

    def fingerprint(self) -> str:
        """A digest of all token ids and labels in their order."""
        return self._digest().hexdigest()

    def _digest(self) -> Any:
        digest = hashlib.blake2b(digest_size=16)
        for ids, labels in self.tokens():
            digest.update(np.asarray([len(ids), *ids, *labels], dtype=np.int64).tobytes())
        return digest

    # ---- from a budget to training rows -------------------------------------------------------------------------

    def choose(self, budget: int, policy: Callable[[int], Selection]) -> Selection:
        """The selection that fills `budget` training rows.

        Args:
            budget: number of training rows.
            policy: selects the given number of examples; called with the same number, it selects the same ones.
        """
        return policy(budget)

    def divide(self, ranked: np.ndarray, rows: Sequence[int]) -> list[np.ndarray]:
        """Chosen examples, highest score first, cut into parts that fill so many training rows each."""
        return np.split(ranked, np.cumsum(rows)[:-1])

    def arrange(self, kept: np.ndarray, budget: int) -> list[TrainingRow]:
        """`budget` training rows made of the kept examples (highest score first), highest score first."""
        return kept.tolist()

    def to_arrays(self, order: list[TrainingRow]) -> dict[str, np.ndarray]:
        """Training rows in the form that a checkpoint keeps."""
        return {"positions": np.asarray(order, dtype=np.int64)}

    def from_arrays(self, arrays: Mapping[str, np.ndarray]) -> list[TrainingRow]:
        """Training rows from what a checkpoint kept."""
        return arrays["positions"].tolist()


class PackedPool(Pool):
    """The examples inside the rows that TRL packed with packing_strategy="bfd"; a training row is a bin of them.

    Args:
        dataset: a `datasets.Dataset` with input_ids, labels and seq_lengths.
        capacity: tokens of a bin, the trainer's max_length.
    """

    packed = True

    def __init__(self, dataset: Any, capacity: int) -> None:
        super().__init__(dataset)
        self.capacity = capacity
        packed = dataset.select_columns(["input_ids", "labels", "seq_lengths"]).with_format("arrow")
        self.examples = packed.map(unpack, batched=True, desc="Unpacking train dataset").with_format(None)
        table = self.examples.with_format("arrow")[:]
        self._lengths = pc.list_value_length(table["input_ids"]).to_numpy().astype(np.int64)

    @cached_property
    def training_rows(self) -> int:
        return len(best_fit_decreasing(self._lengths, self.capacity))

    @property
    def dataset(self) -> PackedRows:
        return PackedRows(self.examples, self.training_rows)

    def lengths(self, positions: np.ndarray) -> np.ndarray:
        return self._lengths[positions]

    def ids(self, column: str | None) -> np.ndarray:
        if column is not None:
            raise ValueError(
                f"id_column={column!r} cannot be used with packing=True, which drops all columns but the tokens. "
                "Leave it out: rows are then known by their position in the unpacked training set."
            )
        return np.arange(len(self))

    def fingerprint(self) -> str:
        digest = self._digest()
        digest.update(f"packed into {self.capacity}".encode())
        return digest.hexdigest()

    def choose(self, budget: int, policy: Callable[[int], Selection]) -> Selection:
        """The selection of as many examples as fit into `budget` bins; a shortfall is one of bins.

        Eligible examples are taken from the highest score downwards until the next one would need another bin. Only
        where all of them together leave bins empty, the policy's way with a shortfall fills the bins.

        Raises:
            ShortfallError: when no example is eligible, or when the eligible ones are too few and the policy refuses.
        """

        def fits(examples: int) -> bool:
            return self._bins(policy(examples).kept) <= budget

        eligible = policy(1).eligible
        count = largest(fits, 1, eligible)
        selection = policy(count)
        filled = self._bins(selection.kept)
        if filled == budget or count < eligible:
            return selection
        try:
            policy(count + 1)
        except ShortfallError as error:
            raise ShortfallError(
                f"{budget} packed rows are to be trained, but the eligible examples fill {filled}: {error}"
            ) from error
        low, high = count, count + 1
        while fits(high):
            low, high = high, 2 * high
        return policy(largest(fits, low, high - 1))

    def divide(self, ranked: np.ndarray, rows: Sequence[int]) -> list[np.ndarray]:
        """Each part takes examples until the next one would need another bin, as if it were an epoch of its own.

        Parts are cut by score alone: every example of a part scores at least as high as all of the next. There need
        not be a cut for which all examples fit (of the lengths 6, 6, 4, 4 in two bins of 10, one is left over):
        examples that were chosen for all bins together and do not fit are the lowest ones, and are left out. A part
        leaves one example at least for each bin of the parts after it, so none stays empty.
        """
        assert len(ranked) >= sum(rows), f"{len(ranked)} examples cannot fill {sum(rows)} bins"
        tokens = np.concatenate([[0], np.cumsum(self._lengths[ranked])])
        parts, start = [], 0
        for number, bins in enumerate(rows):
            room = tokens[start] + bins * self.capacity
            end = min(int(np.searchsorted(tokens, room, side="right")) - 1, len(ranked) - sum(rows[number + 1 :]))
            end = largest(lambda n, a=start, bins=bins: self._bins(ranked[a:n]) <= bins, start + bins, end)
            parts.append(ranked[start:end])
            start = end
        return parts

    def arrange(self, kept: np.ndarray, budget: int) -> list[TrainingRow]:
        """Bins ordered by the mean rank of their examples."""
        bins = spread(best_fit_decreasing(self._lengths[kept], self.capacity), budget)
        assert len(bins) == budget, f"{len(kept)} examples fill {len(bins)} bins, not {budget}"
        return [tuple(kept[list(ranks)].tolist()) for ranks in sorted(bins, key=lambda ranks: sum(ranks) / len(ranks))]

    def to_arrays(self, order: list[TrainingRow]) -> dict[str, np.ndarray]:
        flat = [position for members in order for position in members]
        sizes = [len(members) for members in order]
        return {"positions": np.asarray(flat, dtype=np.int64), "bins": np.asarray(sizes, dtype=np.int64)}

    def from_arrays(self, arrays: Mapping[str, np.ndarray]) -> list[TrainingRow]:
        parts = np.split(arrays["positions"], np.cumsum(arrays["bins"])[:-1])
        return [tuple(part.tolist()) for part in parts]

    def _bins(self, kept: np.ndarray) -> int:
        return len(best_fit_decreasing(self._lengths[kept], self.capacity))
