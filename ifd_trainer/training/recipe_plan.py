"""What a run will do, in a few lines, told before it trains: all that `ifd-trainer train --plan` prints."""

from __future__ import annotations

from trl import SFTTrainer

from ..method.number_words import many
from .initial_weights import Snapshot
from .recipe_run import Run, selection_of


def planned(run: Run) -> str:
    """What will be trained on: budgets and steps, the rows that are there, and the disk that it needs."""
    trainer, callback = run.trainer, selection_of(run.trainer)
    trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())
    lines = [str(callback.plan), _pool_line(run), _batch_line(trainer)]
    lines.append(f"guards: {', '.join(callback.guard.names) if callback.guard else 'none'}")
    if callback.restart is not None:
        size = f"{Snapshot.size(trainer.model) / 1e9:.2f} GB"
        if any("peft" in what for what in run.lacking):
            size = "those of the adapters,"
        lines.append(f"original weights: {size} in {trainer.args.output_dir} until training ends")
    if run.lacking:
        lines.append(f"this machine has no {', no '.join(run.lacking)}; training needs it")
    return "\n".join(lines)


def _pool_line(run: Run) -> str:
    """How many rows are selected from, and what became of the others."""
    pool = run.trainer.selection_pool
    text = f"pool: {len(pool):,} of {many(run.rows, 'row')}"
    if run.unread:
        text += f", {run.unread:,} that cannot be rendered"
    if run.refusals:
        text += f", {run.refusals:,} left out as refusals"
    if lost := run.rows - run.unread - run.refusals - len(pool):
        text += f", {lost:,} lost to max_length={run.trainer.args.max_length} (no token of their answers is left)"
    return text + (f", in {many(pool.training_rows, 'packed row')}" if pool.packed else "")


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
