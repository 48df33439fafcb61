"""The rows of a data set as TRL's SFTTrainer is given them: with ids, without those that cannot be trained on.

Rows that cannot be rendered are left out here, and counted; TRL would stop at the first of them. So are refusals, where
a recipe wants that.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value

from ..data.chat_template import reads_as_text
from ..data.conversation import ConversationEncoder, read_conversation
from ..data.encoding import Encoder
from ..data.format_choice import FormatOptions, columns_read, resolve_format
from ..data.formats import (
    ChatFormat,
    MalformedRow,
    PromptCompletionFormat,
    PromptFormat,
    answer_text,
    rows_of,
    to_training_row,
)
from ..data.json_feature import Json
from ..data.refused_answers import looks_like_refusal
from ..data.row_ids import find_ids
from ..errors import UserError
from ..method.choices import RANKED_BY
from ..method.number_words import many
from ..method.reasons import Status
from ..method.score_histogram import Threshold
from ..method.selection import coded
from ..training.row_tokens import TOKEN_COLUMNS

logger = logging.getLogger(__name__)

# Columns that TRL reads as its own work, whatever they hold: tokens, masks, texts of other forms.
_TRLS = {*TOKEN_COLUMNS, "position_ids", "token_type_ids", "mm_token_type_ids"}
_UNTOLD = "untold answers"
_TRLS |= {"text", "messages", "conversations", "tools", "chat_template_kwargs"}


def prepare(
    rows: Dataset,
    format: str | PromptFormat | FormatOptions | None,
    tokenizer: Callable[[], Any] | None = None,
    every_answer: bool = False,
) -> tuple[Dataset, dict[Any, str]]:
    """Rows as TRL's SFTTrainer reads them, with an id and all columns that neither the format nor TRL reads.

    Rows that cannot be rendered are left out, with one warning.

    Args:
        rows: rows in any known format.
        format: a format, its name or what is said of it; told from the columns by default.
        tokenizer: gives the tokenizer whose chat template is to write the rows; asked for chats alone.
        every_answer: whether all answers of chats are trained on, and not the last alone: they stay one conversation.

    Returns:
        The rows, and what is wrong with each that was left out, by its id.

    Raises:
        ValueError: when no row can be rendered.
    """
    resolved = resolve_format(format, rows.column_names)
    rows, ids = with_ids(rows)
    consumed = {"instruction", "input", "output"} & set(rows.column_names)
    consumed |= set(columns_read(resolved, rows.column_names))
    aside = sorted((_TRLS - {"text", "tools", "chat_template_kwargs"} - consumed) & set(rows.column_names))
    if aside:
        logger.warning("Columns that TRL would take for its own are set aside: %s.", ", ".join(aside))
    chats = isinstance(resolved, ChatFormat) or _holds_messages(rows, resolved)
    whole = every_answer and isinstance(resolved, ChatFormat)
    convert = _Convert(resolved, tokenizer() if chats and tokenizer is not None else None, whole)
    read = [name for name in rows.column_names if name in {*consumed, "tools", "chat_template_kwargs"}]
    checked = rows.select_columns(read).map(convert.check, remove_columns=read, desc="Checking rows")
    problems = {i: problem for i, problem in enumerate(checked["problem"]) if problem}
    bad, left_out = list(problems), {}
    if bad:
        first = f"row {bad[0]}: {problems[bad[0]]}"
        if len(bad) == len(rows):
            raise UserError(
                f"None of {many(len(rows), 'row')} can be trained on as {resolved.name!r}; the first one, {first}."
            )
        said = "%s of %s cannot be trained on as %r: left out of the pool; the first one, %s."
        logger.warning(said, f"{len(bad):,}", many(len(rows), "row"), resolved.name, first)
        left_out = dict(zip(rows.select(bad)[ids], problems.values(), strict=True))
        rows = rows.select(np.setdiff1d(np.arange(len(rows)), bad))
    removed = sorted((consumed | _TRLS) & set(rows.column_names) - {"prompt", "completion"})
    features = {name: kind for name, kind in rows.features.items() if name not in removed}
    # As JSON each message and row has its own names; Arrow would give all of them the names of all, with nulls.
    kind = List(Json()) if chats else Value("string")
    features |= {"messages": kind} if whole else {"prompt": kind, "completion": kind}
    extra = {"tools": lambda: Value("string"), "chat_template_kwargs": Json}
    features |= {name: kind() for name, kind in extra.items() if any(checked[name])}
    prepared = rows.map(
        partial(convert, names=sorted(features)),
        remove_columns=removed,
        features=Features(features),
        desc="Formatting rows",
    )
    return prepared, left_out


@dataclass(frozen=True)
class _Convert:
    """A row of a format as TRL reads it, and what is wrong with one that cannot be."""

    format: PromptFormat
    tokenizer: Any
    whole: bool = False

    def __call__(self, row: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
        prepared = to_training_row(row, self.format, self.tokenizer)
        if self.whole:
            prepared["messages"] = prepared["prompt"] + prepared["completion"]
        return {name: value for name, value in prepared.items() if name in names}

    def check(self, row: dict[str, Any]) -> dict[str, Any]:
        """What is wrong with a row, "" for nothing; and whether it has tools, and variables of a template."""
        prepared, problem = {}, ""
        try:
            prepared = to_training_row(row, self.format, self.tokenizer)
        except MalformedRow as error:
            problem = str(error) or "malformed"
        columns = self.format.columns
        if all(row.get(name) is None for name in columns):  # in a mixture, a row of a data set with other columns
            problem = f"{' and '.join(columns)} are null"
        tools = prepared.get("tools", "null") != "null"
        return {"problem": problem, "tools": tools, "chat_template_kwargs": bool(prepared.get("chat_template_kwargs"))}


def with_ids(rows: Dataset) -> tuple[Dataset, str]:
    """Rows with a column that tells them apart, and its name: their own, or `row_id` with their positions."""

    def read(name: str) -> Any:
        return rows.select_columns([name]).with_format("arrow")[:][name]

    name, _ = find_ids(rows.column_names, read)
    if name is not None:
        return rows, name
    if "row_id" in rows.column_names:
        rows = rows.remove_columns("row_id")
    return rows.add_column("row_id", list(range(len(rows)))), "row_id"


def _holds_messages(rows: Dataset, format: PromptFormat) -> bool:
    """Whether the prompts of prompt-completion rows are messages."""
    return isinstance(format, PromptCompletionFormat) and any(
        not reads_as_text(row[format.prompt]) for row in rows.take(1)
    )


def with_answer_masks(rows: Dataset, tokenizer: Any) -> Dataset:
    """Whole chats as TRL's SFTTrainer reads rows that are tokenised: `input_ids`, and `assistant_masks` that say which
    of them are answers and what ends their turns.

    For templates of which TRL does not know how to mark answers: they are found by rendering, see `data.conversation`.

    Raises:
        UserError: for a template that does not tell in any row.
    """
    encoder = ConversationEncoder(Encoder(tokenizer))
    read = [name for name in ("messages", "tools", "chat_template_kwargs") if name in rows.column_names]

    def mask(batch: dict[str, list]) -> dict[str, list]:
        chats = [read_conversation(row["messages"], 0, row, tokenizer) for row in rows_of(batch)]
        ids, masks = zip(*encoder.trained_on(chats), strict=True)
        untold = [sum(span is None for span in chat.spans) for chat in chats]
        return {"input_ids": list(ids), "assistant_masks": list(masks), _UNTOLD: untold}

    masked = rows.map(mask, batched=True, remove_columns=read, desc="Finding answers")
    untold = np.array(masked[_UNTOLD])
    if not any(1 in row for row in masked["assistant_masks"]):
        name = getattr(tokenizer, "name_or_path", "") or "the tokenizer"
        raise UserError(
            f"The chat template of {name} does not tell where answers begin and end: put its answers between "
            "{% generation %} and {% endgeneration %}, or set assistant_only_loss: false to train on last answers."
        )
    if untold.any():
        logger.warning(
            "The chat template does not tell where %s begin and end: they are not trained on.",
            many(int(untold.sum()), f"answer of {many(int((untold > 0).sum()), 'row')}", "answers"),
        )
    return masked.remove_columns(_UNTOLD)


def without_refusals(rows: Dataset) -> Dataset:
    """Rows whose last answer does not look like a refusal; says how many were left out."""

    said = "messages" if "messages" in rows.column_names else "completion"

    def keeps(completion: str | list[dict[str, Any]] | None) -> bool:
        return not looks_like_refusal(answer_text(completion[-1:] if said == "messages" else completion))

    kept = rows.filter(keeps, input_columns=said, desc="Leaving out refusals")
    logger.warning(
        "drop_refusals: %s of %s left out, their answers look like refusals; the pool is the other %s.",
        f"{len(rows) - len(kept):,}",
        many(len(rows), "row was", "rows were"),
        f"{len(kept):,}",
    )
    return kept


def by_value(rows: Dataset, column: str) -> dict[str, Dataset]:
    """Held-out rows as a set for each value of a column, by the value as a text.

    Raises:
        UserError: for rows without that column.
    """
    if column not in rows.column_names:
        raise UserError(f"eval_by: the held-out rows have no column {column!r}; they have {sorted(rows.column_names)}.")
    texts, codes = coded(rows.select_columns([column]).to_pandas()[column])
    return {text: rows.select(np.flatnonzero(codes == place)) for place, text in enumerate(texts.tolist())}


def at_or_above(rows: Dataset, threshold: Threshold, score: str) -> Dataset:
    """Rows with a score at or above a threshold, by the column that they came with; says how many were left out.

    Their number is known before a step is planned, so that budgets stay exact: `keep` is of these rows.

    Args:
        rows: that were scored.
        threshold: with the name of its score, or without one.
        score: that name, where the threshold has none.

    Raises:
        UserError: for rows without that column, and where none is left.
    """
    name = threshold.score or score
    if name not in rows.column_names:
        raise UserError(
            f"threshold is one of {name}, which is no column of the rows: {sorted(rows.column_names)}. Score them with "
            f"`ifd-trainer score --scores {name}` first, by the model that the threshold was agreed on for."
        )

    def numbers(name: str) -> np.ndarray:
        values = rows.select_columns([name]).to_pandas()[name]
        try:
            return values.to_numpy(dtype=np.float64, na_value=np.nan)
        except (ValueError, TypeError) as error:
            raise UserError(f"threshold: the column {name} holds no numbers.") from error

    kept = numbers(name) >= threshold.value
    if "ifd_status" in rows.column_names:
        kept &= np.array([status == Status.OK.value for status in rows["ifd_status"]])
    limited = name if name in RANKED_BY else RANKED_BY[0]
    if threshold.max_ifd is not None and limited in rows.column_names:
        kept &= ~(numbers(limited) >= threshold.max_ifd)
    if not kept.any():
        raise UserError(
            f"No row has {name} >= {threshold.value:g}: this site has none to train on. Leave it out, or agree on "
            "another threshold."
        )
    logger.warning(
        "threshold: %s with %s >= %g; the other %s left out of the pool.",
        many(int(kept.sum()), "row"),
        name,
        threshold.value,
        many(int((~kept).sum()), "is", "are"),
    )
    return rows.select(np.flatnonzero(kept))
