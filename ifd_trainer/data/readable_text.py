"""Instruction, input and answer of a row for a person to read, whatever columns or template they are in."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from ..errors import UserError
from .chat_template import MalformedRow, common_prefix_length, role_of
from .format_choice import columns_read, told_format
from .formats import PromptCompletionFormat, PromptFormat, TemplateFormat, answer_of
from .table_reader import TableReader

_ALPACA = re.compile(
    r"### Instruction:\s*\n(?P<instruction>.*?)(?:\n+### Input:\s*\n(?P<input>.*?))?\s*### Response:?\s*\Z", re.DOTALL
)
_RESPONSE = re.compile(r"\s*### Response:?\s*\Z")
_END_OF_TURN = re.compile(r"(?:\s*(?:<\|[\w ]+\|>|</s>|<eos>|<end_of_turn>|<｜[^｜]*｜>))+\s*\Z")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")
_ROWS = 1000  # in memory as Python's values at a time
_OF_A_RUN = PromptCompletionFormat("texts of a run", completion="answer")  # what one keeps of its training set


def text_columns(frame: pd.DataFrame, format: PromptFormat | None = None) -> pd.DataFrame | None:
    """`instruction`, `input` and `answer` of each row, without what a template adds; None if there are no texts."""
    format = _without_system(_format_of(frame.columns, format))
    if format is None:
        return None
    names = columns_read(format, frame.columns)
    cells = zip(*(frame[name] for name in names), strict=True)
    texts = [_texts(dict(zip(names, row, strict=True)), format) for row in cells]
    instructions, inputs = [prompt for prompt, _, _ in texts], [extra for _, extra, _ in texts]
    if not isinstance(format, TemplateFormat):
        instructions, inputs = _without_template(instructions)
    # A header's last character that merged with the answer's first into one token is not the answer's.
    answers = [
        _END_OF_TURN.sub("", answer.removeprefix(":") if prompt.endswith("### Response") else answer)
        for prompt, _, answer in texts
    ]
    return pd.DataFrame({"instruction": instructions, "input": inputs, "answer": answers}, dtype=object)


def _format_of(names: Collection[str], format: PromptFormat | None) -> PromptFormat | None:
    """The format that is given, else the one that the names of columns tell."""
    if format is not None:
        return format
    return _OF_A_RUN if set(_OF_A_RUN.columns) <= set(names) else told_format(names)


def _without_system(format: PromptFormat | None) -> PromptFormat | None:
    """The format without a column of system texts, which are neither asked nor answered."""
    return format if getattr(format, "system", None) is None else replace(format, system=None)


def _texts(row: Mapping[str, Any], format: PromptFormat) -> tuple[str, str, str]:
    """Prompt, input and answer of a row; of one that cannot be scored, what can be read of it."""
    extra = ""
    try:
        if isinstance(format, TemplateFormat):
            prompt, extra, answer = row[format.instruction], *format.texts(row)[1:]
        else:
            prompt, answer = format.parts(row)[0], answer_of(row, format)
        return plain(prompt), extra, answer
    except MalformedRow:
        extra = plain(row.get(getattr(format, "input", None)))
        first, *second = (plain(row[name]) for name in format.columns)
        return first, extra, "".join(second)


def text_sources(names: Collection[str], format: PromptFormat | None = None) -> tuple[str, ...]:
    """The columns that hold the texts: of prompts and of answers, or of chats; none where there are none.

    Args:
        names: columns of a data set.
        format: how its rows are read; told from the names by default.

    >>> text_sources(["id", "instruction", "input", "output"]), text_sources(["id", "messages"]), text_sources(["id"])
    (('instruction', 'output'), ('messages',), ())
    """
    format = _without_system(_format_of(names, format))
    return () if format is None else format.columns


def answers_of(frame: pd.DataFrame, format: PromptFormat | None = None) -> list[str]:
    """The answer of each row, "" for none; `format` as for `text_sources`.

    Raises:
        ValueError: when the rows have no texts of a known kind.
    """
    texts = text_columns(frame, format)
    if texts is None:
        raise UserError(
            f"No answers among the columns {sorted(frame)}. Wanted: prompt and answer; messages; conversations; prompt "
            "and completion; instruction and output, or names of public data sets like these."
        )
    return texts["answer"].tolist()


def row_texts(rows: TableReader, format: PromptFormat | None = None) -> Iterator[tuple[str, str]]:
    """Prompt and answer of each row, each as one text that holds all it says; ("", "") for a malformed row.

    Of an Alpaca row, instruction and input; of a chat, all its messages, each with its role and what it calls.

    Args:
        rows: the data set.
        format: how its rows are read; told from the names of its columns by default.

    Raises:
        ValueError: when the rows have no texts of a known kind.

    >>> from datasets import Dataset
    >>> rows = Dataset.from_list([{"instruction": "Add.", "input": "1 and 2", "output": "3"}])
    >>> list(row_texts(TableReader(rows)))
    [('Add.\\n1 and 2', '3')]
    """
    format = _format_of(rows.column_names, format)
    if format is None:
        answers_of(pd.DataFrame(columns=rows.column_names))  # raises, and says what is wanted
    for table in rows.tables(columns_read(format, rows.column_names)):
        for start in range(0, len(table), _ROWS):
            yield from (_whole_texts(row, format) for row in table.slice(start, _ROWS).to_pylist())


def _whole_texts(row: Mapping[str, Any], format: PromptFormat) -> tuple[str, str]:
    try:
        if not isinstance(format, TemplateFormat):
            prompt, answer = format.parts(row)
            return _messages_text(prompt), _messages_text(answer)
        system = () if format.system is None else (plain(row[format.system]),)
        instruction, extra, output = format.texts(row)
        return "\n".join(filter(None, (*system, instruction, extra))), output
    except MalformedRow:
        return "", ""


def _messages_text(messages: str | list[dict[str, Any]]) -> str:
    if isinstance(messages, str):
        return messages
    lines = []
    for message in messages:
        more = {key: value for key, value in message.items() if key not in ("role", "content")}
        said = message.get("content") or ""
        lines += [f"{message['role']}: {said}", *([json.dumps(more, sort_keys=True, default=str)] if more else [])]
    return "\n".join(lines)


def _without_template(prompts: list[str]) -> tuple[list[str], list[str]]:
    """Instructions and inputs of Alpaca prompts; of others, what is left without the text that all of them share."""
    matches = [_ALPACA.search(prompt) for prompt in prompts]
    others = {_RESPONSE.sub("", prompt) for prompt, match in zip(prompts, matches, strict=True) if not match} - {""}
    before = after = ""
    if len(others) > 2:
        before = _common_start(others)
        before = before[: max(before.rfind("\n"), before.rfind(">")) + 1]  # whole lines or marks, never half a word
        after = _common_start({prompt[len(before) :][::-1] for prompt in others})[::-1]
        after = after[min((at for at in (after.find("\n"), after.find("<")) if at >= 0), default=len(after)) :]
    instructions = [
        match["instruction"] if match else _RESPONSE.sub("", prompt).removeprefix(before).removesuffix(after)
        for prompt, match in zip(prompts, matches, strict=True)
    ]
    return instructions, [(match["input"] or "") if match else "" for match in matches]


def _common_start(texts: set[str]) -> str:
    first, last = min(texts), max(texts)  # what these two share, all that sort between them share too
    return first[: common_prefix_length(first, last)]


def plain(value: Any) -> str:
    """The text of a cell: of a chat, its last turn (the question) and how many turns came before it."""
    if isinstance(value, Mapping):
        return plain(value.get("content", value.get("value", value.get("text"))))
    if isinstance(value, (list, tuple, np.ndarray)):
        turns = [item for item in value if isinstance(item, Mapping) and ("role" in item or "from" in item)]
        if not turns:
            return " ".join(plain(part) for part in value)
        earlier = len([turn for turn in turns[:-1] if role_of(turn.get("role") or turn.get("from")) != "system"])
        return (f"[after {earlier} earlier turns] " if earlier else "") + plain(turns[-1])
    return "" if value is None or value is pd.NA or value != value else str(value)


def shortened(text: str, characters: int, lines: int = 8) -> str:
    """The text's start, with an ellipsis where something is left out.

    >>> shortened("one two three", 8)
    'one two…'
    """
    text = _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text.strip().replace("\r\n", "\n"))
    cut = "\n".join(text.split("\n")[:lines])
    if len(cut) > characters:
        cut = cut[:characters]
        blank = max(cut.rfind(" "), cut.rfind("\n"))
        cut = cut[:blank] if blank > 0.7 * characters else cut  # languages without spaces are cut between characters
    return text if len(cut) == len(text) else cut.rstrip() + "…"
