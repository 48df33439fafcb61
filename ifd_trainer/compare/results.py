"""What a comparison has found: each arm's held-out loss against random rows, at equal steps, tokens and compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..data.atomic import write_json
from ..errors import UserError
from ..evaluation.held_out_losses import Point
from ..evaluation.held_out_sets import clusters_of
from ..evaluation.measured import Measured, ifd_documents, measured_of, read_documents
from ..evaluation.measures import MAIN
from ..evaluation.statistics import Difference, difference
from ..method.number_words import many
from .comparison import Comparison, Task
from .judging import Judging

VIEWS = {  # what arms have as much of, in words
    "steps": "as many optimizer steps",
    "tokens": "as many tokens trained on",
    "compute": "as many seconds for training and scoring",
}
_LEAST = 5  # rows, or groups of them, of which losses are compared
EQUAL = {"steps": "equal steps", "tokens": "equal tokens", "compute": "equal seconds"}  # in short


@dataclass(frozen=True)
class Outcome:
    """One arm in one view.

    Attributes:
        arm: its name.
        view: one of `VIEWS`.
        at: of how many steps, tokens or seconds.
        loss: mean held-out loss over seeds, nats per answer token.
        by_seed: that of each seed.
        against: the difference from random rows; None for these.
    """

    arm: str
    view: str
    at: float
    loss: float
    by_seed: list[float]
    against: Difference | None


@dataclass(frozen=True)
class Costs:
    """What an arm took, to its end.

    Attributes:
        steps, tokens: that it trained on, means over seeds.
        seconds: for training and scoring.
        beforehand: of these, for scoring before training, counted for each arm as if it had been alone.
    """

    arm: str
    steps: float
    tokens: float
    seconds: float
    beforehand: float


@dataclass(frozen=True)
class Part:
    """The losses of some held-out rows: of a further set, or of a category.

    Attributes:
        of: the set that the rows are in.
        category: which of its rows; None for all.
        rows: how many.
        outcomes: of all arms in all views.
        before: mean loss before training, where it is known.
    """

    of: str
    category: str | None
    rows: int
    outcomes: list[Outcome]
    before: float | None

    def in_view(self, view: str) -> list[Outcome]:
        """The arms in one view."""
        return [outcome for outcome in self.outcomes if outcome.view == view]


@dataclass(frozen=True)
class Results:
    """All of it.

    Attributes:
        outcomes: of the recipe's own held-out rows, which the verdict is about.
        costs: what each arm took.
        seeds: with which all arms have ended.
        rows: of the recipe's held-out rows, those with a loss in all runs.
        before: their mean loss before training, where it is known.
        parts: further sets and categories.
        measured: what else was measured of the models at the end.
        left_out: sets and categories of which too few rows have a loss, in words.
        judging: what a judge says of the answers, if one was asked.
    """

    outcomes: list[Outcome]
    costs: list[Costs]
    seeds: list[int]
    rows: int
    before: float | None
    parts: list[Part] = field(default_factory=list)
    measured: list[Measured] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    judging: Judging | None = None

    def of(self, view: str) -> list[Outcome]:
        """The arms in one view."""
        return [outcome for outcome in self.outcomes if outcome.view == view]

    def save(self, path: Path) -> None:
        """Write the numbers as JSON."""
        write_json(path, asdict(self))


class Curve:
    """The losses of the held-out rows of one run, along what it has used.

    Attributes:
        used: by view, how much of it each point had used; the first one is the start, where that is known.
        losses: (points, n) of the held-out rows.
        tokens: (n,) of their answers.
    """

    def __init__(self, task: Task, beforehand: float, start: np.ndarray | None) -> None:
        points = task.points()
        frames = [task.held_out(point) for point in points]
        self.tokens = frames[-1]["answer_tokens"].to_numpy()
        losses = [frame["cas"].to_numpy(dtype=float) for frame in frames]
        self.used = {view: [amount(point) for point in points] for view, amount in _AMOUNTS.items()}
        self.used["compute"] = [seconds + beforehand for seconds in self.used["compute"]]
        if start is not None and points[0].updates > 0:  # the model before training is the same in all runs
            losses.insert(0, start)
            for view, amounts in self.used.items():
                amounts.insert(0, beforehand if view == "compute" else 0.0)
        self.losses = np.stack(losses)

    def last(self, view: str) -> float:
        """How much the whole run used."""
        return self.used[view][-1]

    def at(self, view: str, amount: float) -> np.ndarray:
        """(n,) losses when so much was used: those of the nearest points, in proportion."""
        used = np.asarray(self.used[view])
        right = int(np.clip(np.searchsorted(used, amount), 1, len(used) - 1)) if len(used) > 1 else 0
        left = max(right - 1, 0)
        span = used[right] - used[left]
        share = float(np.clip((amount - used[left]) / span, 0, 1)) if span > 0 else 1.0
        return (1 - share) * self.losses[left] + share * self.losses[right]


@dataclass(frozen=True)
class Curves:
    """The curves of all arms, over the same rows and seeds.

    Attributes:
        by_arm: those of each seed.
        seeds: with which all arms have ended.
        beforehand: seconds of each arm for scoring before training.
        start: (n,) losses before training, where they are known.
        scored: (n,) whether each run has a loss of a row at each of its points.
        rows: a line for each row: its `set`, `category` and `group`.
        part: (n,) the rows that are looked at; of `read_curves`, the recipe's own.
        documents: what else was measured of the models at the end, see `measured`, of each seed.
    """

    by_arm: dict[str, list[Curve]]
    seeds: list[int]
    beforehand: dict[str, float]
    start: np.ndarray | None
    scored: np.ndarray
    rows: pd.DataFrame
    part: np.ndarray
    documents: dict[str, list[pd.DataFrame]]

    @property
    def able(self) -> np.ndarray:
        """(n,) the rows that are looked at and have a loss in all runs."""
        return self.scored & self.part

    @property
    def groups(self) -> np.ndarray | None:
        """What the rows of `able` belong to, if they come in groups."""
        return clusters_of(self.rows.loc[self.able, "group"])

    @property
    def before(self) -> float | None:
        """Mean loss before training, where it is known."""
        return None if self.start is None else float(self.mean(self.start))

    def of(self, name: str, category: str | None = None) -> Curves:
        """The same runs, of the rows of one set, or of a category in it."""
        part = (self.rows["set"] == name).to_numpy()
        return replace(self, part=part if category is None else part & (self.rows["category"] == category).to_numpy())

    def parts(self) -> Iterator[tuple[str, str | None]]:
        """Further sets, each followed by its categories; those of the recipe's own rows come first."""
        for name, rows in self.rows.groupby("set", sort=False):
            if name != MAIN:
                yield name, None
            counts = rows["category"].value_counts()
            yield from ((name, category) for category in sorted(counts.index, key=lambda text: (-counts[text], text)))

    @property
    def weights(self) -> np.ndarray:
        """Answer tokens of the rows that have a loss in all runs."""
        return next(iter(self.by_arm.values()))[0].tokens[self.able].astype(float)

    def mean(self, losses: np.ndarray) -> np.ndarray:
        """(...) mean losses, over answer tokens, of (..., n) losses of all rows."""
        return losses[..., self.able] @ self.weights / self.weights.sum()


def read_curves(comparison: Comparison) -> Curves:
    """What there is of a comparison; of seeds, those with which all arms have ended.

    Raises:
        UserError: with fewer than two of them.
    """
    by_arm = {arm.name: {t.seed: t for t in comparison.tasks() if t.arm == arm and t.done} for arm in comparison.arms}
    seeds = [seed for seed in comparison.seeds if all(seed in tasks for tasks in by_arm.values())]
    if len(seeds) < 2:
        raise UserError(
            f"{len(seeds)} of {len(comparison.seeds)} seeds have ended with all arms, and a difference wants at least "
            "2. Run the same command again to go on."
        )
    runs = {name: [tasks[seed] for seed in seeds] for name, tasks in by_arm.items()}
    beforehand = _beforehand(comparison, runs)
    starts = (_start(task) for task in comparison.tasks() if task.done)
    start = next((losses for losses in starts if losses is not None), None)
    curves = {name: [Curve(task, beforehand[name], start) for task in tasks] for name, tasks in runs.items()}
    scored = np.logical_and.reduce([np.isfinite(c.losses).all(axis=0) for each in curves.values() for c in each])
    documents = {name: [_documents(task) for task in tasks] for name, tasks in runs.items()}
    first = next(iter(runs.values()))[0]
    rows = first.held_out(first.points()[-1])[["set", "category", "group"]]
    return Curves(curves, seeds, beforehand, start, scored, rows, (rows["set"] == MAIN).to_numpy(), documents)


def read_results(comparison: Comparison) -> Results:
    """The results of what there is of a comparison; errors as of `read_curves`."""
    return results_of(read_curves(comparison))


def results_of(curves: Curves) -> Results:
    """What the curves of the arms say, random rows first."""
    costs = [_costs(name, each, curves.beforehand[name]) for name, each in curves.by_arm.items()]
    parts, left_out = [], []
    for name, category in curves.parts():
        part, label = curves.of(name, category), name if category is None else f"{category} of {name}"
        rows, groups = int(part.able.sum()), part.groups
        if (rows if groups is None else len(np.unique(groups))) < _LEAST:
            left_out.append(f"{label} ({many(rows, 'row')} with a loss)")
        else:
            parts.append(Part(name, category, rows, _outcomes(part), part.before))
    own, measured = _outcomes(curves), measured_of(curves.documents)
    return Results(own, costs, curves.seeds, int(curves.able.sum()), curves.before, parts, measured, left_out)


def _outcomes(curves: Curves) -> list[Outcome]:
    """All arms in all views, of the rows that are looked at."""
    base, *others = curves.by_arm
    weights, groups, found = curves.weights, curves.groups, []
    for view in VIEWS:
        at = min(curve.last(view) for each in curves.by_arm.values() for curve in each)
        losses = {
            name: np.stack([curve.at(view, at)[curves.able] for curve in each]) for name, each in curves.by_arm.items()
        }
        for name in losses:
            by_seed = losses[name] @ weights / weights.sum()
            against = (
                None if name == base else difference(losses[name], losses[base], weights, groups, arms=len(others))
            )
            found.append(Outcome(name, view, float(at), float(by_seed.mean()), by_seed.tolist(), against))
    return found


def _costs(name: str, curves: Sequence[Curve], beforehand: float) -> Costs:
    def mean(view: str) -> float:
        return float(np.mean([curve.last(view) for curve in curves]))

    return Costs(name, mean("steps"), mean("tokens"), mean("compute"), beforehand)


def _documents(task: Task) -> pd.DataFrame:
    """All that was measured of a run at its end, the IFD of its held-out rows first."""
    frames = [ifd_documents(task.held_out(task.points()[-1])), *read_documents(task.folder)]
    return pd.concat(frames, ignore_index=True)


def _beforehand(comparison: Comparison, runs: dict[str, list[Task]]) -> dict[str, float]:
    """Seconds of each arm for scoring before training.

    The first of all runs that want the same scores computes them, the others take them out of the cache.
    """
    took: dict[tuple[Any, ...], float] = {}
    for task in (task for tasks in runs.values() for task in tasks):
        seconds = float(task.result()["seconds_scoring_beforehand"])
        took[task.arm.scoring] = max(took.get(task.arm.scoring, 0.0), seconds)
    return {arm.name: took[arm.scoring] for arm in comparison.arms}


def _start(task: Task) -> np.ndarray | None:
    """Losses of the rows before the first step, where this run has scored them."""
    first = next((point for point in task.points() if point.updates == 0), None)
    return None if first is None else task.held_out(first)["cas"].to_numpy(dtype=float)


_AMOUNTS: dict[str, Callable[[Point], Any]] = {
    "steps": lambda point: float(point.step),
    "tokens": lambda point: float(point.tokens),
    "compute": lambda point: point.seconds,
}
