"""The selection inside axolotl, by hand and on a CPU: what it trained on, row by row, with the plugin.

    python3.11 -m venv ax-env && ax-env/bin/pip install torch==2.13.0 axolotl==0.19.0 -e .
    ax-env/bin/python tests/frameworks/with_axolotl.py [FOLDER [CHECK ...]]

On a CPU, `pip install --no-deps axolotl==0.19.0` beside its other dependencies does without xformers, fla, modal,
gradio, trackio, lm_eval and the cloud file systems; triton and bitsandbytes are imported, but not used. Tried with
axolotl 0.19.0, transformers 5.16.1, trl 1.9.0, torch 2.13.0, Python 3.11.

Asserted, beside what `witness.py` says: runs with LoRA, grouping by length, curriculum sampling, evaluation,
checkpoints, a warm-up, max_steps, train_on_inputs and chats; a resume inside an epoch that ends with the same rows and
weights; what is refused, and how.
"""

from __future__ import annotations

import os
import tempfile
from typing import Any

os.environ |= {"AXOLOTL_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

import yaml
from axolotl.cli.config import load_cfg
from axolotl.common.datasets import load_datasets
from axolotl.train import train as train_in_axolotl
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
SELECTION = {"keep": 0.5, "max_ifd": float("inf"), "guard": None}
FOLDER = new_folder()


def run(name: str, **changes: Any) -> None:
    """What `axolotl train` does with such a file."""
    config = {
        "base_model": str(FOLDER / "model"),
        "datasets": [{"path": str(FOLDER / "rows.jsonl"), "ds_type": "json", "type": "alpaca"}],
        "dataset_prepared_path": str(FOLDER / "prepared"),
        "output_dir": str(FOLDER / name),
        "sequence_len": 256,
        "micro_batch_size": BATCH,
        "gradient_accumulation_steps": ACCUMULATION,
        "num_epochs": EPOCHS,
        "learning_rate": PEAK,
        "optimizer": "adamw_torch",
        "lr_scheduler": "linear",
        "warmup_steps": 0,
        "bf16": False,
        "val_set_size": 0,
        "dataset_num_proc": 1,
        "save_strategy": "no",
        "seed": 7,
        "plugins": ["ifd_trainer.frameworks.axolotl.IFDSelectionPlugin"],
        "ifd_selection": SELECTION,
    }
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", dir=FOLDER, delete=False) as file:
        yaml.safe_dump(config | changes, file)
    cfg = load_cfg(file.name)
    train_in_axolotl(cfg=cfg, dataset_meta=load_datasets(cfg=cfg))


def check(name: str, counts: list[int] | None = None, **changes: Any) -> Witness:
    """A run whose steps, rows and scores are what the selection says."""
    with watched() as witness:
        run(name, **changes)
    check_run(witness, FOLDER / name, counts or [KEPT] * EPOCHS, batch=BATCH, accumulation=ACCUMULATION)
    return witness


def selected() -> None:
    """Half of the rows in each epoch, and a run that goes on inside its second one."""
    whole = check("half", save_strategy="steps", save_steps=1, save_total_limit=99)
    assert whole.state.epoch == EPOCHS
    check_linear(whole, PEAK)
    with watched() as again:
        run("half", resume_from_checkpoint=str(FOLDER / "half" / "checkpoint-4"))
    check_resumed(again, whole, 4)


def counted() -> None:
    """Steps and warm-up are counted in the planned steps; a run that max_steps ends, ends inside an epoch."""
    witness = check("warm", save_first_step=True, warmup_steps=None, warmup_ratio=0.25)
    assert (FOLDER / "warm" / "checkpoint-1" / "trainer_state.json").exists()
    assert witness.args.get_warmup_steps(witness.planned) == 3
    check("steps", [KEPT, KEPT, 8], max_steps=8)
    check("shrinks", [ROWS, KEPT, 6], ifd_selection={**SELECTION, "keep": [1.0, 0.5, 6]})


def ordered() -> None:
    """Rows in the order of the training set, and grouped by their lengths."""
    witness = check("in_order", curriculum_sampling=True)
    assert all(witness.positions(epoch) == sorted(witness.positions(epoch)) for epoch in witness.epochs)
    check("grouped", group_by_length=True)


def evaluated() -> None:
    """Rows that axolotl holds out are not in the pool."""
    witness = check("evaluated", [10] * EPOCHS, val_set_size=4, evals_per_epoch=1, saves_per_epoch=1)
    assert sum("eval_loss" in log for log in witness.state.log_history) >= EPOCHS


def whole_rows() -> None:
    """train_on_inputs: every token is trained on, and the answer is found by its header."""
    check("inputs", train_on_inputs=True)


def turns() -> None:
    """Chats: all answers that are trained on are scored."""
    of_chats = {"path": str(FOLDER / "chats.jsonl"), "ds_type": "json", "type": "chat_template"}
    check("chats", datasets=[of_chats], chat_template="chatml")


def refusals() -> None:
    """What cannot be exact is refused with a sentence."""
    for changes, sentence in (
        ({"sample_packing": True}, "sample_packing: true packs whole batches of rows anew"),
        ({"use_pose": True, "pose_max_context_len": 512}, "use_pose: true trains on positions that skip"),
        (
            {"streaming": True, "max_steps": 4, "dataset_prepared_path": None},
            "Selection needs a data set with a length, got a streaming one.",
        ),
        ({"ifd_selection": {"kep": 0.5}}, "unexpected keyword argument 'kep'; did you mean 'keep'?"),
        ({"ifd_selection": 0.5}, "ifd_selection holds options of the callback"),
        ({"ifd_selection": {"keep": 1.5}}, "1.5"),
        ({"ifd_selection": {"order": "up"}}, "order must be 'shuffle', 'descending' or 'ascending', got 'up'."),
    ):
        with refused(sentence):
            run("refused", **changes)


def lora() -> None:
    """Last, since axolotl's kernels for LoRA stay in the classes of the models."""
    check("lora", adapter="lora", lora_r=4, lora_alpha=8, lora_target_modules=["q_proj", "v_proj"])


if __name__ == "__main__":
    save_model(FOLDER / "model")
    save_rows(FOLDER / "rows.jsonl", rows(ROWS))
    save_rows(FOLDER / "chats.jsonl", chats(ROWS))
    run_checks([selected, counted, ordered, evaluated, whole_rows, turns, refusals, lora])
