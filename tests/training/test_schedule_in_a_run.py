"""Runs with a schedule: when they score, what each epoch trains on; curricula, annealing, warm-up and freezing."""

from __future__ import annotations

import pytest
from tiny_runs import Stop, model_with, reference_scores, reference_top, select, sft_trainer, train

from ifd_trainer.cli import main
from ifd_trainer.method.schedule import Anneal, Constant, Curriculum, PerEpoch, Timing
from ifd_trainer.recipe.selection import SelectionConfig
from ifd_trainer.training.callback import IFDSelectionCallback

INF = float("inf")
POOL = 24


# ---- inside a run -----------------------------------------------------------------------------------------------


def run(folder, epochs=3, **options):
    """Train and count the scorings."""
    trainer = sft_trainer(folder, POOL, num_train_epochs=epochs)
    callback = select(trainer, max_ifd=INF, **options)
    scored, score_pool = [], callback.score_pool

    def count(description):
        scored.append(int(description.removeprefix("IFD, epoch ")))
        return score_pool(description)

    callback.score_pool = count
    return trainer, callback, train(trainer), scored


def ranking(trainer, witness, epoch):
    """Row ids by score at the start of an epoch, highest first, computed independently."""
    return reference_top(reference_scores(trainer, model_with(witness.weights[epoch])), POOL, INF)


def test_every_second_epoch_selects_and_the_one_between_trains_on_the_same_rows(tmp_path):
    trainer, callback, seen, scored = run(tmp_path, epochs=4, keep=[6, 7, 8, 9], every=2)
    epochs = seen.epochs()
    assert scored == [0, 2]
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert epochs[0] != epochs[1]  # shuffled anew
    assert sorted(epochs[2]) == sorted(epochs[3]) == sorted(ranking(trainer, seen, 2)[:8])
    assert [record["scored_at"] for record in callback.history.epochs] == [0, 0, 2, 2]
    assert [record["seconds_scoring"] > 0 for record in callback.history.epochs] == [True, False, True, False]


def test_warm_up_trains_on_every_row_without_scoring(tmp_path):
    trainer, callback, seen, scored = run(tmp_path, keep=6, warmup_epochs=1)
    epochs = seen.epochs()
    assert scored == [1, 2]
    assert sorted(epochs[0]) == sorted(trainer.train_dataset["row_id"])
    assert sorted(epochs[1]) == sorted(ranking(trainer, seen, 1)[:6])
    assert callback.history.rows(0)["ifd_status"].unique().tolist() == ["not_scored"]
    assert callback.history.epochs[0]["mean_kept"] is None


def test_frozen_epochs_select_by_the_last_scores(tmp_path):
    trainer, _, seen, scored = run(tmp_path, keep=[4, 8, 12], freeze_after=1)
    first = ranking(trainer, seen, 0)
    assert scored == [0]
    assert [sorted(rows) for rows in seen.epochs()] == [sorted(first[:size]) for size in (4, 8, 12)]


@pytest.mark.parametrize("direction", ["easy_to_hard", "hard_to_easy"])
@pytest.mark.parametrize(("mode", "sizes"), [("tiers", [4, 4, 4]), ("growing", [4, 8, 12]), ("shrinking", [12, 8, 4])])
def test_a_curriculum_trains_on_its_tiers_of_the_scores_of_the_moment(tmp_path, direction, mode, sizes):
    trainer, callback, seen, _ = run(tmp_path, schedule=Curriculum(12, 3, direction, mode))
    for epoch, rows in enumerate(seen.epochs()):
        kept = ranking(trainer, seen, epoch)[:12]
        tiers = [kept[:4], kept[4:8], kept[8:]]
        tiers = tiers[::-1] if direction == "easy_to_hard" else tiers
        stages = {"tiers": tiers[epoch : epoch + 1], "growing": tiers[: epoch + 1], "shrinking": tiers[epoch:]}[mode]
        assert sorted(rows) == sorted(row for tier in stages for row in tier)
        history = callback.history.rows(epoch)
        reasons = history["reason"].value_counts()
        assert reasons["kept"] == sizes[epoch]
        assert reasons.get("other_tier", 0) == 12 - sizes[epoch]
        for number, tier in enumerate(tiers):
            assert sorted(history["row_id"][history["tier"] == number]) == sorted(tier)
        assert (history["tier"].isna() == (history["reason"] == "below_cut")).all()
        numbers = {"tiers": [epoch], "growing": list(range(epoch + 1)), "shrinking": list(range(epoch, 3))}[mode]
        assert callback.history.epochs[epoch]["tiers"] == numbers
        assert set(history["tier"][history["reason"] == "kept"]) == set(numbers)
    assert trainer.state.global_step == sum(size // 2 for size in sizes)
    assert seen.final_learning_rate == 0


@pytest.mark.parametrize("direction", ["easy_to_hard", "hard_to_easy"])
def test_the_tiers_that_remain_are_of_the_rows_that_none_before_had(tmp_path, direction):
    trainer, callback, seen, scored = run(tmp_path, epochs=4, schedule=Curriculum(1.0, 3, direction, "remaining"))
    assert scored == [0, 1, 2, 3]
    trained = []
    for epoch, rows in enumerate(seen.epochs()[:3]):
        left = [row for row in ranking(trainer, seen, epoch) if row not in trained]
        assert sorted(rows) == sorted(left[:8] if direction == "hard_to_easy" else left[-8:])
        history = callback.history.rows(epoch).set_index("row_id")
        assert set(history.index[history["tier"] == epoch]) == set(rows)
        assert history["tier"][trained].isna().all()
        assert set(history["reason"][history.index.difference(rows)]) == {"other_tier"}
        trained += rows
    assert sorted(trained) == sorted(trainer.train_dataset["row_id"])  # each row once
    assert sorted(seen.epochs()[3]) == sorted(seen.epochs()[2])  # the last tier takes all epochs that remain
    assert trainer.state.global_step == 16
    assert seen.final_learning_rate == 0


@pytest.mark.parametrize("step", [4, 6])  # at the end of the first epoch, and inside the second
def test_what_the_tiers_had_survives_a_resume(tmp_path, step):
    options = {"schedule": Curriculum(1.0, 3, "hard_to_easy", "remaining")}
    whole = train(_resumable(tmp_path / "whole", **options)[0])
    cut = _resumable(tmp_path / "cut", **options)[0]
    cut.add_callback(Stop(step))
    cut.train()
    resumed, _ = _resumable(tmp_path / "cut", **options)
    assert train(resumed, resume_from_checkpoint=True).order() == whole.order()[2 * step :]


def test_the_rows_that_remain_are_selected_in_each_epoch(tmp_path):
    trainer = sft_trainer(tmp_path, POOL)
    select(trainer, schedule=Curriculum(1.0, 3, mode="remaining"), every=2)
    with pytest.raises(ValueError, match="leave `every` at 1"):
        trainer.train()


def test_annealing_ends_on_the_whole_pool(tmp_path):
    trainer, _, seen, scored = run(tmp_path, schedule=Anneal(6, share=0.34))
    assert scored == [0, 1]
    assert sorted(seen.epochs()[2]) == sorted(trainer.train_dataset["row_id"])
    assert trainer.state.global_step == 3 + 3 + 12


def test_an_annealed_epoch_and_a_run_without_a_curriculum_have_no_tiers(tmp_path):
    _, callback, _, _ = run(tmp_path, schedule=Anneal(Curriculum(12, 2), share=0.34))
    assert [record["tiers"] for record in callback.history.epochs] == [[0], [1], None]
    assert ["tier" in callback.history.rows(epoch) for epoch in range(3)] == [True, True, False]


def test_a_row_repeated_across_tiers_counts_to_the_one_that_is_trained(tmp_path):
    trainer = sft_trainer(tmp_path, 12, num_train_epochs=3)
    callback = select(trainer, schedule=Curriculum(12, 3), freeze_after=1)
    seen = train(trainer)
    assert any(record["shortfall"] for record in callback.history.epochs)
    for epoch, rows in enumerate(seen.epochs()):
        history = callback.history.rows(epoch)
        trained = history["row_id"].isin(rows)
        assert len(rows) == 4
        assert set(history["tier"][trained]) == {epoch}
        assert (history["tier"].isna() == ~history["reason"].isin(["kept", "other_tier"])).all()


@pytest.mark.parametrize("options", [{"every": 3}, {"freeze_after": 1}], ids=["every", "frozen"])
@pytest.mark.parametrize("step", [3, 4])  # at the end of the first epoch, and inside the second
def test_scores_of_an_earlier_epoch_survive_a_resume(tmp_path, options, step):
    whole = train(_resumable(tmp_path / "whole", **options)[0])
    _resumable(tmp_path / "cut", **options)[0].train()
    resumed, callback = _resumable(tmp_path / "again", **options)
    callback.score_pool = None  # to call it would be an error: all that is needed is in the checkpoint
    seen = train(resumed, resume_from_checkpoint=str(tmp_path / "cut" / f"checkpoint-{step}"))
    assert seen.order() == whole.order()[2 * step :]
    assert resumed.state.global_step == 9


def _resumable(folder, **options):
    trainer = sft_trainer(folder, POOL, save_strategy="steps", save_steps=1)
    return trainer, select(trainer, **{"keep": 6, "max_ifd": INF, **options})


# ---- as a user writes it ----------------------------------------------------------------------------------------


def test_the_callback_takes_a_schedule_in_place_of_keep(tmp_path):
    trainer = sft_trainer(tmp_path, POOL)
    callback = IFDSelectionCallback(trainer, schedule=Curriculum(0.5, tiers=2), every=2, freeze_after=3, guard=None)
    assert (callback.schedule, callback.timing) == (Curriculum(0.5, tiers=2), Timing(2, 0, 3))


@pytest.mark.parametrize(
    ("config", "schedule"),
    [
        ({"keep": ["0.1"]}, Constant(0.1)),
        ({"keep": ["100"]}, Constant(100)),
        ({"keep": 0.1}, Constant(0.1)),
        ({"keep": ["1.0", "50"]}, PerEpoch((1.0, 50))),
        ({"keep": ["0.3"], "curriculum": "hard_to_easy", "tiers": 2}, Curriculum(0.3, 2, "hard_to_easy")),
        ({"keep": ["0.3"], "anneal_share": 0.5}, Anneal(0.3, 0.5)),
    ],
)
def test_recipe_keys_make_the_schedule(config, schedule):
    assert SelectionConfig(**config).schedule() == schedule


def test_a_curriculum_of_a_list_is_an_error():
    with pytest.raises(ValueError, match="a list was given"):
        SelectionConfig(keep=["0.1", "0.2"], curriculum="easy_to_hard").schedule()


def test_help_names_the_schedule_options(capsys):
    assert main(["train", "--help"]) == 0
    assert "--freeze_after" in capsys.readouterr().out
