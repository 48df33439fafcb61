"""What a judge says of two answers: two scores from 1 to 10 on its first line, or no verdict and the reason.

A verdict is read strictly, and never evaluated as code. What is not two scores in the form that was asked for is
counted, not guessed: a judge that wrote "8/10" or "Assistant 1: 8" may have meant anything.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from typing import Any

LOWEST, HIGHEST = 1.0, 10.0
KEPT_TEXT = 2000  # characters of what a judge says that are kept
_LONGEST_LINE = 100  # characters; two scores take far fewer
_SCORE = re.compile(r"(?:0|[1-9][0-9]*)(?:\.[0-9]+)?")
_NUMBER = re.compile(r"[+-]?[0-9]+(?:\.[0-9]+)?")


class Reason(str, Enum):
    """Why there is no verdict: what the judge said is none, or nothing came from its server."""

    REFUSED = "refused"  # the server says so; a refusal in words alone has no scores
    EMPTY = "empty"
    CUT = "cut off before its first line ended"
    NO_SCORES = "no scores alone on the first line"
    NOT_TWO = "not two numbers on the first line"
    RANGE = "a score outside 1 to 10"
    TIMEOUT = "timed out"
    RATE = "too many requests"
    SERVER = "server error"
    MALFORMED = "no chat completion"
    NOT_ACCEPTED = "request not accepted"
    CONNECTION = "no connection"

    def __str__(self) -> str:
        return self.value

    @property
    def said(self) -> bool:
        """Whether the judge has answered: to ask again would cost again, and most often give the same."""
        return self in (Reason.REFUSED, Reason.EMPTY, Reason.CUT, Reason.NO_SCORES, Reason.NOT_TWO, Reason.RANGE)


@dataclass(frozen=True)
class Verdict:
    """The scores of two answers, or why there are none.

    Attributes:
        first, second: from 1 to 10, of the answers in the order in which the judge read them; None without a verdict.
        reason: why there is none; None with a verdict.
        text: what the judge said, its first `KEPT_TEXT` characters.
        by: who said it: the model that the server names, and the server's host.
    """

    first: float | None = None
    second: float | None = None
    reason: Reason | None = None
    text: str = ""
    by: str = ""

    def record(self) -> dict[str, Any] | None:
        """What a cache keeps, from which `from_record` reads the verdict again; None where nothing was said."""
        if self.reason is not None and not self.reason.said:
            return None
        flags = {flag.name.lower(): True for flag in (Reason.REFUSED, Reason.CUT) if self.reason is flag}
        return {"text": self.text, "by": self.by, **flags}

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Verdict:
        """The verdict of a record.

        >>> Verdict.from_record(Verdict(8.0, 7.0, text="8 7").record())
        Verdict(first=8.0, second=7.0, reason=None, text='8 7', by='')
        """
        refused, cut = bool(record.get("refused")), bool(record.get("cut"))
        return read_verdict(str(record["text"]), refused, cut, str(record.get("by", "")))


def read_verdict(text: str, refused: bool = False, cut: bool = False, by: str = "") -> Verdict:
    """The verdict in a judge's text, whose first line has to be two numbers from 1 to 10 with a space between.

    Args:
        text: what the judge said; empty lines before the first one, and all after it, are left aside.
        refused: whether the server calls it a refusal.
        cut: whether it ends where the judge had no more tokens: a number at its end may lack a digit.
        by: who said it.

    >>> verdict = read_verdict("8 7.5\\nThe first answer is fuller.")
    >>> verdict.first, verdict.second
    (8.0, 7.5)
    >>> str(read_verdict("10/10 9").reason), str(read_verdict("8 11").reason), str(read_verdict("8").reason)
    ('no scores alone on the first line', 'a score outside 1 to 10', 'not two numbers on the first line')
    """
    text = text.lstrip()[:KEPT_TEXT]
    line, ended, _ = text.partition("\n")
    scores, reason = _scores(line)
    if refused:
        scores, reason = None, Reason.REFUSED
    elif cut and not ended:
        scores, reason = None, Reason.CUT
    first, second = scores or (None, None)
    return Verdict(first, second, reason, text, by)


def _scores(line: str) -> tuple[tuple[float, float] | None, Reason | None]:
    if not line:
        return None, Reason.EMPTY
    words = re.split(r"[ \t]+", line.strip(" \t\r"))
    if len(line) > _LONGEST_LINE or not all(map(_NUMBER.fullmatch, words)):
        return None, Reason.NO_SCORES
    if len(words) != 2:
        return None, Reason.NOT_TWO
    first, second = map(float, words)
    if not all(_SCORE.fullmatch(word) and LOWEST <= float(word) <= HIGHEST for word in words):
        return None, Reason.RANGE
    return (first, second), None
