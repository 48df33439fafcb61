"""Mean negative log-likelihood of answer tokens: the only place that runs a model forward.

`score_pairs` scores encoded rows, both segments of a row in one stream of token-budget batches. Segments are padded
on the right without an attention mask: under causal attention no token sees what follows it, so padding changes
nothing. The LM head runs on the scored positions only, and the log-softmax in float32 whatever the model's dtype.

Scoring leaves no trace: every module's train or eval mode and the global random state are as before.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from . import ifd as equations
from .encoding import EncodedPair, Segment, Status, token_budget_batches

logger = logging.getLogger(__name__)

# Tokens of a padded batch. 2,048 was the fastest of 512 to 8,192 on two CPU cores with a 135M model.
CPU_TOKEN_BUDGET = 2048
ACCELERATOR_TOKEN_BUDGET = 16384
# Logits of a batch: 2**28 values are 1 GiB in float32, so at most 1,766 scored tokens at a vocabulary of 152,000.
LOGITS_BUDGET = 2**28
_HEAD_CHUNK = 256  # rows of logits turned into float32 log-probabilities at a time


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
) -> Scores:
    """Score encoded rows.

    Args:
        model: a causal language model; put into eval mode and back.
        pairs: n encoded rows.
        device: where the token ids go; the model's device by default.
        token_budget: tokens of a padded batch; by default 2,048 on a CPU and 16,384 elsewhere. Halved, with one
            warning, whenever the device runs out of memory.
        progress: called with the number of tokens done after each batch.

    Returns:
        Scores of the n rows, in their order.

    Raises:
        torch.OutOfMemoryError: when one row alone does not fit.
    """
    segments = [segment for pair in pairs if pair.conditioned for segment in (pair.conditioned, pair.direct)]
    nll = answer_nll(model, segments, device=device, token_budget=token_budget, progress=progress)
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
) -> np.ndarray:
    """Mean negative log-likelihood of each segment's scored tokens.

        nll = -1/N * sum_{i >= start} log P(ids[i] | ids[:i])

    Returns:
        (n,) float64, nats per token.
    """
    device = torch.device(device) if device is not None else model_device(model)
    token_budget = token_budget or (CPU_TOKEN_BUDGET if device.type == "cpu" else ACCELERATOR_TOKEN_BUDGET)
    vocabulary = getattr(_config(model), "vocab_size", None) or 2**15
    scored = [segment.scored for segment in segments]
    batches = token_budget_batches(
        [len(segment.ids) for segment in segments], token_budget, scored, max(LOGITS_BUDGET // vocabulary, 1)
    )
    out = np.empty(len(segments), dtype=np.float64)
    with borrowed(model):
        queue = batches[::-1]
        warned = False
        while queue:
            batch = queue.pop()
            try:
                out[batch] = _batch_nll(model, [segments[i] for i in batch], device)
            except torch.OutOfMemoryError as error:
                if len(batch) == 1:
                    raise torch.OutOfMemoryError(
                        f"Out of memory scoring a single row of {len(segments[batch[0]].ids)} tokens on {device}. "
                        "Lower max_length, or score with a smaller model or on a larger device."
                    ) from error
                if not warned:
                    logger.warning("Out of memory on %s: scoring goes on with half of %d rows.", device, len(batch))
                    warned = True
                torch.cuda.empty_cache() if device.type == "cuda" else None
                half = len(batch) // 2
                queue += [batch[half:], batch[:half]]
                continue
            if progress is not None:
                progress(sum(len(segments[i].ids) for i in batch))
    return out


def _batch_nll(model: nn.Module, segments: Sequence[Segment], device: torch.device) -> np.ndarray:
    """Mean NLL of one padded batch, (B,) float64."""
    longest = max(len(segment.ids) for segment in segments)
    ids = torch.zeros(len(segments), longest, dtype=torch.long)  # (B, T)
    predicts = torch.zeros(len(segments), longest, dtype=torch.bool)  # (B, T), positions whose next token is scored
    for row, segment in enumerate(segments):
        ids[row, : len(segment.ids)] = torch.tensor(segment.ids)
        predicts[row, segment.start - 1 : len(segment.ids) - 1] = True
    rows, columns = predicts.nonzero(as_tuple=True)  # (N,) each
    targets = ids[rows, columns + 1].to(device)  # (N,)
    logits = _logits_at(model, ids.to(device), rows.to(device), columns.to(device))  # (N, V)
    losses = torch.cat(
        [
            nn.functional.cross_entropy(chunk.float(), target, reduction="none")
            for chunk, target in zip(logits.split(_HEAD_CHUNK), targets.split(_HEAD_CHUNK), strict=True)
        ]
    )
    sums = torch.zeros(len(segments), dtype=torch.float64).index_add_(0, rows, losses.double().cpu())
    return (sums / predicts.sum(1)).numpy()


def _logits_at(model: nn.Module, ids: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Logits at (rows, columns) of `ids`, (N, V); the LM head runs on those positions alone.

    A hook on the LM head picks the hidden states, so that whatever a model does to its logits afterwards (scaling,
    soft-capping) still happens. Positions count from the end: prompt tuning puts virtual tokens in front.
    """
    back = columns - ids.shape[1]

    def pick(module: nn.Module, inputs: tuple) -> tuple:
        return (inputs[0][rows, back].unsqueeze(0), *inputs[1:])  # (B, T, H) -> (1, N, H)

    head = lm_head(model)
    hook = head.register_forward_pre_hook(pick) if head is not None else contextlib.nullcontext()
    with hook:
        logits = model(input_ids=ids, use_cache=False).logits
    if head is not None and logits.shape[:2] == (1, len(rows)):
        return logits[0]
    return logits[rows, back]  # a model that does not call its head as a module


def lm_head(model: nn.Module) -> nn.Module | None:
    """The output embedding of a causal LM, or None where the model does not tell."""
    get = getattr(model, "get_output_embeddings", None)
    with contextlib.suppress(AttributeError, NotImplementedError):
        return get() if get is not None else None
    return None


def model_device(model: nn.Module) -> torch.device:
    """The device of the model's first parameter (its input embedding, for a model spread over devices)."""
    return next(model.parameters()).device


@contextlib.contextmanager
def borrowed(model: nn.Module) -> Iterator[None]:
    """Run `model` in eval mode without gradients; give back every module's mode and the random state."""
    modes = [(module, module.training) for module in model.modules()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices, key=str)), torch.no_grad():
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


def token_progress(pairs: Sequence[EncodedPair], description: str, enabled: bool = True) -> tqdm:
    """A progress bar that counts tokens, for `score_pairs(progress=bar.update)`."""
    total = sum(len(pair.conditioned.ids) + len(pair.direct.ids) for pair in pairs if pair.conditioned)
    return tqdm(total=total, desc=description, unit="tok", unit_scale=True, disable=not enabled, leave=False)


def _config(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config
