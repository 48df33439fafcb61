"""Rows as questions to a model: the prompt as token ids, the row's own answer to compare with, where an answer ends.

A prompt is written by the row's format as it is to score and to train on, with a chat template's header of the answer
at its end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..data.chat_template import MalformedRow
from ..data.encoding import Encoder, check_positive
from ..data.formats import Example, PromptFormat
from ..errors import UserError
from ..method.reasons import Status
from .generation import Answer, stop_tokens


@dataclass(frozen=True, slots=True)
class Question:
    """A row that a model is asked, or a status that says why it is not.

    Attributes:
        status: `ok`; `malformed`, `empty_answer` (nothing to compare with), `empty_prompt` or `prompt_too_long`.
        example: the rendered row; None for a malformed one.
        prompt: its token ids; none where it is not asked.
    """

    status: Status
    example: Example | None = None
    prompt: tuple[int, ...] = ()

    @property
    def reference(self) -> str | None:
        """The row's own answer, without what a chat template adds."""
        return None if self.example is None else _reference(self.example)


def rendered(row: dict[str, Any], format: PromptFormat, tokenizer: Any) -> Example | None:
    """A row in its format; None for one that the format cannot render."""
    try:
        return format.render(row, tokenizer)
    except MalformedRow:
        return None


def questions(
    examples: Sequence[Example | None], tokenizer: Any, max_new_tokens: int, window: int | None
) -> list[Question]:
    """What a model is asked for each row.

    A prompt ends where an answer of the row is scored from. Only where the two merge into one token (a colon and a
    quote) is the whole prompt asked, since nobody knows what the answer will begin with. Prompts that leave no room for
    max_new_tokens in the window are too long.

    >>> questions([None, Example("What?", "")], None, 8, None)[1].status.value                      # doctest: +SKIP
    'empty_answer'
    """
    return [_question(example, tokenizer, max_new_tokens, window) for example in examples]


def check_window(most: int | None, max_new_tokens: int) -> None:
    """Raise UserError where answers would leave no token of a model's window for a prompt."""
    check_positive(max_new_tokens=max_new_tokens)
    if most is not None and max_new_tokens >= most:
        raise UserError(
            f"max_new_tokens={max_new_tokens} leaves no token of the model's window of {most} for a prompt. Lower it."
        )


def turn_ends(examples: Sequence[Example], tokenizer: Any) -> list[set[int]]:
    """The special tokens, of each row, with which its own answer ends its turn: one or none."""
    special = set(tokenizer.all_special_ids)
    pairs = Encoder(tokenizer)(examples)
    return [{pair.ending[-1]} & special if pair.ending else set() for pair in pairs]


def answered(
    asked: Sequence[Question],
    model: nn.Module,
    tokenizer: Any,
    generate: Callable[[list[tuple[int, ...]], frozenset[int]], list[list[Answer | None]]],
) -> dict[int, list[Answer | None]]:
    """A model's answers to the questions that can be asked, by their places.

    Args:
        asked: the questions.
        model, tokenizer: whose answers they are.
        generate: gives the answers to prompts, for tokens that end a turn.
    """
    places = [place for place, question in enumerate(asked) if question.status is Status.OK]
    ends = turn_ends([asked[place].example for place in places], tokenizer)
    usual = stop_tokens(model, tokenizer)
    # What ends the turn of one row, such as a token that its answer alone ends with, ends no other's.
    groups: dict[frozenset[int], list[int]] = {}
    for place, end in zip(places, ends, strict=True):
        groups.setdefault(frozenset(usual | end), []).append(place)
    found: dict[int, list[Answer | None]] = {}
    for stop, group in groups.items():
        said = generate([asked[place].prompt for place in group], stop)
        for place, answers in zip(group, said, strict=True):
            end = asked[place].example.end
            found[place] = [None if answer is None else ended(answer, end) for answer in answers]
    return {place: found[place] for place in places}


def ended(answer: Answer, end: str) -> Answer:
    """An answer without the text that ends a turn, where a template writes it in words, and what follows it."""
    text, found, _ = answer.text.partition(end.strip()) if end.strip() else (answer.text, "", "")
    return dataclasses.replace(answer, text=text, cut_off=False) if found else answer


def _question(example: Example | None, tokenizer: Any, max_new_tokens: int, window: int | None) -> Question:
    if example is None:
        return Question(Status.MALFORMED)
    if not _reference(example).strip():
        return Question(Status.EMPTY_ANSWER, example)
    if not example.asked:
        return Question(Status.EMPTY_PROMPT, example)
    prompt = _prompt_ids(example, tokenizer)
    if window is not None and len(prompt) + max_new_tokens > window:
        return Question(Status.PROMPT_TOO_LONG, example)
    return Question(Status.OK, example, prompt)


def _reference(example: Example) -> str:
    return example.answer.removesuffix(example.end)


def _prompt_ids(example: Example, tokenizer: Any) -> tuple[int, ...]:
    # A space at a prompt's end is part of an answer's first token, in most tokenizers and where the row is scored.
    text = example.prompt.rstrip(" ")
    ids = tokenizer(text, add_special_tokens=example.special_tokens, verbose=False)["input_ids"]
    without_end = example.special_tokens and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id
    return tuple(ids[:-1] if without_end else ids)  # some tokenizers end every text
