"""Greedy answers of a causal language model, in batches, that leave no trace in it.

The model is borrowed: its modes, its random states and its own settings of generation are afterwards as they were.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import GenerationConfig

from ..data.encoding import check_positive, token_budget_batches
from ..scoring.engine import model_device
from ..scoring.eval_guard import eval_mode
from ..scoring.model_parts import text_config, unwrapped
from ..scoring.rope_limits import kinds_of_lengths

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
    answers: dict[int, Answer] = {}
    with eval_mode(model, model_device(model)), plain_generation(model, **settings):
        queue = _batches([len(ids) for ids in prompts], max_new_tokens, token_budget, text_config(model))[::-1]
        while queue:
            rows = queue.pop()
            try:
                said = _continued(model, [prompts[i] for i in rows], settings["pad_token_id"])
            except torch.OutOfMemoryError:
                if len(rows) == 1:
                    raise
                said = None
            if said is None:  # only here is the error gone, and with it what the forward had made
                half = len(rows) // 2
                queue += [rows[half:], rows[:half]]
                continue
            answers.update((i, _answer(ids, stop, tokenizer)) for i, ids in zip(rows.tolist(), said, strict=True))
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


def _continued(model: nn.Module, prompts: Sequence[Sequence[int]], pad: int) -> list[list[int]]:
    """What `generate` writes behind each prompt."""
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), pad)  # (B, T)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    device = model_device(model)
    config = model.generation_config  # given too: else transformers refuses configs of models with such settings
    written = model.generate(input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=config)
    return written[:, longest:].tolist()


def _answer(ids: list[int], stop: Collection[int], tokenizer: Any) -> Answer:
    end = next((place for place, token in enumerate(ids) if token in stop), None)
    said = ids[:end]
    text = tokenizer.decode(said, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return Answer(text, len(said), cut_off=end is None)
