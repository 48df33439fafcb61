"""Thresholds with a stated error rate: what measured limits share.

Of n losses that were measured on wrong rows, the floor(alpha (n + 1))-th smallest: a further wrong row that is like
them (exchangeable with them) is below it with a probability of at most alpha, whatever their distribution. This is the
argument of split conformal prediction (Vovk, Gammerman and Shafer, 2005).
"""

from __future__ import annotations

import math

from ..errors import UserError
from .choices import WRONG_PROMPTS
from .number_types import is_number, is_whole


def rank_of(alpha: float, measured: int) -> int:
    """Which of so many measured values, in ascending order from 1, is the threshold; 0 where they are too few.

    >>> rank_of(0.05, 256), rank_of(0.05, 18)
    (12, 0)
    """
    return math.floor(alpha * (measured + 1) + 1e-9)  # 0.05 * 20 is a little more than 1, 0.07 * 100 less than 7


def least_measured(alpha: float) -> int:
    """The smallest number of values of which a threshold with this alpha can be told.

    >>> least_measured(0.05)
    19
    """
    return math.ceil(1 / alpha - 1 - 1e-9)


def check_error_rate(alpha: float, measured: int, name: str) -> None:
    """Raise for an alpha that is no share, or a number of values (called `name`) of which none can be told."""
    if not (is_number(alpha) and 0 < alpha < 1):
        raise UserError(f"alpha must be a share in (0, 1), got {alpha!r}.")
    whole = is_whole(measured)
    if not (whole and measured >= least_measured(alpha)):
        raise UserError(
            f"{name} must be a whole number, and at least {least_measured(alpha)} with alpha={alpha}, got {measured!r}."
        )


def check_prompts(prompts: str) -> None:
    """Raise for another choice of wrong prompts than there is."""
    if prompts not in WRONG_PROMPTS:
        raise UserError(f"prompts must be {' or '.join(map(repr, WRONG_PROMPTS))}, got {prompts!r}.")
