"""What is scored is what the collator leaves to train on, whichever TRL is installed, and wherever it makes labels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import build_tokenizer
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import (
    CHATS_READ,
    FIVE,
    TOKENIZER,
    as_trained,
    chat_rows,
    plain_trainer,
    raw_rows,
    select,
    sft_trainer,
    text_rows,
    tokenised,
    train,
)

from ifd_trainer import IFDSelectionCallback
from ifd_trainer.training.collated_labels import label

TURNS = build_tokenizer()
TURNS.chat_template = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def conversations(raw):
    """Chats as one list of messages."""
    rows = chat_rows(raw).map(lambda row: {"messages": row["prompt"] + row["completion"]})
    return rows.remove_columns(["prompt", "completion"])


# ---- the installed TRL ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "config"),
    [
        (text_rows, {}),
        (text_rows, {"max_length": 30}),
        (text_rows, {"max_length": None, "padding_free": True}),
        (text_rows, {"completion_only_loss": False}),
        (conversations, {"assistant_only_loss": True}),
        pytest.param(chat_rows, {"assistant_only_loss": True}, marks=CHATS_READ),
        pytest.param(chat_rows, {"assistant_only_loss": True, "completion_only_loss": False}, marks=CHATS_READ),
    ],
)
def test_the_pool_is_what_the_collator_leaves(tmp_path, rows, config):
    trainer = sft_trainer(tmp_path, rows(raw_rows(12)), tokenizer=TURNS, **config)
    pool = select(trainer, keep=4, max_ifd=float("inf")).pool
    trained = tokenised(trainer)
    assert [list(ids) for ids, _ in pool.tokens()] == trained["input_ids"][:]
    found = pool.trained_labels(np.arange(len(pool)))
    # A first token is never predicted, and a batch without padding masks it.
    assert [labels[1:] for labels in found] == [labels[1:] for labels in trained["labels"]]


# ---- TRL before 1.7, whichever is installed ---------------------------------------------------------------------


@dataclass
class MaskingCollator:
    """Makes labels as TRL 1.0 to 1.6 do, row by row; what it says of itself is what theirs say."""

    completion_only_loss: bool = True
    max_length: int | None = None
    truncation_mode: str = "keep_start"
    padding_free: bool = False
    wrong: bool = False

    def __call__(self, rows):
        ids, labels = [], []
        for row in rows:
            masks = [row["completion_mask"]] if self.completion_only_loss and "completion_mask" in row else []
            masks += [row["assistant_masks"]] if "assistant_masks" in row else []
            given = row.get("labels", row["input_ids"])
            of = [token if all(bits) else -100 for token, *bits in zip(given, *masks, strict=True)]
            size = self.max_length or len(of)
            part = slice(-size, None) if self.truncation_mode == "keep_end" else slice(size)
            ids.append(row["input_ids"][part])
            labels.append((row["input_ids"] if self.wrong else of)[part])
        size = max(map(len, ids))
        return {
            "input_ids": torch.tensor([row + [0] * (size - len(row)) for row in ids]),
            "labels": torch.tensor([row + [-100] * (size - len(row)) for row in labels]),
            "attention_mask": torch.tensor([[1] * len(row) + [0] * (size - len(row)) for row in ids]),
        }


MaskingCollator.__module__ = "trl.trainer.sft_trainer"


def masked_rows(tmp_path, *masks):
    """Prompt-completion rows with masks in the place of labels; the answer's first token is not the assistant's."""
    rows = []
    for row in tokenised(sft_trainer(tmp_path / "rows", 12)):
        mask = [int(label != -100) for label in row.pop("labels")]
        made = {"completion_mask": mask, "assistant_masks": [int(i != mask.index(1)) for i in range(len(mask))]}
        rows.append({**row, **{name: made[name] for name in masks}})
    return Dataset.from_list(rows)


def masked_trainer(tmp_path, rows, **collator):
    trainer = plain_trainer(tmp_path, rows, remove_unused_columns=False, num_train_epochs=2)
    trainer.data_collator = MaskingCollator(**collator)
    return trainer


@pytest.mark.parametrize(
    ("masks", "collator"),
    [
        (["completion_mask"], {}),
        (["completion_mask", "assistant_masks"], {}),
        (["completion_mask"], {"max_length": 30}),
        (["completion_mask"], {"max_length": 30, "truncation_mode": "keep_end"}),
    ],
)
def test_masks_say_which_tokens_are_the_answer(tmp_path, masks, collator):
    trainer = masked_trainer(tmp_path, masked_rows(tmp_path, *masks), **collator)
    callback = select(trainer, keep=4, max_ifd=float("inf"))
    trained = [as_trained(trainer, row) for row in trainer.train_dataset]
    assert list(callback.pool.tokens()) == [(row["input_ids"], row["labels"]) for row in trained]
    seen = train(trainer)
    assert [len(set(rows)) for rows in seen.epochs()] == [4, 4]
    history = callback.history.rows(0).set_index("row_id")
    for row in trained:  # the answer is the last run of labels, without the end of turn
        end = len(row["labels"])
        start = max((i + 1 for i, label in enumerate(row["labels"]) if label == -100), default=0)
        ended = row["input_ids"][-1] == TOKENIZER.eos_token_id
        assert history.loc[row["row_id"], "answer_tokens"] == end - start - ended


@pytest.mark.parametrize(
    ("masks", "completion_only"), [(["assistant_masks"], True), (["completion_mask", "assistant_masks"], False)]
)
def test_masks_that_do_not_apply_mask_nothing(tmp_path, masks, completion_only):
    trainer = masked_trainer(tmp_path, masked_rows(tmp_path, *masks), completion_only_loss=completion_only)
    pool = select(trainer, keep=4).pool
    found = zip(pool.tokens(), pool.trained_labels(np.arange(len(pool))), strict=True)
    for row, ((ids, _), labels) in zip(trainer.train_dataset, found, strict=True):
        assert ids == row["input_ids"]
        assert labels == [token if bit else -100 for token, bit in zip(ids, row["assistant_masks"], strict=True)]


def test_masks_apply_to_labels_too_as_they_do_in_the_collator(tmp_path):
    rows = masked_rows(tmp_path, "completion_mask").map(lambda row: {"labels": [*row["input_ids"][:-1], -100]})
    pool = select(masked_trainer(tmp_path, rows), keep=4).pool
    for row, (_, labels) in zip(rows, pool.tokens(), strict=True):
        mask = [*row["completion_mask"][:-1], 0]
        assert labels == [token if bit else -100 for token, bit in zip(row["input_ids"], mask, strict=True)]


def test_the_columns_beside_the_tokens_are_still_there(tmp_path):
    rows = masked_rows(tmp_path, "completion_mask").map(lambda row: {"topic": f"topic {row['row_id']}"})
    callback = select(masked_trainer(tmp_path, rows), keep=4)
    assert callback.pool.column_names == ["row_id", "topic"]
    assert callback.pool.column("topic").tolist() == rows["topic"][:]


def test_a_collator_that_leaves_other_tokens_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("ifd_trainer.training.collated_labels.version", lambda name: "1.99")
    trainer = masked_trainer(tmp_path, masked_rows(tmp_path, "completion_mask"), wrong=True)
    row = trainer.train_dataset[0]
    with pytest.raises(ImportError) as raised:
        IFDSelectionCallback(trainer)
    assert str(raised.value) == (
        f"The collator of trl 1.99 trains on {len(row['input_ids']) - 1} tokens of row 0, but selection would score "
        f"{sum(row['completion_mask'])}. It works with trl 0.24 to 1.16: install one of those, or give the data set a "
        "labels column."
    )


def test_a_mask_of_another_length_is_refused(tmp_path):
    rows = masked_rows(tmp_path, "completion_mask")
    size = len(rows[5]["input_ids"])
    rows = rows.map(lambda row, i: {"completion_mask": row["completion_mask"] + [1] * (i == 5)}, with_indices=True)
    with pytest.raises(ValueError, match=r"has .* values in completion_mask") as raised:
        IFDSelectionCallback(masked_trainer(tmp_path, rows))
    assert str(raised.value) == (
        f"A row of the training set has {size} input_ids, but {size + 1} values in completion_mask. Tokenise the data "
        "set anew: each token needs one."
    )


@pytest.mark.skipif(not FIVE, reason="transformers 4.57 gives chats as every trl reads them")
def test_chats_that_an_old_trl_cannot_read_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("ifd_trainer.training.collated_labels.version", lambda name: "0.26.2")
    rows = masked_rows(tmp_path, "completion_mask")
    chats = rows.map(lambda row: {"prompt": [{"role": "user", "content": "a"}]})
    with pytest.raises(ValueError, match=r"^trl 0.26.2 takes every chat .* Install trl 0.27 or later, or tokenise"):
        IFDSelectionCallback(masked_trainer(tmp_path, chats))
    select(masked_trainer(tmp_path, rows.map(lambda row: {"prompt": "text"})), keep=4)


row_of = st.lists(st.tuples(st.integers(0, 400), st.booleans(), st.booleans()), max_size=9)


@given(rows=st.lists(row_of, min_size=1, max_size=6), size=st.none() | st.integers(1, 9), keep_end=st.booleans())
def test_labels_are_those_of_a_loop_over_tokens(rows, size, keep_end):
    kinds = {"input_ids": pa.int32(), "completion_mask": pa.int8(), "assistant_masks": pa.int64()}
    columns = {
        name: pa.array([[int(token[i]) for token in row] for row in rows], pa.list_(kind))
        for i, (name, kind) in enumerate(kinds.items())
    }
    found = label(pa.table(columns), ["completion_mask", "assistant_masks"], size, keep_end).to_pydict()
    for row, ids, labels in zip(rows, found["input_ids"], found["labels"], strict=True):
        kept = row if size is None else row[-size:] if keep_end else row[:size]
        assert ids == [token for token, _, _ in kept]
        assert labels == [token if one and two else -100 for token, one, two in kept]
