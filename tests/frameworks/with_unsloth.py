"""The selection inside Unsloth, by hand and on a CPU: what its SFTTrainer trained on, row by row.

    python3.11 -m venv us && us/bin/pip install unsloth -e .
    us/bin/python tests/frameworks/with_unsloth.py [FOLDER [CHECK ...]]
    UNSLOTH_ALLOW_CPU=1 us/bin/python tests/frameworks/with_unsloth.py [FOLDER [CHECK ...]]

Tried with unsloth and unsloth_zoo 2026.10.9: Python 3.11, torch 2.13, transformers 5.17.0, trl 1.15.0, accelerate
1.15.0, datasets 4.8.5, peft 0.21.2; a torchvision for CUDA has to be taken out beside a torch for CPUs.

Without a GPU, Unsloth trains with a part of its own for CPUs: its loader, chunked losses, and a class derived from
TRL's SFTTrainer. With UNSLOTH_ALLOW_CPU=1 the trainer is the one that it writes for GPUs (`UnslothSFTTrainer`, padding-
free, `train` assigned on the instance, its own preparation of texts), on a model of transformers: Unsloth's own models
run on GPUs alone, and were not tried.

Asserted, beside what `witness.py` says: runs with texts of which every token is trained on, with
`train_on_responses_only`, gradient accumulation, packing and, in the part for CPUs, LoRA; that a resumed run trains on
the rows of one that was not stopped, to the same weights; and what is refused, with its sentence.
"""

# ruff: noqa: E402
from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import unsloth  # before trl and transformers, as it wants

AS_ON_GPU = os.environ.pop("UNSLOTH_ALLOW_CPU", "0") == "1"
if AS_ON_GPU:  # what Unsloth leaves out on a CPU: it writes TRL's trainers anew
    from unsloth.models.rl import PatchFastRL
    from unsloth.trainer import _patch_trl_trainer

    PatchFastRL()
    _patch_trl_trainer()

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from unsloth_zoo.dataset_utils import train_on_responses_only
from witness import (
    Witness,
    changed,
    check_linear,
    check_resumed,
    check_run,
    new_folder,
    refused,
    rows,
    run_checks,
    save_model,
    times,
)

from ifd_trainer import IFDSelectionCallback
from ifd_trainer.training.history import History

KEEP, ROWS, EPOCHS, BATCH, PEAK = 0.25, 24, 3, 2, 1e-2
HEADER = "### Response:\n"
FOLDER = new_folder()


def model_and_tokenizer(lora: bool) -> tuple[Any, Any]:
    """As a user's script loads them; without a GPU, the model of the GPU's part is transformers' own."""
    if AS_ON_GPU:
        model = AutoModelForCausalLM.from_pretrained(FOLDER / "model", dtype=torch.float32)
        return model, AutoTokenizer.from_pretrained(FOLDER / "model")
    model, tokenizer = unsloth.FastLanguageModel.from_pretrained(
        str(FOLDER / "model"), 256, dtype=torch.float32, load_in_4bit=False, full_finetuning=not lora
    )
    if lora:
        model = unsloth.FastLanguageModel.get_peft_model(
            model, r=8, lora_alpha=16, lora_dropout=0, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"]
        )
    return model, tokenizer


def trainer_for(name: str, *, responses: bool = False, lora: bool = False, **more: Any) -> SFTTrainer:
    """A trainer of texts, of which the responses alone are trained on if asked to."""
    model, tokenizer = model_and_tokenizer(lora)
    texts = [
        f"### Instruction:\n{row['instruction']}\n\n{HEADER}{row['output']}{tokenizer.eos_token}" for row in rows(ROWS)
    ]
    settings = {
        "output_dir": str(FOLDER / name),
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": 1,
        "num_train_epochs": EPOCHS,
        "learning_rate": 5 * PEAK if lora else PEAK,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0,  # Unsloth's own trainer begins with a tenth of the steps
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataset_text_field": "text",
        "max_length": 256,
        "use_cpu": True,
        "bf16": False,
        "fp16": False,
        "gradient_checkpointing": False,
        **more,
    }
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"text": texts}),
        args=SFTConfig(**settings),
    )
    if responses:
        trainer = train_on_responses_only(trainer, instruction_part="### Instruction:\n", response_part=HEADER)
    return trainer


def train(trainer: SFTTrainer, stop_at: int | None = None, **options: Any) -> Witness:
    """One run with the selection and a witness; without guards, for which the model knows too little."""
    witness = Witness(stop_at)
    trainer.add_callback(IFDSelectionCallback(trainer, keep=KEEP, guard=None))
    trainer.add_callback(witness)
    trainer.train(**options)
    return witness


def check(name: str, accumulation: int = 1, **more: Any) -> Witness:
    """A run whose steps, rows, scores and learning rate are what the selection says."""
    trainer = trainer_for(name, gradient_accumulation_steps=accumulation, **more)
    witness, counts = train(trainer), [round(ROWS * KEEP)] * EPOCHS
    history = check_run(witness, FOLDER / name, counts, batch=BATCH, accumulation=accumulation)
    check_linear(witness, trainer.args.learning_rate)
    assert history.settings["direct_prefix"].endswith(HEADER), history.settings["direct_prefix"]
    assert changed(history), "each epoch selected the same rows"
    return witness


def without_selection() -> None:
    """All rows in each epoch: what the run is without the callback."""
    trainer, witness = trainer_for("all"), Witness()
    print(*(f"{cls.__module__}.{cls.__qualname__}" for cls in type(trainer).__mro__[:-1]), sep="\n  ")
    trainer.add_callback(witness)
    trainer.train()
    assert list(witness.steps.values()) == [ROWS // BATCH] * EPOCHS, witness.steps
    assert all(len(set(epoch)) == ROWS for epoch in witness.epochs.values())


def selected() -> None:
    """A quarter of the rows in each epoch, those with the highest scores, which two forward passes confirm."""
    check("texts")
    check("responses", responses=True)
    check("accumulates", accumulation=4, responses=True)
    if not AS_ON_GPU:
        check("lora", lora=True, responses=True)


def packed() -> None:
    """Examples stay whole in packed rows, which Unsloth prepares without labels; on a CPU it turns packing off."""
    trainer = trainer_for("packed", packing=True, max_length=128)
    assert trainer.args.packing == AS_ON_GPU
    witness, history = train(trainer), History.load(FOLDER / "packed")
    witness.data = trainer.selection_pool.examples
    for epoch in witness.epochs:
        table = history.rows(epoch)
        assert sorted(witness.positions(epoch)) == sorted(table["row_id"][table["times"] > 0]), epoch
        assert 0 < len(witness.positions(epoch)) < ROWS


def resumed() -> None:
    """Runs that are stopped inside the second epoch, or at the end of the first, go on with the same rows."""
    saves = {"save_strategy": "steps", "save_steps": 1, "responses": True}
    whole, before = check("whole", **saves), times(History.load(FOLDER / "whole"))
    for step in (4, 3):
        name = f"from_{step}"
        train(trainer_for(name, **saves), stop_at=step)
        again = train(trainer_for(name, **saves), resume_from_checkpoint=str(FOLDER / name / f"checkpoint-{step}"))
        check_resumed(again, whole, step)
        assert times(History.load(FOLDER / name)) == before


def refusals() -> None:
    """What cannot be exact is refused with a sentence."""
    model, tokenizer = model_and_tokenizer(lora=False)
    pairs = [{"prompt": row["instruction"], "chosen": row["output"], "rejected": "no"} for row in rows(8)]
    args = DPOConfig(
        output_dir=str(FOLDER / "pairs"), use_cpu=True, bf16=False, report_to="none", gradient_checkpointing=False
    )
    trainer = DPOTrainer(model=model, processing_class=tokenizer, train_dataset=Dataset.from_list(pairs), args=args)
    with refused("DPOTrainer trains on pairs of a chosen and a rejected answer"):
        IFDSelectionCallback(trainer)


if __name__ == "__main__":
    save_model(FOLDER / "model")
    run_checks([without_selection, selected, packed, resumed, refusals])
