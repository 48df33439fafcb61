"""What a model knows of rows: samples drawn by hand, rows that cannot be asked, the cache, long jobs."""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import struct
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from conftest import ROUNDING, build_model, build_tokenizer
from datasets import Dataset
from datasets.fingerprint import Hasher
from tiny_runs import random_states

import ifd_trainer
from ifd_trainer.cli import main
from ifd_trainer.data.formats import ALPACA
from ifd_trainer.errors import UserError
from ifd_trainer.method.columns import IFD_COLUMNS, KNOWN_COLUMNS
from ifd_trainer.publish.provenance import read_provenance
from ifd_trainer.scoring.knowledge import KnowledgeScorer
from ifd_trainer.scoring.transform import IFDScorer

NEW, SAMPLES = 10, 4
GOOD = {
    "instruction": ["Name three colours.", "Add the numbers.", "Who sat on the mat?", "What ran in the park?"],
    "input": ["", "12 and 30", "", ""],
    "output": ["Red, green and blue.", "The sum is 42.", "The cat.", "the dog"],
}
ROWS = [dict(zip(GOOD, values, strict=True)) for values in zip(*GOOD.values(), strict=True)]
ARROW = dict.fromkeys(KNOWN_COLUMNS[:3], pa.float64()) | {"known_samples": pa.int64(), "known_status": pa.string()}


def letters(one: str, other: str) -> float:
    """An agreement of random texts that is seldom 0 or 1: the share of letters that both have."""
    both = set(one) | set(other)
    return len(set(one) & set(other)) / len(both) if both else 1.0


@pytest.fixture
def scorer(model, tokenizer) -> KnowledgeScorer:
    return KnowledgeScorer(
        model, tokenizer, samples=SAMPLES, max_new_tokens=NEW, agreement=letters, threshold=0.2, temperature=1.5
    )


def said_by_hand(model, tokenizer, prompt: str, sample: int, temperature: float, add: bool = True) -> str:
    """One sample, one token at a time, from all logits."""
    ids = tokenizer(prompt, add_special_tokens=add).input_ids
    words = struct.unpack("<4I", hashlib.blake2b(struct.pack(f"<{len(ids)}q", *ids), digest_size=16).digest())
    numbers = np.random.Generator(np.random.PCG64(np.random.SeedSequence([0, *words, sample])))
    said = []
    with torch.no_grad():
        while len(said) < NEW:
            logits = model(torch.tensor([[*ids, *said]]), use_cache=False).logits[0, -1].double() / temperature
            summed = torch.softmax(logits, -1).cumsum(-1)
            token = int((summed <= numbers.random() * summed[-1]).sum())
            if token == tokenizer.eos_token_id:
                break
            said.append(token)
    return tokenizer.decode(said, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def numbers_by_hand(answers: list[str], reference: str, threshold: float) -> tuple[float, float, float]:
    agree = [letters(answer, reference) if answer.strip() else 0.0 for answer in answers]
    among = [
        letters(answers[i], answers[j]) if answers[i].strip() and answers[j].strip() else 0.0
        for i in range(len(answers))
        for j in range(len(answers))
        if i != j
    ]
    return sum(value >= threshold for value in agree) / len(agree), np.mean(agree), np.mean(among)


# ---- columns ------------------------------------------------------------------------------------------------------


def test_the_columns_are_those_of_samples_drawn_by_hand(scorer, model, tokenizer):
    found = Dataset.from_dict(GOOD).map(scorer, batched=True)
    for row, values in zip(ROWS, found, strict=True):
        prompt = ALPACA.render(row, tokenizer).prompt
        answers = [said_by_hand(model, tokenizer, prompt, sample, 1.5) for sample in range(SAMPLES)]
        known = [values["known"], values["known_agreement"], values["known_consistency"]]
        assert known == pytest.approx(numbers_by_hand(answers, row["output"], 0.2))
        assert (values["known_samples"], values["known_status"]) == (SAMPLES, "ok")
    assert len(set(found["known_agreement"])) == len(ROWS)
    assert 0 < np.mean(found["known"]) < 1


def test_a_chat_is_asked_with_the_header_of_the_answer_at_its_end(model, tokenizer):
    messages = [{"role": "user", "content": "Name a cat."}, {"role": "assistant", "content": "The red cat."}]
    scorer = KnowledgeScorer(model, tokenizer, samples=2, max_new_tokens=NEW, agreement=letters, temperature=1.0)
    found = scorer({"messages": [messages]})
    prompt = "<|im_start|>user\nName a cat.<|im_end|>\n<|im_start|>assistant\n"
    answers = [said_by_hand(model, tokenizer, prompt, sample, 1.0, add=False) for sample in range(2)]
    assert found["known_agreement"] == pytest.approx([np.mean([letters(text, "The red cat.") for text in answers])])


def test_all_other_columns_stay_and_the_types_are_those_of_the_columns(scorer):
    rows = Dataset.from_dict({**GOOD, "n": [3, 1, 4, 1], "known": ["older", "text", "in", "it"]})
    found = rows.map(scorer, batched=True)
    assert found.column_names == [*GOOD, "n", *KNOWN_COLUMNS]
    assert {name: found.data.schema.field(name).type for name in KNOWN_COLUMNS} == ARROW
    assert found["n"] == [3, 1, 4, 1]
    again = found.map(scorer, batched=True, load_from_cache_file=False)
    assert again.to_dict() == found.to_dict()


def test_types_hold_where_no_row_is_asked_and_where_there_is_none(scorer):
    bad = Dataset.from_dict({"instruction": ["Name a cat."] * 2, "output": ["", " "]})
    found = bad.map(scorer, batched=True)
    assert {name: found.data.schema.field(name).type for name in KNOWN_COLUMNS} == ARROW
    table = pa.table({"instruction": pa.array([], pa.string()), "output": pa.array([], pa.string())})
    assert {field.name: field.type for field in scorer(table).schema if field.name in ARROW} == ARROW


def test_an_arrow_table_comes_back_whole(scorer):
    table = pa.table({**GOOD, "known": [1, 2, 3, 4]})
    found = scorer(table)
    assert found.column_names == [*GOOD, *KNOWN_COLUMNS]
    assert found.select([*KNOWN_COLUMNS]).to_pydict() == scorer(GOOD)


def test_neither_batches_nor_order_nor_other_rows_change_a_row(scorer):
    rows = Dataset.from_dict(GOOD)
    found = rows.map(scorer, batched=True).to_list()
    assert rows.map(scorer, batched=True, batch_size=1).to_list() == found
    assert rows.select([2, 0, 3, 1]).map(scorer, batched=True, batch_size=3).to_list() == [
        found[i] for i in (2, 0, 3, 1)
    ]
    scorer.token_budget = 1
    assert rows.map(scorer, batched=True, load_from_cache_file=False).to_list() == found


def test_the_model_is_given_back_as_it_was(scorer, model):
    model.train()
    first = scorer(GOOD)
    torch.manual_seed(99)
    states = random_states()
    assert scorer(GOOD) == first
    assert random_states() == states
    assert all(module.training for module in model.modules())


def test_one_sample_has_no_consistency(model, tokenizer):
    found = KnowledgeScorer(model, tokenizer, samples=1, max_new_tokens=NEW)(GOOD)
    assert found["known_consistency"] == [None] * 4
    assert found["known_samples"] == [1] * 4
    assert set(found["known"]) <= {0.0, 1.0}


def test_names_of_agreements_are_those_of_the_functions(model, tokenizer):
    found = {}
    for name in ("f1", "exact", "rouge_l"):
        found[name] = KnowledgeScorer(model, tokenizer, samples=2, max_new_tokens=NEW, agreement=name)(GOOD)
    of_own = KnowledgeScorer(
        model, tokenizer, samples=2, max_new_tokens=NEW, agreement=lambda one, other: float(one == other)
    )(GOOD)
    assert found["exact"]["known_agreement"] == of_own["known_agreement"] == [0.0] * 4
    assert found["f1"]["known_status"] == ["ok"] * 4


def test_an_answer_longer_than_a_sample_is_compared_by_its_beginning(model, tokenizer):
    seen = []

    def noted(answer: str, reference: str) -> float:
        seen.append(reference)
        return 0.0

    long = "Red, green and blue. The cat sat on the mat and the dog ran in the park with a ball."
    batch = {"instruction": ["Name three colours."] * 2, "output": [long, "Red."]}
    KnowledgeScorer(model, tokenizer, samples=1, max_new_tokens=5, agreement=noted)(batch)
    cut = tokenizer.decode(tokenizer(long, add_special_tokens=False).input_ids[:5])
    assert seen == [cut, "Red."]
    assert long.startswith(cut)
    assert len(cut) < len(long)


# ---- rows that cannot be asked ------------------------------------------------------------------------------------


BAD = [
    ({"instruction": "Name a cat.", "output": ""}, "empty_answer"),
    ({"instruction": "Name a cat.", "output": " \n"}, "empty_answer"),
    ({"instruction": "Name a cat.", "output": None}, "empty_answer"),
    ({"instruction": " ", "output": "The cat."}, "empty_prompt"),
    ({"instruction": "Name cats: " + "the cat sat " * 300, "output": "The cat."}, "prompt_too_long"),
    ({"instruction": ["Name"], "output": {"a": 1}}, "malformed"),
]


@pytest.mark.parametrize(("bad", "status"), BAD)
def test_a_row_that_cannot_be_asked_says_why_and_leaves_the_others_alone(scorer, bad, status):
    known = scorer({"instruction": GOOD["instruction"], "output": GOOD["output"]})
    batch = {name: [*GOOD[name][:2], bad[name], *GOOD[name][2:]] for name in ("instruction", "output")}
    found = scorer(batch)
    assert {name: values.pop(2) for name, values in found.items()} == {
        **dict.fromkeys(KNOWN_COLUMNS[:3]),
        "known_samples": 0,
        "known_status": status,
    }
    assert found == known


def test_a_batch_of_malformed_rows_only_is_said(scorer, caplog):
    assert scorer({"instruction": [["Name"]], "output": [{"a": 1}]})["known_status"] == ["malformed"]
    assert "None of 1 row can be rendered in their format" in caplog.text


def test_a_prompt_fits_with_its_answer_or_is_not_asked(tokenizer):
    row = {name: values[:1] for name, values in GOOD.items()}
    prompt = len(tokenizer(ALPACA.render(ROWS[0], tokenizer).prompt).input_ids)
    for window, status in ((prompt + NEW, "ok"), (prompt + NEW - 1, "prompt_too_long")):
        model = build_model(len(tokenizer), max_position_embeddings=window)
        assert KnowledgeScorer(model, tokenizer, samples=1, max_new_tokens=NEW)(row)["known_status"] == [status]


def test_a_window_without_room_for_a_prompt_is_told(tokenizer):
    scorer = KnowledgeScorer(build_model(len(tokenizer), max_position_embeddings=NEW), tokenizer, max_new_tokens=NEW)
    with pytest.raises(UserError, match="max_new_tokens=10 leaves no token of the model's window of 10"):
        scorer(GOOD)


def test_the_end_of_one_rows_answer_ends_no_other_sample(model, tokenizer):
    """A special token behind the answer of one row alone would end samples of its batch."""
    scorer = KnowledgeScorer(model, tokenizer, samples=SAMPLES, max_new_tokens=NEW, agreement=letters)
    alone = scorer(GOOD)
    stops = []
    generate = model.generate

    def noted(**options):
        stops.append(set(options["generation_config"].eos_token_id))
        return generate(**options)

    model.generate = noted
    batch = {name: [*values, values[0]] for name, values in GOOD.items()}
    batch["output"][-1] = "Red.<|im_start|>"
    found = scorer(batch)
    assert stops == [{2}, {1, 2}]
    assert {name: values[:-1] for name, values in found.items()} == alone
    assert found["known_status"] == ["ok"] * 5


def test_a_model_without_probabilities_is_a_status(scorer, model):
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    found = scorer(GOOD)
    assert found["known_status"] == ["nonfinite"] * 4
    assert found["known_samples"] == [0] * 4
    assert found["known"] == [None] * 4


def test_a_tokenizer_of_another_model_is_refused(tokenizer):
    with pytest.raises(UserError, match="they do not belong together"):
        KnowledgeScorer(build_model(300), build_tokenizer(), max_new_tokens=NEW)(GOOD)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_model_in_half_precision_is_asked(tmp_path, model, tokenizer, dtype):
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    scorer = KnowledgeScorer(tmp_path, samples=2, max_new_tokens=NEW, dtype=dtype, device="cpu", agreement=letters)
    found = scorer(GOOD)
    assert scorer.scorer.model.dtype == getattr(torch, dtype)
    assert found["known_status"] == ["ok"] * 4
    assert scorer(GOOD) == found


# ---- what it is made of -------------------------------------------------------------------------------------------


def test_it_takes_the_model_of_an_ifd_scorer_and_no_second_one(model, tokenizer, scorer):
    of_scorer = KnowledgeScorer(
        IFDScorer(model, tokenizer, format="alpaca"),
        samples=SAMPLES,
        max_new_tokens=NEW,
        agreement=letters,
        threshold=0.2,
        temperature=1.5,
    )
    assert of_scorer(GOOD) == scorer(GOOD)
    assert of_scorer.scorer.model is model
    with pytest.raises(UserError, match="which has its own tokenizer, format: leave out"):
        KnowledgeScorer(IFDScorer(model, tokenizer), tokenizer, format="alpaca")


def test_it_is_a_public_name():
    assert ifd_trainer.KnowledgeScorer is KnowledgeScorer
    assert ifd_trainer.hard_or_wrong([0.0], [0.9], high_ifd=0.5).tolist() == ["hard"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"samples": 0}, "samples must be"),
        ({"max_new_tokens": 0}, "max_new_tokens must be"),
        ({"temperature": 0.0}, "temperature must be"),
        ({"top_p": 2}, "top_p must be"),
        ({"seed": -1}, "seed must be"),
        ({"threshold": 0}, "threshold must be"),
        ({"agreement": "bleu"}, "agreement must be one of"),
        ({"token_budget": 0}, "token_budget must be"),
        ({"device": "gpu"}, "Unknown device"),
    ],
)
def test_wrong_options_are_refused_before_a_model_loads(options, words):
    with pytest.raises(UserError, match=words):
        KnowledgeScorer("someone/no-such-model", **options)


def test_map_without_batched_names_this_transform(scorer):
    with pytest.raises(UserError, match="KnowledgeScorer scores batches"):
        Dataset.from_dict(GOOD).map(scorer)


OTHER = [
    {"samples": 3},
    {"max_new_tokens": 9},
    {"temperature": 0.9},
    {"top_p": 0.9},
    {"seed": 1},
    {"agreement": "exact"},
    {"agreement": letters},
    {"threshold": 0.4},
    {"format": "wizardlm"},
]


@pytest.mark.parametrize("other", OTHER)
def test_other_options_and_weights_miss_the_cache_and_use_does_not(tokenizer, model, other):
    made = KnowledgeScorer(model, tokenizer, samples=2, max_new_tokens=NEW)
    hashed = Hasher.hash(made)
    made(GOOD)
    assert Hasher.hash(made) == hashed
    assert Hasher.hash(KnowledgeScorer(build_model(len(tokenizer)), tokenizer, samples=2, max_new_tokens=NEW)) == hashed
    assert Hasher.hash(KnowledgeScorer(model, tokenizer, **{"samples": 2, "max_new_tokens": NEW, **other})) != hashed
    with torch.no_grad():
        model.lm_head.weight[0] += 1
    assert Hasher.hash(made) != hashed


def test_one_that_was_sent_to_another_process_asks_as_the_first(tmp_path, model, tokenizer):
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    made = KnowledgeScorer(tmp_path, samples=2, max_new_tokens=NEW, device="cpu")
    sent = pickle.loads(pickle.dumps(made))
    assert Hasher.hash(sent) == Hasher.hash(made)
    assert len(pickle.dumps(made)) < 5000
    assert sent(GOOD) == made(GOOD)
    assert repr(made) == repr(sent)
    assert "samples=2, max_new_tokens=10, seed=0, temperature=0.7" in repr(made)


# ---- long jobs ----------------------------------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path: Path, model, tokenizer) -> list[str]:
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [*ROWS, {**ROWS[0], "output": ""}, {**ROWS[1], "instruction": "the cat " * 600}, *ROWS[::-1]]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    words = ["score", str(tmp_path / "rows.jsonl"), "--model", str(tmp_path / "model"), "--device", "cpu"]
    return [*words, "--known", str(SAMPLES), "--known-max-new-tokens", str(NEW)]


def test_a_job_attaches_the_columns_of_both_transforms(tmp_path, command, model, tokenizer, capsys):
    output = tmp_path / "scored.parquet"
    assert main([*command, "--known-threshold", "0.1", "--known-seed", "3", "--output", str(output)]) == 0
    found = pd.read_parquet(output)
    assert list(found) == [*GOOD, *IFD_COLUMNS, *KNOWN_COLUMNS]
    ifd = IFDScorer(model, tokenizer)
    known = KnowledgeScorer(ifd, samples=SAMPLES, max_new_tokens=NEW, threshold=0.1, seed=3)
    batch = {name: list(found[name]) for name in GOOD}
    for name, values in known(batch).items():
        numbers = [math.nan if value is None else value for value in values]
        assert found[name].tolist() == pytest.approx(numbers, nan_ok=True) if name in KNOWN_COLUMNS[:3] else values
    assert found["known_status"].tolist() == ["ok"] * 4 + ["empty_answer", "prompt_too_long"] + ["ok"] * 4
    np.testing.assert_allclose(
        found["ifd"], [math.nan if value is None else value for value in ifd(batch)["ifd"]], rtol=ROUNDING
    )
    assert read_provenance(output, found).known == known.settings()


@pytest.mark.parametrize("killed_at", [1, 3])
def test_a_job_that_is_interrupted_keeps_what_is_sampled_and_ends_as_if_it_had_not_been(
    tmp_path, command, monkeypatch, killed_at
):
    assert main([*command, "--output", str(tmp_path / "whole.jsonl")]) == 0
    command = [*command, "--part-rows", "2", "--output", str(tmp_path / "scored.jsonl")]
    answer, asked, most = KnowledgeScorer.answer, [], killed_at

    def counted(self, questions, progress=None):
        if len(asked) == most:
            raise KeyboardInterrupt
        asked.append(len(questions))
        return answer(self, questions, progress)

    monkeypatch.setattr(KnowledgeScorer, "answer", counted)
    assert main(command) == 130
    assert len(list((tmp_path / "scored.jsonl.parts").glob("ifd-part-*"))) == killed_at
    most = math.inf
    assert main(command) == 0
    assert asked == [2] * 5  # no row was asked twice
    whole, parts = (pd.read_json(tmp_path / name, lines=True) for name in ("whole.jsonl", "scored.jsonl"))
    pd.testing.assert_frame_equal(parts, whole, rtol=ROUNDING)
    pd.testing.assert_frame_equal(parts[[*KNOWN_COLUMNS]], whole[[*KNOWN_COLUMNS]], check_exact=True)


def test_parts_with_other_samples_are_refused(tmp_path, command, monkeypatch, capsys):
    command = [*command, "--part-rows", "2", "--output", str(tmp_path / "scored.jsonl")]
    save = ifd_trainer.scoring.job_parts.Parts.save

    def once(self, part, columns):
        save(self, part, columns)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ifd_trainer.scoring.job_parts.Parts, "save", once)
        assert main(command) == 130
    assert main([*command, "--known-seed", "1"]) == 2
    assert "holds parts of another job: known_seed: 0 there, 1 now" in capsys.readouterr().err
    assert main(command) == 0


def test_scored_again_without_asking_the_columns_stay(tmp_path, command):
    first, second = tmp_path / "first.parquet", tmp_path / "second.parquet"
    assert main([*command, "--output", str(first)]) == 0
    without = command[: command.index("--known")]
    assert main([without[0], str(first), *without[2:], "--output", str(second)]) == 0
    found = [pd.read_parquet(path) for path in (first, second)]
    pd.testing.assert_frame_equal(found[0][[*KNOWN_COLUMNS]], found[1][[*KNOWN_COLUMNS]])
    assert main([command[0], str(second), *command[2:], "--known-seed", "9", "--output", str(first)]) == 0
    assert list(pd.read_parquet(first)) == list(found[0])


def test_rows_are_selected_by_what_is_not_known(tmp_path, command, capsys):
    scored, kept = tmp_path / "scored.parquet", tmp_path / "kept.parquet"
    assert main([*command, "--known-threshold", "0.05", "--output", str(scored)]) == 0
    table = pd.read_parquet(scored)
    table["known"] = [0.5, 0.0, 1.0, 0.25, None, None, 0.75, 0.9, 0.9, 0.9]
    table.to_parquet(scored)
    assert main(["select", str(scored), "--score", "known:-1", "--keep", "3", "--output", str(kept)]) == 0
    assert sorted(pd.read_parquet(kept)["known"]) == [0.0, 0.25, 0.5]
    card = kept.with_suffix(".md").read_text()
    assert "share of the model's sampled answers that agree with the row's" in card


def test_options_of_asking_without_asking_are_told(command, tmp_path, capsys):
    words = command[: command.index("--known")]
    assert main([*words, "--known-top-p", "0.9", "--output", str(tmp_path / "x.jsonl")]) == 2
    assert "--known-top-p goes with --known N" in capsys.readouterr().err
    assert main([*command, "--known-max-new-tokens", "512", "--output", str(tmp_path / "x.jsonl")]) == 2
    assert "max_new_tokens=512 leaves no token" in capsys.readouterr().err
    assert not (tmp_path / "x.jsonl.parts").exists()
