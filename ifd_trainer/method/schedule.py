"""How many rows each epoch trains on (its budget), and the plan of steps that follows from it.

Budgets are known before training: a Trainer fixes its number of steps, its learning rate schedule and its progress
bar before the first epoch, so an epoch cannot be found shorter later on without ending the schedule early.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from ..errors import UserError
from .brief_experience import Brief
from .choices import DIRECTIONS, RESCORES, TIER_MODES, Direction, Rescore, TierMode
from .number_types import is_whole
from .number_words import many
from .rescoring import check_budget


class Schedule(Protocol):
    """Anything that says how many rows of a pool an epoch trains on; `divide`, if there is one, in which tiers."""

    def budget(self, epoch: int, pool: int) -> int: ...


class Tier(NamedTuple):
    """One tier of a curriculum, as an epoch sees it.

    Attributes:
        number: 0 for the tier that the curriculum begins with.
        rows: its size.
        trained: whether the epoch trains on it.
    """

    number: int
    rows: int
    trained: bool


@dataclass(frozen=True)
class EpochRows:
    """Which rows one epoch trains on.

    Attributes:
        budget: how many.
        source: "selected" now, the "same" as in the epoch before, "all" of the pool, scorable or not, or the "brief"
            experience's sample.
        scored: whether the pool is scored with the model as it is; if not, the last scores stand.
        tiers: of a curriculum, the tier with the highest scores first; the rows are those of the tiers that are
            `trained`, of `budget` rows together. Without tiers, the rows are the ones with the highest scores.
        selected_in: the epoch that selects these rows; an earlier one for the "same" rows.
        counted: that epoch as schedules and policies count: from the start anew, where there is one.
        part: of an epoch in parts, which of them these rows are of, 1 for the first; see `method.parts`.
    """

    budget: int
    source: Literal["selected", "same", "all", "brief"] = "selected"
    scored: bool = True
    tiers: tuple[Tier, ...] = ()
    selected_in: int = 0
    counted: int = 0
    part: int = 1

    @property
    def seeds(self) -> tuple[int, ...]:
        """What tells draws for these rows from others with the same seed: the epoch, and a part after the first."""
        return (self.selected_in,) if self.part == 1 else (self.selected_in, self.part)

    @property
    def ranked(self) -> int:
        """Rows with the highest scores that this epoch's are among: those of all tiers."""
        return sum(tier.rows for tier in self.tiers) or self.budget


@dataclass(frozen=True)
class Constant:
    """The same budget in every epoch: a float is a fraction of the pool, an int a number of rows.

    >>> Constant(0.1).budget(epoch=3, pool=52002)
    5200
    """

    keep: float | int

    def __post_init__(self) -> None:
        _check(self.keep)

    def budget(self, epoch: int, pool: int) -> int:
        return _rows(self.keep, pool)


@dataclass(frozen=True)
class PerEpoch:
    """One budget for each epoch; the last one stands for all epochs after it.

    >>> [PerEpoch((1.0, 0.5, 10)).budget(epoch, pool=100) for epoch in range(4)]
    [100, 50, 10, 10]
    """

    keep: tuple[float | int, ...]

    def __post_init__(self) -> None:
        if not self.keep:
            raise UserError("keep is an empty list; give one entry per epoch, e.g. keep=[1.0, 0.5, 0.1].")
        for entry in self.keep:
            _check(entry)

    def budget(self, epoch: int, pool: int) -> int:
        return _rows(self.keep[min(epoch, len(self.keep) - 1)], pool)


@dataclass(frozen=True)
class Curriculum:
    """Tiers of the rows with the highest scores, one after the other, from easy to hard or from hard to easy.

    Of the pool, the `keep` rows with the highest scores are divided by score into `tiers` parts of equal size, give or
    take one row. Stage s (0, 1, ..., tiers - 1; each takes `epochs_per_tier` epochs, the last one all that remain)
    trains on

        mode "tiers":      tier s alone
        mode "growing":    tiers 0 to s
        mode "shrinking":  tiers s to the last
        mode "remaining":  tier s alone, of the rows that no tier before it had

    where tier 0 is the easiest ("easy_to_hard") or the hardest ("hard_to_easy").

    With packing, rows are packed rows: the examples go by their scores, each tier takes as many as fill its packed
    rows, and no packed row holds examples of two tiers. As each tier is packed by itself, a few examples with the
    lowest scores, which would fit if all `keep` rows were packed together, are left out ("below_cut"): 0.02 to 0.7 %
    of the tokens in trials with 2,000 to 52,000 log-normal lengths in 3 to 5 tiers. See `PackedPool.divide`.

    In the first three modes an epoch divides all rows by its own scores, so that where rows are scored anew one may be
    in two tiers, and another in none. In mode "remaining" an epoch divides the rows that are left into the tiers that
    are left: no row is trained on twice, and with keep=1.0 each is once (the hierarchies of FedDQC, arXiv 2410.11540).

    >>> curriculum = Curriculum(keep=30, tiers=3, mode="growing")
    >>> [curriculum.budget(epoch, pool=100) for epoch in range(4)]
    [10, 20, 30, 30]
    """

    keep: float | int = 1.0
    tiers: int = 3
    direction: Direction = "easy_to_hard"
    mode: TierMode = "tiers"
    epochs_per_tier: int = 1

    def __post_init__(self) -> None:
        _check(self.keep)
        if self.direction not in DIRECTIONS:
            raise UserError(f"direction must be 'easy_to_hard' or 'hard_to_easy', got {self.direction!r}.")
        if self.mode not in TIER_MODES:
            raise UserError(f"mode must be {', '.join(map(repr, TIER_MODES))}, got {self.mode!r}.")
        if self.tiers < 1 or self.epochs_per_tier < 1:
            raise UserError(
                f"tiers and epochs_per_tier must be at least 1, got {self.tiers} and {self.epochs_per_tier}."
            )
        if self.mode == "remaining" and self.epochs_per_tier > 1:
            raise UserError("In mode 'remaining' each tier takes one epoch: leave epochs_per_tier at 1.")

    def budget(self, epoch: int, pool: int) -> int:
        return sum(tier.rows for tier in self.divide(epoch, pool) if tier.trained)

    def divide(self, epoch: int, pool: int) -> tuple[Tier, ...]:
        """The tiers, the one with the highest scores first, and which of them an epoch trains on."""
        ranked = _rows(self.keep, pool)
        if ranked < self.tiers:
            raise UserError(
                f"{many(ranked, 'row')} cannot be divided into {self.tiers} tiers; raise keep or lower tiers."
            )
        stage = min(epoch // self.epochs_per_tier, self.tiers - 1)
        first = 0 if self.mode == "growing" else stage
        last = self.tiers - 1 if self.mode == "shrinking" else stage
        tiers = []
        for rank in range(self.tiers):  # 0 has the highest scores
            number = self.tiers - 1 - rank if self.direction == "easy_to_hard" else rank
            if self.mode == "remaining" and number < stage:
                continue  # its rows were trained on
            rows = (rank + 1) * ranked // self.tiers - rank * ranked // self.tiers
            tiers.append(Tier(number, rows, first <= number <= last))
        return tuple(tiers)


@dataclass(frozen=True)
class Anneal:
    """Another schedule, and the whole pool for the last share of the epochs (at least one epoch).

    Source: the annealing of InfoBatch (arXiv 2303.04947), which trains on the full set at the end.

    Args:
        schedule: a schedule, or what `keep` takes.
        share: of the epochs, in (0, 1]; rounded, but one epoch at least.

    >>> Anneal(0.1, share=0.25).full_from(epochs=4)
    3
    """

    schedule: Schedule | float | int
    share: float = 0.2

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise UserError(f"share must be in (0, 1], got {self.share}.")
        object.__setattr__(self, "schedule", as_schedule(self.schedule))

    def budget(self, epoch: int, pool: int) -> int:
        return self.schedule.budget(epoch, pool)

    def full_from(self, epochs: int) -> int:
        """The first epoch that trains on the whole pool."""
        return epochs - max(1, round(self.share * epochs))


@dataclass(frozen=True)
class Timing:
    """When a run scores and selects, and what it trains on before it does.

    Args:
        every: select in each `every`-th epoch; the epochs between train on the same rows in another order.
        warmup_epochs: train on the whole pool first for so many epochs, or on a sample of it.
        freeze_after: from this epoch on nothing is scored again, the last scores stand (the first epoch that selects
            always scores). A fully trained model is a worse scorer (arXiv 2308.12032, appendix G).
        warmup: the sample of the warm-up epochs; None for the whole pool.
        start_anew: training starts anew from the original weights after the warm-up epochs; the schedule, and the
            trainer's `num_train_epochs`, count epochs from there.
        every_steps: within an epoch, score again after each so many optimizer updates the rows that are left, those
            that it has not trained on, and choose the rows of the next so many among them. What an epoch trains on in
            all, its steps and the learning rate schedule stay as they are. Epochs that score nothing (warm-up, those
            from `freeze_after` on, the full ones of `Anneal`) are not divided. See `method.parts`.
        rescore: which rows are scored anew once there are scores: "all", or "candidates" for as many as
            `rescore_budget` pays for; see `training.candidate_scoring`.
        rescore_budget: of candidates, the share of what training on the epoch's rows costs that scoring them may cost.

    >>> Timing(every=2).rows_of(3, Constant(0.1), pool=200)
    EpochRows(budget=20, source='same', scored=False, tiers=(), selected_in=2, counted=2, part=1)
    """

    every: int = 1
    warmup_epochs: int = 0
    freeze_after: int | None = None
    warmup: Brief | None = None
    start_anew: bool = False
    every_steps: int | None = None
    rescore: Rescore = "all"
    rescore_budget: float = 0.10

    @classmethod
    def cherry(cls, brief: Brief | None, **others: Any) -> Timing:
        """One scoring, after one epoch on a brief experience if there is one (arXiv 2308.12032)."""
        before = {} if brief is None else {"warmup_epochs": 1, "warmup": brief, "start_anew": True}
        return cls(**{"freeze_after": 0, **before, **others})

    def __post_init__(self) -> None:
        if self.warmup is not None and not isinstance(self.warmup, Brief):
            raise UserError(f"warmup must be a Brief, such as Brief('kmeans'), or None, got {self.warmup!r}.")
        if (self.warmup is not None or self.start_anew) and self.warmup_epochs < 1:
            raise UserError("warmup and start_anew say what the warm-up epochs do: set warmup_epochs=1 or more.")
        for name, least in (("every", 1), ("warmup_epochs", 0), ("freeze_after", 0)):
            number = getattr(self, name)
            whole = is_whole(number)
            if not (whole and number >= least) and not (number is None and name == "freeze_after"):
                raise UserError(f"{name} counts epochs: a whole number of at least {least}, got {number!r}.")
        if self.every_steps is not None:
            self._check_steps()
        if self.rescore not in RESCORES:
            raise UserError(f"rescore must be 'all' or 'candidates', got {self.rescore!r}.")
        check_budget(self.rescore_budget)
        if self.rescore == "candidates":
            self._check_candidates()

    def _check_steps(self) -> None:
        steps = self.every_steps
        if not is_whole(steps) or steps < 1:
            raise UserError(f"every_steps counts optimizer updates: a whole number of at least 1, got {steps!r}.")
        if self.every > 1:
            raise UserError(
                f"every={self.every} trains epochs on the rows of the one before, every_steps={steps} chooses anew "
                "within each: leave one of them out."
            )
        if self.freeze_after is not None and self.freeze_after <= self.warmup_epochs:
            raise UserError(
                f"every_steps={steps} scores again within an epoch, and with freeze_after={self.freeze_after} rows are "
                f"scored once, when epoch {self.warmup_epochs} begins: raise freeze_after, or leave one of them out."
            )

    def _check_candidates(self) -> None:
        once = self.warmup_epochs + (1 if self.every_steps is None else 0)  # in parts, the first epoch scores anew
        if self.freeze_after is not None and self.freeze_after <= once:
            raise UserError(
                f"With freeze_after={self.freeze_after} rows are scored once, so that none are scored anew: leave "
                "rescore='candidates' out, or set a later epoch."
            )

    def part_steps(self, rows: EpochRows) -> int | None:
        """Updates of the parts of an epoch with these rows; None where it is not divided."""
        return self.every_steps if rows.source == "selected" and rows.scored else None

    def rows_of(
        self,
        epoch: int,
        schedule: Schedule,
        pool: int,
        epochs: int | None = None,
        part: Callable[[int], int] | None = None,
    ) -> EpochRows:
        """Which rows an epoch trains on.

        Args:
            schedule: how many rows each epoch that selects trains on.
            pool: rows that there are.
            epochs: epochs of the run; None if `max_steps` decides.
            part: how many of them an epoch, as schedules count it, has to choose from; all by default.

        Raises:
            ValueError: for `Anneal` without a number of epochs.
        """
        if isinstance(schedule, Anneal):
            if epochs is None:
                raise UserError("Anneal needs to know the number of epochs: set num_train_epochs, not max_steps.")
            if epoch - (self.restart or 0) >= schedule.full_from(epochs):
                return EpochRows(pool, "all", scored=False)
            schedule = schedule.schedule
        if epoch < self.warmup_epochs:
            sample = self.warmup is not None
            return EpochRows(self.warmup.rows(pool) if sample else pool, "brief" if sample else "all", scored=False)
        if self.every > 1 and getattr(schedule, "mode", None) == "remaining":
            raise UserError("A curriculum of the rows that remain selects in each epoch: leave `every` at 1.")
        since = (epoch - self.warmup_epochs) % self.every
        selected_in = epoch - since
        counted = selected_in - (self.restart or 0)
        pool = pool if part is None else part(counted)
        budget = schedule.budget(counted, pool)
        tiers = schedule.divide(counted, pool) if hasattr(schedule, "divide") else ()
        frozen = self.freeze_after is not None and epoch >= self.freeze_after and epoch > self.warmup_epochs
        return EpochRows(budget, "same" if since else "selected", not (since or frozen), tiers, selected_in, counted)

    @property
    def restart(self) -> int | None:
        """The epoch before which training starts anew, if it does."""
        return self.warmup_epochs if self.start_anew else None


def parse_keep(entry: str | float | int) -> float | int:
    """One entry of `keep` from text: without a point a number of rows, else a fraction; numbers pass unchanged."""
    if isinstance(entry, (int, float)):
        return entry
    try:
        return int(entry) if entry.strip().lstrip("+").isdigit() else float(entry)
    except ValueError as error:
        raise UserError(f"keep: {entry!r} is not a number; use 0.1, 1000, or a list of these.") from error


def as_schedule(keep: float | int | Sequence[float | int] | Schedule) -> Schedule:
    """The schedule for a fraction, a count, a list with one entry per epoch, or a schedule; numbers of NumPy too."""
    if hasattr(keep, "budget"):
        return keep
    keep = keep.tolist() if isinstance(keep, np.ndarray) else keep
    return PerEpoch(tuple(map(_plain, keep))) if isinstance(keep, (list, tuple)) else Constant(_plain(keep))


def unlike_epochs(schedule: Schedule, epochs: int) -> str | None:
    """What is odd about a list of budgets in a run of so many epochs, in words; None where there is one for each.

    >>> unlike_epochs(PerEpoch((1.0, 0.1)), epochs=4)
    'keep has 2 entries, but the run has 4 epochs: the last entry (0.1) stands for epochs 2 to 3 too.'
    """
    last = schedule.full_from(epochs) if isinstance(schedule, Anneal) else epochs
    schedule = schedule.schedule if isinstance(schedule, Anneal) else schedule
    if not isinstance(schedule, PerEpoch) or len(schedule.keep) == last:
        return None
    entries, given, run = len(schedule.keep), many(len(schedule.keep), "entry", "entries"), many(last, "epoch")
    run += " before those on all rows" if last != epochs else ""
    if entries > last:
        unused = ", ".join(map(str, schedule.keep[last:]))
        return f"keep has {given}, but the run has {run}: {unused} {'are' if entries - last > 1 else 'is'} not used."
    span = f"epoch {entries}" if entries + 1 == last else f"epochs {entries} to {last - 1}"
    return f"keep has {given}, but the run has {run}: the last entry ({schedule.keep[-1]}) stands for {span} too."


def _plain(keep: Any) -> Any:
    """A number of NumPy (from a sweep, or a computation) as the number of Python that it is."""
    return keep.item() if isinstance(keep, np.generic) else keep


@dataclass(frozen=True)
class EpochPlan:
    """One epoch: rows to train on, batches per process, optimizer updates."""

    epoch: int
    budget: int
    batches: int
    updates: int


@dataclass(frozen=True)
class TrainingPlan:
    """All epochs of a run, and the number of optimizer updates in total (the last epoch may be cut short).

    Attributes:
        restart: the epoch before which training starts anew, after the brief experience; None if it does not.
        every_steps: of each epoch the updates of its parts, None for one that is not divided; empty if none is.
    """

    epochs: tuple[EpochPlan, ...]
    max_steps: int
    restart: int | None = None
    every_steps: tuple[int | None, ...] = ()

    @property
    def phases(self) -> tuple[int, ...]:
        """Updates before training starts anew, and after; all of them if it does not, or stops before."""
        if self.restart is None:
            return (self.max_steps,)
        before = sum(epoch.updates for epoch in self.epochs[: self.restart])
        return (before, self.max_steps - before) if self.max_steps > before else (self.max_steps,)

    @property
    def brief(self) -> int:
        """Updates before training starts anew; 0 where it does not."""
        return sum(self.phases[:-1])

    @property
    def rows(self) -> int:
        """Rows that the planned epochs train on, repeats counted."""
        return sum(epoch.budget for epoch in self.epochs)

    def position(self, step: int) -> tuple[int, int]:
        """(epoch, updates done in it) after `step` updates; a finished epoch counts as the next one at 0."""
        for plan in self.epochs:
            if step < plan.updates:
                return plan.epoch, step
            step -= plan.updates
        return len(self.epochs), step

    def __str__(self) -> str:
        steps = self.every_steps or [None] * len(self.epochs)
        texts = [
            f"epoch {p.epoch}: {many(p.budget, 'row')}, {many(p.updates, 'update')}{parts_text(p.updates, size)}"
            for p, size in zip(self.epochs, steps, strict=True)
        ]
        if self.restart is not None:
            texts[self.restart - 1] += "; then anew from the original weights"
        return f"{many(self.max_steps, 'update')} ({'; '.join(texts)})"


def plan_epoch(epoch: int, budget: int, batches: int, accumulation: int) -> EpochPlan:
    """The plan of one epoch; the last update may gather fewer than `accumulation` batches."""
    return EpochPlan(epoch, budget, batches, max(math.ceil(batches / accumulation), 1))


def plan_training(
    of_epoch: Callable[[int], EpochPlan], num_train_epochs: float, max_steps: int = -1, restart: int | None = None
) -> TrainingPlan:
    """The plan of a run.

    Args:
        of_epoch: the plan of the given epoch.
        num_train_epochs: epochs, may be fractional; used when max_steps is not positive.
        max_steps: total updates, as in `TrainingArguments`; the run takes as many epochs as that needs.
        restart: the epoch before which training starts anew.
    """
    if max_steps > 0:
        epochs, total = [], 0
        while total < max_steps:
            epochs.append(of_epoch(len(epochs)))
            total += epochs[-1].updates
        return TrainingPlan(tuple(epochs), max_steps, restart)
    epochs = [of_epoch(epoch) for epoch in range(math.ceil(num_train_epochs))]
    whole = int(num_train_epochs)
    total = sum(plan.updates for plan in epochs[:whole])
    if len(epochs) > whole:
        # 2.1 - 2 is a little more than 0.1: without rounding, a tenth of ten updates would be two.
        total += math.ceil(round((num_train_epochs - whole) * epochs[whole].updates, 6))
    return TrainingPlan(tuple(epochs), total, restart)


def parts_text(updates: int, every_steps: int | None) -> str:
    """How an epoch of so many updates is divided, behind their number; "" where it is not.

    >>> parts_text(500, 100), parts_text(550, 100), parts_text(80, 100)
    (' in 5 parts of 100', ' in 6 parts of 100, the last of 50', '')
    """
    if every_steps is None or updates <= every_steps:
        return ""
    count, last = -(-updates // every_steps), updates % every_steps
    return f" in {many(count, 'part')} of {every_steps:,}" + (f", the last of {last:,}" if last else "")


def _check(keep: float | int) -> None:
    ok = (isinstance(keep, int) and keep >= 1) or (isinstance(keep, float) and 0 < keep <= 1)
    if not ok or isinstance(keep, bool):
        raise UserError(
            f"keep must be a fraction in (0, 1], written with a point (0.1, or 1.0 for all rows), or a whole number of "
            f"rows (1000), got {keep!r}."
        )


def _rows(keep: float | int, pool: int) -> int:
    """Rows for `keep` of a pool: the denominator of a fraction is the whole pool, scorable or not."""
    if isinstance(keep, int):
        if keep > pool:
            raise UserError(f"keep={keep} rows were asked for, but the pool has only {pool}.")
        return keep
    return max(1, round(keep * pool))
