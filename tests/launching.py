"""Processes that are launched together, and ended together when they take too long."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from conftest import ROOT

WORLD = 2
LAUNCH_LIMIT = 240  # seconds; a launch takes about 25 on two cores


def launch(task: str, folder: Path, limit: float = LAUNCH_LIMIT, processes: int = WORLD) -> tuple[int, str]:
    """Exit code and output of the processes; a failure, with the output, when they take more than `limit` seconds."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    output = folder / f"{task}.txt"  # not a pipe, which a process that outlives its parent would keep open
    with output.open("w") as sink:
        process = subprocess.Popen(
            [*command, str(ROOT / "tests" / "distributed_run.py"), task, str(folder)],
            stdout=sink,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end(process)
    text = output.read_text(errors="replace")
    if code is None:
        pytest.fail(f"{processes} processes were not done after {limit} s:\n{text[-8000:]}")
    return code, text


def end(process: subprocess.Popen) -> None:
    """Kill a launcher with its workers, which are in process groups of their own."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    process.kill()
    process.wait()
