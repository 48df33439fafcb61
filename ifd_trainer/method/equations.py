"""The equations, on numpy arrays; no model here.

For an answer A of N tokens and its question Q (arXiv 2308.12032, section 2):

    cas = s(A|Q) = -1/N * sum_i log P(a_i | Q, a_<i)      conditioned answer score, nats per token
    das = s(A)   = -1/N * sum_i log P(a_i | a_<i)         direct answer score, nats per token
    IFD = cas / das

Each function maps arrays of equal shape to one of that shape. A value that is not finite, or a division by zero,
gives NaN: unscorable is not zero.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from ..errors import UserError

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


def _pair(cas: ArrayLike, das: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    cas, das = np.asarray(cas, dtype=np.float64), np.asarray(das, dtype=np.float64)
    if cas.shape != das.shape:
        raise UserError(f"cas and das must have the same shape, got {cas.shape} and {das.shape}.")
    return cas, das


def _finite(x: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(x), x, np.nan)
