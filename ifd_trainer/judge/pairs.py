"""Answers of arms held against those of random rows by a judge, document by document, with the same seed.

What a judge has said is kept in a file (`cache`), so that the same command again asks nothing that was answered
before. What it said badly is kept too: to ask again costs again, and is done where the caller says so. What never came
(time-outs, errors of the server) is asked again by the next run. Answers that are the same text are a tie, and are not
asked about; nor is a document that an arm has no answer to, which has no verdict.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pandas as pd

from ..errors import UserError
from ..evaluation.measured import BASELINE
from .cache import Cache
from .scores import Judgement

MEASURE = f"judged against {BASELINE}"
FILE = "judge.jsonl"  # in the folder of a comparison
NO_ANSWER = "no answer to judge"


class Judge(Protocol):
    """What tells answers apart: `client.OpenAIJudge`, `reward_model.RewardModel`, or one of your own.

    What it is asked (two answers in an order, or one answer) and what it says are its own. A thing said has a
    `record()` for the cache (None where nothing was said), a `reason` where it is no verdict, and `by`, who said it.
    """

    @property
    def name(self) -> str:
        """As tables have it."""

    def questions(self, prompt: str, own: str, other: str) -> Sequence[Any]:
        """What it is asked about two answers."""

    def key(self, question: Any) -> str:
        """A digest of all that what it says depends on."""

    def read(self, record: dict[str, Any]) -> Any:
        """What it said, from the cache."""

    def compare(self, said: Sequence[Any]) -> Judgement:
        """What it says of the answers, from what it said to `questions`."""

    def __call__(self, asked: Sequence[Any], said: Callable[[int, Any], Any] | None = None) -> Sequence[Any]:
        """Ask; `said` is called with the number of each question, and what was said to it, as it comes."""


@dataclass(frozen=True)
class Count:
    """What is to be asked.

    Attributes:
        asked: questions that have to be asked; for `OpenAIJudge` each is a request.
        known: those that were answered before.
        same: pairs of answers that are the same text.
    """

    asked: int
    known: int
    same: int


@dataclass(frozen=True)
class Judged:
    """What a judge has said of all pairs.

    Attributes:
        frame: a line for each pair, with the columns set, measure, arm, document, group, seed, own_length and
            other_length (characters), value (1 where the arm wins, 0 for a tie, -1 where it loses, nan without a
            verdict), own_score and other_score (means of both orders, or rewards), higher (True: a higher value is
            better) and contradicts (whether the judge prefers another answer in the other order).
        count: what was asked.
        reasons: bad verdicts by their reasons, most first, and documents without an answer.
        by: how many verdicts each model and server gave; several of them where a name means several things.
        cut: answers of which a reward model has read a part.
    """

    frame: pd.DataFrame
    count: Count
    reasons: dict[str, int] = field(default_factory=dict)
    by: dict[str, int] = field(default_factory=dict)
    cut: int = 0


def paired_answers(answers: Mapping[tuple[str, int], pd.DataFrame]) -> pd.DataFrame:
    """Each arm's answers beside those of random rows with the same seed.

    Args:
        answers: by arm and seed, with the columns document, prompt and answer (None where there is none), and group
            if there are such.

    Returns:
        A line for each arm, seed and document: arm, seed, document, prompt, own, other, group.

    Raises:
        UserError: for a run whose random rows are not there, or have other documents.

    >>> frame = pd.DataFrame({"document": ["1"], "prompt": ["Hi"], "answer": ["Yes."], "group": [None]})
    >>> pairs = paired_answers({("random", 0): frame, ("static", 0): frame.assign(answer="No.")})
    >>> pairs[["own", "other"]].values.tolist()
    [['No.', 'Yes.']]
    """
    lines = []
    for (arm, seed), own in answers.items():
        if arm == BASELINE:
            continue
        other = answers.get((BASELINE, seed))
        if other is None:
            raise UserError(f"The answers of {arm} with seed {seed} have none of {BASELINE} rows beside them.")
        both = own.merge(other[["document", "prompt", "answer"]], on=["document", "prompt"], validate="one_to_one")
        if not len(both) == len(own) == len(other):
            raise UserError(f"{arm} and {BASELINE}, seed {seed}, have answered other documents: make the answers anew.")
        columns = {"own": both["answer_x"], "other": both["answer_y"], "group": both.get("group")}
        lines.append(both[["document", "prompt"]].assign(arm=arm, seed=seed, **columns))
    columns = ["arm", "seed", "document", "prompt", "own", "other", "group"]
    return pd.concat(lines, ignore_index=True)[columns] if lines else pd.DataFrame(columns=columns)


def most_questions(documents: int, seeds: int, arms: int) -> int:
    """Requests to `OpenAIJudge`, where nothing is known yet: each pair in both orders.

    Args:
        arms: those beside random rows.

    >>> most_questions(documents=80, seeds=3, arms=4)
    1920
    """
    return documents * seeds * arms * 2


def count_questions(pairs: pd.DataFrame, judge: Judge, folder: Path, again: bool = False) -> Count:
    """What `judge_pairs` would ask; nothing is asked."""
    return _Questions(pairs, judge, Cache(folder / FILE), again).count()


def judge_pairs(
    pairs: pd.DataFrame,
    judge: Judge,
    folder: Path,
    set_name: str = "",
    progress: Callable[[int, int], Any] | None = None,
    again: bool = False,
) -> Judged:
    """What a judge says of pairs of answers.

    Args:
        pairs: as of `paired_answers`.
        judge: what tells answers apart.
        folder: where what it says is kept, in `FILE`, which may be that of other sets and comparisons too.
        set_name: the name of the documents' set.
        progress: is called with the number of questions done, and of all.
        again: whether what the judge said badly before is asked again.

    Raises:
        UserError: what the judge raises; what it had said before is kept.
    """
    cache = Cache(folder / FILE)
    questions = _Questions(pairs, judge, cache, again)
    count = questions.count()
    questions.ask(progress)
    lines, reasons, by, cut = [], Counter(), Counter(), 0
    for said in questions.said.values():
        by[said.by] += said.reason is None
        reasons[str(said.reason)] += said.reason is not None
        cut += bool(getattr(said, "cut", 0))
    for pair, keys in zip(pairs.itertuples(), questions.keys, strict=True):
        if keys:
            found = judge.compare([questions.said[key] for key in keys])
        else:
            found = Judgement(0) if _answered(pair) else Judgement(None, reasons=(NO_ANSWER,))
            reasons.update(found.reasons)
        lines.append(_line(pair, found, set_name))
    frame = pd.DataFrame(lines, columns=list(_COLUMNS)).astype(_COLUMNS)
    return Judged(frame, count, dict((+reasons).most_common()), dict((+by).most_common()), cut)


def documents_by_arm(frame: pd.DataFrame) -> dict[str, list[pd.DataFrame]]:
    """The values of a frame of `judge_pairs` as documents of each arm and seed, random rows first: theirs are 0.

    A mean over an arm's documents is its winning score less 1, and so is its difference from random rows.
    """
    columns = ["set", "measure", "document", "value", "higher", "group"]
    seeds = sorted(set(frame["seed"]))
    base = frame.drop_duplicates(["set", "document"]).assign(value=0.0)[columns]
    arms = dict(list(frame.groupby("arm", sort=False)))
    found = {arm: [lines.loc[lines["seed"] == seed, columns] for seed in seeds] for arm, lines in arms.items()}
    return {BASELINE: [base for _ in seeds], **found}


_COLUMNS = {
    **dict.fromkeys(("set", "measure", "arm", "document", "group"), object),
    **dict.fromkeys(("seed", "own_length", "other_length"), "int64"),
    **dict.fromkeys(("value", "own_score", "other_score"), "float64"),
    **dict.fromkeys(("higher", "contradicts"), bool),
}


def _line(pair: Any, found: Judgement, set_name: str) -> dict[str, Any]:
    return {
        "set": set_name,
        "measure": MEASURE,
        "arm": pair.arm,
        "document": pair.document,
        "group": pair.group,
        "seed": pair.seed,
        "own_length": len(pair.own) if isinstance(pair.own, str) else 0,
        "other_length": len(pair.other) if isinstance(pair.other, str) else 0,
        "value": float("nan") if found.value is None else found.value,
        "own_score": found.own,
        "other_score": found.other,
        "higher": True,
        "contradicts": found.contradicts,
    }


def _answered(pair: Any) -> bool:
    return isinstance(pair.own, str) and isinstance(pair.other, str)


class _Questions:
    """What there is to ask about pairs, each thing once, and what was said to it."""

    def __init__(self, pairs: pd.DataFrame, judge: Judge, cache: Cache, again: bool) -> None:
        self.judge, self.cache = judge, cache
        self.keys: list[list[str]] = []  # of each pair; none where both answers are one text, or one is missing
        self.same = 0
        self.left: dict[str, Any] = {}
        self.said: dict[str, Any] = {}
        for pair in pairs.itertuples():
            same, answered = pair.own == pair.other, _answered(pair)
            self.same += same and answered
            asked = judge.questions(pair.prompt, pair.own, pair.other) if answered and not same else []
            self.keys.append([judge.key(question) for question in asked])
            for key, question in zip(self.keys[-1], asked, strict=True):
                record = cache.get(key)
                said = None if record is None else judge.read(record)
                if said is None or (again and said.reason is not None):
                    self.left[key] = question
                else:
                    self.said[key] = said

    def count(self) -> Count:
        return Count(len(self.left), len(self.said), self.same)

    def ask(self, progress: Callable[[int, int], Any] | None) -> None:
        keys, known = list(self.left), len(self.said)

        def said(number: int, what: Any) -> None:
            self.said[keys[number]] = what
            if (record := what.record()) is not None:
                self.cache.put(keys[number], record)
            if progress is not None:
                progress(len(self.said) - known, len(keys))

        if keys:
            self.judge(list(self.left.values()), said)
