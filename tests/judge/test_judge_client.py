"""A judge behind a server, over the real protocol: what it is asked, and what becomes of each fault."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import socket
import sys
from dataclasses import asdict, replace

import pytest
from chat_server import SOON, ChatServer, Reply, completion, failure

from ifd_trainer.errors import JudgeError, NotInstalledError, UserError
from ifd_trainer.judge.client import GIVE_UP, PROMPT, OpenAIJudge, Secret
from ifd_trainer.judge.verdicts import Reason

KEY = "sk-secret-1234567890"


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")


def judge_of(server, **settings):
    return OpenAIJudge("tiny", server.url, **{"api_key": KEY, "timeout": 5, "retries": 2, **settings})


def asked(count=1):
    return [(f"question {number}", "first", "second") for number in range(count)]


def verdicts_of(reply, count=1, **settings):
    """Verdicts of a server with this reply, and the server."""
    with ChatServer(reply) as server:
        return judge_of(server, **settings)(asked(count)), server


def test_a_request_holds_both_answers_and_the_settings():
    options = {"temperature": None, "max_tokens": 7, "options": {"seed": 3}}
    (verdict,), server = verdicts_of(lambda *_: completion("8 7\nWhy."), **options)
    assert (verdict.first, verdict.second, verdict.text) == (8, 7, "8 7\nWhy.")
    assert verdict.by == f"tiny-2026 at {server.url[7:-3]}"
    (body,) = server.requests
    (message,) = body.pop("messages")
    assert body == {"model": "tiny", "max_tokens": 7, "seed": 3}
    assert message["content"] == PROMPT.format(question="question 0", first="first", second="second")
    assert server.keys == [f"Bearer {KEY}"]


def test_texts_are_put_in_as_they_are():
    question = ("{first} {0} \\1 {", "{second}", "}{question}")
    with ChatServer(lambda *_: completion("1 2")) as server:
        judge_of(server, prompt="{question}|{first}|{second}")([question])
    assert server.requests[0]["messages"][0]["content"] == "|".join(question)


def test_verdicts_stand_in_the_order_of_the_questions_and_are_told_as_they_come():
    def reply(body, number):
        which = int(body["messages"][0]["content"].partition("question ")[2].partition("\n")[0])
        return replace(completion(f"{which + 1} 1"), wait=0.02 * (which % 2))

    told = {}
    with ChatServer(reply) as server:
        found = judge_of(server)(asked(9), lambda number, verdict: told.update({number: verdict}))
    assert [verdict.first for verdict in found] == list(range(1, 10))
    assert [told[number] for number in range(9)] == found
    assert judge_of(server)([]) == []


@pytest.mark.parametrize("status", [408, 409, 429, 500, 503])
def test_a_fault_that_passes_is_waited_out(status):
    headers = {"Retry_After": "0.01"} if status == 429 else {}
    (verdict,), server = verdicts_of(lambda _, n: failure(status, **headers) if n < 2 else completion("5 6"))
    assert (verdict.first, verdict.second) == (5, 6)
    assert len(server.requests) == 3  # the first one is sent once alone, then as any other


@pytest.mark.parametrize(
    ("reply", "reason", "requests"),
    [
        (failure(429), Reason.RATE, 4),
        (failure(500), Reason.SERVER, 4),
        (failure(400, "maximum context length"), Reason.NOT_ACCEPTED, 2),
        (Reply(b'{"choices": [', 200, SOON), Reason.MALFORMED, 2),
        (Reply(b"<html>", 200, {"content-type": "text/html"}), Reason.MALFORMED, 2),
        (Reply([1, 2]), Reason.MALFORMED, 2),
        (Reply({"error": "in words"}), Reason.MALFORMED, 2),
        (completion("8 7", choices=[]), Reason.MALFORMED, 2),
        (completion("8 7", choices=None), Reason.MALFORMED, 2),
        (completion("8 7", choices=[{"index": 0}]), Reason.MALFORMED, 2),
        (completion("8 7", choices=[{"message": {"content": 5}}]), Reason.MALFORMED, 2),
    ],
)
def test_a_fault_that_stays_is_counted_and_not_kept(reply, reason, requests):
    (verdict,), server = verdicts_of(lambda *_: reply)
    assert (verdict.first, verdict.second, verdict.reason) == (None, None, reason)
    assert verdict.record() is None
    assert len(server.requests) == requests


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (completion("Both are good: 8 7"), Reason.NO_SCORES),
        (completion(""), Reason.EMPTY),
        (completion(None), Reason.EMPTY),
        (completion(None, refusal="I cannot help with that."), Reason.REFUSED),
        (completion("8 7", ended="content_filter"), Reason.REFUSED),
        (completion("I cannot help with that."), Reason.NO_SCORES),
        (completion("8 1", ended="length"), Reason.CUT),
        (failure(400, "filtered", code="content_filter"), Reason.REFUSED),
    ],
)
def test_what_is_said_badly_is_kept_with_its_reason(reply, reason):
    (verdict,), server = verdicts_of(lambda *_: reply)
    assert (verdict.first, verdict.reason) == (None, reason)
    assert judge_of(server).read(verdict.record()) == verdict
    assert len(server.requests) == 1


def test_a_server_that_does_not_answer_in_time():
    slow = replace(completion("8 7"), wait=5)
    found, server = verdicts_of(
        lambda body, _: slow if "question 1\n" in body["messages"][0]["content"] else completion("3 4"),
        count=3,
        timeout=1,
        retries=0,
    )
    assert [verdict.reason for verdict in found] == [None, Reason.TIMEOUT, None]
    assert found[1].record() is None
    assert len(server.requests) == 3


def test_no_server_is_told_at_once():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    judge = OpenAIJudge("tiny", f"http://127.0.0.1:{port}/v1", retries=1000)
    with pytest.raises(JudgeError, match=rf"No judge answers at http://127\.0\.0\.1:{port}/v1: .*refused.*Start its"):
        judge(asked(500))


def test_a_server_that_goes_away_ends_it_and_what_came_is_told():
    told = {}
    good = 4

    def reply(body, number):
        return completion("8 7") if number < good else failure(503, "overloaded")

    with (
        ChatServer(reply) as server,
        pytest.raises(JudgeError, match=f"no answer to {GIVE_UP} requests in a row.*over"),
    ):
        judge_of(server, retries=0, workers=2)(asked(500), lambda number, verdict: told.update({number: verdict}))
    assert sum(verdict.reason is None for verdict in told.values()) == good
    assert GIVE_UP + good <= len(server.requests) < 100


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (failure(401, f"Incorrect API key provided: {KEY[:6]}***{KEY[-4:]}"), r"refuses the key \(status 401\)"),
        (failure(403, KEY), r"refuses the key \(status 403\)"),
        (failure(404, f"no model tiny for {KEY}"), r"has no model tiny.*no model tiny for \*\*\*\. A base_url"),
        (failure(429, "You exceeded your quota.", code="insufficient_quota"), "exceeded your quota"),
    ],
)
def test_what_no_request_would_get_past_ends_it_at_once(reply, words):
    with ChatServer(lambda *_: reply) as server, pytest.raises(JudgeError, match=words) as caught:
        judge_of(server)(asked(100))
    assert len(server.requests) == 1
    assert KEY not in str(caught.value)
    assert KEY[-4:] not in str(caught.value)
    assert caught.value.__suppress_context__  # the client's error holds the server's words


def test_an_interrupt_keeps_what_is_on_its_way():
    told = []

    def said(number, verdict):
        told.append(number)
        if len(told) == 3:
            raise KeyboardInterrupt

    with ChatServer(lambda *_: replace(completion("8 7"), wait=0.05)) as server:
        with pytest.raises(KeyboardInterrupt):
            judge_of(server, workers=4)(asked(200), said)
        assert sorted(told) == list(range(len(server.requests)))
        assert len(told) < 100


def test_the_key_is_in_no_text_copy_or_file(caplog, monkeypatch, tmp_path):
    caplog.set_level(logging.DEBUG)
    with ChatServer(lambda *_: failure(400, f"Bad key {KEY}")) as server:
        judge = judge_of(server, retries=0)
        (verdict,) = judge(asked())
        server.reply = lambda *_: completion(f"8 7\nYour key is {KEY}.")
        (said,) = judge(asked())
    assert verdict.text == "Bad key ***"
    assert said.text == "8 7\nYour key is ***."
    for text in (repr(judge), str(judge.settings()), str(asdict(judge)), json.dumps(asdict(judge), default=str)):
        assert KEY not in text
    assert KEY not in caplog.text
    with pytest.raises(TypeError, match="not pickled"):
        pickle.dumps(judge)
    assert copy.deepcopy(judge).api_key.reveal() == replace(judge, workers=1).api_key.reveal() == KEY
    assert copy.copy(Secret("x")).reveal() == "x"


def test_where_the_key_and_the_address_come_from(monkeypatch):
    with ChatServer(lambda *_: completion("8 7")) as server:
        OpenAIJudge("tiny", server.url)(asked())
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\n")
        judge = OpenAIJudge("tiny")
        judge(asked())
        assert judge.address == server.url
        OpenAIJudge("tiny", api_key="other")(asked())
    assert server.keys == ["Bearer no-key", f"Bearer {KEY}", "Bearer other"]


def test_openai_wants_a_key():
    assert OpenAIJudge("gpt-4o").address == "https://api.openai.com/v1"
    with pytest.raises(UserError, match="set OPENAI_API_KEY"):
        OpenAIJudge("gpt-4o")(asked())


def test_the_package_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(NotInstalledError, match=r"pip install 'ifd_trainer\[judge\]'"):
        OpenAIJudge("tiny", "http://localhost:1/v1")(asked())


def test_a_digest_is_of_all_that_a_verdict_depends_on():
    judge = OpenAIJudge("tiny", "http://localhost:8000/v1", api_key=KEY)
    question, other = ("q", "a", "b"), {"prompt": PROMPT + "\n", "options": {"seed": 1}}
    same = [judge, replace(judge, base_url=None, api_key=None, workers=1, timeout=1.0, retries=0)]
    others = [replace(judge, **{name: value}) for name, value in other.items()]
    others += [replace(judge, model="m"), replace(judge, temperature=0.5), replace(judge, max_tokens=None)]
    keys = [each.key(question) for each in (*others, judge)] + [judge.key(("q", "b", "a"))]
    assert len(set(keys)) == len(keys)
    assert len({each.key(question) for each in same}) == 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model": ""}, "name of a model"),
        ({"workers": 0}, "workers .* at least 1"),
        ({"retries": -1}, "retries .* at least 0"),
        ({"timeout": 0}, "above 0"),
        ({"prompt": "{first} {question}"}, r"lacks \{second\}"),
        ({"base_url": "localhost:8000"}, "wants an address as http"),
        ({"base_url": "https://me:word@host/v1"}, "alone; a key belongs"),
        ({"base_url": "https://host/v1?key=word"}, "alone; a key belongs"),
        ({"api_key": "sk-ü"}, "no HTTP header"),
        ({"api_key": " "}, "is empty"),
    ],
)
def test_settings_that_cannot_be(settings, words):
    with pytest.raises(UserError, match=words) as caught:
        OpenAIJudge(**{"model": "tiny", **settings})
    assert "word" not in str(caught.value)
