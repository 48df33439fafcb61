"""Exact match and ROUGE-L against numbers worked out by hand, in several scripts."""

from __future__ import annotations

import sys

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenize import tokenize

from ifd_trainer.errors import NotInstalledError
from ifd_trainer.evaluation.agreement import agreement
from ifd_trainer.method.text_agreement import exact_match, normalised, word_splitter

ASCII = st.text(st.characters(max_codepoint=127), max_size=40)


def frame(*pairs: tuple[str, str], status: str = "ok") -> pd.DataFrame:
    answers, references = zip(*pairs, strict=True)
    documents = list(map(str, range(len(pairs))))
    return pd.DataFrame({"document": documents, "reference": references, "answer": answers, "status": status})


def values(answers: pd.DataFrame, measure: str) -> list[float]:
    found = agreement(answers)
    return found[found.measure == measure].value.tolist()


@pytest.mark.parametrize(
    ("answer", "reference", "rouge"),
    [
        ("the cat sat on the mat", "the cat is on a mat", 2 * (4 / 6) * (4 / 6) / (8 / 6)),  # the cat on mat
        ("mat cat the", "the cat mat", 1 / 3),  # one of them in its place
        ("a b c d", "b d", 2 * 0.5 * 1 / 1.5),
        ("", "the cat", 0.0),
        ("我喜欢猫", "我喜欢狗", 3 / 4),  # 3 of 4 characters
        ("Москва — столица России.", "Столица России — Москва!", 2 / 3),
        ("ПРИВЕТ", "привет", 1.0),
        ("हिन्दी भाषा", "हिन्दी", 2 * 0.5 * 1 / 1.5),
        ("今日はGPTです", "今日はBERTです", 5 / 6),
        ("cafe\u0301", "caf\u00e9", 1.0),
    ],
)
def test_rouge_l_is_that_of_the_longest_common_subsequence(answer, reference, rouge):
    assert values(frame((answer, reference)), "ROUGE-L") == pytest.approx([rouge])


@given(ASCII, ASCII)
def test_of_ascii_it_is_that_of_the_package_itself(answer, reference):
    assert word_splitter()(answer) == tokenize(answer, None)
    found = values(frame((answer, reference)), "ROUGE-L")
    known = RougeScorer(["rougeL"]).score(reference, answer)["rougeL"].fmeasure
    assert found == ([known] if tokenize(reference, None) else [])


@given(st.text(max_size=30))
def test_a_text_agrees_with_itself(text):
    assert exact_match(text, text)
    assert all(value == pytest.approx(1) for value in agreement(frame((text, text))).value)


@given(st.text(max_size=30))
def test_to_normalise_again_changes_nothing(text):
    assert normalised(normalised(text)) == normalised(text)


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("Paris.", "paris"),
        (" \n“Paris” ", "Paris"),
        ('"Yes."', "Yes"),
        ("Ｐａｒｉｓ！", "Paris"),
        ("北京。", "北京"),
        ("two  words", "two\nwords"),
        ("STRASSE", "Straße"),
        ("Да!", "да"),
    ],
)
def test_what_does_not_count_in_an_exact_match(answer, reference):
    assert exact_match(answer, reference)


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("-5", "5"),
        ("5%", "5"),
        ("C++", "C"),
        ("(0, 1]", "[0, 1)"),
        ("the cat", "cat"),
        ("...", "!"),
        ("", "."),
        ("1.5", "15"),
        ("'tis", "tis'"),
    ],
)
def test_what_does(answer, reference):
    assert not exact_match(answer, reference)


def test_the_long_form_has_a_line_for_each_document_and_measure():
    found = agreement(frame(("Paris", "Paris."), ("Rome", "Paris")), "test rows", groups=["a", None])
    assert found.to_dict("list") == {
        "set": ["test rows"] * 4,
        "measure": ["exact match"] * 2 + ["ROUGE-L"] * 2,
        "document": ["0", "1"] * 2,
        "value": [1.0, 0.0] * 2,
        "higher": [True] * 4,
        "group": ["a", None] * 2,
    }


def test_rows_without_an_answer_are_left_out_and_those_without_a_word_of_rouge():
    answers = pd.concat([frame(("Paris", "Paris"), ("👍", "👍")), frame((None, "Rome"), status="prompt_too_long")])
    answers["document"] = ["0", "1", "2"]
    found = agreement(answers)
    assert found[["measure", "document", "value"]].values.tolist() == [
        ["exact match", "0", 1.0],
        ["exact match", "1", 1.0],
        ["ROUGE-L", "0", 1.0],
    ]


def test_of_no_answers_there_is_nothing_to_say():
    found = agreement(frame((None, "Rome"), status="prompt_too_long"))
    assert (len(found), list(found.columns)) == (0, ["set", "measure", "document", "value", "higher", "group"])


@pytest.mark.parametrize("package", ["rouge_score", "regex"])
def test_without_the_package_an_error_says_how_to_get_it(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(NotInstalledError, match=r"pip install 'ifd_trainer\[compare\]'"):
        agreement(frame(("a", "b")))
