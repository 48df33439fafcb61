"""How a model is run over many rows at once: two engines, and which of them gives a model's own numbers.

A fast way to run rows together must not change a score. So an engine for a model is chosen by trying it out on a few
tokens, and models whose losses are not those of predicting an answer are refused here, in a sentence about them.

- `stream`, on a CPU, and in half precision on CUDA where there is a variable-length attention kernel: the segments of a
  batch as one stream without padding, shared beginnings computed once (see `scoring.prefix_stream` and
  `scoring.span_attention`). A model is compared with the other engine on a few tokens before its first use; one that
  gives other numbers is scored by the other engine.
- `padded`: segments of like length, padded on the right without an attention mask. Under causal attention no token
  sees what follows it, so padding changes nothing.

The LM head runs on the scored positions only, in chunks (see `scoring.chunked_lm_head`), and the log-softmax in float32
whatever the model's dtype. On a CPU, float32 products are oneDNN's (see `scoring.onednn`).
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

from ..data.encoding import Segment, token_budget_batches
from ..data.model_kinds import HEADLESS, SEES_AHEAD, WANTED, kind_of_class
from ..errors import UserError, with_kind
from .chunked_lm_head import ChunkedHead, find_logit_transform
from .eval_guard import eval_mode
from .forward import Batch, LaunchedBatch, launch, logits_at, padded, scored_logits, streamed
from .model_notes import noted
from .model_parts import FORWARD_ERRORS, lm_head, text_config, unwrapped, vocabulary_size
from .nested import Families
from .prefix_stream import stream_batches
from .private_names import can_set_attention
from .rope_limits import kinds_of_lengths
from .span_attention import HALF, NotExact, warn_without_kernel
from .transfer import on_device

logger = logging.getLogger(__name__)

EngineName = Literal["auto", "stream", "padded"]
_LAYOUTS = {"stream": streamed, "padded": padded}

# A kernel for all spans is given the keys of each span's prefix: at most so many for each token of a batch.
_SEEN = 4
# Logits of a batch of a model whose logits cannot be taken in chunks, on a CPU and elsewhere: 128 MiB and 1 GiB in
# float32, or 220 and 1,766 scored tokens at a vocabulary of 152,000. A segment with more is a batch of its own.
CPU_LOGITS_BUDGET = 2**25
ACCELERATOR_LOGITS_BUDGET = 2**28
# Largest difference of the engines' logits on the probe, of their spread, in float32 and in half precision: they round
# differently.
_PROBE_TOLERANCE, _HALF_PROBE_TOLERANCE = 1e-3, 0.15
# Most that tokens which are not to be seen may change a logit, of the largest one. Two forwards of one shape round
# alike, but for models that round by what else a batch holds: a mixture of experts may even send a token to another
# expert. 0.7 for a BERT with large random weights.
_UNSEEN, _UNSEEN_IN_MIXED = 1e-5, 0.1


@dataclass(frozen=True)
class Engine:
    """A way to run a model, which is in eval mode and without gradients.

    Attributes:
        name: "stream" or "padded".
        model: a causal language model, or what a trainer wrapped around one.
        device: where the token ids go.
        chunked_head: how the model makes logits, to take them in chunks; None to take them as a whole.
        nests: whether a segment that is the beginning of another is run inside it (see `scoring.nested`); not for an
            adapter that reads a row as a whole.
    """

    name: EngineName
    model: nn.Module
    device: torch.device
    chunked_head: ChunkedHead | None
    nests: bool = True

    @classmethod
    def for_model(
        cls, model: nn.Module, device: torch.device, name: EngineName = "auto", sharded: bool = False
    ) -> Engine:
        """The engine of that name, or the one that fits the model; what a model does is tried out in forwards, once.

        `sharded`: the weights are spread over processes, which gather them in every forward.

        Raises:
            UserError: for a model whose tokens see what follows them, or that is no language model.
        """
        _rounds_by_row(model, device)
        chunked_head = _chunked_head(model, device, sharded)
        if name == "auto":
            name = "stream" if streams(model, device) else "padded"
        elif not can_set_attention():
            name = "padded"  # as a stream, rows would see each other
        return cls(name, model, device, chunked_head, not _invoked(model))

    @property
    def setting(self) -> tuple[Hashable, ...]:
        """What the memory of a forward depends on beside the model and the lengths of rows."""
        return (self.name, *_setting(self.model, self.device))

    def scored_budget(self, segments: Sequence[Segment]) -> int:
        """Scored tokens of a batch: any number, or as many as are projected as a whole."""
        if self.chunked_head:
            return max(sum(segment.predicted for segment in segments), 1)
        budget = CPU_LOGITS_BUDGET if self.device.type == "cpu" else ACCELERATOR_LOGITS_BUDGET
        return max(budget // vocabulary_size(self.model), 1)

    def batches(self, segments: Sequence[Segment], token_budget: int) -> list[np.ndarray]:
        """Partition segments into batches, families of them undivided: index arrays."""
        lengths, scored_budget = [len(segment.ids) for segment in segments], self.scored_budget(segments)
        batches: list[np.ndarray] = []
        for kind in kinds_of_lengths(lengths, text_config(self.model)):
            families = Families.of([segments[i].ids for i in kind], self.nests)
            ids = [segments[i].ids for i in kind[families.longest]]
            scored = families.sums([segments[i].predicted for i in kind])
            if self.name == "padded":
                of_kind = token_budget_batches([len(each) for each in ids], token_budget, scored, scored_budget)
            else:
                seen_budget = None if self.device.type == "cpu" else _SEEN * token_budget
                of_kind = stream_batches(ids, token_budget, scored, scored_budget, seen_budget)
            batches += [kind[families.members(batch)] for batch in of_kind]
        return batches

    def lay_out(self, segments: Sequence[Segment]) -> Batch:
        """A batch, on the host."""
        return _LAYOUTS[self.name](segments, self.device, self.nests)

    def launch(
        self, batch: Batch, pooled_tokens: Sequence[int] | None = None, by_position: bool = False
    ) -> LaunchedBatch:
        """Run a batch; see `scoring.forward.launch`."""
        return launch(self.model, batch, self.device, self.chunked_head, pooled_tokens, by_position)

    def nll(self, segments: Sequence[Segment]) -> np.ndarray:
        """Run segments as one batch, and wait for it: their mean negative log-likelihood, (n,)."""
        return self.launch(self.lay_out(segments)).nll()


def model_device(model: nn.Module) -> torch.device:
    """The device of the model's first parameter (its input embedding, for a model spread over devices)."""
    return next(model.parameters()).device


def streams(model: nn.Module, device: torch.device | None = None) -> bool:
    """Whether the `stream` engine gives the numbers of the `padded` one for this model, tried out once.

    It does not for models without attention layers, with sliding windows, soft-capped scores or attention sinks, for
    absolute positions that ignore `position_ids`, adapters that read a row as a whole (virtual tokens, invocation
    tokens), and off a CPU without a kernel for the dtype.
    """
    device = device or model_device(model)
    return noted(model, "streams", _setting(model, device), lambda: _streams_exactly(model, device))


# ---- what is refused ----------------------------------------------------------------------------------------------


def check_causal_lm(model: nn.Module) -> None:
    """Raise for a model that by its class and config is no causal language model; runs no forward.

    Args:
        model: of transformers, also inside PEFT or what a trainer wraps around it. Of another model, whose class and
            config tell nothing, nothing is refused.

    Raises:
        UserError: for an encoder-decoder, a classifier, a masked language model, or a model without a head; says what
            was found and what is wanted.

    >>> from transformers import GPT2Config, GPT2ForSequenceClassification
    >>> model = GPT2ForSequenceClassification(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=9))
    >>> check_causal_lm(model)                                                # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ifd_trainer.errors.UserError: GPT2ForSequenceClassification is a classifier: ...
    """
    model = _innermost(model)
    if not isinstance(model, PreTrainedModel):
        return
    name = type(model).__name__
    kind = _kind(name, model.config)
    if kind is None and lm_head(model) is None and re.search(r"(?<!LMHead)(?<!DoubleHeads)Model$", name):
        kind = HEADLESS
    if kind is not None:
        raise UserError(_refusal(model, kind))


def check_causal_config(name: str, config: PretrainedConfig) -> None:
    """Raise for the config of a checkpoint that `AutoModelForCausalLM` does not load, or loads as what it is not.

    Args:
        name: of the checkpoint, for the message.
        config: of transformers.

    Raises:
        UserError: for the kinds of `check_causal_lm`, and for others that are no language models.
    """
    classes = getattr(config, "architectures", None) or [""]
    if any(kind := _kind(name_of_class, config) for name_of_class in classes):
        raise UserError(f"{name} ({', '.join(classes) or config.model_type}) {kind}. {WANTED}")
    own = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if not own and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(
            f"{name} is a model of the type {config.model_type!r}, which transformers does not load as a causal "
            f"language model. {WANTED}"
        )


def _kind(name: str, config: Any) -> str | None:
    """What a class of that name is instead of a causal language model."""
    if kind := kind_of_class(name, bool(getattr(config, "is_encoder_decoder", False))):
        return kind
    told = getattr(config.get_text_config(), "use_bidirectional_attention", None) in (True, "all")
    encoder = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not (
        getattr(config, "is_decoder", False) or getattr(config, "causal", False)
    )
    return SEES_AHEAD if told or encoder else None


def _innermost(model: nn.Module) -> nn.Module:
    """The model inside what trainers, `torch.compile` and PEFT put around it."""
    while True:
        inner = unwrapped(getattr(model, "_orig_mod", model))
        inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
        if inner is model:
            return model
        model = inner


def _refusal(model: nn.Module, kind: str) -> str:
    return f"{type(_innermost(model)).__name__} {kind}. {WANTED}"


# ---- what is tried out -------------------------------------------------------------------------------------------


def _setting(model: nn.Module, device: torch.device) -> tuple[Hashable, ...]:
    """What an engine depends on beside the model: kind of device, dtype of the weights, autocast, kind of adapters."""
    return device.type, next(model.parameters()).dtype, _autocast(device), _adapter_reads_rows(model)


def _autocast(device: torch.device) -> torch.dtype | None:
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def _rounds_by_row(model: nn.Module, device: torch.device) -> bool:
    """Whether the logits of a row are the same bits whatever other rows a batch holds; tried out once.

    Raises:
        UserError: for a model that is no causal language model: by what it is, or because other tokens at the end of a
            row change the logits before them.
    """
    return noted(model, "rounds by row", None, lambda: _try_by_row(model, device))


def _try_by_row(model: nn.Module, device: torch.device) -> bool:
    check_causal_lm(model)
    if _invoked(model):  # any tokens could invoke it
        return False
    ids = np.tile(np.arange(16) % vocabulary_size(model), (2, 1))  # (2, 16)
    other = ids.copy()
    other[0, 8:] = 0
    # All of the second row, which no token of the first is to change, shows how the model rounds.
    flat_indices = np.concatenate([np.arange(8), 16 + np.arange(16)])
    one, two = (logits_at(model, {"input_ids": on_device(x, device)}, flat_indices).float() for x in (ids, other))
    changed = ((one - two).abs().amax(-1) / one.abs().max()).cpu()
    by_row = not bool(changed[8:].max() > 0 or _mixes_rows(model))
    if changed[:8].max() > (_UNSEEN if by_row else _UNSEEN_IN_MIXED):
        raise UserError(_refusal(model, SEES_AHEAD))
    return by_row


def _mixes_rows(model: nn.Module) -> bool:
    """Whether a model's config says that it computes with groups of tokens: experts, quantised products."""
    config = text_config(model)
    settings = {} if config is None else vars(config)
    experts = any("expert" in name and isinstance(value, int) and value > 1 for name, value in settings.items())
    return experts or bool(getattr(_innermost(model), "is_quantized", False))


def _chunked_head(model: nn.Module, device: torch.device, sharded: bool) -> ChunkedHead | None:
    """How logits come from the LM head, tried out once; None where they are not taken in chunks."""

    def find() -> ChunkedHead | None:
        inputs = {"input_ids": torch.zeros(1, 3, dtype=torch.long, device=device)}
        return find_logit_transform(model, lambda: logits_at(model, inputs, np.array([0, 2]))[None])

    head = noted(model, "logits", _setting(model, device), find)
    # Modules inside the head (adapters) would gather their weights once a chunk, and processes differ in chunks.
    if not sharded or head is None:
        return head
    return None if list(lm_head(model).children()) else replace(head, gathered=True)


def _attends_to_all(config: Any) -> bool:
    """Whether every layer sees all earlier tokens; windows and chunks longer than the probe would not show in it."""
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    return layers == {"full_attention"} and getattr(config, "attention_chunk_size", None) is None


def _invoked(model: nn.Module) -> bool:
    """Whether an adapter of PEFT begins where a row has the tokens that invoke it (activated LoRA)."""
    return any(getattr(adapter, "alora_invocation_tokens", None) for adapter in _adapters(model))


def _adapter_reads_rows(model: nn.Module) -> bool:
    """Whether there is an adapter whose work is not that of each token: such a one, or one that puts virtual tokens in
    front of a row."""
    return _invoked(model) or any(getattr(adapter, "is_prompt_learning", False) for adapter in _adapters(model))


def _adapters(model: nn.Module) -> list[Any]:
    """The configs of a model's adapters."""
    return list((getattr(unwrapped(model), "peft_config", None) or {}).values())


def _takes_positions(model: nn.Module) -> bool:
    """Whether a model's forward has a parameter `position_ids`, or takes any."""
    parameters = inspect.signature(unwrapped(model).forward).parameters.values()
    return any(p.name == "position_ids" or p.kind is p.VAR_KEYWORD for p in parameters)


def _streams_exactly(model: nn.Module, device: torch.device) -> bool:
    if not _attends_to_all(text_config(model)) or _adapter_reads_rows(model) or not can_set_attention():
        return False
    segments, others = _probe(vocabulary_size(model))
    batch = streamed(segments, device)
    if device.type != "cpu" and batch.plan.kernel is None:
        if device.type == "cuda" and {next(model.parameters()).dtype, _autocast(device)} & set(HALF):
            warn_without_kernel()
        return False
    try:
        if not _takes_positions(model):
            raise NotExact("its forward takes no positions")
        with eval_mode(model, device):
            _compare_with_padded(model, batch, device, segments, others)
            return True
    except NotExact as error:
        logger.info("%s is padded: %s.", type(model).__name__, error)
    except FORWARD_ERRORS as error:  # the padded engine scores the model, or raises it again
        slower = "%s is padded, which is slower: as a stream it raised %s"
        logger.warning(slower, type(model).__name__, with_kind(error))
    return False


def _compare_with_padded(
    model: nn.Module, batch: Batch, device: torch.device, segments: list[Segment], others: list[Segment]
) -> None:
    """Raise NotExact unless a stream of `segments` gives the padded engine's logits; `others` differ in some rows."""
    expected = scored_logits(model, padded(segments, device), device)  # (N, V)
    streamed_logits = scored_logits(model, batch, device, check=True)  # (N, V)
    if batch.plan.layers != text_config(model).num_hidden_layers:
        # Fresh weights hardly attend, so that the losses of such a model do not tell.
        raise NotExact("not all of its layers attend in the usual way")
    spread = (expected - expected.mean(-1, keepdim=True)).square().mean().sqrt()
    tolerance = _HALF_PROBE_TOLERANCE if batch.plan.dtype in HALF else _PROBE_TOLERANCE
    off = float((streamed_logits - expected).square().mean().sqrt() / spread)
    logger.debug("Logits of %s as a stream differ by %.1e of their spread.", type(model).__name__, off)
    if not off <= tolerance:  # NaN is not either
        raise NotExact(f"as a stream its logits differ by up to {off:.1e}")
    moved = replace(batch, position_ids=batch.position_ids + (batch.position_ids > 3))
    if torch.equal(scored_logits(model, moved, device), streamed_logits):
        raise NotExact("it does not read the positions of a stream")
    if not _rounds_by_row(model, device):
        return
    # Rounding does not hide what rows see of each other: it is the same where only other rows' tokens differ.
    again = scored_logits(model, streamed(others, device), device)
    same = np.repeat([a == b for a, b in zip(segments, others, strict=True)], [s.predicted for s in segments])
    change = (again - streamed_logits)[on_device(same, again.device)].abs().max()
    if not float(change / streamed_logits.abs().max()) <= _UNSEEN:
        raise NotExact("as a stream its rows see each other")


def _probe(vocabulary: int) -> tuple[list[Segment], list[Segment]]:
    """Segments of some length, of any tokens: on a few special ones, rounding alone was 3.6 % in bfloat16.

    And the same with other tokens in two of them, whose stream is laid out alike.
    """
    rng = np.random.default_rng(0)

    def some(size: int, first: int) -> list[int]:
        return [first % vocabulary, *rng.integers(0, vocabulary, size - 1).tolist()]

    beginning, quarter = some(32, 0), max(vocabulary // 4, 1)
    starts = [*(beginning + some(1, n * quarter) for n in (1, 2, 3)), [quarter]]
    ends = [rng.integers(0, vocabulary, size).tolist() for size in (15, 23, 39, 23)]
    new = [rng.integers(0, vocabulary, len(end)).tolist() if n in (1, 3) else end for n, end in enumerate(ends)]

    def segments(ends: list[list[int]]) -> list[Segment]:
        return [Segment(start + end, len(start)) for start, end in zip(starts, ends, strict=True)]

    return segments(ends), segments(new)
