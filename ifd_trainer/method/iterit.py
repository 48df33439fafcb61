"""High IFD and answers that say something new: IterIT's greedy choice (arXiv 2412.17365).

Of the rows with the highest IFD, a multiple of the budget, one is taken after another, each time that with the highest

    IFD_i * sum_t tfidf_it * w_t        t: words, pairs and triples of words of the answer;    w_t = 1 at first

and what the taken answer says weighs less from then on, in all answers: w_t is multiplied by `decay` for each of its
terms. So a row is worth as much as its answer holds of what no taken answer has said, and long answers with rare words
come first. The program of the paper scores the candidates of an epoch alone anew; here all rows are, as the callback
does, and the candidates are those with the highest scores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import UserError
from .calibrated_limit import CalibratedLimit
from .choices import Score, Shortfall
from .number_types import is_number
from .reasons import REDUNDANT
from .selection import AmongCandidates, OwnScore, Selection, score_values

ANSWER_TEXT = "answer_text"  # the column of the rows' answers, as text


@dataclass(frozen=True)
class IterIT(AmongCandidates):
    """Of the rows with the highest IFD, those whose answers say most that no other kept one says.

    Args:
        candidates_per_row: how many rows with the highest scores there are to choose from for each row that is kept, at
            least 1; 3 in the paper.
        decay: what a term weighs in other answers once it was said, from 0 (nothing) to 1 (as before); 0.1 in the
            published program.
        max_ifd, score, on_shortfall: as for `Cherry`. The paper's program ranks by the ratio of perplexities.

    >>> columns = {"ifd_ppl": np.array([0.9, 0.9, 0.5, 1.2]), "ifd_status": np.full(4, "ok")}
    >>> columns["answer_text"] = np.array(["a red ball", "a red ball", "green park", "blue"], dtype=object)
    >>> selection = IterIT()(columns, budget=2)
    >>> selection.kept.tolist(), selection.reasons.tolist()
    ([0, 2], ['kept', 'redundant', 'kept', 'above_limit'])
    """

    candidates_per_row: float = 3
    decay: float = 0.1
    max_ifd: float | CalibratedLimit = 1.0
    score: Score | OwnScore = "ifd_ppl"
    on_shortfall: Shortfall = "repeat"

    def __post_init__(self) -> None:
        for name, low, high in (("candidates_per_row", 1, np.inf), ("decay", 0, 1)):
            number = getattr(self, name)
            if not (is_number(number) and low <= number <= high):
                raise UserError(f"{name} must be a number from {low} to {high}, got {number!r}.")
        self.check_candidates()

    def __call__(
        self,
        columns: Mapping[str, np.ndarray],
        budget: int,
        *,
        ids: np.ndarray | None = None,
        rng: np.random.Generator | None = None,
    ) -> Selection:
        """Select `budget` of n rows.

        Args:
            columns: as for `Cherry`; and `answer_text`, (n,) texts.
            budget, ids, rng: as for `Cherry`.

        Returns:
            The selection, highest score first; `redundant` is the reason of candidates that were not taken.
        """
        eligible = self.candidates(columns, 1, ids=ids).eligible
        count = min(int(self.candidates_per_row * budget), eligible)
        if count <= budget:
            return self.candidates(columns, budget, ids=ids, rng=rng)
        selection = self.candidates(columns, count, ids=ids)
        rows, score = selection.kept, score_values(columns, self.score)
        texts = [str(text) for text in np.asarray(columns[ANSWER_TEXT], dtype=object)[rows]]
        taken = np.sort(new_terms(score[rows], texts, budget, self.decay))
        reasons = selection.reasons.copy()
        reasons[np.delete(rows, taken)] = REDUNDANT
        return Selection(rows[taken], reasons, float(score[rows[taken[-1]]]), eligible, 0)


def new_terms(score: np.ndarray, texts: Sequence[str], k: int, decay: float) -> np.ndarray:
    """Choose k of n texts greedily by score times what they say that no chosen one has said.

    Args:
        score: (n,) positive.
        texts: n answers.
        k: how many, 1 to n.
        decay: of the weight of a term that was said.

    Returns:
        (k,) positions in the order chosen; ties to the lowest.

    >>> new_terms(np.array([0.9, 0.8, 0.1]), ["a red ball", "a red ball", "green park"], k=2, decay=0.0).tolist()
    [0, 2]
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    try:
        by_row = TfidfVectorizer(ngram_range=(1, 3), token_pattern=r"(?u)\b\w+\b").fit_transform(texts)  # (n, terms)
    except ValueError:  # no word in any of them: nothing is new
        return np.argsort(-score, kind="stable")[:k]
    by_term = by_row.tocsc()
    said = np.ones(by_term.shape[1])  # w_t
    worth = np.asarray(by_row.sum(axis=1)).ravel()  # sum_t tfidf_it * w_t
    chosen = np.empty(k, dtype=np.int64)
    left = np.ones(len(texts), dtype=bool)
    for step in range(k):
        # What is worth nothing any more goes by its score, behind all others.
        worth_now = np.where(left, score * np.maximum(worth, 0), -np.inf)
        best = int(worth_now.argmax())
        if worth_now[best] <= 1e-12:
            best = int(np.where(left, score, -np.inf).argmax())
        chosen[step], left[best] = best, False
        for term in by_row.indices[by_row.indptr[best] : by_row.indptr[best + 1]]:
            rows = slice(by_term.indptr[term], by_term.indptr[term + 1])
            worth[by_term.indices[rows]] -= (1 - decay) * said[term] * by_term.data[rows]
            said[term] *= decay
    return chosen
