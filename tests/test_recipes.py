"""Every recipe: what its header says, the paper's numbers, its plan, and a real run of a few steps on a tiny model."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from conftest import ROOT, build_model
from training import TOKENIZER, raw_rows

from ifd_trainer.cli import main
from ifd_trainer.history import History
from ifd_trainer.train import parse_recipe

FOLDER = ROOT / "recipes"
RECIPES = sorted(path.stem for path in FOLDER.glob("*.yaml") if not path.stem.startswith("accelerate"))
CHERRY = ["alpaca_cherry_5pct", "alpaca_cherry_10pct", "alpaca_cherry_fsdp", "wizardlm_cherry_10pct"]
CHERRY_LORA = "alpaca_cherry_lora_24gb"
ROWS = 40


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A folder with a tiny model and its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    build_model(len(TOKENIZER)).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    """Forty rows, two of them refusals, as a local file."""
    rows = [{**row, "quality": "good"} for row in raw_rows(ROWS, with_input=True)]
    rows[3]["output"] = "As an AI language model, I cannot say which park is red."
    rows[8]["output"] = "I'm sorry, but I cannot answer that."
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def small(recipe: str, model: str, data: str, folder: Path, *more: str) -> list[str]:
    """The command line of a recipe at toy size."""
    words = ["train", str(FOLDER / f"{recipe}.yaml"), "--model", model, "--dataset", data, "--output_dir", str(folder)]
    words += ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1", "--use_cpu", "true"]
    words += ["--bf16", "false", "--gradient_checkpointing", "false", "--disable_tqdm", "true"]
    settings = yaml.safe_load((FOLDER / f"{recipe}.yaml").read_text())
    words += ["--scorer", model] if "scorer" in settings else []
    words += ["--diverse", "15", "--embedder", "", "--keep", "6"] if "diverse" in settings else []
    words += ["--eval_dataset", data] if "eval_dataset" in settings else []
    return [*words, *more]


def test_all_recipes_are_there():
    assert {
        *CHERRY,
        CHERRY_LORA,
        "alpaca_superfiltering",
        "alpaca_superfiltering_diverse",
        "alpaca_dynamic",
        "alpaca_curriculum",
        "wizardlm_dynamic",
        "demo",
    } == set(RECIPES)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_header_says_what_it_reproduces_on_what_and_how_long(recipe):
    header = (FOLDER / f"{recipe}.yaml").read_text().split("\n\n")[0].splitlines()
    assert all(line.startswith("#") for line in header)
    for word in ("Reproduces", "Hardware", "Time"):
        assert sum(line.startswith(f"# {word}: ") for line in header) == 1


@pytest.mark.parametrize("recipe", [*CHERRY, CHERRY_LORA, "alpaca_superfiltering", "alpaca_superfiltering_diverse"])
def test_the_hyperparameters_are_the_papers(recipe):
    parsed = parse_recipe(str(FOLDER / f"{recipe}.yaml"), ["--use_cpu", "true", "--bf16", "false"])
    sft = parsed.sft
    gpus = 4 if recipe.endswith("fsdp") else 1
    assert sft.per_device_train_batch_size * sft.gradient_accumulation_steps * gpus == 128
    assert sft.learning_rate == (2e-4 if recipe == CHERRY_LORA else 2e-5)
    assert (sft.num_train_epochs, sft.weight_decay, sft.warmup_steps) == (3, 0, 0.03)
    assert sft.lr_scheduler_type == "cosine"
    assert sft.max_length == (1024 if recipe.startswith("wizardlm") else 512)
    assert parsed.selection.max_ifd == 1.0
    assert parsed.selection.method == "cherry"
    if parsed.selection.brief != "none":
        assert (parsed.selection.brief_clusters, parsed.selection.brief_per_cluster) == (100, 10)
    assert parsed.selection.drop_refusals is recipe.startswith("wizardlm")


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_plan_of_every_recipe(recipe, model, data, tmp_path, capsys):
    assert main(small(recipe, model, data, tmp_path, "--plan")) == 0
    plan = capsys.readouterr().out
    pool = 38 if recipe.startswith("wizardlm") else ROWS
    keep = {"alpaca_curriculum": 0.3 / 3, "alpaca_cherry_5pct": 0.05, "alpaca_superfiltering": 0.05, "demo": 0.12}
    rows = 6 if recipe.endswith("diverse") else round(keep.get(recipe, 0.1) * pool)
    updates = -(-rows // 2)
    if recipe in (*CHERRY, CHERRY_LORA):
        assert "then anew from the original weights; epoch 1:" in plan
        assert "original weights: 0.00 GB in" in plan
    epochs = range(1, 4) if recipe in (*CHERRY, CHERRY_LORA) else range(3)
    for epoch in epochs:
        assert f"epoch {epoch}: {rows} rows, {updates} updates" in plan
    assert not (tmp_path / "ifd_history").exists()


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_runs(recipe, model, data, tmp_path, capsys):
    assert main(small(recipe, model, data, tmp_path, "--max_steps", "4", "--save_strategy", "no")) == 0
    history = History.load(tmp_path)
    assert (tmp_path / "report.html").is_file()
    assert (tmp_path / ("adapter_model.safetensors" if recipe == CHERRY_LORA else "model.safetensors")).is_file()
    scored = [record for record in history.epochs if record["scored_at"] is not None]
    assert scored
    assert {record["pool"] for record in history.epochs} == {38 if recipe.startswith("wizardlm") else ROWS}
    if recipe in (*CHERRY, CHERRY_LORA):
        sample = 3 if recipe.startswith("wizardlm") else 4  # a tenth of the pool
        assert history.epochs[0]["reasons"] == {"kept": sample, "not_in_sample": history.epochs[0]["pool"] - sample}
        assert not (tmp_path / "ifd_original").exists()
    if recipe.endswith("diverse"):
        assert scored[0]["reasons"]["redundant"] == 9
    if "superfiltering" in recipe:
        assert history.settings["scorer"] == "columns"
        assert history.settings["score"] == "ifd_ppl"


def test_a_recipe_reads_csv_too(model, tmp_path):
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["row_id", "instruction", "input", "output"])
        writer.writeheader()
        writer.writerows(raw_rows(ROWS, with_input=True))
    words = small("alpaca_dynamic", model, str(tmp_path / "rows.csv"), tmp_path / "run", "--max_steps", "2")
    assert main([*words, "--save_strategy", "no"]) == 0
    assert History.load(tmp_path / "run").epochs[0]["kept"] == 4


def test_refusals_are_left_out_with_a_count(model, data, tmp_path, caplog):
    assert main(small("wizardlm_dynamic", model, data, tmp_path, "--plan")) == 0
    assert "drop_refusals: 2 of 40 rows were left out" in caplog.text


def test_settings_that_contradict_each_other_are_named(model, data, tmp_path, capsys):
    words = small("alpaca_cherry_5pct", model, data, tmp_path, "--scorer", model)
    assert main(words) == 2
    assert "scores without a brief experience" in capsys.readouterr().err
    assert main(small("alpaca_dynamic", model, data, tmp_path, "--definition", "cherry")) == 2
    assert "Set scorer, or leave definition out" in capsys.readouterr().err


def test_a_label_that_is_missing_is_said_before_training(model, data, tmp_path, capsys):
    assert main(small("alpaca_dynamic", model, data, tmp_path, "--label", "colour")) == 2
    assert "label='colour' is not among the data set's columns" in capsys.readouterr().err
    assert not (tmp_path / "ifd_history").exists()


def test_the_accelerate_config_is_one():
    config = load_config_from_file(str(FOLDER / "accelerate_fsdp.yaml"))
    assert (config.distributed_type.value, config.num_processes, config.mixed_precision) == ("FSDP", 4, "bf16")
    assert config.fsdp_config["fsdp_version"] == 2
