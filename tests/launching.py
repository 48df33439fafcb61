"""Processes that are launched together, and ended together when they take too long."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
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


def forked(run: Callable[[], object]) -> tuple[int, str]:
    """Exit code and output of a copy of this process that does something, which has all imports done.

    For what a process cannot do to itself: be killed, or have a full disk. It runs in one thread.
    """
    end, begin = os.pipe()
    if not (child := os.fork()):
        code = 1
        try:
            for stream in (1, 2):
                os.dup2(begin, stream)
            sys.stdout = sys.stderr = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
            torch.set_num_threads(1)
            code = run() or 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(begin)
    with open(end, errors="replace") as printed:
        text = printed.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text


def end(process: subprocess.Popen) -> None:
    """Kill a launcher with its workers, which are in process groups of their own."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    process.kill()
    process.wait()
