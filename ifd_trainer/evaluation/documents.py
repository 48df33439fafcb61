"""Measures of single documents, in one long form: what is asked of a model once it has been trained.

Held-out rows and benchmarks alike give frames with a line for each document and measure, so that arms can be paired
document by document, and one page can show them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

COLUMNS = ("set", "measure", "document", "value", "higher", "group")


def long_form(
    set: str,
    measure: str,
    documents: Sequence[str],
    values: Sequence[float],
    higher: bool | None = True,
    groups: Sequence[str | None] | None = None,
) -> pd.DataFrame:
    """One measure of n documents, with the columns `COLUMNS`.

    Args:
        set: which documents they are, "held-out rows" or a task's name.
        measure: what was measured of them.
        documents: n keys, no two alike.
        values: n numbers.
        higher: whether a higher value is the better one; None where neither is.
        groups: of each document, what it belongs to, None for nothing.

    >>> long_form("arc", "acc", ["arc/0", "arc/1"], [True, False]).value.tolist()
    [1.0, 0.0]
    """
    columns: dict[str, Any] = {
        "set": set,
        "measure": measure,
        "document": list(documents),
        "value": [float(value) for value in values],
        "higher": higher,
        "group": pd.Series([None] * len(documents) if groups is None else list(groups), dtype=object),
    }
    return pd.DataFrame(columns, columns=list(COLUMNS))


def joined(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Several such frames as one, without any: one without lines."""
    return pd.concat(frames or [long_form("", "", [], [])], ignore_index=True)
