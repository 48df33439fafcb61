"""What a recipe asks for and this machine may not have, so that a laptop can plan what a GPU is to train.

A plan is made by the same trainer as the run, so that it is the same: TRL prepares the rows, and the train loader says
how many batches they are. But its model has no weights (PyTorch's meta device), nothing is scored or written, and what
this machine lacks for the run is set aside and noted.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.utils import is_torch_bf16_gpu_available, is_torch_tf32_available
from trl import ModelConfig, SFTConfig

from ..errors import UserError


@dataclass
class PlanConfig(SFTConfig):
    """TRL's settings for a plan: nothing is written, and what this machine lacks is set aside and noted.

    Attributes:
        lacking: what the run needs and is not here, in words.
        parallel: a way to share the model over processes that was set aside: "deepspeed", or None.
    """

    def __post_init__(self) -> None:
        self.lacking = _set_aside(self)
        self.parallel, self.deepspeed = "deepspeed" if self.deepspeed else None, None
        self.push_to_hub, self.report_to = False, "none"
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()  # several processes are one run then too
        super().__post_init__()

    @property
    def should_save(self) -> bool:
        """No: the trainer makes no folder."""
        return False

    @property
    def place_model_on_device(self) -> bool:
        """No: a model without weights cannot be moved."""
        return False


def _set_aside(sft: SFTConfig) -> list[str]:
    """Take out of the settings what this machine cannot do, and say what that is."""
    accelerated = not sft.use_cpu and torch.accelerator.is_available()
    lacking = []
    if (sft.bf16 or sft.bf16_full_eval) and not sft.use_cpu and not is_torch_bf16_gpu_available():
        lacking.append("GPU with bfloat16 (bf16: true)")
        sft.bf16 = sft.bf16_full_eval = False
    if (sft.fp16 or sft.fp16_full_eval) and not accelerated:
        lacking.append("GPU for float16 (fp16: true)")
        sft.fp16 = sft.fp16_full_eval = False
        sft.bf16 = bool(sft.bf16)  # None would become true
    if sft.tf32 and not is_torch_tf32_available():
        lacking.append("GPU with TF32 (tf32: true)")
        sft.tf32 = None
    if sft.fsdp and int(os.environ.get("WORLD_SIZE", 1)) < 2:
        lacking.append("second process (fsdp: start it with torchrun or accelerate launch)")
        sft.fsdp = sft.fsdp_config = None
    if sft.deepspeed and not installed("deepspeed"):
        lacking.append("package deepspeed")
    if sft.use_liger_kernel and not installed("liger_kernel"):
        lacking.append("package liger-kernel (use_liger_kernel: true)")
        sft.use_liger_kernel = False
    return [*lacking, *(f"package {name} (report_to)" for name in missing_trackers(sft.report_to))]


def missing_trackers(report_to: str | list[str] | None) -> list[str]:
    """Trackers that are asked for and not installed.

    Raises:
        ValueError: for a name that transformers does not know.
    """
    names = [report_to] if isinstance(report_to, str) else list(report_to or [])
    names = [name for name in names if name not in ("none", "all")]
    unknown = [name for name in names if name not in INTEGRATION_TO_CALLBACK]
    if unknown:
        raise UserError(
            f"report_to must be none, all or among {', '.join(INTEGRATION_TO_CALLBACK)}, got {unknown[0]!r}."
        )
    there = get_available_reporting_integrations() if names else []
    return [name for name in names if name not in [*there, "flyte"]]  # that one looks for itself


def installed(package: str) -> bool:
    """Whether a package can be imported."""
    return importlib.util.find_spec(package) is not None


def lacking_for(model: ModelConfig) -> Iterator[str]:
    """What this machine lacks to load the model as the recipe says."""
    attention = model.attn_implementation or ""
    if "flash" in attention and not torch.accelerator.is_available():
        yield f"GPU for attn_implementation: {attention}"
    elif attention.startswith("flash_attention_2") and not installed("flash_attn"):
        yield "package flash-attn (attn_implementation)"
    if (model.load_in_4bit or model.load_in_8bit) and not installed("bitsandbytes"):
        yield "package bitsandbytes (load_in_4bit, load_in_8bit)"
    if model.use_peft and not installed("peft"):
        yield "package peft (use_peft: true)"


def outline(config: PretrainedConfig, dtype: Any, model: ModelConfig, sft: SFTConfig) -> PreTrainedModel:
    """The model as TRL would load it, on the meta device."""
    if isinstance(dtype, str) and dtype != "auto":
        dtype = getattr(torch, dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise UserError(f"dtype must be auto, float32, bfloat16 or float16, got {model.dtype!r}.")
    if dtype in ("auto", None):
        dtype = config.dtype or torch.float32
    cls = getattr(transformers, config.architectures[0], None)
    with torch.device("meta"):
        if cls is None:
            made = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=sft.trust_remote_code)
        else:
            made = cls._from_config(config, dtype=dtype)
    made.is_loaded_in_4bit, made.is_loaded_in_8bit = model.load_in_4bit, model.load_in_8bit  # TRL asks for these
    return made
