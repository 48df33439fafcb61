"""Messages of conversation trees, as OpenAssistant publishes them, as chats: one row for each answer.

There are two forms: a table with a row for each message, which names the message it answers in `parent_id`, and trees
with a row for each first message, `prompt`, whose `replies` have replies of their own. An assistant's message becomes a
row: its chat is all that was said before it, from the first message on, and the message itself. So each answer is in
one row as the last turn, where it is scored and trained on.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

from datasets import Dataset

from ..errors import UserError
from .chat_template import role_of, text_of
from .format_choice import holds_message_trees

logger = logging.getLogger(__name__)


def as_chats(rows: Dataset, say: bool = True) -> Dataset:
    """Rows of a data set as they are; those of message trees as chats, in `messages`, all of them in memory.

    The columns of a table stay, each of the answer's message. Of trees, `message_id`, `parent_id` and
    `message_tree_id` do, and what else all messages say of themselves in texts and numbers.

    Args:
        rows: a data set.
        say: log how many chats the messages are.

    Raises:
        UserError: for trees without an answer.

    >>> table = [("a", None, "prompter", "2 + 2?"), ("b", "a", "assistant", "4"), ("c", "a", "assistant", "5")]
    >>> rows = Dataset.from_list([dict(zip(("message_id", "parent_id", "role", "text"), row)) for row in table])
    >>> [[message["content"] for message in chat] for chat in as_chats(rows)["messages"]]
    [['2 + 2?', '4'], ['2 + 2?', '5']]
    """
    table = "parent_id" in rows.column_names
    if not holds_message_trees(rows.column_names) or not (table or _is_message(rows.features["prompt"])):
        return rows
    messages = list(rows) if table else [message for row in rows for message in _in_tree(row["prompt"], None, row)]
    known = {message["message_id"]: message for message in messages}
    chats, lost = [], 0
    for message in messages:
        if role_of(message["role"]) != "assistant":
            continue
        chat = _path(message, known)
        lost += chat is None
        if chat is not None:
            chats.append({**message, "messages": chat})
    if not chats:
        raise UserError(
            f"The rows are {len(messages)} messages of trees, and none of them is an assistant's answer to another one "
            "(message_id, parent_id, role, text). Write chats to a column 'messages'."
        )
    said = f"{len(messages):,} messages of trees are {len(chats):,} chats, one for each answer"
    logger.log(
        logging.WARNING if say else logging.DEBUG,
        "%s%s.",
        said,
        f"; {lost:,} answers to messages that are not there are left out" if lost else "",
    )
    return Dataset.from_list(chats)


def _is_message(feature: Any) -> bool:
    """Whether a column holds messages of trees; what others call a prompt is a text."""
    return isinstance(feature, dict) and {"message_id", "role", "text"} <= set(feature)


def _path(message: Mapping[str, Any], known: Mapping[str, Mapping[str, Any]]) -> list[dict[str, str]] | None:
    """The chat that ends with a message; None where what it answers is not there."""
    chat, seen = [], set()
    while message is not None and message["message_id"] not in seen:
        seen.add(message["message_id"])
        chat.append({"role": role_of(message["role"]) or str(message["role"]), "content": text_of(message["text"])})
        parent = message["parent_id"]
        message = known.get(parent)
    return chat[::-1] if parent is None and len(chat) > 1 else None


def _in_tree(message: Mapping[str, Any], parent: str | None, row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The messages of a tree, each with the one that it answers; without recursion, since trees may be deep."""
    waiting = [(message, parent)]
    while waiting:
        message, parent = waiting.pop()
        plain = {
            name: value for name, value in message.items() if value is None or isinstance(value, (str, int, float))
        }
        yield {**plain, "parent_id": parent, "message_tree_id": row["message_tree_id"]}
        waiting += [(reply, message["message_id"]) for reply in reversed(message.get("replies") or [])]
