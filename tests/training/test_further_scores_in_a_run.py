"""Further scores in training: what a policy ranks by them, what the history keeps, and a resume that is exact."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest
from conftest import ROUNDING, build_model
from datasets import Dataset
from tiny_runs import (
    RECIPES,
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
    train,
    weights_of,
)

from ifd_trainer import (
    Cherry,
    IFDScorer,
    IFDSelectionCallback,
    LowestScores,
    RandomRows,
    Selection,
    write_report,
)
from ifd_trainer.data.formats import PROMPT_COMPLETION, WIZARDLM
from ifd_trainer.errors import UserError
from ifd_trainer.method.further_scores import FURTHER
from ifd_trainer.recipe.parsing import parse_recipe
from ifd_trainer.recipe.run import build_run
from ifd_trainer.recipe.selection import SelectionConfig
from ifd_trainer.report import plot_further_scores
from ifd_trainer.training.history import History

ALL = ("ira", "answer_ppl", "direct_ppl", "prompt_ppl", "rifd", "rcas", "rdas", "loss_change")


def history_rows(trainer, epoch) -> pd.DataFrame:
    return History.load(trainer.args.output_dir).rows(epoch).set_index("row_id")


def test_rows_are_ranked_by_a_further_score_of_the_model_as_it_is(tmp_path):
    trainer = sft_trainer(tmp_path, 16)
    select(trainer, keep=[5, 4, 3], score="ira")
    seen = train(trainer)
    for epoch, budget in enumerate([5, 4, 3]):
        losses = reference_scores(trainer, model_with(seen.weights[epoch]))
        ira = {row: das - cas for row, (cas, das) in losses.items()}
        expected = sorted(ira, key=lambda row: -ira[row])[:budget]
        assert sorted(seen.epochs()[epoch]) == sorted(expected)
        found = history_rows(trainer, epoch)
        np.testing.assert_allclose(found["ira"], [ira[row] for row in found.index], rtol=1e-4, atol=1e-4)
        record = History.load(tmp_path).record(epoch)
        assert record["cut"] == found.loc[expected, "ira"].min()
        assert set(found.columns) & set(ALL) == {"ira"}
        assert "own_score" not in found
    assert History.load(tmp_path).settings["further_scores"] == ["ira"]


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_a_run_scores_as_the_transform_scores_the_raw_rows(tmp_path, kind):
    raw = raw_rows(12, with_input=kind == "text")
    trainer = sft_trainer(tmp_path, text_rows(raw) if kind == "text" else chat_rows(raw), num_train_epochs=2)
    select(trainer, keep=4, policy=LowestScores("rifd"), scores=ALL)
    seen = train(trainer)
    rows = Dataset.from_list(raw) if kind == "text" else chat_rows(raw)
    for epoch in range(2):
        format = WIZARDLM if kind == "text" else PROMPT_COMPLETION
        scorer = IFDScorer(model_with(seen.weights[epoch]), TOKENIZER, format=format, scores=ALL[:-1])
        expected = rows.map(scorer, batched=True).to_pandas().set_index("row_id")
        found = history_rows(trainer, epoch)
        assert expected["rifd"].notna().all()
        for name in ALL[:-1]:
            np.testing.assert_allclose(found[name], expected.loc[found.index, name], rtol=20 * ROUNDING, atol=1e-4)
        lowest = expected["rifd"].sort_values(kind="stable").index[:4]
        assert sorted(seen.epochs()[epoch]) == sorted(lowest)


def test_how_losses_have_changed_since_the_first_scoring(tmp_path):
    trainer = sft_trainer(tmp_path, 16)
    callback = select(trainer, keep=4, scores="loss_change")
    seen = train(trainer)
    first = reference_scores(trainer, model_with(seen.weights[0]))
    for epoch in range(3):
        now = reference_scores(trainer, model_with(seen.weights[epoch]))
        found = history_rows(trainer, epoch)
        np.testing.assert_array_equal(found["loss_change"], found["cas"] - history_rows(trainer, 0)["cas"])
        expected = [now[row][0] - first[row][0] for row in found.index]
        np.testing.assert_allclose(found["loss_change"], expected, atol=1e-3)
    assert (history_rows(trainer, 0)["loss_change"] == 0).all()
    assert (history_rows(trainer, 2)["loss_change"] != 0).all()
    assert callback.further == ("loss_change",)


def test_rows_are_ranked_by_how_their_loss_has_changed(tmp_path):
    trainer = sft_trainer(tmp_path, 16)
    select(trainer, keep=[16, 5, 5], score="loss_change")
    seen = train(trainer)
    for epoch in (1, 2):
        found = history_rows(trainer, epoch)
        best = found["loss_change"].sort_values(ascending=False, kind="stable").index[:5]
        assert sorted(seen.epochs()[epoch]) == sorted(best)


def test_a_second_run_of_the_same_trainer_compares_with_its_own_first_scoring(tmp_path):
    trainer = sft_trainer(tmp_path, 12, num_train_epochs=1)
    select(trainer, keep=4, scores="loss_change")
    train(trainer)
    before = history_rows(trainer, 0)["cas"]
    train(trainer)
    assert (history_rows(trainer, 0)["cas"] != before).any()
    assert (history_rows(trainer, 0)["loss_change"] == 0).all()


@pytest.mark.parametrize("score", ["loss_change", "rifd"])
@pytest.mark.parametrize("step", [3, 4, 5])
def test_a_resume_is_exact(tmp_path, score, step):
    def trainer_of(folder):
        trainer = sft_trainer(folder, 16, save_strategy="steps", save_steps=step)
        select(trainer, keep=[8, 6, 6], score=score, scores=("loss_change", "prompt_ppl"))
        return trainer

    whole = trainer_of(tmp_path / "whole")
    seen = train(whole)
    cut = trainer_of(tmp_path / "cut")
    cut.add_callback(Stop(step))
    begun = train(cut)
    resumed = trainer_of(tmp_path / "cut")
    rest = train(resumed, resume_from_checkpoint=str(tmp_path / "cut" / f"checkpoint-{step}"))
    assert begun.order() + rest.order() == seen.order()
    assert difference(weights_of(resumed.model), weights_of(whole.model)) == 0.0
    for epoch in range(3):
        pd.testing.assert_frame_equal(history_rows(resumed, epoch), history_rows(whole, epoch), check_exact=True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scores": ("ira",)}, r"further_scores: \('loss_change',\) in the checkpoint, \('ira',\) now"),
        ({"score": "rifd", "scores": "loss_change", "guess": "Q of {answer}?"}, "guess"),
    ],
)
def test_a_resume_with_other_scores_is_refused(tmp_path, options, words):
    trainer = sft_trainer(tmp_path, 12, save_strategy="steps", save_steps=2)
    select(trainer, keep=4, scores="loss_change")
    trainer.add_callback(Stop(2))
    train(trainer)
    again = sft_trainer(tmp_path, 12)
    select(again, keep=4, **options)
    with pytest.raises(UserError, match=words):
        train(again, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_scores_that_are_only_asked_for_are_kept_whatever_the_policy_reads(tmp_path):
    trainer = sft_trainer(tmp_path, 12, num_train_epochs=1)
    select(trainer, keep=4, policy=RandomRows(), scores=("ira", "ifd"))
    train(trainer)
    found = history_rows(trainer, 0)
    np.testing.assert_array_equal(found["ira"], found["das"] - found["cas"])
    assert found["ira"].notna().all()


def test_a_brief_experience_has_the_columns_without_scores(tmp_path):
    trainer = sft_trainer(tmp_path, 24, num_train_epochs=1)
    trainer.add_callback(IFDSelectionCallback.cherry(trainer, 4, brief="random", score="ira", scores="loss_change"))
    train(trainer)
    before, after = history_rows(trainer, 0), history_rows(trainer, 1)
    assert before["ira"].isna().all()
    assert before["loss_change"].isna().all()
    assert after["ira"].notna().all()
    assert set(after.index[after["times"] > 0]) == set(after["ira"].sort_values(ascending=False).index[:4])


def test_packed_examples_are_ranked_by_a_further_score(tmp_path):
    trainer = sft_trainer(tmp_path, 24, packing=True, max_length=128, num_train_epochs=1)
    select(trainer, keep=1, score="ira")
    trainer.train()
    found = history_rows(trainer, 0)
    kept = found["times"] > 0
    assert found.loc[kept, "ira"].min() >= found.loc[~kept, "ira"].max()


def test_a_policy_of_ones_own_reads_what_was_asked_for_and_is_told_what_was_not(tmp_path):
    @dataclass(frozen=True)
    class LikelyPrompts:
        def __call__(self, columns, budget, *, ids=None, rng=None):
            kept = np.argsort(columns["prompt_ppl"], kind="stable")[:budget]
            return Selection.without_scores(kept, len(ids), reason="less_likely")

    trainer = sft_trainer(tmp_path / "asked", 12, num_train_epochs=1)
    select(trainer, keep=3, policy=LikelyPrompts(), scores="prompt_ppl")
    seen = train(trainer)
    likely = history_rows(trainer, 0)["prompt_ppl"].sort_values().index[:3]
    assert sorted(seen.order()) == sorted(likely)
    trainer = sft_trainer(tmp_path / "not", 12, num_train_epochs=1)
    select(trainer, keep=3, policy=LikelyPrompts())
    with pytest.raises(UserError, match=r"The score prompt_ppl was not asked for: name it, scores=\('prompt_ppl',\)\."):
        train(trainer)


def test_the_report_of_a_run_is_about_what_it_ranked_by(tmp_path):
    trainer = sft_trainer(tmp_path, 24)
    select(trainer, keep=4, score="ira", scores="rifd loss_change")
    train(trainer)
    history = History.load(tmp_path)
    page = write_report(history).read_text(encoding="utf-8")
    assert f"the rows with the highest ira ({FURTHER['ira'].meaning}), without a limit" in page
    assert "for most rows the prompt does not help" not in page
    assert "rows with a high score are hard ones" not in page
    found = history_rows(trainer, 2)
    best = found.loc[found["ira"].idxmax()]
    for name in ("ira", "rifd", "loss_change"):
        assert f">{best[name]:.3f}<" in page
    panels = [axes.get_xlabel() for axes in plot_further_scores(history).axes if axes.get_visible()]
    assert panels == ["ira", "rifd", "rcas", "rdas", "loss_change"]
    heights = [sum(patch.get_height() for patch in axes.patches) for axes in plot_further_scores(history).axes[:5]]
    assert heights[4] == 24  # every row has a change of its loss


def test_rows_without_further_scores_have_no_plot_of_them(tmp_path):
    trainer = sft_trainer(tmp_path, 12, num_train_epochs=1)
    select(trainer, keep=4)
    train(trainer)
    with pytest.raises(UserError, match="The rows have no further scores"):
        plot_further_scores(History.load(tmp_path))


# ---- other scorers ----------------------------------------------------------------------------------------------


def test_columns_of_a_scored_set_are_ranked_by(tmp_path):
    raw = raw_rows(16)
    scorer = IFDScorer(build_model(len(TOKENIZER), seed=5), TOKENIZER, format=PROMPT_COMPLETION, scores=ALL[:-1])
    rows = text_rows(raw).map(scorer, batched=True)
    trainer = sft_trainer(tmp_path, rows, num_train_epochs=1)
    select(trainer, keep=5, policy=LowestScores("rifd"), scorer="columns", scores="prompt_ppl")
    seen = train(trainer)
    expected = rows.to_pandas().set_index("row_id")
    assert sorted(seen.order()) == sorted(expected["rifd"].sort_values().index[:5])
    found = history_rows(trainer, 0)
    for name in ("rifd", "rcas", "rdas", "prompt_ppl"):
        np.testing.assert_array_equal(found[name], expected.loc[found.index, name])
    assert "ira" not in found


def test_a_set_without_the_column_is_refused_with_the_way_to_attach_it(tmp_path):
    scorer = IFDScorer(build_model(len(TOKENIZER)), TOKENIZER, format=PROMPT_COMPLETION)
    trainer = sft_trainer(tmp_path, text_rows(raw_rows(12)).map(scorer, batched=True))
    select(trainer, keep=5, score="ira", scorer="columns")
    with pytest.raises(UserError, match=r"which has no ira\. Attach them with .*scores=\('ira',\)"):
        train(trainer)


def test_another_model_gives_further_scores_of_the_texts_that_it_reads(tmp_path):
    raw = raw_rows(12)
    trainer = sft_trainer(tmp_path / "run", text_rows(raw), num_train_epochs=1)
    other = build_model(len(TOKENIZER), seed=5)
    other.save_pretrained(tmp_path / "other")
    TOKENIZER.save_pretrained(tmp_path / "other")
    select(trainer, keep=4, score="ira", scorer=str(tmp_path / "other"), scores="rifd prompt_ppl")
    train(trainer)
    scorer = IFDScorer(other, TOKENIZER, format=WIZARDLM, scores="ira rifd prompt_ppl")
    expected = Dataset.from_list(raw).map(scorer, batched=True).to_pandas().set_index("row_id")
    found = history_rows(trainer, 0)
    for name in ("ira", "rifd", "prompt_ppl"):
        np.testing.assert_allclose(found[name], expected.loc[found.index, name], rtol=20 * ROUNDING, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"score": "irra"}, "score must be one of cas, .*ira, .*, a column of the training set .* got 'irra'"),
        ({"scores": ("irra",)}, r"'irra' is no score, did you mean 'ira'\?"),
        ({"score": "loss_change", "scorer": "columns"}, "loss_change is how the model in training changes"),
        ({"scores": "ira", "guess": "Q of {answer}?"}, "guess is the request of the score rifd"),
        ({"score": "ira", "max_ifd": "calibrated"}, "A calibrated limit is one of ifd or ifd_ppl, not of ira"),
    ],
)
def test_what_makes_no_sense_is_refused_when_the_callback_is_made(tmp_path, options, words):
    with pytest.raises(UserError, match=words):
        select(sft_trainer(tmp_path, 12), keep=4, **options)


def test_text_in_which_no_answer_is_told_has_the_perplexity_of_all_of_it(tmp_path):
    rows = Dataset.from_list([{"row_id": row["row_id"], "text": row["output"]} for row in raw_rows(12)])
    trainer = sft_trainer(tmp_path, rows, num_train_epochs=1)
    select(trainer, keep=4, policy=LowestScores("direct_ppl"))
    seen = train(trainer)
    found = history_rows(trainer, 0)
    np.testing.assert_allclose(found["direct_ppl"], np.exp(found["das"]), rtol=1e-12)
    assert sorted(seen.order()) == sorted(found["das"].sort_values().index[:4])
    with pytest.raises(UserError, match="no"):
        select(sft_trainer(tmp_path, rows), keep=4, score="ira")


# ---- recipes ----------------------------------------------------------------------------------------------------


@RECIPES
def test_the_keys_of_a_recipe(tmp_path):
    keys = {"scores": "rifd, loss_change", "guess": "Q of {answer}?", "keep": ["4"], "guards": ["none"]}
    config = SelectionConfig(score="ira", **keys)
    assert config.further() == ("ira", "rifd", "rcas", "rdas", "loss_change")
    trainer = sft_trainer(tmp_path, 12, num_train_epochs=1)
    callback = config.callback(trainer)
    assert callback.policy == Cherry(score="ira")
    assert callback.further == config.further()
    assert callback.pool_scorer.guess == "Q of {answer}?"


@RECIPES
@pytest.mark.parametrize("scored_before", [False, True])
@pytest.mark.parametrize("written", ["scores: prompt_ppl rifd", "scores: [rifd, prompt_ppl]"])
def test_a_recipe_trains_on_what_it_ranks_by(tmp_path, written, scored_before):
    raw = raw_rows(12)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in raw), encoding="utf-8")
    build_model(len(TOKENIZER)).save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    other = f"scorer: {tmp_path / 'model'}" if scored_before else ""
    keys = ["format: wizardlm", "keep: 4", "score: ira", written, "guards: none", other]
    keys += ["num_train_epochs: 1", "bf16: false", "use_cpu: true", "report_to: none", "save_strategy: 'no'"]
    keys += [f"model_name_or_path: {tmp_path / 'model'}", f"dataset_name: {tmp_path / 'rows.jsonl'}"]
    (tmp_path / "recipe.yaml").write_text("\n".join(keys), encoding="utf-8")
    run = build_run(parse_recipe(str(tmp_path / "recipe.yaml"), ["--output_dir", str(tmp_path / "out")]))
    seen = train(run.trainer)
    scorer = IFDScorer(build_model(len(TOKENIZER)), TOKENIZER, format=WIZARDLM, scores="ira rifd prompt_ppl")
    expected = Dataset.from_list(raw).map(scorer, batched=True).to_pandas().set_index("row_id")
    found = History.load(tmp_path / "out").rows(0).set_index("row_id")
    for name in ("ira", "prompt_ppl", "rifd"):
        np.testing.assert_allclose(found[name], expected.loc[found.index, name], rtol=20 * ROUNDING, atol=1e-4)
    assert sorted(seen.order()) == sorted(expected["ira"].sort_values(ascending=False).index[:4])


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"scores": "rfid"}, r"did you mean 'rifd'\?"),
        ({"guess": "Q of {answer}?"}, "guess is the request of the score rifd"),
        ({"score": "rifd", "guess": "Q?"}, r"with \{answer\} where the answer stands"),
        ({"scores": "loss_change", "scorer": "gpt2"}, "loss_change is how the model in training changes"),
    ],
)
def test_keys_of_a_recipe_that_make_no_sense_are_refused(keys, words):
    with pytest.raises(UserError, match=words):
        SelectionConfig(**keys)
