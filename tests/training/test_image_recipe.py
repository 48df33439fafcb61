"""The recipe for rows with images, planned and run at toy size, and what is refused of such rows."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import ROOT
from tiny_runs import RECIPES
from vision_models import build, by_hand, image_rows, saved

from ifd_trainer.cli import main
from ifd_trainer.training.history import History

pytestmark = RECIPES

REWARDS = [5, 1, 7, 3, 8, 2, 6, 4, 9, 0, None, 10]
RECIPE = str(ROOT / "recipes" / "vlm_ifd.yaml")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return saved("llava", tmp_path_factory.mktemp("sees"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    """Twelve rows as LLaVA's files have them, with a reward; one has two places for its image, one no image file."""
    folder = tmp_path_factory.mktemp("rows")
    lines = []
    for row, reward in zip(image_rows(12), REWARDS, strict=True):
        name = f"{row['row_id']}.png"
        if row["row_id"] != 104:
            row["images"][0].save(folder / name)
        question, answer = (message["content"] for message in row["messages"])
        asked = f"<image>\n{question}" if row["row_id"] != 105 else f"<image>{question}<image>"
        turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
        lines.append({"row_id": row["row_id"], "image": name, "conversations": turns, "reward": reward})
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder / "rows.jsonl")


def words(model, data, folder, *more) -> list[str]:
    found = ["train", RECIPE, "--model", model, "--dataset", data, "--output_dir", str(folder), "--use_cpu", "true"]
    found += ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1", "--bf16", "false"]
    found += ["--dtype", "float32", "--gradient_checkpointing", "false", "--disable_tqdm", "true"]
    return [*found, "--max_length", "200", "--save_strategy", "no", *more]


def test_the_plan(model, data, tmp_path, capsys):
    assert main(words(model, data, tmp_path, "--plan", "--keep", "2")) == 0
    out = capsys.readouterr().out
    assert "epoch 0: 2 rows, 1 update; epoch 1: 2 rows, 1 update; epoch 2: 2 rows, 1 update" in out
    assert "pool: 11 of 12 rows, 1 that cannot be rendered" in out
    assert not (tmp_path / "ifd_history").exists()


def test_the_recipe_runs_as_planned_by_reward_and_then_by_ifd(model, data, tmp_path, caplog):
    options = ("--keep", "3", "--max_ifd", "inf", "--cascade_share", "6", "--max_steps", "2")
    assert main(words(model, data, tmp_path, *options)) == 0
    assert "the row has 1 images, and 2 places <image>" in caplog.text
    history = History.load(tmp_path)
    rows = history.rows(0).set_index("row_id")
    assert rows.loc[104, "reason"] == "unreadable_image"
    assert 105 not in rows.index
    assert rows.loc[110, "reason"] == "no_value"
    seen, processor = build("llava")
    raw = {row["row_id"]: row for row in image_rows(12)}
    preferred = sorted((row for row in rows.index if row not in (104, 110)), key=lambda row: -REWARDS[row - 100])[:6]
    ifd = {
        row: by_hand(seen, processor, raw[row], "both") / by_hand(seen, processor, raw[row], "nothing")
        for row in preferred
    }
    np.testing.assert_allclose([rows.loc[row, "ifd"] for row in preferred], [ifd[row] for row in preferred], rtol=1e-4)
    assert set(rows.index[rows["reason"] == "kept"]) == set(sorted(ifd, key=ifd.get)[-3:])
    assert (rows["reason"] == "less_preferred").sum() == len(rows) - 6 - 2
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "of the 6 rows with the highest reward, those with the highest IFD" in page
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_another_model_scores_before_the_run(model, data, tmp_path):
    options = ("--keep", "3", "--max_ifd", "inf", "--max_steps", "1", "--scorer", model, "--without", "image")
    assert main(words(model, data, tmp_path, *options)) == 0
    history = History.load(tmp_path)
    assert history.settings["scorer"] == "columns"
    rows = history.rows(0).set_index("row_id")
    seen, processor = build("llava")
    raw = {row["row_id"]: row for row in image_rows(12)}
    given = [by_hand(seen, processor, raw[100], name) for name in ("both", "question")]
    np.testing.assert_allclose(rows.loc[100, ["cas", "das"]].astype(float), given, rtol=1e-4)


def test_what_is_refused(model, data, tmp_path, capsys):
    assert main(words(model, data, tmp_path, "--plan", "--guards", "duplicates")) == 2
    assert "The rows have images, and the guards duplicates run or compare texts alone" in capsys.readouterr().err
    texts = tmp_path / "texts.jsonl"
    texts.write_text(json.dumps({"instruction": "a", "output": "b", "reward": 1}) + "\n")
    assert main(words(model, str(texts), tmp_path, "--plan")) == 2
    assert "does not load as a causal language model" in " ".join(capsys.readouterr().err.split())
    assert main(words(model, data, tmp_path, "--plan", "--cascade_by", "")) == 2
    assert "name it with cascade_by" in capsys.readouterr().err
