"""What a run selected, epoch by epoch, on disk beside its checkpoints.

    history.json          settings, and one record for each epoch (counts, means, seconds, held-out loss); of an epoch
                          in parts (`every_steps`) one for each part, with `part` (1 for the first), `parts` (how many
                          there are) and `left` (rows that the parts before had not trained on)
    epoch-000.parquet     one row for each pool row: id, scores, the epoch in which it was scored (`scored_at`), and
                          where some rows are scored anew under a budget after how many updates of the run that was
                          (`scored_step`) and by how many nats its losses were moved since (`cas_shift`, `das_shift`);
                          status, reason, how often it is trained on; with a curriculum its tier (0 is the one that the
                          curriculum begins with); where rows weigh differently in the loss their weight; with
                          train_losses, `train_loss`, the mean loss of rows in the forwards that trained on them, once
                          the epoch has ended; with guards, whether the same scores would have kept it without them, and
                          its p-value in the pairing test; where rows have several answers, `last_cas`, `last_das` and
                          `last_answer_tokens` of the last one, which guards judge
    epoch-000-part-01.parquet   the same for each part of an epoch in parts, in the place of that file
    pool.parquet          the pool's texts and its columns other than token ids, for reports; a resume, or another run
                          on the same training set, leaves it as it is

Files are replaced atomically: a reader, or a run that is killed, never sees half a file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from ..data.atomic import write_atomically, write_json
from ..errors import NotFoundError, UserError
from ..method.plain_data import without_reprs
from ..method.selection import Selection, counted

FOLDER = "ifd_history"
VERSION = 2  # in version 1, policy, schedule and warm-up were kept as their repr
_DIGEST = b"ifd_trainer.digest"  # in the metadata of pool.parquet
_PARTS = 10  # parts of the pool in a row group of it


@dataclass
class History:
    """The history of one run, in memory and in `folder`.

    Attributes:
        folder: where the files are, usually `<output_dir>/ifd_history`.
        settings: what was selected and how; written once.
        epochs: one record for each epoch, in order.
    """

    folder: Path
    settings: dict[str, Any] = field(default_factory=dict)
    epochs: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def load(cls, folder: str | os.PathLike) -> History:
        """Read a history; `folder` may be the run's output folder too.

        Raises:
            FileNotFoundError: when there is none.
            ValueError: when the file is damaged or of another version.
        """
        folder = Path(folder)
        if not (folder / "history.json").exists() and (folder / FOLDER / "history.json").exists():
            folder = folder / FOLDER
        path = folder / "history.json"
        if not path.exists():
            raise NotFoundError(f"No selection history in {folder}: it is written by a run with the callback.")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise UserError(f"{path} is damaged ({error}); the run has to be repeated.") from error
        if content.get("version") not in (1, VERSION):
            raise UserError(f"{path} has version {content.get('version')}, this program reads versions 1 to {VERSION}.")
        return cls(folder, without_reprs(content["settings"]), content["epochs"])

    def record(self, epoch: int) -> dict[str, Any] | None:
        """The record of an epoch, of its last part if it has several; or None."""
        return next((record for record in reversed(self.epochs) if record["epoch"] == epoch), None)

    def add(self, record: dict[str, Any], rows: pd.DataFrame) -> None:
        """Write the record and the rows of an epoch, or of a part of one; this and later ones (of a run cut short) give
        way."""
        self.epochs = [old for old in self.epochs if place_of(old) < place_of(record)] + [record]
        path = self.rows_path(record["epoch"], record.get("part"))
        write_atomically(path, lambda path: rows.to_parquet(path, index=False))
        self.save()

    def add_column(self, epoch: int, name: str, values: np.ndarray, part: int | None = None) -> None:
        """Write a column of the rows of an epoch, or a part of one, in the place of one of that name.

        `values`, (n,), has one for each pool row.
        """
        path = self.rows_path(epoch, part)
        rows = pd.read_parquet(path).assign(**{name: values})
        write_atomically(path, lambda path: rows.to_parquet(path, index=False))

    def save(self) -> None:
        """Write `history.json`."""
        content = {"version": VERSION, "settings": self.settings, "epochs": self.epochs}
        write_json(self.folder / "history.json", content)

    def discard_other_epochs(self) -> None:
        """Delete the rows of epochs without a record: an earlier run in this folder left them."""
        known = {self.rows_path(record["epoch"], record.get("part")) for record in self.epochs}
        for path in set(self.folder.glob("epoch-*.parquet")) - known:
            path.unlink()

    def overlap(self, epoch: int, selection: Selection) -> float | None:
        """Share of the rows kept in an epoch that the epoch before kept too; None if that is not known."""
        if self.record(epoch - 1) is None or not all(path.exists() for path in self._paths(epoch - 1)):
            return None
        before = self.rows(epoch - 1)["times"].to_numpy() > 0
        return float(before[selection.rows].mean())

    def save_pool(self, pool: pd.DataFrame | Iterable[pa.Table], digest: str = "") -> bool:
        """Write the pool's texts, as one frame or part by part (no part is kept in memory).

        Args:
            digest: of what the texts are made from. A file that was written with the same one, and begins with the
                same part, is left as it is.

        Returns:
            Whether the file was written anew.
        """
        parts = iter([pa.Table.from_pandas(pool, preserve_index=False)] if isinstance(pool, pd.DataFrame) else pool)
        first, path = next(parts), self.folder / "pool.parquet"
        if digest and _is_pool(path, digest, first):
            return False
        path.unlink(missing_ok=True)  # if this one cannot be written, a report must not show the texts of another run
        schema = first.schema.with_metadata({**(first.schema.metadata or {}), _DIGEST: digest.encode()})

        def write(path: Path) -> None:
            with pq.ParquetWriter(path, schema) as writer:
                rest = chain([first], parts)
                while group := list(islice(rest, _PARTS)):
                    writer.write_table(pa.concat_tables(group))

        write_atomically(path, write)
        return True

    def rows_path(self, epoch: int, part: int | None = None) -> Path:
        return self.folder / f"epoch-{epoch:03d}{'' if part is None else f'-part-{part:02d}'}.parquet"

    def _paths(self, epoch: int) -> list[Path]:
        parts = [record.get("part") for record in self.epochs if record["epoch"] == epoch]
        return [self.rows_path(epoch, part) for part in parts] or [self.rows_path(epoch)]

    def rows(self, epoch: int, part: int | None = None) -> pd.DataFrame:
        """Row id, scores, status, reason and `times` (how often trained on) of every pool row in an epoch.

        With a curriculum also `tier`: 0, 1, ... in the order of the stages, null for rows that were not chosen.

        Of an epoch in parts, the rows of one part (1 for the first), or what became of each row in the epoch: its line
        of the `part` that trained on it first, with `times` of all parts, or of the last one where none did.
        """
        if part is not None:
            return pd.read_parquet(self.rows_path(epoch, part))
        *before, rows = [pd.read_parquet(path) for path in self._paths(epoch)]
        if not before:
            return rows
        times = np.stack([each["times"].to_numpy() for each in (*before, rows)])
        first = np.where(times.any(axis=0), times.astype(bool).argmax(axis=0), len(before))
        lines = pd.concat([each.assign(part=number) for number, each in enumerate((*before, rows), 1)])
        lines = lines.iloc[first * len(rows) + np.arange(len(rows))].reset_index(drop=True)
        lines["part"] = pd.array(np.where(times.any(axis=0), lines["part"], -1), dtype="Int64")
        lines.loc[lines["part"] < 0, "part"] = pd.NA
        return lines.assign(times=times.sum(axis=0))

    def pool(self) -> pd.DataFrame | None:
        """Row ids with the pool's texts and columns, if they were written."""
        path = self.folder / "pool.parquet"
        return pd.read_parquet(path) if path.exists() else None


def place_of(record: Mapping[str, Any]) -> tuple[int, int]:
    """Where a record stands: its epoch and, of an epoch in parts, its part."""
    return record["epoch"], record.get("part") or 1


def epoch_record(score: np.ndarray, selection: Selection) -> dict[str, Any]:
    """What was selected in an epoch, in numbers.

    Args:
        score: (n,) what was ranked by, NaN for rows without a score.
    """
    kept = np.zeros(len(score), dtype=bool)
    kept[selection.kept] = True
    kept_scores, dropped_scores = (score[mask & np.isfinite(score)] for mask in (kept, ~kept))
    return {
        "pool": len(score),
        "budget": len(selection.kept),
        "kept": int(kept.sum()),
        "eligible": selection.eligible,
        "shortfall": selection.shortfall,
        "tiers": sorted(selection.parts) if selection.tier is not None else None,
        "cut": selection.cut if np.isfinite(selection.cut) else None,
        "mean_kept": float(kept_scores.mean()) if len(kept_scores) else None,
        "mean_dropped": float(dropped_scores.mean()) if len(dropped_scores) else None,
        "reasons": dict(sorted(counted(selection.reasons).items())),
        "seconds_training": None,
        "trained": None,  # training rows, once the epoch has ended
        "eval_loss": None,
        "eval_losses": None,  # by the name of the set, where there are several
        "before_training": None,  # both of them, before the first epoch
    }


def epoch_rows(ids: np.ndarray, columns: Mapping[str, np.ndarray], selection: Selection) -> pd.DataFrame:
    """One row for each of n pool rows: what was measured (columns of length n) and decided."""
    times = np.bincount(selection.kept, minlength=len(ids))
    rows = pd.DataFrame({"row_id": ids, **columns, "reason": selection.reasons, "times": times})
    if selection.tier is not None:
        rows["tier"] = pd.array(selection.tier, dtype="Int64")
        rows.loc[selection.tier < 0, "tier"] = pd.NA
    if selection.weights is not None:
        rows["weight"] = np.nan
        rows.loc[selection.kept, "weight"] = np.asarray(selection.weights, dtype=np.float64)
    return rows


def _is_pool(path: Path, digest: str, first: pa.Table) -> bool:
    """Whether a file holds the pool with this digest, whose first part is that."""
    texts = [name for name in ("prompt", "answer") if name in first.column_names]
    try:
        with pq.ParquetFile(path) as file:
            known = (file.schema_arrow.metadata or {}).get(_DIGEST) == digest.encode()
            return known and file.read_row_group(0, texts)[: len(first)].equals(first.select(texts))
    except (OSError, pa.ArrowException):  # not there, or damaged
        return False
