"""Guards at the edges of a run: tiny pools, warm-ups, retries, other scorers, rows that fill a window."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import build_tokenizer
from test_guards import only
from tiny_runs import (
    INF,
    TOKENIZER,
    plain_trainer,
    raw_rows,
    select,
    sft_trainer,
    text_rows,
    tokenised,
    train,
)
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from ifd_trainer import Brief, Selection
from ifd_trainer.errors import UserError
from ifd_trainer.method.calibrated_limit import CalibratedLimit
from ifd_trainer.method.pairing_test import PairingTest
from ifd_trainer.method.schedule import Timing
from ifd_trainer.recipe.selection import SelectionConfig

TEST = PairingTest(alpha=0.5, anchors=3, tokens=2)


# ---- a run that dies ----------------------------------------------------------------------------------------------


def test_a_row_that_fills_the_window_of_the_model_can_be_scored(tmp_path):
    rows = tokenised(sft_trainer(tmp_path / "rows", 12))
    window = min(map(len, rows["input_ids"])) - 2
    cut = rows.map(lambda row: {name: row[name][:window] for name in ("input_ids", "labels")})
    trainer = plain_trainer(tmp_path / "run", cut, num_train_epochs=1)
    trainer.model = GPT2LMHeadModel(
        GPT2Config(vocab_size=len(TOKENIZER), n_positions=window, n_embd=16, n_layer=1, n_head=2)
    )
    callback = select(trainer, keep=3, max_ifd=INF)
    trainer.train()
    assert callback.history.epochs[0]["budget"] == 3


def test_prompts_that_do_not_help_after_a_warm_up_do_not_end_a_run_that_has_trained(tmp_path, caplog):
    """The error says that nothing was trained, and advises the very warm-up."""
    trainer = sft_trainer(tmp_path, 24, num_train_epochs=2)
    select(trainer, keep=4, guard=only(on_misaligned="error"), warn_share=0.0, warmup_epochs=1, max_ifd=INF)
    trainer.train()  # 24 rows have trained for an epoch when the error says that nothing was trained
    assert "have ifd >= 1" in caplog.text


def test_a_pool_too_small_for_a_calibrated_limit_is_told_before_a_warm_up(tmp_path):
    trainer = sft_trainer(tmp_path, 12, num_train_epochs=2)
    select(trainer, keep=4, max_ifd="calibrated", warmup_epochs=1)
    with pytest.raises(ValueError, match="takes at least 19 answers"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("guards", ["limit", "pairing", "unfinished", "auto pairing"])
def test_guards_that_no_model_measures_are_refused_before_a_recipe_scores_the_rows(guards):
    with pytest.raises(ValueError, match="scorer"):
        SelectionConfig(guards=guards, scorer="gpt2")


def test_a_run_goes_on_where_guards_hold_back_all_rows_after_a_warm_up(tmp_path):
    trainer = sft_trainer(tmp_path, 30, num_train_epochs=2)
    callback = select(
        trainer, keep=4, guard=only(limit=CalibratedLimit(0.5, 24)), warmup_epochs=1, score=lambda of: of["das"]
    )
    score_pool = callback.score_pool

    def no_prompt_helps(description):
        scores = score_pool(description)
        scores.ifd[:] += 10
        return scores

    callback.score_pool = no_prompt_helps
    assert [len(rows) for rows in train(trainer).epochs()] == [30, 4]


def best_rewarded(columns, budget, *, ids, rng):  # of the README
    reward = columns["row_id"]
    return Selection.without_scores(np.argsort(-reward, kind="stable")[:budget], len(reward), reason="less_reward")


def test_a_policy_that_guards_leave_too_few_rows_is_told_so(tmp_path):
    raw = raw_rows(12)
    for copy in range(6, 12):
        raw[copy] |= {"instruction": raw[copy - 6]["instruction"].upper(), "output": raw[copy - 6]["output"] + "."}
    trainer = sft_trainer(tmp_path, text_rows(raw), num_train_epochs=1)
    select(trainer, keep=9, policy=best_rewarded, guard=only(duplicates=True))
    with pytest.raises(ValueError, match=r"[Gg]uards hold back 6"):
        trainer.train()


def test_a_policy_that_fails_without_guards_does_not_end_the_run(tmp_path):
    """What would have been kept without guards is for the report alone."""

    def no_repeats(columns, budget, *, ids, rng):
        if len(ids) > 23:
            raise ValueError("two rows say the same")
        return best_rewarded(columns, budget, ids=ids, rng=rng)

    raw = raw_rows(24)
    raw[20] |= {"instruction": raw[3]["instruction"].upper(), "output": raw[3]["output"]}
    trainer = sft_trainer(tmp_path, text_rows(raw), num_train_epochs=1)
    select(trainer, keep=5, policy=no_repeats, guard=only(duplicates=True))
    assert len(train(trainer).order()) == 5


# ---- rows that are judged wrongly ---------------------------------------------------------------------------------


def test_a_duplicate_takes_the_place_of_a_row_that_the_policys_limit_drops(tmp_path):
    raw = raw_rows(24)
    raw[20] |= {"instruction": raw[3]["instruction"].upper(), "output": raw[3]["output"].upper()}
    plain = sft_trainer(tmp_path / "plain", text_rows(raw), num_train_epochs=1)
    scores = select(plain, keep=24, max_ifd=INF)
    plain.train()
    ifd = scores.history.rows(0).set_index("row_id")["ifd"]
    first, second = sorted((103, 120), key=lambda row: ifd[row])
    ids = {103: 103, 120: 120} if second == 103 else {103: 120, 120: 103}  # the lower id has the higher score
    rows = text_rows(raw).map(lambda row: {"row_id": ids.get(row["row_id"], row["row_id"])})
    trainer = sft_trainer(tmp_path / "run", rows, num_train_epochs=1)
    limit = float(ifd[[first, second]].mean())
    select(trainer, keep=1, max_ifd=limit, guard=only(duplicates=True))
    assert train(trainer).order() == [120]  # 103 is above the limit, and all others are too


def test_p_values_of_a_small_pool_count_each_prompt_once(tmp_path):
    """Four other prompts cannot give a p-value below 1/5."""
    trainer = sft_trainer(tmp_path, 5, num_train_epochs=1)
    callback = select(trainer, keep=2, max_ifd=INF, guard=only(pairing=PairingTest()))
    train(trainer)
    p = callback.history.rows(0)["p_value"].dropna()
    assert not (p < 0.2).any(), p.tolist()


def test_rows_that_no_pairing_test_can_reach_are_told(tmp_path, caplog):
    trainer = sft_trainer(tmp_path, 24, num_train_epochs=2)
    select(trainer, keep=5, max_ifd=INF, guard=only(pairing=TEST), warmup_epochs=1)
    trainer.train()
    assert "pairing" in caplog.text


def test_another_model_tests_rows_that_the_one_in_training_was_trained_on(tmp_path):
    other = sft_trainer(tmp_path / "other", 4).model
    trainer = sft_trainer(tmp_path, 24, num_train_epochs=2)
    other.save_pretrained(tmp_path / "scorer")
    TOKENIZER.save_pretrained(tmp_path / "scorer")
    callback = select(
        trainer, keep=5, max_ifd=INF, guard=only(pairing=TEST), warmup_epochs=1, scorer=str(tmp_path / "scorer")
    )
    trainer.train()
    assert callback.history.rows(1)["p_value"].notna().sum() >= 5


def test_training_that_starts_anew_forgets_what_the_brief_experience_trained_on(tmp_path):
    trainer = sft_trainer(tmp_path, 40, num_train_epochs=1)
    timing = Timing(warmup_epochs=1, warmup=Brief("random", 2, 4), start_anew=True)
    callback = select(trainer, keep=5, max_ifd=INF, guard=only(pairing=TEST), timing=timing)
    train(trainer)
    kept = callback.history.rows(1)
    assert callback.chooser.trained.sum() == (kept["times"] > 0).sum()


def test_rows_nearest_to_the_limit_are_those_of_a_score_of_ones_own(tmp_path):
    """After a warm-up no row is eligible: the lowest row_id is nearest to the limit of 50."""
    trainer = sft_trainer(tmp_path, 24, num_train_epochs=2)
    select(trainer, keep=3, max_ifd=50.0, score="row_id", warmup_epochs=1)
    seen = train(trainer)
    assert set(seen.epochs()[1]) == {100, 101, 102}


def with_a_copy() -> list[dict]:
    raw = raw_rows(24)
    raw[20] |= {"instruction": raw[3]["instruction"].upper(), "output": raw[3]["output"]}
    return raw


def test_a_relaxed_limit_does_not_let_duplicates_in(tmp_path):
    trainer = sft_trainer(tmp_path, text_rows(with_a_copy()), num_train_epochs=1)
    select(trainer, keep=24, max_ifd=0.01, on_shortfall="relax", guard=only(duplicates=True))
    one = set(train(trainer).order())
    trainer = sft_trainer(tmp_path, text_rows(with_a_copy()), num_train_epochs=1)
    select(trainer, keep=24, max_ifd="calibrated", on_shortfall="relax", guard=only(duplicates=True))
    other = set(train(trainer).order())
    assert 120 not in one
    assert 120 not in other


def test_rows_that_stand_in_after_a_brief_experience_are_tested_too(tmp_path):
    trainer = sft_trainer(tmp_path, 40, num_train_epochs=2)
    timing = Timing(warmup_epochs=1, warmup=Brief("random", 2, 4))
    callback = select(trainer, keep=5, max_ifd=0.01, guard=only(pairing=TEST), timing=timing)
    seen = train(trainer)
    rows, brief = callback.history.rows(1).set_index("row_id"), set(seen.epochs()[0])
    assert "p_value" in rows
    assert rows.loc[sorted(set(seen.epochs()[1]) - brief), "p_value"].notna().all()


@pytest.mark.parametrize("guard", ["limit", "pairing"])
def test_the_prompt_of_a_duplicate_is_no_wrong_prompt(tmp_path, monkeypatch, guard):
    trainer = sft_trainer(tmp_path, text_rows(with_a_copy()), num_train_epochs=1)
    guards = {
        "limit": CalibratedLimit(0.5, 24, "near"),
        "pairing": PairingTest(0.5, 3, 2, "near"),
    }
    callback = select(trainer, keep=12, max_ifd=INF, guard=only(duplicates=True, **{guard: guards[guard]}))
    tried, of = [], {"limit": "mismatched_scores", "pairing": "paired_losses"}[guard]
    run = getattr(callback.pool_scorer, of)

    def noted(first, second, *more):
        pairs = (
            first
            if guard == "limit"
            else np.array([(r, a) for r, some in zip(first, second, strict=True) for a in some[:3]])
        )
        tried.extend(map(tuple, (pairs[:second] if guard == "limit" else pairs).tolist()))
        return run(first, second, *more)

    monkeypatch.setattr(callback.pool_scorer, of, noted)
    trainer.train()
    assert not {(3, 20), (20, 3)} & set(tried)


def test_a_limit_that_all_rows_can_give_is_measured_when_too_few_unseen_ones_are_left(tmp_path):
    """24 rows: 19 are needed, 14 were not trained on."""
    trainer = sft_trainer(tmp_path, 24, num_train_epochs=2)
    callback = select(trainer, keep=10, on_shortfall="relax", guard=only(limit=CalibratedLimit(0.05, 24)))
    train(trainer)
    assert [record["limit"] is None for record in callback.history.epochs] == [False, False]


def test_rows_that_failed_stay_out_where_a_later_limit_cannot_be_measured(tmp_path, monkeypatch):
    trainer = sft_trainer(tmp_path, 40, num_train_epochs=2)
    callback = select(trainer, keep=5, max_ifd=INF, guard=only(limit=CalibratedLimit(0.6, 24)))
    run = callback.pool_scorer.mismatched_scores

    def none_in_epoch_1(candidates, wanted, *more):
        return run(candidates[:0] if "epoch 1" in more[-1] else candidates, wanted, *more)

    monkeypatch.setattr(callback.pool_scorer, "mismatched_scores", none_in_epoch_1)
    seen = train(trainer)
    first = callback.history.rows(0).set_index("row_id")["reason"]
    assert callback.history.epochs[1]["limit"] is None
    assert not set(seen.epochs()[1]) & set(first.index[first == "above_limit"])


def test_epochs_between_two_selections_train_on_the_same_diverse_rows(tmp_path):
    trainer = sft_trainer(tmp_path, 40, num_train_epochs=2)
    select(trainer, keep=10, max_ifd=INF, diverse=0.6, every=2)
    first, second = train(trainer).epochs()
    assert set(first) == set(second)


# ---- what counts as trained on ------------------------------------------------------------------------------------


def test_rows_that_a_stopped_run_had_selected_but_not_trained_on_are_not_trained_on(tmp_path):
    trainer = sft_trainer(tmp_path, 24, max_steps=1)
    callback = select(trainer, keep=12, max_ifd=INF, guard=only(duplicates=True))
    seen = train(trainer)
    assert callback.chooser.trained.sum() == len(set(seen.order())) == 2


def test_a_run_that_finds_its_batch_size_selects_what_one_with_that_size_selects(tmp_path):
    found = {}
    for auto, size in ((False, 2), (True, 4)):
        trainer = sft_trainer(
            tmp_path / str(auto), 40, num_train_epochs=1, per_device_train_batch_size=size, auto_find_batch_size=auto
        )
        callback = select(trainer, keep=10, max_ifd=INF, guard=only(limit=CalibratedLimit(0.6, 24)))

        def step(model, inputs, *rest, of=trainer.training_step):
            if len(inputs["input_ids"]) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return of(model, inputs, *rest)

        trainer.training_step = step
        found[auto] = set(train(trainer).order()), callback.history.epochs[0]["limit"]
    assert found[True] == found[False]


# ---- what is said -------------------------------------------------------------------------------------------------


def test_a_pool_without_ends_of_turns_is_told_so_in_words(tmp_path, caplog):
    tokenizer = build_tokenizer()
    tokenizer.eos_token = None
    rows = tokenised(sft_trainer(tmp_path / "rows", 24))
    rows = rows.map(lambda row: {name: row[name][:-1] for name in ("input_ids", "labels")})
    trainer = plain_trainer(tmp_path / "run", rows, num_train_epochs=1)
    trainer.processing_class = tokenizer
    select(trainer, keep=5, max_ifd=INF, guard=only(unfinished=True))
    trainer.train()
    assert "end-of-turn token" in caplog.text
    assert "nan" not in caplog.text


def test_how_to_switch_off_the_limit_of_a_policy_is_said_as_it_is(tmp_path):
    trainer = sft_trainer(tmp_path, 30, num_train_epochs=1)
    select(trainer, keep=29, max_ifd=CalibratedLimit(0.05, 24), on_shortfall="error", guard=None)
    with pytest.raises(ValueError, match="the calibrated limit") as error:
        trainer.train()
    assert "guard=Guard(limit=None)" not in str(error.value)  # there is no guard: it is max_ifd


# ---- what costs or changes more than it says ----------------------------------------------------------------------


def test_another_model_is_loaded_once_for_a_scoring(tmp_path, monkeypatch):
    other = sft_trainer(tmp_path / "other", 4).model
    other.save_pretrained(tmp_path / "scorer")
    TOKENIZER.save_pretrained(tmp_path / "scorer")
    trainer = sft_trainer(tmp_path, 40, num_train_epochs=1)
    loads, load = [], AutoModelForCausalLM.from_pretrained

    def counted(*args, **kwargs):
        loads.append(args)
        return load(*args, **kwargs)

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", counted)
    guard = only(limit=CalibratedLimit(0.5, 24), unfinished=True, pairing=TEST)
    select(trainer, keep=5, max_ifd=INF, guard=guard, scorer=str(tmp_path / "scorer"))
    train(trainer)
    assert len(loads) == 1


def test_a_recipe_says_how_many_wrong_pairs_a_limit_is_made_of():
    assert SelectionConfig(wrong_pairs=64).guard().limit == CalibratedLimit(pairs=64)
    assert SelectionConfig(alpha=0.001).guard().limit == CalibratedLimit(0.001, pairs=999)
    assert SelectionConfig(max_ifd="calibrated", wrong_pairs=30).chosen_policy().max_ifd.pairs == 30
    with pytest.raises(UserError, match=r"pairs must be a whole number, and at least 99 with alpha=0.01, got 64"):
        SelectionConfig(alpha=0.01, wrong_pairs=64).guard()
