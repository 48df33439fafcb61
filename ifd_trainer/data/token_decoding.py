"""Token ids to texts, of millions of rows.

A tokenizer decodes a row in some 20 microseconds. Where it is a byte-level one (GPT-2's kind: most models of today), a
row's text is the bytes of its tokens one after the other, which Arrow looks up and joins without a Python object for
each token, in a fifth of the time.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tokenizers import decoders

from .chat_template import common_prefix_length


class Decoder:
    """Texts as `tokenizer.decode` gives them, special tokens included.

    >>> Decoder(tokenizer)(np.array([5, 6, 7]), np.array([0, 2, 3]))  # doctest: +SKIP
    ["The cat", " sat"]
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        self._pieces = None
        if self._backend is not None and isinstance(self._backend.decoder, decoders.ByteLevel):
            self._pieces = _pieces(self._backend.get_vocab(with_added_tokens=True))

    def __call__(self, ids: np.ndarray, bounds: np.ndarray) -> pa.Array:
        """The texts of the parts of `ids` between one bound and the next, one fewer than there are bounds."""
        if self._pieces is None:
            return pa.array(self._one_by_one(ids, bounds), pa.string())
        known = np.where(ids < len(self._pieces), ids, len(self._pieces) - 1)
        tokens = pa.ListArray.from_arrays(pa.array(bounds, pa.int32()), self._pieces.take(pa.array(known)))
        texts = pc.binary_join(tokens, b"")
        try:
            return texts.cast(pa.string())
        except pa.ArrowInvalid:  # a part begins or ends within a character
            return pa.array([text.decode(errors="replace") for text in texts.to_pylist()], pa.string())

    def row(self, ids: Sequence[int]) -> TextOfTokens:
        """The text of a row, with the places of its tokens in it."""
        if self._lookup is not None:
            return _Pieces([self._lookup[i] if i < len(self._lookup) else b"" for i in ids])
        return _Decoded(self._tokenizer, ids)

    @cached_property
    def _lookup(self) -> list[bytes] | None:
        return None if self._pieces is None else self._pieces.to_pylist()

    def _one_by_one(self, ids: np.ndarray, bounds: np.ndarray) -> list[str]:
        tokens = ids.tolist()
        rows = [tokens[start:end] for start, end in pairwise(bounds.tolist())]
        if self._backend is None:
            return self._tokenizer.batch_decode(rows)
        return self._backend.decode_batch(rows, skip_special_tokens=False)


class TextOfTokens(Protocol):
    """The text of a row of tokens, in bytes of UTF-8.

    Attributes:
        text: all of it.
    """

    text: bytes

    def token_at(self, place: int) -> int:
        """The first token that ends behind a place in the text; the number of tokens where none does."""
        ...


class _Pieces:
    """Of a byte-level tokenizer: its tokens' bytes, one after the other."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self.text, self._pieces = b"".join(pieces), pieces

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum([len(piece) for piece in self._pieces])

    def token_at(self, place: int) -> int:
        return int(np.searchsorted(self._ends, place, side="right"))


class _Decoded:
    """Of any other tokenizer, of which a token's text depends on those before it."""

    def __init__(self, tokenizer: Any, ids: Sequence[int]) -> None:
        self._tokenizer, self._ids = tokenizer, list(ids)
        self._whole = self._start(len(self._ids))
        self.text = self._whole.encode(errors="replace")

    def token_at(self, place: int) -> int:
        return bisect_right(range(1, len(self._ids) + 1), place, key=self._end)

    def _end(self, count: int) -> int:
        """Where the first tokens end in the text.

        Bytes that are no whole characters yet (SentencePiece's byte fallback) read as a U+FFFD each.
        """
        start = self._start(count)
        known = len(start.rstrip("\ufffd"))
        known = known if self._whole.startswith(start[:known]) else 0
        known += common_prefix_length(start[known:], self._whole[known:])
        return len(start[:known].encode(errors="replace")) + len(start) - known

    def _start(self, count: int) -> str:
        return self._tokenizer.decode(self._ids[:count], skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _pieces(vocabulary: dict[str, int]) -> pa.Array:
    """The bytes of each token by its id; none for ids that no token has, the last of all among them."""
    pieces = [b""] * (max(vocabulary.values()) + 2)
    byte_of = _byte_of_character()
    for token, number in vocabulary.items():
        known = all(character in byte_of for character in token)  # else it is an added token, which stands for itself
        pieces[number] = bytes(byte_of[character] for character in token) if known else token.encode()
    return pa.array(pieces, pa.binary())


def _byte_of_character() -> dict[str, int]:
    """Which byte a character of a byte-level token stands for: printable ones for themselves (in Latin-1), the others
    are U+0100 and the characters after it in their order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}
