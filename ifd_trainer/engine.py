"""How a model is run over segments: two engines, and which of them gives a model's own numbers.

- `stream`, on a CPU, and in half precision on CUDA where there is a variable-length attention kernel: the segments of a
  batch as one stream without padding, shared beginnings computed once (see `ifd_trainer.stream` and
  `ifd_trainer.attention`). A model is compared with the other engine on a few tokens before its first use; one that
  gives other numbers is scored by the other engine.
- `padded`: segments of like length, padded on the right without an attention mask. Under causal attention no token
  sees what follows it, so padding changes nothing.

The LM head runs on the scored positions only, in chunks (see `ifd_trainer.head`), and the log-softmax in float32
whatever the model's dtype. On a CPU, float32 products are oneDNN's (see `ifd_trainer.onednn`).
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from .attention import HALF
from .borrow import borrowed
from .encoding import Segment, token_budget_batches
from .errors import UserError
from .forward import Batch, Pending, launch, logits_at, padded, streamed
from .head import Logits, find_change, lm_head, text_config, unwrapped, vocabulary_size
from .positions import kinds_of_lengths
from .stream import stream_batches
from .transfer import on_device

logger = logging.getLogger(__name__)

EngineName = Literal["auto", "stream", "padded"]
_LAYOUTS = {"stream": streamed, "padded": padded}

# A kernel for all spans is given the keys of each span's path: at most so many for each token of a batch.
_SEEN = 4
# Logits of a batch of a model whose logits cannot be taken in chunks, on a CPU and elsewhere: 128 MiB and 1 GiB in
# float32, or 220 and 1,766 scored tokens at a vocabulary of 152,000. A segment with more is a batch of its own.
CPU_LOGITS_BUDGET = 2**25
ACCELERATOR_LOGITS_BUDGET = 2**28
# Largest relative difference of the engines on the probe, in float32 and in half precision; they round differently.
_PROBE_TOLERANCE, _HALF_PROBE_TOLERANCE = 1e-4, 2e-2
# Most that later tokens may change a logit, of the largest one: 0.7 for a BERT with large random weights. A mixture of
# experts may round differently, and send a token to another expert, once a batch has other tokens.
_SEEN_BEHIND = 0.1


@dataclass(frozen=True)
class Engine:
    """A way to run a model, which is in eval mode and without gradients.

    Attributes:
        name: "stream" or "padded".
        model: a causal language model, or what a trainer wrapped around one.
        device: where the token ids go.
        logits: how the model makes logits, to take them in chunks; None to take them as a whole.
    """

    name: EngineName
    model: nn.Module
    device: torch.device
    logits: Logits | None

    @classmethod
    def of(cls, model: nn.Module, device: torch.device, name: EngineName = "auto", sharded: bool = False) -> Engine:
        """The engine of that name, or the one that fits the model; what a model does is tried out in forwards, once.

        `sharded`: the weights are spread over processes, which gather them in every forward.

        Raises:
            ValueError: for a model whose tokens see what follows them.
        """
        _check_causal(model, device)
        logits = _logits(model, device, sharded)
        if name == "auto":
            name = "stream" if streams(model, device) else "padded"
        return cls(name, model, device, logits)

    @property
    def setting(self) -> tuple[Hashable, ...]:
        """What the memory of a forward depends on beside the model and the lengths of rows."""
        return (self.name, *_setting(self.model, self.device))

    def scored_budget(self, segments: Sequence[Segment]) -> int:
        """Scored tokens of a batch: any number, or as many as are projected as a whole."""
        if self.logits:
            return max(sum(segment.scored for segment in segments), 1)
        budget = CPU_LOGITS_BUDGET if self.device.type == "cpu" else ACCELERATOR_LOGITS_BUDGET
        return max(budget // vocabulary_size(self.model), 1)

    def batches(self, segments: Sequence[Segment], token_budget: int) -> list[np.ndarray]:
        """Partition segments into batches: index arrays."""
        lengths, scored_budget = [len(segment.ids) for segment in segments], self.scored_budget(segments)
        batches: list[np.ndarray] = []
        for kind in kinds_of_lengths(lengths, text_config(self.model)):
            ids, scored = [segments[i].ids for i in kind], [segments[i].scored for i in kind]
            if self.name == "padded":
                found = token_budget_batches([lengths[i] for i in kind], token_budget, scored, scored_budget)
            else:
                seen_budget = None if self.device.type == "cpu" else _SEEN * token_budget
                found = stream_batches(ids, token_budget, scored, scored_budget, seen_budget)
            batches += [kind[batch] for batch in found]
        return batches

    def lay_out(self, segments: Sequence[Segment]) -> Batch:
        """A batch, on the host."""
        return _LAYOUTS[self.name](segments, self.device)

    def launch(self, batch: Batch, pooled: Sequence[int] | None = None) -> Pending:
        """Run a batch; see `ifd_trainer.forward.launch`."""
        return launch(self.model, batch, self.device, self.logits, pooled)

    def nll(self, segments: Sequence[Segment]) -> np.ndarray:
        """Run segments as one batch, and wait for it: their mean negative log-likelihood, (n,)."""
        return self.launch(self.lay_out(segments)).nll()


def model_device(model: nn.Module) -> torch.device:
    """The device of the model's first parameter (its input embedding, for a model spread over devices)."""
    return next(model.parameters()).device


def streams(model: nn.Module, device: torch.device | None = None) -> bool:
    """Whether the `stream` engine gives the numbers of the `padded` one for this model, tried out once.

    It does not for models without attention layers, with sliding windows, soft-capped scores or attention sinks, for
    absolute positions that ignore `position_ids`, behind prompt tuning, and off a CPU without a kernel for the dtype.
    """
    device = device or model_device(model)
    known, setting = _probed.setdefault(model, {}), _setting(model, device)
    if setting not in known:
        known[setting] = _streams_exactly(model, device)
        logger.debug("Engine for %s: %s", type(model).__name__, "stream" if known[setting] else "padded")
    return known[setting]


# ---- what is tried out -------------------------------------------------------------------------------------------

# For each model and setting.
_changes: weakref.WeakKeyDictionary[nn.Module, dict[Hashable, Logits | None]] = weakref.WeakKeyDictionary()
_probed: weakref.WeakKeyDictionary[nn.Module, dict[Hashable, bool]] = weakref.WeakKeyDictionary()
_causal: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def _setting(model: nn.Module, device: torch.device) -> tuple[Hashable, ...]:
    """What kernels and rounding depend on beside the model: kind of device, dtype of the weights, autocast."""
    autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    return device.type, next(model.parameters()).dtype, autocast


def _check_causal(model: nn.Module, device: torch.device) -> None:
    """Raise ValueError for a model in which other tokens at the end change the logits before them; tried out once."""
    if model in _causal:
        return
    ids = np.tile(np.arange(16) % vocabulary_size(model), (2, 1))
    ids[1, 8:] = 0
    inputs = {"input_ids": on_device(ids, device)}
    one, other = logits_at(model, inputs, np.concatenate([np.arange(8), 16 + np.arange(8)])).float().chunk(2)
    if (one - other).abs().max() > _SEEN_BEHIND * one.abs().max():
        raise UserError(
            f"{type(unwrapped(model)).__name__} lets tokens see those that follow them, so its losses are not those of "
            "predicting an answer. Score with a causal (decoder-only) language model."
        )
    _causal.add(model)


def _logits(model: nn.Module, device: torch.device, sharded: bool) -> Logits | None:
    """How logits come from the LM head, tried out once; None where they are not taken in chunks."""
    known, setting = _changes.setdefault(model, {}), _setting(model, device)
    if setting not in known:
        inputs = {"input_ids": torch.zeros(1, 3, dtype=torch.long, device=device)}
        known[setting] = find_change(model, lambda: logits_at(model, inputs, np.array([0, 2]))[None])
        logger.debug("Logits of %s: %s", type(model).__name__, known[setting])
    found = known[setting]
    # Modules inside the head (adapters) would gather their weights once a chunk, and processes differ in chunks.
    if not sharded or found is None:
        return found
    return None if list(lm_head(model).children()) else replace(found, gathered=True)


def _attends_to_all(config: Any) -> bool:
    """Whether every layer sees all earlier tokens; windows and chunks longer than the probe would not show in it."""
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    return layers == {"full_attention"} and getattr(config, "attention_chunk_size", None) is None


def _streams_exactly(model: nn.Module, device: torch.device) -> bool:
    if not _attends_to_all(text_config(model)):
        return False
    segments = _probe(vocabulary_size(model))
    batch = streamed(segments, device)
    if device.type != "cpu" and batch.plan.kernel is None:
        return False
    # Whatever such a model raises here, the padded engine scores it or raises it again.
    with borrowed(model, device), contextlib.suppress(Exception):
        expected = launch(model, padded(segments, device), device, None).nll()
        found = launch(model, batch, device, None, check=True).nll()
        if batch.plan.layers != text_config(model).num_hidden_layers:
            # Fresh weights hardly attend, so that the losses of such a model do not tell.
            logger.info("%s is padded: not all of its layers attend in the usual way.", type(model).__name__)
            return False
        tolerance = _HALF_PROBE_TOLERANCE if batch.plan.dtype in HALF else _PROBE_TOLERANCE
        off = float(np.abs(found / expected - 1).max())
        if not off <= tolerance:
            logger.info("%s is padded: as a stream its losses differ by up to %.1e.", type(model).__name__, off)
        return off <= tolerance
    return False


def _probe(vocabulary: int) -> list[Segment]:
    """Segments of some length, of any tokens: on a few special ones, rounding alone was 3.6 % in bfloat16."""
    rng = np.random.default_rng(0)
    beginning, *tails = (rng.integers(0, vocabulary, size).tolist() for size in (32, 16, 24, 40, 24))
    texts = [*(beginning + tail for tail in tails[:3]), tails[3]]
    return [Segment(ids, len(ids) - 12) for ids in texts]
