"""What `trl sft --config` takes, `ifd-trainer train` takes too: mixtures of data sets, test splits, `--config`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from conftest import build_model
from datasets import Dataset
from tiny_runs import RECIPES, TOKENIZER, raw_rows
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig, SFTTrainer, TrlParser, get_dataset

from ifd_trainer import SelectionConfig
from ifd_trainer.cli import main

pytestmark = RECIPES


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tiny")
    build_model(len(TOKENIZER)).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return str(folder)


def written(path: Path, name: str, count: int) -> str:
    rows = [
        {"instruction": f"{name} {i}: {row['instruction']}", "output": row["output"]}
        for i, row in enumerate(raw_rows(count))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def recipe_of(tmp_path: Path, model: str, **keys) -> str:
    path = tmp_path / "recipe.yaml"
    settings = {
        "model_name_or_path": model,
        "output_dir": str(tmp_path / "run"),
        "report_to": "none",
        "use_cpu": True,
        "keep": 0.5,
        "on_misaligned": "warn",
        "num_train_epochs": 1,
        "per_device_train_batch_size": 2,
        "gradient_checkpointing": False,
    }
    path.write_text(yaml.safe_dump(settings | keys))
    return str(path)


@pytest.fixture
def given(monkeypatch) -> dict[str, Dataset]:
    """The data sets that a trainer is given."""
    found, init = {}, SFTTrainer.__init__

    def noted(self, *args, train_dataset, eval_dataset=None, **options):
        found.update(train=train_dataset, held_out=eval_dataset)
        init(self, *args, train_dataset=train_dataset, eval_dataset=eval_dataset, **options)

    monkeypatch.setattr(SFTTrainer, "__init__", noted)
    return found


@pytest.mark.parametrize("beside", [True, False])
def test_a_mixture_is_trained_on_as_trl_reads_it(tmp_path, model, given, beside, capsys):
    a, b = written(tmp_path / "a.jsonl", "A", 12), written(tmp_path / "b.jsonl", "B", 20)
    expected = get_dataset(
        DatasetMixtureConfig(
            [
                {"path": "json", "data_files": a, "columns": ["instruction", "output"], "fraction": 0.75},
                {"path": "json", "data_files": b, "fraction": 0.25},
            ]
        )
    )["train"]
    one = {"path": "a.jsonl" if beside else a, "columns": ["instruction", "output"], "fraction": 0.75}
    recipe = recipe_of(tmp_path, model, datasets=[one, {"path": "json", "data_files": b, "fraction": 0.25}])
    assert main(["train", recipe, "--plan"]) == 0
    assert "epoch 0: 8 rows" in capsys.readouterr().out
    assert len(given["train"]) == 16
    assert [row["completion"] for row in given["train"]] == expected["output"][:]
    assert [row["prompt"] for row in given["train"]] == [f"{text}\n\n### Response:" for text in expected["instruction"]]
    assert given["held_out"] is None


def test_rows_of_a_mixture_whose_columns_are_others_are_left_out_and_counted(tmp_path, model, given, caplog):
    a = written(tmp_path / "a.jsonl", "A", 6)
    (tmp_path / "b.jsonl").write_text('{"question": "Who?", "answer": "Me."}\n' * 4)
    recipe = recipe_of(tmp_path, model, datasets=[{"path": str(tmp_path / "b.jsonl")}, {"path": a}])
    assert main(["train", recipe, "--plan"]) == 0
    assert len(given["train"]) == 6
    assert "4 of 10 rows cannot be trained on as 'wizardlm'" in caplog.text
    assert "row 0: instruction and output are null." in caplog.text


def test_a_part_of_a_mixture_is_held_out_and_the_same_part_each_time(tmp_path, model, given):
    data = written(tmp_path / "a.jsonl", "A", 20)
    recipe = recipe_of(tmp_path, model, datasets=[{"path": data}], test_split_size=0.25, eval_strategy="epoch")
    splits = []
    for _ in range(2):
        assert main(["train", "--config", recipe, "--plan"]) == 0
        splits.append([[row["prompt"] for row in given[name]] for name in ("train", "held_out")])
    train, held_out = splits[0]
    assert (len(train), len(held_out), len({*train, *held_out})) == (15, 5, 20)
    assert splits[1] == splits[0]


def test_a_recipe_of_a_mixture_trains(tmp_path, model, capsys):
    a, b = written(tmp_path / "a.jsonl", "A", 6), written(tmp_path / "b.jsonl", "B", 6)
    recipe = recipe_of(tmp_path, model, datasets=[{"path": a}, {"path": b}], test_split_size=4, eval_strategy="epoch")
    assert main(["train", f"--config={recipe}", "--save_strategy", "no"]) == 0
    history = (tmp_path / "run" / "ifd_history").rglob("*")
    assert any(path.is_file() for path in history)
    assert "held-out" in capsys.readouterr().out


def test_the_test_split_of_a_folder_is_held_out(tmp_path, model, given):
    folder = tmp_path / "rows"
    folder.mkdir()
    written(folder / "train.jsonl", "A", 8)
    written(folder / "test.jsonl", "T", 3)
    recipe = recipe_of(tmp_path, model, dataset_name=str(folder), eval_strategy="epoch")
    assert main(["train", recipe, "--plan"]) == 0
    assert (len(given["train"]), len(given["held_out"])) == (8, 3)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"datasets": [{"path": "rows.jsonl"}], "streaming": True}, "streaming is true, and selection scores all rows"),
        ({"dataset_name": "rows.jsonl", "dataset_streaming": True}, "set dataset_streaming: false."),
        ({"datasets": [{"pth": "rows.jsonl"}]}, "recipe.yaml, datasets: there is no key 'pth'. Did you mean path?"),
        (
            {"datasets": ["rows.jsonl"]},
            "datasets: each one is named by its path (`- path: rows.jsonl`), got 'rows.jsonl'.",
        ),
        (
            {"datasets": [{"path": 5}]},
            "datasets: each one is named by its path (`- path: rows.jsonl`), got {'path': 5}.",
        ),
        (
            {"datasets": [{"path": "rows.jsonl", "fraction": 0}]},
            "fraction of rows.jsonl must be a number above 0, got 0.",
        ),
        ({"datasets": [{"path": "rows.jsonl", "columns": "id"}]}, "columns of rows.jsonl wants a list, got 'id'."),
        (
            {"datasets": [{"path": "rows.jsonl", "fraction": 0.5}, {"path": "rows.jsonl"}]},
            "`fraction` must be set for either all",
        ),
        (
            {"datasets": [{"path": "json", "data_files": "none.jsonl"}]},
            "datasets: json cannot be read as one data set: ",
        ),
        (
            {"dataset_name": "rows.jsonl", "eval_strategy": "epoch"},
            "there are no held-out rows: name some with eval_dataset",
        ),
        ({}, "A run needs a model and a data set"),
    ],
)
def test_what_cannot_be_read_or_streamed_is_told(tmp_path, model, keys, words, capsys):
    written(tmp_path / "rows.jsonl", "A", 4)
    assert main(["train", recipe_of(tmp_path, model, **keys), "--plan"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert words in error


def test_a_data_set_beside_a_mixture_is_said_to_be_left(tmp_path, model, caplog, given):
    data = written(tmp_path / "a.jsonl", "A", 6)
    recipe = recipe_of(tmp_path, model, datasets=[{"path": data}], dataset_name="someone/rows")
    assert main(["train", recipe, "--plan"]) == 0
    assert "datasets is given, and dataset_name (someone/rows) is not read." in caplog.text
    assert len(given["train"]) == 6


def test_config_names_one_recipe(tmp_path, model, capsys):
    recipe = recipe_of(tmp_path, model, dataset_name="rows.jsonl")
    for words in ([recipe, "--config", recipe], ["--config"]):
        assert main(["train", *words]) == 2
        assert "--config names a recipe" in capsys.readouterr().err


def test_a_script_with_a_parser_of_its_own_selects_as_its_recipe_says(tmp_path, model):
    rows = raw_rows(12)
    recipe = recipe_of(
        tmp_path, model, policy="longest", keep=[0.5, 3], num_train_epochs=2, bf16=False, save_strategy="no"
    )
    parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig, SelectionConfig))
    _, sft, names, selection = parser.parse_args_and_config(["--config", recipe, "--order", "descending"])
    data = Dataset.from_list(
        [{"id": i, "prompt": f"{row['instruction']}:", "completion": " " + row["output"]} for i, row in enumerate(rows)]
    )
    trainer = SFTTrainer(names.model_name_or_path, args=sft, train_dataset=data)
    callback = selection.callback(trainer)
    trainer.add_callback(callback)
    trainer.train()
    lengths = {i: len(TOKENIZER(" " + row["output"])["input_ids"]) for i, row in enumerate(rows)}
    for epoch, count in ((0, 6), (1, 3)):
        table = callback.history.rows(epoch)
        kept = table.loc[table["reason"] == "kept", "row_id"]
        assert sorted(lengths[i] for i in kept) == sorted(lengths.values())[-count:]
    assert trainer.state.global_step == 3 + 2


def test_a_definition_of_raw_rows_is_not_for_a_trainer(tmp_path, model):
    selection = SelectionConfig(scorer=model, definition="superfiltering", guards=["none"])
    with pytest.raises(ValueError, match=r"map them with IFDScorer\(.*, definition='superfiltering'\) before"):
        selection.callback(None)
