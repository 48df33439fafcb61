"""Some rows scored anew under a budget, in the place of all: `Timing(rescore="candidates")`.

Where there are scores already, an epoch measures the losses anew, given the prompt and direct, of

    some rows at random    they tell how far losses have moved since; half of them were trained on in between
    the most stale rows    those that were scored the longest ago
    rows near the cut      the nearest to it, above and below, for the rest of the budget

All other rows keep their last measured losses, moved by what those that were measured twice tell of rows like them (see
`method.rescoring`): otherwise each row that is scored anew, whose loss has fallen like all others', would lose its
place to rows that are not. Both losses are moved: that of an answer given its prompt falls with that of the answer
alone, and their ratio moves less than either. The history says of each row when it was scored (`scored_at`,
`scored_step`), and how far its losses were moved since (`cas_shift`, `das_shift`, nats per token). With a curriculum,
the cut is that of all its tiers together.

Each part of an epoch in parts (`every_steps`) has a budget of its own, a share of what training on its rows costs. Rows
that the epoch has trained on before are neither scored nor moved: no part can keep them. The next epoch moves them as
rows that were trained on.
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
from ..method.rescoring import Rescoring, moves, nearest
from ..method.schedule import EpochRows
from ..method.selection import Cherry, Policy
from ..scoring.losses import Scores
from .pool_scorer import PoolScorer

logger = get_logger(__name__)  # speaks in the main process alone


class Ages(NamedTuple):
    """When the scores of n rows were made.

    Attributes:
        scored_at: (n,) the epoch in which each row was scored.
        step: (n,) after how many updates of the run it was.
        shift: (n, 2) nats by which its losses, given the prompt and direct, were moved since.
        drawn: (n,) whether it was drawn at random, the last time that rows were scored.
        cost: tokens of the forwards of that scoring, over those of training on the rows it chose.
    """

    scored_at: np.ndarray
    step: np.ndarray
    shift: np.ndarray
    drawn: np.ndarray
    cost: float | None = None

    @classmethod
    def of_all(cls, rows: int, epoch: int, step: int) -> Ages:
        """All rows scored in one epoch, after so many updates."""
        return cls(np.full(rows, epoch), np.full(rows, step), np.zeros((rows, 2)), np.zeros(rows, dtype=bool))

    def row_columns(self, scored: np.ndarray, moved: bool) -> dict[str, Any]:
        """What the history shows of each row; nothing for rows that are not among the `scored` (n,).

        `moved`: whether losses are moved in this run.
        """
        columns = {"scored_at": _where(scored, self.scored_at)}
        if moved:
            shift = np.where(scored[:, None], self.shift, np.nan)
            columns |= {"scored_step": _where(scored, self.step), "cas_shift": shift[:, 0], "das_shift": shift[:, 1]}
        return columns

    def record(self, scored: np.ndarray, kept: np.ndarray, step: int) -> dict[str, Any]:
        """What the history says of rows that were chosen after `step` updates.

        Args:
            scored: (n,) rows with a score.
            kept: (k,) positions.
        """
        fresh = self.step == step
        return {
            "fresh": float(fresh[scored].mean()),
            "kept_fresh": float(fresh[kept].mean()),
            "oldest_scored_at": int(self.scored_at[scored].min()),
            "oldest_scored_step": int(self.step[scored].min()),
            "rescore_cost": self.cost if fresh.any() else None,
        }

    def to_arrays(self) -> dict[str, np.ndarray]:
        """What a checkpoint keeps."""
        return {
            "rows_scored_at": self.scored_at,
            "rows_scored_step": self.step,
            "loss_shift": self.shift,
            "rows_drawn": self.drawn.astype(np.int8),
        }

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> Ages | None:
        """Take that out of the arrays of a checkpoint; None where all rows were scored at once."""
        if "rows_scored_at" not in arrays:
            return None
        names = ("rows_scored_at", "rows_scored_step", "loss_shift")
        return cls(*map(arrays.pop, names), arrays.pop("rows_drawn").astype(bool))


def _where(known: np.ndarray, numbers: np.ndarray) -> pd.arrays.IntegerArray:
    """Whole numbers (n,) of rows where they are known."""
    return pd.array(pd.Series(numbers).where(known), dtype="Int64")


class Candidates:
    """Scores candidates of a pool anew.

    Args:
        pool_scorer: the pool, and the model in training.
        rule: the budget, and what it is for.
        pairs: answers that are scored under wrong prompts in each scoring, for a calibrated limit, beside the budget.
    """

    def __init__(self, pool_scorer: PoolScorer, rule: Rescoring, pairs: int = 0) -> None:
        self.pool_scorer, self.rule, self._pairs = pool_scorer, rule, pairs

    def rows_for_each(self) -> float:
        """About how many rows of mean length may be scored for each training row; reads the lengths of the pool."""
        pool = self.pool_scorer.pool
        rows = np.arange(len(pool))
        lengths, (starts, ends) = pool.lengths(rows), pool.spans(rows).T
        return self.rule.allowance(1) * lengths.mean() / (lengths + ends - starts).mean()

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
        step: int,
        ids: np.ndarray,
        *,
        trained: np.ndarray,
        used: np.ndarray,
        values: Callable[[Scores], np.ndarray],
        able: np.ndarray,
        prefix: Sequence[int],
        seed: int,
    ) -> tuple[Scores, Ages]:
        """Scores of all n rows, some of them fresh, and how old they are.

        Args:
            known: the last scores, and how old they are.
            wanted: what the epoch, or the part of one that begins, trains on.
            step: updates that were made.
            ids: (n,) of the rows.
            trained: (n,) whether a row was trained on since those scores were made.
            used: (n,) whether the epoch has trained on it in its parts before.
            values: gives what rows are ranked by, (n,).
            able: (n,) rows that may be kept, by what is known of them.
            prefix: tokens before a direct answer.
            seed: of the rows that are drawn.
        """
        pool, left = self.pool_scorer.pool, (known.ifd_status == Status.OK.value) & ~used
        lengths = pool.lengths(np.arange(len(pool)))
        costs = lengths + known.answer_tokens + len(prefix)  # of both passes
        trained_tokens = wanted.budget / pool.training_rows * lengths.sum()  # of rows of mean length
        allowance = self.rule.allowance(trained_tokens)
        self._tell_of_limit(min(self._pairs, len(pool)) * lengths.mean() / self.rule.of_training(trained_tokens))
        draw = self.rule.drawn(left, trained, ages.step, costs, allowance, ids, [seed, *wanted.seeds])
        parts = self._agreed(draw)
        last, eot = np.stack([known.cas, known.das], 1), known.eot_loss.copy()
        new, measured = np.full_like(last, np.nan), np.zeros(len(pool), dtype=bool)
        with np.errstate(divide="ignore", invalid="ignore"):
            features = np.log(np.column_stack([last, known.answer_tokens]))

        def measure(rows: np.ndarray, description: str) -> np.ndarray:
            """Measure some rows anew; both losses of all rows, (n, 2), as they have moved."""
            rows = np.sort(rows)
            scores = self.pool_scorer.scores(prefix, f"{description}, epoch {epoch}", rows)
            new[rows], eot[rows], measured[rows] = np.stack([scores.cas, scores.das], 1), scores.eot_loss, True
            moved = np.stack([moves(last[:, i], new[:, i], trained, features) for i in range(2)], 1)
            return np.where(measured[:, None], new, np.where(left[:, None], last * np.exp(moved), last))

        moved = measure(np.concatenate(parts), "Rows at random")
        ranked = values(self._scores(known, moved, eot))
        kept = max(round(wanted.ranked / pool.training_rows * len(pool)), 1)
        order = nearest(ranked, able & left & np.isfinite(ranked), kept, measured, ids)
        moved = measure(self._agreed(self.rule.near(order, costs, allowance - costs[measured].sum())), "Candidates")
        if not measured.any():
            logger.warning(
                "Epoch %d: rescore_budget=%s pays for no row, %.0f tokens of forwards, so the last scores stand.",
                *(epoch, self.rule.budget, allowance),
            )
        cost = costs[measured].sum() / self.rule.of_training(trained_tokens)
        shift = np.where(measured[:, None], 0.0, ages.shift + moved - last)
        times = np.where(measured, epoch, ages.scored_at), np.where(measured, step, ages.step)
        drawn = np.isin(np.arange(len(pool)), parts[0])
        return self._scores(known, moved, eot), Ages(*times, shift, drawn, float(cost))

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

    def _scores(self, known: Scores, losses: np.ndarray, eot_loss: np.ndarray) -> Scores:
        cas, das = losses.T
        names = [name for name in known.further if name not in OF_A_RUN]
        further = further_scores(names, {"cas": cas, "das": das})
        return Scores.from_nll(cas, das, known.answer_tokens, known.ifd_status, eot_loss, further)

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
        problem = f"measures cas and das, and {', '.join(lacking)} follows from other losses"
    elif images:
        problem = "reads text, and the rows have images"
    elif whole:
        problem = "scores answers given their prompts, and nobody can tell the answers of these rows"
    if problem is not None:
        raise UserError(f"rescore='candidates' {problem}. Set rescore='all'.")
