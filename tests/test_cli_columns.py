"""Columns and templates on the command line: scores, what is recorded of them, and what `select` and `train` read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import ROUNDING
from datasets import Dataset

from ifd_trainer import IFDScorer, TemplateFormat
from ifd_trainer.cli import main
from ifd_trainer.data.files import load_rows
from ifd_trainer.publish.provenance import provenance_path

ROWS = [
    {
        "q": f"Name {n} things.",
        "about": "" if n % 3 else f"the {n} cats",
        "a": f"The {n} is {n * 7}.",
        "rule": "Be brief.",
    }
    for n in range(1, 13)
]
CUSTOM = TemplateFormat(
    "mine",
    "{system}\n\nQ: {instruction}\nA:",
    "{system}\n\nQ: {instruction} ({input})\nA:",
    "A:",
    "q",
    "about",
    "a",
    system="rule",
)
OPTIONS = [
    *("--prompt-column", "q", "--answer-column", "a", "--input-column", "about", "--system-column", "rule"),
    *("--template", r"{system}\n\nQ: {instruction}\nA:"),
    *("--template-with-input", r"{system}\n\nQ: {instruction} ({input})\nA:"),
]


@pytest.fixture
def model_path(tmp_path, model, tokenizer) -> str:
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def written(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def score(data: str, output: Path, model: str, *more: str) -> int:
    return main(["score", data, "--model", model, "--output", str(output), "--device", "cpu", *more])


def read(path: Path) -> pd.DataFrame:
    return load_rows(str(path)).to_pandas()


def test_a_template_on_the_command_line_scores_as_one_in_python_does(tmp_path, model_path, caplog):
    output = tmp_path / "scored.parquet"
    assert score(written(tmp_path / "rows.jsonl", ROWS), output, model_path, *OPTIONS) == 0
    expected = Dataset.from_list(ROWS).map(IFDScorer(model_path, device="cpu", format=CUSTOM), batched=True).to_pandas()
    pd.testing.assert_frame_equal(read(output), expected, rtol=ROUNDING, check_dtype=False)
    assert [message for message in caplog.messages if "olumn" in message] == []


def test_select_reads_texts_of_a_template_again(tmp_path, model_path):
    rows = [*ROWS, ROWS[0] | {"q": "Name  1 things!"}, ROWS[1] | {"a": "I'm sorry, but I can't."}]
    output, kept = tmp_path / "scored.parquet", tmp_path / "kept.parquet"
    assert score(written(tmp_path / "rows.jsonl", rows), output, model_path, *OPTIONS) == 0
    command = ["select", str(output), "--output", str(kept), "--keep", "1.0", "--max-ifd", "inf", "--all"]
    assert main([*command, "--drop-duplicates", "--drop-refusals"]) == 0
    assert read(kept)["ifd_reason"].tolist() == ["kept"] * 12 + ["duplicate", "refusal"]


def test_select_asks_the_model_about_rows_of_a_template_as_they_were_scored(tmp_path, model_path):
    rows = [dict(ROWS[n % 12], q=f"Name {n} things.", a=f"It is {n}, and {n * n} more.") for n in range(40)]
    output, kept = tmp_path / "scored.parquet", tmp_path / "kept.parquet"
    assert score(written(tmp_path / "rows.jsonl", rows), output, model_path, *OPTIONS) == 0
    command = ["select", str(output), "--output", str(kept), "--keep", "3", "--max-ifd", "inf", "--all"]
    assert main([*command, "--drop-mismatched"]) == 0
    scored = load_rows(str(output))
    ranked, scorer = (
        np.argsort(-np.array(scored["ifd"]), kind="stable"),
        IFDScorer(model_path, device="cpu", format=CUSTOM),
    )
    failed, tested = [], []
    while new := [row for row in [row for row in ranked if row not in failed][:3] if row not in tested]:
        tested += new
        failed += [row for row in new if scorer.pairing_p_values(scored, new)[row] > 0.1]
    assert np.flatnonzero(read(kept)["ifd_reason"] == "mismatched").tolist() == sorted(failed)
    assert len(failed) > 1


def test_a_report_shows_the_texts_of_columns_that_were_named(tmp_path, model_path):
    output = tmp_path / "scored.parquet"
    assert score(written(tmp_path / "rows.jsonl", ROWS), output, model_path, *OPTIONS) == 0
    assert main(["report", str(output), "--output", str(tmp_path / "report")]) == 0
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    shown = [row for row in ROWS if row["q"] in page and row["a"] in page]
    assert len(shown) == len(ROWS)
    assert "of the columns q, a" in page


def test_the_recorded_format_is_on_the_card(tmp_path, model_path):
    output, kept = tmp_path / "scored.parquet", tmp_path / "kept.jsonl"
    assert (
        score(written(tmp_path / "rows.jsonl", ROWS), output, model_path, "--prompt_column=q", "--answer_column=a") == 0
    )
    record = yaml.safe_load(provenance_path(output).read_text(encoding="utf-8"))["format"]
    assert json.loads(record) == {"format": "wizardlm", "instruction": "q", "output": "a"}
    assert main(["select", str(output), "--output", str(kept), "--keep", "2", "--max-ifd", "inf"]) == 0
    assert (
        '| prompt format | {"format": "wizardlm", "instruction": "q", "output": "a"} |'
        in kept.with_suffix(".md").read_text()
    )


def test_parts_of_another_template_are_not_taken_over(tmp_path, model_path, monkeypatch, capsys):
    data, output = written(tmp_path / "rows.jsonl", ROWS), tmp_path / "scored.parquet"
    columns = ["--prompt-column", "q", "--answer-column", "a", "--part-rows", "4"]
    done = []

    def interrupted(self, pairs, *more):
        if done:
            raise KeyboardInterrupt
        done.append(pairs)
        return plain(self, pairs, *more)

    plain = IFDScorer.score
    with monkeypatch.context() as patch:
        patch.setattr(IFDScorer, "score", interrupted)
        assert score(data, output, model_path, *columns, "--template", "{instruction} A:") == 130
    assert score(data, output, model_path, *columns, "--template", "{instruction} B:") == 2
    assert "holds parts of another job: format: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "Cannot tell the format from the columns ['a', 'about', 'q', 'rule']."),
        ([], "Name the columns with --prompt-column and --answer-column, or with --messages-column."),
        (["--prompt-column", "q"], "Name it with --answer-column."),
        (["--template", "Q: {q}", "--prompt-column", "q"], "--template 'Q: {q}' lacks {instruction} and has {q}."),
        (["--format", "alpaca"], "Name the columns (--prompt-column, --answer-column, ...), or choose"),
    ],
)
def test_advice_of_the_command_line_is_of_its_options(tmp_path, model_path, options, words, capsys):
    assert score(written(tmp_path / "rows.jsonl", ROWS), tmp_path / "out.jsonl", model_path, *options) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert words in error
    assert "TemplateFormat" not in error
    assert "rename" not in error


def test_options_are_understood_with_underscores_and_hyphens(tmp_path, model_path):
    data = written(tmp_path / "rows.jsonl", ROWS)
    outputs = []
    for sign in "_-":
        outputs.append(tmp_path / f"out{sign}.parquet")
        options = ["--prompt-column", "q", "--answer-column=a", "--max-length", "64", "--min-answer-tokens", "2"]
        options = [word.replace("-", sign).replace(sign * 2, "--", 1) for word in options]
        assert score(data, outputs[-1], model_path, *options) == 0
        options = ["--max-ifd", "inf", "--id-column", "q", "--no-card"]
        options = [word.replace("-", sign).replace(sign * 2, "--", 1) for word in options]
        assert main(["select", str(outputs[-1]), "--output", f"{outputs[-1]}_kept.jsonl", *options]) == 0
    assert outputs[0].read_bytes() == outputs[1].read_bytes()
    assert len(read(Path(f"{outputs[0]}_kept.jsonl"))) == 1


@pytest.mark.parametrize("sign", ["_", "-"])
def test_train_takes_columns_with_underscores_and_hyphens(tmp_path, model_path, sign, capsys):
    words = f"--prompt{sign}column q --answer{sign}column a --max{sign}length 64 --num{sign}train{sign}epochs 1"
    words = [*words.split(), "--report_to", "none", "--use_cpu", "true"]
    data = written(tmp_path / "rows.jsonl", ROWS)
    options = ["--model", model_path, "--dataset", data, "--keep", "0.5", "--output_dir", str(tmp_path / "out")]
    assert main(["train", "--plan", *options, *words]) == 0
    assert "epoch 0: 6 rows" in capsys.readouterr().out


def test_a_recipe_trains_on_the_prompts_of_its_template(tmp_path, model_path, monkeypatch, capsys):
    from trl import SFTTrainer

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "prompt_column: q\nanswer_column: a\ninput_column: about\nsystem_column: rule\n"
        'template: "{system}\\n\\nQ: {instruction}\\nA:"\n'
        "template_with_input: '{system}\\n\\nQ: {instruction} ({input})\\nA:'\n"
        f"model_name_or_path: {model_path}\ndataset_name: {written(tmp_path / 'rows.jsonl', ROWS)}\nreport_to: none\n"
        f"output_dir: {tmp_path / 'out'}\nuse_cpu: true\n"
    )
    seen, init = [], SFTTrainer.__init__

    def noted(self, *args, train_dataset, **options):
        seen.extend(train_dataset)
        init(self, *args, train_dataset=train_dataset, **options)

    monkeypatch.setattr(SFTTrainer, "__init__", noted)
    assert main(["train", str(recipe), "--plan"]) == 0
    expected = [CUSTOM.render(row) for row in ROWS]
    assert [row["prompt"] for row in seen] == [example.prompt for example in expected]
    assert [row["completion"] for row in seen] == [example.answer for example in expected]


def test_messages_of_trees_are_scored_as_chats(tmp_path, model_path, capsys):
    table = [
        ("q", None, "prompter", "Name a bird."),
        ("a", "q", "assistant", "A wren."),
        ("b", "q", "assistant", "A crow."),
    ]
    names = ("message_id", "parent_id", "role", "text")
    data = written(tmp_path / "rows.jsonl", [dict(zip(names, row, strict=True)) for row in table])
    assert score(data, tmp_path / "out.jsonl", model_path) == 0
    found = read(tmp_path / "out.jsonl")
    assert found["message_id"].tolist() == ["a", "b"]
    assert found["ifd_status"].tolist() == ["ok", "ok"]
    chats = Dataset.from_list(
        [
            {"messages": [{"role": "user", "content": table[0][3]}, {"role": "assistant", "content": row[3]}]}
            for row in table[1:]
        ]
    )
    expected = chats.map(IFDScorer(model_path, device="cpu"), batched=True)
    assert found["ifd"].tolist() == pytest.approx(expected["ifd"][:], rel=ROUNDING)
    # What was written is chats: it is scored again as it is.
    assert score(str(tmp_path / "out.jsonl"), tmp_path / "again.jsonl", model_path) == 0
    assert read(tmp_path / "again.jsonl")["ifd"].tolist() == pytest.approx(found["ifd"].tolist(), rel=ROUNDING)


def test_one_warning_for_all_batches_of_a_transform(model, tokenizer, caplog):
    rows = Dataset.from_list(
        [{"instruction": "Sum.", "context": f"{n} and 2", "output": f"It is {n}."} for n in range(6)]
    )
    rows.map(IFDScorer(model, tokenizer), batched=True, batch_size=2)
    said = [message for message in caplog.messages if "context" in message]
    assert said == [
        "Columns of the data set: 'context' looks like a part of the prompt and is not read: TemplateFormat(..., "
        'input="context") makes it the input.'
    ]
