"""Prompts, headers and answers of tokenised rows, of which only tokens and labels are known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ..method.reasons import Status
from .chat_template import Frame, renderer, template_frames
from .encoding import EncodedPair, Encoder
from .formats import ALPACA, SUPERFILTERING, WIZARDLM
from .response_header import GivenHeader


class TokenRows:
    """Rows of tokens and labels, read as the transform reads raw rows: what a template adds is no part of an answer.

    Args:
        encoder: for the tokenizer that made the rows.
        template: the chat template that wrote them, if it is not the tokenizer's own.
    """

    def __init__(self, encoder: Encoder, template: str | None = None) -> None:
        tokenizer = encoder.tokenizer
        self._encoder, self._turns = encoder, encoder.turns
        self._frames = template_frames(tokenizer, template)
        blank = list(_blank_prompts(tokenizer, template, self._frames))
        self._blank = {_letters(prompt) for prompt in blank}
        self._longest = max(len(tokenizer(prompt)["input_ids"]) for prompt in blank) + 8

    def pair(self, ids: Sequence[int], start: int, end: int, prefix: Sequence[int], fills: bool = False) -> EncodedPair:
        """The row's pair, where the labels say that the answer is `ids[start:end]`.

        A row that fills what the trainer leaves of rows, and ends with its answer, was cut there: nobody knows how its
        turn would have ended.

        The direct answer is preceded by the template's header as the row has it; by `prefix`, which `response_prefix`
        gives, where a user chose that or the row has none.
        """
        ids = list(ids)
        header, start, end = self._turns(ids, start, end, self._frames)
        given = header is None or isinstance(prefix, GivenHeader)
        ending = () if fills and end == len(ids) else self._turns.ending(ids[end:])
        pair = self._encoder.pair(ids[:end], start, list(prefix) if given else ids[header:start], ending)
        if pair.status is not Status.EMPTY_ANSWER and self.asks_nothing(ids[:start]):
            return EncodedPair.unscorable(Status.EMPTY_PROMPT)
        return pair

    def whole(self, ids: Sequence[int], fills: bool = False) -> EncodedPair:
        """A row all of which is the answer, behind BOS, else EOS, else its own first token: both segments are alike."""
        tokenizer = self._encoder.tokenizer
        before = [token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None][:1]
        ids = list(ids) if list(ids[: len(before)]) == before else [*before, *ids]
        end = self._turns(ids, min(1, len(ids)), len(ids))[2]
        ending = () if fills and end == len(ids) else self._turns.ending(ids[end:])
        return self._encoder.pair(ids[:end], 1, ids[:1], ending)

    def span(self, ids: Sequence[int], start: int, end: int) -> tuple[int, int]:
        """Where the answer begins and ends within the labels' `start` and `end`."""
        return self._turns(list(ids), start, end, self._frames)[1:]

    def asks_nothing(self, prompt: Sequence[int]) -> bool:
        """Whether a prompt holds nothing but what a template or a known format adds, as far as tokens tell."""
        if len(prompt) > self._longest:
            return False
        decode = self._encoder.tokenizer.decode
        return any(_letters(decode(list(prompt), skip_special_tokens=skip)) in self._blank for skip in (False, True))


def _blank_prompts(tokenizer: Any, template: str | None, frames: Sequence[Frame]) -> Iterator[str]:
    """Prompts in which nothing is asked, as the known formats and the chat template write them."""
    yield ""
    for format in (ALPACA, WIZARDLM, SUPERFILTERING):
        yield format.render({format.instruction: "", format.output: ""}).prompt
    if template is None and not getattr(tokenizer, "chat_template", None):
        return
    render = renderer(tokenizer, {} if template is None else {"chat_template": template})
    user, system = {"role": "user", "content": ""}, {"role": "system", "content": ""}
    for messages in ([user], [system, user], [system]):
        for opened in (True, False):
            try:
                text = render(messages, add_generation_prompt=opened)
            except Exception:  # no chat that this template knows
                continue
            yield text
            yield from () if opened else (text + frame.before for frame in frames)
    yield from (frame.before for frame in frames)


def _letters(text: str) -> str:
    return "".join(text.split())
