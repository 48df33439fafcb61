"""Scoring in the midst of training leaves no trace: not in the model, nor in the global random state.

The trainer's model is borrowed for a while: dropout off, no gradients, nothing compiled anew, and all given back as it
was, so that a run with scoring draws the same random numbers as one without.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import nn

from .private_names import tells_compiled


@contextlib.contextmanager
def eval_mode(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Run `model` in eval mode without gradients; give back every module's mode and the random states."""
    modes = [(module, module.training) for module in model.modules()]
    devices = {p.device for p in model.parameters()} | {device}  # a model may be spread over devices, or be off them
    with _random_states(devices), torch.no_grad(), _uncompiled(model):
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


def _uncompiled(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Run a compiled model as it is: it would be compiled anew for each shape, and with the hooks of scoring.

    Other models keep what they have compiled inside, such as flex attention.
    """
    in_place = tells_compiled()
    compiled = any(
        hasattr(module, "_orig_mod") or (in_place and module._compiled_call_impl) for module in model.modules()
    )
    return torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()


@contextlib.contextmanager
def _random_states(devices: Collection[torch.device]) -> Iterator[None]:
    """Give back the global random states of the CPU and of the accelerators among `devices`."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        for kind in {device.type for device in devices} - {"cpu", "meta", "mps"}:
            current = torch.get_device_module(kind).current_device
            numbers = {current() if device.index is None else device.index for device in devices if device.type == kind}
            stack.enter_context(torch.random.fork_rng(devices=sorted(numbers), device_type=kind))
        if any(device.type == "mps" for device in devices):  # a single device, whose functions take no number
            stack.callback(torch.mps.set_rng_state, torch.mps.get_rng_state())
        yield
