"""A reward model as the judge, against unbatched forwards."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest
import torch
from conftest import ROUNDING, SMALL, build_model, build_tokenizer
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from ifd_trainer.errors import FileAccessError, UserError
from ifd_trainer.judge.pairs import judge_pairs, paired_answers
from ifd_trainer.judge.reward_model import NOT_FINITE, TOO_LONG, RewardModel

ANSWERED = [
    ("Name three colours.", "Red, green and blue."),
    ("Add the numbers.", "The sum is 42."),
    ("Add the numbers.", ""),
    ("Below is an instruction that describes a task.", "The cat sat on the mat and the dog ran in the park. " * 3),
]


def classifier(kind=LlamaForSequenceClassification, config=LlamaConfig, **settings):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(config(**{**SMALL, "num_labels": 1, **settings})).eval()


@pytest.fixture(scope="module")
def chat():
    return RewardModel(classifier(), build_tokenizer(), batch_size=3)


def reward_of(model, ids, **inputs):
    with torch.no_grad():
        return model(torch.tensor([ids]), **{name: torch.tensor([row]) for name, row in inputs.items()}).logits.item()


def chat_ids(tokenizer, prompt, answer):
    text = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_rewards_of_chats_are_those_of_unbatched_forwards(chat):
    told = {}
    rewards = chat(ANSWERED, lambda number, reward: told.update({number: reward}))
    wanted = [reward_of(chat.model, chat_ids(chat.tokenizer, *each)) for each in ANSWERED]
    assert [reward.value for reward in rewards] == pytest.approx(wanted, rel=ROUNDING, abs=1e-6)
    assert len(set(wanted)) == 4
    assert [told[number] for number in range(4)] == rewards
    assert rewards[0].by == chat.name == "LlamaForSequenceClassification"
    assert replace(chat, batch_size=1)(ANSWERED)[3].value == pytest.approx(wanted[3], rel=ROUNDING)
    assert chat([]) == []


def test_without_a_template_the_texts_are_a_pair():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    model = classifier(BertForSequenceClassification, BertConfig)
    for texts, reward in zip(ANSWERED, RewardModel(model, tokenizer)(ANSWERED), strict=True):
        both = [tokenizer(text)["input_ids"] for text in texts]
        types = [0] * len(both[0]) + [1] * len(both[1])
        wanted = reward_of(model, both[0] + both[1], token_type_ids=types)
        assert reward.value == pytest.approx(wanted, rel=ROUNDING, abs=1e-6)


def test_without_a_padding_token_texts_are_run_alone():
    model, tokenizer = classifier(pad_token_id=None), build_tokenizer()
    rewards = RewardModel(model, tokenizer)(ANSWERED)
    wanted = [reward_of(model, chat_ids(tokenizer, *each)) for each in ANSWERED]
    assert [reward.value for reward in rewards] == pytest.approx(wanted, rel=ROUNDING, abs=1e-6)


def test_an_answer_that_does_not_fit_loses_its_end_and_no_more(chat):
    prompt, answer = ANSWERED[3]
    most = len(chat_ids(chat.tokenizer, prompt, answer)) - 10
    (reward,) = replace(chat, max_length=most)([(prompt, answer)])
    kept = answer[: len(answer) - reward.cut]
    ids = chat_ids(chat.tokenizer, prompt, kept)
    assert most - 3 <= len(ids) <= most
    assert len(chat_ids(chat.tokenizer, prompt, answer[: len(kept) + 1])) > most
    assert reward.value == pytest.approx(reward_of(chat.model, ids), rel=ROUNDING)
    (none,) = replace(chat, max_length=len(chat_ids(chat.tokenizer, prompt, "")))([(prompt, answer)])
    assert (none.value, none.reason, none.cut) == (None, TOO_LONG, len(answer))
    (empty,) = replace(chat, max_length=most)([(prompt, "")])  # an empty answer is one
    assert empty.reason is None
    positions = RewardModel(classifier(max_position_embeddings=20), chat.tokenizer)
    assert positions([("Add the numbers.", "The sum is 42. " * 9)])[0].cut > 0


def test_the_higher_reward_wins_by_more_than_the_margin(chat):
    one, other = chat(ANSWERED[:2])
    gap = abs(one.value - other.value)
    value = 1 if one.value > other.value else -1
    assert (chat.compare([one, other]).value, chat.compare([other, one]).value) == (value, -value)
    assert replace(chat, margin=gap * 1.01).compare([one, other]).value == 0
    assert replace(chat, margin=gap * 0.99).compare([one, other]).value == value
    assert chat.compare([one, one]).value == 0
    missing = replace(one, value=None, reason=TOO_LONG)
    assert (chat.compare([one, missing]).value, chat.compare([one, missing]).reasons) == (None, (TOO_LONG,))


def test_rewards_are_kept_and_each_answer_is_scored_once(chat, tmp_path, monkeypatch):
    frame = pd.DataFrame(
        {"document": ["0", "1"], "prompt": ["Hi", "Add."], "answer": ["one", "two"], "category": [None, None]}
    )
    answers = {
        ("random", 0): frame,
        ("a", 0): frame.assign(answer=["three", "two"]),
        ("b", 0): frame.assign(answer="x"),
    }
    pairs = paired_answers(answers)
    judged = judge_pairs(pairs, chat, tmp_path)
    # Four answers to the first prompt less one arm's that is the same, and to the second two: 3 + 2.
    assert (judged.count.asked, judged.count.same) == (5, 1)
    texts = ["one", "three", "x"]
    rewards = dict(zip(texts, (r.value for r in chat([("Hi", text) for text in texts])), strict=True))
    line = judged.frame.iloc[0]
    assert (line["own_score"], line["other_score"]) == pytest.approx((rewards["three"], rewards["one"]), rel=ROUNDING)
    assert line["value"] == (1 if rewards["three"] > rewards["one"] else -1)
    assert judged.frame["value"].iloc[1] == 0  # the same text
    monkeypatch.setattr(chat.model, "forward", None)  # all that is kept needs no model
    again = judge_pairs(pairs, chat, tmp_path)
    assert again.count.asked == 0
    pd.testing.assert_frame_equal(again.frame, judged.frame)


def test_a_digest_is_of_weights_and_texts(chat):
    other = classifier()
    same = RewardModel(other, chat.tokenizer)
    key = chat.key(("p", "a"))
    assert key == same.key(("p", "a")) == replace(chat, margin=1.0).key(("p", "a"))
    assert key != chat.key(("p", "b"))
    assert key != replace(chat, max_length=9).key(("p", "a"))
    with torch.no_grad():
        other.score.weight += 1
    assert key != RewardModel(other, chat.tokenizer).key(("p", "a"))


def test_what_is_not_finite_is_no_reward(chat):
    model = classifier()
    with torch.no_grad():
        model.score.weight.fill_(float("nan"))
    (reward,) = RewardModel(model, chat.tokenizer)(ANSWERED[:1])
    assert (reward.value, reward.reason) == (None, NOT_FINITE)


def test_a_checkpoint_is_loaded_by_its_path(chat, tmp_path):
    chat.model.save_pretrained(tmp_path)
    chat.tokenizer.save_pretrained(tmp_path)
    judge = RewardModel(str(tmp_path), device="cpu")
    assert judge.name == str(tmp_path)
    wanted = [reward.value for reward in chat(ANSWERED)]
    assert [reward.value for reward in judge(ANSWERED)] == pytest.approx(wanted, rel=ROUNDING, abs=1e-6)
    assert judge.key(("p", "a")) == RewardModel(str(tmp_path)).key(("p", "a"))


def test_what_is_no_reward_model(tmp_path):
    tokenizer = build_tokenizer()
    with pytest.raises(UserError, match=r"no reward model.*LlamaForCausalLM"):
        RewardModel(build_model(len(tokenizer)), tokenizer)(ANSWERED)
    with pytest.raises(UserError, match="1 label, and this is a LlamaForSequenceClassification with 3"):
        RewardModel(classifier(num_labels=3), tokenizer)(ANSWERED)
    build_model(len(tokenizer), num_labels=1).save_pretrained(tmp_path)  # its head would be random
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"lacks score\.weight, which would be random"):
        RewardModel(str(tmp_path), device="cpu")(ANSWERED)
    with pytest.raises(FileAccessError, match="nowhere"):
        RewardModel(str(tmp_path / "nowhere"), device="cpu")(ANSWERED)
    with pytest.raises(UserError, match="Pass the tokenizer too"):
        RewardModel(classifier())(ANSWERED)


@pytest.mark.parametrize("settings", [{"margin": -1.0}, {"margin": float("nan")}, {"max_length": 0}, {"batch_size": 0}])
def test_settings_that_cannot_be(settings):
    with pytest.raises(UserError, match="of a reward model must be"):
        RewardModel("m", **settings)
