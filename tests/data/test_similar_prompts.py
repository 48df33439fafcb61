"""Which prompts are near: against cosines of dense vectors, and what a template weighs."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from sklearn.feature_extraction.text import TfidfVectorizer

from ifd_trainer.data.similar_prompts import SimilarPrompts

words = st.sampled_from(["red", "fruit", "add", "two", "song", "city", "river", "name"])
prompts = st.lists(st.lists(words, min_size=1, max_size=6).map(" ".join), min_size=3, max_size=12)


@given(prompts)
def test_nearest_prompts_have_the_highest_cosine(texts):
    found = SimilarPrompts(texts).nearest(np.arange(len(texts)), 2)
    vectors = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"\w+|[^\w\s]").fit_transform(texts)
    likeness = (vectors @ vectors.T).toarray()
    np.fill_diagonal(likeness, -1)
    for row, near in enumerate(found):
        assert row not in near
        np.testing.assert_allclose(likeness[row][near], np.sort(likeness[row])[::-1][:2], atol=1e-9)


def test_a_template_that_all_share_tells_nothing():
    frame = "Below is an instruction that describes a task. Write a response.\n### Instruction:\n{}\n### Response:"
    asked = ["Name a red fruit.", "Add 2 and 2.", "Write a song on rivers.", "Name a green fruit.", "Add 3 and 4."]
    found = SimilarPrompts([frame.format(text) for text in asked]).nearest(np.array([0, 1]), 1)
    assert found.tolist() == [[3], [4]]


def test_of_few_others_all_are_named():
    assert SimilarPrompts(["a b", "a c"]).nearest(np.array([0, 1]), 3).tolist() == [[1], [0]]


def test_near_prompts_may_be_looked_for_among_some():
    texts = ["Name a red fruit.", "Add 2 and 2.", "Name a green fruit.", "Name a red fruit, please.", "Sing."]
    similar = SimilarPrompts(texts)
    assert similar.nearest(np.array([0, 3]), 1).tolist() == [[3], [0]]
    assert similar.nearest(np.array([0, 3]), 1, among=np.array([1, 2, 3])).tolist() == [[3], [2]]
    assert similar.nearest(np.array([0]), 9, among=np.array([1, 2])).tolist() == [[2]]
