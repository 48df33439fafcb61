"""What a comparison will do, and how long that takes about, before anything runs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..evaluation.at_end import checked
from ..evaluation.harness import PlannedTask
from ..evaluation.held_out_sets import read_prompts, read_sets
from ..evaluation.measures import Measures
from ..recipe.parsing import Recipe, parse_recipe
from ..recipe.plan import training_plan
from ..recipe.run import build_run, selection_of
from ..recipe.selection import SelectionConfig, idle_keys_unsaid
from ..training.trainer_hooks import tokenizer_of
from .arms import Arm

_FORWARD, _TRAINED = 2, 6  # operations for each parameter and token: a forward pass, and one with its backward pass

_UNMEASURED = ("--eval_strategy", "no")  # the comparison scores held-out rows itself


@dataclass(frozen=True)
class PlannedArm:
    """One arm with one seed, as far as it is known before it runs.

    Attributes:
        steps: updates, those of a brief experience among them.
        epochs: the steps at which its epochs end, without a brief experience.
        tokens: trained on, if rows are as long as the pool's are on average.
        scored: tokens of forward passes for scoring, those before training among them.
        operations: of training and scoring, by the arithmetic of 2 and 6 for each parameter and token.
        selection: its keys of selection.
    """

    arm: Arm
    steps: int
    epochs: list[int]
    tokens: int
    scored: int
    operations: float
    selection: SelectionConfig


@dataclass(frozen=True)
class PlannedMeasures:
    """What is measured of each run.

    Attributes:
        held_out: how many rows each set of held-out rows has, by its name.
        prompts: how many each set of prompts has.
        tasks: that the trained model will be asked.
    """

    held_out: dict[str, int]
    prompts: dict[str, int]
    tasks: list[PlannedTask]


def planned_measures(recipe: str, words: Sequence[str], measures: Measures) -> PlannedMeasures:
    """What will be measured of each run; loads what it reads, and no weights.

    Raises:
        UserError: for what cannot be read, and what a run could not measure; see `evaluation.at_end.checked`.
    """
    read = _parsed(recipe, [*words, *_UNMEASURED])
    run = build_run(read)
    sets = read_sets(run.held_out, run.format, measures, read.folder, read.selection.rows_format())
    prompts = read_prompts(sets[0], measures, read.folder)
    tasks = checked(run.trainer.model, tokenizer_of(run.trainer), sets, measures, read.folder)
    return PlannedMeasures(*({each.name: len(each.rows) for each in of} for of in (sets, prompts)), tasks)


def planned_arm(recipe: str, words: Sequence[str], arm: Arm) -> PlannedArm:
    """What an arm will do; loads the rows and the tokenizer, and no weights.

    Raises:
        UserError: for a recipe that cannot be run.
    """
    read = _parsed(recipe, [*words, *arm.arguments(), *_UNMEASURED])
    run = build_run(read)
    trainer, callback = run.trainer, selection_of(run.trainer)
    plan, pool = training_plan(trainer), callback.pool
    ends = np.cumsum([epoch.updates for epoch in plan.epochs])
    length = float(np.mean(pool.lengths(np.arange(len(pool)))))
    tokens = int(plan.rows * length)
    passes = sum(callback.rows_scored(epoch.epoch) for epoch in plan.epochs) / pool.training_rows
    if callback.reads_scores and arm.keys.get("scorer"):
        passes = 1  # another model's scores do not change
    scored = int(2 * passes * len(pool) * length)  # with the prompt, and without it
    if callback.targets is not None:  # each row once more, to be embedded
        scored += int(_scorings(arm, len(plan.epochs), callback.timing.every) * len(pool) * length)
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    return PlannedArm(
        arm,
        plan.max_steps,
        [int(end - plan.brief) for end in ends if plan.brief < end <= plan.max_steps],
        tokens,
        scored,
        float(parameters) * (_TRAINED * tokens + _FORWARD * scored),
        read.selection,
    )


def idle_lines(recipe: str, words: Sequence[str], planned: Sequence[PlannedArm]) -> list[str]:
    """What a recipe says for all arms and none has a use for, and what it says for an arm to no effect there."""
    used = set()
    for arm in planned:
        used |= arm.selection.given_keys().difference(*arm.selection.idle_keys().values())
    said: dict[tuple[str, str], list[str]] = {}
    shared = _parsed(recipe, words).selection
    for selection, arm in ((shared, None), *((each.selection, each.arm) for each in planned)):
        for needed, keys in selection.idle_keys().items():
            for key in keys:
                whose = f"arms: {arm.name}: " if arm is not None and key in arm.keys else ""
                if (whose or key not in used) and key not in said.setdefault((whose, needed), []):
                    said[whose, needed].append(key)
    return [f"{whose}{', '.join(keys)}: no effect without {needed}." for (whose, needed), keys in said.items() if keys]


def _parsed(recipe: str, words: Sequence[str]) -> Recipe:
    with idle_keys_unsaid():
        return parse_recipe(recipe, words, plan=True)


def _scorings(arm: Arm, epochs: int, every: int) -> int:
    """How often the whole pool is scored."""
    if arm.keys.get("scorer"):
        return 1
    return 1 if arm.keys.get("method") == "cherry" else -(-epochs // every)


def operations_per_second(size: int = 1024, seconds: float = 0.5) -> float:
    """Operations of float32 matrix products on this machine's first accelerator, or its processor, in each second."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    one = torch.ones(size, size, device=device)
    one @ one
    began, done = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        (one @ one).sum().item()
        done += 1
    return done * 2.0 * size**3 / (time.perf_counter() - began)
