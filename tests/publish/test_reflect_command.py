"""`ifd-trainer reflect`: two files or one in, the texts that are taken and their scores out, in one go or in parts."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from conftest import ROUNDING
from datasets import Dataset

from ifd_trainer import IFDScorer, ReflectionScorer
from ifd_trainer.cli import main
from ifd_trainer.data.files import load_rows
from ifd_trainer.errors import UserError
from ifd_trainer.method.columns import IFD_COLUMNS, REFLECTED_COLUMNS
from ifd_trainer.publish.provenance import read_provenance
from ifd_trainer.publish.reflect import joined

ROWS = [
    {"id": f"r{i}", "instruction": text, "output": answer, "n": i}
    for i, (text, answer) in enumerate(
        [
            ("Name three colours.", "Red, green and blue."),
            ("Add 12 and 30.", "The sum is 42."),
            ("Who sat on the mat?", "The cat."),
            ("What ran in the park?", "a dog"),
            ("Name a ball.", ""),
        ]
    )
]
NEW = [  # in another order, and without one of them
    {"id": "r3", "instruction": "What ran in the park with a red ball?", "output": "a dog and a cat"},
    {"id": "r0", "instruction": "Name three colours.", "output": "The colours are red, green and blue."},
    {"id": "r2", "instruction": "Say no.", "output": "maybe or maybe not"},
    {"id": "r4", "instruction": "Name a ball.", "output": "a red ball"},
]


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def command(tmp_path, model, tokenizer) -> list[str]:
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    words = ["reflect", write(tmp_path / "rows.jsonl", ROWS), "--model", str(tmp_path / "model"), "--device", "cpu"]
    return [*words, "--rewritten", write(tmp_path / "new.jsonl", NEW), "--limit", "inf"]


def test_the_file_holds_what_the_transform_takes(tmp_path, command, model, tokenizer, capsys):
    output = tmp_path / "out.parquet"
    assert main([*command, "--output", str(output), "--part-rows", "2"]) == 0
    found = pd.read_parquet(output)
    rows = joined(load_rows(str(tmp_path / "rows.jsonl")), load_rows(str(tmp_path / "new.jsonl"))).rows
    reflection = ReflectionScorer(model, tokenizer, limit=float("inf"))
    expected = rows.map(reflection, batched=True).remove_columns(["rewritten_instruction", "rewritten_output"])
    assert list(found) == ["id", "instruction", "output", "n", *IFD_COLUMNS, "rifd", "rcas", "rdas", *REFLECTED_COLUMNS]
    pd.testing.assert_frame_equal(found, expected.to_pandas()[list(found)], rtol=5 * ROUNDING)
    reasons = found["reflect_reason"].tolist()
    assert (reasons[1], reasons[4]) == ("not_rewritten", "empty_answer")
    assert found["n"].tolist() == [0, 1, 2, 3, 4]
    out = capsys.readouterr().out
    assert "5 rows: " in out
    assert "(1 row without a rewritten one). Written to" in out
    made = read_provenance(output, found)
    assert made.reflected == {"rewritten": str(tmp_path / "new.jsonl"), "limit": float("inf")}
    assert made.format == "wizardlm"
    # The scores are those of the texts that are written.
    again = Dataset.from_pandas(found[["instruction", "output"]]).map(IFDScorer(model, tokenizer), batched=True)
    pd.testing.assert_series_equal(again.to_pandas()["ifd"], found["ifd"], rtol=1e-3)
    assert not Path(f"{output}.parts").exists()


def test_what_was_taken_is_selected_from_as_from_any_scored_file(tmp_path, command):
    assert main([*command, "--output", str(tmp_path / "out.parquet")]) == 0
    words = ["select", str(tmp_path / "out.parquet"), "--keep", "2", "--max-ifd", "inf"]
    assert main([*words, "--output", str(tmp_path / "kept.jsonl")]) == 0
    found, kept = pd.read_parquet(tmp_path / "out.parquet"), load_rows(str(tmp_path / "kept.jsonl"))
    assert set(kept["id"]) == set(found.nlargest(2, "ifd")["id"])
    assert "`kept_original`, or why there was no choice" in (tmp_path / "kept.md").read_text()


def test_a_report_of_them_does_not_advise_to_score_the_original_rows_over_them(tmp_path, command):
    output = tmp_path / "out.parquet"
    assert main([*command, "--output", str(output)]) == 0
    assert main(["report", str(output), "--output", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text()
    assert f"ifd-trainer select {output}" in page
    assert "--calibrate" not in page


def test_a_job_that_is_interrupted_goes_on_where_it_was(tmp_path, command, monkeypatch):
    assert main([*command, "--output", str(tmp_path / "whole.jsonl")]) == 0
    command = [*command, "--part-rows", "2", "--output", str(tmp_path / "out.jsonl")]
    score_rows, scored = ReflectionScorer.score_rows, []

    def counted(self, rows, progress=None):
        if len(scored) == 1 and not go_on:
            raise KeyboardInterrupt
        scored.append(len(rows))
        return score_rows(self, rows, progress)

    go_on: list[bool] = []
    monkeypatch.setattr(ReflectionScorer, "score_rows", counted)
    assert main(command) == 130
    (tmp_path / "other.jsonl").write_text((tmp_path / "new.jsonl").read_text().replace("Say no.", "Say yes."))
    other = [word.replace("new.jsonl", "other.jsonl") for word in command]
    assert main(other) == 2  # parts of other texts are not taken over
    go_on.append(True)
    assert main(command) == 0
    assert scored == [2, 2, 1]
    whole, parts = (pd.read_json(tmp_path / name, lines=True) for name in ("whole.jsonl", "out.jsonl"))
    pd.testing.assert_frame_equal(parts, whole, rtol=5 * ROUNDING)


def test_rewritten_texts_may_be_columns_of_the_same_file(tmp_path, command):
    assert main([*command, "--output", str(tmp_path / "two.jsonl")]) == 0
    new = {row["id"]: row for row in NEW}
    both = [
        row | {"asked": new.get(row["id"], {}).get("instruction"), "better": new.get(row["id"], {}).get("output")}
        for row in ROWS
    ]
    words = [word for word in command if word not in ("--rewritten", str(tmp_path / "new.jsonl"))]
    words[1] = write(tmp_path / "both.jsonl", both)
    words += ["--rewritten-column", "instruction=asked", "--rewritten-column", "output=better"]
    assert main([*words, "--output", str(tmp_path / "one.jsonl")]) == 0
    two, one = (pd.read_json(tmp_path / name, lines=True) for name in ("two.jsonl", "one.jsonl"))
    pd.testing.assert_frame_equal(one.drop(columns=["asked", "better"]), two, rtol=5 * ROUNDING)
    assert load_rows(str(tmp_path / "one.jsonl"))["better"][:] == [row["better"] for row in both]


def rows(**columns: list) -> Dataset:
    return Dataset.from_dict(columns)


ONE = {"instruction": ["a", "b"], "output": ["c", "d"]}


def test_rows_are_joined_by_ids_or_by_their_places():
    found = joined(rows(id=[1, 2], **ONE), rows(id=[2, 1], output=["D", "C"]))
    assert found.rows["rewritten_output"][:] == ["C", "D"]
    assert (found.columns, found.missing) == ({"output": "rewritten_output"}, 0)
    found = joined(rows(id=["x", "y"], **ONE), rows(id=["y"], instruction=["B"], output=["D"]))
    assert found.rows["rewritten_instruction"][:] == [None, "B"]
    assert found.missing == 1
    assert joined(rows(**ONE), rows(output=["C", "D"])).rows["rewritten_output"][:] == ["C", "D"]
    named = joined(rows(key=[7, 8], **ONE), rows(key=[8, 7], output=["D", "C"]), id_column="key")
    assert named.rows["rewritten_output"][:] == ["C", "D"]
    shuffled = rows(id=[1, 2], **ONE).select([1, 0])  # an index over the rows, which is no order of the file
    assert joined(shuffled, rows(id=[1, 2], output=["C", "D"])).rows["rewritten_output"][:] == ["D", "C"]


@pytest.mark.parametrize(
    ("one", "other", "words"),
    [
        (rows(id=[1, 2], **ONE), rows(id=[1, 3], output=["C", "D"]), "1 rewritten row has an id (id) that no row has"),
        (rows(id=[1, 2], **ONE), rows(output=["C", "D"]), "rows have ids in the column 'id' and the rewritten rows"),
        (rows(**ONE), rows(id=[1, 2], output=["C", "D"]), "rewritten rows have ids in the column 'id' and the rows"),
        (
            rows(id=[1, 2], **ONE),
            rows(row_id=[1, 2], output=["C", "D"]),
            "ids in 'id' and the rewritten rows in 'row_id'",
        ),
        (rows(**ONE), rows(output=["C"]), "There are 2 rows and 1 rewritten row, and no column of ids"),
        (rows(**ONE), rows(text=["C", "D"]), "have none of the columns ['instruction', 'output']"),
        (rows(**ONE), rows(output=[["C"], ["D"]]), "are of other types than those of the rows"),
    ],
)
def test_rows_that_do_not_belong_together_are_refused(one, other, words):
    with pytest.raises(UserError) as caught:
        joined(one, other)
    assert words in str(caught.value)


def test_options_that_do_not_go_together_are_told(tmp_path, command, capsys):
    output = ["--output", str(tmp_path / "out.jsonl")]
    alone = [word for word in command if word not in ("--rewritten", str(tmp_path / "new.jsonl"))]
    for words, said in (
        ([*command, "--rewritten-column", "output=n"], "--rewritten names a second data set"),
        ([*alone, "--id-column", "id"], "--id-column goes with --rewritten FILE"),
        ([*alone, "--rewritten-column", "output"], "--rewritten-column wants NAME=COLUMN, got 'output'"),
        ([*alone, "--rewritten-column", "output=missing"], "there is no column 'missing' to read"),
        (alone, "No column holds rewritten texts"),
        ([*alone, "--rewritten", "no.jsonl"], "no.jsonl"),
        ([*command, "--limit", "0"], "wants a number above 0, or inf, got '0'"),
        ([*command[:-2], "--guess", "What?"], "guess asks for the instruction"),
    ):
        assert main([*words, *output]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl.parts").exists()
