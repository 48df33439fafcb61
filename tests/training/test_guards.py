"""The guards inside a run: what they measure, against one loss at a time; which rows train, and what a resume keeps."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from conftest import ROUNDING, build_model, reference_nll
from scipy.stats import spearmanr
from tiny_runs import (
    TOKENIZER,
    difference,
    model_with,
    raw_rows,
    select,
    selection_logs,
    sft_trainer,
    text_rows,
    tokenised,
    train,
    weights_of,
)

from ifd_trainer import Brief, Cherry, Guard, IFDSelectionCallback, RandomRows, Selection, Timing
from ifd_trainer.method.calibrated_limit import CalibratedLimit
from ifd_trainer.method.duplicates import Duplicates
from ifd_trainer.method.pairing_test import PairingTest
from ifd_trainer.method.scoring_health import Freeze
from ifd_trainer.method.unfinished import Unfinished
from ifd_trainer.training.options import guard_of

NONE = {"limit": None, "pairing": None, "unfinished": None, "duplicates": None, "freeze": None, "on_misaligned": "warn"}
CUT = Unfinished(alpha=0.3, cuts=24)  # a cut between two digits leaves a number, with which answers end
TEST = PairingTest(alpha=0.5, anchors=3, tokens=2)
ALL = Guard(CalibratedLimit(alpha=0.6, pairs=24), TEST, CUT, Duplicates(), None, on_misaligned="warn")


def only(**guards) -> Guard:
    return Guard(**{**NONE, **guards})


@pytest.fixture(scope="module")
def learned():
    """Weights that know where the answers of `raw_rows` end: behind a number."""
    trainer = sft_trainer("unused", text_rows(raw_rows(300, seed=5)), num_train_epochs=6, per_device_train_batch_size=8)
    trainer.train()
    return weights_of(trainer.model)


def some_cut(rows: int = 40, cut: int = 8) -> list[dict]:
    """Rows of which the first few stop before their end."""
    raw = raw_rows(rows)
    for row in raw[:cut]:
        row["output"] = row["output"].rsplit(" ", 1)[0]  # without the number
    return raw


def starts(rows) -> list[int]:
    return [next(i for i, label in enumerate(labels) if label != -100) for labels in rows["labels"]]


# ---- unfinished answers -----------------------------------------------------------------------------------------


def test_unfinished_rows_are_dropped_by_a_threshold_that_one_loss_at_a_time_gives(learned, tmp_path):
    trainer = sft_trainer(tmp_path, text_rows(some_cut()), model=model_with(learned), num_train_epochs=1)
    rows = tokenised(trainer)
    ids, answers = np.array(rows["row_id"]), [row[:-1] for row in rows["input_ids"]]
    callback = select(trainer, keep=20, max_ifd=float("inf"), guard=only(unfinished=CUT))
    seen = train(trainer)
    model, eos = model_with(learned), TOKENIZER.eos_token_id
    whole = np.array([reference_nll(model, [*row, eos], len(row)) for row in answers])
    drawn, left = CUT.draw(ids, np.array([len(row) - s for row, s in zip(answers, starts(rows), strict=True)]), 42)
    cut = [
        reference_nll(model, [*answers[i][: starts(rows)[i] + n], eos], starts(rows)[i] + n)
        for i, n in zip(drawn, left, strict=True)
    ]
    # The threshold where both errors together are smallest, by trying every one of them.
    errors = {t: np.mean(np.array(cut) < t) + np.mean(whole >= t) for t in cut}
    threshold = max(t for t in cut if errors[t] == min(errors.values()))
    assert callback.history.epochs[0]["unfinished"] == pytest.approx(threshold, rel=ROUNDING)
    history = callback.history.rows(0).set_index("row_id")
    found = set(history.index[history["reason"] == "unfinished"])
    assert found == set(ids[whole >= threshold])
    assert len(found & {100 + i for i in range(8)}) >= 7
    assert len(seen.order()) == 20
    assert not found & set(seen.order())
    assert selection_logs(trainer)[0]["ifd/dropped_unfinished"] == len(found)


def test_a_model_that_does_not_know_the_end_of_turn_drops_none_and_says_so(tmp_path, caplog):
    trainer = sft_trainer(tmp_path, text_rows(some_cut()), num_train_epochs=1)  # its weights are random
    callback = select(trainer, keep=5, max_ifd=float("inf"), guard=only(unfinished=CUT))
    train(trainer)
    assert "the end-of-turn token tells too little about which answers are finished" in caplog.text
    assert callback.history.epochs[0]["unfinished"] is None
    assert "unfinished" not in callback.history.epochs[0]["reasons"]


def test_rows_that_the_trainer_cut_are_not_unfinished(learned, tmp_path):
    trainer = sft_trainer(tmp_path, text_rows(some_cut()), model=model_with(learned), num_train_epochs=1, max_length=40)
    cut = {row["row_id"] for row in tokenised(trainer) if row["input_ids"][-1] != TOKENIZER.eos_token_id}
    assert len(cut) > 3
    callback = select(trainer, keep=5, max_ifd=float("inf"), guard=only(unfinished=CUT))
    train(trainer)
    history = callback.history.rows(0).set_index("row_id")
    assert history.loc[sorted(cut), "eot_loss"].isna().all()
    assert (history.loc[sorted(cut), "reason"] != "unfinished").all()
    assert (history["reason"] == "unfinished").any()


# ---- duplicates -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [1, 2])
def test_of_rows_that_say_the_same_the_lowest_id_is_trained_on_in_every_run(tmp_path, seed):
    raw = raw_rows(24)
    for copy, of, written in ((20, 3, str.upper), (21, 3, str.title), (9, 8, str.upper)):
        raw[copy] |= {"instruction": written(raw[of]["instruction"]), "output": raw[of]["output"] + "."}
    trainer = sft_trainer(tmp_path, text_rows(raw).shuffle(seed=seed), num_train_epochs=2)
    callback = select(trainer, keep=21, max_ifd=float("inf"), seed=seed, guard=only(duplicates=True))
    seen = train(trainer)
    for epoch, rows in enumerate(seen.epochs()):
        assert set(rows) == {100 + i for i in range(24)} - {120, 121, 109}
        history = callback.history.rows(epoch).set_index("row_id")
        assert history["duplicate_of"].dropna().astype(int).to_dict() == {120: 103, 121: 103, 109: 108}
        assert (history.loc[[120, 121, 109], "reason"] == "duplicate").all()


def test_a_row_stands_for_its_group_where_another_one_is_dropped(tmp_path):
    raw = raw_rows(24)
    raw[20] |= {"instruction": raw[3]["instruction"], "output": raw[3]["output"]}
    raw[3]["output"] = ""
    trainer = sft_trainer(tmp_path, text_rows(raw), num_train_epochs=1)
    select(trainer, keep=23, max_ifd=float("inf"), guard=only(duplicates=True))
    assert set(train(trainer).order()) == {100 + i for i in range(24) if i != 3}


# ---- the pairing test -------------------------------------------------------------------------------------------


def reference_p(trainer, weights, callback, epoch) -> dict[int, float]:
    """p-values of all rows by one loss at a time, under the anchors that the test draws for these rows."""
    rows, model = tokenised(trainer), model_with(weights)
    history = callback.history.rows(epoch).set_index("row_id")
    ids = np.array(rows["row_id"])
    tested = np.flatnonzero(history.loc[ids, "p_value"].notna())
    anchors = TEST.draw(tested, np.arange(len(ids)), int(np.random.SeedSequence([42, epoch]).generate_state(1)[0]))
    first, tokens, longest = starts(rows), rows["input_ids"][:], max(map(len, rows["input_ids"]))
    prompts, answers = ([row[:s] for row, s in zip(tokens, first, strict=True)] for _ in range(2))
    answers = [row[s:-1] for row, s in zip(tokens, first, strict=True)]
    found = {}
    for row, tried in zip(tested, anchors, strict=True):
        answer = answers[row][: TEST.tokens]
        usable = [
            i for i in tried if i != row and answers[i] != answers[row] and len(prompts[i] + answers[row]) <= longest
        ][: TEST.anchors]
        own, *others = (reference_nll(model, prompts[i] + answer, len(prompts[i])) for i in (row, *usable))
        found[ids[row]] = (1 + sum(loss <= own for loss in others)) / (1 + len(others))
    return found


@pytest.fixture(scope="module")
def paired(tmp_path_factory):
    trainer = sft_trainer(tmp_path_factory.mktemp("paired"), 30, num_train_epochs=1)
    callback = select(trainer, keep=6, max_ifd=float("inf"), guard=only(pairing=TEST))
    return trainer, callback, train(trainer)


def test_p_values_are_those_of_one_loss_at_a_time(paired):
    trainer, callback, seen = paired
    history = callback.history.rows(0).set_index("row_id")
    tested = history["p_value"].dropna()
    assert len(tested) > 6
    # Rows that were tested in a later round have anchors of their own: of the first round all are compared.
    first = set(history["ifd"].nlargest(6).index)
    expected = reference_p(trainer, seen.weights[0], callback, 0)
    order = sorted(first)
    anchors_alike = [row for row in order if tested[row] == pytest.approx(expected[row])]
    assert len(anchors_alike) >= len(order) - 2


def test_rows_that_fail_give_their_places_to_the_next_best(paired):
    _, callback, seen = paired
    history = callback.history.rows(0).set_index("row_id").sort_values("ifd", ascending=False)
    failed = history.index[history["reason"] == "mismatched"]
    assert len(failed) >= 1
    assert (history.loc[failed, "p_value"] > 0.5).all()
    assert set(seen.order()) == set(history.index.difference(failed, sort=False)[:6])
    assert (history.loc[seen.order(), "p_value"] <= 0.5).all()
    tested = history.index[history["p_value"].notna()]
    assert set(tested) == set(failed) | set(seen.order())  # no other row costs a forward


# ---- all of them, resumed and packed ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guarded(tmp_path_factory, learned):
    raw = some_cut(40)
    raw[30] |= {key: raw[12][key] for key in ("instruction", "output")}
    folder = tmp_path_factory.mktemp("guarded")
    return raw, *guarded_run(folder, raw, learned)


def guarded_run(folder, raw, learned, resume=None):
    trainer = sft_trainer(
        folder,
        text_rows(raw).map(lambda row, i: {"prompt": f"{i} {row['prompt']}"} if i == 30 else row, with_indices=True),
        model=model_with(learned),
        learning_rate=1e-3,
        save_strategy="steps",
        save_steps=2,
    )
    callback = select(trainer, keep=[5, 6, 5], guard=ALL)
    return trainer, callback, train(trainer, resume_from_checkpoint=resume)


def test_no_row_that_a_guard_has_dropped_is_trained_on(guarded):
    _, _, callback, seen = guarded
    kinds = set()
    for epoch, rows in enumerate(seen.epochs()):
        history = callback.history.rows(epoch).set_index("row_id")
        assert (history.loc[rows, "reason"] == "kept").all()
        kinds |= set(history["reason"])
    assert {"above_limit", "unfinished", "mismatched"} <= kinds


@pytest.mark.parametrize("step", [2, 4, 6])
def test_a_resumed_run_has_the_same_verdicts_and_rows(guarded, learned, tmp_path, step):
    raw, whole, callback, seen = guarded
    folder = tmp_path / "resumed"
    shutil.copytree(whole.args.output_dir, folder)
    trainer, again, after = guarded_run(folder, raw, learned, resume=str(folder / f"checkpoint-{step}"))
    assert after.order() == seen.order()[-len(after.order()) :]
    assert difference(weights_of(trainer.model), weights_of(whole.model)) == 0.0
    for epoch in range(3):
        assert again.history.rows(epoch).equals(callback.history.rows(epoch))
    watched = ("limit", "unfinished", "separation", "rank_correlation", "reasons", "kept_only_without_guards")
    for name in watched:
        assert [r[name] for r in again.history.epochs] == [r[name] for r in callback.history.epochs]


def test_other_guards_are_not_resumed(guarded, tmp_path):
    raw, whole, *_ = guarded
    shutil.copytree(whole.args.output_dir, tmp_path / "resumed")
    trainer = sft_trainer(tmp_path / "resumed", text_rows(raw), save_strategy="steps", save_steps=2)
    select(trainer, keep=[5, 6, 5])
    with pytest.raises(ValueError, match=r"guard: Guard\(.*in the checkpoint, None now"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "resumed" / "checkpoint-2"))


def test_examples_of_packed_rows_are_guarded_too(learned, tmp_path):
    trainer = sft_trainer(
        tmp_path, text_rows(some_cut()), model=model_with(learned), num_train_epochs=2, packing=True, max_length=64
    )
    callback = select(trainer, keep=3, max_ifd=float("inf"), guard=only(unfinished=CUT, pairing=TEST))
    trainer.train()
    reasons = set()
    for epoch in range(2):
        rows = callback.history.rows(epoch)
        reasons |= set(rows["reason"])
        assert (rows.loc[rows["times"] > 0, "reason"] == "kept").all()
    assert {"unfinished", "mismatched"} <= reasons


def test_what_the_same_scores_would_have_kept_without_guards_is_in_the_history(guarded):
    _, _, callback, _ = guarded
    for epoch, record in enumerate(callback.history.epochs):
        rows = callback.history.rows(epoch)
        eligible = rows[rows["ifd"] < 1].sort_values(["ifd", "row_id"], ascending=[False, True])
        expected = set(eligible["row_id"][: record["budget"]])
        assert set(rows.loc[rows["kept_without_guards"], "row_id"]) == expected
        assert record["kept_only_without_guards"] == len(expected - set(rows.loc[rows["times"] > 0, "row_id"])) > 0


# ---- scorings that say nothing ----------------------------------------------------------------------------------


def test_selection_freezes_at_the_first_scoring_without_information_and_stays_frozen(tmp_path, caplog):
    def run(folder, resume=None):
        trainer = sft_trainer(folder, 40, num_train_epochs=4, save_strategy="steps", save_steps=2)
        callback = select(trainer, keep=4, max_ifd=float("inf"), guard=only(freeze=Freeze(agreement=0.5)))
        score_pool, calls = callback.score_pool, []

        def unlike(description):
            calls.append(description)
            scores = score_pool(description)
            if "epoch 2" in description:
                scores.ifd[:] = np.random.default_rng(0).permutation(scores.ifd)
            return scores

        callback.score_pool = unlike
        return trainer, callback, train(trainer, resume_from_checkpoint=resume), calls

    _, callback, seen, calls = run(tmp_path / "run")
    assert calls == ["IFD, epoch 0", "IFD, epoch 1", "IFD, epoch 2"]
    records = callback.history.epochs
    assert [record["scored_at"] for record in records] == [0, 1, 1, 1]
    assert [record["frozen"] is None for record in records] == [True, True, False, False]
    assert "Epoch 2: scores rank rows otherwise than those before" in caplog.text
    assert set(seen.epochs()[1]) == set(seen.epochs()[2]) == set(seen.epochs()[3])
    shutil.copytree(tmp_path / "run", tmp_path / "resumed")
    *_, after, calls = run(tmp_path / "resumed", resume=str(tmp_path / "resumed" / "checkpoint-6"))
    assert calls == []
    assert after.order() == seen.order()[-len(after.order()) :]


def test_what_is_watched_of_a_scoring_is_of_rows_that_were_not_trained_on(tmp_path):
    trainer = sft_trainer(tmp_path, 40, num_train_epochs=2)
    callback = select(trainer, keep=5, max_ifd=float("inf"), guard=only(limit=CalibratedLimit(0.9, 24)))
    seen = train(trainer)
    first, second = (callback.history.rows(epoch).set_index("row_id")["ifd"] for epoch in (0, 1))
    unseen = second.index.difference(seen.epochs()[0])
    record = callback.history.epochs[1]
    assert record["rank_correlation"] == pytest.approx(spearmanr(first[unseen], second[unseen]).statistic)
    assert record["at_or_above_1"] == pytest.approx((second[unseen] >= 1).mean())
    assert record["spread"] == pytest.approx(np.subtract(*np.percentile(second[unseen], [75, 25])))
    assert 0 < record["separation"] < 1
    logged = selection_logs(trainer)[1]
    assert logged["ifd/rank_correlation"] == record["rank_correlation"]


# ---- before anything is trained ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [24, 60])
def test_prompts_that_do_not_help_are_an_error_before_the_first_step_and_before_all_is_scored(tmp_path, rows):
    trainer = sft_trainer(tmp_path, rows)
    callback = select(trainer, keep=4, guard=Guard(), warn_share=0.0, tried_rows=4)
    scored = []
    callback.score_pool = lambda *args: scored.append(args) or callback.pool_scorer.scores(callback._prefix)
    with pytest.raises(ValueError, match=r"scored rows have ifd >= 1.*does not know this chat template.*Nothing was"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert len(scored) == (0 if rows == 60 else 1)  # ten times the rows that are tried


def test_they_may_be_a_warning(tmp_path, caplog):
    trainer = sft_trainer(tmp_path, 24, num_train_epochs=1)
    select(trainer, keep=4, max_ifd=float("inf"), guard=only(), warn_share=0.0)
    assert len(train(trainer).order()) == 4
    assert sum("scored rows have ifd >= 1" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize("kind", ["model", "columns"])
def test_another_scorer_is_held_against_the_model_in_training(tmp_path, kind, caplog):
    other, rows = build_model(len(TOKENIZER), seed=1), text_rows(raw_rows(24))
    reference = sft_trainer(tmp_path / "reference", rows, model=other, num_train_epochs=1)
    callback = select(reference, keep=24, max_ifd=float("inf"))
    train(reference)
    theirs = callback.history.rows(0).set_index("row_id")
    mine = sft_trainer(tmp_path / "mine", rows, num_train_epochs=1)
    own = select(mine, keep=24, max_ifd=float("inf"))
    train(mine)
    own = own.history.rows(0).set_index("row_id")
    scorer = build_model(len(TOKENIZER), seed=1)
    if kind == "model":
        scorer.save_pretrained(tmp_path / "other")
        TOKENIZER.save_pretrained(tmp_path / "other")
        scorer = str(tmp_path / "other")
    else:
        columns = ["cas", "das", "ifd", "ifd_ppl", "answer_tokens", "ifd_status"]
        rows = rows.map(lambda row: theirs.loc[row["row_id"], columns].to_dict())
        scorer = "columns"
    trainer = sft_trainer(tmp_path / "run", rows, num_train_epochs=1)
    callback = select(trainer, keep=6, max_ifd=float("inf"), scorer=scorer, tried_rows=12)
    train(trainer)
    record = callback.history.epochs[0]
    assert record["proxy_rows"] == 12
    sample = np.sort(np.random.default_rng(42).permutation(24)[:12])
    ids = np.array(trainer.train_dataset["row_id"])[sample]
    assert record["proxy_rank_correlation"] == pytest.approx(
        spearmanr(own.loc[ids, "ifd"], theirs.loc[ids, "ifd"]).statistic
    )
    top = [set(frame.loc[ids, "ifd"].nlargest(3).index) for frame in (own, theirs)]
    assert record["proxy_overlap"] == pytest.approx(len(top[0] & top[1]) / 3)
    assert selection_logs(trainer)[0]["ifd/proxy_overlap"] == record["proxy_overlap"]
    assert "against those of the model in training, on 12 rows" in caplog.text


# ---- when they are on -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "timing", "scorer", "names"),
    [
        (Cherry(), Timing(), None, ["limit", "unfinished", "duplicates", "freeze"]),
        (Cherry(0.9), Timing(), None, ["unfinished", "duplicates", "freeze"]),
        (Cherry("calibrated"), Timing(), "gpt2", ["unfinished", "duplicates", "freeze"]),
        (Cherry(), Timing(), "columns", ["duplicates"]),
        (Cherry(), Timing.cherry(Brief()), None, []),
        (RandomRows(), Timing(), None, []),
    ],
)
def test_guards_are_on_by_default_where_rows_are_selected_by_scores_in_each_epoch(policy, timing, scorer, names):
    guard = guard_of("auto", policy, timing, scorer)
    assert (guard.names if guard else []) == names


def test_a_limit_that_is_given_takes_the_place_of_the_guards(tmp_path):
    assert IFDSelectionCallback(sft_trainer(tmp_path, 8)).guard.limit == CalibratedLimit()
    assert IFDSelectionCallback(sft_trainer(tmp_path, 8), max_ifd=1.0).guard.names == [
        "unfinished",
        "duplicates",
        "freeze",
    ]


def test_the_papers_method_goes_without_guards(tmp_path):
    assert IFDSelectionCallback.cherry(sft_trainer(tmp_path, 8)).guard is None
    assert IFDSelectionCallback.cherry(sft_trainer(tmp_path, 8), guard=True).guard == Guard()


def test_a_policy_of_ones_own_sees_the_rows_that_the_guards_leave(learned, tmp_path):
    seen = []

    def shortest(columns, budget, *, ids, rng):
        seen.append((ids.tolist(), columns["row_id"].tolist(), columns["eot_loss"]))
        return Selection.without_scores(np.argsort(columns["answer_tokens"])[:budget], len(ids), "longer")

    trainer = sft_trainer(tmp_path, text_rows(some_cut()), model=model_with(learned), num_train_epochs=1)
    callback = select(trainer, keep=9, policy=shortest, guard=only(unfinished=CUT))
    order = train(trainer).order()
    history = callback.history.rows(0).set_index("row_id")
    left = history.index[history["reason"] != "unfinished"]
    assert seen[0][0] == seen[0][1] == left.tolist()
    assert seen[0][2] == pytest.approx(history.loc[left, "eot_loss"])
    assert set(order) == set(left[np.argsort(history.loc[left, "answer_tokens"])[:9]])


@pytest.mark.parametrize("guard", [3, "all", RandomRows()])
def test_what_is_no_guard_is_refused(tmp_path, guard):
    with pytest.raises(ValueError, match="guard must be a Guard, True for the default ones or None, got"):
        IFDSelectionCallback(sft_trainer(tmp_path, 4), guard=guard)


def test_guards_that_measure_are_refused_where_scores_are_columns(tmp_path):
    with pytest.raises(ValueError, match=r"no model measures guard=limit, unfinished\. Set these to None"):
        IFDSelectionCallback(sft_trainer(tmp_path, 4), scorer="columns", guard=Guard())


def test_a_pool_too_small_for_a_limit_goes_without_and_says_so(tmp_path, caplog):
    trainer = sft_trainer(tmp_path, 10, num_train_epochs=1)
    callback = select(trainer, keep=2, guard=Guard(on_misaligned="warn"), on_shortfall="relax")
    assert len(train(trainer).order()) == 2
    assert "no limit is measured, and the one of the policy stands alone" in caplog.text
    assert callback.history.epochs[0]["limit"] is None
