"""The guards of a run at work: what they measured of each scoring, and which rows they hold back.

`method.guard` says what guards there are, and what they decide from numbers; here the numbers are measured, with the
model that scores, and the verdicts are kept. A row is judged in each scoring until it is trained on: from then on its
losses say how well the model remembers it, and the last verdict stays with it. Of a row with several answers the last
one is judged: limits are measured on single answers, and one of many that is easily told is no noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list

from ..data.duplicates import duplicate_groups
from ..errors import UserError
from ..method.calibrated_limit import CalibratedLimit
from ..method.duplicates import surplus
from ..method.error_rate import least_measured
from ..method.guard import Guard
from ..method.number_words import many
from ..method.reasons import ABOVE_LIMIT, DUPLICATE, MISMATCHED, UNFINISHED, Status
from ..method.unfinished import too_little
from ..scoring.losses import Scores
from .pool_scorer import PoolScorer

logger = get_logger(__name__)  # speaks in the main process alone

UNJUDGED, PASSED, FAILED = np.int8(0), np.int8(1), np.int8(2)
_VERDICTS = {ABOVE_LIMIT: "verdicts", UNFINISHED: "verdicts_unfinished", MISMATCHED: "verdicts_mismatched"}


class Measured(NamedTuple):
    """What was measured of a scoring: the calibrated limit with the scores of the wrong pairs that it comes from, and
    the loss of an end of turn from which on an answer is unfinished."""

    limit: float | None = None
    wrong: np.ndarray | None = None
    unfinished: float | None = None


class RunGuards:
    """What keeps noise out of a run.

    Args:
        guard: which guards there are; None for none.
        limit: how the limit is measured, of the guard or of the policy itself; None where none is.
        score: the column that the limit is one of.
        pool_scorer: the pool, and the model that scores.

    Attributes:
        verdicts: by reason, (n,) whether each row passes (`PASSED`), does not (`FAILED`), or has not been judged.
        p_values: (n,) of the pairing test, NaN for rows that were not tested.
        groups: (n,) the groups of rows that say the same.
    """

    def __init__(self, guard: Guard | None, limit: CalibratedLimit | None, score: str, pool_scorer: PoolScorer) -> None:
        self.guard = guard or Guard(None, None, None, None, None, on_misaligned="warn")
        self.limit, self.score, self.pool_scorer = limit, score, pool_scorer
        self.forget()

    def forget(self) -> None:
        """Begin with a pool of which nothing is known."""
        self.verdicts: dict[str, np.ndarray] = {}
        self.p_values: np.ndarray | None = None
        self.groups: np.ndarray | None = None
        self._told_of_seen = False

    # ---- what is measured with each scoring ---------------------------------------------------------------------

    def measure(
        self,
        scores: Scores,
        ids: np.ndarray,
        unseen: np.ndarray,
        prefix: Sequence[int],
        seed: int,
        epoch: int,
        ends: bool = True,
    ) -> Measured:
        """The limits of a scoring.

        Args:
            unseen: (n,) rows that the model has not been trained on; what it says of others is memory.
            prefix: tokens before a direct answer.
            ends: whether to measure how answers end, too: of all rows, which have to be scored for it.

        Raises:
            UserError: where a limit that the policy asks for cannot be measured.
        """
        scores = scores.of_last_answers
        limit, wrong = self._measured_limit(scores, ids, unseen, prefix, seed, epoch)
        return Measured(limit, wrong, self._measured_end(scores, ids, unseen, prefix, seed, epoch) if ends else None)

    def _measured_limit(
        self, scores: Scores, ids: np.ndarray, unseen: np.ndarray, prefix: Sequence[int], seed: int, epoch: int
    ) -> tuple[float | None, np.ndarray | None]:
        if self.limit is None:
            return None, None
        scored = np.isfinite(scores.columns()[self.score])
        scored = _measured_on(scored, unseen, self.limit.pairs, least_measured(self.limit.alpha))
        candidates = self.limit.draw(ids, scored, seed, self._nearest)
        wanted = self.limit.wanted(int(scored.sum()))
        wrong = self.pool_scorer.mismatched_scores(candidates, wanted, prefix, scores.das, f"Limit, epoch {epoch}")
        wrong = wrong.columns()[self.score]
        try:
            return self.limit.limit(wrong), wrong
        except UserError as error:
            if self.guard.limit is not self.limit:
                raise
            logger.warning("Epoch %d: no limit is measured, and the one of the policy stands alone. %s", epoch, error)
            return None, wrong

    def _measured_end(
        self, scores: Scores, ids: np.ndarray, unseen: np.ndarray, prefix: Sequence[int], seed: int, epoch: int
    ) -> float | None:
        rule = self.guard.unfinished
        if rule is None:
            return None
        known = np.isfinite(scores.eot_loss)
        cut_short = int(((scores.ifd_status == Status.OK.value) & ~known).sum())
        if cut_short:
            logger.info(
                "Epoch %d: %s cut at max_length, so nobody knows how their answers end: they are not taken for "
                "unfinished.",
                epoch,
                many(cut_short, "row was", "rows were"),
            )
        known = _measured_on(known, unseen, rule.cuts, least_measured(rule.alpha))
        rows, left = rule.draw(ids, np.where(known, scores.answer_tokens, 0), seed)
        cut = self.pool_scorer.cut_losses(rows, left, prefix, f"Cut answers, epoch {epoch}")
        threshold = rule.threshold(scores.eot_loss[known], cut)
        if not known.any():
            logger.warning("Epoch %d: no end-of-turn token follows any answer: none are dropped as unfinished.", epoch)
        elif not np.isfinite(threshold):
            logger.warning("Epoch %d: none are dropped as unfinished: %s", epoch, too_little(scores.eot_loss, cut))
        return threshold

    def judge(self, scores: Scores, measured: Measured, unseen: np.ndarray) -> None:
        """Judge the rows that were not trained on, by the limits of a scoring."""
        scores = scores.of_last_answers
        values = scores.columns()[self.score]
        if measured.limit is not None:
            if ABOVE_LIMIT not in self.verdicts and not unseen.all():
                logger.warning(
                    "%s trained on before the calibrated limit could judge them: mismatched ones among them may pass. "
                    "Without warm-up epochs (warmup_epochs=0, or brief=None) it holds for all rows.",
                    many(int((~unseen).sum()), "row was", "rows were"),
                )
            # A last answer without a score, of a row that has others, passes: nothing speaks against it.
            self._judge(ABOVE_LIMIT, ~(values >= measured.limit), unseen)
        if measured.unfinished is not None:
            self._judge(UNFINISHED, ~(scores.eot_loss >= measured.unfinished), unseen)

    def _judge(self, reason: str, passes: np.ndarray, judged: np.ndarray) -> None:
        """Set the verdict of the rows that are judged now, and of those that never were."""
        verdicts = self.verdicts.setdefault(reason, np.full(len(passes), UNJUDGED))
        judged = judged | (verdicts == UNJUDGED)
        verdicts[judged] = np.where(passes[judged], PASSED, FAILED)

    # ---- which rows are held back -------------------------------------------------------------------------------

    def held_back(
        self, scores: Scores, ids: np.ndarray, trained: np.ndarray, limited: bool, below: np.ndarray, used: np.ndarray
    ) -> np.ndarray:
        """Why a policy is not to see a row, (n,) texts, "" for those that it sees.

        Args:
            trained: (n,) rows that were trained on.
            limited: whether the policy minds the limits of single rows itself.
            below: (n,) rows below the policy's limit; of duplicates one of these is left, if there is any.
            used: (n,) rows that the epoch has trained on in its parts before, instead of which none of their
                duplicates is.
        """
        ok = scores.ifd_status == Status.OK.value
        reasons = np.full(len(ids), "", dtype=object)
        for reason in _VERDICTS:
            if reason in self.verdicts and not (limited and reason == ABOVE_LIMIT):
                reasons[ok & (self.verdicts[reason] == FAILED) & (reasons == "")] = reason
        if self.guard.duplicates is not None:
            above = self.verdicts.get(ABOVE_LIMIT)
            preferred = below if above is None else below & (above != FAILED)
            usable = ok & (reasons == "")
            groups = self._duplicate_groups()
            reasons[surplus(groups, ids, usable, trained, preferred)] = DUPLICATE
            if used.any():
                reasons[usable & ~used & np.isin(groups, groups[used])] = DUPLICATE
        return reasons

    def _duplicate_groups(self) -> np.ndarray:
        if self.groups is None:
            found = [None]
            if self.pool_scorer.rank == 0:
                found = [duplicate_groups(self.pool_scorer.texts(), self.guard.duplicates.similarity)]
            self.groups = broadcast_object_list(found)[0] if self.pool_scorer.world_size > 1 else found[0]
        return self.groups

    def _nearest(self, rows: np.ndarray, k: int, among: np.ndarray | None = None) -> np.ndarray:
        """The rows with the prompts most like those of `rows`, (m, <= k); none that says the same as the row itself."""
        if self.guard.duplicates is None:
            return self.pool_scorer.nearest_prompts(rows, k, among)
        groups, found = self._duplicate_groups(), self.pool_scorer.nearest_prompts(rows, 2 * k, among)
        others = groups[found] != groups[rows][:, None]
        first = np.argsort(~others, axis=1, kind="stable")  # the others, nearest first; then those that say the same
        return np.take_along_axis(found, first, axis=1)[:, :k]

    def test_pairs(
        self, kept: np.ndarray, scores: Scores, ids: np.ndarray, unseen: np.ndarray, prefix: Sequence[int], seed: int
    ) -> bool:
        """Test rows that would be kept and were not tested before; whether some of them failed.

        Rows that the model was trained on before they could be tested pass, which is said.
        """
        rule, scores = self.guard.pairing, scores.of_last_answers
        if rule is None:
            return False
        verdicts = self.verdicts.setdefault(MISMATCHED, np.full(len(ids), UNJUDGED))
        if self.p_values is None:
            self.p_values = np.full(len(ids), np.nan)
        new = np.unique(kept)
        new = new[(verdicts[new] == UNJUDGED) & (scores.ifd_status[new] == Status.OK.value)]
        if (known := int((~unseen[new]).sum())) and not self._told_of_seen:
            self._told_of_seen = True
            logger.warning(
                "%s trained on before the pairing test could judge them: mismatched ones among them may pass. Without "
                "warm-up epochs (warmup_epochs=0, or brief=None) it holds for all rows.",
                many(known, "row was", "rows were"),
            )
        new = new[unseen[new]]
        if not len(new):
            return False
        new = new[np.argsort(np.asarray(ids)[new], kind="stable")]
        scored = np.flatnonzero(np.isfinite(scores.cas))
        scored = scored[np.argsort(np.asarray(ids)[scored], kind="stable")]
        anchors = rule.draw(new, scored, seed, self._nearest)
        losses = self.pool_scorer.paired_losses(new, anchors, rule.anchors, rule.tokens, prefix)
        self.p_values[new] = rule.p_values(*losses)
        passes = rule.passes(self.p_values[new])
        verdicts[new] = np.where(passes, PASSED, FAILED)
        return not passes.all()

    # ---- checkpoints --------------------------------------------------------------------------------------------

    def to_arrays(self) -> dict[str, np.ndarray]:
        """What a checkpoint keeps."""
        arrays = {_VERDICTS[reason]: verdicts for reason, verdicts in self.verdicts.items()}
        arrays |= {"p_values": self.p_values, "duplicate_groups": self.groups}
        return {name: array for name, array in arrays.items() if array is not None}

    def from_arrays(self, arrays: dict[str, np.ndarray]) -> None:
        """Take that out of the arrays of a checkpoint."""
        verdicts = {reason: arrays.pop(name, None) for reason, name in _VERDICTS.items()}
        self.verdicts = {reason: array.astype(np.int8) for reason, array in verdicts.items() if array is not None}
        self.p_values, self.groups = arrays.pop("p_values", None), arrays.pop("duplicate_groups", None)


def _measured_on(rows: np.ndarray, unseen: np.ndarray, wanted: int, least: int) -> np.ndarray:
    """Rows to measure on, (n,) bool: those of `rows` that the model was not trained on, as long as there are enough.

    What was trained on has lower losses under any prompt: a limit of such rows would be too strict for the others.
    """
    enough = (rows & unseen).sum() >= max(least, min(wanted, rows.sum() / 2))
    return rows & unseen if enough else rows
