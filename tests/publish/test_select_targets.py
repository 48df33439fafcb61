"""`ifd-trainer select --targets`: rows, a model and examples in; the rows that these take in turn and a card out."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import build_model
from datasets import Dataset
from tiny_runs import TOKENIZER, raw_rows

from ifd_trainer import TargetScorer
from ifd_trainer.cli import main
from ifd_trainer.data.files import load_rows

TARGETS = [*raw_rows(2, seed=8), {"instruction": "Why is the ball red?"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, rows, their scores, and a target set."""
    place = tmp_path_factory.mktemp("targets")
    build_model(len(TOKENIZER)).save_pretrained(place / "model")
    TOKENIZER.save_pretrained(place / "model")
    rows = [{**row, "source": "ab"[i % 2]} for i, row in enumerate(raw_rows(20))]
    rows[4]["output"] = ""
    for name, content in (("rows", rows), ("task", TARGETS)):
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    words = ["score", str(place / "rows.jsonl"), "--model", str(place / "model"), "--format", "alpaca"]
    assert main([*words, "--output", str(place / "scored.parquet")]) == 0
    return place


@pytest.fixture(scope="module")
def cosines(folder):
    """(n, 3) of the rows that can be embedded, by their ids; from the transform, which has tests of its own."""
    scorer = TargetScorer(str(folder / "model"), str(folder / "task.jsonl"), format="alpaca")
    rows = load_rows(str(folder / "rows.jsonl"))
    table, status = scorer.similarities(rows[:])
    return {row: table[i] for i, row in enumerate(rows["row_id"]) if status[i] == "ok"}


def in_turn(cosines, budget):
    left, taken = dict(cosines), []
    for turn in range(budget):
        taken.append(max(left, key=lambda row: left[row][turn % 3]))
        del left[taken[-1]]
    return taken


def select(folder, tmp_path, source, *words):
    output = tmp_path / "out.parquet"
    words = ["select", str(folder / source), "--targets", str(folder / "task.jsonl"), "--output", str(output), *words]
    assert main([*words, "--all"]) == 0
    return load_rows(str(output))


def ranked(rows):
    table = rows.to_pandas().dropna(subset="ifd_rank").sort_values("ifd_rank")
    return table["row_id"].tolist()


def test_targets_take_rows_in_turn_by_the_model_that_scored(folder, cosines, tmp_path, capsys):
    rows = select(folder, tmp_path, "scored.parquet", "--keep", "6")
    assert ranked(rows) == in_turn(cosines, 6)
    table = rows.to_pandas().set_index("row_id")
    assert table["ifd_reason"].value_counts().to_dict() == {"less_like_targets": 13, "kept": 6, "empty_answer": 1}
    found = table["target_similarity"].drop(104)
    np.testing.assert_allclose(found, [cosines[row].max() for row in found.index], atol=1e-6)
    assert table["target_row"].drop(104).astype(int).tolist() == [int(cosines[row].argmax()) for row in found.index]
    assert np.isnan(table.loc[104, "target_similarity"])
    lowest = min(cosines[row].max() for row in in_turn(cosines, 6))
    out = capsys.readouterr().out
    assert (
        f"6 rows kept, 30.00 % of all 20 rows in the pool (6 asked for), target_similarity >= {lowest:.3f}"[:-3] in out
    )
    card = (tmp_path / "out.md").read_text(encoding="utf-8")
    assert "the 6 rows most like the examples of a target set" in card
    assert "| target set | 3 rows of task.jsonl, 1 of them without an answer; the targets took the rows most" in card
    assert "`target_similarity` | cosine with the target most like the row" in card.replace("|  ", "| ")
    assert "other rows are more like the targets" in card


def test_rows_that_were_not_scored_are_embedded_by_a_model_that_is_named(folder, cosines, tmp_path):
    rows = select(folder, tmp_path, "rows.jsonl", "--keep", "5", "--embedder", str(folder / "model"))
    assert len(ranked(rows)) == 5
    table = rows.to_pandas().set_index("row_id")
    assert table.loc[104, "ifd_reason"] == "empty_answer"
    assert "ifd" not in rows.column_names


def test_limits_and_quotas_come_before_the_targets(folder, cosines, tmp_path):
    ifd = dict(zip(*(load_rows(str(folder / "scored.parquet"))[name] for name in ("row_id", "ifd")), strict=True))
    limit = float(np.median([value for value in ifd.values() if value is not None]))
    below = {row: values for row, values in cosines.items() if ifd[row] < limit}
    rows = select(folder, tmp_path, "scored.parquet", "--keep", "4", "--max-ifd", repr(limit))
    assert ranked(rows) == in_turn(below, 4)
    table = rows.to_pandas().set_index("row_id")
    assert set(table.index[table["ifd_reason"] == "above_limit"]) == cosines.keys() - below.keys()
    assert table.loc[list(cosines.keys() - below.keys()), "target_similarity"].isna().all()  # not embedded
    quotas = ["--per", "source", "--quota", "a=3", "--quota", "b=2", "--keep", "5"]
    rows = select(folder, tmp_path, "scored.parquet", *quotas)
    order = in_turn(cosines, len(cosines))
    source = dict(zip(*(rows[name] for name in ("row_id", "source")), strict=True))
    expected = {row for name, count in (("a", 3), ("b", 2)) for row in [r for r in order if source[r] == name][:count]}
    assert set(ranked(rows)) == expected


def test_embedding_goes_on_where_it_was_interrupted(folder, cosines, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("ifd_trainer.publish.targets.PART_ROWS", 4)
    embedded, embed = [], TargetScorer.similarities_of

    def interrupted(self, rows, progress=None):
        embedded.append(len(rows))
        if len(embedded) == 3:
            raise KeyboardInterrupt
        return embed(self, rows, progress)

    monkeypatch.setattr(TargetScorer, "similarities_of", interrupted)
    words = ["select", str(folder / "scored.parquet"), "--targets", str(folder / "task.jsonl")]
    words += ["--output", str(tmp_path / "out.parquet"), "--all", "--keep", "6"]
    assert main(words) == 130
    assert embedded == [4, 4, 4]
    other = [*words[:3], str(folder / "rows.jsonl"), *words[4:]]  # other targets: every row of the pool
    assert main(other) == 2
    assert "holds parts of another job: targets: " in capsys.readouterr().err
    assert main(words) == 0
    assert embedded[3:] == [4, 4, 3]  # of 19 rows that have a score, 8 were done
    assert "Embedding 19 rows, of which 8 are done already" in capsys.readouterr().err
    rows = load_rows(str(tmp_path / "out.parquet"))
    assert ranked(rows) == in_turn(cosines, 6)
    assert [path.name for path in tmp_path.glob("*.parts")] == []


def test_text_ids_break_ties(folder, tmp_path):
    """Rows that say the same are equally alike to each target: the lower id is kept."""
    row = {"instruction": "Name a colour.", "input": "", "output": "red"}
    Dataset.from_list([{"id": name, **row} for name in ("b", "c", "a")]).to_parquet(tmp_path / "same.parquet")
    words = ["select", str(tmp_path / "same.parquet"), "--targets", str(folder / "task.jsonl"), "--keep", "2"]
    words += ["--embedder", str(folder / "model"), "--output", str(tmp_path / "two.parquet")]
    assert main(words) == 0
    rows = load_rows(str(tmp_path / "two.parquet"))
    assert sorted(rows["id"]) == ["a", "b"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rows.jsonl", "--targets", "task.jsonl"], "nothing says which one scored"),
        (["scored.parquet", "--targets", "task.jsonl", "--score", "ifd"], "--score and --targets both say which rows"),
        (["scored.parquet", "--embedder", "model"], "--embedder goes with --targets FILE"),
        (["scored.parquet", "--targets", "nothing.jsonl"], "nothing.jsonl"),
        (["scored.parquet", "--targets", "empty.jsonl"], "empty.jsonl"),
        (["scored.parquet", "--targets", "task.jsonl", "--max-ifd", "0.000001"], "No row is left that may be kept"),
        (["scored.parquet", "--targets", "task.jsonl", "--keep", "20", "--strict"], "only 19 are eligible"),
    ],
)
def test_what_cannot_be_held_against_targets_is_said(folder, tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.chdir(folder)
    (folder / "empty.jsonl").write_text("")
    assert main(["select", *words, "--output", str(tmp_path / "out.parquet")]) == 2
    assert message in capsys.readouterr().err


def test_fewer_rows_than_asked_for_are_a_warning(folder, tmp_path, capsys):
    rows = select(folder, tmp_path, "scored.parquet", "--keep", "20")
    assert len(ranked(rows)) == 19
    assert (
        "20 rows asked for (of 20 rows in the pool), only 19 are eligible (1 empty_answer)" in capsys.readouterr().err
    )
