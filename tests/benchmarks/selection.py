"""Selection speed and memory: `ifd-trainer select` over a large pool in Parquet, from its start to its end.

The pool is synthetic: scores, an id in random order, and about 90 bytes of text in a row. Each command runs in a
process of its own, with data card and histogram; what is kept is compared with a sort of the pool. Writes
selection.json.

    base               the same command over 100 rows: what the interpreter and the imports take
    keep               5 % of the rows
    keep, refusals     the same without refusals: all answers are read
    all                every row with its rank and reason
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

KEEP = 0.05
ROOT = Path(__file__).resolve().parents[2]
CASES = {"keep": [], "keep, refusals": ["--drop-refusals"], "all": ["--all"]}
REFUSED = "I'm sorry, but I cannot help with that."
_CHUNK = 100_000


def write_pool(path: Path, rows: int, seed: int = 0) -> None:
    """A scored pool: IFD with mean 0.7 and deviation 0.2 (a tenth is 1 or more), one row of 25 without a score, one
    answer of 200 a refusal."""
    rng = np.random.default_rng(seed)
    ids = rng.permutation(rows)
    words = pa.array([f"word number {i} of some" for i in range(1000)])

    def texts(count: int) -> pa.Array:
        parts = (words.take(pa.array(rng.integers(0, len(words), count))) for _ in range(2))
        return pc.binary_join_element_wise(*parts, " ")

    def chunk(part: np.ndarray) -> pa.Table:
        n = len(part)
        status = rng.choice(["ok", "too_short", "truncated"], n, p=[0.96, 0.02, 0.02])
        das = rng.gamma(4, 0.5, n) + 0.05
        cas = das * rng.gamma(12.25, 0.7 / 12.25, n)
        scores = {"cas": cas, "das": das, "ifd": cas / das, "ifd_ppl": np.exp(cas - das)}
        scores = {name: pa.array(values, mask=status != "ok") for name, values in scores.items()}
        tokens = rng.integers(1, 512, n)
        output = pc.if_else(pa.array(rng.random(n) < 0.005), REFUSED, texts(n))
        columns = {"id": pc.binary_join_element_wise("row-", pc.cast(pa.array(part), pa.string()), "")}
        columns |= {"instruction": texts(n), "output": output}
        return pa.table({**columns, **scores, "answer_tokens": tokens, "ifd_status": status})

    writer = None
    for start in range(0, rows, _CHUNK):
        table = chunk(ids[start : start + _CHUNK])
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    writer.close()


def best(pool: Path, rows: int, without_refusals: bool) -> list[str]:
    """Ids to keep, best first, by a sort of the whole pool."""
    table = pq.read_table(pool, columns=["id", "output", "ifd"])
    eligible = pc.less(table["ifd"], 1.0)
    if without_refusals:
        eligible = pc.and_(eligible, pc.not_equal(table["output"], REFUSED))
    table = table.filter(eligible)
    return table.sort_by([("ifd", "descending"), ("id", "ascending")])["id"][:rows].to_pylist()


def measured(command: list[str]) -> tuple[float, int]:
    """Seconds and the peak of memory, in bytes, of a command for this interpreter.

    Pages of mapped files do not count where the system tells them apart: it takes them back when it needs them.

    Raises:
        SystemExit: when it fails.
    """
    places = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    began, peak = time.perf_counter(), 0
    with (
        tempfile.TemporaryFile() as told,  # a pipe that nobody reads is full after a while
        psutil.Popen(
            [sys.executable, *command],
            stdout=subprocess.DEVNULL,
            stderr=told,
            env=os.environ | {"PYTHONPATH": places},
        ) as process,
    ):
        while process.poll() is None:
            with suppress(psutil.Error):  # it may end in between
                memory = process.memory_info()
                peak = max(peak, memory.rss - getattr(memory, "shared", 0))
            time.sleep(0.01)
        seconds = time.perf_counter() - began
        if process.returncode:
            told.seek(0)
            raise SystemExit(f"{' '.join(command)} failed: {told.read().decode()}")
    return seconds, peak


def printed(name: str, seconds: Sequence[float], peak: int, base: int) -> str:
    """A case as a line of a table."""
    return (
        f"{name:32s} {statistics.median(seconds):6.1f} s ({min(seconds):.1f} to {max(seconds):.1f}), "
        f"{peak / 2**20:6.0f} MiB, {(peak - base) / 2**20:.0f} over base"
    )


def check(pool: Path, output: Path, rows: int, case: str) -> None:
    """Raise if a command did not keep the rows that it should."""
    found = pq.read_table(output, columns=["id", "ifd_rank"])
    assert len(found) == (rows if case == "all" else round(KEEP * rows))
    kept = found.filter(pc.is_valid(found["ifd_rank"])).sort_by("ifd_rank")["id"].to_pylist()
    assert kept == best(pool, round(KEEP * rows), "--drop-refusals" in CASES[case]), f"{case}: other rows than those"


def main(arguments: list[str] | None = None) -> None:
    """Measure all cases; write and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of the pool (default 1,000,000)")
    parser.add_argument("--runs", type=int, default=2, help="runs of each case (default 2)")
    parser.add_argument("--tiny", action="store_true", help="400 rows, one run: a dry run")
    parser.add_argument("--output", type=Path, default=Path("runs/bench"), help="folder (default runs/bench)")
    options = parser.parse_args(arguments)
    rows, runs = (400, 1) if options.tiny else (options.rows, options.runs)
    results: dict[str, Any] = {"rows": rows, "load": psutil.getloadavg()[0], "cases": {}}
    with tempfile.TemporaryDirectory() as folder:
        pool, few, output = (Path(folder) / f"{name}.parquet" for name in ("pool", "few", "out"))
        write_pool(few, 100)
        write_pool(pool, rows)
        results["pool_bytes"] = pool.stat().st_size
        for case, extra in {"base": [], **CASES}.items():
            command = ["-m", "ifd_trainer", "select", str(few if case == "base" else pool), "--keep", str(KEEP)]
            found = [measured([*command, "--output", str(output), *extra]) for _ in range(runs)]
            if case != "base":
                check(pool, output, rows, case)
            seconds, peaks = zip(*found, strict=True)
            results["cases"][case] = {"seconds": seconds, "peak_bytes": max(peaks)}
            name = case if case == "base" else f"{rows:,} rows, {case}"
            print(printed(name, seconds, max(peaks), results["cases"]["base"]["peak_bytes"]), flush=True)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "selection.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
