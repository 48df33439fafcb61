"""What transforms share that let a model answer the prompts of rows: the model, the questions, a batch's columns.

The model, its tokenizer, its device and the format of the rows are those of an `IFDScorer`, which such a transform
holds or is given; like its pickle, that of the transform holds a digest of the weights and the options (see
`transform`).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..data.encoding import check_positive
from ..errors import UserError
from ..method.number_words import many
from ..method.reasons import Status
from .questions import Question, check_window, questions
from .transform import IFDScorer, mapped_columns, need_batch, shows_progress, table_with

logger = logging.getLogger(__name__)


class AskingScorer:
    """A transform that asks a model; what it makes of the answers is for `columns_of` to say.

    Args:
        model: a hub name, a local path, a loaded causal LM, or an `IFDScorer`: then its model, tokenizer, format,
            device and dtype are taken, and the arguments for them are refused.
        tokenizer: as of `IFDScorer`.
        max_new_tokens: most tokens of an answer.
        token_budget: tokens of a batch, those to come among them.
        options: others of `IFDScorer`.

    Attributes:
        attached: names of the columns.
        version: raised when the same weights and options would give others.
    """

    attached: ClassVar[tuple[str, ...]]
    version: ClassVar[int]

    def __init__(
        self,
        model: str | os.PathLike | PreTrainedModel | IFDScorer,
        tokenizer: Any,
        max_new_tokens: int,
        token_budget: int,
        options: Mapping[str, Any],
    ) -> None:
        check_positive(max_new_tokens=max_new_tokens, token_budget=token_budget)
        self.most, self.token_budget = max_new_tokens, token_budget
        if isinstance(model, IFDScorer):
            given = [name for name, value in {"tokenizer": tokenizer, **options}.items() if value not in (None, False)]
            if given:
                raise UserError(f"An IFDScorer was given, which has its own {', '.join(given)}: leave out what it has.")
            self.scorer = model
        else:
            self.scorer = IFDScorer(model, tokenizer, **options)

    @property
    def answers(self) -> int:
        """How many answers each row gets."""
        raise NotImplementedError

    def columns_of(
        self, asked: Sequence[Question], progress: Callable[[int], Any] | None = None
    ) -> dict[str, np.ndarray]:
        """Ask, and make columns of it; `progress` gets the number of tokens done after each batch."""
        raise NotImplementedError

    def __call__(
        self, batch: Mapping[str, list] | pa.Table, rank: int | None = None, *more: Any
    ) -> dict[str, list] | pa.Table:
        """Columns for a batch of rows, as `datasets.map(batched=True)` passes and takes them.

        An Arrow table, as Ray passes it with `batch_format="pyarrow"`, comes back whole, with the columns at its end.
        """
        if isinstance(batch, pa.Table):
            asked = self.ask(batch.to_pydict(), rank) if batch.num_rows else []
            return table_with(batch, self.columns_of(asked), self.attached)
        need_batch(type(self).__name__, batch, rank, *more)
        asked = self.ask(batch, rank)
        if asked and all(question.status is Status.MALFORMED for question in asked):
            logger.warning(
                "None of %s can be rendered in their format, and so none is asked: check the columns, or pass another "
                "format.",
                many(len(asked), "row"),
            )
        total, hidden = sum(map(self.tokens, asked)), not shows_progress()
        with tqdm(total=total, desc="Sampling", unit="tok", unit_scale=True, disable=hidden, leave=False) as bar:
            return mapped_columns(self.columns_of(asked, bar.update))

    def ask(self, batch: Mapping[str, list], rank: int | None = None) -> list[Question]:
        """What the model is asked for each row; loads it on first use."""
        self.check()
        encoder = self.scorer.encoder
        asked = questions(self.scorer.examples(batch), encoder.tokenizer, self.most, encoder.window)
        self.scorer.check_tokens(question.prompt for question in asked)
        self.scorer.load(rank)
        return asked

    def check(self) -> None:
        """Raise now, from the config alone, where max_new_tokens leaves no token of the window for a prompt."""
        check_window(self.scorer.encoder.window, self.most)

    def tokens(self, question: Question) -> int:
        """Tokens that asking takes, those of all answers, each counted whole."""
        return self.answers * (len(question.prompt) + self.most) if question.status is Status.OK else 0

    def cut(self, reference: str) -> str:
        """As much of a row's answer as one of the model may have."""
        tokenizer = self.scorer.encoder.tokenizer
        ids = tokenizer(reference, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) <= self.most:
            return reference
        return tokenizer.decode(ids[: self.most], skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_version": self.version}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update({name: value for name, value in state.items() if name != "_version"})
