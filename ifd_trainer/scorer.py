"""Mean negative log-likelihood of answer tokens: which forwards are run for it, and in which order.

`score_pairs` scores encoded rows, both segments of a row among all others, by one of two engines:

- `stream`, on a CPU, and in half precision on CUDA where there is a variable-length attention kernel: the segments of a
  batch as one stream without padding, shared beginnings computed once (see `ifd_trainer.stream` and
  `ifd_trainer.attention`). A model is compared with the other engine on a few tokens before its first use; one that
  gives other numbers is scored by the other engine.
- `padded`: segments of like length, padded on the right without an attention mask. Under causal attention no token
  sees what follows it, so padding changes nothing.

The LM head runs on the scored positions only, in chunks (see `ifd_trainer.head`), and the log-softmax in float32
whatever the model's dtype. On a CPU, float32 products are oneDNN's (see `ifd_trainer.onednn`). An accelerator does not
wait for the host: the next batch is laid out while it runs one (see `ifd_trainer.forward`). Scoring leaves no trace:
every module's train or eval mode, the attention function and the global random state are as before.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from . import ifd as equations
from .attention import HALF
from .encoding import EncodedPair, Segment, Status, token_budget_batches, token_count
from .forward import Batch, Pending, launch, logits_at, padded, streamed
from .head import Logits, find_change, lm_head, text_config, unwrapped, vocabulary_size
from .memory import token_budget as measured_budget
from .positions import kinds_of_lengths, remembers_lengths
from .stream import stream_batches

if TYPE_CHECKING:
    from typing_extensions import Unpack

logger = logging.getLogger(__name__)

Engine = Literal["auto", "stream", "padded"]
_LAYOUTS = {"stream": streamed, "padded": padded}

# A kernel for all spans is given the keys of each span's path: at most so many for each token of a batch.
_SEEN = 4
# Share of the tokens that did not fit which are tried next: halves of a batch are not of quite the same size.
_HALVED = 0.55
# Logits of a batch of a model whose logits cannot be taken in chunks, on a CPU and elsewhere: 128 MiB and 1 GiB in
# float32, or 220 and 1,766 scored tokens at a vocabulary of 152,000. A segment with more is a batch of its own.
CPU_LOGITS_BUDGET = 2**25
ACCELERATOR_LOGITS_BUDGET = 2**28
# Largest relative difference of the engines on the probe, in float32 and in half precision; they round differently.
_PROBE_TOLERANCE, _HALF_PROBE_TOLERANCE = 1e-3, 2e-2


class Options(TypedDict, total=False):
    """How a model is run over many rows.

    Attributes:
        device: where the token ids go; the model's device by default.
        token_budget: tokens of a batch; by default 2,048 on a CPU, fewer for a model with wide layers, and elsewhere
            what a quarter of the device's memory holds, or 3 GiB (1,024 to 65,536 tokens), measured on a few batches.
            Halved, with one warning, whenever the device runs out of memory.
        progress: called with the number of tokens done after each batch.
        engine: "auto", "stream" or "padded".
        forwards: for processes that have to run the same number of forwards: called with the number of batches before
            the first one, returns how many forwards to run, at least as many. Those without a batch run on two tokens.
        sharded: the processes hold parts of one model's weights and gather them in every forward (FSDP, ZeRO-3). A
            process that is out of memory then cannot halve its batch: the others would wait for it in a forward.
    """

    device: torch.device | str | None
    token_budget: int | None
    progress: Callable[[int], Any] | None
    engine: Engine
    forwards: Callable[[int], int] | None
    sharded: bool


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


def score_pairs(model: nn.Module, pairs: Sequence[EncodedPair], **options: Unpack[Options]) -> Scores:
    """Score encoded rows.

    Args:
        model: a causal language model, or what a trainer wrapped around one (DDP, FSDP, DeepSpeed); put into eval mode
            and back.
        pairs: n encoded rows.
        options: see `Options`.

    Returns:
        Scores of the n rows, in their order.

    Raises:
        torch.OutOfMemoryError: when one row alone does not fit, or a batch of a sharded model.
    """
    segments = [segment for pair in pairs if pair.conditioned for segment in (pair.conditioned, pair.direct)]
    nll = answer_nll(model, segments, **options)
    status = np.array([pair.status.value for pair in pairs], dtype=object)
    scored = status == Status.OK.value
    cas, das = np.full(len(pairs), np.nan), np.full(len(pairs), np.nan)
    cas[scored], das[scored] = nll[0::2], nll[1::2]
    tokens = np.array([pair.conditioned.scored if pair.conditioned else 0 for pair in pairs], dtype=np.int64)
    return Scores.from_nll(cas, das, tokens, status)


def answer_nll(model: nn.Module, segments: Sequence[Segment], **options: Unpack[Options]) -> np.ndarray:
    """Mean negative log-likelihood of each segment's scored tokens.

        nll = -1/N * sum_{i >= start} log P(ids[i] | ids[:i])

    Options: see `Options`.

    Returns:
        (n,) float64, nats per token.
    """
    nll = np.empty(len(segments), dtype=np.float64)
    for batch, losses, _ in _forwards(model, segments, **options):
        nll[batch] = losses
    return nll


def prompt_features(
    model: nn.Module, prompts: Sequence[Sequence[int]], **options: Unpack[Options]
) -> tuple[np.ndarray, np.ndarray]:
    """How a model sees n prompts of T tokens q_t: what the brief experience is sampled by (arXiv 2308.12032).

        embedding  = 1/T * sum_t h_t                            h_t: last hidden state, what the LM head reads
        perplexity = exp(-1/(T-1) * sum_{t > 1} log P(q_t | q_<t))

    Options: see `Options`.

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
    for batch, losses, pooled in _forwards(model, segments, sizes, **options):
        if not embeddings.shape[1]:
            embeddings = np.full((len(prompts), pooled.shape[1]), np.nan, dtype=np.float32)
        perplexity[present[batch]] = np.exp(losses)
        embeddings[present[batch]] = pooled
    perplexity[[len(ids) < 2 for ids in prompts]] = np.nan
    return embeddings, perplexity


def _forwards(
    model: nn.Module,
    segments: Sequence[Segment],
    pooled: Sequence[int] | None = None,
    *,
    device: torch.device | str | None = None,
    token_budget: int | None = None,
    progress: Callable[[int], Any] | None = None,
    engine: Engine = "auto",
    forwards: Callable[[int], int] | None = None,
    sharded: bool = False,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray | None]]:
    """Run all segments in batches; their positions, their mean NLL and their mean hidden states.

    `pooled` says how many tokens of each segment, from the first, are averaged; None for no hidden states.
    """
    device = torch.device(device) if device is not None else model_device(model)
    lengths, scored = [len(segment.ids) for segment in segments], [segment.scored for segment in segments]
    with borrowed(model, device):
        tried = segments or forwards is not None  # trying out takes forwards: all processes do it, or none
        logits = _logits(model, device, sharded) if tried else None
        if engine == "auto":
            engine = "stream" if tried and streams(model, device) else "padded"
        lay_out = _LAYOUTS[engine]

        def run(part: Sequence[Segment]) -> np.ndarray:
            return launch(model, lay_out(part, device), device, logits).nll()

        scored_budget = max(sum(scored), 1) if logits else _scored_budget(model, device)
        if not token_budget:
            # Forwards that other processes would have to share in are not spent on measuring.
            alone = not sharded and (forwards is None or unwrapped(model) is model)
            how = (engine, *_setting(model, device))
            token_budget = measured_budget(model, lengths, scored_budget, device, run if alone else None, how)
        batches = []
        for kind in kinds_of_lengths(lengths, text_config(model)):
            of_kind = [segments[i] for i in kind]
            batches += [kind[batch] for batch in _batches(of_kind, engine, token_budget, scored_budget, device)]
        if tried and remembers_lengths(text_config(model)):
            run([Segment([0, 0], 1)])  # what was scored or tried out before is forgotten
        idle = 0 if forwards is None else forwards(len(batches)) - len(batches)

        def laid_out(rows: np.ndarray) -> Batch:
            return lay_out([segments[i] for i in rows], device)

        def launched(rows: np.ndarray, batch: Batch) -> Pending:
            return launch(model, batch, device, logits, None if pooled is None else [pooled[i] for i in rows])

        for rows, pending in _in_turn(laid_out, launched, batches, device, halve=not sharded):
            nll, means = pending.nll(), pending.means()
            if progress is not None:
                progress(sum(lengths[i] for i in rows))
            yield rows, nll, means
        for _ in range(idle):
            run([Segment([0, 0], 1)])


def _batches(
    segments: Sequence[Segment], engine: Engine, token_budget: int, scored_budget: int, device: torch.device
) -> list[np.ndarray]:
    """Partition segments into the batches of an engine."""
    scored = [segment.scored for segment in segments]
    if engine == "padded":
        return token_budget_batches([len(segment.ids) for segment in segments], token_budget, scored, scored_budget)
    seen_budget = None if device.type == "cpu" else _SEEN * token_budget
    return stream_batches([segment.ids for segment in segments], token_budget, scored, scored_budget, seen_budget)


def _in_turn(
    lay_out: Callable[[np.ndarray], Batch],
    begin: Callable[[np.ndarray, Batch], Pending],
    batches: list[np.ndarray],
    device: torch.device,
    halve: bool = True,
) -> Iterator[tuple[np.ndarray, Pending]]:
    """Run batches one after another; what they give is waited for once the next one is launched, but for a CPU.

    One that does not fit in memory is run in halves, and so are all that follow with more than half of its tokens.
    """
    most = float("inf")

    def attempt(rows: np.ndarray, batch: Batch) -> Pending | None:
        """What a forward gives, or None if it does not fit."""
        nonlocal most
        try:
            return begin(rows, batch)
        except torch.OutOfMemoryError as error:
            if len(rows) == 1:
                raise torch.OutOfMemoryError(
                    f"Out of memory on {device} while scoring a single row. Lower max_length, or score with a smaller "
                    "model or on a larger device."
                ) from error
            if not halve:
                raise torch.OutOfMemoryError(
                    f"Out of memory on {device} while scoring {len(rows)} rows in a batch with a model whose weights "
                    "are spread over processes. Lower token_budget."
                ) from error
        if most == float("inf"):
            logger.warning("Out of memory on %s with %d tokens in a batch: going on with half.", device, batch.ids.size)
        most = _HALVED * batch.ids.size
        if device.type == "cuda":
            torch.cuda.empty_cache()  # not before the error is gone, whose traceback holds what the forward had made
        return None

    queue, launched = batches[::-1], deque()
    while queue:
        rows = queue.pop()
        batch = lay_out(rows)
        pending = attempt(rows, batch) if batch.ids.size <= most or len(rows) == 1 else None
        if pending is None:
            half = len(rows) // 2
            queue += [rows[half:], rows[:half]]
            continue
        launched.append((rows, pending))
        while len(launched) > (device.type != "cpu"):
            yield launched.popleft()
    yield from launched


# What was tried out, for each model and setting.
_changes: weakref.WeakKeyDictionary[nn.Module, dict[Hashable, Logits | None]] = weakref.WeakKeyDictionary()
_probed: weakref.WeakKeyDictionary[nn.Module, dict[Hashable, bool]] = weakref.WeakKeyDictionary()


def _setting(model: nn.Module, device: torch.device) -> tuple[Hashable, ...]:
    """What kernels and rounding depend on beside the model: kind of device, dtype of the weights, autocast."""
    return device.type, next(model.parameters()).dtype, torch.is_autocast_enabled(device.type)


def _logits(model: nn.Module, device: torch.device, sharded: bool) -> Logits | None:
    """How logits come from the LM head, tried out once; None where they are not taken in chunks."""
    known, setting = _changes.setdefault(model, {}), _setting(model, device)
    if setting not in known:
        inputs = {"input_ids": torch.zeros(1, 3, dtype=torch.long, device=device)}
        known[setting] = find_change(model, lambda: logits_at(model, inputs, np.array([0, 2]))[None])
        logger.debug("Logits of %s: %s", type(model).__name__, known[setting])
    found = known[setting]
    # Modules inside the head (adapters) would gather their weights once a chunk, and processes differ in chunks.
    if not sharded or found is None:
        return found
    return None if list(lm_head(model).children()) else replace(found, gathered=True)


def _scored_budget(model: nn.Module, device: torch.device) -> int:
    """Scored tokens of a batch that is projected as a whole."""
    budget = CPU_LOGITS_BUDGET if device.type == "cpu" else ACCELERATOR_LOGITS_BUDGET
    return max(budget // vocabulary_size(model), 1)


# ---- the choice of an engine -------------------------------------------------------------------------------------


def _attends_to_all(config: Any) -> bool:
    """Whether every layer sees all earlier tokens; windows and chunks longer than the probe would not show in it."""
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    return layers == {"full_attention"} and getattr(config, "attention_chunk_size", None) is None


def streams(model: nn.Module, device: torch.device | None = None) -> bool:
    """Whether the `stream` engine gives the numbers of the `padded` one for this model, tried out once.

    It does not for models without attention layers, with sliding windows, soft-capped scores or attention sinks, for
    absolute positions that ignore `position_ids`, behind prompt tuning, and off a CPU without a kernel for the dtype.
    """
    device = device or model_device(model)
    known, setting = _probed.setdefault(model, {}), _setting(model, device)
    if setting not in known:
        known[setting] = _streams_exactly(model, device)
        logger.debug("Engine for %s: %s", type(model).__name__, "stream" if known[setting] else "padded")
    return known[setting]


def _streams_exactly(model: nn.Module, device: torch.device) -> bool:
    if not _attends_to_all(text_config(model)):
        return False
    segments = _probe(vocabulary_size(model))
    batch = streamed(segments, device)
    if device.type != "cpu" and batch.plan.kernel is None:
        return False
    # Whatever such a model raises here, the padded engine scores it or raises it again.
    with borrowed(model, device), contextlib.suppress(Exception):
        expected = launch(model, padded(segments, device), device, None).nll()
        found = launch(model, batch, device, None, check=True).nll()
        tolerance = _HALF_PROBE_TOLERANCE if batch.plan.dtype in HALF else _PROBE_TOLERANCE
        off = float(np.abs(found / expected - 1).max())
        if not off <= tolerance:
            logger.info("%s is padded: as a stream its losses differ by up to %.1e.", type(model).__name__, off)
        return off <= tolerance
    return False


def _probe(vocabulary: int) -> list[Segment]:
    """Segments of some length, of any tokens: on a few special ones, rounding alone was 3.6 % in bfloat16."""
    rng = np.random.default_rng(0)
    beginning, *tails = (rng.integers(0, vocabulary, size).tolist() for size in (32, 16, 24, 40, 24))
    texts = [*(beginning + tail for tail in tails[:3]), tails[3]]
    return [Segment(ids, len(ids) - 12) for ids in texts]


def model_device(model: nn.Module) -> torch.device:
    """The device of the model's first parameter (its input embedding, for a model spread over devices)."""
    return next(model.parameters()).device


@contextlib.contextmanager
def borrowed(model: nn.Module, device: torch.device) -> Iterator[None]:
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
    compiled = any(hasattr(module, "_orig_mod") or module._compiled_call_impl for module in model.modules())
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


def token_progress(pairs: Sequence[EncodedPair], description: str, enabled: bool = True) -> tqdm:
    """A progress bar that counts tokens, for `score_pairs(progress=bar.update)`."""
    total = token_count(pairs)
    return tqdm(total=total, desc=description, unit="tok", unit_scale=True, disable=not enabled, leave=False)
