"""Shares of processes: parts that are drawn, rows that are dealt, columns that come together."""

from __future__ import annotations

import importlib
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from stores import Store, start

from ifd_trainer.scoring import processes
from ifd_trainer.scoring.processes import Process, run_shares, share_out

# ---- parts that are drawn -----------------------------------------------------------------------------------------


def test_processes_draw_each_part_once() -> None:
    store, done = Store(), set()
    processes = [start(rank, 2, store) for rank in range(2)]
    assert [processes[i].draw(4, done.__contains__) for i in (0, 1, 1, 0)] == [0, 1, 2, 3]
    assert [process.draw(4, done.__contains__) for process in processes] == [None, None]
    assert [processes[i].add_rows(5) for i in (0, 1)] == [5, 10]
    processes[0].end()
    assert not processes[0].ended()
    processes[1].end()
    assert processes[0].ended()


@pytest.mark.parametrize("lives", [[0, 1], [1, 0], [1], [0]], ids=str)
def test_what_a_process_had_drawn_before_it_died_is_drawn_by_one_that_lives(lives: list[int]) -> None:
    store, done = Store(), set()
    first = [start(rank, 2, store) for rank in range(2)]
    assert [process.draw(6, done.__contains__) for process in first * 2] == [0, 1, 2, 3]
    done |= {0, 1}
    first[0].end()
    first[1].end()
    # Processes are started again, all or the one that died; only what is claimed by those that live is left to them.
    again = {rank: start(rank, 2, store) for rank in lives}
    now = [again.get(rank, first[rank]) for rank in range(2)]
    assert now[0].ended() is False
    drawn = {0: [], 1: []}
    for rank in [*lives, *lives, *lives, *range(2), *range(2)]:
        part = now[rank].draw(6, done.__contains__)
        drawn[rank] += [] if part is None else [part]
    dead = {2: 0, 3: 1}
    assert sorted(drawn[0] + drawn[1]) == sorted([4, 5, *(part for part, rank in dead.items() if rank in lives)])
    now[0].end()
    now[1].end()
    assert now[0].ended()


def test_what_was_drawn_by_a_process_that_is_no_more_is_inherited() -> None:
    """Where a machine is lost, a launcher may go on with fewer processes, whose numbers begin at 0 again."""
    store = Store()
    before = [start(rank, 4, store) for rank in range(4)]
    assert [process.draw(4, lambda _: False) for process in before] == [0, 1, 2, 3]
    now = [start(rank, 2, store) for rank in range(2)]
    done = {0}
    assert [now[i].draw(4, done.__contains__) for i in (0, 1, 0, 0, 1)] == [1, 2, 3, None, None]


def test_of_two_processes_that_inherit_at_the_same_time_one_gets_the_part() -> None:
    store = Store(part=1, part_0="0 1", life_0=1)
    processes = [start(rank, 3, store) for rank in range(3)]
    get = store.get
    other = []

    def between(key: str) -> bytes:
        found = get(key)
        if key == "part 0" and not other:
            other.append(None)
            other[0] = processes[1].draw(1, lambda _: False)
        return found

    store.get = between
    assert [processes[2].draw(1, lambda _: False), other] == [None, [0]]


@pytest.mark.parametrize(
    "variables",
    [
        {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"},
        {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1"},
        {"PMI_SIZE": "4", "PMI_RANK": "3", "MPI_LOCALRANKID": "1"},
    ],
)
def test_a_process_knows_its_number_from_torchrun_and_from_mpi(monkeypatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    asked = []
    module = importlib.import_module("torch.distributed.rendezvous")
    store = Store()
    monkeypatch.setattr(module, "rendezvous", lambda url: asked.append(url) or iter([(store, None, None)]))
    for life in (1, 2):
        found = Process.from_environment()
        assert (found.rank, found.local_rank, found.world_size, found.store) == (3, 1, 4, store)
        assert found.life == life
    assert asked == ["env://?rank=3&world_size=4"] * 2


def test_several_processes_without_an_address_are_told_what_is_missing(monkeypatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="MASTER_ADDR"):
        Process.from_environment()


# ---- rows that are dealt ------------------------------------------------------------------------------------------


@given(tokens=st.lists(st.integers(0, 50), max_size=40), shares=st.integers(1, 5))
def test_shares_are_a_partition_and_differ_by_less_than_a_row(tokens, shares):
    dealt = share_out(tokens, shares)
    assert len(dealt) == shares
    assert sorted(np.concatenate(dealt).tolist()) == list(range(len(tokens)))
    totals = [sum(tokens[i] for i in share) for share in dealt]
    assert max(totals) - min(totals) <= max(tokens, default=0)


def test_shares_go_by_tokens_and_not_by_rows():
    assert [share.tolist() for share in share_out([10, 30, 10, 10], 2)] == [[1], [0, 2, 3]]


@pytest.mark.parametrize("chunk", [1, 2, 100])
def test_each_process_gets_the_columns_of_all_rows_in_their_order(monkeypatch, chunk: int) -> None:
    """Three processes, as threads; with seven rows some have none in a call, and such a call tells no width."""
    barrier, of_ranks, calls = threading.Barrier(3), {}, {rank: [] for rank in range(3)}

    def gather(own: list) -> list:
        of_ranks[int(threading.current_thread().name)] = own[0]
        barrier.wait(20)
        return [of_ranks[rank] for rank in range(3)]

    def columns(rank: int) -> dict[str, np.ndarray]:
        def run(rows: np.ndarray) -> dict[str, np.ndarray]:
            calls[rank].append(rows.tolist())
            return {"n": rows, "wide": np.repeat(rows[:, None], 2, axis=1) if len(rows) else np.empty((0, 0))}

        return run_shares(run, np.array([9, 1, 1, 1, 1, 1, 4]), rank, 3, chunk)

    monkeypatch.setattr(processes, "gather_object", gather)
    found = {}
    threads = [
        threading.Thread(target=lambda r=rank: found.update({r: columns(r)}), name=str(rank)) for rank in (0, 1, 2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    for rank in range(3):
        assert found[rank]["n"].tolist() == list(range(7))
        assert found[rank]["wide"].tolist() == [[n, n] for n in range(7)]
    assert sorted(n for shares in calls.values() for share in shares for n in share) == list(range(7))
    assert {len(shares) for shares in calls.values()} == {-(-7 // (3 * chunk))}  # of like number on all processes
