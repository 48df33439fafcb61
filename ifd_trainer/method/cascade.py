"""Two filters, one behind the other: first what others think of a row, then how hard it is for the model.

Align2LLaVA (arXiv 2409.18541) filters image-text instructions by reward models of human preference, and turns to the
language model with what they leave; there it rewrites the instructions, here it scores them. Any score that is a column
of the rows can come first: a reward model's, ratings of people, a similarity of image and text. Where the ranks of
several scores are to be added instead, see `ranking.Ranking`.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..errors import UserError
from .calibrated_limit import CalibratedLimit
from .choices import Score, Shortfall
from .number_types import check_rows_share, rows_of_share
from .reasons import LESS_PREFERRED, NO_VALUE, Status
from .selection import AmongCandidates, OwnScore, Selection, best_rows


@dataclass(frozen=True)
class Cascade(AmongCandidates):
    """Of the rows with the highest values of a column, those with the highest IFD.

    Rows beyond the share are dropped, `less_preferred`, rows without a number in the column `no_value`; among the
    others a `Cherry` chooses. Ties are broken by row id.

    Args:
        by: the column that comes first, highest is best.
        share: how much it leaves: a fraction of the rows (in a run, of those that guards leave), or a number of rows.
        max_ifd, score, on_shortfall: of the `Cherry`; see there.

    >>> columns = {"reward": np.array([1, 9, 8]), "ifd": np.array([0.7, 0.2, 0.5]), "ifd_status": np.full(3, "ok")}
    >>> selection = Cascade("reward", share=2)(columns, budget=1)
    >>> selection.kept.tolist(), selection.reasons.tolist()
    ([2], ['less_preferred', 'below_cut', 'kept'])
    """

    by: str
    share: float | int = 0.5
    max_ifd: float | CalibratedLimit = 1.0
    score: Score | OwnScore = "ifd"
    on_shortfall: Shortfall = "repeat"

    def __post_init__(self) -> None:
        if not isinstance(self.by, str) or not self.by:
            raise UserError(f"by must be the name of a column, got {self.by!r}.")
        check_rows_share("share", self.share)
        self.check_candidates()

    def __call__(
        self,
        columns: Mapping[str, np.ndarray],
        budget: int,
        *,
        ids: np.ndarray | None = None,
        rng: np.random.Generator | None = None,
    ) -> Selection:
        """Select `budget` of n rows; see `Policy`.

        Raises:
            UserError: for a column that holds no numbers.
        """
        values, status = _numbers(columns[self.by], self.by), np.asarray(columns["ifd_status"], dtype=object).copy()
        scored = status == Status.OK.value
        known = np.isfinite(values)
        positions = np.arange(len(status)) if ids is None else np.asarray(ids)
        best = best_rows(values, positions, known & scored, rows_of_share(self.share, len(status)))
        passed = np.zeros(len(status), dtype=bool)
        passed[best] = True
        status[scored & ~passed] = LESS_PREFERRED
        status[scored & ~known] = NO_VALUE
        return self.candidates(ChainMap({"ifd_status": status}, columns), budget, ids=ids, rng=rng)


def _numbers(values: np.ndarray, name: str) -> np.ndarray:
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise UserError(f"The column {name!r} holds no numbers, by which rows could be ranked first.") from error
