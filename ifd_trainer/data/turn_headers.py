"""What stands between the turns of plain text, as public data sets write it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

RESPONSE = "### Response:"  # of Alpaca and WizardLM


@dataclass(frozen=True)
class TurnTexts:
    """What stands between the turns of a format.

    Attributes:
        headers: texts that begin an answer.
        openers: texts that begin another turn; there need not be any.

    >>> TurnTexts(("### Response:",), ("### Instruction:",)).answer(b"### Instruction: Add 1 and 2. ### Response: 3")
    (43, 45)
    """

    headers: tuple[str, ...]
    openers: tuple[str, ...] = ()

    def answer(self, text: bytes) -> tuple[int, int] | None:
        """Where the last answer begins and ends in a text, in bytes of UTF-8; None where there is no header."""
        return next(self._from_the_end(text), None)

    def answers(self, text: bytes) -> list[tuple[int, int]]:
        """Where each answer begins and ends in a text, in bytes of UTF-8, in their order.

        >>> TurnTexts(("A:",), ("Q:",)).answers(b"Q: 1 + 1? A: 2 Q: And 1? A: 3")
        [(12, 15), (27, 29)]
        """
        return list(self._from_the_end(text))[::-1]

    def _from_the_end(self, text: bytes) -> Iterator[tuple[int, int]]:
        opened = sorted({place for opener in self.openers for place in places(text, opener.encode())})
        end = len(text)
        for begin in [*reversed(opened), 0]:
            found = [(text.find(header.encode(), begin, end), header) for header in self.headers]
            found = [(place, -len(header.encode())) for place, header in found if place >= 0]
            if found:
                place, size = min(found)  # of several at one place, the longest
                yield place - size, end
            end = begin


# Formats that public data sets write as plain text; of those that stand in as many rows, the first one is meant.
PLAIN = (
    TurnTexts((RESPONSE,), ("### Instruction:",)),
    TurnTexts(("### Assistant:",), ("### Human:", "### User:")),
    TurnTexts(("### Answer:",), ("### Question:",)),
    TurnTexts(("### Output:",), ("### Instruction:", "### Input:")),
    TurnTexts(("### Completion:",)),
    TurnTexts(("<|im_start|>assistant",), ("<|im_start|>user",)),
    TurnTexts(("<|assistant|>",), ("<|user|>",)),
    TurnTexts(("<start_of_turn>model",), ("<start_of_turn>user",)),
    TurnTexts(("<|start_header_id|>assistant<|end_header_id|>",), ("<|start_header_id|>user<|end_header_id|>",)),
    TurnTexts(("[/INST]",), ("[INST]",)),
    TurnTexts(("ASSISTANT:",), ("USER:", "HUMAN:")),
    TurnTexts(("\nAssistant:",), ("Human:", "User:")),
    TurnTexts(("\nResponse:",), ("Instruction:",)),
    TurnTexts(("\nAnswer:",), ("Question:",)),
    TurnTexts(("\nOutput:",)),
    TurnTexts(("\nA:",), ("Q:",)),
)


def told_header(prompt: str) -> str:
    """The header with which a prompt ends, and the line breaks behind it; "" for none that is known.

    A header that begins a line is one there alone, and the line break before it is not part of it. Nor is a space
    behind it, which most tokenizers make a part of the answer's first token.

    >>> told_header("### Instruction: Add 1 and 2.\\n\\n### Response:\\n"), told_header("What is the answer:")
    ('### Response:\\n', '')
    """
    text = prompt.rstrip()
    for header in sorted((header for plain in PLAIN for header in plain.headers), key=len, reverse=True):
        name = header.lstrip("\n")
        begins = not header.startswith("\n") or text == name or text.removesuffix(name).endswith("\n")
        if text.endswith(name) and begins:
            behind = prompt[len(text) :]
            return name + (behind if not behind.strip("\n") else "")
    return ""


def places(text: bytes, part: bytes) -> Iterable[int]:
    """Where a part begins in a text.

    >>> list(places(b"abab", b"ab"))
    [0, 2]
    """
    place = text.find(part)
    while place >= 0:
        yield place
        place = text.find(part, place + 1)
