"""Compare and replace: versions scored by hand one by one, texts that are taken, rows that cannot be compared."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from conftest import ROUNDING, build_model
from datasets import Dataset
from datasets.fingerprint import Hasher

from ifd_trainer import ALPACA, IFDScorer, ReflectionScorer
from ifd_trainer.errors import UserError
from ifd_trainer.method.columns import IFD_COLUMNS, REFLECTED_COLUMNS

ROWS = [
    {"instruction": "Name three colours.", "input": "", "output": "Red, green."},
    {"instruction": "Add the numbers.", "input": "12 and 30", "output": "The sum is 42."},
    {"instruction": "Who sat on the mat?", "input": "", "output": "The cat."},
    {"instruction": "What ran?", "input": "", "output": "a dog"},
    {"instruction": "Name a dog.", "input": "", "output": "Rex"},
    {"instruction": "Name a cat.", "input": "", "output": "Tom"},
]
NEW = [
    {"instruction": "Say no.", "output": "maybe, or maybe not"},
    {"instruction": "The sum of the numbers is what?", "output": "The sum of the numbers is 42."},
    {"instruction": None, "output": "The cat sat on the mat."},
    {"instruction": "What ran in the park with a ball?", "output": None},
    {"instruction": " Name a dog. ", "output": "Rex "},
    {"instruction": None, "output": None},
]


def table(rows: list[dict] = ROWS, new: list[dict] = NEW, **more: list) -> Dataset:
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    columns |= {f"rewritten_{name}": [row[name] for row in new] for name in new[0]}
    return Dataset.from_dict({**columns, **more})


@pytest.fixture
def model(tokenizer):
    """One under which each reason comes about."""
    return build_model(len(tokenizer), seed=1)


def by_hand(scorer: IFDScorer, row: dict, new: dict) -> tuple[str, dict, dict]:
    """What becomes of a row with one version scored after the other: reason, texts and scores."""

    def scored(version: dict) -> dict:
        return {name: values[0] for name, values in scorer({name: [value] for name, value in version.items()}).items()}

    def below(scores: dict) -> bool:
        return scores["ifd"] < 1 and scores["rifd"] < 1

    merged = row | {name: value for name, value in new.items() if value is not None}
    asked = merged["instruction"].strip() != row["instruction"].strip()
    said = merged["output"].strip() != row["output"].strip()
    original, numbers = scored(row), {}
    numbers["original"] = original
    if asked:
        numbers["instruction"] = scored(merged)
        if numbers["instruction"]["ifd"] > original["ifd"] and below(numbers["instruction"]):
            return "rewritten_instruction", merged, numbers
    if said:
        version = row | {"output": merged["output"]}
        numbers["answer"] = scored(version)
        if numbers["answer"]["rifd"] < original["rifd"] and below(numbers["answer"]):
            return "rewritten_answer", version, numbers
    return "kept_original" if asked or said else "not_rewritten", row, numbers


def test_versions_are_chosen_as_by_hand(model, tokenizer):
    """On many pairs of the rows, so that each reason comes about."""
    pairs = [(row, NEW[(i + shift) % len(NEW)]) for shift in range(4) for i, row in enumerate(ROWS)]
    rows = table([row for row, _ in pairs], [new for _, new in pairs])
    found = rows.map(ReflectionScorer(model, tokenizer, format="alpaca"), batched=True, batch_size=20)
    reasons = {"rewritten_instruction", "rewritten_answer", "kept_original", "not_rewritten"}
    assert set(found["reflect_reason"]) == reasons
    scorer = IFDScorer(model, tokenizer, scores="rifd", format="alpaca")
    for (row, new), values in zip(pairs, found, strict=True):
        reason, texts, numbers = by_hand(scorer, row, new)
        assert values["reflect_reason"] == reason
        assert {name: values[name] for name in texts} == texts
        for version in ("original", "instruction", "answer"):
            for score in ("ifd", "rifd"):
                wanted = numbers[version][score] if version in numbers else None
                got = values[f"{version}_{score}"]
                assert got == (wanted if wanted is None else pytest.approx(wanted, rel=5 * ROUNDING))
        taken = {"rewritten_instruction": "instruction", "rewritten_answer": "answer"}.get(reason, "original")
        for name in (*IFD_COLUMNS, "rifd", "rcas", "rdas"):
            wanted = numbers[taken][name]
            assert values[name] == (pytest.approx(wanted, rel=1e-3) if isinstance(wanted, float) else wanted)


def test_all_other_columns_stay_and_older_scores_go(model, tokenizer):
    rows = table(n=list(range(6)), ifd_rank=[1, 2, 3, 4, 5, 6], ifd=[9.0] * 6)
    found = rows.map(ReflectionScorer(model, tokenizer), batched=True)
    assert found["n"][:] == list(range(6))
    assert found["rewritten_output"][:] == [new["output"] for new in NEW]
    assert found["ifd_rank"][:] == [None] * 6
    assert max(found["ifd"]) < 9
    assert set(found.column_names) >= {*IFD_COLUMNS, "rifd", *REFLECTED_COLUMNS}


def test_of_answers_alone_the_one_with_the_lower_r_ifd_is_taken(model, tokenizer):
    rows = table().remove_columns(["rewritten_instruction"])
    found = rows.map(ReflectionScorer(model, tokenizer, limit=float("inf")), batched=True)
    for i, values in enumerate(found):
        assert values["instruction_ifd"] is None
        if values["answer_rifd"] is not None:
            lower = values["answer_rifd"] < values["original_rifd"]
            assert values["reflect_reason"] == ("rewritten_answer" if lower else "kept_original")
            assert values["output"] == (NEW[i]["output"] if lower else ROWS[i]["output"])
        else:
            assert values["reflect_reason"] == "not_rewritten"
    assert {"rewritten_answer", "kept_original"} <= set(found["reflect_reason"])


def test_columns_of_other_names_are_named(model, tokenizer):
    named = table().rename_columns({"rewritten_output": "better", "rewritten_instruction": "asked"})
    scorer = ReflectionScorer(model, tokenizer, rewritten={"output": "better", "instruction": "asked"})
    columns = ["instruction", "output", *REFLECTED_COLUMNS]
    usual = table().map(ReflectionScorer(model, tokenizer), batched=True).select_columns(columns)
    assert named.map(scorer, batched=True).select_columns(columns).to_dict() == usual.to_dict()
    for rewritten, words in (
        ({"output": "missing"}, "there is no column 'missing' to read"),
        ({"system": "better"}, "there is no column 'system' to read"),
        ({}, "rewritten names no column"),
        (None, "No column holds rewritten texts: looked for rewritten_instruction, rewritten_input, rewritten_output"),
    ):
        with pytest.raises(UserError, match=words):
            ReflectionScorer(model, tokenizer, rewritten=rewritten)(named.to_dict())


def test_what_cannot_be_scored_keeps_the_row_as_it_is_and_says_why(model, tokenizer):
    rows = [ROWS[0], ROWS[1], {**ROWS[2], "output": ""}, ROWS[3], ROWS[4]]
    long = "word " * 600
    new = [
        {"instruction": None, "output": ""},
        {"instruction": long, "output": None},
        {"instruction": None, "output": "The cat."},
        {"instruction": None, "output": long},
        {"instruction": "", "output": None},
    ]
    found = table(rows, new).map(ReflectionScorer(model, tokenizer, format="alpaca"), batched=True)
    why = ["empty_answer", "prompt_too_long", "empty_answer", "truncated", "kept_original"]
    reasons = found["reflect_reason"][:]
    assert reasons[:4] == why[:4]
    assert found["output"][:] == [row["output"] for row in rows]
    assert found["ifd_status"][:] == ["ok", "ok", "empty_answer", "ok", "ok"]
    blank = found[4]
    assert (blank["reflect_reason"], blank["instruction"]) == ("empty_prompt", ROWS[4]["instruction"])


def test_a_version_without_r_ifd_is_not_taken(model, tokenizer):
    """The answer fits behind its prompt, and not into the longer request to guess."""
    guess = "Which one? " * 20 + "{answer}"
    row = {"instruction": "Name words.", "input": "", "output": "a cat"}
    new = [{"instruction": None, "output": "a red cat " * 50}]
    most = len(tokenizer(ALPACA.render(row | {"output": new[0]["output"]}).prompt + new[0]["output"]).input_ids)
    scorer = ReflectionScorer(model, tokenizer, guess=guess, format="alpaca", max_length=most)
    found = table([row], new).map(scorer, batched=True)[0]
    assert (found["answer_ifd"] is None, found["answer_rifd"]) == (False, None)
    assert (found["reflect_reason"], found["output"]) == ("no_rifd", "a cat")


def test_chats_are_taken_whole(model, tokenizer):
    def chat(asked: str, said: str) -> list[dict]:
        return [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]

    old = [chat(row["instruction"], row["output"]) for row in ROWS]
    merged = [row | {key: text for key, text in new.items() if text} for row, new in zip(ROWS, NEW, strict=True)]
    new = [chat(row["instruction"], row["output"]) for row in merged]
    rows = Dataset.from_dict({"messages": old, "rewritten_messages": new})
    found = rows.map(ReflectionScorer(model, tokenizer, limit=float("inf")), batched=True)
    for i, values in enumerate(found):
        taken = values["reflect_reason"] in ("rewritten_instruction", "rewritten_answer")
        assert values["messages"] == (new if taken else old)[i]
        asked = new[i][0]["content"].strip() != old[i][0]["content"].strip()
        assert (values["instruction_ifd"] is None) == (not asked)
        if asked:
            assert values["answer_ifd"] is None
            assert taken == (values["instruction_ifd"] > values["original_ifd"])
    assert {"rewritten_instruction", "not_rewritten"} <= set(found["reflect_reason"])


def test_equal_options_hit_the_cache_and_others_miss_it(model, tokenizer):
    def digest(**options: object) -> str:
        return Hasher.hash(ReflectionScorer(model, tokenizer, **options))

    assert digest() == digest()
    others = [{"limit": 2.0}, {"rewritten": {"output": "x"}}, {"guess": "What has {answer}?"}]
    assert len({digest(), *(digest(**options) for options in others)}) == 4
    assert pickle.loads(pickle.dumps(ReflectionScorer(model, tokenizer))).limit == 1.0


def test_scorers_that_give_no_r_ifd_are_refused(model, tokenizer):
    with pytest.raises(UserError, match="needs an IFDScorer with scores='rifd', and without turns"):
        ReflectionScorer(IFDScorer(model, tokenizer))
    with pytest.raises(UserError, match="needs an IFDScorer with scores='rifd', and without turns"):
        ReflectionScorer(IFDScorer(model, tokenizer, scores="rifd", turns="tokens"))
    with pytest.raises(UserError, match="which has its own format"):
        ReflectionScorer(IFDScorer(model, tokenizer, scores="rifd"), format="alpaca")
    with pytest.raises(UserError, match="limit must be a number above 0"):
        ReflectionScorer(model, tokenizer, limit=-1)
    named = ReflectionScorer(IFDScorer(model, tokenizer, scores="rifd"))
    assert np.isin(["reflect_reason"], [*named(table().to_dict())]).all()
