"""Every answer of a batch of conversations: read together, scored in one forward of each, and one score for the row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..data.conversation import Conversation, ConversationEncoder, read_conversation
from ..data.encoding import EncodedPair, Encoder, token_count
from ..data.formats import Example, MalformedRow, PromptFormat, conversation_parts, rows_of
from ..data.table_reader import Lists
from ..method.columns import TURN_COLUMNS
from ..method.equations import further_scores
from ..method.reasons import Status
from ..method.turns import row_scores
from .losses import Scores


@dataclass(frozen=True)
class EncodedTurns:
    """The answers of n rows, ready to be scored.

    Attributes:
        pairs: of all answers, one row's behind another's.
        counts: (n,) how many answers each row has.
        empty: (n,) the status of a row without one.
    """

    pairs: list[EncodedPair]
    counts: list[int]
    empty: list[str]

    @classmethod
    def single(cls, pairs: list[EncodedPair]) -> EncodedTurns:
        """Rows of one answer each."""
        return cls(pairs, [1] * len(pairs), [pair.status.value for pair in pairs])

    def __len__(self) -> int:
        return len(self.counts)

    @property
    def tokens(self) -> list[int]:
        """Tokens that are read to score each row, those before several of its answers counted for each of them."""
        ends = np.cumsum(self.counts)
        return [token_count(self.pairs[end - count : end]) for end, count in zip(ends, self.counts, strict=True)]

    def columns(self, scores: Scores, rule: str, further: Sequence[str] = ()) -> dict[str, np.ndarray | Lists]:
        """Columns of the rows: their scores by a rule, and lists of those of their answers.

        Args:
            scores: of all answers.
            rule: of `method.turns`.
            further: names of further scores, which follow from the row's two losses.
        """
        turns = scores.columns()
        of_rows = row_scores(turns, self.counts, rule, self.empty)
        of_rows |= further_scores(further, of_rows)
        named = dict(zip(TURN_COLUMNS, ("cas", "das", "ifd", "answer_tokens", "ifd_status"), strict=True))
        return of_rows | {column: Lists(turns[name], self.counts) for column, name in named.items()}


def encode_turns(
    rows: Mapping[str, list], format: PromptFormat, encoder: Encoder, conversations: ConversationEncoder
) -> tuple[EncodedTurns, Exception | None]:
    """The answers of a batch of rows, and the error of the first row that cannot be rendered.

    Rows of texts, which have one answer, are encoded as they are without turns.
    """
    tokenizer = encoder.tokenizer
    read, first = [], None
    for row in rows_of(rows):
        try:
            parts = conversation_parts(row, format, tokenizer)
            read.append(format.render(row, tokenizer) if parts is None else read_conversation(*parts, row, tokenizer))
        except MalformedRow as error:
            first = first or error
            read.append(None)
    chats = conversations([each if isinstance(each, Conversation) else None for each in read])
    texts = encoder([each if isinstance(each, Example) else None for each in read])
    pairs = [
        chat if isinstance(each, Conversation) else [text] if isinstance(each, Example) else []
        for each, chat, text in zip(read, chats, texts, strict=True)
    ]
    empty = [Status.MALFORMED.value if each is None else Status.EMPTY_ANSWER.value for each in read]
    return EncodedTurns([pair for row in pairs for pair in row], [len(row) for row in pairs], empty), first


def answer_counts(rows: Mapping[str, list], format: PromptFormat, tokenizer: Any) -> list[int]:
    """How many answers each row has; 1 for a row of texts, 0 for one that cannot be read."""
    counts = []
    for row in rows_of(rows):
        try:
            parts = conversation_parts(row, format, tokenizer)
        except MalformedRow:
            counts.append(0)
            continue
        messages, first = ([], 0) if parts is None else parts
        answers = [message for message in messages[first:] if message["role"] == "assistant"]
        counts.append(1 if parts is None else len(answers))
    return counts
