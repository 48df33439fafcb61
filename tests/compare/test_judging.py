"""Answers of a comparison's runs and a judge of them: pairs, counts, the page, and what a rerun asks."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import pandas as pd
import pytest
from datasets import Dataset
from test_comparison_page import made_up, table_of

from ifd_trainer.cli import main
from ifd_trainer.compare.comparison import FILE, Comparison
from ifd_trainer.compare.judging import Judging, answer_pairs, judged, judged_sets, questions, read_judge
from ifd_trainer.data.formats import ALPACA, MESSAGES, PROMPT_COMPLETION
from ifd_trainer.errors import UserError
from ifd_trainer.evaluation.at_end import answers_path
from ifd_trainer.evaluation.held_out_sets import HeldOutSet, asking, read_prompts
from ifd_trainer.evaluation.measures import MAIN, Measures
from ifd_trainer.judge.scores import Judgement, paired
from ifd_trainer.judge.verdicts import Verdict, read_verdict

PROMPTS = 12


@dataclass
class Longer:
    """A judge that gives one point for each letter, up to 10."""

    asked: list = field(default_factory=list)
    name: str = "the longer one"

    def questions(self, prompt: str, own: str, other: str) -> list[tuple[str, str, str]]:
        return [(prompt, own, other), (prompt, other, own)]

    def key(self, question: tuple[str, str, str]) -> str:
        return repr(question)

    def read(self, record: dict) -> Verdict:
        return Verdict.from_record(record)

    def compare(self, said: list[Verdict]):
        (a, b), (c, d) = ((verdict.first, verdict.second) for verdict in said)
        return paired([(a, b), (d, c)])

    def __call__(self, asked, said=None):
        self.asked += asked
        found = [read_verdict(f"{min(len(a), 10)} {min(len(b), 10)}", by="rule") for _, a, b in asked]
        for number, verdict in enumerate(found):
            said(number, verdict)
        return found


@pytest.fixture
def comparison(tmp_path) -> Comparison:
    """Runs that have answered prompts: "better" in long answers, "alike" as random rows do."""
    folder = made_up(
        tmp_path / "mine", arms={"random": (0.0, [{0}, {1}]), "better": (-0.5, [{2}, {3}]), "alike": (0.0, [{4}, {5}])}
    )
    record = json.loads((folder / FILE).read_text())
    (folder / FILE).write_text(json.dumps(record | {"measures": {"prompts": {"asked": "asked.jsonl"}}}))
    made = Comparison.load(folder)
    for task in made.tasks():
        answers = [f"{'long answer' if task.arm.name == 'better' and n < 9 else 'short'}" for n in range(PROMPTS)]
        answers[0] = "ab" if task.arm.name == "alike" else answers[0]
        frame = pd.DataFrame(
            {
                "document": map(str, range(PROMPTS)),
                "question": "?",
                "prompt": "Q: ? A:",
                "answer": answers,
                "group": None,
            }
        )
        frame["category"] = ["odd" if n % 2 else "even" for n in range(PROMPTS)]
        frame.to_parquet(answers_path(task.folder, "asked"))
    return made


def test_verdicts_are_counted_by_arm_and_asked_for_once(comparison):
    judge = Longer()
    pairs = answer_pairs(comparison, [0, 1])
    count = questions(comparison, pairs, judge)
    # "short" against "long answer" and "ab", each in two orders: the same texts are asked about once.
    assert (count.asked, count.known, count.same) == (4, 0, 2 * (3 + 11))
    found = judged(comparison, [0, 1], pairs, judge)
    assert len(judge.asked) == 4
    by_arm = {arm.arm: arm for arm in found.arms}
    better, alike = by_arm["better"], by_arm["alike"]
    assert (better.documents, better.wins, better.ties, better.losses) == (PROMPTS, 18, 6, 0)
    assert better.score.mean == pytest.approx(18 / 24)
    assert better.by_category == {"even": 1 + 5 / 6, "odd": 1 + 4 / 6}
    assert (alike.wins, alike.ties, alike.losses) == (0, 22, 2)
    assert "28 pairs of answers are the same text" in " ".join(found.notes)
    assert questions(comparison, pairs, judge).asked == 0
    found.save(comparison.folder)
    assert Judging.load(comparison.folder, [0, 1]) == found
    assert Judging.load(comparison.folder, [0]) is None
    the_page_shows_it(comparison)


class Mumbling(Longer):
    """A judge that says nothing that can be read."""

    def compare(self, said: list[Verdict]):
        return Judgement(None, reasons=tuple(verdict.reason for verdict in said))

    def __call__(self, asked, said=None):
        found = [read_verdict("well", by="rule") for _ in asked]
        for number, verdict in enumerate(found):
            said(number, verdict)
        return found


def test_what_is_asked_again_is_counted_before(comparison):
    pairs = answer_pairs(comparison, [0, 1])
    judged(comparison, [0, 1], pairs, Mumbling())
    assert questions(comparison, pairs, Longer()).asked == 0
    assert questions(comparison, pairs, Longer(), again=True).asked == 4


def the_page_shows_it(comparison):
    assert main(["report", str(comparison.folder)]) == 0
    page = (comparison.folder / "compare.html").read_text(encoding="utf-8")
    table = table_of(page, "What a judge prefers")
    assert table[1][:4] == ["better", "asked", "12", "18, 6, 0"]
    assert table[1][4].startswith("1.750 ±")
    assert table_of(page, "Winning scores by category")[1:] == [
        ["even", "asked", "1.833", "0.833"],
        ["odd", "asked", "1.667", "1.000"],
    ]
    assert "the longer one was asked for two answers to each prompt" in page


def test_a_run_without_answers_is_named(comparison):
    answers_path(comparison.tasks()[0].folder, "asked").unlink()
    with pytest.raises(UserError, match="random, seed 0 has no answers to asked"):
        answer_pairs(comparison, [0, 1])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("gpt-4", "judge wants a mapping with model, of a server, or with reward_model, got 'gpt-4'"),
        ({"model": "a", "reward_model": "b"}, "judge wants a mapping with model, of a server, or with reward_model"),
        ({"model": "a", "api_key": "sk-1"}, "an api_key does not belong in a recipe: set OPENAI_API_KEY"),
        ({"model": "a", "url": "http://x"}, "there is no key 'url'. Known are model, base_url"),
    ],
)
def test_a_judge_that_cannot_be_is_refused(given, message):
    with pytest.raises(UserError, match=message):
        read_judge(given)


def test_answers_of_held_out_rows_are_judged_where_there_are_no_prompts():
    assert judged_sets(Measures({"code": "code.jsonl"}, answers=5)) == [MAIN, "code"]
    assert judged_sets(Measures(prompts={"asked": "asked.jsonl"}, answers=5)) == ["asked"]
    with pytest.raises(UserError, match="A judge wants answers: name prompts in the recipe"):
        judged_sets(Measures())


def test_prompts_are_rows_of_the_recipes_format(tmp_path):
    text = '{"text": "2 + 2?", "category": "sums"}\n{"text": "Hi", "category": "talk"}\n'
    (tmp_path / "asked.jsonl").write_text(text)
    own = HeldOutSet(MAIN, Dataset.from_dict({"instruction": ["?"], "output": ["!"]}), ALPACA)
    measures = Measures(prompts={"asked": {"path": "asked.jsonl", "category_column": "category"}})
    (found,) = read_prompts(own, measures, tmp_path)
    assert found.rows["instruction"][:] == ["2 + 2?", "Hi"]
    assert found.rows["category"][:] == ["sums", "talk"]
    assert "### Instruction:\n2 + 2?\n" in ALPACA.render(found.rows[0]).prompt
    chats = HeldOutSet(MAIN, Dataset.from_dict({"messages": [[]]}), MESSAGES)
    assert asking("Hi", chats)["messages"][0] == {"role": "user", "content": "Hi"}
    pairs = Dataset.from_list([{"prompt": [{"role": "user", "content": "?"}], "completion": []}])
    assert asking("Hi", HeldOutSet(MAIN, pairs, PROMPT_COMPLETION))["prompt"] == [{"role": "user", "content": "Hi"}]
    texts = Dataset.from_dict({"prompt": ["Q: ?"], "completion": ["!"]})
    assert asking("Hi", HeldOutSet(MAIN, texts, PROMPT_COMPLETION))["prompt"] == "Hi"
    (tmp_path / "asked.jsonl").write_text('{"turns": ["a", "b"]}\n')
    with pytest.raises(UserError, match="prompts: asked: no column of prompts is known; there are turns"):
        read_prompts(own, measures, tmp_path)
