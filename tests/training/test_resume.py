"""Resuming: the same rows in the same order to the same weights, bit for bit, or an error that says why not."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT, build_model
from tiny_runs import (
    FIVE,
    INF,
    TOKENIZER,
    Stop,
    difference,
    plain_trainer,
    raw_rows,
    select,
    selection_logs,
    sft_trainer,
    text_rows,
    tokenised,
    train,
    training_logs,
    weights_of,
)
from transformers import EarlyStoppingCallback, TrainerCallback, set_seed

from ifd_trainer import Diverse
from ifd_trainer.training.history import History

# Updates per epoch: 4, 3 and 5 (with accumulation 2: 2, 2 and 3).
BUDGETS = [8, 6, 10]
PLACES = {
    "inside_the_first_epoch": 2,
    "at_a_boundary": 4,
    "inside_an_epoch": 5,
    "at_the_second_boundary": 7,
    "in_the_last_epoch": 11,
}


# Killed at the end of step n, before its checkpoint is written: the one of step n - 1 is the last.
KILLS = {"first_epoch": 2, "at_a_boundary": 5, "inside": 7, "last_step": 12}


class CopyFolder(TrainerCallback):
    """Keeps what a kill at the end of a step would leave on disk, for each step of `KILLS`."""

    def __init__(self, folder):
        self.folder = folder

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in KILLS.values():
            shutil.copytree(args.output_dir, self.folder / f"killed-{state.global_step}")


def with_dropout(folder, *, rows=16, **config):
    """A trainer whose training draws random numbers."""
    return sft_trainer(folder, rows, model=build_model(len(TOKENIZER), attention_dropout=0.1), **config)


def selecting(folder, *, rows=16, keep=BUDGETS, max_ifd=INF, min_answer_tokens=1, seed=None, order="shuffle", **config):
    trainer = with_dropout(folder, rows=rows, **config)
    callback = select(trainer, keep=keep, max_ifd=max_ifd, min_answer_tokens=min_answer_tokens, seed=seed, order=order)
    callback.scored = 0
    score_pool = callback.score_pool

    def count(*arguments):
        callback.scored += 1
        return score_pool(*arguments)

    callback.score_pool = count
    return trainer, callback


def interrupted(folder, step, **options):
    """The path of the checkpoint at which a run was cut off, and what it trained until then."""
    trainer, _ = selecting(folder, save_strategy="steps", save_steps=step, **options)
    trainer.add_callback(Stop(step))
    seen = train(trainer)
    assert trainer.state.global_step == step
    return folder / f"checkpoint-{step}", seen


def names_in(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def same_in_the_end(trainer, whole):
    return difference(weights_of(trainer.model), whole.weights) == 0.0


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    trainer, callback = selecting(folder / "run", save_strategy="steps", save_steps=1)
    trainer.add_callback(CopyFolder(folder))
    seen = train(trainer)
    assert seen.updates_per_epoch() == [4, 3, 5]
    assert callback.scored == 3
    return SimpleNamespace(
        folder=folder / "run",
        killed=folder,
        left={step: names_in(folder / f"killed-{step}") for step in KILLS.values()},
        seen=seen,
        trainer=trainer,
        callback=callback,
        weights=weights_of(trainer.model),
    )


def copy_of(whole, folder, step):
    """A checkpoint of the uninterrupted run and its history, in a folder of its own."""
    shutil.copytree(whole.folder / "ifd_history", folder / "ifd_history")
    return shutil.copytree(whole.folder / f"checkpoint-{step}", folder / f"checkpoint-{step}")


# ---- exactness --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", PLACES.values(), ids=PLACES.keys())
def test_a_resumed_run_ends_where_the_uninterrupted_one_does(tmp_path, whole, step):
    checkpoint, before = interrupted(tmp_path, step)
    trainer, _ = selecting(tmp_path)
    after = train(trainer, resume_from_checkpoint=str(checkpoint))

    assert before.order() + after.order() == whole.seen.order()
    assert [update.batches for update in after.updates] == [update.batches for update in whole.seen.updates[step:]]
    assert same_in_the_end(trainer, whole)
    assert before.learning_rates() + after.learning_rates() == whole.seen.learning_rates()
    assert after.final_learning_rate == 0.0
    assert after.leftovers == []
    assert trainer.state.global_step == trainer.state.max_steps == 12
    assert trainer.state.epoch == 3.0
    logs, expected = training_logs(trainer), training_logs(whole.trainer)
    assert [(e["step"], e["epoch"], e["loss"]) for e in logs] == [(e["step"], e["epoch"], e["loss"]) for e in expected]
    kept = [(entry["step"], entry["ifd/cut"]) for entry in selection_logs(trainer)]
    assert kept == [(entry["step"], entry["ifd/cut"]) for entry in selection_logs(whole.trainer)]


KILLED = """
import os, signal, sys
from pathlib import Path
from transformers import TrainerCallback
from test_resume import selecting

class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)

trainer, _ = selecting(Path(sys.argv[1]), save_strategy="steps", save_steps=1)
trainer.add_callback(Kill())
trainer.train()
"""


def left_by_a_kill(folder, step):
    """The output folder of a run in a process of its own that is killed at the end of a step."""
    command = [sys.executable, "-c", KILLED, str(folder), str(step)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), *sys.path])}
    process = subprocess.run(command, env=environment, timeout=120, capture_output=True, text=True)
    assert process.returncode == -signal.SIGKILL, process.stderr
    return folder


def resumed_exactly(folder, whole, step):
    """Resume from what a kill at the end of `step` left."""
    trainer, _ = selecting(folder, save_strategy="steps", save_steps=1)
    after = train(trainer, resume_from_checkpoint=True)
    assert after.order() == [row for update in whole.seen.updates[step - 1 :] for row in update.rows]
    assert same_in_the_end(trainer, whole)


@pytest.mark.parametrize("step", KILLS.values(), ids=KILLS)
def test_a_run_is_resumed_exactly_from_what_was_on_disk_at_the_end_of_a_step(whole, step):
    resumed_exactly(whole.killed / f"killed-{step}", whole, step)


def test_a_killed_process_leaves_that_and_is_resumed_exactly(tmp_path, whole):
    step = KILLS["at_a_boundary"]
    left = names_in(left_by_a_kill(tmp_path, step))
    assert left == whole.left[step]
    resumed_exactly(tmp_path, whole, step)


def test_a_run_killed_before_its_first_checkpoint_says_that_there_is_none(tmp_path):
    trainer, _ = selecting(tmp_path)
    with pytest.raises(ValueError, match="No valid checkpoint found"):
        trainer.train(resume_from_checkpoint=True)


def test_rows_that_stand_for_others_are_told_by_the_model_that_scored_them(tmp_path):
    """Of epochs between two scorings, one that is resumed goes by the embeddings of the scoring, as it would have."""

    def begun(name):
        trainer = sft_trainer(tmp_path / name, 24, num_train_epochs=4, save_strategy="steps", save_steps=1)
        # Another number of rows in the second epoch: others are chosen among the same candidates.
        select(trainer, keep=[4, 6, 4, 6], policy=Diverse(0.9, INF), every=2)
        return trainer

    through = train(begun("whole"))
    for step in (2, 3, 5, 7):
        cut = begun(f"cut-{step}")
        cut.add_callback(Stop(step))
        before = train(cut)
        after = train(begun(f"cut-{step}"), resume_from_checkpoint=str(tmp_path / f"cut-{step}" / f"checkpoint-{step}"))
        assert before.order() + after.order() == through.order(), step


@pytest.mark.parametrize(("step", "scored"), [(2, 2), (4, 2), (5, 1), (7, 1), (11, 0)])
def test_an_epoch_that_was_selected_is_not_scored_again(tmp_path, whole, step, scored):
    trainer, callback = selecting(tmp_path)
    train(trainer, resume_from_checkpoint=str(copy_of(whole, tmp_path, step)))
    assert callback.scored == scored
    assert same_in_the_end(trainer, whole)


@pytest.mark.parametrize(
    "config",
    [
        {"gradient_accumulation_steps": 2},
        {"dataloader_num_workers": 2},
        {"train_sampling_strategy": "group_by_length"},
        {"max_steps": 6},
        {"num_train_epochs": 2.5},
        {"order": "descending"},
    ],
    ids=["accumulation", "workers", "group_by_length", "max_steps", "fractional", "descending"],
)
def test_a_resume_is_exact_in_other_settings_too(tmp_path, config):
    expected, _ = selecting(tmp_path / "whole", **config)
    through = train(expected)
    step = len(through.updates) - 2
    checkpoint, before = interrupted(tmp_path / "cut", step, **config)
    trainer, _ = selecting(tmp_path / "cut", **config)
    after = train(trainer, resume_from_checkpoint=str(checkpoint))
    assert before.order() + after.order() == through.order()
    assert difference(weights_of(trainer.model), weights_of(expected.model)) == 0.0
    assert after.final_learning_rate == 0.0
    assert trainer.state.epoch == expected.state.epoch


def test_persistent_workers_that_read_ahead_resume_inside_an_epoch_exactly(tmp_path):
    # Two workers fetch four batches each: at step 5 they have read all of the epoch's three batches. Dropout draws from
    # the random state in which a usual loader would draw its workers' seed.
    workers = {"dataloader_num_workers": 2, "dataloader_persistent_workers": True, "dataloader_prefetch_factor": 4}
    expected, _ = selecting(tmp_path, save_strategy="steps", save_steps=5, **workers)
    through = train(expected)
    trainer, callback = selecting(tmp_path, **workers)
    after = train(trainer, resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert through.updates_per_epoch() == [4, 3, 5]
    assert [update.batches for update in after.updates] == [update.batches for update in through.updates[5:]]
    assert after.learning_rates() == through.learning_rates()[5:]
    assert callback.scored == 1
    assert difference(weights_of(trainer.model), weights_of(expected.model)) == 0.0


def test_a_checkpoint_written_at_the_end_of_an_epoch_is_resumed_exactly(tmp_path, whole):
    trainer, _ = selecting(tmp_path, save_strategy="epoch")
    trainer.add_callback(Stop(7))
    before = train(trainer)
    trainer, callback = selecting(tmp_path, save_strategy="epoch")
    after = train(trainer, resume_from_checkpoint=True)
    assert before.order() + after.order() == whole.seen.order()
    assert callback.scored == 1
    assert same_in_the_end(trainer, whole)


class StopInside(TrainerCallback):
    """Ends training at the fifth step, inside the second epoch, as a callback with a time limit does."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 5


def test_a_run_that_was_stopped_inside_an_epoch_and_saved_at_its_end_goes_on_inside_it(tmp_path, whole):
    trainer, _ = selecting(tmp_path, save_strategy="epoch")
    trainer.add_callback(StopInside())
    before = train(trainer)
    trainer, callback = selecting(tmp_path)
    after = train(trainer, resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert before.order() + after.order() == whole.seen.order()
    assert callback.scored == 1
    assert same_in_the_end(trainer, whole)


@pytest.mark.parametrize("config", [{}, {"num_train_epochs": 2.5}, {"max_steps": 6}], ids=str)
def test_a_finished_run_has_nothing_left_to_train(tmp_path, config):
    first, _ = selecting(tmp_path, save_strategy="steps", save_steps=100, **config)
    steps = len(train(first).updates)  # the last step is saved
    trainer, callback = selecting(tmp_path, **config)
    after = train(trainer, resume_from_checkpoint=str(tmp_path / f"checkpoint-{steps}"))
    assert after.order() == []
    assert callback.scored == 0
    assert trainer.state.global_step == steps
    assert difference(weights_of(trainer.model), weights_of(first.model)) == 0.0


def test_a_run_may_be_interrupted_twice(tmp_path, whole):
    checkpoint, first = interrupted(tmp_path, 2)
    trainer, _ = selecting(tmp_path, save_strategy="steps", save_steps=2)
    trainer.add_callback(Stop(6))
    second = train(trainer, resume_from_checkpoint=str(checkpoint))
    trainer, _ = selecting(tmp_path)
    third = train(trainer, resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert first.order() + second.order() + third.order() == whole.seen.order()
    assert same_in_the_end(trainer, whole)


def test_repeats_of_a_shortfall_are_resumed_exactly(tmp_path):
    options = {"keep": 14, "max_ifd": 1.0}
    expected, callback = selecting(tmp_path / "whole", **options)
    through = train(expected)
    assert callback.history.epochs[0]["shortfall"] > 0
    checkpoint, before = interrupted(tmp_path / "cut", 5, **options)
    trainer, _ = selecting(tmp_path / "cut", **options)
    after = train(trainer, resume_from_checkpoint=str(checkpoint))
    assert before.order() + after.order() == through.order()
    assert difference(weights_of(trainer.model), weights_of(expected.model)) == 0.0


def test_an_adapter_is_resumed_exactly(tmp_path):
    from peft import LoraConfig

    def build(folder):
        set_seed(0)  # trl 1.14 makes an adapter's weights before it seeds
        adapter = LoraConfig(r=4, lora_alpha=64, lora_dropout=0.1, target_modules=["q_proj"], task_type="CAUSAL_LM")
        return selecting(tmp_path / folder, peft_config=adapter, save_strategy="steps", save_steps=5)[0]

    expected = build("whole")
    through = train(expected)
    trainer = build("cut")
    trainer.add_callback(Stop(5))
    before = train(trainer)
    trainer = build("cut")
    after = train(trainer, resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-5"))
    assert before.order() + after.order() == through.order()
    assert difference(weights_of(trainer.model), weights_of(expected.model)) == 0.0


def test_a_plain_trainer_is_resumed_exactly(tmp_path):
    rows = tokenised(sft_trainer(tmp_path, 16))

    def build():
        trainer = plain_trainer(tmp_path, rows, save_strategy="steps", save_steps=3)
        select(trainer, keep=BUDGETS, max_ifd=INF)
        return trainer

    expected = build()
    through = train(expected)
    trainer = build()
    after = train(trainer, resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert after.order() == [row for update in through.updates[6:] for row in update.rows]
    assert difference(weights_of(trainer.model), weights_of(expected.model)) == 0.0


# ---- state of callbacks, and the history --------------------------------------------------------------------------


def test_restoring_callback_states_keeps_this_callback_and_restores_the_others(tmp_path):
    def build(folder, patience):
        trainer, callback = selecting(
            tmp_path / folder,
            restore_callback_states_from_checkpoint=True,
            save_strategy="steps",
            save_steps=5,
            eval_dataset=text_rows(raw_rows(2, seed=9)),
            eval_strategy="steps",
            eval_steps=1,
            metric_for_best_model="eval_loss",
        )
        trainer.add_callback(EarlyStoppingCallback(patience))
        return trainer, callback

    expected, _ = build("whole", patience=99)
    through = train(expected)
    trainer, _ = build("cut", patience=99)
    trainer.add_callback(Stop(5))
    before = train(trainer)
    trainer, callback = build("cut", patience=1)
    after = train(trainer, resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-5"))
    assert before.order() + after.order() == through.order()
    assert difference(weights_of(trainer.model), weights_of(expected.model)) == 0.0
    assert callback in trainer.callback_handler.callbacks
    assert callback.scored == 1
    others = [other for other in trainer.callback_handler.callbacks if isinstance(other, EarlyStoppingCallback)]
    assert [other.early_stopping_patience for other in others] == [99]


def test_a_resumed_history_goes_on_from_the_checkpoint(tmp_path, whole):
    trainer, _ = selecting(tmp_path)
    train(trainer, resume_from_checkpoint=str(copy_of(whole, tmp_path, 5)))
    history = History.load(tmp_path)
    timed = {"seconds_scoring", "seconds_training"}
    records = [{k: v for k, v in record.items() if k not in timed} for record in history.epochs]
    assert records == [{k: v for k, v in record.items() if k not in timed} for record in whole.callback.history.epochs]
    for epoch in range(3):
        assert history.rows(epoch).equals(whole.callback.history.rows(epoch))


def test_records_of_epochs_after_the_checkpoint_are_taken_back(tmp_path, whole):
    trainer, _ = selecting(tmp_path, save_strategy="steps", save_steps=1)
    trainer.add_callback(Stop(6))
    train(trainer, resume_from_checkpoint=str(copy_of(whole, tmp_path, 5)))
    assert [record["epoch"] for record in History.load(tmp_path).epochs] == [0, 1]


def test_a_resume_without_its_history_trains_the_same_rows(tmp_path, whole):
    checkpoint = copy_of(whole, tmp_path, 5)
    shutil.rmtree(tmp_path / "ifd_history")
    trainer, callback = selecting(tmp_path)
    after = train(trainer, resume_from_checkpoint=str(checkpoint))
    assert after.order() == [row for update in whole.seen.updates[5:] for row in update.rows]
    assert same_in_the_end(trainer, whole)
    assert [record["epoch"] for record in callback.history.epochs] == [2]  # epoch 1 was selected before
    assert callback.history.epochs[0]["overlap"] is None


def test_a_checkpoint_can_be_resumed_after_the_callback_was_removed(tmp_path, whole):
    checkpoint = copy_of(whole, tmp_path, 5)
    trainer, callback = selecting(tmp_path, rows=8)  # 4 updates an epoch, 12 in all
    trainer.remove_callback(callback)
    after = train(trainer, resume_from_checkpoint=str(checkpoint))
    assert len(after.updates) == 7
    assert callback.scored == 0


def test_ignore_data_skip_starts_the_epoch_over_with_the_same_rows_and_says_so(tmp_path, whole, caplog):
    checkpoint = copy_of(whole, tmp_path, 5)
    trainer, callback = selecting(tmp_path, ignore_data_skip=True)
    after = train(trainer, resume_from_checkpoint=str(checkpoint))
    assert after.epochs()[0] == whole.seen.epochs()[1]
    assert callback.scored == 1
    assert trainer.state.global_step == 12
    assert "the resumed epoch starts over, so the resume is not exact" in caplog.text


@pytest.mark.parametrize("step", [2, 5, 11])
def test_an_epoch_that_was_stopped_and_resumed_is_recorded_as_a_whole(tmp_path, whole, step):
    """What the stopped run had trained on in its last epoch is not all that the epoch did."""
    checkpoint, before = interrupted(tmp_path, step)
    epoch = len(before.epochs()) - 1
    partial = History.load(tmp_path)
    assert partial.epochs[epoch]["trained"] == partial.rows(epoch)["times"].sum() == len(before.epochs()[epoch])
    trainer, callback = selecting(tmp_path)
    train(trainer, resume_from_checkpoint=str(checkpoint))
    assert [record["trained"] for record in callback.history.epochs] == [8, 6, 10]
    for number, rows in enumerate(whole.seen.epochs()):
        table = callback.history.rows(number)
        assert sorted(table["row_id"][table["times"] > 0]) == sorted(rows)


# ---- what may change --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("epochs", "updates"), [(4, 17), (2, 7)])
def test_other_epochs_may_follow_on_those_that_have_begun(tmp_path, whole, epochs, updates, caplog):
    checkpoint = copy_of(whole, tmp_path, 5)
    trainer, callback = selecting(tmp_path, num_train_epochs=epochs)
    after = train(trainer, resume_from_checkpoint=str(checkpoint))
    assert after.epochs()[0] == whole.seen.epochs()[1][2:]  # a step of the second epoch was done
    assert trainer.state.global_step == updates
    assert callback.scored == epochs - 2
    assert [len(rows) for rows in after.epochs()] == [4, 10, 10][: epochs - 1]
    assert (
        f"planned with 12 updates and now has {updates}: the rows of epochs that have begun are as before"
        in caplog.text
    )


class EndEpoch(TrainerCallback):
    """Ends an epoch at a step, as a budget of time or a plateau would."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_epoch_stop = state.global_step == self.step


@pytest.mark.parametrize("stop", [3, 5, 7])
def test_a_run_with_an_epoch_that_ended_early_resumes_in_the_right_epoch(tmp_path, stop):
    """Two updates of four in the first epoch: the plan alone would find the others one epoch too early."""
    whole, _ = selecting(tmp_path / "whole")
    whole.add_callback(EndEpoch(2))
    everything = train(whole).order()
    assert len(everything) == 4 + 6 + 10
    first, _ = selecting(tmp_path / "part", save_strategy="steps", save_steps=stop)
    first.add_callback(EndEpoch(2))
    first.add_callback(Stop(stop))
    before = train(first).order()
    again, _ = selecting(tmp_path / "part")
    after = train(again, resume_from_checkpoint=str(tmp_path / "part" / f"checkpoint-{stop}")).order()
    assert before + after == everything
    assert difference(weights_of(again.model), weights_of(whole.model)) == 0.0


def test_a_checkpoint_at_the_end_of_an_epoch_that_ended_early_goes_on_with_the_next(tmp_path):
    trainer, _ = selecting(tmp_path, save_strategy="epoch")
    trainer.add_callback(EndEpoch(2))
    whole = train(trainer).order()
    again, _ = selecting(tmp_path)
    assert train(again, resume_from_checkpoint=str(tmp_path / "checkpoint-2")).order() == whole[4:]


# ---- what cannot be resumed -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"keep": [8, 6, 9]}, r"schedule: PerEpoch\(keep=\(8, 6, 10\)\) in the checkpoint, .*\(8, 6, 9\).* now"),
        ({"max_ifd": 1.0}, r"policy: .*max_ifd=inf.* in the checkpoint, .*max_ifd=1\.0.* now"),
        ({"seed": 7}, "seed: 42 in the checkpoint, 7 now"),
        ({"order": "ascending"}, "order: 'shuffle' in the checkpoint, 'ascending' now"),
        ({"rows": text_rows(raw_rows(16, seed=1))}, "training set: .* in the checkpoint, .* now"),
        ({"rows": text_rows(raw_rows(16)[::-1])}, "training set: .* in the checkpoint, .* now"),
        ({"min_answer_tokens": 2}, "min_answer_tokens: 1 in the checkpoint, 2 now"),
        (
            {"train_sampling_strategy": "group_by_length"},
            "train_sampling_strategy: 'random' in the checkpoint, 'group_by_length' now",
        ),
        pytest.param(
            {"per_device_train_batch_size": 4},
            "batches of epoch 0: 4 in the checkpoint, 2 now",
            marks=pytest.mark.skipif(not FIVE, reason="transformers 4.57 resumes with the checkpoint's batch size"),
        ),
    ],
    ids=[
        "keep",
        "max_ifd",
        "seed",
        "order",
        "other_rows",
        "other_order_of_rows",
        "min_answer_tokens",
        "strategy",
        "batch_size",
    ],
)
def test_a_change_that_cannot_be_resumed_is_named(tmp_path, whole, options, named):
    checkpoint = copy_of(whole, tmp_path, 5)
    history = (tmp_path / "ifd_history" / "history.json").read_bytes()
    trainer, callback = selecting(tmp_path, **options)
    with pytest.raises(ValueError, match=f"The run cannot be resumed exactly: .*{named}"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step == 5
    assert callback.scored == 0
    assert (tmp_path / "ifd_history" / "history.json").read_bytes() == history


@pytest.mark.parametrize("restore", [False, True])
def test_a_checkpoint_without_selection_is_refused(tmp_path, restore):
    plain = with_dropout(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    plain.train()
    trainer, callback = selecting(tmp_path, max_steps=4, restore_callback_states_from_checkpoint=restore)
    with pytest.raises(
        ValueError, match="The checkpoint holds no selection state: it was written without this callback"
    ):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert callback.scored == 0


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("checkpoint-9", "No such checkpoint: 'checkpoint-9' is no folder. .*run holds checkpoint-5"),
        (True, "resume_from_checkpoint is true, but .*nothing holds no checkpoint. Leave it out to start training"),
    ],
    ids=["by_name", "the_last_one"],
)
def test_a_checkpoint_that_is_not_there_is_told_with_those_that_are(tmp_path, whole, given, words):
    (tmp_path / "run").mkdir()
    copy_of(whole, tmp_path / "run", 5)
    trainer, callback = selecting(tmp_path / ("nothing" if given is True else "run"))
    shutil.rmtree(tmp_path / "nothing", ignore_errors=True)  # which the trainer makes
    with pytest.raises(FileNotFoundError, match=words):
        trainer.train(resume_from_checkpoint=given)
    assert callback.scored == 0


def test_a_damaged_history_is_named(tmp_path, whole):
    checkpoint = copy_of(whole, tmp_path, 5)
    (tmp_path / "ifd_history" / "history.json").write_text("{")
    trainer, _ = selecting(tmp_path)
    with pytest.raises(ValueError, match=r"history\.json is damaged"):
        trainer.train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize("by_name", [True, False])
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.unlink(), "has no trainer_state.json"),
        (lambda path: path.write_text(path.read_text()[:200]), r"has a damaged \(.*\) trainer_state.json"),
    ],
    ids=["missing", "torn"],
)
def test_a_checkpoint_cut_off_while_written_is_refused_by_name(tmp_path, whole, damage, words, by_name):
    checkpoint = copy_of(whole, tmp_path, 5)
    damage(checkpoint / "trainer_state.json")
    trainer, callback = selecting(tmp_path)
    with pytest.raises(ValueError, match=f"checkpoint-5 {words}.* Delete it and resume from the one before"):
        trainer.train(resume_from_checkpoint=str(checkpoint) if by_name else True)
    assert callback.scored == 0
