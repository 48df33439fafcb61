"""Which rows of a pool an epoch trains on: those of a policy by the last scores, a sample, or all.

The callback says when; what is chosen, by which scores, and what becomes of an epoch in which no row is eligible any
more is here.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from ..errors import UserError
from ..method.brief_experience import Brief
from ..method.calibrated_limit import CALIBRATED, CalibratedLimit
from ..method.choices import RANKED_BY
from ..method.columns import SCORES
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
        self.on_shortfall = getattr(policy, "on_shortfall", "error")
        self.max_ifd = getattr(policy, "max_ifd", None)
        if self.max_ifd == CALIBRATED:
            self.max_ifd = CalibratedLimit()
        if self.score not in SCORES:
            raise UserError(f"score must be one of {', '.join(SCORES)}, but {policy!r} has {self.score!r}.")
        if self.calibrated and self.score not in RANKED_BY:
            raise UserError(f"A calibrated limit is one of {' or '.join(RANKED_BY)}, not of {self.score}.")
        if self.calibrated and pool_scorer.other == "columns":
            raise UserError(
                "The scores are columns of the training set (scorer='columns'), so no model measures a calibrated "
                "limit. Set a number: max_ifd=1.0."
            )
        self.pool_scorer, self.policy, self.sample = pool_scorer, policy, sample
        self.verdicts: np.ndarray | None = None
        self.forget(trained=True)

    @property
    def calibrated(self) -> CalibratedLimit | None:
        """How the limit is measured, if it is."""
        return self.max_ifd if isinstance(self.max_ifd, CalibratedLimit) else None

    def forget(self, trained: bool) -> None:
        """Begin a run, with the pool as it is now.

        Args:
            trained: whether to forget which rows were trained on, too: the model that is trained knows none of them.
        """
        self.last: Scored | None = None
        self.eligible: Scored | None = None
        self.brief: np.ndarray | None = None
        if trained or len(self.trained) != len(self.pool):
            self.verdicts, self.trained = None, np.zeros(len(self.pool), dtype=bool)

    def take(self, scores: Scores, epoch: int, ids: np.ndarray, prefix: Sequence[int], seed: int) -> None:
        """Take new scores; with a calibrated limit measure it, and judge the rows that were not trained on.

        Where no limit can be measured, the last scores by which a row was eligible stand.

        Args:
            prefix: tokens before a direct answer.

        Raises:
            UserError: where no limit can be measured, and there are no such scores, or too few rows are to be an error.
        """
        if self.calibrated is None:
            self.last = Scored(scores, epoch)
            return
        values = scores.columns()[self.score]
        scored = np.isfinite(values)
        candidates, wanted = self.calibrated.draw(ids, scored, seed), self.calibrated.wanted(int(scored.sum()))
        wrong = self.pool_scorer.mismatched_scores(candidates, wanted, prefix, f"Limit, epoch {epoch}")
        try:
            limit = self.calibrated.limit(wrong.columns()[self.score])
        except UserError as error:
            if self.eligible is None or self.on_shortfall == "error":
                raise
            self._go_back(error)
            return
        # What another model says of a row does not change with what this one is trained on.
        knows = self.trained if self.pool_scorer.other is None else np.zeros(len(ids), dtype=bool)
        if self.verdicts is None:
            self.verdicts = np.full(len(ids), UNJUDGED)
            if knows.any() and self.pool_scorer.trainer.is_world_process_zero():
                logger.warning(
                    "%d rows were trained on before the calibrated limit could judge them: mismatched ones among them "
                    "may pass. Without warm-up epochs (warmup_epochs=0, or brief=None) it holds for all rows.",
                    knows.sum(),
                )
        judged = ~knows | (self.verdicts == UNJUDGED)
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
                score = self.score if self.score in RANKED_BY else RANKED_BY[0]
                relaxed = Cherry(self.max_ifd or math.inf, score, on_shortfall="relax")
                return self._by_scores(relaxed, wanted, ids, seed)
            self._go_back(error)
            return self._by_scores(self.policy, wanted, ids, seed)
        self.eligible = self.last
        return selection

    def _go_back(self, error: UserError) -> None:
        """Let the last scores by which a row was eligible stand, since new ones are of no use."""
        self.last = self.eligible
        logger.warning("%s The rows are selected by the scores of epoch %d again.", error, self.last.epoch)

    def warn(self, selection: Selection, epoch: int, share: float) -> None:
        """Say what is odd about the rows of an epoch.

        Args:
            share: of the scored rows; a larger one with scores of 1 or more is odd.
        """
        if self.last is not None and self.last.epoch == epoch and self.score in RANKED_BY:  # once for each scoring
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
        columns = _Columns(self.last.scores.columns(), self.pool)
        if self.verdicts is not None:
            # Of rows that failed, those that have come below the limit since are the last to be taken all the same.
            below = np.where(columns[self.score] < self.last.limit, -np.inf, self.last.limit)
            columns[ROW_LIMIT] = np.where(self.verdicts == PASSED, np.inf, below)
        if isinstance(policy, Diverse):
            columns[EMBEDDING] = self._embeddings(policy, columns, wanted.ranked, ids)

        def choose(rows: int) -> Selection:
            rng = np.random.default_rng([seed, wanted.selected_in])
            return _checked(policy(columns, rows, ids=ids, rng=rng), rows, len(ids), policy)

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


class _Columns(dict):
    """The scores by column, and any other column of the data set as soon as a policy asks for it."""

    def __init__(self, scores: dict[str, np.ndarray], pool: Pool) -> None:
        super().__init__(scores)
        self._pool = pool

    def __missing__(self, name: str) -> np.ndarray:
        self[name] = self._pool.column(name)
        return self[name]


def _checked(selection: Any, budget: int, rows: int, policy: Policy) -> Selection:
    """What a policy gave, if it is a selection of exactly so many rows: the steps of an epoch are planned for them."""
    if not isinstance(selection, Selection):
        raise UserError(f"A policy returns an ifd_trainer.Selection, but {policy!r} returned {selection!r}.")
    kept, reasons = np.asarray(selection.kept), np.asarray(selection.reasons)
    if kept.ndim != 1 or kept.dtype.kind not in "iu" or (len(kept) and not 0 <= kept.min() <= kept.max() < rows):
        raise UserError(
            f"`kept` of a Selection are positions, whole numbers from 0 to {rows - 1}, but {policy!r} kept {kept}."
        )
    if reasons.shape != (rows,):
        raise UserError(f"A Selection has a reason for each of {rows} rows, but {policy!r} gave {reasons.shape}.")
    if len(kept) != budget:
        raise UserError(
            f"The budget is {budget} rows, but {policy!r} kept {len(kept)}. A policy keeps exactly as many, some of "
            "them more than once if it has to, or raises."
        )
    return replace(selection, kept=kept, reasons=reasons)
