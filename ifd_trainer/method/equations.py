"""The equations, on numpy arrays; no model here.

For an answer A of N tokens and its question Q (arXiv 2308.12032, section 2):

    cas = s(A|Q) = -1/N * sum_i log P(a_i | Q, a_<i)      conditioned answer score, nats per token
    das = s(A)   = -1/N * sum_i log P(a_i | a_<i)         direct answer score, nats per token
    IFD = cas / das

and for the reversed row, whose answer is the instruction (arXiv 2402.10110): rcas = s(Q|A), rdas = s(Q).

Each function maps arrays of equal shape to one of that shape. A value that is not finite, or a division by zero,
gives NaN: unscorable is not zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
from numpy.typing import ArrayLike

from ..errors import UserError
from .further_scores import FURTHER

# Under this direct score (nats per token) a model knows the answer by heart and the ratio is noise.
MIN_DIRECT_SCORE = 1e-6


def ifd(cas: ArrayLike, das: ArrayLike) -> np.ndarray:
    """Instruction-Following Difficulty, cas / das, in [0, inf). Above 1 the prompt does not help.

    Source: arXiv 2308.12032, equation 3.

    >>> float(ifd(1.5, 2.0))
    0.75
    """
    cas, das = _pair(cas, das)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(das > MIN_DIRECT_SCORE, _finite(cas) / _finite(das), np.nan)


def ifd_ppl(cas: ArrayLike, das: ArrayLike) -> np.ndarray:
    """IFD as a ratio of perplexities, exp(cas) / exp(das) = exp(cas - das), in (0, inf).

    Ranks rows differently from `ifd`: the two are never to be mixed. Source: arXiv 2402.00530, section 2.

    >>> float(ifd_ppl(2.0, 2.0))
    1.0
    """
    cas, das = _pair(cas, das)
    with np.errstate(over="ignore"):
        return _finite(np.exp(_finite(cas) - _finite(das)))


# What follows from the two losses, by the name of its column.
FROM_LOSSES = {"ifd": ifd, "ifd_ppl": ifd_ppl}


def ira(cas: ArrayLike, das: ArrayLike) -> np.ndarray:
    """What the prompt tells of the answer, das - cas, nats per token; below 0 it misleads.

    Source: IRA, arXiv 2410.11540.

    >>> float(ira(1.5, 2.0))
    0.5
    """
    cas, das = _pair(cas, das)
    return _finite(das) - _finite(cas)


def perplexity(loss: ArrayLike) -> np.ndarray:
    """exp(loss) of a mean loss in nats per token, in [1, inf).

    >>> float(perplexity(0.0))
    1.0
    """
    with np.errstate(over="ignore"):
        return _finite(np.exp(_finite(np.asarray(loss, dtype=np.float64))))


def rifd(rcas: ArrayLike, rdas: ArrayLike) -> np.ndarray:
    """Reversed IFD, rcas / rdas, in [0, inf). Below 1 the answer tells of its instruction: low is good.

    Source: r-IFD, arXiv 2402.10110.

    >>> float(rifd(3.0, 4.0))
    0.75
    """
    return ifd(rcas, rdas)


def loss_change(cas: ArrayLike, earlier: ArrayLike) -> np.ndarray:
    """How a conditioned answer score has changed since an earlier scoring, cas - earlier, nats per token.

    >>> float(loss_change(1.5, 2.0))
    -0.5
    """
    cas, earlier = _pair(cas, earlier)
    return _finite(cas) - _finite(earlier)


def mean_loss(loss: ArrayLike) -> np.ndarray:
    """A mean loss as a score of its own."""
    return _finite(np.asarray(loss, dtype=np.float64))


# The equation of each score in `FURTHER` that follows from losses, which it takes in the order that stands there.
OF_LOSSES: dict[str, Callable[..., np.ndarray]] = {
    "ira": ira,
    "answer_ppl": perplexity,
    "direct_ppl": perplexity,
    "prompt_ppl": perplexity,
    "rifd": rifd,
    "rcas": mean_loss,
    "rdas": mean_loss,
}


def further_scores(names: Iterable[str], losses: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Further scores (n,) by name, of mean losses (n,) by name.

    >>> further_scores(["ira"], {"cas": np.array([1.0]), "das": np.array([3.0])})
    {'ira': array([2.])}
    """
    return {name: OF_LOSSES[name](*(losses[loss] for loss in FURTHER[name].of)) for name in names}


def _pair(cas: ArrayLike, das: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    cas, das = np.asarray(cas, dtype=np.float64), np.asarray(das, dtype=np.float64)
    if cas.shape != das.shape:
        raise UserError(f"cas and das must have the same shape, got {cas.shape} and {das.shape}.")
    return cas, das


def _finite(x: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(x), x, np.nan)
