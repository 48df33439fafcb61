"""Policies within the values of a column in a run: what each epoch trains on, a resume, and their keys in recipes."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from tiny_runs import INF, RECIPES, Stop, raw_rows, select, sft_trainer, text_rows, train

from ifd_trainer import (
    Cherry,
    Diverse,
    Guard,
    IterIT,
    Mixture,
    RandomRows,
    Ranking,
    SoftSampling,
    Stages,
    Stratified,
    write_report,
)
from ifd_trainer.errors import UserError
from ifd_trainer.recipe.selection import SelectionConfig

SOURCES = np.array(["web"] * 12 + ["code"] * 8 + ["chat"] * 4)
ROWS = text_rows(raw_rows(24)).add_column("source", SOURCES.tolist()).add_column("weight", list(range(24)))
OF = dict(zip(ROWS["row_id"], ROWS["source"], strict=True))


def sources(rows) -> dict[str, int]:
    names, counts = np.unique([OF[row] for row in rows], return_counts=True)
    return dict(zip(names.tolist(), counts.tolist(), strict=True))


def test_each_epoch_trains_on_a_share_of_each_value(tmp_path):
    trainer = sft_trainer(tmp_path, ROWS)
    policy = Stratified("source", {"code": 0.5}, at_most={"chat": 1}, policy=Cherry(INF))
    callback = select(trainer, keep=8, policy=policy)
    for epoch, rows in enumerate(train(trainer).epochs()):
        assert sources(rows)["code"] == 4
        assert sources(rows).get("chat", 0) <= 1
        history = callback.history.rows(epoch).set_index("row_id")
        code = history[[OF[row] == "code" for row in history.index]]
        assert set(code["ifd"].nlargest(4).index) == {row for row in rows if OF[row] == "code"}
    assert "so many of each value of source" in write_report(tmp_path).read_text()


def test_a_mixture_changes_from_epoch_to_epoch_and_a_resume_knows_where_it_is(tmp_path):
    mixture = Mixture("source", [{"web": 1.0}, {"web": 0.5, "code": 0.5}, {"chat": 0.5, "code": 0.5}], Cherry(INF))
    config = {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 4}
    trainer = sft_trainer(tmp_path, ROWS, **config)
    select(trainer, keep=4, policy=mixture)
    expected = train(trainer)
    found = [sources(rows) for rows in expected.epochs()]
    assert found == [{"web": 4}, {"code": 2, "web": 2}, {"chat": 2, "code": 2}, {"chat": 2, "code": 2}]
    cut = sft_trainer(tmp_path / "cut", ROWS, **config)
    cut.add_callback(Stop(4))
    select(cut, keep=4, policy=mixture)
    train(cut)
    rest = sft_trainer(tmp_path / "cut", ROWS, **config)
    select(rest, keep=4, policy=mixture)
    assert train(rest, resume_from_checkpoint=True).order() == expected.order()[8:]


@pytest.mark.parametrize(
    ("options", "budgets"),
    [({"keep": 1.0}, [12, 8, 4]), ({"keep": 0.5}, [6, 4, 2]), ({"keep": 3}, [3, 3, 3])],
)
def test_stages_train_on_one_value_after_another(tmp_path, options, budgets):
    trainer = sft_trainer(tmp_path, ROWS)
    callback = select(trainer, policy=Stages("source", ["web", "code", "chat"], policy=Cherry(INF)), **options)
    seen = train(trainer)
    assert [sources(rows) for rows in seen.epochs()] == [
        {name: count} for name, count in zip(("web", "code", "chat"), budgets, strict=True)
    ]
    assert [plan.budget for plan in callback.plan.epochs] == budgets
    assert seen.updates_per_epoch() == [-(-budget // 2) for budget in budgets]
    assert seen.final_learning_rate == pytest.approx(0, abs=1e-12)
    assert (callback.history.rows(0)["reason"] == "other_stage").sum() == 12


def test_growing_stages_by_random_rows_score_nothing(tmp_path):
    trainer = sft_trainer(tmp_path, ROWS)
    stages = Stages("source", ["code", "web"], epochs=[1, 2], growing=True, policy=RandomRows())
    callback = select(trainer, keep=1.0, policy=stages)
    epochs = train(trainer).epochs()
    assert [sources(rows) for rows in epochs] == [{"code": 8}, {"code": 8, "web": 12}, {"code": 8, "web": 12}]
    assert callback.history.rows(0)["ifd"].isna().all()


def test_guards_are_on_where_the_order_is_that_of_cherry(tmp_path):
    on = [Stratified("source", {"code": 0.5}), Stages("source", ["web"]), SoftSampling(0.5)]
    for number, policy in enumerate(on):
        callback = select(sft_trainer(tmp_path / str(number), ROWS), keep=4, policy=policy, guard="auto")
        assert callback.guard.names
    off = Stratified("source", {"code": 0.5}, policy=RandomRows())
    assert select(sft_trainer(tmp_path / "off", ROWS), keep=4, policy=off, guard="auto").guard is None


@pytest.mark.parametrize("policy", [Stratified("source", {"code": 0.5, "web": 0.5}), SoftSampling(0.3)])
def test_guards_hold_rows_back_from_them(tmp_path, policy):
    raw = raw_rows(24)
    raw[13]["output"], raw[13]["instruction"] = raw[12]["output"], raw[12]["instruction"]
    rows = text_rows(raw).add_column("source", SOURCES.tolist())
    trainer = sft_trainer(tmp_path, rows, num_train_epochs=1)
    policy = Stratified("source", policy.shares, policy=Cherry(INF)) if isinstance(policy, Stratified) else policy
    guard = Guard(limit=None, unfinished=None, freeze=None, on_misaligned="warn")
    callback = select(trainer, keep=16, policy=policy, guard=guard, max_ifd=None)
    trainer.train()
    reasons = callback.history.rows(0).set_index("row_id")["reason"]
    assert (reasons[[112, 113]] == "duplicate").sum() == 1
    kept = reasons[reasons == "kept"].index
    if isinstance(policy, Stratified):
        assert {name: sum(SOURCES[row - 100] == name for row in kept) for name in ("code", "web")} == {
            "code": 7,
            "web": 8,
        }


def test_stages_and_packing_are_refused(tmp_path):
    trainer = sft_trainer(tmp_path, ROWS, packing=True, max_length=64)
    with pytest.raises(UserError, match="how many packed rows those of a value fill"):
        select(trainer, keep=1.0, policy=Stages("source", ["web"]))


def test_an_unknown_stage_is_told_before_training(tmp_path):
    trainer = sft_trainer(tmp_path, ROWS)
    select(trainer, keep=1.0, policy=Stages("source", ["web", "maths"]))
    with pytest.raises(UserError, match="'source' has no value 'maths'; it has chat, code, web"):
        trainer.train()


def test_rows_are_ranked_by_weighted_ranks_of_columns(tmp_path):
    trainer = sft_trainer(tmp_path, ROWS, num_train_epochs=1)
    select(trainer, keep=3, max_ifd=INF, score=Ranking({"weight": 1.0, "ifd": 1e-9}))
    assert sorted(train(trainer).order()) == [121, 122, 123]


@RECIPES
@pytest.mark.parametrize(
    ("keys", "policy"),
    [
        (
            {"per": "source", "floors": ["code=0.1"], "caps": ["chat=5"]},
            Stratified("source", {}, {"code": 0.1}, {"chat": 5}),
        ),
        (
            {"per": "source", "shares": ["equal"], "policy": "random"},
            Stratified("source", "equal", policy=RandomRows()),
        ),
        (
            {"per": "answer_tokens", "shares": ["1=0.5", "2=0.5"], "buckets": 2},
            Stratified("answer_tokens", {"1": 0.5, "2": 0.5}, buckets=2),
        ),
        (
            {"per": "source", "mixture": ["web=0.9 code=0.1", "code=1.0"]},
            Mixture("source", [{"web": 0.9, "code": 0.1}, {"code": 1.0}]),
        ),
        (
            {"per": "source", "stages": ["a", "b"], "stage_epochs": [1, 2], "growing": True},
            Stages("source", ["a", "b"], (1, 2), True),
        ),
        ({"temperature": 0.2, "max_ifd": "0.9"}, SoftSampling(0.2, 0.9)),
        ({"diverse": "0.2", "diverse_by": "k_center"}, Diverse(0.2, by="k_center")),
        ({"score": "ifd:0.7 reward:0.3"}, Cherry(score=Ranking({"ifd": 0.7, "reward": 0.3}))),
    ],
)
def test_the_keys_of_a_recipe_make_these_policies(keys, policy, caplog):
    caplog.set_level(logging.WARNING)
    assert SelectionConfig(**keys).chosen_policy() == policy
    assert "no effect" not in caplog.text


@RECIPES
@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"floors": ["code=0.1"]}, "name it with per"),
        ({"per": "source"}, "goes with one of bad_cases, stages, mixture, shares, floors or caps; given were none"),
        ({"per": "source", "stages": ["a"], "mixture": ["a=1.0"]}, "given were stages and mixture"),
        ({"per": "source", "floors": ["0.1"]}, "floors wants VALUE=NUMBER"),
        ({"per": "source", "floors": ["code=many"]}, "wants a number or VALUE=NUMBER"),
        ({"temperature": 0.2, "diverse": "0.2"}, "leave one out"),
        ({"temperature": -1.0}, "temperature must be a positive number"),
        ({"score": "ifd ifd"}, "'ifd' is named twice"),
    ],
)
def test_what_the_keys_contradict_is_told(keys, said):
    with pytest.raises(UserError, match=said):
        SelectionConfig(**keys)


@RECIPES
def test_keys_without_effect_are_named(caplog):
    caplog.set_level(logging.WARNING)
    SelectionConfig(diverse_by="k_center", growing=True, buckets=3, policy="random", temperature=0.5)
    assert "diverse_by: no effect without diverse." in caplog.text
    assert "growing: no effect without stages." in caplog.text
    assert "buckets: no effect without shares, floors or caps." in caplog.text
    assert "temperature: no effect without policy: cherry." in caplog.text


def test_a_policy_reads_answers_as_texts(tmp_path):
    raw = raw_rows(24)
    trainer = sft_trainer(tmp_path, text_rows(raw), num_train_epochs=2)
    callback = select(trainer, keep=4, policy=IterIT(max_ifd=INF))
    epochs = train(trainer).epochs()
    texts = {row["row_id"]: row["output"] for row in raw}
    for epoch, kept in enumerate(epochs):
        rows = callback.history.rows(epoch).set_index("row_id")
        columns = {"ifd_ppl": rows["ifd_ppl"].to_numpy(), "ifd_status": rows["ifd_status"].to_numpy()}
        columns["answer_text"] = np.array([texts[row] for row in rows.index], dtype=object)
        expected = IterIT(max_ifd=INF)(columns, 4, ids=rows.index.to_numpy())
        assert sorted(kept) == sorted(rows.index[expected.kept])
        assert (rows["reason"] == "redundant").sum() == 8
