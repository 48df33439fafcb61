"""What rows are ranked by: a column, highest or lowest first, or the weighted ranks of several.

Scores of several columns have no common unit, so that their ranks are added: r = sum_c w_c rank_c / sum_c |w_c|, where
rank_c is the share of the rows that have no higher value in c, in (0, 1], equal values at the mean of their ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from ..errors import UserError
from .choices import RANKED_BY
from .reasons import Status


@dataclass(frozen=True)
class Ranking:
    """The columns that rows are ranked by, highest first, each with its weight; a negative one ranks lowest first.

    >>> Ranking({"ifd": 0.7, "reward": 0.3}).label
    '0.7 ifd + 0.3 reward'
    """

    weights: Mapping[str, float]

    def __post_init__(self) -> None:
        for name, weight in self.weights.items():
            if not np.isfinite(weight) or weight == 0:
                raise UserError(f"The weight of {name!r} has to be a number other than 0, got {weight:g}.")

    @classmethod
    def parse(cls, entries: Sequence[str]) -> Ranking:
        """From texts `NAME` or `NAME:WEIGHT`; a colon in the name of a column is part of it.

        >>> Ranking.parse(["ifd:0.7", "reward"]).weights
        {'ifd': 0.7, 'reward': 1.0}
        """
        weights: dict[str, float] = {}
        for entry in entries:
            name, colon, weight = entry.rpartition(":")
            try:
                name, weight = (name, float(weight)) if colon else (entry, 1.0)
            except ValueError:
                name, weight = entry, 1.0
            if name in weights:
                raise UserError(f"{name!r} is named twice.")
            weights[name] = weight
        return cls(weights)

    @property
    def plain(self) -> str | None:
        """The column, if it is one, and as it is."""
        return next(iter(self.weights)) if list(self.weights.values()) == [1.0] else None

    @property
    def lowest(self) -> str | None:
        """The column, if it is one, and ranked lowest first.

        >>> Ranking({"rifd": -1.0}).lowest
        'rifd'
        """
        return next((name for name, weight in self.weights.items() if weight < 0 and len(self.weights) == 1), None)

    @property
    def label(self) -> str:
        """What is ranked by, for a reader."""
        if self.lowest is not None:
            return f"-{self.lowest}"
        return self.plain or " + ".join(f"{weight:g} {name}" for name, weight in self.weights.items())

    @property
    def ifd(self) -> str | None:
        """The first of the columns that is an IFD."""
        return next((name for name in self.weights if name in RANKED_BY), None)

    def __call__(self, columns: Mapping[str, np.ndarray]) -> np.ndarray:
        """What the rows with a score are ranked by, (n,): the ranking as the `score` of a policy.

        >>> columns = {"ifd": np.array([0.9, 0.1]), "reward": np.array([1.0, 3.0]), "ifd_status": np.full(2, "ok")}
        >>> Ranking({"ifd": 1.0, "reward": 3.0})(columns).tolist()
        [0.625, 0.875]
        """
        among = np.asarray(columns["ifd_status"]) == Status.OK.value
        return self.values({name: np.asarray(columns[name], dtype=np.float64) for name in self.weights}, among)

    def values(self, columns: Mapping[str, np.ndarray], among: np.ndarray) -> np.ndarray:
        """(n,) what rows are ranked by, NaN where a column has no number.

        Args:
            columns: (n,) float64 each, by name.
            among: (n,) bool, the rows to rank when there are several columns.
        """
        if self.plain is not None:
            return columns[self.plain]
        if self.lowest is not None:
            return -columns[self.lowest]
        whole = among & np.logical_and.reduce([np.isfinite(columns[name]) for name in self.weights])
        total, most = np.full(len(among), np.nan), sum(map(abs, self.weights.values()))
        total[whole] = sum(
            weight / most * pd.Series(columns[name][whole]).rank(pct=True).to_numpy()
            for name, weight in self.weights.items()
        )
        return total
