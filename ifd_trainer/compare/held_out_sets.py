"""Sets of held-out rows: the recipe's own, and further ones, of other topics or other sources, by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset

from ..data.files import load_rows
from ..data.format_choice import FormatOptions, resolve_format
from ..data.formats import PromptFormat
from ..data.message_trees import as_chats
from ..errors import UserError
from ..report.tables import labels_of
from ..training.recipe_file import beside
from .measures import MAIN, Measures


@dataclass(frozen=True)
class HeldOutSet:
    """Rows that are scored and never trained on.

    Attributes:
        name: as tables have it; `MAIN` for the recipe's own.
        rows: as they were read.
        format: how they are read.
    """

    name: str
    rows: Dataset
    format: PromptFormat


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
    known = sorted({name for each in sets for name in each.rows.column_names})
    for key in ("category_column", "group_column"):
        if (column := getattr(measures, key)) is not None and column not in known:
            raise UserError(f"{key}: no set of held-out rows has a column {column!r}; they have {', '.join(known)}.")
    return sets


def _format(rows: Dataset, source: Mapping[str, Any], usual: PromptFormat, options: FormatOptions) -> PromptFormat:
    said = {key: value for key, value in source.items() if key not in ("path", "split", "config")}
    if not said and set(usual.columns) <= set(rows.column_names):
        return usual
    return resolve_format(FormatOptions(**said) if said else options, rows.column_names)


def rows_frame(sets: list[HeldOutSet], measures: Measures) -> pd.DataFrame:
    """A line for each row of all sets, one set after the other: its `set`, and its `category` and `group`, if any.

    >>> rows = Dataset.from_dict({"topic": ["sums", None], "text": ["1 + 1", "?"]})
    >>> rows_frame([HeldOutSet("own", rows, None)], Measures(category_column="topic"))["category"].tolist()
    ['sums', '(none)']
    """
    parts = []
    for each in sets:
        part = pd.DataFrame({"set": [each.name] * len(each.rows), "category": None, "group": None}, dtype=object)
        if measures.category_column in each.rows.column_names:
            part["category"] = labels_of(pd.Series(each.rows[measures.category_column][:]))
        if measures.group_column in each.rows.column_names:
            values = [None if value is None else str(value) for value in each.rows[measures.group_column]]
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
