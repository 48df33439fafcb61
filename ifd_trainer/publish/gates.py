"""Gates for synthetic rows in a published set: `ifd-trainer select --gates`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from ..data.files import load_rows
from ..data.formats import PromptFormat
from ..data.gate_measures import example_texts, measured, numbers_read
from ..data.readable_text import row_texts
from ..data.row_ids import ranks
from ..data.table_reader import TableReader
from ..errors import UserError
from ..method.gates import CopyGate, Gate, gate
from ..method.reasons import KEPT


def gated_rows(
    rows: TableReader,
    gates: Sequence[Gate],
    usable: np.ndarray,
    ids: np.ndarray | pa.ChunkedArray | None = None,
    examples: str | None = None,
    format: PromptFormat | None = None,
) -> dict[str, np.ndarray]:
    """Which of n rows gates hold back, (n,) bool by reason, of those that might be kept.

    Args:
        rows: with their texts.
        gates: in their order.
        usable: (n,) bool, rows that might be kept.
        ids: (n,) of rows that say the same, the one with the lowest stays; None for positions.
        examples: file or hub name of rows that these were generated from.
        format: how the rows are read; told from the names of their columns by default.

    Raises:
        UserError: for rows or examples without texts of a known kind, and for what gates raise.
    """
    order = ids if ids is None or isinstance(ids, np.ndarray) else None
    if order is None and ids is not None and any(isinstance(each, CopyGate) for each in gates):
        order = ranks(ids, usable)
    try:
        texts = example_texts(load_rows(examples)) if examples is not None else []
    except UserError as error:
        raise UserError(f"--gate-examples {examples}: {error}") from error
    columns = numbers_read(gates, rows.column_names, rows.column)
    reasons = gate(measured(row_texts(rows, format), gates, texts, columns, order), gates, usable)
    found = dict.fromkeys(reason for reason in reasons.tolist() if reason not in (None, KEPT))
    return {reason: reasons == reason for reason in found}
