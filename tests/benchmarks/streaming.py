"""Memory and time of `ifd-trainer score` over a large file, from its start to its end, without a model.

The rows are read, cut into parts, saved, joined and written as ever. In the place of the tokens and of a model's losses
stand numbers made of the row's id, since what is measured is everything else. Each command runs in a process of its
own; the order of the rows and all scores that it writes are checked. Writes streaming.json.

    base               the same command over 100 rows: what the interpreter and the imports take
    from the start     all rows, which a Parquet file holds in one row group
    from the last part all rows but those of the last part are there already
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from selection import measured, printed, write_pool

WORKER, PART_ROWS = "--worker", 10_000


def losses_of(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Conditioned and direct losses of rows, from the numbers in their ids."""
    return numbers * 0.618 % 1 + 0.1, numbers * 0.414 % 1 + 0.1


def worker(stop_before: int, arguments: list[str]) -> int:
    """`ifd-trainer` without a model; it stops before it saves a part (-1: it goes on to its end)."""
    from ifd_trainer import cli
    from ifd_trainer.data.encoding import EncodedPair, Segment
    from ifd_trainer.scoring.job_parts import Parts
    from ifd_trainer.scoring.losses import Scores
    from ifd_trainer.scoring.transform import IFDScorer
    from ifd_trainer.scoring.turns import EncodedTurns

    def encode(self: IFDScorer, batch: dict[str, list], rank: int | None = None) -> EncodedTurns:
        segments = [Segment([0, int(name.removeprefix("row-"))], 1) for name in batch["id"]]
        return EncodedTurns.single([EncodedPair(segment, segment) for segment in segments])

    def score(self: IFDScorer, pairs: list[EncodedPair], progress: Any = None) -> Scores:
        cas, das = losses_of(np.array([pair.conditioned.ids[1] for pair in pairs]))
        return Scores.from_nll(cas, das, np.ones(len(pairs), dtype=np.int64), np.full(len(pairs), "ok", dtype=object))

    save = Parts.save

    def saved(self: Parts, part: int, *columns: Any) -> None:
        if part == stop_before:
            raise SystemExit("stopped on purpose")
        save(self, part, *columns)

    IFDScorer.encode_rows, IFDScorer.score, Parts.save = encode, score, saved
    return cli.main(arguments)


def check(pool: Path, output: Path) -> None:
    """Raise if the output has not all rows in their order, each with its own scores."""
    names = ["id", "instruction", "output"]
    found = pq.read_table(output)
    assert found.select(names).equals(pq.read_table(pool, columns=names))
    numbers = pc.cast(pc.utf8_slice_codeunits(found["id"], 4), "int64").to_numpy()
    for name, wanted in zip(("cas", "das"), losses_of(numbers), strict=True):
        np.testing.assert_array_equal(found[name].to_numpy(), wanted)


def main(arguments: list[str] | None = None) -> None:
    """Measure all cases; write and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="name or path of a causal LM, of which only the digest is read")
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of the pool (default 1,000,000)")
    parser.add_argument("--tiny", action="store_true", help="400 rows in parts of 50: a dry run")
    parser.add_argument("--output", type=Path, default=Path("runs/bench"), help="folder (default runs/bench)")
    options = parser.parse_args(arguments)
    rows, size = (400, 50) if options.tiny else (options.rows, PART_ROWS)
    results: dict[str, Any] = {"rows": rows, "part_rows": size, "cases": {}}
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, HF_DATASETS_CACHE=folder):
        pool, few, output = (Path(folder) / f"{name}.parquet" for name in ("pool", "few", "out"))
        for path, count in ((few, 100), (pool, rows)):
            write_pool(path, count)
            pq.write_table(pq.read_table(path).drop_columns(["cas", "das"]), path, row_group_size=count)
        results["pool_bytes"] = pool.stat().st_size

        def run(source: Path, stop_before: int = -1) -> tuple[float, int]:
            command = [__file__, WORKER, str(stop_before), "score", str(source), "--model", options.model]
            return measured([*command, "--device", "cpu", "--part-rows", str(size), "--output", str(output)])

        for case in ("base", "from the start", "from the last part"):
            if case == "from the last part":
                last = (rows - 1) // size
                with suppress(SystemExit):
                    run(pool, stop_before=last)
                saved = list(Path(f"{output}.parts").glob("ifd-part-*.arrow"))
                assert len(saved) == last, f"{len(saved)} parts are saved, wanted {last}"
            seconds, peak = run(few if case == "base" else pool)
            if case != "base":
                check(pool, output)
            output.unlink()
            results["cases"][case] = {"seconds": seconds, "peak_bytes": peak}
            name = case if case == "base" else f"{rows:,} rows, {case}"
            print(printed(name, [seconds], peak, results["cases"]["base"]["peak_bytes"]), flush=True)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "streaming.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == [WORKER]:
        sys.exit(worker(int(sys.argv[2]), sys.argv[3:]))
    main()
