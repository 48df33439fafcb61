"""Packing: examples to bins of at most `capacity` tokens, and the data set that joins the examples of a bin.

Best-fit decreasing, as in TRL's packing_strategy="bfd": the longest example first, each into the fullest bin that it
still fits into, else into a new one. Two differences: TRL packs a thousand rows at a time and once for all epochs,
here all examples of an epoch are packed together, and anew in each epoch.

A bin is a tuple of example indices. The sampler yields bins, and `PackedRows` reads what it is asked for: it holds no
state of an epoch, so workers that outlive an epoch cannot be out of date.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import UserError


def best_fit_decreasing(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[tuple[int, ...]]:
    """Pack examples of the given lengths (tokens) into bins of at most `capacity` tokens.

    Examples of the same length are taken in their order, bins with the same space in the order in which they got it.

    Returns:
        The bins as tuples of indices into `lengths`; each index occurs once.

    Raises:
        ValueError: when a length is below 1 or above the capacity.

    >>> best_fit_decreasing([3, 5, 2, 1], capacity=6)
    [(1, 3), (0, 2)]
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if len(lengths) and not 1 <= lengths.min() <= lengths.max() <= capacity:
        raise UserError(
            f"Lengths from {lengths.min()} to {lengths.max()} tokens cannot be packed into bins of {capacity}: an "
            "example has at least one token and no more than a bin."
        )
    bins: list[list[int]] = []
    with_space: dict[int, deque[int]] = defaultdict(deque)
    spaces: list[int] = []  # the keys of with_space that have a bin, ascending
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[index])
        at = bisect_left(spaces, length)
        if at == len(spaces):
            space, number = capacity, len(bins)
            bins.append([])
        else:
            space = spaces[at]
            number = with_space[space].popleft()
            if not with_space[space]:
                del spaces[at]
        bins[number].append(index)
        left = space - length
        if left:
            if not with_space[left]:
                insort(spaces, left)
            with_space[left].append(number)
    return [tuple(members) for members in bins]


def spread(bins: Sequence[tuple[int, ...]], count: int) -> list[tuple[int, ...]]:
    """The bins, the ones with the most members halved until there are `count`.

    Best-fit decreasing can leap: one example more may need two bins more. The number between is reached this way.
    """
    result = list(bins)
    while len(result) < count:
        largest = max(range(len(result)), key=lambda number: len(result[number]))
        members = result[largest]
        assert len(members) > 1, f"{len(result)} bins of single examples cannot become {count}"
        result[largest] = members[: len(members) // 2]
        result.append(members[len(members) // 2 :])
    return result


def largest(fits: Callable[[int], bool], low: int, high: int) -> int:
    """A number n in [low, high] that fits, while n + 1 does not (or n is `high`); `low` has to fit."""
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low


def unpack(table: pa.Table) -> pa.Table:
    """The examples of packed rows: input_ids and labels, cut at `seq_lengths`, in their order; no token is copied.

    >>> packed = {"input_ids": [[1, 2, 3], [4]], "labels": [[1, 2, 3], [4]], "seq_lengths": [[2, 1], [1]]}
    >>> unpack(pa.table(packed))["input_ids"].to_pylist()
    [[1, 2], [3], [4]]
    """
    lengths = pc.list_flatten(table["seq_lengths"]).to_numpy()
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    columns = {}
    for name in ("input_ids", "labels"):
        cls, width = (
            (pa.LargeListArray, np.int64) if pa.types.is_large_list(table[name].type) else (pa.ListArray, np.int32)
        )
        values = pc.list_flatten(table[name]).combine_chunks()
        if len(values) != offsets[-1]:
            raise UserError(f"seq_lengths add up to {offsets[-1]} tokens, but {name} has {len(values)}.")
        columns[name] = cls.from_arrays(pa.array(offsets.astype(width)), values)
    return pa.table(columns)


class PackedRows:
    """A data set whose index is a bin: the examples in it, joined in the form of TRL's packed rows.

    Args:
        examples: a data set of single examples with input_ids and labels.
        size: what `len` says, the bins of all examples; an epoch may ask for fewer, more, or other ones.
    """

    def __init__(self, examples: Any, size: int) -> None:
        self.examples, self.size = examples, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, members: tuple[int, ...]) -> dict[str, list[int]]:
        rows = self.examples[list(members)]
        joined = {name: [token for row in rows[name] for token in row] for name in ("input_ids", "labels")}
        return {**joined, "seq_lengths": [len(ids) for ids in rows["input_ids"]]}
