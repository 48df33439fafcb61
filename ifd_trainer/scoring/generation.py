"""Answers of a causal language model in batches, greedy or sampled, that leave no trace in it.

The model is borrowed: its modes, its random states and its own settings of generation are afterwards as they were.

What is sampled does not depend on what else is asked. `generate` draws from one random state for a whole batch; here
each sample of each prompt has random numbers of its own, made from a seed, the prompt and the sample's number (see
`draws`), and one of them chooses each token. A batch can change a token by rounding alone: where the number lies closer
to the limit between two tokens than the model's probabilities in two batches differ. In float32 they hardly do; in
bfloat16 and float16 they differ in the second or third digit, so that samples of other batches may go other ways, while
those of the same batches are the same.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from ..data.encoding import check_positive, token_budget_batches
from ..errors import UserError
from ..method.knowledge import check_share
from ..method.number_types import is_number, is_whole
from .engine import model_device
from .eval_guard import eval_mode
from .model_parts import text_config, unwrapped
from .rope_limits import kinds_of_lengths

TOKENS = 4096  # of a batch, those to come among them: a 7B model without grouped heads keeps 2 GiB for them in bfloat16


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model says.

    Attributes:
        text: without special tokens.
        tokens: how many they are, without the one that ends the turn.
        cut_off: whether the model would have gone on.
    """

    text: str
    tokens: int
    cut_off: bool


def greedy_answers(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop: Collection[int] | None = None,
    token_budget: int = TOKENS,
    progress: Callable[[int], Any] | None = None,
) -> list[Answer]:
    """The most likely token after each prompt, and so on, until the turn ends.

    Prompts of about the same length share a forward, padded on the left; which ones do changes an answer only where
    rounding decides between two tokens. The model's own settings (a temperature, a repetition penalty, beams) do not
    count.

    Args:
        model: a causal language model of transformers, or one with adapters of peft.
        tokenizer: decodes the answers; used, never changed.
        prompts: token ids of each; at least one, and with max_new_tokens no more than the model has positions for.
        max_new_tokens: most tokens of an answer.
        stop: ids of the tokens that end a turn; by default those of `stop_tokens`.
        token_budget: most tokens of a batch, padding and max_new_tokens for each of its prompts among them. A batch
            that does not fit in memory is done in halves.
        progress: called with the number of tokens done after each batch, max_new_tokens counted whole.

    Returns:
        An answer for each prompt, in their order.

    Raises:
        UserError: for a max_new_tokens or a token_budget below 1.
        torch.OutOfMemoryError: when a single prompt does not fit.

    >>> from transformers import AutoModelForCausalLM, AutoTokenizer                                # doctest: +SKIP
    >>> model = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M")                  # doctest: +SKIP
    >>> tokenizer = AutoTokenizer.from_pretrained("HuggingFaceTB/SmolLM2-135M")                     # doctest: +SKIP
    >>> greedy_answers(model, tokenizer, tokenizer(["2 + 2 ="]).input_ids, 3)                       # doctest: +SKIP
    [Answer(text=' 4', tokens=2, cut_off=False)]
    """
    return _answers(model, tokenizer, prompts, max_new_tokens, stop, token_budget, progress=progress)


def sampled_answers(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    samples: int,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: Collection[int] | None = None,
    token_budget: int = TOKENS,
    progress: Callable[[int], Any] | None = None,
) -> list[list[Answer | None]]:
    """Several answers to each prompt, drawn from the model's probabilities at a temperature, until the turn ends.

    They depend on the seed, the prompt's tokens and the number of the sample: not on the other prompts nor their order,
    the batches, the global random state, and the number of samples; and with more new tokens they begin with the same
    ones. How far rounding may change that is said above. Each sample is a generation of its own, the prompt read anew.

    Args:
        model: a causal language model of transformers, or one with adapters of peft.
        tokenizer: decodes the answers; used, never changed.
        prompts: token ids of each; at least one, and with max_new_tokens no more than the model has positions for.
        samples: answers to each prompt.
        max_new_tokens: most tokens of an answer.
        temperature: what logits are divided by, above 0.
        top_p: of the likeliest tokens that have at least this probability together, in (0, 1]; 1 for all.
        seed: of the random numbers, a whole number of at least 0.
        stop: ids of the tokens that end a turn; by default those of `stop_tokens`.
        token_budget: as in `greedy_answers`.
        progress: called with the number of tokens done after each batch, max_new_tokens counted whole.

    Returns:
        For each prompt, in their order, its samples, in theirs; None for one where the model gave no probabilities (NaN
        or infinity).

    Raises:
        UserError: for numbers outside of what is said here.
        torch.OutOfMemoryError: when a single prompt does not fit.

    >>> sampled_answers(model, tokenizer, tokenizer(["2 + 2 ="]).input_ids, 2, 3)                   # doctest: +SKIP
    [[Answer(text=' 4', tokens=2, cut_off=False), Answer(text=' 4. ', tokens=3, cut_off=True)]]
    """
    check_sampling(samples, temperature, top_p, seed)
    rows = [(ids, sample) for ids in prompts for sample in range(samples)]

    def drawn(chosen: np.ndarray) -> _Sampling:
        numbers = [draws(*rows[row], max_new_tokens, seed) for row in chosen]
        return _Sampling(np.stack(numbers), max(len(rows[row][0]) for row in chosen), temperature, top_p)

    found = _answers(
        model, tokenizer, [ids for ids, _ in rows], max_new_tokens, stop, token_budget, drawn=drawn, progress=progress
    )
    return [found[start : start + samples] for start in range(0, len(found), samples)]


def check_sampling(samples: int, temperature: float, top_p: float, seed: int) -> None:
    """Raise UserError for what `sampled_answers` does not take.

    >>> check_sampling(samples=8, temperature=1.0, top_p=0.9, seed=0)
    """
    check_positive(samples=samples)
    check_share(top_p=top_p)
    if not is_whole(seed) or seed < 0:
        raise UserError(f"seed must be a whole number of at least 0, got {seed!r}.")
    number = is_number(temperature)
    if not (number and 0 < temperature < float("inf")):
        raise UserError(
            f"temperature must be a number above 0, got {temperature!r}: at 0 all samples would be the same answer."
        )


def draws(prompt: Sequence[int], sample: int, count: int, seed: int = 0) -> np.ndarray:
    """The random numbers, (count,) in [0, 1), of a sample of a prompt: its t-th token is chosen by the t-th of them.

    NumPy's PCG64 with the entropy (seed, four 32-bit words of a BLAKE2b digest of the token ids, sample).

    >>> bool((draws([5, 6], 0, 3) == draws([5, 6], 0, 9)[:3]).all()), bool((draws([5, 6], 1, 3) == 0).any())
    (True, False)
    """
    digest = hashlib.blake2b(np.asarray(prompt, dtype="<i8").tobytes(), digest_size=16).digest()
    entropy = [seed, *np.frombuffer(digest, dtype="<u4").tolist(), sample]
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy))).random(count)


def sampled_tokens(
    logits: torch.Tensor, numbers: torch.Tensor, temperature: float = 1.0, top_p: float = 1.0
) -> torch.Tensor:
    """The tokens, (B,), that (B,) random numbers in [0, 1) choose from (B, V) logits.

    With probabilities p_v = softmax(logits / temperature), those outside of the likeliest tokens that reach top_p set
    to 0, a number u chooses the first token v, by its id, with p_0 + ... + p_v > u * sum_w p_w. By id, since the order
    of two tokens of about the same probability would depend on rounding.

    >>> sampled_tokens(torch.tensor([[1.0, 0.25]]).log(), torch.tensor([0.79])).tolist()
    [0]
    >>> sampled_tokens(torch.tensor([[1.0, 0.25]]).log(), torch.tensor([0.81])).tolist()
    [1]
    """
    exact = torch.float32 if logits.device.type == "mps" else torch.float64
    probabilities = torch.softmax(logits.to(exact) / temperature, dim=-1)  # (B, V)
    if top_p < 1:
        ordered, tokens = probabilities.sort(dim=-1, descending=True, stable=True)
        outside = ordered.cumsum(dim=-1) - ordered >= top_p  # those before it reach top_p already
        probabilities = probabilities.masked_fill(torch.zeros_like(outside).scatter(1, tokens, outside), 0)
    summed = probabilities.cumsum(dim=-1)
    total = summed[:, -1:]
    reached = numbers.to(exact)[:, None] * total
    reached = torch.minimum(reached, torch.nextafter(total, torch.zeros_like(total)))  # a number may round up to 1
    return torch.searchsorted(summed, reached, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


class _Sampling(LogitsProcessor):
    """Leaves one token of each row, the one that is drawn, to a generation that takes the likeliest.

    Args:
        numbers: (B, T) of each row and each token to come.
        begin: tokens of the padded prompts.
        temperature, top_p: see `sampled_answers`.
    """

    def __init__(self, numbers: np.ndarray, begin: int, temperature: float, top_p: float) -> None:
        self._numbers, self._begin = torch.from_numpy(numbers), begin
        self._temperature, self._top_p = temperature, top_p
        self.finite = np.ones(len(numbers), dtype=bool)  # (B,) rows whose logits were numbers so far

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        numbers = self._numbers[:, input_ids.shape[1] - self._begin]
        numbers = numbers.to(scores.device, torch.float32 if scores.device.type == "mps" else torch.float64)
        tokens = sampled_tokens(scores, numbers, self._temperature, self._top_p)
        self.finite &= torch.isfinite(torch.logsumexp(scores.float(), dim=-1)).cpu().numpy()
        return torch.full_like(scores, -torch.inf).scatter(1, tokens[:, None], 0.0)


def _answers(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop: Collection[int] | None,
    token_budget: int,
    drawn: Callable[[np.ndarray], _Sampling] | None = None,
    progress: Callable[[int], Any] | None = None,
) -> list[Answer | None]:
    """Answers in batches, of the likeliest tokens or of those that are drawn for the rows of a batch."""
    check_positive(max_new_tokens=max_new_tokens, token_budget=token_budget)
    model = unwrapped(model)
    stop = stop_tokens(model, tokenizer) if stop is None else set(stop)
    pad = tokenizer.pad_token_id
    settings = {
        "max_new_tokens": max_new_tokens,
        "do_sample": False,
        "use_cache": True,
        "eos_token_id": sorted(stop) or None,
        "pad_token_id": min(stop, default=0) if pad is None else pad,
    }
    answers: dict[int, Answer | None] = {}
    with eval_mode(model, model_device(model)), plain_generation(model, **settings):
        queue = _batches([len(ids) for ids in prompts], max_new_tokens, token_budget, text_config(model))[::-1]
        while queue:
            rows = queue.pop()
            sampling = None if drawn is None else drawn(rows)
            try:
                said = _continued(model, [prompts[i] for i in rows], settings["pad_token_id"], sampling)
            except torch.OutOfMemoryError:
                if len(rows) == 1:
                    raise
                said = None
            if said is None:  # only here is the error gone, and with it what the forward had made
                half = len(rows) // 2
                queue += [rows[half:], rows[:half]]
                continue
            finite = [True] * len(rows) if sampling is None else sampling.finite
            for i, ids, whole in zip(rows.tolist(), said, finite, strict=True):
                answers[i] = _answer(ids, stop, tokenizer) if whole else None
            if progress is not None:
                progress(sum(len(prompts[i]) + max_new_tokens for i in rows))
    return [answers[i] for i in range(len(prompts))]


def stop_tokens(model: nn.Module, tokenizer: Any) -> set[int]:
    """The tokens that end a text or a turn: of the tokenizer, of the model's config and of its generation's."""
    found: set[int] = set()
    for source in (tokenizer, getattr(model, "config", None), getattr(model, "generation_config", None)):
        ids = getattr(source, "eos_token_id", None)
        found |= set() if ids is None else {int(ids)} if isinstance(ids, int) else {int(each) for each in ids}
    return found


@contextlib.contextmanager
def plain_generation(model: nn.Module, **settings: Any) -> Iterator[None]:
    """Let a model's `generate` have these settings by default, and none of its own but its special tokens.

    What `generate` is not told, it takes from the model, also where it is given a config of its own.
    """
    owners = [
        module for module in model.modules() if isinstance(vars(module).get("generation_config"), GenerationConfig)
    ]
    own = [module.generation_config for module in owners]
    for module, config in zip(owners, own, strict=True):
        special = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        module.generation_config = GenerationConfig(**special | settings)
    try:
        yield
    finally:
        for module, config in zip(owners, own, strict=True):
            module.generation_config = config


def _batches(lengths: Sequence[int], more: int, token_budget: int, config: Any) -> list[np.ndarray]:
    """Indices of prompts that share forwards, of which each is to get up to `more` tokens."""
    whole = [length + more for length in lengths]
    kind = np.empty(2 * len(whole), dtype=np.int64)
    for number, places in enumerate(kinds_of_lengths([*lengths, *whole], config)):
        kind[places] = number
    begins, ends = kind[: len(whole)], kind[len(whole) :]
    batches = [np.array([row]) for row in np.flatnonzero(begins != ends)]  # its frequencies change on the way
    for each in np.unique(begins[begins == ends]):
        rows = np.flatnonzero((begins == each) & (ends == each))
        batches += [rows[batch] for batch in token_budget_batches([whole[i] for i in rows], token_budget)]
    return batches


def _continued(
    model: nn.Module, prompts: Sequence[Sequence[int]], pad: int, sampling: LogitsProcessor | None
) -> list[list[int]]:
    """What `generate` writes behind each prompt."""
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), pad)  # (B, T)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    device = model_device(model)
    config = model.generation_config  # given too: else transformers refuses configs of models with such settings
    options = {} if sampling is None else {"logits_processor": LogitsProcessorList([sampling])}
    written = model.generate(
        input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=config, **options
    )
    return written[:, longest:].tolist()


def _answer(ids: list[int], stop: Collection[int], tokenizer: Any) -> Answer:
    end = next((place for place, token in enumerate(ids) if token in stop), None)
    said = ids[:end]
    text = tokenizer.decode(said, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return Answer(text, len(said), cut_off=end is None)
