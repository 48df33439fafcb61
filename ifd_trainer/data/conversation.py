"""Every answer of a conversation, in the one text that its chat template writes.

A conversation is trained on as a whole, so each of its answers is scored where it stands there: behind all that was
said before, as the template writes that in a conversation that goes on (some leave out what was thought earlier). Where
an answer begins and ends is found by rendering the conversation once more with a text in its place that no row holds,
and holds only if everything around it is as before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import UserError
from ..method.reasons import Status
from .chat_template import common_prefix_length, renderer, spans_of_answers, template_options
from .encoding import EncodedPair, Encoder, direct_prefix
from .token_rows import TokenRows


@dataclass(frozen=True)
class Conversation:
    """A conversation as its template writes it.

    Attributes:
        text: all of it, up to its last answer.
        spans: for each answer of the assistant its first character and the one behind its last; None where the template
            does not tell.
    """

    text: str
    spans: tuple[tuple[int, int] | None, ...]


def read_conversation(
    messages: Sequence[dict[str, Any]], first: int, row: Mapping[str, Any], tokenizer: Any
) -> Conversation:
    """Render a conversation up to its last answer, and find all of them.

    Args:
        messages: of the row, as `chat_messages` gives them; what stands behind the last answer is left out.
        first: the first message that may be an answer.
        row: what else it gives its template; see `template_options`.

    Raises:
        MalformedRow: when the template cannot render the messages.
    """
    places = [place for place, message in enumerate(messages) if place >= first and message["role"] == "assistant"]
    if not places:
        return Conversation("", ())
    render = renderer(tokenizer, template_options(row, tokenizer))
    text, spans = spans_of_answers(render, list(messages[: places[-1] + 1]), places)
    return Conversation(text, tuple(spans))


class ConversationEncoder:
    """Conversations to encoded pairs, one for each answer; all of them are beginnings of one another.

    Args:
        encoder: of the definition "paper"; its limits hold for each answer with all that stands before it.

    Raises:
        UserError: for another definition, which says nothing of conversations, and for a tokenizer without a template.
    """

    def __init__(self, encoder: Encoder) -> None:
        if encoder.definition != "paper":
            raise UserError(
                f"definition={encoder.definition!r} is defined for one answer of a row. Use definition='paper' to "
                "score every turn, or turns='last'."
            )
        self._encoder, self._rows = encoder, TokenRows(encoder)
        self._prefix = direct_prefix(encoder.tokenizer, "", special=False)

    def __call__(self, conversations: Sequence[Conversation | None]) -> list[list[EncodedPair]]:
        """The pairs of each conversation, in the order of its answers; `None` stands for a row that has none."""
        texts = [each.text for each in conversations if each is not None and each.spans]
        encoded = iter(self._tokenize(texts))
        return [self._pairs(each, *next(encoded)) if each is not None and each.spans else [] for each in conversations]

    def trained_on(self, conversations: Sequence[Conversation]) -> list[tuple[list[int], list[int]]]:
        """The token ids of conversations, and 1 for each that is an answer's or ends its turn, 0 for the others.

        What is found nowhere is not marked.
        """
        masked = []
        for each, (ids, offsets) in zip(
            conversations, self._tokenize([each.text for each in conversations]), strict=True
        ):
            mask = [0] * len(ids)
            for start, end in filter(None, self._places(each, ids, offsets)):
                end += len(self._encoder.turns.ending(ids[end:]))
                mask[start:end] = [1] * (end - start)
            masked.append((ids, mask))
        return masked

    def _pairs(
        self, conversation: Conversation, ids: list[int], offsets: list[tuple[int, int]] | None
    ) -> list[EncodedPair]:
        """`offsets`: the places in the text of each token, where the tokenizer tells them."""
        return [
            EncodedPair.unscorable(Status.NO_HEADER) if place is None else self._rows.pair(ids, *place, self._prefix)
            for place in self._places(conversation, ids, offsets)
        ]

    def _places(
        self, conversation: Conversation, ids: list[int], offsets: list[tuple[int, int]] | None
    ) -> list[tuple[int, int] | None]:
        """The first token of each answer and the one behind its last; None where the template does not tell."""
        places: list[tuple[int, int] | None] = []
        for span in conversation.spans:
            if span is None:
                places.append(None)
                continue
            if offsets is None:
                start, end = (self._shared(ids, conversation.text[:place]) for place in span)
            else:
                # A token of the header and of the answer is the answer's, as in what is trained on.
                start = next((i for i, (_, behind) in enumerate(offsets) if behind > span[0]), len(ids))
                end = next((i for i, (first, _) in enumerate(offsets) if first >= span[1]), len(ids))
            places.append((start, max(start, end)))
        return places

    def _shared(self, ids: list[int], text: str) -> int:
        """How many tokens of a conversation are those of its beginning."""
        return common_prefix_length(ids, self._encoder.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _tokenize(self, texts: list[str]) -> list[tuple[list[int], list[tuple[int, int]] | None]]:
        if not texts:
            return []
        tokenizer = self._encoder.tokenizer
        fast = getattr(tokenizer, "is_fast", False)
        encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=fast, verbose=False)
        offsets = encoded["offset_mapping"] if fast else [None] * len(texts)
        return list(zip(encoded["input_ids"], offsets, strict=True))
