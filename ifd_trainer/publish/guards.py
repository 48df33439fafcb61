"""What keeps noise out of a published set: the guards of a training run, by what was measured when rows were scored.

`ifd-trainer score --calibrate` measures (`IFDScorer.calibrate`), and the file beside the scores holds it. What each
guard does, and what its numbers mean, stands with its class in `method`.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow as pa

from ..data.duplicates import duplicate_groups
from ..data.formats import PromptFormat
from ..data.readable_text import row_texts
from ..data.row_ids import ranks
from ..data.table_reader import TableReader
from ..errors import UserError
from ..method.calibrated_limit import CalibratedLimit
from ..method.columns import EOT_LOSS
from ..method.duplicates import Duplicates, surplus
from ..method.reasons import DUPLICATE, REFUSAL, UNFINISHED, Status
from ..method.unfinished import Unfinished, too_little
from .provenance import Provenance

_MEASURE = "score it with `ifd-trainer score --calibrate`"


def measured_limit(provenance: Provenance, score: str, alpha: float, data: str) -> float:
    """The calibrated limit of scores of this provenance.

    Raises:
        UserError: where nothing was measured with them, or too little for an alpha this small.

    >>> round(measured_limit(Provenance(wrong_ifd=[0.9, 0.8, 1.1, 0.95]), "ifd", 0.2, "scored.parquet"), 2)
    0.8
    """
    wrong = {"ifd": provenance.wrong_ifd, "ifd_ppl": provenance.wrong_ifd_ppl}[score]
    if wrong is None:
        raise UserError(f"--max-ifd calibrated: {_not_measured(provenance, data)}, or give --max-ifd a number.")
    return CalibratedLimit.of(alpha).limit(np.array(wrong, dtype=np.float64))


def unfinished_rows(eot_loss: np.ndarray | None, provenance: Provenance, data: str) -> tuple[np.ndarray, str | None]:
    """Which of n rows have an answer that stops before its end, (n,) bool; none, and why, where nothing tells.

    Args:
        eot_loss: (n,) losses of the end of turn, None where there is no such column.

    Raises:
        UserError: where there is no such column, or nothing was measured with the scores.
    """
    cut = provenance.cut_eot_loss
    if cut is None or eot_loss is None:
        raise UserError(f"--drop-unfinished: {_not_measured(provenance, data, eot_loss is None)}, or leave it out.")
    if not np.isfinite(eot_loss).any():
        made = f"definition {provenance.definition}" if provenance.definition else "their definition"
        why, way = f"scores by {made}", "Score them by the definition paper, or leave it out."
        if provenance.definition == "paper":
            why, way = "each answer is cut off, or no token ends its turn", "Leave it out."
        raise UserError(
            f"--drop-unfinished reads the loss of the end of turn, which none of the rows in {data} has ({why}). {way}"
        )
    cut = np.array(cut, dtype=np.float64)
    threshold = Unfinished().threshold(eot_loss, cut)
    if np.isfinite(threshold):
        return eot_loss >= threshold, None
    return np.zeros(len(eot_loss), dtype=bool), f"--drop-unfinished drops none: {too_little(eot_loss, cut)}"


def dropped_rows(
    rows: TableReader,
    usable: np.ndarray,
    status: pd.Series,
    ids: np.ndarray | pa.ChunkedArray | None,
    refusals: np.ndarray | None = None,
    unfinished: np.ndarray | None = None,
    duplicates: Duplicates | None = None,
    format: PromptFormat | None = None,
) -> dict[str, np.ndarray]:
    """Which of n rows are dropped, (n,) bool by reason, each for one reason; but for refusals, rows that might be kept.

    Args:
        rows: with their texts, of which duplicates are told.
        usable: (n,) rows with what is ranked by, below the limit.
        status: `ifd_status`.
        ids: (n,) of duplicates that may be kept, the one with the lowest id is; None for positions.
        refusals: (n,) rows whose answer looks like a refusal; None not to drop them.
        unfinished: (n,) rows whose answer stops before its end; None not to drop them.
        duplicates: when rows say the same; None not to look for them.
        format: how the rows are read; told from the names of their columns by default.

    Raises:
        ValueError: when the rows have no texts of a known kind, and duplicates are looked for.
    """
    dropped = {}
    usable = np.asarray(status == Status.OK.value) & usable
    if refusals is not None:
        dropped[REFUSAL] = refusals
        usable &= ~refusals
    if unfinished is not None:
        dropped[UNFINISHED] = usable & unfinished
        usable &= ~unfinished
    if duplicates is not None:
        groups = duplicate_groups(row_texts(rows, format), duplicates.similarity)
        dropped[DUPLICATE] = surplus(groups, _order(ids, groups, usable), usable, np.zeros(len(groups), dtype=bool))
    return dropped


def _order(ids: np.ndarray | pa.ChunkedArray | None, groups: np.ndarray, usable: np.ndarray) -> np.ndarray:
    """Numbers (n,) that sort as the ids of the rows that may stand for one another do."""
    if ids is None or isinstance(ids, np.ndarray):
        return np.arange(len(groups)) if ids is None else ids
    several = np.bincount(groups, usable, len(groups)) > 1
    return ranks(ids, usable & several[groups])


def _not_measured(provenance: Provenance, data: str, no_column: bool = False) -> str:
    """Why there is no measure, and what gives one."""
    if provenance.program is not None and not provenance.program.startswith("ifd_trainer "):
        return f"the scores are those of {provenance.program}, which measures nothing else of {data}: {_MEASURE}"
    if no_column:
        return f"{data} has no column {EOT_LOSS}: {_MEASURE}"
    return f"nothing says how noise scores in {data} (its .ifd.yaml holds no measure, or is not there): {_MEASURE}"
