"""What a run will do, in a few lines, told before it trains: all that `ifd-trainer train --plan` prints."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from trl import SFTTrainer

from ..method.schedule import TrainingPlan
from ..training.initial_weights import Snapshot
from ..training.pool_line import pool_line
from .run import Run, selection_of


@contextmanager
def only_the_plan() -> Iterator[None]:
    """While a plan is made, neither bars over rows are shown nor what transformers will call its settings one day."""
    hidden = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\b")
            yield
    finally:
        if not hidden:
            enable_progress_bars()


def training_plan(trainer: SFTTrainer) -> TrainingPlan:
    """The steps of all epochs, which are otherwise known once training begins."""
    trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())
    return selection_of(trainer).plan


def planned(run: Run) -> str:
    """What will be trained on: budgets and steps, the rows that are there, and the disk that it needs."""
    trainer, callback = run.trainer, selection_of(run.trainer)
    pool = pool_line(trainer, callback.pool, callback.rows_before, callback.turns)
    plan = training_plan(trainer)
    lines = [str(plan), pool, _batch_line(trainer)]
    lines.append(f"guards: {', '.join(callback.guard.names) if callback.guard else 'none'}")
    if not callback.reads_scores:
        lines.append("scoring: none, since nothing reads a score")
    elif any(plan.every_steps) or callback.chooser.candidates is not None:
        scored = sum(callback.rows_scored(epoch.epoch) for epoch in plan.epochs)
        begins = "each part of an epoch" if any(plan.every_steps) else "each epoch"
        which = "the rows that are left"
        if callback.chooser.candidates is not None:
            which = f"as many candidates as {100 * callback.timing.rescore_budget:g} % of its training pays for"
            begins = f"all rows once, and {begins} after that"
        lines.append(
            f"scoring: {begins} scores {which}, {scored:,} in all, {scored / plan.rows:.1f} for each one that is "
            "trained on"
        )
    if callback.targets is not None:
        targets = callback.targets
        bare = f", {targets.without_answer:,} without an answer" if targets.without_answer else ""
        lines.append(f"targets: {len(targets):,}{bare}; rows and targets are embedded where rows would be scored")
    if callback.restart is not None:
        size = f"{Snapshot.size(trainer.model) / 1e9:.2f} GB"
        if any("peft" in what for what in run.lacking):
            size = "those of the adapters,"
        lines.append(f"original weights: {size} in {trainer.args.output_dir} until training ends")
    if run.lacking:
        lines.append(f"this machine has no {', no '.join(run.lacking)}; training needs it")
    return "\n".join(lines)


def _batch_line(trainer: SFTTrainer) -> str:
    """Rows of an update, which depend on how the run is launched."""
    args = trainer.args
    rows = "packed rows" if trainer.selection_pool.packed else "rows"
    parts = [
        f"{args.train_batch_size} {rows}",
        f"{args.gradient_accumulation_steps} batch{'es' if args.gradient_accumulation_steps > 1 else ''}",
    ]
    parts.append(f"{args.world_size} process{'es' if args.world_size > 1 else ''}")
    return f"update: {' x '.join(parts)} = {trainer.get_total_train_batch_size(args)} {rows}"
