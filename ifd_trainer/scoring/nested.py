"""Segments that are the beginning of others: one forward of the longest gives the losses of all of them.

Under causal attention no token sees what follows it, so a segment's losses are the same inside a longer one. The turns
of a conversation are such segments, and so is a prompt before its answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Families:
    """n segments in f families: each has a longest segment, and all others are its beginnings or equal to it.

    Attributes:
        longest: (f,) the number of the longest segment of each family, ascending.
        family: (n,) the family of each segment.
    """

    longest: np.ndarray
    family: np.ndarray

    @classmethod
    def of(cls, segments: Sequence[Sequence[int]], nested: bool = True) -> Families:
        """The families of segments, by their token ids; unless `nested`, each segment is a family by itself.

        >>> Families.of([[1, 2], [7], [1, 2, 3], [1]]).longest.tolist()
        [1, 2]
        """
        holders = np.arange(len(segments))
        holder = None
        # In order, a segment stands right before all that begin with it.
        for i in sorted(range(len(segments)), key=lambda i: segments[i], reverse=True) if nested else ():
            ids = segments[i]
            if holder is None or list(segments[holder][: len(ids)]) != list(ids):
                holder = i
            holders[i] = holder
        return cls(*np.unique(holders, return_inverse=True))

    def sums(self, values: Sequence[int]) -> list[int]:
        """Sums over the segments of each family, (f,), of values (n,)."""
        sums = np.zeros(len(self.longest), dtype=np.int64)
        np.add.at(sums, self.family, np.asarray(values, dtype=np.int64))
        return sums.tolist()

    def members(self, families: np.ndarray) -> np.ndarray:
        """The segments of some families, one family after another."""
        order = np.argsort(self.family, kind="stable")
        bounds = np.searchsorted(self.family[order], [families, families + 1])  # (2, m)
        return np.concatenate([order[first:end] for first, end in bounds.T])
