"""Does the model's own answer score as the row's does? The transform that compares their losses (SPIN).

What the gap means, and the rule that goes by it, is in `method.spin`; whose model, tokenizer and format they are, in
`asking`. The row's answer and the model's own are tokenised and scored in the same way, behind the same prompt and the
same white space.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from transformers import PreTrainedModel

from ..data.format_choice import FormatOptions
from ..data.formats import Example, PromptFormat
from ..method.columns import SPIN_COLUMNS
from ..method.knowledge import compared
from ..method.reasons import Status
from ..method.spin import OWN_EMPTY, spin_gap
from ..method.text_agreement import Agreement, as_agreement
from .asking import AskingScorer
from .generation import TOKENS, Answer, check_sampling, greedy_answers, sampled_answers
from .questions import Question, answered
from .transform import IFDScorer

OWN_ANSWERS_VERSION = 1  # raised when the same weights and options would give other answers or gaps


class OwnAnswerScorer(AskingScorer):
    """Attach how much more a row's answer surprises the model than the model's own: `ds.map(scorer, batched=True)`.

    With the row's answer r and the model's own answers y_i to the row's prompt Q, s(A|Q) the mean loss of an answer:

        own_cas       = 1/n * sum_i s(y_i|Q)
        spin_gap      = s(r|Q) - own_cas            nats per token
        own_agreement = 1/n * sum_i a(y_i, r)       an agreement of texts, in [0, 1]

    Columns: these (float64, null without a value), `own_answer` (the first y_i) and `spin_status`: "ok", or why there
    is no gap: the row is `malformed`, has an `empty_answer` or an `empty_prompt`, is `prompt_too_long` for
    max_new_tokens more in the model's window, or `truncated` where an answer does not fit in max_length;
    `own_answer_empty` where the model says nothing, `nonfinite` where it gives no probabilities. Blank answers among
    several count for the agreement, as 0, and not for the loss. All other columns stay as they are. `MatchedGate` is a
    rule by them; a selection ranks by them as by any column: `Cherry(float("inf"), "spin_gap")` keeps what the model
    would say least.

    Asking costs far more than scoring: each token of an answer is a forward.

    Args:
        model: a hub name, a local path, a loaded causal LM, or an `IFDScorer`: then its model, tokenizer, format,
            device and dtype are taken, and the arguments for them are refused.
        tokenizer, format, device, dtype, revision, trust_remote_code: as of `IFDScorer`.
        samples: how many answers are sampled; None for the greedy one, the likeliest token after each other.
        max_new_tokens: most tokens of an answer; for the agreement, that of the row is cut there too.
        temperature, top_p, seed: of sampling; see `sampled_answers`. SPIN samples at temperature 1.
        agreement: "f1" (of words), "exact", "rouge_l", or a function; see `method.text_agreement`.
        token_budget: tokens of a batch, those to come among them.

    Raises:
        UserError: for options outside of their ranges, and what `IFDScorer` raises.

    >>> ds = ds.map(OwnAnswerScorer("HuggingFaceTB/SmolLM2-135M"), batched=True)                 # doctest: +SKIP
    >>> gate_rows(ds, [MatchedGate(margin=0.1)])                                                # doctest: +SKIP
    array(['kept', 'matched', 'kept', ...], dtype=object)
    """

    attached: ClassVar[tuple[str, ...]] = SPIN_COLUMNS
    version: ClassVar[int] = OWN_ANSWERS_VERSION

    def __init__(
        self,
        model: str | os.PathLike | PreTrainedModel | IFDScorer,
        tokenizer: Any = None,
        *,
        samples: int | None = None,
        max_new_tokens: int = 128,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int = 0,
        agreement: str | Agreement = "f1",
        format: str | PromptFormat | FormatOptions | None = None,
        device: str | None = None,
        dtype: torch.dtype | str | None = None,
        token_budget: int = TOKENS,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        check_sampling(1 if samples is None else samples, temperature, top_p, seed)
        as_agreement(agreement)
        self.samples, self.agreement = samples, agreement
        self.sampling = {"temperature": float(temperature), "top_p": float(top_p), "seed": seed}
        options = {"format": format, "device": device, "dtype": dtype, "revision": revision}
        options |= {"trust_remote_code": trust_remote_code}
        super().__init__(model, tokenizer, max_new_tokens, token_budget, options)

    @property
    def answers(self) -> int:
        """How many answers each row gets."""
        return self.samples or 1

    def columns_of(
        self, asked: Sequence[Question], progress: Callable[[int], Any] | None = None
    ) -> dict[str, np.ndarray]:
        """Ask, and hold the losses of the answers against those of the rows' own."""
        said = self.said(asked, progress)
        examples: list[Example] = []
        places: dict[int, range] = {}  # of a row's answer and behind it the model's own, those that say anything
        for row, answers in said.items():
            whole = asked[row].example
            own = [answer.text for answer in answers if answer is not None and answer.text.strip()]
            places[row] = range(len(examples), len(examples) + 1 + len(own))
            examples += [whole, *(_with_answer(whole, text) for text in own)]
        losses, found = self._losses(examples)
        status = np.array([question.status.value for question in asked], dtype=object)
        cas, own_cas, agreement = np.full((3, len(asked)), np.nan)
        texts = np.full(len(asked), None, dtype=object)
        for row, answers in said.items():
            if None in answers:
                status[row] = Status.NONFINITE.value
                continue
            texts[row] = answers[0].text
            whole = [answer.text for answer in answers]
            agreement[row] = compared(whole, self.cut(asked[row].reference), self.agreement)[0].mean()
            first, *own = places[row]
            status[row] = next((found[i] for i in places[row] if found[i] != Status.OK.value), Status.OK.value)
            if status[row] == Status.OK.value and not own:
                status[row] = OWN_EMPTY
            if status[row] == Status.OK.value:
                cas[row], own_cas[row] = losses[first], losses[own].mean()
        gap = spin_gap(cas, own_cas)
        status[(status == Status.OK.value) & np.isnan(gap)] = Status.NONFINITE.value
        return dict(zip(SPIN_COLUMNS, (gap, own_cas, agreement, texts, status), strict=True))

    def said(
        self, asked: Sequence[Question], progress: Callable[[int], Any] | None = None
    ) -> dict[int, list[Answer | None]]:
        """The model's answers to the questions that can be asked, by their places."""
        model, tokenizer = self.scorer.model, self.scorer.encoder.tokenizer
        more = {"max_new_tokens": self.most, "token_budget": self.token_budget, "progress": progress}

        def generate(prompts: list[tuple[int, ...]], stop: frozenset[int]) -> list[list[Answer | None]]:
            if self.samples is not None:
                return sampled_answers(model, tokenizer, prompts, self.samples, stop=stop, **self.sampling, **more)
            return [[answer] for answer in greedy_answers(model, tokenizer, prompts, stop=stop, **more)]

        return answered(asked, model, tokenizer, generate)

    def settings(self) -> dict[str, Any]:
        """The options that answers and gaps depend on, beside those of the `IFDScorer`; of a function its name."""
        name = self.agreement if isinstance(self.agreement, str) else getattr(self.agreement, "__qualname__", "own")
        sampling = {"samples": self.samples, **self.sampling} if self.samples is not None else {"samples": None}
        return {"max_new_tokens": self.most, **sampling, "agreement": name, "version": OWN_ANSWERS_VERSION}

    def _losses(self, examples: list[Example]) -> tuple[np.ndarray, np.ndarray]:
        """Mean losses of answers given their prompts, (n,), and statuses, (n,): NaN where one is not "ok"."""
        pairs = self.scorer.encoder(examples)
        status = np.array([pair.status.value for pair in pairs], dtype=object)
        losses = np.full(len(pairs), np.nan)
        segments = [pair.conditioned for pair in pairs if pair.conditioned is not None]
        if segments:
            losses[[pair.conditioned is not None for pair in pairs]] = self.scorer.nll_with_tails(segments)[0]
        return losses, status

    def __repr__(self) -> str:
        options = {"samples": self.samples, "max_new_tokens": self.most, **self.sampling, "agreement": self.agreement}
        return f"OwnAnswerScorer({self.scorer!r}, {', '.join(f'{name}={value!r}' for name, value in options.items())})"


def _with_answer(example: Example, text: str) -> Example:
    """The example with an answer of the model's own, behind the white space that the row's answer begins with.

    A model that begins with a line break where the data has none would else seem not to know what it says itself.
    """
    blank = example.answer[: len(example.answer) - len(example.answer.lstrip())]
    return dataclasses.replace(example, answer=blank + text.lstrip() + example.end)
