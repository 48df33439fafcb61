"""Where the answers of tokenised rows begin and end, where no label tells: by what stands between turns in their text.

Most scripts train on every token: `text` rows, or `messages` without assistant_only_loss. What is trained on is the
user's choice; a score needs to know which tokens are the answer. A row's turns are told by two kinds of text:

    openers   begin the turn of somebody else: `<|im_start|>user`, `### Instruction:`
    headers   begin an answer: `<|im_start|>assistant`, `### Response:`

The last turn that has a header holds the answer: from the first header behind its opener to the next opener, or to the
row's end. Those of a chat template are found by rendering, those of plain formats are known by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import UserError
from .chat_template import turn_texts
from .token_decoding import Decoder
from .turn_headers import PLAIN, TurnTexts

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

    def __call__(self, ids: Sequence[int]) -> tuple[int, int] | None:
        """The answer's first token and the one behind its last; None where there is no header.

        A token that holds the header's end and the answer's beginning is the answer's.
        """
        row = self.decoder.row(ids)
        found = self.texts.answer(row.text)
        return None if found is None else (row.token_at(found[0]), row.token_at(found[1]))

    @property
    def header(self) -> str | None:
        """The text before a direct answer, where it is one for all rows."""
        return None if self.known else self.texts.headers[0]


def answer_finder(
    tokenizer: Any, rows: Iterable[Sequence[int]], template: str | None = None, header: str | None = None
) -> AnswerFinder:
    """What finds the answers of rows like these.

    Args:
        rows: token ids of some of them.
        template: the chat template that wrote them, if it is not the tokenizer's own.
        header: the text that begins an answer, where a user knows it.

    Raises:
        UserError: where too few rows have a known header, or none has the given one.
    """
    decoder = Decoder(tokenizer)
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
    best, plain = max(((_share(plain, texts), plain) for plain in PLAIN), key=lambda found: found[0])
    if best >= FOUND:
        return AnswerFinder(decoder, _with_break(plain, texts))
    nearest = f" ({plain.headers[0].strip()!r} in {100 * best:.0f} %)" if best else ""
    raise UserError(
        f"No row of the training set has a prompt that is masked out, and no known response header stands in "
        f"{100 * FOUND:.0f} % of them{nearest}, so nobody can tell which tokens are the answer. {_LOOK}"
    )


_LOOK = (
    "Say what begins an answer (header='### Answer:'), or use a prompt-completion data set, or `messages`. A policy "
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
