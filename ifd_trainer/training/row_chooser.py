"""Which rows of a pool an epoch trains on: those of a policy by the last scores, a sample, or all.

The callback says when; what is chosen, by which scores, and what becomes of an epoch in which no row is eligible any
more is here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
from accelerate.logging import get_logger

from ..errors import UserError
from ..method.bad_cases import BadCases
from ..method.brief_experience import Brief
from ..method.calibrated_limit import CALIBRATED, CalibratedLimit
from ..method.choices import RANKED_BY
from ..method.columns import SCORES
from ..method.duplicates import representatives
from ..method.equations import loss_change
from ..method.error_rate import least_measured
from ..method.facility_location import EMBEDDING, Diverse
from ..method.further_scores import FURTHER, LOSS_CHANGE, RECENT_CHANGE
from ..method.guard import GUARD_REASONS, Guard
from ..method.iterit import ANSWER_TEXT
from ..method.lead import Lead
from ..method.number_words import many
from ..method.parts import repeated
from ..method.plain_data import to_data
from ..method.reasons import ABOVE_LIMIT, EARLIER_PART, KEPT, NOT_IN_SAMPLE, OTHER_TIER, Status
from ..method.schedule import EpochRows
from ..method.scoring_health import Health, health
from ..method.selection import (
    ROW_LIMIT,
    Cherry,
    Policy,
    Selection,
    ShortfallError,
    base,
    check_score,
    counted,
    eligibility,
    score_values,
)
from ..method.target_set import TargetSet
from ..scoring.losses import Scores
from .bad_case_losses import BadCaseLosses
from .candidate_scoring import Ages, Candidates
from .checkpoint_state import arrays_of, scores_of
from .lead_state import LeadState
from .policy_state import PolicyState
from .pool import Pool, TrainingRow
from .pool_scorer import PoolScorer
from .run_guards import PASSED, Measured, RunGuards
from .target_similarities import TargetSimilarities

logger = get_logger(__name__)  # speaks in the main process alone


class Scored(NamedTuple):
    """Scores of a pool, when they were made, what was measured with them, and what they are worth.

    `epoch` is the one in which they were made, after `step` updates of the run; `health` is that of
    `method.scoring_health`, `ages` says when single rows were scored, where that was not at once.
    """

    scores: Scores
    epoch: int
    step: int
    measured: Measured = Measured()
    health: Health | None = None
    ages: Ages | None = None

    @property
    def limit(self) -> float | None:
        """The calibrated limit that was measured with them."""
        return self.measured.limit


class RowChooser:
    """Chooses the rows of epochs, and keeps what that depends on.

    Args:
        pool_scorer: embeds prompts, for a brief experience and for a `Diverse` policy, and rows for a `TargetSet`; runs
            what guards measure.
        policy: scores to rows.
        sample: of the brief experience, if there is one.
        guard: what keeps noise out.
        further: names of the run's further scores.
        candidates: scores some rows anew, in the place of all.

    Attributes:
        last: the last scores; None before there are any.
        eligible: the last ones by which a row was eligible.
        brief: the rows of the brief experience, once they are drawn.
        trained: (n,) whether each row has been trained on.
        since: (n,) whether it has been since the last scores were made.
        first_cas: (n,) of the first scoring in the run that gave a row one, where losses are compared with it.
        tier_of: (n,) the tier of a curriculum that trained on each row last, -1 for none; None without a curriculum.
        guards: which rows are held back from the policy.
        state: what the policy knows of the run beside the scores.
        frozen: why rows are scored no more, if they are not; see `method.scoring_health.Freeze`.
        earlier: what the epoch has trained on in its parts before the one that is chosen.
        used: (n,) whether each row is among them.
        again: the training rows of a part for which no row was left, so that some of those are repeated; else None.

    Raises:
        UserError: for a limit that is measured, without a model that scores.
    """

    def __init__(
        self,
        pool_scorer: PoolScorer,
        policy: Policy,
        sample: Brief | None,
        guard: Guard | None = None,
        further: Sequence[str] = (),
        candidates: Candidates | None = None,
    ) -> None:
        # A policy of a user's own need not have these.
        self.score = getattr(policy, "score", "das" if pool_scorer.pool.whole else RANKED_BY[0])
        self.on_shortfall = getattr(policy, "on_shortfall", "error")
        self.max_ifd = getattr(policy, "max_ifd", None)
        if self.max_ifd == CALIBRATED:
            self.max_ifd = CalibratedLimit()
        check_score(self.score)
        others = pool_scorer.pool.column_names
        if isinstance(self.score, str) and self.score not in (*SCORES, *FURTHER, "answer_tokens", *others):
            raise UserError(
                f"score must be one of {', '.join((*SCORES, *FURTHER))}, a column of the training set "
                f"({', '.join(others) or 'none'}), or a function of columns, got {self.score!r}."
            )
        measured = guard.measuring if guard else []
        if self.calibrated and self.score not in RANKED_BY:
            raise UserError(f"A calibrated limit is one of {' or '.join(RANKED_BY)}, not of {self.score}.")
        if pool_scorer.other == "columns" and (self.calibrated or measured):
            what = f"guard={', '.join(measured)}" if measured else "a calibrated limit"
            raise UserError(
                f"The scores are columns of the training set (scorer='columns'), so no model measures {what}. "
                f"{'Set these to None in Guard(...).' if measured else 'Set a number: max_ifd=1.0.'}"
            )
        self.pool_scorer, self.policy, self.sample, self.further = pool_scorer, policy, sample, tuple(further)
        self.candidates = candidates
        limit = self.calibrated or (guard.limit if guard else None)
        self.guards = RunGuards(guard, limit, self.ranked_by, pool_scorer)
        self.state = _state_of(policy, pool_scorer)
        self.forget(trained=True)

    @property
    def calibrated(self) -> CalibratedLimit | None:
        """How the policy's limit is measured, if it is."""
        return self.max_ifd if isinstance(self.max_ifd, CalibratedLimit) else None

    @property
    def score_name(self) -> str:
        """What rows are ranked by, in a word."""
        return self.score if isinstance(self.score, str) else to_data(self.score)["type"]

    def values(self, scores: Scores) -> np.ndarray:
        """What rows are ranked by, (n,); NaN for rows without a score."""
        values = score_values(_Columns(scores.columns(), self.pool_scorer), self.score)
        return np.where(scores.ifd_status == Status.OK.value, values, np.nan)

    @property
    def ranked_by(self) -> str:
        """The score that limits are of: the policy's, where that is one."""
        return self.score if self.score in RANKED_BY else RANKED_BY[0]

    def forget(self, trained: bool) -> None:
        """Begin a run, with the pool as it is now.

        Args:
            trained: whether to forget which rows were trained on, too: the model that is trained knows none of them.
        """
        self.last: Scored | None = None
        self.eligible: Scored | None = None
        self.brief: np.ndarray | None = None
        self.frozen: str | None = None
        self.first_health: Health | None = None
        self.first_cas: np.ndarray | None = None
        # Of an epoch in parts: the scores that its first part was chosen by, which are of all rows, and whether some
        # row was eligible by them. Those of later parts lack the rows that the epoch has trained on, unless candidates
        # are scored among all that are known.
        self._of_all: tuple[Scored, bool] | None = None
        self.earlier: list[TrainingRow] = []
        self.used, self.again = np.zeros(len(self.pool), dtype=bool), None
        self.since = np.zeros(len(self.pool), dtype=bool)
        self._ages: Ages | None = None
        self.tier_of: np.ndarray | None = None
        self._embedded: tuple[Scores | None, np.ndarray] = None, np.empty((0, 0), dtype=np.float32)
        self.state.forget()
        if trained or len(self.trained) != len(self.pool):
            self.trained = np.zeros(len(self.pool), dtype=bool)
            self.guards.forget()

    def check_pool(self) -> None:
        """Raise for a pool that is too small for what the policy asks for, before anything is trained."""
        if self.calibrated is not None and len(self.pool) < least_measured(self.calibrated.alpha):
            self.calibrated.limit(np.ones(len(self.pool) if len(self.pool) > 1 else 0))  # says what it takes
        if self.candidates is not None:
            self.candidates.check()

    def begin(self, earlier: list[TrainingRow]) -> None:
        """The rows of an epoch are to be chosen, or those of a part of one.

        Args:
            earlier: what the epoch has trained on in the parts before.
        """
        self.earlier, self.again = earlier, None
        self.used = np.zeros(len(self.pool), dtype=bool)
        if earlier:
            self.used[np.concatenate([np.ravel(row) for row in earlier])] = True
            if self._of_all is None and self.last is not None and self.candidates is None:
                self._of_all = self.last, self.eligible is not None
        elif self._of_all is not None:
            (self.last, eligible), self._of_all = self._of_all, None
            self.eligible = self.last if eligible else None

    def rescore(
        self, wanted: EpochRows, epoch: int, step: int, ids: np.ndarray, prefix: Sequence[int], seed: int
    ) -> None:
        """Score the candidates anew, and take the scores of all rows as they then are; see `take`."""
        known = self.last.scores
        below = self._below_limit(self.policy, _Columns(known.columns(), self.pool_scorer))
        held_back = self.guards.held_back(known, ids, self.trained, False, below, self.used)
        scores, ages = self.candidates(
            *(known, self.ages, wanted, epoch, step, ids),
            trained=self.since,
            used=self.used,
            values=self.values,
            able=below & (held_back == "") & ~self._gone(wanted),
            prefix=prefix,
            seed=seed,
        )
        self.take(scores, epoch, step, ids, prefix, seed, ages)

    @property
    def ages(self) -> Ages | None:
        """When the rows were scored; None before they were."""
        if self.last is None:
            return None
        return self.last.ages or Ages.of_all(len(self.pool), self.last.epoch, self.last.step)

    def take(
        self,
        scores: Scores,
        epoch: int,
        step: int,
        ids: np.ndarray,
        prefix: Sequence[int],
        seed: int,
        ages: Ages | None = None,
    ) -> None:
        """Take new scores: measure their limits, and judge the rows that were not trained on.

        Where a policy's limit cannot be measured, the last scores by which a row was eligible stand; where the scores
        carry no information any more, those before, from now on.

        Args:
            step: updates that were made.
            prefix: tokens before a direct answer.
            ages: when each row was scored, where that was not now. Only what is fresh is judged, and what the scores
                are worth is told by the rows that were drawn at random: those near the cut are not like all others.
                How answers end is not measured again: the verdicts on that stand.

        Raises:
            UserError: where no limit can be measured, and there are no such scores, or too few rows are to be an error.
        """
        unseen, scores = self.unseen, self._compared(scores)
        judged = unseen if ages is None else unseen & (ages.step == step)
        watched = unseen if ages is None else unseen & ages.drawn
        try:
            measured = self.guards.measure(scores, ids, unseen, prefix, seed, epoch, ends=ages is None)
        except UserError as error:
            if self.eligible is None or self.on_shortfall == "error":
                raise
            self._go_back(error)
            return
        # As wrong pairs are: of one answer each.
        values = scores.of_last_answers.columns()[self.ranked_by]
        before = None if self.last is None else self.last.scores.of_last_answers.columns()[self.ranked_by]
        found = health(values, before, measured.wrong, watched)
        freeze = self.guards.guard.freeze
        if freeze is not None and self.first_health is not None:
            self.frozen = freeze.reason(found, self.first_health)
            if self.frozen:
                logger.warning(
                    "Epoch %d: %s, so this scoring carries no information. The rows are selected by the scores of "
                    "epoch %d from here on, and scored no more. A lower learning rate, or fewer epochs, may help.",
                    epoch,
                    self.frozen,
                    self.last.epoch,
                )
                return
        self.first_health = self.first_health or found
        self.guards.judge(scores, measured, judged)
        if ages is not None:
            measured = measured._replace(unfinished=self.last.measured.unfinished)
        self.last = Scored(scores, epoch, step, measured, found, ages)
        self.since &= self.used  # what the epoch has trained on was not looked at

    def _compared(self, scores: Scores) -> Scores:
        """Scores with how losses have changed, since each row's first scoring and since the one before, as asked."""
        changes = {}
        if LOSS_CHANGE in self.further:
            first = scores.cas if self.first_cas is None else self.first_cas
            self.first_cas = np.where(np.isfinite(first), first, scores.cas)
            changes[LOSS_CHANGE] = loss_change(scores.cas, self.first_cas)
        if RECENT_CHANGE in self.further:
            before = np.full(len(scores), np.nan) if self.last is None else self.last.scores.cas
            changes[RECENT_CHANGE] = loss_change(scores.cas, before)
        return replace(scores, further={**scores.further, **changes}) if changes else scores

    def take_unscored(self, rows: Scores, epoch: int, step: int) -> None:
        """Take what is known of rows that are not scored, since nothing reads their scores."""
        self.last = Scored(rows, epoch, step)

    @property
    def guard_reasons(self) -> list[str]:
        """The reasons for which guards drop rows in this run, whether or not one was."""
        on = {*self.guards.guard.names, *(["limit"] if self.guards.limit is not None else [])}
        return [reason for name, reason in GUARD_REASONS.items() if name in on]

    def row_columns(
        self, wanted: EpochRows, ids: np.ndarray, selection: Selection, values: np.ndarray, seed: int
    ) -> dict[str, np.ndarray]:
        """What the rows of an epoch have beside their scores, (n,) by column: see `training.history`.

        `values`, (n,), are what they were ranked by.
        """
        columns, rows = {}, self.without_guards(wanted, ids, seed)
        if np.isfinite(values).any():
            columns |= self.ages.row_columns(np.isfinite(values), self.candidates is not None)
        if self.score not in (*SCORES, *FURTHER) and wanted.source not in ("all", "brief"):
            columns["own_score"] = values
        if rows is not None:
            columns["kept_without_guards"] = np.isin(np.arange(len(ids)), rows)
        if wanted.source not in ("all", "brief"):
            columns |= self.state.row_columns()
        if self.guards.p_values is not None:
            columns["p_value"] = self.guards.p_values.copy()
        if self.guards.groups is not None:
            columns["duplicate_of"] = representatives(self.guards.groups, ids, selection.reasons)
        return columns

    @property
    def unseen(self) -> np.ndarray:
        """(n,) rows that the model that scores has not been trained on; another one is not trained at all."""
        return ~self.trained if self.pool_scorer.other is None else np.ones(len(self.trained), dtype=bool)

    def to_arrays(self, read_again: bool = True) -> dict[str, np.ndarray]:
        """What a checkpoint keeps beside the scores.

        `read_again`: whether an epoch to come chooses by the last scores. It then goes by the embeddings that the model
        had given with them, (candidates, d), which a model that has trained on does not give again.
        """
        arrays = {"trained": self.trained.astype(np.int8), "brief": self.brief, "first_cas": self.first_cas}
        arrays["tier_of"] = self.tier_of
        arrays |= self.guards.to_arrays()
        if self.candidates is not None:
            arrays |= {"since": self.since.astype(np.int8)}
            arrays |= {} if self.last is None or self.last.ages is None else self.last.ages.to_arrays()
        arrays |= self.state.to_arrays()
        arrays |= {} if self._of_all is None else arrays_of(self._of_all[0].scores, _OF_ALL)
        of_scores, known = self._embedded
        if read_again and known.shape[1] and self.last is not None and of_scores is self.last.scores:
            rows = np.flatnonzero(~np.isnan(known[:, 0]))
            arrays |= {"embedded": rows, "embeddings": known[rows]}
        return {name: array for name, array in arrays.items() if array is not None}

    def from_arrays(self, arrays: dict[str, np.ndarray]) -> None:
        """Take that out of the arrays of a checkpoint."""
        self.brief, self.first_cas = arrays.pop("brief", None), arrays.pop("first_cas", None)
        self.tier_of = arrays.pop("tier_of", None)
        self.trained = arrays.pop("trained", np.zeros(len(self.pool))).astype(bool)  # earlier releases lack it
        self.since = arrays.pop("since", np.zeros(len(self.pool))).astype(bool)
        self._ages = Ages.from_arrays(arrays)  # of the scores that `from_state` takes
        rows, embeddings = arrays.pop("embedded", None), arrays.pop("embeddings", None)
        if rows is not None:  # of the same scores
            known = np.full((len(self.pool), embeddings.shape[1]), np.nan, dtype=np.float32)
            known[rows] = embeddings
            self._embedded = None, known
        self.guards.from_arrays(arrays)
        self.state.from_arrays(arrays)
        of_all = {name: arrays.pop(name) for name in list(arrays) if name.startswith(_OF_ALL)}
        self._scores_of_all = scores_of(of_all, _OF_ALL)

    def to_state(self) -> dict[str, Any]:
        """What a checkpoint keeps as JSON."""
        of_all = {} if self._of_all is None else {"of_all": {**_said(self._of_all[0]), "eligible": self._of_all[1]}}
        return {
            **_said(self.last),
            "first_health": self.first_health,
            "frozen": self.frozen,
            "eligible": self.eligible is not None,
            **of_all,
            **self.state.to_state(),
        }

    def from_state(self, saved: Mapping[str, Any], scores: Scores | None) -> None:
        """Take that out of a checkpoint, with the scores that it keeps; earlier releases lack parts of it."""
        self.frozen, self.first_health = saved.get("frozen"), saved.get("first_health")
        self.state.from_state(saved, scores)
        if scores is None:
            return
        self.last = _as_said(scores, saved, self._ages)
        if (of_all := saved.get("of_all")) is not None:
            self._of_all = _as_said(self._scores_of_all, of_all), of_all["eligible"]
        self.eligible = self.last if saved.get("eligible", True) else None
        self._embedded = scores, self._embedded[1]

    @property
    def pool(self) -> Pool:
        """What is chosen from."""
        return self.pool_scorer.pool

    def choose(
        self, wanted: EpochRows, ids: np.ndarray, seed: int, begun: bool, prefix: Sequence[int] = ()
    ) -> Selection:
        """The rows of an epoch; where new scores leave none eligible, by the last ones that left some.

        A run does not end for this after hours of training. Before there are such scores (after warm-up epochs), the
        rows nearest above the limit are taken. It does end where training has not begun, and where the user wants it
        to (on_shortfall="error").

        Args:
            ids: (n,) of the pool's rows.
            seed: of repeats, and of the brief experience.
            begun: whether anything has been trained.
            prefix: tokens before a direct answer.

        Raises:
            ShortfallError: when too few rows are eligible.
        """
        if wanted.source == "all":
            return Selection.whole_pool(len(ids))
        if wanted.source == "brief":
            return self._sampled(ids, seed)
        if not self.earlier:
            return self._chosen(wanted, ids, seed, begun, prefix)
        rng = np.random.default_rng([seed, *wanted.seeds])
        try:
            selection = self._chosen(wanted, ids, seed, begun, prefix)
        except ShortfallError as error:
            if self.on_shortfall == "error":
                raise
            logger.warning("%s Rows of the epoch's parts before are repeated.", error)
            return self._earlier_again(wanted.budget, rng)
        return self._repeated_evenly(selection, rng)

    def _earlier_again(self, budget: int, rng: np.random.Generator) -> Selection:
        """Training rows of the epoch's parts before, where no other row is left to be chosen."""
        self.again = repeated(self.earlier, budget, rng)
        kept = np.concatenate([np.ravel(row) for row in self.again])
        status = self.last.scores.ifd_status
        reasons = np.where(self.used, EARLIER_PART, np.where(status == Status.OK.value, ABOVE_LIMIT, status))
        reasons[kept] = KEPT
        return Selection(kept, reasons, float("nan"), 0, budget)

    def _repeated_evenly(self, selection: Selection, rng: np.random.Generator) -> Selection:
        """The same rows; what is repeated is so from the whole epoch, no row twice before all of them once.

        Packed rows are filled with repeats as whole epochs are, and so are shares of a column's values, and rows whose
        weights say how often they are repeated.
        """
        rows = selection.rows
        missing = len(selection.kept) - len(rows)
        if not missing or self.pool.packed or base(self.policy) is not self.policy or selection.weights is not None:
            return selection
        more = np.array(repeated([*self.earlier, *rows.tolist()], missing, rng), dtype=np.int64)
        reasons = selection.reasons.copy()
        reasons[more] = np.where(reasons[more] == EARLIER_PART, KEPT, reasons[more])
        return replace(selection, kept=np.concatenate([rows, more]), reasons=reasons)

    def _chosen(self, wanted: EpochRows, ids: np.ndarray, seed: int, begun: bool, prefix: Sequence[int]) -> Selection:
        """What `choose` says, among the rows that are left of an epoch."""
        try:
            selection = self._tested(self.policy, wanted, ids, seed, prefix)
        except ShortfallError as error:
            if not begun or self.on_shortfall == "error":
                raise
            if self.eligible is None:
                logger.warning("%s The rows nearest to the limit are taken.", error)
                return self._relaxed(wanted, ids, seed, prefix)
            self._go_back(error)
            return self._tested(self.policy, wanted, ids, seed, prefix)
        self.eligible = self.last
        return selection

    def note_trained(self, times: np.ndarray) -> None:
        """An epoch has trained on each row so many times, (n,)."""
        self.trained |= times > 0
        self.since |= times > 0

    def note_tiers(self, wanted: EpochRows, selection: Selection) -> None:
        """Remember which rows an epoch takes for its tiers: those of the rows that remain come later without them."""
        if wanted.tiers:
            self.tier_of = np.full(len(self.pool), -1, dtype=np.int16) if self.tier_of is None else self.tier_of
            for number, rows in selection.parts.items():
                self.tier_of[rows] = number

    def _gone(self, wanted: EpochRows) -> np.ndarray:
        """Which rows a tier has had that is none of an epoch's, (n,)."""
        if not wanted.tiers or self.tier_of is None:
            return np.zeros(len(self.pool), dtype=bool)
        return (self.tier_of >= 0) & ~np.isin(self.tier_of, [tier.number for tier in wanted.tiers])

    def _relaxed(self, wanted: EpochRows, ids: np.ndarray, seed: int, prefix: Sequence[int]) -> Selection:
        """The rows nearest to the limit, and without guards if these leave none."""
        policy = Cherry(self.max_ifd or math.inf, self.score, on_shortfall="relax")
        try:
            return self._tested(policy, wanted, ids, seed, prefix)
        except ShortfallError as error:
            logger.warning("%s The guards are set aside for this epoch.", error)
            return self._by_scores(policy, wanted, ids, seed, guarded=False)

    def _go_back(self, error: UserError) -> None:
        """Let the last scores by which a row was eligible stand, since new ones are of no use."""
        self.last = self.eligible
        logger.warning("%s The rows are selected by the scores of epoch %d again.", error, self.last.epoch)

    def warn(self, selection: Selection, name: str) -> None:
        """Say what is odd about the rows of an epoch, or of a part of one, with this name."""
        if selection.shortfall:
            logger.warning(
                "%s: %s planned, %s eligible; %s filled (on_shortfall=%r).",
                name.capitalize(),
                many(len(selection.kept), "row is", "rows are"),
                many(selection.eligible, "is", "are"),
                many(selection.shortfall, "was", "were"),
                self.on_shortfall,
            )

    def _tested(
        self, policy: Policy, wanted: EpochRows, ids: np.ndarray, seed: int, prefix: Sequence[int]
    ) -> Selection:
        """The rows that a policy keeps, each of which has passed the pairing test, if there is one."""
        while True:
            selection = self._by_scores(policy, wanted, ids, seed)
            every = selection.kept if not wanted.tiers else np.flatnonzero(selection.tier >= 0)
            draw = int(np.random.SeedSequence([seed, *wanted.seeds]).generate_state(1)[0])
            if not self.guards.test_pairs(every, self.last.scores, ids, self.unseen, prefix, draw):
                return selection

    def without_guards(self, wanted: EpochRows, ids: np.ndarray, seed: int) -> np.ndarray | None:
        """Rows that the same scores would have given without guards, positions; None where that is not known.

        A policy of a user's own is asked once an epoch and no more; a diverse one would have to embed other rows.
        """
        guards = self.guards.limit or self.guards.guard.names
        if wanted.source in ("all", "brief") or not guards or not isinstance(base(self.policy), Cherry):
            return None
        policy = self.policy
        if self.calibrated:
            plain = replace(base(policy), max_ifd=1.0)
            policy = plain if policy is base(policy) else replace(policy, policy=plain)
        try:
            return self._by_scores(policy, wanted, ids, seed, guarded=False).rows
        except ShortfallError:
            return None

    def _by_scores(
        self, policy: Policy, wanted: EpochRows, ids: np.ndarray, seed: int, guarded: bool = True
    ) -> Selection:
        """The rows that a policy keeps of those that the guards leave it; the same scores give the same rows."""
        every = columns = _Columns(self.last.scores.columns(), self.pool_scorer)
        if policy is self.policy:
            policy = self.state.policy
            columns |= self.state.columns(self.last.scores, self.last.epoch)
        policy = policy.in_epoch(wanted.counted) if hasattr(policy, "in_epoch") else policy
        limited = eligibility(policy) is not None and self.score in RANKED_BY
        held_back = np.full(len(ids), "", dtype=object)
        if guarded:
            most, below = self._most(policy), self._below_limit(policy, columns)
            held_back = self.guards.held_back(self.last.scores, ids, self.trained, limited, below, self.used)
            verdicts, limit = self.guards.verdicts.get(ABOVE_LIMIT), self.last.limit
            if limited and verdicts is not None:
                # Of rows that failed, those that have come below the limit since are the last to be taken all the same.
                limit = -np.inf if limit is None else np.where(columns[self.ranked_by] < limit, -np.inf, limit)
                columns[ROW_LIMIT] = np.where(verdicts == PASSED, most, np.minimum(limit, most))
        held_back[self.used] = EARLIER_PART
        held_back[self._gone(wanted)] = OTHER_TIER
        rows = np.flatnonzero(held_back == "")
        columns = columns.of(rows)
        if isinstance(policy, Diverse):
            columns[EMBEDDING] = self._embeddings(policy, columns, wanted.ranked, rows, ids)

        def choose(budget: int) -> Selection:
            rng = np.random.default_rng([seed, *wanted.seeds])
            try:
                chosen = _checked(policy(columns, budget, ids=ids[rows], rng=rng), budget, len(rows), policy)
            except UserError as error:
                if len(rows) == len(ids):
                    raise
                counts = counted(held_back[held_back != ""])
                used, tiers = counts.pop(EARLIER_PART, 0), counts.pop(OTHER_TIER, 0)
                held = ", ".join(f"{count} {reason}" for reason, count in counts.items())
                guarded = f" Guards hold back {sum(counts.values())} more: {held}." if held else ""
                before = f" The epoch has trained on {used} more in its parts before." if used else ""
                before += f" Other tiers have had {tiers} more." if tiers else ""
                # What has chosen an epoch's first rows can refuse later ones only because too many are gone.
                kind = ShortfallError if used else type(error)
                raise kind(f"{error}{guarded}{before}") from error
            reasons = held_back.copy()
            reasons[rows] = chosen.reasons
            return replace(chosen, kept=rows[chosen.kept], reasons=reasons)

        selection = self.pool.choose(wanted.ranked, choose)
        if not wanted.tiers:
            return selection
        score = score_values(every, self.score)
        ranked = selection.kept[np.argsort(-score[selection.kept], kind="stable")]
        parts = self.pool.divide(ranked, [tier.rows for tier in wanted.tiers])
        tiers = {tier.number: part for tier, part in zip(wanted.tiers, parts, strict=True)}
        return selection.in_tiers(score, tiers, {tier.number for tier in wanted.tiers if tier.trained})

    def _below_limit(self, policy: Policy, columns: Mapping[str, np.ndarray]) -> np.ndarray:
        """(n,) rows below the number that a policy's limit is, as far as it is one."""
        most = self._most(policy)
        return score_values(columns, self.score) < most if np.isfinite(most) else np.ones(len(self.pool), dtype=bool)

    def _most(self, policy: Policy) -> float:
        """What scores have to be below, as far as it is a number."""
        ranks = eligibility(policy)
        return ranks.number if ranks is not None and isinstance(ranks.max_ifd, Real) else np.inf

    def _embeddings(
        self, policy: Diverse, columns: dict[str, np.ndarray], budget: int, rows: np.ndarray, ids: np.ndarray
    ) -> np.ndarray:
        """Prompt embeddings (m, d) of the candidates of a diverse selection among m rows; NaN for the others."""
        among = np.sort(policy.among(columns, budget, ids=ids[rows]))
        of_scores, known = self._embedded  # the model as it was when it scored: epochs between two scorings go by them
        if of_scores is not self.last.scores:
            known = np.empty((len(ids), 0), dtype=np.float32)
        new = rows[among] if not known.shape[1] else rows[among][np.isnan(known[rows[among], 0])]
        if len(new):
            embedded = self.pool_scorer.embeddings(new)  # (candidates, d)
            if not known.shape[1]:
                known = np.full((len(ids), embedded.shape[1]), np.nan, dtype=np.float32)
            known[new] = embedded
        self._embedded = self.last.scores, known
        embeddings = np.full((len(rows), known.shape[1]), np.nan, dtype=np.float32)
        embeddings[among] = known[rows[among]]
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


def _state_of(policy: Policy, pool_scorer: PoolScorer) -> PolicyState:
    """What is kept for a policy of a run."""
    kinds = {BadCases: BadCaseLosses, Lead: LeadState, TargetSet: TargetSimilarities}
    made = next((made for kind, made in kinds.items() if isinstance(policy, kind)), PolicyState)
    return made(policy, pool_scorer)


_OF_ALL = "of_all/"  # in the names of arrays in a checkpoint


def _said(scored: Scored | None) -> dict[str, Any]:
    """What a checkpoint keeps of a scoring as JSON."""
    return {
        "scored_at": None if scored is None else scored.epoch,
        "scored_step": None if scored is None else scored.step,
        "measured_limit": None if scored is None else scored.limit,
        "unfinished": None if scored is None else to_data(scored.measured.unfinished),
        "health": None if scored is None else scored.health,
    }


def _as_said(scores: Scores, saved: Mapping[str, Any], ages: Ages | None = None) -> Scored:
    """The scoring of which a checkpoint keeps that; earlier releases lack parts of it."""
    scored_at = saved["scored_at"] if "scored_at" in saved else saved["scores"]["epoch"]
    unfinished = saved.get("unfinished")
    measured = Measured(saved.get("measured_limit"), None, None if unfinished is None else float(unfinished))
    return Scored(scores, scored_at, saved.get("scored_step", 0), measured, saved.get("health"), ages)


class _Columns(dict):
    """The scores by column, and any other column of the data set as soon as a policy asks for it; answers as texts.

    Of all rows of a pool, or of some.
    """

    def __init__(
        self, scores: Mapping[str, np.ndarray], pool_scorer: PoolScorer, rows: np.ndarray | None = None
    ) -> None:
        super().__init__(scores)
        self._pool_scorer, self._pool, self._rows = pool_scorer, pool_scorer.pool, rows

    def of(self, rows: np.ndarray) -> _Columns:
        """Those of some rows."""
        if len(rows) == len(self._pool):
            return self
        return _Columns({name: values[rows] for name, values in self.items()}, self._pool_scorer, rows)

    def __missing__(self, name: str) -> np.ndarray:
        own = name in self._pool.column_names
        if name in FURTHER and not own:
            raise UserError(f"The score {name} was not asked for: name it, scores={(name,)!r}.")
        values = self._pool_scorer.answer_texts() if name == ANSWER_TEXT and not own else self._pool.column(name)
        self[name] = values if self._rows is None else values[self._rows]
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
    _check_weights(selection, kept, policy)
    if len(kept) != budget:
        raise UserError(
            f"The budget is {budget} rows, but {policy!r} kept {len(kept)}. A policy keeps exactly as many, some of "
            "them more than once if it has to, or raises."
        )
    return replace(selection, kept=kept, reasons=reasons)


def _check_weights(selection: Selection, kept: np.ndarray, policy: Policy) -> None:
    if selection.weights is None:
        return
    weights = np.asarray(selection.weights)
    wanted = "A weight of a Selection is a number of at least 0 for each kept row"
    if weights.shape != kept.shape or weights.dtype.kind not in "biuf":
        raise UserError(f"{wanted}, but {policy!r} gave {weights.dtype} {weights.shape} for {len(kept)} rows.")
    if not (np.isfinite(weights) & (weights >= 0)).all():
        raise UserError(f"{wanted}, but {policy!r} gave {weights[~(np.isfinite(weights) & (weights >= 0))][0]}.")
    _, place = np.unique(kept, return_inverse=True)
    last = np.empty(place.max(initial=-1) + 1)
    last[place] = weights
    if (last[place] != weights).any():
        raise UserError(f"All repeats of a row have one weight, but {policy!r} gave some rows several.")
