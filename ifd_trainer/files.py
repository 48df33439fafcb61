"""Data sets in and out: JSON, JSON lines, CSV, Parquet files and hub names; and parts of a job that can be resumed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
from datasets import Dataset, load_dataset

from .history import write_atomically

LOADERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def load_rows(source: str, split: str = "train", config: str | None = None) -> Dataset:
    """A data set from a file (by its ending) or from a hub, by name.

    Raises:
        FileNotFoundError: when `source` looks like a file and is none.
        ValueError: for an ending that cannot be read.
    """
    path = Path(source)
    if path.is_file():
        return load_dataset(_loader(path), data_files=str(path), split="train")
    if path.suffix in LOADERS or source.startswith((".", "/")):
        raise FileNotFoundError(
            f"No such file: {source}. Files end in {', '.join(LOADERS)}; other names are hub names."
        )
    return load_dataset(source, config, split=split)


def write_rows(dataset: Dataset, path: str | os.PathLike) -> None:
    """Write a data set in the format of the path's ending, atomically; nulls stay nulls."""
    path = Path(path)
    _loader(path)

    def write(temporary: Path) -> None:
        if path.suffix == ".parquet":
            dataset.to_parquet(temporary)
        elif path.suffix == ".csv":
            dataset.to_csv(temporary, index=False)
        else:
            _write_json(dataset, temporary, lines=path.suffix == ".jsonl")

    write_atomically(path, write)


def check_writable(path: str | os.PathLike) -> None:
    """Raise ValueError now if `write_rows` could not write to this path after hours of work."""
    _loader(Path(path))
    if not os.access(_existing_parent(Path(path)), os.W_OK):
        raise ValueError(f"Cannot write to {path}: the folder is not writable.")


class Parts:
    """Finished parts of a job beside its output file, so that it can be interrupted and run again.

    Args:
        output: the file that the job makes; parts are kept in `<output>.parts`.
        job: what the parts depend on; parts of another job are not taken over.

    Raises:
        ValueError: when the folder holds parts of another job.
    """

    def __init__(self, output: str | os.PathLike, job: dict[str, str | int]) -> None:
        self.folder = Path(f"{os.fspath(output)}.parts")
        path = self.folder / "job.json"
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            differs = sorted(key for key in job if found.get(key) != job[key])
            if differs:
                raise ValueError(
                    f"{self.folder} holds parts of another job: {', '.join(differs)} differ. Delete the folder to "
                    "start anew, or write to another file."
                )
        else:
            write_atomically(path, lambda temporary: temporary.write_text(json.dumps(job), encoding="utf-8"))

    def path(self, part: int) -> Path:
        return self.folder / f"part-{part:06d}.parquet"

    def done(self, part: int) -> bool:
        return self.path(part).exists()

    def save(self, part: int, rows: pd.DataFrame) -> None:
        write_atomically(self.path(part), lambda temporary: rows.to_parquet(temporary, index=False))

    def read(self, count: int) -> Iterator[pd.DataFrame]:
        return (pd.read_parquet(self.path(part)) for part in range(count))

    def remove(self) -> None:
        shutil.rmtree(self.folder)


def source_digest(source: str, rows: Dataset) -> str:
    """A digest of a file's bytes, or the fingerprint of a hub data set."""
    path = Path(source)
    if not path.is_file():
        return rows._fingerprint
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(2**24):
            digest.update(block)
    return digest.hexdigest()


def _loader(path: Path) -> str:
    if path.suffix not in LOADERS:
        raise ValueError(f"Cannot tell the format of {path} from its ending; use one of {', '.join(LOADERS)}.")
    return LOADERS[path.suffix]


def _existing_parent(path: Path) -> Path:
    parent = path.resolve().parent
    while not parent.exists():
        parent = parent.parent
    return parent


def _write_json(dataset: Dataset, path: Path, lines: bool) -> None:
    """One object a line, or a list of them; text stays readable, a missing score is null."""
    with path.open("w", encoding="utf-8") as file:
        if not lines:
            file.write("[\n")
        for i, row in enumerate(dataset):
            if i:
                file.write("\n" if lines else ",\n")
            file.write(json.dumps(row, ensure_ascii=False, default=str))
        file.write("\n" if lines else "\n]\n")
