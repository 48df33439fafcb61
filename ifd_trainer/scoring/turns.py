"""Every answer of a batch of conversations: read together, scored in one forward of each, and one score for the row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from ..data.conversation import Conversation, ConversationEncoder, read_conversation
from ..data.encoding import EncodedPair, Encoder, token_count
from ..data.formats import Example, MalformedRow, PromptFormat, conversation_parts, rows_of
from ..data.further_segments import with_further
from ..data.reversed_rows import ReversedRows
from ..data.table_reader import Lists
from ..method.columns import TURN_COLUMNS
from ..method.further_scores import turn_column
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
        """Columns of the rows: their scores by a rule, and lists of those of their answers, further ones among them.

        Args:
            scores: of all answers, as a model gave them.
            rule: of `method.turns`.
            further: names of further scores.
        """
        turns = scores.columns()
        named = dict(zip(TURN_COLUMNS, ("cas", "das", "ifd", "answer_tokens", "ifd_status"), strict=True))
        named |= {turn_column(name): name for name in further}
        lists = {column: Lists(turns[name], self.counts) for column, name in named.items()}
        return self.of_rows(scores, rule, further) | lists

    def of_rows(self, scores: Scores, rule: str, further: Sequence[str] = ()) -> dict[str, np.ndarray]:
        """Columns of the rows alone; as for `columns`."""
        read = {name: (losses, self._tokens_of(name)) for name, losses in scores.losses.items()}
        return row_scores(scores.columns(), self.counts, rule, self.empty, further, read)

    def _tokens_of(self, loss: str) -> np.ndarray:
        """Tokens that a loss of a further score is the mean of, for each answer; 0 of one that has none."""
        return np.array([pair.more[loss].scored if loss in pair.more else 0 for pair in self.pairs], dtype=np.int64)


def encode_turns(
    batch: Mapping[str, list],
    format: PromptFormat,
    encoder: Encoder,
    conversations: ConversationEncoder,
    scores: Sequence[str] = (),
    reversed_rows: ReversedRows | None = None,
) -> tuple[EncodedTurns, Exception | None]:
    """The answers of a batch of rows, and the error of the first row that cannot be rendered.

    Rows of texts, which have one answer, are encoded as they are without turns.

    Args:
        batch: columns of the rows.
        format: of the rows.
        encoder: of rows of texts.
        conversations: of the others.
        scores: names of further scores, whose segments are encoded too.
        reversed_rows: turns answers round, where these scores read them so.
    """
    tokenizer, rows = encoder.tokenizer, list(rows_of(batch))
    read, first = [], None
    for row in rows:
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
    answers = [pair for row in pairs for pair in row]
    counts = [len(row) for row in pairs]
    places = [(row, number) for row, count in enumerate(counts) for number in range(count)]

    @cache
    def turned(row: int) -> list[Example | None]:
        return reversed_rows.of_answers(rows[row], format)

    def turned_answer(place: int) -> Example | None:
        row, number = places[place]
        return turned(row)[number]

    return EncodedTurns(with_further(answers, scores, encoder, turned_answer, counts), counts, empty), first


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
