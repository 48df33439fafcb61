"""Which rows of a pool an epoch trains on: those of a policy by the last scores, a sample, or all.

The callback says when; what is chosen, by which scores, and what becomes of an epoch in which no row is eligible any
more is here.
"""

from __future__ import annotations

import logging
from typing import NamedTuple

import numpy as np

from ..method.brief_experience import Brief
from ..method.facility_location import EMBEDDING, Diverse
from ..method.reasons import NOT_IN_SAMPLE, Status
from ..method.schedule import EpochRows
from ..method.selection import Cherry, Selection, ShortfallError
from ..scoring.losses import Scores
from .pool import Pool
from .pool_scorer import PoolScorer

logger = logging.getLogger(__name__)


class Scored(NamedTuple):
    """Scores of a pool, and the epoch at whose start they were made."""

    scores: Scores
    epoch: int


class RowChooser:
    """Chooses the rows of epochs, and keeps what that depends on.

    Args:
        pool_scorer: embeds prompts, for a brief experience and for a `Diverse` policy.
        policy: scores to rows.
        sample: of the brief experience, if there is one.

    Attributes:
        last: the last scores; None before there are any.
        eligible: the last ones by which a row was eligible.
        brief: the rows of the brief experience, once they are drawn.
    """

    def __init__(self, pool_scorer: PoolScorer, policy: Cherry | Diverse, sample: Brief | None) -> None:
        self.pool_scorer, self.policy, self.sample = pool_scorer, policy, sample
        self.forget()

    def forget(self) -> None:
        """Begin as in a new run."""
        self.last: Scored | None = None
        self.eligible: Scored | None = None
        self.brief: np.ndarray | None = None

    @property
    def pool(self) -> Pool:
        """What is chosen from."""
        return self.pool_scorer.pool

    def choose(self, wanted: EpochRows, ids: np.ndarray, seed: int, begun: bool) -> Selection:
        """The rows of an epoch; where new scores leave none eligible, by the last ones that left some.

        A run does not end for this after hours of training. Before there are such scores (after warm-up epochs), the
        rows nearest above the limit are taken. It does end where training has not begun, and where the user wants it
        to (on_shortfall="error").

        Args:
            ids: (n,) of the pool's rows.
            seed: of repeats, and of the brief experience.
            begun: whether anything has been trained.

        Raises:
            ShortfallError: when too few rows are eligible.
        """
        if wanted.source == "all":
            return Selection.whole_pool(len(ids))
        if wanted.source == "brief":
            return self._sampled(ids, seed)
        try:
            selection = self._by_scores(self.policy, wanted, ids, seed)
        except ShortfallError as error:
            if not begun or self.policy.on_shortfall == "error":
                raise
            if self.eligible is None:
                logger.warning("%s The rows nearest to the limit are taken.", error)
                relaxed = Cherry(self.policy.max_ifd, self.policy.score, on_shortfall="relax")
                return self._by_scores(relaxed, wanted, ids, seed)
            self.last = self.eligible
            logger.warning("%s The rows are selected by the scores of epoch %d again.", error, self.last.epoch)
            return self._by_scores(self.policy, wanted, ids, seed)
        self.eligible = self.last
        return selection

    def warn(self, selection: Selection, epoch: int, share: float) -> None:
        """Say what is odd about the rows of an epoch.

        Args:
            share: of the scored rows; a larger one with scores of 1 or more is odd.
        """
        if self.last is not None and self.last.epoch == epoch:  # once for each scoring
            scored = self.last.scores.ifd_status == Status.OK.value
            values = self.last.scores.columns()[self.policy.score][scored]
            if len(values) and np.mean(values >= 1) > share:
                logger.warning(
                    "Epoch %d: %.0f %% of the scored rows have %s >= 1, that is, their prompt does not help. Is the "
                    "prompt format one the model knows? A chat template on a base model has this effect.",
                    epoch,
                    100 * np.mean(values >= 1),
                    self.policy.score,
                )
        if selection.shortfall:
            logger.warning(
                "Epoch %d: %d rows are planned, %d are eligible; %d were filled (on_shortfall=%r).",
                epoch,
                len(selection.kept),
                selection.eligible,
                selection.shortfall,
                self.policy.on_shortfall,
            )

    def _by_scores(self, policy: Cherry | Diverse, wanted: EpochRows, ids: np.ndarray, seed: int) -> Selection:
        """The rows that a policy keeps; the same scores give the same rows."""
        columns = self.last.scores.columns()
        if isinstance(policy, Diverse):
            columns[EMBEDDING] = self._embeddings(policy, columns, wanted.ranked, ids)

        def choose(rows: int) -> Selection:
            rng = np.random.default_rng([seed, wanted.selected_in])
            return policy(columns, rows, ids=ids, rng=rng)

        selection = self.pool.choose(wanted.ranked, choose)
        if not wanted.tiers:
            return selection
        score = columns[policy.score]
        ranked = selection.kept[np.argsort(-score[selection.kept], kind="stable")]
        parts = self.pool.divide(ranked, [tier.rows for tier in wanted.tiers])
        tiers = {tier.number: part for tier, part in zip(wanted.tiers, parts, strict=True)}
        return selection.in_tiers(score, tiers, {tier.number for tier in wanted.tiers if tier.trained})

    def _embeddings(self, policy: Diverse, columns: dict[str, np.ndarray], budget: int, ids: np.ndarray) -> np.ndarray:
        """Prompt embeddings (n, d) of the candidates of a diverse selection; NaN for the other rows."""
        rows = np.sort(policy.among(columns, budget, ids=ids))
        embedded = self.pool_scorer.embeddings(rows)  # (candidates, d)
        embeddings = np.full((len(ids), embedded.shape[1]), np.nan, dtype=np.float32)
        embeddings[rows] = embedded
        return embeddings

    def _sampled(self, ids: np.ndarray, seed: int) -> Selection:
        """The rows of the brief experience, chosen by the model as it is now."""
        if self.brief is None:
            embeddings, perplexity = None, self.pool.has_answer().astype(np.float64)
            perplexity[perplexity == 0] = np.nan
            if self.sample.method == "kmeans":
                embeddings, perplexity = self.pool_scorer.features(description="Prompts, brief experience")
            self.brief = self.sample(embeddings, perplexity, ids=ids, seed=seed)
        return Selection.without_scores(self.brief, len(self.pool), NOT_IN_SAMPLE)
