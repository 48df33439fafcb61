"""What this room uses of PyTorch and transformers that they do not promise to keep.

A release may rename such a thing, or change what it does, without a word. So each is tried out once in a process,
before its first use: where it does not do what it did, one warning says what is slower now, and the caller goes on by
public ways to the same scores. No other module of this room knows these names.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig

from ..errors import with_kind

logger = logging.getLogger(__name__)

_PYTORCH = f"PyTorch {torch.__version__}"
# What a name that is gone, another signature, or an operator without an implementation raises.
_CHANGED = (AttributeError, TypeError, ValueError, NotImplementedError, RuntimeError)


def _tried(name: str, release: str, otherwise: str) -> Callable[[Callable[[], bool]], Callable[[], bool]]:
    """For a function that tries a name out: made once in a process; one warning where it fails says what is slower."""

    def once(trial: Callable[[], bool]) -> Callable[[], bool]:
        @cache
        @wraps(trial)
        def works() -> bool:
            try:
                if trial():
                    return True
                outcome = "it does something else"
            except _CHANGED as error:
                outcome = with_kind(error)
            what = "%s does not work as expected in %s (%s). Scores stay the same, but %s"
            logger.warning(what, name, release, outcome, otherwise)
            return False

        return works

    return once


# ---- oneDNN's products -------------------------------------------------------------------------------------------


def onednn_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x @ weight.T + bias by oneDNN: x (M, K), weight (N, K), bias (N,), float32 on a CPU."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@_tried(
    "torch.ops.mkldnn._linear_pointwise",
    _PYTORCH,
    "float32 products on a CPU are computed by PyTorch's own BLAS, which on some processors takes twice as long.",
)
def has_onednn_linear() -> bool:
    """Whether `onednn_linear` gives the numbers of a product, tried out on two that are exact in float32."""
    exact = {"dtype": torch.float32, "device": "cpu"}
    x, weight = torch.tensor([[1.0, 2.0]], **exact), torch.tensor([[3.0, 5.0], [4.0, 6.0]], **exact).t()
    products = [onednn_linear(x, weight, bias).tolist() for bias in (None, torch.tensor([0.5, -1.0], **exact))]
    return products == [[[11.0, 17.0]], [[11.5, 16.0]]]


# ---- the attention function of a model ---------------------------------------------------------------------------


def set_attention(config: Any, name: str | None) -> None:
    """Let the layers of this config attend by the function of that name, and those of configs inside it as before."""
    config._attn_implementation_internal = name


@_tried(
    "PretrainedConfig._attn_implementation_internal",
    f"transformers {transformers.__version__}",
    "rows are padded and the beginnings that they share are computed for each of them, which takes up to seven times "
    "as long on a CPU.",
)
def can_set_attention() -> bool:
    """Whether `set_attention` sets the name that a model's layers look up."""
    config = PretrainedConfig()
    set_attention(config, "ifd_trial")
    return config._attn_implementation == "ifd_trial"


# ---- what is put around a module ---------------------------------------------------------------------------------


@_tried(
    "nn.Module._forward_hooks",
    _PYTORCH,
    "the LM head is called as a whole on a CPU, which takes longer for large vocabularies.",
)
def tells_hooks() -> bool:
    """Whether modules tell the hooks that run around their forward, as `_forward_hooks` and `_forward_pre_hooks`."""
    layer = nn.Identity()
    layer.register_forward_hook(lambda *_: None)
    layer.register_forward_pre_hook(lambda *_: None)
    return len(layer._forward_hooks) == len(layer._forward_pre_hooks) == 1


@_tried(
    "nn.Module._compiled_call_impl",
    _PYTORCH,
    "a model compiled by `model.compile()` is compiled anew for each shape of a batch.",
)
def tells_compiled() -> bool:
    """Whether modules tell that they were compiled in place, as `_compiled_call_impl`."""
    return nn.Identity()._compiled_call_impl is None  # compiling one to see takes a second
