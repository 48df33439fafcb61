"""What a judge says is read strictly, and kept so that no kill takes it away."""

from __future__ import annotations

import json
import threading
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ifd_trainer.errors import FileAccessError
from ifd_trainer.judge.cache import Cache, content_key
from ifd_trainer.judge.verdicts import KEPT_TEXT, Reason, Verdict, read_verdict


@pytest.mark.parametrize(
    ("text", "scores"),
    [
        ("8 7", (8, 7)),
        ("8 7\nThe first one is fuller.", (8, 7)),
        ("\n\n 8.5   10 \r\n2 3", (8.5, 10)),
        ("1\t10.0", (1, 10)),
    ],
)
def test_two_scores_are_a_verdict(text, scores):
    verdict = read_verdict(text)
    assert (verdict.first, verdict.second) == scores
    assert verdict.reason is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", Reason.EMPTY),
        (" \n\t\n", Reason.EMPTY),
        ("I'm sorry, I cannot judge these.", Reason.NO_SCORES),
        ("I'm sorry.\n8 7", Reason.NO_SCORES),
        ("10/10 9/10", Reason.NO_SCORES),
        ("10/10", Reason.NO_SCORES),
        ("8, 7", Reason.NO_SCORES),
        ("8,7", Reason.NO_SCORES),
        ("**8 7**", Reason.NO_SCORES),
        ("Assistant 1: 8 Assistant 2: 7", Reason.NO_SCORES),
        ("nan 5", Reason.NO_SCORES),
        ("inf 5", Reason.NO_SCORES),
        ("1e1 5", Reason.NO_SCORES),
        ("８ ７", Reason.NO_SCORES),  # digits of another width
        ("8\u00a07", Reason.NO_SCORES),
        ("__import__('os').abort() 5", Reason.NO_SCORES),
        ("8 7" + " " * 3000 + "or the other way round", Reason.NO_SCORES),
        ("9" * 10**6, Reason.NO_SCORES),
        ("word " * 10**6, Reason.NO_SCORES),
        ("8", Reason.NOT_TWO),
        ("8 7 6", Reason.NOT_TWO),
        ("8\n7", Reason.NOT_TWO),
        ("0 5", Reason.RANGE),
        ("5 10.1", Reason.RANGE),
        ("-5 5", Reason.RANGE),
        ("+5 5", Reason.RANGE),
        ("08 07", Reason.RANGE),
    ],
)
def test_all_else_is_none_and_has_its_reason(text, reason):
    verdict = read_verdict(text)
    assert (verdict.first, verdict.second, verdict.reason) == (None, None, reason)
    assert len(verdict.text) <= KEPT_TEXT


def test_a_number_that_may_lack_a_digit_is_none():
    assert read_verdict("8 1", cut=True).reason is Reason.CUT  # "8 10" it may have been
    assert read_verdict("8 1\nThe fir", cut=True).second == 1
    assert read_verdict("8 7", refused=True).reason is Reason.REFUSED


@given(st.text(max_size=300) | st.text("0123456789. +-\n\t/,", max_size=12), st.booleans(), st.booleans())
def test_a_record_is_read_as_what_was_said(text, refused, cut):
    verdict = read_verdict(text, refused, cut, by="m at h")
    assert Verdict.from_record(json.loads(json.dumps(verdict.record()))) == verdict
    assert (verdict.reason is None) == (verdict.first is not None) == (verdict.second is not None)


@given(st.text("0123456789. +-", max_size=9))
def test_a_verdict_is_two_decimal_numbers_from_1_to_10(text):
    words = text.split(" ")
    words = [word for word in words if word]
    numbers = [f"{whole}{part}" for whole, part in product([str(n) for n in range(1, 11)], ["", ".0", ".5", ".25"])]
    verdict = read_verdict(text)
    if len(words) == 2 and all(word in numbers and float(word) <= 10 for word in words):
        assert (verdict.first, verdict.second) == tuple(map(float, words))
    if verdict.reason is None:
        assert len(words) == 2
        assert all(1 <= float(word) <= 10 and set(word) <= set("0123456789.") for word in words)


def test_what_never_came_is_not_kept():
    assert Verdict(reason=Reason.TIMEOUT).record() is None
    assert {reason for reason in Reason if Verdict(reason=reason).record() is not None} == {
        Reason.REFUSED,
        Reason.EMPTY,
        Reason.CUT,
        Reason.NO_SCORES,
        Reason.NOT_TWO,
        Reason.RANGE,
    }


def filled(path, count=3):
    cache = Cache(path)
    for number in range(count):
        cache.put(f"k{number}", {"text": f"{number} \ud800ü\n"})
    return cache


def test_a_file_cut_anywhere_keeps_all_lines_before_and_takes_new_ones(tmp_path):
    path = tmp_path / "said.jsonl"
    filled(path)
    whole = path.read_bytes()
    ends = [number + 1 for number, byte in enumerate(whole) if byte == ord("\n")]
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        lines = sum(end - 1 <= length for end in ends)  # the line's end may be missing
        assert len(Cache(path)) == lines
        Cache(path).put("new", {"text": "8 7"})
        again = Cache(path)
        assert len(again) == lines + 1
        assert again.get("new") == {"text": "8 7"}
        assert again.damaged == (length not in (0, *ends, *(end - 1 for end in ends)))


def test_damage_takes_its_line_alone(tmp_path):
    path = tmp_path / "deep" / "said.jsonl"
    filled(path)
    lines = path.read_bytes().split(b"\n")
    for bad in (b"\0" * 40, b"[" * 10**5, b'{"key": 1, "record": {}}', b'{"key": "k1"}', b"\xff\xfe", b"null"):
        path.write_bytes(b"\n".join([lines[0], bad, *lines[2:]]))
        cache = Cache(path)
        assert (len(cache), cache.damaged, cache.get("k1")) == (2, 1, None)
        assert cache.get("k2") == {"text": "2 \ud800ü\n"}


def test_the_later_of_two_lines_counts(tmp_path):
    cache = filled(tmp_path / "said.jsonl")
    cache.put("k1", {"text": "new"})
    assert Cache(tmp_path / "said.jsonl").get("k1") == cache.get("k1") == {"text": "new"}


def test_threads_and_other_caches_of_the_file_write_whole_lines(tmp_path):
    caches = [Cache(tmp_path / "said.jsonl") for _ in range(4)]

    def write(number):
        for each in range(20):
            caches[number % 4].put(f"{number} {each}", {"text": "x" * 500})

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cache = Cache(tmp_path / "said.jsonl")
    assert (len(cache), cache.damaged) == (160, 0)


def test_a_file_that_cannot_be_used_is_named(tmp_path):
    (tmp_path / "said.jsonl").mkdir()
    with pytest.raises(FileAccessError, match=r"said\.jsonl cannot be read"):
        Cache(tmp_path / "said.jsonl")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileAccessError, match="Cannot write"):
        Cache(tmp_path / "file" / "said.jsonl").put("k", {})


def test_a_key_tells_all_parts_apart():
    parts = [("m", "a", "b"), ("m", "ab", ""), ("m", "b", "a"), ("m", ["a"], "b"), ("m", 0, "b"), ("m", 0.5, "b")]
    assert len({content_key(*each) for each in parts}) == len(parts)
    assert content_key({"x": 1, "y": 2}) == content_key({"y": 2, "x": 1})
