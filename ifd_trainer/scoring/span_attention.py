"""Attention when many rows stand in one stream of tokens: each token sees those of its own row, and no others.

`scoring.prefix_stream` cuts the stream into spans, of which each knows the tokens before it. While a model runs inside
`attending`, its layers call a function of this module, registered with transformers' attention interface. With a mask
(1, 1, T, T) for transformers' own attention instead, SmolLM2-135M took 1.7 times as long for real rows, since all pairs
of tokens are computed; and a model whose attention is something else (windows, sinks) would not be found out.

Two ways to the same numbers:

- a call of PyTorch's `scaled_dot_product_attention` for each span: everywhere;
- one call of a variable-length flash attention kernel for all spans, with the keys of each span's prefix gathered
  before its own: float16 and bfloat16 on CUDA, where PyTorch or the package flash-attn has such a kernel. Its causal
  mask has to be aligned with the last key, so that the queries of a span see all of its prefix. `attending(check=True)`
  compares it with the first way, on the values of every layer.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AttentionInterface

from ..errors import with_kind
from .prefix_stream import Span
from .private_names import set_attention
from .transfer import on_device

logger = logging.getLogger(__name__)

# q (T, heads, D), k and v (S, key heads, D), cumulated lengths of queries and of keys (n + 1,), longest of each, scale;
# returns (T, heads, D).
Kernel = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int, int, float | None], torch.Tensor
]

_NAME = "ifd_stream"
HALF = (torch.float16, torch.bfloat16)
# What attention layers are called with that changes nothing of it. Whatever else they are called with may change it: a
# window, a soft cap, a sink, a bias, or what models yet to come bring along.
_OF_NO_EFFECT = ("position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states")
# What importing a package that is missing, of another release, or built for another PyTorch or CUDA raises.
_BROKEN = (ImportError, OSError, RuntimeError, AttributeError, TypeError, ValueError)
_KERNEL_TOLERANCE = 2e-2  # of the largest value, between the two ways; bfloat16 rounds by 0.4 %


class NotExact(Exception):
    """The model asks for an attention that is not computed here, or a kernel gives other numbers."""


class AttentionPlan:
    """How the tokens of a stream attend, laid out on the host.

    Args:
        spans: of the stream.
        device: where the model will run.
    """

    def __init__(self, spans: Sequence[Span], device: torch.device) -> None:
        self.spans, self.device = spans, device
        self.tokens = spans[-1].end if spans else 0
        self.kernel = varlen_kernel(device)
        self.check = False
        self.dtype: torch.dtype | None = None  # what the attention was computed in, once it was
        self.layers = 0  # that attended by this plan
        self._packed = None if self.kernel is None else _packed(spans)
        self._sent: dict[torch.device, list] = {}

    def packed(self, device: torch.device) -> list:
        """What the kernel is given, its arrays on a device; a model may be spread over several."""
        if device in self._sent:
            return self._sent[device]
        sent = [on_device(part, device) if isinstance(part, np.ndarray) else part for part in self._packed]
        self._sent[sent[1].device] = sent  # "cuda" was sent to "cuda:0"
        return sent

    @cached_property
    def masked(self) -> list[tuple[slice, slice | torch.Tensor, torch.Tensor | None]]:
        """Queries, keys and mask of each span, on the host; one without a prefix has no mask, and its own keys."""
        return [_masked(span) for span in self.spans]


def _masked(span: Span) -> tuple[slice, slice | torch.Tensor, torch.Tensor | None]:
    queries, before = slice(span.start, span.end), len(span.prefix)
    if not before:
        return queries, queries, None
    size = span.end - span.start
    mask = torch.ones(size, before + size, dtype=torch.bool).tril(before)  # all of the prefix, then causal
    return queries, torch.from_numpy(_keys(span)), mask


def _packed(spans: Sequence[Span]) -> tuple[np.ndarray | None, np.ndarray, np.ndarray, int, int]:
    """What a kernel is given for all spans: the keys to gather (S,), and the ends and longest of queries and of keys.

    The keys are None where they are the stream itself, since no span has a prefix.
    """
    queries = np.array([span.end - span.start for span in spans])
    keys = queries + [len(span.prefix) for span in spans]
    gathered = np.concatenate([_keys(span) for span in spans]) if (keys > queries).any() else None
    ends = (np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32) for sizes in (queries, keys))
    return gathered, *ends, int(queries.max()), int(keys.max())


def _keys(span: Span) -> np.ndarray:
    """Places in the stream that the last token of a span sees, in order."""
    return np.concatenate([span.prefix, np.arange(span.start, span.end)])


_active: AttentionPlan | None = None


@contextlib.contextmanager
def attending(model: nn.Module, plan: AttentionPlan, check: bool = False) -> Iterator[None]:
    """Let every attention layer of `model` attend along spans: each sees its prefix and, causally, itself.

    Args:
        model: a model of transformers.
        plan: of the stream (1, T) that the model is run on inside this context.
        check: compute every layer in both ways; off a CPU, allow the kernel's only.

    Raises:
        NotExact: from the model's forward, for attention that is something else, or when the two ways differ.
    """
    global _active
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}.values()
    before = [(config, config._attn_implementation) for config in configs if hasattr(config, "_attn_implementation")]
    _active, plan.check = plan, check
    if plan.kernel is not None:
        plan.packed(plan.device)  # there before the forward begins
    try:
        for config, _ in before:
            set_attention(config, _NAME)
        yield
    finally:
        for config, name in before:
            set_attention(config, name)
        _active = None


def varlen_kernel(device: torch.device) -> Kernel | None:
    """A variable-length attention kernel for a device, or None."""
    return None if device.type != "cuda" else _pytorch_kernel() or _flash_attn_kernel()


def _pytorch_kernel() -> Kernel | None:
    try:
        from torch.nn.attention.varlen import varlen_attn

        takes = inspect.signature(varlen_attn).parameters
    except _BROKEN as error:
        _tell_missing("torch.nn.attention.varlen", with_kind(error))
        return None
    if not {"scale", "window_size"} <= set(takes):
        _tell_missing("torch.nn.attention.varlen", "varlen_attn takes no scale and window_size")
        return None
    grouped = {"enable_gqa": True} if "enable_gqa" in takes else {}  # before it had a name, it was always so
    return lambda q, k, v, q_ends, k_ends, longest_q, longest_k, scale: varlen_attn(
        q, k, v, q_ends, k_ends, longest_q, longest_k, scale=scale, window_size=(-1, 0), **grouped
    )


def _flash_attn_kernel() -> Kernel | None:
    try:
        from flash_attn import flash_attn_varlen_func
    except _BROKEN as error:
        _tell_missing("flash_attn", with_kind(error))
        return None
    return lambda q, k, v, q_ends, k_ends, longest_q, longest_k, scale: flash_attn_varlen_func(
        q, k, v, q_ends, k_ends, longest_q, longest_k, softmax_scale=scale, causal=True
    )


@cache  # asked for each batch
def _tell_missing(package: str, reason: str) -> None:
    logger.info("No variable-length attention kernel from %s: %s", package, reason)


@cache
def warn_without_kernel() -> None:
    """Say once that half precision on CUDA would be faster with a kernel."""
    logger.warning(
        "Rows are padded, since neither PyTorch %s nor the package flash-attn gives a variable-length attention kernel "
        "here: scores stay the same, but padding and beginnings that rows share are computed too. PyTorch 2.11 or "
        "later has one.",
        torch.__version__,
    )


def _attention(
    module: nn.Module,
    query: torch.Tensor,  # (1, heads, T, D)
    key: torch.Tensor,  # (1, key heads, T, D)
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls in place of its own attention; (1, T, heads, D)."""
    # Of switches, those that are off have no effect either, and a causal mask that is on.
    others = {name: value for name, value in kwargs.items() if name not in _OF_NO_EFFECT and value is not None}
    unknown = [name for name, value in others.items() if value is not (name == "is_causal")]
    if attention_mask is not None or unknown:
        raise NotExact(f"the model's attention has a mask or something else of its own: {unknown}")
    if not query.shape[2] == key.shape[2] == _active.tokens:
        raise NotExact("the model attends to other tokens than those of the stream, such as virtual ones")
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
    _active.dtype = dtype
    _active.layers += 1
    if _active.kernel is None or dtype not in HALF:
        if _active.check and kind != "cpu":
            raise NotExact(f"there is no variable-length kernel for {dtype}, and a call for each span is slow there")
        return _by_span(query, key, value, scaling), None
    out = _by_kernel(query.to(dtype), key.to(dtype), value.to(dtype), scaling)
    if _active.check:
        wanted = _by_span(query.float(), key.float(), value.float(), scaling)
        if not (out.float() - wanted).abs().max() <= _KERNEL_TOLERANCE * wanted.abs().max():  # NaN is not either
            raise NotExact("the variable-length kernel gives other numbers")
    return out, None


AttentionInterface.register(_NAME, _attention)


def _by_span(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None) -> torch.Tensor:
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    out = torch.empty_like(query)  # (1, heads, T, D)
    for queries, keys, mask in _active.masked:
        if mask is not None:
            keys, mask = keys.to(key.device), mask.to(key.device)
        q, k, v = query[:, :, queries], key[:, :, keys], value[:, :, keys]
        out[:, :, queries] = nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale
        )
    return out.transpose(1, 2).contiguous()


def _by_kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None) -> torch.Tensor:
    gathered, *lengths = _active.packed(query.device)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, heads, D), (T, key heads, D)
    if gathered is not None:
        k, v = k[gathered], v[gathered]  # (S, key heads, D)
    return _active.kernel(q, k, v, *lengths, scale)[None]
