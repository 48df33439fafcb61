"""Answers to the prompts of rows: what is asked is what is scored and trained on, and every row has its status."""

from __future__ import annotations

import pytest
import torch
from conftest import build_tokenizer
from datasets import Dataset
from tiny_runs import TOKENIZER, model_with, random_states, raw_rows, sft_trainer, text_rows, weights_of
from tokenizers.processors import TemplateProcessing

from ifd_trainer.data.encoding import Encoder
from ifd_trainer.data.formats import ALPACA, MESSAGES, PROMPT_COMPLETION
from ifd_trainer.errors import UserError
from ifd_trainer.evaluation.answers import answers_to

ALPACA_ROWS = [
    {"instruction": "Name three colours.", "input": "", "output": "Red, green and blue."},
    {"instruction": "Add the numbers.", "input": "12 and 30", "output": "The sum is 42."},
]
CHATS = [
    {"messages": [{"role": "user", "content": "The cat?"}, {"role": "assistant", "content": "It sat."}]},
    {
        "messages": [
            {"role": "user", "content": "A dog?"},
            {"role": "assistant", "content": "It ran."},
            {"role": "user", "content": "Where?"},
            {"role": "assistant", "content": "In the park."},
        ]
    },
]
PAIRS = [{"prompt": "Add 1 and 2. Answer: ", "completion": "The sum is 3."}]


@pytest.fixture
def asked(model, monkeypatch):
    """Prompts and settings that `generate` was called with."""
    generate, calls = model.generate, []

    def noted(input_ids, attention_mask, generation_config):
        prompts = [ids[mask.bool()].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True)]
        calls.append((prompts, generation_config))
        return generate(input_ids=input_ids, attention_mask=attention_mask, generation_config=generation_config)

    monkeypatch.setattr(model, "generate", noted)
    return calls


@pytest.fixture
def saying(model, monkeypatch):
    """Let the model say the same to each prompt."""

    def say(ids: list[int]) -> None:
        def generate(input_ids, **options):
            return torch.cat([input_ids, torch.tensor([ids] * len(input_ids))], dim=1)

        monkeypatch.setattr(model, "generate", generate)

    return say


def with_specials(bos: bool, eos: bool):
    """A tokenizer that begins or ends every text with a special token."""
    tokenizer = build_tokenizer()
    template = f"{'<s> ' if bos else ''}$A{' <|im_end|>' if eos else ''}"
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "<|im_end|>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=special)
    return tokenizer


@pytest.mark.parametrize("add_eos", [False, True])
@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize(
    ("rows", "format"), [(ALPACA_ROWS, ALPACA), (CHATS, MESSAGES), (PAIRS, PROMPT_COMPLETION)], ids=lambda value: ""
)
def test_a_prompt_has_the_tokens_that_an_answer_is_scored_behind(model, asked, rows, format, add_bos, add_eos):
    tokenizer = with_specials(add_bos, add_eos)
    answers_to(model, tokenizer, Dataset.from_list(rows), format, max_new_tokens=2)
    pairs = Encoder(tokenizer)([format.render(row, tokenizer) for row in rows])
    scored = [pair.conditioned.ids[: pair.conditioned.start] for pair in pairs]
    assert sorted(prompt for prompts, _ in asked for prompt in prompts) == sorted(scored)
    assert all((prompt[0] == tokenizer.bos_token_id) == (add_bos and format is not MESSAGES) for prompt in scored)


def test_a_colon_that_merges_with_an_answers_quote_is_asked_whole(model, asked):
    tokenizer = build_tokenizer(extra=('### Response:"Yes."',) * 50)
    row = {"instruction": "Say yes.", "input": "", "output": '"Yes."'}
    example = ALPACA.render(row, tokenizer)
    pair = Encoder(tokenizer)([example])[0]
    whole = tokenizer(example.prompt).input_ids
    assert pair.conditioned.ids[: pair.conditioned.start] != whole  # they do merge
    answers_to(model, tokenizer, Dataset.from_list([row]), ALPACA, max_new_tokens=2)
    assert asked[0][0] == [whole]


def test_a_line_says_what_was_asked_and_said(model, tokenizer, saying):
    saying([*tokenizer(" It sat").input_ids, tokenizer.eos_token_id, 5])
    found = answers_to(model, tokenizer, Dataset.from_list(CHATS), "messages", max_new_tokens=9)
    assert found.to_dict("list") == {
        "document": ["0", "1"],
        "prompt": [
            "<|im_start|>user\nThe cat?<|im_end|>\n<|im_start|>assistant\n",
            "<|im_start|>user\nA dog?<|im_end|>\n<|im_start|>assistant\nIt ran.<|im_end|>\n"
            "<|im_start|>user\nWhere?<|im_end|>\n<|im_start|>assistant\n",
        ],
        "reference": ["It sat.", "In the park."],
        "answer": [" It sat", " It sat"],
        "answer_tokens": [len(tokenizer(" It sat").input_ids)] * 2,
        "cut_off": [False, False],
        "status": ["ok", "ok"],
    }


def test_an_answer_that_would_go_on_is_cut_off(model, tokenizer, saying):
    saying(tokenizer(" It sat").input_ids)
    assert answers_to(model, tokenizer, Dataset.from_list(CHATS), "messages", max_new_tokens=9).cut_off.all()


def test_an_answer_ends_with_the_turn_also_where_that_is_not_the_end_of_a_text(model, asked):
    tokenizer = build_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    model.generation_config.eos_token_id = model.config.eos_token_id = tokenizer.eos_token_id
    answers_to(model, tokenizer, Dataset.from_list(CHATS), "messages", max_new_tokens=2)
    answers_to(model, tokenizer, Dataset.from_list(ALPACA_ROWS), "alpaca", max_new_tokens=2)
    end, turn = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    assert [config.eos_token_id for _, config in asked] == [[end, turn], [end]]


def test_an_answer_ends_where_a_template_ends_a_turn_in_words(model, saying):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + ' [END]\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    saying(tokenizer("It ran. [END]\nuser: And").input_ids)
    found = answers_to(model, tokenizer, Dataset.from_list(CHATS[:1]), "messages", max_new_tokens=9)
    assert (found.answer[0].strip(), found.cut_off[0], found.reference[0]) == ("It ran.", False, "It sat.")


def test_rows_that_cannot_be_asked_or_compared_say_why(model, tokenizer):
    rows = [
        ALPACA_ROWS[0],
        {"instruction": "Say nothing.", "input": "", "output": " \n"},
        {"instruction": " ", "input": "", "output": "Red."},
        {"instruction": "the cat " * 400, "input": "", "output": "Red."},
        ALPACA_ROWS[1] | {"output": "word " * 900},  # longer than the window, which is no matter
    ]
    found = answers_to(model, tokenizer, Dataset.from_list(rows), "alpaca", max_new_tokens=3)
    assert found.status.tolist() == ["ok", "empty_answer", "empty_prompt", "prompt_too_long", "ok"]
    assert found.document.tolist() == ["0", "1", "2", "3", "4"]
    assert found.answer.notna().tolist() == [True, False, False, False, True]
    alone = answers_to(model, tokenizer, Dataset.from_list([rows[4]]), "alpaca", max_new_tokens=3)
    assert found.answer[4] == alone.answer[0]


def test_a_chat_that_cannot_be_read_is_malformed(model, tokenizer):
    unknown = {"messages": [{"role": "narrator", "content": "x"}, {"role": "assistant", "content": "y"}]}
    no_answer = {"messages": CHATS[0]["messages"][:1]}
    found = answers_to(model, tokenizer, Dataset.from_list([unknown, no_answer]), "messages", max_new_tokens=3)
    assert found.status.tolist() == ["malformed", "empty_answer"]
    assert found.prompt.tolist()[0] is None or found.prompt.isna()[0]


def test_a_prompt_may_fill_what_the_answer_leaves_of_the_window(model, tokenizer):
    row = {"prompt": "the cat sat", "completion": "on"}
    length = len(tokenizer(row["prompt"]).input_ids)
    window = model.config.max_position_embeddings
    for new, status in ((window - length, "ok"), (window - length + 1, "prompt_too_long")):
        model.generation_config.eos_token_id = list(range(len(tokenizer)))  # the answer ends at once
        found = answers_to(model, tokenizer, Dataset.from_list([row]), "prompt-completion", new)
        assert found.status.tolist() == [status]


def test_no_token_left_for_a_prompt_is_an_error(model, tokenizer):
    with pytest.raises(UserError, match="max_new_tokens=512 leaves no token of the model's window of 512"):
        answers_to(model, tokenizer, Dataset.from_list(ALPACA_ROWS), "alpaca", max_new_tokens=512)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_trainer_has_trained_the_model_that_answers(tmp_path, checkpointing):
    """The trainer's own model answers as one does that was given its weights, and the trainer goes on as it would."""
    raw = raw_rows(6)
    trainer = sft_trainer(
        tmp_path, text_rows(raw), num_train_epochs=1, gradient_checkpointing=checkpointing, packing=False
    )
    trainer.train()
    rows = Dataset.from_list(raw)
    before = [module.training for module in trainer.model.modules()], random_states()
    found = answers_to(trainer.model, trainer.processing_class, rows, "wizardlm", max_new_tokens=8)
    fresh = answers_to(model_with(weights_of(trainer.model)), TOKENIZER, rows, "wizardlm", max_new_tokens=8)
    assert found.to_dict("list") == fresh.to_dict("list")
    assert ([module.training for module in trainer.model.modules()], random_states()) == before
