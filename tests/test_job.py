"""A scoring job: parts on disk, constant memory, several processes and one that dies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from datasets import Dataset
from test_distributed import end

from ifd_trainer import job
from ifd_trainer.files import Parts, load_rows, with_columns
from ifd_trainer.job import Process, score_parts
from ifd_trainer.provenance import scores_digest

LIMIT = 200  # seconds; a launch takes about 15 on two cores
ROWS = [{"instruction": f"Name {n} things.", "output": "The cat sat. " * (n % 5), "n": n} for n in range(40)]
# In a process with the rank $DIES, the first forward is the end of the process, as if it had been killed.
PROGRAM = """
import os, sys
from ifd_trainer.cli import main
from ifd_trainer.columns import IFDScorer
if os.environ.get("DIES") == os.environ.get("RANK", "0"):
    IFDScorer.score = lambda *_: os._exit(9)
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


def run(command: list[str], processes: int, output: Path, dies: int | None = None) -> tuple[int, str]:
    """Exit code and what was printed."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    printed = output.with_suffix(".txt")
    with printed.open("w") as sink:
        process = subprocess.Popen(
            [sys.executable, *launcher, *command, "--output", str(output)],
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


def test_two_processes_write_the_bytes_of_one_and_go_on_after_one_has_died(tmp_path: Path, command: list[str]) -> None:
    alone, shared = tmp_path / "alone.parquet", tmp_path / "shared.parquet"
    code, text = run(command, 1, alone)
    assert code == 0, text
    code, text = run(command, 2, shared, dies=1)
    assert code != 0, text
    assert not shared.exists()
    code, text = run(command, 2, shared)
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


def test_several_processes_without_an_address_are_told_what_is_missing(monkeypatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="MASTER_ADDR"):
        Process.of_launch()


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
