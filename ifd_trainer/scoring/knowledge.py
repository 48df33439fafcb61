"""Does the model know it? The transform that samples answers to rows' prompts and holds them against the rows' own.

What the numbers mean, and what they do not, is in `method.knowledge`; how answers are sampled, in `generation`; whose
model, tokenizer and format they are, in `asking`.

Asking costs far more than scoring: n generations of a row, each token of which is a forward.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import torch
from transformers import PreTrainedModel

from ..data.format_choice import FormatOptions
from ..data.formats import PromptFormat
from ..data.table_reader import Lists
from ..method.columns import KNOWN_COLUMNS
from ..method.knowledge import check_share, compared, known_share
from ..method.reasons import Status
from ..method.text_agreement import Agreement, as_agreement
from .asking import AskingScorer
from .generation import TOKENS, Answer, check_sampling, sampled_answers
from .questions import Question, answered
from .transform import IFDScorer
from .turns import EncodedTurns

KNOWLEDGE_VERSION = 1  # raised when the same weights and options would give other answers or shares


@dataclass(frozen=True)
class Knowledge:
    """What n rows' samples say, as arrays of shape (n,): shares in [0, 1], NaN for rows that were not asked.

    `known_consistency` is NaN too where there is one sample.
    """

    known: np.ndarray
    known_agreement: np.ndarray
    known_consistency: np.ndarray
    known_samples: np.ndarray
    known_status: np.ndarray

    def columns(self) -> dict[str, np.ndarray]:
        """Arrays by column name."""
        return {name: getattr(self, name) for name in KNOWN_COLUMNS}


class KnowledgeScorer(AskingScorer):
    """Attach to each row how many of the model's own answers agree with its answer: `ds.map(scorer, batched=True)`.

    With `samples` answers y_i that the model samples to the row's prompt, an agreement a in [0, 1], and the answer r:

        known             = 1/n * sum_i [a(y_i, r) >= threshold]
        known_agreement   = 1/n * sum_i a(y_i, r)
        known_consistency = mean over i != j of a(y_i, y_j)

    Columns: these three (float64, null unless `known_status` is "ok"; consistency also where n is 1), `known_samples`
    (int64, n, or 0) and `known_status` (a `Status`: a row that is `malformed`, has an `empty_answer` or an
    `empty_prompt`, or is `prompt_too_long` for max_new_tokens more in the model's window, is not asked; `nonfinite`
    where the model gave no probabilities). All other columns stay as they are. `method.knowledge` has an interval for
    `known`, and `hard_or_wrong` for what it says together with IFD.

    A row's samples depend on the weights, the seed, its prompt and their number alone, not on other rows or batches,
    but for rounding (see `generation`). An answer longer than max_new_tokens is compared by its first so many tokens,
    as samples are.

    Args:
        model: a hub name, a local path, a loaded causal LM, or an `IFDScorer`: then its model, tokenizer, format,
            device and dtype are taken, and the arguments for them are refused.
        tokenizer, format, device, dtype, revision, trust_remote_code: as of `IFDScorer`.
        samples: n; with 8, known = 0 still leaves a probability of up to 0.32 (see `wilson_interval`).
        max_new_tokens: most tokens of a sample.
        temperature, top_p: of sampling; see `sampled_answers`.
        seed: of the samples.
        agreement: "f1" (of words), "exact", "rouge_l", or a function of an answer and a reference with values in
            [0, 1]; see `method.text_agreement`.
        threshold: from which agreement on a sample agrees, in (0, 1].
        token_budget: tokens of a batch, those to come among them.

    Raises:
        UserError: for options outside of their ranges, and what `IFDScorer` raises.

    >>> from datasets import load_dataset                                                    # doctest: +SKIP
    >>> ds = load_dataset("json", data_files="alpaca.json", split="train")                   # doctest: +SKIP
    >>> ds = ds.map(IFDScorer("HuggingFaceTB/SmolLM2-135M"), batched=True)                   # doctest: +SKIP
    >>> ds = ds.map(KnowledgeScorer("HuggingFaceTB/SmolLM2-135M", samples=8), batched=True)  # doctest: +SKIP
    >>> hard_or_wrong(ds["known"], ds["ifd"], ds["known_consistency"])                       # doctest: +SKIP
    array(['hard', 'unclear', 'doubtful', ...], dtype=object)
    """

    attached: ClassVar[tuple[str, ...]] = KNOWN_COLUMNS
    version: ClassVar[int] = KNOWLEDGE_VERSION

    def __init__(
        self,
        model: str | os.PathLike | PreTrainedModel | IFDScorer,
        tokenizer: Any = None,
        *,
        samples: int = 8,
        max_new_tokens: int = 128,
        temperature: float = 0.7,
        top_p: float = 1.0,
        seed: int = 0,
        agreement: str | Agreement = "f1",
        threshold: float = 0.5,
        format: str | PromptFormat | FormatOptions | None = None,
        device: str | None = None,
        dtype: torch.dtype | str | None = None,
        token_budget: int = TOKENS,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        check_sampling(samples, temperature, top_p, seed)
        check_share(threshold=threshold)
        as_agreement(agreement)
        self.sampling = {"samples": samples, "max_new_tokens": max_new_tokens, "seed": seed}
        self.sampling |= {"temperature": float(temperature), "top_p": float(top_p)}
        self.agreement, self.threshold = agreement, float(threshold)
        options = {"format": format, "device": device, "dtype": dtype, "revision": revision}
        options |= {"trust_remote_code": trust_remote_code}
        super().__init__(model, tokenizer, max_new_tokens, token_budget, options)

    @property
    def answers(self) -> int:
        """How many answers each row gets."""
        return self.sampling["samples"]

    def columns_of(
        self, asked: Sequence[Question], progress: Callable[[int], Any] | None = None
    ) -> dict[str, np.ndarray]:
        """`answer` as columns."""
        return self.answer(asked, progress).columns()

    def answer(self, asked: Sequence[Question], progress: Callable[[int], Any] | None = None) -> Knowledge:
        """Ask, and hold the answers against the rows'; `progress` gets the number of tokens done after each batch."""
        rows = len(asked)
        numbers = {name: np.full(rows, np.nan) for name in KNOWN_COLUMNS[:3]}
        status = np.array([question.status.value for question in asked], dtype=object)
        samples = np.zeros(rows, dtype=np.int64)
        for row, answers in self.sample(asked, progress).items():
            if None in answers:
                status[row] = Status.NONFINITE.value
                continue
            said = [answer.text for answer in answers]
            agreements, among = compared(said, self.cut(asked[row].reference), self.agreement)
            numbers["known"][row] = known_share(agreements, self.threshold)
            numbers["known_agreement"][row] = agreements.mean()
            numbers["known_consistency"][row] = np.nanmean(among) if len(said) > 1 else np.nan
            samples[row] = len(said)
        return Knowledge(**numbers, known_samples=samples, known_status=status)

    def sample(
        self, asked: Sequence[Question], progress: Callable[[int], Any] | None = None
    ) -> dict[int, list[Answer | None]]:
        """The sampled answers to the questions that can be asked, by their places."""
        model, tokenizer = self.scorer.model, self.scorer.encoder.tokenizer
        more = {**self.sampling, "token_budget": self.token_budget, "progress": progress}
        return answered(
            asked, model, tokenizer, lambda prompts, stop: sampled_answers(model, tokenizer, prompts, stop=stop, **more)
        )

    def settings(self) -> dict[str, Any]:
        """The options that answers and shares depend on, beside those of the `IFDScorer`; of a function its name."""
        name = self.agreement if isinstance(self.agreement, str) else getattr(self.agreement, "__qualname__", "own")
        return self.sampling | {"agreement": name, "threshold": self.threshold, "version": KNOWLEDGE_VERSION}

    def __repr__(self) -> str:
        options = {**self.sampling, "agreement": self.agreement, "threshold": self.threshold}
        return f"KnowledgeScorer({self.scorer!r}, {', '.join(f'{name}={value!r}' for name, value in options.items())})"


@dataclass(frozen=True)
class AskedRows:
    """Rows that are scored and asked.

    Attributes:
        scored: what is scored of them.
        questions: what is asked.
        tokens: that both take, of each row.
    """

    scored: EncodedTurns
    questions: list[Question]
    tokens: list[int]

    def __len__(self) -> int:
        return len(self.questions)


class ScoredAndAsked:
    """IFD, and what a transform makes of answers, of the same rows by the same model, for a long job (`scoring_job`).

    >>> score_parts(rows, ScoredAndAsked(KnowledgeScorer(scorer)), parts, 8, process)               # doctest: +SKIP
    """

    def __init__(self, asking: AskingScorer) -> None:
        self.asking = asking

    def encode_rows(self, batch: Mapping[str, list]) -> AskedRows:
        """Rows to score and to ask."""
        scored, asked = self.asking.scorer.encode_rows(batch), self.asking.ask(batch)
        asking = map(self.asking.tokens, asked)
        return AskedRows(scored, asked, [read + more for read, more in zip(scored.tokens, asking, strict=True)])

    def score_rows(
        self, rows: AskedRows, progress: Callable[[int], Any] | None = None
    ) -> dict[str, np.ndarray | Lists | pa.Array]:
        """The columns of both.

        Rows are asked first: that takes nearly all of the time, which a job tells from its first batches.
        """
        said = self.asking.columns_of(rows.questions, progress)
        return self.asking.scorer.score_rows(rows.scored, progress) | said
