"""What a run with the callback costs before its first step and in each checkpoint, as its pool grows.

The pool is synthetic: ids of tokens that read as words, with lengths like those of Alpaca's rows, and scores as columns
(`scorer="columns"`), so that no model scores anything. A plain `Trainer` makes two steps on a tiny model, writes a
checkpoint after the first one, and a second process resumes from it. Each size runs in two processes of its own, one
after the other. Seconds are those of the clock and those of all threads on the processor. Writes growth.json.

    start            the pool is read, its ids are checked, the response header is found
    texts            `pool.parquet`, when training begins
    epoch            the rows of an epoch are chosen and its record is written
    checkpoint       what one checkpoint takes, without the model's weights or with those of a tiny one
    resume: ...      the same in the process that resumes; its epoch is read, not chosen
    resume: read     the checkpoint's selection and scores are read and checked (a part of "resume: start")
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
from selection import measured

WORKER, BASE_ROWS = "--worker", 100
_CHUNK = 100_000
STEPS = 2


# ---- the pool ---------------------------------------------------------------------------------------------------


def write_pool(folder: Path, rows: int, tokens: np.ndarray, header: list[int], seed: int = 0) -> None:
    """A tokenised and scored pool as a folder of `datasets`: a preamble of 30 tokens that all rows share, an
    instruction (log-normal, median 15), for two of five rows an input (median 12), the header, and an answer (median
    45, sigma 1.0, at most 512 tokens)."""
    from datasets import Dataset
    from datasets.arrow_writer import ArrowWriter

    rng = np.random.default_rng(seed)
    preamble = rng.choice(tokens, 30)
    folder.mkdir()
    writer = None
    for start in range(0, rows, _CHUNK):
        table = _chunk(np.arange(start, min(start + _CHUNK, rows)), tokens, preamble, np.asarray(header), rng)
        writer = writer or ArrowWriter(path=str(folder / "rows.arrow"), schema=table.schema)
        writer.write_table(table)
    writer.finalize()
    Dataset.from_file(str(folder / "rows.arrow"))  # it can be read


def _chunk(
    rows: np.ndarray, tokens: np.ndarray, preamble: np.ndarray, header: np.ndarray, rng: np.random.Generator
) -> pa.Table:
    n = len(rows)

    def sizes(median: float, sigma: float, most: int) -> np.ndarray:
        return np.clip(median * np.exp(sigma * rng.normal(size=n)), 2, most).astype(np.int64)

    asked = sizes(15, 0.5, 200) + np.where(rng.random(n) < 0.4, sizes(12, 0.9, 300), 0)
    answers = sizes(45, 1.0, 512)
    prompts = len(preamble) + asked + len(header)
    total = prompts + answers
    offsets = np.concatenate([[0], np.cumsum(total)])
    ids = rng.choice(tokens, offsets[-1]).astype(np.int32)
    for place, part in ((offsets[:-1], preamble), (offsets[:-1] + prompts - len(header), header)):
        ids[(place[:, None] + np.arange(len(part))).ravel()] = np.tile(part, n)
    within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], total)
    labels = np.where(within < np.repeat(prompts, total), -100, ids).astype(np.int64)
    status = rng.choice(["ok", "too_short", "truncated"], n, p=[0.96, 0.02, 0.02])
    das = rng.gamma(4, 0.5, n) + 0.05
    cas = das * rng.gamma(12.25, 0.7 / 12.25, n)
    scores = {"cas": cas, "das": das, "ifd": cas / das, "ifd_ppl": np.exp(cas - das)}
    return pa.table(
        {
            "id": pa.array([f"row-{row}" for row in rows.tolist()]),
            "quality": pa.array(rng.choice(["clean", "shuffled", "truncated"], n)),
            "input_ids": pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(ids)),
            "labels": pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(labels)),
            **{name: pa.array(values, mask=status != "ok") for name, values in scores.items()},
            "answer_tokens": pa.array(answers),
            "ifd_status": pa.array(status),
        }
    )


# ---- a run ------------------------------------------------------------------------------------------------------


def worker(pool: Path, model: str, folder: Path, resume: bool) -> None:
    """Train two steps, or resume after the first of them; what each part took, as JSON in `folder`."""
    from datasets import Dataset
    from transformers import (
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        LlamaConfig,
        LlamaForCausalLM,
        Trainer,
        TrainingArguments,
        set_seed,
    )

    import ifd_trainer.training.callback as callback_module
    from ifd_trainer import IFDSelectionCallback

    tokenizer = AutoTokenizer.from_pretrained(model)
    set_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    arguments = TrainingArguments(
        output_dir=str(folder / "run"),
        per_device_train_batch_size=1,
        max_steps=STEPS,
        save_strategy="steps",
        save_steps=1,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(
        model=LlamaForCausalLM(LlamaConfig(vocab_size=max(header_of(tokenizer)) + 1, **sizes)),
        args=arguments,
        train_dataset=Dataset.from_file(str(pool / "rows.arrow")),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
    )
    callback = IFDSelectionCallback.cherry(trainer, keep=0.1, scorer="columns")
    trainer.add_callback(callback)
    seconds: dict[str, list[tuple[float, float]]] = {}
    for owner, name, part in (
        (callback, "start", "start"),
        (callback_module, "load_selection", "read"),
        (callback, "on_train_begin", "texts"),
        (callback, "on_epoch_begin", "epoch"),
        (trainer, "_save_checkpoint", "checkpoint"),
    ):
        _timed(owner, name, seconds.setdefault(part, []))
    trainer.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-1") if resume else None)
    assert trainer.state.global_step == STEPS
    found = {
        "seconds": {part: min(values) for part, values in seconds.items() if values},
        "order": [int(row) for row in callback.sampler.order[:STEPS]],
        "bytes": {
            path.name: path.stat().st_size
            for place in (folder / "run" / "ifd_history", folder / "run" / "checkpoint-1")
            for path in sorted(place.iterdir())
            if path.name.startswith(("ifd_", "pool", "epoch", "trainer_state"))
        },
    }
    (folder / "found.json").write_text(json.dumps(found))


def header_of(tokenizer: Any) -> list[int]:
    """Token ids of the header that all prompts end with."""
    return tokenizer("### Response:", add_special_tokens=False)["input_ids"]


def _timed(owner: Any, name: str, seconds: list[tuple[float, float]]) -> None:
    method = getattr(owner, name)

    def timed(*arguments: Any, **options: Any) -> Any:
        began, busy = time.perf_counter(), time.process_time()
        try:
            return method(*arguments, **options)
        finally:
            seconds.append((time.perf_counter() - began, time.process_time() - busy))

    setattr(owner, name, timed)


def cases(sizes: list[int], model: str, folder: Path) -> Iterator[dict[str, Any]]:
    """A run and its resume for each size of the pool."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    header = header_of(tokenizer)
    words = [i for i in range(max(header)) if tokenizer.decode([i]).isalpha()]  # few, so that logits take no memory
    for rows in sizes:
        pool, output = folder / f"pool-{rows}", folder / f"out-{rows}"
        write_pool(pool, rows, np.array(words), header)
        output.mkdir()
        case: dict[str, Any] = {"rows": rows, "seconds": {}, "peak_bytes": {}, "load": psutil.getloadavg()[0]}
        orders = []
        for resume in (False, True):
            command = [__file__, WORKER, str(pool), model, str(output), str(int(resume))]
            whole, peak = measured(command)
            found = json.loads((output / "found.json").read_text())
            orders.append(found["order"])
            name = "resume" if resume else "run"
            parts = {f"resume: {part}" if resume else part: spent for part, spent in found["seconds"].items()}
            case["seconds"] |= parts
            case["whole_seconds"] = {**case.get("whole_seconds", {}), name: whole}
            case["peak_bytes"][name] = peak
            if not resume:
                case["bytes"] = found["bytes"]
        assert orders[0] == orders[1], "the resumed run trains in another order"
        yield case


def printed(case: dict[str, Any], base: dict[str, Any]) -> str:
    """A size as lines of a table."""
    lines = [f"{case['rows']:,} rows"]
    lines += [f"  {part:24s} {wall:8.2f} s, {busy:7.2f} s of CPU" for part, (wall, busy) in case["seconds"].items()]
    lines += [f"  {name + ', whole process':24s} {seconds:8.2f} s" for name, seconds in case["whole_seconds"].items()]
    lines += [f"  {name:24s} {size / 2**20:8.2f} MiB" for name, size in case["bytes"].items()]
    over = {name: peak - base["peak_bytes"][name] for name, peak in case["peak_bytes"].items()}
    lines += [f"  {name + ', over base':24s} {size / 2**20:8.0f} MiB" for name, size in over.items()]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Measure all sizes; write and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="name or path; only its tokenizer is read")
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000], help="sizes of the pool")
    parser.add_argument("--tiny", action="store_true", help="400 rows: a dry run")
    parser.add_argument("--output", type=Path, default=Path("runs/bench"), help="folder (default runs/bench)")
    options = parser.parse_args(arguments)
    sizes = [400] if options.tiny else options.rows
    results: dict[str, Any] = {"cases": []}
    with tempfile.TemporaryDirectory() as folder:
        for case in cases([BASE_ROWS, *sizes], options.model, Path(folder)):
            results["cases"].append(case)
            print(printed(case, results["cases"][0]), flush=True)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "growth.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == [WORKER]:
        worker(*map(Path, sys.argv[2:3]), sys.argv[3], Path(sys.argv[4]), sys.argv[5] == "1")
    else:
        main()
