"""S-IFD on the command line: token losses from `score`, what `select` makes of them, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import ROUNDING
from datasets import Dataset

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
