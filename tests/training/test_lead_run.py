"""LEAD in a run: rows of each epoch by a simulation from the losses of the history, and what a resume keeps."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_runs import Stop, difference, raw_rows, select, sft_trainer, text_rows, train, weights_of

from ifd_trainer import Lead, write_report
from ifd_trainer.errors import UserError
from ifd_trainer.recipe.selection import SelectionConfig

ROWS, KEEP, EPOCHS = 24, 4, 6
POLICY = Lead(groups=3, explore=0.3, most=2)


def leading(folder, policy=POLICY, rows=None, **config):
    """A trainer of some epochs of four rows, and its callback."""
    rows = text_rows(raw_rows(ROWS)) if rows is None else rows
    trainer = sft_trainer(folder, rows, num_train_epochs=EPOCHS, **config)
    return trainer, select(trainer, keep=KEEP, max_ifd=None, policy=policy, freeze_after=0)


@pytest.fixture(scope="module")
def through(tmp_path_factory):
    """A run with a checkpoint after each update, two of which are an epoch."""
    trainer, callback = leading(tmp_path_factory.mktemp("lead"), save_strategy="steps", save_steps=1)
    return trainer, callback, train(trainer)


def test_each_epoch_is_of_the_rows_that_losses_of_training_point_to(through):
    _, callback, seen = through
    history, first = callback.history, callback.history.rows(0)
    group = np.full(ROWS, -1)
    group[np.argsort(first["ifd"], kind="stable")] = np.arange(ROWS) * 3 // ROWS
    utility, times, weights, gains = first["cas"].to_numpy(), np.zeros(ROWS, dtype=int), np.ones(3), []
    place = {row: number for number, row in enumerate(first["row_id"])}
    for epoch, ids in enumerate(seen.epochs()):
        trained = [place[row] for row in ids]
        chance = 0.7 * weights / weights.sum() + 0.1
        record, rows = history.epochs[epoch], history.rows(epoch)
        assert [of["chance"] for of in record["lead"].values()] == pytest.approx(chance.tolist())
        turn = np.random.default_rng([callback.seed, epoch]).choice(3, 3, replace=False, p=chance).tolist()
        late = np.where(times >= 2, times, 0)
        order = sorted(range(ROWS), key=lambda row: (late[row], turn.index(group[row]), -utility[row], row))
        assert sorted(trained) == sorted(order[:KEEP])
        assert rows["utility"].to_numpy() == pytest.approx(utility)
        assert [int(name) - 1 for name in rows["group"]] == group.tolist()
        losses = rows["train_loss"].to_numpy()
        assert np.flatnonzero(np.isfinite(losses)).tolist() == sorted(trained)
        # Learned from this epoch, for the next one.
        moved = np.mean([losses[row] - utility[row] for row in trained])
        after = utility.copy()
        for row in trained:
            after[row] = 0.9 * (losses[row] + moved) + 0.1 * utility[row]
            times[row] += 1
        gained = {g: np.mean([utility[r] - after[r] for r in trained if group[r] == g]) for g in {*group[trained]}}
        gains += gained.values()
        low, high = min(gains), max(gains)
        for number, gain in gained.items():
            reward = 2 * (gain - low) / (high - low) - 1 if high > low else 0.0
            weights[number] *= np.exp(0.3 * reward / (3 * chance[number]))
        utility = after
    assert len({tuple(sorted(rows)) for rows in seen.epochs()}) > 2
    assert [record["seconds_scoring"] > 0 for record in history.epochs] == [True, *[False] * (EPOCHS - 1)]


@pytest.mark.parametrize("step", [3, 4, 5])
def test_a_resume_goes_on_with_what_was_learned(through, step):
    trainer, callback, seen = through
    told = [record["lead"] for record in callback.history.epochs]
    other, resumed = leading(trainer.args.output_dir, save_strategy="no")
    again = train(other, resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-{step}")
    assert [update.rows for update in again.updates] == [update.rows for update in seen.updates[step:]]
    assert difference(weights_of(other.model), weights_of(trainer.model)) == 0.0
    assert [record["lead"] for record in resumed.history.epochs] == told


def test_a_run_that_was_stopped_goes_on_likewise(through, tmp_path):
    _, _, seen = through
    trainer, _ = leading(tmp_path, save_strategy="steps", save_steps=1)
    trainer.add_callback(Stop(4))
    train(trainer)
    other, _ = leading(tmp_path, save_strategy="no")
    again = train(other, resume_from_checkpoint=f"{tmp_path}/checkpoint-4")
    assert [update.rows for update in again.updates] == [update.rows for update in seen.updates[4:]]


def test_groups_may_be_the_values_of_a_column(tmp_path):
    rows = text_rows(raw_rows(ROWS)).add_column("source", ["code", "web"] * (ROWS // 2))
    trainer, callback = leading(tmp_path, Lead("source"), rows)
    train(trainer)
    for epoch, record in enumerate(callback.history.epochs):
        assert record["lead"].keys() == {"code", "web"}
        kept = callback.history.rows(epoch)
        assert kept.loc[kept["times"] > 0, "group"].nunique() == 1
        assert sorted(of["rows"] for of in record["lead"].values()) == [0, KEEP]
    page = write_report(str(tmp_path)).read_text(encoding="utf-8")
    assert "of the rows with one value of source, which a bandit draws for each epoch" in page


@pytest.mark.parametrize(
    ("options", "config", "words"),
    [
        (
            {"freeze_after": None},
            {},
            "goes by losses of training from then on: set freeze_after=0",
        ),
        ({"freeze_after": 1}, {}, "set freeze_after=0"),
        ({"scorer": "columns"}, {}, "scorer='columns' is another: leave it out"),
        ({"every": 2}, {}, "leave every out"),
        ({}, {"packing": True, "max_length": 96}, "set packing=False"),
        ({}, {"label_smoothing_factor": 0.1}, "train_losses=True needs the loss of each row"),
    ],
)
def test_what_it_cannot_learn_from_is_refused(tmp_path, options, config, words):
    trainer = sft_trainer(tmp_path, ROWS, **config)
    with pytest.raises(UserError, match=words):
        select(trainer, keep=KEEP, **{"max_ifd": None, "policy": POLICY, "freeze_after": 0, **options})


def test_a_recipe_names_it():
    assert SelectionConfig(policy="lead", lead_by="source", freeze_after=0).chosen_policy() == Lead("source")
    assert SelectionConfig(policy="lead", lead_groups=4, freeze_after=0).chosen_policy() == Lead(groups=4)
