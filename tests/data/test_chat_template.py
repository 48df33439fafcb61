"""Chats: which data of a row reaches a template, and that what a template adds is never an answer."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import trl
from conftest import CHAT_TEMPLATE, build_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken

from ifd_trainer.data.chat_template import Frame, chat_messages, common_prefix_length, template_frames, template_options
from ifd_trainer.data.distinct_prompts import Prompts
from ifd_trainer.data.encoding import Encoder, answer_span
from ifd_trainer.data.formats import (
    ALPACA,
    FORMATS,
    MESSAGES,
    PROMPT_COMPLETION,
    SHAREGPT,
    Example,
    MalformedRow,
    to_prompt_completion,
    to_training_row,
)
from ifd_trainer.data.response_header import response_prefix
from ifd_trainer.data.token_rows import TokenRows
from ifd_trainer.method.reasons import Status

TEMPLATES = {path.stem: path.read_text(encoding="utf-8") for path in Path(trl.__file__).parent.rglob("*.jinja")}
NO_SYSTEM = ("gemma", "gemma_training")
READ_PARTS = ("idefics3", "smolvlm", "llava_next")  # of models that see images: contents are lists of parts
_MARKUP = re.compile(r"<[|｜][^'\"<>\s{}]*[|｜]>|</?think>|<\w+_of_\w+>|\[/?INST\]|<turn\|>|<\|turn>|<\|?channel\|?>")


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def said(text: str, **more: str) -> dict:
    return {"role": "assistant", "content": text, **more}


def tokenizer_for(template: str, special: bool):
    """A tokenizer with the template's markup as added tokens, which are special ones or not."""
    tokenizer = build_tokenizer()
    markup = sorted(set(_MARKUP.findall(template)) - set(tokenizer.get_vocab()))
    tokenizer.add_tokens([AddedToken(text, special=special, normalized=False) for text in markup], special)
    tokenizer.chat_template = template
    return tokenizer


# Templates, and whether labels come from the marks that they make (assistant_only_loss).
TRAINED_ON = [
    (name, masked)
    for name in sorted(TEMPLATES)
    for masked in (False, True)
    if not name.startswith(READ_PARTS) and (not masked or re.search(r"{%-?\s*generation", TEMPLATES[name]))
]


# Chats, and what of their last turn is the row's own.
CHATS = {
    "one turn": ([user("What is it?"), said("It is blue.")], "It is blue."),
    "turns": ([user("Name one."), said("Red."), user("Another?"), said("Blue,\n\nor three.")], "Blue,\n\nor three."),
    "like markup": ([user("Name it."), said("<b>Red<b>")], "<b>Red<b>"),
    "empty": ([user("Name it."), said("")], Status.EMPTY_ANSWER),
    "blank": ([user("Name it."), said(" \n")], Status.EMPTY_ANSWER),
    "asks nothing": ([user(" "), said("Red.")], Status.EMPTY_PROMPT),
}


@pytest.mark.parametrize("special", [True, False], ids=["special", "added"])
@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_what_a_template_adds_is_not_the_answer(name, special):
    tokenizer = tokenizer_for(TEMPLATES[name], special)
    encoder = Encoder(tokenizer)
    for messages, expected in CHATS.values():
        example = MESSAGES.render({"messages": messages}, tokenizer)
        (pair,) = encoder([example])
        if isinstance(expected, Status):
            assert pair.status is expected
            continue
        whole = example.prompt + example.answer
        assert example.answer.removesuffix(example.end).strip() == expected
        assert example.header
        assert example.prompt.endswith(example.header)
        answer = tokenizer.decode(pair.conditioned.ids[pair.conditioned.start :])
        assert answer.strip() == expected  # a space may be one token with the answer's first word
        assert tokenizer.decode(pair.conditioned.ids) == whole[: whole.rindex(expected) + len(expected)]
        header = tokenizer.decode(pair.direct.ids[: pair.direct.start])
        assert (header + answer).removeprefix(tokenizer.bos_token).endswith(example.header + expected)


@pytest.mark.parametrize("special", [True, False], ids=["special", "added"])
@pytest.mark.parametrize(("name", "masked"), TRAINED_ON)
def test_the_transform_and_the_loop_read_the_same_tokens(name, masked, special):
    template = TEMPLATES[name]
    tokenizer = tokenizer_for(template, special)
    encoder = Encoder(tokenizer)
    chats = {kind: messages for kind, (messages, _) in CHATS.items()} | {
        "system": [{"role": "system", "content": "Be brief."}, user("Name it."), said("Red.")],
        "thought": [user("Name it."), said("Red.", reasoning_content="Hm, which one?")],
        "thought in text": [user("Name it."), said("<think>\nHm, which one?\n</think>\n\nRed.")],
    }
    rows = {}
    for kind, messages in chats.items():
        if kind != "system" or name not in NO_SYSTEM:
            rows[kind] = as_trained_on(tokenizer, messages, masked)
    prefix = response_prefix(tokenizer, Prompts.of(ids[:start] for ids, (start, _) in rows.values()))
    read = TokenRows(encoder, template if masked else None)
    for kind, (ids, (start, end)) in rows.items():
        example = MESSAGES.render({"messages": chats[kind]}, tokenizer)
        assert read.pair(ids, start, end, prefix) == encoder([example])[0], kind


def as_trained_on(tokenizer, messages: list[dict], masked: bool) -> tuple[list[int], tuple[int, int]]:
    """Token ids, and the span of the labels, as TRL makes them."""
    opened = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
    whole = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=masked)
    ids = whole["input_ids"]
    start = common_prefix_length(opened, ids)
    mask = whole["assistant_masks"] if masked else [0] * start + [1] * (len(ids) - start)
    return ids, answer_span([token if bit else -100 for token, bit in zip(ids, mask, strict=True)])


@pytest.mark.parametrize(
    ("name", "key", "header", "answer"),
    [
        ("qwen3", "reasoning_content", "<|im_start|>assistant\n<think>\n", "Hm.\n</think>\n\nRed."),
        ("gptoss", "thinking", "<|start|>assistant<|channel|>analysis<|message|>", "Hm.<|end|><|start|>assistant"),
        ("glm4moe", "reasoning_content", "<|assistant|>\n<think>", "Hm.</think>\nRed."),
        ("qwen2_5", "reasoning_content", "<|im_start|>assistant\n", "Red."),  # writes no thoughts
    ],
)
def test_thoughts_of_a_row_are_part_of_its_answer(name, key, header, answer):
    # each by the name that its template reads: older transformers do not look for the others
    row = {"messages": [user("Name it."), said("Red.", **{key: "Hm."})]}
    example = MESSAGES.render(row, tokenizer_for(TEMPLATES[name], special=False))
    assert example.header == header
    assert example.answer.startswith(answer)


def test_tool_calls_of_a_row_are_part_of_its_answer():
    call = {"type": "function", "function": {"name": "get", "arguments": {"city": "Rome"}}}
    row = {"messages": [user("Weather?"), {"role": "assistant", "content": None, "tool_calls": [call]}]}
    example = MESSAGES.render(row, tokenizer_for(TEMPLATES["qwen3"], special=False))
    assert example.header == "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert example.answer.removesuffix(example.end).startswith('<tool_call>\n{"name": "get", "arguments": {"city"')


def test_a_template_that_opens_turns_by_their_place_is_followed():
    template = (
        "{% for m in messages %}[{{ m.role }} {{ loop.index }}]{% if m.role == 'assistant' and loop.last %}"
        "<{{ messages | length }} turns>{% endif %}{{ m.content }}{{ '/end/' }}{% endfor %}"
    )
    tokenizer = tokenizer_for(template, special=False)
    row = {"messages": [user("a"), said("b"), user("c"), said("d.")]}
    example = MESSAGES.render(row, tokenizer)
    assert (example.header, example.answer, example.end) == ("[assistant 4]<4 turns>", "d./end/", "/end/")


def test_the_header_at_the_end_of_a_users_turn_is_one():
    template = (
        "{% for m in messages %}{{ '[INST] ' + m.content + ' [/INST]' if m.role == 'user' else m.content }}{% endfor %}"
    )
    tokenizer = tokenizer_for(template, special=False)
    example = MESSAGES.render({"messages": [user("a"), said("b.")]}, tokenizer)
    assert (example.prompt, example.header, example.answer) == ("[INST] a [/INST]", " [/INST]", "b.")
    assert template_frames(tokenizer)[0] == Frame(" [/INST]", "")


def test_the_header_at_the_end_of_a_users_turn_begins_behind_what_ends_that_turn():
    """As LLaMA-Factory writes a tokenizer's template anew."""
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>user\n{{ m.content }}<|im_end|>\n"
        "<|im_start|>assistant\n{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    )
    tokenizer = tokenizer_for(template, special=False)
    example = MESSAGES.render({"messages": [user("a"), said("b.")]}, tokenizer)
    assert (example.header, example.answer) == ("<|im_start|>assistant\n", "b.<|im_end|>\n")
    assert example.prompt == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    assert template_frames(tokenizer)[0] == Frame("<|im_start|>assistant\n", "<|im_end|>\n")


def test_a_direct_answer_has_bos_where_the_template_writes_it():
    tokenizer = tokenizer_for("{{ bos_token }}" + CHAT_TEMPLATE, special=False)
    (pair,) = Encoder(tokenizer)([MESSAGES.render({"messages": [user("a"), said("b.")]}, tokenizer)])
    assert tokenizer.decode(pair.direct.ids) == "<s><|im_start|>assistant\nb."


# ---- which data of a row is read ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("role", "known"),
    [
        *(
            (name, "assistant")
            for name in ("gpt", "bot", "model", "ai", "chatgpt", "bing", "Assistant", "function_call")
        ),
        *((name, "user") for name in ("human", "User", "user")),
        *((name, "tool") for name in ("tool", "observation", "function_response")),
        ("system", "system"),
    ],
)
@pytest.mark.parametrize("keys", [("from", "value"), ("role", "content")])
def test_roles_by_their_names(role, known, keys):
    assert chat_messages([{keys[0]: role, keys[1]: "x"}]) == [{"role": known, "content": "x"}]


@pytest.mark.parametrize("role", ["narrator", "", 5, ["human"], {"a": 1}, True])
@pytest.mark.parametrize("key", ["from", "role"])
def test_other_roles_are_malformed_and_named(role, key):
    with pytest.raises(MalformedRow, match=re.escape(f"message 0 has the unknown role {role!r}")):
        chat_messages([{key: role, "content": "x"}])


def test_parts_that_are_all_text_are_joined_and_others_named():
    parts = [{"type": "text", "text": "Name "}, {"type": "text", "text": "one."}]
    assert chat_messages([{"role": "user", "content": parts}]) == [user("Name one.")]
    with pytest.raises(MalformedRow, match="message 0 has a part of type 'image_url'; only text can be scored"):
        chat_messages([{"role": "user", "content": [*parts, {"type": "image_url", "image_url": "x"}]}])


@pytest.mark.parametrize("role", ["user", "system", "tool", "assistant"])
def test_a_message_without_content_is_malformed(role):
    with pytest.raises(MalformedRow, match=rf"message 1 \({role}\) has no content"):
        chat_messages([user("x"), {"role": role, "content": None}])


def test_numpy_arrays_of_messages_are_lists():
    row = {"messages": np.array([user("What?"), said("Red.")], dtype=object), "tools": np.array([], dtype=object)}
    tokenizer = build_tokenizer()
    assert MESSAGES.render(row, tokenizer) == MESSAGES.render({"messages": [user("What?"), said("Red.")]}, tokenizer)


@pytest.mark.parametrize("nothing", [None, "", " ", {}, "{}", float("nan"), {"enable_thinking": None}])
def test_no_variables(nothing):
    assert template_options({"chat_template_kwargs": nothing}) == {"tools": None}


@pytest.mark.parametrize("given", [{"enable_thinking": False, "own": [1]}, '{"enable_thinking": false, "own": [1]}'])
def test_variables_of_a_template_are_taken(given):
    assert template_options({"chat_template_kwargs": given}) == {"tools": None, "enable_thinking": False, "own": [1]}


@pytest.mark.parametrize(
    "name",
    [
        *("tokenize", "chat_template", "continue_final_message", "return_dict", "add_generation_prompt", "messages"),
        *("tools", "documents", "max_length", "tokenizer_kwargs", "eos_token", "conversation"),
    ],
)
def test_a_row_does_not_say_how_the_template_is_applied(name):
    with pytest.raises(MalformedRow, match=f"'chat_template_kwargs' sets {name}, which is not for a row to say"):
        template_options({"chat_template_kwargs": {"enable_thinking": True, name: "x"}}, build_tokenizer())


@pytest.mark.parametrize("given", [5, "text", "[1]", [1], True, '{"a":'])
def test_variables_that_are_none_are_malformed(given):
    with pytest.raises(MalformedRow, match="'chat_template_kwargs'"):
        template_options({"chat_template_kwargs": given})


@pytest.mark.parametrize("given", [5, "5", "text", {"name": "get"}, ["get"], "[" * 5000])
def test_tools_that_are_none_are_malformed(given):
    with pytest.raises(MalformedRow, match="'tools'"):
        template_options({"tools": given})


texts = st.sampled_from(["", " ", "x", "Red.", "<think>", "</think>", "{{ x }}", "\ud800", "IFDx7answer"]) | st.text(
    max_size=5
)
keys = st.sampled_from(["role", "from", "content", "value", "type", "text", "tools", "tool_calls", "reasoning_content"])
values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats() | texts | st.sampled_from(["user", "gpt", "[]", "{}"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys | texts, inner, max_size=3),
    max_leaves=8,
)
roles = st.sampled_from(["user", "assistant", "system", "human", "gpt", "tool", "narrator"]) | values
turns = st.lists(
    st.fixed_dictionaries({"role": roles, "content": texts | values}, optional={"tool_calls": values})
    | st.fixed_dictionaries({"from": roles, "value": texts | values}),
    max_size=4,
)
cells = values | turns | texts
columns = ("messages", "conversations", "prompt", "completion", "instruction", "input", "output")
any_row = st.fixed_dictionaries(
    dict.fromkeys(columns, cells),
    optional={"tools": values, "chat_template_kwargs": values | st.just({"tokenize": True})},
)
TOKENIZERS = [tokenizer_for(TEMPLATES.get(name, CHAT_TEMPLATE), False) for name in ("own", "qwen3", "gemma", "smolvlm")]


@given(row=any_row, format=st.sampled_from(sorted(FORMATS)), tokenizer=st.sampled_from(TOKENIZERS))
def test_any_row_is_rendered_or_malformed(row, format, tokenizer):
    try:
        example = FORMATS[format].render(row, tokenizer)
    except MalformedRow:
        return
    assert isinstance(example, Example)
    assert example.answer.endswith(example.end)
    Encoder(tokenizer)([example])


@given(row=any_row, format=st.sampled_from(sorted(FORMATS)), tokenizer=st.sampled_from([None, *TOKENIZERS]))
def test_any_row_can_be_trained_on_or_is_malformed(row, format, tokenizer):
    try:
        found = to_training_row(row, FORMATS[format], tokenizer)
    except MalformedRow:
        return
    kind = list if isinstance(found["prompt"], list) else str
    assert isinstance(found["prompt"], kind)
    assert isinstance(found["completion"], kind)
    json.dumps(found)


def test_a_row_without_a_column_is_malformed():
    for format in (ALPACA, MESSAGES, SHAREGPT, PROMPT_COMPLETION):
        with pytest.raises(MalformedRow, match="the row has no"):
            format.render({}, build_tokenizer())


def test_rows_that_trl_takes_have_no_nulls():
    format = PROMPT_COMPLETION
    assert to_prompt_completion({"prompt": None, "completion": 5}, format) == {"prompt": "", "completion": "5"}
    row = {"prompt": [user("a")], "completion": [said("b")], "tools": "", "chat_template_kwargs": {"x": None}}
    assert to_training_row(row, format) | {"tools": "null", "chat_template_kwargs": {}} == to_training_row(row, format)
    for broken, problem in (({"completion": []}, "no assistant turn"), ({"prompt": []}, "no message stands before it")):
        with pytest.raises(MalformedRow, match=problem):
            to_training_row(row | broken, format)
