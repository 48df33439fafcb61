"""Which rows each arm trained on: how far selections overlap, how much noise they hold, and where they disagree."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
import pandas as pd

from ..errors import NotFoundError
from ..report.report_data import details_of
from ..report.wording import EpochKinds
from ..training.history import History
from .comparison import Comparison, Task


@dataclass(frozen=True)
class TrainedRows:
    """How often each row was trained on.

    Attributes:
        times: of each arm, a frame with a line for each row of the pool and a column for each seed.
        details: texts and columns of the rows, by the same keys; None where no run has kept them.
        unknown: arms whose runs have no history any more.
    """

    times: dict[str, pd.DataFrame]
    details: pd.DataFrame | None = None
    unknown: list[str] = field(default_factory=list)

    def overlap(self) -> pd.DataFrame:
        """Of the rows that either of two arms trained on with a seed, the share that both did; mean over seeds.

        On the diagonal two seeds of one arm are held against one another.
        """
        ever = {arm: times.to_numpy() > 0 for arm, times in self.times.items()}  # (rows, seeds)
        table = pd.DataFrame(np.nan, index=list(ever), columns=list(ever))
        for one, of_one in ever.items():
            for other, of_other in ever.items():
                pairs = (
                    combinations(range(of_one.shape[1]), 2)
                    if one == other
                    else ((s, s) for s in range(of_one.shape[1]))
                )
                shares = [_shared(of_one[:, a], of_other[:, b]) for a, b in pairs]
                table.loc[one, other] = np.mean(shares) if shares else np.nan
        return table

    def label_shares(self, labels: pd.Series) -> pd.DataFrame:
        """The share of each label's rows that each arm trained on, mean over seeds, beside how many `rows` it has.

        Args:
            labels: of the rows, by key.
        """
        counts = labels.value_counts()
        table = pd.DataFrame({"rows": counts.loc[sorted(counts.index, key=lambda value: (-counts[value], value))]})
        table.index.name = labels.name
        for arm, times in self.times.items():
            share = (times > 0).mean(axis=1)
            table[arm] = share.groupby(labels.reindex(share.index).to_numpy()).mean().reindex(table.index)
        return table

    def disagreed(self, one: str, other: str) -> list[str]:
        """The rows that one arm trained on with every seed and the other never; those trained on most come first."""
        of_one, of_other = self.times[one], self.times[other]
        chosen = of_one[(of_one > 0).all(axis=1) & (of_other == 0).all(axis=1)].sum(axis=1)
        return sorted(chosen.index, key=lambda key: (-chosen[key], key))


def read_trained_rows(comparison: Comparison, seeds: list[int]) -> TrainedRows:
    """What the histories of the runs with these seeds say; an arm that does not select trained on all rows."""
    counts: dict[str, dict[int, pd.Series]] = {}
    details, unknown = None, []
    for arm in comparison.arms:
        tasks = [task for task in comparison.tasks() if task.arm == arm and task.seed in seeds]
        if not arm.selects:
            continue
        try:
            counts[arm.name] = {task.seed: _times(task) for task in tasks}
        except (NotFoundError, FileNotFoundError):
            unknown.append(arm.name)
            continue
        pool = History.load(tasks[0].folder).pool() if details is None else None
        if pool is not None:
            details = details_of(pool, pool["row_id"].map(str))
            details = details[~details.index.duplicated()]
    keys = sorted(set().union(*(times.index for by_seed in counts.values() for times in by_seed.values())))
    everything = pd.DataFrame(1, index=keys, columns=list(seeds))
    times = {
        arm.name: pd.DataFrame(counts[arm.name]).reindex(keys, fill_value=0).fillna(0).astype(int)
        if arm.selects
        else everything
        for arm in comparison.arms
        if arm.name not in unknown
    }
    return TrainedRows(times if keys else {}, details, unknown)


def _times(task: Task) -> pd.Series:
    """How often a run trained on each row, by its id as text; before it began anew does not count."""
    history = History.load(task.folder)
    restart = EpochKinds.from_settings(history.settings).restart or 0
    numbers = dict.fromkeys(record["epoch"] for record in history.epochs if record["epoch"] >= restart)
    epochs = [history.rows(epoch) for epoch in numbers]
    if not epochs:
        raise NotFoundError(f"The history in {history.folder} has no epochs.")
    rows = pd.concat([epoch[["row_id", "times"]] for epoch in epochs])
    return rows["times"].groupby(rows["row_id"].map(str)).sum()


def _shared(one: np.ndarray, other: np.ndarray) -> float:
    either = (one | other).sum()
    return float((one & other).sum() / either) if either else np.nan
