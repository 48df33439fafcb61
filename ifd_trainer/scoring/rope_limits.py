"""How many positions a model has, and which rows may share a forward where they depend on the longest row in it.

Two kinds of rotary embeddings choose their frequencies anew in each forward, from its largest position:

- `longrope` (Phi-3, MiniCPM) has one set of frequencies for rows up to the length of its first training, another one
  beyond;
- `dynamic` has its own up to the model's window, and beyond it different ones for each length (and goes on with those
  of the longest row that it has seen since one within the window).

A long row would change the scores of all others in its batch, so rows of different kinds are kept apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def kinds_of_lengths(lengths: Sequence[int], config: Any) -> list[np.ndarray]:
    """Partition rows into those that may share a forward; shorter ones come first.

    Args:
        lengths: tokens of each row.
        config: of a transformers model, or None.

    Returns:
        Index arrays in ascending order, none of them empty.

    >>> from types import SimpleNamespace
    >>> config = SimpleNamespace(rope_parameters={"rope_type": "longrope", "original_max_position_embeddings": 4})
    >>> [rows.tolist() for rows in kinds_of_lengths([3, 5, 4, 9], config)]
    [[0, 2], [1, 3]]
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    kinds = np.zeros_like(lengths)
    for rope in _ropes(config):
        if rope.get("rope_type") == "longrope":
            kinds = 2 * kinds + (lengths > rope.get("original_max_position_embeddings", np.inf))
        elif rope.get("rope_type") == "dynamic":
            trained = getattr(config, "max_position_embeddings", np.inf)
            kinds = np.where(lengths < trained, kinds, lengths + kinds.max(initial=0))
    return [np.flatnonzero(kinds == kind) for kind in np.unique(kinds)]


def remembers_lengths(config: Any) -> bool:
    """Whether a model goes on with the frequencies of the longest row that it has seen since a short one."""
    return any(rope.get("rope_type") == "dynamic" for rope in _ropes(config))


def window(config: Any) -> int | None:
    """Most tokens of a row that a model was made for, None if it does not tell: those of its training, times the factor
    of a scaled rotary embedding where the config does not count it in already.

    >>> from types import SimpleNamespace
    >>> yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    >>> window(SimpleNamespace(max_position_embeddings=32768, rope_parameters=yarn))
    131072
    """
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None:
        return None
    factors = [1.0]
    for rope in _ropes(config):
        uncounted = rope.get("rope_type") in ("linear", "dynamic") or (
            rope.get("rope_type") == "yarn" and rope.get("original_max_position_embeddings", positions) == positions
        )
        factors.append(float(rope.get("factor") or 1.0) if uncounted else 1.0)
    return int(positions * max(factors))


def _ropes(config: Any) -> list[dict[str, Any]]:
    """Parameters of the rotary embeddings: one set, or one for each type of layer."""
    ropes = getattr(config, "rope_parameters", None) or {}
    return [ropes] if "rope_type" in ropes else [value for value in ropes.values() if isinstance(value, dict)]
