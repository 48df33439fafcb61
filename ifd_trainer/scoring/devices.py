"""Devices and dtypes: what a user may name, what there is, and what is taken by default."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import UserError


def device_type(device: str | torch.device) -> str:
    """The kind of a device that a user named; ValueError for a name that PyTorch does not know."""
    try:
        return torch.device(device).type
    except RuntimeError as error:
        raise UserError(
            f"Unknown device {device!r}: use 'cuda' ('cuda:1' for the second one), 'mps' or 'cpu'."
        ) from error


def check_device(device: str | torch.device) -> None:
    """Raise ValueError for a device on which no tensor can be made; a process should not fork after that."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # PyTorch asserts that it was built for CUDA
        reason = str(error).splitlines()[0].split(". ")[0].rstrip(".")  # of what may be a page
        raise UserError(
            f"The device {str(device)!r} cannot be used here: {reason}. Leave device out to take the best there "
            f"is: {default_device()!r}."
        ) from error


def named_dtype(dtype: torch.dtype | str | None) -> torch.dtype | str | None:
    """A dtype by its name; "auto" is transformers' word for the checkpoint's own."""
    named = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype in (None, "auto"):
        return dtype
    if not isinstance(named, torch.dtype) or not named.is_floating_point:
        raise UserError(f"dtype must be 'float32', 'bfloat16' or 'float16', got {dtype!r}.")
    return named


def default_device(rank: int | None = None) -> str:
    """The accelerator of this rank, or "cpu"."""
    if torch.cuda.is_available():
        return f"cuda:{(rank or 0) % torch.cuda.device_count()}"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def default_dtype(config: Any, device: str) -> torch.dtype:
    """float32 on a CPU; on an accelerator the checkpoint's dtype, with bfloat16 in place of float16 where it runs."""
    if torch.device(device).type == "cpu":
        return torch.float32
    dtype = getattr(config, "dtype", None) or torch.float32
    if dtype == torch.float16 and torch.device(device).type == "cuda" and torch.cuda.is_bf16_supported():
        return torch.bfloat16
    return dtype
