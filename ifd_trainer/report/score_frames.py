"""Score columns as plain data frames, and numbers as text: what plots, tables and the page share.

Rows are data frames with the columns of `method.columns.IFD_COLUMNS` and, where a policy has chosen, `reason` (or
`ifd_reason`) and `times`, how often an epoch trains on the row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from ..data.row_ids import named_ids
from ..errors import UserError
from ..method.choices import RANKED_BY
from ..method.columns import LIKENESS, SCORES, TARGET_MEANINGS
from ..method.equations import FROM_LOSSES
from ..method.further_scores import FURTHER
from ..method.number_words import many, rounded_below
from ..method.reasons import (
    ABOVE_LIMIT,
    BELOW_CUT,
    HIDDEN,
    HIGHER_SCORE,
    KEPT,
    LESS_ALIKE,
    NOT_DRAWN,
    NOT_IN_SAMPLE,
    OTHER_TIER,
    OUTSIDE_BAND,
    REDUNDANT,
    RELAXED,
    SHORTER_ANSWER,
    Status,
)
from ..training.history import History

MISSING = "-"
WITHOUT_GUARDS = ", without guards"  # behind the name of an epoch: what its scores would have kept
_OF_GUARDS = ("kept_without_guards", "p_value", "duplicate_of")
_OF_TRAINING = ("weight", "train_loss")  # of a run: what a row weighed in the loss, and what its loss was
_OF_LIKENESS = "target_status"
_BESIDE = (*_OF_GUARDS, "ifd_rank")  # columns that are taken over as they are
_PASSED_OVER = (
    BELOW_CUT,
    HIDDEN,
    HIGHER_SCORE,
    LESS_ALIKE,
    NOT_DRAWN,
    OUTSIDE_BAND,
    SHORTER_ANSWER,
)  # others were taken in their place
_CHOICES = (KEPT, RELAXED, BELOW_CUT, REDUNDANT, OTHER_TIER, NOT_IN_SAMPLE, ABOVE_LIMIT)


# Numbers beside IFD that are shown where rows have them, with what each means.
BESIDE_IFD = {name: each.meaning for name, each in FURTHER.items()} | {LIKENESS: TARGET_MEANINGS[LIKENESS]}
SCORE_NAMES = {"ifd": "IFD", "ifd_ppl": "IFD (ppl)", **{name: name for name in BESIDE_IFD}}  # of tables and plots
# Those at which 1 means that the prompt does not help.
SCORE_EQUATIONS = {"ifd": "IFD = cas / das", "ifd_ppl": "perplexity ratio exp(cas - das)"}
LIMIT = "limit"  # in the attributes of an epoch's frame: the limit that was measured for it


def normalised(frame: pd.DataFrame) -> pd.DataFrame:
    """A copy with the columns that this module reads, as floats and plain strings; NaN where there is no score.

    Further scores, and how alike rows are to a target set, are there where the rows have them; `kept`, `reason` and
    `times` only if a policy has chosen.
    """
    if not {*RANKED_BY, LIKENESS} & {*frame} and not {"cas", "das"} <= {*frame}:
        raise UserError(
            f"The rows have no IFD columns (`ifd`, or `cas` and `das`), only {list(frame.columns)}. Score them first: "
            'ds.map(IFDScorer("model"), batched=True), or `ifd-trainer score`.'
        )
    name = named_ids(frame.columns)
    rows = pd.DataFrame({"row_id": np.arange(len(frame)) if name is None else frame[name].to_numpy()})
    rows.attrs = dict(frame.attrs)
    for name in (*SCORES, "answer_tokens"):
        rows[name] = _floats(frame[name]) if name in frame else np.nan
    for name in BESIDE_IFD:
        if name in frame:
            rows[name] = _floats(frame[name])
    further = [name for name in FURTHER if name in frame]
    for name, equation in FROM_LOSSES.items():
        if name not in frame:
            rows[name] = equation(rows["cas"], rows["das"])
    any_score = rows[[name for name in (*RANKED_BY, LIKENESS) if name in rows]].notna().any(axis=1)
    # A row without a status was not scored, whatever numbers it has: training and `select` take it so too.
    named = next((name for name in ("ifd_status", _OF_LIKENESS) if name in frame), None)
    status = Status.OK.value if named is None else _words(frame[named], Status.NONFINITE.value)
    # Of rows that were held against targets alone, the reason tells which of them were not.
    by_reason = named is None and "ifd_reason" in frame and LIKENESS in frame
    missing = _words(frame["ifd_reason"], Status.NONFINITE.value) if by_reason else Status.NONFINITE.value
    rows["ifd_status"] = np.where((status == Status.OK.value) & ~any_score, missing, status)
    rows.loc[rows["ifd_status"] != Status.OK.value, [*SCORES, *further]] = np.nan
    return _with_choice(rows, frame)


def further_columns(rows: pd.DataFrame) -> list[str]:
    """The numbers beside IFD of which rows have some."""
    return [name for name in BESIDE_IFD if name in rows and rows[name].notna().any()]


def _with_choice(rows: pd.DataFrame, frame: pd.DataFrame) -> pd.DataFrame:
    """Add `reason`, `times` and `kept`, if `frame` says what a policy decided."""
    for name in ("ifd_reason", "reason"):  # a data set may have a column `reason` of its own
        if name in frame and frame[name].isin(_CHOICES).any():
            rows["reason"] = _words(frame[name], "(none)")
            kept = frame[name].isin([KEPT, RELAXED]).to_numpy()
            counted = name == "reason" and "times" in frame  # beside `ifd_reason`, it is a column of the data set's own
            rows["times"] = np.nan_to_num(_floats(frame["times"])).astype(int) if counted else kept.astype(int)
            rows["kept"] = rows["times"] > 0
            beside = (*_BESIDE, *(_OF_TRAINING if counted else ()))
            rows = rows.assign(**{column: frame[column].to_numpy() for column in beside if column in frame})
            break
    return rows


def _words(series: pd.Series, missing: str) -> np.ndarray:
    """Values as texts, `missing` in the place of nulls."""
    return series.astype(object).where(series.notna(), missing).map(str).to_numpy(dtype=object)


def _floats(series: pd.Series) -> np.ndarray:
    values = pd.to_numeric(series, errors="coerce").to_numpy(dtype=float, na_value=np.nan)
    return np.where(np.isfinite(values), values, np.nan)


Rows = pd.DataFrame | Mapping[Any, pd.DataFrame] | History  # what plots take: those of one epoch, of several, of a run


def by_epoch(rows: Rows, most: int | None = None) -> dict[Any, pd.DataFrame]:
    """Normalised rows by epoch (None for rows that belong to none); `most` of them, the first and the last included."""
    rows = read_epochs(rows)[0] if isinstance(rows, History) else rows
    epochs = dict(rows) if isinstance(rows, Mapping) else {None: rows}
    chosen = list(epochs)
    if most is not None and len(chosen) > most:
        chosen = [chosen[i] for i in np.linspace(0, len(chosen) - 1, most).round().astype(int)]
    return {epoch: normalised(epochs[epoch]) for epoch in chosen}


def merged(epochs: Mapping[Any, pd.DataFrame], columns: Sequence[str]) -> dict[Any, pd.DataFrame]:
    """Rows by epoch, those of epochs that follow one another once if they agree in `columns`: under `1-3`, say.

    >>> rows = pd.DataFrame({"ifd": [0.5]})
    >>> list(merged({0: rows, 1: rows, 3: rows}, ["ifd"]))
    ['0-1', 3]
    """
    groups: list[tuple[list[Any], pd.DataFrame]] = []
    for epoch, rows in epochs.items():
        if groups and groups[-1][0][-1] + 1 == epoch and _agree(groups[-1][1], rows, columns):
            groups[-1][0].append(epoch)
        else:
            groups.append(([epoch], rows))
    return {of[0] if len(of) == 1 else f"{of[0]}-{of[-1]}": rows for of, rows in groups}


def read_epochs(history: History) -> tuple[dict[int, pd.DataFrame], list[str]]:
    """Rows of each epoch that can be read, and a note on each that cannot; of an epoch in parts see `History.rows`."""
    epochs, notes = {}, []
    for epoch, record in {record["epoch"]: record for record in history.epochs}.items():
        path = history.rows_path(epoch, record.get("part"))
        named = f"Epoch {epoch}: {path.name}{' or one before' if record.get('part') else ''}"
        try:
            rows = normalised(history.rows(epoch))
        except FileNotFoundError:
            notes.append(f"{named} is missing; plots and rows leave it out.")
        except (OSError, ValueError):
            notes.append(f"{named} cannot be read; plots and rows leave it out.")
        else:
            epochs[epoch] = rows.assign(key=rows["row_id"].map(str))
            epochs[epoch].attrs[LIMIT] = record.get("limit")
    return epochs, notes


def held_out_losses(history: History) -> pd.DataFrame:
    """The held-out losses of a run, nats per token: lines `before`, `epoch 0`, ..., a column for each evaluation set.

    Without epochs before training starts anew, whose weights are given up, and without lines that have none.
    """
    restart = history.settings.get("warmup_epochs") if history.settings.get("start_anew") else 0
    lines = {"before": (history.epochs[0].get("before_training") or {}) if history.epochs else {}}
    lines |= {record_name(record): record for record in history.epochs if record["epoch"] >= (restart or 0)}
    losses = {
        name: {"held-out loss": record.get("eval_loss"), **(record.get("eval_losses") or {})}
        for name, record in lines.items()
    }
    frame = pd.DataFrame.from_dict(losses, orient="index", dtype=float)
    return frame.dropna(axis="columns", how="all").dropna(axis="index", how="all")


def _agree(one: pd.DataFrame, other: pd.DataFrame, columns: Sequence[str]) -> bool:
    return all(
        (name in one) == (name in other) and (name not in one or one[name].equals(other[name])) for name in columns
    )


def epoch_name(epoch: Any, alone: str = "") -> str:
    """`epoch 3`, `epochs 1-3`, or `alone` for rows that belong to no epoch."""
    return alone if epoch is None else f"epoch{'s' if isinstance(epoch, str) else ''} {epoch}"


def record_name(record: Mapping[str, Any]) -> str:
    """What a record of a history is called: an epoch, or a part of one.

    >>> record_name({"epoch": 0}), record_name({"epoch": 0, "part": 2, "parts": 5})
    ('epoch 0', 'epoch 0, part 2')
    """
    return epoch_name(record["epoch"]) + (f", part {record['part']}" if record.get("part") else "")


def cut_of(rows: pd.DataFrame, score: str) -> float | None:
    """Lowest score kept; None where nothing is, or where this score is not what rows were chosen by.

    Then rows with a higher one were passed over, or the kept ones rank otherwise.
    """
    if "kept" not in rows or not rows["kept"].any():
        return None
    kept, passed = rows[rows["kept"]], rows.loc[rows["reason"].isin(_PASSED_OVER), score]
    lowest = kept[score].min()
    if "ifd_rank" in rows and not kept.sort_values("ifd_rank")[score].is_monotonic_decreasing:
        return None
    return float(lowest) if pd.notna(lowest) and not passed.max() > lowest else None


def how_kept(rows: pd.DataFrame, score: str) -> str:
    """Where the score cuts, if it does, as the end of a sentence about rows that were kept.

    >>> rows = pd.DataFrame({"ifd": [0.5, 0.7], "kept": [True, False], "reason": ["kept", "below_cut"]})
    >>> how_kept(rows, "ifd"), how_kept(rows[:1], "ifd")
    (', not chosen by IFD alone', ', cut at 0.500')
    """
    cut = cut_of(rows, score)
    if cut is None:
        return f", not chosen by {SCORE_NAMES[score]} alone" if rows["kept"].any() else ""
    return f", cut at {number_text(cut, below=1.0)}"


def number_text(value: Any, digits: int = 3, below: float | None = None) -> str:
    """A number with so many digits, "-" where there is none; one that is below a limit is not rounded up to it."""
    known = value is not None and np.isfinite(value)
    if known and below is not None:
        return rounded_below(float(value), below, digits)
    return f"{round(value, digits) + 0.0:.{digits}f}" if known else MISSING  # + 0.0: no "-0.00"


def percent_text(value: float | None) -> str:
    """A share as per cent, "-" where there is none."""
    return MISSING if value is None or not np.isfinite(value) else f"{100 * value:.0f} %"


def count_text(value: int | None) -> str:
    """A count with separators, "-" where there is none."""
    return MISSING if value is None else f"{value:,}"


def rows_text(count: int) -> str:
    """`1 row`, `2,000 rows`."""
    return many(count, "row")
