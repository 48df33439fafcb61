"""Sets of held-out rows: the recipe's own, and further ones, of other topics or other sources, by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset

from ..data.chat_template import MalformedRow, reads_as_text, text_of
from ..data.files import load_rows
from ..data.format_choice import FormatOptions, resolve_format
from ..data.formats import ChatFormat, PromptCompletionFormat, PromptFormat, TemplateFormat
from ..data.message_trees import as_chats
from ..errors import UserError
from ..recipe.file import beside
from ..report.tables import labels_of
from .measures import MAIN, Measures

_PROMPTS = ("prompt", "instruction", "Instruction", "question", "text")  # columns of prompts in public sets
_ANY = "-"  # in the place of an answer, which nobody reads


@dataclass(frozen=True)
class HeldOutSet:
    """Rows that are scored and never trained on.

    Attributes:
        name: as tables have it; `MAIN` for the recipe's own.
        rows: as they were read.
        format: how they are read.
        category, group: names of the columns with their categories, and with what they belong to, if they have any.
    """

    name: str
    rows: Dataset
    format: PromptFormat
    category: str | None = None
    group: str | None = None


def read_sets(
    rows: Dataset, format: PromptFormat, measures: Measures, folder: Path, options: FormatOptions
) -> list[HeldOutSet]:
    """The recipe's own held-out rows and the further sets that `measures` names.

    A set for which no format is said has that of the recipe's rows if it has their columns; else what the recipe says
    of formats holds, and the names of its own columns.

    Args:
        rows: the recipe's held-out rows.
        format: of the rows that are trained on.
        folder: of the recipe, beside which files may lie.
        options: what the recipe says of formats.

    Raises:
        UserError: for a set that cannot be read, has no rows, or whose format is not known; and where no set has the
            column of categories or groups.
    """
    sets = [HeldOutSet(MAIN, rows, _format(rows, {}, format, options))]
    for name, source in measures.held_out_sets.items():
        try:
            read = load_rows(beside(source["path"], folder), source.get("split", "test"), source.get("config"))
            read = as_chats(read)
            if not len(read):
                raise UserError(f"{source['path']} has no rows.")
            sets.append(HeldOutSet(name, read, _format(read, source, format, options)))
        except UserError as error:
            raise type(error)(f"held_out_sets: {name}: {error}") from error
    sets = [replace(each, **_columns(each.rows, measures)) for each in sets]
    known = sorted({name for each in sets for name in each.rows.column_names})
    for key in ("category_column", "group_column"):
        if (column := getattr(measures, key)) is not None and column not in known:
            raise UserError(f"{key}: no set of held-out rows has a column {column!r}; they have {', '.join(known)}.")
    return sets


def _columns(rows: Dataset, measures: Measures) -> dict[str, str | None]:
    """The columns of categories and groups, of those that a set has."""
    named = {"category": measures.category_column, "group": measures.group_column}
    return {key: column if column in rows.column_names else None for key, column in named.items()}


def read_prompts(own: HeldOutSet, measures: Measures, folder: Path) -> list[HeldOutSet]:
    """The sets of prompts that `measures` names, as rows of the recipe's own format, without answers that count.

    Args:
        own: the recipe's own rows, whose format is that of the prompts.
        folder: of the recipe, beside which files may lie.

    Raises:
        UserError: for a set that cannot be read, or whose texts cannot be found.
    """
    sets = []
    for name, source in measures.prompts.items():
        try:
            read = load_rows(beside(source["path"], folder), source.get("split", "test"), source.get("config"))
            column, category = _prompt_column(read, source.get("column")), source.get("category_column")
            if category is not None and category not in read.column_names:
                raise UserError(f"there is no column {category!r}; there are {', '.join(read.column_names)}.")
        except UserError as error:
            raise type(error)(f"prompts: {name}: {error}") from error
        rows = [asking(text, own) for text in read[column]]
        categories = [{} if category is None else {"category": value} for value in read[category or column]]
        rows = Dataset.from_list([{**row, **of} for row, of in zip(rows, categories, strict=True)])
        sets.append(HeldOutSet(name, rows, own.format, category and "category"))
    return sets


def asking(text: str, own: HeldOutSet) -> dict[str, Any]:
    """A row that asks a text in the format of others, with an answer that stands for any.

    >>> from ifd_trainer.data.formats import ALPACA
    >>> asking("2 + 2?", HeldOutSet("own", Dataset.from_dict({"instruction": ["?"], "output": ["!"]}), ALPACA))
    {'instruction': '2 + 2?', 'output': '-'}
    """
    chat, format = [{"role": "user", "content": text}], own.format
    answer = [{"role": "assistant", "content": _ANY}]
    if isinstance(format, ChatFormat):
        return {format.messages: chat + answer}
    if isinstance(format, PromptCompletionFormat):
        texts = reads_as_text(own.rows[0][format.prompt])
        return {format.prompt: text if texts else chat, format.completion: _ANY if texts else answer}
    if isinstance(format, TemplateFormat) and format.instances is None:
        return {format.instruction: text, format.output: _ANY} | ({format.system: ""} if format.system else {})
    raise UserError(f"prompts cannot be written in the format {format.name!r}. Leave prompts out.")


def question_of(row: Mapping[str, Any], format: PromptFormat) -> str:
    """What a row asks, without the words that its format puts around it: for a reader, not for the model.

    >>> from ifd_trainer.data.formats import ALPACA, MESSAGES
    >>> question_of({"instruction": "Add.", "input": "1, 2", "output": "3"}, ALPACA)
    'Add.\\n\\n1, 2'
    >>> question_of({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "?"}]}, MESSAGES)
    'Hi'
    """
    try:
        if isinstance(format, TemplateFormat):
            return "\n\n".join(filter(None, format.texts(row)[:2]))
        prompt = format.parts(row)[0]
    except MalformedRow:
        return ""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return text_of(prompt[0].get("content"))
    return "\n\n".join(f"{message['role']}: {text_of(message.get('content'))}" for message in prompt)


def _prompt_column(rows: Dataset, named: str | None) -> str:
    column = named or next((name for name in _PROMPTS if name in rows.column_names), None)
    if column is None or column not in rows.column_names:
        missing = "no column of prompts is known" if column is None else f"there is no column {column!r}"
        raise UserError(f"{missing}; there are {', '.join(rows.column_names)}. Name one with column.")
    if not len(rows) or not all(isinstance(text, str) and text.strip() for text in rows[column]):
        raise UserError(f"the column {column!r} has to hold texts, at least one and none of them empty.")
    return column


def _format(rows: Dataset, source: Mapping[str, Any], usual: PromptFormat, options: FormatOptions) -> PromptFormat:
    said = {key: value for key, value in source.items() if key not in ("path", "split", "config")}
    if not said and set(usual.columns) <= set(rows.column_names):
        return usual
    return resolve_format(FormatOptions(**said) if said else options, rows.column_names)


def rows_frame(sets: Sequence[HeldOutSet]) -> pd.DataFrame:
    """A line for each row of all sets, one set after the other: its `set`, and its `category` and `group`, if any.

    >>> from ifd_trainer.data.formats import ALPACA
    >>> rows = Dataset.from_dict({"topic": ["sums", None], "text": ["1 + 1", "?"]})
    >>> rows_frame([HeldOutSet("own", rows, ALPACA, category="topic")])["category"].tolist()
    ['sums', '(none)']
    """
    parts = []
    for each in sets:
        part = pd.DataFrame({"set": [each.name] * len(each.rows), "category": None, "group": None}, dtype=object)
        if each.category is not None:
            part["category"] = labels_of(pd.Series(each.rows[each.category][:]))
        if each.group is not None:
            values = [None if value is None else str(value) for value in each.rows[each.group]]
            part["group"] = pd.Series(values, dtype=object)
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


def clusters_of(groups: pd.Series) -> np.ndarray | None:
    """(n,) what rows belong to, a row without a group to itself; None where no row has one.

    >>> clusters_of(pd.Series(["a", None, "a"])).tolist()
    ['of a', 'alone 1', 'of a']
    """
    if groups.isna().all():
        return None
    return np.array([f"alone {n}" if pd.isna(group) else f"of {group}" for n, group in enumerate(groups)])
