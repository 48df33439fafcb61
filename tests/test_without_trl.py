"""All but `ifd-trainer train` works where TRL is not installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from conftest import build_model, build_tokenizer

from ifd_trainer.cli import main

# Run as a program of its own: what this process has imported of trl is not there.
BLOCKED = """
import sys

sys.modules["trl"] = None  # as if it were not installed
sys.path.insert(0, sys.argv[1])
"""
TRAINING = """
from conftest import build_model, build_tokenizer
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments
from ifd_trainer import IFDSelectionCallback

tokenizer = build_tokenizer()

def ids(text):
    return tokenizer(text)["input_ids"]

def tokenised(number):
    prompt, answer = ids(f"Add {number}.\\n\\n### Response:"), ids(f"{number + 7} cats")
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}

settings = {"learning_rate": 1e-2, "report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}
trainer = Trainer(
    model=build_model(len(tokenizer)),
    args=TrainingArguments("run", num_train_epochs=2, per_device_train_batch_size=2, **settings),
    train_dataset=Dataset.from_list([tokenised(number) for number in range(12)]),
    data_collator=DataCollatorForSeq2Seq(tokenizer),
    processing_class=tokenizer,
)
callback = IFDSelectionCallback(trainer, keep=4, max_ifd=float("inf"), guard=None)
trainer.add_callback(callback)
trainer.train()
print("trained", trainer.state.global_step, [sum(callback.history.rows(epoch)["times"]) for epoch in (0, 1)])
"""
COMMAND = """
from ifd_trainer.cli import main

sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a model and rows."""
    folder = tmp_path_factory.mktemp("place")
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(folder / "model")
    build_model(len(tokenizer)).save_pretrained(folder / "model")
    rows = [{"instruction": f"Add {n}.", "input": "", "output": f"{n + 7} cats"} for n in range(8)]
    pd.DataFrame(rows).to_json(folder / "rows.jsonl", orient="records", lines=True)
    (folder / "recipe.yaml").write_text("model_name_or_path: model\ndataset_name: rows.jsonl\n", encoding="utf-8")
    return folder


def ran(place: Path, program: str, *words: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", BLOCKED + program, str(Path(__file__).parent), *words]
    return subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)


def test_a_plain_trainer_is_trained_with_the_callback(place):
    done = ran(place, TRAINING)
    assert done.stdout.splitlines()[-1:] == ["trained 4 [4, 4]"], done.stderr


def test_rows_are_scored_selected_and_reported(place):
    score = ran(
        place, COMMAND, "score", "rows.jsonl", "--model", "model", "--output", "scored.parquet", "--device", "cpu"
    )
    assert score.returncode == 0, score.stderr
    assert pd.read_parquet(place / "scored.parquet")["ifd"].notna().all()
    chosen = ("select", "scored.parquet", "--keep", "3", "--max-ifd", "99", "--output", "chosen/kept.jsonl")
    for words in (chosen, ("report", "scored.parquet", "--output", "page")):
        done = ran(place, COMMAND, *words)
        assert done.returncode == 0, done.stderr
    assert len(pd.read_json(place / "chosen/kept.jsonl", lines=True)) == 3
    assert (place / "page" / "report.html").is_file()


@pytest.mark.parametrize("words", [["recipe.yaml"], ["recipe.yaml", "--plan"], ["--help-all"]])
def test_the_recipe_runner_says_how_trl_is_installed(place, words):
    done = ran(place, COMMAND, "train", *words)
    assert done.returncode == 2
    assert done.stderr == (
        "ifd-trainer: error: ifd-trainer train fine-tunes with trl 1.8 or later, and none is installed: pip install "
        "'ifd_trainer[trl]'.\n"
    )


def test_the_recipe_runner_names_a_trl_that_is_too_old(monkeypatch, capsys):
    monkeypatch.setattr("ifd_trainer.commands.train.find_spec", lambda name: name)
    monkeypatch.setattr("ifd_trainer.commands.train.version", lambda name: "0.24.0")
    assert main(["train", "recipe.yaml"]) == 2
    assert "fine-tunes with trl 1.8 or later, and 0.24.0 is installed: pip install" in capsys.readouterr().err


def test_the_help_of_the_recipe_runner_needs_no_trl(place):
    assert ran(place, COMMAND, "train", "--help").returncode == 0
