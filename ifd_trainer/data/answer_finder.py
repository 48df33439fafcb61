"""Where the answers of tokenised rows begin and end, where no label tells: by what stands between turns in their text.

Most scripts train on every token: `text` rows, or `messages` without assistant_only_loss. What is trained on is the
user's choice; a score needs to know which tokens are the answer. A row's turns are told by two kinds of text:

    openers   begin the turn of somebody else: `<|im_start|>user`, `### Instruction:`
    headers   begin an answer: `<|im_start|>assistant`, `### Response:`

Each turn that has a header holds an answer: from the first header behind its opener to the next opener, or to the row's
end. Those of a chat template are found by rendering, those of plain formats are known by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import UserError
from .chat_template import turn_texts
from .token_decoding import Decoder
from .turn_headers import PLAIN, TurnTexts, places

FOUND = 0.5  # share of the rows that a header has to stand in, for it to be taken for theirs; others may be cut
_ALIKE = 0.9  # share of the headers that a line break has to stand behind, for it to be part of them
_BREAKS = ("\n\n", "\n")  # what may stand behind a header in all rows: a part of it


@dataclass(frozen=True)
class AnswerFinder:
    """Finds the answers of rows of tokens.

    Args:
        decoder: of the tokenizer that made the rows.
        texts: what stands between their turns.
        known: whether that is the tokenizer's chat template.
    """

    decoder: Decoder
    texts: TurnTexts
    known: bool = False

    def __call__(self, ids: Sequence[int], position: int | None = None) -> tuple[int, int] | None:
        """The last answer's first token and the one behind its last; None where there is no header.

        A token that holds the header's end and the answer's beginning is the answer's.
        """
        row = self.decoder.row(ids)
        found = self.texts.answer(row.text)
        return None if found is None else (row.token_at(found[0]), row.token_at(found[1]))

    def answers(self, ids: Sequence[int], position: int | None = None) -> list[tuple[int, int]]:
        """The places of all answers in their order."""
        row = self.decoder.row(ids)
        return [(row.token_at(start), row.token_at(end)) for start, end in self.texts.answers(row.text)]

    @property
    def header(self) -> str | None:
        """The text before a direct answer, where it is one for all rows."""
        return None if self.known else self.texts.headers[0]

    @property
    def words(self) -> str:
        """What an answer is, in words."""
        behind = "its chat template's header" if self.known else repr(self.texts.headers[0])
        return f"what stands behind {behind}"


@dataclass(frozen=True)
class SaidAnswers:
    """Finds the answers of chats whose messages stand beside their tokens.

    Args:
        decoder: of the tokenizer that made the rows.
        said: what the last turn of the row at a position says.
    """

    decoder: Decoder
    said: Callable[[int], str]
    header: str | None = None
    words: str = "what its last message says"

    def __call__(self, ids: Sequence[int], position: int) -> tuple[int, int] | None:
        """As `AnswerFinder`; None where the text of a row does not hold, or end with a part of, what was said."""
        row, answer = self.decoder.row(ids), self.said(position).strip().encode()
        place = row.text.rfind(answer) if answer else -1
        if place < 0:  # max_length may have cut it
            place = next((at for at in places(row.text, answer[:1]) if answer.startswith(row.text[at:])), -1)
        return None if place < 0 else (row.token_at(place), row.token_at(min(place + len(answer), len(row.text))))

    def answers(self, ids: Sequence[int], position: int) -> list[tuple[int, int]]:
        """The place of the one answer that is known."""
        found = self(ids, position)
        return [] if found is None else [found]


def answer_finder(
    tokenizer: Any,
    rows: Iterable[Sequence[int]],
    template: str | None = None,
    header: str | None = None,
    said: Callable[[int], str] | None = None,
    positions: Sequence[int] = (),
) -> AnswerFinder | SaidAnswers:
    """What finds the answers of rows like these.

    Args:
        rows: token ids of some of them.
        template: the chat template that wrote them, if it is not the tokenizer's own.
        header: the text that begins an answer, where a user knows it.
        said: of chats whose messages are known, what the last turn of the row at a position says.
        positions: of these rows.

    Raises:
        UserError: where too few rows have a known header, or none has the given one.
    """
    decoder, rows = Decoder(tokenizer), list(rows)
    texts = [decoder.row(ids).text for ids in rows]
    if header is not None:
        given = TurnTexts((header,), next((plain.openers for plain in PLAIN if header.strip() in plain.headers), ()))
        if not _share(given, texts):
            raise UserError(f"header={header!r} stands in none of {len(texts)} rows of the training set. {_LOOK}")
        return AnswerFinder(decoder, given)
    if template is not None or getattr(tokenizer, "chat_template", None):
        of_template = TurnTexts(*turn_texts(tokenizer, template))
        if _share(of_template, texts) >= FOUND:
            return AnswerFinder(decoder, of_template, known=True)
    if said is not None:  # a template that writes nothing between turns
        own = SaidAnswers(decoder, said)
        if sum(own(*each) is not None for each in zip(rows, positions, strict=True)) >= FOUND * len(rows):
            return own
    best, plain = max(((_share(plain, texts), plain) for plain in PLAIN), key=lambda found: found[0])
    if best >= FOUND:
        return AnswerFinder(decoder, _with_break(plain, texts))
    nearest = f" ({plain.headers[0].strip()!r} in {100 * best:.0f} %)" if best else ""
    raise UserError(
        f"No row of the training set has a prompt that is masked out, and no known response header stands in "
        f"{100 * FOUND:.0f} % of them{nearest}, so nobody can tell which tokens are the answer. {_LOOK}"
    )


_LOOK = (
    "Say what begins an answer (header='### Answer:'), or use a prompt-completion data set. A policy "
    "that needs no prompt takes such rows as they are: policy=RandomRows(), LongestAnswers() or LowestScores('das'), "
    "which is the loss of the whole text."
)


def _share(texts: TurnTexts, rows: Sequence[bytes]) -> float:
    return sum(texts.answer(row) is not None for row in rows) / max(len(rows), 1)


def _with_break(texts: TurnTexts, rows: Sequence[bytes]) -> TurnTexts:
    """With the line break that stands behind the header in the rows, as far as they are alike."""
    found = [(texts.answer(row), row) for row in rows]
    behind = [row[place[0] : place[0] + 2].decode(errors="replace") for place, row in found if place is not None]
    for text in _BREAKS:
        if sum(rest.startswith(text) for rest in behind) >= _ALIKE * len(behind):
            return replace(texts, headers=tuple(header + text for header in texts.headers))
    return texts
