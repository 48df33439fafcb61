"""Which rows of a pool an epoch trains on: those of a policy by the last scores, a sample, or all.

The callback says when; what is chosen, by which scores, and what becomes of an epoch in which no row is eligible any
more is here.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ..errors import UserError
from ..method.brief_experience import Brief
from ..method.calibrated_limit import CalibratedLimit
from ..method.choices import RANKED_BY
from ..method.facility_location import EMBEDDING, Diverse
from ..method.reasons import NOT_IN_SAMPLE, Status
from ..method.schedule import EpochRows
from ..method.selection import ROW_LIMIT, Cherry, Policy, Selection, ShortfallError
from ..scoring.losses import Scores
from .pool import Pool
from .pool_scorer import PoolScorer

logger = logging.getLogger(__name__)

UNJUDGED, PASSED, FAILED = np.int8(0), np.int8(1), np.int8(2)


class Scored(NamedTuple):
    """Scores of a pool, the epoch at whose start they were made, and the limit that was measured with them."""

    scores: Scores
    epoch: int
    limit: float | None = None


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
        verdicts: (n,) of a calibrated limit: whether each row is below it (`PASSED`), is not (`FAILED`), or has not
            been judged. A row is judged in each scoring until it is trained on: from then on its score says how well
            the model remembers it, and the last verdict stays with it.
        trained: (n,) whether each row has been trained on.

    Raises:
        UserError: for a calibrated limit without a model that scores.
    """

    def __init__(self, pool_scorer: PoolScorer, policy: Policy, sample: Brief | None) -> None:
        # A policy of a user's own need not have these.
        self.score = getattr(policy, "score", RANKED_BY[0])
        self.max_ifd = getattr(policy, "max_ifd", None)
        self.on_shortfall = getattr(policy, "on_shortfall", "error")
        if isinstance(self.max_ifd, CalibratedLimit) and pool_scorer.other == "columns":
            raise UserError(
                "The scores are columns of the training set (scorer='columns'), so no model measures a calibrated "
                "limit. Set a number: max_ifd=1.0."
            )
        self.pool_scorer, self.policy, self.sample = pool_scorer, policy, sample
        self.forget()

    def forget(self) -> None:
        """Begin as in a new run, with the pool as it is now."""
        self.last: Scored | None = None
        self.eligible: Scored | None = None
        self.brief: np.ndarray | None = None
        self.verdicts: np.ndarray | None = None
        self.trained = np.zeros(len(self.pool), dtype=bool)

    def take(self, scores: Scores, epoch: int, ids: np.ndarray, prefix: Sequence[int], seed: int) -> None:
        """Take new scores; with a calibrated limit measure it, and judge the rows that were not trained on.

        Args:
            prefix: tokens before a direct answer.
        """
        if not isinstance(self.max_ifd, CalibratedLimit):
            self.last = Scored(scores, epoch)
            return
        values, calibrated = scores.columns()[self.score], self.max_ifd
        pairs = calibrated.draw(ids, np.isfinite(values), seed)
        wrong = self.pool_scorer.mismatched_scores(pairs, prefix, f"Limit, epoch {epoch}")
        limit = calibrated.limit(wrong.columns()[self.score])
        if self.verdicts is None:
            self.verdicts = np.full(len(ids), UNJUDGED)
            if self.trained.any():
                logger.warning(
                    "%d rows were trained on before the calibrated limit could judge them: mismatched ones among them "
                    "may pass. Leave warmup_epochs at 0 for a limit that holds for all rows.",
                    self.trained.sum(),
                )
        judged = ~self.trained | (self.verdicts == UNJUDGED)
        self.verdicts[judged] = np.where(values[judged] < limit, PASSED, FAILED)
        self.last = Scored(scores, epoch, limit)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """What a checkpoint keeps beside the scores."""
        arrays = {"trained": self.trained.astype(np.int8), "brief": self.brief, "verdicts": self.verdicts}
        return {name: array for name, array in arrays.items() if array is not None}

    def from_arrays(self, arrays: dict[str, np.ndarray]) -> None:
        """Take that out of the arrays of a checkpoint."""
        self.brief, verdicts = arrays.pop("brief", None), arrays.pop("verdicts", None)
        self.verdicts = None if verdicts is None else verdicts.astype(np.int8)
        self.trained = arrays.pop("trained", np.zeros(len(self.pool))).astype(bool)  # earlier releases lack it

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
        selection = self._chosen(wanted, ids, seed, begun)
        self.trained[selection.kept] = True
        return selection

    def _chosen(self, wanted: EpochRows, ids: np.ndarray, seed: int, begun: bool) -> Selection:
        if wanted.source == "all":
            return Selection.whole_pool(len(ids))
        if wanted.source == "brief":
            return self._sampled(ids, seed)
        try:
            selection = self._by_scores(self.policy, wanted, ids, seed)
        except ShortfallError as error:
            if not begun or self.on_shortfall == "error":
                raise
            if self.eligible is None:
                logger.warning("%s The rows nearest to the limit are taken.", error)
                relaxed = Cherry(self.max_ifd or math.inf, self.score, on_shortfall="relax")
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
            values = self.last.scores.columns()[self.score][scored]
            if len(values) and np.mean(values >= 1) > share:
                logger.warning(
                    "Epoch %d: %.0f %% of the scored rows have %s >= 1, that is, their prompt does not help. Is the "
                    "prompt format one the model knows? A chat template on a base model has this effect.",
                    epoch,
                    100 * np.mean(values >= 1),
                    self.score,
                )
        if selection.shortfall:
            logger.warning(
                "Epoch %d: %d rows are planned, %d are eligible; %d were filled (on_shortfall=%r).",
                epoch,
                len(selection.kept),
                selection.eligible,
                selection.shortfall,
                self.on_shortfall,
            )

    def _by_scores(self, policy: Policy, wanted: EpochRows, ids: np.ndarray, seed: int) -> Selection:
        """The rows that a policy keeps; the same scores give the same rows."""
        columns = self.last.scores.columns()
        if self.verdicts is not None:
            columns[ROW_LIMIT] = np.where(self.verdicts == PASSED, np.inf, -np.inf)
        if isinstance(policy, Diverse):
            columns[EMBEDDING] = self._embeddings(policy, columns, wanted.ranked, ids)

        def choose(rows: int) -> Selection:
            rng = np.random.default_rng([seed, wanted.selected_in])
            return _checked(policy(columns, rows, ids=ids, rng=rng), rows, policy)

        selection = self.pool.choose(wanted.ranked, choose)
        if not wanted.tiers:
            return selection
        score = columns[self.score]
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


def _checked(selection: Any, budget: int, policy: Policy) -> Selection:
    """What a policy gave, if it is a selection of exactly so many rows: the steps of an epoch are planned for them."""
    if not isinstance(selection, Selection):
        raise UserError(f"A policy returns an ifd_trainer.Selection, but {policy!r} returned {selection!r}.")
    if len(selection.kept) != budget:
        raise UserError(
            f"The budget is {budget} rows, but {policy!r} kept {len(selection.kept)}. A policy keeps exactly as many, "
            "some of them more than once if it has to, or raises."
        )
    return selection
