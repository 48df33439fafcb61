"""Scoring speed: ours against one row at a time, and against padded batches in data order.

The two baselines are written from the published descriptions. All score the same rows with the same model, in turn,
several times; what is reported are ratios of one run, their median and their range. Scores are compared too: a fast
wrong number is no result.

Expected before it was written, from counting operations on the demo rows (prompts are mostly the Alpaca preamble):
about 1.4 times one row at a time, from computing the preamble once and projecting answer tokens only; more than 2
times padded batches, from not padding.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from ifd_trainer.columns import IFDScorer
from ifd_trainer.encoding import Segment, token_count
from ifd_trainer.files import load_rows
from ifd_trainer.scorer import score_pairs

ROOT = Path(__file__).resolve().parents[2]


def one_row_at_a_time(model: torch.nn.Module, segments: list[Segment]) -> np.ndarray:
    """Full-vocabulary logits of one row, then a loop over its tokens: what the published programs do."""
    out = []
    for segment in segments:
        logits = model(torch.tensor([segment.ids])).logits[0]
        losses = []
        for i in range(segment.start, len(segment.ids)):
            losses.append(-torch.log_softmax(logits[i - 1].float(), dim=-1)[segment.ids[i]].item())
        out.append(sum(losses) / len(losses))
    return np.array(out)


def padded_batches(model: torch.nn.Module, segments: list[Segment], size: int = 8) -> np.ndarray:
    """Batches of 8 in data order, padded to their longest, with full-vocabulary logits."""
    out = []
    for first in range(0, len(segments), size):
        batch = segments[first : first + size]
        longest = max(len(segment.ids) for segment in batch)
        ids = torch.tensor([segment.ids + [0] * (longest - len(segment.ids)) for segment in batch])
        mask = torch.tensor([[1] * len(segment.ids) + [0] * (longest - len(segment.ids)) for segment in batch])
        logits = model(ids, attention_mask=mask).logits
        for row, segment in enumerate(batch):
            target = torch.tensor(segment.ids[segment.start :])
            part = logits[row, segment.start - 1 : len(segment.ids) - 1].float()
            out.append(torch.nn.functional.cross_entropy(part, target).item())
    return np.array(out)


def main() -> None:
    """Time the three procedures in turn and print their ratios."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="name or path of a causal LM")
    parser.add_argument("--data", default=str(ROOT / "recipes" / "data" / "demo_train.jsonl"), help="rows to score")
    parser.add_argument("--rows", type=int, default=64, help="first N rows (default 64)")
    parser.add_argument("--runs", type=int, default=3, help="runs of each procedure (default 3)")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    options = parser.parse_args()

    scorer = IFDScorer(options.model, device="cpu")
    rows = load_rows(options.data).select(range(options.rows))
    pairs = [pair for pair in scorer.encode(rows[:]) if pair.conditioned]
    segments = [segment for pair in pairs for segment in (pair.conditioned, pair.direct)]
    model = scorer.model.eval()
    procedures = {
        "ours": lambda: (lambda s: np.stack([s.cas, s.das], axis=1).ravel())(score_pairs(model, pairs)),
        "one row at a time": lambda: one_row_at_a_time(model, segments),
        "padded batches of 8": lambda: padded_batches(model, segments),
    }
    seconds: dict[str, list[float]] = {name: [] for name in procedures}
    with torch.no_grad():
        procedures["ours"]()  # warm up
        for _ in range(options.runs):
            values = {}
            for name, procedure in procedures.items():
                began = time.perf_counter()
                values[name] = procedure()
                seconds[name].append(time.perf_counter() - began)
    tokens = token_count(pairs)
    result = {"rows": len(pairs), "tokens": tokens, "threads": torch.get_num_threads(), "seconds": seconds}
    print(f"{len(pairs)} rows, {tokens} tokens, {torch.get_num_threads()} threads, {options.runs} runs in turn")
    for name in procedures:
        ratios = [other / own for other, own in zip(seconds[name], seconds["ours"], strict=True)]
        difference = float(np.abs(values[name] / values["ours"] - 1).max())
        result[name] = {"ratio": ratios, "largest_relative_difference": difference}
        print(
            f"{name:22s} {statistics.median(seconds[name]):7.2f} s   time over ours: median "
            f"{statistics.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}   largest difference "
            f"{difference:.1e}"
        )
    if options.json:
        options.json.write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
