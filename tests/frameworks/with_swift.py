"""Train a tiny model in ms-swift with the plugin, and assert what was trained on.

    python3.11 -m venv swift-env && swift-env/bin/pip install torch==2.13.0 ms-swift==4.6.0 transformers==5.16.1 -e .
    swift-env/bin/python tests/frameworks/with_swift.py

Tried with ms-swift 4.6.0, transformers 5.16.1, trl 0.29.1, torch 2.13.0, Python 3.11.

Asserted: the number of steps, and that each epoch trained on the rows that were selected and no others, alone and with
LoRA, grouping by length, no shuffling, lazy tokenisation, evaluation, weighted losses and chats; scores against two
plain forward passes; a resume inside an epoch that ends with the same rows and weights; swift's own metrics; what is
refused, and how.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from itertools import count
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

import tiny

ROWS, KEPT, EPOCHS, STEPS = 24, 12, 3, 9  # 12 rows in batches of 2, 2 of them an update
SELECTION = 'keep=0.5, max_ifd=float("inf"), guard=None'
NUMBER = count()


def run(folder: Path, selected: str = SELECTION, **changes: Any) -> None:
    """What `swift sft` does with such options."""
    from swift.pipelines import sft_main

    plugin = folder / f"plugin_{next(NUMBER)}.py"
    plugin.write_text(
        "from swift.callbacks import callbacks_map\n"
        "from ifd_trainer import IFDSelectionCallback\n"
        "from ifd_trainer.frameworks.swift import selection\n"
        f'callbacks_map["ifd"] = selection({selected})\n'
    )
    options = {
        "model": folder / "model",
        "model_type": "llama",
        "template": "chatml",
        "dataset": folder / "rows.jsonl",
        "output_dir": folder / "run",
        "add_version": "false",
        "check_model": "false",
        "create_checkpoint_symlink": "false",
        "tuner_type": "full",
        "torch_dtype": "float32",
        "max_length": 256,
        "split_dataset_ratio": 0,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": EPOCHS,
        "learning_rate": 0.001,
        "lr_scheduler_type": "linear",
        "warmup_ratio": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "external_plugins": plugin,
        "callbacks": "ifd",
    }
    sft_main([part for name, value in (options | changes).items() for part in (f"--{name}", str(value))])


def selects(folder: Path, rows: list[int] | None = None, selected: str = SELECTION, **changes: Any) -> tiny.Watched:
    """Train anew, and assert which rows were trained on."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    with tiny.watched() as seen:
        run(folder, selected, **changes)
    tiny.check_epochs(seen, folder / "run", rows or [KEPT] * EPOCHS)
    print(f"{changes}: {seen.trainer.state.global_step} steps", file=sys.stderr)
    return seen


def main() -> None:
    folder = Path(tempfile.mkdtemp())
    tiny.write_model(folder / "model")
    tiny.write_rows(folder / "rows.jsonl", ROWS)
    tiny.write_chats(folder / "chats.jsonl", ROWS)

    # ---- a run, its scores, and a resume inside its second epoch
    seen = selects(folder, save_strategy="steps", save_steps=1)
    state = seen.trainer.state
    assert (state.global_step, state.max_steps, state.epoch) == (STEPS, STEPS, EPOCHS)
    rates = [log["learning_rate"] for log in state.log_history if "learning_rate" in log]
    assert len(rates) == STEPS
    assert rates[-1] == 0, rates  # swift logs the rate of the step to come
    tiny.check_scores(seen, folder / "model", folder / "run")
    with tiny.watched() as again:
        run(folder, resume_from_checkpoint=folder / "run" / "checkpoint-4")
    tiny.check_resumed(again, seen, rows=4 * 4)

    # ---- what else may be said
    seen = selects(folder, logging_steps=2)  # epochs end between two logs
    logs = seen.trainer.state.log_history
    assert all(("token_acc" in log) == ("loss" in log) for log in logs[:-1]), logs
    seen = selects(folder, train_dataloader_shuffle="false")
    assert seen.rows[:KEPT] == sorted(seen.rows[:KEPT], key=seen.pool.index)
    selects(folder, group_by_length="true")
    selects(folder, lazy_tokenize="true")
    seen = selects(folder, [10, 10, 10], split_dataset_ratio=0.17, eval_strategy="epoch")
    assert sum("eval_loss" in log for log in seen.trainer.state.log_history) >= EPOCHS
    seen = selects(folder, dataset=folder / "chats.jsonl", loss_scale="last_round")
    seen = selects(folder, dataset=folder / "chats.jsonl")
    selects(folder, [ROWS, KEPT, 6], selected='keep=[1.0, 0.5, 6], max_ifd=float("inf"), guard=None')
    selects(folder, tuner_type="lora", lora_rank=4, target_modules="all-linear")

    # ---- what is refused
    for selected, changes, sentence in (
        (SELECTION, {"streaming": "true", "max_steps": 4}, "needs a data set with a length, got a streaming one."),
        (SELECTION, {"task_type": "seq_cls", "num_labels": 2}, "--task_type seq_cls does not train on answers"),
        ("kep=0.5", {}, "unexpected keyword argument 'kep'; did you mean 'keep'?"),
        ("keep=1.5", {}, "1.5"),
        ('order="up"', {}, "order must be 'shuffle', 'descending' or 'ascending', got 'up'."),
    ):
        shutil.rmtree(folder / "run", ignore_errors=True)
        with tiny.refused(sentence):
            run(folder, selected, **changes)
    print("all as it should be")


if __name__ == "__main__":
    main()
