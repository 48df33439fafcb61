"""Which prompts of a pool are most like a given one: the near wrong prompts of a limit and of a test.

Likeness is the cosine of TF-IDF weights of words and pairs of words. It needs no model, and what all prompts share, a
template's preamble, weighs next to nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

_FEATURES = 2**18
_BLOCK = 2**24  # similarities that are held at a time


class SimilarPrompts:
    """The prompts of a pool, by which similar ones are found.

    Args:
        prompts: n texts.

    >>> SimilarPrompts(["Name a red fruit.", "Add 2 and 2.", "Name a green fruit."]).nearest(np.array([0]), 1).tolist()
    [[2]]
    """

    def __init__(self, prompts: Iterable[str]) -> None:
        from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer

        words = HashingVectorizer(
            n_features=_FEATURES, alternate_sign=False, norm=None, ngram_range=(1, 2), token_pattern=r"\w+|[^\w\s]"
        )
        self._vectors = TfidfTransformer(sublinear_tf=True).fit_transform(words.transform(prompts)).tocsr()  # (n, F)

    def nearest(self, rows: np.ndarray, k: int, among: np.ndarray | None = None) -> np.ndarray:
        """Positions (m, k) of the k prompts most like those of m rows, nearest first, ties by position; not their own.

        Of fewer than k others, all of them.

        Args:
            among: positions of the prompts that are looked at, ascending; all by default.
        """
        others = self._vectors if among is None else self._vectors[among]
        n, found = others.shape[0], []
        k = min(k, n - 1)
        for start in range(0, len(rows), max(_BLOCK // n, 1)):
            part = rows[start : start + max(_BLOCK // n, 1)]
            likeness = (self._vectors[part] @ others.T).toarray()  # (rows of the block, n)
            own = part[:, None] == (np.arange(n) if among is None else among)
            likeness[own] = -1.0
            found.append(np.argsort(-likeness, axis=1, kind="stable")[:, :k])
        nearest = np.concatenate(found) if found else np.empty((0, k), dtype=np.int64)
        return nearest if among is None else among[nearest]
