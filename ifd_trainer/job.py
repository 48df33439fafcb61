"""A long scoring job: parts of a data set, scored by one process or by several, each saved as soon as it is done.

Several processes (`torchrun`, `accelerate launch`, `mpirun`) draw the numbers of parts from one counter, so that none
of them waits for another before the last parts, however unequal parts and devices are. What is done is on disk: a job
that is interrupted, or one of whose processes dies, goes on with the parts that are missing, with any number of
processes.
The processes share the folder of the parts and the launcher's key-value store; they exchange nothing else.

While a part is scored, a thread reads and tokenises the next one, so that a fast device does not wait for text.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import chain, count, islice
from threading import Thread
from typing import TYPE_CHECKING, Any

from accelerate.utils import get_int_from_env
from datasets import Dataset
from tqdm.auto import tqdm

from .encoding import EncodedPair, token_count
from .errors import RunError
from .files import Parts

if TYPE_CHECKING:
    from .columns import IFDScorer

STALL = 1800.0  # seconds without a finished part after which the main process gives up on the others
GRACE = 60.0  # seconds until a file of another machine is seen here
LEAVE = 2.0  # seconds that an interrupted program waits for the thread; a part takes milliseconds to encode
_POLL = 0.1
# What launchers call a process's number and theirs: torchrun and accelerate; MPICH and Intel MPI; Open MPI; MVAPICH.
_VARIABLES = {
    "SIZE": ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"),
    "RANK": ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK"),
    "LOCAL_RANK": ("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK"),
}
_LAYOUT = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total} [{elapsed}<{remaining}, {rate_fmt}]"


@dataclass
class Process:
    """One of the processes of a job, or the only one.

    Attributes:
        rank: 0 for the main process, which writes the output.
        local_rank: the number of its device on its machine.
        processes: how many there are.
        store: the launcher's key-value store; None for a single process.
    """

    rank: int = 0
    local_rank: int = 0
    processes: int = 1
    store: Any = None
    _numbers: count = field(default_factory=count, repr=False)
    _rows: int = 0

    @classmethod
    def of_launch(cls) -> Process:
        """This process as its launcher's environment describes it.

        Raises:
            ValueError: for several processes without the address of the main one (`MASTER_ADDR`, `MASTER_PORT`).
        """
        processes = get_int_from_env(_VARIABLES["SIZE"], 1)
        rank = get_int_from_env(_VARIABLES["RANK"], 0)
        if processes < 2:
            return cls()
        from torch.distributed.rendezvous import rendezvous

        store, *_ = next(rendezvous(f"env://?rank={rank}&world_size={processes}"))
        return cls(rank, get_int_from_env(_VARIABLES["LOCAL_RANK"], rank), processes, store)

    @property
    def main(self) -> bool:
        """Whether this process writes the output."""
        return self.rank == 0

    def first(self, name: str, prepare: Callable[[], Any]) -> Any:
        """Call a function in the main process, then in the others; `name` says which one of such calls it is."""
        if not self.main:
            # As long as a large file takes; if the main process fails, the launcher ends this one.
            self.store.wait([f"{name} ready"], timedelta(days=1))
        found = prepare()
        if self.main and self.store is not None:
            self.store.set(f"{name} ready", "")
        return found

    def draw(self) -> int:
        """The number of the next part, for one process only."""
        return next(self._numbers) if self.store is None else self.store.add("part", 1) - 1

    def add_rows(self, rows: int) -> int:
        """Say that rows are done; how many all processes have done by now."""
        if self.store is not None:
            return self.store.add("rows", rows)
        self._rows += rows
        return self._rows

    def end(self) -> None:
        """Say that this process draws no more parts."""
        if self.store is not None:
            self.store.add("ended", 1)

    def ended(self) -> bool:
        """Whether no process draws any more parts."""
        return self.store is None or self.store.add("ended", 0) == self.processes


def score_parts(rows: Dataset, scorer: IFDScorer, parts: Parts, size: int, process: Process) -> None:
    """Score the parts that are not done yet, `size` rows each, and save each; the main process waits for all.

    Raises:
        RuntimeError: in the main process, when the others make no progress or their parts do not arrive.
    """
    starts = range(0, len(rows), size)
    sizes = [min(size, len(rows) - start) for start in starts]
    done = sum(size for part, size in enumerate(sizes) if parts.done(part, size))
    ahead = _encoded(
        lambda part: scorer.encode(rows[starts[part] : starts[part] + size]), lambda: _draw(parts, sizes, process)
    )
    with closing(ahead):
        # The first one loads the model, which has a bar of its own and is no part of this one's rate.
        encoded = chain([*islice(ahead, 1)], ahead)
        with tqdm(
            total=len(rows), initial=done, desc="Scoring", unit="row", bar_format=_LAYOUT, disable=not process.main
        ) as bar:
            for part, pairs in encoded:
                rows_per_token = len(pairs) / max(token_count(pairs), 1)
                scores = scorer.score(pairs, lambda tokens, rate=rows_per_token: bar.update(tokens * rate))
                parts.save(part, scores.columns())
                bar.update(done + process.add_rows(len(pairs)) - bar.n)  # exact again, and the rows without a score
            process.end()
            if process.main:
                _wait(parts, sizes, process, lambda: bar.update(done + process.add_rows(0) - bar.n))


def _draw(parts: Parts, sizes: Sequence[int], process: Process) -> int | None:
    """The next part that is not done, for this process only; None when there are no more."""
    while (part := process.draw()) < len(sizes):
        if not parts.done(part, sizes[part]):
            return part
    return None


def _encoded(
    encode: Callable[[int], list[EncodedPair]], draw: Callable[[], int | None]
) -> Iterator[tuple[int, list[EncodedPair]]]:
    """Parts and their encoded rows; while the caller has one, a thread encodes the next one.

    One part ahead and no more: what is drawn here waits for this device, also when another one has nothing left to do.
    The first part is encoded in this thread, since that loads the model.
    """
    part, waiting = draw(), None
    pairs = None if part is None else encode(part)
    try:
        while part is not None:
            ahead = draw()
            waiting = None if ahead is None else _Call(encode, ahead)
            yield part, pairs
            part, pairs = ahead, waiting and waiting.result()
    finally:  # a thread that is in native code when the interpreter shuts down aborts the process
        if waiting is not None:
            waiting.join(LEAVE)


class _Call(Thread):
    """What a function gives or raises, in time. A program that ends does not wait for the thread."""

    def __init__(self, function: Callable[[int], Any], argument: int) -> None:
        super().__init__(name="encode", daemon=True)
        self._function, self._argument = function, argument
        self._found, self._error = None, None
        self.start()

    def run(self) -> None:
        try:
            self._found = self._function(self._argument)
        except BaseException as error:  # for the one who asks for the result, with its traceback
            self._error = error

    def result(self) -> Any:
        self.join()
        if self._error is not None:
            raise self._error
        return self._found


def _wait(parts: Parts, sizes: Sequence[int], process: Process, show: Callable[[], Any]) -> None:
    """Until all parts are on disk and the other processes draw no more."""
    missing, since = [part for part, size in enumerate(sizes) if not parts.done(part, size)], time.monotonic()
    while missing or not process.ended():
        ended = process.ended()
        left = [part for part in missing if not parts.done(part, sizes[part])]
        if len(left) < len(missing):
            missing, since = left, time.monotonic()
            show()
        elif time.monotonic() - since > (GRACE if ended else STALL):
            why = (
                f"all processes are done, but {parts.folder} is not the same folder on all of their machines. Write to "
                "a file system that they share"
                if ended
                else f"none was finished in {STALL:.0f} s, so a process has died or hangs. End the others"
            )
            raise RunError(
                f"{len(missing)} of {len(sizes)} parts are missing: {why}, and run the same command again to go on."
            )
        time.sleep(_POLL)
