"""Losses of tokens without the logits of all of them: the LM head on scored positions alone, some at a time.

    loss_n = log sum_v exp(z_nv) - z_n,target        z_n = transform(head(h_n))

`h` are the hidden states that the head reads, `transform` is what a model does to its logits afterwards: nothing, or a
scale (Cohere, Granite), or a soft cap (Gemma). A chunk of positions is projected and reduced to its losses before the
next one, so that memory does not grow with tokens x vocabulary. On a CPU a chunk of few positions would spend its time
on reading the head's weights: there a head that is nothing but a matrix is taken apart, a tile of the vocabulary with
many positions at a time.

transformers' `logits_to_keep` picks the positions too (in a batch of one row), but holds the logits of all of them.
Scoring real rows with it took 3.4 GB and 1.9 times the CPU time for a narrow model with 152,000 tokens, and 0.9 GB and
as long for SmolLM2-135M, with 49,000; this takes 0.1 to 0.8 and 0.1 to 0.3 GB.

Which transform it is, is not taken from a list of models: the model is run once on two tokens, with logits of ours in
place of the head's, and what it returns for them is compared bit for bit with the transforms that its config has
numbers for. A model for which none of them is exact, or that does not call its head as a module, keeps whole logits.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import nn

from ..errors import with_kind
from .model_parts import FORWARD_ERRORS, lm_head, text_config, unwrapped
from .onednn import rounded
from .private_names import tells_hooks
from .transfer import on_device

logger = logging.getLogger(__name__)

LogitTransform = Callable[[torch.Tensor], torch.Tensor]
# Values at u places (u, ...), for each of n targets its place among the u, and the targets; returns (n,) losses.
Losses = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

# Logits of a chunk, which has to hold enough rows to be worth a read of the head's weights: on a CPU just below the
# 32 MiB from which glibc takes new pages for every chunk, which cost as much time as the product that fills them (55
# rows at a vocabulary of 152,000); elsewhere about 256 MiB in bfloat16 (768 rows), of as many rows as matrix products
# like.
CPU_CHUNK_VALUES = 2**23 - 2**12
ACCELERATOR_CHUNK_VALUES, ACCELERATOR_ROWS = 2**27, 256
# Of a tile, in tokens; with fewer a product is too small to be fast. Tiles made the head of 152,000 x 896 weights 1.3
# times as fast for 700 positions, and all of scoring with 152,000 x 256 weights 1.6 times (SmolLM2-135M: 1.07 times).
LEAST_TILE = 2**11


@dataclass(frozen=True)
class Targets:
    """N tokens, each predicted at one of U places.

    Attributes:
        host_places: (N,) the number of each one's place among the U, ascending; on the host, where chunks are cut.
        places: the same, on the device of the forward.
        tokens: (N,) the tokens, on that device.
    """

    host_places: np.ndarray
    places: torch.Tensor
    tokens: torch.Tensor

    @classmethod
    def on(cls, device: torch.device, places: np.ndarray, tokens: np.ndarray) -> Targets:
        """From two int64 arrays."""
        return cls(places, on_device(places, device), on_device(tokens, device))

    def losses(self, values: torch.Tensor, size: int, losses: Losses) -> torch.Tensor:
        """(N,) losses, from `losses` of the values (U, ...) of so many places at a time.

        Nothing here waits for the device.
        """
        firsts = np.arange(0, len(values), size)
        edges = np.searchsorted(self.host_places, [*firsts, len(values)]).tolist()
        places, tokens = self.places.to(values.device), self.tokens.to(values.device)
        return torch.cat(
            [
                losses(values[first : first + size], places[low:high] - first, tokens[low:high])
                for first, low, high in zip(firsts.tolist(), edges[:-1], edges[1:], strict=True)
            ]
        )


@dataclass(frozen=True)
class ChunkedHead:
    """How a model makes V logits of a position: by its LM head and `transform`.

    `gathered` says that the head's weights are spread over processes and gathered before its own call only.
    """

    vocabulary: int
    transform: LogitTransform
    gathered: bool = False

    def losses(self, head: nn.Module, hidden: torch.Tensor, targets: Targets) -> torch.Tensor:
        """Losses of N targets, (N,); nats.

        Args:
            head: the LM head.
            hidden: (U, H), what it reads at the targets' places.
            targets: the tokens.
        """
        if not self.gathered and _is_a_matrix(head):
            size = _power_of_two(CPU_CHUNK_VALUES // LEAST_TILE)
            losses = partial(_tiled_losses, head, self.transform)
        else:
            size = chunk_positions(self.vocabulary, hidden.device)
            # Weights that are spread over processes are gathered by now, and a second call would let go of them.
            project = head.forward if self.gathered else head

            def losses(hidden: torch.Tensor, places: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
                return _losses(self.transform(project(hidden[None]))[0], places, tokens)  # (1, u, V) to (n,)

        return targets.losses(hidden, size, losses)


def _is_a_matrix(head: nn.Module) -> bool:
    """Whether calling this head is nothing but a product with float32 weights on a CPU."""
    return (
        type(head) is nn.Linear
        and type(head.weight) in (torch.Tensor, nn.Parameter)
        and head.weight.is_cpu
        and head.weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and "forward" not in vars(head)
        and tells_hooks()
        and not head._forward_hooks
        and len(head._forward_pre_hooks) < 2  # the one in which this runs
    )


def _tiled_losses(
    head: nn.Linear, transform: LogitTransform, hidden: torch.Tensor, places: torch.Tensor, tokens: torch.Tensor
) -> torch.Tensor:
    """Losses (n,) of `tokens` at `places` of hidden states (u, H), by tiles of the vocabulary.

        loss = log sum_tiles exp(s_tile) - s_own + loss_own        s_tile = log sum_{v in tile} exp z_v

    `loss_own` is the loss within the tile that holds the target; the sums are added up in float64, so that a loss near
    0 keeps its digits.
    """
    vocabulary, width = len(head.weight), tile_width(len(hidden), len(head.weight))
    order = tokens.argsort()
    edges = torch.searchsorted(tokens[order], torch.arange(0, vocabulary + width, width)).tolist()
    own = torch.empty(len(tokens))

    def of_tile(start: int, mine: torch.Tensor) -> torch.Tensor:
        tile = slice(start, start + width)
        bias = None if head.bias is None else head.bias[tile]
        # Gone before the next tile's are there.
        logits = transform(nn.functional.linear(hidden, head.weight[tile], bias))
        sums = _log_softmax_(logits)
        own[mine] = -logits[places[mine], tokens[mine] - start]
        return sums

    starts = zip(range(0, vocabulary, width), edges[:-1], edges[1:], strict=True)
    of_tiles = torch.stack([of_tile(start, order[low:high]) for start, low, high in starts])  # (tiles, u)
    return of_tiles.logsumexp(0)[places] - of_tiles[tokens // width, places] + own


def tile_width(positions: int, vocabulary: int) -> int:
    """How many tokens a tile has: all, or a power of two, which products are fast with."""
    fits = CPU_CHUNK_VALUES // rounded(positions)
    return vocabulary if fits >= vocabulary else _power_of_two(fits)


def _power_of_two(most: int) -> int:
    return 1 << (max(most, 1).bit_length() - 1)


def _log_softmax_(logits: torch.Tensor) -> torch.Tensor:
    """Turn logits (u, V) into their log-softmax, in place; (u,) float64, what was subtracted."""
    before = logits[:, 0].double()
    sums = None if before.isfinite().all() else logits.logsumexp(-1).double()
    torch.log_softmax(logits, -1, out=logits)
    return before - logits[:, 0].double() if sums is None else sums


def whole_losses(logits: torch.Tensor, targets: Targets) -> torch.Tensor:
    """Losses of N targets from the logits of all U places (U, V), which may be written over; (N,), nats."""
    return targets.losses(logits, chunk_positions(logits.shape[-1], logits.device), _losses)


def _losses(logits: torch.Tensor, places: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """(n,) float32 from logits (u, V), which may be written over; the log-softmax is float32 whatever their dtype.

    A log-softmax, written in whole, takes half the time of `logsumexp` on a CPU, where it stays in the cache, and three
    quarters of its reads and writes on a GPU.
    """
    logits = logits.float()
    in_place = {"out": logits} if logits.device.type == "cpu" else {}
    return -torch.log_softmax(logits, -1, **in_place)[places, tokens]


def chunk_positions(vocabulary: int, device: torch.device) -> int:
    """Positions in a chunk of whole rows of logits."""
    if device.type == "cpu":
        return max(CPU_CHUNK_VALUES // vocabulary, 1)
    return max(ACCELERATOR_CHUNK_VALUES // vocabulary // ACCELERATOR_ROWS, 1) * ACCELERATOR_ROWS


def find_logit_transform(model: nn.Module, run: Callable[[], torch.Tensor]) -> ChunkedHead | None:
    """What `model` does to its logits after the head, found in one forward; None where chunks would not be exact.

    Args:
        model: a causal LM.
        run: a forward whose LM head sees two positions; returns the model's logits.
    """
    head = lm_head(model)
    if head is None:
        return None
    given: list[torch.Tensor] = []

    def replace(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        given.append(_test_values(output))
        return given[-1].clone()  # a model may change its logits in place

    try:
        with head.register_forward_hook(replace):
            logits = run()
        return _transform_between(model, logits, given)
    except FORWARD_ERRORS as error:  # with whole logits it raises that again, or it does not raise there
        more = "%s is scored with whole logits, which takes more memory: with logits of two positions it raised %s"
        logger.warning(more, type(model).__name__, with_kind(error))
    return None


def _transform_between(model: nn.Module, logits: torch.Tensor, given: list[torch.Tensor]) -> ChunkedHead | None:
    """The transform that turns what the head gave into what the model returned, bit for bit."""
    if len(given) != 1 or given[0].dim() != 3 or given[0].shape[1] != 2:
        return None
    values = given[0]
    for transform in _candidates(model):
        if logits.shape == values.shape and torch.equal(logits.float(), transform(values).float()):
            return ChunkedHead(values.shape[-1], transform)
    return None


def _test_values(like: torch.Tensor) -> torch.Tensor:
    """Values of another tensor's shape and dtype: each one different, most between -60 and 60, some far outside."""
    values = torch.linspace(-60, 60, like.numel(), device=like.device)
    values[:2], values[-2:] = -1e4, 1e4
    return values.view(like.shape).to(like.dtype)


def _candidates(model: nn.Module) -> Iterator[LogitTransform]:
    """Nothing at all, and all that could be done to logits with a number of the config that has to do with them."""
    yield _untouched
    for number in _numbers(model):
        for kind in (_multiplied, _divided, _soft_capped):
            transform = partial(kind, number)
            yield from (transform, partial(_in_float32, transform))  # some models turn their logits into float32 first


def _numbers(model: nn.Module) -> list[float]:
    """Numbers under names like logit_scale, logits_scaling, final_logit_softcapping, lm_head_multiplier."""
    configs = (getattr(unwrapped(model), "config", None), text_config(model))
    named = [item for config in configs if config is not None for item in vars(config).items()]
    values = [value for name, value in named if "logit" in name or "lm_head" in name]
    numbers = {float(value) for value in values if isinstance(value, (int, float)) and not isinstance(value, bool)}
    return sorted(number for number in numbers if number and math.isfinite(number))


def _untouched(logits: torch.Tensor) -> torch.Tensor:
    return logits


def _multiplied(number: float, logits: torch.Tensor) -> torch.Tensor:
    return logits * number


def _divided(number: float, logits: torch.Tensor) -> torch.Tensor:
    return logits / number


def _soft_capped(number: float, logits: torch.Tensor) -> torch.Tensor:
    return torch.tanh(logits / number) * number


def _in_float32(transform: LogitTransform, logits: torch.Tensor) -> torch.Tensor:
    return transform(logits.float())
