"""Which of several rows that say the same is kept.

Which rows say the same is told from their texts (`data.duplicates`); one of each group is kept, the same one in every
epoch and in every run on these rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import UserError
from .choices import SIMILARITY
from .number_types import is_number
from .reasons import ABOVE_LIMIT, DUPLICATE, MISMATCHED, UNFINISHED, Status

# Reasons for which a row cannot stand for others.
_NOT_SHOWN = [ABOVE_LIMIT, MISMATCHED, UNFINISHED, *(status.value for status in Status)]


@dataclass(frozen=True)
class Duplicates:
    """Keep one of the rows that say the same.

    Args:
        similarity: from which share of common shingles on prompts, and answers, are the same (Jaccard), from 0.5 to
            1; None for texts alone that are equal but for case, punctuation and white space.
    """

    similarity: float | None = SIMILARITY

    def __post_init__(self) -> None:
        number = is_number(self.similarity)
        if self.similarity is not None and not (number and 0.5 <= self.similarity <= 1):
            raise UserError(
                f"similarity must be a share from 0.5 to 1, or None for equal texts, got {self.similarity!r}."
            )


def surplus(
    groups: np.ndarray,
    ids: np.ndarray,
    usable: np.ndarray,
    trained: np.ndarray,
    preferred: np.ndarray | None = None,
) -> np.ndarray:
    """Which rows are to go, (n,) bool: of each group all but one of the usable ones.

    The one that stays is one of the preferred, if there is any; of these one that has been trained on, if any has, and
    else the one with the lowest id.

    Args:
        groups: (n,) the number of each row's group.
        ids: (n,) row ids.
        usable: (n,) rows that no other guard drops, and that can be trained on.
        trained: (n,) rows that were trained on before.
        preferred: (n,) rows below the limit; all by default.

    >>> surplus(np.array([0, 0, 2, 0]), np.array([7, 5, 1, 9]), np.ones(4, bool), np.array([0, 0, 0, 1], bool)).tolist()
    [True, True, False, False]
    """
    rows = np.flatnonzero(usable)
    last = np.zeros(len(rows), dtype=bool) if preferred is None else ~preferred[rows]
    order = rows[np.lexsort((np.asarray(ids)[rows], ~trained[rows], last, groups[rows]))]
    goes = np.zeros(len(groups), dtype=bool)
    goes[order] = np.concatenate([[False], np.diff(groups[order]) == 0])[: len(order)]
    return goes


def representatives(groups: np.ndarray, ids: np.ndarray, reasons: np.ndarray) -> np.ndarray:
    """The id of the row that stands for each row that is dropped as its duplicate, (n,); None for other rows.

    >>> representatives(np.array([0, 0, 2]), np.array([7, 5, 1]), np.array(["duplicate", "kept", "kept"])).tolist()
    [5, None, None]
    """
    dropped = reasons == DUPLICATE
    members = np.flatnonzero(np.isin(groups, groups[dropped]) & ~dropped)
    # Of a group's other rows the one that was let through: others of it may be dropped for other reasons.
    order = members[np.lexsort((np.asarray(ids)[members], np.isin(reasons[members], _NOT_SHOWN)))]
    numbers, first = np.unique(groups[order], return_index=True)
    stands_for = dict(zip(numbers.tolist(), np.asarray(ids)[order[first]].tolist(), strict=True))
    out = np.full(len(groups), None, dtype=object)
    out[dropped] = [stands_for.get(group) for group in groups[dropped].tolist()]
    return out
