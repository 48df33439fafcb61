"""What one pass over a pool finds, against a loop over its rows, and how often a run makes that pass."""

from __future__ import annotations

import hashlib
from collections import Counter
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import build_tokenizer
from datasets import Dataset, Features, List, Value
from hypothesis import example, given
from hypothesis import strategies as st
from tiny_runs import INF, TOKENIZER, plain_trainer, raw_rows, select, sft_trainer, text_rows, tokenised, train

from ifd_trainer.data.encoding import answer_span
from ifd_trainer.data.response_header import response_prefix
from ifd_trainer.data.token_decoding import Decoder
from ifd_trainer.training.history import History
from ifd_trainer.training.pool import PackedPool, Pool

rows_of = st.lists(
    st.lists(st.tuples(st.integers(0, 2**31 - 1), st.booleans()), max_size=8).map(
        lambda row: {"input_ids": [t for t, _ in row], "labels": [t if kept else -100 for t, kept in row]}
    ),
    min_size=1,
    max_size=12,
)


def digest_of(rows, end=b""):
    """The digest that checkpoints hold since the first version: row by row, each number as eight bytes."""
    digest = hashlib.blake2b(digest_size=16)
    for row in rows:
        for number in (len(row["input_ids"]), *row["input_ids"], *row["labels"]):
            digest.update(int(number).to_bytes(8, "little", signed=True))
    digest.update(end)
    return digest.hexdigest()


def stored(rows):
    names = ("input_ids", "labels")
    features = Features(dict.fromkeys(names, List(Value("int64"))))  # else rows without a token have no type
    return Dataset.from_dict({name: [row[name] for row in rows] for name in names}, features=features)


def whole(prompts):
    """Distinct prompts that are no longer than what is kept of them."""
    found = [tuple(tail[tail != -1].tolist()) for tail in prompts.tails]
    assert prompts.lengths.tolist() == [len(prompt) for prompt in found]
    assert prompts.firsts.tolist() == [prompt[0] if prompt else -1 for prompt in found]
    assert len(set(found)) == len(found)
    return set(found)


class Rows(torch.utils.data.Dataset):
    """A data set of a user's own, without columns."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {name: torch.tensor(self.rows[index][name], dtype=torch.long) for name in ("input_ids", "labels")}


@pytest.mark.parametrize(
    "kind", [stored, list, Rows, lambda rows: stored(rows).with_format("torch")], ids=["stored", "list", "own", "torch"]
)
@given(rows=rows_of)
@example(rows=[{"input_ids": [], "labels": []}])
@example(
    rows=[{"input_ids": [], "labels": []}, {"input_ids": [3], "labels": [3]}, {"input_ids": [4], "labels": [-100]}]
)
def test_one_pass_finds_what_a_loop_over_the_rows_does(kind, rows):
    pool = Pool(kind(rows))
    prompts, fingerprint = pool.read()
    spans = [answer_span(row["labels"]) for row in rows]
    answered = [(row, start) for row, (start, end) in zip(rows, spans, strict=True) if start < end]
    answered = answered or [(row, len(row["input_ids"])) for row in rows]
    assert whole(prompts) == {tuple(row["input_ids"][:start]) for row, start in answered}
    assert fingerprint == digest_of(rows)
    everything = np.arange(len(rows))
    assert pool.spans(everything).tolist() == [list(span) for span in spans]
    assert pool.lengths(everything).tolist() == [len(row["input_ids"]) for row in rows]
    assert pool.lengths(everything[::-1][:1]).tolist() == [len(rows[-1]["input_ids"])]


def prefix_one_by_one(tokenizer, prompts):
    """`response_prefix` as it was: over whole prompts, one by one."""
    if prompts == {()}:
        return None
    bos = tokenizer.bos_token_id
    opened = tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    for header in (opened, tokenizer("### Response:", add_special_tokens=False)["input_ids"]):
        parts = [tuple(header[first:end]) for first in (0, 1) for end in range(2 * first + 1, len(header) + 1)]
        found = sum(any(prompt[-len(part) :] == part for part in parts) for prompt in prompts)
        if found / len(prompts) >= 0.9:
            break
    else:
        header, matching = [], list(prompts)
        while len(matching) > 1:
            tokens = Counter(prompt[-1 - len(header)] for prompt in matching if len(prompt) > len(header))
            token, count = tokens.most_common(1)[0] if tokens else (None, 0)
            if count < max(0.9 * len(prompts), 2):
                break
            matching = [p for p in matching if len(p) > len(header) and p[-1 - len(header)] == token]
            header = [token, *header]
        if not header:
            return [bos]
    return [bos, *header] if all(prompt[:1] == (bos,) for prompt in prompts) and header[0] != bos else header


ANSWER = TOKENIZER("### Response:", add_special_tokens=False)["input_ids"]
ASSISTANT = TOKENIZER("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
LONG = [*range(50, 120)]  # more than what is kept of a prompt


@given(
    starts=st.lists(st.lists(st.integers(20, 22), max_size=3), min_size=1, max_size=25),
    end=st.sampled_from([ANSWER, ANSWER[:-1], ANSWER[1:], ASSISTANT, ASSISTANT[:-1], LONG, [7], []]),
    bos=st.booleans(),
    others=st.lists(st.lists(st.integers(20, 22), max_size=3), max_size=2),
)
def test_the_response_header_is_that_of_whole_prompts_one_by_one(starts, end, bos, others):
    prompts = [[*([3] if bos else []), *start, *end] for start in starts] + others
    rows = [{"input_ids": [*prompt, 9], "labels": [-100] * len(prompt) + [9]} for prompt in prompts]
    found, _ = Pool(stored(rows)).read()
    expected = prefix_one_by_one(TOKENIZER, {tuple(prompt) for prompt in prompts})
    if expected is None:
        with pytest.raises(ValueError, match="No row of the training set has a prompt"):
            response_prefix(TOKENIZER, found)
    else:
        assert response_prefix(TOKENIZER, found) == expected


def many_rows(count):
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(count):
        prompt, answer = rng.integers(5, 60_000, rng.integers(1, 9)).tolist(), rng.integers(5, 60_000, 4).tolist()
        rows.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    return rows


@pytest.mark.parametrize(
    "kind", [list, Rows, lambda rows: stored(rows).with_transform(dict)], ids=["list", "own", "transform"]
)
def test_other_data_sets_are_read_over_several_batches_too(kind):
    rows = many_rows(2100)
    pool = Pool(kind(rows))
    prompts, fingerprint = pool.read()
    assert fingerprint == digest_of(rows)
    assert len(prompts) == len({tuple(row["input_ids"][:-4]) for row in rows})
    found = [(ids[start:end].tolist()) for ids, bounds in pool.segments(700) for start, end in pairwise(bounds)]
    assert found[0::3] == [row["input_ids"][:-4] for row in rows]
    assert found[1::3] == [row["input_ids"][-4:] for row in rows]
    assert not any(found[2::3])


def test_rows_are_read_in_the_order_of_the_data_set_over_several_batches():
    rows = many_rows(2500)
    order = np.random.default_rng(1).permutation(2500)
    shuffled = [rows[i] for i in order]
    pool = Pool(stored(rows).select(order))
    assert pool.read()[1] == digest_of(shuffled) != digest_of(rows)
    assert pool.lengths(np.array([2, 2499])).tolist() == [len(shuffled[i]["input_ids"]) for i in (2, 2499)]


def test_a_transform_of_the_data_set_is_applied():
    def shifted(batch):
        return {name: [[t + 1 if t >= 0 else t for t in row] for row in batch[name]] for name in batch}

    rows = many_rows(5)
    expected = [{name: [t + 1 if t >= 0 else t for t in row[name]] for name in row} for row in rows]
    assert Pool(stored(rows).with_transform(shifted)).read()[1] == digest_of(expected)


def test_a_packed_pool_says_what_it_is_packed_into():
    packed = Dataset.from_dict({"input_ids": [[5, 6, 7]], "labels": [[-100, 6, 7]], "seq_lengths": [[2, 1]]})
    examples = [{"input_ids": [5, 6], "labels": [-100, 6]}, {"input_ids": [7], "labels": [7]}]
    prompts, fingerprint = PackedPool(packed, 8).read()
    assert whole(prompts) == {(5,), ()}
    assert fingerprint == digest_of(examples, b"packed into 8")


def test_a_row_without_a_label_for_each_token_is_named():
    rows = [*many_rows(1200), {"input_ids": [5, 6, 7], "labels": [6, 7]}]
    with pytest.raises(ValueError, match="Row 1200 of the training set has 3 input_ids, but 2 labels"):
        Pool(stored(rows)).read()


def test_what_changed_between_two_runs_is_read_again():
    rows = many_rows(3)
    pool = Pool(rows)
    pool.read()
    assert pool.ids(None).tolist() == [0, 1, 2]
    rows.append({"input_ids": [9], "labels": [9]})
    assert pool.read()[1] == digest_of(rows)
    assert pool.ids(None).tolist() == [0, 1, 2, 3]
    assert pool.spans(np.arange(4))[3].tolist() == [0, 1]


def test_lengths_can_be_asked_for_without_a_run():
    pool = Pool(many_rows(2))
    assert pool.lengths(np.arange(2)).tolist() == [len(row["input_ids"]) for row in pool.examples]
    assert Pool(pool.examples).spans(np.array([0])).tolist() == [list(answer_span(pool.examples[0]["labels"]))]


def test_a_run_reads_its_pool_and_checks_its_ids_once(tmp_path, monkeypatch):
    trainer = sft_trainer(tmp_path, 24, train_sampling_strategy="group_by_length")
    select(trainer, keep=6, max_ifd=INF)
    ids = tokenised(trainer)["row_id"][:]
    read, getitem = [], Dataset.__getitem__

    def noted(self, key):
        read.append((self.column_names, key))
        return getitem(self, key)

    monkeypatch.setattr(Dataset, "__getitem__", noted)
    trained = [ids.index(row) for rows in train(trainer).epochs() for row in rows]
    # With TRL before 1.7 what is trained on has masks in the place of labels.
    tokens = [key for columns, key in read if columns in (["input_ids", "labels"], ["input_ids", "completion_mask"])]
    assert [key for key in tokens if isinstance(key, slice)] == [slice(0, 24)] * 2  # the second time for the texts
    rows = [position for key in tokens if not isinstance(key, slice) for position in key]
    assert sorted(rows) == sorted(3 * list(range(24)) + trained)  # the scores of three epochs, and the training
    assert [key for columns, key in read if columns == ["row_id"]] == [slice(None)]


@pytest.fixture
def parts_of_five(monkeypatch):
    """Texts are decoded five rows at a time, in the place of a thousand."""
    segments = Pool.segments

    def of_five(self, size):
        assert size == 1000
        return segments(self, 5)

    monkeypatch.setattr(Pool, "segments", of_five)


def rows_of_each_decoding(monkeypatch):
    """A list that grows by the number of rows whenever texts of rows are decoded."""
    rows, decode = [], Decoder.__call__

    def counted(self, ids, bounds):
        rows.append(len(bounds) // 3)
        return decode(self, ids, bounds)

    monkeypatch.setattr(Decoder, "__call__", counted)
    return rows


@pytest.mark.usefixtures("parts_of_five")
def test_texts_are_decoded_and_written_part_by_part(tmp_path, monkeypatch):
    extra = {"note": [None] * 10 + ["late", "later"], "tags": [[i] * (i % 3) for i in range(12)], "number": [0.5] * 12}
    rows = text_rows(raw_rows(12))
    for name, values in extra.items():
        rows = rows.add_column(name, values)
    trainer = sft_trainer(tmp_path, rows, num_train_epochs=1)
    decoded = rows_of_each_decoding(monkeypatch)
    select(trainer, keep=4, max_ifd=INF)
    train(trainer)
    pool = History.load(tmp_path).pool()
    assert pool["row_id"].tolist() == rows["row_id"][:]
    assert pool["prompt"].tolist() == trainer.train_dataset["prompt"][:]
    assert pool["answer"].tolist() == trainer.train_dataset["completion"][:]
    assert pool["note"].isna().tolist() == [True] * 10 + [False] * 2
    assert pool["note"].tolist()[10:] == ["late", "later"]
    assert [list(value) for value in pool["tags"]] == extra["tags"]
    assert pool["number"].tolist() == extra["number"]
    assert "input_ids" not in pool
    assert decoded == [5, 5, 2]


def test_texts_of_rows_without_columns(tmp_path):
    rows = [{name: row[name] for name in ("input_ids", "labels")} for row in tokenised(sft_trainer(tmp_path, 6))]
    trainer = plain_trainer(tmp_path, rows, num_train_epochs=1)
    select(trainer, keep=4, max_ifd=INF)
    trainer.train()
    pool = History.load(tmp_path).pool()
    assert list(pool) == ["row_id", "prompt", "answer"]
    assert pool["answer"].tolist() == [row["output"] + "<|im_end|>" for row in raw_rows(6)]


# ---- the texts that are there ------------------------------------------------------------------------------------


def noted_rows(quality=("clean", "shuffled")):
    return text_rows(raw_rows(12)).add_column("quality", [*quality] * 6).add_column("key", list("abcdefghijkl"))


def texts_of_a_run(folder, rows, tokenizer=None, **options):
    """The file of the texts, with what the file system knows of it."""
    trainer = sft_trainer(folder, rows, num_train_epochs=1, tokenizer=tokenizer)
    select(trainer, keep=4, max_ifd=INF, **options)
    train(trainer)
    file = (folder / "ifd_history" / "pool.parquet").stat()
    return History.load(folder).pool(), (file.st_ino, file.st_mtime_ns)


@pytest.mark.usefixtures("parts_of_five")
def test_texts_that_are_there_and_right_are_not_written_again(tmp_path, monkeypatch):
    first, file = texts_of_a_run(tmp_path, noted_rows())
    decoded = rows_of_each_decoding(monkeypatch)
    again, same = texts_of_a_run(tmp_path, noted_rows())
    assert same == file
    assert decoded == [5]  # the first part, which is compared
    assert again.equals(first)


@pytest.mark.parametrize(
    "change",
    [
        {"rows": noted_rows(("clean", "other"))},
        {"rows": noted_rows().rename_column("quality", "label")},
        {"rows": noted_rows().select(range(11))},
        {"rows": noted_rows().select(range(11, -1, -1))},
        {"id_column": "key"},
    ],
    ids=["other_labels", "other_name", "fewer_rows", "other_order", "other_ids"],
)
def test_texts_of_other_rows_are_written_anew(tmp_path, change):
    _, file = texts_of_a_run(tmp_path, noted_rows())
    found, other = texts_of_a_run(tmp_path, **{"rows": noted_rows(), **change})
    expected, _ = texts_of_a_run(tmp_path / "fresh", **{"rows": noted_rows(), **change})
    assert other != file
    assert found.equals(expected)


def test_texts_of_another_tokenizer_are_written_anew(tmp_path):
    rows = tokenised(sft_trainer(tmp_path, 12))
    for tokenizer in (TOKENIZER, build_tokenizer(extra=("cat dog ball park red blue",) * 30)):
        trainer = plain_trainer(tmp_path, rows, num_train_epochs=1)
        trainer.processing_class = tokenizer
        callback = select(trainer, keep=4, max_ifd=INF)
        trainer.train()
        pairs = zip(callback.pool.tokens(), callback.pool.spans(np.arange(12)).tolist(), strict=True)
        expected = [tokenizer.decode(ids[start:end]) for (ids, _), (start, end) in pairs]
        assert History.load(tmp_path).pool()["answer"].tolist() == expected


@pytest.mark.parametrize("end", [-20, 9, 0])
def test_a_file_that_is_cut_off_is_written_anew(tmp_path, end):
    first, _ = texts_of_a_run(tmp_path, noted_rows())
    path = tmp_path / "ifd_history" / "pool.parquet"
    path.write_bytes(path.read_bytes()[:end])
    again, _ = texts_of_a_run(tmp_path, noted_rows())
    assert again.equals(first)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), pa.ArrowInvalid("of two types")], ids=str)
def test_a_run_goes_on_without_texts_that_cannot_be_written(tmp_path, monkeypatch, caplog, error):
    texts_of_a_run(tmp_path, noted_rows())

    trainer = sft_trainer(tmp_path, noted_rows().select(range(8)), num_train_epochs=1)
    select(trainer, keep=4, max_ifd=INF)

    write_table = pq.ParquetWriter.write_table

    def broken(self, table, *rest, **options):
        if "prompt" in table.column_names:  # the texts: of each epoch the numbers are written
            raise error
        write_table(self, table, *rest, **options)

    monkeypatch.setattr(pq.ParquetWriter, "write_table", broken)
    seen = train(trainer)
    assert [len(epoch) for epoch in seen.epochs()] == [4]
    assert f"could not be kept in {tmp_path / 'ifd_history' / 'pool.parquet'}: " in caplog.text
    assert f"{getattr(error, 'strerror', None) or error}. Training goes on" in caplog.text
    assert History.load(tmp_path).pool() is None  # and not that of the run before, whose rows are others
    assert sorted(path.name for path in (tmp_path / "ifd_history").iterdir()) == ["epoch-000.parquet", "history.json"]


def test_columns_of_some_rows_are_those_of_the_data_set():
    rows = many_rows(4)
    dataset = stored(rows).add_column("key", list("abcd")).add_column("other", [1, 2, 3, 4])
    columns = Pool(dataset).columns(1, 3, without=["other"])
    assert {name: values.to_pylist() for name, values in columns.items()} == {"key": ["b", "c"]}
    assert isinstance(columns["key"], pa.ChunkedArray)
    assert Pool(rows).columns(0, 4, without=[]) == {}
