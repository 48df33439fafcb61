"""Losses of single tokens: of each row's answer given its prompt, and of the same tokens without it.

They come from the forwards that score the rows. Only a definition that scores the same tokens in both segments has
them: `paper`. `cherry` tokenises the direct answer by itself and cuts it elsewhere, and `superfiltering` does not score
its first token there, so that no token of one segment stands for one of the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from torch import nn

from ..data.encoding import EncodedPair
from ..errors import UserError
from ..method.columns import TOKEN_COLUMNS
from ..method.reasons import Status
from .forward import LaunchedBatch
from .losses import Options, Scores, score_pairs
from .selective_columns import TOKEN_TYPE

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True)
class TokenLosses:
    """Losses of the answers' tokens of n rows, nats; None for a row without a score.

    Attributes:
        cas_tokens: for each row `answer_tokens` losses given the prompt, float32; their mean is `cas`.
        das_tokens: the same without the prompt; their mean is `das`.
    """

    cas_tokens: list[np.ndarray | None]
    das_tokens: list[np.ndarray | None]

    def of_rows(self, counts: Sequence[int]) -> TokenLosses:
        """Those of rows that have several answers: of the answers with a score, one behind another.

        Args:
            counts: how many answers each row has.

        >>> losses = [np.array([1.0, 2.0]), None, np.array([3.0]), None]
        >>> [None if row is None else row.tolist() for row in TokenLosses(losses, losses).of_rows([3, 1]).cas_tokens]
        [[1.0, 2.0, 3.0], None]
        """
        starts = np.cumsum([0, *counts])[:-1]

        def joined(losses: list[np.ndarray | None]) -> list[np.ndarray | None]:
            rows = (losses[start : start + count] for start, count in zip(starts.tolist(), counts, strict=True))
            scored = ([answer for answer in row if answer is not None] for row in rows)
            return [np.concatenate(answers) if answers else None for answers in scored]

        return TokenLosses(joined(self.cas_tokens), joined(self.das_tokens))

    def columns(self) -> dict[str, pa.Array]:
        """Columns of lists, null without a score, by name."""
        return {name: _lists(getattr(self, name)) for name in TOKEN_COLUMNS}


def check_token_losses(definition: str, turns: str | None) -> None:
    """Raise for a definition, or a rule for several answers, that has no losses of single tokens.

    >>> check_token_losses("paper", None)
    """
    why = {
        "cherry": "tokenises the direct answer by itself and cuts it at another length",
        "superfiltering": "does not score the first token of a direct answer",
    }
    if definition != "paper":
        raise UserError(
            f"token_losses go with definition='paper', which scores the same tokens with the prompt and without; "
            f"{definition!r} {why[definition]}, so that tokens cannot be held against each other. Leave out one of the "
            "two."
        )
    if turns not in (None, "tokens"):
        raise UserError(
            "token_losses are those that a row's loss is the mean of: of its last answer, or with turns='tokens' of "
            f"all its answers. By turns={turns!r} it is of no such mean."
        )


def score_with_tokens(
    model: nn.Module, pairs: Sequence[EncodedPair], further: Sequence[str] = (), **options: Unpack[Options]
) -> tuple[Scores, TokenLosses]:
    """Score encoded rows, and keep the losses of their tokens: those of the same forwards.

    Args:
        model: a causal language model; see `score_pairs`, which gives the same scores.
        pairs: n encoded rows.
        further: names of further scores.
        options: see `Options`.

    Raises:
        UserError: for a row whose two segments do not score the same tokens.
    """
    scorable = [row for row, pair in enumerate(pairs) if pair.conditioned]
    for row in scorable:
        _check_same_tokens(row, pairs[row])
    found: list[list[np.ndarray | None]] = [[None] * len(pairs), [None] * len(pairs)]

    def collect(segments: np.ndarray, launched: LaunchedBatch) -> None:
        for segment, losses in zip(segments.tolist(), launched.token_losses(), strict=True):
            if segment >= 2 * len(scorable):
                continue  # of a further score
            found[segment % 2][scorable[segment // 2]] = losses

    scores = score_pairs(model, pairs, further, collect, **options)
    for row in np.flatnonzero(scores.ifd_status != Status.OK.value):
        found[0][row] = found[1][row] = None
    return scores, TokenLosses(*found)


def _check_same_tokens(row: int, pair: EncodedPair) -> None:
    given, alone = (s.ids[s.start : len(s.ids) - s.tail] for s in (pair.conditioned, pair.direct))
    if given != alone:
        raise UserError(
            f"Row {row} is scored on {len(given)} tokens given its prompt and on {len(alone)} without it, which are "
            "not the same, so that the losses of its tokens cannot be held against each other. Encode it with "
            "definition='paper'."
        )


def _lists(rows: Sequence[np.ndarray | None]) -> pa.ListArray:
    lengths = [0 if row is None else len(row) for row in rows]
    offsets = np.cumsum([0, *lengths], dtype=np.int32)
    values = np.concatenate([np.empty(0, dtype=np.float32), *(row for row in rows if row is not None)])
    missing = pa.array([row is None for row in rows], pa.bool_())
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values), type=TOKEN_TYPE, mask=missing)
