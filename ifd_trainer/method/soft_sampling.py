"""Rows drawn at random, the likelier the higher their score: a selection that is not only its top.

    P(next row is i)  =  exp(score_i / T) / sum_j exp(score_j / T)        over the rows j that are left

T, in the unit of the score, says how hard the choice is: near 0 it is that of the highest scores, and for T far above
their spread that of random rows. Without putting back, this is one sort: the `budget` rows with the highest

    score_i / T + g_i,     g_i from the standard Gumbel distribution       (arXiv 1903.06059, section 2)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..errors import UserError
from .calibrated_limit import CalibratedLimit
from .choices import Score, Shortfall
from .number_types import is_number
from .reasons import BELOW_CUT, KEPT, NOT_DRAWN
from .selection import AmongCandidates, OwnScore, Selection, score_values


@dataclass(frozen=True)
class SoftSampling(AmongCandidates):
    """Draw rows without putting back, with probabilities that follow from their scores and a temperature.

    Args:
        temperature: T above, positive; inf draws as `RandomRows` among the eligible rows does.
        max_ifd, score, on_shortfall: which rows are eligible, and what is done with too few; as for `Cherry`.

    >>> columns = {"ifd": np.array([0.2, 0.9, 1.3]), "ifd_status": np.array(["ok", "ok", "ok"])}
    >>> SoftSampling(1e-6)(columns, budget=1, rng=np.random.default_rng(0)).kept.tolist()
    [1]
    """

    temperature: float = 0.1
    max_ifd: float | CalibratedLimit = 1.0
    score: Score | OwnScore = "ifd"
    on_shortfall: Shortfall = "repeat"

    def __post_init__(self) -> None:
        number = is_number(self.temperature)
        if not (number and self.temperature > 0):
            raise UserError(f"temperature must be a positive number, inf for random rows, got {self.temperature!r}.")
        self.check_candidates()

    def __call__(
        self,
        columns: Mapping[str, np.ndarray],
        budget: int,
        *,
        ids: np.ndarray | None = None,
        rng: np.random.Generator | None = None,
    ) -> Selection:
        """Select `budget` of n rows; see `Cherry`.

        Returns:
            The selection, highest score first; `not_drawn` is the reason of eligible rows that were not.
        """
        rng = np.random.default_rng(0) if rng is None else rng
        eligible = self.candidates(columns, 1, ids=ids).eligible
        if eligible <= budget:
            return self.candidates(columns, budget, ids=ids, rng=rng)
        selection = self.candidates(columns, eligible, ids=ids)
        rows, score = selection.kept, score_values(columns, self.score)
        keys = rng.gumbel(size=len(rows)) + (score[rows] / self.temperature if math.isfinite(self.temperature) else 0)
        kept = rows[np.sort(np.argsort(-keys, kind="stable")[:budget])]
        reasons = selection.reasons.copy()
        reasons[(reasons == KEPT) | (reasons == BELOW_CUT)] = NOT_DRAWN
        reasons[kept] = KEPT
        return Selection(kept, reasons, float(score[kept[-1]]), eligible, 0)
