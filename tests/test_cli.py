"""The command line, used as a person would: files in, files out, exit codes."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from html import unescape
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import ROUNDING, build_model, build_tokenizer
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, PreTrainedTokenizerFast

import ifd_trainer
from ifd_trainer.cli import main
from ifd_trainer.data.files import load_rows, write_rows
from ifd_trainer.data.formats import FORMATS
from ifd_trainer.data.paths import check_checkpoint
from ifd_trainer.method.columns import IFD_COLUMNS
from ifd_trainer.publish.provenance import provenance_path
from ifd_trainer.scoring.transform import IFDScorer
from ifd_trainer.scoring.turns import EncodedTurns
from ifd_trainer.training.history import History

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
    pd.testing.assert_series_equal(found["ifd"], expected["ifd"], rtol=ROUNDING, check_dtype=False)


def test_score_goes_on_where_it_was_interrupted(
    tmp_path: Path, data: Path, model_path: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    output, scored = tmp_path / "out.parquet", []
    encode = IFDScorer.encode_rows

    def interrupted(self: IFDScorer, batch: dict, rank: int | None = None) -> EncodedTurns:
        if len(scored) == 2 and not monkeypatch_off:
            raise KeyboardInterrupt
        scored.append(batch["instruction"])
        return encode(self, batch, rank)

    monkeypatch_off: list[bool] = []
    monkeypatch.setattr(IFDScorer, "encode_rows", interrupted)
    assert score(data, output, model_path, "--part-rows", "3") == 130
    assert not output.exists()
    assert "run the same command again" in capsys.readouterr().err
    monkeypatch_off.append(True)
    assert score(data, output, model_path, "--part-rows", "3") == 0
    assert [name for part in scored for name in part] == [row["instruction"] for row in ROWS]  # each exactly once
    assert len(read(output)) == len(ROWS)
    assert not Path(f"{output}.parts").exists()


def interrupted_score(monkeypatch: pytest.MonkeyPatch, data: Path, output: Path, model: str) -> None:
    """Score and save the first part, of four."""
    score_batch, scored = IFDScorer.score, []

    def interrupt(self: IFDScorer, pairs: list, *more: object) -> object:
        if scored:
            raise KeyboardInterrupt
        scored.append(len(pairs))
        return score_batch(self, pairs, *more)

    with monkeypatch.context() as patch:
        patch.setattr(IFDScorer, "score", interrupt)
        assert score(data, output, model, "--part-rows", "3") == 130
    assert scored == [3]


def test_parts_of_another_job_are_refused_with_the_options_that_differ(
    tmp_path: Path, data: Path, model_path: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    output = tmp_path / "out.parquet"
    interrupted_score(monkeypatch, data, output, model_path)
    job = json.loads(Path(f"{output}.parts/ifd-job.json").read_text(encoding="utf-8"))
    assert job.items() >= {"rows": 11, "part_rows": 3, "definition": "paper", "format": "alpaca"}.items()
    assert job.items() >= {"max_length": 512, "min_answer_tokens": 1, "score_truncated": False}.items()
    assert job.items() >= {"device": "cpu", "dtype": None}.items()
    assert score(data, output, model_path, "--part-rows", "3", "--max-length", "64") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "holds parts of another job: max_length: 512 there, 64 now. " in error


def test_a_job_goes_on_with_another_token_budget(
    tmp_path: Path, data: Path, model_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.parquet"
    interrupted_score(monkeypatch, data, output, model_path)
    assert score(data, output, model_path, "--part-rows", "3", "--token-budget", "256") == 0
    expected = tmp_path / "expected.parquet"
    assert score(data, expected, model_path) == 0
    pd.testing.assert_frame_equal(read(output), read(expected), rtol=ROUNDING)


def test_rows_of_the_last_part_may_all_be_malformed(tmp_path: Path, model_path: str) -> None:
    rows = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]}] * 3
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"messages": None}]))
    assert score(tmp_path / "rows.jsonl", tmp_path / "out.jsonl", model_path, "--part-rows", "3") == 0
    assert read(tmp_path / "out.jsonl")["ifd_status"].tolist() == ["ok"] * 3 + ["malformed"]


def test_rows_that_are_all_malformed_are_told_before_weights_are_read(
    tmp_path: Path, model_path: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"messages": null}\n{"messages": null}\n')
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    assert score(tmp_path / "rows.jsonl", tmp_path / "out.jsonl", model_path, "--format", "messages") == 2
    assert "None of 2 rows can be rendered as 'messages'" in capsys.readouterr().err


def test_an_adapter_is_told_from_a_model(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    assert score(data, tmp_path / "out.jsonl", str(tmp_path / "lora")) == 2
    assert "holds an adapter and no model. Merge it first" in capsys.readouterr().err


def test_a_job_goes_on_with_the_same_folder_in_another_spelling_and_with_a_copy(
    tmp_path: Path, data: Path, model_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(model_path, tmp_path / "copy")
    monkeypatch.chdir(tmp_path)
    for spelling in ("./model", str(copy)):
        output = tmp_path / "out.parquet"
        interrupted_score(monkeypatch, data, output, "model")
        assert score(data, output, spelling, "--part-rows", "3") == 0


def test_rows_that_are_scored_again_lose_what_was_selected_by_their_old_scores(
    tmp_path: Path, data: Path, model_path: str
) -> None:
    scored, kept, again = (tmp_path / f"{name}.parquet" for name in ("scored", "kept", "again"))
    assert score(data, scored, model_path, "--definition", "cherry") == 0
    assert main(["select", str(scored), "--keep", "3", "--max-ifd", "inf", "--output", str(kept)]) == 0
    assert {"ifd_definition", "ifd_rank", "ifd_reason"} <= set(read(kept))
    assert score(kept, again, model_path) == 0
    assert list(read(again)) == ["instruction", "input", "output", *IFD_COLUMNS]
    assert main(["select", str(again), "--max-ifd", "inf", "--output", str(tmp_path / "last.jsonl")]) == 0
    assert set(read(tmp_path / "last.jsonl")["ifd_definition"]) == {"paper"}


CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}


@pytest.mark.parametrize(
    ("row", "options", "words"),
    [
        (ROWS[0], ["--device", "gpu"], "Unknown device 'gpu'"),
        (ROWS[0], ["--device", "mps"], "The device 'mps' cannot be used here"),
        (ROWS[0], ["--device", "cuda:99"], "The device 'cuda:99' cannot be used here"),
        (ROWS[0], ["--dtype", "foo"], "dtype must be 'float32', 'bfloat16' or 'float16', got 'foo'"),
        (ROWS[0], ["--max-length", "513"], "max_length=513 is more than the model's window of 512 tokens"),
        (ROWS[0], ["--format", "alpaka"], "Unknown format 'alpaka'"),
        (ROWS[0], ["--format", "messages"], "reads the columns ['messages']"),
        ({"question": "a", "reply": "b"}, [], "Cannot tell the format from the columns"),
        (CHAT, ["--definition", "cherry"], "defined for the Alpaca and WizardLM prompts only"),
    ],
)
def test_wrong_options_are_told_before_a_folder_is_made_or_weights_are_read(
    tmp_path: Path,
    model_path: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    row: dict,
    options: list[str],
    words: str,
) -> None:
    if "mps" in options and torch.backends.mps.is_available():
        pytest.skip("there is such a device")
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    before = sorted(tmp_path.iterdir())
    assert score(tmp_path / "rows.jsonl", tmp_path / "new" / "out.jsonl", model_path, *options) == 2
    assert words in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("option", ["--part-rows", "--max-length", "--limit", "--token-budget", "--min-answer-tokens"])
@pytest.mark.parametrize("value", ["0", "-4", "1.5", "many"])
def test_numbers_below_one_are_refused(option: str, value: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["score", "rows.jsonl", "--model", "m", "--output", "out.jsonl", f"{option}={value}"]) == 2
    assert f"argument {option}: wants a whole number of at least 1, got '{value}'" in capsys.readouterr().err


def test_defaults_stop_at_the_window_of_learned_positions(
    tmp_path: Path, data: Path, tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture
) -> None:
    rows = [*ROWS, {"instruction": "Count.", "input": "", "output": "7" * 300}]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=256, n_embd=32, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    output = tmp_path / "out.jsonl"
    assert score(data, output, str(tmp_path / "gpt2"), "--definition", "superfiltering") == 0
    assert yaml.safe_load(provenance_path(output).read_text(encoding="utf-8"))["max_length"] == 256
    assert read(output)["ifd_status"].iloc[-1] == "ok"  # the part that fits, as its program has it
    assert score(data, output, str(tmp_path / "gpt2"), "--max-length", "100000") == 2
    assert "window of 256 tokens. Lower it, or leave it out" in capsys.readouterr().err


def test_damaged_weights_are_one_line(
    tmp_path: Path, data: Path, model_path: str, capsys: pytest.CaptureFixture
) -> None:
    weights = Path(model_path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert score(data, tmp_path / "out.jsonl", model_path) == 2
    assert "cannot be read" in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "out.jsonl.parts").exists()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory.\nMore."), "CUDA out of memory."),
        (MemoryError(), "out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 8 bytes"), "can't allocate memory"),
    ],
)
def test_a_device_out_of_memory_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, error: Exception, words: str
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"ifd": 0.5}')

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("ifd_trainer.report.page.write_report", fail)
    assert main(["report", str(rows)]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert words in errors[0]
    error = RuntimeError("of another kind")
    assert main(["report", str(rows)]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert "a fault of this program" in errors[0]
    assert errors[-1] == "RuntimeError: of another kind"


def test_the_help_knows_all_formats(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["score", "--help"])
    text = "".join(capsys.readouterr().out.split())  # lines break at hyphens
    assert f"promptformat:{','.join(FORMATS)};" in text


MANY = [
    {"id": 70 - n, "instruction": f"Name {n} things.", "output": f"The {n} is {n * 7}, and {n * n} more."}
    for n in range(60)
]


@pytest.fixture
def many(tmp_path: Path) -> Path:
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in MANY), encoding="utf-8")
    return path


def made(output: Path) -> dict:
    return yaml.safe_load(provenance_path(output).read_text(encoding="utf-8"))


def test_score_records_how_noise_scores_and_select_takes_its_limit(
    tmp_path: Path, many: Path, model_path: str, capsys: pytest.CaptureFixture
) -> None:
    output, kept = tmp_path / "scored.parquet", tmp_path / "kept.jsonl"
    assert score(many, output, model_path, "--calibrate", "--part-rows", "7") == 0
    assert "warning" not in capsys.readouterr().err
    found = IFDScorer(model_path, device="cpu").calibrate(load_rows(str(output)))
    assert made(output)["wrong_ifd"] == pytest.approx(found.wrong.ifd.tolist(), rel=ROUNDING)
    assert made(output)["wrong_ifd_ppl"] == pytest.approx(found.wrong.ifd_ppl.tolist(), rel=ROUNDING)
    assert made(output)["cut_eot_loss"] == pytest.approx(found.cut.tolist(), rel=ROUNDING)
    assert (len(found.wrong), len(found.cut)) == (60, 60)
    limit = sorted(made(output)["wrong_ifd"])[11]  # floor(0.2 * 61)
    options = ["--keep", "0.1", "--max-ifd", "calibrated", "--alpha", "0.2"]
    assert main(["select", str(output), *options, "--output", str(kept)]) == 0
    table = read(output)
    best = table[table["ifd"] < limit].nlargest(6, "ifd")
    assert sorted(read(kept)["id"]) == sorted(best["id"])
    assert (
        f"| limit | `ifd` < {limit:g}, calibrated with alpha = 0.2 on 60 answers" in (tmp_path / "kept.md").read_text()
    )
    plain = tmp_path / "plain.parquet"
    assert score(many, plain, model_path, "--part-rows", "7") == 0
    assert plain.read_bytes() == output.read_bytes()
    assert not {"wrong_ifd", "wrong_ifd_ppl", "cut_eot_loss"} & set(made(plain))
    assert main(["select", str(plain), *options, "--output", str(kept)]) == 2
    assert "score it with `ifd-trainer score --calibrate`" in capsys.readouterr().err


def test_a_report_names_the_command_that_measures_noise_of_the_same_scores(many, model_path, tmp_path):
    output = tmp_path / "scored.parquet"
    options = ["--scores", "ira", "rifd", "--guess", "Which task?\\n{answer}", "--part-rows=7", "--token_losses"]
    assert score(many, output, model_path, *options) == 0
    assert main(["report", str(output), "--output", str(tmp_path)]) == 0
    page = unescape((tmp_path / "report.html").read_text())
    [line] = re.findall(r"ifd-trainer score [^<]*--calibrate", page)
    words = shlex.split(line)[1:]
    before, told = pd.read_parquet(output), made(output)
    assert main(words) == 0
    pd.testing.assert_frame_equal(pd.read_parquet(output), before)
    assert "wrong_ifd" not in told
    assert made(output)["wrong_ifd"]
    assert made(output)["options"] == [*told["options"], "--calibrate"]


def test_what_cannot_be_measured_of_several_answers_is_not_advised(tmp_path, model_path):
    turns = [{"role": role, "content": f"the {role}"} for role in ("user", "assistant")] * 2
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    output = tmp_path / "scored.parquet"
    assert score(tmp_path / "chats.jsonl", output, model_path, "--turns", "mean") == 0
    assert main(["report", str(output), "--output", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "--calibrate" not in page
    assert "the row's score; of several answers the mean of theirs" in page


@pytest.mark.parametrize("method", ["calibrate", "nll_with_tails"])
def test_a_job_that_was_interrupted_while_it_calibrated_ends_as_if_it_had_not_been(
    tmp_path: Path, many: Path, model_path: str, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    output, whole = tmp_path / "scored.parquet", tmp_path / "whole.parquet"

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(IFDScorer, method, interrupt)
        assert score(many, output, model_path, "--calibrate", "--part-rows", "7") == 130
    assert not output.exists()
    assert score(many, output, model_path, "--calibrate", "--part-rows", "7") == 0
    assert score(many, whole, model_path, "--calibrate", "--part-rows", "7") == 0
    assert output.read_bytes() == whole.read_bytes()
    assert provenance_path(output).read_bytes() == provenance_path(whole).read_bytes()
    assert not Path(f"{output}.parts").exists()


def test_too_few_rows_to_calibrate_on_are_a_warning(
    tmp_path: Path, data: Path, model_path: str, capsys: pytest.CaptureFixture
) -> None:
    output = tmp_path / "scored.parquet"
    assert score(data, output, model_path, "--calibrate") == 0
    error = capsys.readouterr().err
    assert (
        "warning: too little to calibrate on: 10 answers could be scored under a wrong prompt and 10 be cut. " in error
    )
    assert (len(read(output)), len(made(output)["wrong_ifd"]), len(made(output)["cut_eot_loss"])) == (11, 10, 10)
    assert main(["select", str(output), "--max-ifd", "calibrated", "--output", str(tmp_path / "kept.jsonl")]) == 2
    assert "takes at least 19 answers under a wrong prompt; the pool gave 10 " in capsys.readouterr().err


@pytest.mark.parametrize("definition", ["cherry", "superfiltering"])
def test_other_definitions_have_a_limit_and_no_ends(
    tmp_path: Path, many: Path, model_path: str, capsys: pytest.CaptureFixture, definition: str
) -> None:
    output = tmp_path / "scored.parquet"
    assert score(many, output, model_path, "--calibrate", "--definition", definition) == 0
    assert "warning" not in capsys.readouterr().err
    assert (len(made(output)["wrong_ifd_ppl"]), made(output)["cut_eot_loss"]) == (60, [])
    command = ["select", str(output), "--keep", "2", "--max-ifd", "calibrated", "--output", str(tmp_path / "kept.csv")]
    assert main(command) == 0
    assert main([*command, "--drop-unfinished"]) == 2
    assert f"(scores by definition {definition}). Score them by the definition paper" in capsys.readouterr().err


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
        "format: alpaca\nkeep: [0.5, 3]\nmax_ifd: .inf\nguards: none\nnum_train_epochs: 2\n"
        "per_device_train_batch_size: 2\n"
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
    assert "6 updates (epoch 0: 1 row, 1 update; epoch 1: 2 rows, 2 updates; epoch 2: 3 rows" in (
        capsys.readouterr().out
    )


def plan_of(out: str) -> list[str]:
    """The lines of a plan in what a command prints."""
    lines = out[out.index("Plan: ") :].splitlines()
    return [line.rstrip() for line in lines if re.match(r"Plan: |pool: \d|update: |original weights: ", line)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--keep", "4", "--gradient_accumulation_steps", "3"], "Plan: 2 updates"),
        (["--max_steps", "7", "--keep", "4"], "Plan: 7 updates"),
        (["--num_train_epochs", "1.5", "--keep", "4"], "Plan: 3 updates"),
        (["--keep", "6", "--curriculum", "easy_to_hard", "--tiers", "2"], "Plan: 4 updates"),
        (["--keep", "2", "--anneal_share", "0.5"], "epoch 1: 11 rows, 6 updates"),
        (["--keep", "3", "--method", "cherry"], "original weights: 0.00 GB"),
        (["--keep", "3", "--method", "cherry", "--brief", "random", "--use_peft", "true"], "original weights: 0.00 GB"),
        (["--keep", "3", "--scorer", "MODEL", "--definition", "superfiltering"], "pool: 11 of 11 rows"),
        (
            ["--keep", "1.0", "--packing", "true", "--per_device_train_batch_size", "1"],
            "pool: 11 of 11 rows, in 4 packed",
        ),
        (["--keep", "2", "--max_length", "58"], "pool: 6 of 11 rows, 5 lost to max_length=58 (no token of their"),
        (["--keep", "2", "--max_length", "58", "--drop_refusals", "true"], "1 left out as refusals, 5 lost to max_len"),
    ],
)
def test_a_run_is_as_it_was_planned_and_says_which_rows_it_lost(
    recipe: Path, data: Path, model_path: str, capsys: pytest.CaptureFixture, options: list[str], expected: str
) -> None:
    rows = [*ROWS[:-1], ROWS[-1] | {"input": "", "output": "I'm sorry, but I cannot help with that."}]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options = [model_path if word == "MODEL" else word for word in options]
    assert main(["train", str(recipe), "--model", model_path, *options, "--plan"]) == 0
    plan = plan_of(capsys.readouterr().out)
    assert expected in "\n".join(plan)
    assert main(["train", str(recipe), "--model", model_path, *options]) == 0
    assert plan_of(capsys.readouterr().out) == plan


def test_rows_that_a_run_leaves_out_are_named_with_the_reason(
    tmp_path: Path, recipe: Path, data: Path, model_path: str, capsys: pytest.CaptureFixture
) -> None:
    rows = [dict(row, row_id=f"r{i}") for i, row in enumerate(ROWS)]
    rows[2]["output"], rows[5]["output"] = ["a", "list"], "I'm sorry, but I cannot help with that."
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options = ["--model", model_path, "--keep", "2", "--drop_refusals", "true", "--max_length", "58"]
    assert main(["train", str(recipe), *options, "--plan"]) == 0
    assert not (tmp_path / "run").exists()
    assert main(["train", str(recipe), *options]) == 0
    names = (tmp_path / "run" / "ifd_history" / "left_out.jsonl").read_text(encoding="utf-8")
    left = [json.loads(line) for line in names.splitlines()]
    planned, line = [line for line in capsys.readouterr().out.splitlines() if line.startswith("pool: 5 of")]
    assert planned == line
    assert line.startswith("pool: 5 of 11 rows, 1 that cannot be rendered, 1 left out as refusals, 4 lost to max_len")
    assert line.endswith("named in ifd_history/left_out.jsonl")
    assert [row["row_id"] for row in left[:2]] == ["r2", "r5"]
    assert left[0]["reason"]
    assert left[1]["reason"] == "its answer looks like a refusal"
    assert [row["reason"] for row in left[2:]] == ["no token of its answer is within max_length=58"] * 4
    kept = History.load(tmp_path / "run").pool()["row_id"].tolist()
    assert sorted(kept + [row["row_id"] for row in left]) == sorted(row["row_id"] for row in rows)


COMMANDS = """
import contextlib, json, os, sys
from ifd_trainer.cli import main

for number, words in enumerate(json.loads(sys.argv[2])):
    with open(f"{sys.argv[1]}/{number}-{os.environ['RANK']}.txt", "w") as out, contextlib.redirect_stdout(out):
        if code := main(words):
            sys.exit(code)
"""


def launched(folder: Path, *commands: list[str]) -> list[str]:
    """What two processes print together for each of the commands, which they run one after the other."""
    program = folder / "commands.py"
    program.write_text(COMMANDS, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*command, str(program), str(folder), json.dumps(commands)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return ["".join((folder / f"{i}-{rank}.txt").read_text() for rank in range(2)) for i in range(len(commands))]


def test_several_processes_run_what_they_planned(tmp_path: Path, recipe: Path, model_path: str) -> None:
    words = ["train", str(recipe), "--model", model_path, "--packing", "true", "--keep", "2"]
    # A plan needs no telling that processors train.
    planned, out = launched(tmp_path, [*words, "--plan", "--use_cpu", "false"], words)
    assert plan_of(planned)[1:] == [
        "pool: 11 of 11 rows, in 4 packed rows",
        "update: 2 packed rows x 1 batch x 2 processes = 4 packed rows",
    ]
    assert planned.count("Plan: ") == out.count("Plan: ") == 1
    assert plan_of(out) == plan_of(planned)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU would wait for the other process")
def test_processes_that_would_each_train_by_themselves_are_told(
    recipe: Path, model_path: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", str(recipe), "--model", model_path, "--use_cpu", "false"]) == 2
    assert capsys.readouterr().err == (
        "ifd-trainer: error: 2 processes were started, but each would train by itself: there is no GPU for them. Set "
        "use_cpu: true to train on processors, or start one process.\n"
    )


# ---- what a user gets wrong ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the commands of a README work on, and with things of the wrong kind."""
    place = tmp_path_factory.mktemp("place")
    tokenizer = build_tokenizer()
    build_model(len(tokenizer)).save_pretrained(place / "model")
    tokenizer.save_pretrained(place / "model")
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    scores = pd.DataFrame(ROWS).assign(ifd=0.5, ifd_ppl=0.6, cas=1.0, das=2.0, answer_tokens=3, ifd_status="ok")
    scores.to_parquet(place / "scored.parquet")
    (place / "recipe.yaml").write_text(
        "model_name_or_path: model\ndataset_name: rows.jsonl\nkeep: 3\nmax_ifd: .inf\nguards: none\n"
        "num_train_epochs: 1\n"
        "per_device_train_batch_size: 2\ngradient_checkpointing: false\nuse_cpu: true\nreport_to: none\n"
        "save_strategy: 'no'\noutput_dir: run\n",
        encoding="utf-8",
    )
    for name, config in (
        ("adapter", ("adapter_config.json", "{}")),
        ("gguf", ("model.gguf", "GGUF")),
        ("t5", ("config.json", '{"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": true}')),
        ("bert", ("config.json", '{"architectures": ["BertForMaskedLM"], "model_type": "bert"}')),
        ("vit", ("config.json", '{"architectures": ["ViTModel"], "model_type": "vit"}')),
        ("broken", ("config.json", '{"architectures": ')),
        ("other", ("readme.txt", "nothing")),
        ("run/checkpoint-5", ("readme.txt", "nothing")),
    ):
        (place / name).mkdir(parents=True)
        (place / name / config[0]).write_text(config[1], encoding="utf-8")
    (place / "file").write_text("text", encoding="utf-8")
    (place / "empty.jsonl").touch()
    return place


def told(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *command: str) -> str:
    """The one line that a command ends with; nothing is left behind."""
    monkeypatch.chdir(place)
    capsys.readouterr()
    before = sorted(place.rglob("*"))
    assert main(command) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("ifd-trainer", "Traceback"))]
    assert len(lines) == 1
    assert sorted(place.rglob("*")) == before
    return lines[0].removeprefix("ifd-trainer: error: ")


SCORE = ["score", "rows.jsonl", "--model", "model", "--output", "out.jsonl", "--device", "cpu"]
SELECT = ["select", "scored.parquet", "--output", "out.jsonl"]
REPORT = ["report", "scored.parquet", "--output", "page"]
TRAIN = ["train", "recipe.yaml"]
A_PATH = [
    (["score", "missing.jsonl", *SCORE[2:]], "No such file: 'missing.jsonl'. Files end in"),
    (["score", "no/such/rows", *SCORE[2:]], "No such file: 'no/such/rows'"),
    (["score", "file", *SCORE[2:]], "Cannot tell the format of file from its ending"),
    (["score", "", *SCORE[2:]], "data is empty: give it a value"),
    ([*SCORE, "--output", "out.txt"], "Cannot tell the format of out.txt"),
    ([*SCORE, "--output", "file/out.csv"], "file is a file, not a folder. Write to another folder"),
    ([*SCORE, "--output", "."], "Cannot tell the format of . from its ending"),
    ([*SCORE, "--model", "./nothing"], "No such folder: './nothing'. A model is a folder"),
    ([*SCORE, "--model", "file"], "No such folder: 'file' is a file. A model is a folder"),
    ([*SCORE, "--model", "adapter"], "holds an adapter and no model. Merge it first"),
    ([*SCORE, "--model", "gguf"], "holds a GGUF file and no config.json. transformers neither trains nor scores"),
    ([*SCORE, "--model", "gguf/model.gguf"], "is the name of a GGUF file"),
    ([*SCORE, "--model", "t5"], "(T5ForConditionalGeneration) is an encoder-decoder"),
    ([*SCORE, "--model", "bert"], "(BertForMaskedLM) lets tokens see those that follow them"),
    ([*SCORE, "--model", "other"], "holds no config.json. A model is a folder"),
    ([*SCORE, "--model", "broken"], "config.json cannot be read"),
    ([*SCORE, "--split", "test"], "--split test: the file rows.jsonl has no splits"),
    ([*SCORE, "--revision", "main"], "--revision main: the folder model has no revisions"),
    (["select", "missing.parquet", *SELECT[2:]], "No such file: 'missing.parquet'"),
    ([*SELECT, "--scores", "missing.pt"], "No such file of scores: missing.pt"),
    ([*SELECT, "--scores", "model"], "No such file of scores: model"),
    ([*SELECT, "--push-to-hub", ""], "push-to-hub is empty"),
    (["report", "missing"], "No such file or folder: 'missing'. A report is made from the output folder of a run"),
    (["report", "missing.parquet"], "No such file or folder: 'missing.parquet'"),
    (["report", "file"], "Cannot tell the format of file"),
    ([*REPORT, "--output", "file"], "Cannot write to file: it is a file, and a folder is wanted"),
    ([*REPORT, "--output", "file/page"], "file is a file, not a folder"),
    (["train", "missing.yaml"], "No such recipe: missing.yaml"),
    (["train", "model"], "model is a folder. Name a recipe in it"),
    (["train", "file"], "file holds no YAML mapping. Write one `key: value` a line"),
    (["train", "--keep", "0.1"], "A run needs a model and a data set"),
    ([*TRAIN, "--dataset", "missing.jsonl"], "No such file: 'missing.jsonl'"),
    ([*TRAIN, "--dataset", ""], "No such file: ''. Files end in"),
    ([*TRAIN, "--eval_dataset", "missing.csv"], "No such file: 'missing.csv'"),
    ([*TRAIN, "--model", "./nothing"], "No such folder: './nothing'. A model is a folder"),
    ([*TRAIN, "--model=adapter"], "holds an adapter and no model"),
    ([*TRAIN, "--model-name-or-path", "gguf"], "holds a GGUF file and no config.json"),
    ([*TRAIN, "--model", "t5"], "(T5ForConditionalGeneration) is an encoder-decoder"),
    ([*TRAIN, "--scorer", "adapter"], "holds an adapter and no model"),
    ([*TRAIN, "--output_dir", "file"], "Cannot write to file: it is a file, and a folder is wanted"),
    ([*TRAIN, "--output_dir", "file/run"], "file is a file, not a folder"),
    ([*TRAIN, "--resume_from_checkpoint", "run/checkpoint-7"], "is no folder. run holds checkpoint-5. Name one"),
    ([*TRAIN, "--resume_from_checkpoint", "true", "--output_dir", "new"], "true, but new holds no checkpoint"),
    ([*TRAIN, "--deepspeed", "missing.json"], "deepspeed: no such file: missing.json"),
    ([*TRAIN, "--chat_template_path", "a.jinja"], "chat_template_path: no such file: a.jinja"),
    ([*TRAIN, "--dataset_train_split", "test"], "dataset_train_split is 'test', but the data set is a file"),
    ([*TRAIN, "--dataset_config", "en"], "dataset_config is 'en', but the data set is a file"),
    ([*TRAIN, "--model_revision", "v2"], "model_revision is 'v2', but the model is a folder"),
]


@pytest.mark.parametrize(("command", "words"), A_PATH)
def test_a_wrong_path_is_told_in_one_line(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, command: list[str], words: str
) -> None:
    assert words in told(place, monkeypatch, capsys, *command)


def test_a_wrong_path_is_told_before_anything_slow_is_imported(place: Path) -> None:
    program = (
        "import json, sys\n"
        "from ifd_trainer.cli import main\n"
        f"codes = [main(command) for command in json.loads({json.dumps([c for c, _ in A_PATH])!r})]\n"
        "slow = {'torch', 'transformers', 'trl', 'datasets', 'pandas', 'numpy', 'pyarrow', 'matplotlib'}\n"
        "print(set(codes), slow & set(sys.modules))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], cwd=place, env=environment, capture_output=True, text=True)
    assert done.stdout == "{2} set()\n"
    assert len(done.stderr.splitlines()) == len(A_PATH)


WRONG = {
    "--output": ["", "file"],
    "--format": ["", "missing", "nan"],
    "--prompt-column": ["", "missing"],
    "--input-column": [""],
    "--answer-column": ["", "missing"],
    "--system-column": ["", "missing", "input"],
    "--messages-column": ["", "missing"],
    "--template": ["", "text", "{output}"],
    "--template-with-input": ["", "{instruction}{input}"],
    "--definition": ["", "missing"],
    "--limit": ["-1", "0", "nan", "1.5", "text", ""],
    "--device": ["", "gpu", "0", "cuda:99"],
    "--dtype": ["", "float7", "16"],
    "--split": [""],
    "--revision": [""],
    "--known": ["", "0", "-1", "1.5", "text"],
    "--known-max-new-tokens": ["0", "8"],
    "--known-agreement": ["", "text", "exact"],
    "--known-threshold": ["0", "1.1", "nan", "0.5"],
    "--known-temperature": ["0", "-1", "inf", "text", "1"],
    "--known-top-p": ["0", "2", "1"],
    "--known-seed": ["-1", "1.5", "text", "0"],
}
WRONG_OF_SELECT = {
    "--output": ["", "out.txt"],
    "--scores": ["", "file", "model"],
    "--scores-format": ["", "text"],
    "--scored-by": [""],
    "--split": ["", "test"],
    "--keep": ["", "-1", "0", "nan", "text", "1.5", "100"],
    "--max-ifd": ["", "-1", "0", "nan", "text"],
    "--score": ["", "missing", "output", "ifd:0"],
    "--threshold": ["", "nan", "none.json"],
    "--per": ["", "missing"],
    "--quota": ["", "1", "text"],
    "--floor": ["", "1"],
    "--id-column": ["", "missing"],
    "--push-to-hub": ["", "name", "a/b/c", "a b/c"],
    "--private": [None],
    "--nothing": [None],
}
WRONG_OF_REPORT = {"--output": ["", "file"], "--label": ["", "missing"], "--rows": ["", "0", "-1", "1.5", "nan"]}
WRONG_OF_TRAIN = {
    "--format": ["missing"],
    "--answer_column": ["missing"],
    "--system_column": ["input"],
    "--messages_column": ["missing"],
    "--template": ["text"],
    "--datasets": ["missing/rows.jsonl"],
    "--dataset_streaming": ["true"],
    "--keep": ["", "-1", "0", "nan", "text", "1.5", "100"],
    "--every": ["", "0", "-1", "1.5", "nan", "text"],
    "--warmup_epochs": ["-1", "1.5", "text"],
    "--freeze_after": ["-1", "1.5", "text"],
    "--rescore": ["", "text"],
    "--rescore_budget": ["0", "-1", "nan", "text"],
    "--method": ["", "text"],
    "--brief": ["", "text"],
    "--brief_clusters": ["0", "-1", "1.5"],
    "--brief_per_cluster": ["0", "-1", "text"],
    "--scorer": ["", "bert", "./x"],
    "--definition": ["text", "cherry"],
    "--diverse": ["", "0", "-1", "nan", "text", "1.5"],
    "--embedder": ["./x", "file"],
    "--drop_refusals": ["", "text", "2"],
    "--threshold": ["", "nan", "none.json", "0.5"],
    "--eval_by": ["", "missing"],
    "--bad_cases": ["text", "true"],
    "--curriculum": ["", "text"],
    "--tiers": ["0", "-1", "1.5", "text"],
    "--tier_mode": ["", "text"],
    "--anneal_share": ["-1", "1.5", "nan", "text"],
    "--max_ifd": ["", "0", "-1", "nan", "None", "text"],
    "--score": ["", "no_module.name"],
    "--order": ["", "text"],
    "--on_shortfall": ["", "text"],
    "--min_answer_tokens": ["0", "-1", "1.5", "text"],
    "--token_budget": ["0", "-1", "1.5", "text"],
    "--label": ["missing"],
    "--num_train_epochs": ["0", "-1", "nan", "text"],
    "--max_steps": ["0", "1.5", "text"],
    "--learning_rate": ["-1", "nan", "text"],
    "--per_device_train_batch_size": ["0", "-1", "1.5"],
    "--gradient_accumulation_steps": ["0", "-1", "1.5"],
    "--max_length": ["0", "-1", "1.5", "3"],
    "--seed": ["-1", "1.5", "99999999999"],
    "--warmup_steps": ["-1", "nan"],
    "--report_to": ["", "missing"],
    "--lr_scheduler_type": ["", "text"],
    "--optim": ["text"],
    "--dtype": ["float7"],
    "--attn_implementation": ["text"],
    "--eos_token": ["missing"],
    "--bf16": ["text"],
    "--deepspeed": ["-1", "file", "[1]", "{"],
    "--fsdp": ["text", "full_shard"],
    "--model_init_kwargs": ["text", "[1]", "{"],
    "--gradient_checkpointing_kwargs": ["text", "-1"],
    "--accelerator_config": ["missing", "model"],
    "--eval_strategy": ["epoch", "text"],
    "--packing_strategy": ["text"],
    "--nothing": ["1"],
    "--keep_n": [None],
    "--num_train": ["1"],
}
OF_COMMANDS = [(SCORE, WRONG), (SELECT, WRONG_OF_SELECT), (REPORT, WRONG_OF_REPORT), (TRAIN, WRONG_OF_TRAIN)]


@pytest.mark.parametrize(
    "command",
    [
        [*command, option, *([] if value is None else [value])]
        for command, wrong in OF_COMMANDS
        for option, values in wrong.items()
        for value in values
    ],
    ids=lambda words: " ".join(words[0:1] + words[-2:]) or "empty",
)
def test_a_wrong_value_of_every_option_is_told_in_one_line(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, command: list[str]
) -> None:
    line = told(place, monkeypatch, capsys, *command)
    option = next(word for word in reversed(command) if word.startswith("--"))
    named = {option, option.removeprefix("--"), option.removeprefix("--").replace("-", "_"), option.replace("_", "-")}
    said = {
        "--output": "rite to",  # Cannot write to, Write to
        "--scorer": "odel",
        "--embedder": "A model is",
        "--diverse": "share must be",
        "--brief_clusters": "clusters and per_cluster must be",
        "--brief_per_cluster": "clusters and per_cluster must be",
        "--scores": "No such file of scores",
        "--id-column": "no column 'missing' of row ids",
        "--max_length": "max_length",
    }
    assert any(name in line for name in named) or said.get(option, "???") in line or "Cannot tell the format" in line


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("keep: [0.1\nseed: 1\n", "recipe.yaml is not YAML (line 2, column"),
        ("a: b: c\n", "is not YAML (line 1, column 5"),
        ("\tkeep: 1\n", "is not YAML (line 1, column 1"),
        ("- keep\n", "is not YAML"),
        ("\x00", "is not YAML"),
        ("keeep: 0.1\n", "there is no key 'keeep'. Did you mean keep?"),
        ("model: model\n", "there is no key 'model'. Did you mean model_"),
        ("xyzzy: 1\n", "there is no key 'xyzzy'. ifd-trainer train --help-all lists all keys"),
        ("max_ifd: null\n", "max_ifd wants a number or calibrated, got null"),
        ("max_ifd: None\n", "max_ifd: 'None' is no number, and not calibrated"),
        ("max_ifd: .nan\n", "max_ifd must be positive, got nan"),
        ("learning_rate: .nan\n", "learning_rate must be at least 0, got nan"),
        ("every: 1.5\n", "every wants a whole number, got 1.5"),
        ("every: null\n", "every wants a whole number, got null"),
        ("every: [1]\n", "every wants a whole number, got [1]"),
        ("tiers: true\n", "tiers wants a whole number, got True"),
        ("tiers: three\n", "argument --tiers: invalid int value: 'three'"),
        ("scorer: [gpt2]\n", "scorer wants text or null, got ['gpt2']"),
        ("scorer: {a: 1}\n", "scorer wants text or null, got {'a': 1}"),
        ("scorer: !!python/name:print\n", "is not YAML (line 1, column 9: could not determine a constructor"),
        ("method: text\n", "method must be one of dynamic, cherry, got 'text'"),
        ("keep: [0.1, x]\n", "keep: 'x' is not a number"),
        ("keep: {a: 1}\n", "keep wants a list, got {'a': 1}"),
        ("keep: []\n", "keep is an empty list"),
        ("drop_refusals: 3\n", "drop_refusals wants true or false, got 3"),
        ("num_train_epochs: three\n", "argument --num_train_epochs"),
        ("num_train_epochs: [1, 2]\n", "num_train_epochs wants a number, got [1, 2]"),
        ("save_strategy: no\n", "got False (in YAML, yes, no, on and off are that: put the word in quotes)"),
        ("report_to: no\n", "got False (in YAML"),
        ("report_to: [wandb, nothing]\n", "report_to must be none, all or among"),
        ("model_init_kwargs: [1]\n", "model_init_kwargs wants a mapping or text or null, got [1]"),
        ("fp16: true\nbf16: true\n", "At most one of fp16 and bf16 can be True"),
        ("scorer: model\npacking: true\n", "scorer='model' scores the rows before TRL packs them"),
        ("curriculum: easy_to_hard\nkeep: [3, 3]\n", "A curriculum takes one `keep`"),
        ("output_dir: file\n", "Cannot write to file: it is a file"),
        ("dataset_name: 7\n", "There is no file or folder '7' here"),
        ("dataset_name: empty.jsonl\n", "empty.jsonl is empty: it has no bytes"),
        (
            "model_name_or_path: vit\n",
            "vit is a model of the type 'vit', which transformers does not load as a causal language model",
        ),
        ("env: 3\n", "env wants a mapping of variables, got 3"),
    ],
)
def test_what_is_wrong_in_a_recipe_is_told_in_one_line(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, text: str, words: str
) -> None:
    path = place / "recipe.yaml"
    whole = path.read_text(encoding="utf-8")
    keys = [line.split(":")[0] for line in text.splitlines()]
    kept = [line for line in whole.splitlines() if line.split(":")[0] not in keys]
    path.write_text(text + "".join(f"{line}\n" for line in kept), encoding="utf-8")
    try:
        assert words in told(place, monkeypatch, capsys, *TRAIN)
    finally:
        path.write_text(whole, encoding="utf-8")


def test_a_tracker_that_is_not_installed_is_told_before_the_rows_are_read(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("ifd_trainer.recipe.machine.get_available_reporting_integrations", list)
    monkeypatch.setattr("ifd_trainer.recipe.run.load_rows", None)
    line = told(place, monkeypatch, capsys, *TRAIN, "--report_to", "wandb")
    assert line == "report_to: wandb is not installed. Install its package, or set report_to: none."


def test_the_last_checkpoint_is_found_by_its_number(tmp_path: Path) -> None:
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-x", "other-11"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-12").touch()
    assert check_checkpoint("true", str(tmp_path)) == str(tmp_path / "checkpoint-10")
    assert check_checkpoint(True, str(tmp_path)) == str(tmp_path / "checkpoint-10")
    assert check_checkpoint(str(tmp_path / "checkpoint-9"), "nowhere") == str(tmp_path / "checkpoint-9")
    assert [check_checkpoint(nothing, "nowhere") for nothing in (None, False, "false", "")] == [None] * 4


def test_a_run_goes_on_from_its_last_checkpoint_in_a_folder_with_brackets(
    tmp_path: Path, recipe: Path, model_path: str, capsys: pytest.CaptureFixture
) -> None:
    output = tmp_path / "run[bold] [1]"
    words = ["train", str(recipe), "--model", model_path, "--output_dir", str(output), "--save_strategy", "epoch"]
    assert main(words) == 0
    weights = (output / "model.safetensors").read_bytes()
    shutil.rmtree(output / "checkpoint-5")
    assert main([*words, "--resume_from_checkpoint", "true"]) == 0
    assert (output / "model.safetensors").read_bytes() == weights
    out = capsys.readouterr().out.splitlines()
    assert out[-2:] == [f"Model: {output}", f"Report: {output / 'report.html'}"]
    assert main(["report", str(output)]) == 0


@pytest.mark.parametrize("words", [TRAIN, SCORE, SELECT, REPORT])
def test_debug_shows_the_trace_of_any_error(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, words: list[str]
) -> None:
    monkeypatch.chdir(place)
    words = [word.replace("rows.jsonl", "missing.jsonl").replace("scored.parquet", "missing.csv") for word in words]
    words += ["--dataset", "missing.jsonl"] if words[0] == "train" else []
    assert main([words[0], "--debug", *words[1:]]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert errors[0] == "Traceback (most recent call last):"
    assert errors[-1].startswith("ifd-trainer: error: No such file")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "big.parquet"), "big.parquet cannot be written: no space"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "x.csv"), "x.csv cannot be written: no space is left. Make room"),
        (OSError(errno.EFBIG, "File too large", "x.csv"), "x.csv cannot be written: no space is left. Make room"),
        (OSError(errno.EACCES, "Permission denied", "x.csv"), "x.csv cannot be read or written: Permission denied"),
        (OSError(errno.EROFS, "Read-only file system", "x.csv"), "x.csv cannot be read or written: Read-only file"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "no space is left. Make room; the same"),
    ],
)
def test_a_full_disk_and_a_file_of_others_are_one_line(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, error: Exception, words: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("ifd_trainer.report.page.write_report", fail)
    assert words in told(place, monkeypatch, capsys, *REPORT)


def test_a_run_that_a_full_disk_ended_is_resumed_by_one_option_more(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "run/checkpoint-5")

    monkeypatch.setattr("ifd_trainer.recipe.run.build_run", fail)
    line = told(place, monkeypatch, capsys, *TRAIN)
    assert "Make room; the same command will add --resume_from_checkpoint true to go on" in line


@pytest.mark.parametrize("error", [ValueError("of ours"), KeyError("of ours"), ImportError("of ours"), OSError("ours")])
def test_a_fault_of_the_program_keeps_its_trace_and_says_so(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, error: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("ifd_trainer.publish.select.choose", fail)
    monkeypatch.chdir(place)
    assert main(SELECT) == 1
    errors = capsys.readouterr().err.splitlines()
    assert errors[0].startswith("ifd-trainer: this error is not yours but a fault of this program")
    assert errors[1] == "Traceback (most recent call last):"
    assert errors[-1].startswith(type(error).__name__)


def test_keys_without_effect_are_named(
    place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(place)
    assert main([*TRAIN, "--plan", "--brief_clusters", "7", "--tier_mode", "growing", "--embedder", "some/model"]) == 0
    assert "brief_clusters: no effect without method: cherry." in caplog.text
    assert "tier_mode: no effect without curriculum." in caplog.text
    assert "embedder: no effect without diverse." in caplog.text


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


def test_names_that_are_loaded_on_use_are_listed() -> None:
    assert set(ifd_trainer.__all__) <= set(dir(ifd_trainer))
    assert "__version__" in dir(ifd_trainer)


# ---- select, asking the model -----------------------------------------------------------------------------------


def test_select_tests_the_rows_that_it_would_keep_and_takes_the_next_best_for_those_that_fail(
    tmp_path: Path, many: Path, model_path: str
) -> None:
    output, kept = tmp_path / "scored.parquet", tmp_path / "kept.jsonl"
    assert score(many, output, model_path) == 0
    command = ["select", str(output), "--keep", "6", "--max-ifd", "inf", "--all", "--drop-mismatched"]
    assert main([*command, "--output", str(kept)]) == 0
    rows = load_rows(str(output))
    ranked = np.argsort(-np.array(rows["ifd"]), kind="stable")
    scorer, failed, tested = IFDScorer(model_path, device="cpu"), [], []
    while new := [row for row in [row for row in ranked if row not in failed][:6] if row not in tested]:
        tested += new
        failed += [row for row in new if scorer.pairing_p_values(rows, new)[row] > 0.1]
    reasons = read(kept)["ifd_reason"]
    assert sorted(failed) == np.flatnonzero(reasons == "mismatched").tolist()
    assert len(failed) > 3  # random weights: nine of ten rows fail
    assert sorted(set(tested) - set(failed)) == np.flatnonzero(reasons == "kept").tolist()
    assert (reasons == "kept").sum() == 6
    card = (tmp_path / "kept.md").read_text(encoding="utf-8")
    assert f"| `mismatched` | {len(failed)} |" in card


def test_select_takes_a_copy_of_the_model_that_scored_and_no_other(
    tmp_path: Path, many: Path, model_path: str, capsys: pytest.CaptureFixture
) -> None:
    output, copy, other = tmp_path / "scored.parquet", tmp_path / "copy", tmp_path / "other"
    shutil.copytree(model_path, copy)
    assert score(many, output, str(copy)) == 0
    shutil.copytree(copy, other)
    weights = load_file(other / "model.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, other / "model.safetensors")
    shutil.rmtree(copy)
    command = ["select", str(output), "--keep", "3", "--output", str(tmp_path / "kept.jsonl"), "--drop-mismatched"]
    assert main(command) == 2
    assert f"{copy}" in capsys.readouterr().err
    assert main([*command, "--scored-by", str(other)]) == 2
    error = capsys.readouterr().err
    assert f"{other} has other weights now (" in error
    assert "score" in error
    assert not (tmp_path / "kept.jsonl").exists()
    assert main([*command, "--scored-by", model_path]) == 0


def test_select_cannot_test_the_rows_of_a_model_that_nobody_knows(
    tmp_path: Path, many: Path, model_path: str, capsys: pytest.CaptureFixture
) -> None:
    output = tmp_path / "scored.parquet"
    assert score(many, output, model_path) == 0
    provenance_path(output).unlink()
    command = ["select", str(output), "--keep", "3", "--output", str(tmp_path / "kept.jsonl")]
    assert main([*command, "--drop-mismatched"]) == 2
    assert "nothing says which that was of" in capsys.readouterr().err
    assert main([*command, "--trust-remote-code"]) == 2
    assert "--trust-remote-code goes with --drop-mismatched or --targets." in capsys.readouterr().err


def test_rows_and_scores_of_two_files_are_tested_too(tmp_path: Path, many: Path, model_path: str) -> None:
    output, command = tmp_path / "scored.parquet", ["--keep", "3", "--max-ifd", "inf", "--drop-mismatched"]
    assert score(many, output, model_path) == 0
    assert main(["select", str(many), "--scores", str(output), *command, "--output", str(tmp_path / "a.jsonl")]) == 0
    assert main(["select", str(output), *command, "--output", str(tmp_path / "b.jsonl")]) == 0
    assert read(tmp_path / "a.jsonl")["id"].tolist() == read(tmp_path / "b.jsonl")["id"].tolist()


def test_a_reader_that_has_seen_enough_is_no_fault_of_the_program():
    program = (
        "import sys; from ifd_trainer import cli; from ifd_trainer.commands import train; "
        "train.train_help = lambda: 'x\\n' * 10**6; sys.exit(cli.main())"
    )
    started = [sys.executable, "-c", program, "train", "--help"]
    with subprocess.Popen(started, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as done:
        assert done.stdout.readline() == "x\n"
        done.stdout.close()
        assert done.stderr.read() == ""
    assert done.returncode == 141
