"""S-IFD: the ratio of perplexities over the tokens of which the prompt tells most, alone. Pure, no model here.

For token t of an answer y under its prompt x (T-SHIRT, arXiv 2506.01317):

    Delta_t = loss(y_t | y_<t) - loss(y_t | x, y_<t)        what the prompt tells of the token, nats
    S-IFD   = exp(-mean of Delta_t over the tokens with |Delta_t| >= threshold)

The threshold is one for the whole data set: the smallest of the share k of its tokens with the largest |Delta_t|.
Many tokens follow from the words before them whatever was asked; they pull the IFD of every row towards 1, and the
more of them an answer has the more so. Here they count nothing. Losses enter as a ratio of perplexities, and not as
cas / das, since that is the paper's score, and since a few tokens that are all easy have a das near 0, which no ratio
stands.

The threshold is exact and is found in memory that does not grow with the data set. Positive floats are ordered as the
whole numbers with the same bits, so two passes do: one counts the upper 15 bits of each |Delta_t|, which tells between
which floats the threshold is; one counts the lower 16 bits of those between them. A sketch would do with one pass, but
with an error, and reading losses takes nothing beside making them; the sum of the counts is the same in every order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import ArrayLike

from ..errors import UserError
from .choices import TOKEN_SHARE as SHARE
from .number_types import is_number

_LOW = 16  # bits that the second pass counts
_HIGH = 15  # bits that the first one counts: of the 32, the sign is always 0


def check_share(share: float, name: str = "share") -> None:
    """Raise for what is no share of the tokens, in (0, 1].

    >>> check_share(0.5)
    """
    if not is_number(share) or not 0 < share <= 1:
        raise UserError(
            f"{name} is a share of all tokens, above 0 and at most 1, got {share!r}. Papers take 0.5 to 0.75."
        )


def token_deltas(
    cas_tokens: Sequence[ArrayLike | None], das_tokens: Sequence[ArrayLike | None]
) -> tuple[np.ndarray, np.ndarray]:
    """What the prompts tell of the tokens of n answers, one answer after another.

    Args:
        cas_tokens: for each row the losses of its answer's tokens given the prompt, nats; None or empty for none.
        das_tokens: the same without the prompt.

    Returns:
        Delta_t = das_t - cas_t of all tokens (T,) float32, and how many tokens each row has (n,) int64.

    Raises:
        UserError: for rows of which one has more tokens than the other.

    >>> deltas, counts = token_deltas([[1.0, 2.0], None], [[1.5, 2.0], None])
    >>> deltas.tolist(), counts.tolist()
    ([0.5, 0.0], [2, 0])
    """
    cas, das = (
        [np.asarray([] if row is None else row, dtype=np.float32).ravel() for row in rows]
        for rows in (cas_tokens, das_tokens)
    )
    counts = [np.array([len(row) for row in rows], dtype=np.int64) for rows in (cas, das)]
    check_counts(*counts)
    none = np.empty(0, dtype=np.float32)
    with np.errstate(invalid="ignore"):
        return np.concatenate([none, *das]) - np.concatenate([none, *cas]), counts[0]


def check_counts(cas: np.ndarray, das: np.ndarray) -> None:
    """Raise unless rows (n,) have as many losses given the prompt as without it."""
    if len(cas) != len(das):
        raise UserError(f"cas_tokens and das_tokens are of the same rows, got {len(cas)} and {len(das)} of them.")
    if (differing := np.flatnonzero(cas != das)).size:
        row = differing[0]
        raise UserError(
            f"cas_tokens and das_tokens are losses of the same tokens, but row {row} has {cas[row]} of the one and "
            f"{das[row]} of the other. Score the rows again."
        )


def delta_threshold(parts: Callable[[], Iterable[ArrayLike]], share: float = SHARE) -> float:
    """The smallest |Delta_t| of the share of a data set's tokens with the largest ones; exact.

    Of N tokens ceil(share * N) are at or above it, and more only where several are equal to it. Values that are not
    finite are none of the N. NaN for a data set without tokens.

    Args:
        parts: called twice, gives the Delta_t of the data set's tokens in parts, float32, in any order. Of what fits in
            memory it is `lambda: [deltas]`.
        share: k, in (0, 1].

    Raises:
        UserError: for a share that is none, and for parts that are not the same the second time.

    >>> deltas = np.array([0.1, -3.0, 0.0, 0.5], dtype=np.float32)
    >>> delta_threshold(lambda: [deltas], share=0.5), delta_threshold(lambda: [deltas[:1], deltas[1:]], share=0.25)
    (0.5, 3.0)
    """
    check_share(share)
    upper = _counted((bits >> _LOW for bits in map(_bits, parts())), _HIGH)
    tokens = int(upper.sum())
    if not tokens:
        return math.nan
    wanted = math.ceil(Fraction(repr(float(share))) * tokens)  # 0.07 of 100 tokens are 7, though 0.07 * 100 is above 7
    between, above = _at_rank(upper, wanted)
    inside = (bits[bits >> _LOW == between] & (2**_LOW - 1) for bits in map(_bits, parts()))
    lower = _counted(inside, _LOW)
    if lower.sum() != upper[between]:
        raise UserError("parts has to give the same tokens each time that it is called; of an iterator make a list.")
    last, _ = _at_rank(lower, wanted - above)
    return float(np.uint32(between << _LOW | last).view(np.float32))


def selective_ifd(
    cas_tokens: Sequence[ArrayLike | None], das_tokens: Sequence[ArrayLike | None], threshold: float
) -> np.ndarray:
    """S-IFD of n rows, (n,) float64, in (0, inf); NaN for a row of which no token passes, or with one not finite.

    Args:
        cas_tokens: for each row the losses of its answer's tokens given the prompt, nats; None or empty for none.
        das_tokens: the same without the prompt.
        threshold: of |Delta_t|, of the whole data set; see `delta_threshold`. Tokens at it pass.

    Source: arXiv 2506.01317.

    >>> selective_ifd([[1.0, 2.0], [3.0]], [[2.0, 2.1], [3.0]], threshold=0.5).round(4).tolist()
    [0.3679, nan]
    """
    return selective_scores(*token_deltas(cas_tokens, das_tokens), threshold)


def selective_scores(deltas: np.ndarray, counts: np.ndarray, threshold: float) -> np.ndarray:
    """`selective_ifd` of what `token_deltas` gives: the Delta_t of all tokens (T,), and how many each row has (n,).

    A row's score is the same bits wherever it stands.

    >>> selective_scores(np.array([1.0, 0.1, 0.0], dtype=np.float32), np.array([2, 1]), 0.5).round(4).tolist()
    [0.3679, nan]
    """
    return selected_scores(deltas, counts, np.abs(deltas) >= np.float32(threshold))


def selected_scores(deltas: np.ndarray, counts: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """The same over tokens that were chosen otherwise: `chosen` (T,) bool.

    >>> selected_scores(np.array([1.0, 3.0, 0.0]), np.array([2, 1]), np.array([True, True, False])).round(4).tolist()
    [0.1353, nan]
    """
    rows = np.repeat(np.arange(len(counts)), counts)  # (T,), the row of each token
    bad = np.bincount(rows[~np.isfinite(deltas)], minlength=len(counts)) > 0
    of = np.bincount(rows[chosen], minlength=len(counts))
    # Added up token by token: in pairs, a sum would depend on where the row begins.
    total = np.bincount(rows[chosen], np.float64(deltas[chosen]), minlength=len(counts))
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        scores = np.exp(-total / of)
    return np.where((of > 0) & ~bad & np.isfinite(scores), scores, np.nan)


def _bits(deltas: ArrayLike) -> np.ndarray:
    """The |Delta_t| that are finite as whole numbers, which are ordered as they are."""
    values = np.abs(np.asarray(deltas, dtype=np.float32).ravel())
    return values[np.isfinite(values)].view(np.uint32)


def _counted(parts: Iterable[np.ndarray], bits: int) -> np.ndarray:
    """How often each number of so many bits occurs, (2**bits,)."""
    counts = np.zeros(2**bits, dtype=np.int64)
    for part in parts:
        counts += np.bincount(part, minlength=2**bits)
    return counts


def _at_rank(counts: np.ndarray, rank: int) -> tuple[int, int]:
    """The number with that rank, the largest having rank 1, and how many are above it."""
    from_top = np.cumsum(counts[::-1])
    place = int(np.searchsorted(from_top, rank))
    number = len(counts) - 1 - place
    return number, int(from_top[place] - counts[number])
