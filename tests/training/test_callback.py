"""The callback: which rows it chooses and why, what it logs and writes down, and what it refuses."""

from __future__ import annotations

import json
import string
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import CORPUS, ROUNDING, build_model, build_tokenizer, reference_nll
from datasets import Dataset
from tiny_runs import (
    CHATS_READ,
    INF,
    MERGES_TRAINED,
    TOKENIZER,
    alpaca_rows,
    chat_rows,
    difference,
    model_with,
    plain_trainer,
    random_states,
    ratios,
    raw_rows,
    reference_scores,
    reference_top,
    select,
    selection_logs,
    sft_trainer,
    text_rows,
    tokenised,
    train,
    training_logs,
    weights_of,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast, TrainerCallback

from ifd_trainer import IFDScorer, IFDSelectionCallback
from ifd_trainer.method.selection import ShortfallError
from ifd_trainer.training.history import History


def trained_times(rows: pd.DataFrame) -> dict:
    """How often each row was trained on, by the history."""
    return {row.row_id: row.times for row in rows.itertuples() if row.times}


def counts(values) -> dict:
    found, times = np.unique(values, return_counts=True)
    return dict(zip(found.tolist(), times.tolist(), strict=True))


# ---- which rows -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0.25, 6, [8, 0.25, 3]], ids=str)
def test_the_highest_eligible_rows_of_each_epochs_own_model_are_trained(tmp_path, keep):
    trainer = sft_trainer(tmp_path, 24)
    select(trainer, keep=keep)
    seen = train(trainer)
    for epoch, rows in enumerate(seen.epochs()):
        budget = [8, 6, 3][epoch] if isinstance(keep, list) else 6
        scores = reference_scores(trainer, model_with(seen.weights[epoch]))
        assert len(rows) == budget
        assert set(rows) == set(reference_top(scores, budget))
        assert all(ratios(scores)[row] < 1 for row in rows)
    assert any(ratio >= 1 for ratio in ratios(reference_scores(trainer, model_with(seen.weights[0]))).values())


@pytest.mark.parametrize(("score", "max_ifd"), [("ifd_ppl", 1.0), ("ifd", 1.05), ("ifd", INF)])
def test_the_score_and_its_limit_can_be_chosen(tmp_path, score, max_ifd):
    trainer = sft_trainer(tmp_path, 24, num_train_epochs=1)
    select(trainer, keep=5, score=score, max_ifd=max_ifd)
    seen = train(trainer)
    scores = reference_scores(trainer, model_with(seen.weights[0]))
    values = {row: (np.exp(c - d) if score == "ifd_ppl" else c / d) for row, (c, d) in scores.items()}
    eligible = [row for row, value in values.items() if value < max_ifd]
    assert set(seen.order()) == set(sorted(eligible, key=values.get)[-5:])


def test_an_empty_completion_is_an_empty_answer_and_never_trained(tmp_path):
    raw = raw_rows(16)
    for i in (3, 7, 8):
        raw[i]["output"] = ""
    trainer = sft_trainer(tmp_path, text_rows(raw))
    callback = select(trainer, keep=16, max_ifd=INF)
    seen = train(trainer)
    empty = {103, 107, 108}
    for epoch, rows in enumerate(seen.epochs()):
        history = callback.history.rows(epoch).set_index("row_id")
        assert not empty & set(rows)
        assert len(rows) == 16  # three rows take the empty ones' places
        assert set(history.index[history["ifd_status"] == "empty_answer"]) == empty
        assert (history.loc[sorted(empty), "reason"] == "empty_answer").all()
        assert history.loc[sorted(empty), ["cas", "das", "ifd", "ifd_ppl"]].isna().all(axis=None)
        assert callback.history.epochs[epoch]["shortfall"] == 3


@CHATS_READ
def test_an_empty_assistant_turn_is_an_empty_answer_too(tmp_path):
    raw = raw_rows(12)
    raw[5]["output"] = ""
    trainer = sft_trainer(tmp_path, chat_rows(raw), num_train_epochs=1)
    callback = select(trainer, keep=11, max_ifd=INF)
    seen = train(trainer)
    assert set(seen.order()) == {row["row_id"] for row in raw} - {105}
    assert callback.history.epochs[0]["reasons"] == {"empty_answer": 1, "kept": 11}


def test_answers_with_too_few_tokens_are_not_scored(tmp_path):
    trainer = sft_trainer(tmp_path, 24, num_train_epochs=1)
    callback = select(trainer, keep=4, max_ifd=INF, min_answer_tokens=12)
    train(trainer)
    rows = callback.history.rows(0)
    answers = [sum(label != -100 for label in row["labels"]) - 1 for row in tokenised(trainer)]  # without EOS
    assert 4 < sum(count >= 12 for count in answers) < 24
    assert (rows["ifd_status"] == np.where(np.array(answers) < 12, "too_short", "ok")).all()
    assert (rows.loc[rows["times"] > 0, "ifd_status"] == "ok").all()


def test_rows_keep_their_ids_when_truncation_cuts_some_and_drops_others(tmp_path):
    raw = raw_rows(20)
    raw[2]["instruction"] *= 5  # the prompt alone fills max_length: TRL drops the row
    whole = {row["row_id"]: len(row["input_ids"]) for row in sft_trainer(tmp_path, text_rows(raw)).train_dataset}
    trainer = sft_trainer(tmp_path, text_rows(raw), max_length=34, num_train_epochs=1)
    left = [row["row_id"] for row in tokenised(trainer) if set(row["labels"]) != {-100}]  # TRL before 1.9 keeps the row
    assert left == [row["row_id"] for row in raw if row["row_id"] != 102]
    assert 0 < sum(length > 34 for length in whole.values()) - 1 < 18
    callback = select(trainer, keep=6)
    seen = train(trainer)
    scores = reference_scores(trainer, model_with(seen.weights[0]))
    assert set(seen.order()) == set(reference_top(scores, 6))
    history = callback.history.rows(0)
    assert history.loc[history["ifd_status"] != "empty_answer", "row_id"].tolist() == left


# ---- a shortfall ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def eligible(tmp_path_factory):
    """Of 24 rows, by descending score, those under the limit of 1 and those at or above it, before training."""
    trainer = sft_trainer(tmp_path_factory.mktemp("eligible"), 24)
    found = ratios(reference_scores(trainer, build_model(len(TOKENIZER))))
    ranked = sorted(found, key=found.get, reverse=True)
    under = [row for row in ranked if found[row] < 1]
    assert 3 < len(under) < 12
    return under, ranked[: -len(under)]


def test_a_shortfall_is_filled_with_evenly_repeated_rows(tmp_path, eligible):
    under, _ = eligible
    budget = 2 * len(under) + 3  # 24 rows at most
    trainer = sft_trainer(tmp_path, 24, num_train_epochs=1)
    callback = select(trainer, keep=budget, on_shortfall="repeat")
    seen = train(trainer)
    times = counts(seen.order())
    assert set(times) == set(under)
    assert sorted(times.values()) == [2] * (len(under) - 3) + [3] * 3
    assert trained_times(callback.history.rows(0)) == times
    record = callback.history.epochs[0]
    assert (record["budget"], record["kept"], record["eligible"]) == (budget, len(under), len(under))
    assert record["shortfall"] == budget - len(under)


def test_a_shortfall_is_relaxed_by_the_rows_nearest_to_the_limit(tmp_path, eligible):
    under, above = eligible
    trainer = sft_trainer(tmp_path, 24, num_train_epochs=1)
    callback = select(trainer, keep=len(under) + 3, on_shortfall="relax")
    seen = train(trainer)
    assert sorted(seen.order()) == sorted(under + above[-3:])
    rows = callback.history.rows(0)
    assert set(rows["row_id"][rows["reason"] == "kept_above_limit"]) == set(above[-3:])
    assert set(rows["row_id"][rows["reason"] == "above_limit"]) == set(above[:-3])


def test_a_shortfall_can_be_an_error(tmp_path, eligible):
    trainer = sft_trainer(tmp_path, 24)
    select(trainer, keep=len(eligible[0]) + 1, on_shortfall="error")
    with pytest.raises(
        ShortfallError, match=rf"{len(eligible[0]) + 1} rows are to be kept, but only {len(eligible[0])}"
    ):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("on_shortfall", ["repeat", "relax"])
def test_what_fills_a_shortfall_is_the_same_for_the_same_seed(tmp_path, on_shortfall):
    orders = []
    for _ in range(2):
        trainer = sft_trainer(tmp_path, 24, num_train_epochs=2)
        select(trainer, keep=20, on_shortfall=on_shortfall, seed=3)
        orders.append(train(trainer).order())
    assert orders[0] == orders[1]


# ---- the same scores as the transform ---------------------------------------------------------------------------

# A turn and its end of turn are inside the mark, the line break after it is not.
GENERATION_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MERGING = build_tokenizer(extra=('### Response:"Yes."',) * 40)


def metaspace_tokenizer():
    """A tokenizer that puts a space before a text, as SentencePiece does: a header alone begins with another token."""
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="first"), pre_tokenizers.Punctuation()]
    )
    inner.decoder = decoders.Metaspace()
    special = ["<|endoftext|>", "<unk>", "<|im_end|>", "<s>"]
    letters = list(string.printable)
    inner.train_from_iterator(
        CORPUS * 3, BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=letters, show_progress=False)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token="<unk>"
    )


def raw_and_prepared(kind):
    """(rows for the transform, its format, rows for the trainer, tokenizer)."""
    raw = raw_rows(15, with_input=True, quotes=True)
    if kind == "chat":
        return chat_rows(raw), None, chat_rows(raw), TOKENIZER
    if kind == "messages":
        tokenizer = build_tokenizer()
        tokenizer.chat_template = GENERATION_TEMPLATE
        turns = [{"role": "user", "content": "The cat?"}, {"role": "assistant", "content": "The dog sat."}]
        rows = chat_rows(raw).map(
            lambda row: {"messages": [*turns[: row["row_id"] % 3], *row["prompt"], *row["completion"]]},
            remove_columns=["prompt", "completion"],
        )
        return rows, None, rows, tokenizer
    tokenizer = {
        "alpaca": TOKENIZER,
        "alpaca_merging": MERGING,
        "alpaca_bos": build_tokenizer(add_bos=True),
        "alpaca_metaspace": metaspace_tokenizer(),
    }[kind]
    return Dataset.from_list(raw), "alpaca", alpaca_rows(raw), tokenizer


@pytest.mark.parametrize(
    "kind",
    [
        "alpaca",
        pytest.param("alpaca_merging", marks=MERGES_TRAINED),
        "alpaca_bos",
        "alpaca_metaspace",
        pytest.param("chat", marks=CHATS_READ),
        "messages",
    ],
)
def test_scores_in_the_loop_are_those_of_the_transform(tmp_path, kind):
    raw, format, rows, tokenizer = raw_and_prepared(kind)
    model = build_model(len(tokenizer))
    turns = "tokens" if kind == "messages" else None  # the loop scores all answers that it trains on
    scorer = IFDScorer(build_model(len(tokenizer)), tokenizer, format=format, turns=turns)
    expected = raw.map(scorer, batched=True, batch_size=7).to_pandas()
    trainer = sft_trainer(
        tmp_path, rows, model=model, tokenizer=tokenizer, num_train_epochs=1, assistant_only_loss=kind == "messages"
    )
    callback = select(trainer, keep=5, max_ifd=INF)
    train(trainer)
    found = callback.history.rows(0)
    assert found["row_id"].tolist() == expected["row_id"].tolist()
    assert (found["ifd_status"] == "ok").all()
    assert found["answer_tokens"].tolist() == expected["answer_tokens"].tolist()
    assert found["eot_loss"].notna().all()
    for column in ("cas", "das", "ifd", "ifd_ppl", "eot_loss"):
        assert found[column].to_numpy() == pytest.approx(expected[column].to_numpy(), abs=1e-5)


def test_what_ends_a_turn_is_scored_but_for_rows_that_the_trainer_cut(tmp_path):
    trainer = sft_trainer(tmp_path, num_train_epochs=1, max_length=32)
    rows = tokenised(trainer)
    cut = [len(ids) == 32 and ids[-1] != TOKENIZER.eos_token_id for ids in rows["input_ids"]]
    assert 0 < sum(cut) < len(rows)
    expected = [
        np.nan if was_cut else reference_nll(build_model(len(TOKENIZER)), ids, len(ids) - 1)
        for ids, was_cut in zip(rows["input_ids"], cut, strict=True)
    ]
    callback = select(trainer, keep=4, max_ifd=INF)
    train(trainer)
    found = callback.history.rows(0).set_index("row_id")["eot_loss"][list(rows["row_id"])]
    np.testing.assert_allclose(found, expected, rtol=ROUNDING)


def test_a_row_without_an_end_of_turn_is_scored_as_if_eos_followed(tmp_path):
    whole = tokenised(sft_trainer(tmp_path / "whole"))
    bare = whole.map(lambda row: {name: row[name][:-1] for name in ("input_ids", "labels")})
    losses = []
    for rows in (whole, bare):
        trainer = plain_trainer(tmp_path / "run", rows, num_train_epochs=1)
        callback = select(trainer, keep=4, max_ifd=INF)
        train(trainer)
        losses.append(callback.history.rows(0)["eot_loss"])
    np.testing.assert_allclose(losses[0], losses[1], rtol=ROUNDING)


def test_a_quote_does_merge_with_the_colon_before_it():
    assert MERGING.tokenize('### Response:"Yes') != [*MERGING.tokenize("### Response:"), *MERGING.tokenize('"Yes')]


@MERGES_TRAINED
def test_rows_whose_boundary_tokens_merge_are_selected_by_the_reference_too(tmp_path):
    raw = raw_rows(18, quotes=True)
    model = build_model(len(MERGING))
    trainer = sft_trainer(tmp_path, text_rows(raw), model=model, tokenizer=MERGING, num_train_epochs=1)
    scores = reference_scores(trainer, build_model(len(MERGING)))
    callback = select(trainer, keep=6)
    seen = train(trainer)
    assert set(seen.order()) == set(reference_top(scores, 6))
    for row in callback.history.rows(0).itertuples():
        assert (row.cas, row.das) == pytest.approx(scores[row.row_id], rel=ROUNDING)


def test_a_header_of_ones_own_precedes_the_direct_answer(tmp_path):
    raw = raw_rows(12)
    rows = text_rows(raw).map(lambda row: {"prompt": row["prompt"].replace("### Response:", "### Answer:")})
    trainer = sft_trainer(tmp_path, rows, num_train_epochs=1)
    callback = select(trainer, keep=4, max_ifd=INF, header="Answer:")
    seen = train(trainer)
    assert callback.history.settings["direct_prefix"] == "Answer:"
    header = TOKENIZER("Answer:")["input_ids"]
    model = model_with(seen.weights[0])
    for row, tokens in zip(callback.history.rows(0).itertuples(), tokenised(trainer), strict=True):
        answer = [label for label in tokens["labels"] if label != -100][:-1]
        assert row.das == pytest.approx(reference_nll(model, header + answer, len(header)), rel=ROUNDING)


# ---- no trace ---------------------------------------------------------------------------------------------------


class Look(TrainerCallback):
    """Notes what `look` returns at the start of each epoch."""

    def __init__(self, look):
        self.look, self.notes = look, []

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.notes.append(self.look())


def around(trainer, look, **options):
    """What `look` returns before and after each selection."""

    class After(Look):
        pass

    before, after = Look(look), After(look)
    trainer.add_callback(before)
    select(trainer, **options)
    trainer.add_callback(after)
    trainer.train()
    assert len(before.notes) == len(after.notes) == 3
    return before.notes, after.notes


def draw(module, inputs):
    torch.rand(1)


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_the_global_random_states_are_untouched(tmp_path, strategy):
    trainer = sft_trainer(
        tmp_path, 12, model=build_model(len(TOKENIZER), attention_dropout=0.1), train_sampling_strategy=strategy
    )
    trainer.model.model.norm.register_forward_pre_hook(draw)  # some models draw in eval mode too
    before, after = around(trainer, random_states, keep=11)  # a shortfall: repeats are drawn
    assert before == after
    assert before[0] != before[1]  # the training itself draws


def test_every_module_keeps_its_own_mode(tmp_path):
    trainer = sft_trainer(tmp_path, 12)

    class Freeze(TrainerCallback):
        def on_epoch_begin(self, args, state, control, **kwargs):
            trainer.model.train(state.global_step != 4)  # one epoch begins in eval mode
            trainer.model.model.layers[0].eval()

    trainer.add_callback(Freeze())
    before, after = around(trainer, lambda: [module.training for module in trainer.model.modules()], keep=8)
    assert before == after
    assert all(len(set(modes)) == 2 for modes in before if modes[0])
    assert any(not modes[0] for modes in before)


def test_weights_and_gradients_are_untouched(tmp_path):
    trainer = sft_trainer(tmp_path, 12)
    before, after = around(trainer, lambda: weights_of(trainer.model), keep=8)
    assert [difference(one, other) for one, other in zip(before, after, strict=True)] == [0.0] * 3


def test_selections_are_logged_beside_the_trainers_own_metrics(tmp_path):
    trainer = sft_trainer(tmp_path, 12, logging_steps=3)
    callback = select(trainer, keep=8)
    train(trainer)
    entries = trainer.state.log_history
    assert "loss" in entries[0]  # the first entry stays the script's own, and has the first selection with it
    assert [(entry["step"], entry["epoch"]) for entry in selection_logs(trainer)] == [(3, 0.75), (4, 1), (8, 2)]
    for entry, record in zip(selection_logs(trainer), callback.history.epochs, strict=True):
        names = {name.removeprefix("ifd/"): value for name, value in entry.items() if name.startswith("ifd/")}
        assert names == {name: record[name] for name in names}
        assert names.keys() >= {"pool", "eligible", "kept", "cut", "mean_kept", "mean_dropped", "shortfall"}
        assert not {"entropy", "mean_token_accuracy", "num_tokens"} & entry.keys() or entry is entries[0]
    for entry in training_logs(trainer):
        assert {"entropy", "mean_token_accuracy", "num_tokens"} <= entry.keys()
    tokens = [entry["num_tokens"] for entry in entries if "num_tokens" in entry]
    assert tokens == sorted(tokens)


# ---- the history ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run with unscorable rows: its trainer, its callback, and what was seen."""
    raw = raw_rows(24)
    raw[4]["output"] = ""
    trainer = sft_trainer(tmp_path_factory.mktemp("finished"), text_rows(raw), learning_rate=1e-3)
    callback = select(trainer, keep=[8, 0.25, 7])
    return trainer, callback, train(trainer)


def test_a_parquet_file_of_each_epoch_says_what_was_measured_and_decided(finished):
    trainer, _, seen = finished
    history = History.load(trainer.args.output_dir)
    for epoch, rows in enumerate(seen.epochs()):
        table = history.rows(epoch)
        assert table.columns.tolist() == [
            "row_id", "cas", "das", "ifd", "ifd_ppl", "eot_loss", "answer_tokens", "ifd_status", "scored_at", "reason",
            "times",
        ]  # fmt: skip
        assert table["row_id"].tolist() == trainer.train_dataset["row_id"][:]
        assert trained_times(table) == dict.fromkeys(rows, 1)
        ok = table[table["ifd_status"] == "ok"]
        assert (ok["scored_at"] == epoch).all()
        assert ok["ifd"].to_numpy() == pytest.approx((ok["cas"] / ok["das"]).to_numpy())
        assert ok["ifd_ppl"].to_numpy() == pytest.approx(np.exp(ok["cas"] - ok["das"]).to_numpy())
        assert (table["reason"][table["ifd"] >= 1] == "above_limit").all()
        assert (table["reason"] == "kept").tolist() == (table["times"] == 1).tolist()


def test_the_counts_by_reason_add_up_to_the_pool(finished):
    trainer, callback, _ = finished
    for epoch, record in zip(range(3), History.load(trainer.args.output_dir).epochs, strict=True):
        assert sum(record["reasons"].values()) == record["pool"] == 24
        assert record["reasons"] == counts(callback.history.rows(epoch)["reason"])
        assert record["reasons"]["empty_answer"] == 1
        assert record["reasons"]["kept"] == record["kept"] == [8, 6, 7][epoch]
        assert record["reasons"]["kept"] + record["reasons"].get("below_cut", 0) == record["eligible"]


def test_the_records_sum_up_each_epoch(finished):
    trainer, _, seen = finished
    history = History.load(trainer.args.output_dir)
    epochs = [set(rows) for rows in seen.epochs()]
    for epoch, record in enumerate(history.epochs):
        values = history.rows(epoch).set_index("row_id")["ifd"]
        kept, dropped = values[sorted(epochs[epoch])], values[~values.index.isin(epochs[epoch])]
        assert record["epoch"] == epoch
        assert record["step"] == [0, 4, 7][epoch]
        assert record["cut"] == pytest.approx(kept.min())
        assert record["mean_kept"] == pytest.approx(kept.mean())
        assert record["mean_dropped"] == pytest.approx(dropped.mean())
        assert record["seconds_scoring"] > 0
        assert record["seconds_training"] > 0
    overlaps = [None, *(len(a & b) / len(b) for a, b in pairwise(epochs))]
    assert [record["overlap"] for record in history.epochs] == overlaps
    assert any(0 < overlap < 1 for overlap in overlaps[1:])


def test_the_settings_say_how_the_run_was_planned(finished):
    _, callback, _ = finished
    settings = json.loads((callback.history.folder / "history.json").read_text(encoding="utf-8"))["settings"]
    assert settings["direct_prefix"] == "### Response:"
    assert settings["pool"] == 24
    assert settings["max_steps"] == 11
    assert [(plan["budget"], plan["updates"]) for plan in settings["plan"]] == [(8, 4), (6, 3), (7, 4)]
    assert (settings["seed"], settings["max_ifd"], settings["score"]) == (42, 1.0, "ifd")


def test_the_pools_texts_are_kept_for_reports(finished):
    trainer, callback, _ = finished
    pool = callback.history.pool()
    assert pool["row_id"].tolist() == [row["row_id"] for row in raw_rows(24)]
    assert pool["prompt"].tolist() == trainer.train_dataset["prompt"][:]
    assert pool["answer"].tolist() == trainer.train_dataset["completion"][:]


@pytest.mark.parametrize(
    ("columns", "id_column", "expected"),
    [
        ({"row_id": [f"r{i}" for i in range(12)]}, None, [f"r{i}" for i in range(12)]),
        ({"id": list(range(50, 62))}, None, list(range(50, 62))),
        ({"id": [0] * 12, "key": list("abcdefghijkl")}, "key", list("abcdefghijkl")),
        ({}, None, list(range(12))),
    ],
    ids=["row_id", "id", "id_column", "position"],
)
def test_rows_are_named_by_their_ids(tmp_path, columns, id_column, expected):
    rows = text_rows(raw_rows(12)).remove_columns("row_id")
    for name, values in columns.items():
        rows = rows.add_column(name, values)
    trainer = sft_trainer(tmp_path, rows, num_train_epochs=1)
    callback = select(trainer, keep=4, id_column=id_column)
    train(trainer)
    assert callback.history.rows(0)["row_id"].tolist() == expected
    assert callback.history.pool()["row_id"].tolist() == expected


def test_a_new_run_in_the_same_folder_begins_a_new_history(tmp_path):
    for epochs in (3, 1):
        trainer = sft_trainer(tmp_path, 12, num_train_epochs=epochs)
        select(trainer, keep=4)
        train(trainer)
    history = History.load(tmp_path)
    assert [record["epoch"] for record in history.epochs] == [0]
    assert history.settings["max_steps"] == 2


def test_an_evaluation_after_training_is_none_of_the_last_epochs(tmp_path):
    trainer = sft_trainer(tmp_path, 12, eval_dataset=text_rows(raw_rows(4, seed=9)), eval_strategy="epoch")
    callback = select(trainer, keep=4)
    train(trainer)
    losses = [record["eval_loss"] for record in callback.history.epochs]
    for prefix in ("eval", "test"):
        trainer.evaluate(trainer.eval_dataset.select(range(2)), metric_key_prefix=prefix)
    assert trainer.state.log_history[-2]["eval_loss"] not in losses
    assert [record["eval_loss"] for record in History.load(tmp_path).epochs] == losses
    assert len(set(losses)) == 3


# ---- warnings ---------------------------------------------------------------------------------------------------


def test_many_scores_of_one_and_more_are_warned_about(tmp_path, caplog):
    trainer = sft_trainer(tmp_path, 24, num_train_epochs=1)
    callback = select(trainer, keep=2, max_ifd=INF, warn_share=0.05)
    trainer.train()
    share = 100 * (callback.history.rows(0)["ifd"] >= 1).mean()
    assert f"{share:.0f} % of 24 scored rows have ifd >= 1" in caplog.text


def test_a_shortfall_is_warned_about(tmp_path, caplog):
    trainer = sft_trainer(tmp_path, 24, num_train_epochs=1)
    callback = select(trainer, keep=24)
    trainer.train()
    eligible = callback.history.epochs[0]["eligible"]
    assert f"24 rows are planned, {eligible} are eligible; {24 - eligible} were filled" in caplog.text


# ---- errors before the first step -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (0, "got 0"),
        (-3, "got -3"),
        (0.0, "got 0.0"),
        (1.5, "got 1.5"),
        (True, "got True"),
        ("10%", "got '10%'"),
        ([0.5, 2.0], "got 2.0"),
        ([], "empty list"),
    ],
)
def test_an_invalid_keep_is_refused(tmp_path, keep, message):
    trainer = sft_trainer(tmp_path, 4)
    with pytest.raises(ValueError, match=message):
        IFDSelectionCallback(trainer, keep=keep)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": "random"}, "order must be 'shuffle', 'descending' or 'ascending', got 'random'"),
        ({"score": "loss"}, "score must be one of cas, .*, a column of the training set .*, got 'loss'"),
        ({"on_shortfall": "fill"}, "on_shortfall must be 'repeat', 'relax' or 'error', got 'fill'"),
        ({"max_ifd": 0}, "max_ifd must be positive, got 0"),
        ({"max_ifd": "1"}, "max_ifd must be positive, got '1'"),
        ({"max_ifd": float("nan")}, "max_ifd must be positive, got nan"),
        (
            {"scorer": lambda rows: rows},
            "scorer must be a model's name or path, a loaded model, 'columns' or None",
        ),
        ({"scorer": 3}, "scorer must be .* got 3"),
        ({"embedder": 3, "diverse": 0.2}, "embedder must be the name of a model, an IFDScorer or None, got 3"),
        ({"header": 3}, "header must be the text that precedes an answer, or None, got 3"),
        ({"seed": "a"}, "seed must be a whole number of at least 0, or None for the trainer's, got 'a'"),
        ({"seed": 1.5}, "seed must be a whole number .* got 1.5"),
        ({"seed": -1}, "seed must be a whole number .* got -1"),
        ({"warn_share": "x"}, "warn_share must be a share from 0 to 1, got 'x'"),
        ({"token_budget": -1}, "token_budget must be a whole number of at least 1, got -1"),
        ({"warmup": "kmeans", "warmup_epochs": 1}, r"warmup must be a Brief, such as Brief\('kmeans'\), or None"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_invalid_option_is_refused(tmp_path, options, message):
    trainer = sft_trainer(tmp_path, 4)
    with pytest.raises(ValueError, match=message):
        IFDSelectionCallback(trainer, **options)


@pytest.mark.parametrize("trainer", [None, "trainer"])
def test_a_callback_without_a_trainer_is_refused(trainer):
    with pytest.raises(TypeError, match=r"IFDSelectionCallback\(trainer, ...\), got "):
        IFDSelectionCallback(trainer)


def test_a_callback_made_without_arguments_names_what_is_missing():
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'trainer'"):
        IFDSelectionCallback()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"train_sampling_strategy": "batch_rebalance"}, "'batch_rebalance' orders rows by itself"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches=True sends batches from one process"),
        ({"packing": True, "packing_strategy": "wrapped"}, "packing_strategy='wrapped' cuts .* or packing=False"),
    ],
    ids=["batch_rebalance", "dispatch_batches", "wrapped"],
)
def test_a_configuration_that_cannot_be_exact_is_refused(tmp_path, config, message):
    trainer = sft_trainer(tmp_path, 8, **config)
    with pytest.raises(ValueError, match=message):
        IFDSelectionCallback(trainer, keep=0.5)


def test_a_configuration_that_changed_after_the_callback_was_made_is_refused(tmp_path):
    trainer = sft_trainer(tmp_path, 8)
    select(trainer, keep=0.5)
    trainer.args.train_sampling_strategy = "batch_rebalance"
    with pytest.raises(ValueError, match="'batch_rebalance' orders rows by itself"):
        trainer.train()


def test_a_streaming_data_set_is_refused(tmp_path):
    trainer = sft_trainer(tmp_path, text_rows(raw_rows(8)).to_iterable_dataset(), max_steps=2)
    with pytest.raises(ValueError, match="needs a data set with a length, got a streaming one"):
        IFDSelectionCallback(trainer)


def test_a_data_set_exchanged_for_a_streaming_one_is_refused(tmp_path):
    trainer = sft_trainer(tmp_path, 8, max_steps=2)
    select(trainer, keep=0.5)
    trainer.train_dataset = tokenised(trainer).to_iterable_dataset()
    with pytest.raises(ValueError, match="does not use the selection's sampler: it comes from a streaming data set"):
        trainer.train()


def test_a_train_loader_of_ones_own_is_refused(tmp_path):
    trainer = sft_trainer(tmp_path, 8)
    select(trainer, keep=0.5)
    rows = tokenised(trainer).remove_columns("row_id")
    trainer.get_train_dataloader = lambda: DataLoader(rows, batch_size=2, collate_fn=trainer.data_collator)
    with pytest.raises(ValueError, match="from a get_train_dataloader of your own"):
        trainer.train()


@pytest.mark.parametrize(
    ("size", "what"), [("tp", "tensor parallelism"), ("cp", "context parallelism"), ("sp", "sequence parallelism")]
)
def test_processes_that_share_a_row_are_refused(tmp_path, size, what):
    trainer = sft_trainer(tmp_path, 8)
    setattr(trainer, f"get_{size}_size", lambda: 2)
    with pytest.raises(ValueError, match=f"this run has {what} over 2 processes.*Use data parallelism"):
        IFDSelectionCallback(trainer)


def test_fsdp_through_xla_is_refused(tmp_path):
    trainer = sft_trainer(tmp_path, 8)
    trainer.is_fsdp_xla_enabled = True
    with pytest.raises(ValueError, match="FSDP through XLA is not supported"):
        IFDSelectionCallback(trainer)


def test_a_trainer_without_a_training_set_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no train_dataset to select from"):
        IFDSelectionCallback(plain_trainer(tmp_path, None))


def test_a_trainer_without_a_tokenizer_is_refused(tmp_path):
    trainer = plain_trainer(tmp_path, [{"input_ids": [5, 6], "labels": [-100, 6]}])
    trainer.processing_class = None
    with pytest.raises(ValueError, match="pass processing_class=tokenizer to the trainer"):
        IFDSelectionCallback(trainer)


def test_a_data_set_without_tokens_is_refused(tmp_path):
    trainer = plain_trainer(tmp_path, Dataset.from_list([{"text": "a"}] * 4))
    with pytest.raises(ValueError, match="Selection reads input_ids, but the prepared training set has"):
        select(trainer, keep=2)


def test_a_budget_below_one_batch_with_drop_last_is_refused(tmp_path):
    trainer = sft_trainer(tmp_path, 8, dataloader_drop_last=True)
    select(trainer, keep=[4, 1])
    with pytest.raises(ValueError, match="Epoch 1 is planned with 1 row, fewer than one global batch"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_first_budget_below_one_batch_with_drop_last_is_refused(tmp_path):
    trainer = sft_trainer(tmp_path, 8, dataloader_drop_last=True, per_device_train_batch_size=4)
    select(trainer, keep=3)
    with pytest.raises(ValueError, match="Epoch 0 is planned with 3 rows, fewer than one global batch"):
        trainer.train()


def test_a_data_set_without_a_prompt_boundary_is_refused(tmp_path):
    rows = Dataset.from_list([{"text": row["instruction"] + row["output"]} for row in raw_rows(8)])
    trainer = sft_trainer(tmp_path, rows)
    with pytest.raises(ValueError, match="No row of the training set has a prompt that is masked out, and no known"):
        select(trainer, keep=0.5)
    trainer.train()  # as without a callback
    assert trainer.state.global_step == 12


@pytest.mark.parametrize("attached", [False, True], ids=["plain", "attached"])
def test_a_callback_made_for_another_trainer_is_refused(tmp_path, attached):
    trainer = sft_trainer(tmp_path, 8)
    if attached:
        IFDSelectionCallback(trainer, keep=0.5)
    trainer.add_callback(IFDSelectionCallback(sft_trainer(tmp_path, 8), keep=0.5))
    with pytest.raises(ValueError, match="was made for another trainer"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_two_callbacks_are_refused(tmp_path):
    trainer = sft_trainer(tmp_path, 8)
    select(trainer, keep=0.5)
    select(trainer, keep=0.5)
    with pytest.raises(ValueError, match="follows one selection callback, found 2"):
        trainer.train()


def test_more_rows_than_the_pool_has_are_refused(tmp_path):
    trainer = sft_trainer(tmp_path, 8)
    select(trainer, keep=[4, 9])
    with pytest.raises(ValueError, match="keep=9 rows were asked for, but the pool has only 8"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_duplicate_ids_in_a_named_column_are_refused(tmp_path):
    rows = text_rows(raw_rows(8)).remove_columns("row_id").add_column("key", [1, 2, 3, 4, 5, 6, 7, 1])
    trainer = sft_trainer(tmp_path, rows)
    select(trainer, keep=4, id_column="key")
    with pytest.raises(ValueError, match="'key', named with id_column, cannot tell rows apart: 1 of 8 values"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_an_unknown_id_column_is_refused(tmp_path):
    trainer = sft_trainer(tmp_path, 8)
    select(trainer, keep=4, id_column="key")
    with pytest.raises(ValueError, match=r"There is no column 'key' of row ids \(id_column\)"):
        trainer.train()
    assert trainer.state.global_step == 0
