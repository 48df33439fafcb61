"""Train a tiny model in axolotl with the plugin, and assert what was trained on.

    python3.11 -m venv ax-env && ax-env/bin/pip install torch==2.13.0 axolotl==0.19.0 -e .
    ax-env/bin/python tests/frameworks/with_axolotl.py

On a CPU some of axolotl's dependencies for GPUs can be left out (`pip install --no-deps axolotl==0.19.0`, and what it
imports). Tried with axolotl 0.19.0, transformers 5.16.1, torch 2.13.0, Python 3.11.

Asserted: the number of steps, and that each epoch trained on the rows that were selected and no others, alone and with
LoRA, grouping by length, curriculum sampling, evaluation, train_on_inputs and chats; scores against
two plain forward passes; a resume inside an epoch that ends with the same rows and weights; what is refused, and how.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ |= {"AXOLOTL_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
sys.path.insert(0, str(Path(__file__).parent))

ROWS, KEPT, EPOCHS, STEPS = 24, 12, 3, 9  # 12 rows in batches of 2, 2 of them an update
SELECTION = {"keep": 0.5, "max_ifd": float("inf"), "guard": None}


def configuration(folder: Path, **changes: Any) -> dict[str, Any]:
    config = {
        "base_model": str(folder / "model"),
        "datasets": [{"path": str(folder / "rows.jsonl"), "ds_type": "json", "type": "alpaca"}],
        "dataset_prepared_path": str(folder / "prepared"),
        "output_dir": str(folder / "run"),
        "sequence_len": 256,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_epochs": EPOCHS,
        "learning_rate": 0.001,
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
    return config | changes


def run(config: dict[str, Any]) -> Any:
    """What `axolotl train` does with such a file; gives the trainer."""
    import yaml
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets
    from axolotl.train import train

    with tempfile.NamedTemporaryFile("w", suffix=".yaml", delete=False) as file:
        yaml.safe_dump(config, file)
    cfg = load_cfg(file.name)
    return train(cfg=cfg, dataset_meta=load_datasets(cfg=cfg))[2]


def selects(folder: Path, rows: list[int] | None = None, **changes: Any) -> tuple[Any, list]:
    """Train anew, and assert which rows were trained on."""
    import tiny

    shutil.rmtree(folder / "run", ignore_errors=True)
    with tiny.watched() as seen:
        trainer = run(configuration(folder, **changes))
    rows = rows or [KEPT] * EPOCHS
    tiny.check_epochs(seen, pool_of(trainer), folder / "run", rows)
    print(f"{changes}: {trainer.state.global_step} steps", file=sys.stderr)
    return trainer, seen


def pool_of(trainer: Any) -> list[tuple[int, ...]]:
    return [tuple(ids) for ids in trainer.train_dataset["input_ids"]]


def main() -> None:
    import tiny
    import torch

    folder = Path(tempfile.mkdtemp())
    tiny.write_model(folder / "model")
    tiny.write_rows(folder / "rows.jsonl", ROWS)

    # ---- a run, its scores, and a resume inside its second epoch
    trainer, seen = selects(folder, save_strategy="steps", save_steps=1, save_total_limit=99)
    assert trainer.state.global_step == trainer.state.max_steps == STEPS
    assert trainer.state.epoch == EPOCHS
    rates = [log["learning_rate"] for log in trainer.state.log_history if "learning_rate" in log]
    assert len(rates) == STEPS and abs(rates[-1] - 0.001 / STEPS) < 1e-9, rates
    worst = tiny.check_scores(folder / "model", pool_of(trainer), trainer.train_dataset["labels"], folder / "run")
    print(f"scores differ by {worst:.1e} at most", file=sys.stderr)
    weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with tiny.watched() as again:
        trainer = run(configuration(folder, resume_from_checkpoint=str(folder / "run" / "checkpoint-4")))
    assert again == seen[4 * 4 :]
    assert all(torch.equal(value, weights[name]) for name, value in trainer.model.state_dict().items())

    # ---- what else a configuration may say
    trainer, _ = selects(folder, save_first_step=True, warmup_steps=None, warmup_ratio=0.25)
    assert (folder / "run" / "checkpoint-1" / "ifd_selection.safetensors").exists() or list(
        (folder / "run" / "checkpoint-1").glob("ifd*")
    )
    assert trainer.args.get_warmup_steps(STEPS) == 3
    trainer, _ = selects(folder, [KEPT, KEPT, 8], max_steps=8)  # the third epoch is not finished
    assert trainer.state.global_step == 8
    selects(folder, group_by_length=True)
    _, seen = selects(folder, curriculum_sampling=True)
    order = [pool_of(trainer).index(row) for row in seen[:KEPT]]
    assert order == sorted(order)
    trainer, _ = selects(folder, [10, 10, 10], val_set_size=4, evals_per_epoch=1, saves_per_epoch=1)
    assert sum("eval_loss" in log for log in trainer.state.log_history) >= EPOCHS
    selects(folder, train_on_inputs=True)
    selects(folder, [ROWS, KEPT, 6], ifd_selection={**SELECTION, "keep": [1.0, 0.5, 6]})
    chats = {"path": str(folder / "chats.jsonl"), "ds_type": "json", "type": "chat_template"}
    tiny.write_chats(folder / "chats.jsonl", ROWS)
    selects(folder, datasets=[chats], chat_template="chatml")

    # ---- what is refused
    for changes, sentence in (
        ({"sample_packing": True}, "sample_packing: true packs whole batches of rows anew"),
        ({"use_pose": True, "pose_max_context_len": 512}, "use_pose: true trains on positions that skip"),
        ({"streaming": True, "max_steps": 4}, "Selection needs a data set with a length, got a streaming one."),
        ({"ifd_selection": {"kep": 0.5}}, "unexpected keyword argument 'kep'; did you mean 'keep'?"),
        ({"ifd_selection": 0.5}, "ifd_selection holds options of the callback"),
        ({"ifd_selection": {"keep": 1.5}}, "1.5"),
        ({"ifd_selection": {"order": "up"}}, "order must be 'shuffle', 'descending' or 'ascending', got 'up'."),
    ):
        with tiny.refused(sentence):
            run(configuration(folder, **changes))
    # ---- last, since axolotl's kernels for LoRA stay in the classes of the models
    selects(folder, adapter="lora", lora_r=4, lora_alpha=8, lora_target_modules=["q_proj", "v_proj"])
    print("all as it should be")


if __name__ == "__main__":
    main()
