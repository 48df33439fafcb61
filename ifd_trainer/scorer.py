"""Mean negative log-likelihood of answer tokens: the only place that runs a model forward.

`score_pairs` scores encoded rows, both segments of a row among all others, by one of two engines:

- `stream`, on a CPU, and in half precision on CUDA where there is a variable-length attention kernel: the segments of a
  batch as one stream without padding, shared beginnings computed once (see `ifd_trainer.stream` and
  `ifd_trainer.attention`). A model is compared with the other engine on a few tokens before its first use; one that
  gives other numbers is scored by the other engine.
- `padded`: segments of like length, padded on the right without an attention mask. Under causal attention no token
  sees what follows it, so padding changes nothing.

The LM head runs on the scored positions only, in chunks (see `ifd_trainer.head`), and the log-softmax in float32
whatever the model's dtype. On a CPU, float32 products are oneDNN's (see `ifd_trainer.onednn`). Scoring leaves no trace:
every module's train or eval mode, the attention function and the global random state are as before.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from . import ifd as equations
from .attention import NotExact, attending
from .encoding import EncodedPair, Segment, Status, token_budget_batches, token_count
from .head import CPU_CHUNK_VALUES, Logits, find_change, lm_head, unwrapped, whole_losses
from .memory import LEAST_TOKENS, Footprint, device_memory, free_bytes, measure
from .onednn import OneDNN, rounded, rounded_down
from .stream import build_stream, stream_batches

logger = logging.getLogger(__name__)

Engine = Literal["auto", "stream", "padded"]

# Tokens of a batch. On two CPU cores with a 135M model 2,048 was as fast as 512 and 1,024, and faster than 4,096. A
# model with wide layers has fewer: an intermediate result of 32 MiB takes new pages each time (see `ifd_trainer.head`).
CPU_TOKEN_BUDGET, LEAST_CPU_TOKENS = 2048, 256
# Where it is not measured: weights spread over processes, which would have to try out the same number of forwards, or
# over devices; devices that do not tell their memory; less to score than trying out is worth.
ACCELERATOR_TOKEN_BUDGET = 16384
_WORTH_MEASURING = 2**16  # tokens
_TRIED_TOKENS = 1024  # of the smaller batch; the larger has four times as many
# A kernel for all spans is given the keys of each span's path: at most so many for each token of a batch.
_SEEN = 4
# Logits of a batch of a model whose logits cannot be taken in chunks, on a CPU and elsewhere: 128 MiB and 1 GiB in
# float32, or 220 and 1,766 scored tokens at a vocabulary of 152,000. A segment with more is a batch of its own.
CPU_LOGITS_BUDGET = 2**25
ACCELERATOR_LOGITS_BUDGET = 2**28
# Largest relative difference of the engines on the probe, in float32 and in half precision; they round differently.
_PROBE_TOLERANCE, _HALF_PROBE_TOLERANCE = 1e-3, 2e-2


@dataclass(frozen=True)
class Scores:
    """Scores of n rows as arrays of shape (n,); cas, das in nats per token; NaN where `ifd_status` is not `ok`."""

    cas: np.ndarray
    das: np.ndarray
    ifd: np.ndarray
    ifd_ppl: np.ndarray
    answer_tokens: np.ndarray
    ifd_status: np.ndarray

    def __len__(self) -> int:
        return len(self.cas)

    def columns(self) -> dict[str, np.ndarray]:
        """Arrays by column name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def unscored(cls, rows: int, status: str) -> Scores:
        """No scores at all, for one reason."""
        blank = np.full(rows, np.nan)
        return cls.from_nll(blank, blank, np.zeros(rows, dtype=np.int64), np.full(rows, status, dtype=object))

    @classmethod
    def from_nll(cls, cas: np.ndarray, das: np.ndarray, tokens: np.ndarray, status: np.ndarray) -> Scores:
        """Scores from the two mean losses; a row whose ratio is not finite becomes `nonfinite`."""
        ratio, ppl = equations.ifd(cas, das), equations.ifd_ppl(cas, das)
        ok = status == Status.OK.value
        broken = ok & ~(np.isfinite(ratio) & np.isfinite(ppl))
        status = np.where(broken, Status.NONFINITE.value, status)
        blank = status != Status.OK.value
        values = [np.where(blank, np.nan, x) for x in (cas, das, ratio, ppl)]
        return cls(*values, answer_tokens=tokens, ifd_status=status)


def score_pairs(
    model: nn.Module,
    pairs: Sequence[EncodedPair],
    *,
    device: torch.device | str | None = None,
    token_budget: int | None = None,
    progress: Callable[[int], Any] | None = None,
    engine: Engine = "auto",
    forwards: Callable[[int], int] | None = None,
    sharded: bool = False,
) -> Scores:
    """Score encoded rows.

    Args:
        model: a causal language model, or what a trainer wrapped around one (DDP, FSDP, DeepSpeed); put into eval mode
            and back.
        pairs: n encoded rows.
        device: where the token ids go; the model's device by default.
        token_budget: tokens of a batch; by default 2,048 on a CPU, fewer for a model with wide layers, and elsewhere
            what the free memory holds (1,024 to 65,536), measured on two batches. Halved, with one warning, whenever
            the device runs out of memory.
        progress: called with the number of tokens done after each batch.
        engine: "auto", "stream" or "padded".
        forwards: for processes that have to run the same number of forwards: called with the number of batches before
            the first one, returns how many forwards to run, at least as many. Those without a batch run on two tokens.
        sharded: the processes hold parts of one model's weights and gather them in every forward (FSDP, ZeRO-3). A
            process that is out of memory then cannot halve its batch: the others would wait for it in a forward.

    Returns:
        Scores of the n rows, in their order.

    Raises:
        torch.OutOfMemoryError: when one row alone does not fit, or a batch of a sharded model.
    """
    segments = [segment for pair in pairs if pair.conditioned for segment in (pair.conditioned, pair.direct)]
    nll = answer_nll(
        model,
        segments,
        device=device,
        token_budget=token_budget,
        progress=progress,
        engine=engine,
        forwards=forwards,
        sharded=sharded,
    )
    status = np.array([pair.status.value for pair in pairs], dtype=object)
    scored = status == Status.OK.value
    cas, das = np.full(len(pairs), np.nan), np.full(len(pairs), np.nan)
    cas[scored], das[scored] = nll[0::2], nll[1::2]
    tokens = np.array([pair.conditioned.scored if pair.conditioned else 0 for pair in pairs], dtype=np.int64)
    return Scores.from_nll(cas, das, tokens, status)


def answer_nll(
    model: nn.Module,
    segments: Sequence[Segment],
    *,
    device: torch.device | str | None = None,
    token_budget: int | None = None,
    progress: Callable[[int], Any] | None = None,
    engine: Engine = "auto",
    forwards: Callable[[int], int] | None = None,
    sharded: bool = False,
) -> np.ndarray:
    """Mean negative log-likelihood of each segment's scored tokens.

        nll = -1/N * sum_{i >= start} log P(ids[i] | ids[:i])

    Arguments as for `score_pairs`.

    Returns:
        (n,) float64, nats per token.
    """
    nll = np.empty(len(segments), dtype=np.float64)
    options = {"device": device, "token_budget": token_budget, "progress": progress, "engine": engine}
    for batch, losses, _ in _forwards(model, segments, None, forwards=forwards, sharded=sharded, **options):
        nll[batch] = losses
    return nll


def prompt_features(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    device: torch.device | str | None = None,
    token_budget: int | None = None,
    progress: Callable[[int], Any] | None = None,
    engine: Engine = "auto",
    forwards: Callable[[int], int] | None = None,
    sharded: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """How a model sees n prompts of T tokens q_t: what the brief experience is sampled by (arXiv 2308.12032).

        embedding  = 1/T * sum_t h_t                            h_t: last hidden state, what the LM head reads
        perplexity = exp(-1/(T-1) * sum_{t > 1} log P(q_t | q_<t))

    Arguments as for `score_pairs`.

    Returns:
        Embeddings (n, H) float32 and perplexities (n,) float64; NaN for a prompt of no token, and a perplexity of NaN
        for a prompt of one.

    Raises:
        ValueError: for a model that does not tell its LM head.
    """
    if lm_head(model) is None:
        raise ValueError(f"{type(unwrapped(model)).__name__} does not tell its output embeddings, so no hidden state.")
    # A prompt of one token is its own continuation: that loss is not used.
    segments = [Segment([*ids, *ids][: max(len(ids), 2)], 1) for ids in map(list, prompts) if ids]
    present = np.flatnonzero([len(ids) > 0 for ids in prompts])
    perplexity = np.full(len(prompts), np.nan)
    embeddings = np.full((len(prompts), 0), np.nan, dtype=np.float32)
    sizes = [len(prompts[i]) for i in present]
    options = {"device": device, "token_budget": token_budget, "progress": progress, "engine": engine}
    for batch, losses, pooled in _forwards(model, segments, sizes, forwards=forwards, sharded=sharded, **options):
        if not embeddings.shape[1]:
            embeddings = np.full((len(prompts), pooled.shape[1]), np.nan, dtype=np.float32)
        perplexity[present[batch]] = np.exp(losses)
        embeddings[present[batch]] = pooled
    perplexity[[len(ids) < 2 for ids in prompts]] = np.nan
    return embeddings, perplexity


def _forwards(
    model: nn.Module,
    segments: Sequence[Segment],
    pooled: Sequence[int] | None,
    *,
    device: torch.device | str | None,
    token_budget: int | None,
    progress: Callable[[int], Any] | None,
    engine: Engine,
    forwards: Callable[[int], int] | None,
    sharded: bool,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray | None]]:
    """Run all segments in batches; their positions, their mean NLL and their mean hidden states.

    `pooled` says how many tokens of each segment, from the first, are averaged; None for no hidden states.
    """
    device = torch.device(device) if device is not None else model_device(model)
    scored = [segment.scored for segment in segments]
    with borrowed(model, device):
        tried = segments or forwards is not None  # trying out takes forwards: all processes do it, or none
        logits = _logits(model, device, sharded) if tried else None
        scored_budget = max(sum(scored), 1) if logits else _scored_budget(model, device)
        if engine == "auto":
            engine = "stream" if tried and streams(model, device) else "padded"
        run = _stream_nll if engine == "stream" else _padded_nll
        lengths = [len(segment.ids) for segment in segments]
        if not token_budget:
            # Forwards that other processes would have to share in are not spent on measuring.
            alone = not sharded and (forwards is None or unwrapped(model) is model)
            token_budget = _token_budget(model, lengths, device, logits, run if alone else None)
        if engine == "stream":
            seen_budget = None if device.type == "cpu" else _SEEN * token_budget
            ids = [segment.ids for segment in segments]
            batches = stream_batches(ids, token_budget, scored, scored_budget, seen_budget)
        else:
            batches = token_budget_batches(lengths, token_budget, scored, scored_budget)
        idle = 0 if forwards is None else forwards(len(batches)) - len(batches)

        def of_batch(batch: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
            pool = None if pooled is None else _MeanPool([pooled[i] for i in batch])
            nll = run(model, [segments[i] for i in batch], device, logits, pool)
            return nll, None if pool is None else pool.means()

        for batch, (nll, means) in _halving(of_batch, batches, device, halve=not sharded):
            if progress is not None:
                progress(sum(len(segments[i].ids) for i in batch))
            yield batch, nll, means
        for _ in range(idle):
            run(model, [Segment([0, 0], 1)], device, logits)


_footprints: weakref.WeakKeyDictionary[nn.Module, dict[int, Footprint]] = weakref.WeakKeyDictionary()


def _token_budget(
    model: nn.Module,
    lengths: Sequence[int],
    device: torch.device,
    logits: Logits | None,
    run: Callable[..., np.ndarray] | None,
) -> int:
    """Tokens of a batch for an engine's `run`, from free memory where there is a way and a reason to measure it."""
    memory = device_memory(device)
    if memory is None:
        return _cpu_token_budget(model) if device.type == "cpu" else ACCELERATOR_TOKEN_BUDGET
    spread = len({parameter.device for parameter in model.parameters()}) > 1  # only one device would be looked at
    if run is None or spread or sum(lengths) < _WORTH_MEASURING:
        return ACCELERATOR_TOKEN_BUDGET
    longest = max(lengths)  # attention may take memory by the square of a row's length
    known = _footprints.setdefault(model, {})
    new = longest.bit_length() not in known
    if new:
        rows = max(_TRIED_TOKENS // longest, 1)

        def tried(tokens: int) -> None:
            # No two begin alike: a stream would compute once what they share.
            firsts = np.arange(tokens // longest) % _vocabulary(model)
            segments = [Segment([first, *[0] * (longest - 1)], 1) for first in firsts.tolist()]
            run(model, segments, device, logits)

        try:
            known[longest.bit_length()] = measure(tried, (rows * longest, 4 * rows * longest), memory, device)
        except torch.OutOfMemoryError:
            logger.info("Token budget on %s: %d, since %d did not fit.", device, LEAST_TOKENS, 4 * rows * longest)
            return LEAST_TOKENS
    footprint, free = known[longest.bit_length()], free_bytes(memory, device)
    budget = footprint.tokens(free)
    logger.log(
        logging.INFO if new else logging.DEBUG,
        "Token budget on %s: %d (%.1f GiB free; a forward takes %.0f MiB and %.0f KiB a token).",
        device,
        budget,
        free / 2**30,
        footprint.fixed / 2**20,
        footprint.per_token / 2**10,
    )
    return budget


def _cpu_token_budget(model: nn.Module) -> int:
    """Tokens whose results in the widest layer stay below 32 MiB; a number that streams are rounded to."""
    config = _config(model)
    widths = [getattr(config, name, None) for name in ("intermediate_size", "ffn_dim", "n_inner")]
    width = next(filter(None, widths), None) or 4 * (getattr(config, "hidden_size", None) or 0)
    fits = rounded_down(CPU_CHUNK_VALUES // width) if isinstance(width, int) and width else CPU_TOKEN_BUDGET
    return min(max(fits, LEAST_CPU_TOKENS), CPU_TOKEN_BUDGET)


class _MeanPool:
    """Takes the mean over the first `sizes[i]` tokens of segment i from the hidden states of a forward."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = sizes
        self.found: list[torch.Tensor] = []

    def take(self, hidden: torch.Tensor, places: Sequence[np.ndarray]) -> None:
        """`hidden` (B * T, H), and the places of each segment's tokens in it."""
        for size, place in zip(self.sizes, places, strict=True):
            self.found.append(hidden[torch.from_numpy(place[:size]).to(hidden.device)].float().mean(0))

    def means(self) -> np.ndarray:
        """(n, H) float32."""
        return torch.stack(self.found).cpu().numpy()


def _halving(
    run: Callable[[np.ndarray], Any], batches: list[np.ndarray], device: torch.device, halve: bool = True
) -> Iterator[tuple[np.ndarray, Any]]:
    """Run batches; one that does not fit in memory is run in halves, and so are all of its size that follow."""
    queue, limit = batches[::-1], None
    while queue:
        batch = queue.pop()
        try:
            if limit is not None and len(batch) > limit:
                raise torch.OutOfMemoryError
            result = run(batch)
        except torch.OutOfMemoryError as error:
            if len(batch) == 1:
                raise torch.OutOfMemoryError(
                    f"Out of memory on {device} while scoring a single row. Lower max_length, or score with a smaller "
                    "model or on a larger device."
                ) from error
            if not halve:
                raise torch.OutOfMemoryError(
                    f"Out of memory on {device} while scoring {len(batch)} rows in a batch with a model whose weights "
                    "are spread over processes. Lower token_budget."
                ) from error
            if limit is None:
                logger.warning("Out of memory on %s with %d rows in a batch: going on with half.", device, len(batch))
            half = len(batch) // 2
            limit = half if limit is None else min(limit, half) or 1
            if device.type == "cuda":
                torch.cuda.empty_cache()
            queue += [batch[half:], batch[:half]]
            continue
        yield batch, result


def _padded_nll(
    model: nn.Module,
    segments: Sequence[Segment],
    device: torch.device,
    logits: Logits | None,
    pool: _MeanPool | None = None,
) -> np.ndarray:
    """Mean NLL of one batch of B segments padded to T tokens, (B,) float64."""
    longest = max(len(segment.ids) for segment in segments)
    ids = torch.zeros(len(segments), longest, dtype=torch.long)  # (B, T)
    for row, segment in enumerate(segments):
        ids[row, : len(segment.ids)] = torch.tensor(segment.ids)
    places = [row * longest + np.arange(len(segment.ids)) for row, segment in enumerate(segments)]
    return _mean_nll(model, segments, places, {"input_ids": ids.to(device)}, logits, pool)


def _stream_nll(
    model: nn.Module,
    segments: Sequence[Segment],
    device: torch.device,
    logits: Logits | None,
    pool: _MeanPool | None = None,
    check: bool = False,
) -> np.ndarray:
    """Mean NLL of one batch of n segments as a stream of T tokens, (n,) float64."""
    stream = build_stream([segment.ids for segment in segments])
    if device.type == "cpu":
        stream = stream.lengthened(rounded(len(stream.ids)))
    inputs = {
        "input_ids": torch.from_numpy(stream.ids)[None].to(device),  # (1, T)
        "position_ids": torch.from_numpy(stream.positions)[None].to(device),  # (1, T)
    }
    with attending(model, stream.spans, device, check):
        return _mean_nll(model, segments, stream.places, inputs, logits, pool)


def _mean_nll(
    model: nn.Module,
    segments: Sequence[Segment],
    places: Sequence[np.ndarray],
    inputs: dict[str, torch.Tensor],
    logits: Logits | None,
    pool: _MeanPool | None = None,
) -> np.ndarray:
    """Mean NLL of segments whose tokens stand at `places` of the flattened inputs (B * T)."""
    predicts = [place[segment.start - 1 : -1] for segment, place in zip(segments, places, strict=True)]
    where, which = np.unique(np.concatenate(predicts), return_inverse=True)  # a shared token is projected once
    targets = np.array([token for segment in segments for token in segment.ids[segment.start :]])  # (N,)
    see = None if pool is None else lambda hidden: pool.take(hidden, places)
    if logits is None:
        losses = whole_losses(_logits_at(model, inputs, where, see), which, targets)
    else:
        losses = _losses_at(model, inputs, where, which, targets, logits, see)
    ends = np.cumsum([segment.scored for segment in segments])[:-1]
    return np.array([part.mean() for part in np.split(losses, ends)])


See = Callable[[torch.Tensor], None]


def _losses_at(
    model: nn.Module,
    inputs: dict[str, torch.Tensor],
    where: np.ndarray,
    which: np.ndarray,
    targets: np.ndarray,
    logits: Logits,
    see: See | None = None,
) -> np.ndarray:
    """Losses of N targets predicted at U places of the flattened inputs, (N,); the LM head runs on a chunk at a time.

    All of them are projected before the head's own call, which is left a single position for the model to go on with.
    """
    found: list[np.ndarray] = []

    def reduce(module: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        found.append(logits.losses(module, hidden, which, targets))
        return hidden[:1]

    # Other hooks run on each chunk, so they are not to run before; but for one that gathers the head's weights.
    with _at_head(model, inputs, where, reduce, see, first=not logits.gathered), OneDNN():
        model(**inputs, use_cache=False)
    return found[0]


def _logits_at(
    model: nn.Module, inputs: dict[str, torch.Tensor], where: np.ndarray, see: See | None = None
) -> torch.Tensor:
    """Logits at U places of the flattened inputs, (U, V); the LM head runs on those alone where it is a module."""
    with _at_head(model, inputs, where, lambda module, hidden: hidden, see), OneDNN():
        logits = model(**inputs, use_cache=False).logits
    if lm_head(model) is not None and logits.shape[:2] == (1, len(where)):
        return logits[0]
    length = inputs["input_ids"].shape[1]
    return logits[where // length, where % length - length]  # a model that does not call its head as a module


def _at_head(
    model: nn.Module,
    inputs: dict[str, torch.Tensor],
    where: np.ndarray,
    reduce: Callable[[nn.Module, torch.Tensor], torch.Tensor],
    see: See | None,
    first: bool = False,
) -> contextlib.AbstractContextManager[Any]:
    """Let the LM head see what `reduce` makes of the hidden states at U places (U, H), and not those of all.

    A hook on the head picks them, so that whatever a model does to its logits afterwards still happens. `see` is
    called with the hidden states of all places, (B * T, H). `first` puts the hook before those that are there.
    """
    length = inputs["input_ids"].shape[1]
    # Positions count from the end: prompt tuning puts virtual tokens in front.
    rows, back = torch.from_numpy(where // length), torch.from_numpy(where % length - length)

    picking = False

    def pick(module: nn.Module, args: tuple) -> tuple | None:
        nonlocal picking
        if picking:
            return None  # a call by `reduce`
        picking = True
        hidden = args[0]  # (B, T, H)
        if see is not None:
            see(hidden[:, -length:].flatten(0, 1))
        picked = hidden[rows.to(hidden.device), back.to(hidden.device)]
        given = reduce(module, picked).unsqueeze(0)
        picking = False
        return (given, *args[1:])

    head = lm_head(model)
    return contextlib.nullcontext() if head is None else head.register_forward_pre_hook(pick, prepend=first)


_changes: weakref.WeakKeyDictionary[nn.Module, Logits | None] = weakref.WeakKeyDictionary()


def _logits(model: nn.Module, device: torch.device, sharded: bool) -> Logits | None:
    """How logits come from the LM head, tried out once; None where they are not taken in chunks."""
    if model not in _changes:
        inputs = {"input_ids": torch.zeros(1, 3, dtype=torch.long, device=device)}
        _changes[model] = find_change(model, lambda: _logits_at(model, inputs, np.array([0, 2]))[None])
        logger.debug("Logits of %s: %s", type(model).__name__, _changes[model])
    found = _changes[model]
    # Modules inside the head (adapters) would gather their weights once a chunk, and processes differ in chunks.
    if not sharded or found is None:
        return found
    return None if list(lm_head(model).children()) else replace(found, gathered=True)


def _scored_budget(model: nn.Module, device: torch.device) -> int:
    """Scored tokens of a batch that is projected as a whole."""
    budget = CPU_LOGITS_BUDGET if device.type == "cpu" else ACCELERATOR_LOGITS_BUDGET
    return max(budget // _vocabulary(model), 1)


# ---- the choice of an engine -------------------------------------------------------------------------------------

_probed: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def _attends_to_all(config: Any) -> bool:
    """Whether every layer sees all earlier tokens; windows and chunks longer than the probe would not show in it."""
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    return layers == {"full_attention"} and getattr(config, "attention_chunk_size", None) is None


def streams(model: nn.Module, device: torch.device | None = None) -> bool:
    """Whether the `stream` engine gives the numbers of the `padded` one for this model, tried out once.

    It does not for models without attention layers, with sliding windows, soft-capped scores or attention sinks, for
    absolute positions that ignore `position_ids`, behind prompt tuning, and off a CPU without a kernel for the dtype.
    """
    if model not in _probed:
        head = [7, 5, 3, 2, 6, 4, 9, 8, 1, 3]
        tails = [[2, 4, 6], [4, 2, 1, 9], [2, 4, 6, 8, 1]]
        segments = [Segment(head + tail, 1) for tail in tails] + [Segment([5, 3, 4], 1)]
        device = device or model_device(model)
        exact = False
        # Whatever such a model raises here, the padded engine scores it or raises it again.
        with borrowed(model, device), contextlib.suppress(Exception):
            if not _attends_to_all(_config(model)):
                raise NotExact("the model has windows or chunks")
            expected = _padded_nll(model, segments, device, None)
            found = _stream_nll(model, segments, device, None, check=True)
            half = torch.is_autocast_enabled(device.type) or next(model.parameters()).dtype != torch.float32
            exact = bool(np.allclose(found, expected, rtol=_HALF_PROBE_TOLERANCE if half else _PROBE_TOLERANCE, atol=0))
        logger.debug("Engine for %s: %s", type(model).__name__, "stream" if exact else "padded")
        _probed[model] = exact
    return _probed[model]


def model_device(model: nn.Module) -> torch.device:
    """The device of the model's first parameter (its input embedding, for a model spread over devices)."""
    return next(model.parameters()).device


@contextlib.contextmanager
def borrowed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Run `model` in eval mode without gradients; give back every module's mode and the random states."""
    modes = [(module, module.training) for module in model.modules()]
    devices = {p.device for p in model.parameters()} | {device}  # a model may be spread over devices, or be off them
    with _random_states(devices), torch.no_grad():
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


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


def token_progress(pairs: Sequence[EncodedPair], description: str, enabled: bool = True) -> tqdm:
    """A progress bar that counts tokens, for `score_pairs(progress=bar.update)`."""
    total = token_count(pairs)
    return tqdm(total=total, desc=description, unit="tok", unit_scale=True, disable=not enabled, leave=False)


def _vocabulary(model: nn.Module) -> int:
    """Number of tokens, or a usual number for a model that does not tell."""
    return getattr(_config(model), "vocab_size", None) or 2**15


def _config(model: nn.Module) -> Any:
    config = getattr(unwrapped(model), "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config
