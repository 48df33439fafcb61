"""What a comparison has found: each arm's held-out loss against random rows, at equal steps, tokens and compute."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..data.atomic import write_atomically
from ..errors import UserError
from .comparison import Comparison, Task
from .measuring import Point
from .statistics import Difference, difference

VIEWS = {  # what arms have as much of, in words
    "steps": "as many optimizer steps",
    "tokens": "as many tokens trained on",
    "compute": "as many seconds for training and scoring",
}
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
class Results:
    """All of it."""

    outcomes: list[Outcome]
    costs: list[Costs]
    seeds: list[int]
    rows: int
    before: float | None

    def of(self, view: str) -> list[Outcome]:
        """The arms in one view."""
        return [outcome for outcome in self.outcomes if outcome.view == view]

    def save(self, path: Path) -> None:
        """Write the numbers as JSON."""
        text = json.dumps(asdict(self), indent=1)
        write_atomically(path, lambda part: part.write_text(text + "\n", encoding="utf-8"))


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
        able: (n,) whether each run has a loss of a row at each of its points.
    """

    by_arm: dict[str, list[Curve]]
    seeds: list[int]
    beforehand: dict[str, float]
    start: np.ndarray | None
    able: np.ndarray

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
    beforehand = {name: max(_beforehand(task) for task in tasks) for name, tasks in runs.items()}
    starts = (_start(task) for task in comparison.tasks() if task.done)
    start = next((losses for losses in starts if losses is not None), None)
    curves = {name: [Curve(task, beforehand[name], start) for task in tasks] for name, tasks in runs.items()}
    able = np.logical_and.reduce([np.isfinite(c.losses).all(axis=0) for each in curves.values() for c in each])
    return Curves(curves, seeds, beforehand, start, able)


def read_results(comparison: Comparison) -> Results:
    """The results of what there is of a comparison; errors as of `read_curves`."""
    return results_of(read_curves(comparison))


def results_of(curves: Curves) -> Results:
    """What the curves of the arms say, random rows first."""
    outcomes = []
    for view in VIEWS:
        at = min(curve.last(view) for each in curves.by_arm.values() for curve in each)
        losses = {
            name: np.stack([curve.at(view, at)[curves.able] for curve in each]) for name, each in curves.by_arm.items()
        }
        outcomes += _outcomes(view, at, losses, curves.weights)
    costs = [_costs(name, each, curves.beforehand[name]) for name, each in curves.by_arm.items()]
    before = None if curves.start is None else float(curves.mean(curves.start))
    return Results(outcomes, costs, curves.seeds, int(curves.able.sum()), before)


def _outcomes(view: str, at: float, losses: dict[str, np.ndarray], weights: np.ndarray) -> list[Outcome]:
    base, *others = losses
    found = []
    for name in losses:
        by_seed = losses[name] @ weights / weights.sum()
        against = None if name == base else difference(losses[name], losses[base], weights, arms=len(others))
        found.append(Outcome(name, view, float(at), float(by_seed.mean()), by_seed.tolist(), against))
    return found


def _costs(name: str, curves: Sequence[Curve], beforehand: float) -> Costs:
    def mean(view: str) -> float:
        return float(np.mean([curve.last(view) for curve in curves]))

    return Costs(name, mean("steps"), mean("tokens"), mean("compute"), beforehand)


def _beforehand(task: Task) -> float:
    return float(task.result()["seconds_scoring_beforehand"])


def _start(task: Task) -> np.ndarray | None:
    """Losses of the rows before the first step, where this run has scored them."""
    first = next((point for point in task.points() if point.updates == 0), None)
    return None if first is None else task.held_out(first)["cas"].to_numpy(dtype=float)


_AMOUNTS: dict[str, Callable[[Point], Any]] = {
    "steps": lambda point: float(point.step),
    "tokens": lambda point: float(point.tokens),
    "compute": lambda point: point.seconds,
}
