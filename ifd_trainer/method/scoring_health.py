"""Does a scoring still say something about rows? What is watched of each, and when selection freezes.

A fully trained model is a worse scorer than one that was trained briefly (arXiv 2308.12032, appendix G). Of each
scoring are watched, over the rows that the model has not been trained on:

    separation         P(w > v) + P(w = v) / 2 for the score w of a wrong pair and v of a row: 1/2 where own prompts
                       help no more than any others, near 1 where a score tells them apart
    rank correlation   Spearman's, with the scoring before
    spread             distance of the quartiles of the scores
    at or above 1      share of the rows whose prompt does not help
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from ..errors import UserError
from .number_types import is_number

Health = Mapping[str, float | None]
WATCHED = ("separation", "rank_correlation", "spread", "at_or_above_1")
_FEWEST = 20  # rows, from which on a scoring is judged


def rank_correlation(x: np.ndarray | pd.Series, y: np.ndarray | pd.Series) -> float | None:
    """Spearman's rank correlation of the rows that have both; None where it is not defined.

    >>> rank_correlation(np.array([1.0, 2.0, 3.0, np.nan]), np.array([2.0, 4.0, 9.0, 1.0]))
    1.0
    """
    # Not scipy's: over ten million rows it takes 3.5 s and 950 MiB, this 3.3 s and 600 MiB, without an import of 0.4 s.
    x, y = pd.Series(np.asarray(x, dtype=float)), pd.Series(np.asarray(y, dtype=float))
    known = x.notna() & y.notna()
    with np.errstate(invalid="ignore"):  # of equal values, in pandas 2
        rho = x[known].rank().corr(y[known].rank(), min_periods=3)
    return None if np.isnan(rho) else float(rho)


def separation(scores: np.ndarray, wrong: np.ndarray) -> float | None:
    """How often a wrong pair scores higher than a row: the area under the ROC curve; None without one of them.

    >>> separation(np.array([0.2, 0.4, 0.6]), np.array([0.5, 0.6]))
    0.75
    """
    scores, wrong = (np.sort(values[np.isfinite(values)]) for values in (scores, wrong))
    if not len(scores) or not len(wrong):
        return None
    below, not_above = (np.searchsorted(scores, wrong, side) for side in ("left", "right"))
    return float((below + not_above).mean() / 2 / len(scores))


def health(scores: np.ndarray, before: np.ndarray | None, wrong: np.ndarray | None, unseen: np.ndarray) -> Health:
    """What is watched of a scoring.

    Args:
        scores: (n,), NaN for rows without one.
        before: (n,) of the scoring before, if there was one.
        wrong: (m,) of wrong pairs, if any were scored.
        unseen: (n,) whether the model has not been trained on a row; with fewer than 20, nothing is said.
    """
    values = scores[unseen & np.isfinite(scores)]
    if len(values) < _FEWEST:
        return dict.fromkeys(WATCHED)
    low, high = np.percentile(values, [25, 75])
    return {
        "separation": None if wrong is None else separation(values, wrong),
        "rank_correlation": None if before is None else rank_correlation(scores[unseen], before[unseen]),
        "spread": float(high - low),
        "at_or_above_1": float(np.mean(values >= 1)),
    }


@dataclass(frozen=True)
class Freeze:
    """Score no more from the first scoring on that carries no information; the one before stands.

    A scoring carries none where its separation, or its rank correlation with the scoring before, is below a least
    value, or its spread below a share of that of the first one. And where little is left of what the first one told,

        separation - 1/2  <  retained * (that of the first scoring - 1/2),

    since a scorer that forgets does so by and by: each scoring agrees with the one before, and less tells rows apart.

    Args:
        separation: the least one; 1/2 is that of a coin.
        agreement: the least rank correlation with the scoring before.
        spread: the least share of the first scoring's spread.
        retained: the least share of what the first scoring's separation was above that of a coin.

    >>> Freeze().reason({"separation": 0.52, "spread": 0.3}, first={"spread": 0.4})
    'scores tell a row from one with a wrong prompt in 52 % of cases (a coin does in 50 %, wanted are 60 %)'
    """

    separation: float = 0.6
    agreement: float = 0.3
    spread: float = 0.1
    retained: float = 0.5

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (is_number(value) and 0 <= value < 1):
                raise UserError(f"{name} must be a number in [0, 1), got {value!r}; 0 switches it off.")

    def reason(self, now: Health, first: Health) -> str | None:
        """Why a scoring carries no information, in words; None where it does."""
        separated, agreed, spread = (now.get(name) for name in ("separation", "rank_correlation", "spread"))
        tells = f"scores tell a row from one with a wrong prompt in {100 * (separated or 0):.0f} % of cases"
        if separated is not None and separated < self.separation:
            return f"{tells} (a coin does in 50 %, wanted are {100 * self.separation:.0f} %)"
        if self.retained and separated is not None and first.get("separation") is not None:
            wanted = 0.5 + self.retained * (first["separation"] - 0.5)
            if separated < wanted:
                return (
                    f"{tells}, and the first ones did in {100 * first['separation']:.0f} % (a coin does in 50 %, "
                    f"wanted are {100 * wanted:.0f} %)"
                )
        if self.agreement and agreed is not None and agreed < self.agreement:
            return f"scores rank rows otherwise than those before (correlation {agreed:.2f}, wanted {self.agreement})"
        if spread is not None and first.get("spread") and spread < self.spread * first["spread"]:
            return f"scores hardly differ any more (quartiles {spread:.3f} apart, at first {first['spread']:.3f})"
        return None
