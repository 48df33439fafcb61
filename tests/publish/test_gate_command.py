"""`ifd-trainer gate`, and `select --gates`: rows in; what passes, reasons and counts out."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from ifd_trainer.cli import main
from ifd_trainer.data.files import load_rows
from ifd_trainer.method.reasons import GATE_REASONS, MEANINGS

TEXTS = [
    ("Name a bird.", "A robin is one."),
    ("Name a tree.", "An old oak tree."),
    ("Name a fish.", ""),
    ("Name a tool.", "Sure! Here is one: a saw."),
    ("name a  tree", "an old oak tree"),
    ("Name a city.", " ".join(f"Kyoto-{i}" for i in range(60))),
    ("Name a lake.", "The lake of Como."),
    ("Name a word.", "the word the word the word the word"),
]
SEEDS = [("Name a lake.", "The lake of Como."), ("Name a sea.", "The Baltic is a sea."), ("Name a king.", "Arthur.")]
KEPT = ["kept", "duplicate", "near_empty", "boilerplate", "kept", "length_outlier", "copy_of_example", "repetitive"]


def write(path: Path, texts: list[tuple[str, str]], **columns: list) -> str:
    rows = [{"id": 100 - i, "instruction": asked, "output": said} for i, (asked, said) in enumerate(texts)]
    rows = [row | {name: values[i] for name, values in columns.items()} for i, row in enumerate(rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def command(tmp_path) -> list[str]:
    words = ["gate", write(tmp_path / "rows.jsonl", TEXTS), "--gates", "noise", "length:3", "copies"]
    return [*words, "--gate-examples", write(tmp_path / "seeds.jsonl", SEEDS), "--output", str(tmp_path / "out.jsonl")]


def test_what_passes_is_written_and_what_does_not_is_counted(tmp_path, command, capsys):
    assert main(command) == 0
    found = load_rows(str(tmp_path / "out.jsonl"))
    assert found["id"][:] == [100, 96]  # of the two trees the lower id
    assert found["gate_reason"][:] == ["kept", "kept"]
    out = capsys.readouterr().out
    assert "2 of 8 rows kept. Not kept: 1 repetitive, 1 near_empty, 1 length_outlier, 1 duplicate, 1 copy_of_e" in out


def test_all_rows_have_their_reason(tmp_path, command):
    assert main([*command, "--all"]) == 0
    assert load_rows(str(tmp_path / "out.jsonl"))["gate_reason"][:] == KEPT
    assert set(GATE_REASONS) <= set(MEANINGS)


def test_select_drops_them_among_scored_rows(tmp_path, command, capsys):
    scores = [0.5, 0.9, 0.8, 0.7, 0.6, 0.4, 0.3, 0.2]
    status = ["ok"] * 8
    status[2] = "empty_answer"
    columns = {"ifd": scores, "ifd_ppl": scores, "ifd_status": status, "answer_tokens": [5] * 8}
    words = ["select", write(tmp_path / "scored.jsonl", TEXTS, **columns), *command[2:], "--all"]
    assert main([*words, "--keep", "all"]) == 0
    expected = [reason if reason != "near_empty" else "empty_answer" for reason in KEPT]
    found = load_rows(str(tmp_path / "out.jsonl"))
    assert found["ifd_reason"][:] == expected
    assert found["ifd_rank"][:] == [2, None, None, None, 1, None, None, None]
    out = capsys.readouterr()
    assert "2 rows kept, 25.00 % of all 8 rows in the pool (2 asked for)" in out.out
    assert out.err == ""
    card = (tmp_path / "out.md").read_text()
    assert "| `copy_of_example` | 1 | 12.50 % | dropped: an example says the same |" in card
    assert main([*words, "--keep", "3"]) == 0
    assert "only 2 are eligible (1 boilerplate, 1 copy_of_example, 1 duplicate" in capsys.readouterr().err
    assert main([*words, "--keep", "1"]) == 0
    assert load_rows(str(tmp_path / "out.jsonl"))["ifd_reason"][0] == "below_cut"


def test_a_row_above_the_limit_stands_for_no_other(tmp_path):
    """Of the two that say the same, the lower id is above the limit."""
    columns = {"ifd": [0.5, 1.2], "ifd_ppl": [0.5, 1.2], "ifd_status": ["ok", "ok"], "answer_tokens": [5, 5]}
    source = write(tmp_path / "scored.jsonl", [TEXTS[1], TEXTS[4]], **columns)
    words = ["select", source, "--gates", "copies", "--keep", "all", "--all", "--output", str(tmp_path / "out.parquet")]
    assert main(words) == 0
    assert pd.read_parquet(tmp_path / "out.parquet")["ifd_reason"].tolist() == ["kept", "above_limit"]


def test_where_all_rows_are_dropped_the_option_is_named(tmp_path, capsys):
    columns = {"ifd": [0.5], "ifd_ppl": [0.5], "ifd_status": ["ok"], "answer_tokens": [5]}
    source = write(tmp_path / "scored.jsonl", [TEXTS[3]], **columns)
    words = ["select", source, "--gates", "noise", "--keep", "all", "--output", str(tmp_path / "out.parquet")]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "None of 1 row in the pool may be kept (1 boilerplate). No row that may be kept has a score" in error
    assert "leave out --gates, or look at the data." in error


def test_other_columns_and_ids(tmp_path, command):
    rows = [{"key": f"k{i}", "q": asked, "a": said} for i, (asked, said) in enumerate(TEXTS)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["gate", str(tmp_path / "own.jsonl"), *command[2:], "--prompt-column", "q", "--answer-column", "a"]
    assert main([*words, "--id-column", "key", "--all"]) == 0
    found = load_rows(str(tmp_path / "out.jsonl"))["gate_reason"][:]
    assert found == ["kept", "kept", *KEPT[2:4], "duplicate", *KEPT[5:]]  # of texts the lower one is another row


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gates", "size"], "--gates: 'size' is no gate: they are length, noise, copies, matched."),
        (["--gates", "matched"], "reads spin_gap, which the rows do not have: attach it with `ifd-trainer score"),
        (["--gates", "length", "--gate-examples", "no.jsonl"], "no.jsonl"),
        (["--gates", "noise", "--id-column", "none"], "There is no column 'none' of row ids (--id-column)"),
    ],
)
def test_wrong_gates_are_told_in_a_line(tmp_path, words, said, capsys):
    source = write(tmp_path / "rows.jsonl", TEXTS)
    assert main(["gate", source, "--output", str(tmp_path / "out.jsonl"), *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out.jsonl").exists()


def test_examples_that_cannot_be_read_are_named(tmp_path, capsys):
    source = write(tmp_path / "rows.jsonl", TEXTS)
    (tmp_path / "seeds.jsonl").write_text('{"n": 1}\n')
    output = ["--output", str(tmp_path / "out.jsonl")]
    assert main(["gate", source, "--gates", "length", "--gate-examples", str(tmp_path / "seeds.jsonl"), *output]) == 2
    assert "seeds.jsonl: No answers among the columns ['n']" in capsys.readouterr().err
    assert main(["gate", source, "--gates", "noise", "--output", source]) == 2
    assert "is the file that is read" in capsys.readouterr().err
    assert main(["select", source, "--gate-examples", source, *output]) == 2
    assert "--gate-examples goes with --gates" in capsys.readouterr().err
    assert main(["select", source, "--keep", "all", "--per", "id", "--quota", "99=1", *output]) == 2
    assert "--keep all keeps every row that is not dropped" in capsys.readouterr().err
