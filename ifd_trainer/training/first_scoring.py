"""What a few rows tell before all of them are scored for the first time, and before anything is trained.

Whether the prompts help the model at all: with a template that it does not know, most IFDs are above 1, and hours of
scoring would tell no more than the first rows do. And whether the scores of another model, or of columns, rank rows as
the model in training would: on a sample, by both.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from accelerate.logging import get_logger

from ..errors import UserError
from ..method.choices import RANKED_BY
from ..method.number_words import many
from ..method.scoring_health import rank_correlation
from ..scoring.losses import Scores
from .options import Scoring
from .pool_scorer import PoolScorer

logger = get_logger(__name__)  # speaks in the main process alone

_TRUSTED = 0.5  # rank correlation from which on scores of another model are taken without a warning
_LARGE = 10  # times as many rows as are tried: in a smaller pool, all of them are scored at once


@dataclass(frozen=True)
class FirstScoring:
    """The first scoring of a run.

    Args:
        pool_scorer: the pool, the model that scores, and the one in training.
        stops: whether a run ends where most prompts do not help: before it has trained, and if the user wants it to.
        scoring: how many rows are tried, and which share of them is odd.
        score: the column that rows are ranked by; None for a score of one's own.
        prefix: tokens before a direct answer.
        seed: of the sample.
    """

    pool_scorer: PoolScorer
    stops: bool
    scoring: Scoring
    score: str | None
    prefix: Sequence[int]
    seed: int

    def try_out(self) -> None:
        """Score a sample of a large pool, to see whether prompts help; of another, `look_at` sees it in time.

        Raises:
            UserError: where most prompts do not help, and that is to be an error.
        """
        if len(self.pool_scorer.pool) >= _LARGE * self.scoring.tried_rows and self.pool_scorer.other != "columns":
            self._check_aligned(self.pool_scorer.scores(self.prefix, "First rows", self._sample()))

    def look_at(self, scores: Scores, keep: float) -> dict[str, Any]:
        """What the scores of the whole pool tell, for the history.

        Args:
            keep: share of the rows that the epoch trains on.

        Raises:
            UserError: as for `try_out`.
        """
        self._check_aligned(scores)
        if self.pool_scorer.other is None:
            return {}
        sample = self._sample()
        score = self.score or RANKED_BY[0]
        own = self.pool_scorer.scores(self.prefix, "Proxy check", sample, own=True).columns()[score]
        return self._held_against(own, scores.columns()[score][sample], keep)

    def _sample(self) -> np.ndarray:
        rows = len(self.pool_scorer.pool)
        return np.sort(np.random.default_rng(self.seed).permutation(rows)[: self.scoring.tried_rows])

    def _check_aligned(self, scores: Scores) -> None:
        if self.score not in RANKED_BY:  # 1 means nothing for it
            return
        values = scores.columns()[self.score]
        values = values[np.isfinite(values)]
        share = np.mean(values >= 1) if len(values) else 0.0
        if share <= self.scoring.warn_share:
            return
        tokenizer = self.pool_scorer.encoder.tokenizer
        template = "chat template" if getattr(tokenizer, "chat_template", None) else "prompt format"
        message = (
            f"{100 * share:.0f} % of {many(len(values), 'scored row')} have {self.score} >= 1, that is, their prompt "
            f"does not help the model. Most likely it does not know this {template} (a chat template on a base model "
            f"has this effect); or what stands before a direct answer is not the rows' response header (it is "
            f"{tokenizer.decode(self.prefix)!r}; header= sets it); or prompts and answers do not belong together."
        )
        if self.stops:
            raise UserError(
                f"{message} Nothing was trained. To go on all the same: guard=Guard(on_misaligned='warn'), in a recipe "
                "on_misaligned: warn; or let the model learn the format first, with warmup_epochs=1."
            )
        logger.warning("%s", message)

    def _held_against(self, own: np.ndarray, proxy: np.ndarray, keep: float) -> dict[str, Any]:
        """How the scores of another model, or of columns, agree with those of the model in training on the sample."""
        both = np.isfinite(own) & np.isfinite(proxy)
        top = max(round(keep * both.sum()), 1)
        best = [set(np.argsort(-values[both], kind="stable")[:top].tolist()) for values in (own, proxy)]
        rho = rank_correlation(own, proxy)
        found = {
            "proxy_rows": int(both.sum()),
            "proxy_rank_correlation": rho,
            "proxy_overlap": len(best[0] & best[1]) / top if both.any() else None,
        }
        if both.any():
            trusted = rho is not None and rho >= _TRUSTED
            of = "the training set's columns" if self.pool_scorer.other == "columns" else self.pool_scorer.name
            logger.log(
                logging.INFO if trusted else logging.WARNING,
                "%s",
                f"Scores of {of} against those of the model in training, on {many(int(both.sum()), 'row')}: rank "
                f"correlation {'unknown' if rho is None else format(rho, '.2f')}, {100 * found['proxy_overlap']:.0f} % "
                f"of the {top} highest are the same."
                f"{'' if trusted else ' They rank rows otherwise than the model would.'}",
            )
        return found
