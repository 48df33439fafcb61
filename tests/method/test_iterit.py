"""IterIT's choice against a loop that computes every weight anew, as its paper has it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.feature_extraction.text import TfidfVectorizer

from ifd_trainer import Cherry, IterIT
from ifd_trainer.errors import UserError
from ifd_trainer.method.iterit import new_terms

WORDS = ["red", "blue", "cat", "dog", "sum", "park", "ball", "a"]
answers = st.lists(
    st.lists(st.sampled_from(WORDS), min_size=1, max_size=8).map(" ".join), min_size=2, max_size=10, unique=True
)


def by_the_paper(score, texts, k, decay):
    """All weights anew at each step, dense."""
    weights = TfidfVectorizer(ngram_range=(1, 3), token_pattern=r"(?u)\b\w+\b").fit_transform(texts).toarray()
    chosen = []
    for _ in range(k):
        worth = np.round(score * weights.sum(axis=1), 9)
        worth[chosen] = -1
        chosen.append(int(worth.argmax()))
        weights[:, weights[chosen[-1]] > 0] *= decay
    return chosen


@given(answers, st.data())
def test_each_row_is_the_one_that_says_most_anew(texts, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    score = np.sort(rng.uniform(0.2, 0.99, len(texts)))[::-1]
    k = data.draw(st.integers(1, len(texts)))
    assert new_terms(score, texts, k, 0.1).tolist() == by_the_paper(score, texts, k, 0.1)


def test_answers_without_a_word_go_by_their_scores():
    assert new_terms(np.array([0.3, 0.9, 0.5]), ["!", "?", "..."], 2, 0.1).tolist() == [1, 2]
    assert new_terms(np.array([0.9, 0.5, 0.7]), ["red ball", "red ball", "!"], 3, 0.0).tolist() == [0, 2, 1]


def test_the_candidates_are_a_multiple_of_the_budget():
    columns = {"ifd_ppl": np.linspace(0.9, 0.1, 9), "ifd_status": np.full(9, "ok")}
    columns["answer_text"] = np.array(["same words"] * 8 + ["others altogether"], dtype=object)
    selection = IterIT()(columns, 2)
    assert selection.kept.tolist() == [0, 1]
    assert selection.reasons.tolist() == ["kept", "kept", *["redundant"] * 4, *["below_cut"] * 3]
    assert IterIT(candidates_per_row=4.5)(columns, 2).kept.tolist() == [0, 8]
    few = IterIT()(columns, 9)
    assert few.kept.tolist() == Cherry(score="ifd_ppl")(columns, 9).kept.tolist()


@pytest.mark.parametrize("options", [{"candidates_per_row": 0.5}, {"decay": 1.5}, {"decay": True}, {"max_ifd": -1}])
def test_numbers_that_cannot_be_are_told(options):
    with pytest.raises(UserError, match="must be"):
        IterIT(**options)
