"""What precedes the direct answers of a tokenised data set, found from its prompts alone."""

from __future__ import annotations

from typing import Any

from ..errors import UserError
from .chat_template import template_frames
from .distinct_prompts import Prompts
from .encoding import direct_prefix
from .formats import ALPACA
from .turn_headers import told_header

_SHARE = 0.9  # of the prompts that have to end with a header; see `Prompts.shared_suffix`


class GivenHeader(list):
    """Tokens before a direct answer that a user chose: they take the place of a template's header."""


def response_prefix(tokenizer: Any, prompts: Prompts, header: str | None = None, found: str | None = None) -> list[int]:
    """Tokens before a direct answer: the header that the prompts share, or BOS, else EOS.

    Where that is the chat template's assistant header or the Alpaca header, that alone is taken, so that scores agree
    with those of `IFDScorer` on the raw rows.

    Args:
        prompts: the distinct ones of the pool.
        header: the header's text, if a user knows it.
        found: the header's text, if it was found in the rows.

    Raises:
        ValueError: when no row has a prompt.
    """
    if not prompts.lengths.any():
        raise UserError(
            "No row of the training set has a prompt that is masked out: labels hold no -100 before the answer, so "
            "there is nothing to condition on. Use a prompt-completion data set, or `messages` with "
            "assistant_only_loss=True."
        )
    if header is not None:
        return GivenHeader(direct_prefix(tokenizer, header, special=False))
    # The response headers that the transform uses.
    headers = [*filter(None, [found]), *(frame.before for frame in template_frames(tokenizer))]
    headers += [ALPACA.header, f"{ALPACA.header}\n"]  # the second one in LLaMA-Factory and Unsloth
    known = (tokenizer(header, add_special_tokens=False, verbose=False)["input_ids"] for header in headers)
    suffix = next((ids for ids in known if _share_opened(prompts, ids) >= _SHARE), None)
    suffix = suffix or _as_told(tokenizer, prompts, prompts.shared_suffix(_SHARE))
    if not suffix:
        return direct_prefix(tokenizer, "", special=False)
    bos = tokenizer.bos_token_id
    needs_bos = bos is not None and suffix[0] != bos and prompts.all_begin_with(bos)
    return [bos, *suffix] if needs_bos else suffix


def _as_told(tokenizer: Any, prompts: Prompts, suffix: list[int]) -> list[int]:
    """What prompts share at their ends, or the known header that it ends with."""
    text = tokenizer.decode(suffix, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    header = tokenizer(told_header(text), add_special_tokens=False, verbose=False)["input_ids"]
    return header if header and _share_opened(prompts, header) >= _SHARE else suffix


def _share_opened(prompts: Prompts, header: list[int]) -> float:
    """Share of prompts that end with `header`, or with a start of it: its end may have merged with the answer.

    The first token may be another one inside a text (SentencePiece puts a space before a text); then two of the
    tokens after it have to be there.
    """
    parts = [header[first:end] for first in (0, 1) for end in range(2 * first + 1, len(header) + 1)]
    return prompts.share_ending_with(parts)
