"""One forward over a batch of segments: from token ids to the losses of the tokens that are scored.

A segment is a row's prompt and answer, or what stands before a direct answer and that answer. A batch of them is laid
out on the host (`padded`, `streamed`), run (`launch`), and waited for once its results are asked for (`LaunchedBatch`):
an accelerator computes while the host lays out the next batch. All index arrays are on the device before the forward
begins, so that nothing inside it makes the host wait.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ..data.encoding import Segment
from .chunked_lm_head import Logits, Targets, whole_losses
from .model_parts import lm_head
from .onednn import OneDNN, rounded
from .prefix_stream import build_stream
from .span_attention import Plan, attending
from .transfer import HostCopy, on_device


@dataclass(frozen=True)
class Batch:
    """n segments laid out for one forward, on the host.

    Attributes:
        ids: (B, T) token ids.
        places: for each segment, the places of its tokens in the flattened ids.
        scored: (n,) scored tokens of each segment.
        predicting: (U,) places that predict scored tokens, ascending; one that several segments share is there once.
        predicted_at: (N,) for each scored token the number of its place among the U, ascending.
        targets: (N,) the scored tokens, in the order of `predicted_at`.
        scored_index: (N,) the index of each of these among the scored tokens of the segments, one segment after
            another.
        positions: (B, T) of a stream: each token's position in its own segment.
        plan: of a stream: how its tokens attend to each other.
    """

    ids: np.ndarray
    places: list[np.ndarray]
    scored: np.ndarray
    predicting: np.ndarray
    predicted_at: np.ndarray
    targets: np.ndarray
    scored_index: np.ndarray
    positions: np.ndarray | None = None
    plan: Plan | None = None

    @classmethod
    def of(cls, segments: Sequence[Segment], ids: np.ndarray, places: list[np.ndarray], **stream: Any) -> Batch:
        """Segments whose tokens stand at `places` of the flattened ids."""
        each = [place[segment.start - 1 : -1] for segment, place in zip(segments, places, strict=True)]
        predicting, predicted_at = np.unique(np.concatenate(each), return_inverse=True)
        by_place = np.argsort(predicted_at, kind="stable")
        targets = np.concatenate([segment.ids[segment.start :] for segment in segments], dtype=np.int64)
        scored = np.array([segment.scored for segment in segments])
        return cls(ids, places, scored, predicting, predicted_at[by_place], targets[by_place], by_place, **stream)


def padded(segments: Sequence[Segment], device: torch.device) -> Batch:
    """A row for each segment, padded on the right to the longest; the same for every device."""
    longest = max(len(segment.ids) for segment in segments)
    ids = np.zeros((len(segments), longest), dtype=np.int64)
    for row, segment in enumerate(segments):
        ids[row, : len(segment.ids)] = segment.ids
    places = [row * longest + np.arange(len(segment.ids)) for row, segment in enumerate(segments)]
    return Batch.of(segments, ids, places)


def streamed(segments: Sequence[Segment], device: torch.device) -> Batch:
    """One row, without padding, in which beginnings that segments share stand once."""
    stream = build_stream([segment.ids for segment in segments])
    if device.type == "cpu":
        stream = stream.lengthened(rounded(len(stream.ids)))
    plan = Plan(stream.spans, device)
    return Batch.of(segments, stream.ids[None], stream.places, positions=stream.positions[None], plan=plan)


@dataclass(frozen=True)
class LaunchedBatch:
    """A batch whose forward was begun, and may still run: its (N,) losses, and (n, H) means if they were wanted."""

    batch: Batch
    losses: HostCopy
    mean_states: HostCopy | None

    def nll(self) -> np.ndarray:
        """Mean negative log-likelihood of each segment's scored tokens, (n,) float64; waits for the device."""
        losses = np.empty(len(self.batch.scored_index), dtype=np.float64)  # widened here: not every device has float64
        losses[self.batch.scored_index] = self.losses.array()
        firsts = np.cumsum(self.batch.scored) - self.batch.scored
        return np.add.reduceat(losses, firsts) / self.batch.scored

    def means(self) -> np.ndarray | None:
        """Mean hidden state of each segment, (n, H) float32."""
        return None if self.mean_states is None else self.mean_states.array()


def launch(
    model: nn.Module,
    batch: Batch,
    device: torch.device,
    logits: Logits | None,
    pooled: Sequence[int] | None = None,
) -> LaunchedBatch:
    """Run a forward; on an accelerator, without waiting for its end.

    Args:
        model: a causal language model, in eval mode and without gradients.
        batch: of n segments.
        device: where the model runs.
        logits: how the model makes logits, to take them in chunks; None to take them as a whole.
        pooled: how many tokens of each segment, from the first, its mean hidden state is of; None for no means.
    """
    targets = Targets.on(device, batch.predicted_at, batch.targets)
    means = None if pooled is None else _Means(batch, pooled, device)
    with _prepared(device, model, batch) as inputs:
        if logits is None:
            losses = whole_losses(logits_at(model, inputs, batch.predicting, means), targets)
        else:
            losses = _losses_at(model, inputs, batch.predicting, targets, logits, means)
    return LaunchedBatch(batch, HostCopy(losses), None if means is None else HostCopy(means.found))


@contextlib.contextmanager
def _prepared(
    device: torch.device, model: nn.Module, batch: Batch, check: bool = False
) -> Iterator[dict[str, torch.Tensor]]:
    """A batch as inputs of `model`, which inside this context runs as the batch wants it."""
    inputs = {"input_ids": on_device(batch.ids, device)}
    if batch.positions is not None:
        inputs["position_ids"] = on_device(batch.positions, device)
    attention = contextlib.nullcontext() if batch.plan is None else attending(model, batch.plan, check)
    with attention, OneDNN() if device.type == "cpu" else contextlib.nullcontext():
        yield inputs


def scored_logits(model: nn.Module, batch: Batch, device: torch.device, check: bool = False) -> torch.Tensor:
    """Logits that the N scored tokens are predicted by, (N, V) float32, one segment after another.

    For trying out a model on few tokens. `check`: compare the ways to attend along a stream; see `attending`.
    """
    with _prepared(device, model, batch, check) as inputs:
        logits = logits_at(model, inputs, batch.predicting)
    places = np.empty_like(batch.predicted_at)  # one segment after another
    places[batch.scored_index] = batch.predicted_at
    return logits[on_device(places, logits.device)].float()


class _Means:
    """Called with the hidden states of a forward (B, T, H); `found` is then their mean for each segment, (n, H)."""

    def __init__(self, batch: Batch, sizes: Sequence[int], device: torch.device) -> None:
        parts = [place[:size] for place, size in zip(batch.places, sizes, strict=True)]
        self._sizes, self._length = [len(part) for part in parts], batch.ids.shape[1]
        self._places = on_device(np.concatenate(parts), device)
        self.found: torch.Tensor | None = None

    def __call__(self, hidden: torch.Tensor) -> None:
        hidden = hidden[:, -self._length :].flatten(0, 1)  # prompt tuning puts virtual tokens in front
        parts = self._places.to(hidden.device).split(self._sizes)
        self.found = torch.stack([hidden[part].float().mean(0) for part in parts])


Observe = Callable[[torch.Tensor], None]


def _losses_at(
    model: nn.Module,
    inputs: dict[str, torch.Tensor],
    predicting: np.ndarray,
    targets: Targets,
    logits: Logits,
    observe: Observe | None = None,
) -> torch.Tensor:
    """Losses of N targets predicted at U places of the flattened inputs, (N,); the LM head runs on a chunk at a time.

    All of them are projected before the head's own call, which is left a single position for the model to go on with.
    """
    found: list[torch.Tensor] = []

    def reduce(module: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        found.append(logits.losses(module, hidden, targets))
        return hidden[:1]

    # Other hooks run on each chunk, so they are not to run before; but for one that gathers the head's weights.
    with _at_head(model, _from_end(inputs, predicting), reduce, observe, first=not logits.gathered):
        model(**inputs, use_cache=False)
    return found[0]


def logits_at(
    model: nn.Module, inputs: dict[str, torch.Tensor], predicting: np.ndarray, observe: Observe | None = None
) -> torch.Tensor:
    """Logits at U places of the flattened inputs, (U, V); the LM head runs on those alone where it is a module."""
    rows, back = places = _from_end(inputs, predicting)
    with _at_head(model, places, lambda module, hidden: hidden, observe):
        logits = model(**inputs, use_cache=False).logits
    if lm_head(model) is not None and logits.shape[:2] == (1, len(predicting)):
        return logits[0]
    return logits[rows.to(logits.device), back.to(logits.device)]  # a model that does not call its head as a module


def _from_end(inputs: dict[str, torch.Tensor], places: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column of places of the flattened inputs, (U,) each, on their device.

    Columns count from the end: prompt tuning puts virtual tokens in front.
    """
    ids = inputs["input_ids"]
    length = ids.shape[1]
    return on_device(places // length, ids.device), on_device(places % length - length, ids.device)


def _at_head(
    model: nn.Module,
    places: tuple[torch.Tensor, torch.Tensor],
    reduce: Callable[[nn.Module, torch.Tensor], torch.Tensor],
    observe: Observe | None,
    first: bool = False,
) -> contextlib.AbstractContextManager[Any]:
    """Let the LM head see what `reduce` makes of the hidden states at U places (U, H), and not those of all.

    A hook on the head picks them, so that whatever a model does to its logits afterwards still happens. `observe` is
    called with all hidden states, (B, T, H). `first` puts the hook before those that are there.
    """
    rows, back = places
    picking = False

    def pick(module: nn.Module, args: tuple) -> tuple | None:
        nonlocal picking
        if picking:
            return None  # a call by `reduce`
        picking = True
        hidden = args[0]  # (B, T, H)
        if observe is not None:
            observe(hidden)
        picked = hidden[rows.to(hidden.device), back.to(hidden.device)]
        given = reduce(module, picked).unsqueeze(0)
        picking = False
        return (given, *args[1:])

    head = lm_head(model)
    return contextlib.nullcontext() if head is None else head.register_forward_pre_hook(pick, prepend=first)
