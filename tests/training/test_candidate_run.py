"""Runs that score candidates anew, in the place of all rows: which ones, what becomes of the others, and resuming."""

from __future__ import annotations

import shutil

import numpy as np
import pandas as pd
import pytest
from tiny_runs import (
    INF,
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

ROWS, KEEP, SEED = 40, 10, 42
BUDGET = 1.2
CANDIDATES = {"rescore": "candidates", "rescore_budget": BUDGET}


class Expected:
    """What a run does, computed row by row from the losses of `reference_scores` and the tokens of the rows."""

    def __init__(self, trainer, seen):
        self.rows = tokenised(trainer)
        self.ids = np.array(self.rows["row_id"])
        self.exact = [
            np.array([found[row] for row in self.ids.tolist()])
            for found in (reference_scores(trainer, model_with(seen.weights[epoch])) for epoch in sorted(seen.weights))
        ]  # (n, 2) for each epoch
        self.kept = [np.isin(self.ids, rows) for rows in seen.epochs()]
        self.cost = np.array([len(tokens) for tokens in self.rows["input_ids"]])
        self.allowance = BUDGET * 3 * KEEP / len(self.ids) * self.cost.sum()

    def epoch(self, epoch, losses, scored_at):
        """Losses (n, 2) of all rows, and when they were scored, after an epoch has scored its candidates anew."""
        exact, trained = self.exact[epoch][:, 0], self.kept[epoch - 1]
        order = np.random.default_rng([SEED, epoch]).permutation(len(self.ids)).tolist()
        drawn = self.take([row for row in order if trained[row]], self.allowance / 8)
        drawn += self.take([row for row in order if not trained[row]], self.allowance / 4 - self.cost[drawn].sum())
        rest = sorted((row for row in order if row not in drawn), key=lambda row: scored_at[row])
        drawn += self.take(rest, self.allowance / 10)
        ifd = self.moved(losses[:, 0], exact, drawn, trained) / losses[:, 1]
        near = sorted(set(range(len(self.ids))) - set(drawn), key=lambda row: abs(ifd[row] - sorted(ifd)[-KEEP]))
        fresh = drawn + self.take(near, self.allowance - self.cost[drawn].sum())
        cas = self.moved(losses[:, 0], exact, fresh, trained)
        at = np.where(np.isin(np.arange(len(self.ids)), fresh), epoch, scored_at)
        return np.stack([cas, losses[:, 1]], axis=1), at

    @staticmethod
    def moved(known, exact, fresh, trained):
        moved = known.copy()
        for kind in (True, False):
            of_kind = [row for row in fresh if trained[row] == kind]
            assert len(of_kind) >= 2
            moved[trained == kind] *= np.exp(np.log(exact[of_kind] / known[of_kind]).mean())
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
    """A run of three epochs, with a checkpoint at every second step."""
    folder = tmp_path_factory.mktemp("whole")
    trainer, callback = run(folder, config={"save_strategy": "steps", "save_steps": 2})
    return folder, trainer, callback, train(trainer)


def rows_of(callback, epoch):
    return callback.history.rows(epoch).sort_values("row_id").reset_index(drop=True)


def test_candidates_are_scored_anew_and_the_others_are_moved(whole):
    _, trainer, callback, seen = whole
    expected = Expected(trainer, seen)
    losses, measured, scored_at = expected.exact[0], expected.exact[0], np.zeros(ROWS, dtype=int)
    shares = []
    for epoch in range(3):
        if epoch:
            losses, scored_at = expected.epoch(epoch, losses, scored_at)
            measured = np.where(scored_at[:, None] == epoch, losses, measured)
        found = rows_of(callback, epoch)
        assert found["row_id"].tolist() == sorted(expected.ids)
        assert found["scored_at"].tolist() == scored_at.tolist()
        np.testing.assert_allclose(found["cas"], losses[:, 0], rtol=1e-4)
        np.testing.assert_allclose(found["das"], losses[:, 1], rtol=1e-4)
        np.testing.assert_allclose(found["cas"] - found["cas_shift"], measured[:, 0], rtol=1e-4)
        ifd = losses[:, 0] / losses[:, 1]
        best = expected.ids[np.argsort(-ifd, kind="stable")[:KEEP]]
        assert sorted(seen.epochs()[epoch]) == sorted(best.tolist())
        shares.append(np.mean(scored_at == epoch))
    assert shares[0] == 1
    assert all(0.2 < share < 0.9 for share in shares[1:])
    records = callback.history.epochs
    assert [record["fresh"] for record in records] == pytest.approx(shares)
    assert [record["oldest_scored_at"] for record in records] == [0, 0, int(scored_at.min())]
    assert records[0]["rescore_cost"] is None
    for record, log in zip(records[1:], selection_logs(trainer)[1:], strict=True):
        assert 0.8 * BUDGET < record["rescore_cost"] <= BUDGET
        assert log["ifd/rescore_cost"] == record["rescore_cost"]
        assert log["ifd/fresh"] == record["fresh"]
    headers, cells = epoch_cells(callback.history)
    assert [row[headers.index("oldest")] for row in cells] == ["0", "0", str(int(scored_at.min()))]
    assert [row[headers.index("fresh")] for row in cells] == [f"{100 * share:.0f} %" for share in shares]


@pytest.mark.parametrize("step", [6, 10], ids=["inside an epoch", "between epochs"])
def test_a_resumed_run_goes_on_with_the_same_ages_to_the_same_weights(whole, tmp_path, step):
    folder, trainer, callback, seen = whole
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
        ({"scores": ("rifd", "prompt_ppl")}, "prompt_ppl, rifd, rcas, rdas follows from losses other"),
    ],
)
def test_what_has_no_candidates_is_refused(tmp_path, options, problem):
    with pytest.raises(UserError, match=problem):
        run(tmp_path, **options)
