"""Scoring speed on a CPU: this package against one row at a time, and against padded batches in data order.

    rows               rows of a file (the demo's by default)
    long definition    rows of one task: a definition of 300 tokens that all share, answers of 1 to 5 tokens
    152k vocabulary    a narrow model with a vocabulary of 151,936

then, with four layers of the size of SmolLM2-135M's and random weights, rows of several lengths, vocabularies, token
budgets and numbers of rows; and what scoring costs inside training: its seconds over those of one epoch of training on
10 % and on all of the same rows. Writes scoring-cpu.json and scoring-cpu.png. See `measuring.py` for what is counted.

Expected before it was written, from counting operations on the demo rows (prompts are mostly the Alpaca preamble):
about 1.4 times one row at a time, from computing the preamble once and projecting answer tokens only; more than 2
times padded batches, from not padding. With a long definition, about as many times as it is longer than the rest.
With oneDNN's products, measured first at twice the speed of the BLAS's: 2.4 times one row on rows of 100 to 400 tokens.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from measuring import (
    ONE_ROW,
    OURS,
    Case,
    Sweep,
    alpaca_like,
    long_definition,
    machine,
    matmul_peaks,
    measured,
    printed,
    sweeps,
    write,
)
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from ifd_trainer import IFDSelectionCallback
from ifd_trainer.data.files import load_rows
from ifd_trainer.data.format_choice import resolve_format
from ifd_trainer.data.formats import to_prompt_completion
from ifd_trainer.scoring.transform import IFDScorer
from ifd_trainer.training.history import History

ROOT = Path(__file__).resolve().parents[2]
KEEPS = (0.1, 1.0)


SWEEP = Sweep(
    lengths=(16, 64, 256, 1024),
    vocabularies=(16_000, 64_000),
    budgets=(512, 2048, 4096),
    counts=(4, 40),
    rows=12,
    baseline_rows=4,
    tokens=2048,
    runs=2,
)
TINY_SWEEP = Sweep((16, 40), (300, 600), (64, 256), (6, 12), rows=12, baseline_rows=4, scale=0.2, tokens=480)
_TRAINING_RUNS = 2


def random_model(vocabulary: int, hidden: int, intermediate: int, heads: int, key_heads: int) -> LlamaForCausalLM:
    """Four layers of random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=4,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def cases(scorer: IFDScorer, rows: Dataset, tiny: bool) -> Iterator[Case]:
    """The three kinds of rows, then the sweeps."""
    model: nn.Module = scorer.model.eval()
    pairs = [pair for pair in scorer.encode(rows[:]) if pair.conditioned]
    yield Case("real rows", f"{len(pairs)} rows", lambda: model, pairs)
    shared = long_definition(len(rows), model.config.vocab_size, definition=40 if tiny else 300)
    yield Case("shared task", "long definition", lambda: model, shared, 4, others=(ONE_ROW,), runs=2)
    # Most operations of this model are those of its LM head.
    vocabulary, narrow = (3000, (32, 96, 4, 4)) if tiny else (151_936, (256, 768, 4, 4))
    wide = alpaca_like(8, vocabulary, scale=0.2 if tiny else 1.0)
    label = "3k vocabulary" if tiny else "152k vocabulary"
    yield Case("large vocabulary", label, lambda: random_model(vocabulary, *narrow), wide, runs=2)
    own, sizes = (500, (32, 64, 4, 2)) if tiny else (49_152, (576, 1536, 9, 3))

    def build(size: int | None) -> Callable[[], nn.Module]:
        return lambda: random_model(size or own, *sizes)

    yield from sweeps("4 layers of 135M", build, own, TINY_SWEEP if tiny else SWEEP)


def in_loop(path: str, rows: Dataset, keep: float) -> dict[str, float]:
    """Seconds of scoring all rows, and of one epoch of training on a part of them, in one run of the callback."""
    format = resolve_format(None, rows.column_names)
    texts = Dataset.from_list([to_prompt_completion(row, format) for row in rows])
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder,
            num_train_epochs=1,
            per_device_train_batch_size=4,
            max_length=512,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_strategy="no",
        )
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(path)
        trainer = SFTTrainer(model=model, args=arguments, train_dataset=texts, processing_class=tokenizer)
        trainer.add_callback(IFDSelectionCallback(trainer, keep=keep, max_ifd=float("inf")))
        trainer.train()
        record = History.load(Path(folder)).epochs[0]
    return {part: record[f"seconds_{part}"] for part in ("scoring", "training")}


def main(arguments: list[str] | None = None) -> None:
    """Measure the cases and the cost inside training; write and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="name or path of a causal LM")
    parser.add_argument("--data", default=str(ROOT / "recipes" / "data" / "demo_train.jsonl"), help="rows to score")
    parser.add_argument("--rows", type=int, default=10, help="first N rows (default 10)")
    parser.add_argument("--runs", type=int, default=3, help="turns of all procedures (default 3)")
    parser.add_argument("--tiny", action="store_true", help="synthetic rows and models of no size: a dry run")
    parser.add_argument("--output", type=Path, default=Path("runs/bench"), help="folder (default runs/bench)")
    options = parser.parse_args(arguments)

    device = torch.device("cpu")
    scorer = IFDScorer(options.model, device="cpu", dtype="float32")
    rows = load_rows(options.data)
    rows = rows.select(range(min(options.rows, len(rows))))
    peaks = matmul_peaks(device, torch.float32, 128 if options.tiny else 2048)
    results: dict[str, Any] = {
        "machine": machine(device),
        "dtype": "float32",
        "peak_flops": max(peaks.values()),
        "matmul_flops": peaks,
        "tiny": options.tiny,
        "cases": [],
    }
    about = results["machine"]
    print(f"{about['device']}, {about['threads']} threads, load {about['load']:.1f}")
    print("sgemm:", ", ".join(f"{name} {flops / 1e9:.0f} GFLOP/s" for name, flops in peaks.items()))
    for case in cases(scorer, rows, options.tiny):
        results["cases"].append(measured(case, device, results["peak_flops"], options.runs))
        print(printed(results["cases"][-1]), flush=True)
    results["in_loop"] = {str(keep): [] for keep in KEEPS}
    for _ in range(min(options.runs, _TRAINING_RUNS)):
        for keep in KEEPS:
            results["in_loop"][str(keep)].append(in_loop(options.model, rows, keep))
    for keep, found in results["in_loop"].items():
        shares = [run["scoring"] / run["training"] for run in found]
        print(
            f"in training, keep {float(keep):.0%} of {len(rows)} rows: scoring takes {statistics.median(shares):.2f} "
            f"times as long as an epoch's training ({min(shares):.2f} to {max(shares):.2f})"
        )
    write(options.output, "scoring-cpu", results)
    ratio = statistics.median(results["cases"][0]["procedures"][OURS]["tokens_per_s"])
    print(f"{ratio:.0f} tok/s; written: {options.output}/scoring-cpu.json and .png")


if __name__ == "__main__":
    main()
