"""What a run says while it trains: a line for each epoch, or each part of one, and at its end where the history is.

Lines go where the trainer's own numbers go, to standard output past the progress bar, and are silent where these are.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import PrinterCallback, Trainer
from transformers.utils import logging

from ..method.number_words import many, rounded_below
from ..method.reasons import counted_noise


def say(trainer: Trainer, text: str) -> None:
    """Print a line on the main process, unless the user asked for silence.

    That is `disable_tqdm=True` with `log_level="error"` (or less), or without the `PrinterCallback` that the trainer
    then has.
    """
    args, callbacks = trainer.args, trainer.callback_handler.callbacks
    if not trainer.is_world_process_zero():
        return
    if args.disable_tqdm and (
        args.get_process_log_level() >= logging.ERROR or not any(isinstance(c, PrinterCallback) for c in callbacks)
    ):
        return
    tqdm.write(text)  # as the trainer's progress bar writes its numbers


def epoch_line(record: Mapping[str, Any], source: str, guards: Sequence[str] = ()) -> str:
    """What an epoch trains on, in a line.

    Args:
        record: of the history.
        source: where its rows come from; see `method.schedule.EpochRows`.
        guards: reasons for which guards drop rows in this run.

    >>> record = {"epoch": 1, "pool": 292, "kept": 35, "budget": 35, "cut": 0.874, "overlap": 0.6, "reasons": {}}
    >>> epoch_line(record | {"reasons": {"kept": 35, "unfinished": 22}}, "selected", ["unfinished", "duplicate"])
    'IFD, epoch 1: 35 of 292 rows kept, cut at 0.8740; 60 % of them were kept in epoch 0 too; guards held back 22 (22 \
unfinished, 0 duplicates)'
    >>> epoch_line(record | {"part": 2, "parts": 5, "left": 257, "overlap": None}, "selected")
    'IFD, epoch 1, part 2 of 5: 35 of the 257 rows that are left kept, cut at 0.8740'
    """
    epoch, pool, kept = record["epoch"], record["pool"], record["kept"]
    name = f"epoch {epoch}" + (f", part {record['part']} of {record['parts']}" if record.get("part") else "")
    packed = record.get("packed_rows")
    rows = "examples" if packed else "row" if pool == 1 else "rows"
    if source == "all":
        said = [f"all {pool:,} {rows}, none chosen by its score"]
    elif source == "brief":
        said = [f"{kept:,} of {pool:,} {rows}, the sample of the brief experience"]
    else:
        cut, repeats = record.get("cut"), record["budget"] - kept
        again = f" and {many(repeats, 'repeat')}" if repeats > 0 else ""
        at = f", cut at {rounded_below(cut, record.get('limit') or 1.0, 4)}" if cut is not None else ""
        said = [f"{kept:,} of {pool:,} {rows} kept{again}{at}"]
        if record.get("left", pool) < pool:
            said = [f"{kept:,} of the {record['left']:,} {rows} that are left kept{again}{at}"]
        if record.get("overlap") is not None:
            said.append(f"{100 * record['overlap']:.0f} % of them were kept in epoch {epoch - 1} too")
        if record.get("rescore_cost") is not None:
            said.append(
                f"{_percent(record['fresh'])} of the scores are fresh, {_percent(record['kept_fresh'])} of those kept, "
                f"for {_percent(record['rescore_cost'])} of what training on them costs"
            )
        if guards:
            counts = {reason: int(record["reasons"].get(reason, 0)) for reason in guards}
            kinds = ", ".join(counted_noise(reason, count) for reason, count in counts.items())
            said.append(f"guards held back {sum(counts.values()):,} ({kinds})")
    if packed:
        said[0] += f", in {many(packed, 'packed row')}"
    before = record.get("before_training") or {}
    losses = {"": before["eval_loss"]} if "eval_loss" in before else before.get("eval_losses") or {}
    if losses:
        named = ", ".join(f"{loss:.4f}{f' on {name}' if name else ''}" for name, loss in losses.items())
        said.append(f"held-out loss before training {named}")
    return f"IFD, {name}: {'; '.join(said)}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def end_line(history: Path, output: Path) -> str:
    """Where the history of a run is, and how to see it.

    >>> end_line(Path("my run/ifd_history"), Path("my run"))
    "What was selected, epoch by epoch, is in my run/ifd_history. To see it: ifd-trainer report 'my run'"
    """
    return (
        f"What was selected, epoch by epoch, is in {history}. To see it: ifd-trainer report {shlex.quote(str(output))}"
    )
