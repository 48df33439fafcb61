"""What a report is about, from whatever it is made from: a run's history, a folder, or rows with score columns."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from ..data.definitions import KNOWN_DEFINITIONS
from ..data.format_choice import format_of_rows
from ..data.formats import PromptFormat
from ..data.readable_text import text_columns
from ..data.row_ids import named_ids
from ..errors import FileAccessError, NotFoundError, UserError, one_line
from ..method.choices import RANKED_BY
from ..method.columns import LIKENESS
from ..method.number_words import many
from ..method.reasons import BELOW_CUT
from ..training.history import FOLDER, History
from .score_frames import LIMIT, SCORE_EQUATIONS, SCORE_NAMES, merged, normalised, read_epochs
from .tables import labels_of
from .wording import EpochKinds

SELECTED = "train.parquet"  # the rows in a folder that `ifd-trainer select` wrote


@dataclass(frozen=True)
class Origin:
    """Where scored rows come from, as far as it is known.

    Attributes:
        file: the file that they are in, as a command line names it.
        source: the rows that were scored.
        model, definition, format, program: what scored them, and how.
        turns: how the scores of a row's answers became one.
        options: of the command that scored them, where they are known.
        measured: whether it was measured how noise scores (`ifd-trainer score --calibrate`).
        single: whether it can be, with the same scores.
    """

    file: str | None = None
    source: str | None = None
    model: str | None = None
    definition: str | None = None
    format: str | None = None
    program: str | None = None
    turns: str | None = None
    options: Sequence[str] | None = None
    measured: bool = False
    single: bool = True


@dataclass
class ReportData:
    """What a report is about, whatever it was made from.

    Attributes:
        epochs: normalised rows by epoch, with `key`; one frame under None for a data set.
        details: texts and the pool's columns, indexed by key; None if not known.
        labels: the label of each row, indexed by key; None without a label.
        origin: of rows that belong to no run.
    """

    title: str
    score: str
    epochs: dict[Any, pd.DataFrame]
    details: pd.DataFrame | None
    labels: pd.Series | None
    folder: Path
    max_ifd: float | None = None
    history: History | None = None
    notes: list[str] = field(default_factory=list)
    origin: Origin = Origin()

    @property
    def kinds(self) -> EpochKinds:
        """Which kind each epoch is of."""
        return EpochKinds.from_settings(self.history.settings if self.history is not None else {})

    @property
    def scored(self) -> dict[Any, pd.DataFrame]:
        """Epochs with scores; those that follow one another with the same scores and the same rows kept are one."""
        return merged(self.with_scores, [self.score, "kept"])

    @property
    def with_scores(self) -> dict[Any, pd.DataFrame]:
        """Epochs in which some row has a score."""
        return {epoch: rows for epoch, rows in self.epochs.items() if rows[self.score].notna().any()}

    @property
    def last_epoch(self) -> Any:
        """The last epoch with scores; if none has any, the last one."""
        return next(reversed(self.with_scores or self.epochs or {None: None}))

    @property
    def last(self) -> pd.DataFrame | None:
        """Rows of the last epoch with scores."""
        return self.epochs.get(self.last_epoch)

    @property
    def any_score(self) -> bool:
        """Whether there is any score at all."""
        return bool(self.with_scores)


def read_report_data(source: Any, label: str | None, texts: Any, origin: Origin | None = None) -> ReportData:
    """The data that a source makes; arguments and errors as for `write_report`."""
    texts, folder = _frame(texts) if texts is not None else None, None
    if isinstance(source, (str, os.PathLike)):
        folder, source = Path(source), _read_folder(Path(source))
    if isinstance(source, History):
        data = _of_history(source, texts)
    else:
        data = _of_rows(source, texts, folder or Path("ifd_report"), origin or Origin())
    known = [] if data.details is None else list(data.details.columns)
    if label is not None and label not in known:
        raise UserError(
            f"There is no column {label!r} to take labels from; the columns are {sorted(map(str, known))}. "
            "Pass another label, or the column in `texts`."
        )
    label = label or next((name for name in ("quality", "label") if name in known), None)
    data.labels = labels_of(data.details[label]) if label is not None else None
    return data


def _read_folder(folder: Path) -> History | pd.DataFrame:
    """The history of a run, or the rows of a folder that `ifd-trainer select` wrote."""
    if folder.is_file():
        raise NotFoundError(
            f"{folder} is a file: read it first, and pass its rows (`ifd-trainer report` takes its name)."
        )
    rows = folder / SELECTED
    try:
        if any((folder / name).exists() for name in ("history.json", f"{FOLDER}/history.json")):
            history = History.load(folder)
            if not isinstance(history.settings, dict) or not all(isinstance(r["epoch"], int) for r in history.epochs):
                raise ValueError("history.json has no settings, or records without an epoch")
            return history
        if rows.is_file():
            return pd.read_parquet(rows)
    except UserError:
        raise
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
    ) as error:  # of Arrow, JSON, and a key that is gone
        raise FileAccessError(
            f"The files in {folder} cannot be read ({one_line(error)}): one is damaged, or of another program. Copy it "
            "again, or make it anew."
        ) from error
    files = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else None
    listed = "there is no such folder" if files is None else f"it holds {', '.join(files[:8]) or 'nothing'}"
    raise NotFoundError(
        f"No selection history in {folder}, and no rows: {listed}{', ...' if files and len(files) > 8 else ''}. A "
        f"report is made from the output folder of a training run (with {FOLDER}/history.json), or from a folder that "
        f"`ifd-trainer select --output FOLDER` wrote (with {SELECTED}); pass a scored file by its own name."
    )


def _of_history(history: History, texts: pd.DataFrame | None) -> ReportData:
    epochs, notes = read_epochs(history)
    try:
        pool, lost = history.pool(), "is missing"
    except (OSError, ValueError):
        pool, lost = None, "cannot be read"
    if pool is not None:
        details = details_of(pool, pool["row_id"].map(str))
    else:
        details = None
        if texts is None:
            notes.append(f"pool.parquet {lost}: rows are listed without their texts and labels.")
    if texts is not None:
        given = details_of(texts, _ids(texts).map(str))
        details = given if details is None else _replaced(details, given)
    settings, score = history.settings, history.settings.get("score")
    score = score if score in SCORE_NAMES and all(score in rows for rows in epochs.values()) else "ifd"
    for rows in epochs.values() if score not in SCORE_EQUATIONS else ():
        rows.attrs[LIMIT] = None  # it is one of the IFD
    return ReportData(
        title="What was selected, epoch by epoch",
        score=score,
        epochs=epochs,
        details=details,
        labels=None,
        folder=history.folder,
        max_ifd=settings.get("max_ifd"),
        history=history,
        notes=notes,
    )


def _of_rows(source: Any, texts: pd.DataFrame | None, folder: Path, origin: Origin) -> ReportData:
    frame = _frame(source).reset_index(drop=True)
    rows = normalised(frame)
    rows["key"] = rows.index.map(str)  # ids of a data set need not be unique
    details = details_of(frame, rows["key"], format_of_rows(origin.format, frame.columns))
    if texts is not None:
        by_id = named_ids(frame.columns) is not None
        if not by_id and len(texts) != len(frame):
            raise UserError(
                f"{many(len(frame), 'row')} and {many(len(texts), 'text')}, without a column `row_id` or `id` to match."
            )
        given = details_of(texts, _ids(texts).map(str) if by_id else rows["key"])
        given = given.reindex(rows["row_id"].map(str)).set_axis(details.index) if by_id else given
        details = _replaced(details, given)
    if origin.definition is None and "ifd_definition" in frame and frame["ifd_definition"].nunique() == 1:
        origin = replace(origin, definition=str(frame["ifd_definition"].dropna().iloc[0]))
    chosen = "reason" in rows
    notes = []
    if chosen and len(rows) and rows["kept"].all():
        card = (
            " README.md beside it counts them."
            if (folder / SELECTED).exists() and (folder / "README.md").exists()
            else ""
        )
        notes.append("Every row here was kept: the rows that were dropped are not in this data set." + card)
    return ReportData(
        title="Scores of a data set" + (" and what was selected" if chosen else ""),
        score=_score_of(rows, frame.get("ifd_rank"), origin),
        epochs={None: rows},
        details=details,
        labels=None,
        folder=folder,
        notes=notes,
        origin=origin,
    )


def _frame(data: Any) -> pd.DataFrame:
    if isinstance(data, pd.DataFrame):
        return data
    if hasattr(data, "to_pandas"):
        return data.to_pandas()
    raise TypeError(
        f"A report is made from a History, a folder, a pandas data frame or a data set, not from "
        f"{type(data).__name__}. Of a DatasetDict, pass one of its splits."
    )


def _ids(texts: pd.DataFrame) -> pd.Series:
    name = named_ids(texts.columns)
    if name is None:
        raise UserError(f"`texts` has no column `row_id` or `id`, only {list(texts.columns)}: rows cannot be matched.")
    if texts[name].duplicated().any():
        raise UserError(f"The column {name!r} of `texts` holds the same id twice: rows cannot be matched.")
    return texts[name]


def details_of(frame: pd.DataFrame, keys: pd.Series, format: PromptFormat | None = None) -> pd.DataFrame:
    """The frame's columns by key, its texts as `instruction`, `input` and `answer`, which the format tells."""
    texts = text_columns(frame, format)
    rest = frame.drop(columns=[name for name in ("instruction", "input", "answer") if name in frame])
    parts = [rest.reset_index(drop=True), *([texts] if texts is not None else [])]
    return pd.concat(parts, axis=1).set_axis(pd.Index(keys.to_numpy(), dtype=object), axis=0)


def _replaced(details: pd.DataFrame, given: pd.DataFrame) -> pd.DataFrame:
    """The columns of `given` in the place of those in `details`; rows that only `given` has are left out."""
    kept = details.drop(columns=[name for name in given.columns if name in details])
    return kept.join(given)


def _score_of(rows: pd.DataFrame, ranks: pd.Series | None, origin: Origin) -> str:
    """The score that rows of a data set were selected by, or would be.

    The one that falls along `ranks` (1 is the highest), else the one in which kept rows and rows below the cut part;
    of rows that nothing was selected from, the one that their definition ranks by.
    """
    if ranks is not None and ranks.notna().any():
        ranked = rows.loc[ranks.astype(float).sort_values().dropna().index]
        whole = [name for name in SCORE_NAMES if name in ranked and ranked[name].notna().all()]
        falling = [name for name in whole if ranked[name].is_monotonic_decreasing]
        if falling:
            return falling[0]
    if rows["ifd"].notna().any() and "reason" in rows:
        kept, below = rows[rows["kept"]], rows[rows["reason"] == BELOW_CUT]
        known = [name for name in SCORE_NAMES if name in rows]
        parts = [name for name in known if not kept[name].min() < below[name].max()]
        return parts[0] if parts else "ifd"
    if LIKENESS in rows and not rows[[*RANKED_BY]].notna().any(axis=None):
        return LIKENESS
    known = KNOWN_DEFINITIONS.get(origin.definition)
    if known and "reason" not in rows and rows[known.ranked_by].notna().any():
        return known.ranked_by
    return "ifd" if rows["ifd"].notna().any() or not rows["ifd_ppl"].notna().any() else "ifd_ppl"
