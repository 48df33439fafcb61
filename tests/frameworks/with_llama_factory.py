"""The selection inside LLaMA-Factory, by hand and on a CPU: what `run_exp` trained on, row by row.

    python3.11 -m venv lf && lf/bin/pip install llamafactory -e . jieba nltk rouge_chinese
    lf/bin/python tests/frameworks/with_llama_factory.py [FOLDER [CHECK ...]]

Tried with llamafactory 0.9.5, transformers 5.6.0, trl 0.24.0, accelerate 1.11.0, datasets 4.0.0, peft 0.18.1, torch
2.13.0, Python 3.11. Where an index has torchvision and torchaudio for CUDA alone, they fail beside a torch for CPUs:
take torchvision out, and delete the folder `lib` of torchaudio, which then does without its compiled part; text needs
neither.

Asserted, beside what `witness.py` says: runs with LoRA, gradient accumulation, disable_shuffling,
predict_with_generate, rows grouped by length, chats (with mask_history too), train_on_prompt, and the paper's method;
that a resumed run trains on the rows of one that was not stopped, to the same weights; and what is refused, with its
sentence.
"""

from __future__ import annotations

import json
import os
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from llamafactory.train.tuner import run_exp
from witness import (
    Witness,
    changed,
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
    times,
    watched,
)

from ifd_trainer import IFDSelectionCallback, SelectLater
from ifd_trainer.method.brief_experience import Brief
from ifd_trainer.training.history import History

KEEP, ROWS, EPOCHS, BATCH, PEAK = 0.5, 24, 3, 2, 1e-2
FOLDER = new_folder()


def settings(name: str, **more: Any) -> dict[str, Any]:
    """What a user's yaml file says, for a tiny model."""
    return {
        "model_name_or_path": str(FOLDER / "model"),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "full",
        "dataset": "tiny",
        "dataset_dir": str(FOLDER / "data"),
        "template": "alpaca",
        "cutoff_len": 256,
        "output_dir": str(FOLDER / name),
        "per_device_train_batch_size": BATCH,
        "num_train_epochs": EPOCHS,
        "learning_rate": PEAK,
        "lr_scheduler_type": "linear",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "overwrite_cache": True,
        "use_cpu": True,
        **more,
    }


def train(name: str, stop_at: int | None = None, later: SelectLater | None = None, **more: Any) -> Witness:
    """One run with the selection and a witness; without guards, for which the model knows too little."""
    with watched(stop_at) as witness:
        run_exp(settings(name, **more), callbacks=[later or SelectLater(keep=KEEP, guard=None)])
    return witness


def check(name: str, rows: int = ROWS, accumulation: int = 1, **more: Any) -> Witness:
    """A run whose steps, rows, scores and learning rate are what the selection says."""
    witness = train(name, gradient_accumulation_steps=accumulation, **more)
    counts = [round(rows * KEEP)] * EPOCHS
    history = check_run(witness, FOLDER / name, counts, batch=BATCH, accumulation=accumulation)
    check_linear(witness, more.get("learning_rate", PEAK))
    assert changed(history), "each epoch selected the same rows"
    return witness


def without_selection() -> None:
    """All rows in each epoch: what the run is without the callback."""
    with watched() as witness:
        run_exp(settings("all"))
    assert list(witness.steps.values()) == [ROWS // BATCH] * EPOCHS, witness.steps
    assert all(len(set(epoch)) == ROWS for epoch in witness.epochs.values())


def selected() -> None:
    """Half of the rows in each epoch, those with the highest scores, which two forward passes confirm."""
    check("half")
    check("lora", finetuning_type="lora", lora_rank=8, learning_rate=5e-2)
    check("accumulates", accumulation=4)
    check("generates", rows=20, val_size=4, do_eval=True, eval_strategy="epoch", predict_with_generate=True)


def ordered() -> None:
    """Rows in the order of the training set, and grouped by their lengths."""
    witness = check("in_order", disable_shuffling=True)
    orders = [witness.positions(epoch) for epoch in witness.epochs]
    assert all(epoch == sorted(epoch) for epoch in orders), orders
    check("grouped", train_sampling_strategy="group_by_length")


def turns() -> None:
    """Chats: all answers that are trained on are scored, or the last one alone where that is."""
    for name, more in (("chats", {}), ("last_turn", {"mask_history": True})):
        check(name, dataset="chats", template="chatml", **more)
        header = History.load(FOLDER / name).settings["direct_prefix"]
        assert header == "<|im_start|>assistant\n", header  # as the tokenizer's own template has it


def whole_rows() -> None:
    """train_on_prompt: every token is trained on, and the answer is found by its header."""
    witness = train("prompts", train_on_prompt=True)
    history = check_run(witness, FOLDER / "prompts", [round(ROWS * KEEP)] * EPOCHS, batch=BATCH, accumulation=1)
    assert "### Response:" in history.settings["direct_prefix"], history.settings["direct_prefix"]


def papers_method() -> None:
    """A brief experience, then the epochs anew from the original weights, each with a whole schedule."""
    brief = Brief("random", clusters=3, per_cluster=2, max_share=0.25)
    later = SelectLater(IFDSelectionCallback.cherry, keep=KEEP, brief=brief)
    witness = train("cherry", later=later, lr_scheduler_type="warmup_stable_decay")
    assert list(witness.steps.values()) == [3] + [6] * EPOCHS, witness.steps
    before, after = witness.begun[0], witness.begun[1]
    assert all(torch.equal(before[name], after[name]) for name in before), "training did not begin anew"
    rates = [rate / PEAK for rate in witness.rates]
    assert rates[0] == 1, rates[:3]  # of 3 steps one stays, of 18 six
    assert rates[3:9] == [1] * 6, rates[3:]
    assert 0 < rates[-1] < 0.1, rates[3:]


def resumed() -> None:
    """Runs that are stopped inside the second epoch, or at the end of the first, go on with the same rows."""
    saves = {"save_strategy": "steps", "save_steps": 2}
    whole, before = check("whole", **saves), times(History.load(FOLDER / "whole"))
    for step in (8, 6):
        name = f"from_{step}"
        train(name, stop_at=step, **saves)
        again = train(name, resume_from_checkpoint=str(FOLDER / name / f"checkpoint-{step}"), **saves)
        check_resumed(again, whole, step)
        assert times(History.load(FOLDER / name)) == before


def refusals() -> None:
    """What cannot be exact is refused with a sentence."""
    for name, fields, sentence in (
        ("packing", {"packing": True}, "of the training set holds several examples: its position_ids begin anew"),
        ("neat_packing", {"neat_packing": True}, "of the training set holds several examples"),
        ("streaming", {"streaming": True, "max_steps": 6, "dataloader_num_workers": 1}, "got a streaming one"),
        ("pretraining", {"stage": "pt", "cutoff_len": 32}, ""),
        ("preferences", {"stage": "dpo", "dataset": "pairs"}, "trains on pairs of a chosen and a rejected answer"),
        ("rewards", {"stage": "rm", "dataset": "pairs"}, "prepared training set has ['chosen_input_ids', "),
        ("labelled", {"stage": "kto", "dataset": "judged"}, "trains on answers labelled as good or bad"),
    ):
        with refused(sentence):
            train(name, **fields)


def prepare() -> None:
    """The model and the data sets, as LLaMA-Factory wants them."""
    save_model(FOLDER / "model")
    alpaca = rows(ROWS)
    roles = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    sets = {
        "tiny": (alpaca, {}),
        "chats": (chats(ROWS), {"formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": roles}),
        "pairs": (
            [{**row, "rejected": "no"} for row in alpaca],
            {"ranking": True, "columns": {"prompt": "instruction", "chosen": "output", "rejected": "rejected"}},
        ),
        "judged": (
            [{**row, "good": i % 2 == 0} for i, row in enumerate(alpaca)],
            {"columns": {"prompt": "instruction", "response": "output", "kto_tag": "good"}},
        ),
    }
    for name, (content, _) in sets.items():
        save_rows(FOLDER / "data" / f"{name}.jsonl", content)
    described = {name: {"file_name": f"{name}.jsonl", **more} for name, (_, more) in sets.items()}
    (FOLDER / "data" / "dataset_info.json").write_text(json.dumps(described))


if __name__ == "__main__":
    prepare()
    run_checks([without_selection, selected, ordered, turns, whole_rows, papers_method, resumed, refusals])
