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
from .arms import Arm
from .comparison import Comparison, Task
from .measuring import Point
from .statistics import Difference, difference

VIEWS = {  # what arms have as much of, in words
    "steps": "as many optimizer steps",
    "tokens": "as many tokens trained on",
    "compute": "as many seconds for training and scoring",
}


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


def read_results(comparison: Comparison) -> Results:
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
    start = next((_Curve.start(task) for task in comparison.tasks() if task.done and _Curve.start(task)), None)
    curves = {name: [_Curve(task, beforehand[name], start) for task in tasks] for name, tasks in runs.items()}
    able = np.logical_and.reduce([curve.able for each in curves.values() for curve in each])
    weights = next(iter(curves.values()))[0].tokens[able].astype(float)
    outcomes = []
    for view in VIEWS:
        at = min(curve.last(view) for each in curves.values() for curve in each)
        losses = {name: np.stack([curve.at(view, at)[able] for curve in each]) for name, each in curves.items()}
        outcomes += _outcomes(comparison.arms, view, at, losses, weights)
    costs = [_costs(name, each, beforehand[name]) for name, each in curves.items()]
    before = None if start is None else float(start[0][able] @ weights / weights.sum())
    return Results(outcomes, costs, seeds, int(able.sum()), before)


def _outcomes(
    arms: Sequence[Arm], view: str, at: float, losses: dict[str, np.ndarray], weights: np.ndarray
) -> list[Outcome]:
    base, found = losses[arms[0].name], []
    for arm in arms:
        by_seed = losses[arm.name] @ weights / weights.sum()
        same = arm == arms[0]
        against = None if same else difference(losses[arm.name], base, weights, arms=len(arms) - 1)
        found.append(Outcome(arm.name, view, float(at), float(by_seed.mean()), by_seed.tolist(), against))
    return found


def _costs(name: str, curves: Sequence[_Curve], beforehand: float) -> Costs:
    def mean(view: str) -> float:
        return float(np.mean([curve.last(view) for curve in curves]))

    return Costs(name, mean("steps"), mean("tokens"), mean("compute"), beforehand)


def _beforehand(task: Task) -> float:
    return float(task.result()["seconds_scoring_beforehand"])


class _Curve:
    """The losses of the held-out rows of one run, along what it has used."""

    def __init__(self, task: Task, beforehand: float, start: tuple[np.ndarray, np.ndarray] | None) -> None:
        points = task.points()
        frames = [task.held_out(point) for point in points]
        self.tokens = frames[-1]["answer_tokens"].to_numpy()
        losses = [frame["cas"].to_numpy(dtype=float) for frame in frames]
        self.used = {view: [amount(point) for point in points] for view, amount in _AMOUNTS.items()}
        self.used["compute"] = [seconds + beforehand for seconds in self.used["compute"]]
        if start is not None and points[0].updates > 0:  # the model before training is the same in all runs
            losses.insert(0, start[0])
            for view, amounts in self.used.items():
                amounts.insert(0, beforehand if view == "compute" else 0.0)
        self.losses = np.stack(losses)
        self.able = np.isfinite(self.losses).all(axis=0)

    @staticmethod
    def start(task: Task) -> tuple[np.ndarray, np.ndarray] | None:
        """Losses and tokens of the rows before the first step, where this run has scored them."""
        first = next((point for point in task.points() if point.updates == 0), None)
        if first is None:
            return None
        frame = task.held_out(first)
        return frame["cas"].to_numpy(dtype=float), frame["answer_tokens"].to_numpy()

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


_AMOUNTS: dict[str, Callable[[Point], Any]] = {
    "steps": lambda point: float(point.step),
    "tokens": lambda point: float(point.tokens),
    "compute": lambda point: point.seconds,
}
