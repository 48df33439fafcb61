"""Answers in batches, greedy and sampled: those of one prompt and one token at a time, and no trace in the model."""

from __future__ import annotations

import copy
import hashlib
import struct

import numpy as np
import pytest
import torch
from conftest import build_model, build_tokenizer
from tiny_runs import random_states
from transformers import GenerationConfig

from ifd_trainer.errors import UserError
from ifd_trainer.scoring.generation import (
    Answer,
    draws,
    greedy_answers,
    plain_generation,
    sampled_answers,
    sampled_tokens,
    stop_tokens,
)

TEXTS = [
    "### Instruction:\nName three colours.\n\n### Response:",
    "The cat",
    "### Instruction:\nAdd the numbers.\n\n### Input:\n12 and 30\n\n### Response:",
    "He said:",
    "Below is an instruction that describes a task.",
]
NEW = 12


@pytest.fixture
def prompts(tokenizer) -> list[list[int]]:
    return tokenizer(TEXTS).input_ids


def followed(model, ids: list[int], new: int, stop: set[int]) -> list[int]:
    """The most likely token, one at a time, from all logits: no batch, no cache, no `generate`."""
    said = []
    with torch.no_grad():
        while len(said) < new:
            token = int(model(torch.tensor([[*ids, *said]]), use_cache=False).logits[0, -1].argmax())
            if token in stop:
                return said
            said.append(token)
    return said


@pytest.fixture
def expected(model, tokenizer, prompts) -> list[list[int]]:
    return [followed(model, ids, NEW, set()) for ids in prompts]


def texts(tokenizer, said: list[list[int]]) -> list[str]:
    return [tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) for ids in said]


@pytest.mark.parametrize("token_budget", [1, 60, 10_000])
def test_answers_are_those_of_one_prompt_and_one_token_at_a_time(model, tokenizer, prompts, expected, token_budget):
    found = greedy_answers(model, tokenizer, prompts, NEW, stop=(), token_budget=token_budget)
    assert [answer.text for answer in found] == texts(tokenizer, expected)
    assert all(answer.cut_off and answer.tokens == NEW for answer in found)


def test_an_answer_ends_before_the_first_token_that_ends_a_turn(model, tokenizer, prompts, expected):
    stop = {expected[0][3], expected[2][0]}
    found = greedy_answers(model, tokenizer, prompts, NEW, stop)
    said = [followed(model, ids, NEW, stop) for ids in prompts]
    assert said[2] == []
    assert [answer.text for answer in found] == texts(tokenizer, said)
    assert [answer.tokens for answer in found] == list(map(len, said))
    assert [answer.cut_off for answer in found] == [len(ids) == NEW for ids in said]
    assert not found[0].cut_off


def test_the_tokens_that_end_a_turn_are_those_of_tokenizer_and_model(tokenizer):
    model = build_model(len(tokenizer))
    assert (tokenizer.eos_token_id, model.config.eos_token_id) == (2, 2)
    assert stop_tokens(model, tokenizer) == {2}
    model.generation_config.eos_token_id = [5, 7]
    assert stop_tokens(model, tokenizer) == {2, 5, 7}


def test_by_default_an_answer_ends_there(model, tokenizer, prompts, expected):
    model.generation_config.eos_token_id = [expected[1][2]]
    assert greedy_answers(model, tokenizer, prompts, NEW)[1] == Answer(
        *texts(tokenizer, [followed(model, prompts[1], NEW, {2, expected[1][2]})]), tokens=2, cut_off=False
    )


OWN = {
    "do_sample": True,
    "temperature": 5.0,
    "top_p": 0.5,
    "top_k": 7,
    "num_beams": 3,
    "repetition_penalty": 4.0,
    "no_repeat_ngram_size": 1,
    "length_penalty": 3.0,
    "min_new_tokens": NEW - 1,
    "max_length": 3,
    "suppress_tokens": [5],
    "stop_strings": [" "],
    "cache_implementation": "static",
}


def test_the_models_own_settings_neither_count_nor_warn(model, tokenizer, prompts, expected, capfd):
    own = model.generation_config = GenerationConfig(**OWN, eos_token_id=2, pad_token_id=0)
    before = copy.deepcopy(own)
    found = greedy_answers(model, tokenizer, prompts, NEW, stop=())
    assert [answer.text for answer in found] == texts(tokenizer, expected)
    assert model.generation_config is own
    assert own.to_dict() == before.to_dict()
    assert capfd.readouterr() == ("", "")


def test_they_are_back_after_an_error(model):
    own = model.generation_config
    borrowed = plain_generation(model, max_new_tokens=3)
    borrowed.__enter__()
    assert (model.generation_config.max_new_tokens, model.generation_config.eos_token_id) == (3, own.eos_token_id)
    assert not borrowed.__exit__(RuntimeError, RuntimeError("stopped"), None)
    assert model.generation_config is own


def test_an_adapter_answers_with_its_weights_and_leaves_no_settings_behind(tokenizer, prompts):
    peft = pytest.importorskip("peft")
    base = build_model(len(tokenizer))
    own = base.generation_config = GenerationConfig(**OWN, eos_token_id=2, pad_token_id=0)
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    found = greedy_answers(model, tokenizer, prompts, NEW, stop=())
    assert [answer.text for answer in found] == texts(tokenizer, [followed(model, ids, NEW, set()) for ids in prompts])
    assert base.generation_config is own
    assert model.generation_config is own


def test_all_is_given_back(tokenizer, prompts, expected):
    model = build_model(len(tokenizer), attention_dropout=0.5).train()
    model.gradient_checkpointing_enable()
    model.config.use_cache = False
    model.model.layers[0].eval()
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = "right"
    modes = [module.training for module in model.modules()]
    states = random_states()
    found = greedy_answers(model, tokenizer, prompts, NEW, stop=())
    assert [answer.text for answer in found] == texts(tokenizer, expected)
    assert [module.training for module in model.modules()] == modes
    assert random_states() == states
    assert (model.config.use_cache, tokenizer.padding_side) == (False, "right")
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.is_gradient_checkpointing


def test_a_batch_that_does_not_fit_is_done_in_halves(model, tokenizer, prompts, expected, monkeypatch):
    generate, sizes = model.generate, []

    def small(input_ids, **options):
        sizes.append(len(input_ids))
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError("no room")
        return generate(input_ids=input_ids, **options)

    monkeypatch.setattr(model, "generate", small)
    found = greedy_answers(model, tokenizer, prompts, NEW, stop=())
    assert [answer.text for answer in found] == texts(tokenizer, expected)
    assert sizes == [5, 2, 3, 1, 2]


def test_one_that_does_not_fit_alone_is_an_error(model, tokenizer, prompts, monkeypatch):
    def never(**options):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(model, "generate", never)
    with pytest.raises(torch.OutOfMemoryError):
        greedy_answers(model, tokenizer, prompts, NEW)


def test_prompts_for_which_a_model_has_other_frequencies_are_asked_apart(tokenizer, prompts):
    """Some begin within the length of the first training and end behind it, others are behind it at once."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [1.0, 2.0, 4.0, 8.0],
        "original_max_position_embeddings": 16,
    }
    model = build_model(len(tokenizer), rope_parameters=rope)
    alone = [greedy_answers(model, tokenizer, [ids], NEW, stop=())[0] for ids in prompts]
    assert greedy_answers(model, tokenizer, prompts, NEW, stop=()) == alone
    assert min(map(len, prompts)) + NEW <= 16 < max(map(len, prompts))


def test_a_tokenizer_without_a_pad_token_will_do(model, prompts, expected):
    tokenizer = build_tokenizer()
    tokenizer.pad_token = None
    found = greedy_answers(model, tokenizer, prompts, NEW, stop=())
    assert [answer.text for answer in found] == texts(tokenizer, expected)
    assert tokenizer.pad_token is None


def test_no_prompts_have_no_answers(model, tokenizer):
    assert greedy_answers(model, tokenizer, [], NEW) == []


@pytest.mark.parametrize("wrong", [{"max_new_tokens": 0}, {"max_new_tokens": 1, "token_budget": 0}])
def test_numbers_below_one_are_errors(model, tokenizer, wrong):
    with pytest.raises(UserError, match="must be a whole number of at least 1"):
        greedy_answers(model, tokenizer, [[1]], **wrong)


# ---- sampled ------------------------------------------------------------------------------------------------------

SAMPLES = 3


def sampled_by_hand(model, ids, sample, new, stop, temperature=1.0, top_p=1.0, seed=0) -> list[int]:
    """One sample, one token at a time, from all logits: no batch, no cache, no `generate`."""
    words = struct.unpack("<4I", hashlib.blake2b(struct.pack(f"<{len(ids)}q", *ids), digest_size=16).digest())
    numbers = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, *words, sample])))
    said = []
    with torch.no_grad():
        while len(said) < new:
            logits = model(torch.tensor([[*ids, *said]]), use_cache=False).logits[0, -1].double().numpy() / temperature
            likely = np.exp(logits - logits.max())
            likely /= likely.sum()
            order = sorted(range(len(likely)), key=lambda token: -likely[token])
            mass, kept = 0.0, set()
            for token in order:
                if mass >= top_p:
                    break
                kept.add(token)
                mass += likely[token]
            reached, summed = numbers.random() * sum(likely[token] for token in kept), 0.0
            for token in sorted(kept):
                summed += likely[token]
                if summed > reached:
                    break
            if token in stop:
                return said
            said.append(token)
    return said


@pytest.mark.parametrize(("temperature", "top_p", "seed"), [(1.0, 1.0, 0), (0.5, 1.0, 7), (2.0, 0.6, 0)])
@pytest.mark.parametrize("token_budget", [1, 100, 10_000])
def test_samples_are_those_of_one_prompt_and_one_token_at_a_time(
    model, tokenizer, prompts, temperature, top_p, seed, token_budget
):
    how = {"temperature": temperature, "top_p": top_p, "seed": seed}
    found = sampled_answers(model, tokenizer, prompts, SAMPLES, NEW, **how, stop=(), token_budget=token_budget)
    for ids, answers in zip(prompts, found, strict=True):
        by_hand = [sampled_by_hand(model, ids, sample, NEW, set(), **how) for sample in range(SAMPLES)]
        assert [answer.text for answer in answers] == texts(tokenizer, by_hand)
        assert all(answer.cut_off and answer.tokens == NEW for answer in answers)
    assert len({answer.text for answers in found for answer in answers}) == len(prompts) * SAMPLES


def test_a_sample_ends_where_its_turn_does_and_the_others_go_on(model, tokenizer, prompts):
    by_hand = [[sampled_by_hand(model, ids, sample, NEW, set()) for sample in range(SAMPLES)] for ids in prompts]
    stop = {by_hand[0][1][4], by_hand[3][0][0]}
    found = sampled_answers(model, tokenizer, prompts, SAMPLES, NEW, stop=stop)
    ended = [[sampled_by_hand(model, ids, sample, NEW, stop) for sample in range(SAMPLES)] for ids in prompts]
    assert [[answer.tokens for answer in answers] for answers in found] == [list(map(len, each)) for each in ended]
    assert [answer.text for answers in found for answer in answers] == texts(
        tokenizer, [ids for each in ended for ids in each]
    )
    assert found[3][0] == Answer("", 0, cut_off=False)
    assert not found[0][1].cut_off
    assert any(answer.cut_off for answers in found for answer in answers)


def test_neither_other_prompts_nor_their_order_nor_more_samples_change_a_sample(model, tokenizer, prompts):
    found = sampled_answers(model, tokenizer, prompts, SAMPLES, NEW, seed=5)
    assert sampled_answers(model, tokenizer, prompts[::-1], SAMPLES, NEW, seed=5) == found[::-1]
    assert [sampled_answers(model, tokenizer, [ids], SAMPLES, NEW, seed=5)[0] for ids in prompts] == found
    more = sampled_answers(model, tokenizer, prompts, SAMPLES + 2, NEW, seed=5)
    assert [answers[:SAMPLES] for answers in more] == found
    assert sampled_answers(model, tokenizer, [prompts[0]] * 2, SAMPLES, NEW, seed=5) == [found[0]] * 2
    assert sampled_answers(model, tokenizer, prompts, SAMPLES, NEW, seed=6) != found


def test_with_more_tokens_a_sample_begins_with_the_same_ones(model, tokenizer, prompts):
    short = sampled_answers(model, tokenizer, prompts, 1, 4, stop=())
    long = sampled_answers(model, tokenizer, prompts, 1, NEW, stop=())
    by_hand = [sampled_by_hand(model, ids, 0, NEW, set()) for ids in prompts]
    assert [answer.text for [answer] in short] == texts(tokenizer, [ids[:4] for ids in by_hand])
    assert [answer.text for [answer] in long] == texts(tokenizer, by_hand)
    assert [answer.tokens for [answer] in long] == [NEW] * len(prompts)


def test_the_global_random_state_neither_counts_nor_changes(tokenizer, prompts):
    model = build_model(len(tokenizer), attention_dropout=0.5).train()
    model.config.use_cache = False
    own = model.generation_config = GenerationConfig(**OWN, eos_token_id=2, pad_token_id=0)
    before = copy.deepcopy(own)
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        states = random_states()
        found.append(sampled_answers(model, tokenizer, prompts, SAMPLES, NEW))
        assert random_states() == states
    assert found[0] == found[1]
    assert all(module.training for module in model.modules())
    assert not model.config.use_cache
    assert model.generation_config is own
    assert own.to_dict() == before.to_dict()


def test_samples_that_do_not_fit_are_done_in_halves(model, tokenizer, prompts, monkeypatch):
    found = sampled_answers(model, tokenizer, prompts, SAMPLES, NEW)
    generate, done = model.generate, []

    def small(input_ids, **options):
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError("no room")
        return generate(input_ids=input_ids, **options)

    monkeypatch.setattr(model, "generate", small)
    assert sampled_answers(model, tokenizer, prompts, SAMPLES, NEW, progress=done.append) == found
    assert sum(done) == SAMPLES * sum(len(ids) + NEW for ids in prompts)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_gives_the_same_samples_in_the_same_batches(tokenizer, prompts, dtype):
    model = build_model(len(tokenizer)).to(dtype)
    found = sampled_answers(model, tokenizer, prompts, SAMPLES, NEW, stop=())
    assert sampled_answers(model, tokenizer, prompts, SAMPLES, NEW, stop=()) == found
    assert all(answer.tokens == NEW for answers in found for answer in answers)
    assert len({answer.text for answers in found for answer in answers}) > len(prompts)


def test_a_model_that_gives_no_probabilities_has_no_sample(model, tokenizer, prompts):
    found = sampled_answers(model, tokenizer, prompts, SAMPLES, NEW)
    marked = prompts[1][-1]  # a token of this prompt alone
    assert all(marked not in ids for i, ids in enumerate(prompts) if i != 1)
    with torch.no_grad():
        model.model.embed_tokens.weight[marked] = torch.nan
    again = sampled_answers(model, tokenizer, prompts, SAMPLES, NEW)
    assert again[1] == [None] * SAMPLES
    kept = [i for i, answers in enumerate(again) if None not in answers]
    assert len(kept) >= 2
    assert [again[i] for i in kept] == [found[i] for i in kept]


def test_numbers_choose_tokens_in_proportion_to_their_probabilities():
    likely = torch.tensor([0.5, 0.0, 0.3, 0.2])
    numbers = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    logits = likely.log().expand(1000, -1)
    assert sampled_tokens(logits, numbers).bincount(minlength=4).tolist() == [500, 0, 300, 200]
    assert sampled_tokens(logits, numbers, top_p=0.6).bincount(minlength=4).tolist() == [625, 0, 375, 0]
    assert sampled_tokens(logits, numbers, top_p=0.5).unique().tolist() == [0]
    hot = (likely**0.5 / (likely**0.5).sum() * 1000).tolist()
    assert sampled_tokens(logits, numbers, temperature=2.0).bincount(minlength=4).tolist() == pytest.approx(hot, abs=1)


@pytest.mark.parametrize("number", [0.0, 1 - 2**-53, 1.0])
def test_the_ends_of_the_range_choose_a_token_that_has_a_probability(number):
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]])
    assert sampled_tokens(logits, torch.tensor([number], dtype=torch.float64)).item() == (1 if number == 0 else 2)


def test_draws_are_numbers_of_their_own_for_prompt_sample_and_seed():
    of = {
        (len(prompt), sample, seed): draws(prompt, sample, 50, seed)
        for prompt in ([1], [1, 2])
        for sample in range(2)
        for seed in range(2)
    }
    assert len({tuple(numbers) for numbers in of.values()}) == 8
    assert all(((numbers >= 0) & (numbers < 1)).all() for numbers in of.values())
    np.testing.assert_array_equal(draws([1, 2], 1, 5, 1), of[2, 1, 1][:5])
    np.testing.assert_array_equal(draws(np.array([1, 2], dtype=np.int32), 1, 50, 1), of[2, 1, 1])


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"samples": 0}, "samples must be a whole number of at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number of at least 1"),
        ({"temperature": 0}, "temperature must be a number above 0, got 0: at 0 all samples would be the same"),
        ({"temperature": float("nan")}, "temperature must be a number above 0"),
        ({"temperature": float("inf")}, "temperature must be a number above 0"),
        ({"top_p": 0}, "top_p must be a number above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p must be a number above 0 and at most 1"),
        ({"seed": -1}, "seed must be a whole number of at least 0"),
        ({"seed": 1.0}, "seed must be a whole number of at least 0"),
    ],
)
def test_what_nothing_can_be_sampled_with_is_told(model, tokenizer, wrong, words):
    with pytest.raises(UserError, match=words):
        sampled_answers(model, tokenizer, [[1]], **{"samples": 1, "max_new_tokens": 1, **wrong})


def test_no_prompts_have_no_samples(model, tokenizer):
    assert sampled_answers(model, tokenizer, [], 2, NEW) == []
