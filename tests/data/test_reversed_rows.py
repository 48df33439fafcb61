"""Rows turned round: which instruction is told, how it is asked for, and from what."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import build_tokenizer

from ifd_trainer.data.chat_template import MalformedRow
from ifd_trainer.data.encoding import Encoder
from ifd_trainer.data.formats import (
    ALPACA,
    MESSAGES,
    PROMPT_COMPLETION,
    SHAREGPT,
    SUPERFILTERING,
    WIZARDLM,
    Example,
    TemplateFormat,
)
from ifd_trainer.data.further_segments import with_further
from ifd_trainer.data.reversed_rows import GUESS, ReversedRows, request
from ifd_trainer.errors import UserError

TOKENIZER = build_tokenizer()
ASK = "Guess what was asked: {answer}"
TURN = ReversedRows(TOKENIZER, ASK)
OF_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nGuess what was asked: {}\n\n### Response:"
)
OF_CHAT = "<|im_start|>user\nGuess what was asked: {}<|im_end|>\n<|im_start|>assistant\n"
SYSTEM = TemplateFormat("s", "{system} {instruction} A:", "{system} {instruction} {input} A:", "A:", system="sys")
NESTED = TemplateFormat("n", "{instruction}\n", "{instruction}\n{input}\n", header="", instances="instances")
# name: (format, row, prompt, answer, header)
TURNED = {
    "alpaca": (
        ALPACA,
        {"instruction": "Add the numbers.", "input": "12 and 30", "output": "The sum is 42."},
        OF_ALPACA.format("The sum is 42."),
        "Add the numbers.\n12 and 30",
        "### Response:",
    ),
    "wizardlm": (
        WIZARDLM,
        {"instruction": "Name a colour.", "output": "Red {answer}."},
        "Guess what was asked: Red {answer}.\n\n### Response:",
        "Name a colour.",
        "### Response:",
    ),
    "superfiltering": (
        SUPERFILTERING,
        {"instruction": "Name a colour.", "input": None, "output": "Red."},
        "Guess what was asked: Red.\n",
        "Name a colour.",
        "",
    ),
    "only an input": (
        WIZARDLM,
        {"instruction": " ", "input": "12 and 30", "output": "42"},
        "Guess what was asked: 42\n\n### Response:",
        "12 and 30",
        "### Response:",
    ),
    "a system prompt": (
        SYSTEM,
        {"instruction": "Name a colour.", "input": "", "output": "Red.", "sys": "Be brief."},
        "Guess what was asked: Red. A:",
        "Name a colour.",
        "A:",
    ),
    "instances": (
        NESTED,
        {"instruction": "Name a colour.", "instances": [{"input": "", "output": "Red."}]},
        "Guess what was asked: Red.\n",
        "Name a colour.",
        "",
    ),
    "a text in the template of Alpaca": (
        PROMPT_COMPLETION,
        {
            "prompt": ALPACA.render({"instruction": "Add.", "input": "1 and 2", "output": ""}).prompt,
            "completion": "3",
        },
        OF_ALPACA.format("3"),
        "Add.\n1 and 2",
        "### Response:",
    ),
    "a text with a header": (
        PROMPT_COMPLETION,
        {"prompt": "Which colour?\n### Answer:", "completion": "Red."},
        "Guess what was asked: Red.\n\n### Answer:",
        "Which colour?",
        "### Answer:",
    ),
    "a text without one": (
        PROMPT_COMPLETION,
        {"prompt": "The cat sat on ", "completion": "the mat."},
        "Guess what was asked: the mat.\n\n",
        "The cat sat on",
        "",
    ),
    "messages": (
        MESSAGES,
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Name a colour."},
                {"role": "assistant", "content": "Red."},
                {"role": "user", "content": "Another."},
                {"role": "assistant", "content": "Blue."},
            ]
        },
        OF_CHAT.format("Blue."),
        "Another.<|im_end|>\n",
        "<|im_start|>assistant\n",
    ),
    "sharegpt": (
        SHAREGPT,
        {"conversations": [{"from": "human", "value": "مرحبا"}, {"from": "gpt", "value": "hello."}]},
        OF_CHAT.format("hello."),
        "مرحبا<|im_end|>\n",
        "<|im_start|>assistant\n",
    ),
}


@pytest.mark.parametrize("name", TURNED)
def test_a_row_of_each_format_turned_round(name):
    format, row, prompt, answer, header = TURNED[name]
    found = TURN.of_row(row, format)
    assert (found.prompt, found.answer, found.header) == (prompt, answer, header)


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "system", "content": "Say hello."}, {"role": "assistant", "content": "Hello."}],
        [{"role": "assistant", "content": "Hello."}],
    ],
    ids=["a system turn only", "an answer only"],
)
def test_a_chat_in_which_no_user_asks_is_not_turned(messages):
    assert TURN.of_row({"messages": messages}, MESSAGES) is None


def test_a_format_of_ones_own_tells_its_prompt():
    class Own:
        name, columns = "own", ("q", "a")

        def render(self, row, tokenizer):
            return Example(f"{row['q']} =>", row["a"] + "<end>", "=>", end="<end>")

    found = TURN.of_row({"q": "2 + 2", "a": "4"}, Own())
    assert (found.prompt, found.answer, found.header) == ("Guess what was asked: 4\n\n=>", "2 + 2", "=>")


@pytest.mark.parametrize("name", ["alpaca", "wizardlm", "a text with a header", "messages", "sharegpt"])
def test_tokens_tell_what_the_raw_row_tells(name):
    format, row, *_ = TURNED[name]
    pair = Encoder(TOKENIZER)([format.render(row, TOKENIZER)])[0]
    ids, start = pair.conditioned.ids, pair.conditioned.start
    assert TURN.of_tokens(ids[:start], ids[start:]) == TURN.of_row(row, format)


def test_a_colon_that_merged_with_a_quote_is_the_headers():
    text = OF_ALPACA.format("x") + '"Yes."'
    tokenizer = build_tokenizer(extra=('### Response:"Yes."',) * 40)
    ids = tokenizer(text)["input_ids"]
    size = next(i for i in range(len(ids)) if tokenizer.decode(ids[:i]).endswith("### Response"))
    assert tokenizer.decode(ids[size:]).startswith(':"'), "they merged"
    found = ReversedRows(tokenizer, ASK).of_tokens(ids[:size], ids[size:])
    assert (found.prompt, found.answer) == (OF_ALPACA.format('"Yes."'), "Guess what was asked: x")


def test_another_chat_template_than_the_tokenizers_writes_the_row():
    template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}|{% endfor %}"
    template += "{% if add_generation_prompt %}[assistant]{% endif %}"
    prompt, answer = ("[user]Name a colour.|[assistant]", "Red.")
    found = ReversedRows(TOKENIZER, ASK, template).of_tokens(
        *(TOKENIZER(text)["input_ids"] for text in (prompt, answer))
    )
    assert (found.prompt, found.answer) == ("[user]Guess what was asked: Red.|[assistant]", "Name a colour.|")


def templates() -> list[Path]:
    spec = find_spec("trl")
    return sorted(Path(spec.origin).with_name("chat_templates").glob("*.jinja")) if spec else []


@pytest.mark.parametrize("path", templates(), ids=lambda path: path.stem)
@pytest.mark.parametrize("system", [False, True], ids=["", "system"])
def test_tokens_of_every_template_that_trl_ships_tell_what_the_user_asked(path, system):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = path.read_text(encoding="utf-8")
    turns = [("system", "Be brief."), ("user", "Name a colour."), ("assistant", "Red.")]
    turns += [("user", "And \nanother one?"), ("assistant", "Blue.")]
    row = {"messages": [{"role": role, "content": text} for role, text in turns if system or role != "system"]}
    try:
        example = MESSAGES.render(row, tokenizer)
    except MalformedRow as error:
        pytest.skip(str(error))
    pair = Encoder(tokenizer)([example])[0]
    ids, start = pair.conditioned.ids, pair.conditioned.start
    turn = ReversedRows(tokenizer, ASK)
    found = turn.of_tokens(ids[:start], ids[start:])
    assert found == turn.of_row(row, MESSAGES)
    assert found.answer.startswith("And \nanother one?")
    assert "Guess what was asked: Blue." in found.prompt
    assert "Name a colour." not in found.prompt + found.answer


# ---- every answer of a conversation -----------------------------------------------------------------------------


def test_an_answer_is_turned_round_with_what_the_user_says_since_the_one_before():
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": "{}"}}]}
    said = [("user", "Name one."), ("assistant", "Red."), ("user", "And?"), ("user", "Why?"), ("assistant", "Blue.")]
    chat = [{"role": role, "content": content} for role, content in said]
    found = TURN.of_answers({"messages": [*chat, {"role": "user", "content": "Look!"}, call, *chat[1:2]]}, MESSAGES)
    assert [example and example.answer.removesuffix(example.end) for example in found] == [
        *("Name one.", "And?\nWhy?"),
        *(None, None),  # a call without a text, and an answer that follows no question
    ]
    assert found[1].prompt == OF_CHAT.format("Blue.")
    assert TURN.of_row({"messages": [*chat, call]}, MESSAGES) is None
    halves = TURN.of_answers({"prompt": chat[:3], "completion": chat[4:]}, PROMPT_COMPLETION)
    assert [example.answer.removesuffix(example.end) for example in halves] == ["And?"]


# ---- what is asked ----------------------------------------------------------------------------------------------


def test_the_usual_request_has_a_place_for_the_answer():
    assert GUESS.count("{answer}") == 1
    assert request(None, ["rifd"]) == GUESS
    assert request(ASK, ["rcas"]) == ASK
    assert request(None, ["ira"]) is None


@pytest.mark.parametrize(
    ("guess", "scores", "words"),
    [
        ("What was asked?", ["rifd"], r"with \{answer\} where the answer stands, once; got 'What was asked"),
        ("{answer} {answer}", ["rifd"], "once; got"),
        (3, ["rifd"], "got 3"),
        (ASK, ["ira"], "guess is the request of the score rifd, which was not asked for"),
    ],
)
def test_a_request_without_a_place_for_the_answer_or_without_a_use_is_refused(guess, scores, words):
    with pytest.raises(UserError, match=words):
        request(guess, scores)


# ---- segments ---------------------------------------------------------------------------------------------------


def segments(row, scores, **options):
    encoder = Encoder(TOKENIZER, **options)
    pairs = encoder([WIZARDLM.render(row, TOKENIZER)])
    return pairs[0], with_further(pairs, scores, encoder, lambda _: TURN.of_row(row, WIZARDLM))[0]


ROW = {"instruction": "Name a colour.", "output": "Red."}


def test_what_is_not_asked_for_is_not_read():
    pair, found = segments(ROW, ["ira", "answer_ppl"])
    assert found == pair
    assert segments(ROW, ["rcas"])[1].more.keys() == {"rcas"}
    assert segments(ROW, ["rifd", "prompt_ppl"])[1].more.keys() == {"rcas", "rdas", "prompt"}


def test_the_prompt_begins_what_the_answer_is_read_behind():
    _, found = segments(ROW, ["prompt_ppl"])
    given, prompt = found.conditioned, found.more["prompt"]
    assert (prompt.ids, prompt.start, prompt.tail) == (given.ids[: given.start], 1, 0)


def test_a_row_turned_round_that_does_not_fit_has_no_segments_and_the_row_keeps_its_own():
    row = {"instruction": "Name a colour.", "output": "Red, green and blue."}
    size = len(segments(row, [])[0].conditioned.ids)
    pair, found = segments(row, ["rifd", "prompt_ppl"], max_length=size)
    assert (found.conditioned, found.direct) == (pair.conditioned, pair.direct)
    assert found.conditioned is not None
    assert found.more.keys() == {"prompt"}


def test_a_limit_on_answers_is_none_on_instructions():
    row = {"instruction": "Who?", "output": "The cat sat on the mat and the dog ran in the park with a ball."}
    assert segments(row, ["rifd"], min_answer_tokens=6)[1].more.keys() == {"rcas", "rdas"}
