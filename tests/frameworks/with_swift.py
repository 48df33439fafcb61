"""The selection inside ms-swift, by hand and on a CPU: what it trained on, row by row, with the plugin.

    python3.11 -m venv swift-env && swift-env/bin/pip install torch==2.13.0 ms-swift==4.6.0 transformers==5.16.1 -e .
    swift-env/bin/python tests/frameworks/with_swift.py [FOLDER [CHECK ...]]

Tried with ms-swift 4.6.0, transformers 5.16.1, trl 0.29.1, torch 2.13.0, Python 3.11.

Asserted, beside what `witness.py` says: runs with LoRA, grouping by length, no shuffling, lazy tokenisation,
evaluation, weighted losses and chats; a resume inside an epoch that ends with the same rows and weights; swift's own
metrics; what is refused, and how.
"""

from __future__ import annotations

import os
from itertools import count
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

from swift.pipelines import sft_main
from witness import (
    Witness,
    chats,
    check_linear,
    check_resumed,
    check_run,
    new_folder,
    refused,
    rows,
    run_checks,
    save_model,
    save_rows,
    watched,
)

ROWS, KEPT, EPOCHS, BATCH, ACCUMULATION, PEAK = 24, 12, 3, 2, 2, 1e-2
SELECTION = 'keep=0.5, max_ifd=float("inf"), guard=None'
FOLDER = new_folder()
NUMBER = count()


def run(name: str, selected: str = SELECTION, **changes: Any) -> None:
    """What `swift sft` does with such options."""
    plugin = FOLDER / f"plugin_{next(NUMBER)}.py"  # a module is imported once
    plugin.write_text(
        "from swift.callbacks import callbacks_map\n"
        "from ifd_trainer import IFDSelectionCallback\n"
        "from ifd_trainer.frameworks.swift import selection\n"
        f'callbacks_map["ifd"] = selection({selected})\n'
    )
    options = {
        "model": FOLDER / "model",
        "model_type": "llama",
        "template": "chatml",
        "dataset": FOLDER / "rows.jsonl",
        "output_dir": FOLDER / name,
        "add_version": "false",
        "check_model": "false",
        "create_checkpoint_symlink": "false",
        "tuner_type": "full",
        "torch_dtype": "float32",
        "max_length": 256,
        "split_dataset_ratio": 0,
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": ACCUMULATION,
        "num_train_epochs": EPOCHS,
        "learning_rate": PEAK,
        "lr_scheduler_type": "linear",
        "warmup_ratio": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "external_plugins": plugin,
        "callbacks": "ifd",
    }
    sft_main([part for key, value in (options | changes).items() for part in (f"--{key}", str(value))])


def check(name: str, counts: list[int] | None = None, selected: str = SELECTION, **changes: Any) -> Witness:
    """A run whose steps, rows and scores are what the selection says."""
    with watched() as witness:
        run(name, selected, **changes)
    check_run(witness, FOLDER / name, counts or [KEPT] * EPOCHS, batch=BATCH, accumulation=ACCUMULATION)
    return witness


def selected() -> None:
    """Half of the rows in each epoch, and a run that goes on inside its second one."""
    whole = check("half", save_strategy="steps", save_steps=1)
    assert whole.state.epoch == EPOCHS
    check_linear(whole, PEAK)
    with watched() as again:
        run("half", resume_from_checkpoint=FOLDER / "half" / "checkpoint-4")
    check_resumed(again, whole, 4)
    check("shrinks", [ROWS, KEPT, 6], 'keep=[1.0, 0.5, 6], max_ifd=float("inf"), guard=None')
    check("lora", tuner_type="lora", lora_rank=4, target_modules="all-linear")
    check("lazy", lazy_tokenize="true")


def ordered() -> None:
    """Rows in the order of the training set, and grouped by their lengths."""
    witness = check("in_order", train_dataloader_shuffle="false")
    assert all(witness.positions(epoch) == sorted(witness.positions(epoch)) for epoch in witness.epochs)
    check("grouped", group_by_length="true")


def metrics() -> None:
    """swift's numbers are there where it logs a loss, also where epochs end between two logs; so are evaluations."""
    logs = check("logs", logging_steps=2).state.log_history
    assert all(("token_acc" in log) == ("loss" in log) for log in logs[:-1]), logs
    witness = check("evaluated", [10] * EPOCHS, split_dataset_ratio=0.17, eval_strategy="epoch")
    assert sum("eval_loss" in log for log in witness.state.log_history) >= EPOCHS


def turns() -> None:
    """Chats: all answers that are trained on are scored, or the last one alone where that is."""
    check("chats", dataset=FOLDER / "chats.jsonl")
    check("last_turn", dataset=FOLDER / "chats.jsonl", loss_scale="last_round")


def refusals() -> None:
    """What cannot be exact is refused with a sentence."""
    for selected, changes, sentence in (
        (SELECTION, {"streaming": "true", "max_steps": 4}, "needs a data set with a length, got a streaming one."),
        (SELECTION, {"task_type": "seq_cls", "num_labels": 2}, "--task_type seq_cls does not train on answers"),
        ("kep=0.5", {}, "unexpected keyword argument 'kep'; did you mean 'keep'?"),
        ("keep=1.5", {}, "1.5"),
        ('order="up"', {}, "order must be 'shuffle', 'descending' or 'ascending', got 'up'."),
    ):
        with refused(sentence):
            run("refused", selected, **changes)


if __name__ == "__main__":
    save_model(FOLDER / "model")
    save_rows(FOLDER / "rows.jsonl", rows(ROWS))
    save_rows(FOLDER / "chats.jsonl", chats(ROWS))
    run_checks([selected, ordered, metrics, turns, refusals])
