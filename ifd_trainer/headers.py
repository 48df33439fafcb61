"""Prompts, headers and answers of a tokenised data set, of which only tokens and labels are known."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

from .chat import renderer, template_frames
from .encoding import EncodedPair, Encoder, Status, direct_prefix, shared_suffix
from .errors import UserError
from .formats import ALPACA, SUPERFILTERING, WIZARDLM

_SHARE = 0.9  # of the prompts that have to end with a header; see `shared_suffix`


class GivenHeader(list):
    """Tokens before a direct answer that a user chose: they take the place of a template's header."""


def response_prefix(tokenizer: Any, prompts: Collection[tuple[int, ...]], header: str | None = None) -> list[int]:
    """Tokens before a direct answer: the header that the prompts share, or BOS, else EOS.

    Where that is the chat template's assistant header or the Alpaca header, that alone is taken, so that scores agree
    with those of `IFDScorer` on the raw rows.

    Args:
        prompts: the distinct prompts, as token ids.
        header: the header's text, if it is known.

    Raises:
        ValueError: when no row has a prompt.
    """
    if set(prompts) == {()}:
        raise UserError(
            "No row of the training set has a prompt that is masked out: labels hold no -100 before the answer, so "
            "there is nothing to condition on. Use a prompt-completion data set, or `messages` with "
            "assistant_only_loss=True."
        )
    if header is not None:
        return GivenHeader(direct_prefix(tokenizer, header, special=False))
    known = (ids for ids in _known_headers(tokenizer) if _share_opened(prompts, ids) >= _SHARE)
    suffix = next(known, None) or shared_suffix(prompts, _SHARE)
    if not suffix:
        return direct_prefix(tokenizer, "", special=False)
    bos = tokenizer.bos_token_id
    starts_with_bos = bos is not None and all(prompt[:1] == (bos,) for prompt in prompts)
    return [bos, *suffix] if starts_with_bos and suffix[0] != bos else suffix


def _known_headers(tokenizer: Any) -> list[list[int]]:
    """Token ids of the response headers that the transform uses: the chat template's, and Alpaca's."""
    headers = [frame.before for frame in template_frames(tokenizer)] + [ALPACA.header]
    return [tokenizer(header, add_special_tokens=False, verbose=False)["input_ids"] for header in headers]


def _share_opened(prompts: Collection[tuple[int, ...]], header: list[int]) -> float:
    """Share of prompts that end with `header`, or with a start of it: its end may have merged with the answer.

    The first token may be another one inside a text (SentencePiece puts a space before a text); then two of the
    tokens after it have to be there.
    """
    parts = [tuple(header[first:end]) for first in (0, 1) for end in range(2 * first + 1, len(header) + 1)]
    return sum(any(prompt[-len(part) :] == part for part in parts) for prompt in prompts) / len(prompts)


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
        self._blank = {_letters(prompt) for prompt in _blank_prompts(tokenizer, template)}
        self._longest = max(len(tokenizer(prompt)["input_ids"]) for prompt in _blank_prompts(tokenizer, template)) + 8

    def pair(self, ids: Sequence[int], start: int, end: int, prefix: Sequence[int]) -> EncodedPair:
        """The row's pair, where the labels say that the answer is `ids[start:end]`.

        The direct answer is preceded by the template's header as the row has it; by `prefix`, which `response_prefix`
        gives, where a user chose that or the row has none.
        """
        ids = list(ids)
        header, start, end = self._turns(ids, start, end, self._frames)
        given = header is None or isinstance(prefix, GivenHeader)
        pair = self._encoder.pair(ids[:end], start, list(prefix) if given else ids[header:start])
        if pair.status is not Status.EMPTY_ANSWER and self.asks_nothing(ids[:start]):
            return EncodedPair.unscorable(Status.EMPTY_PROMPT)
        return pair

    def span(self, ids: Sequence[int], start: int, end: int) -> tuple[int, int]:
        """Where the answer begins and ends within the labels' `start` and `end`."""
        return self._turns(list(ids), start, end, self._frames)[1:]

    def asks_nothing(self, prompt: Sequence[int]) -> bool:
        """Whether a prompt holds nothing but what a template or a known format adds, as far as tokens tell."""
        if len(prompt) > self._longest:
            return False
        decode = self._encoder.tokenizer.decode
        return any(_letters(decode(list(prompt), skip_special_tokens=skip)) in self._blank for skip in (False, True))


def _blank_prompts(tokenizer: Any, template: str | None) -> Iterator[str]:
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
            yield from () if opened else (text + frame.before for frame in template_frames(tokenizer, template))
    yield from (frame.before for frame in template_frames(tokenizer, template))


def _letters(text: str) -> str:
    return "".join(text.split())
