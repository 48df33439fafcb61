"""A run whose rows are those most like a target set: by an independent loop, resumed exactly, without scoring."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from conftest import build_model
from tiny_runs import (
    INF,
    TOKENIZER,
    Stop,
    chat_rows,
    difference,
    model_with,
    raw_rows,
    reference_scores,
    select,
    sft_trainer,
    text_rows,
    tokenised,
    train,
    weights_of,
)

from ifd_trainer import Guard, IFDScorer, TargetSet, write_report
from ifd_trainer.data.formats import WIZARDLM
from ifd_trainer.training.history import History

TARGETS = raw_rows(3, seed=9)  # without an answer, as a question alone, is the last one
TARGETS[2]["output"] = ""
POLICY = TargetSet(TARGETS, format="wizardlm")


def vector(model, ids):
    """Mean of a text's last hidden states with the weights 1, 2, ..., T."""
    with torch.no_grad():
        states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0].double().numpy()
    return np.average(states, axis=0, weights=np.arange(1, len(ids) + 1))


def reference_cosines(trainer, model, targets=TARGETS):
    """Cosines of the rows as they are trained on, without TRL's end-of-turn token, with the targets: by row id."""
    texts = [WIZARDLM.render(target) for target in targets]
    of = [vector(model, TOKENIZER(text.prompt + text.answer)["input_ids"]) for text in texts]
    found = {}
    for row in tokenised(trainer):
        ids = row["input_ids"][: -1 if row["input_ids"][-1] == TOKENIZER.eos_token_id else None]
        x = vector(model, ids)
        found[row["row_id"]] = [float(x @ y / math.sqrt((x @ x) * (y @ y))) for y in of]
    return found


def in_turn(cosines, budget):
    """What the targets take, one after another."""
    left, taken = dict(cosines), []
    for turn in range(budget):
        taken.append(max(left, key=lambda row: left[row][turn % len(left[row])]))
        del left[taken[-1]]
    return taken


def not_to_be_scored(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("a score, though nothing reads it")

    for name in ("score_pairs", "nll_with_tails", "prompt_features"):
        monkeypatch.setattr(f"ifd_trainer.training.pool_scorer.{name}", refuse)


# ---- what is trained on -----------------------------------------------------------------------------------------


def test_each_epoch_trains_on_the_rows_that_targets_take_by_the_model_as_it_is(tmp_path, monkeypatch):
    not_to_be_scored(monkeypatch)
    trainer = sft_trainer(tmp_path, 24)
    callback = select(trainer, keep=[8, 6, 10], policy=POLICY)
    seen = train(trainer)
    for epoch, rows in enumerate(seen.epochs()):
        cosines = reference_cosines(trainer, model_with(seen.weights[epoch]))
        budget = [8, 6, 10][epoch]
        assert sorted(rows) == sorted(in_turn(cosines, budget))
        record, table = callback.history.epochs[epoch], callback.history.rows(epoch).set_index("row_id")
        assert record["reasons"] == {"kept": budget, "less_like_targets": 24 - budget}
        assert record["scored_at"] is None
        highest = {row: max(values) for row, values in cosines.items()}
        np.testing.assert_allclose(table["target_similarity"], [highest[row] for row in table.index], atol=1e-5)
        assert table["target_row"].tolist() == [TARGETS[int(np.argmax(cosines[row]))]["row_id"] for row in table.index]
    page = write_report(callback.history).read_text(encoding="utf-8")
    assert "other rows are more like the targets" in page


def test_a_limit_on_ifd_is_scored_and_comes_first(tmp_path):
    trainer = sft_trainer(tmp_path, 24, num_train_epochs=1)
    model = build_model(len(TOKENIZER))
    ifd = {row: cas / das for row, (cas, das) in reference_scores(trainer, model).items()}
    limit = float(np.median(list(ifd.values())))
    callback = select(trainer, keep=5, policy=TargetSet(TARGETS, "wizardlm", max_ifd=limit))
    seen = train(trainer)
    below = {row: values for row, values in reference_cosines(trainer, model).items() if ifd[row] < limit}
    assert sorted(seen.epochs()[0]) == sorted(in_turn(below, 5))
    reasons = callback.history.epochs[0]["reasons"]
    assert reasons == {"above_limit": 24 - len(below), "kept": 5, "less_like_targets": len(below) - 5}


def test_guards_hold_rows_back_from_the_targets(tmp_path):
    rows = raw_rows(24)
    rows += [{**rows[0], "row_id": 200}, {**rows[1], "row_id": 201}]
    trainer = sft_trainer(tmp_path, text_rows(rows), num_train_epochs=1)
    guard = Guard(limit=None, pairing=None, unfinished=None, freeze=None, on_misaligned="warn")
    callback = select(trainer, keep=20, policy=POLICY, guard=guard)
    trainer.train()
    table = callback.history.rows(0)
    assert table["reason"].value_counts().to_dict() == {"kept": 20, "less_like_targets": 4, "duplicate": 2}
    assert table["ifd"].notna().all()  # a guard reads scores


def test_packed_rows_are_filled_with_what_targets_take(tmp_path, monkeypatch):
    not_to_be_scored(monkeypatch)
    trainer = sft_trainer(tmp_path, 24, packing=True, max_length=128, num_train_epochs=1)
    callback = select(trainer, keep=2, policy=POLICY)
    single = sft_trainer(tmp_path / "single", 24)
    cosines = reference_cosines(single, build_model(len(TOKENIZER)))
    trainer.train()
    table = callback.history.rows(0)
    kept = table["row_id"][table["reason"] == "kept"]
    # Rows are known by their positions in what was packed: of these the targets took some first ones.
    [known] = callback.chooser.state.columns(callback.scores, scored_at=0).values()
    values = {row: known[row].tolist() for row in range(24)}
    assert sorted(map(max, values.values())) == pytest.approx(sorted(map(max, cosines.values())), abs=1e-5)
    assert sorted(kept) == sorted(in_turn(values, len(kept)))
    assert len(kept) > 2
    assert callback.history.epochs[0]["packed_rows"] == 2


def test_chats_are_held_against_targets_without_an_answer(tmp_path):
    rows = chat_rows(raw_rows(12))
    trainer = sft_trainer(tmp_path, rows, num_train_epochs=1)
    question = rows[4]["prompt"]
    callback = select(trainer, keep=3, policy=TargetSet([{"messages": question}]))
    written = TOKENIZER.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    assert callback.targets.tokens == [TOKENIZER(written)["input_ids"]]
    assert callback.targets.without_answer == 1
    model, target = build_model(len(TOKENIZER)), vector(build_model(len(TOKENIZER)), TOKENIZER(written)["input_ids"])
    end = TOKENIZER.convert_tokens_to_ids("<|im_end|>")
    cosines = {}
    for row in tokenised(trainer):
        ids = row["input_ids"]
        x = vector(model, ids[: len(ids) - 1 - ids[::-1].index(end)])
        cosines[row["row_id"]] = [x @ target / math.sqrt((x @ x) * (target @ target))]
    assert sorted(train(trainer).epochs()[0]) == sorted(in_turn(cosines, 3))


def test_another_model_embeds_once_for_all(tmp_path, monkeypatch):
    not_to_be_scored(monkeypatch)
    other = build_model(len(TOKENIZER), seed=5, hidden_size=48)
    other.save_pretrained(tmp_path / "other")
    TOKENIZER.save_pretrained(tmp_path / "other")
    trainer = sft_trainer(tmp_path / "run", 24)
    callback = select(trainer, keep=8, policy=POLICY, scorer=str(tmp_path / "other"))
    embedded, similarities = [], callback.pool_scorer.similarities
    monkeypatch.setattr(callback.pool_scorer, "similarities", lambda *a: embedded.append(1) or similarities(*a))
    epochs = train(trainer).epochs()
    expected = sorted(in_turn(reference_cosines(trainer, other), 8))
    assert [sorted(rows) for rows in epochs] == [expected] * 3
    assert len(embedded) == 1
    again = sft_trainer(tmp_path / "embedder", 24, num_train_epochs=1)
    select(again, keep=8, policy=POLICY, embedder=IFDScorer(str(tmp_path / "other")))
    assert sorted(train(again).epochs()[0]) == expected


# ---- resuming ---------------------------------------------------------------------------------------------------


def trained(folder, **config):
    trainer = sft_trainer(folder, 24, save_strategy="steps", save_steps=1, num_train_epochs=4, **config)
    callback = select(trainer, keep=[6, 4, 8, 6], policy=POLICY, every=2)
    return trainer, callback


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    trainer, _ = trained(folder)
    seen = train(trainer)
    return folder, seen, weights_of(trainer.model)


def test_epochs_between_two_selections_go_by_what_was_embedded_then(whole):
    folder, _, _ = whole
    history = History.load(folder)
    for one, other in ((0, 1), (2, 3)):
        assert history.rows(one)["target_similarity"].equals(history.rows(other)["target_similarity"])
    assert not history.rows(1)["target_similarity"].equals(history.rows(2)["target_similarity"])


@pytest.mark.parametrize("step", [2, 3, 5, 8, 11])
def test_a_run_is_resumed_exactly_though_the_model_has_changed_since_it_embedded(whole, tmp_path, step):
    folder, seen, weights = whole
    trainer, _ = trained(tmp_path)
    resumed = train(trainer, resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    assert resumed.order() == [row for update in seen.updates[step:] for row in update.rows]
    assert difference(weights_of(trainer.model), weights) == 0.0


def test_a_run_is_not_resumed_with_other_targets(tmp_path):
    path = tmp_path / "task.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in TARGETS))
    policy = TargetSet(path, "wizardlm")

    def build():
        trainer = sft_trainer(tmp_path / "run", 24, save_strategy="steps", save_steps=2)
        select(trainer, keep=8, policy=policy)
        return trainer

    trainer = build()
    trainer.add_callback(Stop(2))
    train(trainer)
    train(build(), resume_from_checkpoint=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in raw_rows(3, seed=10)))
    with pytest.raises(ValueError, match=r"cannot be resumed exactly: targets: '\w+' in the checkpoint, '\w+' now"):
        build().train(resume_from_checkpoint=True)


# ---- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"policy": POLICY, "embedder": "some/sentences"},
            "embedder='some/sentences' is a sentence-transformers model",
        ),
        ({"policy": TargetSet("missing.jsonl")}, r"missing\.jsonl"),
        ({"policy": TargetSet([{"colour": "red"}])}, "The target set cannot be read: "),
        ({"policy": TargetSet([{"prompt": ["a"], "completion": "b"}])}, "None of 1 row of the target set can be read"),
        ({"policy": POLICY, "max_ifd": INF}, "max_ifd is a part of `policy`"),
        ({"policy": TargetSet}, "policy must be a Cherry, a Diverse, a TargetSet or a callable"),
    ],
)
def test_what_cannot_work_is_said_before_training(tmp_path, options, message):
    with pytest.raises((ValueError, OSError), match=message):
        select(sft_trainer(tmp_path, 4), **options)


def test_too_few_rows_are_an_error_before_anything_is_trained_where_they_are_to_be(tmp_path):
    trainer = sft_trainer(tmp_path, 4)
    select(trainer, keep=6, policy=TargetSet(TARGETS, on_shortfall="error"))
    with pytest.raises(ValueError, match="6"):
        trainer.train()
