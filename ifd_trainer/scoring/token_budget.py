"""How many tokens are scored at once: on an accelerator what its memory holds, on a CPU what the heap gives back
quickly.

Too few leave a device idle, too many do not fit. What a forward takes is measured on two small batches:

    bytes(t) = fixed + per_token * t                        the peak of a forward over what was there before
    tokens   = (planned - fixed) / per_token

A quarter of the device's memory is planned with, and not more than 3 GiB: by arithmetic a 7B model has some 20,000
tokens in a batch then, and its products do not get faster with more. What is free changes from epoch to epoch, and from
a run to its resumption, whose batches, and with them the rounding of scores, are to be the same: half of it is planned
with only where that is less. Free is what the driver has and what the allocator holds without using it.

accelerate's `find_executable_batch_size` was tried in place of the halving in `losses.run_in_turn`. It takes 0.9 of
what did not fit: 14 forwards fail where a quarter fits (halving: 3), and 57 for a row that never fits, which it does
not name. It collects garbage and empties the cache before each batch (1.2 s beside a 135M model on a busy CPU).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ..data.encoding import Segment
from .chunked_lm_head import CPU_CHUNK_VALUES
from .model_notes import is_noted, noted
from .model_parts import text_config, vocabulary_size
from .onednn import rounded_down

logger = logging.getLogger(__name__)

SHARE_OF_TOTAL, MOST_BYTES, SHARE_OF_FREE = 1 / 4, 3 * 2**30, 1 / 2
# Fewer tokens leave a device idle; more gain nothing, and pad more.
LEAST_TOKENS, MOST_TOKENS = 1024, 65536
# Where it is not measured: weights spread over processes, which would have to try out the same number of forwards, or
# over devices; devices that do not tell their memory; less to score than trying out is worth.
ACCELERATOR_TOKENS = 16384
_WORTH_MEASURING = 2**16  # tokens
_TRIED_TOKENS = 1024  # of the smaller batch; the larger has four times as many
# On two CPU cores with a 135M model 2,048 was as fast as 512 and 1,024, and faster than 4,096. A model with wide layers
# has fewer: an intermediate result of 32 MiB takes new pages each time (see `scoring.chunked_lm_head`).
CPU_TOKENS, LEAST_CPU_TOKENS = 2048, 256
_NEEDED = ("mem_get_info", "memory_allocated", "memory_reserved", "max_memory_allocated", "reset_peak_memory_stats")
_Run = Callable[[list[Segment]], Any]


@dataclass(frozen=True)
class Footprint:
    """Bytes that a forward of t tokens takes over the weights: fixed + per_token * t."""

    fixed: float
    per_token: float

    def tokens(self, planned: float) -> int:
        """Tokens of a batch for so many bytes, between `LEAST_TOKENS` and `MOST_TOKENS`; see `onednn.rounded_down`.

        >>> Footprint(fixed=2**20, per_token=2**16).tokens(2**29)
        7936
        """
        fits = (planned - self.fixed) / self.per_token
        return rounded_down(int(min(max(fits, LEAST_TOKENS), MOST_TOKENS)))


def token_budget(
    model: nn.Module,
    lengths: Sequence[int],
    scored_budget: int,
    device: torch.device,
    run: _Run | None,
    how: Hashable = None,
) -> int:
    """Tokens of a batch.

    Args:
        model: what is run.
        lengths: of all segments that will be.
        scored_budget: most scored tokens of a batch.
        device: where it is run.
        run: runs a batch of segments and waits for it; None where that is not to be tried out.
        how: what else the memory of a forward depends on; measured once for each.
    """
    memory = device_memory(device)
    if memory is None:
        return _cpu_tokens(model) if device.type == "cpu" else ACCELERATOR_TOKENS
    longest = max(lengths, default=0)  # attention may take memory by the square of a row's length
    case = (how, longest.bit_length())
    new = not is_noted(model, "footprint", case)
    spread = len({parameter.device for parameter in model.parameters()}) > 1  # only one device would be looked at
    if new and (run is None or spread or sum(lengths) < _WORTH_MEASURING):
        return ACCELERATOR_TOKENS
    footprint = noted(
        model, "footprint", case, lambda: _tried(vocabulary_size(model), longest, scored_budget, memory, device, run)
    )
    planned = planned_bytes(memory, device)
    if footprint is None:
        return LEAST_TOKENS
    budget = footprint.tokens(planned)
    takes = f"{footprint.fixed / 2**20:.0f} MiB and {footprint.per_token / 2**10:.0f} KiB a token"
    why = f"{budget} (for {planned / 2**30:.1f} GiB; a forward takes {takes})"
    logger.log(logging.INFO if new else logging.DEBUG, "Token budget on %s: %s.", device, why)
    return budget


def _tried(
    vocabulary: int, longest: int, scored_budget: int, memory: Any, device: torch.device, run: _Run
) -> Footprint | None:
    """The footprint of batches of rows of a length, or None, with a warning, if the smaller trial does not fit."""
    rows = max(_TRIED_TOKENS // longest, 1)

    def tried(tokens: int, all_scored: bool) -> None:
        count = tokens // longest
        scored = min(longest - 1, max(scored_budget // count, 1)) if all_scored else 1
        # No two begin alike: a stream would compute once what they share.
        firsts = np.arange(count) % vocabulary
        run([Segment([first, *[0] * (longest - 1)], longest - scored) for first in firsts.tolist()])

    try:
        return measure(tried, (rows * longest, 4 * rows * longest), memory, device)
    except torch.OutOfMemoryError:
        logger.warning("Token budget on %s: %d, since %d did not fit.", device, LEAST_TOKENS, rows * longest)
        return None


def _cpu_tokens(model: nn.Module) -> int:
    """Tokens whose results in the widest layer stay below 32 MiB; a number that streams are rounded to."""
    config = text_config(model)
    widths = [getattr(config, name, None) for name in ("intermediate_size", "ffn_dim", "n_inner")]
    width = next(filter(None, widths), None) or 4 * (getattr(config, "hidden_size", None) or 0)
    fits = rounded_down(CPU_CHUNK_VALUES // width) if isinstance(width, int) and width else CPU_TOKENS
    return min(max(fits, LEAST_CPU_TOKENS), CPU_TOKENS)


def device_memory(device: torch.device) -> Any | None:
    """The functions that tell a device's memory (`torch.cuda`, say); None for a CPU and where they are missing."""
    if device.type in ("cpu", "meta", "mps"):
        return None
    module = torch.get_device_module(device)
    return module if all(hasattr(module, name) for name in _NEEDED) else None


def measure(run: Callable[[int, bool], Any], sizes: tuple[int, int], memory: Any, device: torch.device) -> Footprint:
    """The footprint of `run(tokens, all_scored)` from two numbers of tokens, the smaller first.

    A token's cost is that of the layers, found with hardly a token scored: the logits of a chunk do not grow with the
    batch, and would hide what small batches take in the layers. They are part of what is fixed. Where the larger number
    does not fit, all that the smaller one takes is put down to its tokens.

    The device's peak statistics are reset.

    Raises:
        torch.OutOfMemoryError: when the smaller one does not fit.
    """

    def peak(tokens: int, all_scored: bool) -> int:
        memory.reset_peak_memory_stats(device)
        before = memory.memory_allocated(device)
        run(tokens, all_scored)
        return memory.max_memory_allocated(device) - before

    small, large = sizes
    run(small, True)  # what is made once (workspaces of libraries, compiled kernels) is no cost of a token
    with contextlib.suppress(torch.OutOfMemoryError):
        layers, grown, with_logits = peak(small, False), peak(large, False), peak(large, True)
        per_token = max((grown - layers) / (large - small), 1.0)
        return Footprint(max(layers - per_token * small, with_logits - per_token * large, 0.0), per_token)
    return Footprint(0.0, max(peak(small, True) / small, 1.0))


def planned_bytes(memory: Any, device: torch.device) -> float:
    """Bytes that a forward is to take."""
    free, total = memory.mem_get_info(device)
    free += memory.memory_reserved(device) - memory.memory_allocated(device)
    return min(SHARE_OF_TOTAL * total, MOST_BYTES, SHARE_OF_FREE * free)
