"""One arm with one seed, trained in a process of its own: `python -m ifd_trainer.compare.arm_run FOLDER`.

The folder holds `run.json`, what to do. It gets checkpoints while the run trains, the scores of the held-out rows, and
at the end `result.json`; a run that was killed goes on from its last checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..data.atomic import write_json
from ..errors import UserError, one_line

RUN, RESULT = "run.json", "result.json"


@dataclass(frozen=True)
class ArmRun:
    """What a process is to do.

    Attributes:
        recipe: the recipe's file.
        words: the command line's words over it, those of the arm and the seed among them.
        selects: whether the arm selects; else it trains on all rows.
        steps: after which the held-out rows are scored, beside each epoch's end.
        at_start: whether they are scored before the first step.
        measures: what is measured, as the keys of `Measures`.
    """

    recipe: str
    words: list[str]
    selects: bool
    steps: list[int]
    at_start: bool
    measures: dict[str, Any] = field(default_factory=dict)


def main(folder: Path) -> None:
    """Train what `run.json` says, from the last checkpoint if there is one."""
    import torch
    from transformers.trainer_utils import get_last_checkpoint

    from ..evaluation.at_end import measure_at_end
    from ..evaluation.held_out_losses import HeldOutRows
    from ..evaluation.held_out_sets import read_prompts, read_sets
    from ..evaluation.measures import Measures
    from ..recipe.parsing import parse_recipe
    from ..recipe.plan import training_plan
    from ..recipe.run import build_run, selection_of
    from ..training.trainer_hooks import tokenizer_of

    todo = ArmRun(**json.loads((folder / RUN).read_text(encoding="utf-8")))
    began = time.perf_counter()
    recipe = parse_recipe(todo.recipe, todo.words)
    recipe.sft.include_num_input_tokens_seen = "non_padding"
    run = build_run(recipe)
    trainer, callback = run.trainer, selection_of(run.trainer)
    if run.held_out is None:
        raise UserError("A comparison needs held-out rows: name them with eval_dataset.")
    brief = training_plan(trainer).brief
    if not todo.selects:
        trainer.remove_callback(callback)
    measures = Measures(**todo.measures)
    sets = read_sets(run.held_out, run.format, measures, recipe.folder, recipe.selection.rows_format())
    watch = HeldOutRows(trainer, sets, folder, todo.steps, brief, todo.at_start)
    trainer.add_callback(watch)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)))
    prompts = read_prompts(sets[0], measures, recipe.folder)
    measure_at_end(trainer.model, tokenizer_of(trainer), sets, prompts, measures, folder, recipe.folder)
    result = {
        "rows": len(trainer.train_dataset),
        "brief": brief,
        "seconds_scoring_beforehand": run.seconds_scoring,
        "seconds": time.perf_counter() - began,
        "device": trainer.args.device.type,
        "torch": torch.__version__,
    }
    write_json(folder / RESULT, result)
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)


def write_run(folder: Path, run: ArmRun) -> None:
    """Say what the process of a folder is to do."""
    write_json(folder / RUN, asdict(run))


def _end_with_parent() -> None:
    """End when the comparison does, even if that is killed: else it could be begun again beside this run."""

    def watch() -> None:
        os.read(0, 1)  # nothing is ever written: the parent is gone
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    _end_with_parent()
    try:
        main(Path(sys.argv[1]))
    except UserError as error:
        traceback.print_exc()
        sys.exit(f"error: {one_line(error)}")
