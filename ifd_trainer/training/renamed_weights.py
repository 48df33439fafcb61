"""The weights of a checkpoint whose names are not those of the model, as models that see save them.

`save_pretrained` writes some models with the names of an older release, and `from_pretrained` reads them. A Trainer
that resumes looks for the model's own names, warns of those that it does not find, and goes on with the weights that
the model began with (transformers 5.23, LLaVA: none of them is found).
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

logger = logging.getLogger(__name__)


def load_renamed(model: nn.Module, checkpoint: str | Path) -> bool:
    """Load the weights of a checkpoint as `from_pretrained` does, where it has names that the model has not.

    Returns:
        Whether it had.
    """
    names = _names(Path(checkpoint))
    if not isinstance(model, PreTrainedModel) or names <= model.state_dict().keys():
        return False
    with torch.random.fork_rng(devices=[]):
        saved = type(model).from_pretrained(checkpoint, dtype=model.dtype)
    model.load_state_dict(saved.state_dict())
    logger.info("The weights in %s have other names than the model's: they were read by from_pretrained.", checkpoint)
    return True


def _names(checkpoint: Path) -> set[str]:
    """Names of the weights in a checkpoint; none where it has no such file."""
    index, single = checkpoint / SAFE_WEIGHTS_INDEX_NAME, checkpoint / SAFE_WEIGHTS_NAME
    if index.exists():
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    if not single.exists():
        return set()
    with safe_open(single, framework="pt") as weights:
        return set(weights.keys())
