"""LEAD (arXiv 2505.07437): what to train on next by the losses of the training itself, without scoring rows again.

Each row has a utility u, its conditioned loss as far as it is known: that of the one scoring before training, and after
an epoch that trained on it

    u  <-  (1 - b) (l + m) + b u          l: its loss in the forward that trained on it;  b: the smoothing
    m  =   mean over the epoch's rows of (l - u)

(l is of all trained tokens, the end of turn among them, which u begins without; m makes up for that in the mean).

Losses fall while an epoch runs. In shuffled order a row is trained on halfway through it in the mean, so that m, how
far losses had fallen by then, is about how far they fall from there to the epoch's end.

Rows are in groups of like difficulty. An epoch draws a group, by the chances of a multi-armed bandit (EXP3), and trains
on its rows with the highest utility:

    p_g  =   (1 - e) w_g / sum w + e / K                           K groups;  e: the exploration
    w_g  <-  w_g exp(e r_g / (K p_g))                              for a group that was trained on
    r_g  =   mean over its rows of (u before - u after), put in [-1, 1] by the least and the largest one so far

Where we differ from the published program: it draws one group a round and takes a share of it, here the budget is
exact, so that a group with too few rows is followed by the next one that is drawn; it estimates m by a first-order
approximation from earlier epochs' mean losses and the change of the weights of a LoRA's last layer, here m is read off
the losses; it divides groups by task as well, here a column of one's own may do that in their place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..errors import UserError
from .number_types import is_number, is_whole
from .reasons import BELOW_CUT, OTHER_GROUP, TRAINED_ENOUGH
from .selection import Selection, coded, reasons_of, repeats, rows_with_loss

UTILITY, GROUP, TIMES = "lead_utility", "lead_group", "lead_times"  # columns that a run gives the policy


@dataclass(frozen=True)
class Lead:
    """Rows of a group that a bandit draws, those with the highest utility first; see the module.

    In a run, an epoch is a round: many short ones (`num_train_epochs=40, keep=0.02`) let it learn. The pool is scored
    once (`freeze_after=0`).

    Args:
        by: a column whose values are the groups; None for groups of equal size by IFD in the scoring.
        groups: how many of these.
        explore: share of the chances that is the same for all groups, in (0, 1].
        smoothing: share of a utility that is what it was, in [0, 1).
        most: how often a row is trained on before others are.
        chances: of the groups, as a run has them; the same for all by default.

    >>> columns = {"cas": np.array([1.0, 3.0, 2.0]), "ifd_status": np.full(3, "ok")}
    >>> columns |= {"lead_group": np.array([0, 1, 1])}
    >>> selection = Lead(groups=2, chances=(0.1, 0.9))(columns, budget=1, rng=np.random.default_rng(0))
    >>> selection.kept.tolist(), selection.reasons.tolist()
    ([1], ['other_group', 'kept', 'below_cut'])
    """

    score: ClassVar[str] = "cas"
    reads_train_losses: ClassVar[bool] = True

    by: str | None = None
    groups: int = 7
    explore: float = 0.1
    smoothing: float = 0.1
    most: int = 4
    chances: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.by is not None and not (isinstance(self.by, str) and self.by):
            raise UserError(f"by is the name of a column, or None for groups by IFD, got {self.by!r}.")
        for name, least in (("groups", 2), ("most", 1)):
            if not (is_whole(number := getattr(self, name)) and number >= least):
                raise UserError(f"{name} is a whole number of at least {least}, got {number!r}.")
        if not (is_number(self.explore) and 0 < self.explore <= 1):
            raise UserError(f"explore is a share above 0 and at most 1, got {self.explore!r}.")
        if not (is_number(self.smoothing) and 0 <= self.smoothing < 1):
            raise UserError(f"smoothing is a share from 0 to below 1, got {self.smoothing!r}.")

    def divided(self, ifd: np.ndarray, values: np.ndarray | None = None) -> tuple[list[str], np.ndarray]:
        """Names of the groups, and which one each row is in (n,), -1 for rows without a score.

        Args:
            ifd: (n,) of the scoring before training, NaN without a score.
            values: (n,) of the column `by`, where there is one.

        >>> Lead(groups=2).divided(np.array([0.9, np.nan, 0.2, 0.5, 0.7]))
        (['1', '2'], array([ 1, -1,  0,  0,  1]))
        """
        if values is not None:
            texts, codes = coded(values)
            return texts.tolist(), np.where(np.isfinite(ifd), codes, -1)
        rows = np.flatnonzero(np.isfinite(ifd))
        rows, count = rows[np.argsort(ifd[rows], kind="stable")], min(self.groups, max(len(rows), 1))
        codes = np.full(len(ifd), -1)
        codes[rows] = np.arange(len(rows)) * count // max(len(rows), 1)
        return [str(number + 1) for number in range(count)], codes

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
            columns: arrays (n,): `ifd_status` and `cas`, and as a run has them `lead_utility` (`cas` by default),
                `lead_group` (one group by default) and `lead_times`, how often each row was trained on.
            budget, ids: as for `Cherry`.
            rng: draws the groups; seed 0 by default.

        Returns:
            The selection, in the order in which rows were taken. Of the rows that are not kept, those of a group that
            was not needed have the reason `other_group`, others that had their turns `trained_enough`.

        Raises:
            ShortfallError: when no row has a utility.
        """
        rng = np.random.default_rng(0) if rng is None else rng
        status = np.asarray(columns["ifd_status"], dtype=object)
        utility = np.asarray(columns.get(UTILITY, columns["cas"]), dtype=np.float64)
        group = np.asarray(columns.get(GROUP, np.zeros(len(status), dtype=np.int64)))
        times = np.asarray(columns.get(TIMES, np.zeros(len(status), dtype=np.int64)))
        ids = np.arange(len(status)) if ids is None else np.asarray(ids)
        rows = rows_with_loss(status, np.where(group >= 0, utility, np.nan), budget)
        chances = self._chances(int(group.max()) + 1)
        turn = np.empty(len(chances), dtype=np.int64)  # when each group has its turn
        turn[rng.choice(len(chances), len(chances), replace=False, p=chances)] = np.arange(len(chances))
        enough = times >= self.most
        # Rows that had their turns come after all others, those with the fewest first.
        late = np.where(enough, times, 0)[rows]
        order = rows[np.lexsort((ids[rows], -utility[rows], turn[group[rows]], late))]
        kept = order[:budget]
        again = repeats(kept, budget - len(kept), rng)
        reached = np.isin(group, group[kept])
        dropped = np.where(enough, TRAINED_ENOUGH, np.where(reached, BELOW_CUT, OTHER_GROUP))[rows]
        reasons = reasons_of(status, rows, dropped, kept)
        cut = float(utility[kept].min())
        return Selection(np.concatenate([kept, again]), reasons, cut, len(rows), len(again))

    def _chances(self, groups: int) -> np.ndarray:
        if self.chances is None:
            return np.full(groups, 1 / groups)
        return np.asarray(self.chances, dtype=np.float64)


def chances(weights: np.ndarray, explore: float) -> np.ndarray:
    """Chances (K,) of groups with these weights (K,) of EXP3.

    >>> chances(np.array([3.0, 1.0]), 0.2).round(3).tolist()
    [0.7, 0.3]
    """
    return (1 - explore) * weights / weights.sum() + explore / len(weights)


def rewarded(weights: np.ndarray, of: np.ndarray, rewards: np.ndarray, explore: float) -> np.ndarray:
    """Weights (K,) of EXP3 after an epoch.

    Args:
        of: (K,) chances by which the groups were drawn.
        rewards: (K,) from -1 to 1, NaN for a group that was not trained on.

    >>> rewarded(np.ones(2), np.array([0.5, 0.5]), np.array([np.nan, 1.0]), 0.2).round(3).tolist()
    [0.819, 1.0]
    """
    grown = weights * np.exp(explore * np.nan_to_num(rewards) / (len(weights) * of))
    return grown / grown.max()  # their ratios are all that counts, and they may not grow without end


def learned(utility: np.ndarray, losses: np.ndarray, smoothing: float) -> np.ndarray:
    """Utilities (n,) after an epoch that trained on the rows with losses (n,), NaN for the others.

    >>> learned(np.array([2.0, 3.0, 1.0]), np.array([1.8, np.nan, 0.6]), smoothing=0.0).round(6).tolist()
    [1.5, 3.0, 0.3]
    """
    trained = np.isfinite(losses) & np.isfinite(utility)
    moved = (losses - utility)[trained].mean() if trained.any() else 0.0
    return np.where(trained, (1 - smoothing) * (losses + moved) + smoothing * utility, utility)
