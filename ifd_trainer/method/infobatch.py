"""InfoBatch (arXiv 2303.04947): rows with a low loss are pruned at random, and those that stay count for the others.

The paper prunes each row whose loss is below the mean with a probability r, and multiplies the loss of those that it
keeps by 1/(1 - r), so that the expected sum of gradients is that of all rows. Here the budget is exact. Of n eligible
rows, a of them with a loss of at least the mean, b are kept:

    b > a     all a rows, each with weight 1; b - a of the n - a others, drawn evenly, each with (n - a)/(b - a)
    b <= a    b of all n rows, drawn evenly, each with n/b
    b > n     all n rows, some of them repeated; a row that is trained on k times has 1/k in each

A row's weight is one over its probability to be kept, so in each case

    E[ sum over kept rows of w_i g_i ]  =  sum over all n rows of g_i        for any g_i of a row, such as its gradient.

A batch of the kept rows therefore has n/b times the mean gradient of all rows, in b/n of the steps, as in the paper.
The equation is exact for sums. A loss that is divided by the tokens of its batch, as trainers do, follows it exactly
where rows have equally many of these, else as closely as batches are alike in them.

Where we differ: the paper takes the loss of a row from the last time that it was trained on, here it is that of the
last scoring; and its last epochs are on all rows, which is the schedule `Anneal`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .choices import Score
from .reasons import NOT_DRAWN
from .selection import OwnScore, Selection, check_score, reasons_of, repeats, rows_with_loss, score_values


@dataclass(frozen=True)
class InfoBatch:
    """Rows below the mean loss are drawn, the others kept, with weights in the loss that keep gradients unbiased.

    Args:
        score: what is held against its mean, higher is harder: `cas`, the loss of the answer given its prompt, or
            another column, or a function of columns. Rows without a number are not eligible.

    >>> columns = {"cas": np.array([3.0, 1.0, 1.1, 0.9]), "ifd_status": np.full(4, "ok")}
    >>> selection = InfoBatch()(columns, budget=2, rng=np.random.default_rng(0))
    >>> selection.kept[0].item(), selection.weights.tolist(), selection.reasons.tolist().count("not_drawn")
    (0, [1.0, 3.0], 2)
    """

    gives_weights: ClassVar[bool] = True

    score: Score | OwnScore = "cas"

    def __post_init__(self) -> None:
        check_score(self.score)

    def __call__(
        self,
        columns: Mapping[str, np.ndarray],
        budget: int,
        *,
        ids: np.ndarray | None = None,
        rng: np.random.Generator | None = None,
    ) -> Selection:
        """Select `budget` of n rows.

        Args:
            columns: arrays (n,): what `score` reads, and `ifd_status`.
            budget: number of rows to train on, at least 1.
            ids: (n,) row ids: the same draw whatever order the rows stand in; positions by default.
            rng: of the draw; seed 0 by default.

        Returns:
            The selection with its weights, highest score first; `not_drawn` is the reason of eligible rows that were
            not kept.

        Raises:
            ShortfallError: when no row is eligible.
        """
        rng = np.random.default_rng(0) if rng is None else rng
        status, score = np.asarray(columns["ifd_status"], dtype=object), score_values(columns, self.score)
        rows = rows_with_loss(status, score, budget)
        rows = rows if ids is None else rows[np.argsort(np.asarray(ids)[rows], kind="stable")]
        above = score[rows] >= score[rows].mean()
        kept, weights = _drawn(rows, above, budget, rng)
        order = np.argsort(-score[kept], kind="stable")
        kept, weights = kept[order], weights[order]
        again = repeats(kept, budget - len(kept), rng)
        if len(again):
            times = np.bincount(np.concatenate([kept, again]), minlength=len(status))
            kept = np.concatenate([kept, again])
            weights = 1 / times[kept]
        reasons = reasons_of(status, rows, NOT_DRAWN, kept)
        return Selection(kept, reasons, float(score[kept].min()), len(rows), len(again), weights=weights)


def _drawn(rows: np.ndarray, above: np.ndarray, budget: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """At most `budget` of n rows, and their weights; `above`, (n,) bool, says which have at least the mean."""
    sure = rows[above] if budget > above.sum() else rows[:0]
    others = rows[~above] if budget > above.sum() else rows
    drawn = others[rng.permutation(len(others))[: budget - len(sure)]]
    weights = np.ones(len(sure) + len(drawn))
    weights[len(sure) :] = len(others) / max(len(drawn), 1)
    return np.concatenate([sure, drawn]), weights
