"""S-IFD on the command line: token losses from `score`, what `select` makes of them, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import ROUNDING, build_model
from datasets import Dataset
from transformers import AutoTokenizer

from ifd_trainer import IFDScorer, attach_selective_ifd
from ifd_trainer.cli import main
from ifd_trainer.data.files import load_rows
from ifd_trainer.method.columns import IFD_COLUMNS, TOKEN_COLUMNS
from ifd_trainer.scoring.job_parts import Parts

ROWS = [
    {"instruction": f"Name {n} things.", "input": "" if n % 2 else f"about {n} cats", "output": f"The {n} is {n * 7}."}
    for n in range(1, 12)
]
ROWS[3]["output"] = ""


@pytest.fixture
def model_path(tmp_path, model, tokenizer) -> str:
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def data(tmp_path) -> str:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return str(tmp_path / "rows.jsonl")


def score(data: str, output: Path, model: str, *more: str) -> int:
    return main(["score", data, "--model", model, "--output", str(output), "--device", "cpu", *more])


def select(scored: Path, output: Path, *more: str) -> pd.DataFrame:
    assert main(["select", str(scored), "--output", str(output), *more]) == 0
    return load_rows(str(output)).to_pandas()


def numbers(rows: Dataset, name: str) -> np.ndarray:
    return np.array(rows[name][:], dtype=float)


@pytest.mark.parametrize("ending", [".parquet", ".jsonl"])
def test_token_losses_are_written_and_rows_are_chosen_by_sifd(tmp_path, data, model_path, ending):
    output = tmp_path / f"scored{ending}"
    assert score(data, output, model_path, "--token_losses", "--part-rows", "4") == 0
    scored = load_rows(str(output))
    assert scored.column_names == ["instruction", "input", "output", *IFD_COLUMNS, *TOKEN_COLUMNS]
    expected = Dataset.from_list(ROWS).map(IFDScorer(model_path, device="cpu", token_losses=True), batched=True)
    for found, wanted in zip(scored, expected, strict=True):
        for name in TOKEN_COLUMNS:
            assert (found[name] is None) == (wanted[name] is None) == (found["ifd_status"] != "ok")
            np.testing.assert_allclose(found[name] or [], wanted[name] or [], rtol=ROUNDING, atol=1e-5)
    options = ["--score", "sifd", "--keep", "3", "--max-ifd", "inf", "--all"]
    for share in ("0.5", "0.2"):
        chosen = select(output, tmp_path / f"kept{ending}", *options, "--token_share", share)
        sifd = np.array(attach_selective_ifd(scored, float(share))["sifd"][:], dtype=float)
        np.testing.assert_array_equal(chosen["sifd"].to_numpy(dtype=float), sifd)
        best = np.argsort(-np.nan_to_num(sifd, nan=-1), kind="stable")[:3]
        assert np.flatnonzero(chosen["ifd_reason"] == "kept").tolist() == sorted(best)
        assert chosen["ifd_rank"][best].tolist() == [1, 2, 3]
        # A row of whose tokens none is in the share has a score and no S-IFD.
        none = np.isnan(sifd) & (chosen["ifd_status"] == "ok").to_numpy()
        assert set(chosen["ifd_reason"][none]) <= {"no_value"}
    assert none.any()
    # The share 0.5 is the default, and a column that is there is ranked by as it is, but for a share that is asked for.
    default = select(output, tmp_path / f"default{ending}", *options)
    half = np.array(attach_selective_ifd(scored)["sifd"][:], dtype=float)
    np.testing.assert_array_equal(default["sifd"].to_numpy(dtype=float), half)
    again = select(tmp_path / f"kept{ending}", tmp_path / f"again{ending}", *options)
    np.testing.assert_array_equal(again["sifd"].to_numpy(dtype=float), sifd)
    other = select(tmp_path / f"kept{ending}", tmp_path / f"other{ending}", *options, "--token-share", "0.5")
    np.testing.assert_array_equal(other["sifd"].to_numpy(dtype=float), half)
    assert list(other.columns).count("sifd") == 1


def test_the_limit_of_ifd_holds_where_sifd_is_ranked_by(tmp_path, data, model_path):
    output = tmp_path / "scored.parquet"
    assert score(data, output, model_path, "--token-losses") == 0
    chosen = select(output, tmp_path / "kept.parquet", "--score", "sifd", "--keep", "1", "--all")
    high = chosen["ifd"] >= 1
    assert high.any()
    assert not high.all()
    assert set(chosen["ifd_reason"][high]) == {"above_limit"}


def test_parts_without_tokens_are_not_taken_over_by_a_job_with_them(tmp_path, data, model_path, monkeypatch, capsys):
    output, saved, save = tmp_path / "out.parquet", [], Parts.save

    def interrupted(self, part, columns):
        if saved:
            raise KeyboardInterrupt
        saved.append(sorted(columns))
        save(self, part, columns)

    with monkeypatch.context() as patch:
        patch.setattr(Parts, "save", interrupted)
        assert score(data, output, model_path, "--part-rows", "4", "--token-losses") == 130
    assert saved == [sorted((*IFD_COLUMNS, *TOKEN_COLUMNS))]
    assert score(data, output, model_path, "--part-rows", "4") == 2
    assert "holds parts of another job: token_losses: True there, not set now" in capsys.readouterr().err
    assert score(data, output, model_path, "--part-rows", "4", "--token-losses") == 0
    assert load_rows(str(output))["cas_tokens"][3] is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--token-share", "0.5"], "--token-share goes with --score sifd"),
        (
            ["--score", "sifd", "--token-share", "50"],
            "--token-share is a share of all tokens, above 0 and at most 1, g",
        ),
        (["--score", "sifd"], "The rows have no cas_tokens and no das_tokens"),
    ],
)
def test_what_select_cannot_make_sifd_of_is_said(tmp_path, data, model_path, options, words, capsys):
    output = tmp_path / "scored.parquet"
    assert score(data, output, model_path) == 0
    assert main(["select", str(output), "--output", str(tmp_path / "kept.jsonl"), *options]) == 2
    assert words in capsys.readouterr().err


def test_token_losses_of_another_definition_are_refused_before_anything_is_loaded(tmp_path, data, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    options = ["--definition", "cherry", "--token-losses"]
    assert score(data, tmp_path / "out.parquet", str(tmp_path / "empty"), *options) == 2
    assert "token_losses go with definition='paper'" in capsys.readouterr().err


# ---- S-IFD and its neighbourhood ------------------------------------------------------------------------------------


def test_sifd_and_its_neighbours_are_those_of_the_library(tmp_path, data, model_path, monkeypatch, capsys):
    scored, steady = tmp_path / "scored.parquet", tmp_path / "steady.parquet"
    assert score(data, scored, model_path, "--sifd", "0.4", "--scores", "ira") == 0
    rows = load_rows(str(scored))
    np.testing.assert_array_equal(numbers(rows, "sifd"), numbers(attach_selective_ifd(rows, 0.4), "sifd"))
    command = [str(scored), steady, model_path, "--sifd", "0.4", "--neighbours", "2", "--part-rows", "4"]

    saved, save = [], Parts.save

    def interrupted(self, part, columns):
        save(self, part, columns)
        saved.append(part)
        if len(saved) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Parts, "save", interrupted)
    assert score(*command) == 130
    assert score(*command[:-1], "3") == 2  # another job
    assert "part_rows: 4 there, 3 now" in capsys.readouterr().err
    assert score(*command, "--noise-seed", "1") == 2
    assert "sifd_seed: 0 there, 1 now" in capsys.readouterr().err
    assert score(*command) == 0
    assert sorted(saved) == [0, 1, 2]  # of 11 rows, none twice

    found = load_rows(str(steady))
    scorer = IFDScorer(model_path, device="cpu", token_losses=True)
    expected = scorer.neighbourhood(rows, share=0.4, neighbours=2)
    for name in ("sifd", "sifd_mean", "sifd_std"):
        np.testing.assert_allclose(numbers(found, name), numbers(expected, name), rtol=1e-3, atol=1e-6)
    assert np.isfinite(numbers(found, "sifd_std")).any()
    assert found.remove_columns(["sifd", "sifd_mean", "sifd_std"]).to_dict() == rows.remove_columns("sifd").to_dict()
    records = [yaml.safe_load(Path(f"{path}.ifd.yaml").read_text(encoding="utf-8")) for path in (scored, steady)]
    assert [record.pop("sifd") for record in records] == [
        {"share": 0.4},
        {"share": 0.4, "neighbours": 2, "alpha": 5.0, "seed": 0},
    ]
    assert all(record.pop("checksum") for record in records)
    assert records[0] == records[1]  # the scores are those of before, and so is what is known of them
    assert not list(tmp_path.glob("*.parts"))


def test_neighbours_are_of_the_model_that_scored(tmp_path, data, model_path, capsys):
    scored = tmp_path / "scored.parquet"
    assert score(data, scored, model_path, "--sifd") == 0
    other = build_model(400, seed=1)
    other.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(model_path).save_pretrained(tmp_path / "other")
    assert score(str(scored), tmp_path / "out.parquet", str(tmp_path / "other"), "--neighbours", "1") == 2
    assert "were scored by" in capsys.readouterr().err
    assert not (tmp_path / "out.parquet").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--neighbours", "2"], "The rows have no cas_tokens and no das_tokens"),
        (["--neighbours", "2", "--token-losses"], "--neighbours leaves the scores of rows as they are, and --token-lo"),
        (["--neighbours", "2", "--known", "3"], "and --known is for scoring them: score them first, with --sifd"),
        (["--neighbours", "2", "--definition", "cherry"], "token_losses go with definition='paper'"),
        (["--noise", "2"], "--noise goes with --neighbours N"),
        (["--neighbours", "2", "--noise", "-1"], "wants a number of at least 0, got '-1'"),
        (["--sifd", "2"], "wants a number above 0 and at most 1, got '2'"),
        (["--sifd", "--turns", "min"], "By turns='min' it is of no such mean"),
    ],
)
def test_what_neighbours_do_not_go_with_is_said(tmp_path, data, model_path, options, words, capsys):
    assert score(data, tmp_path / "out.parquet", model_path, *options) == 2
    assert words in capsys.readouterr().err
