"""Two processes: the same order and the same steps on both, rows dealt out as documented, and exact resuming.

One launch of `distributed_run.py` does all runs; the tests read what each process wrote. A launch that takes too long
is ended with all its processes, and its output shown.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import distributed_run
import numpy as np
import pytest
from conftest import ROOT
from distributed_run import CASES, RESUME_FROM, ROWS
from training import raw_rows, select, sft_trainer

BATCH, WORLD = 2, 2
ALL = pytest.mark.parametrize("case", CASES)


def launch(task: str, folder: Path, limit: float) -> tuple[int, str]:
    """The exit code and the output of two processes; fails the test when they take longer than `limit` seconds."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
        "OMP_NUM_THREADS": "1",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={WORLD}"]
    script = ROOT / "tests" / "distributed_run.py"
    output = folder / f"{task}.txt"  # not a pipe, which a process that outlives its parent would hold open
    with output.open("w") as sink:
        process = subprocess.Popen(
            [*command, str(script), task, str(folder)],
            stdout=sink,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end(process)
    text = output.read_text(errors="replace")
    if code is None:
        pytest.fail(f"Not done after {limit} s:\n{text[-6000:]}")
    return code, text


def end(process: subprocess.Popen) -> None:
    """Kill a launcher and its workers, which it puts into sessions of their own."""
    workers = descendants(process.pid)
    for pid in (process.pid, *workers):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()


def descendants(pid: int) -> list[int]:
    """Processes that `pid` started, and those that they started."""
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    pairs = [tuple(map(int, line.split())) for line in listed.splitlines()]
    found = [pid]
    for parent in found:
        found += [child for child, its_parent in pairs if its_parent == parent]
    return found[1:]
