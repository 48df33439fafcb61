"""Whether a model knows the answer of a row: how many of its own answers agree with the one that the row has.

Of n answers y_1, ..., y_n that a model samples to a row's prompt, with an agreement a between 0 and 1 and the row's
answer r:

    known       = 1/n * sum_i [a(y_i, r) >= threshold]        the share that agrees
    agreement   = 1/n * sum_i a(y_i, r)                       the mean, which needs no threshold
    consistency = mean over i != j of a(y_i, y_j)             how far the answers agree with one another

Source: self-training through knowledge detection (arXiv 2406.11275), which trains on what a model does not know, told
by how its sampled answers contradict a reference, and leaves out references that it is not sure of itself. There both
are judged by a model of entailment and references are the model's own; here both are an agreement of texts (token F1 by
default, see `text_agreement`), and the reference is the row's answer. A model of entailment can be passed as an
agreement.

Token F1 tells words, not truth: an answer that says the opposite in the same words agrees, and one that says the same
in others does not. It serves best where answers are short.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike

from ..errors import UserError
from .number_types import is_number
from .text_agreement import Agreement, as_agreement

KNOWN = "known"  # the model's answers agree with the row's
HARD = "hard"  # they agree neither with it nor with one another, and its prompt helps little
DOUBTFUL = "doubtful"  # the model has one answer of its own, another one; or it knows this one, and it is a surprise
UNCLEAR = "unclear"  # none of these


def check_share(**shares: float) -> None:
    """Raise UserError for a number that is not in (0, 1].

    >>> check_share(threshold=0.5)
    """
    for name, share in shares.items():
        number = is_number(share)
        if not (number and 0 < share <= 1):
            raise UserError(f"{name} must be a number above 0 and at most 1, got {share!r}.")


def known_share(agreements: ArrayLike, threshold: float = 0.5) -> np.ndarray:
    """The share of each row's samples that agree with its answer: (..., n) agreements to (...) shares.

    Args:
        agreements: of each sample with its row's answer, in [0, 1]. A row with a NaN has the share NaN.
        threshold: from which one agrees, in (0, 1].

    >>> known_share([[0.9, 0.5, 0.1, 0.0], [0.0, 0.2, 0.4, 0.49]]).tolist()
    [0.5, 0.0]
    """
    check_share(threshold=threshold)
    agreements = np.asarray(agreements, dtype=float)
    shares = (agreements >= threshold).mean(axis=-1)
    return np.where(np.isnan(agreements).any(axis=-1), np.nan, shares)


def compared(
    answers: Sequence[str], reference: str, agreement: str | Agreement = "f1"
) -> tuple[np.ndarray, np.ndarray]:
    """How far n answers agree with a reference, (n,), and each of them with each other one, (n, n) with NaN at i = j.

    A blank answer agrees with nothing, another blank one included: who says nothing has no answer of his own.

    Args:
        answers: of the model, y_1, ..., y_n.
        reference: the row's.
        agreement: see `text_agreement.as_agreement`; a(y_i, y_j) stands in line i and column j.

    >>> with_reference, among = compared(["Paris", "paris!", ""], "Paris.", "exact")
    >>> with_reference.tolist(), among[0, 1:].tolist()
    ([1.0, 1.0, 0.0], [1.0, 0.0])
    """
    agrees = as_agreement(agreement)
    said = [bool(answer.strip()) for answer in answers]
    with_reference = [agrees(one, reference) if says else 0.0 for one, says in zip(answers, said, strict=True)]
    among = np.full((len(answers), len(answers)), np.nan)
    same_both_ways = isinstance(agreement, str)  # those that have a name
    for i, j in permutations(range(len(answers)), 2):
        if same_both_ways and i > j:
            among[i, j] = among[j, i]
        else:
            among[i, j] = agrees(answers[i], answers[j]) if said[i] and said[j] else 0.0
    return np.array(with_reference), among


def wilson_interval(known: ArrayLike, samples: ArrayLike, confidence: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Between which shares the model's own probability to agree lies: Wilson's interval for k of n draws.

    With p = k / n and z the quantile of the normal distribution, the two ends are

        (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)

    What is told so is how the model answers at that temperature, not whether the row's answer is right. Eight samples
    say little: of 0 of 8 that agree, the probability may be up to 0.32.

    Args:
        known: shares k / n; NaN has the interval (NaN, NaN).
        samples: n of each, or of all; 0 has the interval (NaN, NaN).
        confidence: of the interval, in (0, 1).

    Returns:
        The lower and the upper ends.

    Source: Wilson, Probable inference, the law of succession, and statistical inference (1927).

    >>> low, high = wilson_interval([0.0, 0.5], 8)
    >>> low.round(3).tolist(), high.round(3).tolist()
    ([0.0, 0.215], [0.324, 0.785])
    """
    if not 0 < confidence < 1:
        raise UserError(f"confidence must be a number between 0 and 1, got {confidence!r}.")
    share, n = np.broadcast_arrays(np.asarray(known, dtype=float), np.asarray(samples, dtype=float))
    n = np.where(n > 0, n, np.nan)
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    middle = share + z**2 / (2 * n)
    half = z * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    whole = 1 + z**2 / n
    # Rounding does not take an end past what was seen.
    return np.clip((middle - half) / whole, 0, share), np.clip((middle + half) / whole, share, 1)


def hard_or_wrong(
    known: ArrayLike,
    ifd: ArrayLike,
    consistency: ArrayLike | None = None,
    *,
    known_from: float = 0.5,
    high_ifd: float | None = None,
    consistent_from: float = 0.5,
) -> np.ndarray:
    """What a row with a high IFD is: hard for the model, or doubtful itself. (n,) names from (n,) numbers.

    | the model's answers | IFD is high | it is not |
    |---|---|---|
    | agree with the row's (known >= known_from) | `doubtful` | `known` |
    | do not, but agree with one another (consistency >= consistent_from) | `doubtful` | `doubtful` |
    | agree with neither | `hard` | `unclear` |

    - `hard`: the model does not know what to say, and the prompt does not help it to the row's answer: what a selection
      by difficulty is after.
    - `doubtful`: a person should look. Either the model says one thing, and the row another: one of the two is wrong,
      and numbers do not tell which. Or its answers agree with the row's, and its words still surprise it: a slip, a
      part that does not belong there, or a style of its own.
    - `unclear`: the prompt leads the model to the row's answer, and it says others: so it is with questions that many
      answers are right for, whose samples differ from one another, and from any one answer.
    - None where a row has no known share or no IFD; a consistency that is missing counts as none.

    A recipe of thresholds, not a test: no rate of errors is known for it. A small model is also consistently wrong, so
    that `doubtful` counts for more the better the model is.

    Args:
        known: shares of `known_share`.
        ifd: scores of the same rows, of the same model.
        consistency: of the same samples; None leaves the second line of the table out.
        known_from, consistent_from: shares, in (0, 1].
        high_ifd: from which IFD on it is high; by default the median of the rows that have both numbers.

    >>> names = hard_or_wrong([1.0, 0.0, 0.0, 0.9], [0.3, 0.9, 0.9, 0.9], [1.0, 0.1, 0.8, 0.7], high_ifd=0.8)
    >>> names.tolist()
    ['known', 'hard', 'doubtful', 'doubtful']
    """
    check_share(known_from=known_from, consistent_from=consistent_from)
    known, ifd = np.asarray(known, dtype=float), np.asarray(ifd, dtype=float)
    consistency = np.full(known.shape, np.nan) if consistency is None else np.asarray(consistency, dtype=float)
    if not known.shape == ifd.shape == consistency.shape or known.ndim != 1:
        raise UserError(
            "known, ifd and consistency are numbers of the same rows, one for each: got arrays of the shapes "
            f"{known.shape}, {ifd.shape} and {consistency.shape}."
        )
    told = np.isfinite(known) & np.isfinite(ifd)
    if high_ifd is None:
        high_ifd = float(np.median(ifd[told])) if told.any() else np.nan
    knows, high, consistent = known >= known_from, ifd >= high_ifd, consistency >= consistent_from
    names = np.full(known.shape, UNCLEAR, dtype=object)
    names[high] = HARD
    names[consistent] = DOUBTFUL
    names[knows] = KNOWN
    names[knows & high] = DOUBTFUL
    names[~told] = None
    return names
