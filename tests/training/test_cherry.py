"""The whole Cherry method in one run, against its parts done one by one with nothing of the package's loop."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import torch
from conftest import ROUNDING, build_model, build_tokenizer, reference_nll
from tiny_runs import (
    INF,
    PEAK,
    TOKENIZER,
    difference,
    model_with,
    plain_trainer,
    raw_rows,
    reference_scores,
    reference_top,
    sft_trainer,
    text_rows,
    tokenised,
    train,
    weights_of,
)
from torch.utils.data import Sampler
from transformers import TrainerCallback

from ifd_trainer import Brief, IFDScorer, IFDSelectionCallback
from ifd_trainer.training.history import History
from ifd_trainer.training.initial_weights import Snapshot

ROWS = 40
BRIEF = Brief(clusters=4, per_cluster=2, max_share=0.2)  # 8 of 40 rows: 4 updates
KEEP = 6  # 3 updates an epoch


def cherry(folder: Path, *, keep=KEEP, brief=BRIEF, config=None, model=None, rows=ROWS, **options):
    """A trainer with the whole method: 8 rows once, then 2 epochs of 6 rows."""
    settings = {"num_train_epochs": 2, **(config or {})}
    dataset = text_rows(raw_rows(rows)) if isinstance(rows, int) else rows
    trainer = sft_trainer(folder, dataset, model=model, **settings)
    callback = IFDSelectionCallback.cherry(trainer, keep, brief=brief, max_ifd=INF, **options)
    trainer.add_callback(callback)
    return trainer, callback


class _InOrder(Sampler):
    """The given positions, another list in each epoch."""

    def __init__(self, epochs: list[list[int]]) -> None:
        self.epochs, self.next = epochs, 0

    def __iter__(self):
        self.next += 1
        return iter(self.epochs[self.next - 1])

    def __len__(self) -> int:
        return len(self.epochs[0])


def train_alone(folder: Path, orders: list[list[int]], **config) -> dict[str, torch.Tensor]:
    """Weights after a training of its own on the rows of each epoch, in their order."""
    trainer = sft_trainer(folder, ROWS, num_train_epochs=len(orders), **config)
    position = {row: i for i, row in enumerate(tokenised(trainer)["row_id"])}
    trainer._get_train_sampler = lambda *_: _InOrder([[position[row] for row in order] for order in orders])
    trainer.train()
    return weights_of(trainer.model)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One uninterrupted run that saves at each second step."""
    folder = tmp_path_factory.mktemp("cherry")
    trainer, callback = cherry(folder, config={"save_strategy": "steps", "save_steps": 2})
    witness = train(trainer)
    return folder, trainer, callback, witness


@pytest.fixture(scope="module")
def experienced(run, tmp_path_factory):
    """Weights after a training of its own on the brief-experience sample."""
    return train_alone(tmp_path_factory.mktemp("brief"), run[3].epochs()[:1])


def test_the_plan_has_both_trainings(run):
    _, trainer, callback, witness = run
    assert [len(epoch) for epoch in witness.epochs()] == [8, 6, 6]
    assert witness.updates_per_epoch() == [4, 3, 3]
    assert callback.plan.phases == (4, 6)
    assert trainer.state.global_step == trainer.state.max_steps == 10
    assert trainer.state.epoch == 3
    assert witness.leftovers == []


def test_the_learning_rate_begins_anew(run):
    _, _, _, witness = run
    first = [PEAK * (4 - step) / 4 for step in range(4)]
    second = [PEAK * (6 - step) / 6 for step in range(6)]
    assert witness.learning_rates() == pytest.approx(first + second)
    assert witness.final_learning_rate == 0


def test_the_sample_is_that_of_the_original_model(run):
    _, trainer, callback, witness = run
    model, rows = build_model(len(TOKENIZER)), tokenised(trainer)
    embeddings, perplexity = [], []
    for row in rows:
        prompt = row["input_ids"][: next(i for i, label in enumerate(row["labels"]) if label != -100)]
        with torch.no_grad():
            hidden = model(torch.tensor([prompt]), output_hidden_states=True).hidden_states[-1][0]
        embeddings.append(hidden.mean(0).numpy())
        perplexity.append(np.exp(reference_nll(model, prompt, 1)))
    ids = np.array(rows["row_id"])
    chosen = BRIEF(np.array(embeddings), np.array(perplexity), ids=ids, seed=callback.seed)
    assert sorted(witness.epochs()[0]) == sorted(ids[chosen].tolist())
    assert len(set(witness.epochs()[0])) == 8


def test_the_rows_are_those_that_the_experienced_model_scores_highest(run, experienced):
    _, trainer, _, witness = run
    expected = reference_top(reference_scores(trainer, model_with(experienced)), KEEP, INF)
    original = reference_top(reference_scores(trainer, build_model(len(TOKENIZER))), KEEP, INF)
    assert set(expected) != set(original)  # else this test would not see who scored
    assert [set(epoch) for epoch in witness.epochs()[1:]] == [set(expected), set(expected)]
    assert witness.epochs()[1] != witness.epochs()[2]  # shuffled anew


def test_training_on_them_is_a_training_of_its_own_from_the_original_weights(run, tmp_path):
    _, trainer, _, witness = run
    alone = train_alone(tmp_path, witness.epochs()[1:])
    assert difference(weights_of(trainer.model), alone) == 0
    assert difference(witness.weights[1], weights_of(build_model(len(TOKENIZER)))) == 0


def test_with_dropout_too_the_random_state_is_that_of_a_new_run(tmp_path):
    trainer, _ = cherry(tmp_path / "whole", model=build_model(len(TOKENIZER), attention_dropout=0.2))
    witness = train(trainer)
    alone = sft_trainer(
        tmp_path / "alone", ROWS, num_train_epochs=2, model=build_model(len(TOKENIZER), attention_dropout=0.2)
    )
    position = {row: i for i, row in enumerate(tokenised(alone)["row_id"])}
    orders = [[position[row] for row in epoch] for epoch in witness.epochs()[1:]]
    alone._get_train_sampler = lambda *_: _InOrder(orders)
    torch.manual_seed(alone.args.seed)
    alone.train()
    assert difference(weights_of(trainer.model), weights_of(alone.model)) == 0


@pytest.mark.parametrize("step", [2, 4, 6, 8])
def test_a_run_resumes_in_each_part_and_between_them(run, tmp_path, step):
    folder, whole, _, witness = run
    trainer, _ = cherry(tmp_path, config={"save_strategy": "no"})
    if step <= 4:  # the folder of the run that was cut short has them still
        Snapshot(tmp_path / "ifd_original").save(build_model(len(TOKENIZER)))
    resumed = train(trainer, resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    assert resumed.order() == witness.order()[len([r for u in witness.updates[:step] for r in u.rows]) :]
    assert resumed.learning_rates() == witness.learning_rates()[step:]
    assert difference(weights_of(trainer.model), weights_of(whole.model)) == 0
    assert trainer.state.global_step == 10


def test_the_original_weights_go_when_training_ends_and_are_missed_before(run, tmp_path):
    folder, _, _, _ = run
    assert not (folder / "ifd_original").exists()
    trainer, _ = cherry(tmp_path)
    with pytest.raises(ValueError, match=r"stopped before training had started anew, but the original weights are not"):
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-4"))


def test_the_original_weights_wait_on_disk_and_their_size_is_said(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="ifd_trainer")
    trainer, _ = cherry(tmp_path)
    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, *arguments, **_):
            seen.append(Snapshot(tmp_path / "ifd_original").complete)

    trainer.add_callback(Look())
    trainer.train()
    assert seen == [True] * 10
    assert any("The original weights take 0.00 GB in" in record.message for record in caplog.records)


def test_the_history_says_what_each_part_was(run):
    folder, _, _, witness = run
    history = History.load(folder)
    rows = [history.rows(epoch) for epoch in range(3)]
    assert rows[0]["reason"].value_counts().to_dict() == {"not_in_sample": 32, "kept": 8}
    assert rows[0]["ifd"].isna().all()
    assert set(rows[1].loc[rows[1]["times"] > 0, "row_id"]) == set(witness.epochs()[1])
    assert [record["scored_at"] for record in history.epochs] == [None, 1, 1]
    assert history.settings["start_anew"] is True
    assert history.settings["warmup"]["method"] == "kmeans"


# ---- variants ---------------------------------------------------------------------------------------------------


def test_without_brief_experience_the_original_model_scores_once(tmp_path):
    trainer, callback = cherry(tmp_path, brief=None)
    witness = train(trainer)
    expected = reference_top(reference_scores(trainer, build_model(len(TOKENIZER))), KEEP, INF)
    assert [set(epoch) for epoch in witness.epochs()] == [set(expected)] * 2
    assert [record["scored_at"] for record in callback.history.epochs] == [0, 0]
    assert not (tmp_path / "ifd_original").exists()
    assert trainer.state.epoch == 2


def test_one_scoring_gives_one_warning(tmp_path, caplog):
    trainer, _ = cherry(tmp_path, brief=None, warn_share=0.0)
    train(trainer)
    assert sum("scored rows have ifd >= 1" in record.message for record in caplog.records) == 1


def test_a_random_sample_does_without_the_model(tmp_path):
    trainer, callback = cherry(tmp_path, brief=Brief("random", clusters=4, per_cluster=2, max_share=0.2))
    callback.pool_scorer.features = None  # would fail if it were called
    witness = train(trainer)
    assert len(set(witness.epochs()[0])) == 8
    again, _ = cherry(tmp_path / "again", brief=Brief("random", clusters=4, per_cluster=2, max_share=0.2))
    assert train(again).epochs()[0] == witness.epochs()[0]


def test_a_row_without_an_answer_has_no_perplexity_so_it_takes_no_part_in_the_sample(tmp_path):
    rows = tokenised(sft_trainer(tmp_path, 12))
    rows = rows.map(lambda row, i: row if i != 4 else {"labels": [-100] * len(row["labels"])}, with_indices=True)
    callback = IFDSelectionCallback.cherry(plain_trainer(tmp_path, rows), 2, brief=BRIEF, max_ifd=INF)
    _, perplexity = callback.pool_scorer.features()
    assert np.flatnonzero(np.isnan(perplexity)).tolist() == [4]


def test_another_model_scores_with_its_own_tokenizer(tmp_path):
    tokenizer = build_tokenizer(extra=("cat dog ball park red blue",) * 30)
    other = build_model(len(tokenizer), seed=5, hidden_size=48)
    other.config.name_or_path = str(tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    trainer, callback = cherry(tmp_path / "run", scorer=str(tmp_path / "other"))
    witness = train(trainer)
    raw = {row["row_id"]: row for row in raw_rows(ROWS)}
    scorer = IFDScorer(str(tmp_path / "other"), format="wizardlm")
    scores = scorer({name: [row[name] for row in raw.values()] for name in ("instruction", "output")})
    expected = [list(raw)[i] for i in np.argsort(scores["ifd"])[-KEEP:]]
    assert [set(epoch) for epoch in witness.epochs()] == [set(expected)] * 2
    np.testing.assert_allclose(callback.history.rows(0)["ifd"], scores["ifd"], rtol=ROUNDING)
    assert callback.history.settings["scorer"] == str(tmp_path / "other")


def test_scores_that_the_training_set_has_are_taken_from_it(tmp_path):
    rows = text_rows(raw_rows(ROWS))
    scores = np.random.default_rng(0).permutation(np.linspace(0.1, 1.5, ROWS))
    for name in ("cas", "das", "ifd", "ifd_ppl"):
        rows = rows.add_column(name, scores.tolist())
    rows = rows.add_column("answer_tokens", [3] * ROWS).add_column("ifd_status", ["ok"] * ROWS)
    trainer = sft_trainer(tmp_path, rows, num_train_epochs=2)
    callback = IFDSelectionCallback.cherry(trainer, KEEP, scorer="columns")
    trainer.add_callback(callback)
    witness = train(trainer)
    ids = np.array(rows["row_id"])
    eligible = np.flatnonzero(scores < 1)
    expected = ids[eligible[np.argsort(scores[eligible])[-KEEP:]]]
    assert set(witness.epochs()[0]) == set(expected.tolist())


def test_a_row_whose_status_is_null_in_the_training_set_has_no_score(tmp_path):
    rows = text_rows(raw_rows(8))
    for name in ("cas", "das", "ifd", "ifd_ppl"):
        rows = rows.add_column(name, [0.1 * (i + 1) for i in range(8)])
    rows = rows.add_column("answer_tokens", [3] * 8).add_column("ifd_status", ["ok"] * 7 + [None])
    trainer = sft_trainer(tmp_path, rows, num_train_epochs=1)
    callback = IFDSelectionCallback.cherry(trainer, 2, scorer="columns", brief=None)
    trainer.add_callback(callback)
    assert sorted(train(trainer).order()) == [105, 106]
    assert callback.history.rows(0)["reason"].tolist() == ["below_cut"] * 5 + ["kept"] * 2 + ["nonfinite"]


def test_scores_that_the_training_set_lacks_are_missed(tmp_path):
    trainer, _ = cherry(tmp_path, scorer="columns")
    with pytest.raises(ValueError, match=r"which has no cas, das.*dataset.map\(IFDScorer"):
        trainer.train()


def test_adapters_start_anew(tmp_path):
    def run(folder, brief):
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights="gaussian")
        torch.manual_seed(3)
        model = peft.get_peft_model(build_model(len(TOKENIZER)), config)
        return cherry(folder, brief=brief, model=model)

    trainer, _ = run(tmp_path, BRIEF)
    before = weights_of(trainer.model)
    witness = train(trainer)
    assert difference(witness.weights[1], before) == 0
    assert difference(weights_of(trainer.model), before) > 0


def test_a_brief_experience_may_go_on_without_starting_anew(tmp_path):
    trainer = sft_trainer(tmp_path, ROWS, num_train_epochs=3)
    callback = IFDSelectionCallback(trainer, KEEP, INF, warmup_epochs=1, warmup=BRIEF, guard=None)
    trainer.add_callback(callback)
    witness = train(trainer)
    assert [len(epoch) for epoch in witness.epochs()] == [8, 6, 6]
    steps = 10
    assert witness.learning_rates() == pytest.approx([PEAK * (steps - step) / steps for step in range(steps)])
    assert difference(witness.weights[1], witness.weights[0]) > 0
    assert [record["scored_at"] for record in callback.history.epochs] == [None, 1, 2]


def test_two_epochs_of_brief_experience_train_on_one_sample_also_when_resumed(tmp_path):
    def run(folder, **config):
        return cherry(folder, warmup_epochs=2, config={"save_strategy": "epoch", **config})[0]

    trainer = run(tmp_path)
    witness = train(trainer)
    assert set(witness.epochs()[0]) == set(witness.epochs()[1])
    assert [len(epoch) for epoch in witness.epochs()] == [8, 8, 6, 6]
    Snapshot(tmp_path / "again" / "ifd_original").save(build_model(len(TOKENIZER)))
    again = run(tmp_path / "again", save_strategy="no")
    resumed = train(again, resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert resumed.order() == witness.order()[8:]
    assert difference(weights_of(again.model), weights_of(trainer.model)) == 0


@pytest.mark.parametrize("step", [2, 4, 6])
def test_a_random_sample_that_repeats_rows_resumes_in_the_same_order(tmp_path, step):
    rows = tokenised(sft_trainer(tmp_path, 20))
    # Four usable rows for a sample of six: two of them twice.
    rows = rows.map(lambda row, i: row if i < 4 else {"labels": [-100] * len(row["labels"])}, with_indices=True)
    brief = Brief("random", clusters=3, per_cluster=2, max_share=0.3)

    def run(folder, **config):
        trainer = plain_trainer(folder, rows, num_train_epochs=2, **config)
        options = {"brief": brief, "warmup_epochs": 2, "max_ifd": INF}
        trainer.add_callback(IFDSelectionCallback.cherry(trainer, 2, **options))
        return trainer

    trainer = run(tmp_path, save_strategy="steps", save_steps=2)
    witness = train(trainer)
    assert [len(epoch) for epoch in witness.epochs()] == [6, 6, 2, 2]
    assert len(set(witness.epochs()[0])) == 4
    Snapshot(tmp_path / "again" / "ifd_original").save(build_model(len(TOKENIZER)))
    again = run(tmp_path / "again")
    resumed = train(again, resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert resumed.order() == witness.order()[2 * step :]
    assert difference(weights_of(again.model), weights_of(trainer.model)) == 0


def test_a_list_of_budgets_counts_the_epochs_after_the_brief_experience(tmp_path):
    trainer, _ = cherry(tmp_path, keep=[6, 2])
    assert [len(epoch) for epoch in train(trainer).epochs()] == [8, 6, 2]


def test_a_run_begun_again_with_smaller_batches_begins_with_the_original_weights(tmp_path, monkeypatch):
    trainer, _ = cherry(tmp_path, config={"per_device_train_batch_size": 4, "auto_find_batch_size": True})
    step, rows = trainer.training_step, []

    def short_of_memory(model, inputs, *rest):
        size = len(inputs["input_ids"])
        if size > 2 and len(rows) == 2:  # in the main training: weights have changed, and the snapshot was used
            raise RuntimeError("CUDA out of memory.")
        rows.append(size)
        return step(model, inputs, *rest)

    monkeypatch.setattr(trainer, "training_step", short_of_memory)
    trainer.train()
    assert rows == [4, 4] + [2] * (4 + 6)
    again, _ = cherry(tmp_path / "again")
    train(again)
    assert difference(weights_of(trainer.model), weights_of(again.model)) == 0


def test_a_second_call_of_train_begins_with_the_weights_of_the_first(tmp_path):
    trainer, _ = cherry(tmp_path)
    train(trainer)
    after = weights_of(trainer.model)
    witness = train(trainer)
    assert difference(witness.weights[1], after) == 0


def test_the_best_checkpoint_is_looked_for_anew(tmp_path):
    held_out = text_rows(raw_rows(4, seed=9))
    trainer = sft_trainer(
        tmp_path,
        ROWS,
        num_train_epochs=1,
        eval_dataset=held_out,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
    )
    trainer.add_callback(IFDSelectionCallback.cherry(trainer, 1, brief=BRIEF, max_ifd=INF))
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert losses[0] < losses[1]  # the brief experience was on more rows
    assert trainer.state.best_metric == losses[1]


# ---- what is refused --------------------------------------------------------------------------------------------


def test_a_run_that_would_end_in_the_brief_experience_is_refused(tmp_path):
    trainer, _ = cherry(tmp_path, config={"max_steps": 4})
    with pytest.raises(ValueError, match=r"max_steps=4 ends in the brief experience, which takes 4 updates"):
        trainer.train()
    trainer, callback = cherry(tmp_path, config={"max_steps": 5})
    assert train(trainer).updates_per_epoch() == [4, 1]
    assert callback.plan.phases == (4, 1)


def test_a_schedule_that_depends_on_losses_is_refused(tmp_path):
    config = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch"}
    trainer = sft_trainer(tmp_path, ROWS, eval_dataset=text_rows(raw_rows(4, seed=9)), **config)
    trainer.add_callback(IFDSelectionCallback.cherry(trainer, KEEP, brief=BRIEF))
    with pytest.raises(ValueError, match="'reduce_lr_on_plateau' is no function of the step alone"):
        trainer.train()


def test_packing_and_deepspeed_are_refused(tmp_path):
    trainer = sft_trainer(tmp_path, ROWS, packing=True, max_length=128)
    with pytest.raises(ValueError, match=r"sample of examples.*Set packing=False, or go without"):
        IFDSelectionCallback.cherry(trainer)
    assert IFDSelectionCallback.cherry(trainer, brief=None).restart is None
    trainer = sft_trainer(tmp_path, ROWS)
    trainer.is_deepspeed_enabled = True
    with pytest.raises(ValueError, match="cannot start anew from the original weights under DeepSpeed"):
        IFDSelectionCallback.cherry(trainer)


@pytest.mark.parametrize("options", [{"warmup": BRIEF}, {"start_anew": True}])
def test_a_warm_up_without_epochs_is_refused(tmp_path, options):
    trainer = sft_trainer(tmp_path, ROWS)
    with pytest.raises(ValueError, match="say what the warm-up epochs do: set warmup_epochs=1 or more"):
        IFDSelectionCallback(trainer, **options)


# ---- a diverse selection ----------------------------------------------------------------------------------------


def prompts_of(trainer) -> list[list[int]]:
    rows = tokenised(trainer)
    return [r["input_ids"][: next(i for i, label in enumerate(r["labels"]) if label != -100)] for r in rows]


def greedy(embeddings: np.ndarray, k: int) -> list[int]:
    """Plain greedy facility location over cosines, one row at a time."""
    units = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    similar, chosen = np.maximum(units @ units.T, 0), []
    for _ in range(k):
        gains = [similar[:, [*chosen, j]].max(1).sum() if j not in chosen else -1 for j in range(len(units))]
        chosen.append(int(np.argmax(gains)))
    return chosen


def test_a_diverse_selection_stands_for_the_rows_with_the_highest_scores(tmp_path):
    trainer = sft_trainer(tmp_path, ROWS, num_train_epochs=1)
    callback = IFDSelectionCallback(trainer, KEEP, INF, diverse=15, guard=None)
    trainer.add_callback(callback)
    witness = train(trainer)
    model = build_model(len(TOKENIZER))
    top = reference_top(reference_scores(trainer, model), 15, INF)
    position = {row: i for i, row in enumerate(tokenised(trainer)["row_id"])}
    embeddings = []
    for row in top:
        with torch.no_grad():
            out = model(torch.tensor([prompts_of(trainer)[position[row]]]), output_hidden_states=True)
        embeddings.append(out.hidden_states[-1][0].double().mean(0).numpy())
    assert set(witness.epochs()[0]) == {top[i] for i in greedy(np.array(embeddings), KEEP)}
    assert set(witness.epochs()[0]) != set(top[:KEEP])
    reasons = callback.history.rows(0)["reason"].value_counts().to_dict()
    assert reasons == {"kept": 6, "redundant": 9, "below_cut": 25}


def test_another_scorer_embeds_too(tmp_path):
    other = build_model(len(TOKENIZER), seed=5, hidden_size=48)
    other.save_pretrained(tmp_path / "other")
    TOKENIZER.save_pretrained(tmp_path / "other")
    trainer, callback = cherry(tmp_path / "run", scorer=str(tmp_path / "other"), diverse=15)
    rows = np.array([3, 0, 7])
    found = callback.pool_scorer.embeddings(rows)
    texts = TOKENIZER.batch_decode([prompts_of(trainer)[row] for row in rows])
    expected = IFDScorer(str(tmp_path / "other")).embed(texts)
    assert found.shape == (3, 48)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    assert len(set(train(trainer).epochs()[0])) == KEEP


def test_an_embedder_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    trainer = sft_trainer(tmp_path, ROWS)
    callback = IFDSelectionCallback(trainer, KEEP, INF, diverse=15, embedder="some/sentences", guard=None)
    with pytest.raises(ImportError, match=r"embedder='some/sentences' is a sentence-transformers model: pip install"):
        callback.pool_scorer.embeddings(np.arange(3))


def test_sentence_transformers_embed_the_prompts(tmp_path, monkeypatch):
    seen = []

    class SentenceTransformer:
        def __init__(self, name, device):
            assert (name, device) == ("some/sentences", "cpu")

        def encode(self, texts, **options):
            seen.extend(texts)
            return np.array([[len(text), 1.0] for text in texts])

    monkeypatch.setitem(sys.modules, "sentence_transformers", SimpleNamespace(SentenceTransformer=SentenceTransformer))
    trainer = sft_trainer(tmp_path, ROWS)
    callback = IFDSelectionCallback(trainer, KEEP, INF, diverse=15, embedder="some/sentences", guard=None)
    found = callback.pool_scorer.embeddings(np.array([5, 2]))
    assert seen == TOKENIZER.batch_decode([prompts_of(trainer)[5], prompts_of(trainer)[2]])
    np.testing.assert_array_equal(found, [[len(text), 1.0] for text in seen])


def test_a_diverse_selection_of_packed_rows_is_refused(tmp_path):
    trainer = sft_trainer(tmp_path, ROWS, packing=True, max_length=128)
    with pytest.raises(ValueError, match="diverse= chooses examples"):
        IFDSelectionCallback(trainer, diverse=0.2)
