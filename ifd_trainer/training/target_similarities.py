"""How alike the rows of a run's pool are to a target set, by the model as it was when the pool was scored last."""

from __future__ import annotations

import logging
import math

import numpy as np

from ..data.encoding import Encoder
from ..data.target_rows import Targets
from ..errors import UserError
from ..method.reasons import Status
from ..method.target_set import SIMILARITIES, TargetSet, most_like
from ..scoring.losses import Scores
from .policy_state import PolicyState
from .pool_scorer import PoolScorer

logger = logging.getLogger(__name__)


class TargetSimilarities(PolicyState):
    """The cosines of a pool's rows with the targets of a policy; kept from one scoring to the next, and in checkpoints.

    Args:
        given: names the targets.
        pool_scorer: embeds rows and targets.

    Attributes:
        targets: as tokens of the trainer's tokenizer, cut like its rows.

    Raises:
        UserError: for targets that cannot be read, and for an embedder that gives no states of single tokens.
    """

    def __init__(self, given: TargetSet, pool_scorer: PoolScorer) -> None:
        super().__init__(given, pool_scorer)
        if isinstance(pool_scorer.embedder, str):
            raise UserError(
                f"embedder={pool_scorer.embedder!r} is a sentence-transformers model, and a target set is compared by "
                "the states of single tokens: leave it out, or embed with a causal language model, "
                "embedder=IFDScorer(...)."
            )
        # Another model than the one in training does not change: what it made of the rows once, it makes of them again.
        self._fixed = pool_scorer.embedder is not None or pool_scorer.other not in (None, "columns")
        longest = pool_scorer.longest_row
        longest = int(longest) if math.isfinite(longest) else None
        encoder = Encoder(pool_scorer.encoder.tokenizer, max_length=longest, score_truncated=True)
        targets = Targets.read(given.targets)
        self.targets = targets.encoded(targets.format(given.format), encoder)
        self.forget()

    def forget(self) -> None:
        """Begin a run."""
        super().forget()
        self._scored_at, self._known = -1, np.empty((0, len(self.targets)), dtype=np.float32)

    def columns(self, scores: Scores, scored_at: int) -> dict[str, np.ndarray]:
        """Cosines of the n rows of the pool when they were scored, (n, m) float32; NaN where the status is not `ok`.

        Those of one epoch are computed once, and those of another model than the one in training once for all.
        """
        scored_at, status = 0 if self._fixed else scored_at, scores.ifd_status
        if scored_at != self._scored_at:
            rows = np.flatnonzero(status == Status.OK.value)
            self._known = np.full((len(status), len(self.targets)), np.nan, dtype=np.float32)
            self._known[rows] = self.pool_scorer.similarities(
                self.targets.tokens, rows, f"Likeness to targets, epoch {scored_at}"
            )
            self._scored_at = scored_at
        return {SIMILARITIES: self._known}

    def row_columns(self) -> dict[str, np.ndarray]:
        """What the history shows of each row, (n,): how alike it is to the target most like it, and which that is."""
        if not len(self._known):
            return {}
        most, similarity = most_like(self._known)
        like = np.where(most >= 0, self.targets.ids[most].astype(object), None)
        return {"target_similarity": similarity, "target_row": like}

    def to_arrays(self) -> dict[str, np.ndarray]:
        """What a checkpoint keeps: epochs to come may go by what the model made of the rows at an earlier one."""
        if not len(self._known):
            return {}
        return {"target_similarities": self._known, "target_similarities_of": np.array([self._scored_at])}

    def from_arrays(self, arrays: dict[str, np.ndarray]) -> None:
        """Take that out of the arrays of a checkpoint."""
        self.forget()
        if "target_similarities" in arrays:
            self._known = arrays.pop("target_similarities")
            self._scored_at = int(arrays.pop("target_similarities_of")[0])
