"""Greedy answers in batches: those of one prompt and one token at a time, and no trace in the model."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import build_model, build_tokenizer
from tiny_runs import random_states
from transformers import GenerationConfig

from ifd_trainer.errors import UserError
from ifd_trainer.scoring.generation import Answer, greedy_answers, plain_generation, stop_tokens

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
