"""A judge that is a reward model: a classifier with one output, which gives each prompt and answer a number.

A pair is told by its two rewards, so that there is no order to change, and each answer is scored once, whatever it is
held against. A tokenizer with a chat template writes prompt and answer as a user's and an assistant's message; any
other joins the two texts as its model's pairs of texts. An answer that does not fit into `max_length` tokens loses its
end, not the template's, and is counted; a prompt that leaves it no room gives no reward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from ..data.paths import check_model
from ..errors import FileAccessError, UserError, one_line
from ..scoring.devices import check_device, default_device, default_dtype, named_dtype
from ..scoring.eval_guard import eval_mode
from ..scoring.weights_digest import checkpoint_digest, weights_digest
from .cache import content_key
from .scores import Judgement

Answered = tuple[str, str]  # prompt, answer
TOO_LONG, NOT_FINITE = "too long a prompt for the reward model", "a reward that is not finite"
_UNBOUNDED = 10**6  # tokens; a tokenizer that knows no limit names a far larger one


@dataclass(frozen=True)
class Reward:
    """What an answer is worth to a reward model.

    Attributes:
        value: the higher the better, on the model's own scale; None without one.
        cut: characters of the answer that did not fit.
        reason: why there is none.
        by: the model.
    """

    value: float | None = None
    cut: int = 0
    reason: str | None = None
    by: str = ""

    def record(self) -> dict[str, Any] | None:
        """What a cache keeps."""
        return vars(self).copy()


@dataclass(frozen=True)
class _Encoded:
    """Token ids, and of which of two texts each is."""

    ids: list[int]
    types: list[int]

    @classmethod
    def of(cls, encoding: Any) -> _Encoded:
        ids = encoding["input_ids"]
        return cls(ids, encoding.get("token_type_ids") or [0] * len(ids))

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class RewardModel:
    """Gives each answer a reward; of two the one with the higher one wins.

    Attributes:
        model: a hub name or path of a sequence classifier with one label, or such a model, loaded.
        tokenizer: of a loaded model; by default that of the checkpoint.
        margin: rewards that differ by no more than this are a tie.
        max_length: tokens of prompt and answer; by default what tokenizer and model allow.
        batch_size: answers at a time.
        device, dtype: by default an accelerator and the checkpoint's dtype, or the CPU and float32.

    Raises:
        UserError: for settings that cannot be; when it is used, for a model that is no reward model.
        FileAccessError: when it is used, for a checkpoint that cannot be read.

    >>> judge = RewardModel("OpenAssistant/reward-model-deberta-v3-large-v2")                    # doctest: +SKIP
    >>> judge([("Name a colour.", "Red.")])                                                      # doctest: +SKIP
    [Reward(value=1.7, cut=0, reason=None, by='OpenAssistant/reward-model-deberta-v3-large-v2')]
    """

    model: Any
    tokenizer: Any = None
    margin: float = 0.0
    max_length: int | None = None
    batch_size: int = 8
    device: str | None = None
    dtype: torch.dtype | str | None = None

    def __post_init__(self) -> None:
        if not (self.margin >= 0 and math.isfinite(self.margin)):
            raise UserError(f"margin of a reward model must be at least 0, got {self.margin!r}.")
        for name in ("max_length", "batch_size"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int) and value > 0):
                raise UserError(f"{name} of a reward model must be above 0, got {value!r}.")

    @property
    def name(self) -> str:
        """As tables have it."""
        return self.model if isinstance(self.model, str) else type(self.model).__name__

    def check(self) -> None:
        """Raise for a folder that is not there, before anything is loaded."""
        if isinstance(self.model, str):
            check_model(self.model)

    def settings(self) -> dict[str, Any]:
        """What a record of a comparison may hold."""
        return {"model": self.name, "margin": self.margin, "max_length": self.max_length}

    def questions(self, prompt: str, own: str, other: str) -> list[Answered]:
        """Both answers."""
        return [(prompt, own), (prompt, other)]

    def key(self, answered: Answered) -> str:
        """A digest of all that a reward depends on: weights, dtype, longest text, prompt and answer."""
        return content_key("reward", self._digest, str(self.dtype), self.max_length, *answered)

    def read(self, record: dict[str, Any]) -> Reward:
        """The reward that a cache has kept."""
        return Reward(**record)

    def compare(self, rewards: Sequence[Reward]) -> Judgement:
        """Win, tie or loss of the first answer."""
        reasons = tuple(reward.reason for reward in rewards if reward.reason is not None)
        if reasons:
            return Judgement(None, reasons=reasons)
        own, other = (reward.value for reward in rewards)
        return Judgement(int(own - other > self.margin) - int(other - own > self.margin), own, other)

    def __call__(self, answered: Sequence[Answered], said: Callable[[int, Reward], Any] | None = None) -> list[Reward]:
        """A reward for each prompt and answer.

        Args:
            answered: prompts and answers.
            said: is called with the number and the reward of each, batch by batch.
        """
        rewards: dict[int, Reward] = {}

        def note(number: int, reward: Reward) -> None:
            rewards[number] = reward
            if said is not None:
                said(number, reward)

        if answered:
            fitted = [self._fitted(prompt, answer) for prompt, answer in answered]
            for number, (text, cut) in enumerate(fitted):
                if text is None:
                    note(number, Reward(cut=cut, reason=TOO_LONG, by=self.name))
            for numbers in self._batches([text for text, _ in fitted]):
                values = self._values([fitted[number][0] for number in numbers])
                for number, value in zip(numbers, values, strict=True):
                    finite, cut = math.isfinite(value), fitted[number][1]
                    note(number, Reward(value if finite else None, cut, None if finite else NOT_FINITE, self.name))
        return [rewards[number] for number in range(len(answered))]

    def _batches(self, texts: Sequence[_Encoded | None]) -> Iterator[list[int]]:
        """Numbers of texts that are run together, like lengths with like, the longest first."""
        order = sorted((n for n, text in enumerate(texts) if text is not None), key=lambda n: -len(texts[n]))
        # Without a padding token the model would not know where a padded text ends.
        size = self.batch_size if self._pad is not None else 1
        for begin in range(0, len(order), size):
            yield order[begin : begin + size]

    def _values(self, texts: Sequence[_Encoded]) -> list[float]:
        """Rewards of encoded texts, padded on the right."""
        model, longest = self._loaded, max(map(len, texts))
        device = next(model.parameters()).device
        inputs = {
            "input_ids": [[*text.ids, *[self._pad or 0] * (longest - len(text))] for text in texts],
            "attention_mask": [[1] * len(text) + [0] * (longest - len(text)) for text in texts],
        }
        if (getattr(model.config, "type_vocab_size", 0) or 0) > 1:
            inputs["token_type_ids"] = [[*text.types, *[0] * (longest - len(text))] for text in texts]
        with eval_mode(model, device):
            tensors = {name: torch.tensor(rows, device=device) for name, rows in inputs.items()}  # (B, T)
            logits = model(**tensors).logits  # (B, 1)
        return logits[:, 0].float().tolist()

    def _fitted(self, prompt: str, answer: str) -> tuple[_Encoded | None, int]:
        """A text that fits, None where not even a part of the answer does, and the characters that are left out."""
        whole, most = self._encoded(prompt, answer), self._most
        if most is None or len(whole) <= most:
            return whole, 0
        kept, upper = 0, len(answer)
        while kept < upper:
            middle = (kept + upper + 1) // 2
            if len(self._encoded(prompt, answer[:middle])) <= most:
                kept = middle
            else:
                upper = middle - 1
        return (self._encoded(prompt, answer[:kept]) if kept else None), len(answer) - kept

    def _encoded(self, prompt: str, answer: str) -> _Encoded:
        tokenizer = self._tokenizer
        if tokenizer.chat_template is None:
            return _Encoded.of(tokenizer(prompt, answer))
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        return _Encoded.of(tokenizer(text, add_special_tokens=False))  # the template has written them

    @cached_property
    def _digest(self) -> str:
        if not isinstance(self.model, str):
            return weights_digest(self.model)
        with _reading(f"The reward model {self.model} cannot be read"):
            return checkpoint_digest(self.model)

    @cached_property
    def _tokenizer(self) -> Any:
        if self.tokenizer is not None and not isinstance(self.tokenizer, str):
            return self.tokenizer
        source = self.tokenizer or (self.model if isinstance(self.model, str) else self.model.config.name_or_path)
        if not source:
            raise UserError("Pass the tokenizer too: the loaded reward model does not say where it came from.")
        with _reading(f"{source} has no tokenizer that can be read"):
            return AutoTokenizer.from_pretrained(source)

    @cached_property
    def _most(self) -> int | None:
        """Tokens that fit; None without a limit."""
        config = self._loaded.config.get_text_config()
        limits = [self.max_length, self._tokenizer.model_max_length, getattr(config, "max_position_embeddings", None)]
        return min((limit for limit in limits if limit and 0 < limit < _UNBOUNDED), default=None)

    @property
    def _pad(self) -> int | None:
        return self._loaded.config.get_text_config().pad_token_id

    @cached_property
    def _loaded(self) -> Any:
        if not isinstance(self.model, str):
            return _checked(self.model, self.name)
        device = self.device or default_device()
        check_device(device)
        dtype = named_dtype(self.dtype)
        with _reading(f"The reward model {self.model} cannot be read"):
            config = AutoConfig.from_pretrained(self.model)
            dtype = dtype or default_dtype(config, device)
            model, loading = AutoModelForSequenceClassification.from_pretrained(
                self.model, config=config, dtype=dtype, output_loading_info=True
            )
        if missing := sorted(loading["missing_keys"]):
            raise UserError(
                f"{self.model} lacks {', '.join(missing[:3])}, which would be random: it is no reward model, but what "
                "one is made of. Name a sequence classifier that was trained to give rewards."
            )
        return _checked(model.to(device), self.model)


@contextmanager
def _reading(problem: str) -> Iterator[None]:
    """What transformers raises for files and names that it cannot read, told in a sentence that begins so."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise FileAccessError(f"{problem}: {one_line(error)}") from error


def _checked(model: Any, name: str) -> Any:
    """The model; UserError unless it is a classifier with one output."""
    labels = getattr(getattr(model, "config", None), "num_labels", None)
    if not type(model).__name__.endswith("ForSequenceClassification") or labels != 1:
        raise UserError(
            f"{name} is no reward model: that is a sequence classifier with 1 label, and this is a "
            f"{type(model).__name__} with {labels}."
        )
    return model
