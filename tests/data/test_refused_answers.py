"""Answers that refuse, and answers that only sound like it."""

from __future__ import annotations

import sys

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ifd_trainer.data.refused_answers import OPENINGS, SELF_REFERENCES, looks_like_refusal, may_refuse


@pytest.mark.parametrize(
    "answer",
    [
        "As an AI language model, I do not have personal opinions.",
        "Well. AS AN AI LANGUAGE MODEL I cannot eat.",
        "I'm sorry, but I can't help with that request.",
        "I’m sorry, but I can’t help with that request.",
        "  I am\n unable   to browse the internet.",
        "Sorry, but I cannot do this.",
        "Unfortunately, as a large language model I have no body.",
        "<nooutput> - there is no picture.",
    ],
)
def test_refusals_are_told(answer):
    assert looks_like_refusal(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "Paris.",
        "I'm sorry for your loss.",
        "She wrote: I'm sorry, but I cannot come.",  # an opening further on is part of a story
        "As an AI researcher, I recommend more data.",
        "A GPT-3 language model is able to write.",
        "I was unable to sleep.",
        "Was an AI language model ever asked?",  # only at the edge of a word
        "I cannot assistant-proof this.",
    ],
)
def test_other_answers_are_not(answer):
    assert not looks_like_refusal(answer)


def test_every_phrase_is_reached_and_written_as_it_is_compared():
    for phrase in (*SELF_REFERENCES, *OPENINGS):
        assert phrase == " ".join(phrase.casefold().split())
        assert looks_like_refusal(phrase.upper())
        assert looks_like_refusal(phrase.replace("'", "’") + " ...")


@given(st.text(max_size=40), st.sampled_from(SELF_REFERENCES), st.text(max_size=40))
def test_a_self_reference_is_found_anywhere_as_whole_words(before, phrase, after):
    assert looks_like_refusal(f"{before} {phrase} {after}")
    assert not looks_like_refusal(f"x{phrase}") or phrase.startswith("<")


@given(st.text(max_size=200))
def test_any_text_is_taken(text):
    assert looks_like_refusal(text) == looks_like_refusal(f"\n{text} ")


SPACES = "".join(c for c in map(chr, range(sys.maxunicode + 1)) if c.isspace())
# Characters that one can write for those of a phrase, so that the comparison sees no difference.
ALIKE = {" ": SPACES, "'": "'‘’ʼ＇`´′", "s": "sSſ", "k": "kK\N{KELVIN SIGN}"}


@st.composite
def disguised(draw):
    """A phrase as it may be written, within other text."""
    phrase = draw(st.sampled_from(SELF_REFERENCES + OPENINGS))
    letters = [draw(st.sampled_from(ALIKE.get(c, c + c.upper()))) for c in phrase]
    return draw(st.sampled_from(["", " ", "Oh. "])) + "".join(letters) + draw(st.sampled_from(["", "!", "\n", "x"]))


@given(st.lists(st.none() | st.text(max_size=20) | disguised(), max_size=5))
def test_no_refusal_is_left_out_of_those_that_may_be_one(texts):
    found = may_refuse(pa.array(texts, pa.string()))
    for text, maybe in zip(texts, found, strict=True):
        assert maybe or text is None or not looks_like_refusal(text)


def test_ligatures_that_fold_to_letters_of_a_phrase_are_looked_at():
    text = "I cannot ful\N{LATIN SMALL LIGATURE FI}ll this."
    assert looks_like_refusal(text)
    assert may_refuse(pa.array([text, "Grüße aus Köln", "Paris", "東京"])).tolist() == [True, True, False, False]
