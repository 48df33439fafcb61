"""Texts of many rows at once, against the tokenizer's own for one row after the other."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from conftest import CHAT_TEMPLATE, build_tokenizer
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AddedToken, PreTrainedTokenizerFast

from ifd_trainer.data.token_decoding import Decoder

BYTES = build_tokenizer(extra=("Grüße – 你好 🙂",))
BYTES.add_tokens([AddedToken("<tool call>"), AddedToken("é"), "▁x"])
SIZE = len(BYTES)


def metaspace():
    """A tokenizer of SentencePiece's kind: the first token's space is not in the text."""
    vocabulary = {"<unk>": 0, "▁the": 1, "▁cat": 2, "s": 3, "▁": 4}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", chat_template=CHAT_TEMPLATE)


def joined(rows):
    """Flat ids and where each row begins."""
    return np.array([token for row in rows for token in row], dtype=np.int64), np.cumsum([0, *map(len, rows)])


@given(rows=st.lists(st.lists(st.integers(0, SIZE + 3), max_size=6), min_size=1, max_size=6))
@example(rows=[[]])
@example(rows=[[SIZE - 1], [SIZE - 2, SIZE - 3], [SIZE + 2]])
def test_texts_are_those_of_the_tokenizer(rows):
    assert Decoder(BYTES)(*joined(rows)).to_pylist() == [BYTES.backend_tokenizer.decode(row, False) for row in rows]


# The tokenizer itself reads an added token "é" as one byte, half of a character.
@pytest.mark.parametrize("text", ["Grüße – 你好 🙂 <|im_end|>", "é<tool call>▁x", "\x00\x7f\xad\n\t ~"])
def test_characters_of_several_bytes_and_added_tokens_are_whole_and_may_be_cut(text):
    ids = BYTES(text, add_special_tokens=False)["input_ids"]
    assert Decoder(BYTES)(*joined([ids])).to_pylist() == [text.replace("é<", "\ufffd<")]
    cuts = [0, *range(1, len(ids) + 1)]
    expected = [BYTES.decode(ids[start:end]) for start, end in pairwise(cuts)]
    assert Decoder(BYTES)(np.array(ids), np.array(cuts)).to_pylist() == expected


def test_a_tokenizer_that_is_not_byte_level_decodes_by_itself():
    tokenizer, rows = metaspace(), [[1, 2, 3], [2], []]
    assert Decoder(tokenizer)(*joined(rows)).to_pylist() == ["the cats", "cat", ""]


def test_characters_in_bytes_of_their_own_are_told_token_by_token():
    """Byte fallback, as in Llama 2 and Gemma: a part of a character reads as U+FFFD, which has three bytes each."""
    text = "a😀: b日本 cé"
    vocabulary = {"<unk>": 0} | {f"<0x{byte:02X}>": byte + 1 for byte in range(256)}
    vocabulary |= {character: 257 + i for i, character in enumerate("▁abc:")}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    ids = tokenizer(text.replace(" ", "▁"))["input_ids"]
    row = Decoder(tokenizer).row(ids)
    assert row.text == text.encode()
    assert len(ids) == len(row.text)  # a token for each byte
    starts = [len(text[:i].encode()) for i in range(len(text) + 1)]
    assert [row.token_at(place) for place in starts] == starts


class Slow:
    """A tokenizer in Python."""

    def batch_decode(self, rows):
        return [" ".join(map(str, row)) for row in rows]


def test_a_tokenizer_without_a_backend_decodes_by_itself():
    assert Decoder(Slow())(*joined([[1, 2], [], [3]])).to_pylist() == ["1 2", "", "3"]


def test_every_token_of_the_real_model_reads_as_its_tokenizer_says(real_model_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(real_model_path)
    rows = [[token] for token in range(len(tokenizer))]
    rows += np.random.default_rng(0).integers(0, len(tokenizer), (500, 20)).tolist()
    assert Decoder(tokenizer)(*joined(rows)).to_pylist() == tokenizer.batch_decode(rows)
