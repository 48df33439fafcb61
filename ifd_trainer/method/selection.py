"""Scores to kept rows: pure, seeded, each dropped row with its reason.

A policy is a frozen dataclass that maps score columns and a budget to a `Selection`. It sees nothing but arrays, so
ten million rows cost a sort.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import pandas as pd

from ..errors import UserError
from .calibrated_limit import CALIBRATED, CalibratedLimit
from .choices import RANKED_BY, SHORTFALLS, Score, Shortfall
from .number_types import is_number
from .number_words import many
from .reasons import ABOVE_LIMIT, BELOW_CUT, KEPT, OTHER_TIER, RELAXED, Status

OwnScore = Callable[[Mapping[str, np.ndarray]], np.ndarray]  # columns, each (n,), to what rows are ranked by, (n,)
ROW_LIMIT = "row_limit"  # a column of limits for single rows, in the place of the policy's


class Policy(Protocol):
    """Anything that maps score columns and a budget to a `Selection`: `Cherry`, `Diverse`, or one of your own.

    What it has of these attributes is used: `score`, the column that it ranks by ("ifd" without it), `max_ifd` (a
    limit, or a `CalibratedLimit` to measure one), `on_shortfall` ("error": too few rows end the run), `reads_scores`
    (False: it needs statuses, answer lengths and columns of the data set alone, and the pool is not scored for it),
    `reads` (names of further scores that it needs), `gives_weights` (True: its rows may weigh differently in the loss,
    so that a trainer in which they cannot is refused at once), `in_epoch(epoch)` (the policy of that epoch, where they
    differ).

    >>> def hardest(columns, budget, *, ids=None, rng=None):
    ...     kept = np.argsort(-np.nan_to_num(columns["cas"], nan=-np.inf), kind="stable")[:budget]
    ...     return Selection.without_scores(kept, len(columns["cas"]), reason="easier")
    >>> hardest({"cas": np.array([0.5, 2.0, np.nan])}, budget=1).reasons.tolist()
    ['easier', 'kept', 'easier']
    """

    def __call__(
        self,
        columns: Mapping[str, np.ndarray],
        budget: int,
        *,
        ids: np.ndarray | None = None,
        rng: np.random.Generator | None = None,
    ) -> Selection: ...


def base(policy: Policy) -> Policy:
    """The policy that says which rows are eligible: another one's, where that takes its order.

    >>> from ifd_trainer import Stratified
    >>> base(Stratified("source", policy=Cherry(0.9)))
    Cherry(max_ifd=0.9, score='ifd', on_shortfall='repeat')
    """
    return getattr(policy, "policy", policy)


def eligibility(policy: Policy) -> Cherry | None:
    """What says which rows a policy may keep: itself, or the `candidates` of it; None where it has no such rule."""
    policy = base(policy)
    found = policy if isinstance(policy, Cherry) else getattr(policy, "candidates", None)
    return found if isinstance(found, Cherry) else None


class ShortfallError(UserError):
    """Fewer eligible rows than the budget asks for."""


@dataclass(frozen=True)
class Selection:
    """What a policy decided about n rows.

    Attributes:
        kept: (budget,) positions to train on, highest score first; a row occurs more than once only after a
            shortfall, the repeats behind the first pass.
        reasons: (n,) `kept`, `kept_above_limit`, `above_limit`, `below_cut`, or the status of an unscorable row.
        cut: lowest score kept.
        eligible: number of rows that were scorable and under the limit.
        shortfall: budget minus eligible, 0 if there were enough.
        tier: (n,) the number of each row's tier in a curriculum, -1 for a row in none; None without a curriculum.
        parts: of a curriculum, `kept` by the number of the tier, the one with the highest scores first.
        weights: (budget,) what the loss of each kept row is multiplied by in training, at least 0, the same for all
            repeats of a row; None where all are 1. See `training.row_weights`.
    """

    kept: np.ndarray
    reasons: np.ndarray
    cut: float
    eligible: int
    shortfall: int
    tier: np.ndarray | None = None
    parts: Mapping[int, np.ndarray] = field(default_factory=dict)
    weights: np.ndarray | None = None

    @classmethod
    def whole_pool(cls, rows: int) -> Selection:
        """All rows of a pool, whatever their scores."""
        return cls(np.arange(rows), np.full(rows, KEPT, dtype=object), float("nan"), rows, 0)

    @classmethod
    def without_scores(cls, kept: np.ndarray, rows: int, reason: str) -> Selection:
        """The rows `kept`, chosen otherwise than by a score; the others are dropped for one reason."""
        reasons = np.full(rows, reason, dtype=object)
        reasons[kept] = KEPT
        return cls(kept, reasons, float("nan"), rows, 0)

    def in_tiers(self, score: np.ndarray, tiers: Mapping[int, np.ndarray], trained: Collection[int]) -> Selection:
        """Only the kept rows in some of the tiers.

        Args:
            score: (n,) what was ranked by.
            tiers: kept positions by number of the tier, the one with the highest scores first. A row that is repeated
                may be in several; a kept row in none is dropped like the ones below the cut.
            trained: numbers of the tiers to keep.
        """
        parts = {number: part for number, part in tiers.items() if number in trained}
        kept, chosen = np.concatenate(list(parts.values())), np.concatenate(list(tiers.values()))
        reasons, tier = self.reasons.copy(), np.full(len(self.reasons), -1)
        left = np.setdiff1d(self.kept, chosen)
        reasons[left] = np.where(reasons[left] == RELAXED, ABOVE_LIMIT, BELOW_CUT)
        reasons[np.setdiff1d(chosen, kept)] = OTHER_TIER
        for number in sorted(tiers, key=lambda number: (number in trained, -number)):  # the last one stands
            tier[tiers[number]] = number
        by_row = self.row_weights
        weights = None if by_row is None else by_row[kept]
        cut = float(score[kept].min())
        return replace(self, kept=kept, reasons=reasons, cut=cut, tier=tier, parts=parts, weights=weights)

    @property
    def rows(self) -> np.ndarray:
        """Positions kept, each once, highest score first."""
        _, first = np.unique(self.kept, return_index=True)
        return self.kept[np.sort(first)]

    @property
    def row_weights(self) -> np.ndarray | None:
        """(n,) what the loss of each row is multiplied by, NaN for rows that are not kept; None where all are 1."""
        if self.weights is None or (np.asarray(self.weights) == 1).all():
            return None
        weights = np.full(len(self.reasons), np.nan)
        weights[self.kept] = self.weights
        return weights


@dataclass(frozen=True)
class Cherry:
    """Keep the rows with the highest IFD under a limit: the paper's "cherry" samples.

    A row is eligible when its status is `ok` and its score < `max_ifd`; of these the highest `budget` are kept. Ties
    are broken by row id, lowest first. Source: arXiv 2308.12032, section 2.3.

    Args:
        max_ifd: rows at or above are dropped, their prompt does not help; `float("inf")` switches this off. A
            `CalibratedLimit`, or "calibrated" for its defaults, is measured in each scoring of a run.
        score: the column to rank by, "ifd" or "ifd_ppl"; or one of your own, highest kept: the name of a column of the
            data set (a reward model's, say), or a function of columns. These have no limit unless `max_ifd` is set.
        on_shortfall: what to do with fewer eligible rows than the budget. "repeat" repeats eligible rows, each as
            often as any other give or take one, chosen by the seed; "relax" fills with rows at or above the limit,
            the nearest first; "error" raises.

    >>> columns = {"ifd": np.array([0.2, 0.9, 1.3]), "ifd_status": np.array(["ok", "ok", "ok"])}
    >>> selection = Cherry()(columns, budget=1)
    >>> selection.kept.tolist(), selection.reasons.tolist()
    ([1], ['below_cut', 'kept', 'above_limit'])
    """

    max_ifd: float | CalibratedLimit = 1.0
    score: Score | OwnScore = "ifd"
    on_shortfall: Shortfall = "repeat"

    def __post_init__(self) -> None:
        if self.max_ifd == CALIBRATED:
            object.__setattr__(self, "max_ifd", CalibratedLimit())
        number = is_number(self.max_ifd)
        if not isinstance(self.max_ifd, CalibratedLimit) and not (number and self.max_ifd > 0):
            raise UserError(
                f"max_ifd must be positive, got {self.max_ifd!r}; for no limit give infinity, inf, for one that is "
                "measured 'calibrated'."
            )
        check_score(self.score)
        if self.on_shortfall not in SHORTFALLS:
            raise UserError(f"on_shortfall must be 'repeat', 'relax' or 'error', got {self.on_shortfall!r}.")

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
            columns: arrays (n,): the score column, NaN for none, and `ifd_status`; and, if there is one, `row_limit`,
                limits of single rows in the place of `max_ifd`.
            budget: number of rows to train on, at least 1.
            ids: (n,) row ids that break ties; positions by default.
            rng: chooses what is repeated after a shortfall; seed 0 by default.

        Raises:
            ShortfallError: when no row is eligible (with "relax": has a score), or on a shortfall with "error".
        """
        check_rows_wanted(budget)
        score = score_values(columns, self.score)
        statuses, codes = coded(columns["ifd_status"])
        ids = np.arange(len(score)) if ids is None else np.asarray(ids)
        ok = (statuses == Status.OK.value)[codes]
        scored = ok & np.isfinite(score)
        of_rows = columns.get(ROW_LIMIT)
        eligible = scored & (score < (self.number if of_rows is None else of_rows))
        nearest = -score if of_rows is None else of_rows - score
        count = int(eligible.sum())
        shortfall = max(budget - count, 0)
        fillable = count or (self.on_shortfall == "relax" and scored.any())
        if shortfall and (self.on_shortfall == "error" or not fillable):
            unscored = dict(zip(statuses, np.bincount(codes[~scored], minlength=len(statuses)).tolist(), strict=True))
            measured = of_rows is not None or isinstance(self.max_ifd, CalibratedLimit)
            raise ShortfallError(self._explain(budget, eligible, scored, unscored, measured))
        kept = best_rows(score, ids, eligible, budget)
        relaxed = best_rows(nearest, ids, scored & ~eligible, shortfall) if self.on_shortfall == "relax" else kept[:0]
        kept = np.concatenate([kept, relaxed])
        kept = np.concatenate([kept, repeats(kept, budget - len(kept), rng)])
        names = [*statuses, Status.NONFINITE.value, ABOVE_LIMIT, BELOW_CUT, KEPT, RELAXED]
        reason = codes.copy()
        for code, rows in enumerate((ok & ~scored, scored, eligible, kept, relaxed), start=len(statuses)):
            reason[rows] = code
        reasons = np.array(names, dtype=object)[reason]
        return Selection(kept, reasons, float(score[kept].min()), count, shortfall)

    @property
    def number(self) -> float:
        """The limit.

        Raises:
            UserError: for one that is to be measured.
        """
        if isinstance(self.max_ifd, CalibratedLimit):
            raise UserError("A calibrated limit is measured with a model; here max_ifd has to be a number.")
        return math.inf if self.max_ifd == 1.0 and self.score not in RANKED_BY else self.max_ifd

    def _explain(
        self, budget: int, eligible: np.ndarray, scored: np.ndarray, unscored: dict[str, int], measured: bool
    ) -> str:
        why = ", ".join(f"{count} {status}" for status, count in unscored.items() if count)
        limit, raised = ("the calibrated limit", "alpha") if measured else (self.max_ifd, "max_ifd")
        name = getattr(self.score, "__name__", self.score)
        off = "guard=Guard(limit=None)" if measured else "max_ifd=float('inf')"
        off = "max_ifd=1.0" if isinstance(self.max_ifd, CalibratedLimit) else off
        return (
            f"{many(budget, 'row is', 'rows are')} to be kept, but only {eligible.sum()} of {len(scored)} are "
            f"eligible: {many(int((~scored).sum()), 'has', 'have')} no score and "
            f"{many(int((scored & ~eligible).sum()), 'has', 'have')} {name} >= {limit}. "
            f"{f'Without a score: {why}. ' if why else ''}"
            f"Lower `keep`, raise `{raised}` ({off} switches the limit off), or look at the prompt format: with a "
            "chat template that the model was not trained on, prompts often do not help."
        )


class AmongCandidates:
    """What policies share that choose among the rows which a `Cherry` would rank: its fields `max_ifd`, `score` and
    `on_shortfall` are theirs."""

    max_ifd: float | CalibratedLimit
    score: Score | OwnScore
    on_shortfall: Shortfall

    @property
    def candidates(self) -> Cherry:
        """The policy that says which rows are eligible, and ranks them."""
        return Cherry(self.max_ifd, self.score, self.on_shortfall)

    def check_candidates(self) -> None:
        """Refuse what `Cherry` refuses; "calibrated" becomes a `CalibratedLimit`."""
        object.__setattr__(self, "max_ifd", self.candidates.max_ifd)


def coded(values: np.ndarray | pd.Series | pd.Categorical) -> tuple[np.ndarray, np.ndarray]:
    """The different texts of an array (k,), as objects, and for each of its n values which of them it is (n,).

    Ten million statuses are a handful of texts: what is computed on the numbers makes no Python object for each row.

    >>> texts, codes = coded(np.array(["ok", "failed", "ok"]))
    >>> texts[codes].tolist()
    ['ok', 'failed', 'ok']
    """
    values = values if isinstance(values, (pd.Series, pd.Categorical)) else np.asarray(values, dtype=object)
    codes, texts = pd.factorize(values, use_na_sentinel=False)
    return np.asarray(texts, dtype=object).astype(str).astype(object), codes


def counted(values: np.ndarray | pd.Series | pd.Categorical) -> dict[str, int]:
    """How often each text is in an array.

    >>> counted(np.array(["ok", "failed", "ok"]))
    {'ok': 2, 'failed': 1}
    """
    texts, codes = coded(values)
    return dict(zip(texts.tolist(), np.bincount(codes, minlength=len(texts)).tolist(), strict=True))


def check_score(score: Score | OwnScore) -> None:
    """Raise for what can be no score: neither the name of a column nor a function of columns."""
    if not (isinstance(score, str) and score) and (not callable(score) or isinstance(score, type)):
        raise UserError(
            f"score must be {', '.join(map(repr, RANKED_BY))}, the name of another column, or a function of columns, "
            f"got {score!r}."
        )


def score_values(columns: Mapping[str, np.ndarray], score: Score | OwnScore) -> np.ndarray:
    """What rows are ranked by, (n,) float64: a column, or what a function makes of columns.

    Raises:
        UserError: for a function that gives something else.

    >>> columns = {"das": np.array([2.0, 3.0]), "cas": np.array([1.0, 2.5]), "ifd_status": np.array(["ok", "ok"])}
    >>> score_values(columns, lambda of: of["das"] - of["cas"])
    array([1. , 0.5])
    """
    if isinstance(score, str):
        return np.asarray(columns[score], dtype=np.float64)
    values, rows = np.asarray(score(columns)), len(columns["ifd_status"])
    if values.shape != (rows,) or values.dtype.kind not in "biuf":
        raise UserError(
            f"A score is one number for each of {rows} rows, but {score!r} gave {values.dtype} {values.shape}."
        )
    return values.astype(np.float64)


def best_rows(score: np.ndarray, ids: np.ndarray, mask: np.ndarray, count: int) -> np.ndarray:
    """At most `count` positions under the mask, highest score first, ties by id; no others are sorted.

    >>> best_rows(np.array([0.5, 0.9, 0.5]), np.array([7, 8, 6]), np.array([True, True, True]), 2).tolist()
    [1, 2]
    """
    positions = np.flatnonzero(mask) if count else np.flatnonzero(())
    if count < len(positions):
        cut = np.partition(score[positions], len(positions) - count)[len(positions) - count]
        positions = positions[score[positions] >= cut]
    return positions[np.lexsort((ids[positions], -score[positions]))][:count]


def check_rows_wanted(budget: int) -> None:
    """Raise for a budget of no rows."""
    if budget < 1:
        raise UserError(f"The budget must be at least one row, got {budget}.")


def rows_with_loss(status: np.ndarray, loss: np.ndarray, budget: int) -> np.ndarray:
    """Positions of the rows with a score and a finite loss, (m,), for a policy that minds no limit.

    Args:
        status: (n,) of each row.
        loss: (n,) what it ranks by.
        budget: rows that are to be kept, for the message.

    Raises:
        ShortfallError: without one.

    >>> rows_with_loss(np.array(["ok", "ok", "too_long"]), np.array([1.0, np.nan, np.nan]), budget=1).tolist()
    [0]
    """
    check_rows_wanted(budget)
    rows = np.flatnonzero((status == Status.OK.value) & np.isfinite(loss))
    if not len(rows):
        raise ShortfallError(f"{many(budget, 'row is', 'rows are')} to be kept, but none of {len(status)} has a loss.")
    return rows


def reasons_of(status: np.ndarray, rows: np.ndarray, dropped: str | np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Why rows were kept or not, (n,) texts.

    Args:
        status: (n,) of each row.
        rows: (m,) positions of those with a number to rank by; others with a score have the reason `nonfinite`.
        dropped: the reason of those that are not kept, one for all or (m,).
        kept: positions.

    >>> reasons_of(np.array(["ok", "ok", "too_long"], dtype=object), np.array([0, 1]), "hidden", np.array([1])).tolist()
    ['hidden', 'kept', 'too_long']
    """
    reasons = status.copy()
    reasons[status == Status.OK.value] = Status.NONFINITE.value
    reasons[rows] = dropped
    reasons[kept] = KEPT
    return reasons


def repeats(rows: np.ndarray, missing: int, rng: np.random.Generator | None) -> np.ndarray:
    """`missing` repeats of `rows`, each as often as any other give or take one."""
    if missing <= 0:
        return rows[:0]
    rng = rng or np.random.default_rng(0)
    rounds, rest = divmod(missing, len(rows))
    return np.concatenate([np.tile(rows, rounds), rows[np.sort(rng.permutation(len(rows))[:rest])]])
