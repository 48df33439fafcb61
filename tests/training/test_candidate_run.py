"""Runs that score candidates anew, in the place of all rows: which ones, what becomes of the others, and resuming."""

from __future__ import annotations

import shutil

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler
from tiny_runs import (
    FIVE,
    INF,
    WeightsAt,
    difference,
    model_with,
    raw_rows,
    reference_scores,
    select,
    selection_logs,
    sft_trainer,
    text_rows,
    tokenised,
    train,
    weights_of,
)
from transformers import TrainerCallback

from ifd_trainer import Guard, LowestScores, RandomRows, TargetSet
from ifd_trainer.errors import UserError
from ifd_trainer.method.calibrated_limit import CalibratedLimit
from ifd_trainer.method.scoring_health import rank_correlation
from ifd_trainer.method.unfinished import Unfinished
from ifd_trainer.report.tables import epoch_cells
from ifd_trainer.report.wording import scoring_sentence

ROWS, KEEP, SEED = 40, 10, 42
BUDGET = 1.2
CANDIDATES = {"rescore": "candidates", "rescore_budget": BUDGET}


class Expected:
    """What a run does, computed row by row from the losses of `reference_scores` and the tokens of the rows."""

    def __init__(self, trainer, weights):
        self.trainer, self.weights, self.rows = trainer, weights, tokenised(trainer)
        self.ids = np.array(self.rows["row_id"])
        tokenizer = trainer.processing_class
        hashes, end = tokenizer.convert_tokens_to_ids("###"), tokenizer.eos_token_id
        self.lengths, self.answers, self.cost = (np.empty(len(self.ids), dtype=int) for _ in range(3))
        for row, (ids, labels) in enumerate(zip(self.rows["input_ids"], self.rows["labels"], strict=True)):
            start = next(place for place, label in enumerate(labels) if label != -100)
            header = ids[:start][::-1].index(hashes) + 1
            self.lengths[row], self.answers[row] = len(ids), len(ids) - start - (ids[-1] == end)
            self.cost[row] = len(ids) + header + self.answers[row]

    def exact(self, step):
        """Losses (n, 2) by the model after so many updates."""
        found = reference_scores(self.trainer, model_with(self.weights[step]))
        return np.array([found[row] for row in self.ids.tolist()])

    def anew(self, step, draws, kept, losses, scored, trained, used):
        """Losses (n, 2) of all rows, and after which updates they were scored, once candidates were scored anew.

        `draws` are what seeds are made of beside the run's, `kept` the rows that are to be trained on, `losses` and
        `scored` what was known, `trained` and `used` (n,) rows that were trained on since, and in this epoch.
        """
        exact, left = self.exact(step), [row for row in range(len(self.ids)) if not used[row]]
        allowance = BUDGET * 3 * kept / len(self.ids) * self.lengths.sum()
        order = np.random.default_rng([SEED, *draws]).permutation(len(left))
        order = [left[place] for place in order]
        drawn = self.take([row for row in order if trained[row]], allowance / 8)
        drawn += self.take([row for row in order if not trained[row]], allowance / 4 - self.cost[drawn].sum())
        rest = sorted((row for row in order if row not in drawn), key=lambda row: scored[row])
        drawn += self.take(rest, allowance / 10)
        cas, das = self.moved(losses, exact, drawn, trained, used).T
        ifd = cas / das
        cut = sorted(ifd[left])[-kept]
        near = sorted(set(left) - set(drawn), key=lambda row: abs(ifd[row] - cut))
        fresh = drawn + self.take(near, allowance - self.cost[drawn].sum())
        scored = np.where(np.isin(np.arange(len(self.ids)), fresh), step, scored)
        return self.moved(losses, exact, fresh, trained, used), scored

    def moved(self, known, exact, fresh, trained, used):
        """By a ridge regression, with a mean for rows that were trained on and one for the others."""
        x = StandardScaler().fit_transform(np.log(np.column_stack([known, self.answers])))
        y, kinds = np.log(exact / known), np.empty((len(x), x.shape[1] + 2))
        for kind in (True, False):
            of_kind = [row for row in fresh if trained[row] == kind]
            of_kind = of_kind if len(of_kind) >= 2 else fresh
            kinds[trained == kind] = np.column_stack([x, y])[of_kind].mean(axis=0)
        x, mean = x - kinds[:, :-2], kinds[:, -2:]
        model = Ridge(alpha=5.0, fit_intercept=False).fit(x[fresh], (y - mean)[fresh])
        moved = np.where(used[:, None], known, known * np.exp(mean + model.predict(x)))
        moved[fresh] = exact[fresh]
        return moved

    def take(self, order, allowance):
        taken, spent = [], 0.0
        for row in (row for row in order if self.cost[row] <= allowance):
            spent += self.cost[row]
            if spent > allowance:
                break
            taken.append(int(row))
        return taken


def run(folder, **options):
    trainer = sft_trainer(folder, ROWS, **options.pop("config", {}))
    return trainer, select(trainer, **{"keep": KEEP, "max_ifd": INF, "seed": SEED, **CANDIDATES, **options})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of three epochs of five updates, with a checkpoint at every second step."""
    folder = tmp_path_factory.mktemp("whole")
    trainer, callback = run(folder, config={"save_strategy": "steps", "save_steps": 2})
    weights = WeightsAt(trainer)
    return folder, trainer, callback, train(trainer), weights.after


def rows_of(callback, epoch):
    return callback.history.rows(epoch).sort_values("row_id").reset_index(drop=True)


def test_candidates_are_scored_anew_and_the_others_are_moved(whole):
    _, trainer, callback, seen, weights = whole
    expected = Expected(trainer, weights)
    losses = measured = expected.exact(0)
    scored, nothing = np.zeros(ROWS, dtype=int), np.zeros(ROWS, dtype=bool)
    shares = []
    for epoch in range(3):
        step = 5 * epoch
        if epoch:
            trained = np.isin(expected.ids, seen.epochs()[epoch - 1])
            losses, scored = expected.anew(step, [epoch], KEEP, losses, scored, trained, used=nothing)
            measured = np.where(scored[:, None] == step, losses, measured)
        found = rows_of(callback, epoch)
        assert found["row_id"].tolist() == sorted(expected.ids)
        assert found["scored_step"].tolist() == scored.tolist()
        assert found["scored_at"].tolist() == (scored // 5).tolist()
        np.testing.assert_allclose(found["cas"], losses[:, 0], rtol=1e-4)
        np.testing.assert_allclose(found["das"], losses[:, 1], rtol=1e-4)
        np.testing.assert_allclose(found["cas"] - found["cas_shift"], measured[:, 0], rtol=1e-4)
        np.testing.assert_allclose(found["das"] - found["das_shift"], measured[:, 1], rtol=1e-4)
        ifd = losses[:, 0] / losses[:, 1]
        best = expected.ids[np.argsort(-ifd, kind="stable")[:KEEP]]
        assert sorted(seen.epochs()[epoch]) == sorted(best.tolist())
        shares.append(np.mean(scored == step))
    assert shares[0] == 1
    assert all(0.2 < share < 0.9 for share in shares[1:])
    records = callback.history.epochs
    assert [record["fresh"] for record in records] == pytest.approx(shares)
    oldest = int(scored.min()) // 5
    assert [record["oldest_scored_at"] for record in records] == [0, 0, oldest]
    assert [record["oldest_scored_step"] for record in records] == [0, 0, 5 * oldest]
    assert records[0]["rescore_cost"] is None
    for record, log in zip(records[1:], selection_logs(trainer)[1:], strict=True):
        assert 0.8 * BUDGET < record["rescore_cost"] <= BUDGET
        assert log["ifd/rescore_cost"] == record["rescore_cost"]
        assert log["ifd/fresh"] == record["fresh"]
    headers, cells = epoch_cells(callback.history)
    assert [row[headers.index("oldest")] for row in cells] == ["0", "0", str(oldest)]
    assert [row[headers.index("fresh")] for row in cells] == [f"{100 * share:.0f} %" for share in shares]


@pytest.mark.parametrize("step", [6, 10], ids=["inside an epoch", "between epochs"])
def test_a_resumed_run_goes_on_with_the_same_ages_to_the_same_weights(whole, tmp_path, step):
    folder, trainer, callback, seen, _ = whole
    checkpoint = shutil.copytree(folder / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    again, other = run(tmp_path, config={"save_strategy": "no"})
    resumed = train(again, resume_from_checkpoint=str(checkpoint))
    assert resumed.order() == seen.order()[2 * step :]
    assert difference(weights_of(trainer.model), weights_of(again.model)) == 0
    for epoch in range(step // 5 + (step % 5 > 0), 3):
        pd.testing.assert_frame_equal(callback.history.rows(epoch), other.history.rows(epoch))


def test_a_resume_under_another_budget_is_refused(whole, tmp_path):
    folder = whole[0]
    for options, found in (({"rescore_budget": 0.3}, "rescore_budget: 1.2"), ({"rescore": "all"}, "rescore: 'cand")):
        trainer, _ = run(tmp_path, **options)
        with pytest.raises(UserError, match=found):
            trainer.train(resume_from_checkpoint=str(folder / "checkpoint-6"))


# ---- in parts of an epoch ---------------------------------------------------------------------------------------

PARTS = [4, 4, 4]  # rows of two updates each


@pytest.fixture(scope="module")
def divided(tmp_path_factory):
    """Two epochs of six updates on 12 rows, in parts of two, with a checkpoint after each update."""
    folder = tmp_path_factory.mktemp("divided")
    trainer, callback = run_in_parts(folder, save_strategy="steps", save_steps=1)
    weights = WeightsAt(trainer)
    return folder, trainer, callback, train(trainer), weights.after


def run_in_parts(folder, **config):
    return run(folder, keep=sum(PARTS), every_steps=2, config={"num_train_epochs": 2, **config})


@pytest.mark.skipif(not FIVE, reason="every_steps needs transformers 5")
def test_each_part_scores_candidates_among_the_rows_that_are_left(divided):
    _, trainer, callback, seen, weights = divided
    expected = Expected(trainer, weights)
    losses = measured = expected.exact(0)
    scored, trained, records = np.zeros(ROWS, dtype=int), np.zeros(ROWS, dtype=bool), callback.history.epochs
    for epoch in range(2):
        used = np.zeros(ROWS, dtype=bool)
        for number, size in enumerate(PARTS):
            step, record = 6 * epoch + 2 * number, records[3 * epoch + number]
            if step:
                draws = [epoch, number + 1] if number else [epoch]
                losses, scored = expected.anew(step, draws, size, losses, scored, trained, used)
                measured = np.where(scored[:, None] == step, losses, measured)
                assert 0.6 * BUDGET < record["rescore_cost"] <= BUDGET
                assert record["fresh"] == np.mean(scored == step)
                trained &= used
            found = callback.history.rows(epoch, number + 1).sort_values("row_id").reset_index(drop=True)
            assert found["scored_step"].tolist() == scored.tolist()
            assert found["scored_at"].tolist() == (scored // 6).tolist()
            np.testing.assert_allclose(found["cas"], losses[:, 0], rtol=1e-4)
            np.testing.assert_allclose(found["cas"] - found["cas_shift"], measured[:, 0], rtol=1e-4)
            np.testing.assert_allclose(found["das"], losses[:, 1], rtol=1e-4)
            ifd = np.where(used, -INF, losses[:, 0] / losses[:, 1])
            best = set(expected.ids[np.argsort(-ifd, kind="stable")[:size]].tolist())
            rows = [row for update in seen.updates[step : step + 2] for row in update.rows]
            assert len(rows) == size
            assert set(rows) == best
            assert (record["oldest_scored_at"], record["oldest_scored_step"]) == (scored.min() // 6, scored.min())
            used |= np.isin(expected.ids, rows)
            trained |= used
        assert used.sum() == sum(PARTS)
    headers, cells = epoch_cells(callback.history)
    oldest = [str(record["oldest_scored_step"]) for record in records]
    assert [row[headers.index("oldest step")] for row in cells] == oldest
    assert "some of the rows that are left are anew" in scoring_sentence(callback.history.settings, records)


@pytest.mark.skipif(not FIVE, reason="every_steps needs transformers 5")
@pytest.mark.parametrize("step", [1, 2, 5, 6, 9])
def test_a_run_in_parts_resumes_with_the_same_candidates_to_the_same_weights(divided, tmp_path, step):
    folder, trainer, callback, seen, _ = divided
    checkpoint = shutil.copytree(folder / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    again, other = run_in_parts(tmp_path)
    resumed = train(again, resume_from_checkpoint=str(checkpoint))
    assert resumed.order() == seen.order()[2 * step :]
    assert difference(weights_of(trainer.model), weights_of(again.model)) == 0
    for record in other.history.epochs:
        parts = record["epoch"], record["part"]
        pd.testing.assert_frame_equal(callback.history.rows(*parts), other.history.rows(*parts))
    assert other.history.epochs[-1]["rescore_cost"] == callback.history.epochs[-1]["rescore_cost"]


class Verdicts(TrainerCallback):
    """What the guards of a run have to say when an epoch begins."""

    def __init__(self, callback):
        self.callback, self.seen, self.trained = callback, [], []

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.seen.append({reason: found.copy() for reason, found in self.callback.chooser.guards.verdicts.items()})
        self.trained.append(self.callback.chooser.trained.copy())


def test_guards_judge_what_is_fresh_and_was_not_trained_on(tmp_path):
    guard = Guard(CalibratedLimit(alpha=0.4, pairs=20), None, Unfinished(alpha=0.5, cuts=20), None, None, "warn")
    trainer, callback = run(tmp_path, guard=guard, config={"num_train_epochs": 3})
    verdicts = Verdicts(callback)
    trainer.add_callback(verdicts)
    train(trainer)
    changed = 0
    for epoch in (1, 2):
        before, now = verdicts.seen[epoch - 1 : epoch + 1]
        assert (now["unfinished"] == before["unfinished"]).all()
        rows, record = callback.history.rows(epoch), callback.history.record(epoch)
        judged = (rows["scored_at"] == epoch).to_numpy() & ~verdicts.trained[epoch]
        assert (now["above_limit"][~judged] == before["above_limit"][~judged]).all()
        below = rows["ifd"].to_numpy() < record["limit"]
        assert (now["above_limit"][judged] == np.where(below[judged], 1, 2)).all()
        changed += (now["above_limit"] != before["above_limit"]).sum()
        assert record["limit"] != callback.history.record(epoch - 1)["limit"]
        assert record["unfinished"] == callback.history.record(0)["unfinished"]
    assert changed


def test_what_scores_are_worth_is_told_by_the_rows_that_were_drawn(tmp_path):
    rows = text_rows(raw_rows(100))
    trainer = sft_trainer(tmp_path, rows, num_train_epochs=2)
    callback = select(trainer, keep=5, max_ifd=INF, seed=SEED, rescore="candidates", rescore_budget=12.0)
    train(trainer)
    first, second = (rows_of(callback, epoch) for epoch in (0, 1))
    drawn = callback.chooser.ages.drawn & (first["times"] == 0).to_numpy()
    assert 20 <= drawn.sum() < 50
    found = rank_correlation(first["ifd"].to_numpy()[drawn], second["ifd"].to_numpy()[drawn])
    assert callback.history.record(1)["rank_correlation"] == pytest.approx(found)
    assert callback.history.record(1)["spread"] == pytest.approx(
        float(np.subtract(*np.percentile(second["ifd"].to_numpy()[drawn], [75, 25])))
    )


def test_a_budget_that_pays_for_no_row_is_said_and_the_old_scores_stand(tmp_path, caplog):
    trainer, callback = run(tmp_path, rescore_budget=1e-3, config={"num_train_epochs": 2})
    train(trainer)
    assert "rescore_budget=0.001 pays for no row" in caplog.text
    first, second = (rows_of(callback, epoch) for epoch in (0, 1))
    assert second["scored_at"].tolist() == [0] * ROWS
    assert second["cas"].tolist() == first["cas"].tolist()
    assert second["times"].tolist() == first["times"].tolist()


def test_packed_rows_are_scored_anew_one_example_at_a_time(tmp_path):
    rows = text_rows(raw_rows(60)).remove_columns("row_id")
    trainer = sft_trainer(tmp_path, rows, packing=True, max_length=64, num_train_epochs=2)
    callback = select(trainer, keep=0.2, max_ifd=INF, **CANDIDATES)
    trainer.train()
    record, rows = callback.history.record(1), callback.history.rows(1)
    assert 0.8 * BUDGET < record["rescore_cost"] <= BUDGET
    assert 0 < record["fresh"] < 1
    assert (rows["scored_at"] == 1).mean() == pytest.approx(record["fresh"])


def test_scores_that_follow_from_both_losses_go_along(tmp_path):
    trainer, callback = run(tmp_path, scores=("ira", "loss_change"), score="ira", config={"num_train_epochs": 2})
    train(trainer)
    first, rows = callback.history.rows(0), callback.history.rows(1)
    np.testing.assert_allclose(rows["ira"], rows["das"] - rows["cas"])
    np.testing.assert_allclose(rows["loss_change"], rows["cas"] - first["cas"])
    assert (rows.nlargest(KEEP, "ira")["reason"] == "kept").all()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"scorer": "columns"}, "the scores of scorer='columns' do not change with training"),
        ({"policy": RandomRows(), "max_ifd": None}, "the policy is a RandomRows"),
        ({"policy": LowestScores(), "max_ifd": None}, "the policy is a LowestScores"),
        ({"policy": TargetSet(raw_rows(2, seed=7)), "max_ifd": None}, "the policy is a TargetSet"),
        ({"diverse": 0.5}, "the policy is a Diverse"),
        ({"scores": ("rifd", "prompt_ppl")}, "prompt_ppl, rifd, rcas, rdas follows from other losses"),
    ],
)
def test_what_has_no_candidates_is_refused(tmp_path, options, problem):
    with pytest.raises(UserError, match=problem):
        run(tmp_path, **options)
