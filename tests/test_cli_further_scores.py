"""Further scores on the command line: attached by `score`, ranked by in `select`, shown by `report`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import ROUNDING
from datasets import Dataset

from ifd_trainer.cli import main
from ifd_trainer.data.files import load_rows
from ifd_trainer.method.columns import IFD_COLUMNS
from ifd_trainer.method.further_scores import FURTHER, OF_A_RUN
from ifd_trainer.scoring.transform import IFDScorer

ROWS = [
    {"id": n, "instruction": f"Name {n} things.", "input": "", "output": f"The {n} is {n * 7}."} for n in range(1, 12)
]
ROWS[3]["output"] = ""
ASKED = ["ira", "prompt_ppl", "rifd", "rcas", "rdas"]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    from conftest import build_model, build_tokenizer

    folder, tokenizer = tmp_path_factory.mktemp("model"), build_tokenizer()
    build_model(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return path


def score(data: Path, output: Path, model: str, *more: str) -> int:
    return main(["score", str(data), "--model", model, "--output", str(output), "--device", "cpu", *more])


def read(path: Path) -> pd.DataFrame:
    return load_rows(str(path)).to_pandas()


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".parquet"])
def test_score_attaches_the_columns_that_were_asked_for(
    tmp_path: Path, data: Path, model_path: str, ending: str
) -> None:
    output = tmp_path / f"out{ending}"
    assert score(data, output, model_path, "--scores", "rifd", "ira,prompt_ppl", "ifd", "--part-rows", "4") == 0
    found = read(output)
    assert list(found.columns) == [*ROWS[0], *IFD_COLUMNS, *ASKED]
    scorer = IFDScorer(model_path, device="cpu", scores=ASKED)
    expected = Dataset.from_list(ROWS).map(scorer, batched=True).to_pandas()
    for name in ASKED:
        np.testing.assert_allclose(found[name], expected[name], rtol=20 * ROUNDING, atol=1e-5)
    assert found.loc[3, ASKED].isna().all()


def test_another_request_gives_another_reversed_ifd(tmp_path: Path, data: Path, model_path: str) -> None:
    assert score(data, tmp_path / "usual.parquet", model_path, "--scores", "rifd") == 0
    asked = "Which question has this answer?\\n{answer}"
    assert score(data, tmp_path / "other.parquet", model_path, "--scores", "rifd", "--guess", asked) == 0
    scorer = IFDScorer(model_path, device="cpu", scores="rifd", guess=asked.replace("\\n", "\n"))
    expected = Dataset.from_list(ROWS).map(scorer, batched=True).to_pandas()
    usual, other = read(tmp_path / "usual.parquet"), read(tmp_path / "other.parquet")
    np.testing.assert_allclose(other["rcas"], expected["rcas"], rtol=ROUNDING)
    assert not np.allclose(other["rcas"], usual["rcas"], rtol=ROUNDING, equal_nan=True)
    np.testing.assert_allclose(other["rdas"], usual["rdas"], rtol=ROUNDING)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--scores", "rfid"], "'rfid' is no score, did you mean 'rifd'? Known are ira, "),
        (["--scores", "loss_change"], "loss_change compares the scorings of a run"),
        (["--scores", "rifd", "--guess", "What was it?"], "with {answer} where the answer stands"),
        (["--guess", "What has {answer}?"], "guess is the request of the score rifd"),
    ],
)
def test_what_cannot_be_scored_is_one_line_and_writes_nothing(
    tmp_path: Path, data: Path, model_path: str, capsys: pytest.CaptureFixture, options: list[str], words: str
) -> None:
    assert score(data, tmp_path / "out.parquet", model_path, *options) == 2
    assert words in capsys.readouterr().err.strip().splitlines()[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl"]


def test_a_job_with_other_scores_is_another_job(
    tmp_path: Path, data: Path, model_path: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    output, of_batch, scored = tmp_path / "out.parquet", IFDScorer.score, []

    def interrupt(self: IFDScorer, pairs: list, *more: object) -> object:
        if scored:
            raise KeyboardInterrupt
        scored.append(len(pairs))
        return of_batch(self, pairs, *more)

    with monkeypatch.context() as patch:
        patch.setattr(IFDScorer, "score", interrupt)
        assert score(data, output, model_path, "--part-rows", "3", "--scores", "ira") == 130
    assert score(data, output, model_path, "--part-rows", "3", "--scores", "ira", "prompt_ppl") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "holds parts of another job: scores: ira there, ira prompt_ppl now. " in error
    assert score(data, output, model_path, "--part-rows", "3") == 2
    assert "scores: ira there, not set now" in capsys.readouterr().err
    assert score(data, output, model_path, "--part-rows", "3", "--scores", "ira") == 0
    assert read(output)["ira"].isna().tolist() == [not row["output"] for row in ROWS]


def test_scored_again_only_the_columns_of_the_new_scoring_are_there(
    tmp_path: Path, data: Path, model_path: str
) -> None:
    first, again = tmp_path / "first.parquet", tmp_path / "again.parquet"
    assert score(data, first, model_path, "--scores", "ira", "answer_ppl") == 0
    assert score(first, again, model_path, "--scores", "answer_ppl") == 0
    assert list(read(again).columns) == [*ROWS[0], *IFD_COLUMNS, "answer_ppl"]


def test_select_ranks_by_a_further_score_and_by_the_lowest(
    tmp_path: Path, data: Path, model_path: str, capsys: pytest.CaptureFixture
) -> None:
    scored = tmp_path / "scored.parquet"
    assert score(data, scored, model_path, "--scores", "ira", "rifd") == 0
    rows = read(scored)
    for option, ascending in (("ira", False), ("rifd:-1", True)):
        output, name = tmp_path / f"{option[:4]}.jsonl", option.split(":")[0]
        assert main(["select", str(scored), "--score", option, "--keep", "3", "--output", str(output)]) == 0
        expected = rows.sort_values(name, ascending=ascending)["id"].head(3)
        found = read(output).sort_values("ifd_rank")
        assert found["id"].tolist() == expected.tolist()
        card = output.with_suffix(".md").read_text(encoding="utf-8")
        assert f"`{name}`" in card
        assert FURTHER[name].meaning.split(",")[0] in card
        assert f"rows with the {'lowest' if ascending else 'highest'} `{name}`" in card
        cut = rows.sort_values(name, ascending=ascending)[name].iloc[2]
        assert f"{name} {'<=' if ascending else '>='} {cut:.4f}" in capsys.readouterr().out


def test_the_help_names_every_further_score_with_its_meaning(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["score", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for name, further in FURTHER.items():
        assert (f"{name}: {further.meaning}" in shown) == (name not in OF_A_RUN)


def test_a_report_shows_them_in_its_tables_and_plots(tmp_path: Path, data: Path, model_path: str) -> None:
    scored = tmp_path / "scored.parquet"
    assert score(data, scored, model_path, "--scores", "ira", "rifd") == 0
    assert main(["report", str(scored), "--output", str(tmp_path / "report")]) == 0
    page = (tmp_path / "report/report.html").read_text(encoding="utf-8")
    assert (tmp_path / "report/report_files/further_scores.png").is_file()
    rows = read(scored)
    best = rows[rows["ifd"] < 1].sort_values("ifd").iloc[-1] if (rows["ifd"] < 1).any() else rows.iloc[0]
    for name in ("ira", "rifd", "rcas", "rdas"):
        assert FURTHER[name].meaning in page  # below the plot
        assert f"{rows[name].median():.3f}" in page  # in the table of quantiles
    for name in ("ira", "rifd"):
        assert f"{best[name]:.3f}" in page  # in a table of rows
