"""Rows and targets are embedded as an independent loop does, in both engines, and the transform says how alike."""

from __future__ import annotations

import json
import math
import pickle

import numpy as np
import pytest
import torch
from conftest import build_model, build_tokenizer
from datasets import Dataset
from datasets.fingerprint import Hasher
from tiny_runs import raw_rows

from ifd_trainer import IFDScorer, TargetScorer
from ifd_trainer.data.formats import ALPACA, WIZARDLM
from ifd_trainer.scoring.losses import position_weighted_embeddings, prompt_features

TOKENIZER = build_tokenizer()
ENGINES = ["padded", "stream"]
TARGETS = [{"instruction": "Task 3: the red ball.", "output": "cat dog 3"}, {"instruction": "Why?", "output": ""}]


@pytest.fixture(scope="module")
def shared_model():
    return build_model(len(TOKENIZER))


def states(model, ids):
    """Last hidden states of a text alone, (T, H)."""
    with torch.no_grad():
        return model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0].double().numpy()


def by_position(model, ids):
    """Their mean with the weights 1, 2, ..., T, one token after another."""
    total = sum(t * state for t, state in enumerate(states(model, ids), start=1))
    return total / (len(ids) * (len(ids) + 1) / 2)


def cosine(one, other):
    return float(one @ other / math.sqrt((one @ one) * (other @ other)))


def tokens(row, format=ALPACA):
    example = format.render({"output": None, **row})
    return TOKENIZER(example.prompt + example.answer)["input_ids"]


# ---- embeddings -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("budget", [1, 40, 10_000])
def test_later_tokens_count_more(shared_model, engine, budget):
    rng = np.random.default_rng(0)
    beginning = rng.integers(5, 390, 12).tolist()  # what sequences share stands once in a stream
    sequences = [beginning + rng.integers(5, 390, size).tolist() for size in (1, 9, 3, 20)]
    sequences += [rng.integers(5, 390, 17).tolist(), [7], [7, 8], [], beginning]
    found = position_weighted_embeddings(shared_model, sequences, engine=engine, token_budget=budget)
    assert found.dtype == np.float32
    assert np.isnan(found[7]).all()
    for ids, embedding in zip(sequences, found, strict=True):
        if ids:
            np.testing.assert_allclose(embedding, by_position(shared_model, ids), rtol=1e-4, atol=1e-5)
    plain = prompt_features(shared_model, sequences[:1], engine=engine)[0][0]
    np.testing.assert_allclose(plain, states(shared_model, sequences[0]).mean(0), rtol=1e-4, atol=1e-5)
    assert np.abs(found[0] - plain).max() > 0.01


def test_the_weights_by_hand(shared_model):
    ids = [5, 6, 7]
    one, two, three = states(shared_model, ids)
    found = position_weighted_embeddings(shared_model, [ids])[0]
    np.testing.assert_allclose(found, one / 6 + two / 3 + three / 2, rtol=1e-4, atol=1e-5)


def test_the_head_reads_one_token_of_a_sequence(shared_model, monkeypatch):
    sequences, read, linear = [[5] * 30, [6] * 20, [7]], [], torch.nn.functional.linear
    position_weighted_embeddings(shared_model, sequences, token_budget=1000)  # what is tried out once is over
    memory = shared_model.lm_head.weight.untyped_storage().data_ptr()

    def noted(x, weight, bias=None):
        if weight.untyped_storage().data_ptr() == memory:
            read.append(x.shape[:-1].numel())
        return linear(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", noted)
    position_weighted_embeddings(shared_model, sequences, token_budget=1000)
    assert 3 <= sum(read) <= 4  # one may be left to the head's own call


def test_embeddings_need_hidden_states():
    model = build_model(400)
    model.get_output_embeddings = lambda: None
    with pytest.raises(ValueError, match="LlamaForCausalLM does not tell its output embeddings"):
        position_weighted_embeddings(model, [[1, 2]])


def test_a_bfloat16_model_is_averaged_in_float32():
    model = build_model(400).to(torch.bfloat16)
    ids = list(range(5, 60))
    expected = by_position(model.float(), ids)
    found = position_weighted_embeddings(model.to(torch.bfloat16), [ids])[0]
    assert cosine(found.astype(float), expected) > 0.999


# ---- the transform ----------------------------------------------------------------------------------------------


def expected_columns(model, rows, targets=TARGETS, format=ALPACA):
    """The highest cosine, and the number of its target, of each row; from single texts."""
    vectors = [by_position(model, tokens(target, format)) for target in targets]
    table = np.array([[cosine(by_position(model, tokens(row, format)), v) for v in vectors] for row in rows])
    return table.max(1), table.argmax(1)


def test_rows_say_how_alike_they_are_and_to_which_target(shared_model):
    rows = raw_rows(12, with_input=True)
    rows[4]["output"] = ""
    scored = Dataset.from_list(rows).map(TargetScorer(shared_model, TARGETS, TOKENIZER), batched=True, batch_size=5)
    answered = [i for i in range(12) if i != 4]
    similarity, like = expected_columns(shared_model, [rows[i] for i in answered])
    np.testing.assert_allclose(scored.select(answered)["target_similarity"][:], similarity, atol=1e-5)
    assert scored.select(answered)["target_row"][:] == like.tolist()
    assert len(set(like.tolist())) == 2  # both targets are most like some row
    assert (scored[4]["target_similarity"], scored[4]["target_row"]) == (None, None)
    assert scored["target_status"][:] == ["empty_answer" if i == 4 else "ok" for i in range(12)]
    kinds = {name: scored.features[name].dtype for name in ("target_similarity", "target_row", "target_status")}
    assert kinds == {"target_similarity": "float64", "target_row": "int64", "target_status": "string"}
    assert scored.column_names[:4] == ["row_id", "instruction", "input", "output"]


def test_a_batch_of_nulls_has_the_types_of_the_others(shared_model):
    rows = raw_rows(4)
    rows[0]["output"] = rows[1]["output"] = ""
    targets = [{**target, "id": name} for target, name in zip(TARGETS, ("first", "second"), strict=True)]
    scored = Dataset.from_list(rows).map(TargetScorer(shared_model, targets, TOKENIZER), batched=True, batch_size=2)
    assert scored["target_similarity"][:2] == [None, None]
    assert scored.features["target_row"].dtype == "string"
    assert set(scored["target_row"][2:]) <= {"first", "second"}


def test_a_target_in_the_pool_is_most_like_its_own_row(shared_model):
    rows = raw_rows(10)
    scored = Dataset.from_list(rows).map(TargetScorer(shared_model, rows[6:8], TOKENIZER), batched=True)
    assert np.argsort(scored["target_similarity"][:])[-2:].tolist() in ([6, 7], [7, 6])
    assert [scored[i]["target_row"] for i in (6, 7)] == [106, 107]
    np.testing.assert_allclose([scored[i]["target_similarity"] for i in (6, 7)], 1, atol=1e-6)


def test_targets_are_read_in_the_rows_format_where_they_have_its_columns(shared_model):
    rows, bare = raw_rows(6), [{"instruction": target["instruction"]} for target in TARGETS]
    scored = Dataset.from_list(rows).map(TargetScorer(shared_model, bare, TOKENIZER, format="wizardlm"), batched=True)
    similarity, _ = expected_columns(shared_model, rows, bare, WIZARDLM)  # questions alone
    np.testing.assert_allclose(scored["target_similarity"][:], similarity, atol=1e-5)
    scorer = TargetScorer(shared_model, bare, TOKENIZER, format="wizardlm", targets_format="alpaca")
    other = Dataset.from_list(rows).map(scorer, batched=True)
    vectors = [by_position(shared_model, tokens(target)) for target in bare]
    of_rows = [by_position(shared_model, tokens(row, WIZARDLM)) for row in rows]
    expected = [max(cosine(row, vector) for vector in vectors) for row in of_rows]
    np.testing.assert_allclose(other["target_similarity"][:], expected, atol=1e-5)


def test_targets_may_be_chats_where_rows_are_texts(shared_model, caplog):
    question = [{"role": "user", "content": "Add 12 and 30."}]
    chats = [{"messages": [*question, {"role": "assistant", "content": "42"}]}, {"messages": question}]
    rows = raw_rows(4)
    scored = Dataset.from_list(rows).map(TargetScorer(shared_model, chats, TOKENIZER, format="alpaca"), batched=True)
    written = "<|im_start|>user\nAdd 12 and 30.<|im_end|>\n<|im_start|>assistant\n"
    vectors = [by_position(shared_model, TOKENIZER(text)["input_ids"]) for text in (f"{written}42", written)]
    expected = [max(cosine(by_position(shared_model, tokens(row)), vector) for vector in vectors) for row in rows]
    np.testing.assert_allclose(scored["target_similarity"][:], expected, atol=1e-5)
    assert "does not have the usual format, and is read by its columns" in caplog.text


def test_long_rows_and_targets_are_cut_at_their_ends(shared_model):
    rows, long = raw_rows(3), [{"instruction": "Why? " * 60, "output": "cat"}]
    scored = Dataset.from_list(rows).map(TargetScorer(shared_model, long, TOKENIZER, max_length=60), batched=True)
    vector = by_position(shared_model, tokens(long[0])[:60])
    expected = [cosine(by_position(shared_model, tokens(row)[:60]), vector) for row in rows]
    np.testing.assert_allclose(scored["target_similarity"][:], expected, atol=1e-5)


def test_targets_that_cannot_be_read_are_counted_and_named(shared_model, caplog):
    targets = [TARGETS[0], {"instruction": ["a"], "output": "b"}, {"instruction": " ", "output": None}]
    rows = Dataset.from_list(raw_rows(3))
    scored = rows.map(TargetScorer(shared_model, targets, TOKENIZER), batched=True)
    assert (
        "2 of 3 rows of the target set cannot be read as 'alpaca': left out; the first one, row 1: exp" in caplog.text
    )
    assert scored["target_row"][:] == [0, 0, 0]
    with pytest.raises(ValueError, match="None of 2 rows of the target set can be read as 'alpaca'; the first one, ro"):
        TargetScorer(shared_model, targets[1:], TOKENIZER)(rows[:])


# ---- what tells it from others ----------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    build_model(len(TOKENIZER)).save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    (tmp_path / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in TARGETS))
    return tmp_path


def test_its_pickle_tells_targets_weights_and_options(folder):
    model, task = str(folder / "model"), str(folder / "task.jsonl")
    scorer = TargetScorer(model, task)
    first, rows = Hasher.hash(scorer), Dataset.from_list(raw_rows(3))
    scored = rows.map(scorer, batched=True)
    assert Hasher.hash(scorer) == first  # what was loaded and embedded meanwhile is not in it
    assert Hasher.hash(TargetScorer(model, task)) == first
    again = pickle.loads(pickle.dumps(scorer))
    assert rows.map(again, batched=True)["target_similarity"][:] == scored["target_similarity"][:]
    assert Hasher.hash(TargetScorer(model, task, max_length=99)) != first
    assert Hasher.hash(TargetScorer(model, task, targets_format="wizardlm")) != first
    (folder / "task.jsonl").write_text(json.dumps(TARGETS[0]) + "\n")
    assert Hasher.hash(TargetScorer(model, task)) != first
    (folder / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in TARGETS))
    build_model(len(TOKENIZER), seed=1).save_pretrained(folder / "model")
    assert Hasher.hash(TargetScorer(model, task)) != first


def test_workers_give_what_one_process_gives(folder):
    scorer = TargetScorer(str(folder / "model"), str(folder / "task.jsonl"))
    rows = Dataset.from_list(raw_rows(6))
    alone, shared = rows.map(scorer, batched=True), rows.map(scorer, batched=True, num_proc=2)
    np.testing.assert_allclose(shared["target_similarity"][:], alone["target_similarity"][:], atol=1e-6)
    assert shared["target_row"][:] == alone["target_row"][:]


@pytest.mark.parametrize(
    ("targets", "message"),
    [("", "A TargetSet needs a file"), ([], "The target set has no rows"), ("no.jsonl", "no.jsonl")],
)
def test_targets_that_are_not_there_are_said_at_once(shared_model, targets, message):
    with pytest.raises((ValueError, OSError), match=message):
        TargetScorer(shared_model, targets, TOKENIZER)


def test_an_empty_file_and_one_of_other_rows_are_said(shared_model, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"empty\.jsonl"):
        TargetScorer(shared_model, tmp_path / "empty.jsonl", TOKENIZER)
    (tmp_path / "other.jsonl").write_text('{"colour": "red"}\n')
    scorer = TargetScorer(shared_model, tmp_path / "other.jsonl", TOKENIZER)
    with pytest.raises(ValueError, match=r"The target set .*other\.jsonl cannot be read: "):
        scorer(Dataset.from_list(raw_rows(2))[:])


def test_it_reads_batches_of_rows_alone(shared_model):
    scorer, rows = TargetScorer(shared_model, TARGETS, TOKENIZER), Dataset.from_list(raw_rows(2))
    with pytest.raises(ValueError, match="TargetScorer scores batches: call"):
        rows.map(scorer)
    with pytest.raises(ValueError, match="TargetScorer reads the columns of its format itself"):
        rows.map(scorer, batched=True, input_columns=["output"])


def test_an_arrow_table_comes_back_with_the_same_columns_also_where_it_is_empty(shared_model):
    rows = raw_rows(5)
    rows[1]["output"] = ""
    scorer, rows = TargetScorer(shared_model, TARGETS, TOKENIZER), Dataset.from_list(rows)
    mapped, table = rows.map(scorer, batched=True), rows.with_format("arrow")[:]
    found = scorer(table)
    assert found.to_pylist() == mapped.to_list()
    assert scorer(found).to_pylist() == found.to_pylist()  # what it replaces is not there twice
    empty = TargetScorer(shared_model, TARGETS, TOKENIZER)(table.slice(0, 0))
    assert empty.schema.equals(found.schema)


def test_what_is_embedded_is_what_is_scored(shared_model):
    """The same tokens as those of IFDScorer: of prompt and answer, without the end of a turn."""
    said = {"role": "assistant", "content": "red"}
    chats = [{"messages": [{"role": "user", "content": f"Task {i}"}, said]} for i in (1, 2)]
    pairs = IFDScorer(shared_model, TOKENIZER).encode({"messages": [chat["messages"] for chat in chats]})
    vectors = [by_position(shared_model, pair.conditioned.ids) for pair in pairs]
    scored = Dataset.from_list(chats).map(TargetScorer(shared_model, chats[:1], TOKENIZER), batched=True)
    expected = [cosine(vector, vectors[0]) for vector in vectors]
    np.testing.assert_allclose(scored["target_similarity"][:], expected, atol=1e-5)
