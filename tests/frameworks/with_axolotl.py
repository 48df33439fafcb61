"""Train a tiny model in axolotl with the plugin, and assert what was trained on.

    python3.11 -m venv ax-env && ax-env/bin/pip install torch==2.13.0 axolotl==0.19.0 -e .
    ax-env/bin/python tests/frameworks/with_axolotl.py

On a CPU, `pip install --no-deps axolotl==0.19.0` beside its other dependencies does without xformers, fla, modal,
lm_eval and the cloud file systems; triton and bitsandbytes are imported, but not used. Tried with axolotl 0.19.0,
transformers 5.16.1, torch 2.13.0, Python 3.11.

Asserted: the number of steps, and that each epoch trained on the rows that were selected and no others, alone and with
LoRA, grouping by length, curriculum sampling, evaluation, train_on_inputs and chats; scores against two plain forward
passes; a resume inside an epoch that ends with the same rows and weights; what is refused, and how.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ |= {"AXOLOTL_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

import tiny

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


def run(config: dict[str, Any]) -> None:
    """What `axolotl train` does with such a file."""
    import yaml
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets
    from axolotl.train import train

    with tempfile.NamedTemporaryFile("w", suffix=".yaml", delete=False) as file:
        yaml.safe_dump(config, file)
    cfg = load_cfg(file.name)
    train(cfg=cfg, dataset_meta=load_datasets(cfg=cfg))


def selects(folder: Path, rows: list[int] | None = None, **changes: Any) -> tiny.Watched:
    """Train anew, and assert which rows were trained on."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    with tiny.watched() as seen:
        run(configuration(folder, **changes))
    tiny.check_epochs(seen, folder / "run", rows or [KEPT] * EPOCHS)
    print(f"{changes}: {seen.trainer.state.global_step} steps", file=sys.stderr)
    return seen


def main() -> None:
    folder = Path(tempfile.mkdtemp())
    tiny.write_model(folder / "model")
    tiny.write_rows(folder / "rows.jsonl", ROWS)
    tiny.write_chats(folder / "chats.jsonl", ROWS)

    # ---- a run, its scores, and a resume inside its second epoch
    seen = selects(folder, save_strategy="steps", save_steps=1, save_total_limit=99)
    state = seen.trainer.state
    assert (state.global_step, state.max_steps, state.epoch) == (STEPS, STEPS, EPOCHS)
    rates = [log["learning_rate"] for log in state.log_history if "learning_rate" in log]
    assert len(rates) == STEPS
    assert abs(rates[-1] - 0.001 / STEPS) < 1e-9, rates
    tiny.check_scores(seen, folder / "model", folder / "run")
    with tiny.watched() as again:
        run(configuration(folder, resume_from_checkpoint=str(folder / "run" / "checkpoint-4")))
    tiny.check_resumed(again, seen, rows=4 * 4)

    # ---- what else a configuration may say
    seen = selects(folder, save_first_step=True, warmup_steps=None, warmup_ratio=0.25)
    assert (folder / "run" / "checkpoint-1" / "trainer_state.json").exists()
    assert seen.trainer.args.get_warmup_steps(STEPS) == 3
    seen = selects(folder, [KEPT, KEPT, 8], max_steps=8)  # the third epoch is not finished
    assert seen.trainer.state.global_step == 8
    selects(folder, group_by_length=True)
    seen = selects(folder, curriculum_sampling=True)
    assert seen.rows[:KEPT] == sorted(seen.rows[:KEPT], key=seen.pool.index)
    seen = selects(folder, [10, 10, 10], val_set_size=4, evals_per_epoch=1, saves_per_epoch=1)
    assert sum("eval_loss" in log for log in seen.trainer.state.log_history) >= EPOCHS
    selects(folder, train_on_inputs=True)
    selects(folder, [ROWS, KEPT, 6], ifd_selection={**SELECTION, "keep": [1.0, 0.5, 6]})
    chats = {"path": str(folder / "chats.jsonl"), "ds_type": "json", "type": "chat_template"}
    selects(folder, datasets=[chats], chat_template="chatml")

    # ---- what is refused
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
        with tiny.refused(sentence):
            run(configuration(folder, **changes))
    # ---- last, since axolotl's kernels for LoRA stay in the classes of the models
    selects(folder, adapter="lora", lora_r=4, lora_alpha=8, lora_target_modules=["q_proj", "v_proj"])
    print("all as it should be")


if __name__ == "__main__":
    main()
