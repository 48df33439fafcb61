"""Examples of what a model is to be good at, as text and as tokens: a target set.

They are rows as any others, in the format of the pool or in one of their own. Some may have no answer: of these the
prompt alone is read. What cannot be read is counted and named, and the others are used.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from ..errors import UserError
from ..method.number_words import many
from .encoding import Encoder
from .files import load_rows
from .format_choice import FormatOptions, resolve_format
from .formats import PROMPT_COMPLETION, ChatFormat, Example, MalformedRow, PromptCompletionFormat, PromptFormat
from .message_trees import as_chats
from .row_ids import as_array, find_ids

logger = logging.getLogger(__name__)

_ANSWERS = ("output", "completion", "response", "answer")  # columns of answers, tried where none is there
# A chat without an answer is written with this one, and cut before it.
_ANSWER = [{"role": "assistant", "content": "."}]


@dataclass(frozen=True)
class Targets:
    """Rows of a target set.

    Attributes:
        source: the file or the name that they come from; None for rows that were given.
        rows: each a mapping from columns to values, all with the same columns.
    """

    source: str | None
    rows: tuple[Mapping[str, Any], ...]

    @classmethod
    def read(cls, targets: str | Iterable[Mapping[str, Any]]) -> Targets:
        """Those of a file, a hub name, a data set or a list.

        Raises:
            FileNotFoundError, UserError: for a file that is not there, that cannot be read, or that has no rows.

        >>> Targets.read([{"prompt": "2 + 2?"}, {"prompt": "Why?", "id": "b"}]).rows[0]
        {'prompt': '2 + 2?', 'id': None}
        """
        source = targets if isinstance(targets, str) else None
        read = as_chats(load_rows(source)) if source is not None else targets
        rows = [dict(row) for row in read]
        if not rows:
            raise UserError(
                f"The target set {source or 'that was given'} has no rows: a few examples of what the model is to be "
                "good at are needed."
            )
        columns = dict.fromkeys(name for row in rows for name in row)
        return cls(source, tuple({name: row.get(name) for name in columns} for row in rows))

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def name(self) -> str:
        """What messages call it."""
        return "the target set" if self.source is None else f"the target set {self.source}"

    @property
    def columns(self) -> list[str]:
        """Names of its columns."""
        return list(self.rows[0])

    @property
    def ids(self) -> np.ndarray:
        """What tells its rows apart, (m,): a column `row_id` or `id` that serves, else their positions."""
        try:
            name, ids = find_ids(self.columns, lambda name: pa.chunked_array([[row[name] for row in self.rows]]))
        except pa.ArrowException:  # texts and numbers in one column
            name = None
        return np.arange(len(self)) if name is None else as_array(ids)

    def format(self, usual: str | PromptFormat | FormatOptions | None = None) -> PromptFormat:
        """How its rows are written: in the usual format, where it has the columns, else in one told from them.

        A column of answers may be missing.

        Args:
            usual: the format of the pool, or one that was named for the targets.

        Raises:
            UserError: where no format fits.

        >>> Targets.read([{"question": "2 + 2?"}]).format().columns
        ('question', 'response')
        """
        if usual is not None:
            try:
                return self._fitting(usual)
            except UserError as error:
                logger.warning("%s does not have the usual format, and is read by its columns: %s", self.name, error)
        return self._fitting(None)

    def _fitting(self, format: str | PromptFormat | FormatOptions | None) -> PromptFormat:
        """The format, for the columns as they are or with one of answers beside them."""
        own = [getattr(format, name, None) for name in ("output", "completion", "answer_column")]
        first = None
        for answer in (None, *filter(None, own), *_ANSWERS):
            try:
                return resolve_format(format, [*self.columns, *([] if answer is None else [answer])], warn=False)
            except UserError as error:
                first = first or error
        raise UserError(f"{self.name[0].upper()}{self.name[1:]} cannot be read: {first}") from first

    def encoded(self, format: PromptFormat, encoder: Encoder) -> EncodedTargets:
        """Its rows as tokens, those that can be read; one warning tells of the others.

        Args:
            format: see `format`.
            encoder: of the model that embeds. What does not fit in its max_length is cut at the end.

        Raises:
            UserError: where no row can be read.
        """
        examples: dict[int, Example] = {}
        problems: dict[int, str] = {}
        for number, row in enumerate(self.rows):
            try:
                examples[number] = _example(row, format, encoder.tokenizer)
            except MalformedRow as error:
                problems[number] = str(error)
        if problems:
            first, why = next(iter(problems.items()))
            said = f"the first one, row {first}: {why}"
            if not examples:
                raise UserError(
                    f"None of {many(len(self), 'row')} of {self.name} can be read as {format.name!r}; {said}."
                )
            logger.warning(
                "%s of %s of %s cannot be read as %r: left out; %s.",
                f"{len(problems):,}",
                many(len(self), "row"),
                self.name,
                format.name,
                said,
            )
        tokens = _tokens(list(examples.values()), encoder)
        bare = sum(not example.answer for example in examples.values())
        return EncodedTargets(tokens, self.ids[list(examples)], bare, problems)


@dataclass(frozen=True)
class EncodedTargets:
    """The targets that can be read, as tokens.

    Attributes:
        tokens: ids of each: of prompt and answer, or of the prompt alone.
        ids: (m,) what tells them apart; see `Targets.ids`.
        without_answer: how many are prompts alone.
        problems: what is wrong with each row that cannot be read, by its position.
    """

    tokens: Sequence[list[int]]
    ids: np.ndarray
    without_answer: int
    problems: Mapping[int, str]

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def digest(self) -> str:
        """What tells these tokens from others."""
        digest = hashlib.blake2b(digest_size=16)
        for ids in self.tokens:
            digest.update(np.array([len(ids), *ids], dtype="<i8").tobytes())
        return digest.hexdigest()


def _example(row: Mapping[str, Any], format: PromptFormat, tokenizer: Any) -> Example:
    """A row as text; its answer is empty where it has none.

    Raises:
        MalformedRow: where the format cannot render it, and for one that says nothing.
    """
    answers = (getattr(format, "output", None), getattr(format, "completion", None))
    row = {**{name: None for name in answers if name}, **row}
    chat = format.parts(row) if isinstance(format, (ChatFormat, PromptCompletionFormat)) else ("", "")
    if isinstance(chat[0], list) and not _says_anything(chat[1]):
        asked = {**row, PROMPT_COMPLETION.prompt: chat[0], PROMPT_COMPLETION.completion: _ANSWER}
        example = replace(PROMPT_COMPLETION.render(asked, tokenizer), answer="", end="")
    else:
        example = format.render(row, tokenizer)
    if example.answer.removesuffix(example.end).strip():
        return example
    if not example.asked:
        raise MalformedRow("it has neither a question nor an answer")
    return replace(example, answer="", end="")


def _says_anything(messages: Iterable[Mapping[str, Any]]) -> bool:
    """Whether messages hold a text, a call or anything else beside their roles."""
    values = (value for message in messages for key, value in message.items() if key != "role")
    return any(value.strip() if isinstance(value, str) else value for value in values)


def _tokens(examples: Sequence[Example], encoder: Encoder) -> list[list[int]]:
    """Prompt and answer of each as the encoder gives them, without what ends a turn; else the text, cut at its end."""
    tokenizer, tokens = encoder.tokenizer, []
    for example, pair in zip(examples, encoder(examples), strict=True):
        if pair.conditioned is not None:
            tokens.append(list(pair.conditioned.ids[: encoder.max_length]))
            continue
        text = example.prompt + example.answer
        ids = tokenizer(text, add_special_tokens=example.special_tokens, verbose=False)["input_ids"]
        tokens.append(ids[: encoder.max_length])
    return tokens
