"""S-IFD of a row's neighbours: how much of it stays when the embeddings of the row are disturbed a little.

    e'_i = e_i + alpha / sqrt(L d) * u_i        u_i uniform in [-1, 1)^d, i = 1 ... L

for the L tokens of a row's prompt and answer, whose embeddings e_i have d dimensions. The scale is NEFTune's
(arXiv 2310.05914), with the length of the row and not of its batch; neighbours as a measure of a score are T-SHIRT's
(arXiv 2506.01317). The answer alone is disturbed as it is behind its prompt: a neighbour is a pair of a prompt and an
answer, whichever part of it the model reads. For that, the direct segment has the noise of as many tokens at the end of
the conditioned one, which are the same tokens but for a BOS that only the direct one has.

Which tokens count is decided once, by the row as it is, so that the mean and the spread of its neighbours are of the
same tokens, and are S-IFD itself and 0 where alpha is 0.

Noise depends on the seed, the row's tokens and the number of the neighbour, not on batches, the global random state or
the kind of device. Rows that share a beginning differ there once they have noise, so the padded engine runs them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from tqdm.auto import tqdm

from ..data.encoding import EncodedPair, Segment, check_positive
from ..data.table_reader import TableReader
from ..errors import UserError
from ..method.columns import TOKEN_COLUMNS
from ..method.selective_ifd import SHARE, check_share, selected_scores, token_deltas
from .forward import Batch, LaunchedBatch
from .losses import Options, nll_with_tails
from .model_parts import unwrapped
from .selective_columns import threshold_of
from .token_losses import check_token_losses
from .transfer import on_device

if TYPE_CHECKING:
    from typing_extensions import Unpack


NEIGHBOURS, ALPHA = 10, 5.0  # by default
_ROWS = 256  # whose neighbours are scored at a time


@dataclass(frozen=True)
class Neighbour:
    """One neighbour of a row: what noise is drawn by.

    Attributes:
        ids: the row's prompt and answer.
        number: of the neighbour, from 0.
        seed: of all neighbours.
        alpha: the size of the noise; 5 is what NEFTune takes for most models.
    """

    ids: Sequence[int]
    number: int
    seed: int
    alpha: float

    def noise(self, width: int, last: int | None = None) -> np.ndarray:
        """What is added to the embeddings of the row's L tokens, (L, d) float32, or to those of its last ones.

        Args:
            width: d.
            last: how many of the last tokens; where these are more than L, the first have no noise. All by default.

        >>> row = Neighbour([5, 6, 7], number=0, seed=1, alpha=6.0)
        >>> row.noise(2).shape, bool((np.abs(row.noise(2)) <= 6 / np.sqrt(3 * 2)).all())
        ((3, 2), True)
        >>> bool((row.noise(2, last=1) == row.noise(2)[-1:]).all())
        True
        """
        key = hashlib.blake2b(f"{self.seed} {self.number} ".encode(), digest_size=16)
        key.update(np.asarray(self.ids, dtype="<i8").tobytes())
        rng = np.random.default_rng(int.from_bytes(key.digest(), "little"))
        noise = 2 * rng.random((len(self.ids), width), dtype=np.float32) - 1
        noise *= np.float32(self.alpha / np.sqrt(noise.size))
        if last is None or last <= len(noise):
            return noise if last is None else noise[len(noise) - last :]
        return np.concatenate([np.zeros((last - len(noise), width), dtype=np.float32), noise])


def neighbour_scores(
    model: nn.Module,
    pairs: Sequence[EncodedPair],
    chosen: Sequence[np.ndarray | None],
    neighbours: int,
    alpha: float,
    seed: int,
    **options: Unpack[Options],
) -> np.ndarray:
    """S-IFD of each neighbour of n rows, (n, neighbours) float64; NaN for a row without tokens to count.

    Args:
        model: a causal language model that embeds its tokens in a module, once in a forward.
        pairs: n encoded rows, of the definition "paper".
        chosen: for each row which of its answer's tokens count, bool; None or none of them for no score.
        neighbours: how many of each row.
        alpha, seed: see `Neighbour`.
        options: see `Options`; the engine is the padded one.

    Raises:
        UserError: for a model whose embeddings cannot be disturbed.
    """
    scored = [row for row, tokens in enumerate(chosen) if tokens is not None and np.any(tokens)]
    segments: list[Segment] = []
    of: list[Neighbour] = []
    for row in scored:
        given, alone = pairs[row].conditioned, pairs[row].direct
        for number in range(neighbours):
            segments += [given, alone]
            of += [Neighbour(given.ids, number, seed, alpha)] * 2
    found: list[np.ndarray | None] = [None] * len(segments)

    def collect(positions: np.ndarray, launched: LaunchedBatch) -> None:
        for position, losses in zip(positions.tolist(), launched.token_losses(), strict=True):
            found[position] = losses

    def around(positions: np.ndarray, batch: Batch) -> Any:
        noise = [partial(of[i].noise, last=len(segments[i].ids)) for i in positions.tolist()]
        return _disturbed(model, batch, noise)

    nll_with_tails(model, segments, collect, **{**options, "engine": "padded", "around": around})
    scores = np.full((len(pairs), neighbours), np.nan)
    if scored:
        deltas, counts = token_deltas(found[0::2], found[1::2])
        tokens = np.concatenate([np.tile(chosen[row], neighbours) for row in scored])
        scores[scored] = selected_scores(deltas, counts, tokens).reshape(-1, neighbours)
    return scores


@dataclass(frozen=True)
class DisturbedRows:
    """Rows whose neighbours are to be scored.

    Attributes:
        pairs: the rows, encoded.
        chosen: for each row which of its answer's tokens count, bool.
        tokens: that are read to score the neighbours of each row; 0 of one that has none.
    """

    pairs: list[EncodedPair]
    chosen: list[np.ndarray]
    tokens: list[int]

    def __len__(self) -> int:
        return len(self.pairs)


class Scorer(Protocol):
    """What attached the losses of tokens, an `IFDScorer`: how it reads rows, and its model."""

    options: dict[str, Any]
    turns: str | None
    token_budget: int | None

    @property
    def model(self) -> nn.Module: ...

    def encode(self, batch: Mapping[str, list]) -> list[EncodedPair]: ...


class NeighbourScorer:
    """Mean and standard deviation of S-IFD over the neighbours of rows that have losses of tokens.

    It reads and scores rows as a scoring job wants it (see `scoring_job`).

    Args:
        scorer: what attached the losses.
        rows: all of the data set, with the columns of these losses: they say from which threshold tokens count.
        share: of all tokens; see `delta_threshold`.
        neighbours: of each row.
        alpha, seed: see `Neighbour`.

    Raises:
        UserError: for numbers that cannot be, for a scorer of other than single answers in the definition "paper", and
            for rows without losses of tokens.
    """

    def __init__(
        self,
        scorer: Scorer,
        rows: Dataset,
        share: float = SHARE,
        neighbours: int = NEIGHBOURS,
        alpha: float = ALPHA,
        seed: int = 0,
    ) -> None:
        check_share(share)
        check_positive(neighbours=neighbours)
        check_token_losses(scorer.options["definition"], scorer.turns)
        if scorer.turns is not None:
            raise UserError("neighbourhood disturbs rows of one answer: score them with a scorer without turns.")
        if not isinstance(alpha, Real) or not 0 <= alpha < float("inf"):
            raise UserError(f"alpha is the size of noise, a number of at least 0, got {alpha!r}.")
        self._scorer = scorer
        self.settings = {"share": share, "neighbours": neighbours, "alpha": float(alpha), "seed": seed}
        self._threshold = np.float32(threshold_of(TableReader(rows), share))

    def encode_rows(self, batch: Mapping[str, list], first: int | None = None) -> DisturbedRows:
        """Read a batch of rows, of which the first has this number, where it is known.

        Raises:
            UserError: for rows that are not read as they were when they were scored.
        """
        deltas, counts = token_deltas(*(batch[name] for name in TOKEN_COLUMNS))
        pairs = self._scorer.encode(batch)
        _check_scored_so(pairs, counts, first)
        chosen = np.split(np.abs(deltas) >= self._threshold, np.cumsum(counts)[:-1])
        tokens = [_tokens_read(pair) if of.any() else 0 for pair, of in zip(pairs, chosen, strict=True)]
        return DisturbedRows(pairs, chosen, [self.settings["neighbours"] * each for each in tokens])

    def score_rows(self, rows: DisturbedRows, progress: Callable[[int], Any] | None = None) -> dict[str, np.ndarray]:
        """`sifd_mean` and `sifd_std` of the rows, float64, NaN without a score.

        Args:
            rows: as `encode_rows` gives them.
            progress: called with the number of tokens done after each batch.
        """
        options = {name: self.settings[name] for name in ("neighbours", "alpha", "seed")}
        options |= {"token_budget": self._scorer.token_budget, "progress": progress}
        scores = neighbour_scores(self._scorer.model, rows.pairs, rows.chosen, **options)
        return {"sifd_mean": scores.mean(1), "sifd_std": scores.std(1)}

    def columns(self, rows: Dataset, show: bool) -> dict[str, np.ndarray]:
        """The same of all rows of a data set, (n,); `show` a progress bar or not."""
        found = [{name: np.empty(0) for name in ("sifd_mean", "sifd_std")}]
        for first in range(0, len(rows), _ROWS):
            read = self.encode_rows(rows[first : first + _ROWS], first)
            what, total = f"Neighbours, from row {first + 1:,}", sum(read.tokens)
            with tqdm(total=total, desc=what, unit="tok", unit_scale=True, disable=not show, leave=False) as bar:
                found.append(self.score_rows(read, bar.update))
        return {name: np.concatenate([part[name] for part in found]) for name in found[0]}


def _tokens_read(pair: EncodedPair) -> int:
    return len(pair.conditioned.ids) + len(pair.direct.ids)


def _check_scored_so(pairs: Sequence[EncodedPair], counts: np.ndarray, first: int | None) -> None:
    """Raise where rows are not read as they were when they were scored."""
    for place, (pair, count) in enumerate(zip(pairs, counts.tolist(), strict=True)):
        size = pair.conditioned.scored if pair.conditioned else 0
        if count and size != count:
            row = "A row" if first is None else f"Row {first + place}"
            raise UserError(
                f"{row} has losses of {count} tokens, and this scorer reads {size} in its answer: they are of "
                "another tokenizer, format, max_length or text. Use the scorer that attached them."
            )


@contextmanager
def _disturbed(model: nn.Module, batch: Batch, noise: Sequence[Callable[[int], np.ndarray]]) -> Iterator[None]:
    """Add noise to the embeddings of a padded batch: of each row, what is given for the width of the embeddings."""
    seen = 0

    def add(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        nonlocal seen
        seen += 1
        if output.dim() != 3 or output.shape[:2] != batch.input_ids.shape:
            raise UserError(_refusal(model, f"it gave embeddings of the shape {tuple(output.shape)}"))
        disturbed = output.clone()  # (B, T, d)
        for row, of_row in enumerate(noise):
            added = on_device(of_row(output.shape[-1]), output.device)  # (L, d)
            disturbed[row, : len(added)] += added.to(output.dtype)
        return disturbed

    with _embedding(model).register_forward_hook(add):
        yield
    if seen != 1:
        raise UserError(_refusal(model, f"a forward called its embedding {seen} times"))


def _embedding(model: nn.Module) -> nn.Module:
    embedding = None
    with suppress(AttributeError, NotImplementedError):
        embedding = unwrapped(model).get_input_embeddings()
    if embedding is None:
        raise UserError(_refusal(model, "it does not tell its input embeddings"))
    return embedding


def _refusal(model: nn.Module, why: str) -> str:
    return (
        f"The embeddings of {type(unwrapped(model)).__name__} cannot be disturbed: {why}. Rank its rows by sifd, which "
        "attach_selective_ifd makes without neighbours, or score with another model."
    )
