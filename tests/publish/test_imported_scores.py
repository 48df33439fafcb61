"""Scores of other programs: files built as those programs build them, values worked out apart from the reader."""

from __future__ import annotations

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ifd_trainer.data.definitions import SCORE_KINDS
from ifd_trainer.publish.imported_scores import answer_length, read_scores

NAN = float("nan")
# Losses of all tokens of a text, of which the last ones are the answer's; the answers' means are 1.0, 2.0 and 3.0, 2.0.
DIRECT = [[9.0, 8.0, 1.5, 2.5], [7.0, 9.0, 2.0]]
CONDITIONED = [[5.0, 6.0, 7.0, 0.5, 1.5], [4.0, 4.5, 3.0]]


def cherry_rows() -> list[dict]:
    rows = []
    for direct, conditioned, n in zip(DIRECT, CONDITIONED, (2, 1), strict=True):
        means = [torch.tensor(losses[-n:]).mean() for losses in (direct, conditioned)]
        rows.append({"ppl": [0, means[0].exp(), means[1].exp()], "token_loss": [[], direct, conditioned]})
    # Nothing of an empty answer is scored; the mean over nothing is NaN.
    rows.append({"ppl": [0, torch.tensor(NAN), torch.tensor(NAN)], "token_loss": [[], [9.0, 8.0], [5.0, 6.0, 7.0]]})
    return rows


def superfiltering_rows() -> list[dict]:
    def record(das: float, cas: float) -> dict:
        return {"ppl": [0, math.exp(das), 0, math.exp(cas)], "loss": [0, das, 0, cas]}

    zeros = {"ppl": [0, 0, 0, 0], "loss": [0, 0, 0, 0]}
    half = {"ppl": [0, math.exp(2.0), 0, 0], "loss": [0, 2.0, 0, 0]}
    return [record(2.0, 1.0), {}, zeros, half, record(NAN, 1.5), record(NAN, NAN), record(2.0, 3.0)]


def write_lines(path, records) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def test_cherry_llm(tmp_path):
    torch.save(cherry_rows(), tmp_path / "scores.pt")
    found = read_scores(tmp_path / "scores.pt", 3, answers=["a b", "c", ""])
    assert found.kind == "cherry"
    columns = found.columns
    np.testing.assert_allclose(columns["cas"], [1.0, 3.0, NAN], rtol=1e-6)
    np.testing.assert_allclose(columns["das"], [2.0, 2.0, NAN], rtol=1e-6)
    np.testing.assert_allclose(columns["ifd"], [0.5, 1.5, NAN], rtol=1e-6)
    np.testing.assert_allclose(columns["ifd_ppl"], [math.exp(-1), math.exp(1), NAN], rtol=1e-6)
    assert columns["answer_tokens"].tolist() == [2, 1, 0]
    assert columns["ifd_status"].tolist() == ["ok", "ok", "empty_answer"]


def test_cherry_llm_values_of_its_own_program(tmp_path, shared):
    """The published program's losses for 100 real rows, in the file that it would have saved."""
    path = shared / "reference" / "smollm2_135m_alpaca_cherry_first100.jsonl"
    expected = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rng = np.random.default_rng(0)

    def losses(mean: float, tokens: int, before: int) -> list[float]:
        answer = rng.uniform(0.1, 4.0, tokens)
        return [*rng.uniform(0.1, 8.0, before), *(answer * mean / answer.mean())]

    rows = []
    for row in (line["cherry"] for line in expected):
        lists = [
            losses(row["loss_alone"], row["n_alone"], 3),
            losses(row["loss_cond"], row["n_cond"], row["prompt_len"] - 1),
        ]
        ppl = [torch.tensor(row[name], dtype=torch.float32).exp() for name in ("loss_alone", "loss_cond")]
        rows.append({"ppl": [0, *ppl], "token_loss": [[], *([float(x) for x in values] for values in lists)]})
    torch.save(rows, tmp_path / "scores.pt")
    columns = read_scores(tmp_path / "scores.pt", len(rows)).columns
    np.testing.assert_allclose(columns["ifd"], [line["cherry"]["ifd"] for line in expected], rtol=1e-6)
    known = columns["answer_tokens"].notna()
    assert known.mean() > 0.9  # where two lengths have the same mean, none is told
    tokens = [line["cherry"]["n_cond"] for line in expected]
    assert columns["answer_tokens"][known].tolist() == [n for n, told in zip(tokens, known, strict=True) if told]


def test_rows_with_ifd_score(tmp_path):
    write_lines(tmp_path / "a.jsonl", [{"instruction": "x", "ifd_score": 0.7}, {"instruction": "y", "ifd_score": NAN}])
    found = read_scores(tmp_path / "a.jsonl", 2)
    assert found.kind == "cherry"
    assert found.columns["ifd"].tolist()[0] == 0.7
    assert found.columns[["cas", "das", "ifd_ppl"]].isna().all(axis=None)
    assert found.columns["ifd_status"].tolist() == ["ok", "nonfinite"]


def test_superfiltering(tmp_path):
    write_lines(tmp_path / "scores.jsonl", superfiltering_rows())
    found = read_scores(tmp_path / "scores.jsonl", 7)
    assert found.kind == "superfiltering"
    columns = found.columns
    statuses = ["ok", "empty_answer", "failed", "failed", "too_short", "nonfinite", "ok"]
    assert columns["ifd_status"].tolist() == statuses
    nothing = [status != "ok" for status in statuses]
    for name in ("cas", "das", "ifd", "ifd_ppl"):
        assert columns[name].isna().tolist() == nothing
    np.testing.assert_allclose(columns["ifd_ppl"].dropna(), [math.exp(-1), math.exp(1)])
    np.testing.assert_allclose(columns["ifd"].dropna(), [0.5, 1.5])


def test_rows_of_superfiltering(tmp_path):
    rows = [
        {"output": "x", "ppl_A_direct": 8.0, "ppl_A_condition": 4.0, "ifd_ppl": 0.5},
        {"output": "", "ppl_A_direct": NAN, "ppl_A_condition": NAN, "ifd_ppl": NAN},
        {"output": "y", "ppl_A_direct": 0, "ppl_A_condition": 0, "ifd_ppl": 0},
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows), encoding="utf-8")
    found = read_scores(tmp_path / "a.json", 3, answers=["x", "", "y"])
    assert found.kind == "superfiltering"
    np.testing.assert_allclose(found.columns["ifd_ppl"], [0.5, NAN, NAN])
    np.testing.assert_allclose(found.columns["ifd"], [math.log(4) / math.log(8), NAN, NAN])
    assert found.columns["ifd_status"].tolist() == ["ok", "empty_answer", "failed"]


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".parquet"])
def test_data_juicer(tmp_path, ending):
    rows = [{"text": "a", "__dj__stats__": {"ifd_score": 0.25, "text_len": 1}}]
    rows.append({"text": "b", "__dj__stats__": {"ifd_score": None, "text_len": 0}})
    path = tmp_path / f"a{ending}"
    if ending == ".parquet":
        pd.DataFrame(rows).to_parquet(path)
    else:
        write_lines(path, rows)  # its .json holds lines too
    found = read_scores(path, 2)
    assert found.kind == "data-juicer"
    assert found.columns["ifd"].tolist()[0] == 0.25
    assert found.columns["ifd_status"].tolist() == ["ok", "nonfinite"]


def test_own_scores(tmp_path):
    row = {"cas": 1.0, "das": 2.0, "ifd": 0.5, "ifd_ppl": 0.4, "answer_tokens": 3, "ifd_status": "ok", "eot_loss": 1.5}
    empty = dict.fromkeys(row) | {"answer_tokens": 0, "ifd_status": "empty_answer"}
    write_lines(tmp_path / "a.jsonl", [row, empty])
    found = read_scores(tmp_path / "a.jsonl", 2)
    assert found.kind == "ifd-trainer"
    assert found.columns.iloc[0].to_dict() == row
    assert found.columns["ifd"].isna().tolist() == [False, True]


def test_the_number_of_rows_must_be_the_same(tmp_path):
    write_lines(tmp_path / "a.jsonl", superfiltering_rows())
    with pytest.raises(ValueError, match=r"scores for 7 rows, the data has 8\. .*matched by position"):
        read_scores(tmp_path / "a.jsonl", 8)


def test_code_in_a_file_is_never_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").touch, ())

    torch.save([{"ppl": [0, 1.0, 1.0], "token_loss": Bomb()}], tmp_path / "a.pt")
    with pytest.raises(ValueError, match="would run code from the file, which is never done"):
        read_scores(tmp_path / "a.pt", 1)
    assert not (tmp_path / "ran").exists()
    (tmp_path / "b.pt").write_bytes(b"no torch file")
    with pytest.raises(ValueError, match="cannot be read"):
        read_scores(tmp_path / "b.pt", 1)


def test_the_file_of_the_first_step_is_told_apart(tmp_path):
    torch.save([{"ppl": [torch.tensor(3.0), 0, 0], "sent_emb": [torch.zeros(1, 4), 0, 0]}], tmp_path / "a.pt")
    with pytest.raises(ValueError, match="file of `--mod pre`, with no score of an answer"):
        read_scores(tmp_path / "a.pt", 1)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", '{"text": "x"}\n', r"no scores of a known kind, only \['text'\]"),
        ("a.jsonl", '{"ppl": [0, 1.5], "loss": [0, 1.5]}\n', r"row 0, is not what superfiltering writes"),
        ("a.json", '{"ppl": 1, "loss": 2}', "not what superfiltering writes"),
        ("a.txt", "1\n2\n", "Cannot read scores from"),
    ],
)
def test_other_files_are_refused(tmp_path, name, content, words):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=words):
        read_scores(tmp_path / name, 1)


def test_a_kind_can_be_told(tmp_path):
    write_lines(tmp_path / "a.jsonl", [{"ifd_score": 0.5}])
    assert read_scores(tmp_path / "a.jsonl", 1, kind="data-juicer").kind == "data-juicer"
    with pytest.raises(ValueError, match="not what superfiltering writes: found the keys"):
        read_scores(tmp_path / "a.jsonl", 1, kind="superfiltering")
    with pytest.raises(ValueError, match=f"choose one of {', '.join(SCORE_KINDS)}"):
        read_scores(tmp_path / "a.jsonl", 1, kind="other")
    with pytest.raises(FileNotFoundError):
        read_scores(tmp_path / "b.jsonl", 1)


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=40), st.data())
def test_the_answer_is_told_from_its_mean_or_not_at_all(losses, data):
    n = data.draw(st.integers(1, len(losses)))
    mean = float(np.float32(np.mean(losses[-n:])))
    near = [m for m in range(1, len(losses) + 1) if abs(np.mean(losses[-m:]) - mean) < 2e-5 * max(1, mean)]
    found = answer_length(losses, mean)
    assert found == n or (found is None and len(near) > 1)


def test_no_length_without_losses():
    assert answer_length([], 1.0) is None
    assert answer_length([1.0], NAN) is None
    assert answer_length([1.0], 2.0) is None
