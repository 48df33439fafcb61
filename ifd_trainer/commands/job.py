"""What `score` and `reflect` share: a model over the rows of a data set, part by part, and one file at the end."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import RunError

if TYPE_CHECKING:
    from datasets import Dataset

    from ..publish.provenance import Provenance
    from ..scoring.job_parts import Parts
    from ..scoring.processes import Process

CHECKED_ROWS = 64  # to find out whether rows, format, definition and tokenizer go together


def device_of(options: argparse.Namespace, local_rank: int) -> str:
    """The device that scores: each process on a machine has one of its own."""
    import torch

    from ..scoring.devices import default_device

    device = options.device
    return default_device(local_rank) if device is None or (device == "cuda" and torch.cuda.is_available()) else device


def part_rows(options: argparse.Namespace, settings: Mapping[str, Any], asks: bool = False) -> int:
    """Rows of a part; fewer where a model is `asked` for answers, which takes far longer than scoring."""
    on_cpu, elsewhere = (8, 256) if asks else (64, 2048)
    return options.part_rows or (on_cpu if settings["device"] == "cpu" else elsewhere)


def job_of(rows: Dataset, size: int, sources: Mapping[str, str | None], settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the parts of a job depend on: the same for all processes, and for any number of them.

    Args:
        size: rows of a part.
        sources: digests of what is read, by name.
        settings: of what scores.
    """
    from ..scoring.transform import SCORES_VERSION

    job = {**sources, "rows": len(rows), "part_rows": size, **settings, "scores_version": SCORES_VERSION}
    del job["token_budget"]  # with another one, after trouble with memory, scores differ by rounding alone
    return job


class Joined(NamedTuple):
    """The scores of all rows of a job, in its main process.

    Attributes:
        scores: on disk, until the job has finished.
    """

    scores: Dataset
    parts: Parts
    process: Process

    def write(self, rows: Dataset, output: str, origin: Provenance | None) -> None:
        """Write the rows, and beside them where their scores come from."""
        from ..data.files import write_rows
        from ..publish.provenance import write_provenance
        from ..scoring.job_parts import kept

        with kept():
            write_rows(rows, output, self.parts.folder)
            if origin is not None:
                write_provenance(output, origin, rows)

    def finish(self, status: int = 0) -> None:
        """Nothing is read of the scores any more: all processes end with this status, and the parts go."""
        self.parts.check_joined()
        self.process.finish(status)
        self.parts.remove()


@contextmanager
def scored_in_parts(
    rows: Dataset, scorer: Any, output: str, job: Mapping[str, Any], process: Process, **how: Any
) -> Iterator[Joined | None]:
    """Score rows part by part, on all processes; in the main one the scores of all, and None in the others.

    Args:
        job: see `job_of`.
        how: see `score_parts`.
    """
    from ..scoring.job_parts import Parts
    from ..scoring.scoring_job import join_parts, score_parts

    size = job["part_rows"]
    with closing(process.main_first("parts", lambda: Parts(output, job, process.main))) as parts:
        try:
            score_parts(rows, scorer, parts, size, process, **how)
        except RunError:  # the parts are gone
            if process.finished() is None:
                raise
        if process.main:
            yield Joined(join_parts(rows, scorer, parts, size), parts, process)
            return
        if process.finished() is not None:
            parts.remove()  # what this process, started again, has made after it was finished
        yield None


def counts_of(values: Any) -> dict[str, int]:
    """How often each value of a column occurs, most often first."""
    import pyarrow.compute as pc

    counted = sorted(pc.value_counts(values).to_pylist(), key=lambda each: -each["counts"])
    return {each["values"]: each["counts"] for each in counted}


def counts_text(counts: Mapping[str, int]) -> str:
    """The same in words."""
    return ", ".join(f"{count:,} {value}" for value, count in counts.items())
