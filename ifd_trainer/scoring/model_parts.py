"""Where the parts of a language model are: what a trainer wrapped, its language config, its head, its vocabulary.

Trainers wrap models (DDP, FSDP, DeepSpeed), models that also see images keep the config of their language part inside
another one, and architectures call their output layer by different names. Whatever scores a model asks here, so that
the rest of the room can take any of them for a plain causal language model.
"""

from __future__ import annotations

import contextlib
from typing import Any

from torch import nn

# What the forward of a model that this package does not know may raise where it is run as it was not made for: on
# positions of a stream, on another shape of hidden states.
FORWARD_ERRORS = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError, ArithmeticError)


def lm_head(model: nn.Module) -> nn.Module | None:
    """The output embedding of a causal LM, or None where the model does not tell."""
    get = getattr(unwrapped(model), "get_output_embeddings", None)
    with contextlib.suppress(AttributeError, NotImplementedError):
        return get() if get is not None else None
    return None


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, FullyShardedDataParallel or a DeepSpeed engine."""
    while isinstance(inner := getattr(model, "module", None), nn.Module):
        model = inner
    return model


def text_config(model: nn.Module) -> Any:
    """The config of a model's language part; None for a model without a config."""
    config = getattr(unwrapped(model), "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def vocabulary_size(model: nn.Module) -> int:
    """Number of tokens, that of the input embeddings for a config that does not tell, or else a usual number."""
    size = getattr(text_config(model), "vocab_size", None)
    if not size:
        with contextlib.suppress(AttributeError, NotImplementedError):
            size = unwrapped(model).get_input_embeddings().num_embeddings
    return size or 2**15
