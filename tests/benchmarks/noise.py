"""What the guards keep out of a selection: noise of known kinds in real rows, and how much of each is kept.

Rows of a file (a sample of those with answers of at most 200 tokens) get noise by a seed; a row has one kind at most,
the others are `untouched`, which says nothing of how good they were. The settings differ in which answers are wrong:

    everywhere        20 % of the answers are shuffled among all of these rows
    within clusters   20 % trade places with one of the same cluster of prompts (TF-IDF and k-means, N/10 clusters)
    fluent            5 % are answers to other prompts that begin with the same word, and about as long

In all of them 10 % are cut off in the middle of a sentence (`truncated`), and 5 % more are copies of untouched rows
with a word replaced, a word dropped or a typo (`duplicated`). A file with a column `quality`, as the demo's, has its
noise already: its rows are taken as they are (`as labelled`), and seeds draw nothing but wrong pairs and random rows.

    signals     areas under the precision-recall curve (AP) and the ROC curve, of rows of one kind against untouched
                ones. The AP of a coin is the share of that kind, which differs between settings
    policies    at a budget of 10 %, the share of each kind that is kept, and its lift: share among the kept rows over
                share in the pool. A lift of 1 is that of random rows
    guards      share of each kind that a guard drops. Of shuffled rows, what a limit or a test lets pass is to be at
                most its alpha, if they are like its wrong pairs; what it drops of untouched rows is its price
    cost        seconds of CPU, and tokens, of each guard over those of scoring all rows: measured once for each file,
                on the first pool, the pairing test with anchors drawn as in a run

Figures are means over seeds, with the lowest and the highest. All rows are scored by the model as it is, so nothing is
said about what training on them does. As in a run, the pairing test is of the rows that would be kept; as a signal, of
25 untouched and 25 wrong rows more, weighed as in the pool (--tested). A loss that was computed for one seed or setting
is not computed again: random anchors are the same ones for all seeds. Writes noise.json, with the numbers of every seed
and untouched rows that were dropped (of the first seed), and noise.png.

By default 400 rows of a file and 3 seeds: 1.1 million tokens of rows like Alpaca's, 0.7 of short answers with code,
which took 49 and 38 minutes of one core of an AMD EPYC without AVX-512, with SmolLM2-135M.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
import torch
from duplicates import edits_of
from matplotlib.figure import Figure
from measuring import machine
from rich.console import Console
from rich.table import Table

from ifd_trainer.data.duplicates import duplicate_groups
from ifd_trainer.data.encoding import EncodedPair, Segment, with_ending
from ifd_trainer.data.files import load_rows
from ifd_trainer.data.format_choice import resolve_format
from ifd_trainer.data.formats import PromptFormat
from ifd_trainer.data.similar_prompts import SimilarPrompts
from ifd_trainer.errors import UserError
from ifd_trainer.method.calibrated_limit import CalibratedLimit
from ifd_trainer.method.controls import LongestAnswers, LowestScores, MiddleBand, RandomRows
from ifd_trainer.method.duplicates import Duplicates, surplus
from ifd_trainer.method.pairing_test import PairingTest
from ifd_trainer.method.reasons import Status
from ifd_trainer.method.scoring_health import separation
from ifd_trainer.method.selection import Cherry, Policy, ShortfallError
from ifd_trainer.method.unfinished import Unfinished
from ifd_trainer.scoring.calibration import Reader, wrong_scores
from ifd_trainer.scoring.losses import Scores
from ifd_trainer.scoring.transform import IFDScorer

ROOT = Path(__file__).resolve().parents[2]
UNTOUCHED, SHUFFLED, FLUENT, TRUNCATED, DUPLICATED = "untouched", "shuffled", "fluent", "truncated", "duplicated"
SETTINGS = ("everywhere", "within clusters", "fluent")
LABELLED = "as labelled"
BUDGET = 0.1
SHARES = {SHUFFLED: 0.2, FLUENT: 0.05, TRUNCATED: 0.1, DUPLICATED: 0.05}  # of the rows
DEFAULT, NEAR = "default guard", "default guard, near limit"
EDITS = ("a word replaced by any other", "a word dropped", "two letters of a word swapped")
MOST_EXAMPLES = 20  # untouched rows that a guard dropped, which are written down
_NOISE, _MOVES, _POLICY = 1, 2, 3  # what a seed is for: equal generators would draw equal rows
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
# White space within a line, behind what is no end of a sentence (nor one with its quote or bracket).
_MIDDLE = re.compile(r"(?<![\s.!?])(?<![.!?]['\")\]]) +(?=\S)")

Row = dict[str, Any]


# ---- noise ------------------------------------------------------------------------------------------------------


@dataclass
class Noisy:
    """Rows with noise.

    Attributes:
        rows: n rows of the file's columns.
        kinds: (n,) `untouched` or a kind of noise.
        origin: (n,) the row that an answer was taken from; its own position where it was not moved.
    """

    rows: list[Row]
    kinds: np.ndarray
    origin: np.ndarray

    @classmethod
    def untouched(cls, rows: Sequence[Row]) -> Noisy:
        return cls([dict(row) for row in rows], np.full(len(rows), UNTOUCHED, dtype=object), np.arange(len(rows)))


def with_noise(rows: Sequence[Row], format: PromptFormat, clusters: np.ndarray, setting: str, seed: int) -> Noisy:
    """A pool of a setting; the cut rows and the copies of a seed are the same ones in all settings."""
    pool, rng, (asked, answer) = Noisy.untouched(rows), np.random.default_rng([seed, _NOISE]), format.columns
    number = {kind: round(share * len(rows)) for kind, share in SHARES.items()}
    order = rng.permutation(len(rows))
    cuts = ((row, cut_off(str(rows[row][answer]), rng)) for row in order.tolist())
    for row, text in islice(((row, text) for row, text in cuts if text), number[TRUNCATED]):
        pool.rows[row][answer], pool.kinds[row] = text, TRUNCATED
    free = order[pool.kinds[order] == UNTOUCHED]
    copied, free = free[: number[DUPLICATED]], free[number[DUPLICATED] :]
    moving = np.random.default_rng([seed, _MOVES])
    if setting == "fluent":
        kind, moved = FLUENT, fluent(rows, format, free[moving.permutation(len(free))])
    else:
        alike = clusters if setting == "within clusters" else None
        kind, moved = SHUFFLED, shuffled(free, moving, number[SHUFFLED], alike)
    for row, other in islice(((a, b) for a, b in moved if rows[a][answer] != rows[b][answer]), number[kind]):
        pool.rows[row][answer], pool.kinds[row], pool.origin[row] = rows[other][answer], kind, other
    edits = edits_of(rng, [(str(row[asked]), str(row[answer])) for row in rows])
    for row in copied.tolist():
        part, edit = format.columns[rng.integers(2)], edits[EDITS[rng.integers(len(EDITS))]]
        pool.rows.append({**rows[row], part: edit(str(rows[row][part]))})
    pool.kinds = np.append(pool.kinds, np.full(len(copied), DUPLICATED, dtype=object))
    pool.origin = np.append(pool.origin, np.arange(len(rows), len(pool.rows)))
    return pool


def cut_off(answer: str, rng: np.random.Generator) -> str | None:
    """An answer up to a place in the middle of a sentence, in its second to fourth fifth; None if it has none."""
    places = [found.start() for found in _MIDDLE.finditer(answer)]
    places = [place for place in places if 0.2 * len(answer) <= place <= 0.8 * len(answer)]
    return answer[: places[rng.integers(len(places))]] if places else None


def shuffled(
    free: np.ndarray, rng: np.random.Generator, number: int, clusters: np.ndarray | None
) -> Iterator[tuple[int, int]]:
    """Rows and the rows whose answers they get: one round of all, or pairs within clusters that trade places."""
    free = free[rng.permutation(len(free))]
    if clusters is None:
        chosen = free[:number]
        return zip(chosen.tolist(), np.roll(chosen, 1).tolist(), strict=True)
    pairs = []
    for cluster in np.unique(clusters[free]):
        members = free[clusters[free] == cluster].tolist()
        pairs += list(zip(members[0::2], members[1::2], strict=False))
    order = rng.permutation(len(pairs)).tolist()
    return (move for i in order for move in (pairs[i], pairs[i][::-1]))


def fluent(rows: Sequence[Row], format: PromptFormat, free: np.ndarray) -> Iterator[tuple[int, int]]:
    """Rows and the rows whose answers they get: of those whose prompts begin with the same word, the one with an answer
    nearest in length, a fifth more or less at most."""
    asked, answer = format.columns
    first = np.array([(str(row[asked]).split() or [""])[0].casefold() for row in rows], dtype=object)
    length = np.array([len(str(row[answer])) for row in rows])
    for row in free.tolist():
        differs = np.array([other[answer] != rows[row][answer] for other in rows])
        near = np.flatnonzero((first == first[row]) & differs & (abs(length - length[row]) <= length[row] / 5))
        if len(near):
            yield row, int(near[np.argmin(abs(length[near] - length[row]))])


def clusters_of(prompts: Sequence[str]) -> np.ndarray:
    """(n,) the cluster of each prompt, about ten to a cluster."""
    from sklearn.cluster import KMeans
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectors = TfidfVectorizer(sublinear_tf=True, max_df=0.5).fit_transform(prompts)
    return KMeans(max(len(prompts) // 10, 1), n_init=1, random_state=0).fit_predict(vectors)


def labelled(rows: Sequence[Row], format: PromptFormat, label: str) -> Noisy:
    """Rows that are labelled already. Of rows with equal texts the later ones are the copies, as the guard has it."""
    pool = Noisy.untouched(rows)
    kinds = [UNTOUCHED if row[label] == "clean" else str(row[label]) for row in rows]
    groups = duplicate_groups([_texts(row, format) for row in rows], None)
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        pool.kinds[members] = sorted((kinds[i] for i in members), key=lambda kind: kind == DUPLICATED)
    return pool


def _texts(row: Row, format: PromptFormat) -> tuple[str, str]:
    """What a row asks and answers, without a template."""
    more = row.get(getattr(format, "input", ""))
    return "\n".join(filter(None, (str(row[format.columns[0]]), more))), str(row[format.columns[1]])


# ---- measuring --------------------------------------------------------------------------------------------------


class Losses:
    """Losses of segments by a model, each computed once.

    Attributes:
        timed: compute all that is asked for, whatever is known, and note what it takes.
        tokens_run: how many tokens were computed so far.
        costs: by step, the seconds of CPU, tokens and segments of what was asked for while `timed`.
    """

    def __init__(self, scorer: IFDScorer) -> None:
        self.scorer, self.timed = scorer, False
        self.costs: dict[str, dict[str, float]] = {}
        self.tokens_run = 0
        self._known: dict[tuple[tuple[int, ...], int, int], tuple[float, float]] = {}

    def warm_up(self, segments: Sequence[Segment]) -> None:
        """Let the model find out what it finds out once, so that it is not counted."""
        self.scorer.nll_with_tails(list(segments))

    def __call__(self, segments: Sequence[Segment], step: str) -> np.ndarray:
        """(n, 2) mean loss of the scored tokens, and the loss of the tail, of n segments."""
        keys = [(tuple(segment.ids), segment.start, segment.tail) for segment in segments]
        asked = dict(zip(keys, segments, strict=True))
        new = [key for key in asked if self.timed or key not in self._known]
        began = time.process_time()
        if new:
            found = self.scorer.nll_with_tails([asked[key] for key in new])
            self.tokens_run += sum(len(asked[key].ids) for key in new)
            self._known.update(zip(new, zip(*(values.tolist() for values in found), strict=True), strict=True))
        if self.timed:
            cost = self.costs.setdefault(step, {"seconds": 0.0, "tokens": 0, "segments": 0})
            cost["seconds"] += time.process_time() - began
            cost["tokens"] += sum(len(segment.ids) for segment in segments)
            cost["segments"] += len(segments)
        return np.array([self._known[key] for key in keys]).reshape(-1, 2)


@dataclass
class Measured:
    """A pool with what the model says of it; what is not needed is not computed."""

    pool: Noisy
    format: PromptFormat
    losses: Losses
    seed: int
    limits: dict[str, float] = field(default_factory=dict)
    tests: dict[str, PairingTest] = field(default_factory=dict)
    p: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        columns = {name: [row.get(name) for row in self.pool.rows] for name in self.pool.rows[0]}
        self.pairs = self.losses.scorer.encode(columns)
        longest = max(len(pair.conditioned.ids) for pair in self.pairs if pair.conditioned)
        self.reader = Reader(lambda rows: [self.pairs[row] for row in rows], None, None, longest)
        self.texts = [_texts(row, self.format) for row in self.pool.rows]
        prompts = [self.format.render(row, None).prompt for row in self.pool.rows]
        self.similar = SimilarPrompts(prompts)
        self.ids = np.arange(len(self.pool.rows))
        self.scores = self._scores()
        self.ok = self.scores.ifd_status == Status.OK.value
        for prompts in ("random", "near"):
            self.limits[prompts] = self._limit(CalibratedLimit(prompts=prompts))
            self.tests[prompts] = PairingTest(prompts=prompts)
            self.p[prompts] = np.full(len(self.ids), np.nan)
        self._tested = {prompts: np.zeros(len(self.ids), dtype=bool) for prompts in self.tests}
        self._anchors = {prompts: self._drawn(test) for prompts, test in self.tests.items()}
        self.unfinished = self._threshold(Unfinished())
        self.groups = duplicate_groups(self.texts, Duplicates().similarity)

    def _scores(self) -> Scores:
        status = np.array([pair.status.value for pair in self.pairs], dtype=object)
        scored, values = status == Status.OK.value, np.full((3, len(self.pairs)), np.nan)
        found = self.losses(list(_both(self.pairs)), "scoring")
        values[:, scored] = found[0::2, 0], found[1::2, 0], found[0::2, 1]
        tokens = np.array([pair.conditioned.scored if pair.conditioned else 0 for pair in self.pairs])
        return Scores.from_nll(values[0], values[1], tokens, status, values[2])

    def _limit(self, rule: CalibratedLimit) -> float:
        """The calibrated limit; infinity where the pool is too small for one."""
        candidates = rule.draw(self.ids, self.ok, self.seed, self.similar.nearest)
        pairs = self.reader.wrong_pairs(candidates, rule.wanted(int(self.ok.sum())))
        cas = self.losses([segment for _, segment in pairs], f"limit, {rule.prompts}")[:, 0]
        try:
            return rule.limit(wrong_scores(pairs, cas, self.scores.das).ifd)
        except UserError:
            return float("inf")

    def _threshold(self, rule: Unfinished) -> float:
        known = np.isfinite(self.scores.eot_loss)
        drawn = rule.draw(self.ids, np.where(known, self.scores.answer_tokens, 0), self.seed)
        cut = self.reader.cut_answers(*drawn)
        return rule.threshold(self.scores.eot_loss[known], self.losses(cut, "unfinished")[:, 1])

    def _drawn(self, test: PairingTest) -> np.ndarray:
        """(n, C) anchors that are tried; random ones go with an answer wherever it was moved, so that its losses under
        them are computed once for all settings."""
        anchors = test.draw(self.ids, np.flatnonzero(self.ok), 0, self.similar.nearest)
        return anchors[self.pool.origin] if test.prompts == "random" else anchors

    def p_values(self, rows: np.ndarray, prompts: str) -> np.ndarray:
        """(m,) p-values of the pairing test of some rows; NaN where it tells nothing."""
        test, new = self.tests[prompts], rows[~self._tested[prompts][rows] & self.ok[rows]]

        def losses(segments: Sequence[Segment]) -> np.ndarray:
            return self.losses(segments, f"pairing test, {prompts}")[:, 0] if segments else np.empty(0)

        if self.losses.timed:  # as a run does it: random anchors are shared by rows that are tested together
            anchors = test.draw(new, np.flatnonzero(self.ok), self.seed, self.similar.nearest)
            self.reader.paired_losses(new, anchors, test.anchors, test.tokens, losses)
        timed, self.losses.timed = self.losses.timed, False
        table = self.reader.paired_losses(new, self._anchors[prompts][new], test.anchors, test.tokens, losses)
        self.losses.timed = timed
        self.p[prompts][new] = test.p_values(table[:, 0], table[:, 1:])
        self._tested[prompts][new] = True
        return self.p[prompts][rows]

    def held_back(self) -> dict[str, np.ndarray]:
        """By guard, and for two sets of guards, (n,) which rows with a score are dropped without a pairing test."""
        out = {f"limit, {name}": self.ok & ~(self.scores.ifd < limit) for name, limit in self.limits.items()}
        out["unfinished"] = self.ok & (self.scores.eot_loss >= self.unfinished)
        untrained = np.zeros_like(self.ok)
        out["duplicates"] = surplus(self.groups, self.ids, self.ok, untrained)
        for name, guards in (("random", DEFAULT), ("near", NEAR)):
            others = out[f"limit, {name}"] | out["unfinished"]
            out[guards] = others | surplus(self.groups, self.ids, self.ok & ~others, untrained)
        return out

    def sample(self, number: int) -> np.ndarray:
        """At most so many untouched rows and so many of each wrong kind, the same ones wherever they are of a kind."""
        order = np.random.default_rng(0).permutation(len(self.ids))
        of_kinds = (order[self.ok[order] & (self.pool.kinds[order] == kind)] for kind in (UNTOUCHED, SHUFFLED, FLUENT))
        return np.sort(np.concatenate([rows[:number] for rows in of_kinds]))


def _both(pairs: Sequence[EncodedPair]) -> Iterator[Segment]:
    return (segment for pair in pairs if pair.conditioned for segment in (with_ending(pair), pair.direct))


def kept_by(policy: Policy, found: Measured, held: np.ndarray | None = None, anchors: str | None = None) -> np.ndarray:
    """Positions that a policy keeps of the rows that are not held back, each of which has passed the pairing test if
    there are `anchors`; none where none is eligible."""
    held = np.zeros(len(found.ids), dtype=bool) if held is None else held.copy()
    while True:
        rows = np.flatnonzero(~held)
        columns = {name: values[rows] for name, values in found.scores.columns().items()}
        rng = np.random.default_rng([found.seed, _POLICY])
        try:
            kept = rows[policy(columns, round(BUDGET * len(held)), ids=rows, rng=rng).rows]
        except ShortfallError:
            return rows[:0]
        failed = kept[~found.tests[anchors].passes(found.p_values(kept, anchors))] if anchors else kept[:0]
        if not len(failed):
            return kept
        held[failed] = True


def kept_by_policies(found: Measured) -> dict[str, np.ndarray]:
    """The rows that each policy keeps."""
    held = found.held_back()
    kept = {
        "highest IFD below 1": kept_by(Cherry(), found),
        "middle band, 25 to 75": kept_by(MiddleBand(), found),
        "random": kept_by(RandomRows(), found),
        "longest answers": kept_by(LongestAnswers(), found),
        "lowest IFD": kept_by(LowestScores(), found),
        "limit, random": kept_by(Cherry(found.limits["random"]), found),
        "limit, near": kept_by(Cherry(found.limits["near"]), found),
        DEFAULT: kept_by(Cherry(), found, held[DEFAULT]),
        "guard + test, random": kept_by(Cherry(), found, held[DEFAULT], "random"),
        "guard + test, near": kept_by(Cherry(), found, held[DEFAULT], "near"),
    }
    found.losses.timed = False  # what comes now tests other rows than those that these policies would keep
    return kept | {"near limit + near test": kept_by(Cherry(), found, held[NEAR], "near")}


# ---- what is reported -------------------------------------------------------------------------------------------


def run_of(found: Measured, tested: int, examples: bool) -> dict[str, Any]:
    """All numbers of a pool; what the pairing test says is of at most `tested` rows of a kind."""
    kinds = found.pool.kinds
    kept = kept_by_policies(found)
    sample, every = found.sample(tested), np.flatnonzero(found.ok)
    guards = {name: (every, drops[every]) for name, drops in found.held_back().items()}
    for name, test in found.tests.items():
        guards[f"pairing test, {name}"] = sample, ~test.passes(found.p_values(sample, name))
    run = {
        "seed": found.seed,
        "kinds": {kind: int((kinds == kind).sum()) for kind in named(kinds)},
        "with_score": {kind: int((found.ok & (kinds == kind)).sum()) for kind in named(kinds)},
        "limits": {name: finite(limit) for name, limit in found.limits.items()},
        "unfinished": finite(found.unfinished),
        "signals": signals(found, sample),
        "copies": copies_found(found.groups, kinds),
        "kept_rows": {name: len(rows) for name, rows in kept.items()},
        "policies": {name: shares(rows, kinds) for name, rows in kept.items()},
        "dropped": {name: dropped_shares(drops, kinds[rows]) for name, (rows, drops) in guards.items()},
    }
    if examples:
        run["dropped_untouched"] = {name: shown(found, rows[drops]) for name, (rows, drops) in guards.items()}
    return run


def named(kinds: np.ndarray) -> list[str]:
    """The kinds there are, `untouched` first."""
    return sorted(set(kinds.tolist()), key=lambda kind: (kind != UNTOUCHED, kind))


def shares(kept: np.ndarray, kinds: np.ndarray) -> dict[str, dict[str, float | None]]:
    """Of each kind, how much of it is kept, and how much more often it is kept than rows are on average.

    >>> shares(np.array([0]), np.array(["untouched", "untouched", "shuffled", "untouched"]))["untouched"]
    {'kept': 0.3333333333333333, 'lift': 1.3333333333333333}
    """
    out = {}
    for kind in named(kinds):
        of_kind = float((kinds[kept] == kind).mean()) if len(kept) else None
        lift = None if of_kind is None else of_kind / float((kinds == kind).mean())
        out[kind] = {"kept": float((kinds[kept] == kind).sum() / (kinds == kind).sum()), "lift": lift}
    return out


def dropped_shares(drops: np.ndarray, kinds: np.ndarray) -> dict[str, float]:
    """The share of each kind that is dropped, of (n,) rows."""
    return {kind: float(drops[kinds == kind].mean()) for kind in named(kinds)}


def signals(found: Measured, sample: np.ndarray) -> dict[str, dict[str, dict[str, float]]]:
    """By kind and signal, the areas under the precision-recall and the ROC curve against untouched rows.

    Of the pairing test those of a sample, in which a kind weighs as much as in the pool.
    """
    scores, kinds, every, out = found.scores, found.pool.kinds, np.flatnonzero(found.ok), {}
    pairs = {"IFD": scores.ifd, "cas - das": scores.cas - scores.das, "cas": scores.cas, "das": scores.das}
    pairs = {name: (every, values) for name, values in pairs.items()}
    pairs |= {f"p, {name} anchors": (sample, found.p[name]) for name in found.tests}
    ends = {"end of turn": (every, scores.eot_loss)}
    of_kinds = {SHUFFLED: pairs, FLUENT: pairs, TRUNCATED: ends, "one_word": ends}
    for kind in (kind for kind in of_kinds if (kinds[every] == kind).any()):
        in_pool = np.array([(kinds[every] == one).sum() for one in (UNTOUCHED, kind)])
        out[kind] = {"a coin": {"AP": float(in_pool[1] / in_pool.sum()), "ROC": 0.5}}
        for name, (rows, values) in of_kinds[kind].items():
            of_kind = [values[rows[kinds[rows] == one]] for one in (UNTOUCHED, kind)]
            out[kind][name] = areas(*of_kind, in_pool)
    return out


def areas(untouched: np.ndarray, noise: np.ndarray, in_pool: Sequence[int]) -> dict[str, float]:
    """Both areas of a signal, high for noise, of samples of the two kinds and their numbers in the pool; NaN, of which
    nothing is known, is the least suspicious.

    >>> areas(np.array([0.1, 0.3]), np.array([0.2, np.nan]), [2, 2])
    {'AP': 0.5, 'ROC': 0.25}
    """
    from sklearn.metrics import average_precision_score

    values = np.nan_to_num(np.concatenate([untouched, noise]), nan=-1e9)
    is_noise = np.arange(len(values)) >= len(untouched)
    weight = np.where(is_noise, in_pool[1] / len(noise), in_pool[0] / len(untouched))
    ranked = average_precision_score(is_noise, values, sample_weight=weight)
    return {"AP": float(ranked), "ROC": separation(values[~is_noise], values[is_noise])}


def copies_found(groups: np.ndarray, kinds: np.ndarray) -> dict[str, float | None]:
    """Recall: copies that are in a group with another row. Precision: of rows that a group has too many, the share that
    its copies account for."""
    sizes, copies = np.bincount(groups), np.bincount(groups, kinds == DUPLICATED)
    surplus_rows, number = np.maximum(sizes - 1, 0), (kinds == DUPLICATED).sum()
    explained = np.minimum(copies, surplus_rows).sum()
    return {
        "recall": float(copies[sizes > 1].sum() / number) if number else None,
        "precision": float(explained / surplus_rows.sum()) if surplus_rows.any() else None,
    }


def shown(found: Measured, dropped: np.ndarray) -> list[Row]:
    """Some untouched rows of those that a guard drops, for a reader to judge: are they good rows?"""
    rows = dropped[found.pool.kinds[dropped] == UNTOUCHED]
    rows = np.sort(np.random.default_rng(0).permutation(rows)[:MOST_EXAMPLES])
    columns = {"ifd": found.scores.ifd, "eot_loss": found.scores.eot_loss}
    columns |= {f"p, {name} anchors": p for name, p in found.p.items()}
    return [
        {"asked": found.texts[row][0], "answer": found.texts[row][1]}
        | {name: finite(values[row]) for name, values in columns.items()}
        for row in rows.tolist()
    ]


def finite(value: float) -> float | None:
    """A number for JSON, which has no infinity."""
    return float(value) if np.isfinite(value) else None


def spread(values: Sequence[float | None]) -> tuple[float, float, float] | None:
    """Mean, lowest and highest of the values there are.

    >>> spread([1.0, None, 2.0])
    (1.5, 1.0, 2.0)
    """
    known = [value for value in values if value is not None and np.isfinite(value)]
    return (float(np.mean(known)), min(known), max(known)) if known else None


def cell(values: Sequence[float | None], form: str) -> str:
    """A mean with its range, for a table."""
    found = spread(values)
    if found is None:
        return "-"
    mean, low, high = (format(value, form) for value in found)
    return mean if low == high else f"{mean} ({low} to {high})"


def tables(name: str, setting: str, runs: Sequence[dict[str, Any]]) -> Iterator[Table]:
    """What was found in the pools of a setting."""
    kinds = list(dict.fromkeys(kind for run in runs for kind in run["kinds"]))
    counts = ", ".join(f"{cell([run['kinds'].get(kind) for run in runs], '.0f')} {kind}" for kind in kinds)
    limits = ", ".join(f"{p} {cell([run['limits'][p] for run in runs], '.3f')}" for p in runs[0]["limits"])
    ends = cell([run["unfinished"] for run in runs], ".1f")
    table = Table(
        "kind", "signal", "AP", "ROC", title=f"{name}, {setting}: {counts}\nlimit: {limits}; end of turn: {ends} nats"
    )
    for kind, found in runs[0]["signals"].items():
        for signal in found:
            at = [run["signals"].get(kind, {}).get(signal, {}) for run in runs]
            table.add_row(kind, signal, *(cell([one.get(area) for one in at], ".2f") for area in ("AP", "ROC")))
    for measure in ("recall", "precision"):
        table.add_row(DUPLICATED, f"found, {measure}", cell([run["copies"][measure] for run in runs], ".2f"), "")
    yield table
    for title, part, number in (("lift", "policies", "lift"), ("kept", "policies", "kept"), ("dropped", "dropped", "")):
        numbers = ["rows"] if number else []
        table = Table(part, *numbers, *kinds, title=f"{name}, {setting}: {title}")
        for row in runs[0][part]:
            found = [[run[part][row].get(kind) for run in runs] for kind in kinds]
            values = [[one and one[number] for one in of_kind] if number else of_kind for of_kind in found]
            numbers = [cell([run["kept_rows"][row] for run in runs], ".0f")] if number else []
            table.add_row(row, *numbers, *(cell(of_kind, ".2f" if number == "lift" else ".1%") for of_kind in values))
        yield table


def cost_table(name: str, costs: Mapping[str, Mapping[str, float]]) -> Table:
    """What each guard takes, over what scoring takes."""
    table = Table("step", "segments", "tokens", "tokens / scoring", "seconds / scoring", title=f"{name}: cost")
    whole = costs["scoring"]
    for step, cost in costs.items():
        ratios = (f"{cost[unit] / whole[unit]:.2f}" for unit in ("tokens", "seconds"))
        table.add_row(step, f"{cost['segments']:,}", f"{cost['tokens']:,}", *ratios)
    return table


def drawn(results: Mapping[str, Any]) -> Figure:
    """Lift of each kind of noise by policy; a panel for each file and setting, with lines from the lowest to the
    highest seed."""
    panels = [(name, s, runs) for name, file in results["files"].items() for s, runs in file["settings"].items()]
    figure = Figure(figsize=(11.0, 0.6 + 3.0 * len(panels)), layout="constrained")
    for ax, (name, setting, runs) in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
        policies = list(runs[0]["policies"])
        kinds = [kind for kind in runs[0]["kinds"] if kind != UNTOUCHED]
        for number, kind in enumerate(kinds):
            found = [spread([run["policies"][p].get(kind, {}).get("lift") for run in runs]) for p in policies]
            mean, low, high = np.array([one or (np.nan,) * 3 for one in found]).T
            at, color = np.arange(len(policies)) + 0.8 * ((number + 0.5) / len(kinds) - 0.5), _COLORS[number % 6]
            ax.bar(at, mean, 0.8 / len(kinds), color=color, label=kind)
            ax.errorbar(at, mean, [mean - low, high - mean], fmt="none", ecolor="#333333", elinewidth=0.8)
        ax.axhline(1, color="#333333", lw=0.8, ls=":")
        ax.set(title=f"{name}, {setting}", ylabel="lift (1: random rows)")
        ax.set_xticks(range(len(policies)), [fill(policy, 15) for policy in policies], fontsize=7)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False, fontsize=7)
    return figure


# ---- the run ----------------------------------------------------------------------------------------------------


def sampled(path: str, scorer: IFDScorer, options: argparse.Namespace) -> tuple[list[Row], PromptFormat]:
    """Rows of a file, by a seed, and their format; of rows without labels those with a score and a short answer."""
    rows = load_rows(path)
    format = resolve_format(None, rows.column_names)
    if len(format.columns) != 2:
        raise UserError(f"{path} holds chats; noise is made of two columns of text, a prompt and an answer.")
    able = np.arange(len(rows))
    if options.label not in rows.column_names:
        pairs = scorer.encode(rows[:])
        able = np.flatnonzero([pair.conditioned and pair.conditioned.scored <= options.answer_tokens for pair in pairs])
    chosen = np.sort(np.random.default_rng(0).permutation(able)[: options.rows])
    return rows.select(chosen).to_list(), format


def pools_of(
    rows: Sequence[Row], format: PromptFormat, options: argparse.Namespace
) -> Iterator[tuple[str, int, Noisy]]:
    """Settings, seeds and pools of a file, seed by seed."""
    seeds = range(options.seeds)
    if options.label in rows[0]:
        yield from ((LABELLED, seed, labelled(rows, format, options.label)) for seed in seeds)
        return
    clusters = clusters_of([_texts(row, format)[0] for row in rows])
    for seed in seeds:
        yield from ((setting, seed, with_noise(rows, format, clusters, setting, seed)) for setting in SETTINGS)


def write(folder: Path, results: Mapping[str, Any]) -> None:
    """The results so far as noise.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "noise.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    """Measure all files; write and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="name or path of a causal LM")
    parser.add_argument(
        "--data", nargs="+", default=[str(ROOT / "recipes" / "data" / "demo_train.jsonl")], help="files (the demo's)"
    )
    parser.add_argument("--rows", type=int, default=400, help="rows of each file (default 400)")
    parser.add_argument("--answer-tokens", type=int, default=200, help="most tokens of an answer (default 200)")
    parser.add_argument("--seeds", type=int, default=3, help="draws of noise (default 3)")
    parser.add_argument("--tested", type=int, default=25, help="rows of a kind for the pairing test (default 25)")
    parser.add_argument("--label", default="quality", help="column of a file that has its noise (default quality)")
    parser.add_argument("--output", type=Path, default=Path("runs/bench"), help="folder (default runs/bench)")
    options = parser.parse_args(arguments)
    scorer, console = IFDScorer(options.model, device="cpu", dtype="float32"), Console(width=140)
    results: dict[str, Any] = {"machine": machine(torch.device("cpu")), "model": options.model, "files": {}}
    for path in options.data:
        rows, format = sampled(path, scorer, options)
        name, losses, settings = Path(path).stem, Losses(scorer), {}
        results["files"][name] = {"rows": len(rows), "format": format.name, "costs": losses.costs, "settings": settings}
        losses.warm_up(list(_both(scorer.encode({column: [row[column] for row in rows[:8]] for column in rows[0]}))))
        began = time.process_time()
        for setting, seed, pool in pools_of(rows, format, options):
            losses.timed = not settings
            runs = settings.setdefault(setting, [])
            runs.append(run_of(Measured(pool, format, losses, seed), options.tested, examples=not runs))
            results["files"][name] |= {"tokens_run": losses.tokens_run, "cpu_seconds": time.process_time() - began}
            write(options.output, results)  # what takes minutes is written down at once
            console.print(f"{name}, {setting}, seed {seed}: done")
        for setting, runs in settings.items():
            for table in tables(name, setting, runs):
                console.print(table)
        console.print(cost_table(name, losses.costs))
    drawn(results).savefig(options.output / "noise.png", dpi=144)
    console.print(f"written: {options.output}/noise.json and .png")


if __name__ == "__main__":
    main()
