"""What a `Lead` policy has learned in a run: utilities of rows, and the weights of the bandit over groups of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from ..errors import UserError
from ..method.lead import GROUP, TIMES, UTILITY, Lead, chances, learned, rewarded
from ..method.schedule import Timing
from ..scoring.losses import Scores
from .policy_state import PolicyState
from .pool_scorer import PoolScorer


def check_lead(policy: Lead, timing: Timing, scorer: Any, packed: bool) -> None:
    """Raise for runs in which losses of training cannot take the place of scores.

    Raises:
        UserError: with what to change.
    """
    problem = None
    if timing.freeze_after is None or timing.freeze_after > timing.warmup_epochs:
        once = f"set freeze_after={timing.warmup_epochs}"
        problem = f"scores rows once, and goes by losses of training from then on: {once}"
    elif timing.every > 1:
        problem = f"learns from each epoch, and every={timing.every} trains on the rows of one again: leave every out"
    elif scorer is not None:
        problem = f"goes on from the losses of the model in training, and scorer={scorer!r} is another: leave it out"
    elif packed:
        problem = "takes so many rows, and how many of a group fill a packed row is not known before: set packing=False"
    if problem is not None:
        raise UserError(f"A {type(policy).__name__} policy {problem}.")


class LeadState(PolicyState):
    """Utilities, times and weights of a run; its policy has the chances that groups have now.

    Args:
        given: how they follow from losses.
        pool_scorer: has the pool.
    """

    def __init__(self, given: Lead, pool_scorer: PoolScorer) -> None:
        super().__init__(given, pool_scorer)
        self.forget()

    def forget(self) -> None:
        """Begin a run."""
        super().forget()
        self._pending: np.ndarray | None = None  # (n,) losses of the last epoch's rows, not learned from yet
        self._names: list[str] = []
        self._group = self._utility = self._times = self._weights = None
        self._range, self._rewards = (np.inf, -np.inf), None
        self._restored: dict[str, np.ndarray] = {}

    def trained(self, losses: np.ndarray) -> None:
        """Losses to learn from before rows are selected again."""
        self._pending = losses

    def prepare(self, scores: Scores, step: int) -> None:
        """Take the scores before training, or learn from the epoch that has ended since."""
        if self._utility is None:
            self._begin(scores)
        elif self._pending is not None:
            self._learn(self._pending)
        self._pending = None
        self.policy = self._with_chances()

    def _begin(self, scores: Scores) -> None:
        self._divide(scores)
        self._utility, self._times = scores.cas.astype(np.float64), np.zeros(len(scores), dtype=np.int64)
        self._weights = np.ones(len(self._names))

    def _divide(self, scores: Scores) -> None:
        by, pool = self.given.by, self.pool_scorer.pool
        self._names, self._group = self.given.divided(scores.ifd, None if by is None else pool.column(by))

    def _learn(self, losses: np.ndarray) -> None:
        before, trained = self._utility, np.isfinite(losses)
        self._utility = learned(before, losses, self.given.smoothing)
        self._times = self._times + trained
        gains = np.full(len(self._names), np.nan)
        for number in np.unique(self._group[trained & (self._group >= 0)]):
            of_group = trained & (self._group == number)
            gains[number] = (before - self._utility)[of_group].mean()
        known = gains[np.isfinite(gains)]
        if not len(known):
            return
        low, high = min(self._range[0], known.min()), max(self._range[1], known.max())
        self._range = float(low), float(high)
        self._rewards = 2 * (gains - low) / (high - low) - 1 if high > low else 0 * gains
        self._weights = rewarded(self._weights, self._chances(), self._rewards, self.given.explore)

    def _chances(self) -> np.ndarray:
        return chances(self._weights, self.given.explore)

    def _with_chances(self) -> Lead:
        return replace(self.given, chances=tuple(self._chances().tolist()))

    def columns(self, scores: Scores, scored_at: int) -> dict[str, np.ndarray]:
        """Utility, group and times of each row."""
        return {UTILITY: self._utility, GROUP: self._group, TIMES: self._times}

    def row_columns(self) -> dict[str, np.ndarray]:
        """Utility and group of each row."""
        names = np.array([*self._names, ""], dtype=object)  # the last one of rows in no group
        return {"utility": self._utility, "group": names[self._group]}

    def record(self, kept: np.ndarray) -> dict[str, Any]:
        """What the history says of an epoch that trains on these positions: of each group chances, reward and rows."""
        rows = np.bincount(self._group[kept], minlength=len(self._names)).tolist()
        rewards = (
            [None] * len(rows) if self._rewards is None else [r if np.isfinite(r) else None for r in self._rewards]
        )
        told = zip(self._names, self._chances().tolist(), rewards, rows, strict=True)
        groups = {name: {"chance": chance, "reward": reward, "rows": count} for name, chance, reward, count in told}
        return {"lead": groups}

    def to_arrays(self) -> dict[str, np.ndarray]:
        """What a checkpoint keeps."""
        if self._utility is None:
            return {}
        arrays = {"utility": self._utility, "times": self._times, "weights": self._weights, "range": self._range}
        arrays |= {} if self._rewards is None else {"rewards": self._rewards}
        arrays |= {} if self._pending is None else {"pending": self._pending}
        return {f"{_PREFIX}{name}": np.asarray(array) for name, array in arrays.items()}

    def from_arrays(self, arrays: dict[str, np.ndarray]) -> None:
        """Take that out of the arrays of a checkpoint."""
        names = [name for name in arrays if name.startswith(_PREFIX)]
        self._restored = {name.removeprefix(_PREFIX): arrays.pop(name) for name in names}

    def from_state(self, saved: Mapping[str, Any], scores: Scores | None) -> None:
        """Go on with what `from_arrays` took, and the scores before training."""
        if not (found := self._restored) or scores is None:
            return
        self._divide(scores)
        self._utility, self._times, self._weights = found["utility"], found["times"], found["weights"]
        self._range, self._rewards = tuple(found["range"].tolist()), found.get("rewards")
        self._pending = found.get("pending")
        self.policy = self._with_chances()


_PREFIX = "lead_"
