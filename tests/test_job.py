"""A scoring job: parts on disk, constant memory, several processes and one that dies."""

from __future__ import annotations

import errno
import importlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from datasets import Dataset
from test_distributed import end

from ifd_trainer import files, job
from ifd_trainer.encoding import EncodedPair, Segment
from ifd_trainer.files import Parts, load_rows, with_columns, write_rows
from ifd_trainer.job import Process, score_parts
from ifd_trainer.provenance import scores_digest

TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node=2"]
# What a machine with two GPUs is told; `--cpu` would start one process.
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--main_process_port={port}"]
LIMIT = 200  # seconds; a launch takes about 15 on two cores
ROWS = [{"instruction": f"Name {n} things.", "output": "The cat sat. " * (n % 5), "n": n} for n in range(40)]
# The process with the rank $DIES ends in its first forward, as if it had been killed, once a part of the other one is
# on disk; the other one stops after that part, so that it cannot do all of them before the first is there.
PROGRAM = """
import os, sys, time
from pathlib import Path
from ifd_trainer.cli import main
from ifd_trainer.columns import IFDScorer
from ifd_trainer.files import Parts

def dies(*_):
    while not any(Path(sys.argv[-1] + ".parts").glob("part-*.parquet")):
        time.sleep(0.01)
    os._exit(9)

def save_and_stop(*part):
    save(*part)
    time.sleep(1000)  # the launcher ends it

if os.environ["DIES"] == os.environ.get("RANK"):
    IFDScorer.score = dies
elif os.environ["DIES"] != "None":
    save, Parts.save = Parts.save, save_and_stop
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def command(tmp_path: Path, model, tokenizer) -> list[str]:
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    (tmp_path / "program.py").write_text(PROGRAM, encoding="utf-8")
    scored = ["score", str(tmp_path / "rows.jsonl"), "--model", str(tmp_path / "model"), "--device", "cpu"]
    return [str(tmp_path / "program.py"), *scored, "--part-rows", "3"]


def run(command: list[str], launcher: list[str], output: Path, dies: int | None = None) -> tuple[int, str]:
    """Exit code and what was printed."""
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    printed = output.with_suffix(".txt")
    with printed.open("w") as sink, socket.create_server(("localhost", 0)) as taken:
        # Told a port that is taken, accelerate leaves it to the store to find a free one, as torchrun does.
        module = ["-m", *(word.format(port=taken.getsockname()[1]) for word in launcher)] if launcher else []
        process = subprocess.Popen(
            [sys.executable, *module, *command, "--output", str(output)],
            stdout=sink,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "DIES": str(dies)},
        )
        try:
            return process.wait(LIMIT), printed.read_text()
        except subprocess.TimeoutExpired:
            pytest.fail(f"Not done after {LIMIT} s:\n{printed.read_text()[-4000:]}")
        finally:
            end(process)


@pytest.mark.timeout(3 * LIMIT + 100)
@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_two_processes_write_the_bytes_of_one_and_go_on_after_one_has_died(
    tmp_path: Path, command: list[str], launcher: list[str]
) -> None:
    alone, shared = tmp_path / "alone.parquet", tmp_path / "shared.parquet"
    code, text = run(command, [], alone)
    assert code == 0, text
    code, text = run(command, launcher, shared, dies=1)
    assert code != 0, text
    assert "rank      : 1 " in text  # there was a second process, and it died
    assert not shared.exists()
    assert any(Path(f"{shared}.parts").glob("part-*.parquet"))
    code, text = run(command, launcher, shared)
    assert code == 0, text
    assert text.count("Written to") == 1
    assert shared.read_bytes() == alone.read_bytes()
    assert not Path(f"{shared}.parts").exists()
    found = load_rows(str(shared)).to_pandas()
    assert found["n"].tolist() == list(range(40))
    assert (found["ifd_status"] == "empty_answer").tolist() == [n % 5 == 0 for n in range(40)]


# ---- waiting ----------------------------------------------------------------------------------------------------


class Store(dict):
    """The launcher's store, without a launcher."""

    def add(self, key: str, value: int) -> int:
        self[key] = self.get(key, 0) + value
        return self[key]


@pytest.mark.parametrize(
    ("ended", "words"), [(1, "not the same folder on all"), (0, "a process has died or hangs. End the others")]
)
def test_the_main_process_does_not_wait_forever(tmp_path: Path, monkeypatch, ended: int, words: str) -> None:
    monkeypatch.setattr(job, "STALL", 0.3)
    monkeypatch.setattr(job, "GRACE", 0.3)
    # The other process has drawn both parts and has not saved them here.
    process = Process(0, 0, 2, Store(part=2, ended=ended))
    parts = Parts(tmp_path / "out.parquet", {})
    with pytest.raises(RuntimeError, match=f"2 of 2 parts are missing: .*{words}"):
        score_parts(Dataset.from_dict({"n": [1, 2]}), None, parts, 1, process)


def test_processes_draw_each_part_once() -> None:
    store = Store()
    processes = [Process(rank, rank, 2, store) for rank in range(2)]
    assert [processes[i].draw() for i in (0, 1, 1, 0)] == [0, 1, 2, 3]
    assert [processes[i].add_rows(5) for i in (0, 1)] == [5, 10]
    processes[0].end()
    assert not processes[0].ended()
    processes[1].end()
    assert processes[0].ended()


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
    monkeypatch.setattr(module, "rendezvous", lambda url: asked.append(url) or iter([("store", None, None)]))
    found = Process.of_launch()
    assert (found.rank, found.local_rank, found.processes, found.store) == (3, 1, 4, "store")
    assert asked == ["env://?rank=3&world_size=4"]


def test_several_processes_without_an_address_are_told_what_is_missing(monkeypatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="MASTER_ADDR"):
        Process.of_launch()


# ---- a part ahead -----------------------------------------------------------------------------------------------


class Device:
    """Stands in for an `IFDScorer`: the score of a row is ten times its number, and each step is noted.

    Args:
        at: called with a step's name and the part (rows 2 * part and 2 * part + 1) before the step is done.
    """

    def __init__(self, at=lambda step, part: None) -> None:
        self.at = at
        self.threads: dict[int, str] = {}
        self.encoded: list[int] = []
        self.scored: list[int] = []

    def encode(self, batch: dict[str, list[int]]) -> list[EncodedPair]:
        part = batch["n"][0] // 2
        self.threads[part] = threading.current_thread().name
        self.at("encode", part)
        self.encoded.append(part)
        return [EncodedPair(Segment([n, 0], 1), Segment([n, 0], 1)) for n in batch["n"]]

    def score(self, pairs: list[EncodedPair], progress) -> Device:
        self.numbers = [pair.conditioned.ids[0] for pair in pairs]
        self.at("score", self.numbers[0] // 2)
        self.scored.append(self.numbers[0] // 2)
        progress(4)
        return self

    def columns(self) -> dict[str, np.ndarray]:
        self.at("save", self.numbers[0] // 2)
        return {"ifd": np.array(self.numbers) * 10.0}


NUMBERS = Dataset.from_dict({"n": list(range(9))})  # five parts of two rows, the last one of one


def score_numbers(folder: Path, device: Device, process: Process | None = None) -> list[float]:
    parts = Parts(folder / "out.parquet", {})
    score_parts(NUMBERS, device, parts, 2, process or Process())
    return parts.join(5)["ifd"][:]


def test_the_next_part_is_encoded_while_one_is_scored_and_no_further_one(tmp_path: Path) -> None:
    begun = [threading.Event() for _ in range(6)]
    begun[5].set()  # there is none
    ahead = []

    def at(step: str, part: int) -> None:
        if step == "encode":
            begun[part].set()
        elif step == "score":
            assert begun[part + 1].wait(20)
            ahead.append(max(part for part in range(5) if begun[part].is_set()) - part)

    device = Device(at)
    assert score_numbers(tmp_path, device) == [n * 10 for n in range(9)]
    assert ahead == [1, 1, 1, 1, 0]
    assert device.encoded == device.scored == list(range(5))
    assert device.threads == {0: threading.main_thread().name, **dict.fromkeys(range(1, 5), "encode")}


def test_an_error_in_the_thread_is_raised_with_its_place_after_the_part_before_it_is_saved(tmp_path: Path) -> None:
    def at(step: str, part: int) -> None:
        if (step, part) == ("encode", 2):
            raise ValueError("no such row")

    with pytest.raises(ValueError, match="no such row") as raised:
        score_numbers(tmp_path, Device(at))
    assert [frame.name for frame in traceback.extract_tb(raised.tb)][-3:] == ["<lambda>", "encode", "at"]
    device = Device()
    assert score_numbers(tmp_path, device) == [n * 10 for n in range(9)]
    assert device.scored == [2, 3, 4]


@pytest.mark.parametrize("part", range(5))
@pytest.mark.parametrize("step", ["encode", "score", "save"])
def test_an_interruption_at_any_step_repeats_one_part_at_most(tmp_path: Path, step: str, part: int) -> None:
    def at(*now: object) -> None:
        if now == (step, part):
            raise KeyboardInterrupt

    first, second = Device(at), Device()
    with pytest.raises(KeyboardInterrupt):
        score_numbers(tmp_path, first)
    assert score_numbers(tmp_path, second) == [n * 10 for n in range(9)]
    times = Counter(first.scored + second.scored)
    assert set(times) == set(range(5))
    assert times.total() == (6 if step == "save" else 5)


def test_an_interruption_does_not_wait_for_the_thread(tmp_path: Path) -> None:
    begun, end = threading.Event(), threading.Event()

    def at(step: str, part: int) -> None:
        if (step, part) == ("encode", 1):
            begun.set()
            end.wait(60)
        elif step == "score":
            assert begun.wait(20)
            raise KeyboardInterrupt

    device, start = Device(at), time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            score_numbers(tmp_path, device)
        assert time.monotonic() - start < 30
        assert device.encoded == [0]  # the thread still has the next part
        assert all(thread.daemon for thread in threading.enumerate() if thread.name == "encode")
    finally:
        end.set()
        for thread in threading.enumerate():  # the next test looks for such a thread
            if thread.name == "encode":
                thread.join(60)


@pytest.mark.parametrize("step", ["score", "save"])
def test_an_interruption_waits_for_a_thread_that_is_about_to_end(tmp_path: Path, monkeypatch, step: str) -> None:
    monkeypatch.setattr(job, "LEAVE", 60.0)  # however late the thread gets a processor
    begun = threading.Event()

    def at(now: str, part: int) -> None:
        if (now, part) == ("encode", 1):
            begun.set()
            time.sleep(0.3)
        elif now == step:
            assert begun.wait(20)
            raise KeyboardInterrupt

    device = Device(at)
    with pytest.raises(KeyboardInterrupt):
        score_numbers(tmp_path, device)
    assert device.encoded == [0, 1]
    assert "encode" not in [thread.name for thread in threading.enumerate()]


def test_parts_drawn_by_a_process_that_died_are_missing_and_scored_by_the_next_job(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(job, "STALL", 0.3)
    monkeypatch.setattr(job, "GRACE", 0.3)

    def dies(step: str, part: int) -> None:
        if (step, part) == ("score", 0):
            raise SystemExit(9)

    store = Store()
    with pytest.raises(SystemExit):
        score_numbers(tmp_path, Device(dies), Process(1, 1, 2, store))
    main = Device()
    with pytest.raises(RuntimeError, match="2 of 5 parts are missing: none was finished"):
        score_numbers(tmp_path, main, Process(0, 0, 2, store))
    assert main.scored == [2, 3, 4]
    again = Device()
    assert score_numbers(tmp_path, again) == [n * 10 for n in range(9)]
    assert again.scored == [0, 1]


# ---- parts ------------------------------------------------------------------------------------------------------


def test_parts_join_to_typed_columns_with_nulls(tmp_path: Path) -> None:
    parts = Parts(tmp_path / "out.parquet", {"a": 1})
    blank = {"ifd": np.array([np.nan]), "ifd_ppl": np.array([np.nan]), "ifd_status": np.array(["failed"], object)}
    given = {
        "ifd": np.array([0.5, 0.25]),
        "ifd_ppl": np.array([0.75, np.nan]),
        "ifd_status": np.array(["ok", "ok"], object),
    }
    parts.save(0, blank)
    parts.save(1, given)
    found = parts.join(2)
    assert found.to_dict() == {
        "ifd": [None, 0.5, 0.25],
        "ifd_ppl": [None, 0.75, None],
        "ifd_status": ["failed", "ok", "ok"],
    }
    assert pq.read_schema(parts.path(0)) == pq.read_schema(parts.path(1))
    frame = pd.DataFrame({name: np.concatenate([blank[name], given[name]]) for name in given})
    assert scores_digest(found) == scores_digest(frame)
    rows = with_columns(Dataset.from_dict({"ifd": ["old"] * 3, "n": [1, 2, 3]}), found)
    assert rows.column_names == ["n", "ifd", "ifd_ppl", "ifd_status"]
    assert rows["ifd"][:] == [None, 0.5, 0.25]


def test_removed_parts_are_gone_also_where_an_earlier_removal_was_interrupted(tmp_path: Path) -> None:
    for _ in range(2):
        parts = Parts(tmp_path / "out.parquet", {"a": 1})
        parts.save(0, {"n": np.array([1])})
        Path(f"{parts.folder}-removed").mkdir(exist_ok=True)
        parts.remove()
        assert [path.name for path in tmp_path.iterdir()] == []


@pytest.mark.parametrize("damage", ["empty", "cut off", "other rows", "no footer"])
def test_a_damaged_part_is_scored_again(tmp_path: Path, damage: str) -> None:
    first = Device()
    score_numbers(tmp_path, first)
    path = tmp_path / "out.parquet.parts" / "part-000003.parquet"
    whole = path.read_bytes()
    if damage == "other rows":
        pq.write_table(pq.read_table(path).slice(1), path)
    else:
        path.write_bytes({"empty": b"", "cut off": whole[:-20], "no footer": b"PAR1" + bytes(20) + whole[-8:]}[damage])
    again = Device()
    assert score_numbers(tmp_path, again) == [n * 10 for n in range(9)]
    assert again.scored == [3]
    assert path.read_bytes() == whole


def test_each_part_is_read_once_to_see_that_it_is_whole(tmp_path: Path, monkeypatch) -> None:
    score_numbers(tmp_path, Device())
    read, read_metadata = [], pq.read_metadata
    monkeypatch.setattr(pq, "read_metadata", lambda path: read.append(path.name) or read_metadata(path))
    score_numbers(tmp_path, Device())
    assert read == [f"part-{part:06d}.parquet" for part in range(5)]


def test_a_part_whose_values_are_damaged_is_named(tmp_path: Path) -> None:
    score_numbers(tmp_path, Device())
    path = tmp_path / "out.parquet.parts" / "part-000003.parquet"
    start = pq.read_metadata(path).row_group(0).column(0).dictionary_page_offset
    whole = path.read_bytes()
    path.write_bytes(whole[:start] + b"\xff" * 20 + whole[start + 20 :])
    with pytest.raises(ValueError, match=f"{path} is damaged .*Delete it, and run the same command again"):
        score_numbers(tmp_path, Device())


def test_options_that_differ_are_listed_with_both_values(tmp_path: Path) -> None:
    options = {"model": "gpt2", "max_length": 512, "dtype": None, "score_truncated": False, "share": 0.1, "old": 1}
    parts = Parts(tmp_path / "out.parquet", options, main=True)
    parts.save(0, {"n": np.array([1])})
    Parts(tmp_path / "out.parquet", options, main=True)
    others = {"model": "gpt2", "max_length": 1024, "dtype": "bfloat16", "score_truncated": True, "share": 0.1}
    with pytest.raises(ValueError, match="another job") as raised:
        Parts(tmp_path / "out.parquet", others, main=True)
    assert str(raised.value) == (
        f"{parts.folder} holds parts of another job: max_length: 512 there, 1024 now; dtype: not set there, bfloat16 "
        "now; score_truncated: False there, True now; old: 1 there, not set now. Delete the folder to start anew, or "
        "write to another file."
    )


@pytest.mark.parametrize("found", ['{"a": 2}', "", '{"a"', "[1]", "\xff", None])
def test_a_folder_without_parts_is_taken_over(tmp_path: Path, found: str | None) -> None:
    folder = tmp_path / "out.parquet.parts"
    folder.mkdir()
    if found is not None:
        (folder / "job.json").write_text(found, encoding="latin-1")
    Parts(tmp_path / "out.parquet", {"a": 1}, main=True).save(0, {"n": np.array([1])})
    assert json.loads((folder / "job.json").read_text()) == {"a": 1}
    Parts(tmp_path / "out.parquet", {"a": 1})


def test_only_the_main_process_takes_a_folder_over(tmp_path: Path) -> None:
    Parts(tmp_path / "out.parquet", {"a": 1}, main=True)
    with pytest.raises(ValueError, match="a: 1 there, 2 now"):
        Parts(tmp_path / "out.parquet", {"a": 2})


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ("", "job.json is damaged .*so the parts may be of another job. Delete the folder"),
        ('{"a"', "job.json is damaged"),
        ("[1]", "job.json is damaged"),
        ("\xff", "job.json is damaged"),
        (None, "out.parquet.parts holds parts, but no job.json to say of which job. Delete the folder"),
    ],
)
def test_parts_of_which_nothing_says_whose_they_are_are_refused(tmp_path: Path, found: str | None, words: str) -> None:
    path = tmp_path / "out.parquet.parts" / "job.json"
    Parts(tmp_path / "out.parquet", {"a": 1}).save(0, {"n": np.array([1])})
    path.unlink() if found is None else path.write_text(found, encoding="latin-1")
    for main in (True, False):
        with pytest.raises(ValueError, match=words):
            Parts(tmp_path / "out.parquet", {"a": 1}, main=main)


DIES_WRITING = """
import os, sys
from datasets import Dataset
from ifd_trainer.files import Parts, write_rows
parts = Parts(sys.argv[1], {"a": 1}, main=True)
os.fsync = lambda _: os._exit(9)
write_rows(Dataset.from_dict({"number": [1, 2]}), sys.argv[1], parts.folder)
"""
HOLDS = """
import sys
from ifd_trainer.files import Parts
parts = Parts(sys.argv[1], {"a": 1}, main=True)
print("ready", flush=True)
sys.stdin.read()
"""


def test_a_second_job_is_refused_until_the_first_one_is_killed(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    output = tmp_path / "out.parquet"
    command = [sys.executable, "-c", HOLDS, str(output)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as holder:
        try:
            assert holder.stdout.readline().strip() == b"ready"
            with pytest.raises(ValueError, match=rf"Another job is making {output} \(process {holder.pid} on .*Wait"):
                Parts(output, {"a": 1}, main=True)
            Parts(output, {"a": 1})  # another process of the same job
        finally:
            holder.kill()
    parts = Parts(output, {"a": 2}, main=True)
    parts.save(0, {"n": np.array([1])})
    parts.close()
    with pytest.raises(ValueError, match="a: 2 there, 3 now"):
        Parts(output, {"a": 3}, main=True)
    # What was refused does not keep others out.
    check = [
        sys.executable,
        "-c",
        "import sys; from ifd_trainer.files import Parts; Parts(sys.argv[1], {'a': 2}, True)",
    ]
    assert subprocess.run([*check, str(output)], cwd=ROOT, check=False).returncode == 0
    Parts(output, {"a": 2}, main=True).remove()
    Parts(output, {"a": 3}, main=True)


def test_a_system_without_locks_goes_without(tmp_path: Path, monkeypatch) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "lockf", none)
    Parts(tmp_path / "a.parquet", {}, main=True).remove()
    monkeypatch.setattr(files, "fcntl", None)
    Parts(tmp_path / "a.parquet", {}, main=True).remove()
    assert list(tmp_path.iterdir()) == []


def test_nothing_stays_of_an_output_whose_writing_was_killed(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    command = [sys.executable, "-c", DIES_WRITING, str(output)]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 9
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl.parts"]
    parts = Parts(output, {"a": 1}, main=True)
    assert len(list(parts.folder.glob(".out-*.jsonl"))) == 1
    write_rows(NUMBERS, output, parts.folder)
    parts.remove()
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]
