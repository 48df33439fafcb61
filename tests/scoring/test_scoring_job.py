"""A scoring job: parts on disk, constant memory, several processes and one that dies."""

from __future__ import annotations

import errno
import gzip
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from conftest import ROOT
from datasets import Dataset
from launching import end, forked
from stores import Store, start

from ifd_trainer.cli import main
from ifd_trainer.data import files
from ifd_trainer.data.encoding import EncodedPair, Segment
from ifd_trainer.data.files import load_rows, with_columns, write_rows
from ifd_trainer.errors import FileAccessError, RunError, UserError
from ifd_trainer.publish.provenance import provenance_path, scores_digest
from ifd_trainer.scoring import job_parts
from ifd_trainer.scoring.job_parts import Parts
from ifd_trainer.scoring.processes import Process
from ifd_trainer.scoring.scoring_job import join_parts, score_parts
from ifd_trainer.scoring.transform import IFDScorer
from ifd_trainer.scoring.turns import EncodedTurns

TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node=2"]
# What a machine with two GPUs is told; `--cpu` would start one process.
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--main_process_port={port}"]
RESTARTS = {TORCHRUN[0]: "--max-restarts=1", ACCELERATE[0]: "--max_restarts=1"}
AT_ONCE = {"stall": 0.3, "grace": 0.3}  # seconds: as long as a process waits for others that are gone
LIMIT = 200  # seconds; a launch takes about 15 on two cores
ROWS = [{"instruction": f"Name {n} things.", "output": "The cat sat. " * (n % 5), "n": n} for n in range(40)]
# The process with the rank $DIES ends in its first forward, as if it had been killed, once a part of the other one is
# on disk; the other one stops after that part, so that it cannot do all of them before the first is there. With $ONCE,
# which happens in the first life alone, the one that dies does so in its second part, and the other one goes on.
PROGRAM = """
import os, sys, time
from pathlib import Path
from ifd_trainer.cli import main
from ifd_trainer.scoring.transform import IFDScorer
from ifd_trainer.scoring.job_parts import Parts

def parts():
    return list(Path(sys.argv[-1] + ".parts").glob("ifd-part-*.arrow"))

def dies(*_):
    while not parts():
        time.sleep(0.01)
    os._exit(9)

def dies_in_its_second(self, *pairs):
    scored.append(1)
    if len(scored) < 2:
        return score(self, *pairs)
    while len(parts()) < 3:
        time.sleep(0.01)
    os._exit(9)

def save_and_stop(*part):
    save(*part)
    time.sleep(1000)  # the launcher ends it

scored, score, save = [], IFDScorer.score, Parts.save
if os.environ.get("ONCE"):
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["DIES"] == os.environ["RANK"]:
        IFDScorer.score = dies_in_its_second
elif os.environ["DIES"] == os.environ.get("RANK"):
    IFDScorer.score = dies
else:
    Parts.save = save_and_stop
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


def run(command: list[str], launcher: list[str], output: Path, dies: int, once: bool = False) -> tuple[int, str]:
    """Exit code and what was printed."""
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    printed = output.with_suffix(".txt")
    with printed.open("w") as sink, socket.create_server(("localhost", 0)) as taken:
        # Told a port that is taken, accelerate leaves it to the store to find a free one, as torchrun does.
        module = ["-m", *(word.format(port=taken.getsockname()[1]) for word in launcher)]
        process = subprocess.Popen(
            [sys.executable, *module, *command, "--output", str(output)],
            stdout=sink,
            stderr=subprocess.STDOUT,
            env={
                **os.environ,
                "PYTHONPATH": paths,
                "OMP_NUM_THREADS": "1",
                "DIES": str(dies),
                "ONCE": "1" if once else "",
            },
        )
        try:
            return process.wait(LIMIT), printed.read_text()
        except subprocess.TimeoutExpired:
            pytest.fail(f"Not done after {LIMIT} s:\n{printed.read_text()[-4000:]}")
        finally:
            end(process)


@pytest.mark.timeout(LIMIT + 100)
def test_a_job_of_two_processes_of_which_one_has_died_goes_on(tmp_path: Path, command: list[str]) -> None:
    alone, shared = tmp_path / "alone.parquet", tmp_path / "shared.parquet"
    assert main([*command[1:], "--output", str(alone)]) == 0
    code, text = run(command, TORCHRUN, shared, dies=1)
    assert code != 0, text
    assert "rank      : 1 " in text  # there was a second process, and it died
    assert not shared.exists()
    assert any(Path(f"{shared}.parts").glob("ifd-part-*.arrow"))
    assert main([*command[1:], "--output", str(shared)]) == 0
    assert shared.read_bytes() == alone.read_bytes()
    assert not Path(f"{shared}.parts").exists()
    found = load_rows(str(shared)).to_pandas()
    assert found["n"].tolist() == list(range(40))
    assert (found["ifd_status"] == "empty_answer").tolist() == [n % 5 == 0 for n in range(40)]


@pytest.mark.timeout(LIMIT + 100)
@pytest.mark.parametrize(
    ("launcher", "dies"), [(TORCHRUN, 0), (ACCELERATE, 1)], ids=["torchrun, main", "accelerate, other"]
)
def test_two_processes_write_the_bytes_of_one_and_each_part_where_a_launcher_starts_them_again(
    tmp_path: Path, command: list[str], launcher: list[str], dies: int
) -> None:
    alone, shared = tmp_path / "alone.parquet", tmp_path / "shared.parquet"
    command = [*command, "--calibrate"]  # by the main process, when the others have ended
    assert main([*command[1:], "--output", str(alone)]) == 0
    code, text = run(command, [*launcher, RESTARTS[launcher[0]]], shared, dies, once=True)
    assert code == 0, text
    assert text.count("Written to") == 1
    assert "parts are missing" not in text
    assert shared.read_bytes() == alone.read_bytes()
    assert provenance_path(shared).read_bytes() == provenance_path(alone).read_bytes()
    assert not Path(f"{shared}.parts").exists()


def test_rows_of_which_none_has_a_score_are_written_with_a_warning_and_exit_status_1(
    tmp_path: Path, command: list[str], capsys
) -> None:
    rows, output = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    rows.write_text("".join(json.dumps({**row, "output": ""}) + "\n" for row in ROWS[:8]), encoding="utf-8")
    assert main([*command[1:], "--output", str(output)]) == 1
    captured = capsys.readouterr()
    assert f"8 rows: 8 empty_answer. Written to {output}." in captured.out
    assert captured.err.splitlines()[-1] == (
        "ifd-trainer: warning: none of 8 rows has a score (8 empty_answer): nothing can be selected from "
        f"{output}. Check the format and the options; `ifd_status` says why for each row."
    )
    assert load_rows(str(output))["ifd_status"][:] == ["empty_answer"] * 8
    assert not Path(f"{output}.parts").exists()
    rows.write_text(rows.read_text() + json.dumps(ROWS[1]) + "\n", encoding="utf-8")
    assert main([*command[1:], "--output", str(output)]) == 0


def test_rows_are_not_scored_into_the_file_or_folder_that_they_come_from(
    tmp_path: Path, command: list[str], monkeypatch, capsys
) -> None:
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    rows, link = Path(command[2]), tmp_path / "link.jsonl"
    link.symlink_to(rows)
    before = rows.read_bytes(), names(tmp_path)
    for output in (rows, link):
        assert main([*command[1:], "--output", str(output), "--limit", "2"]) == 2
        assert f"--output {output} is the file that is read" in capsys.readouterr().err
    assert main(["score", str(tmp_path), *command[3:], "--output", str(tmp_path / "out.jsonl")]) == 2
    assert "is in the folder that is read" in capsys.readouterr().err
    assert (rows.read_bytes(), names(tmp_path)) == before


def test_compressed_rows_are_scored_as_they_are(tmp_path: Path, command: list[str]) -> None:
    rows = Path(command[2])
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(rows.read_bytes()))
    found = []
    for source in (rows, tmp_path / "rows.jsonl.gz"):
        assert main(["score", str(source), *command[3:], "--output", str(tmp_path / "out.parquet")]) == 0
        found.append((tmp_path / "out.parquet").read_bytes())
    assert found[0] == found[1]


def full_from_here(size: int) -> None:
    """Let this process, a copy, write no larger files."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize("ending", [".parquet", ".csv"])
def test_a_full_disk_at_the_end_is_one_line_and_the_same_command_goes_on(
    tmp_path: Path, command: list[str], ending: str, monkeypatch
) -> None:
    pytest.importorskip("resource")
    output = tmp_path / f"out{ending}"
    arguments = [*command[1:], "--output", str(output)]

    def job() -> int:
        def full(*rows: object) -> None:
            full_from_here(1000)
            write_rows(*rows)

        files.write_rows = full
        return main(arguments)

    code, text = forked(job)
    assert code == 2, text
    assert text.splitlines()[-1] == (
        f"ifd-trainer: error: Cannot write {output}: File too large. What is scored so far is kept. Mend this (make "
        "room, or allow writing there), and run the same command again to go on."
    )
    assert not output.exists()
    assert not [path for path in Path(f"{output}.parts").iterdir() if not path.name.startswith("ifd-")]
    monkeypatch.setattr(IFDScorer, "encode_rows", None)  # all is scored
    assert main(arguments) == 0
    assert len(load_rows(str(output))) == 40


@pytest.mark.parametrize("when", ["parts", "output"])
def test_an_output_that_cannot_be_written_is_one_line(
    tmp_path: Path, command: list[str], monkeypatch, capsys, when: str
) -> None:
    """A disk that takes nothing more, also where a folder is to be made."""
    output, mkdir, openly = tmp_path / "new" / "out.jsonl", Path.mkdir, os.open

    def no_folder(path: Path, *more: object, **named: object) -> None:
        if path.is_relative_to(tmp_path / "new"):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        mkdir(path, *more, **named)

    def no_output(path: object, flags: int, *more: object) -> int:
        if ".out-ifdtmp-" in str(path) and flags & os.O_CREAT:
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return openly(path, flags, *more)

    monkeypatch.setattr(*((Path, "mkdir", no_folder) if when == "parts" else (os, "open", no_output)))
    assert main([*command[1:], "--output", str(output)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    file = Path(f"{output}.parts") if when == "parts" else output
    assert error.startswith(f"ifd-trainer: error: Cannot write {file}: Read-only file system.")
    assert ("run the same command again to go on" in error) == (when == "output")


@pytest.mark.parametrize("seen", ["at its start", "before its first part", "in a part"])
@pytest.mark.parametrize("status", [0, 1])
def test_a_process_that_is_started_again_after_the_output_was_written_leaves_nothing(
    tmp_path: Path, command: list[str], monkeypatch, capsys, seen: str, status: int
) -> None:
    """It had drawn its last part before it died, so that the main process did not wait for it."""
    output, store = tmp_path / "out.jsonl", Store(part=14, life_0=2, life_1=1, ended_0=2, ended_1=1)
    store.values |= {f"{name} ready": "" for name in ("rows", "check", "parts")}
    store.values |= {f"part {part}": "1 1" for part in range(14)}

    def finish(*_: object) -> None:
        """What the main process does in the meantime."""
        store.set("finished", str(status))
        shutil.rmtree(f"{output}.parts", ignore_errors=True)

    monkeypatch.setattr(Process, "from_environment", lambda: start(1, 2, store))
    if seen == "at its start":
        finish()
    step = getattr(IFDScorer, method := "score" if seen == "in a part" else "check")
    monkeypatch.setattr(IFDScorer, method, lambda *arguments: (finish(), step(*arguments))[1])
    if seen != "in a part":
        monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    before = names(tmp_path)
    assert main([*command[1:], "--output", str(output)]) == 0
    assert names(tmp_path) == before
    assert "Written" not in capsys.readouterr().out
    monkeypatch.setattr(Process, "from_environment", lambda: start(0, 2, store))
    assert main([*command[1:], "--output", str(output)]) == status
    assert names(tmp_path) == before


# ---- waiting ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ended", "words"),
    [
        ({"ended_1": 1}, "all processes are done, but .* is not the same folder on all"),
        ({}, "none was finished in 0 s, so a process has died or hangs. End the others"),
        ({"ended_1": 0}, "none was finished in 0 s, so a process has died or hangs. End the others"),
    ],
)
def test_the_main_process_does_not_wait_forever(tmp_path: Path, ended: dict, words: str) -> None:
    # The other process has drawn both parts and has not saved them here.
    store = Store(part=2, part_0="1 1", part_1="1 1", life_1=1, **ended)
    parts = Parts(tmp_path / "out.parquet", {})
    with pytest.raises(RunError, match=f"2 of 2 parts are missing: .*{words}"):
        score_parts(Dataset.from_dict({"n": [1, 2]}), None, parts, 1, start(0, 2, store), **AT_ONCE)


def test_a_process_that_dies_after_its_last_part_is_told_from_one_that_lost_a_part(tmp_path) -> None:
    store = Store(life_1=1)
    with pytest.raises(RunError, match=r"^All parts are there: none was finished in 0 s, so a process has died"):
        score_numbers(tmp_path, Device(), start(0, 2, store), stall=0.3)


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

    def encode_rows(self, batch: dict[str, list[int]]) -> EncodedTurns:
        part = batch["n"][0] // 2
        self.threads[part] = threading.current_thread().name
        self.at("encode", part)
        self.encoded.append(part)
        return EncodedTurns.single([EncodedPair(Segment([n, 0], 1), Segment([n, 0], 1)) for n in batch["n"]])

    def score_rows(self, rows: EncodedTurns, progress=lambda tokens: None) -> dict[str, np.ndarray]:
        numbers = [pair.conditioned.ids[0] for pair in rows.pairs]
        self.at("score", numbers[0] // 2)
        self.scored.append(numbers[0] // 2)
        progress(4)
        self.at("save", numbers[0] // 2)
        return {"ifd": np.array(numbers) * 10.0}


NUMBERS = Dataset.from_dict({"n": list(range(9))})  # five parts of two rows, the last one of one


def score_numbers(folder: Path, device: Device, process: Process | None = None, **limits: float) -> list[float]:
    parts = Parts(folder / "out.parquet", {})
    score_parts(NUMBERS, device, parts, 2, process or Process(), **limits)
    return join_parts(NUMBERS, device, parts, 2)["ifd"][:]


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
    assert [frame.name for frame in traceback.extract_tb(raised.tb)][-3:] == ["<lambda>", "encode_rows", "at"]
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
def test_an_interruption_waits_for_a_thread_that_is_about_to_end(tmp_path: Path, step: str) -> None:
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
        score_numbers(tmp_path, device, leave=60.0)  # however late the thread gets a processor
    assert device.encoded == [0, 1]
    assert "encode" not in [thread.name for thread in threading.enumerate()]


def test_parts_drawn_by_a_process_that_died_are_missing_and_scored_by_the_next_job(tmp_path: Path) -> None:
    def dies(step: str, part: int) -> None:
        if (step, part) == ("score", 0):
            raise SystemExit(9)

    store = Store()
    with pytest.raises(SystemExit):
        score_numbers(tmp_path, Device(dies), start(1, 2, store))
    main = Device()
    with pytest.raises(RunError, match="2 of 5 parts are missing: none was finished"):
        score_numbers(tmp_path, main, start(0, 2, store), **AT_ONCE)
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
    found = parts.join([1, 2], None)
    assert found.to_dict() == {
        "ifd": [None, 0.5, 0.25],
        "ifd_ppl": [None, 0.75, None],
        "ifd_status": ["failed", "ok", "ok"],
    }
    assert pa.ipc.open_stream(parts.path(0)).schema == pa.ipc.open_stream(parts.path(1)).schema
    frame = pd.DataFrame({name: np.concatenate([blank[name], given[name]]) for name in given})
    assert scores_digest(found) == scores_digest(frame)
    rows = with_columns(Dataset.from_dict({"ifd": ["old"] * 3, "n": [1, 2, 3]}), found)
    assert rows.column_names == ["n", "ifd", "ifd_ppl", "ifd_status"]
    assert rows["ifd"][:] == [None, 0.5, 0.25]


def fill(folder: Path, job: dict, parts: int = 1, main: bool = True) -> Parts:
    found = Parts(folder / "out.parquet", job, main)
    for part in range(parts):
        found.save(part, {"n": np.array([part])})
    return found


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_removed_parts_are_gone_also_where_an_earlier_removal_was_interrupted(tmp_path: Path, monkeypatch) -> None:
    fill(tmp_path, {"a": 1}, 3).remove()
    assert names(tmp_path) == []
    parts, unlink = fill(tmp_path, {"a": 1}, 3), Path.unlink
    deleted = []

    def interrupted(path: Path, *more: object, **named: object) -> None:
        deleted.append(path.name)
        if len(deleted) == 2:
            raise KeyboardInterrupt
        unlink(path, *more, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", interrupted)
        with pytest.raises(KeyboardInterrupt):
            parts.remove()
    assert len(list(parts.folder.glob("ifd-part-*"))) == 2
    parts.close()
    # What is left is of a job that is done: another one does not take it for its own, and is not refused.
    other = Parts(tmp_path / "out.parquet", {"a": 2}, main=True)
    assert names(other.folder) == ["ifd-job.json", "ifd-lock"]
    other.close()
    assert names(tmp_path) == []


def test_files_of_others_in_the_folder_stay(tmp_path: Path) -> None:
    folder = tmp_path / "out.parquet.parts"
    (folder / "mine").mkdir(parents=True)
    # Names that are like those of parts, and those of other programs.
    others = [
        "notes.txt",
        "job.json",
        "lock",
        "part-000000.parquet",
        "ifd-part-1.arrow.txt",
        "mine/a.txt",
        "ifd-part-x",
    ]
    for name in others:
        (folder / name).write_text(name)
    Parts(tmp_path / "out.parquet", {"a": 1}, main=True).close()
    fill(tmp_path, {"a": 1}, 2).remove()
    assert names(folder) == sorted([*others, "mine"])
    assert [(folder / name).read_text() for name in others] == others


def test_a_folder_of_parts_is_beside_the_file_that_a_link_leads_to(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "out.parquet").symlink_to(tmp_path / "far" / "real.parquet")
    parts = fill(tmp_path, {})
    assert parts.folder == tmp_path / "far" / "real.parquet.parts"
    write_rows(NUMBERS, tmp_path / "out.parquet", parts.folder)
    parts.remove()
    assert (tmp_path / "out.parquet").is_symlink()
    assert load_rows(str(tmp_path / "far" / "real.parquet"))["n"][:] == list(range(9))
    assert names(tmp_path) == ["far", "far/real.parquet", "out.parquet"]


def test_a_lock_that_is_a_link_is_refused_and_what_it_leads_to_is_left_alone(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    (tmp_path / "mine.txt").write_text("mine")
    lock = tmp_path / "out.parquet.parts" / "ifd-lock"
    lock.parent.mkdir()
    lock.symlink_to(tmp_path / "mine.txt")
    with pytest.raises(FileAccessError, match=r"ifd-lock is a symbolic link, which no lock of a job is\. Delete it"):
        Parts(tmp_path / "out.parquet", {}, main=True)
    assert (tmp_path / "mine.txt").read_text() == "mine"


# ---- damage -----------------------------------------------------------------------------------------------------


def damaged_files(parts: list[bytes], seed: int) -> Iterator[tuple[str, dict[int, bytes | None]]]:
    """What may become of the files of parts: kinds of damage, and the bytes that are there then."""
    random = np.random.default_rng(seed)
    for part, whole in enumerate(parts):
        for _ in range(24):
            at, bit = int(random.integers(len(whole))), int(random.integers(8))
            flipped = bytearray(whole)
            flipped[at] ^= 1 << bit
            yield f"bit {bit} of byte {at}", {part: bytes(flipped)}
        for _ in range(6):
            at = int(random.integers(len(whole)))
            other = bytearray(whole)
            other[at] = (other[at] + int(random.integers(1, 256))) % 256
            yield f"byte {at}", {part: bytes(other)}
            yield f"cut off at {at}", {part: whole[:at]}
            yield f"zeros from {at}", {part: whole[:at] + bytes(len(whole) - at) + b"\1"}
        yield "empty", {part: b""}
        yield "longer", {part: whole + b"\0"}
        yield "twice", {part: whole * 2}
        yield "missing", {part: None}
    for one, two in itertools.permutations(range(len(parts)), 2):
        yield f"{two} in the place of {one}", {one: parts[two]}
        yield f"{one} and {two} swapped", {one: parts[two], two: parts[one]}


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_damaged_part_is_scored_again_whatever_the_damage(tmp_path: Path, when: str) -> None:
    """Before the job goes on, or after its parts were seen to be whole."""
    expected = score_numbers(tmp_path, Device())
    parts = Parts(tmp_path / "out.parquet", {})
    whole = [parts.path(part).read_bytes() for part in range(5)]
    tried = 0
    for what, files_now in damaged_files(whole, 0):
        parts, device = Parts(tmp_path / "out.parquet", {}), Device()
        if when == "after":
            score_parts(NUMBERS, device, parts, 2, Process())
            assert device.scored == []
        for part, data in files_now.items():
            parts.path(part).unlink() if data is None else parts.path(part).write_bytes(data)
        if when == "before":
            score_parts(NUMBERS, device, parts, 2, Process())
            assert device.scored == sorted(files_now), what
        assert join_parts(NUMBERS, device, parts, 2)["ifd"][:] == expected, what
        assert device.scored == sorted(files_now), what
        assert [parts.path(part).read_bytes() for part in range(5)] == whole, what
        tried += 1
    assert tried > 250


def test_damaged_parts_are_told_once(tmp_path: Path, caplog) -> None:
    score_numbers(tmp_path, Device())
    parts = Parts(tmp_path / "out.parquet", {})
    for part in (1, 3):
        parts.path(part).write_bytes(b"other")
    assert score_numbers(tmp_path, Device()) == [n * 10 for n in range(9)]
    assert caplog.messages == [
        "Damaged, or of another job, and so scored again: ifd-part-000001.arrow, ifd-part-000003.arrow in "
        f"{parts.folder}."
    ]
    caplog.clear()
    score_parts(NUMBERS, Device(), parts, 2, Process())
    for part in (0, 2, 4):
        parts.path(part).write_bytes(b"")
    assert join_parts(NUMBERS, Device(), parts, 2)["ifd"][:] == [n * 10 for n in range(9)]
    assert caplog.messages == [
        f"Damaged, or of another job, and so scored again: ifd-part-000000.arrow in {parts.folder}."
    ]


def test_a_part_of_another_job_is_none(tmp_path: Path) -> None:
    """Copied there by hand, with the same number and as many rows."""
    for model in "ab":
        fill(tmp_path / model, {"model": model}).close()
    parts = [tmp_path / name / "out.parquet.parts" / "ifd-part-000000.arrow" for name in "ab"]
    parts[0].write_bytes(parts[1].read_bytes())
    assert not Parts(tmp_path / "a" / "out.parquet", {"model": "a"}).done(0, 1)
    assert Parts(tmp_path / "b" / "out.parquet", {"model": "b"}).done(0, 1)


def test_each_part_is_read_once_to_see_that_it_is_whole(tmp_path: Path, monkeypatch) -> None:
    score_numbers(tmp_path, Device())
    parts, read, read_bytes = Parts(tmp_path / "out.parquet", {}), [], Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(path.name) or read_bytes(path))
    score_parts(NUMBERS, Device(), parts, 2, Process())
    assert read == [f"ifd-part-{part:06d}.arrow" for part in range(5)]


def test_a_disk_that_keeps_nothing_is_told(tmp_path: Path, monkeypatch) -> None:
    score_numbers(tmp_path, Device())
    parts = Parts(tmp_path / "out.parquet", {})
    parts.path(2).unlink()
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda path, to: to if to == parts.path(2) else replace(path, to))
    with pytest.raises(RunError, match=r"ifd-part-000002\.arrow is not what was written there a moment ago"):
        join_parts(NUMBERS, Device(), parts, 2)


def test_joined_parts_that_change_before_they_are_read_for_the_last_time_are_told(tmp_path: Path) -> None:
    score_numbers(tmp_path, Device())
    parts = Parts(tmp_path / "out.parquet", {})
    join_parts(NUMBERS, Device(), parts, 2)
    parts.check_joined()
    path = parts.folder / "ifd-joined.arrow"
    whole = path.read_bytes()
    for at in range(0, len(whole), 7):
        flipped = bytearray(whole)
        flipped[at] ^= 4
        path.write_bytes(flipped)
        with pytest.raises(
            RunError, match=r"ifd-joined\.arrow was changed or deleted while .*out\.parquet was written"
        ):
            parts.check_joined()
    path.unlink()
    with pytest.raises(RunError, match="was changed or deleted"):
        parts.check_joined()


@pytest.mark.parametrize("step", ["score", "save"])
def test_a_folder_that_is_deleted_while_a_job_is_at_work_is_told(tmp_path: Path, step: str) -> None:
    def at(now: str, part: int) -> None:
        if (now, part) == (step, 2):
            shutil.rmtree(tmp_path / "out.parquet.parts")

    with pytest.raises(RunError, match=r"out\.parquet\.parts was deleted or moved while its job was at work\. Run the"):
        score_numbers(tmp_path, Device(at))
    assert names(tmp_path) == []
    assert score_numbers(tmp_path, Device()) == [n * 10 for n in range(9)]


def test_a_folder_that_is_deleted_while_the_main_process_waits_or_joins_is_told(tmp_path: Path) -> None:
    parts = Parts(tmp_path / "out.parquet", {})
    score_parts(NUMBERS, Device(), parts, 2, Process())
    shutil.rmtree(parts.folder)
    with pytest.raises(RunError, match="was deleted or moved"):
        join_parts(NUMBERS, Device(), parts, 2)
    parts = Parts(tmp_path / "out.parquet", {})
    shutil.rmtree(parts.folder)
    with pytest.raises(RunError, match="was deleted or moved"):
        score_parts(NUMBERS, None, parts, 2, start(0, 2, Store(part=5, life_1=1)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_full_disk_names_the_part_and_the_same_job_goes_on(tmp_path: Path) -> None:
    def at(step: str, part: int) -> None:
        if (step, part) == ("save", 1):
            full_from_here(100)

    def job() -> None:
        try:
            score_numbers(tmp_path, Device(at))
        except OSError as error:
            print(error)

    _, text = forked(job)
    path = tmp_path / "out.parquet.parts" / "ifd-part-000001.arrow"
    assert text.splitlines()[-1:] == [
        f"Cannot write {path}: File too large. What is scored so far is kept. Mend this (make room, or allow writing "
        "there), and run the same command again to go on."
    ]
    assert names(tmp_path) == ["out.parquet.parts"] + [
        f"out.parquet.parts/{name}" for name in ("ifd-job.json", "ifd-part-000000.arrow")
    ]
    device = Device()
    assert score_numbers(tmp_path, device) == [n * 10 for n in range(9)]
    assert device.scored == [1, 2, 3, 4]


# ---- whose parts they are ---------------------------------------------------------------------------------------


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
        (folder / "ifd-job.json").write_text(found, encoding="latin-1")
    Parts(tmp_path / "out.parquet", {"a": 1}, main=True).save(0, {"n": np.array([1])})
    assert json.loads((folder / "ifd-job.json").read_text()) == {"a": 1}
    Parts(tmp_path / "out.parquet", {"a": 1})


def test_only_the_main_process_takes_a_folder_over(tmp_path: Path) -> None:
    Parts(tmp_path / "out.parquet", {"a": 1}, main=True)
    with pytest.raises(ValueError, match="a: 1 there, 2 now"):
        Parts(tmp_path / "out.parquet", {"a": 2})


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ("", "ifd-job.json is damaged .*so the parts may be of another job. Delete the folder"),
        ('{"a"', "ifd-job.json is damaged"),
        ("[1]", "ifd-job.json is damaged"),
        ("\xff", "ifd-job.json is damaged"),
        ('{"a": 3}', "holds parts of another job: a: 3 there"),
        (None, "out.parquet.parts holds parts, but no ifd-job.json to say of which job. Delete the folder"),
    ],
)
@pytest.mark.parametrize("main", [True, False])
def test_parts_say_themselves_of_which_job_they_are(tmp_path: Path, found: str | None, words: str, main: bool) -> None:
    path = tmp_path / "out.parquet.parts" / "ifd-job.json"
    fill(tmp_path, {"a": 1}, 3).close()
    path.unlink() if found is None else path.write_text(found, encoding="latin-1")
    with pytest.raises(UserError, match=words):
        Parts(tmp_path / "out.parquet", {"a": 2}, main=main)
    (path.parent / "ifd-part-000000.arrow").write_bytes(b"")
    parts = Parts(tmp_path / "out.parquet", {"a": 1}, main=main)
    assert [parts.done(part, 1) for part in range(3)] == [False, True, True]
    assert json.loads(path.read_text()) == {"a": 1}
    parts.close()
    for part in range(3):
        parts.path(part).write_bytes(b"")
    path.write_text("")
    with pytest.raises(UserError, match=r"ifd-job\.json is damaged"):
        Parts(tmp_path / "out.parquet", {"a": 1}, main=main)


HOLDS = """
import sys
from ifd_trainer.scoring.job_parts import Parts
parts = Parts(sys.argv[1], {"a": 1}, main=True)
print("ready", flush=True)
sys.stdin.read()
"""


CALLS = ["open", "fsync", "replace", "rename", "unlink", "rmdir", "mkdir", "truncate", "write"]


def killed_at(step: int, folder: Path) -> None:
    """A job in this process, a copy, that ends as if it were killed after so many calls of the system."""
    left = [step]

    def counting(call):
        def counted(*arguments, **named):
            left[0] -= 1
            if left[0] < 0:
                os._exit(9)
            return call(*arguments, **named)

        return counted

    for name in CALLS:
        setattr(os, name, counting(getattr(os, name)))
    finish(folder, Device())
    os._exit(0)


def finish(folder: Path, device: Device) -> list[float]:
    """A job from its beginning, or from where it was cut off, to its end."""
    parts = Parts(folder / "out.jsonl", {"a": 1}, main=True)
    score_parts(NUMBERS, device, parts, 2, Process())
    write_rows(join_parts(NUMBERS, device, parts, 2), folder / "out.jsonl", parts.folder)
    parts.check_joined()
    parts.remove()
    return load_rows(str(folder / "out.jsonl"))["ifd"][:]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_job_that_is_killed_at_any_step_goes_on_and_leaves_nothing(tmp_path: Path) -> None:
    scored: list[int] = []  # parts that the next job has to score
    for step in itertools.count():
        code, text = forked(partial(killed_at, step, tmp_path))
        assert code in (0, 9), text
        device = Device()
        assert finish(tmp_path, device) == [n * 10 for n in range(9)]
        assert names(tmp_path) == ["out.jsonl"]
        scored.append(len(device.scored))
        (tmp_path / "out.jsonl").unlink()
        if not code:
            break
    assert scored[-1] == 5
    assert set(scored) == {0, 1, 2, 3, 4, 5}
    assert len(scored) > 40


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
    assert forked(lambda: Parts(output, {"a": 2}, True) and None) == (0, "")
    Parts(output, {"a": 2}, main=True).remove()
    Parts(output, {"a": 3}, main=True)


def test_a_system_without_locks_goes_without(tmp_path: Path, monkeypatch) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(job_parts.fcntl, "lockf", none)
    Parts(tmp_path / "a.parquet", {}, main=True).remove()
    monkeypatch.setattr(job_parts, "fcntl", None)
    Parts(tmp_path / "a.parquet", {}, main=True).remove()
    assert list(tmp_path.iterdir()) == []


def test_nothing_stays_of_an_output_whose_writing_was_killed(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"

    def job() -> None:
        parts = Parts(output, {"a": 1}, main=True)
        os.fsync = lambda _: os._exit(9)
        write_rows(Dataset.from_dict({"number": [1, 2]}), output, parts.folder)

    assert forked(job)[0] == 9
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl.parts"]
    assert len(list(Path(f"{output}.parts").glob(".out-*.jsonl"))) == 1
    parts = Parts(output, {"a": 1}, main=True)
    assert names(parts.folder) == ["ifd-job.json", "ifd-lock"]
    write_rows(NUMBERS, output, parts.folder)
    parts.remove()
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]
