"""The model's own answers beside the rows': answers and losses by hand, rows without a gap, the cache, long jobs."""

from __future__ import annotations

import math
import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from conftest import ROUNDING, build_model, reference_nll
from datasets import Dataset
from datasets.fingerprint import Hasher
from tiny_runs import random_states

import ifd_trainer
from ifd_trainer import Cherry, MatchedGate, OwnAnswerScorer, gate_rows
from ifd_trainer.cli import main
from ifd_trainer.data.formats import ALPACA
from ifd_trainer.errors import UserError
from ifd_trainer.method.columns import IFD_COLUMNS, SPIN_COLUMNS
from ifd_trainer.publish.provenance import read_provenance
from ifd_trainer.scoring.generation import draws
from ifd_trainer.scoring.transform import IFDScorer

NEW = 10
GOOD = {
    "instruction": ["Name three colours.", "Add the numbers.", "Who sat on the mat?", "What ran in the park?"],
    "input": ["", "12 and 30", "", ""],
    "output": ["Red, green and blue.", "The sum is 42.", "The cat.", "the dog"],
}
ROWS = [dict(zip(GOOD, values, strict=True)) for values in zip(*GOOD.values(), strict=True)]
ARROW = dict.fromkeys(SPIN_COLUMNS[:3], pa.float64()) | dict.fromkeys(SPIN_COLUMNS[3:], pa.string())


def letters(one: str, other: str) -> float:
    """An agreement of random texts that is seldom 0 or 1."""
    both = set(one) | set(other)
    return len(set(one) & set(other)) / len(both) if both else 1.0


def said_by_hand(model, tokenizer, prompt: str, sample: int | None) -> str:
    """One answer, one token at a time: the likeliest, or those that the sample's numbers choose."""
    ids = tokenizer(prompt).input_ids
    numbers = None if sample is None else draws(ids, sample, NEW)
    said: list[int] = []
    with torch.no_grad():
        while len(said) < NEW:
            logits = model(torch.tensor([[*ids, *said]]), use_cache=False).logits[0, -1].double()
            summed = torch.softmax(logits, -1).cumsum(-1)
            token = int(logits.argmax() if sample is None else (summed <= numbers[len(said)] * summed[-1]).sum())
            if token == tokenizer.eos_token_id:
                break
            said.append(token)
    return tokenizer.decode(said, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def loss_by_hand(model, tokenizer, prompt: str, answer: str) -> float:
    before, whole = tokenizer(prompt).input_ids, tokenizer(prompt + answer).input_ids
    start = next(i for i in range(len(whole)) if i >= len(before) or whole[i] != before[i])
    return reference_nll(model, whole, start)


@pytest.mark.parametrize("samples", [None, 3])
def test_the_columns_are_those_of_answers_and_losses_by_hand(model, tokenizer, samples):
    scorer = OwnAnswerScorer(model, tokenizer, samples=samples, max_new_tokens=NEW, agreement=letters)
    found = Dataset.from_dict(GOOD).map(scorer, batched=True)
    for row, values in zip(ROWS, found, strict=True):
        prompt = ALPACA.render(row, tokenizer).prompt
        answers = [said_by_hand(model, tokenizer, prompt, each) for each in ([None] if samples is None else range(3))]
        assert values["own_answer"] == answers[0]
        own = [loss_by_hand(model, tokenizer, prompt, answer.lstrip()) for answer in answers if answer.strip()]
        assert values["own_cas"] == pytest.approx(np.mean(own), rel=ROUNDING)
        cas = loss_by_hand(model, tokenizer, prompt, row["output"])
        assert values["spin_gap"] == pytest.approx(cas - np.mean(own), rel=1e-4)
        agreed = [letters(answer, row["output"]) if answer.strip() else 0.0 for answer in answers]
        assert values["own_agreement"] == pytest.approx(np.mean(agreed))
        assert values["spin_status"] == "ok"
    assert len(set(found["spin_gap"])) == len(ROWS)


def test_an_answer_of_the_models_own_has_no_gap_and_is_matched(model, tokenizer):
    scorer = OwnAnswerScorer(model, tokenizer, max_new_tokens=NEW)
    first = Dataset.from_dict(GOOD).map(scorer, batched=True)
    own = first.remove_columns("output").rename_column("own_answer", "output")
    again = own.map(scorer, batched=True)
    assert again["own_answer"][:] == own["output"][:]
    assert again["spin_gap"] == pytest.approx([0.0] * 4, abs=1e-4)
    assert gate_rows(again, [MatchedGate(1e-3)]).tolist() == ["matched"] * 4
    margin = sorted(first["spin_gap"])[1]
    expected = ["matched" if gap <= margin else "kept" for gap in first["spin_gap"]]
    assert gate_rows(first, [MatchedGate(margin)]).tolist() == expected


def test_white_space_before_an_answer_is_no_gap(model, tokenizer):
    scorer = OwnAnswerScorer(model, tokenizer, max_new_tokens=NEW)
    said = scorer(GOOD)["own_answer"]
    for blank in ("", "\n"):
        found = scorer(GOOD | {"output": [blank + text.lstrip() for text in said]})
        assert found["spin_gap"] == pytest.approx([0.0] * 4, abs=1e-4)


def test_a_policy_ranks_by_the_gap_as_by_any_column(model, tokenizer):
    rows = Dataset.from_dict(GOOD).map(OwnAnswerScorer(model, tokenizer, max_new_tokens=NEW), batched=True)
    columns = {"spin_gap": np.array(rows["spin_gap"]), "ifd_status": np.array(rows["spin_status"])}
    kept = Cherry(math.inf, "spin_gap")(columns, 2).kept
    assert kept.tolist() == sorted(range(4), key=lambda i: -columns["spin_gap"][i])[:2]


def test_rows_without_a_gap_say_why_and_types_hold(model, tokenizer):
    bad = {"instruction": ["Name a cat.", " ", "x " * 600, "Name a dog."], "output": ["", "Tom", "Tom", "y " * 600]}
    scorer = OwnAnswerScorer(model, tokenizer, max_new_tokens=NEW)
    found = Dataset.from_dict(bad).map(scorer, batched=True)
    assert found["spin_status"][:] == ["empty_answer", "empty_prompt", "prompt_too_long", "truncated"]
    assert (found["spin_gap"][:], found["own_cas"][:]) == ([None] * 4, [None] * 4)
    assert [answer is not None for answer in found["own_answer"]] == [False, False, False, True]
    assert {name: found.data.schema.field(name).type for name in SPIN_COLUMNS} == ARROW
    table = pa.table({"instruction": pa.array([], pa.string()), "output": pa.array([], pa.string())})
    assert {field.name: field.type for field in scorer(table).schema if field.name in ARROW} == ARROW
    assert gate_rows(found, [MatchedGate()]).tolist() == ["kept"] * 4


def test_a_model_that_says_nothing_or_gives_no_numbers_has_no_gap(tokenizer):
    silent = build_model(len(tokenizer))
    with torch.no_grad():
        silent.lm_head.weight.zero_()  # all tokens are as likely, and the first of them ends a turn
    silent.generation_config.eos_token_id = [0, tokenizer.eos_token_id]
    found = Dataset.from_dict(GOOD).map(OwnAnswerScorer(silent, tokenizer, max_new_tokens=NEW), batched=True)
    assert found["spin_status"][:] == ["own_answer_empty"] * 4
    assert (found["spin_gap"][:], found["own_answer"][:]) == ([None] * 4, [""] * 4)
    assert found["own_agreement"][:] == [0.0] * 4
    broken = build_model(len(tokenizer))
    with torch.no_grad():
        broken.lm_head.weight.fill_(math.nan)
    for samples in (None, 2):
        scorer = OwnAnswerScorer(broken, tokenizer, samples=samples, max_new_tokens=NEW)
        found = Dataset.from_dict(GOOD).map(scorer, batched=True)
        assert set(found["spin_status"]) <= {"nonfinite", "own_answer_empty"}
        assert found["spin_gap"][:] == [None] * 4


def test_the_model_and_the_random_state_are_as_they_were(model, tokenizer):
    model.train()
    before = random_states()
    OwnAnswerScorer(model, tokenizer, samples=2, max_new_tokens=NEW)(GOOD)
    assert model.training
    assert random_states() == before


def test_equal_options_hit_the_cache_and_others_miss_it(model, tokenizer):
    def digest(**options: object) -> str:
        return Hasher.hash(OwnAnswerScorer(model, tokenizer, **options))

    assert digest() == digest()
    others = [{"samples": 1}, {"samples": 2}, {"samples": 1, "seed": 1}, {"agreement": "exact"}]
    assert len({digest(), *(digest(**options) for options in others)}) == 5
    assert pickle.loads(pickle.dumps(OwnAnswerScorer(IFDScorer(model, tokenizer)))).settings()["samples"] is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"samples": 0}, "samples must be"),
        ({"temperature": 0}, "temperature must be a number above 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be"),
        ({"agreement": "words"}, "agreement must be one of"),
    ],
)
def test_what_is_no_way_to_ask_is_refused(model, tokenizer, options, words):
    with pytest.raises(UserError, match=words):
        OwnAnswerScorer(model, tokenizer, **options)
    with pytest.raises(UserError, match="which has its own tokenizer"):
        OwnAnswerScorer(IFDScorer(model, tokenizer), tokenizer)
    with pytest.raises(UserError, match="leaves no token"):
        OwnAnswerScorer(model, tokenizer, max_new_tokens=512)(GOOD)


# ---- on files -----------------------------------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path: Path, model, tokenizer) -> list[str]:
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = pd.DataFrame([*ROWS, {**ROWS[0], "output": ""}, *ROWS[1:]])
    rows.to_json(tmp_path / "rows.jsonl", orient="records", lines=True)
    words = ["score", str(tmp_path / "rows.jsonl"), "--model", str(tmp_path / "model"), "--device", "cpu"]
    return [*words, "--spin", "2", "--spin-max-new-tokens", str(NEW), "--spin-seed", "3"]


def test_a_job_gives_what_the_transform_gives_and_its_provenance(tmp_path, command, model, tokenizer):
    output = tmp_path / "scored.parquet"
    assert main([*command, "--output", str(output), "--part-rows", "3"]) == 0
    found = pd.read_parquet(output)
    assert list(found) == [*GOOD, *IFD_COLUMNS, *SPIN_COLUMNS]
    own = OwnAnswerScorer(IFDScorer(model, tokenizer), samples=2, max_new_tokens=NEW, seed=3)
    expected = Dataset.from_pandas(found[[*GOOD]]).map(own, batched=True).to_pandas()
    pd.testing.assert_frame_equal(found[[*SPIN_COLUMNS]], expected[[*SPIN_COLUMNS]], rtol=1e-4)
    np.testing.assert_allclose(found["cas"] - found["own_cas"], found["spin_gap"], rtol=1e-4)
    assert read_provenance(output, found).spin == own.settings()
    assert found["spin_status"].tolist() == ["ok"] * 4 + ["empty_answer"] + ["ok"] * 3


def test_a_job_that_is_interrupted_goes_on_where_it_was(tmp_path, command, monkeypatch):
    assert main([*command, "--output", str(tmp_path / "whole.jsonl")]) == 0
    command = [*command, "--part-rows", "2", "--output", str(tmp_path / "scored.jsonl")]
    columns_of, asked = OwnAnswerScorer.columns_of, []

    def counted(self, questions, progress=None):
        if len(asked) == 2 and not go_on:
            raise KeyboardInterrupt
        asked.append(len(questions))
        return columns_of(self, questions, progress)

    go_on: list[bool] = []
    monkeypatch.setattr(OwnAnswerScorer, "columns_of", counted)
    assert main(command) == 130
    go_on.append(True)
    assert main(command) == 0
    assert asked == [2] * 4
    whole, parts = (pd.read_json(tmp_path / name, lines=True) for name in ("whole.jsonl", "scored.jsonl"))
    pd.testing.assert_frame_equal(parts, whole, rtol=1e-4)


def test_parts_with_other_answers_are_refused(tmp_path, command, monkeypatch, capsys):
    command = [*command, "--part-rows", "2", "--output", str(tmp_path / "scored.jsonl")]
    save = ifd_trainer.scoring.job_parts.Parts.save

    def once(self, part, columns):
        save(self, part, columns)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ifd_trainer.scoring.job_parts.Parts, "save", once)
        assert main(command) == 130
    assert main([*command, "--spin-seed", "1"]) == 2
    assert "holds parts of another job: spin_seed: 3 there, 1 now" in capsys.readouterr().err


def test_matched_rows_are_not_selected_and_counted(tmp_path, command, capsys):
    scored, kept = tmp_path / "scored.parquet", tmp_path / "kept.parquet"
    assert main([*command, "--output", str(scored)]) == 0
    table = pd.read_parquet(scored).assign(spin_gap=[0.05, 0.5, -1.0, 0.2, None, 0.1, 0.11, 2.0], ifd=0.5)
    table.to_parquet(scored)
    words = ["select", str(scored), "--keep", "all", "--output", str(kept), "--gates", "matched:0.1", "--all"]
    assert main(words) == 0
    found = pd.read_parquet(kept)["ifd_reason"].tolist()
    assert found == ["matched", "kept", "matched", "kept", "empty_answer", "matched", "kept", "kept"]
    assert "4 rows kept, 50.00 % of all 8 rows in the pool (4 asked for)" in capsys.readouterr().out
    card = kept.with_suffix(".md").read_text()
    assert "| `matched` | 3 | 37.50 % | dropped: the model scores the answer as its own |" in card
    assert "how much more the row's answer surprises the model than its own" in card


def test_options_that_do_not_go_together_are_told(command, tmp_path, capsys):
    without = [*command[: command.index("--spin")], "--output", str(tmp_path / "x.jsonl")]
    for words, said in (
        (["--spin-seed", "1"], "--spin-seed goes with --spin."),
        (["--spin", "--spin-seed", "1"], "--spin-seed goes with --spin N, which samples N answers."),
        (["--spin", "--known", "2"], "--known and --spin are two jobs"),
        (["--spin", "--spin-max-new-tokens", "512"], "leaves no token"),
        (["--spin", "--neighbours", "2"], "--neighbours leaves the scores of rows as they are, and --spin is for"),
    ):
        assert main([*without, *words]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "x.jsonl.parts").exists()
