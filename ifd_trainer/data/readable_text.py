"""Instruction, input and answer of a row for a person to read, whatever columns or template they are in."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import pandas as pd

from ..errors import UserError
from .chat_template import role_of

_ALPACA = re.compile(
    r"### Instruction:\s*\n(?P<instruction>.*?)(?:\n+### Input:\s*\n(?P<input>.*?))?\s*### Response:?\s*\Z", re.DOTALL
)
_RESPONSE = re.compile(r"\s*### Response:?\s*\Z")
_END_OF_TURN = re.compile(r"(?:\s*(?:<\|[\w ]+\|>|</s>|<eos>|<end_of_turn>|<｜[^｜]*｜>))+\s*\Z")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")
_TEXT_COLUMNS = (("prompt", "answer"), ("prompt", "completion"), ("instruction", "output"), ("instruction", "response"))


def text_columns(frame: pd.DataFrame) -> pd.DataFrame | None:
    """`instruction`, `input` and `answer` of each row, without what a template adds; None if there are no texts."""
    sources = text_sources(frame.columns)
    pair, chat = (sources, None) if len(sources) == 2 else (None, next(iter(sources), None))
    if pair is not None:
        prompts = [plain(value) for value in frame[pair[0]]]
        answers = [plain(value) for value in frame[pair[1]]]
    elif chat is not None:
        prompts, answers = map(list, zip(*map(_split_chat, frame[chat]), strict=True)) if len(frame) else ([], [])
    else:
        return None
    raw = prompts
    if pair is not None and pair[0] == "instruction":
        inputs = [plain(value) for value in frame["input"]] if "input" in frame else [""] * len(frame)
    else:
        prompts, inputs = _without_template(prompts)
    # A header's last character that merged with the answer's first into one token is not the answer's.
    answers = [
        _END_OF_TURN.sub("", answer.removeprefix(":") if prompt.endswith("### Response") else answer)
        for prompt, answer in zip(raw, answers, strict=True)
    ]
    return pd.DataFrame({"instruction": prompts, "input": inputs, "answer": answers}, dtype=object)


def text_sources(names: Collection[str]) -> tuple[str, ...]:
    """The columns that hold the texts: of prompts and of answers, or of chats; none where there are none.

    >>> text_sources(["id", "instruction", "input", "output"]), text_sources(["id", "messages"]), text_sources(["id"])
    (('instruction', 'output'), ('messages',), ())
    """
    pair = next((pair for pair in _TEXT_COLUMNS if set(pair) <= set(names)), None)
    return pair or tuple(name for name in ("messages", "conversations") if name in names)[:1]


def answers_of(frame: pd.DataFrame) -> list[str]:
    """The answer of each row, "" for none.

    Raises:
        ValueError: when the rows have no texts of a known kind.
    """
    found = text_columns(frame)
    if found is None:
        wanted = "; ".join(f"{prompt} and {answer}" for prompt, answer in _TEXT_COLUMNS)
        raise UserError(f"No answers among the columns {sorted(frame)}. Wanted: {wanted}; messages; conversations.")
    return found["answer"].tolist()


def _without_template(prompts: list[str]) -> tuple[list[str], list[str]]:
    """Instructions and inputs of Alpaca prompts; of others, what is left without the text that all of them share."""
    found = [_ALPACA.search(prompt) for prompt in prompts]
    others = {_RESPONSE.sub("", prompt) for prompt, match in zip(prompts, found, strict=True) if not match} - {""}
    before = after = ""
    if len(others) > 2:
        before = _common_start(others)
        before = before[: max(before.rfind("\n"), before.rfind(">")) + 1]  # whole lines or marks, never half a word
        after = _common_start({prompt[len(before) :][::-1] for prompt in others})[::-1]
        after = after[min((at for at in (after.find("\n"), after.find("<")) if at >= 0), default=len(after)) :]
    instructions, inputs = [], []
    for prompt, match in zip(prompts, found, strict=True):
        rest = _RESPONSE.sub("", prompt).removeprefix(before).removesuffix(after)
        instructions.append(match["instruction"] if match else rest)
        inputs.append((match["input"] or "") if match else "")
    return instructions, inputs


def _common_start(texts: set[str]) -> str:
    first, last = min(texts), max(texts)  # what these two share, all that sort between them share too
    return first[: next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))]


def _split_chat(turns: Any) -> tuple[str, str]:
    """What precedes the last assistant turn, and that turn."""
    turns = [turn for turn in (turns if isinstance(turns, (list, tuple, np.ndarray)) else []) if _is_turn(turn)]
    last = max((i for i, turn in enumerate(turns) if _role(turn) == "assistant"), default=len(turns))
    return plain(turns[:last]), plain(turns[last]) if last < len(turns) else ""


def plain(value: Any) -> str:
    """The text of a cell: of a chat, its last turn (the question) and how many turns came before it."""
    if isinstance(value, Mapping):
        return plain(value.get("content", value.get("value", value.get("text"))))
    if isinstance(value, (list, tuple, np.ndarray)):
        turns = [item for item in value if _is_turn(item)]
        if not turns:
            return " ".join(plain(part) for part in value)
        earlier = len([turn for turn in turns[:-1] if _role(turn) != "system"])
        return (f"[after {earlier} earlier turns] " if earlier else "") + plain(turns[-1])
    return "" if value is None or value is pd.NA or value != value else str(value)


def _is_turn(item: Any) -> bool:
    return isinstance(item, Mapping) and ("role" in item or "from" in item)


def _role(turn: Mapping[str, Any]) -> str | None:
    return role_of(turn.get("role") or turn.get("from"))


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
