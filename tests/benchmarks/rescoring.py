"""How well each way to score rows anew recovers the rows that are exactly the best, against what it costs.

A model is trained on real rows, as the callback does: before each epoch all rows are scored, and the epoch trains on
the tenth with the highest IFD below 1. The losses of all answers' tokens are kept, so that one run serves all ways:
each is played through afterwards, from epoch to epoch, with no more of the fresh losses than it would have measured.

    all             every row anew, both passes
    nothing         the scores of epoch 0 stand
    top 30 %        the 30 % with the highest known scores anew; the best of them
    candidates      what `Timing(rescore="candidates")` does, with a budget; and that without one of its parts

Overlap is the share of the exactly best rows that a way keeps too. Cost is in tokens of forwards, over three times the
tokens that an epoch trains on (a backward is as dear as two forwards); what a token of each kind took in seconds of the
processor is measured beside it. Writes rescoring.json, and the losses as rescoring.npz, which `--losses` reads again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from ifd_trainer import Cherry
from ifd_trainer.data.encoding import EncodedPair, Segment, with_ending
from ifd_trainer.data.files import load_rows
from ifd_trainer.method.equations import ifd
from ifd_trainer.method.rescoring import Rescoring, moves, nearest
from ifd_trainer.method.scoring_health import rank_correlation
from ifd_trainer.scoring.losses import nll_with_tails
from ifd_trainer.scoring.token_losses import score_with_tokens
from ifd_trainer.scoring.transform import IFDScorer

TIMED = 60  # rows of which the pass with the prompt alone is timed


@dataclass(frozen=True)
class Recorded:
    """A run: n rows, and E + 1 scorings of all of them, one before each of E epochs and one after the last.

    Attributes:
        lengths: (n, 3) tokens of prompt, answer with what ends its turn, and what precedes a direct answer.
        tokens: (n,) scored tokens of the answers.
        cas, das: (E + 1, sum of tokens) losses of all answers' tokens, one row's behind another's.
        kept: (E, k) rows of each epoch, by exact scores.
        steps: (E + 1,) updates before each scoring.
        seconds: of the processor, for a token of both passes, of the pass with the prompt alone, and of training.
    """

    lengths: np.ndarray
    tokens: np.ndarray
    cas: np.ndarray
    das: np.ndarray
    kept: np.ndarray
    steps: np.ndarray
    seconds: np.ndarray

    @property
    def given(self) -> np.ndarray:
        """(n,) tokens of the pass with the prompt."""
        return self.lengths[:, 0] + self.lengths[:, 1]

    @property
    def alone(self) -> np.ndarray:
        """(n,) tokens of the direct pass."""
        return self.lengths[:, 2] + self.tokens

    def means(self, losses: np.ndarray) -> np.ndarray:
        """(E + 1, n) mean losses of answers."""
        starts = np.cumsum(self.tokens) - self.tokens
        return np.add.reduceat(losses.astype(np.float64), starts, axis=1) / self.tokens


@dataclass(frozen=True)
class Way:
    """A way to score rows anew.

    Args:
        budget: share of the cost of training; None for a way without one.
        drawn, stale: shares of the budget for rows drawn at random, and for those whose scores are the oldest.
        moved: how the losses of the other rows are moved: by what they were, and how long answers are ("by features"),
            by a factor of rows trained on and one of the others ("by kind"), by one for all ("as one"), or not ("not").
        direct: whether direct losses are measured and moved too.
        top: without a budget, the share of the rows, by known scores, that are scored anew.
    """

    budget: float | None = 0.1
    drawn: float = Rescoring.explored
    stale: float = Rescoring.stale
    moved: str = "by features"
    direct: bool = True
    top: float | None = None


BUDGETS = (0.1, 0.2, 0.3, 0.5, 1.0)


def ways() -> dict[str, Way]:
    """All that are compared, by name."""
    found = {"all": Way(None, top=1.0), "all, with the prompt alone": Way(None, direct=False, top=1.0)}
    found |= {"nothing": Way(None, top=0.0), "top 30 %": Way(None, top=0.3)}
    found["top 30 %, with the prompt alone"] = Way(None, direct=False, top=0.3)
    for budget in BUDGETS:
        whole, name = Way(budget), f"candidates, {100 * budget:.0f} %"
        found[name] = whole
        if budget in (0.1, 0.3, 1.0):
            found[f"{name}, not moved"] = replace(whole, moved="not")
            found[f"{name}, moved as one"] = replace(whole, moved="as one")
            found[f"{name}, moved by kind"] = replace(whole, moved="by kind")
            found[f"{name}, near the cut alone"] = replace(whole, drawn=0.0, stale=0.0)
            found[f"{name}, all drawn"] = replace(whole, drawn=1.0, stale=0.0)
            found[f"{name}, with the prompt alone"] = replace(whole, direct=False)
            found[f"{name}, the prompt alone, by kind"] = replace(whole, direct=False, moved="by kind")
    return found


# ---- a run ------------------------------------------------------------------------------------------------------


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
    given = lengths[:, 0] + lengths[:, 1]
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.0)
    budget, rng = max(round(options.keep * len(pairs)), 1), np.random.default_rng(1)
    cas, das, kept, steps, seconds, trained = [], [], [], [0], np.zeros(3), 0
    for epoch in range(options.epochs + 1):
        began = time.process_time()
        scores, losses = score_with_tokens(model, pairs)
        seconds[0] += time.process_time() - began
        cas.append(np.concatenate(losses.cas_tokens))
        das.append(np.concatenate(losses.das_tokens))
        if epoch == 0:
            began = time.process_time()
            nll_with_tails(model, segments[:TIMED])
            seconds[1] = (time.process_time() - began) / given[:TIMED].sum()
        if epoch < options.epochs:
            kept.append(Cherry()(scores.columns(), budget).kept)
            began, order = time.process_time(), rng.permutation(kept[-1])
            steps.append(steps[-1] + train(model, [segments[i] for i in order], optimizer, options.batch))
            seconds[2] += time.process_time() - began
            trained += int(given[kept[-1]].sum())
    seconds[0] /= (options.epochs + 1) * (given + lengths[:, 2] + tokens).sum()
    seconds[2] /= max(trained, 1)
    return Recorded(lengths, tokens, np.stack(cas), np.stack(das), np.array(kept), np.array(steps), seconds)


# ---- ways -------------------------------------------------------------------------------------------------------


def best(cas: np.ndarray, das: np.ndarray, among: np.ndarray, kept: int) -> set[int]:
    """The rows (n,) bool `among` which has the highest IFD below 1, so many of them."""
    scores = np.where(among, ifd(cas, das), np.nan)
    return set(Cherry()({"ifd": scores, "ifd_status": np.full(len(cas), "ok")}, kept).rows.tolist())


def played(run: Recorded, way: Way, seed: int) -> list[tuple[float, float]]:
    """Overlap and cost of a way before each epoch after the first, with no more than it has measured by then."""
    exact, kept = np.stack([run.means(run.cas), run.means(run.das)], axis=1), run.kept.shape[1]  # (E + 1, 2, n)
    rows, everything = np.arange(len(run.tokens)), np.full(len(run.tokens), True)
    training = Rescoring.of_training(kept * run.given.mean())
    cost = run.given + (run.alone if way.direct else 0)
    known, scored_at, found = exact[0], np.zeros(len(rows), dtype=int), []
    for epoch in range(1, len(exact)):
        new, trained = exact[epoch], np.isin(rows, run.kept[epoch - 1])
        if way.budget is None:
            fresh = np.isin(rows, np.argsort(-ifd(*known), kind="stable")[: round(way.top * len(rows))])
            among = fresh if fresh.any() else everything
            known = np.where(fresh & np.array([[True], [way.direct]]), new, known)
        else:
            rule, allowance, among = Rescoring(way.budget, way.drawn, way.stale), way.budget * training, everything
            parts = rule.drawn(everything, trained, scored_at, cost, allowance, rows, [seed, epoch])
            fresh = np.isin(rows, np.concatenate(parts))
            scores = ifd(*_told(way, run, known, new, fresh, trained))
            order = nearest(scores, scores < 1, kept, fresh, rows)
            fresh |= np.isin(rows, rule.near(order, cost, allowance - cost[fresh].sum()))
            known = _told(way, run, known, new, fresh, trained)
        scored_at = np.where(fresh, epoch, scored_at)
        overlap = len(best(*known, among, kept) & best(*new, everything, kept)) / kept
        found.append((overlap, float(cost[fresh].sum() / training)))
    return found


def _told(
    way: Way, run: Recorded, known: np.ndarray, new: np.ndarray, fresh: np.ndarray, trained: np.ndarray
) -> np.ndarray:
    """Both losses of all rows, (2, n): the new ones of the fresh rows, the others as far as they have moved."""
    features = np.log(np.column_stack([*known, run.tokens]))
    features = features if way.moved == "by features" else features[:, :0]
    told = known.copy()
    for which in range(1 + way.direct):
        last = known[which]
        moved = moves(last, np.where(fresh, new[which], np.nan), trained & (way.moved != "as one"), features)
        told[which] = np.where(fresh, new[which], last * (1.0 if way.moved == "not" else np.exp(moved)))
    return told


def compared(run: Recorded, seeds: int) -> dict[str, Any]:
    """What each way recovers, and what it costs; means over seeds where it draws rows."""
    results: dict[str, Any] = {}
    for name, way in ways().items():
        draws = seeds if way.budget is not None else 1
        found = np.array([played(run, way, seed) for seed in range(draws)])  # (seeds, epochs, 2)
        results[name] = {
            "overlap": found[..., 0].mean(axis=0).tolist(),
            "range": [found[..., 0].mean(axis=1).min(), found[..., 0].mean(axis=1).max()],
            "cost": found[..., 1].mean(),
        }
    return results


def how_far(run: Recorded) -> list[dict[str, float]]:
    """How the losses have moved since epoch 0, before each epoch after it: rank correlations, and means of logs."""
    cas, das = run.means(run.cas), run.means(run.das)
    found = []
    for epoch in range(1, len(cas)):
        pairs = {"cas": cas[[0, epoch]], "das": das[[0, epoch]]}
        pairs["ifd"] = pairs["cas"] / pairs["das"]
        one = {f"{name} ranks": rank_correlation(*pair) for name, pair in pairs.items()}
        last, trained = np.log(cas[epoch] / cas[epoch - 1]), np.isin(np.arange(len(run.tokens)), run.kept[epoch - 1])
        one |= {"moved": last[~trained].mean(), "spread": last[~trained].std(), "moved, trained": last[trained].mean()}
        found.append({"updates": int(run.steps[epoch]), **{name: float(value) for name, value in one.items()}})
    return found


def table(results: dict[str, Any], steps: Sequence[int]) -> Table:
    """A line for each way."""
    out = Table("way", *(f"after {step} updates" for step in steps[1:]), "mean", "seeds", "cost")
    for name, found in results.items():
        overlaps = [f"{overlap:.2f}" for overlap in found["overlap"]]
        span = f"{found['range'][0]:.2f} to {found['range'][1]:.2f}"
        out.add_row(name, *overlaps, f"{np.mean(found['overlap']):.2f}", span, f"{100 * found['cost']:.0f} %")
    return out


def main(arguments: list[str] | None = None) -> None:
    """Record a run, play all ways through it; write and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="name or path of a causal LM")
    parser.add_argument("--data", help="file of prompts and answers")
    parser.add_argument("--losses", type=Path, help="rescoring.npz of an earlier run, in the place of training")
    parser.add_argument("--rows", type=int, default=320, help="rows of the pool (default 320)")
    parser.add_argument("--epochs", type=int, default=3, help="(default 3)")
    parser.add_argument("--keep", type=float, default=0.1, help="share of the rows that an epoch trains on (0.1)")
    parser.add_argument("--batch", type=int, default=2, help="rows of an update (default 2)")
    parser.add_argument("--lr", type=float, default=1e-4, help="learning rate, constant (default 1e-4)")
    parser.add_argument("--answer-tokens", type=int, default=64, help="most tokens of an answer (default 64)")
    parser.add_argument("--seeds", type=int, default=20, help="draws of the rows at random (default 20)")
    parser.add_argument("--output", type=Path, default=Path("runs/bench"), help="folder (default runs/bench)")
    options = parser.parse_args(arguments)
    if options.losses is None and not (options.model and options.data):
        parser.error("--model and --data, or --losses")
    options.output.mkdir(parents=True, exist_ok=True)
    if options.losses is None:
        run = recorded(options)
        np.savez(options.output / "rescoring.npz", **vars(run))
    else:
        with np.load(options.losses) as file:
            run = Recorded(**{field.name: file[field.name] for field in fields(Recorded)})
    found = {
        "rows": len(run.tokens),
        "kept": run.kept.shape[1],
        "steps": run.steps.tolist(),
        "tokens": {"prompt": run.lengths[:, 0].mean(), "answer": run.tokens.mean(), "direct": run.alone.mean()},
        "seconds_of_a_token": dict(zip(("both passes", "conditioned", "training"), run.seconds.tolist(), strict=True)),
        "moves": how_far(run),
        "ways": compared(run, options.seeds),
    }
    (options.output / "rescoring.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    console = Console(width=160)
    for move in found["moves"]:
        console.print(", ".join(f"{name} {value:.3g}" for name, value in move.items()))
    both, given = 3 * run.seconds[:2] / run.seconds[2]
    console.print(f"a token scored, over a third of one trained: {both:.2f} of both passes, {given:.2f} conditioned")
    console.print(table(found["ways"], found["steps"]))


if __name__ == "__main__":
    main()
