"""A policy of a user's own, written with public names alone: what it keeps is trained on, and its reasons are kept."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
from datasets import Dataset
from tiny_runs import RECIPES, Stop, raw_rows, select, sft_trainer, text_rows, tokenised, train

from ifd_trainer import (
    BalancedRandom,
    CalibratedLimit,
    Cherry,
    Curriculum,
    Guard,
    LongestAnswers,
    LowestScores,
    MiddleBand,
    RandomRows,
    Selection,
    TargetSet,
    write_report,
)
from ifd_trainer.method.columns import SCORES
from ifd_trainer.recipe.parsing import parse_recipe
from ifd_trainer.recipe.selection import SelectionConfig


@dataclass(frozen=True)
class Longest:
    """The rows with the longest answers; ties by id."""

    at_least: int = 1

    def __call__(self, columns, budget, *, ids=None, rng=None):
        tokens = columns["answer_tokens"]
        order = np.lexsort((ids, -tokens))
        return Selection.without_scores(order[:budget], len(tokens), reason="shorter")


def at_random(columns, budget, *, ids, rng):
    rows = len(columns["ifd"])
    return Selection.without_scores(rng.choice(rows, size=budget, replace=False), rows, reason="not_drawn")


def given(kept, rows=24):
    """A policy that returns these positions, whatever it is asked."""
    selection = Selection(kept, np.full(rows, "kept", dtype=object), 0.0, rows, 0)
    return lambda columns, budget, **_: selection


def test_what_it_keeps_is_trained_on_and_the_others_have_its_reason(tmp_path):
    trainer = sft_trainer(tmp_path, 24)
    callback = select(trainer, keep=[4, 5, 6], policy=Longest())
    seen = train(trainer)
    lengths = {row["row_id"]: sum(label != -100 for label in row["labels"]) for row in tokenised(trainer)}
    longest = sorted(lengths, key=lambda row: (-lengths[row], row))
    for epoch, rows in enumerate(seen.epochs()):
        assert sorted(rows) == sorted(longest[: 4 + epoch])
        assert callback.history.epochs[epoch]["reasons"] == {"kept": 4 + epoch, "shorter": 20 - epoch}
    page = write_report(callback.history).read_text(encoding="utf-8")
    assert "Longest(at_least=1)" in page
    assert "shorter" in page


FREE = [RandomRows(), LongestAnswers(), BalancedRandom("source")]  # of scores
KNOWN = ["row_id", "times", "reason", "answer_tokens"]


def sourced_rows(count=24):
    """Rows of two sources, one of them with an answer that cannot be scored."""
    rows = [{**row, "source": "ab"[i % 2]} for i, row in enumerate(text_rows(raw_rows(count)).to_list())]
    rows[3]["completion"] = ""
    return Dataset.from_list(rows)


def not_to_be_scored(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("a forward, though nothing reads the scores")

    for name in ("score_pairs", "nll_with_tails", "prompt_features"):
        monkeypatch.setattr(f"ifd_trainer.training.pool_scorer.{name}", refuse)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("policy", FREE, ids=["random", "longest", "balanced"])
def test_what_reads_no_score_is_not_scored_and_keeps_the_same_rows(tmp_path, monkeypatch, policy, packing):
    if packing and isinstance(policy, BalancedRandom):
        pytest.skip("packing drops the column that rows are balanced by")
    options = {"packing": True, "max_length": 64} if packing else {}
    histories = []
    for each in (lambda *arguments, **options: policy(*arguments, **options), policy):  # a plain callable reads scores
        trainer = sft_trainer(tmp_path / str(len(histories)), sourced_rows(), **options)
        callback = select(trainer, keep=2 if packing else 4, policy=each)
        trainer.train()
        histories.append(callback.history)
        not_to_be_scored(monkeypatch)
    with_scores, without = histories
    for epoch in range(3):
        scored, blank = with_scores.rows(epoch), without.rows(epoch)
        assert scored["ifd"].notna().sum() == (blank["reason"] != "empty_answer").sum() >= 23
        assert blank[list(SCORES)].isna().all(axis=None)
        assert blank[KNOWN].equals(scored[KNOWN])
    assert [record["scored_at"] for record in without.epochs] == [None] * 3
    page = write_report(without).read_text(encoding="utf-8")
    assert type(policy).__name__ in page
    assert "Rows not trained on" in page
    assert "not finite" not in page


@pytest.mark.parametrize(
    "options",
    [
        {"keep": 4, "order": "descending"},
        {"keep": 4, "guard": Guard(limit=None, freeze=None, on_misaligned="warn")},
        {"schedule": Curriculum(4, 2)},
    ],
    ids=["order", "guard", "curriculum"],
)
def test_scores_that_something_else_reads_are_computed(tmp_path, options):
    trainer = sft_trainer(tmp_path, 24)
    callback = select(trainer, policy=RandomRows(), **options)
    trainer.train()
    assert callback.history.rows(0)["ifd"].notna().any()


@pytest.mark.parametrize("step", [1, 2, 3, 5])
def test_a_run_that_is_not_scored_is_resumed_exactly(tmp_path, step):
    def begun(name):
        trainer = sft_trainer(tmp_path / name, sourced_rows(), save_strategy="steps", save_steps=1)
        select(trainer, keep=4, policy=BalancedRandom("source"), every=2)
        return trainer

    through, cut = train(begun("whole")), begun("cut")
    cut.add_callback(Stop(step))
    before = train(cut)
    after = train(begun("cut"), resume_from_checkpoint=str(tmp_path / "cut" / f"checkpoint-{step}"))
    assert before.order() + after.order() == through.order()


def test_its_generator_is_seeded_anew_in_each_epoch(tmp_path):
    runs = []
    for seed in (1, 1, 2):
        trainer = sft_trainer(tmp_path, 24)
        select(trainer, keep=6, policy=at_random, seed=seed)
        runs.append([sorted(rows) for rows in train(trainer).epochs()])
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]
    assert len(set(map(tuple, runs[0]))) == 3


def test_it_fills_packed_rows_too(tmp_path):
    trainer = sft_trainer(tmp_path, 24, num_train_epochs=1, packing=True, max_length=64)
    callback = select(trainer, keep=2, policy=Longest())
    trainer.train()
    rows = callback.history.rows(0)
    kept = rows[rows["times"] > 0]
    assert callback.history.epochs[0]["packed_rows"] == 2
    assert kept["answer_tokens"].min() >= rows.loc[rows["times"] == 0, "answer_tokens"].max()


def test_a_run_with_another_policy_is_not_resumed(tmp_path):
    trainer = sft_trainer(tmp_path, 24, save_strategy="steps", save_steps=2)
    select(trainer, keep=4, policy=Longest())
    train(trainer)
    again = sft_trainer(tmp_path, 24, save_strategy="steps", save_steps=2)
    select(again, keep=4, policy=Longest(at_least=2))
    with pytest.raises(ValueError, match=r"policy: .*Longest\(at_least=1\) in the checkpoint, .*at_least=2\) now"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        (lambda columns, budget, **_: [0, 1], r"A policy returns an ifd_trainer\.Selection, but .* returned \[0, 1\]"),
        (
            lambda columns, budget, **_: Selection.without_scores(np.arange(2), 24, reason="no"),
            "The budget is 4 rows, but .* kept 2",
        ),
        (given(np.array([True, False] * 12)), "are positions, whole numbers from 0 to 23, but .* kept"),
        (given([0, 1, 2, 24]), "are positions, whole numbers from 0 to 23, but"),
        (given([0, 1, 2, -1]), "are positions, whole numbers from 0 to 23, but"),
        (given([0.0, 1.0, 2.0, 3.0]), "are positions, whole numbers from 0 to 23, but"),
        (given([0, 1, 2, 3], rows=23), r"A Selection has a reason for each of 24 rows, but .* gave \(23,\)"),
    ],
)
def test_what_is_no_selection_of_the_budget_is_refused(tmp_path, policy, words):
    trainer = sft_trainer(tmp_path, 24)
    select(trainer, keep=4, policy=policy)
    with pytest.raises(ValueError, match=words):
        trainer.train()


def ranked(columns, budget, *, ids, rng, sign=1):
    order = np.argsort(sign * columns["das"], kind="stable")
    return Selection.without_scores(order[:budget], len(order), reason="other")


class Limited:
    """Cherry with a limit of its own."""

    score, on_shortfall = "ifd", "relax"

    def __init__(self, alpha):
        self.max_ifd = CalibratedLimit(alpha, 24)

    def __call__(self, columns, budget, **options):
        return Cherry(on_shortfall="relax")(columns, budget, **options)


@pytest.mark.parametrize(
    ("then", "now"),
    [
        (partial(ranked, sign=1), partial(ranked, sign=-1)),
        (Limited(0.3), Limited(0.1)),
        (ranked, partial(ranked, sign=1)),
    ],
)
def test_what_a_policy_is_made_of_is_compared_too(tmp_path, then, now):
    for policy in (then, now):
        trainer = sft_trainer(tmp_path, 24, num_train_epochs=1, save_strategy="steps", save_steps=1)
        callback = select(trainer, keep=4, policy=policy)
        if policy is then:
            train(trainer)
            assert (callback.history.epochs[0]["limit"] is None) == (then is not now and not isinstance(then, Limited))
    with pytest.raises(ValueError, match=r"cannot be resumed exactly: (policy|limit): "):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_a_policy_may_name_the_column_that_it_ranks_by(tmp_path, caplog):
    policy = partial(ranked)
    policy.score = "das"
    trainer = sft_trainer(tmp_path, 24, num_train_epochs=1)
    callback = select(trainer, keep=4, policy=policy)
    train(trainer)
    rows = callback.history.rows(0)
    kept = rows.nsmallest(4, "das")
    assert sorted(kept["row_id"]) == sorted(rows.loc[rows["times"] > 0, "row_id"])
    assert callback.history.epochs[0]["mean_kept"] == pytest.approx(kept["das"].mean())
    assert "their prompt does not help" not in caplog.text


@pytest.mark.parametrize(
    ("attributes", "words"),
    [
        (
            {"score": "quality"},
            r"score must be one of cas, .*, a column of the training set \(completion, .*row_id\), .*, got 'quality'",
        ),
        ({"score": "cas", "max_ifd": "calibrated"}, "A calibrated limit is one of ifd or ifd_ppl, not of cas"),
    ],
)
def test_attributes_that_cannot_be_used_are_told_at_once(tmp_path, attributes, words):
    policy = partial(ranked)
    vars(policy).update(attributes)
    with pytest.raises(ValueError, match=words):
        select(sft_trainer(tmp_path, 4), policy=policy)


def test_a_policy_reads_a_column_of_the_data_set(tmp_path):
    rows = text_rows(raw_rows(24)).add_column("source", ["a"] * 18 + ["b"] * 6)
    trainer = sft_trainer(tmp_path, rows, num_train_epochs=2)
    callback = select(trainer, keep=8, policy=BalancedRandom("source"))
    seen = train(trainer)
    for rows in seen.epochs():
        assert sum(row >= 118 for row in rows) == 4
    assert set(seen.epochs()[0]) != set(seen.epochs()[1])
    page = write_report(callback.history).read_text(encoding="utf-8")
    assert "not drawn" in page


def test_two_stages_read_columns_of_the_data_set_and_no_row_is_scored(tmp_path):
    mean, std = [*np.linspace(0.9, 0.1, 22), None, 1.2], [*np.tile([0.3, 0.1], 11), 0.0, 0.0]
    rows = text_rows(raw_rows(24)).add_column("sifd_mean", mean).add_column("sifd_std", std)
    trainer = sft_trainer(tmp_path, rows, num_train_epochs=1)
    policy = SelectionConfig(policy="ifd_trainer.Hierarchical").chosen_policy()
    callback = select(trainer, keep=4, policy=policy)
    seen = train(trainer)
    ids = rows["row_id"][:]
    assert sorted(seen.epochs()[0]) == sorted(ids[row] for row in (1, 3, 5, 7))
    reasons = callback.history.rows(0).set_index("row_id")["reason"]
    assert reasons[[ids[row] for row in (0, 1, 8, 22, 23)]].tolist() == [
        *("unstable", "kept", "below_cut", "no_value", "above_limit")
    ]
    assert "change less among their neighbours" in write_report(callback.history).read_text(encoding="utf-8")


@pytest.mark.parametrize(("packing", "words"), [(False, r"it has .*'row_id'\]"), (True, "packing drops all others")])
def test_a_column_that_is_not_there_is_named(tmp_path, packing, words):
    trainer = sft_trainer(tmp_path, 24, packing=packing, max_length=64)
    select(trainer, keep=2, policy=BalancedRandom("source"))
    with pytest.raises(ValueError, match=f"The training set has no column 'source'; .*{words}"):
        trainer.train()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("random", RandomRows()),
        ("longest", LongestAnswers()),
        ("lowest", LowestScores()),
        ("middle", MiddleBand()),
        ("ifd_trainer.LongestAnswers", LongestAnswers()),
    ],
)
def test_a_recipe_names_a_policy(name, expected):
    assert SelectionConfig(policy=name).chosen_policy() == expected


def test_a_recipe_balances_by_a_column_that_it_names():
    assert SelectionConfig(policy="balanced", balance_by="source").chosen_policy() == BalancedRandom("source")
    with pytest.raises(ValueError, match="name it with balance_by"):
        SelectionConfig(policy="balanced")


def test_a_recipe_names_a_target_set_and_perhaps_a_limit(caplog):
    named = {"policy": "target", "target_set": "task.jsonl"}
    assert SelectionConfig(**named).chosen_policy() == TargetSet("task.jsonl")
    limited = SelectionConfig(**named, max_ifd="0.9", on_shortfall="error").chosen_policy()
    assert limited == TargetSet("task.jsonl", max_ifd=0.9, on_shortfall="error")
    measured = SelectionConfig(**named, max_ifd="calibrated", alpha=0.1).chosen_policy()
    assert measured.max_ifd == CalibratedLimit.of(0.1)
    assert SelectionConfig(**named).only_embeds
    assert not SelectionConfig(**named, max_ifd="0.9").only_embeds
    assert not SelectionConfig(**named, curriculum="easy_to_hard").only_embeds
    assert caplog.text == ""
    SelectionConfig(**named, score="ifd_ppl")
    SelectionConfig(target_set="task.jsonl")
    assert "score: no effect without policy: cherry" in caplog.text
    assert "target_set: no effect without policy: target" in caplog.text


@RECIPES
def test_a_policy_beside_the_recipe_is_found(tmp_path, monkeypatch):
    (tmp_path / "policy_beside_a_recipe.py").write_text(
        "from ifd_trainer import LongestAnswers\n\nclass Mine(LongestAnswers):\n    pass\n"
    )
    (tmp_path / "rows.jsonl").write_text('{"instruction": "Say red.", "output": "red"}\n')
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model_name_or_path: none\ndataset_name: rows.jsonl\npolicy: policy_beside_a_recipe.Mine\n")
    monkeypatch.setattr("ifd_trainer.recipe.parsing.check_recipe", lambda *_: None)  # looks for the model
    path = list(sys.path)
    parsed = parse_recipe(str(recipe), ["--output_dir", str(tmp_path / "out")])
    assert type(parsed.selection.chosen_policy()).__name__ == "Mine"
    assert sys.path == path


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (
            {"policy": "best"},
            "policy: 'best' is none of cherry, target, infobatch, kakurenbo, lead, random, balanced, longest, lowest",
        ),
        ({"policy": "no_module.Mine"}, "policy: 'no_module.Mine' cannot be imported: No module named 'no_module'"),
        ({"policy": "ifd_trainer.Mine"}, "policy: 'ifd_trainer.Mine' cannot be imported"),
        ({"policy": "ifd_trainer.BalancedRandom"}, "cannot be made without arguments"),
        ({"policy": "ifd_trainer.__version__"}, "is a str, which is no callable"),
        (
            {"policy": "target"},
            "policy: target keeps the rows most like some examples .* name a file of them with targ",
        ),
        ({"policy": "target", "target_set": "t.jsonl", "diverse": "0.2"}, "diverse chooses rows by itself"),
        ({"policy": "random", "diverse": "0.2"}, "diverse chooses rows by itself, but policy is 'random'"),
    ],
)
def test_a_policy_that_is_none_is_refused_before_a_model_is_loaded(keys, words):
    with pytest.raises(ValueError, match=words):
        SelectionConfig(**keys)


def test_keys_of_another_policy_are_called_idle(caplog):
    SelectionConfig(policy="random", max_ifd=2.0, score="ifd_ppl")
    assert "max_ifd, score: no effect without policy: cherry" in caplog.text
    caplog.clear()
    SelectionConfig(policy="middle", score="ifd_ppl")
    assert caplog.text == ""


# ---- a score of one's own ---------------------------------------------------------------------------------------


def gain(columns):
    """What the prompt tells of an answer, nats in all."""
    return (columns["das"] - columns["cas"]) * columns["answer_tokens"]


def rewarded(rows=24):
    rng = np.random.default_rng(0)
    return text_rows(raw_rows(rows)).add_column("reward", rng.permutation(rows).astype(float) - 12)


def test_rows_may_be_ranked_by_a_function_of_columns(tmp_path):
    trainer = sft_trainer(tmp_path, 24)
    callback = select(trainer, keep=5, score=gain)
    seen = train(trainer)
    for epoch, rows in enumerate(seen.epochs()):
        history = callback.history.rows(epoch).set_index("row_id")
        values = (history["das"] - history["cas"]) * history["answer_tokens"]
        assert set(rows) == set(values.nlargest(5).index)
        np.testing.assert_allclose(history["own_score"], values)
        assert callback.history.epochs[epoch]["cut"] == pytest.approx(values.nlargest(5).min())
    assert callback.history.settings["score"].endswith("gain")
    assert "gain" in write_report(callback.history).read_text(encoding="utf-8")


def test_rows_may_be_ranked_by_a_column_of_the_data_set_without_a_limit_of_1(tmp_path):
    trainer = sft_trainer(tmp_path, rewarded(), num_train_epochs=2)
    callback = select(trainer, keep=6, score="reward", order="descending")
    seen = train(trainer)
    best = sorted(trainer.train_dataset, key=lambda row: -row["reward"])[:6]
    assert seen.epochs() == [[row["row_id"] for row in best]] * 2
    assert callback.history.epochs[0]["cut"] == best[-1]["reward"] > 1


def test_a_limit_that_is_set_is_one_of_that_column(tmp_path):
    trainer = sft_trainer(tmp_path, rewarded(), num_train_epochs=1)
    select(trainer, keep=3, score="reward", max_ifd=4.5)
    row_of = {row["reward"]: row["row_id"] for row in trainer.train_dataset}
    assert set(train(trainer).order()) == {row_of[4.0], row_of[3.0], row_of[2.0]}


def test_guards_hold_back_rows_also_where_another_score_ranks(tmp_path):
    trainer = sft_trainer(tmp_path, rewarded(), num_train_epochs=1)
    guard = Guard(CalibratedLimit(0.5, 24), None, None, None, None, on_misaligned="warn")
    callback = select(trainer, keep=4, score="reward", guard=guard)
    order = train(trainer).order()
    history = callback.history.rows(0).set_index("row_id")
    below = history.index[history["ifd"] < callback.history.epochs[0]["limit"]]
    assert 4 < len(below) < 24
    assert set(order) == set(history.loc[below, "own_score"].nlargest(4).index)


@RECIPES
def test_a_recipe_names_a_column_or_a_function_of_a_module_beside_it(tmp_path, monkeypatch):
    (tmp_path / "score_beside_a_recipe.py").write_text("def mine(columns):\n    return -columns['cas']\n")
    (tmp_path / "rows.jsonl").write_text('{"instruction": "Say red.", "output": "red"}\n')
    monkeypatch.setattr("ifd_trainer.recipe.parsing.check_recipe", lambda *_: None)  # looks for the model
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model_name_or_path: none\ndataset_name: rows.jsonl\nscore: score_beside_a_recipe.mine\n")
    policy = parse_recipe(str(recipe), ["--output_dir", str(tmp_path / "out")]).selection.chosen_policy()
    assert policy.score({"cas": np.array([2.0])}).tolist() == [-2.0]
    sys.modules.pop("score_beside_a_recipe")
    assert SelectionConfig(score="reward").chosen_policy() == Cherry(score="reward")
    with pytest.raises(ValueError, match=r"score: 'no_module.mine' cannot be imported"):
        SelectionConfig(score="no_module.mine")


@pytest.mark.parametrize(
    ("score", "words"),
    [
        (lambda columns: columns["cas"][:3], r"A score is one number for each of 24 rows, but .* gave float64 \(3,\)"),
        (lambda columns: columns["ifd_status"], r"one number for each of 24 rows, but .* gave object"),
    ],
)
def test_what_a_function_gives_is_checked_before_anything_trains(tmp_path, score, words):
    trainer = sft_trainer(tmp_path, 24)
    select(trainer, keep=4, score=score)
    with pytest.raises(ValueError, match=words):
        trainer.train()
    assert trainer.state.global_step == 0
