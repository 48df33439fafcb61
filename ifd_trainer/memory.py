"""How many tokens of a batch fit into a device's free memory.

    bytes(t) = fixed + per_token * t          from forwards of two sizes, the peak over what was there before
    tokens   = (share * free - fixed) / per_token

Free is what the driver has and what the allocator holds without using it. Half of it is planned with: other libraries
on the device (collectives, data loaders) ask the driver, who cannot give them what an allocator caches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

SHARE = 0.5
# Fewer tokens leave a device idle; more gain nothing, and pad more.
LEAST_TOKENS, MOST_TOKENS = 1024, 65536
_NEEDED = ("mem_get_info", "memory_allocated", "memory_reserved", "max_memory_allocated", "reset_peak_memory_stats")


@dataclass(frozen=True)
class Footprint:
    """Bytes that a forward of t tokens takes over the weights: fixed + per_token * t."""

    fixed: float
    per_token: float

    def tokens(self, free: int) -> int:
        """Tokens of a batch for `free` bytes, a multiple of 16 between `LEAST_TOKENS` and `MOST_TOKENS`.

        >>> Footprint(fixed=2**20, per_token=2**16).tokens(free=2**30)
        8176
        """
        found = (SHARE * free - self.fixed) / self.per_token
        return int(min(max(found, LEAST_TOKENS), MOST_TOKENS)) // 16 * 16


def device_memory(device: torch.device) -> Any | None:
    """The functions that tell a device's memory (`torch.cuda`, say); None for a CPU and where they are missing."""
    if device.type in ("cpu", "meta", "mps"):
        return None
    module = torch.get_device_module(device)
    return module if all(hasattr(module, name) for name in _NEEDED) else None


def measure(run: Callable[[int], Any], sizes: tuple[int, int], memory: Any, device: torch.device) -> Footprint:
    """The footprint of `run(tokens)` from two numbers of tokens, the smaller first.

    The device's peak statistics are reset.

    Raises:
        torch.OutOfMemoryError: when one of them does not fit.
    """
    run(sizes[0])  # what is made once (workspaces of libraries, compiled kernels) is no cost of a token
    peaks = []
    for tokens in sizes:
        memory.reset_peak_memory_stats(device)
        before = memory.memory_allocated(device)
        run(tokens)
        peaks.append(memory.max_memory_allocated(device) - before)
    small, large = peaks
    per_token = max((large - small) / (sizes[1] - sizes[0]), 1.0)
    return Footprint(max(small - per_token * sizes[0], 0.0), per_token)


def free_bytes(memory: Any, device: torch.device) -> int:
    """Bytes that a forward could take."""
    return memory.mem_get_info(device)[0] + memory.memory_reserved(device) - memory.memory_allocated(device)
