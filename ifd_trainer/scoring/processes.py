"""Rows shared out over processes: which process this is, which rows it takes, how the results come together.

There are two ways, since a process may be gone in the one and not in the other:

- A scoring job (`Process`): parts of a file, each drawn by one process when it is free and done when its file is on
  disk. The processes meet in the launcher's key-value store alone, so that any of them may die or be started again.
- The training loop (`run_shares`): all processes are in one collective program. Rows are dealt by their tokens before
  anything runs, each process runs its share, and each gets the results of all.

Shares of like numbers of rows, as `Dataset.shard` and accelerate's `split_between_processes` cut them, were tried on
6,128 real rows of three files one after another: the longest of 4 shares took 1.27 times the mean, of 8 shares 1.57
times, and 1.9 times with one device of half the speed. Drawn parts took 1.02 times there (1.2 where 8 processes had 49
parts), dealt tokens 1.00 times.

A launcher may start processes again, all of them or those of one machine (`torchrun --max-restarts`), and its store
keeps what they wrote in an earlier life. So each part is claimed by a process in one of its lives, and when the counter
has come to its end, parts are drawn whose claimant has died.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import count
from typing import Any

import numpy as np
from accelerate.utils import gather_object, get_int_from_env

# What launchers call a process's number and theirs: torchrun and accelerate; MPICH and Intel MPI; Open MPI; MVAPICH.
_LAUNCHER_VARIABLES = {
    "WORLD_SIZE": ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"),
    "RANK": ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK"),
    "LOCAL_RANK": ("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK"),
}


@dataclass
class Process:
    """One of the processes of a job, or the only one.

    Attributes:
        rank: 0 for the main process, which writes the output.
        local_rank: the number of its device on its machine.
        world_size: how many there are.
        store: the launcher's key-value store; None for a single process.
        life: 1, and one more each time that the launcher starts this process again.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    store: Any = None
    life: int = 1
    _next_number: count = field(default_factory=count, repr=False)
    _rows: int = 0

    @classmethod
    def from_environment(cls) -> Process:
        """This process as its launcher's environment describes it.

        Raises:
            ValueError: for several processes without the address of the main one (`MASTER_ADDR`, `MASTER_PORT`).
        """
        world_size = get_int_from_env(_LAUNCHER_VARIABLES["WORLD_SIZE"], 1)
        rank = get_int_from_env(_LAUNCHER_VARIABLES["RANK"], 0)
        if world_size < 2:
            return cls()
        from torch.distributed.rendezvous import rendezvous

        store, *_ = next(rendezvous(f"env://?rank={rank}&world_size={world_size}"))
        life = store.add(f"life {rank}", 1)
        return cls(rank, get_int_from_env(_LAUNCHER_VARIABLES["LOCAL_RANK"], rank), world_size, store, life)

    @property
    def main(self) -> bool:
        """Whether this process writes the output."""
        return self.rank == 0

    def main_first(self, name: str, prepare: Callable[[], Any]) -> Any:
        """Call a function in the main process, then in the others; `name` says which one of such calls it is.

        In a later life the others do not wait for what has been prepared once.
        """
        if not self.main:
            # As long as a large file takes; if the main process fails, the launcher ends this one.
            self.store.wait([f"{name} ready"], timedelta(days=1))
        prepared = prepare()
        if self.main and self.store is not None:
            self.store.set(f"{name} ready", "")
        return prepared

    def draw(self, parts: int, done: Callable[[int], bool]) -> int | None:
        """The number of a part that is not done, of so many, for one process only; None when there are no more."""
        while (part := self._next_part()) < parts:
            if self.store is not None:
                self.store.set(f"part {part}", self._claim())
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
            self._get(f"ended {rank}") == str(self._life_of(rank)) for rank in range(self.world_size)
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
        status = self._get("finished")
        return int(status) if status else None

    def _next_part(self) -> int:
        return next(self._next_number) if self.store is None else self.store.add("part", 1) - 1

    def _inherit(self, part: int) -> bool:
        """Claim a part that is claimed by no process that lives; whether that was done."""
        claim = self._get(f"part {part}")
        if claim:
            rank, life = map(int, claim.split())
            if rank < self.world_size and life == self._life_of(rank):  # there may be fewer processes now
                return False
        # Two processes may see that it is free: one of them gets it.
        return self.store.compare_set(f"part {part}", claim, self._claim()).decode() == self._claim()

    def _any_restarted(self) -> bool:
        # One that is started again after this question looks for its own parts itself.
        return self.store is not None and any(self._life_of(rank) > 1 for rank in range(self.world_size))

    def _life_of(self, rank: int) -> int:
        return self.store.add(f"life {rank}", 0)

    def _claim(self) -> str:
        return f"{self.rank} {self.life}"

    def _get(self, key: str) -> str:
        return self.store.get(key).decode() if self.store.check([key]) else ""


def share_out(tokens: Sequence[int], shares: int) -> list[np.ndarray]:
    """Deal rows out so that the shares hold about the same number of tokens.

    Longest first, each row to the share that has the fewest tokens so far: no two shares differ by more tokens than
    the longest row has. The same rows are always dealt in the same way.

    Returns:
        `shares` index arrays in ascending order, a partition of range(len(tokens)); some may be empty.

    >>> [share.tolist() for share in share_out([3, 9, 4, 1], 2)]
    [[1], [0, 2, 3]]
    """
    if shares == 1:
        return [np.arange(len(tokens))]
    tokens = np.asarray(tokens, dtype=np.int64)
    dealt: list[list[int]] = [[] for _ in range(shares)]
    totals = [(0, share) for share in range(shares)]  # a heap
    for index in np.argsort(-tokens, kind="stable").tolist():
        total, share = totals[0]
        dealt[share].append(index)
        heapq.heapreplace(totals, (total + int(tokens[index]), share))
    return [np.array(sorted(indices), dtype=np.int64) for indices in dealt]


def run_shares(
    run: Callable[[np.ndarray], dict[str, np.ndarray]], tokens: np.ndarray, rank: int, world_size: int, chunk: int
) -> dict[str, np.ndarray]:
    """Columns of all n rows, in their order, of which each process computes a share; all processes call it together.

    Args:
        run: columns of some rows, given by their numbers.
        tokens: (n,) of each row, by which rows are dealt.
        rank: of this process.
        world_size: of how many.
        chunk: rows of a call of `run`; every process makes the same number of calls, also with no rows.
    """
    dealt, columns = [], []
    for start in range(0, max(len(tokens), 1), chunk * world_size):  # of no rows, columns without values
        shares = [start + share for share in share_out(tokens[start : start + chunk * world_size], world_size)]
        dealt.append(shares)
        columns.append(run(shares[rank]))
    own = {name: _concatenated([part[name] for part in columns]) for name in columns[0]}
    if world_size == 1:
        return own
    of_ranks = gather_object([own])
    order = np.argsort(np.concatenate([share for shares in zip(*dealt, strict=True) for share in shares]))
    return {name: _concatenated([part[name] for part in of_ranks])[order] for name in own}


def _concatenated(parts: Iterable[np.ndarray]) -> np.ndarray:
    """One array of several; a part without rows does not know how wide the others are."""
    parts = list(parts)
    return np.concatenate([part for part in parts if len(part)] or parts[:1])
