"""The command line, used as a person would: files in, files out, exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from datasets import Dataset
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from ifd_trainer.cli import main
from ifd_trainer.columns import IFD_COLUMNS, IFDScorer
from ifd_trainer.files import load_rows, write_rows
from ifd_trainer.history import History

ROWS = [
    {"instruction": f"Name {n} things.", "input": "" if n % 2 else f"about {n} cats", "output": f"The {n} is {n * 7}."}
    for n in range(1, 12)
]
ROWS[3]["output"] = ""


@pytest.fixture
def model_path(tmp_path: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> str:
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return path


def read(path: Path) -> pd.DataFrame:
    return load_rows(str(path)).to_pandas()


def score(data: Path, output: Path, model: str, *more: str) -> int:
    return main(["score", str(data), "--model", model, "--output", str(output), "--device", "cpu", *more])


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".csv", ".parquet"])
def test_score_keeps_all_columns_and_adds_scores_in_every_file_format(
    tmp_path: Path, data: Path, model_path: str, ending: str
) -> None:
    source, output = tmp_path / f"in{ending}", tmp_path / f"out{ending}"
    write_rows(load_rows(str(data)), source)
    assert score(source, output, model_path, "--part-rows", "4") == 0
    found = read(output)
    assert list(found.columns) == ["instruction", "input", "output", *IFD_COLUMNS]
    assert found["instruction"].tolist() == [row["instruction"] for row in ROWS]
    assert found["ifd_status"].tolist() == ["empty_answer" if not row["output"] else "ok" for row in ROWS]
    assert found["ifd"].isna().tolist() == [not row["output"] for row in ROWS]
    expected = Dataset.from_list(ROWS).map(IFDScorer(model_path, device="cpu"), batched=True).to_pandas()
    pd.testing.assert_series_equal(found["ifd"], expected["ifd"], rtol=1e-5, check_dtype=False)


def test_score_goes_on_where_it_was_interrupted(
    tmp_path: Path, data: Path, model_path: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    output, scored = tmp_path / "out.parquet", []
    encode = IFDScorer.encode

    def interrupted(self: IFDScorer, batch: dict, rank: int | None = None) -> list:
        if len(scored) == 2 and not monkeypatch_off:
            raise KeyboardInterrupt
        scored.append(batch["instruction"])
        return encode(self, batch, rank)

    monkeypatch_off: list[bool] = []
    monkeypatch.setattr(IFDScorer, "encode", interrupted)
    assert score(data, output, model_path, "--part-rows", "3") == 130
    assert not output.exists()
    assert "run the same command again" in capsys.readouterr().err
    monkeypatch_off.append(True)
    assert score(data, output, model_path, "--part-rows", "3") == 0
    assert [name for part in scored for name in part] == [row["instruction"] for row in ROWS]  # each exactly once
    assert len(read(output)) == len(ROWS)
    assert not Path(f"{output}.parts").exists()


def test_parts_of_another_job_are_refused(
    tmp_path: Path, data: Path, model_path: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    output = tmp_path / "out.parquet"

    def interrupt(*_: object) -> list:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(IFDScorer, "encode", interrupt)
        assert score(data, output, model_path) == 130
    assert score(data, output, model_path, "--max-length", "64") == 2
    assert "scorer differ" in capsys.readouterr().err


def test_select_keeps_the_highest_and_says_why_the_rest_went(tmp_path: Path, data: Path, model_path: str) -> None:
    scored, output = tmp_path / "scored.jsonl", tmp_path / "kept.jsonl"
    score(data, scored, model_path)
    table = read(scored)
    assert main(["select", str(scored), "--keep", "0.3", "--max-ifd", "inf", "--output", str(output)]) == 0
    kept = read(output)
    best = table[table["ifd_status"] == "ok"].nlargest(3, "ifd")  # 0.3 of 11 rows
    assert sorted(kept["instruction"]) == sorted(best["instruction"])
    assert kept.sort_values("ifd_rank")["ifd"].tolist() == best["ifd"].tolist()
    assert main(["select", str(scored), "--keep", "3", "--max-ifd", "inf", "--all", "--output", str(output)]) == 0
    everything = read(output)
    assert everything["ifd_reason"].value_counts().to_dict() == {"kept": 3, "below_cut": 7, "empty_answer": 1}
    assert everything["ifd_rank"].notna().sum() == 3


def test_score_records_what_select_puts_on_the_card(tmp_path: Path, data: Path, model_path: str) -> None:
    scored = tmp_path / "scored.csv"
    assert score(data, scored, model_path, "--definition", "cherry", "--min-answer-tokens", "2") == 0
    assert main(["select", str(scored), "--max-ifd", "inf", "--output", str(tmp_path / "kept.jsonl")]) == 0
    card = (tmp_path / "kept.md").read_text(encoding="utf-8")
    assert "| scoring model | model |" in card  # a local path is not published
    assert "| definition of the scores | cherry: " in card
    assert "| prompt format | alpaca |" in card
    assert "| options of the scoring | maximal length: 512, least answer tokens: 2 |" in card
    assert set(read(tmp_path / "kept.jsonl")["ifd_definition"]) == {"cherry"}


def test_select_warns_of_a_shortfall_and_fails_if_strict(
    tmp_path: Path, data: Path, model_path: str, capsys: pytest.CaptureFixture
) -> None:
    scored, output = tmp_path / "scored.jsonl", tmp_path / "kept.jsonl"
    score(data, scored, model_path)
    command = ["select", str(scored), "--keep", "11", "--max-ifd", "inf", "--output", str(output)]
    assert main(command) == 0
    assert "only 10 are eligible" in capsys.readouterr().err
    assert len(read(output)) == 10
    assert main([*command, "--strict"]) == 2


def test_report_of_scored_rows(tmp_path: Path, data: Path, model_path: str) -> None:
    scored = tmp_path / "scored.parquet"
    score(data, scored, model_path)
    assert main(["report", str(scored), "--output", str(tmp_path / "page")]) == 0
    assert "Name 1 things." in (tmp_path / "page" / "report.html").read_text(encoding="utf-8")


@pytest.fixture
def recipe(tmp_path: Path, data: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"dataset_name: {data.name}\n"
        "format: alpaca\nkeep: [0.5, 3]\nmax_ifd: .inf\nnum_train_epochs: 2\nper_device_train_batch_size: 2\n"
        "max_length: 256\ngradient_checkpointing: false\nbf16: false\ndtype: float32\nuse_cpu: true\n"
        f"report_to: none\nsave_strategy: 'no'\noutput_dir: {tmp_path / 'run'}\n",
        encoding="utf-8",
    )
    return path


def test_train_runs_a_recipe_and_writes_history_and_report(tmp_path: Path, recipe: Path, model_path: str) -> None:
    assert main(["train", str(recipe), "--model", model_path]) == 0
    history = History.load(tmp_path / "run")
    # 11 rows, one of them empty; TRL gives that one an EOS to learn, selection drops it.
    assert [record["kept"] for record in history.epochs] == [6, 3]
    assert [record["step"] for record in history.epochs] == [0, 3]
    assert history.epochs[0]["reasons"]["empty_answer"] == 1
    assert (tmp_path / "run" / "report.html").exists()
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_train_takes_overrides_and_prints_the_plan_without_training(
    tmp_path: Path, recipe: Path, model_path: str, capsys: pytest.CaptureFixture
) -> None:
    assert main(["train", str(recipe), "--model", model_path, "--plan", "--keep", "4", "--num_train_epochs", "3"]) == 0
    assert "6 updates (epoch 0: 4 rows, 2 updates; epoch 1: 4 rows" in capsys.readouterr().out
    assert not (tmp_path / "run" / "report.html").exists()


def test_the_plan_of_a_curriculum_with_packing_is_printed(
    recipe: Path, model_path: str, capsys: pytest.CaptureFixture
) -> None:
    options = ["--plan", "--keep", "3", "--curriculum", "easy_to_hard", "--tier_mode", "growing"]
    options += ["--packing", "true", "--per_device_train_batch_size", "1", "--num_train_epochs", "3"]
    assert main(["train", str(recipe), "--model", model_path, *options]) == 0
    assert "6 updates (epoch 0: 1 rows, 1 updates; epoch 1: 2 rows, 2 updates; epoch 2: 3 rows" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["score", "missing.jsonl", "--model", "m", "--output", "out.jsonl"], "No such file: missing.jsonl"),
        (["score", "missing.jsonl", "--model", "m", "--output", "out.txt"], "Cannot tell the format of out.txt"),
        (["train", "missing.yaml"], "No such recipe"),
        (["train", "--keep", "0.1"], "A run needs a model and a data set"),
        (["report", "missing.parquet"], "No such file"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(
    command: list[str], words: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(command) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert words in errors[-1]


def test_select_of_rows_without_scores_says_what_to_do(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["select", str(data), "--output", str(tmp_path / "kept.jsonl")]) == 2
    assert "score it first with `ifd-trainer score`" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["--help"], ["score", "--help"], ["select", "--help"], ["report", "--help"]])
def test_help_is_there(command: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 0
    assert "ifd" in capsys.readouterr().out


def test_train_help_names_the_selection_options(capsys: pytest.CaptureFixture) -> None:
    assert main(["train", "--help"]) == 0
    assert "--on_shortfall" in capsys.readouterr().out
