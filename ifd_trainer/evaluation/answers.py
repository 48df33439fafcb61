"""What a model answers to the prompts of rows, beside the rows' own answers."""

from __future__ import annotations

from typing import Any

import pandas as pd
from datasets import Dataset
from torch import nn

from ..data.format_choice import resolve_format
from ..data.formats import PromptFormat
from ..method.reasons import Status
from ..scoring.generation import TOKENS, Answer, greedy_answers, stop_tokens
from ..scoring.model_parts import text_config
from ..scoring.questions import Question, check_window, ended, questions, rendered, turn_ends
from ..scoring.rope_limits import window

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

    What is asked of a row, and where the answer to it ends, is in `scoring.questions`.

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
    asked = questions([rendered(row, format, tokenizer) for row in rows], tokenizer, max_new_tokens, most)
    present = {i: question for i, question in enumerate(asked) if question.status is Status.OK}
    ends = turn_ends([question.example for question in present.values()], tokenizer)
    stop = stop_tokens(model, tokenizer).union(*ends)
    prompts = [question.prompt for question in present.values()]
    said = greedy_answers(model, tokenizer, prompts, max_new_tokens, stop, token_budget)
    answers = {i: ended(answer, asked[i].example.end) for i, answer in zip(present, said, strict=True)}
    return pd.DataFrame(
        [_line(i, question, answers.get(i)) for i, question in enumerate(asked)], columns=list(_COLUMNS)
    )


def window_for(model: nn.Module, max_new_tokens: int) -> int | None:
    """Most tokens of a prompt and its answer; None where the model does not tell. Weights are not needed.

    Raises:
        UserError: where answers would leave no token for a prompt.
    """
    most = window(text_config(model))
    check_window(most, max_new_tokens)
    return most


def _line(place: int, question: Question, answer: Answer | None) -> tuple[Any, ...]:
    prompt = None if question.example is None else question.example.prompt
    said = (None, 0, False) if answer is None else (answer.text, answer.tokens, answer.cut_off)
    return str(place), prompt, question.reference, *said, question.status.value
