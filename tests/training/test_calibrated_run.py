"""The calibrated limit inside a run: measured with each epoch's own model, held, and resumed exactly."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from conftest import build_model, reference_nll
from tiny_runs import (
    TOKENIZER,
    difference,
    model_with,
    ratios,
    raw_rows,
    reference_scores,
    select,
    sft_trainer,
    text_rows,
    tokenised,
    train,
    weights_of,
)
from transformers import TrainerCallback

from ifd_trainer import IFDSelectionCallback
from ifd_trainer.method.calibrated_limit import CalibratedLimit

LIMIT = CalibratedLimit(alpha=0.3, pairs=24)


def parts_of(row, tokenizer):
    """Prompt, header and answer of a prepared row, as `reference_scores` finds them."""
    ids = row["input_ids"][:-1] if row["input_ids"][-1] == tokenizer.eos_token_id else row["input_ids"]
    start = next(i for i, label in enumerate(row["labels"]) if label != -100)
    header = ids[start - 1 - ids[:start][::-1].index(tokenizer.convert_tokens_to_ids("###")) : start]
    return ids[:start], header, ids[start:]


def reference_limit(trainer, model, alpha=LIMIT.alpha, seed=42, trained=()):
    """The limit by one loss at a time: answers under the prompts that the limit draws for them.

    Of the rows that were not trained on, as long as they are half of all.
    """
    rows = [parts_of(row, trainer.processing_class) for row in tokenised(trainer)]
    ids = np.array(trainer.train_dataset["row_id"])
    drawn_from = ~np.isin(ids, list(trained)) if len(trained) <= len(ids) / 2 else np.ones(len(ids), bool)
    candidates = LIMIT.draw(ids, drawn_from, seed)
    longest = max(len(row["input_ids"]) for row in tokenised(trainer))
    wrong = []
    for row, other in candidates:
        (_, header, answer), (prompt, _, other_answer) = rows[row], rows[other]
        if answer != other_answer and len(prompt) + len(answer) <= longest:
            if len(wrong) == min(LIMIT.pairs, drawn_from.sum()):
                break
            given = reference_nll(model, prompt + answer, len(prompt))
            wrong.append(given / reference_nll(model, header + answer, len(header)))
    return sorted(wrong)[int(alpha * (len(wrong) + 1)) - 1]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    trainer = sft_trainer(tmp_path_factory.mktemp("run"), 24, save_strategy="steps", save_steps=2)
    callback = select(trainer, keep=[3, 4, 5], max_ifd=LIMIT)
    seen = train(trainer)
    return trainer, callback, seen


def test_each_epoch_measures_its_limit_with_its_own_model(run):
    trainer, callback, seen = run
    records = callback.history.epochs
    trained = [set().union(*seen.epochs()[:epoch]) for epoch in range(3)]
    assert 0 < len(trained[1]) < len(trained[2]) <= 12
    expected = [reference_limit(trainer, model_with(seen.weights[epoch]), trained=trained[epoch]) for epoch in range(3)]
    assert [record["limit"] for record in records] == pytest.approx(expected, rel=2e-5)
    assert len(set(expected)) == 3  # it moves with the model


def test_a_row_is_judged_until_it_is_trained_on_and_keeps_that_verdict(run):
    trainer, callback, seen = run
    trained, verdicts = set(), {}
    for epoch, rows in enumerate(seen.epochs()):
        scores = ratios(reference_scores(trainer, model_with(seen.weights[epoch])))
        limit = callback.history.epochs[epoch]["limit"]
        verdicts |= {row: value < limit for row, value in scores.items() if row not in trained}
        eligible = [row for row, passed in verdicts.items() if passed]
        budget = [3, 4, 5][epoch]
        expected = sorted(eligible, key=scores.get)[-budget:]
        assert set(rows) == set(expected)
        history = callback.history.rows(epoch).set_index("row_id")
        assert set(history.index[history["reason"] == "above_limit"]) == set(scores) - set(eligible)
        trained |= set(rows)
    assert not all(verdicts.values())


def test_a_row_that_failed_and_was_trained_on_all_the_same_has_failed_for_good(tmp_path):
    trainer = sft_trainer(tmp_path, 24, num_train_epochs=3)
    callback = select(trainer, keep=[10, 12, 12], max_ifd=LIMIT, on_shortfall="relax")
    train(trainer)
    epochs = [callback.history.rows(epoch).set_index("row_id") for epoch in range(3)]
    failed = epochs[0].index[epochs[0]["reason"] == "kept_above_limit"]
    assert len(failed) == 10 - callback.history.epochs[0]["eligible"] > 0
    for epoch in (1, 2):
        assert (epochs[epoch].loc[failed, "ifd"] < callback.history.epochs[epoch]["limit"]).any()
        assert epochs[epoch].loc[failed, "reason"].isin(["kept_above_limit", "above_limit"]).all()


@pytest.mark.parametrize("step", [2, 4])
def test_a_resumed_run_has_the_same_limits_and_verdicts(run, tmp_path, step):
    whole, callback, seen = run
    folder = tmp_path / "resumed"
    shutil.copytree(whole.args.output_dir, folder)
    trainer = sft_trainer(folder, 24, save_strategy="steps", save_steps=2)
    again = select(trainer, keep=[3, 4, 5], max_ifd=LIMIT)
    after = train(trainer, resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    assert after.order() == seen.order()[-len(after.order()) :]
    assert difference(weights_of(trainer.model), weights_of(whole.model)) == 0.0
    assert [record["limit"] for record in again.history.epochs] == [r["limit"] for r in callback.history.epochs]


def test_another_alpha_is_not_resumed(run, tmp_path):
    shutil.copytree(run[0].args.output_dir, tmp_path / "resumed")
    trainer = sft_trainer(tmp_path / "resumed", 24, save_strategy="steps", save_steps=2)
    select(trainer, keep=[3, 4, 5], max_ifd=CalibratedLimit(alpha=0.2, pairs=24))
    with pytest.raises(ValueError, match=r"CalibratedLimit\(alpha=0.3, pairs=24, .* in the checkpoint, .*alpha=0.2"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "resumed" / "checkpoint-2"))


def test_rows_that_were_trained_on_before_any_verdict_are_told(tmp_path, caplog):
    trainer = sft_trainer(tmp_path, 24, num_train_epochs=2)
    callback = select(trainer, keep=3, warmup_epochs=1, max_ifd=LIMIT)
    train(trainer)
    assert "24 rows were trained on before the calibrated limit could judge them" in caplog.text
    assert [record["limit"] is None for record in callback.history.epochs] == [True, False]


def test_examples_of_packed_rows_are_judged_too(tmp_path):
    trainer = sft_trainer(tmp_path, 24, num_train_epochs=2, packing=True, max_length=64)
    callback = select(trainer, keep=2, max_ifd=CalibratedLimit(0.5, 24))
    trainer.train()
    for epoch, record in enumerate(callback.history.epochs):
        rows = callback.history.rows(epoch)
        if epoch == 0:  # later verdicts of rows that were trained on are older than the limit
            assert ((rows["ifd"] >= record["limit"]) == (rows["reason"] == "above_limit")).all()
        assert (rows.loc[rows["times"] > 0, "reason"] == "kept").all()
        assert record["reasons"]["above_limit"] > 0


def test_another_model_measures_the_limit_of_its_own_scores(tmp_path):
    other = build_model(len(TOKENIZER), seed=1)
    for part in (other, TOKENIZER):
        part.save_pretrained(tmp_path / "other")
    trainer = sft_trainer(tmp_path, 24, num_train_epochs=2)
    callback = select(trainer, keep=3, scorer=str(tmp_path / "other"), max_ifd=CalibratedLimit(0.5, 24))
    train(trainer)
    limits = [record["limit"] for record in callback.history.epochs]
    assert limits[0] == limits[1] == pytest.approx(reference_limit(trainer, other, alpha=0.5), rel=2e-5)


def test_a_pool_that_is_too_small_says_so(tmp_path):
    trainer = sft_trainer(tmp_path, 1)
    select(trainer, keep=1, max_ifd="calibrated")
    with pytest.raises(ValueError, match=r"at least 19 answers under a wrong prompt; the pool gave 0 "):
        trainer.train()


def test_scores_that_the_set_came_with_cannot_be_calibrated(tmp_path):
    with pytest.raises(ValueError, match=r"no model measures a calibrated limit\. Set a number: max_ifd=1.0"):
        IFDSelectionCallback(sft_trainer(tmp_path, 4), scorer="columns", max_ifd="calibrated")


def test_where_no_limit_can_be_measured_any_more_the_last_scores_stand(tmp_path, caplog):
    trainer = sft_trainer(tmp_path, 24)
    callback = select(trainer, keep=3, max_ifd=LIMIT)

    class Break(TrainerCallback):
        def on_epoch_end(self, args, state, control, model=None, **kwargs):
            if state.epoch == 1:
                with torch.no_grad():
                    model.lm_head.weight.fill_(float("nan"))

    trainer.add_callback(Break())
    trainer.train()
    assert "The rows are selected by the scores of epoch 0 again" in caplog.text
    records = callback.history.epochs
    assert [record["scored_at"] for record in records] == [0, 0, 0]
    assert records[1]["limit"] == records[0]["limit"]
    assert callback.history.rows(1)["times"].equals(callback.history.rows(0)["times"])


def test_pairs_that_are_none_are_drawn_again(tmp_path):
    raw = raw_rows(24)
    for i in range(0, 24, 2):
        raw[i] |= {"output": "red"}  # half of all pairs have the same answer twice, or are of one of these
    trainer = sft_trainer(tmp_path, text_rows(raw), num_train_epochs=1)
    callback = select(trainer, keep=2, max_ifd=CalibratedLimit(alpha=0.3, pairs=24))
    scored, mismatched_scores = [], callback.pool_scorer.mismatched_scores
    callback.pool_scorer.mismatched_scores = lambda *args: scored.append(mismatched_scores(*args)) or scored[-1]
    train(trainer)
    assert [len(scores) for scores in scored] == [24]
    assert np.isfinite(scored[0].ifd).all()


def test_a_second_call_of_train_knows_which_rows_the_first_has_trained_on(tmp_path):
    trainer = sft_trainer(tmp_path, 24, num_train_epochs=1)
    callback = select(trainer, keep=10, max_ifd=LIMIT, on_shortfall="relax")
    train(trainer)
    first = callback.history.rows(0).set_index("row_id")
    failed = first.index[first["reason"] == "kept_above_limit"]
    trainer.train()
    second = callback.history.rows(0).set_index("row_id")
    assert (second.loc[failed, "ifd"] < callback.history.epochs[0]["limit"]).any()
    assert second.loc[failed, "reason"].isin(["kept_above_limit", "above_limit"]).all()


def test_a_relaxed_limit_takes_the_nearest_rows_before_those_that_training_has_brought_below_it(tmp_path):
    trainer = sft_trainer(tmp_path, 24, num_train_epochs=2)
    callback = select(trainer, keep=[10, 12], max_ifd=LIMIT, on_shortfall="relax")
    train(trainer)
    rows, limit = callback.history.rows(1), callback.history.epochs[1]["limit"]
    relaxed = rows[rows["reason"] == "kept_above_limit"]
    above = rows[(rows["ifd"] >= limit) & rows["reason"].isin(["kept_above_limit", "above_limit"])]
    nearest = above.sort_values("ifd")["row_id"].tolist()[: len(relaxed)]
    assert sorted(relaxed["row_id"]) == sorted(nearest)
    assert len(above) > len(relaxed) > 0


@pytest.mark.parametrize("options", [{"every": 3}, {"freeze_after": 0}], ids=str)
def test_epochs_that_score_nothing_have_the_limit_of_the_scoring_before_also_after_a_resume(tmp_path, options):
    def runs(**more):
        trainer = sft_trainer(tmp_path, 24, save_strategy="steps", save_steps=1)
        callback = select(trainer, keep=[9, 12, 12], max_ifd=LIMIT, on_shortfall="relax", **options)
        return callback, train(trainer, **more).order()

    whole, through = runs()
    limits = [record["limit"] for record in whole.history.epochs]
    assert len(set(limits)) == 1
    again, after = runs(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert after == through[4:]
    assert [record["limit"] for record in again.history.epochs] == limits
