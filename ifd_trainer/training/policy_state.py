"""What a policy knows of a run beside the scores: a state for each kind that keeps one, and none for all others.

The chooser has one `PolicyState`, told of what happens in the run, asked before rows are chosen, and kept in
checkpoints. A policy that is a function of the scores has the one here, which knows nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from ..method.selection import Policy
from ..scoring.losses import Scores
from .pool_scorer import PoolScorer


class PolicyState:
    """What is known beside the scores: nothing.

    Args:
        given: the policy, as the user gave it.
        pool_scorer: has the pool, and the trainer.

    Attributes:
        policy: as it is now, with what it has learned.
        reads_held_out: whether held-out losses before training are to be measured before rows are selected.
    """

    reads_held_out: ClassVar[bool] = False

    def __init__(self, given: Policy, pool_scorer: PoolScorer) -> None:
        self.given = self.policy = given
        self.pool_scorer = pool_scorer

    def forget(self) -> None:
        """Begin a run."""
        self.policy = self.given

    # ---- what happens in a run ----------------------------------------------------------------------------------

    def evaluated(self, step: int, losses: Mapping[str, Any]) -> None:
        """Held-out losses after so many steps, as a history's record has them."""

    def trained(self, losses: np.ndarray) -> None:
        """An epoch has ended: mean losses of rows in the forwards that trained on them, (n,), NaN for other rows."""

    def prepare(self, scores: Scores, step: int) -> None:
        """Rows are to be selected, after so many steps; called on every process."""

    # ---- what is asked of it ------------------------------------------------------------------------------------

    def columns(self, scores: Scores, scored_at: int) -> dict[str, np.ndarray]:
        """What the policy reads beside the `scores`, which were made in the epoch `scored_at`: (n, ...) by column."""
        return {}

    def row_columns(self) -> dict[str, np.ndarray]:
        """What the history shows of each row, (n,) by column."""
        return {}

    def record(self, kept: np.ndarray) -> dict[str, Any]:
        """What the history says of an epoch that trains on these positions, an entry of its record each."""
        return {}

    def logged(self) -> dict[str, float]:
        """Numbers for the log, by name."""
        return {}

    # ---- checkpoints --------------------------------------------------------------------------------------------

    def to_arrays(self) -> dict[str, np.ndarray]:
        """What a checkpoint keeps of rows."""
        return {}

    def from_arrays(self, arrays: dict[str, np.ndarray]) -> None:
        """Take that out of the arrays of a checkpoint."""

    def to_state(self) -> dict[str, Any]:
        """What a checkpoint keeps as JSON."""
        return {}

    def from_state(self, saved: Mapping[str, Any], scores: Scores | None) -> None:
        """Take that out of a checkpoint, whose arrays were read before, and whose scores are these."""
