"""Messages of conversation trees to chats: every answer once, with all that was said before it."""

from __future__ import annotations

import json
import logging

import pytest
from datasets import Dataset

from ifd_trainer.data.files import load_rows
from ifd_trainer.data.format_choice import resolve_format
from ifd_trainer.data.message_trees import as_chats

#   q1 -> a1 -> q2 -> a2       another tree: q3 -> a4
#      -> a3 -> q4
MESSAGES = [
    ("q1", None, "prompter", "Name a bird."),
    ("a1", "q1", "assistant", "A robin."),
    ("q2", "a1", "prompter", "Another."),
    ("a2", "q2", "assistant", "A wren."),
    ("a3", "q1", "assistant", "A crow."),
    ("q4", "a3", "prompter", "Why?"),
    ("q3", None, "prompter", "2 + 2?"),
    ("a4", "q3", "assistant", "4."),
]
CHATS = {
    "a1": ["Name a bird.", "A robin."],
    "a2": ["Name a bird.", "A robin.", "Another.", "A wren."],
    "a3": ["Name a bird.", "A crow."],
    "a4": ["2 + 2?", "4."],
}


def table(messages=MESSAGES) -> list[dict]:
    names = ("message_id", "parent_id", "role", "text")
    return [dict(zip(names, message, strict=True)) | {"lang": "en", "rank": i} for i, message in enumerate(messages)]


def tree(identity: str) -> dict:
    name, _, role, text = next(message for message in MESSAGES if message[0] == identity)
    replies = [tree(other) for other, parent, *_ in MESSAGES if parent == identity]
    return {"message_id": name, "role": role, "text": text, "lang": "en", "replies": replies}


def said(rows: Dataset) -> dict[str, list[str]]:
    return {row["message_id"]: [message["content"] for message in row["messages"]] for row in rows}


def test_a_table_of_messages_becomes_a_chat_for_each_answer(caplog):
    shuffled = table()[::-1]  # a reply may stand before what it answers
    rows = as_chats(Dataset.from_list(shuffled))
    assert said(rows) == CHATS
    assert rows["rank"][:] == [7, 4, 3, 1]  # other columns are those of the answer
    assert [message["role"] for message in rows[0]["messages"]] == ["user", "assistant"]
    assert caplog.messages == ["8 messages of trees are 4 chats, one for each answer."]
    assert resolve_format(None, rows.column_names).name == "messages"


def test_trees_become_the_same_chats(tmp_path):
    trees = [{"message_tree_id": name, "tree_state": "ready", "prompt": tree(name)} for name in ("q1", "q3")]
    path = tmp_path / "trees.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in trees), encoding="utf-8")
    rows = as_chats(load_rows(str(path)))
    assert said(rows) == CHATS
    assert dict(zip(rows["message_id"], rows["message_tree_id"], strict=True)) == dict.fromkeys(CHATS, "q1") | {
        "a4": "q3"
    }
    assert set(rows["lang"]) == {"en"}


def test_an_answer_to_a_message_that_is_not_there_is_counted(caplog):
    rows = [*table(), *table([("a5", "q9", "assistant", "Lost."), ("a6", None, "assistant", "First.")])]
    assert said(as_chats(Dataset.from_list(rows))) == CHATS
    assert "4 chats, one for each answer; 2 answers to messages that are not there are left out." in caplog.text


def test_messages_that_answer_one_another_end():
    rows = table([("a", "b", "assistant", "x"), ("b", "a", "prompter", "y"), ("q", None, "prompter", "z")])
    with pytest.raises(ValueError, match="The rows are 3 messages of trees, and none of them is an assistant's answer"):
        as_chats(Dataset.from_list(rows))


def test_other_rows_are_left_alone(caplog):
    caplog.set_level(logging.DEBUG, "ifd_trainer")
    for columns in (
        {"messages": [None], "message_id": ["a"], "parent_id": [None], "role": [""], "text": [""]},
        {"a": [1]},
    ):
        rows = Dataset.from_dict(columns)
        assert as_chats(rows) is rows
    assert caplog.messages == []


def test_the_transform_says_what_makes_chats_of_messages():
    with pytest.raises(ValueError, match=r"messages of trees.*message_trees\.as_chats\(dataset\)"):
        resolve_format(None, list(table()[0]))


def test_a_prompt_that_is_a_text_is_no_tree():
    """Answers to the first messages of trees, as others publish them."""
    rows = Dataset.from_list([{"message_tree_id": "q3", "prompt": "2 + 2?", "response": "4."}])
    assert as_chats(rows) is rows
