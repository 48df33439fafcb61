"""A long scoring job: parts of a data set, scored by one process or by several, each saved as soon as it is done.

Several processes (`torchrun`, `accelerate launch`, `mpirun`) draw the numbers of parts from one counter, so that none
of them waits for another before the last parts, however unequal parts and devices are. What is done is on disk: a job
that is interrupted, or one of whose processes dies, goes on with the parts that are missing, with any number of
processes. The processes share the folder of the parts and the launcher's key-value store; they exchange nothing else.

A launcher may start processes again, all of them or those of one machine (`torchrun --max-restarts`), and its store
keeps what they wrote in an earlier life. So each part is claimed by a process in one of its lives, and when the counter
has come to its end, parts are drawn whose claimant has died.

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

from ..data.encoding import EncodedPair, token_count
from ..data.files import Parts
from ..errors import RunError

if TYPE_CHECKING:
    from .transform import IFDScorer

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
        life: 1, and one more each time that the launcher starts this process again.
    """

    rank: int = 0
    local_rank: int = 0
    processes: int = 1
    store: Any = None
    life: int = 1
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
        life = store.add(f"life {rank}", 1)
        return cls(rank, get_int_from_env(_VARIABLES["LOCAL_RANK"], rank), processes, store, life)

    @property
    def main(self) -> bool:
        """Whether this process writes the output."""
        return self.rank == 0

    def first(self, name: str, prepare: Callable[[], Any]) -> Any:
        """Call a function in the main process, then in the others; `name` says which one of such calls it is.

        In a later life the others do not wait for what has been prepared once.
        """
        if not self.main:
            # As long as a large file takes; if the main process fails, the launcher ends this one.
            self.store.wait([f"{name} ready"], timedelta(days=1))
        found = prepare()
        if self.main and self.store is not None:
            self.store.set(f"{name} ready", "")
        return found

    def draw(self, parts: int, done: Callable[[int], bool]) -> int | None:
        """The number of a part that is not done, of so many, for one process only; None when there are no more."""
        while (part := self._next()) < parts:
            if self.store is not None:
                self.store.set(f"part {part}", self._name())
            if not done(part):
                return part
        if self._any_restarted() and self.finished() is None:
            return next((part for part in range(parts) if not done(part) and self._inherit(part)), None)
        return None

    def add_rows(self, rows: int) -> int:
        """Say that rows are done; how many all processes have done by now, in all their lives."""
        if self.store is not None:
            return self.store.add("rows", rows)
        self._rows += rows
        return self._rows

    def end(self) -> None:
        """Say that this process draws no more parts."""
        if self.store is not None:
            self.store.set(f"ended {self.rank}", str(self.life))

    def ended(self) -> bool:
        """Whether no process draws any more parts."""
        return self.store is None or all(
            self._get(f"ended {rank}") == str(self._life_of(rank)) for rank in range(self.processes)
        )

    def finish(self, status: int) -> None:
        """Say, in the main process, that the output is written, before the parts are deleted."""
        if self.store is not None:
            self.store.set("finished", str(status))

    def finished(self) -> int | None:
        """The status of a job that is finished, for a process that is started again; None where it is not finished.

        One that comes late is not waited for, if it had drawn its last part in an earlier life.
        """
        if self.life == 1:  # it was waited for, and the store may be gone with the main process
            return None
        found = self._get("finished")
        return int(found) if found else None

    def _next(self) -> int:
        return next(self._numbers) if self.store is None else self.store.add("part", 1) - 1

    def _inherit(self, part: int) -> bool:
        """Claim a part that is claimed by no process that lives; whether that was done."""
        claim = self._get(f"part {part}")
        if claim:
            rank, life = map(int, claim.split())
            if rank < self.processes and life == self._life_of(rank):  # there may be fewer processes now
                return False
        # Two processes may see that it is free: one of them gets it.
        return self.store.compare_set(f"part {part}", claim, self._name()).decode() == self._name()

    def _any_restarted(self) -> bool:
        # One that is started again after this question looks for its own parts itself.
        return self.store is not None and any(self._life_of(rank) > 1 for rank in range(self.processes))

    def _life_of(self, rank: int) -> int:
        return self.store.add(f"life {rank}", 0)

    def _name(self) -> str:
        return f"{self.rank} {self.life}"

    def _get(self, key: str) -> str:
        return self.store.get(key).decode() if self.store.check([key]) else ""


def score_parts(rows: Dataset, scorer: IFDScorer, parts: Parts, size: int, process: Process) -> None:
    """Score the parts that are not done yet, `size` rows each, and save each; the main process waits for all.

    Raises:
        RuntimeError: in the main process, when the others make no progress or their parts do not arrive; when the
            folder of the parts is gone.
    """
    sizes = sizes_of(len(rows), size)
    earlier = process.add_rows(0)  # counted in earlier lives; their parts are among those on disk
    done = sum(size for part, size in enumerate(sizes) if parts.done(part, size))
    if process.main:
        parts.warn(parts.damaged(len(sizes)))

    def draw() -> int | None:
        return process.draw(len(sizes), lambda part: parts.done(part, sizes[part]))

    def show(counted: int) -> None:
        bar.update(done + counted - earlier - bar.n)

    ahead = _encoded(lambda part: scorer.encode(_rows_of(rows, part, size)), draw)
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
                show(process.add_rows(len(pairs)))  # exact again, and the rows without a score
            process.end()
            if process.main:
                _wait(parts, len(sizes), process, lambda: show(process.add_rows(0)))


def join_parts(rows: Dataset, scorer: IFDScorer, parts: Parts, size: int) -> Dataset:
    """The scores of all rows, on disk; a part whose file is damaged by now is scored again."""
    return parts.join(
        sizes_of(len(rows), size), lambda part: scorer.score(scorer.encode(_rows_of(rows, part, size))).columns()
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


def _wait(parts: Parts, count: int, process: Process, show: Callable[[], Any]) -> None:
    """Until all parts are on disk and the other processes draw no more."""
    missing, since = [part for part in range(count) if not parts.path(part).exists()], time.monotonic()
    while missing or not process.ended():
        ended = process.ended()
        left = [part for part in missing if not parts.path(part).exists()]
        parts.check_there()
        if len(left) < len(missing):
            missing, since = left, time.monotonic()
            show()
        elif time.monotonic() - since > (GRACE if ended else STALL):
            raise RunError(_why(missing, count, parts, ended))
        time.sleep(_POLL)


def _why(missing: Sequence[int], count: int, parts: Parts, ended: bool) -> str:
    """What the main process says when it gives up."""
    if ended:
        return (
            f"{len(missing)} of {count} parts are missing: all processes are done, but {parts.folder} is not the same "
            "folder on all of their machines, or parts were deleted from it. Write to a file system that they share, "
            "and run the same command again to go on."
        )
    what = f"{len(missing)} of {count} parts are missing" if missing else "All parts are there"
    return (
        f"{what}: none was finished in {STALL:.0f} s, so a process has died or hangs. End the others, and run the same "
        "command again to go on."
    )
