"""How far a scoring job is, and how long it will take: counted in tokens, of which all take about as long.

Rows do not: a part of long ones takes several times as long as one of short ones, and what is left, told from rows,
jumps with each part. Of parts that were begun the tokens are known; of the others they are estimated from the bytes of
their texts, as a + b * bytes for a row, by least squares over the rows of the parts that were begun.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from tqdm.auto import tqdm

from ..data.text_bytes import text_bytes

_LAYOUT = "{desc}: {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}, {rate_fmt}]"


class JobProgress:
    """A bar of the tokens of a job, with what it says before the first batch and after the second.

    Args:
        rows: of the whole job.
        sizes: the numbers of rows of its parts.
        done: the parts that were scored before.
        columns: those with the texts; None for all.
        processes: how many share the job.
        shown: whether this process shows it.
        doing: what is done with the rows, for the bar.
    """

    def __init__(
        self,
        rows: Dataset,
        sizes: Sequence[int],
        done: Collection[int],
        columns: Sequence[str] | None = None,
        processes: int = 1,
        shown: bool = True,
        doing: str = "Scoring",
    ) -> None:
        self._sizes = np.array(sizes, dtype=np.int64)
        self._rows, self._shown, self._processes, self._doing = rows, shown, processes, doing
        self._columns, self._bytes = columns, np.zeros(len(sizes))
        if shown:
            starts = np.cumsum(self._sizes) - self._sizes
            self._bytes = np.add.reduceat(text_bytes(rows, columns).astype(np.float64), starts)
        self._open = np.ones(len(sizes), dtype=bool)  # parts neither done before nor begun by this process
        self._open[list(done)] = False
        self._before = int(self._sizes[~self._open].sum())  # rows
        self._seen = np.zeros((0, 2))  # bytes and tokens of the rows of parts that were begun
        self._own_rows = self._own_tokens = 0  # of parts that were begun
        self._read = 0  # tokens of these that are done
        self._others = 0  # rows that other processes have done
        self._bar: tqdm | None = None
        self._batches, self._since = 0, 0.0

    def __enter__(self) -> JobProgress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def begin(self, part: int, tokens_of_rows: Sequence[int]) -> Callable[[int], Any]:
        """A part is begun, with so many tokens in each of its rows; what takes how many are done after each batch."""
        if not self._shown:
            return lambda tokens: None
        tokens, rows = sum(tokens_of_rows), len(tokens_of_rows)
        rows_before, read_before = self._own_rows, self._own_tokens
        start = int(self._sizes[:part].sum())
        sizes = text_bytes(self._rows.select(range(start, start + rows)), self._columns)
        self._seen = np.concatenate([self._seen, np.stack([sizes, tokens_of_rows], axis=1)])
        self._own_rows, self._own_tokens = self._own_rows + rows, self._own_tokens + tokens
        self._open[part] = False
        if self._bar is None:
            self._start()

        def progress(batch: int) -> None:
            self._read += batch
            self._time_batch(batch)
            share = (self._read - read_before) / max(tokens, 1)
            self._show(self._before + rows_before + self._others + share * rows)

        return progress

    def update(self, done: int) -> None:
        """So many rows are done by now, by all processes."""
        if self._bar is not None:
            self._read = self._own_tokens
            self._others = max(done - self._before - self._own_rows, 0)
            self._show(done)

    def _estimate(self, rows: float, size: float) -> float:
        """Tokens of rows with texts of so many bytes in all."""
        sizes, tokens = self._seen.T
        varies = len(sizes) > 1 and sizes.std() > 0
        slope = float(np.polyfit(sizes, tokens, 1)[0]) if varies else 0.0
        each = float(tokens.mean() - slope * sizes.mean())
        if slope <= 0:
            return rows * float(tokens.mean())
        return rows * each + size * slope if each >= 0 else size * float(tokens.sum() / sizes.sum())

    def _left(self) -> float:
        """Tokens that are still to be read, by all processes."""
        rows = self._sizes[self._open].sum()
        others = min(self._others / rows, 1) if rows else 0
        return self._estimate(rows, self._bytes[self._open].sum()) * (1 - others) + self._own_tokens - self._read

    def _start(self) -> None:
        count = int(self._sizes.sum())
        old = f", of which {self._before:,} are done already" if self._before else ""
        self._say(f"{self._doing} {count:,} rows{old}: about {self._left():,.0f} tokens.")
        # The mean rate since the start (no smoothing), and each batch is shown, since they differ.
        self._bar = tqdm(
            total=self._left(),
            desc=self._doing,
            unit="tok",
            unit_scale=True,
            smoothing=0,
            miniters=1,
            bar_format=_LAYOUT,
        )

    def _show(self, rows: float) -> None:
        open_rows = self._sizes[self._open].sum()
        others = self._estimate(open_rows, self._bytes[self._open].sum()) * min(self._others / max(open_rows, 1), 1)
        done = self._read + others
        self._bar.total = max(done + self._left(), 1)
        self._bar.desc = f"{self._doing} {rows:,.0f}/{self._sizes.sum():,} rows"
        self._bar.update(done - self._bar.n)

    def _time_batch(self, tokens: int) -> None:
        """Take times from the end of the first batch on, in which a model is made ready; say what the second took."""
        self._batches, now = self._batches + 1, time.monotonic()
        if self._batches == 1:
            self._since = now
            self._bar.reset()  # shows the bar: with what was read as its beginning, it would go backwards
            self._bar.n = self._bar.last_print_n = self._bar.initial = self._read
        elif self._batches == 2:
            rate = tokens / max(now - self._since, 1e-9)
            each = f" on each of {self._processes} processes" if self._processes > 1 else ""
            expected = duration(self._left() / (rate * self._processes))
            self._say(f"{self._doing} runs at {rate:,.0f} tokens/s{each}: what is left takes about {expected}.")

    def _say(self, text: str) -> None:
        tqdm.write(text, file=sys.stderr)


def duration(seconds: float) -> str:
    """A time as a person says it.

    >>> duration(40), duration(500), duration(110_000)
    ('40 s', '8 min', '31 h')
    """
    for unit, size, until in (("s", 1, 90), ("min", 60, 90 * 60)):
        if seconds < until:
            return f"{seconds / size:.0f} {unit}"
    hours = seconds / 3600
    return f"{hours:.1f} h" if hours < 10 else f"{hours:.0f} h"
