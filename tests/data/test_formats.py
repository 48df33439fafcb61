"""Rows to prompt, answer and header: every format against texts written out by hand."""

from __future__ import annotations

import json

import pytest
from conftest import CHAT_TEMPLATE, build_tokenizer

from ifd_trainer.data.format_choice import FormatOptions, format_record, recorded_format, resolve_format
from ifd_trainer.data.formats import (
    ALPACA,
    FORMATS,
    MESSAGES,
    PROMPT_COMPLETION,
    SHAREGPT,
    SUPERFILTERING,
    WIZARDLM,
    ChatFormat,
    MalformedRow,
    PromptCompletionFormat,
    TemplateFormat,
    text_of,
    to_prompt_completion,
)

USER = {"role": "user", "content": "Name a colour."}
ASSISTANT = {"role": "assistant", "content": "Red."}
CHAT_PROMPT = "<|im_start|>user\nName a colour.<|im_end|>\n<|im_start|>assistant\n"
CHAT_ANSWER = "Red.<|im_end|>\n"
NAN = float("nan")

TOOL_TEMPLATE = "{% if tools %}TOOLS {{ tools | length }}:{{ tools[0]['name'] }}\n{% endif %}" + CHAT_TEMPLATE
THINKING_TEMPLATE = (
    "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]<think>' if thinking else '[assistant]' }}{% endif %}"
)


def with_template(template: str | None):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


# ---- text formats -----------------------------------------------------------------------------------------------


def test_alpaca_prompt_without_input():
    example = ALPACA.render({"instruction": "Name a colour.", "input": "", "output": "Red."})
    assert example.prompt == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nName a colour.\n\n### Response:"
    )
    assert (example.answer, example.header, example.special_tokens) == ("Red.", "### Response:", True)


def test_alpaca_prompt_with_input():
    example = ALPACA.render({"instruction": "Add them.", "input": "12 and 30", "output": "42"})
    assert example.prompt == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request."
        "\n\n### Instruction:\nAdd them.\n\n### Input:\n12 and 30\n\n### Response:"
    )


def test_wizardlm_prompts():
    assert WIZARDLM.render({"instruction": "Add.", "output": "4"}).prompt == "Add.\n\n### Response:"
    with_input = WIZARDLM.render({"instruction": "Add.", "input": "2, 2", "output": "4"})
    assert with_input.prompt == "Add.\nInput:2, 2\n\n### Response:"


def test_superfiltering_prompts_are_bare():
    example = SUPERFILTERING.render({"instruction": "Add.", "input": "2, 2", "output": "4"})
    assert (example.prompt, example.header) == ("Add.\n2, 2\n", "")
    assert SUPERFILTERING.render({"instruction": "Add.", "input": "", "output": "4"}).prompt == "Add.\n"


def test_cherry_program_counts_the_bare_instruction_of_wizardlm_rows_and_the_whole_alpaca_prompt():
    row = {"instruction": "Add.", "output": "4"}
    assert WIZARDLM.render(row).counted == "Add."
    assert ALPACA.render(row).counted is None


@pytest.mark.parametrize("nothing", [None, NAN, ""])
def test_no_input_is_no_input(nothing):
    row = {"instruction": "Name a colour.", "output": "Red."}
    assert ALPACA.render(row | {"input": nothing}) == ALPACA.render(row)


@pytest.mark.parametrize("nothing", [None, NAN])
def test_missing_output_is_an_empty_answer(nothing):
    assert ALPACA.render({"instruction": "Name a colour.", "output": nothing}).answer == ""


@pytest.mark.parametrize(("value", "text"), [(42, "42"), (0.5, "0.5"), (None, ""), (NAN, ""), ("x", "x")])
def test_text_of_a_cell(value, text):
    assert text_of(value) == text


@pytest.mark.parametrize("value", [["a"], {"a": 1}, b"a"])
def test_text_of_refuses_what_is_not_text(value):
    with pytest.raises(MalformedRow, match=f"expected text, got {type(value).__name__}"):
        text_of(value)


def test_braces_of_a_row_are_not_template_fields():
    row = {"instruction": "Fill {input} and {0} in {instruction}", "input": "{instruction}{input}", "output": "{x}"}
    prompt = ALPACA.render(row).prompt
    assert "### Instruction:\nFill {input} and {0} in {instruction}\n\n" in prompt
    assert "### Input:\n{instruction}{input}\n\n" in prompt


def test_template_format_reads_columns_of_other_names():
    format = TemplateFormat("qa", "Q: {instruction}\nA:", "Q: {instruction} ({input})\nA:", "A:", "q", "context", "a")
    assert format.columns == ("q", "a")
    example = format.render({"q": "Why?", "context": "sky", "a": "Because."})
    assert (example.prompt, example.answer, example.header) == ("Q: Why? (sky)\nA:", "Because.", "A:")


@pytest.mark.parametrize(
    ("prompt", "with_input", "wrong"),
    [
        ("Q: {q}\nA:", "Q: {instruction} {input}\nA:", r"prompt='Q: {q}.* lacks {instruction} and has {q}"),
        ("Q:", "Q: {instruction} {input}", "prompt='Q:' lacks {instruction}"),
        ("{instruction}", "{instruction} {context}", "prompt_with_input=.* lacks {input} and has {context}"),
        ("{instruction}", "{input}", "prompt_with_input='{input}' lacks {instruction}"),
        ("{instruction} {output}", "{instruction} {input}", "has {output}"),
    ],
)
def test_a_template_needs_its_placeholders_and_no_others(prompt, with_input, wrong):
    with pytest.raises(ValueError, match=wrong.replace("{", r"\{")) as caught:
        TemplateFormat("qa", prompt, with_input, instruction="q", input="context", output="a")
    assert "Write {instruction} for the instruction" in str(caught.value)


def test_other_braces_of_a_template_are_text():
    text = 'Answer {instruction} as {"a": {}} or {answer} in \\boxed{answer}.'
    found = TemplateFormat("json", text, text + "{input}").render({"instruction": "x", "output": ""})
    assert found.prompt == 'Answer x as {"a": {}} or {answer} in \\boxed{answer}.'


def test_one_template_for_rows_that_have_no_input():
    format = TemplateFormat("qa", "{instruction} A:", "{instruction} A:")
    assert format.render({"instruction": "Why?", "output": "So."}).prompt == "Why? A:"


def test_prompt_completion_texts(tokenizer):
    example = PROMPT_COMPLETION.render({"prompt": "The cat", "completion": " sat."}, tokenizer)
    assert (example.prompt, example.answer, example.header) == ("The cat", " sat.", "")
    assert example.special_tokens


# ---- chats ------------------------------------------------------------------------------------------------------


def test_prompt_completion_messages(tokenizer):
    example = PROMPT_COMPLETION.render({"prompt": [USER], "completion": [ASSISTANT]}, tokenizer)
    assert (example.prompt, example.answer) == (CHAT_PROMPT, CHAT_ANSWER)
    assert example.header == "<|im_start|>assistant\n"
    assert not example.special_tokens


@pytest.mark.parametrize("missing", [None, []])
def test_prompt_messages_without_completion_have_an_empty_answer(tokenizer, missing):
    example = PROMPT_COMPLETION.render({"prompt": [USER], "completion": missing}, tokenizer)
    assert example.answer == ""


def test_messages_answer_is_the_last_assistant_turn(tokenizer):
    turns = [{"role": "system", "content": "Be brief."}, USER, ASSISTANT, {"role": "user", "content": "Another."}]
    answer = {"role": "assistant", "content": "Blue."}
    example = MESSAGES.render({"messages": [*turns, answer]}, tokenizer)
    assert example.prompt == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nName a colour.<|im_end|>\n"
        "<|im_start|>assistant\nRed.<|im_end|>\n<|im_start|>user\nAnother.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert example.answer == "Blue.<|im_end|>\n"


def test_turns_after_the_last_assistant_turn_do_not_count(tokenizer):
    later = {"role": "user", "content": "Thanks."}
    alone = MESSAGES.render({"messages": [USER, ASSISTANT]}, tokenizer)
    assert MESSAGES.render({"messages": [USER, ASSISTANT, later]}, tokenizer) == alone


@pytest.mark.parametrize("turns", [[], [USER]])
def test_a_chat_without_an_assistant_turn_has_an_empty_answer(tokenizer, turns):
    assert MESSAGES.render({"messages": turns}, tokenizer).answer == ""


def test_sharegpt_roles(tokenizer):
    turns = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "Weather?"},
        {"from": "function_call", "value": "get()"},
        {"from": "observation", "value": "sun"},
        {"from": "gpt", "value": "Sunny."},
    ]
    example = SHAREGPT.render({"conversations": turns}, tokenizer)
    assert example.prompt == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWeather?<|im_end|>\n"
        "<|im_start|>assistant\nget()<|im_end|>\n<|im_start|>tool\nsun<|im_end|>\n<|im_start|>assistant\n"
    )
    assert example.answer == "Sunny.<|im_end|>\n"


@pytest.mark.parametrize(
    ("format", "row"),
    [
        (MESSAGES, {"messages": [USER | {"tool_calls": None}, ASSISTANT]}),
        (PROMPT_COMPLETION, {"prompt": [USER | {"tool_calls": None}], "completion": [ASSISTANT | {"name": None}]}),
    ],
)
def test_fields_that_arrow_filled_with_null_do_not_reach_the_template(format, row):
    tokenizer = with_template("{% for m in messages %}{{ m.keys() | list | join(',') }}: {{ m.content }};{% endfor %}")
    example = format.render(row, tokenizer)
    assert example.prompt + example.answer == "role,content: Name a colour.;role,content: Red.;"


@pytest.mark.parametrize("tools", [[{"name": "get"}], json.dumps([{"name": "get"}])])
def test_tools_reach_the_template_as_a_list_or_as_json(tools):
    example = MESSAGES.render({"messages": [USER, ASSISTANT], "tools": tools}, with_template(TOOL_TEMPLATE))
    assert example.prompt == "TOOLS 1:get\n" + CHAT_PROMPT


@pytest.mark.parametrize("tools", [None, "", []])
def test_no_tools_are_no_tools(tools):
    example = MESSAGES.render({"messages": [USER, ASSISTANT], "tools": tools}, with_template(TOOL_TEMPLATE))
    assert example.prompt == CHAT_PROMPT


def test_chat_template_kwargs_of_a_row_reach_the_template():
    tokenizer = with_template(THINKING_TEMPLATE)
    row = {"messages": [USER, {"role": "assistant", "content": "<think>Hm</think>Red."}]}
    assert MESSAGES.render(row, tokenizer).prompt == "[user]Name a colour.[assistant]"
    thinking = MESSAGES.render(row | {"chat_template_kwargs": {"thinking": True}}, tokenizer)
    assert thinking.prompt == "[user]Name a colour.[assistant]<think>"
    assert thinking.answer == "Hm</think>Red."


def test_the_answer_begins_where_an_open_and_a_finished_turn_part():
    row = {"messages": [USER, ASSISTANT], "chat_template_kwargs": {"thinking": True}}
    example = MESSAGES.render(row, with_template(THINKING_TEMPLATE))
    assert (example.prompt, example.answer) == ("[user]Name a colour.[assistant]", "Red.")


def test_without_a_generation_prompt_the_header_is_what_the_finished_turn_begins_with():
    tokenizer = with_template("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}")
    example = MESSAGES.render({"messages": [USER, ASSISTANT]}, tokenizer)
    assert (example.prompt, example.header) == ("user: Name a colour.\nassistant: ", "assistant: ")
    assert (example.answer, example.end) == ("Red.\n", "\n")


@pytest.mark.parametrize(
    ("format", "row"),
    [(MESSAGES, {"messages": [USER, ASSISTANT]}), (PROMPT_COMPLETION, {"prompt": [USER], "completion": [ASSISTANT]})],
)
def test_chat_rows_need_a_chat_template(format, row):
    with pytest.raises(ValueError, match="no chat template") as caught:
        format.render(row, with_template(None))
    assert not isinstance(caught.value, MalformedRow)  # the fault of the tokenizer, not of the row


@pytest.mark.parametrize(
    ("format", "row"),
    [
        (MESSAGES, {"messages": "hello"}),
        (MESSAGES, {"messages": None}),
        (MESSAGES, {"messages": {"role": "user", "content": "x"}}),
        (MESSAGES, {"messages": ["hello"]}),
        (MESSAGES, {"messages": [{"content": "x"}]}),
        (MESSAGES, {"messages": [{"role": None, "content": "x"}]}),
        (MESSAGES, {"messages": [USER, {"role": "assistant"}]}),
        (MESSAGES, {"messages": [USER, ASSISTANT], "tools": "{not json"}),
        (SHAREGPT, {"conversations": [{"from": "gpt", "value": ["x"]}]}),
        (PROMPT_COMPLETION, {"prompt": [USER], "completion": "Red."}),
        (PROMPT_COMPLETION, {"prompt": [USER], "completion": 5}),
        (PROMPT_COMPLETION, {"prompt": [USER], "completion": NAN}),
        (PROMPT_COMPLETION, {"prompt": ["x"], "completion": [ASSISTANT]}),
        (PROMPT_COMPLETION, {"prompt": "x", "completion": [ASSISTANT]}),
        (ALPACA, {"instruction": ["x"], "output": "y"}),
    ],
)
def test_malformed_rows(tokenizer, format, row):
    with pytest.raises(MalformedRow):
        format.render(row, tokenizer)


def test_a_template_that_raises_says_why():
    tokenizer = with_template("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(MalformedRow, match="roles must alternate"):
        MESSAGES.render({"messages": [USER, ASSISTANT]}, tokenizer)


# ---- which format -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "name"),
    [
        (["messages", "prompt", "completion"], "messages"),
        (["conversations", "tools"], "sharegpt"),
        (["prompt", "completion", "instruction", "output"], "prompt-completion"),
        (["id", "instruction", "input", "output"], "alpaca"),
        (["instruction", "output"], "wizardlm"),
        (["instruction", "output", "response"], "wizardlm"),  # the first pair stands
        (["instruction", "context", "response", "category"], "alpaca"),
    ],
)
def test_a_format_is_told_from_columns(columns, name):
    assert resolve_format(None, iter(columns)).name == name


def test_columns_that_tell_no_format_are_named_with_those_that_would():
    with pytest.raises(ValueError, match=r"\['reply', 'text'\]") as caught:
        resolve_format(None, ["reply", "text"])
    for wanted in ("messages", "conversations", "completion", "instruction", "rename_columns"):
        assert wanted in str(caught.value)
    with pytest.raises(ValueError, match=r"\['reply', 'text'\]") as caught:
        resolve_format(FormatOptions(), ["reply", "text"])
    assert "--prompt-column and --answer-column, or with --messages-column" in str(caught.value)
    assert "TemplateFormat" not in str(caught.value)


@pytest.mark.parametrize(
    ("columns", "shown"),
    [
        (["question", "answer", "response"], "'question' and 'answer'; 'question' and 'response'"),
        (["prompt", "question", "response"], "'prompt' and 'response'; 'question' and 'response'"),
    ],
)
def test_columns_that_can_be_read_in_several_ways_are_not_guessed(columns, shown):
    with pytest.raises(ValueError, match=f"can be read in several ways: {shown}"):
        resolve_format(None, columns)


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_resolve_format_by_name(name):
    format = FORMATS[name]
    assert resolve_format(name, format.columns) == format
    assert resolve_format(format, format.columns) is format


def test_resolve_format_refuses_an_unknown_name():
    with pytest.raises(ValueError, match=r"Unknown format 'alpaka'.*alpaca.*wizardlm"):
        resolve_format("alpaka", ["instruction", "output"])


def test_resolve_format_names_the_missing_column():
    with pytest.raises(ValueError, match=r"'alpaca' reads .*\['output'\] are not among .*\['answer', 'instruction'\]"):
        resolve_format("alpaca", ["instruction", "answer"])


ALPACA_WITHOUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{}\n\n### Response:"
)
ALPACA_WITH = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{}\n\n### Input:\n{}\n\n### Response:"
)


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"instruction": "Sum.", "context": "1 2", "response": "A."}, ALPACA_WITH.format("Sum.", "1 2")),
        ({"instruction": "Sum.", "context": "", "response": "A."}, ALPACA_WITHOUT.format("Sum.")),
        ({"instruction": "Sum.", "input": "1 2", "response": "A."}, ALPACA_WITH.format("Sum.", "1 2")),
        ({"instruction": "Sum.", "response": "A."}, "Sum.\n\n### Response:"),
        ({"prompt": "Sum.", "response": "A."}, "Sum.\n\n### Response:"),
        ({"question": "Sum.", "answer": "A."}, "Sum.\n\n### Response:"),
        ({"question": "Sum.", "response": "A."}, "Sum.\n\n### Response:"),
        ({"query": "Sum.", "response": "A.", "type": "x"}, "Sum.\n\n### Response:"),
        (
            {"id": 1, "instruction": "Sum.", "instances": [{"input": "1 2", "output": "A."}]},
            ALPACA_WITH.format("Sum.", "1 2"),
        ),
    ],
)
@pytest.mark.parametrize("options", [None, FormatOptions()])
def test_rows_of_public_data_sets_are_read_under_their_names(row, prompt, options, caplog):
    example = resolve_format(options, row).render(row, None)
    assert (example.prompt, example.answer, example.header) == (prompt, "A.", "### Response:")
    assert caplog.messages == []


@pytest.mark.parametrize("instances", [[], [{"input": "", "output": "a"}] * 3, None, "a", ["a"]])
def test_a_row_of_several_instances_or_none_is_malformed(instances):
    row = {"instruction": "Sum.", "instances": instances}
    with pytest.raises(MalformedRow, match=r"'instances' has to be a list of one object .* got (\d of them|None|'a'|)"):
        resolve_format(None, row).render(row, None)


@pytest.mark.parametrize(
    ("options", "row", "expected"),
    [
        (
            {"prompt_column": "q", "answer_column": "a"},
            {"q": "Why?", "a": "So."},
            ("Why?\n\n### Response:", "So.", "### Response:"),
        ),
        (
            {"prompt_column": "q", "answer_column": "a", "input_column": "c", "format": "superfiltering"},
            {"q": "Why?", "a": "So.", "c": "sky"},
            ("Why?\nsky\n", "So.", ""),
        ),
        (
            {"input_column": "context"},
            {"instruction": "Sum.", "context": "1 2", "output": "3"},
            (ALPACA_WITH.format("Sum.", "1 2"), "3", "### Response:"),
        ),
        (  # TRL's names, of which a template is asked
            {"input_column": "document"},
            {"prompt": "Sum.", "document": "1 2", "completion": "3"},
            (ALPACA_WITH.format("Sum.", "1 2"), "3", "### Response:"),
        ),
        (
            {"answer_column": "reply"},
            {"instruction": "Sum.", "output": "4", "reply": "3"},
            ("Sum.\n\n### Response:", "3", "### Response:"),
        ),
        (  # a shell passes backslashes on
            {"template": r"Q: {instruction}\nA: \\n", "template_with_input": r"Q: {instruction} ({input})\nA: \\n"},
            {"question": "Why {input}?", "input": "{instruction}", "answer": "So."},
            ("Q: Why {input}? ({instruction})\nA: \\n", "So.", "A: \\n"),
        ),
        (
            {"template": "{system}\n\n{instruction}\n\nReply:\n", "response_header": "Reply:"},
            {"system_prompt": "Be {instruction}.", "question": "Why?", "response": "So."},
            ("Be {instruction}.\n\nWhy?\n\nReply:\n", "So.", "Reply:"),
        ),
        (
            {"template": "{system}\n\n{instruction}\n\nReply:\n", "system_column": "rules"},
            {"rules": None, "question": "Why?", "response": "So."},
            ("Why?\n\nReply:\n", "So.", "Reply:\n"),
        ),
        (
            {"format": "prompt-completion", "prompt_column": "q", "answer_column": "a"},
            {"q": "Why?", "a": " So."},
            ("Why?", " So.", ""),
        ),
    ],
)
def test_options_say_which_columns_and_which_template(options, row, expected, caplog):
    example = resolve_format(FormatOptions(**options), row).render(row, None)
    assert (example.prompt, example.answer, example.header) == expected
    assert caplog.messages == []


SYSTEM_TURN = "<|im_start|>system\nBe brief.<|im_end|>\n"


@pytest.mark.parametrize(
    ("row", "options"),
    [
        ({"messages": [USER, ASSISTANT], "system": "Be brief."}, None),
        ({"conversations": [USER, ASSISTANT], "system_prompt": "Be brief."}, FormatOptions()),
        ({"chat": [USER, ASSISTANT], "rules": "Be brief."}, {"messages_column": "chat", "system_column": "rules"}),
        ({"chat": [USER, ASSISTANT], "system": "Be brief."}, {"messages_column": "chat", "format": "sharegpt"}),
        ({"prompt": [USER], "completion": [ASSISTANT], "system": "Be brief."}, None),
    ],
)
def test_a_system_column_becomes_a_system_turn(tokenizer, row, options):
    format = resolve_format(FormatOptions(**options) if isinstance(options, dict) else options, row)
    example = format.render(row, tokenizer)
    assert (example.prompt, example.answer) == (SYSTEM_TURN + CHAT_PROMPT, CHAT_ANSWER)


@pytest.mark.parametrize("system", [None, " ", "Be long."])
def test_a_chat_has_one_system_turn_at_most(tokenizer, system):
    row = {"messages": [{"role": "system", "content": "Be brief."}, USER, ASSISTANT], "system": system}
    assert resolve_format(None, row).render(row, tokenizer).prompt == SYSTEM_TURN + CHAT_PROMPT
    if system != "Be long.":
        row["messages"] = row["messages"][1:]
        assert resolve_format(None, row).render(row, tokenizer).prompt == CHAT_PROMPT


@pytest.mark.parametrize(
    ("options", "columns", "words"),
    [
        (None, "instruction context output", ["'context' looks like a part", 'TemplateFormat(..., input="context")']),
        ({}, "instruction context output", ["'context' looks like a part of the prompt", "--input-column context"]),
        ({}, "prompt completion document", ["'document' looks", "--input-column document"]),
        ({}, "question answer passage context", ["--input-column passage", "--input-column context"]),
        ({"format": "wizardlm"}, "instruction evidence output", ["--input-column evidence"]),
        ({"template": "{instruction}"}, "instruction input output", ["'input' looks", "--template-with-input"]),
        (
            {},
            "instruction output system",
            ["'system' is not read", "'wizardlm' has no place", "--template with {system}"],
        ),
        (None, "question response system_prompt", ['TemplateFormat(..., system="system_prompt") has one']),
        ({}, "prompt completion system", ["'system' is read where prompts are messages"]),
    ],
)
def test_a_column_that_looks_like_a_part_of_the_prompt_and_is_not_read_is_one_warning(options, columns, words, caplog):
    resolve_format(options if options is None else FormatOptions(**options), columns.split())
    assert len(caplog.messages) == 1
    assert all(word in caplog.messages[0] for word in words)


@pytest.mark.parametrize(
    "columns", ["messages context", "instruction input output category", "prompt completion source"]
)
def test_other_columns_are_none_of_the_warnings_business(columns, caplog):
    resolve_format(FormatOptions(), columns.split())
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("options", "columns", "message"),
    [
        ({"format": "alpaka"}, "", "Unknown format 'alpaka'. Known formats: alpaca, "),
        (
            {"messages_column": "a", "prompt_column": "b"},
            "",
            "--prompt-column is of rows of texts, and --messages-column of",
        ),
        (
            {"messages_column": "a", "format": "alpaca"},
            "",
            "--messages-column is of chats, and --format alpaca of texts",
        ),
        (
            {"format": "messages", "template": "{instruction}"},
            "",
            "--template is of rows of texts, and --format messages",
        ),
        (
            {"format": "prompt-completion", "input_column": "c"},
            "",
            "takes prompts as they are: leave it out, or --input",
        ),
        ({"template_with_input": "{instruction}{input}"}, "", "--template-with-input goes with --template"),
        (
            {"template": "Q: {q}", "prompt_column": "q"},
            "",
            "--template 'Q: {q}' lacks {instruction} and has {q}. Write",
        ),
        ({"template": "{instruction}", "system_column": "s"}, "", "--template has no {system}, where the text of"),
        ({"template": "{system}{instruction}"}, "instruction output", "there is no column 'system' or 'system_prompt'"),
        ({"system_column": "s"}, "instruction output s", "'wizardlm' has no place for it. Write one with --template"),
        (
            {"prompt_column": "q"},
            "q a",
            "--prompt-column q: which of the columns ['a', 'q'] goes with it cannot be told",
        ),
        ({"answer_column": "a"}, "q a", "Name it with --prompt-column."),
        (
            {"prompt_column": "q", "answer_column": "b"},
            "q a",
            "--answer-column b: there is no such column; the columns are ['a', 'q'].",
        ),
        ({"messages_column": "chat"}, "q a", "--messages-column chat: there is no such column"),
        ({"system_column": "rules"}, "messages", "--system-column rules: there is no such column"),
    ],
)
def test_options_that_do_not_go_together_are_told_as_options(options, columns, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the message is checked)
        resolve_format(FormatOptions(**options), columns.split())
    assert message in str(caught.value)
    assert "=..." not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "columns"),
    [
        ({}, "instruction context response"),
        ({}, "instruction instances"),
        ({}, "conversations system"),
        ({"prompt_column": "q", "answer_column": "a"}, "q a"),
        ({"template": "{system}\n{instruction}\nA:", "prompt_column": "q", "answer_column": "a"}, "q a system"),
        ({"messages_column": "chat"}, "chat"),
        ({"format": "prompt-completion", "prompt_column": "q", "answer_column": "a"}, "q a"),
    ],
)
def test_what_is_recorded_of_a_format_is_the_format(options, columns):
    format = resolve_format(FormatOptions(**options), columns.split())
    assert format.name in format_record(format)
    assert recorded_format(format_record(format)) == format


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_a_format_of_this_package_is_recorded_by_its_name(name):
    assert format_record(FORMATS[name]) == name


@pytest.mark.parametrize(
    "record", ["{", "{}", '{"format": "mine"}', '{"format": "alpaca", "colour": 1}', '{"format": 1}']
)
def test_what_is_no_record_is_said(record):
    with pytest.raises(ValueError, match="is no format's record"):
        recorded_format(record)


# ---- rows for TRL -----------------------------------------------------------------------------------------------


def test_text_rows_become_prompt_and_completion():
    row = {"instruction": "Add.", "output": "4"}
    assert to_prompt_completion(row, WIZARDLM) == {"prompt": "Add.\n\n### Response:", "completion": "4"}


def test_chats_stay_messages():
    row = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}
    assert to_prompt_completion(row, SHAREGPT) == {
        "prompt": [{"role": "user", "content": "Hi"}],
        "completion": [{"role": "assistant", "content": "Ho"}],
    }


def test_prompt_completion_rows_keep_their_values_under_trl_names():
    format = PromptCompletionFormat(prompt="question", completion="reply")
    assert to_prompt_completion({"question": "a", "reply": "b", "id": 1}, format) == {"prompt": "a", "completion": "b"}


def test_a_chat_without_an_assistant_turn_has_no_completion():
    assert to_prompt_completion({"chat": [USER]}, ChatFormat("mine", "chat")) == {"prompt": [USER], "completion": []}
