"""What a model answers to the prompts of rows, beside the rows' own answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pandas as pd
from datasets import Dataset
from torch import nn

from ..data.chat_template import MalformedRow
from ..data.encoding import Encoder, check_positive
from ..data.format_choice import resolve_format
from ..data.formats import Example, PromptFormat
from ..errors import UserError
from ..method.reasons import Status
from ..scoring.model_parts import text_config
from ..scoring.rope_limits import window
from .greedy import TOKENS, Answer, greedy_answers, stop_tokens

_COLUMNS = ("document", "prompt", "reference", "answer", "answer_tokens", "cut_off", "status")


def answers_to(
    model: nn.Module,
    tokenizer: Any,
    rows: Dataset,
    format: str | PromptFormat | None,
    max_new_tokens: int,
    token_budget: int = TOKENS,
) -> pd.DataFrame:
    """Greedy answers to the prompts of rows, which a format writes as it does to score and to train on them.

    A prompt ends where an answer of the row is scored from. Only where the two merge into one token (a colon and a
    quote) is the whole prompt asked, since nobody knows what the answer will begin with.

    Args:
        model: a causal language model of transformers, or one with adapters of peft.
        tokenizer: its own; used, never changed.
        rows: the rows, in the columns that the format reads.
        format: a format or its name; told from the columns by default.
        max_new_tokens: most tokens of an answer.
        token_budget: see `greedy_answers`.

    Returns:
        A line for each row: `document` (its position, as text), `prompt`, `reference` (the row's answer, without what a
        chat template adds), `answer`, `answer_tokens`, `cut_off` (whether the answer would have gone on behind
        max_new_tokens) and `status`. A row that cannot be asked, or has nothing to compare with, has no answer but a
        status that says why: `malformed`, `empty_answer` (its own), `empty_prompt`, or `prompt_too_long` (prompt and
        max_new_tokens are more than the model's window); all others are `ok`. It is the same with any weights.

    Raises:
        UserError: for a format that does not fit, and a max_new_tokens that leaves no token of the window for a prompt.

    >>> rows = Dataset.from_list([{"instruction": "Add 1 and 2.", "output": "3"}])                  # doctest: +SKIP
    >>> answers_to(model, tokenizer, rows, "alpaca", max_new_tokens=64).answer.tolist()             # doctest: +SKIP
    ['The sum of 1 and 2 is 3.']
    """
    most = window_for(model, max_new_tokens)
    rows, format = rows.with_format(None), resolve_format(format, rows.column_names)
    examples = [_rendered(row, format, tokenizer) for row in rows]
    asked = [_status(example) for example in examples]
    prompts = {i: _prompt_ids(examples[i], tokenizer) for i, status in enumerate(asked) if status is Status.OK}
    if most is not None:
        too_long = [i for i, ids in prompts.items() if len(ids) + max_new_tokens > most]
        for i in too_long:
            asked[i] = Status.PROMPT_TOO_LONG
            del prompts[i]
    present = [examples[i] for i in prompts]
    stop = stop_tokens(model, tokenizer) | _turn_ends(present, tokenizer)
    said = greedy_answers(model, tokenizer, list(prompts.values()), max_new_tokens, stop, token_budget)
    answers = {i: _ended(answer, examples[i].end) for i, answer in zip(prompts, said, strict=True)}
    lines = [_line(i, *each, answers.get(i)) for i, each in enumerate(zip(examples, asked, strict=True))]
    return pd.DataFrame(lines, columns=list(_COLUMNS))


def window_for(model: nn.Module, max_new_tokens: int) -> int | None:
    """Most tokens of a prompt and its answer; None where the model does not tell. Weights are not needed.

    Raises:
        UserError: where answers would leave no token for a prompt.
    """
    check_positive(max_new_tokens=max_new_tokens)
    most = window(text_config(model))
    if most is not None and max_new_tokens >= most:
        raise UserError(
            f"max_new_tokens={max_new_tokens} leaves no token of the model's window of {most} for a prompt. Lower it."
        )
    return most


def _rendered(row: dict[str, Any], format: PromptFormat, tokenizer: Any) -> Example | None:
    try:
        return format.render(row, tokenizer)
    except MalformedRow:
        return None


def _status(example: Example | None) -> Status:
    if example is None:
        return Status.MALFORMED
    if not _reference(example).strip():
        return Status.EMPTY_ANSWER
    return Status.OK if example.asked else Status.EMPTY_PROMPT


def _reference(example: Example) -> str:
    return example.answer.removesuffix(example.end)


def _prompt_ids(example: Example, tokenizer: Any) -> list[int]:
    # A space at a prompt's end is part of an answer's first token, in most tokenizers and where the row is scored.
    text = example.prompt.rstrip(" ")
    ids = tokenizer(text, add_special_tokens=example.special_tokens, verbose=False)["input_ids"]
    ended = example.special_tokens and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id
    return ids[:-1] if ended else ids  # some tokenizers end every text


def _turn_ends(examples: Sequence[Example], tokenizer: Any) -> set[int]:
    """The special tokens with which the rows' own answers end their turns."""
    special = set(tokenizer.all_special_ids)
    pairs = Encoder(tokenizer)(examples)
    return {pair.ending[-1] for pair in pairs if pair.ending and pair.ending[-1] in special}


def _ended(answer: Answer, end: str) -> Answer:
    """An answer without the text that ends a turn, where a template writes it in words, and what follows it."""
    text, found, _ = answer.text.partition(end.strip()) if end.strip() else (answer.text, "", "")
    return dataclasses.replace(answer, text=text, cut_off=False) if found else answer


def _line(place: int, example: Example | None, status: Status, answer: Answer | None) -> tuple[Any, ...]:
    texts = (None, None) if example is None else (example.prompt, _reference(example))
    said = (None, 0, False) if answer is None else (answer.text, answer.tokens, answer.cut_off)
    return str(place), *texts, *said, status.value
