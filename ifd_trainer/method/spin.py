"""The student matches already: rows whose answer scores as the model's own answer does have nothing to teach it.

Source: SPIN (arXiv 2401.01335), which trains a model to tell the data's answers y from its own answers y' by the
difference of their log probabilities, and is done when it cannot:

    spin_gap = s(y|Q) - s(y'|Q)          nats per token, s(A|Q) the mean loss of an answer's tokens given its prompt

A gap of 0 or less: the row's answer surprises the model no more than what it says itself. Where we differ: SPIN
compares sums over whole answers, with the model of the round before beside them, and drops no row; here means over
tokens are compared, so that answers of different lengths can be, with one model, before training.

Whose own answer: the greedy one is about the least surprising that the model knows, and few answers of others come near
its loss; sampled ones at temperature 1 have the losses of the model's own distribution, which for a small model are
often higher than those of clean answers. So a margin goes with a way of answering, and is chosen by a look at the gaps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike

from ..errors import UserError
from .columns import OWN_AGREEMENT, SPIN_GAP
from .gates import GateMeasures
from .number_types import is_number
from .reasons import MATCHED

OWN_EMPTY = "own_answer_empty"  # status: the model says nothing, which has no loss to compare with


def spin_gap(cas: ArrayLike, own_cas: ArrayLike) -> np.ndarray:
    """How much more the row's answer surprises the model than its own, cas - own_cas, nats per token; NaN for none.

    >>> spin_gap([1.5, 0.5], [0.75, np.nan]).tolist()
    [0.75, nan]
    """
    cas, own_cas = np.asarray(cas, dtype=np.float64), np.asarray(own_cas, dtype=np.float64)
    gap = np.full(np.broadcast_shapes(cas.shape, own_cas.shape), np.nan)
    np.subtract(cas, own_cas, out=gap, where=np.isfinite(cas) & np.isfinite(own_cas))
    return gap


@dataclass(frozen=True)
class MatchedGate:
    """Hold back rows whose answer the model scores as its own: `matched`.

    A row is matched where spin_gap <= margin; with `agreement`, also where own_agreement >= agreement: the words are
    the same, whatever the loss. A row without these numbers is let through.

    Args:
        margin: nats per token; below 0, only answers that surprise the model less than its own are matched.
        agreement: in (0, 1], of the model's own answer with the row's; None not to look at it.

    Raises:
        UserError: on use, for a data set without the columns.

    >>> gate, columns = MatchedGate(0.1), {"spin_gap": np.array([0.05, 0.5, np.nan])}
    >>> gate.matched(columns).tolist()
    [True, False, False]
    """

    name: ClassVar[str] = "matched"
    margin: float = 0.1
    agreement: float | None = None

    def __post_init__(self) -> None:
        if not (is_number(self.margin) and np.isfinite(self.margin)):
            raise UserError(f"margin must be a number of nats per token, got {self.margin!r}.")
        if self.agreement is not None and not (is_number(self.agreement) and 0 < self.agreement <= 1):
            raise UserError(f"agreement must be a number above 0 and at most 1, or None, got {self.agreement!r}.")

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the data set that it reads."""
        return (SPIN_GAP,) if self.agreement is None else (SPIN_GAP, OWN_AGREEMENT)

    def matched(self, columns: dict[str, np.ndarray]) -> np.ndarray:
        """Which of n rows are matched, (n,) bool."""
        if missing := [name for name in self.columns if name not in columns]:
            raise UserError(
                f"The gate matched reads {missing[0]}, which the rows do not have: attach it with `ifd-trainer score "
                "--spin` or an OwnAnswerScorer."
            )
        with np.errstate(invalid="ignore"):
            matched = np.asarray(columns[SPIN_GAP], dtype=np.float64) <= self.margin
            if self.agreement is not None:
                matched |= np.asarray(columns[OWN_AGREEMENT], dtype=np.float64) >= self.agreement
        return matched

    def __call__(self, measures: GateMeasures, passed: np.ndarray) -> np.ndarray:
        return np.where(self.matched(measures.columns), MATCHED, None).astype(object)
