"""Federated use by commands: what a site's file tells, the threshold of several, and the rows that sites keep by it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset

from ifd_trainer.cli import main
from ifd_trainer.data.files import load_rows, write_rows
from ifd_trainer.data.histogram_files import read_histogram, read_threshold, threshold_of
from ifd_trainer.errors import UserError
from ifd_trainer.publish.provenance import Provenance, write_provenance

ROWS = {"a": 200, "b": 120}


def site_rows(name: str, rows: int, high: float) -> pd.DataFrame:
    """Rows of a site: their IRA, and every tenth of them without a score."""
    rng = np.random.default_rng(len(name) + rows)
    ira = rng.normal(high, 0.4, rows).round(3)
    scored = np.arange(rows) % 10 > 0
    return pd.DataFrame(
        {
            "id": [f"{name}-{i}" for i in range(rows)],
            "instruction": [f"Secret {name} {i}." for i in range(rows)],
            "output": "Answer.",
            "ifd": np.where(scored, (2 - ira) / 2, np.nan),
            "ifd_ppl": np.where(scored, np.exp(-ira), np.nan),
            "ira": np.where(scored, ira, np.nan),
            "answer_tokens": 3,
            "ifd_status": np.where(scored, "ok", "too_short"),
        }
    )


@pytest.fixture
def sites(tmp_path: Path, monkeypatch) -> dict[str, pd.DataFrame]:
    """Scored files of two sites in the working directory, with histograms of their scores."""
    monkeypatch.chdir(tmp_path)
    frames = {"a": site_rows("a", ROWS["a"], 1.0), "b": site_rows("b", ROWS["b"], 0.5)}
    for name, frame in frames.items():
        write_rows(Dataset.from_pandas(frame), Path(f"{name}.jsonl"))
        write_provenance(f"{name}.jsonl", Provenance("paper", "org/model", weights="1234"), frame)
        assert main(["histogram", f"{name}.jsonl", "--score", "ira", "--output", f"site_{name}.json"]) == 0
    return frames


def told(capsys, *words: str) -> str:
    assert main(list(words)) == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_a_site_tells_counts_and_nothing_of_a_row(sites):
    content = json.loads(Path("site_a.json").read_text())
    edges, counts = content.pop("edges"), content.pop("counts")
    assert content == {
        "kind": "score histogram",
        "version": 1,
        "score": "ira",
        "rows": 200,
        "least": 10,
        "max_ifd": None,
        "weights": "1234",
    }
    grid = np.linspace(-2, 8, 401)
    assert set(edges) <= set(grid.tolist())
    assert (edges[0], edges[-1]) == (-2.0, 8.0)
    values = sites["a"]["ira"].dropna()
    assert counts == np.histogram(values, edges)[0].tolist()
    assert sum(counts) == len(values) == 180
    assert all(count == 0 or count >= 10 for count in counts)


def test_sites_keep_the_agreed_share_of_all_their_rows(sites, capsys):
    assert main(["threshold", "site_a.json", "site_b.json", "--keep", "0.2", "--output", "threshold.json"]) == 0
    said = capsys.readouterr().out
    found = read_threshold(Path("threshold.json"))
    assert (found.budget, found.rows, found.keep, found.score, found.weights) == (64, 320, 0.2, "ira", "1234")
    assert f"ira >= {found.value:.6g} keeps about 64 rows of 320 rows at 2 sites" in said
    exact = np.sort(pd.concat([frame["ira"] for frame in sites.values()]).dropna())[-64]
    assert found.between[0] <= exact < found.between[1]
    assert found.between[0] <= found.value < found.between[1]
    kept = 0
    for site, frame in zip(found.sites, sites.values(), strict=True):
        name = site.name[len("site_")]
        words = ["select", f"{name}.jsonl", "--threshold", "threshold.json", "--no-card"]
        assert main([*words, "--output", f"kept_{name}.jsonl"]) == 0
        ids = [row["id"] for row in load_rows(f"kept_{name}.jsonl")]
        high = frame[frame["ira"] >= found.value].sort_values("ira", ascending=False, kind="stable")
        assert sorted(ids) == sorted(high["id"])
        assert site.fewest <= len(ids) <= site.most
        kept += len(ids)
    low, high = (sum(getattr(site, end) for site in found.sites) for end in ("fewest", "most"))
    assert low <= kept <= high
    assert low <= 64 <= high
    assert len(load_rows("kept_a.jsonl")) > len(load_rows("kept_b.jsonl"))  # and not the same share of both


def test_reasons_and_drops_beside_a_threshold(sites):
    frame = sites["a"].assign(output=lambda rows: [f"Answer {i}." for i in range(len(rows))])
    best = frame["ira"].idxmax()
    frame.loc[best, "output"] = "I'm sorry, but I cannot answer that."
    write_rows(Dataset.from_pandas(frame), Path("c.jsonl"))
    words = ["select", "c.jsonl", "--threshold", "1.2", "--score", "ira", "--drop-refusals", "--all", "--no-card"]
    assert main([*words, "--output", "out.jsonl"]) == 0
    rows = load_rows("out.jsonl").to_pandas()
    expected = np.where(frame["ira"].isna(), "too_short", np.where(frame["ira"] >= 1.2, "kept", "below_cut"))
    expected[best] = "refusal"
    assert rows["ifd_reason"].tolist() == expected.tolist()


def test_a_threshold_of_ifd_goes_with_its_limit(sites):
    frame = sites["a"]
    for limit, words in ((1.0, []), (np.inf, ["--max-ifd", "inf"])):
        assert main(["histogram", "a.jsonl", "--score", "ifd", *words, "--output", "ifd.json"]) == 0
        assert sum(read_histogram(Path("ifd.json")).counts) == (frame["ifd"] < limit).sum()
        assert main(["threshold", "ifd.json", "--keep", "50", "--output", "t.json"]) == 0
        assert main(["select", "a.jsonl", "--threshold", "t.json", "--no-card", "--output", "k.jsonl"]) == 0
        kept = frame[(frame["ifd"] < limit) & (frame["ifd"] >= threshold_of("t.json").value)]
        assert sorted(row["id"] for row in load_rows("k.jsonl")) == sorted(kept["id"])


def test_scores_of_another_model_are_warned_of(sites, capsys):
    assert main(["threshold", "site_a.json", "--keep", "20", "--output", "t.json"]) == 0
    write_provenance("b.jsonl", Provenance("paper", "org/other", weights="5678"), sites["b"])
    assert main(["select", "b.jsonl", "--threshold", "t.json", "--no-card", "--output", "k.jsonl"]) == 0
    assert "agreed on for scores by the weights 1234, and those of b.jsonl were made by 5678" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["histogram", "a.jsonl", "--output", "x.csv"], "Name a file that ends in .json"),
        (["histogram", "a.jsonl", "--score", "reward", "--output", "x.json"], "--edges LOW HIGH BINS"),
        (["histogram", "a.jsonl", "--edges", "1", "0", "9", "--output", "x.json"], "got 1 0 9"),
        (["histogram", "a.jsonl", "--edges", "0", "1", "0.5", "--output", "x.json"], "got 0 1 0.5"),
        (["histogram", "a.jsonl", "--least", "181", "--output", "x.json"], "180 rows have a score, and bins of at"),
        (["histogram", "none.jsonl", "--output", "x.json"], "none.jsonl"),
        (["threshold", "site_a.json", "--keep", "181", "--output", "x.json"], "at least 1 and at most 180"),
        (["threshold", "site_a.json", "--keep", "many", "--output", "x.json"], "'many' is not a number"),
        (["threshold", "site_a.json", "--keep", "1.5", "--output", "x.json"], "keep must be a fraction in (0, 1]"),
        (["threshold", "site_a.json", "site_a.json", "--keep", "9", "--output", "x.json"], "A file is named twice"),
        (["threshold", "none.json", "--keep", "9", "--output", "x.json"], "none.json cannot be read"),
        (["threshold", "a.jsonl", "--keep", "9", "--output", "x.json"], "a.jsonl is no JSON"),
        (["threshold", "site_a.json", "--keep", "9", "--output", "site_a.json"], "a histogram that this command reads"),
        (["select", "a.jsonl", "--threshold", "site_a.json", "--output", "x.jsonl"], "is no score threshold, which"),
        (
            ["select", "a.jsonl", "--threshold", "none.json", "--output", "x.jsonl"],
            "'none.json' is no number, and there is no such file",
        ),
        (["select", "a.jsonl", "--threshold", "nan", "--output", "x.jsonl"], "threshold wants a number"),
        (
            ["select", "a.jsonl", "--threshold", "1", "--keep", "9", "--output", "x.jsonl"],
            "--threshold says how many rows are kept, and so does --keep",
        ),
        (
            ["select", "a.jsonl", "--threshold", "9", "--score", "ira", "--output", "x.jsonl"],
            "No row that may be kept has a score at or above 9",
        ),
    ],
)
def test_what_is_wrong_is_told_in_one_line(sites, capsys, words, said):
    assert said in told(capsys, *words)


def test_a_threshold_of_one_score_ranks_by_no_other(sites, capsys):
    assert main(["threshold", "site_a.json", "--keep", "20", "--output", "t.json"]) == 0
    words = ["select", "a.jsonl", "--threshold", "t.json", "--output", "x.jsonl"]
    assert "is one of ira, and --score ifd ranks by another" in told(capsys, *words, "--score", "ifd")
    assert main([*words, "--score", "ira"]) == 0  # with a card
    assert "| kept | " in Path("x.md").read_text()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"counts": [3]}, "holds no histogram: counts are"),
        ({"rows": 5}, "holds no histogram: The bins hold 180 rows, and there are 5"),
        ({"names": ["Ann"]}, "holds no histogram"),
        ({"counts": None}, "holds no histogram"),
        ({"version": 2}, "has version 2, and this program reads version 1"),
        ({"kind": "rows"}, "is no score histogram"),
    ],
)
def test_a_file_that_was_changed_is_told(sites, change, said):
    content = json.loads(Path("site_a.json").read_text())
    Path("changed.json").write_text(json.dumps(content | change))
    with pytest.raises(UserError, match=said):
        read_histogram(Path("changed.json"))


def test_a_threshold_that_was_changed_is_told(sites):
    assert main(["threshold", "site_a.json", "--keep", "20", "--output", "t.json"]) == 0
    content = json.loads(Path("t.json").read_text())
    for change in ({"value": None}, {"value": "high"}, {"between": 3}, {"sites": [{"row": 1}]}, {"more": 1}):
        Path("changed.json").write_text(json.dumps(content | change))
        with pytest.raises(UserError, match=r"changed\.json holds no threshold"):
            read_threshold(Path("changed.json"))
