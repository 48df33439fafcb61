"""Which version of a row is taken: the original, or one with a rewritten instruction or answer.

Source: Selective Reflection-Tuning (arXiv 2402.10110), where a teacher rewrites rows (Reflection-Tuning, arXiv
2310.11716) and the student, the model that is to be trained, takes of each row what is worth more to it:

    1. the rewritten instruction, where IFD rises: it is harder to follow, and still helps
    2. then, under the instruction that was chosen, the rewritten answer, where r-IFD falls: it tells more of its
       instruction

    IFD = s(A|Q) / s(A)        r-IFD = s(Q|A, guess) / s(Q)

No rewritten version is taken whose IFD or r-IFD is 1 or more. Where we differ: the authors' program leaves out rows
whose chosen version is not below 1, and those whose answer was not rewritten in the end; here the original stays, and
its scores say whether it is below 1. Theirs compares exp(s(A|Q) - s(A)), ours the ratio of losses.

IFD rises for a wrong reason too: an answer that does not belong to its instruction scores high. So a rewritten
instruction is judged with the answer that was written for it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike

from ..errors import UserError
from .number_types import is_number

# Versions of a row, by what of them is rewritten.
ORIGINAL, INSTRUCTION, ANSWER, BOTH = "original", "instruction", "answer", "both"
VERSIONS = (ORIGINAL, INSTRUCTION, ANSWER, BOTH)

KEPT_ORIGINAL = "kept_original"
REWRITTEN_INSTRUCTION = "rewritten_instruction"  # with the answer that came with it
REWRITTEN_ANSWER = "rewritten_answer"
NOT_REWRITTEN = "not_rewritten"  # there is no other version of the row
NO_RIFD = "no_rifd"  # a version has an IFD and no r-IFD: turned round, it does not fit


def choose_rewritten(scores: Mapping[str, tuple[ArrayLike, ArrayLike]], limit: float = 1.0) -> np.ndarray:
    """The version of each row that is taken: (n,) of `VERSIONS`.

    With the IFD f and the r-IFD r of a version, of those whose f and r are both below the limit:

        1. the instruction is rewritten where f(instruction) > f(original)
        2. where it is, the answer is rewritten too where r(both) < r(instruction); where it is not, the answer alone
           where r(answer) < r(original)

    A version that is not given, or whose number is NaN, is never taken; nor is another one where the number that it is
    held against is NaN.

    Args:
        scores: IFD and r-IFD, each (n,), of "original" and of any of the other versions.
        limit: above 0; infinity for none.

    Raises:
        UserError: for names that are no versions, numbers of different rows, and a limit that is none.

    >>> of = {"original": ([0.5, 0.5, 0.5], [0.8, 0.8, 0.8]), "instruction": ([0.7, 1.2, 0.4], [0.9, 0.7, 0.9])}
    >>> choose_rewritten(of | {"answer": ([0.5, 0.6, 0.6], [0.7, 0.7, 0.9])}).tolist()
    ['instruction', 'answer', 'original']
    """
    if not (is_number(limit) and limit > 0):
        raise UserError(f"limit must be a number above 0, got {limit!r}; infinity for none.")
    if ORIGINAL not in scores or not set(scores) <= set(VERSIONS):
        raise UserError(f"scores are of {ORIGINAL!r} and of any of {', '.join(VERSIONS[1:])}; got {sorted(scores)}.")
    arrays = {name: [np.asarray(values, dtype=np.float64) for values in pair] for name, pair in scores.items()}
    shapes = {values.shape for pair in arrays.values() for values in pair}
    if len(shapes) > 1 or any(len(pair) != 2 for pair in arrays.values()) or len(next(iter(shapes))) != 1:
        raise UserError(f"IFD and r-IFD of all versions are of the same rows, one number each; got {sorted(shapes)}.")
    ifd, rifd = ({name: pair[i] for name, pair in arrays.items()} for i in range(2))
    missing = np.full(len(ifd[ORIGINAL]), np.nan)
    with np.errstate(invalid="ignore"):
        below = {name: (ifd[name] < limit) & (rifd[name] < limit) for name in arrays}
        instruction = (ifd.get(INSTRUCTION, missing) > ifd[ORIGINAL]) & below.get(INSTRUCTION, False)
        both = instruction & (rifd.get(BOTH, missing) < rifd.get(INSTRUCTION, missing)) & below.get(BOTH, False)
        answer = ~instruction & (rifd.get(ANSWER, missing) < rifd[ORIGINAL]) & below.get(ANSWER, False)
    chosen = np.full(len(missing), ORIGINAL, dtype=object)
    for name, rows in ((INSTRUCTION, instruction), (BOTH, both), (ANSWER, answer)):
        chosen[rows] = name
    return chosen
