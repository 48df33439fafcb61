"""Which of several rows that say the same is kept.

Which rows say the same is told from their texts (`data.duplicates`); one of each group is kept, the same one in every
epoch and in every run on these rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real

import numpy as np

from ..errors import UserError


@dataclass(frozen=True)
class Duplicates:
    """Keep one of the rows that say the same.

    Args:
        similarity: from which share of common shingles on prompts, and answers, are the same (Jaccard), from 0.5 to
            1; None for texts alone that are equal but for case, punctuation and white space.
    """

    similarity: float | None = 0.85

    def __post_init__(self) -> None:
        number = isinstance(self.similarity, Real) and not isinstance(self.similarity, bool)
        if self.similarity is not None and not (number and 0.5 <= self.similarity <= 1):
            raise UserError(
                f"similarity must be a share from 0.5 to 1, or None for equal texts, got {self.similarity!r}."
            )


def surplus(groups: np.ndarray, ids: np.ndarray, usable: np.ndarray, trained: np.ndarray) -> np.ndarray:
    """Which rows are to go, (n,) bool: of each group all but one of the usable ones.

    The one that stays has been trained on, if any has, and else the lowest id.

    Args:
        groups: (n,) the number of each row's group.
        ids: (n,) row ids.
        usable: (n,) rows that no other guard drops, and that can be trained on.
        trained: (n,) rows that were trained on before.

    >>> surplus(np.array([0, 0, 2, 0]), np.array([7, 5, 1, 9]), np.ones(4, bool), np.array([0, 0, 0, 1], bool)).tolist()
    [True, True, False, False]
    """
    rows = np.flatnonzero(usable)
    order = rows[np.lexsort((np.asarray(ids)[rows], ~trained[rows], groups[rows]))]
    goes = np.zeros(len(groups), dtype=bool)
    goes[order] = np.concatenate([[False], np.diff(groups[order]) == 0])[: len(order)]
    return goes
