"""A target set is read in the pool's format or its own, with and without answers; what cannot be read is named."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
from conftest import build_tokenizer
from datasets import Dataset

from ifd_trainer.data.encoding import Encoder
from ifd_trainer.data.format_choice import FormatOptions
from ifd_trainer.data.formats import ALPACA, MESSAGES, WIZARDLM
from ifd_trainer.data.target_rows import Targets
from ifd_trainer.errors import UserError

TOKENIZER = build_tokenizer()
ENCODER = Encoder(TOKENIZER, score_truncated=True)
ASKED = "<|im_start|>user\nAdd 12 and 30.<|im_end|>\n<|im_start|>assistant\n"
USER = {"role": "user", "content": "Add 12 and 30."}
SAID = {"role": "assistant", "content": "42"}


def texts(rows, usual=None, encoder=ENCODER):
    """What is embedded of each row, as text."""
    targets = Targets.read(rows)
    encoded = targets.encoded(targets.format(usual), encoder)
    return TOKENIZER.batch_decode(encoded.tokens)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "2 + 2?", "completion": " 4"}, "2 + 2? 4"),
        ({"prompt": "2 + 2?"}, "2 + 2?"),
        ({"question": "2 + 2?"}, "2 + 2?\n\n### Response:"),
        ({"instruction": "2 + 2?", "output": "4"}, "2 + 2?\n\n### Response:4"),
        ({"instruction": "2 + 2?", "output": " \n"}, "2 + 2?\n\n### Response:"),
        ({"instruction": "2 + 2?", "response": "4"}, "2 + 2?\n\n### Response:4"),
        ({"messages": [USER, SAID]}, f"{ASKED}42"),
        ({"messages": [USER]}, ASKED),
        ({"messages": [USER, {"role": "assistant", "content": ""}]}, ASKED),
        ({"conversations": [{"from": "human", "value": "Add 12 and 30."}]}, ASKED),
        ({"prompt": [USER], "completion": [SAID]}, f"{ASKED}42"),
        ({"prompt": [USER]}, ASKED),
        ({"prompt": [USER], "completion": None}, ASKED),
    ],
)
def test_rows_with_and_without_answers_are_read_in_every_format(row, expected):
    assert texts([row]) == [expected]


def test_a_set_may_have_both():
    rows = [{"messages": [USER, SAID]}, {"messages": [USER]}]
    targets = Targets.read(rows)
    encoded = targets.encoded(targets.format(), ENCODER)
    assert (len(encoded), encoded.without_answer, encoded.problems) == (2, 1, {})


def test_the_usual_format_is_taken_where_the_columns_are_there(caplog):
    row = {"instruction": "2 + 2?", "output": "4"}
    assert texts([row], ALPACA) == [ALPACA.render(row).prompt + "4"]
    assert texts([{"instruction": "2 + 2?"}], ALPACA) == [ALPACA.render(row).prompt]
    assert texts([row], "wizardlm") == [WIZARDLM.render(row).prompt + "4"]
    options = FormatOptions(prompt_column="ask", answer_column="say", template="Q: {instruction}\\nA: ")
    assert texts([{"ask": "2 + 2?", "say": "4"}], options) == ["Q: 2 + 2?\nA: 4"]
    assert texts([{"ask": "2 + 2?"}], options) == ["Q: 2 + 2?\nA: "]
    assert caplog.text == ""
    assert texts([{"prompt": "2 + 2?", "completion": "4"}], MESSAGES) == ["2 + 2?4"]
    assert "the target set does not have the usual format, and is read by its columns: " in caplog.text


def test_what_does_not_fit_is_cut_at_its_end():
    row = {"prompt": "cat dog " * 20, "completion": "red"}
    whole = TOKENIZER(row["prompt"] + row["completion"])["input_ids"]
    for longest in (5, len(whole) - 1, len(whole)):
        encoder = Encoder(TOKENIZER, max_length=longest, score_truncated=True)
        targets = Targets.read([row])
        assert targets.encoded(targets.format(), encoder).tokens == [whole[:longest]]


def test_bos_is_where_the_tokenizer_puts_it():
    tokenizer = build_tokenizer(add_bos=True)
    rows = Targets.read([{"prompt": "cat", "completion": " dog"}, {"prompt": "cat"}, {"messages": [USER]}][:2])
    encoded = rows.encoded(rows.format(), Encoder(tokenizer, score_truncated=True))
    assert encoded.tokens == [tokenizer("cat dog")["input_ids"], tokenizer("cat")["input_ids"]]
    assert {ids[0] for ids in encoded.tokens} == {tokenizer.bos_token_id}
    chat = Targets.read([{"messages": [USER]}])
    ids = chat.encoded(chat.format(), Encoder(tokenizer, score_truncated=True)).tokens[0]
    assert ids == tokenizer(ASKED, add_special_tokens=False)["input_ids"]


def test_rows_that_cannot_be_read_are_named_and_the_others_used(caplog):
    rows = [
        {"id": "a", "messages": "no list"},
        {"id": "b", "messages": [USER]},
        {"id": "c", "messages": []},
        {"id": "d", "messages": [{"role": "user", "content": "  "}]},
        {"id": "e", "messages": [USER, SAID]},
    ]
    targets = Targets.read(rows)
    with caplog.at_level(logging.WARNING):
        encoded = targets.encoded(targets.format(), ENCODER)
    assert list(encoded.problems) == [0, 2, 3]
    assert encoded.problems[3] == "it has neither a question nor an answer"
    assert encoded.ids.tolist() == ["b", "e"]
    assert (
        "3 of 5 rows of the target set cannot be read as 'messages': left out; the first one, row 0: exp" in caplog.text
    )
    none = Targets.read(rows[2:4])
    with pytest.raises(UserError, match="None of 2 rows of the target set can be read as 'messages'; the first one, r"):
        none.encoded(none.format(), ENCODER)


def test_files_data_sets_and_lists_are_read_alike(tmp_path):
    rows = [{"prompt": "a", "completion": "b", "row_id": 7}, {"prompt": "c", "completion": None, "row_id": 3}]
    path = tmp_path / "task.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    digests = set()
    for source in (str(path), Dataset.from_list(rows), rows):
        targets = Targets.read(source)
        encoded = targets.encoded(targets.format(), ENCODER)
        assert encoded.ids.tolist() == [7, 3]
        digests.add(encoded.digest)
    assert len(digests) == 1
    other = Targets.read(rows[:1])
    assert other.encoded(other.format(), ENCODER).digest not in digests
    assert Targets.read([*rows[:1], {"prompt": "x"}]).ids.tolist() == [0, 1]  # an id is missing
    assert Targets.read([{"id": 1, "prompt": "x"}, {"id": "a", "prompt": "y"}]).ids.tolist() == [0, 1]


def test_an_empty_set_and_columns_of_no_format_are_said(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match=r"empty\.jsonl"):
        Targets.read(str(tmp_path / "empty.jsonl"))
    with pytest.raises(UserError, match="The target set that was given has no rows"):
        Targets.read([])
    with pytest.raises(UserError, match="The target set cannot be read: "):
        Targets.read([{"colour": "red"}]).format()
    with pytest.raises(FileNotFoundError):
        Targets.read(str(tmp_path / "nothing.jsonl"))


def test_tokens_are_told_apart_by_where_rows_end():
    one, other = Targets.read([{"prompt": "cat dog"}]), Targets.read([{"prompt": "cat"}, {"prompt": " dog"}])
    digests = {rows.encoded(rows.format(), ENCODER).digest for rows in (one, other)}
    assert len(digests) == 2
    assert np.concatenate(other.encoded(other.format(), ENCODER).tokens).tolist() == TOKENIZER("cat dog")["input_ids"]
