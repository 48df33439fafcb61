"""How far texts agree: F1 of words against SQuAD's measure written out here and numbers worked out by hand."""

from __future__ import annotations

import math
import re
import string
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ifd_trainer.errors import NotInstalledError, UserError
from ifd_trainer.method.text_agreement import AGREEMENTS, as_agreement, exact_match, rouge_l, token_f1

PRINTABLE = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=30)
WORDS = st.lists(st.sampled_from(["the", "a", "Cat", "dog.", "don't", "3.5", "-5", "mat,", "(an)", "_"]), max_size=6)


def squad(answer: str, reference: str) -> float | None:
    """F1 as the task's page describes it: lower case, no punctuation, no articles, words between spaces."""
    lists = []
    for text in (answer, reference):
        text = "".join(sign for sign in text.lower() if sign not in string.punctuation)
        lists.append(re.sub(r"\b(a|an|the)\b", " ", text).split())
    if not all(lists):
        return None
    same = sum((Counter(lists[0]) & Counter(lists[1])).values())
    if same == 0:
        return 0.0
    precision, recall = same / len(lists[0]), same / len(lists[1])
    return 2 * precision * recall / (precision + recall)


@given(st.one_of(PRINTABLE, WORDS.map(" ".join)), st.one_of(PRINTABLE, WORDS.map(" ".join)))
def test_of_ascii_f1_is_squads(answer, reference):
    known = squad(answer, reference)
    expected = float(exact_match(answer, reference)) if known is None else known
    assert token_f1(answer, reference) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "reference", "f1"),
    [
        ("The cat sat on a mat.", "the cat slept", 2 * (1 / 4) * (1 / 2) / (3 / 4)),  # cat; of 4 words, and of 2
        ("cat cat cat", "cat", 0.5),  # one of three, all of one
        ("mat cat", "cat mat", 1.0),  # whatever the order
        ("don't", "don’t", 1.0),
        ("3.5", "3,5", 1.0),  # as SQuAD has it: both are 35
        ("我喜欢猫", "我喜欢狗。", 3 / 4),
        ("今日はGPTです", "今日はBERTです", 5 / 6),
        ("Москва — столица России.", "Столица России — Париж!", 2 / 3),
        ("हिन्दी भाषा।", "हिन्दी", 2 * 0.5 * 1 / 1.5),
        ("cafe\u0301", "CAF\u00c9", 1.0),
        ("STRASSE", "Straße", 1.0),
        ("👍 yes", "👍 no", 0.5),
        ("20 €", "20 $", 2 * 0.5 * 1 / 1.5),  # the dollar is punctuation of ASCII, the euro is not
        ("x—y", "x y", 1.0),
    ],
)
def test_f1_of_words_worked_out_by_hand(answer, reference, f1):
    assert token_f1(answer, reference) == pytest.approx(f1)


@pytest.mark.parametrize(
    ("answer", "reference", "f1"),
    [
        ("A", "A.", 1),
        ("A", "B", 0),
        ("The answer is A", "A", 0),
        ("-", "+", 0),
        ("+", "+", 1),
        ("", "", 1),
        ("", "x", 0),
    ],
)
def test_texts_without_a_word_agree_where_they_are_the_same(answer, reference, f1):
    assert token_f1(answer, reference) == f1


@given(st.text(max_size=30), st.text(max_size=30))
def test_a_share_that_does_not_change_when_texts_change_places(one, other):
    for agreement in AGREEMENTS.values():
        assert 0 <= agreement(one, other) <= 1
        assert agreement(one, other) == pytest.approx(float(agreement(other, one)))


def test_the_names_stand_for_the_functions():
    assert list(AGREEMENTS.values()) == [token_f1, exact_match, rouge_l]
    assert as_agreement("f1")("the cat", "a cat sat") == pytest.approx(2 / 3)
    assert as_agreement("rouge_l")("mat cat the", "the cat mat") == pytest.approx(1 / 3)
    assert as_agreement(lambda answer, reference: len(answer) > len(reference))("long", "no") == 1.0


@pytest.mark.parametrize("value", [1.1, -0.1, math.nan, None, "much"])
def test_a_function_whose_values_are_no_shares_is_told(value):
    with pytest.raises(UserError, match=r"An agreement is a number between 0 and 1; .* returned "):
        as_agreement(lambda answer, reference: value)("a", "b")


@pytest.mark.parametrize("wrong", ["bleu", None, 0.5])
def test_what_is_no_agreement_is_told(wrong):
    with pytest.raises(UserError, match="agreement must be one of f1, exact, rouge_l, or a callable"):
        as_agreement(wrong)


@pytest.mark.parametrize(("agreement", "package"), [(token_f1, "regex"), (rouge_l, "regex"), (rouge_l, "rouge_score")])
def test_a_package_that_lacks_is_named(monkeypatch, agreement, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None if package == "rouge_score" else pytest)
    if package == "regex":
        monkeypatch.delitem(sys.modules, "rouge_score.rouge_scorer")
    with pytest.raises(NotInstalledError, match=f"the package {package}, which is not installed"):
        agreement("a cat", "a dog")
