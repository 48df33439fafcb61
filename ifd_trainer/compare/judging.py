"""The judge of a comparison: what a recipe says of it, and what it says of the arms' answers."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from ..data.atomic import write_json
from ..errors import NotFoundError, UserError
from ..evaluation.at_end import answers_path
from ..evaluation.measured import BASELINE
from ..evaluation.measures import MAIN, Measures
from ..evaluation.statistics import Difference
from ..judge.client import OpenAIJudge
from ..judge.pairs import Count, Judge, count_questions, judge_pairs, paired_answers
from ..judge.reward_model import RewardModel
from ..judge.scores import judged_documents, winning_score
from ..method.number_words import many
from .comparison import Comparison

# Of an API key neither is read from a recipe, which is published with the results.
_OPENAI = [field.name for field in dataclasses.fields(OpenAIJudge) if field.name != "api_key"]
FILE = "judging.json"
_REWARD = ["margin", "max_length", "batch_size", "device"]


@dataclass(frozen=True)
class JudgedArm:
    """What a judge says of the answers of one arm to the prompts of one set, beside those of random rows.

    Attributes:
        documents: prompts with a verdict for each seed.
        left_out: prompts that lack one.
        wins, ties, losses: over documents and seeds.
        score: the winning score less 1, (wins - losses) / (documents x seeds).
        length_controlled: the same where answers are equally long.
        by_category: winning scores of the prompts of each category, if they have any.
    """

    of: str
    arm: str
    documents: int
    left_out: int
    wins: int
    ties: int
    losses: int
    score: Difference
    length_controlled: Difference
    by_category: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Judging:
    """All that a judge has said.

    Attributes:
        judge: its name.
        seeds: of the runs.
        arms: one after the other, set by set.
        notes: what there is to know of its verdicts, in sentences.
        settings: of the judge, its prompt among them.
    """

    judge: str
    seeds: list[int]
    arms: list[JudgedArm]
    notes: list[str]
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Keep it in the folder of a comparison."""
        write_json(folder / FILE, dataclasses.asdict(self))

    @classmethod
    def load(cls, folder: Path, seeds: list[int]) -> Judging | None:
        """What was kept, if it is of these seeds."""
        path = folder / FILE
        kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if kept.get("seeds") != seeds:
            return None
        known = ("score", "length_controlled")
        arms = [JudgedArm(**{**arm, **{key: Difference(**arm[key]) for key in known}}) for arm in kept["arms"]]
        return cls(kept["judge"], seeds, arms, kept["notes"], kept["settings"])


def read_judge(given: Any) -> OpenAIJudge | RewardModel | None:
    """The judge that a recipe describes: `model` and what else `OpenAIJudge` takes, or `reward_model`.

    Raises:
        UserError: for a key that there is not, and for values that cannot be.

    >>> read_judge({"model": "local", "base_url": "http://localhost:8000/v1"}).name
    'local'
    """
    if not given:
        return None
    if not isinstance(given, Mapping) or ("model" in given) == ("reward_model" in given):
        raise UserError(f"judge wants a mapping with model, of a server, or with reward_model, got {given!r}.")
    keys = ["reward_model", *_REWARD] if "reward_model" in given else _OPENAI
    if "api_key" in given:
        raise UserError("judge: an api_key does not belong in a recipe: set OPENAI_API_KEY in the environment.")
    if unknown := [key for key in given if key not in keys]:
        raise UserError(f"judge: there is no key {unknown[0]!r}. Known are {', '.join(keys)}.")
    if "reward_model" in given:
        return RewardModel(given["reward_model"], **{key: value for key, value in given.items() if key in _REWARD})
    return OpenAIJudge(**given)


def judged_sets(measures: Measures) -> list[str]:
    """Of which sets the answers are judged: those of prompts, or else of held-out rows.

    Raises:
        UserError: where models are to answer nothing.
    """
    if measures.prompts:
        return list(measures.prompts)
    if not measures.answers:
        raise UserError(
            "A judge wants answers: name prompts in the recipe, or say how many held-out rows are answered with "
            "answers: 100."
        )
    return [MAIN, *measures.held_out_sets]


def answer_pairs(comparison: Comparison, seeds: Sequence[int]) -> dict[str, pd.DataFrame]:
    """Each arm's answers beside those of random rows, by the set of prompts that they answer.

    Args:
        seeds: with which all arms have ended.

    Raises:
        UserError: where a run has no answers.
    """
    return {name: _pairs(comparison, seeds, name) for name in judged_sets(comparison.measures)}


def questions(comparison: Comparison, pairs: Mapping[str, pd.DataFrame], judge: Judge, again: bool = False) -> Count:
    """What `judged` will still ask."""
    counts = [count_questions(of_set, judge, comparison.folder, again) for of_set in pairs.values()]
    return Count(*(sum(getattr(count, field.name) for count in counts) for field in dataclasses.fields(Count)))


def judged(
    comparison: Comparison,
    seeds: Sequence[int],
    pairs: Mapping[str, pd.DataFrame],
    judge: Judge,
    progress: Callable[[int, int], Any] | None = None,
    again: bool = False,
) -> Judging:
    """What a judge says of all arms: asked for what it was not asked before.

    Args:
        seeds: with which all arms have ended.
        pairs: of their answers, as of `answer_pairs`.
        progress: is called with how many questions of a set were asked, and how many there are.
        again: whether what it said badly before is asked again.

    Raises:
        UserError: what the judge raises.
    """
    arms, notes, others = [], [], len(comparison.arms) - 1
    for name, of_set in pairs.items():
        categories = _categories(comparison, name)
        found = judge_pairs(of_set, judge, comparison.folder, name, progress, again)
        for arm, lines in found.frame.groupby("arm", sort=False):
            documents = judged_documents(lines)
            values = documents.values
            if values.shape[1] < 2:
                notes.append(f"Of {arm}'s answers to {name} fewer than 2 have a verdict with each seed.")
                continue
            arms.append(
                JudgedArm(
                    name,
                    str(arm),
                    values.shape[1],
                    documents.left_out,
                    documents.wins,
                    int((values == 0).sum()),
                    documents.losses,
                    documents.difference(others),
                    documents.length_controlled(others),
                    _by_category(lines, categories),
                )
            )
        notes += _notes(name, found)
    settings = getattr(judge, "settings", dict)()
    return Judging(judge.name, list(seeds), arms, notes, settings)


def _by_category(lines: pd.DataFrame, categories: pd.Series) -> dict[str, float]:
    values = lines.dropna(subset="value").assign(category=lambda frame: frame["document"].map(categories))
    return {str(category): winning_score(each["value"]) for category, each in values.groupby("category")}


def _categories(comparison: Comparison, name: str) -> pd.Series:
    """Of each document, its category."""
    answers = pd.read_parquet(answers_path(comparison.tasks()[0].folder, name), columns=["document", "category"])
    return answers.set_index("document")["category"]


def _notes(name: str, found: Any) -> list[str]:
    notes = []
    if found.reasons:
        bad = ", ".join(f"{reason}: {count:,}" for reason, count in found.reasons.items())
        count = sum(found.reasons.values())
        notes.append(f"{name}: {count:,} of the judge's answers {_are(count)} no verdict ({bad}).")
    frame = found.frame
    if frame["contradicts"].any():
        share = frame["contradicts"].sum() / max(frame["value"].notna().sum(), 1)
        notes.append(f"{name}: of {share:.0%} of the pairs the judge preferred another answer in the other order.")
    if found.count.same:
        notes.append(
            f"{name}: {many(found.count.same, 'pair')} of answers {_are(found.count.same)} the same text, ties."
        )
    if found.cut:
        notes.append(f"{name}: {many(found.cut, 'answer')} {_are(found.cut)} longer than the reward model reads.")
    if len(found.by) > 1:
        notes.append(f"{name}: verdicts are of {', '.join(f'{by} ({count:,})' for by, count in found.by.items())}.")
    return notes


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def _pairs(comparison: Comparison, seeds: Sequence[int], name: str) -> pd.DataFrame:
    answers = {}
    for task in comparison.tasks():
        if task.seed not in seeds:
            continue
        path = answers_path(Path(task.folder), name)
        if not path.exists():
            raise NotFoundError(f"{task.name} has no answers to {name}: {path} is not there.")
        frame = pd.read_parquet(path)
        # The judge reads what is asked, without the words that a format puts around it.
        answers[task.arm.name, task.seed] = frame[frame["answer"].notna()].assign(prompt=frame["question"])
    if not any(arm == BASELINE for arm, _ in answers):
        raise NotFoundError(f"No run of {BASELINE} rows has ended, against which the others are judged.")
    return paired_answers(answers)
