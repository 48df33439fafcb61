"""What is measured of the trained models document by document, beside losses, and held against random rows.

A run writes a frame of `documents` for each thing that it measures, `measured-<name>.parquet` in its folder. Their keys
are the same in all runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from ..data.atomic import write_atomically
from .documents import COLUMNS
from .held_out_sets import clusters_of
from .statistics import Difference, difference

BASELINE = "random"  # the arm that others are held against


@dataclass(frozen=True)
class MeasuredArm:
    """One arm.

    Attributes:
        value: mean over documents and seeds.
        by_seed: that of each seed.
        against: the difference from random rows; None for these.
    """

    arm: str
    value: float
    by_seed: list[float]
    against: Difference | None


@dataclass(frozen=True)
class Measured:
    """One measure of one set of documents, random rows first.

    Attributes:
        higher: whether a higher value is better; None where neither is.
        documents: how many have a value in all runs.
        lacking: how many have none in some run, and are left out.
    """

    of: str
    measure: str
    higher: bool | None
    documents: int
    lacking: int
    arms: list[MeasuredArm]


def documents_path(folder: Path, name: str) -> Path:
    """Where a run keeps the documents of a measure."""
    return folder / f"measured-{name}.parquet"


def write_documents(folder: Path, name: str, documents: pd.DataFrame) -> None:
    """Keep the documents of a measure."""
    whole = documents[list(COLUMNS)]
    write_atomically(documents_path(folder, name), lambda path: whole.to_parquet(path, index=False))


def read_documents(folder: Path) -> list[pd.DataFrame]:
    """The documents of each measure of a run."""
    return [pd.read_parquet(path).astype(object) for path in sorted(folder.glob("measured-*.parquet"))]


def ifd_documents(scores: pd.DataFrame) -> pd.DataFrame:
    """The IFD of held-out rows as documents: how hard they still are, which is neither better nor worse.

    Args:
        scores: their `ifd`, `set` and `group`.
    """
    documents = pd.DataFrame({"set": scores["set"], "measure": "IFD", "document": scores.index.astype(str)})
    return documents.assign(value=scores["ifd"], higher=None, group=scores["group"]).astype(object)


def measured_of(documents: Mapping[str, Sequence[pd.DataFrame]]) -> list[Measured]:
    """Each measure of each set, over the documents that have a value in all runs.

    Measures of fewer than two such documents, or groups of them, are left out: nothing could be said of others.

    Args:
        documents: of each arm, random rows first, those of each seed.
    """
    first = next(iter(documents.values()))[0]
    found = []
    for of, measure in first[["set", "measure"]].drop_duplicates().itertuples(index=False):
        values = {arm: [_values(frame, of, measure) for frame in frames] for arm, frames in documents.items()}
        whole = pd.concat([series for each in values.values() for series in each], axis=1)
        known = whole.index[np.isfinite(whole.to_numpy(dtype=float)).all(axis=1)]
        lines = first[(first["set"] == of) & (first["measure"] == measure)].set_index("document").loc[known]
        groups = clusters_of(lines["group"])
        if (len(known) if groups is None else len(np.unique(groups))) < 2:
            continue
        higher = lines["higher"].iloc[0]
        arms = _arms({arm: np.stack([s.loc[known] for s in each]) for arm, each in values.items()}, groups)
        higher = None if higher is None or pd.isna(higher) else bool(higher)
        found.append(Measured(of, measure, higher, len(known), len(whole) - len(known), arms))
    return found


def _values(documents: pd.DataFrame, of: str, measure: str) -> pd.Series:
    lines = documents[(documents["set"] == of) & (documents["measure"] == measure)]
    return lines.set_index("document")["value"].astype(float)


def _arms(values: Mapping[str, np.ndarray], groups: np.ndarray | None) -> list[MeasuredArm]:
    """Of values (seeds, documents) by arm."""
    base, *others = values
    arms = []
    for arm, each in values.items():
        by_seed = each.mean(axis=1)
        against = None if arm == base else difference(each, values[base], groups=groups, arms=len(others))
        arms.append(MeasuredArm(arm, float(by_seed.mean()), by_seed.tolist(), against))
    return arms
