"""Answers held against those of random rows: what is asked, what is kept, and the frame, over a server or by a rule."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from chat_server import ChatServer, completion, failure
from conftest import ROOT

from ifd_trainer.errors import UserError
from ifd_trainer.judge.client import OpenAIJudge
from ifd_trainer.judge.pairs import (
    FILE,
    MEASURE,
    NO_ANSWER,
    count_questions,
    documents_by_arm,
    judge_pairs,
    most_questions,
    paired_answers,
)
from ifd_trainer.judge.scores import judged_documents, length_controlled, winning_score

PLAIN = "{question}|{first}|{second}"


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")


def judge_of(server, **settings):
    return OpenAIJudge("tiny", server.url, **{"api_key": "k", "timeout": 5, "retries": 0, "prompt": PLAIN, **settings})


def by_number(body, number=0):
    """Scores an answer by the number in it; "?" is an answer that it has no scores for."""
    _, first, second = body["messages"][0]["content"].split("|")
    scores = [re.search(r"\d+", text) for text in (first, second)]
    return completion(" ".join(score[0] for score in scores) if all(scores) else "Neither.")


def answers_of(own, other, seeds=1):
    """Two arms whose answers hold these numbers."""
    documents = [str(number) for number in range(len(own))]

    def frame(numbers):
        texts = [f"answer {number}" for number in numbers]
        questions = [f"question {document}" for document in documents]
        columns = {"document": documents, "prompt": questions, "answer": texts, "cut": False}
        return pd.DataFrame(columns | {"group": [f"kind {int(document) % 2}" for document in documents]})

    return {(arm, seed): frame(n) for arm, n in (("random", other), ("static", own)) for seed in range(seeds)}


def test_answers_stand_beside_those_of_random_rows_with_the_same_seed():
    answers = answers_of([1, 2], [3, 4], seeds=2)
    answers["random", 1] = answers["random", 1].assign(answer=["answer 5", "answer 6"]).iloc[::-1]
    pairs = paired_answers(answers)
    assert pairs[["arm", "seed", "document", "own", "other"]].values.tolist() == [
        ["static", 0, "0", "answer 1", "answer 3"],
        ["static", 0, "1", "answer 2", "answer 4"],
        ["static", 1, "0", "answer 1", "answer 5"],
        ["static", 1, "1", "answer 2", "answer 6"],
    ]
    assert pairs["group"].tolist() == ["kind 0", "kind 1"] * 2


def test_answers_to_other_documents_are_no_pair():
    answers = answers_of([1, 2], [3, 4])
    with pytest.raises(UserError, match="static with seed 0 have none of random"):
        paired_answers({("static", 0): answers["static", 0]})
    with pytest.raises(UserError, match="seed 0, have answered other documents"):
        paired_answers(answers | {("random", 0): answers["random", 0].iloc[:1]})
    with pytest.raises(UserError, match="other documents"):
        paired_answers(answers | {("random", 0): answers["random", 0].assign(prompt="other")})


def test_verdicts_become_a_frame(tmp_path):
    pairs = paired_answers(answers_of([8, 5, 3, 7, "?"], [6, 5, 9, 7, 2]))
    with ChatServer(by_number) as server:
        judged = judge_pairs(pairs, judge_of(server), tmp_path, "vicuna")
    frame = judged.frame
    assert frame["value"].tolist()[:4] == [1, 0, -1, 0]
    assert np.isnan(frame["value"].iloc[4])
    assert frame["own_score"].tolist()[0] == 8
    assert frame["other_score"].tolist()[2] == 9
    assert set(frame["set"]) == {"vicuna"}
    assert set(frame["measure"]) == {MEASURE} == {"judged against random"}
    assert frame["higher"].all()
    assert not frame["contradicts"].any()
    assert frame["group"].tolist() == ["kind 0", "kind 1"] * 2 + ["kind 0"]
    assert frame["own_length"].tolist() == [8] * 5
    assert winning_score(frame["value"]) == 1
    # Equal answers, of documents 1 and 3, were not asked about.
    assert (judged.count.asked, judged.count.known, judged.count.same) == (6, 0, 2)
    assert len(server.requests) == 6
    assert judged.reasons == {"no scores alone on the first line": 2}
    assert judged.by == {f"tiny-2026 at {server.url[7:-3]}": 4}


def test_documents_without_an_answer_have_no_verdict(tmp_path):
    answers = answers_of([1, 2, 3], [3, 2, 5])
    answers["static", 0] = answers["static", 0].drop(columns="group").assign(answer=["answer 1", None, None])
    answers["random", 0] = answers["random", 0].assign(answer=["answer 3", "answer 2", None])
    with ChatServer(by_number) as server:
        judged = judge_pairs(paired_answers(answers), judge_of(server), tmp_path)
    assert judged.frame["value"].isna().tolist() == [False, True, True]
    assert judged.frame["group"].isna().all()
    assert judged.reasons == {NO_ANSWER: 2}
    assert (judged.count.asked, judged.count.same, len(server.requests)) == (2, 0, 2)


def test_documents_by_arm_are_held_against_zeros(tmp_path):
    answers = answers_of([8, 5, 3, "?"], [6, 9, 2, 2], seeds=2)
    answers["other", 1] = answers["other", 0] = answers["static", 0].assign(answer="answer 1")
    with ChatServer(by_number) as server:
        documents = documents_by_arm(judge_pairs(paired_answers(answers), judge_of(server), tmp_path, "v").frame)
    assert {arm: len(frames) for arm, frames in documents.items()} == {"random": 2, "static": 2, "other": 2}
    for arm, values in (("random", [0, 0, 0, 0]), ("static", [1, -1, 1, float("nan")]), ("other", [-1, -1, -1, -1])):
        for frame in documents[arm]:
            assert frame.columns.tolist() == ["set", "measure", "document", "value", "higher", "group"]
            assert frame["document"].tolist() == ["0", "1", "2", "3"]
            assert frame["value"].tolist() == pytest.approx(values, nan_ok=True)


def test_a_judge_that_likes_the_first_answer_ties_all(tmp_path):
    with ChatServer(lambda *_: completion("9 1")) as server:
        judged = judge_pairs(paired_answers(answers_of([1, 2], [3, 4])), judge_of(server), tmp_path)
    assert judged.frame["value"].tolist() == [0, 0]
    assert judged.frame["contradicts"].all()
    assert judged.frame["own_score"].tolist() == [5, 5]


def test_a_rerun_sends_nothing_and_says_the_same(tmp_path):
    pairs = paired_answers(answers_of([8, "?", 3], [6, 5, 9], seeds=2))
    with ChatServer(by_number) as server:
        judge = judge_of(server)
        assert count_questions(pairs, judge, tmp_path).asked == 6 <= most_questions(documents=3, seeds=2, arms=1) == 12
        assert not server.requests
        first = judge_pairs(pairs, judge, tmp_path)
        assert len(server.requests) == 6  # both seeds have the same answers
        again = judge_pairs(pairs, judge, tmp_path)
        assert len(server.requests) == 6
        pd.testing.assert_frame_equal(again.frame, first.frame)
        assert (again.reasons, again.by) == (first.reasons, first.by)
        assert (again.count.asked, again.count.known) == (0, 6)
        judge_pairs(pairs, judge, tmp_path, again=True)  # what was said badly
        assert len(server.requests) == 8
        judge_pairs(pairs, judge_of(server, temperature=1.0), tmp_path)
        assert len(server.requests) == 14
    assert "secret" not in (tmp_path / FILE).read_text()


def test_what_never_came_is_asked_again_and_alone(tmp_path):
    pairs = paired_answers(answers_of([8, 4, 3], [6, 5, 9]))

    def reply(body, number):
        return failure(503) if "|answer 5|" in body["messages"][0]["content"] else by_number(body)

    with ChatServer(reply) as server:
        judged = judge_pairs(pairs, judge_of(server), tmp_path)
        assert judged.frame["value"].isna().tolist() == [False, True, False]
        assert judged.reasons == {"server error": 1}
    with ChatServer(by_number) as server:
        progress = []
        again = judge_pairs(pairs, judge_of(server), tmp_path, progress=lambda *done: progress.append(done))
        assert [body["messages"][0]["content"] for body in server.requests] == ["question 1|answer 5|answer 4"]
    assert again.frame["value"].tolist() == [1, -1, -1]
    assert progress == [(1, 1)]
    assert len(again.by) == 2  # two servers have a part in it


def test_a_kill_in_the_middle_costs_what_was_on_its_way(tmp_path):
    answers = answers_of(range(1, 9), [10] * 8)
    pairs = paired_answers(answers)
    pairs.to_json(tmp_path / "pairs.json", orient="records")
    script = f"""
import os, signal, pandas as pd
from pathlib import Path
from ifd_trainer.judge.pairs import judge_pairs
from ifd_trainer.judge.client import OpenAIJudge
pairs = pd.read_json({str(tmp_path / "pairs.json")!r}, orient="records", dtype={{"document": str}})
judge = OpenAIJudge("tiny", os.environ["SERVER"], api_key="k", prompt={PLAIN!r}, workers=2)
kill = lambda done, left: done == 5 and os.kill(os.getpid(), signal.SIGKILL)
judge_pairs(pairs, judge, Path({str(tmp_path)!r}), progress=kill)
"""
    with ChatServer(by_number) as server:
        environment = os.environ | {"SERVER": server.url, "PYTHONPATH": str(ROOT)}
        assert subprocess.run([sys.executable, "-c", script], env=environment).returncode == -signal.SIGKILL
        kept = [json.loads(line)["record"]["text"] for line in (tmp_path / FILE).read_text().splitlines()]
        assert len(kept) == 5
        del server.requests[:]
        judged = judge_pairs(pairs, judge_of(server), tmp_path)
        assert len(server.requests) == 16 - 5
    assert judged.frame["value"].tolist() == [-1] * 8


def test_a_whole_test_set(tmp_path, shared):
    """Eighty real prompts, two seeds, a judge that likes long answers: all of it counted by hand."""
    lines = (shared / "data" / "vicuna_test_set.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]

    def frame(longer):
        return pd.DataFrame(
            {
                "document": [str(row["question_id"]) for row in rows],
                "prompt": [row["text"] for row in rows],
                "answer": ["word " * (20 + longer(row["question_id"])) for row in rows],
                "group": [row["category"] for row in rows],
            }
        )

    answers = {("random", seed): frame(lambda number: 0) for seed in (0, 1)}
    answers["static", 0] = frame(lambda number: 1 if number <= 40 else 0 if number <= 60 else -1)
    answers["static", 1] = frame(lambda number: 1 if number <= 20 else -1)

    def reply(body, number):
        question, first, second = body["messages"][0]["content"].split("|")
        assert question in questions
        assert body["temperature"] == 0
        return completion(f"{len(first) / 20:g} {len(second) / 20:g}\nBecause.")

    questions = {row["text"] for row in rows}
    pairs = paired_answers(answers)
    with ChatServer(reply) as server:
        judged = judge_pairs(pairs, judge_of(server), tmp_path, "vicuna")
    # Seed 0: 40 wins, 20 equal texts, 20 losses. Seed 1: 20 wins and 60 losses, of which the pairs of documents 1 to 20
    # (longer in both) and 61 to 80 (shorter in both) are those of seed 0. 60 + 40 pairs in two orders.
    assert (judged.count.asked, judged.count.same) == (200, 20)
    assert len(server.requests) == 200
    documents = judged_documents(judged.frame)
    assert (documents.wins, documents.losses, documents.values.shape) == (60, 80, (2, 80))
    assert documents.winning_score == 1 + (60 - 80) / 160
    assert documents.difference().mean == pytest.approx(-20 / 160)
    assert abs(length_controlled(documents.values, documents.longer, resamples=20).mean) < 0.05
    assert len(set(documents.groups)) == 9
