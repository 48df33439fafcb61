"""One forward over a batch of segments: from token ids to the losses of the tokens that are scored.

A segment is a row's prompt and answer, or what stands before a direct answer and that answer. A batch of them is laid
out on the host (`padded`, `streamed`), run (`launch`), and waited for once its results are asked for (`LaunchedBatch`):
an accelerator computes while the host lays out the next batch. All index arrays are on the device before the forward
begins, so that nothing inside it makes the host wait.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn

from ..data.encoding import Segment
from ..errors import UserError
from .chunked_lm_head import ChunkedHead, Targets, whole_losses
from .model_parts import lm_head
from .nested import Families
from .onednn import OneDNN
from .prefix_stream import build_stream
from .span_attention import AttentionPlan, attending
from .transfer import HostCopy, on_device


@dataclass(frozen=True)
class Batch:
    """n segments laid out for one forward, on the host.

    Attributes:
        input_ids: (B, T) token ids.
        token_indices: for each segment, the indices of its tokens in the flattened ids (B * T).
        scored: (n,) scored tokens of each segment that its mean loss is of; the others are its tail.
        predicted: (n,) all scored tokens of each segment.
        predicting: (U,) flat indices that predict scored tokens, ascending; one that segments share is there once.
        predicted_at: (N,) for each scored token the number of its index among the U, ascending.
        targets: (N,) the scored tokens, in the order of `predicted_at`.
        scored_index: (N,) the index of each of these among the scored tokens of the segments, one segment after
            another.
        position_ids: (B, T) of a stream: each token's position in its own segment.
        plan: of a stream: how its tokens attend to each other.
        more: what else the model is called with, such as the pixels of images.
    """

    input_ids: np.ndarray
    token_indices: list[np.ndarray]
    scored: np.ndarray
    predicted: np.ndarray
    predicting: np.ndarray
    predicted_at: np.ndarray
    targets: np.ndarray
    scored_index: np.ndarray
    position_ids: np.ndarray | None = None
    plan: AttentionPlan | None = None
    more: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def from_segments(
        cls, segments: Sequence[Segment], input_ids: np.ndarray, token_indices: list[np.ndarray], **stream: Any
    ) -> Batch:
        """Segments whose tokens are at `token_indices` of the flattened ids."""
        before = [indices[segment.start - 1 : -1] for segment, indices in zip(segments, token_indices, strict=True)]
        predicting, predicted_at = np.unique(np.concatenate(before), return_inverse=True)  # (U,), (N,)
        order = np.argsort(predicted_at, kind="stable")  # (N,)
        targets = np.concatenate([segment.ids[segment.start :] for segment in segments], dtype=np.int64)  # (N,)
        counts = np.array([(segment.scored, segment.predicted) for segment in segments])  # (n, 2)
        places = predicting, predicted_at[order], targets[order], order
        return cls(input_ids, token_indices, *counts.T, *places, **stream)


def padded(segments: Sequence[Segment], device: torch.device, nested: bool = True) -> Batch:
    """A row for each family of segments, padded on the right to the longest; the same for every device."""
    families = Families.of([segment.ids for segment in segments], nested)
    rows = [segments[i].ids for i in families.longest]
    longest = max(map(len, rows))
    input_ids = np.zeros((len(rows), longest), dtype=np.int64)  # (B, T) = (f, longest)
    for row, ids in enumerate(rows):
        input_ids[row, : len(ids)] = ids
    places = zip(families.family.tolist(), segments, strict=True)
    token_indices = [row * longest + np.arange(len(segment.ids)) for row, segment in places]
    return Batch.from_segments(segments, input_ids, token_indices)


def streamed(segments: Sequence[Segment], device: torch.device, nested: bool = True) -> Batch:
    """One row, without padding, in which beginnings that segments share stand once."""
    families = Families.of([segment.ids for segment in segments], nested)
    stream = build_stream([segments[i].ids for i in families.longest])
    input_ids, position_ids = stream.input_ids[None], stream.position_ids[None]  # (1, T)
    plan = AttentionPlan(stream.spans, device)
    places = zip(families.family.tolist(), segments, strict=True)
    token_indices = [stream.token_indices[family][: len(segment.ids)] for family, segment in places]
    return Batch.from_segments(segments, input_ids, token_indices, position_ids=position_ids, plan=plan)


@dataclass(frozen=True)
class LaunchedBatch:
    """A batch whose forward was begun, and may still run: its (N,) losses, and (n, H) means if they were wanted."""

    batch: Batch
    losses: HostCopy
    mean_states: HostCopy | None

    def wait(self) -> None:
        """Return once the device has computed it."""
        self.losses.array()

    def nll(self) -> np.ndarray:
        """Mean negative log-likelihood of each segment's scored tokens, (n,) float64; waits for the device."""
        return self._sums[0] / self.batch.scored

    def tail_nll(self) -> np.ndarray:
        """Negative log-likelihood of each segment's tail as a whole, (n,) float64; NaN for a segment without one."""
        return np.where(self.batch.predicted > self.batch.scored, self._sums[1], np.nan)

    def token_losses(self) -> list[np.ndarray]:
        """What `nll` is the mean of: n arrays of float32, nats; waits for the device."""
        losses = self._in_order.astype(np.float32)
        return [losses[first:end] for first, end in self._parts.tolist()]

    @cached_property
    def _in_order(self) -> np.ndarray:
        """Losses of the segments' tokens, one segment after another, and a zero behind them, (N + 1,) float64."""
        losses = np.zeros(len(self.batch.scored_index) + 1)  # widened here: not every device has float64
        losses[self.batch.scored_index] = self.losses.array()
        return losses

    @cached_property
    def _parts(self) -> np.ndarray:
        """Where in that order a segment's tokens begin, and where its tail does or the next segment, (n, 2)."""
        firsts = np.cumsum(self.batch.predicted) - self.batch.predicted
        return np.stack([firsts, firsts + self.batch.scored], axis=1)

    @cached_property
    def _sums(self) -> np.ndarray:
        """Losses of each segment's tokens before its tail, and of those in it: sums, (2, n)."""
        return np.add.reduceat(self._in_order, self._parts.ravel()).reshape(-1, 2).T

    def means(self) -> np.ndarray | None:
        """Mean hidden state of each segment, (n, H) float32."""
        return None if self.mean_states is None else self.mean_states.array()


def launch(
    model: nn.Module,
    batch: Batch,
    device: torch.device,
    chunked_head: ChunkedHead | None,
    pooled_tokens: Sequence[int] | None = None,
    by_position: bool = False,
) -> LaunchedBatch:
    """Run a forward; on an accelerator, without waiting for its end.

    Args:
        model: a causal language model, in eval mode and without gradients.
        batch: of n segments.
        device: where the model runs.
        chunked_head: how the model makes logits, to take them in chunks; None to take them as a whole.
        pooled_tokens: how many tokens of each segment, from the first, its mean hidden state is of; None for no means.
        by_position: whether that mean weighs each token by its position, 1, 2, ..., and not all of them alike.
    """
    targets = Targets.on(device, batch.predicted_at, batch.targets)
    pooling = None if pooled_tokens is None else _MeanPooling(batch, pooled_tokens, device, by_position)
    with _prepared(device, model, batch) as inputs:
        if chunked_head is None:
            losses = whole_losses(logits_at(model, inputs, batch.predicting, pooling), targets)  # (N,)
        else:
            losses = _losses_at(model, inputs, batch.predicting, targets, chunked_head, pooling)  # (N,)
    return LaunchedBatch(batch, HostCopy(losses), None if pooling is None else HostCopy(pooling.means))


@contextlib.contextmanager
def _prepared(
    device: torch.device, model: nn.Module, batch: Batch, check: bool = False
) -> Iterator[dict[str, torch.Tensor]]:
    """A batch as inputs of `model`, which inside this context runs as the batch wants it."""
    inputs = {"input_ids": on_device(batch.input_ids, device)}  # (B, T)
    if batch.position_ids is not None:
        inputs["position_ids"] = on_device(batch.position_ids, device)  # (B, T)
    inputs |= {name: value.to(device) for name, value in batch.more.items()}
    attention = contextlib.nullcontext() if batch.plan is None else attending(model, batch.plan, check)
    with attention, OneDNN() if device.type == "cpu" else contextlib.nullcontext():
        yield inputs


def scored_logits(model: nn.Module, batch: Batch, device: torch.device, check: bool = False) -> torch.Tensor:
    """Logits that the N scored tokens are predicted by, (N, V) float32, one segment after another.

    For trying out a model on few tokens. `check`: compare the ways to attend along a stream; see `attending`.
    """
    with _prepared(device, model, batch, check) as inputs:
        logits = logits_at(model, inputs, batch.predicting)  # (U, V)
    predicted_at = np.empty_like(batch.predicted_at)  # (N,), one segment after another
    predicted_at[batch.scored_index] = batch.predicted_at
    return logits[on_device(predicted_at, logits.device)].float()


class _MeanPooling:
    """Called with the hidden states of a forward (B, T, H); `means` is then their mean for each segment, (n, H)."""

    def __init__(self, batch: Batch, sizes: Sequence[int], device: torch.device, by_position: bool = False) -> None:
        self._by_position = by_position
        parts = [indices[:size] for indices, size in zip(batch.token_indices, sizes, strict=True)]
        self._sizes, self._length = [len(part) for part in parts], batch.input_ids.shape[1]
        self._indices = on_device(np.concatenate(parts), device)
        self.means: torch.Tensor | None = None

    def __call__(self, hidden: torch.Tensor) -> None:
        hidden = hidden[:, -self._length :].flatten(0, 1)  # (B * T, H); prompt tuning puts virtual tokens in front
        parts = self._indices.to(hidden.device).split(self._sizes)
        mean = _position_weighted_mean if self._by_position else lambda states: states.mean(0)
        self.means = torch.stack([mean(hidden[part].float()) for part in parts])  # (n, H)


def _position_weighted_mean(states: torch.Tensor) -> torch.Tensor:
    """Of T states (T, H) the mean with the weights 1, 2, ..., T, (H,)."""
    weights = torch.arange(1, len(states) + 1, dtype=states.dtype, device=states.device)  # (T,)
    return (states * (weights / weights.sum())[:, None]).sum(0)


Observe = Callable[[torch.Tensor], None]


def _losses_at(
    model: nn.Module,
    inputs: dict[str, torch.Tensor],
    predicting: np.ndarray,
    targets: Targets,
    chunked_head: ChunkedHead,
    observe: Observe | None = None,
) -> torch.Tensor:
    """Losses of N targets predicted at U flat indices of the inputs, (N,); the LM head runs on a chunk at a time.

    All of them are projected before the head's own call, which is left a single position for the model to go on with.
    """
    losses: list[torch.Tensor] = []

    def reduce(module: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        losses.append(chunked_head.losses(module, hidden, targets))
        return hidden[:1]

    # Other hooks run on each chunk, so they are not to run before; but for one that gathers the head's weights.
    indices, length = _from_end(inputs, predicting), inputs["input_ids"].shape[1]
    with _at_head(model, indices, length, reduce, observe, first=not chunked_head.gathered):
        model(**inputs, use_cache=False)
    return losses[0]


def logits_at(
    model: nn.Module, inputs: dict[str, torch.Tensor], predicting: np.ndarray, observe: Observe | None = None
) -> torch.Tensor:
    """Logits at U flat indices of the inputs, (U, V); the LM head runs on those alone where it is a module."""
    rows, columns = indices = _from_end(inputs, predicting)
    length = inputs["input_ids"].shape[1]
    with _at_head(model, indices, length, lambda module, hidden: hidden, observe):
        logits = model(**inputs, use_cache=False).logits
    if lm_head(model) is not None and logits.shape[:2] == (1, len(predicting)):
        return logits[0]
    _check_whole(logits, length)
    return logits[rows.to(logits.device), columns.to(logits.device)]  # a model that does not call its head as a module


def _from_end(inputs: dict[str, torch.Tensor], flat_indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column of flat indices of the inputs, (U,) each, on their device.

    Columns count from the end: prompt tuning puts virtual tokens in front.
    """
    device, length = inputs["input_ids"].device, inputs["input_ids"].shape[1]
    return on_device(flat_indices // length, device), on_device(flat_indices % length - length, device)


def _check_whole(states: torch.Tensor, length: int) -> None:
    """Raise where a model has read fewer tokens than it was given: what it makes is then of other ones."""
    if states.shape[1] < length:
        raise UserError(
            f"The model cut rows of {length} tokens to {states.shape[1]}, so their answers cannot be scored. Unsloth "
            "does so beyond max_seq_length: load the model with one as large as the longest row, or cut rows with "
            "max_length."
        )


def _at_head(
    model: nn.Module,
    indices: tuple[torch.Tensor, torch.Tensor],
    length: int,
    reduce: Callable[[nn.Module, torch.Tensor], torch.Tensor],
    observe: Observe | None,
    first: bool = False,
) -> contextlib.AbstractContextManager[Any]:
    """Let the LM head see what `reduce` makes of the hidden states at U indices (U, H), and not those of all.

    A hook on the head picks them, so that whatever a model does to its logits afterwards still happens. `observe` is
    called with all hidden states, (B, T, H). `first` puts the hook before those that are there.
    """
    rows, columns = indices
    picking = False

    def pick(module: nn.Module, args: tuple) -> tuple | None:
        nonlocal picking
        if picking:
            return None  # a call by `reduce`
        picking = True
        hidden = args[0]  # (B, T, H)
        _check_whole(hidden, length)
        if observe is not None:
            observe(hidden)
        picked = hidden[rows.to(hidden.device), columns.to(hidden.device)]  # (U, H)
        given = reduce(module, picked).unsqueeze(0)  # (1, U, H), or (1, 1, H)
        picking = False
        return (given, *args[1:])

    head = lm_head(model)
    return contextlib.nullcontext() if head is None else head.register_forward_pre_hook(pick, prepend=first)
