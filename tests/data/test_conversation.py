"""Conversations: every answer is found in the one text that its template writes, and nothing else is an answer."""

from __future__ import annotations

from dataclasses import replace

import pytest
from conftest import build_tokenizer
from test_chat_template import TEMPLATES, said, tokenizer_for, user

from ifd_trainer.data.conversation import Conversation, ConversationEncoder, read_conversation
from ifd_trainer.data.encoding import Encoder
from ifd_trainer.data.formats import (
    ALPACA,
    MESSAGES,
    PROMPT_COMPLETION,
    SHAREGPT,
    MalformedRow,
    conversation_parts,
)
from ifd_trainer.errors import UserError
from ifd_trainer.method.reasons import Status

CALL = {"type": "function", "id": "c00000000", "function": {"name": "look", "arguments": {"at": "it"}}}
CHATS = {
    "turns": [
        user("Name one."),
        said("Red."),
        user("Another? Say why."),
        said("Blue,\n\nor three."),
        user("Why?"),
        said("So."),
    ],
    "tool": [
        {"role": "system", "content": "Be brief."},
        user("What is it?"),
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "name": "look", "tool_call_id": "c00000000", "content": "blue"},
        said("It is blue."),
        user("Sure?"),
        said("Yes."),
    ],
}
NO_TOOLS = ("cohere", "deepseekv3", "gemma_", "gemma3", "llava_next")
# In an answer that others follow, these leave out the think block that they write into the last one.
THINKS_LAST = ("qwen3", "qwen3_5_nothink", "qwen3_5_think", "qwen3_6")


def pairs_of(tokenizer, row, format=MESSAGES, **options):
    conversation = read_conversation(*conversation_parts(row, format, tokenizer), row, tokenizer)
    return ConversationEncoder(Encoder(tokenizer, **options))([conversation])[0]


def answers(tokenizer, pairs):
    return [tokenizer.decode(pair.conditioned.ids[pair.conditioned.start :]) for pair in pairs]


@pytest.mark.parametrize(("kind", "special"), [("turns", True), ("tool", False)])
@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_each_answer_is_that_of_the_conversation_up_to_it(name, kind, special):
    if kind == "tool" and f"{name}_".startswith(NO_TOOLS):
        pytest.skip("the template knows no tools, or no system")
    tokenizer, chat = tokenizer_for(TEMPLATES[name], special), CHATS[kind]
    pairs = pairs_of(tokenizer, {"messages": chat})
    places = [place for place, message in enumerate(chat) if message["role"] == "assistant"]
    assert len(pairs) == len(places)
    whole = pairs[-1].conditioned.ids
    for place, pair in zip(places, pairs, strict=True):
        cut = Encoder(tokenizer)([MESSAGES.render({"messages": chat[: place + 1]}, tokenizer)])[0]
        if pair is pairs[-1]:
            assert pair == cut
        elif pair.status is Status.OK:
            assert pair.conditioned.ids == whole[: len(pair.conditioned.ids)]  # one forward is enough
            if name in THINKS_LAST:
                assert answers(tokenizer, [pair]) == answers(tokenizer, [cut])
                header = tokenizer.decode(pair.direct.ids[: pair.direct.start])
                assert header == "<|im_start|>assistant\n"
            else:  # what ends a turn that others follow may be the next one's opening
                assert replace(pair, ending=cut.ending) == cut
        else:
            assert pair == cut
            assert (kind, pair.status) == ("tool", Status.EMPTY_ANSWER)  # a template that writes no calls
    texts = ["Red.", "Blue,\n\nor three.", "So."] if kind == "turns" else ["It is blue.", "Yes."]
    assert [text.strip() for text in answers(tokenizer, pairs[-len(texts) :])] == texts


def test_a_thought_that_the_template_leaves_out_is_in_no_answer():
    tokenizer = tokenizer_for(TEMPLATES["qwen3"], True)
    chat = [user("Name one."), said("<think>\nA cat.\n</think>\n\nRed."), user("Another?"), said("Blue.")]
    assert answers(tokenizer, pairs_of(tokenizer, {"messages": chat})) == ["Red.", "Blue."]


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("text", ["It is blue.", "élan \N{GRINNING FACE}", '"Yes."', " three", "a\n\n b \n"])
def test_tokens_at_the_edges_of_an_answer_are_its_own(fast, text):
    tokenizer = build_tokenizer()
    if not fast:  # no offsets: the tokens that a beginning has in common with the whole
        tokenizer.__class__ = type("Slow", (type(tokenizer),), {"is_fast": False})
    chat = [user("Name it."), said(text), user("And?"), said("No.")]
    pairs = pairs_of(tokenizer, {"messages": chat})
    cut = Encoder(tokenizer)([MESSAGES.render({"messages": chat[:2]}, tokenizer)])[0]
    assert pairs[0] == cut


def test_answers_of_a_completion_are_scored_and_those_of_its_prompt_are_not():
    tokenizer = build_tokenizer()
    chat = [user("Name one."), said("Red."), user("Another?"), said("Blue."), user("More?"), said("Three.")]
    row = {"prompt": chat[:3], "completion": chat[3:]}
    assert answers(tokenizer, pairs_of(tokenizer, row, PROMPT_COMPLETION)) == ["Blue.", "Three."]
    turns = [{"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]} for m in chat]
    assert pairs_of(tokenizer, {"conversations": turns}, SHAREGPT) == pairs_of(tokenizer, {"messages": chat})


def test_what_follows_the_last_answer_is_no_part_of_the_conversation():
    tokenizer, chat = build_tokenizer(), [user("Name one."), said("Red.")]
    assert pairs_of(tokenizer, {"messages": [*chat, user("Why?")]}) == pairs_of(tokenizer, {"messages": chat})


def test_bad_turns_have_a_status_and_leave_the_others_their_scores():
    tokenizer = build_tokenizer()
    chat = [user("Name one."), said(" \n"), user("Why?"), said("Red."), {"role": "tool", "content": "5"}, said("Five.")]
    pairs = pairs_of(tokenizer, {"messages": chat})
    assert [pair.status for pair in pairs] == [Status.EMPTY_ANSWER, Status.OK, Status.OK]
    assert answers(tokenizer, pairs[1:]) == ["Red.", "Five."]  # a tool's result without a call is context
    assert pairs_of(tokenizer, {"messages": [user("Name one.")]}) == []
    asks_nothing = pairs_of(tokenizer, {"messages": [user(" "), said("Red."), user("Why?"), said("So.")]})
    assert [pair.status for pair in asks_nothing] == [Status.EMPTY_PROMPT, Status.OK]
    with pytest.raises(MalformedRow, match="unknown role"):
        conversation_parts({"messages": [{"role": "narrator", "content": "x"}]}, MESSAGES, tokenizer)


def test_a_limit_holds_for_each_answer_with_all_that_stands_before_it():
    tokenizer = build_tokenizer()
    chat = [user("Name one."), said("Red."), user("Another?"), said("Blue or three. " * 9), user("Why?"), said("So.")]
    whole = pairs_of(tokenizer, {"messages": chat})
    most = len(whole[1].conditioned.ids) - 4
    pairs = pairs_of(tokenizer, {"messages": chat}, max_length=most)
    assert [pair.status for pair in pairs] == [Status.OK, Status.TRUNCATED, Status.PROMPT_TOO_LONG]
    assert pairs[0] == whole[0]


def test_a_conversation_that_a_template_cannot_write_is_malformed():
    tokenizer = tokenizer_for(TEMPLATES["gemma"], True)
    with pytest.raises(MalformedRow, match=r"cannot render the row: .*alternate"):
        pairs_of(tokenizer, {"messages": [user("One?"), user("Two?"), said("Red.")]})


def test_an_answer_that_a_template_does_not_write_has_a_status_of_its_own():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if loop.last or m['role'] != 'assistant' %}"
        "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    )
    pairs = pairs_of(tokenizer, {"messages": [user("One?"), said("Red."), user("Two?"), said("Blue.")]})
    assert [pair.status for pair in pairs] == [Status.NO_HEADER, Status.OK]


def test_rows_of_texts_are_no_conversations():
    row = {"instruction": "Name one.", "input": "", "output": "Red."}
    assert conversation_parts(row, ALPACA, build_tokenizer()) is None
    assert conversation_parts({"prompt": "Name one.", "completion": "Red."}, PROMPT_COMPLETION, None) is None
    with pytest.raises(UserError, match="no chat template"):
        conversation_parts({"messages": [user("x"), said("y")]}, MESSAGES, None)


def test_definitions_of_one_answer_know_no_turns():
    with pytest.raises(UserError, match="definition='cherry' is defined for one answer"):
        ConversationEncoder(Encoder(build_tokenizer(), "cherry"))
    assert ConversationEncoder(Encoder(build_tokenizer()))([None, Conversation("", ())]) == [[], []]
