"""Some rows scored anew under a budget, in the place of all: `Timing(rescore="candidates")`.

Where there are scores already, an epoch measures the losses given the prompt anew, of

    some rows at random    they tell how far losses have moved since; half of them were trained on in between
    the most stale rows    those that were scored the longest ago
    rows near the cut      the nearest to it, above and below, for the rest of the budget

All other rows keep their last measured losses, moved as far as those that were measured twice have moved (see
`method.rescoring`): otherwise each row that is scored anew, whose loss has fallen like all others', would lose its
place to rows that are not. Direct losses, which move least, stay those of the scoring of all rows. The history says of
each row when it was scored (`scored_at`), and how far its loss was moved since (`cas_shift`, nats per token). With a
curriculum, the cut is that of all its tiers together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list

from ..errors import UserError
from ..method.equations import further_scores
from ..method.further_scores import OF_A_RUN, losses_read
from ..method.reasons import Status
from ..method.rescoring import Rescoring, drift, nearest
from ..method.schedule import EpochRows
from ..method.selection import Cherry, Policy
from ..scoring.losses import Scores
from .pool_scorer import PoolScorer

logger = get_logger(__name__)  # speaks in the main process alone


class Ages(NamedTuple):
    """When the scores of n rows were made.

    Attributes:
        scored_at: (n,) the epoch at whose start each row was scored.
        shift: (n,) nats by which its loss given the prompt was moved since.
        drawn: (n,) whether it was drawn at random, the last time that rows were scored.
        cost: tokens of the forwards of that scoring, over those of training on the epoch's rows.
    """

    scored_at: np.ndarray
    shift: np.ndarray
    drawn: np.ndarray
    cost: float | None = None

    @classmethod
    def of_all(cls, rows: int, epoch: int) -> Ages:
        """All rows scored in one epoch."""
        return cls(np.full(rows, epoch), np.zeros(rows), np.zeros(rows, dtype=bool))

    def row_columns(self, scored: np.ndarray, moved: bool) -> dict[str, Any]:
        """What the history shows of each row; nothing for rows that are not among the `scored` (n,).

        `moved`: whether losses are moved in this run.
        """
        at = pd.array(np.where(scored, self.scored_at, -1), dtype="Int64")
        at[~scored] = pd.NA
        return {"scored_at": at} | ({"cas_shift": np.where(scored, self.shift, np.nan)} if moved else {})

    def record(self, scored: np.ndarray, kept: np.ndarray, epoch: int) -> dict[str, Any]:
        """What the history says of an epoch: shares of the `scored` rows (n,), and of those at `kept` (k,)."""
        fresh = self.scored_at == epoch
        return {
            "fresh": float(fresh[scored].mean()),
            "kept_fresh": float(fresh[kept].mean()),
            "oldest_scored_at": int(self.scored_at[scored].min()),
            "rescore_cost": self.cost if fresh.any() else None,
        }

    def to_arrays(self) -> dict[str, np.ndarray]:
        """What a checkpoint keeps."""
        return {"rows_scored_at": self.scored_at, "cas_shift": self.shift, "rows_drawn": self.drawn.astype(np.int8)}

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> Ages | None:
        """Take that out of the arrays of a checkpoint; None where all rows were scored at once."""
        if "rows_scored_at" not in arrays:
            return None
        drawn = arrays.pop("rows_drawn").astype(bool)
        return cls(arrays.pop("rows_scored_at"), arrays.pop("cas_shift"), drawn)


class Candidates:
    """Scores candidates of a pool anew.

    Args:
        pool_scorer: the pool, and the model in training.
        rule: the budget, and what it is for.
        pairs: answers that are scored under wrong prompts in each scoring, for a calibrated limit, beside the budget.
    """

    def __init__(self, pool_scorer: PoolScorer, rule: Rescoring, pairs: int = 0) -> None:
        self.pool_scorer, self.rule, self._pairs = pool_scorer, rule, pairs

    def check(self) -> None:
        """Raise for rows of several answers, once the pool was read."""
        if self.pool_scorer.turns is not None:
            raise UserError(
                "rescore='candidates' scores rows by one answer each, and rows of the training set have several: set "
                "turns='last', or rescore='all'."
            )

    def __call__(
        self,
        known: Scores,
        ages: Ages,
        wanted: EpochRows,
        epoch: int,
        ids: np.ndarray,
        *,
        trained: np.ndarray,
        values: Callable[[Scores], np.ndarray],
        able: np.ndarray,
        prefix: Sequence[int],
        seed: int,
    ) -> tuple[Scores, Ages]:
        """Scores of all n rows, some of them fresh, and how old they are.

        Args:
            known: the last scores, and how old they are.
            wanted: what the epoch trains on.
            ids: (n,) of the rows.
            trained: (n,) whether a row was trained on since those scores were made.
            values: gives what rows are ranked by, (n,).
            able: (n,) rows that may be kept, by what is known of them.
            prefix: tokens before a direct answer.
            seed: of the rows that are drawn.
        """
        pool, ok = self.pool_scorer.pool, known.ifd_status == Status.OK.value
        lengths = pool.lengths(np.arange(len(pool)))
        trained_tokens = wanted.budget / pool.training_rows * lengths.sum()  # of rows of mean length
        allowance = self.rule.allowance(trained_tokens)
        self._tell_of_limit(min(self._pairs, len(pool)) * lengths.mean() / self.rule.of_training(trained_tokens))
        parts = self._agreed(self.rule.drawn(ok, trained, ages.scored_at, lengths, allowance, ids, [seed, epoch]))
        cas, eot, measured = known.cas.copy(), known.eot_loss.copy(), np.zeros(len(pool), dtype=bool)

        def measure(rows: np.ndarray, description: str) -> np.ndarray:
            """Measure some rows anew; losses of all rows, as they have moved."""
            rows = np.sort(rows)
            cas[rows], eot[rows] = self.pool_scorer.conditioned_losses(rows, prefix, f"{description}, epoch {epoch}")
            measured[rows] = True
            twice = np.flatnonzero(measured)
            factors = drift(known.cas[twice], cas[twice], twice, trained)
            return np.where(measured, cas, known.cas * factors)

        moved = measure(np.concatenate(parts), "Rows at random")
        ranked = values(self._scores(known, moved, eot))
        kept = max(round(wanted.ranked / pool.training_rows * len(pool)), 1)
        order = nearest(ranked, able & np.isfinite(ranked), kept, measured, ids)
        moved = measure(self._agreed(self.rule.near(order, lengths, allowance - lengths[measured].sum())), "Candidates")
        if not measured.any():
            logger.warning(
                "Epoch %d: rescore_budget=%s pays for no row, %.0f tokens of forwards, so the last scores stand.",
                *(epoch, self.rule.budget, allowance),
            )
        cost = lengths[measured].sum() / self.rule.of_training(trained_tokens)
        shift = np.where(measured, 0.0, ages.shift + moved - known.cas)
        scored_at, drawn = np.where(measured, epoch, ages.scored_at), np.isin(np.arange(len(pool)), parts[0])
        return self._scores(known, moved, eot), Ages(scored_at, shift, drawn, float(cost))

    def _tell_of_limit(self, cost: float) -> None:
        """Say, once, that measuring a calibrated limit costs more than the budget, as a share of training."""
        if cost > self.rule.budget:
            logger.warning(
                "The calibrated limit is measured in each scoring, from %d answers under wrong prompts: %.0f %% of "
                "what training on the epoch's rows costs, beside the %.0f %% of rescore_budget. A limit that is a "
                "number (max_ifd=1.0) costs nothing, and of a larger pool it is a smaller share.",
                *(self._pairs, 100 * cost, 100 * self.rule.budget),
            )
            self._pairs = 0

    def _scores(self, known: Scores, cas: np.ndarray, eot_loss: np.ndarray) -> Scores:
        names = [name for name in known.further if name not in OF_A_RUN]
        further = further_scores(names, {"cas": cas, "das": known.das})
        return Scores.from_nll(cas, known.das, known.answer_tokens, known.ifd_status, eot_loss, further)

    def _agreed(self, chosen: Any) -> Any:
        """What the main process chose: machines may round differently, and all of them score the same rows."""
        shared = [chosen]
        return broadcast_object_list(shared)[0] if self.pool_scorer.world_size > 1 else chosen


def check_candidates(
    policy: Policy, scorer: Any, further: Sequence[str], images: bool = False, whole: bool = False
) -> None:
    """Raise for runs in which `rescore="candidates"` has no meaning, or would not be what it says.

    Args:
        policy: the run's.
        scorer: another model than the one in training, or columns.
        further: names of further scores.
        images: whether rows have images.
        whole: whether nobody can tell answers, so that rows have no prompt.
    """
    problem = None
    if scorer is not None:
        problem = f"the scores of scorer={scorer!r} do not change with training: freeze_after=0 makes them once"
    elif not isinstance(policy, Cherry):
        problem = f"looks for the rows near the cut of a Cherry, and the policy is a {type(policy).__name__}"
    elif lacking := [name for name in further if losses_read([name])]:
        problem = f"measures cas alone, and {', '.join(lacking)} follows from losses other than cas and das"
    elif images:
        problem = "reads text, and the rows have images"
    elif whole:
        problem = "scores answers given their prompts, and nobody can tell the answers of these rows"
    if problem is not None:
        raise UserError(f"rescore='candidates' {problem}. Set rescore='all'.")
