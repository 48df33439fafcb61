"""Shares that follow held-out losses in a run: the rows of each epoch, by losses of the log and scores of a loop."""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path

import pytest
import yaml
from conftest import build_model
from tiny_runs import (
    INF,
    RECIPES,
    TOKENIZER,
    Stop,
    model_with,
    ratios,
    raw_rows,
    reference_scores,
    select,
    sft_trainer,
    text_rows,
    train,
)
from trl import SFTTrainer

from ifd_trainer import BadCases, Cherry, RandomRows
from ifd_trainer.cli import main
from ifd_trainer.errors import UserError
from ifd_trainer.recipe.selection import SelectionConfig
from ifd_trainer.report.share_table import share_cells, share_table

SOURCES = ["code"] * 12 + ["web"] * 12


def rows_of(count: int, seed: int, first: int = 0) -> list[dict]:
    """Half of them with answers that nothing tells (code), half with one answer that is soon learned (web)."""
    rows, words = raw_rows(count, seed=seed), random.Random(seed)
    for i, row in enumerate(rows):
        row["row_id"] = first + i
        if i >= count // 2:
            row["output"] = f"the red ball {words.choice(['', 'ran'])}".strip()
    return rows


POOL = text_rows(rows_of(24, 0)).add_column("source", SOURCES)
OF = dict(zip(POOL["row_id"], SOURCES, strict=True))
HELD_OUT = text_rows(rows_of(12, 5, first=500))
SETS = {"code": HELD_OUT.select(range(6)), "web": HELD_OUT.select(range(6, 12))}


def counts(shares: dict[str, float], budget: int) -> dict[str, int]:
    """Rows by share, rounded to the largest remainders."""
    found = {name: int(share * budget) for name, share in shares.items()}
    by_rest = sorted(shares, key=lambda name: found[name] - shares[name] * budget)
    for name in by_rest[: budget - sum(found.values())]:
        found[name] += 1
    return found


def logged_losses(trainer) -> list[dict[str, float]]:
    """The held-out losses before each epoch: those before training, then those of each evaluation."""
    log = trainer.state.log_history
    before = next(entry for entry in log if "ifd/eval_code_loss_before" in entry)
    losses = [{name: before[f"ifd/eval_{name}_loss_before"] for name in SETS}]
    told = [[entry[f"eval_{name}_loss"] for entry in log if f"eval_{name}_loss" in entry] for name in SETS]
    return losses + [dict(zip(SETS, each, strict=True)) for each in zip(*told, strict=True)]


def test_the_share_of_what_stays_hard_rises_and_its_rows_are_those_of_the_losses(tmp_path):
    trainer = sft_trainer(tmp_path, POOL, eval_dataset=SETS, eval_strategy="epoch", num_train_epochs=3)
    callback = select(trainer, keep=8, policy=BadCases("source", policy=Cherry(INF)))
    seen = train(trainer)
    losses, shares_of_code = logged_losses(trainer), []
    for epoch, rows in enumerate(seen.epochs()):
        shares = {name: loss / sum(losses[epoch].values()) for name, loss in losses[epoch].items()}
        scores = ratios(reference_scores(trainer, model_with(seen.weights[epoch])))
        expected = []
        for name, count in counts(shares, 8).items():
            expected += sorted((row for row in scores if OF[row] == name), key=lambda row: -scores[row])[:count]
        assert sorted(rows) == sorted(expected)
        record = callback.history.epochs[epoch]["bad_cases"]
        assert record["losses"] == losses[epoch]
        assert record["shares"] == pytest.approx(shares)
        assert record["rows"] == {name: sum(OF[row] == name for row in rows) for name in SETS}
        shares_of_code.append(record["rows"]["code"])
    assert shares_of_code == sorted(shares_of_code)
    assert shares_of_code[-1] > shares_of_code[0]
    reasons = callback.history.rows(0)["reason"].value_counts()
    assert reasons.to_dict() == {"over_quota": 16, "kept": 8}
    logged = [entry for entry in trainer.state.log_history if "ifd/share_code" in entry]
    assert [entry["ifd/share_code"] for entry in logged] == [
        record["bad_cases"]["shares"]["code"] for record in callback.history.epochs
    ]
    headers, lines = share_cells(callback.history)
    assert headers == ["epoch", "code", "web"]
    first = callback.history.epochs[0]["bad_cases"]
    assert lines[0][1] == (
        f"{100 * first['shares']['code']:.0f} % ({first['rows']['code']}), loss {first['losses']['code']:.3f}"
    )
    assert share_table(callback.history).row_count == 3


def test_losses_are_measured_where_the_trainer_has_not_just_evaluated(tmp_path):
    found = []
    for strategy in ("epoch", "steps", "no"):
        config = {"eval_dataset": SETS, "eval_strategy": strategy, "eval_steps": 5, "num_train_epochs": 2}
        trainer = sft_trainer(tmp_path / strategy, POOL, **config)
        policy = BadCases("source", at_least=0.1, temperature=0.5, policy=Cherry(INF))
        callback = select(trainer, keep=8, policy=policy)
        order = train(trainer).order()
        found.append((order, [record["bad_cases"] for record in callback.history.epochs]))
    assert found[0] == found[1] == found[2]


def resumable(folder: Path, **config):
    settings = {"eval_dataset": SETS, "eval_strategy": "epoch", "save_strategy": "steps", "save_steps": 2}
    trainer = sft_trainer(folder, POOL, **{**settings, "num_train_epochs": 3, **config})
    return trainer, select(trainer, keep=8, every=2, policy=BadCases("source", policy=Cherry(INF)))


@pytest.mark.parametrize("step", [6, 8])  # of four updates an epoch: inside the second, and before its evaluation
def test_a_resumed_run_has_the_same_shares(tmp_path, step):
    trainer, whole = resumable(tmp_path / "whole")
    expected = train(trainer)
    cut, _ = resumable(tmp_path / "cut")
    cut.add_callback(Stop(step))
    train(cut)
    rest, callback = resumable(tmp_path / "cut")
    assert train(rest, resume_from_checkpoint=True).order() == expected.order()[2 * step :]
    told = [[record["bad_cases"] for record in each.history.epochs] for each in (whole, callback)]
    assert told[0] == told[1]
    assert told[0][1]["shares"] == told[0][0]["shares"] != told[0][2]["shares"]  # every=2: the same rows again


def test_a_value_without_held_out_rows_keeps_its_share_and_that_is_said(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    sources = ["code"] * 12 + ["web"] * 6 + ["chat"] * 6
    rows = POOL.remove_columns("source").add_column("source", sources)
    sets = {**SETS, "poems": SETS["web"]}
    trainer = sft_trainer(tmp_path, rows, eval_dataset=sets, num_train_epochs=1)
    callback = select(trainer, keep=8, policy=BadCases("source", policy=RandomRows()))
    assert "No held-out rows have source chat: its share of the kept rows is its share of the pool." in caplog.text
    assert "No row of the pool has source poems: its held-out loss says nothing." in caplog.text
    train(trainer)
    record = callback.history.epochs[0]["bad_cases"]
    assert record["rows"]["chat"] == 2  # a quarter of eight
    assert record["shares"]["chat"] == 0.25
    assert record["losses"].keys() == {"code", "web"}


def test_warm_up_epochs_have_no_shares(tmp_path):
    trainer = sft_trainer(tmp_path, POOL, eval_dataset=SETS, eval_strategy="epoch", num_train_epochs=2)
    callback = select(trainer, keep=8, warmup_epochs=1, policy=BadCases("source", policy=Cherry(INF)))
    train(trainer)
    assert callback.history.epochs[0].get("bad_cases") is None
    losses = logged_losses(trainer)[1]
    assert callback.history.epochs[1]["bad_cases"]["losses"] == losses


@pytest.mark.parametrize(
    ("sets", "policy", "said"),
    [
        (None, BadCases("source"), r"eval_dataset has to be a mapping .* there is none\. Set eval_dataset="),
        (HELD_OUT, BadCases("source"), "it is Dataset"),
        ({"poems": HELD_OUT}, BadCases("source"), "has sets for poems, and the column 'source' .* values code and web"),
        (SETS, BadCases("level"), "no column 'level'"),
        (SETS, BadCases("source", at_least=0.6), "is more than all rows: lower it to at most 0.5"),
    ],
)
def test_what_gives_no_losses_is_told_when_the_callback_is_made(tmp_path, sets, policy, said):
    trainer = sft_trainer(tmp_path, POOL, eval_dataset=sets)
    with pytest.raises(UserError, match=said):
        select(trainer, keep=8, policy=policy)


# ---- recipes ----------------------------------------------------------------------------------------------------


@RECIPES
def test_the_keys_of_a_recipe_make_the_policy(caplog):
    caplog.set_level(logging.WARNING)
    keys = {"per": "source", "bad_cases": True, "bad_cases_floor": 0.1, "bad_cases_temperature": 2.0}
    assert SelectionConfig(**keys).chosen_policy() == BadCases("source", 0.1, 2.0)
    assert "no effect" not in caplog.text
    SelectionConfig(bad_cases_floor=0.1)
    assert "bad_cases_floor: no effect without bad_cases." in caplog.text
    with pytest.raises(UserError, match="bad_cases are for the values of a column: name it with per"):
        SelectionConfig(bad_cases=True)
    with pytest.raises(UserError, match="given were bad_cases and stages"):
        SelectionConfig(per="source", bad_cases=True, stages=["a"])


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> dict:
    """What a recipe says of rows with two columns, in the working directory, where the rows are too."""
    monkeypatch.chdir(tmp_path)
    build_model(len(TOKENIZER)).save_pretrained("model")
    TOKENIZER.save_pretrained("model")
    for name, rows in (("rows", rows_of(24, 0)), ("held_out", rows_of(12, 5, first=500))):
        half = len(rows) // 2
        for i, row in enumerate(rows):
            row |= {"source": "code" if i < half else "web", "level": ["easy", "hard", "hard"][i % 3]}
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = {"model_name_or_path": "model", "dataset_name": "rows.jsonl", "keep": 0.25, "max_ifd": "inf"}
    keys |= {"eval_dataset": "held_out.jsonl", "eval_strategy": "epoch", "output_dir": "run", "guards": "none"}
    keys |= {"use_cpu": True, "report_to": "none", "save_strategy": "no", "num_train_epochs": 1, "bf16": False}
    return keys | {"gradient_checkpointing": False, "disable_tqdm": True, "per_device_train_batch_size": 2}


@RECIPES
def test_held_out_rows_are_parted_by_any_column(recipe, capsys, monkeypatch):
    given, init = {}, SFTTrainer.__init__

    def noted(self, *args, eval_dataset=None, **options):
        given.update({name: len(rows) for name, rows in eval_dataset.items()})
        init(self, *args, eval_dataset=eval_dataset, **options)

    folder = Path.cwd()
    monkeypatch.setattr(SFTTrainer, "__init__", noted)
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe | {"eval_by": "level"}))
    assert main(["train", "recipe.yaml", "--plan"]) == 0
    assert given == {"easy": 4, "hard": 8}
    given.clear()
    words = ["train", "recipe.yaml", "--plan", "--per", "source", "--bad_cases", "true"]
    assert main([*words, "--eval_by", "source"]) == 0
    assert given == {"code": 6, "web": 6}
    assert main(["train", "recipe.yaml", "--plan", "--eval_by", "colour"]) == 2
    assert "eval_by: the held-out rows have no column 'colour'" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    Path("recipe.yaml").write_text(yaml.safe_dump({**recipe, "eval_dataset": None, "eval_strategy": "no"}))
    assert main(["train", "recipe.yaml", "--plan", "--eval_by", "source"]) == 2
    assert "eval_by parts held-out rows, and there are none: name some with eval_dataset" in capsys.readouterr().err
    assert main(["train", "recipe.yaml", "--plan", "--per", "source", "--bad_cases", "true"]) == 2
    assert "in a recipe eval_dataset: FILE_OR_NAME" in capsys.readouterr().err
