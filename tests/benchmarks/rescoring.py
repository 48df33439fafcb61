"""How well each way to score rows anew recovers the rows that are exactly the best, against what it costs.

A model is trained on real rows, as the callback does: before each epoch all rows are scored, and the epoch trains on
the 10 % with the highest IFD below 1. The losses of all tokens are kept, so that one run serves all ways: each is
played through afterwards, with no more of the fresh losses than it would have measured.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from ifd_trainer import Cherry
from ifd_trainer.data.encoding import EncodedPair, Segment, with_ending
from ifd_trainer.data.files import load_rows
from ifd_trainer.scoring.losses import nll_with_tails
from ifd_trainer.scoring.token_losses import score_with_tokens
from ifd_trainer.scoring.transform import IFDScorer

BACKWARD = 2  # forwards that a backward takes as long as


@dataclass(frozen=True)
class Recorded:
    """A run: n rows, and E + 1 scorings of all of them, one before each of E epochs and one after the last.

    Attributes:
        lengths: (n, 3) tokens of prompt, answer with what ends its turn, and what precedes a direct answer.
        tokens: (n,) scored tokens of the answers.
        cas, das: (E + 1, sum of tokens) losses of all answers' tokens, one row's behind another's.
        kept: (E, k) rows of each epoch, by exact scores.
        steps: (E + 1,) updates before each scoring.
        seconds: of all scorings, of conditioned passes alone over the same rows, and of all epochs' training.
    """

    lengths: np.ndarray
    tokens: np.ndarray
    cas: np.ndarray
    das: np.ndarray
    kept: np.ndarray
    steps: np.ndarray
    seconds: np.ndarray


def pairs_of(options: argparse.Namespace, scorer: IFDScorer) -> list[EncodedPair]:
    """Encoded rows whose answers are not too long, by a seed."""
    pairs = [pair for pair in scorer.encode(load_rows(options.data)[:]) if pair.conditioned]
    able = [pair for pair in pairs if 2 <= pair.conditioned.scored <= options.answer_tokens]
    return [able[i] for i in np.random.default_rng(0).permutation(len(able))[: options.rows]]


def train(model: nn.Module, segments: Sequence[Segment], optimizer: torch.optim.Optimizer, batch: int) -> int:
    """One epoch over the answers of rows, in their order; the number of updates."""
    model.train()
    for first in range(0, len(segments), batch):
        part = segments[first : first + batch]
        longest = max(len(segment.ids) for segment in part)
        ids = torch.tensor([segment.ids + [0] * (longest - len(segment.ids)) for segment in part])
        labels = torch.full_like(ids, -100)
        for row, segment in enumerate(part):
            labels[row, segment.start : len(segment.ids)] = torch.tensor(segment.ids[segment.start :])
        mask = torch.arange(longest)[None] < torch.tensor([len(segment.ids) for segment in part])[:, None]
        model(input_ids=ids, attention_mask=mask.long(), labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return -(-len(segments) // batch)


def recorded(options: argparse.Namespace) -> Recorded:
    """Train, and score all rows before each epoch and after the last."""
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    scorer = IFDScorer(model, AutoTokenizer.from_pretrained(options.model))
    pairs = pairs_of(options, scorer)
    segments = [with_ending(pair) for pair in pairs]
    tokens = np.array([pair.conditioned.scored for pair in pairs])
    prompts, headers = (np.array([getattr(p, name).start for p in pairs]) for name in ("conditioned", "direct"))
    lengths = np.stack([prompts, [len(s.ids) - s.start for s in segments], headers], axis=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.0)
    budget, rng = round(options.keep * len(pairs)), np.random.default_rng(1)
    cas, das, kept, steps, seconds = [], [], [], [0], np.zeros(3)
    for epoch in range(options.epochs + 1):
        began = time.perf_counter()
        scores, losses = score_with_tokens(model, pairs)
        seconds[0] += time.perf_counter() - began
        cas.append(np.concatenate(losses.cas_tokens))
        das.append(np.concatenate(losses.das_tokens))
        print(f"scored after {steps[-1]} updates, {time.perf_counter() - began:.0f} s", flush=True)
        if epoch == 0:
            began = time.perf_counter()
            nll_with_tails(model, segments)
            seconds[1] = (time.perf_counter() - began) * (options.epochs + 1)
        if epoch < options.epochs:
            kept.append(Cherry()(scores.columns(), budget).kept)
            began, order = time.perf_counter(), rng.permutation(kept[-1])
            steps.append(steps[-1] + train(model, [segments[i] for i in order], optimizer, options.batch))
            seconds[2] += time.perf_counter() - began
            print(f"trained to {steps[-1]} updates, {time.perf_counter() - began:.0f} s", flush=True)
        run = Recorded(lengths, tokens, np.stack(cas), np.stack(das), np.array(kept), np.array(steps), seconds)
        np.savez(options.output / "rescoring.npz", **vars(run))  # a run that is cut short has its first epochs
    return run


def main(arguments: list[str] | None = None) -> None:
    """Record a run, play all ways through it; write and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="name or path of a causal LM")
    parser.add_argument("--data", required=True, help="file of prompts and answers")
    parser.add_argument("--rows", type=int, default=600, help="rows of the pool (default 600)")
    parser.add_argument("--epochs", type=int, default=4, help="(default 4)")
    parser.add_argument("--keep", type=float, default=0.1, help="share of the rows that an epoch trains on (0.1)")
    parser.add_argument("--batch", type=int, default=2, help="rows of an update (default 2)")
    parser.add_argument("--lr", type=float, default=1e-4, help="learning rate, constant (default 1e-4)")
    parser.add_argument("--answer-tokens", type=int, default=120, help="most tokens of an answer (default 120)")
    parser.add_argument("--output", type=Path, default=Path("runs/bench"), help="folder (default runs/bench)")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    recorded(options)


if __name__ == "__main__":
    main()
