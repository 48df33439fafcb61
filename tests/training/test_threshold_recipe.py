"""The key `threshold` of recipes, and the commands of FedDQC from scores to a site's run."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, build_model
from tiny_runs import RECIPES, TOKENIZER, raw_rows

from ifd_trainer.cli import main
from ifd_trainer.data.files import load_rows
from ifd_trainer.data.histogram_files import read_threshold
from ifd_trainer.recipe.parsing import parse_recipe
from ifd_trainer.recipe.plan import planned
from ifd_trainer.recipe.run import build_run
from ifd_trainer.training.history import History

pytestmark = RECIPES

RECIPE = ROOT / "recipes" / "feddqc_tiers.yaml"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tiny")
    build_model(len(TOKENIZER)).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return str(folder)


def test_a_site_trains_on_the_rows_above_the_threshold_each_once(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = raw_rows(24)
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    header = RECIPE.read_text().split("\n\n")[0].replace("\\\n#", "")
    commands = [shlex.split(line) for line in re.findall(r"^# +ifd-trainer (.*)$", header, re.MULTILINE)]
    assert [words[0] for words in commands] == ["score", "histogram", "threshold"]
    commands[0][commands[0].index("--model") + 1] = model
    for words in commands:
        assert main(words) == 0
    threshold, scored = read_threshold(Path("threshold.json")), load_rows("scored.jsonl").to_pandas()
    above = scored["row_id"][scored["ira"] >= threshold.value].tolist()
    assert threshold.sites[0].fewest <= len(above) <= threshold.sites[0].most
    words = ["--model_name_or_path", model, "--use_cpu", "true", "--bf16", "false", "--disable_tqdm", "true"]
    words += ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1", "--save_strategy", "no"]
    words += ["--gradient_checkpointing", "false", "--output_dir", "run"]
    prepared = build_run(parse_recipe(str(RECIPE), words))
    said = f"pool: {len(above)} of 24 rows, {24 - len(above)} not at or above the threshold, named in"
    assert said in planned(prepared)
    prepared.trainer.train()
    history = History.load("run")
    epochs = [history.rows(epoch) for epoch in range(3)]
    trained = [row for epoch in epochs for row in epoch["row_id"][epoch["times"] > 0]]
    assert sorted(trained) == sorted(above)
    assert {record["scored_at"] for record in history.epochs} == {0, 1, 2}  # anew for each tier
    left_out = [json.loads(line) for line in Path("run/ifd_history/left_out.jsonl").read_text().splitlines()]
    assert sorted(each["row_id"] for each in left_out) == sorted({row["row_id"] for row in rows} - set(above))
    assert {each["reason"] for each in left_out} == {"its score is not at or above the threshold"}


@pytest.mark.parametrize(
    ("threshold", "said"),
    [
        ("0.5", "threshold is one of ira, which is no column of the rows: ['completion', 'prompt', 'row_id']"),
        ("none.json", "'none.json' is no number, and there is no such file"),
        ("inf", "threshold wants a number"),
    ],
)
def test_a_threshold_that_cannot_be_used_is_told_before_training(model, tmp_path, monkeypatch, capsys, threshold, said):
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in raw_rows(6)))
    recipe = yaml.safe_load(RECIPE.read_text()) | {"model_name_or_path": model, "dataset_name": "rows.jsonl"}
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe | {"threshold": threshold}))
    assert main(["train", "recipe.yaml", "--plan", "--use_cpu", "true", "--bf16", "false"]) == 2
    assert said in capsys.readouterr().err


def test_rows_without_a_score_and_above_the_limit_are_not_trained_on(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    scores = [(0.9, "ok"), (0.2, "ok"), (1.2, "ok"), (None, "too_short"), (0.95, "ok"), (0.6, "failed")]
    rows = [row | {"ifd": ifd, "ifd_status": s} for row, (ifd, s) in zip(raw_rows(6), scores, strict=True)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    agreed = {"value": 0.5, "score": "ifd", "max_ifd": 1.0, "between": [0.5, 0.6], "sites": []}
    Path("t.json").write_text(json.dumps({"kind": "score threshold", "version": 1} | agreed))
    words = ["train", "--model", model, "--dataset", "rows.jsonl", "--threshold", "0.1", "--score", "ifd_status"]
    assert main([*words, "--plan", "--use_cpu", "true", "--bf16", "false"]) == 2
    assert "threshold: the column ifd_status holds no numbers" in capsys.readouterr().err
    words = ["train", "--model", model, "--dataset", "rows.jsonl", "--threshold", "t.json", "--keep", "1.0", "--plan"]
    assert main([*words, "--use_cpu", "true", "--bf16", "false"]) == 0
    assert "epoch 0: 2 rows" in capsys.readouterr().out
    Path("t.json").write_text(json.dumps({"kind": "score threshold", "version": 1} | agreed | {"value": 1.5}))
    assert main([*words, "--use_cpu", "true", "--bf16", "false"]) == 2
    assert "No row has ifd >= 1.5: this site has none to train on" in capsys.readouterr().err
