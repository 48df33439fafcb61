"""A long scoring job: parts of a data set, scored by one process or by several, each saved as soon as it is done.

What is done is on disk: a job that is interrupted, or one of whose processes dies, goes on with the parts that are
missing, with any number of processes (see `scoring.processes`). While a part is scored, a thread reads and tokenises
the next one, so that a fast device does not wait for text.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing
from itertools import chain, islice
from threading import Thread
from typing import TYPE_CHECKING, Any

from datasets import Dataset

from ..errors import RunError
from .job_parts import Parts
from .job_progress import JobProgress
from .processes import Process

if TYPE_CHECKING:
    from .transform import IFDScorer
    from .turns import EncodedTurns

_POLL = 0.1


def score_parts(
    rows: Dataset,
    scorer: IFDScorer,
    parts: Parts,
    size: int,
    process: Process,
    *,
    columns: Sequence[str] | None = None,
    doing: str = "Scoring",
    stall: float = 1800.0,
    grace: float = 60.0,
    leave: float = 2.0,
) -> None:
    """Score the parts that are not done yet, `size` rows each, and save each; the main process waits for all.

    Args:
        rows: of the whole job.
        scorer: encodes and scores them.
        parts: where they are saved.
        size: rows of a part.
        process: which of the job's processes this is.
        columns: those with the texts, of which the job's tokens are estimated; None for all.
        doing: what the bar says is done with the rows.
        stall: seconds without a finished part after which the main process gives up on the others.
        grace: seconds until a file of another machine is seen here.
        leave: seconds that an interrupted program waits for the thread; a part takes milliseconds to encode.

    Raises:
        RuntimeError: in the main process, when the others make no progress or their parts do not arrive; when the
            folder of the parts is gone.
    """
    sizes = sizes_of(len(rows), size)
    earlier = process.add_rows(0)  # counted in earlier lives; their parts are among those on disk
    done = [part for part, size in enumerate(sizes) if parts.done(part, size)]
    if process.main:
        parts.warn(parts.damaged(len(sizes)))

    def draw() -> int | None:
        return process.draw(len(sizes), lambda part: parts.done(part, sizes[part]))

    ahead = _encoded(lambda part: scorer.encode_rows(_rows_of(rows, part, size)), draw, leave)
    with closing(ahead):
        # The first one loads the model, which has a bar of its own and is no part of this one's rate.
        encoded = chain([*islice(ahead, 1)], ahead)
        with JobProgress(rows, sizes, done, columns, process.world_size, process.main, doing) as progress:

            def show(counted: int) -> None:
                progress.update(sum(sizes[part] for part in done) + counted - earlier)

            for part, read in encoded:
                parts.save(part, scorer.score_rows(read, progress.begin(part, read.tokens)))
                show(process.add_rows(len(read)))  # exact again, and the rows without a score
            process.end()
            if process.main:
                _wait(parts, len(sizes), process, lambda: show(process.add_rows(0)), stall, grace)


def join_parts(rows: Dataset, scorer: IFDScorer, parts: Parts, size: int) -> Dataset:
    """The scores of all rows, on disk; a part whose file is damaged by now is scored again."""
    return parts.join(
        sizes_of(len(rows), size), lambda part: scorer.score_rows(scorer.encode_rows(_rows_of(rows, part, size)))
    )


def sizes_of(rows: int, size: int) -> list[int]:
    """The numbers of rows of a job's parts.

    >>> sizes_of(5, 2)
    [2, 2, 1]
    """
    return [min(size, rows - start) for start in range(0, rows, size)]


def _rows_of(rows: Dataset, part: int, size: int) -> dict[str, list]:
    return rows[part * size : (part + 1) * size]


def _encoded(
    encode: Callable[[int], EncodedTurns], draw: Callable[[], int | None], leave: float
) -> Iterator[tuple[int, EncodedTurns]]:
    """Parts and their encoded rows; while the caller has one, a thread encodes the next one.

    One part ahead and no more: what is drawn here waits for this device, also when another one has nothing left to do.
    The first part is encoded in this thread, since that loads the model.
    """
    part, waiting = draw(), None
    read = None if part is None else encode(part)
    try:
        while part is not None:
            ahead = draw()
            waiting = None if ahead is None else _Call(encode, ahead)
            yield part, read
            part, read = ahead, waiting and waiting.result()
    finally:  # a thread that is in native code when the interpreter shuts down aborts the process
        if waiting is not None:
            waiting.join(leave)


class _Call(Thread):
    """A function's call in a thread, and its result or error in time.

    A daemon, unlike the threads of `ThreadPoolExecutor`: a program that ends does not wait for it.
    """

    def __init__(self, function: Callable[[int], Any], argument: int) -> None:
        super().__init__(name="encode", daemon=True)
        self._function, self._argument, self._future = function, argument, Future()
        self.result = self._future.result
        self.start()

    def run(self) -> None:
        try:
            self._future.set_result(self._function(self._argument))
        except BaseException as error:  # for the one who asks for the result, with its traceback
            self._future.set_exception(error)


def _wait(parts: Parts, count: int, process: Process, show: Callable[[], Any], stall: float, grace: float) -> None:
    """Until all parts are on disk and the other processes draw no more."""
    missing, since = [part for part in range(count) if not parts.path(part).exists()], time.monotonic()
    while missing or not process.ended():
        ended = process.ended()
        left = [part for part in missing if not parts.path(part).exists()]
        parts.check_there()
        if len(left) < len(missing):
            missing, since = left, time.monotonic()
            show()
        elif time.monotonic() - since > (grace if ended else stall):
            raise RunError(_why(missing, count, parts, None if ended else stall))
        time.sleep(_POLL)


def _why(missing: Sequence[int], count: int, parts: Parts, stall: float | None) -> str:
    """What the main process says when it gives up, after so many seconds or, with None, since all others ended."""
    if stall is None:
        return (
            f"{len(missing)} of {count} parts are missing: all processes are done, but {parts.folder} is not the same "
            "folder on all of their machines, or parts were deleted from it. Write to a file system that they share, "
            "and run the same command again to go on."
        )
    what = f"{len(missing)} of {count} parts are missing" if missing else "All parts are there"
    return (
        f"{what}: none was finished in {stall:.0f} s, so a process has died or hangs. End the others, and run the same "
        "command again to go on."
    )
