"""Every recipe: what its header says, the paper's numbers, its plan, and a real run of a few steps on a tiny model."""

from __future__ import annotations

import csv
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from conftest import ROOT, build_model
from tiny_runs import RECIPES, TOKENIZER, raw_rows
from transformers import PreTrainedModel
from transformers.utils import is_torch_bf16_gpu_available

from ifd_trainer.cli import main
from ifd_trainer.data.files import load_rows
from ifd_trainer.recipe.machine import PlanConfig
from ifd_trainer.recipe.parsing import parse_recipe
from ifd_trainer.scoring.transform import IFDScorer
from ifd_trainer.training.history import History

pytestmark = RECIPES

FOLDER = ROOT / "recipes"
RECIPES = sorted(path.stem for path in FOLDER.glob("*.yaml") if not path.stem.startswith(("accelerate", "compare")))
TEXTS = [name for name in RECIPES if name != "vlm_ifd"]  # which has rows with images: see test_image_recipe
CHERRY = ["alpaca_cherry_5pct", "alpaca_cherry_10pct", "alpaca_cherry_fsdp", "wizardlm_cherry_10pct"]
CHERRY_LORA = "alpaca_cherry_lora_24gb"
ROWS = 40
SOURCES = [["web", "chat", "code", "web"][i % 4] for i in range(ROWS)]
LEVELS = [["easy", "middle", "hard", "hard"][i % 4] for i in range(ROWS)]
ASKED = [None if i == 5 else (i * 7 % ROWS) / ROWS for i in range(ROWS)]  # what `score --known` attached to the rows
ALIGNED = [(i * 3 % ROWS) / ROWS for i in range(ROWS)]  # what `score --scores ira` attached
STEADY = [0.3 + (i * 3 % ROWS) / ROWS / 2 for i in range(ROWS)]  # what `score --neighbours` did
GAPS = [(i * 11 % ROWS) / ROWS for i in range(ROWS)]  # what `score --spin` did
TAKEN = ("rewritten_instruction", "rewritten_answer")
CHOSEN_BEFORE = ("reflection_compare", "selective_reflection")  # recipes that train on all rows that they are given
UNSCORED = ("target_set", "curriculum_by_column", "superfiltering_tshirt", *CHOSEN_BEFORE)
LORA = (CHERRY_LORA, "federated_scores", "feddqc_tiers")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A folder with a tiny model and its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    build_model(len(TOKENIZER)).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return str(folder)


def write_rows(path: Path, rows: list[dict]) -> str:
    """A file of rows, and another one of them as chats with a tool beside it."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    chats = [
        {
            "conversations": [
                {"from": "human", "value": row["instruction"]},
                {"from": "function_call", "value": '{"name": "look", "arguments": {}}'},
                {"from": "observation", "value": row["instruction"][::-1]},
                {"from": "gpt", "value": row["output"]},
            ],
            "tools": "[]",
        }
        for row in rows
    ]
    path.with_name(f"chats_{path.name}").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    return str(path)


def rows_for(recipe: str, data: str) -> str:
    """Those in the format that a recipe names."""
    settings = yaml.safe_load((FOLDER / f"{recipe}.yaml").read_text())
    return str(Path(data).with_name(f"chats_{Path(data).name}")) if settings.get("format") == "sharegpt" else data


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    """Forty rows, two of them refusals, as a local file."""
    rows = [
        row
        | {"quality": "good", "known_agreement": ASKED[i], "sifd_mean": STEADY[i], "sifd_std": i % 7 / 10}
        | {"source": SOURCES[i], "level": LEVELS[i], "ira": ALIGNED[i], "spin_gap": GAPS[i]}
        for i, row in enumerate(raw_rows(ROWS, with_input=True))
    ]
    rows[3]["output"] = "As an AI language model, I cannot say which park is red."
    rows[8]["output"] = "I'm sorry, but I cannot answer that."
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", rows)


def small(recipe: str, model: str, data: str, folder: Path, *more: str) -> list[str]:
    """The command line of a recipe at toy size."""
    words = ["train", str(FOLDER / f"{recipe}.yaml"), "--model", model, "--dataset", rows_for(recipe, data)]
    words += ["--output_dir", str(folder)]
    words += ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1", "--use_cpu", "true"]
    words += ["--bf16", "false", "--gradient_checkpointing", "false", "--disable_tqdm", "true"]
    words += ["--on_misaligned", "warn", "--alpha", "0.9"]  # the model is random: wrong prompts help as much
    settings = yaml.safe_load((FOLDER / f"{recipe}.yaml").read_text())
    words += ["--scorer", model] if "scorer" in settings else []
    words += ["--diverse", "15", "--embedder", "", "--keep", "6"] if "diverse" in settings else []
    words += ["--threshold", "0.1"] if "threshold" in settings else []
    words += ["--eval_dataset", data] if "eval_dataset" in settings else []
    words += ["--keep", "0.1"] if recipe == "lead" else []
    words += ["--every_steps", "3"] if "every_steps" in settings else []
    return [*words, *more]


def forbid(patch) -> None:
    """What a plan may not do is an error: to score, to load weights, to reach a hub."""

    def never(*_, **__):
        raise AssertionError("a plan does nothing but plan")

    patch.setattr(IFDScorer, "__call__", never)
    patch.setattr(PreTrainedModel, "from_pretrained", never)
    patch.setattr("transformers.Trainer.init_hf_repo", never)


def plan_of(out: str) -> list[str]:
    """The lines of a plan in what a command prints."""
    lines = out[out.index("Plan: ") :].splitlines()
    return [line.rstrip() for line in lines if re.match(r"Plan: |pool: \d|update: |original weights: ", line)]


def test_all_recipes_are_there():
    assert {
        *CHERRY,
        CHERRY_LORA,
        "alpaca_superfiltering",
        "alpaca_superfiltering_diverse",
        "alpaca_dynamic",
        "alpaca_one_epoch",
        "alpaca_curriculum",
        "wizardlm_dynamic",
        "curriculum_by_column",
        "infobatch",
        "iterit",
        "lead",
        "knowledge_detection",
        "mixture_by_epoch",
        "quotas",
        "reflection_compare",
        "spin_gate",
        "target_set",
        "multiturn_tools",
        "selective_reflection",
        "superfiltering_tshirt",
        "federated_scores",
        "feddqc_tiers",
        "bad_cases",
        "vlm_ifd",
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


@pytest.mark.parametrize("recipe", TEXTS)
def test_the_plan_of_every_recipe(recipe, model, data, tmp_path, capsys):
    assert main(small(recipe, model, data, tmp_path, "--plan")) == 0
    plan = capsys.readouterr().out
    pool = pool_of(recipe)
    keep = {
        "iterit": 0.05,
        "alpaca_curriculum": 0.3 / 3,
        "alpaca_cherry_5pct": 0.05,
        "alpaca_one_epoch": 0.2,
        "alpaca_superfiltering": 0.05,
        "demo": 0.12,
    }
    keep |= {
        "superfiltering_tshirt": 0.05,
        "federated_scores": 0.9 / 3,
        "feddqc_tiers": 1 / 3,
        "spin_gate": 0.5,
        **dict.fromkeys(CHOSEN_BEFORE, 1.0),
    }
    rows = 6 if recipe.endswith("diverse") else round(keep.get(recipe, 0.1) * pool)
    updates = -(-rows // 2)
    if recipe in (*CHERRY, CHERRY_LORA):
        assert "then anew from the original weights; epoch 1:" in plan
        assert "original weights: 0.00 GB in" in plan
    epochs = range(1, 4) if recipe in (*CHERRY, CHERRY_LORA) else range(3)
    if recipe == "alpaca_one_epoch":
        assert "(epoch 0: 8 rows, 4 updates in 2 parts of 3, the last of 1)" in plan
        assert "each part of an epoch scores the rows that are left, 74 in all, 9.2 for each one" in plan
        return
    if recipe == "curriculum_by_column":
        assert [f"epoch {epoch}: {rows} rows" in plan for epoch, rows in enumerate((10, 10, 20))] == [True] * 3
        return
    if recipe == "infobatch":
        assert [f"epoch {epoch}: {rows} rows" in plan for epoch, rows in enumerate((27, 27, ROWS))] == [True] * 3
        return
    for epoch in epochs:
        assert f"epoch {epoch}: {rows} rows, {updates} update" in plan
    assert not (tmp_path / "ifd_history").exists()


@pytest.mark.parametrize("recipe", TEXTS)
def test_every_recipe_runs_as_planned(recipe, model, data, tmp_path, capsys, monkeypatch):
    words = small(recipe, model, data, tmp_path, "--max_steps", "4", "--save_strategy", "no")
    words += ["--anneal_share", "0"] if recipe == "infobatch" else []  # which needs to know the number of epochs
    with monkeypatch.context() as patch:
        forbid(patch)
        assert main([*words, "--plan"]) == 0
    plan = plan_of(capsys.readouterr().out)
    assert main(words) == 0
    out = capsys.readouterr().out
    assert plan_of(out) == plan
    history = History.load(tmp_path)
    assert (tmp_path / "report.html").is_file()
    assert (tmp_path / ("adapter_model.safetensors" if recipe in LORA else "model.safetensors")).is_file()
    scored = [record for record in history.epochs if record["scored_at"] is not None]
    assert bool(scored) == (recipe not in UNSCORED)
    of_value = [{100 + i: value for i, value in enumerate(values)} for values in (SOURCES, LEVELS)]  # by row ids
    epochs = sorted({record["epoch"] for record in history.epochs})
    kept = [rows["row_id"][rows["times"] > 0].tolist() for rows in map(history.rows, epochs)]
    if recipe == "alpaca_one_epoch":
        assert [(record["part"], record["kept"]) for record in history.epochs] == [(1, 6), (2, 2)]
        assert len(kept[0]) == 8
    if recipe == "multiturn_tools":
        assert history.settings["turns"] == "tokens"
        assert (history.rows(0)["answer_tokens"] > history.rows(0)["last_answer_tokens"]).all()
    if recipe == "quotas":
        assert all(sum(of_value[0][row] == "code" for row in rows) >= 1 for rows in kept)
        assert all(sum(of_value[0][row] == "chat" for row in rows) <= 2 for rows in kept)
    if recipe == "bad_cases":
        for record, rows in zip(history.epochs, kept, strict=True):
            told = record["bad_cases"]
            assert told["losses"].keys() == set(SOURCES)
            assert told["rows"] == {name: sum(of_value[0][row] == name for row in rows) for name in set(SOURCES)}
            free = (1 - 3 * 0.05) / sum(told["losses"].values())
            assert told["shares"] == pytest.approx({name: 0.05 + free * x for name, x in told["losses"].items()})
        page = (tmp_path / "report.html").read_text()
        assert "in shares of the values of source that follow their held-out losses" in page
        assert "Shares by source" in page
        assert "Shares by source" in out
    if recipe == "mixture_by_epoch":
        assert [sum(of_value[0][row] == "chat" for row in rows) for rows in kept] == [2, 1]
    if recipe == "lead":
        assert [record["scored_at"] for record in history.epochs] == [0, 0]
        assert [sum(of["rows"] for of in record["lead"].values()) for record in history.epochs] == [4, 4]
        assert history.rows(0)["train_loss"].notna().sum() == 4
    if recipe == "infobatch":
        rows = history.rows(0)
        above = rows["cas"] >= rows["cas"].mean()
        assert (rows["weight"][above] == 1).all()
        assert rows["weight"].sum() == pytest.approx(ROWS)
        assert rows["train_loss"].notna().sum() == 8  # four steps of two rows
    if recipe == "curriculum_by_column":
        assert {of_value[1][row] for row in kept[0]} == {"easy"}
    if recipe == "target_set":
        assert history.epochs[0]["reasons"] == {"kept": 4, "less_like_targets": 36}
        assert history.settings["policy"]["targets"].endswith("data/code_targets.jsonl")
        assert history.rows(0)["times"].equals(history.rows(1)["times"])  # embedded once
    assert {record["pool"] for record in history.epochs} == {pool_of(recipe)}
    if recipe in (*CHERRY, CHERRY_LORA):
        sample = 3 if recipe.startswith("wizardlm") else 4  # a tenth of the pool
        assert history.epochs[0]["reasons"] == {"kept": sample, "not_in_sample": history.epochs[0]["pool"] - sample}
        assert not (tmp_path / "ifd_original").exists()
    if recipe.endswith("diverse"):
        assert scored[0]["reasons"]["redundant"] == 9
    if recipe.startswith("alpaca_superfiltering"):
        assert history.settings["scorer"] == "columns"
        assert history.settings["score"] == "ifd_ppl"
    if recipe == "superfiltering_tshirt":
        steady = sorted(range(ROWS), key=lambda place: -STEADY[place])[:4]
        expected = sorted(steady, key=lambda place: place % 7)[:2]
        assert history.epochs[0]["reasons"] == {"kept": 2, "unstable": 2, "below_cut": ROWS - 4}
        assert kept_places(history) == set(expected)
    if recipe == "federated_scores":
        rows = history.rows(0)
        assert kept_places(history) == set(rows["ira"].sort_values(ascending=False).index[:12])  # the first of 3 tiers
    if recipe == "feddqc_tiers":
        assert all(ALIGNED[row - 100] >= 0.1 for row in history.rows(0)["row_id"])
        assert kept_places(history) == set(history.rows(0)["ira"].sort_values(ascending=False).index[:12])
    if recipe == "knowledge_detection":
        rows = history.rows(0)
        free = rows.loc[rows["reason"].isin(["kept", "higher_score"]), "row_id"] - rows["row_id"].min()  # of guards
        lowest = sorted(free, key=lambda place: 2 if ASKED[place] is None else ASKED[place])[:4]
        assert set(rows.loc[rows["reason"] == "kept", "row_id"] - rows["row_id"].min()) == set(lowest)
        assert (rows["reason"] == "above_limit").any()
    if recipe == "spin_gate":
        free = [place for place, why in enumerate(history.rows(0)["reason"]) if why in ("kept", "below_cut")]
        most = sorted(free, key=lambda place: -GAPS[place])[:20]
        assert kept_places(history) == set(most)


def pool_of(recipe: str) -> int:
    """How many of the rows a recipe selects from: no refusals, or no rows below its threshold."""
    return {"feddqc_tiers": sum(value >= 0.1 for value in ALIGNED)}.get(recipe, 38 if "wizardlm" in recipe else ROWS)


def kept_places(history: History) -> set[int]:
    """Where the rows that the first epoch trained on stand in the pool."""
    return set(np.flatnonzero(history.rows(0)["reason"] == "kept").tolist())


def commands_of(recipe: str) -> list[list[str]]:
    """The commands in a recipe's header, as words."""
    header = (FOLDER / f"{recipe}.yaml").read_text().split("\n\n")[0].replace("\\\n#", "")
    return [shlex.split(line) for line in re.findall(r"^# +ifd-trainer (.*)$", header, re.MULTILINE)]


@pytest.mark.parametrize("recipe", ["selective_reflection", "reflection_compare", "spin_gate", "superfiltering_tshirt"])
def test_the_commands_in_a_header_make_the_rows_of_the_recipe(recipe, model, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pairs = [row | {"pair": i // 2} for i, row in enumerate(raw_rows(12))]
    for name in ("instructions.jsonl", "responses.jsonl", "original.jsonl"):
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in pairs))
    for name, changed in (("rewritten.jsonl", ("instruction", "output")), ("answers.jsonl", ("output",))):
        new = [row | {column: pairs[-1 - i][column] for column in changed} for i, row in enumerate(pairs[:10])]
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in new))
    for words in commands_of(recipe):
        if words[0] in ("score", "reflect"):
            words[words.index("--model") + 1] = model
            words[1] = words[1] if Path(words[1]).is_file() else rows_for(recipe, data)
            words = [word if word != "2048" else "512" for word in words] + ["--device", "cpu"]
            words += ["--spin-max-new-tokens", "8"] if "--spin" in words else []
        assert main(words) == 0
    rows = load_rows(yaml.safe_load((FOLDER / f"{recipe}.yaml").read_text())["dataset_name"])
    if recipe == "selective_reflection":
        scored = load_rows("responses.parquet").to_pandas()
        lowest = scored.loc[scored.groupby("pair")["rifd"].idxmin(), "row_id"]
        assert sorted(rows["row_id"]) == sorted(lowest)
        chosen, scored = load_rows("chosen_instructions.jsonl"), load_rows("instructions.parquet").to_pandas()
        assert sorted(chosen["row_id"]) == sorted(scored.loc[scored.groupby("pair")["ifd"].idxmax(), "row_id"])
    if recipe == "reflection_compare":
        assert rows["row_id"][:] == [row["row_id"] for row in pairs]
        assert set(rows["reflect_reason"]) <= {*TAKEN, "kept_original", "not_rewritten"}
    if recipe == "spin_gate":
        scored = load_rows("alpaca_spin.parquet").to_pandas()
        assert sorted(rows["row_id"]) == sorted(scored.loc[scored["spin_gap"] > 0.1, "row_id"])
    words = [
        "train",
        str(FOLDER / f"{recipe}.yaml"),
        "--plan",
        "--model",
        model,
        "--use_cpu",
        "true",
        "--bf16",
        "false",
    ]
    assert main(words) == 0
    assert f"pool: {len(rows)} of {len(rows)} rows" in capsys.readouterr().out


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> str:
    """As many rows as the largest count in a recipe wants."""
    path = tmp_path_factory.mktemp("large") / "rows.jsonl"
    own = {"ira": 1.0, "known_agreement": 0.5, "sifd_mean": 0.5, "sifd_std": 0.1, "spin_gap": 0.5}
    rows = [
        row | own | {"source": SOURCES[i % ROWS], "level": LEVELS[i % ROWS]} for i, row in enumerate(raw_rows(1100))
    ]
    return write_rows(path, rows)


@pytest.mark.parametrize("recipe", [name for name in TEXTS if name != "demo"])
def test_a_recipe_for_gpus_is_planned_as_it_is_on_any_machine(recipe, model, large, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    forbid(monkeypatch)
    words = ["train", str(FOLDER / f"{recipe}.yaml"), "--plan", "--model", model, "--dataset", rows_for(recipe, large)]
    words += ["--threshold", "1"] if recipe == "feddqc_tiers" else []
    words += ["--eval_dataset", large] if recipe == "bad_cases" else []
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    lines = lines[lines.index(next(line for line in lines if line.startswith("Plan: "))) :]
    several = "; 1,100 of them have several answers, all of which are scored (turns='tokens')"
    assert lines[1] == f"pool: 1,100 of 1,100 rows{several if recipe == 'multiturn_tools' else ''}"
    assert lines[2].endswith("= 32 rows" if recipe.endswith("fsdp") else "= 128 rows")
    if not is_torch_bf16_gpu_available():
        assert lines[-1] == "this machine has no GPU with bfloat16 (bf16: true); training needs it"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "lacking"),
    [
        (["--attn_implementation", "flash_attention_2"], "no GPU for attn_implementation: flash_attention_2"),
        (["--tf32", "true"], "no GPU with TF32 (tf32: true)"),
        (["--bf16", "false", "--fp16", "true"], "this machine has no GPU for float16 (fp16: true); training needs it"),
        (["--fsdp", "full_shard"], "no second process (fsdp: start it with torchrun or accelerate launch)"),
        (["--load_in_4bit", "true"], "no package bitsandbytes (load_in_4bit, load_in_8bit)"),
        (["--use_liger_kernel", "true"], "no package liger-kernel (use_liger_kernel: true)"),
        (["--report_to", "wandb"], "no package wandb (report_to)"),
        (["--push_to_hub", "true", "--hub_model_id", "someone/something"], ""),
        (["--deepspeed", "ds.json"], ""),
    ],
)
def test_what_a_machine_lacks_is_noted_in_a_plan(options, lacking, model, data, tmp_path, capsys, monkeypatch):
    if torch.accelerator.is_available():
        pytest.skip("this machine has what others lack")
    monkeypatch.setattr(
        "ifd_trainer.recipe.machine.installed",
        lambda package: package not in ("bitsandbytes", "liger_kernel", "wandb"),
    )
    monkeypatch.setattr("ifd_trainer.recipe.machine.get_available_reporting_integrations", list)
    monkeypatch.chdir(tmp_path)
    forbid(monkeypatch)
    Path("ds.json").write_text('{"zero_optimization": {"stage": 3}}')
    words = ["train", str(FOLDER / "alpaca_dynamic.yaml"), "--plan", "--model", model, "--dataset", data]
    assert main([*words, *options]) == 0
    out = capsys.readouterr().out
    assert "3 updates (epoch 0: 4 rows, 1 update; epoch 1: 4 rows" in out
    assert lacking in out.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["ds.json"]


def test_half_precision_that_is_set_aside_does_not_turn_the_other_one_on(tmp_path):
    if torch.accelerator.is_available():
        pytest.skip("this machine has what others lack")
    config = PlanConfig(str(tmp_path), fp16=True, bf16=None)
    assert (config.fp16, config.bf16, config.lacking) == (False, False, ["GPU for float16 (fp16: true)"])


def test_adapters_are_planned_without_their_package(model, data, tmp_path, capsys, monkeypatch):
    for module in ("machine", "run"):
        monkeypatch.setattr(f"ifd_trainer.recipe.{module}.installed", lambda package: package != "peft")
    assert main(small(CHERRY_LORA, model, data, tmp_path, "--plan")) == 0
    lines = plan_of(capsys.readouterr().out)
    assert lines[-1] == f"original weights: those of the adapters, in {tmp_path} until training ends"


def test_another_model_embeds_for_a_target_set_and_scores_no_row(model, data, tmp_path, monkeypatch):
    monkeypatch.setattr(IFDScorer, "__call__", lambda *_: pytest.fail("rows are scored"))
    words = small("target_set", model, data, tmp_path, "--max_steps", "2", "--save_strategy", "no")
    assert main([*words, "--scorer", model]) == 0
    assert History.load(tmp_path).epochs[0]["reasons"] == {"kept": 4, "less_like_targets": 36}


def test_a_plan_says_what_rows_are_held_against(model, data, tmp_path, capsys):
    assert main(small("target_set", model, data, tmp_path, "--plan")) == 0
    out = capsys.readouterr().out
    assert "scoring: none, since nothing reads a score" in out
    assert "targets: 10; rows and targets are embedded where rows would be scored" in out
    assert main(small("target_set", model, data, tmp_path, "--plan", "--target_set", "no.jsonl")) == 2
    assert "no.jsonl" in capsys.readouterr().err


def test_a_label_may_be_a_column_that_scoring_adds(model, data, tmp_path):
    assert main(small("alpaca_superfiltering", model, data, tmp_path, "--plan", "--label", "ifd_status")) == 0
    assert main(small("alpaca_dynamic", model, data, tmp_path, "--plan", "--label", "ifd_status")) == 2


def test_what_is_refused_under_deepspeed_is_refused_in_its_plan(model, data, tmp_path, capsys):
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 2}}')
    words = small("alpaca_cherry_5pct", model, data, tmp_path, "--plan", "--deepspeed", str(tmp_path / "ds.json"))
    assert main(words) == 2
    assert "cannot start anew from the original weights under DeepSpeed" in capsys.readouterr().err


def test_the_disk_of_the_original_weights_is_known_without_them(model, data, tmp_path, capsys):
    config = json.loads((Path(model) / "config.json").read_text())
    config |= {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    folder = tmp_path / "large"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config | {"num_key_value_heads": 32, "head_dim": 128}))
    TOKENIZER.save_pretrained(folder)
    assert main(small("alpaca_cherry_5pct", str(folder), data, tmp_path, "--plan")) == 0
    assert "original weights: 25.92 GB in" in capsys.readouterr().out  # 6.5 billion numbers of 4 bytes
    assert main(small(CHERRY_LORA, str(folder), data, tmp_path, "--plan")) == 0
    assert "original weights: 0.16 GB in" in capsys.readouterr().out
    assert main(small(CHERRY_LORA, str(folder), data, tmp_path, "--plan", "--load_in_4bit", "true")) == 0
    assert "original weights: 0.08 GB in" in capsys.readouterr().out


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
