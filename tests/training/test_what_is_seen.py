"""What a person sees of a run: lines, histograms, the held-out loss before training, a warning for a list of `keep`."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import build_model
from tiny_runs import (
    TOKENIZER,
    difference,
    plain_trainer,
    raw_rows,
    select,
    selection_logs,
    sft_trainer,
    text_rows,
    tokenised,
    train,
    weights_of,
)
from transformers import EarlyStoppingCallback, PrinterCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback
from transformers.utils import logging

from ifd_trainer import Guard, IFDSelectionCallback
from ifd_trainer.training.history import History

HELD_OUT = text_rows(raw_rows(5, seed=9))
EVALUATES = {"eval_dataset": HELD_OUT, "eval_strategy": "epoch"}


# ---- the held-out loss before training ------------------------------------------------------------------------------


def dropping_trainer(folder, **config):
    return sft_trainer(folder, 12, model=build_model(len(TOKENIZER), attention_dropout=0.2), **config)


def test_the_held_out_loss_before_training_is_that_of_the_untrained_model(tmp_path):
    expected = sft_trainer(tmp_path / "other", 12, **EVALUATES).evaluate()["eval_loss"]
    trainer = sft_trainer(tmp_path, 12, **EVALUATES)
    callback = select(trainer, keep=4)
    train(trainer)
    records = History.load(tmp_path).epochs
    assert records[0]["before_training"] == {"eval_loss": expected}
    assert [record["before_training"] for record in records[1:]] == [None, None]
    assert [entry.get("ifd/eval_loss_before") for entry in selection_logs(trainer)] == [expected, None, None]
    assert len({expected, *(record["eval_loss"] for record in callback.history.epochs)}) == 4


@pytest.mark.parametrize("persistent", [False, True])
def test_a_run_is_bit_for_bit_the_same_without_it(tmp_path, monkeypatch, persistent):
    workers = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True} if persistent else {}
    runs = []
    for measured in (True, False):
        if not measured:
            monkeypatch.setattr("ifd_trainer.training.callback.evaluates_later", lambda trainer: False)
        trainer = dropping_trainer(tmp_path / str(measured), **EVALUATES, **workers)
        callback = select(trainer, keep=4)
        seen = train(trainer)
        assert (callback.history.epochs[0]["before_training"] is not None) == measured
        entries = [
            {name: value for name, value in entry.items() if not name.startswith("ifd/") and "_runtime" not in name}
            for entry in trainer.state.log_history
        ]
        entries = [{name: value for name, value in e.items() if "per_second" not in name} for e in entries]
        runs.append((seen, weights_of(trainer.model), entries))
    (one, weights, entries), (other, other_weights, other_entries) = runs
    assert one.order() == other.order()
    assert difference(weights, other_weights) == 0.0
    assert entries == other_entries


def test_no_callback_and_no_best_checkpoint_sees_it(tmp_path):
    trainer = sft_trainer(
        tmp_path, 12, **EVALUATES, save_strategy="epoch", load_best_model_at_end=True, learning_rate=10.0
    )
    stopping = EarlyStoppingCallback(early_stopping_patience=2)
    trainer.add_callback(stopping)
    callback = select(trainer, keep=4, max_ifd=float("inf"))
    seen = train(trainer)
    losses = [record["eval_loss"] for record in callback.history.epochs]
    before = callback.history.epochs[0]["before_training"]["eval_loss"]
    assert before < min(losses)  # so large a learning rate does harm: the untrained model would have been the best
    assert trainer.state.best_metric == min(losses)
    assert seen.evaluations == [2, 4, 6]
    assert [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry] == [2, 4, 6]


def test_each_of_several_sets_has_its_own(tmp_path):
    sets = {"one": HELD_OUT, "two": text_rows(raw_rows(3, seed=11))}
    config = {"eval_dataset": sets, "eval_strategy": "epoch", "num_train_epochs": 1}
    expected = sft_trainer(tmp_path / "other", 12, **config).evaluate()
    trainer = sft_trainer(tmp_path, 12, **config)
    callback = select(trainer, keep=4)
    train(trainer)
    before = callback.history.epochs[0]["before_training"]
    assert before == {"eval_losses": {name: expected[f"eval_{name}_loss"] for name in sets}}
    assert selection_logs(trainer)[0]["ifd/eval_one_loss_before"] == before["eval_losses"]["one"]
    assert callback.history.epochs[0]["eval_losses"].keys() == sets.keys()


def test_eval_on_start_is_not_done_twice(tmp_path):
    trainer = sft_trainer(tmp_path, 12, **EVALUATES, eval_on_start=True)
    callback = select(trainer, keep=4)
    seen = train(trainer)
    assert seen.evaluations == [0, 2, 4, 6]
    first = next(entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry)
    assert callback.history.epochs[0]["before_training"] == {"eval_loss": first}


@pytest.mark.parametrize("config", [{"eval_strategy": "no"}, {"eval_strategy": "epoch", "eval_delay": 2}])
def test_a_trainer_that_does_not_evaluate_yet_is_left_alone(tmp_path, config):
    trainer = sft_trainer(tmp_path, 12, eval_dataset=HELD_OUT, num_train_epochs=1, **config)
    trainer.get_eval_dataloader = None  # would be called
    callback = select(trainer, keep=4)
    train(trainer)
    assert callback.history.epochs[0]["before_training"] is None


def test_a_plain_trainer_and_a_resumed_run_keep_it(tmp_path):
    rows = tokenised(sft_trainer(tmp_path / "rows"))

    def run(**options):
        trainer = plain_trainer(tmp_path, rows, save_strategy="epoch", num_train_epochs=2)
        trainer.eval_dataset, trainer.args.eval_strategy = rows.select(range(3)), "epoch"
        expected = trainer.evaluate()["eval_loss"]
        select(trainer, keep=4)
        train(trainer, **options)
        return expected, History.load(tmp_path).epochs[0]["before_training"]

    expected, before = run()
    assert before == {"eval_loss": expected}
    assert run(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))[1] == before


# ---- lines ----------------------------------------------------------------------------------------------------------


def lines_of(capsys) -> list[str]:
    out = capsys.readouterr().out.splitlines()
    return [line for line in out if line.startswith(("IFD, epoch", "What was selected"))]


@pytest.mark.parametrize("disable_tqdm", [True, False])
def test_a_script_that_does_nothing_about_logging_sees_a_line_for_each_epoch(tmp_path, capsys, disable_tqdm):
    trainer = sft_trainer(tmp_path / "my run", 24, **EVALUATES, disable_tqdm=disable_tqdm, num_train_epochs=2)
    callback = select(trainer, keep=6)
    trainer.train()
    first, second = callback.history.epochs
    assert lines_of(capsys) == [
        f"IFD, epoch 0: 6 of 24 rows kept, cut at {first['cut']:.4f}; held-out loss before training "
        f"{first['before_training']['eval_loss']:.4f}",
        f"IFD, epoch 1: 6 of 24 rows kept, cut at {second['cut']:.4f}; {100 * second['overlap']:.0f} % of them were "
        "kept in epoch 0 too",
        f"What was selected, epoch by epoch, is in {tmp_path}/my run/ifd_history. To see it: ifd-trainer report "
        f"'{tmp_path}/my run'",
    ]


def test_the_line_counts_what_guards_held_back(tmp_path, capsys):
    raw = [*raw_rows(40), {**raw_rows(1)[0], "row_id": 900}]
    raw[-1]["output"] = raw[-1]["output"].upper()
    trainer = sft_trainer(tmp_path, text_rows(raw), num_train_epochs=1)
    trainer.add_callback(
        IFDSelectionCallback(trainer, keep=4, guard=Guard(limit=None, unfinished=None, on_misaligned="warn"))
    )
    trainer.train()
    assert "guards held back 1 (1 duplicate)" in lines_of(capsys)[0]


@pytest.fixture
def verbosity():
    """What a trainer with a log level of its own changes for all that come after it."""
    before = logging.get_verbosity()
    yield
    logging.set_verbosity(before)


@pytest.mark.usefixtures("verbosity")
@pytest.mark.parametrize("quiet", [{"log_level": "error"}, {"remove": True}], ids=str)
def test_who_asked_for_silence_has_it(tmp_path, capsys, quiet):
    remove = quiet.pop("remove", False)
    trainer = sft_trainer(tmp_path, 12, num_train_epochs=1, disable_tqdm=True, **quiet)
    if remove:
        trainer.remove_callback(PrinterCallback)
    select(trainer, keep=4)
    trainer.train()
    assert lines_of(capsys) == []


def test_epochs_that_select_nothing_and_repeated_rows_are_told(tmp_path, capsys):
    trainer = sft_trainer(tmp_path, 24, num_train_epochs=2)
    callback = select(trainer, keep=24, warmup_epochs=1)
    trainer.train()
    record = callback.history.epochs[1]
    first, second, _ = lines_of(capsys)
    assert first == "IFD, epoch 0: all 24 rows, none chosen by its score"
    assert second.startswith(f"IFD, epoch 1: {record['kept']} of 24 rows kept and {24 - record['kept']} repeats")


# ---- trackers -------------------------------------------------------------------------------------------------------


class Board(TensorBoardCallback):
    """TensorBoard's callback without its package: what would be written."""

    def __init__(self):
        self.tb_writer, self.scalars, self.histograms = self, {}, {}

    def on_train_begin(self, *args, **kwargs): ...

    def on_train_end(self, *args, **kwargs): ...

    def flush(self): ...

    def add_scalar(self, name, value, step):
        self.scalars[name, step] = value

    def add_histogram(self, name, values, step):
        self.histograms[name, step] = values.tolist()


def silent(kind):
    """A tracker's callback that does nothing."""
    events = [name for name in dir(kind) if name.startswith("on_")]
    return type(
        kind.__name__, (kind,), {"__init__": lambda self: None, **dict.fromkeys(events, lambda *a, **k: None)}
    )()


def test_histograms_go_to_trackers_that_take_them(tmp_path, monkeypatch):
    logged = {"wandb": [], "trackio": []}
    for name, entries in logged.items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(log=entries.append, Histogram=tuple))
    trainer, board = sft_trainer(tmp_path, 24, num_train_epochs=2), Board()
    for callback in (board, silent(WandbCallback), silent(TrackioCallback)):
        trainer.add_callback(callback)
    callback = select(trainer, keep=6)
    trainer.train()
    assert len(board.histograms) == 4
    for epoch, record in enumerate(callback.history.epochs):
        rows, step = callback.history.rows(epoch), record["step"]
        for name, part in (("scores", rows), ("kept_scores", rows[rows["times"] > 0])):
            expected = part["ifd"].dropna()
            assert sorted(board.histograms[f"train/ifd/{name}", step]) == pytest.approx(sorted(expected), rel=1e-5)
            for entries in logged.values():
                assert entries[epoch][f"train/ifd/{name}"] == tuple(board.histograms[f"train/ifd/{name}", step])
                assert entries[epoch]["train/global_step"] == step
        # Numbers of the first epoch come with the first entry of the trainer's own.
        assert board.scalars["train/ifd/kept", step or 1] == 6
    assert all(np.isfinite(values).all() for values in board.histograms.values())


def test_nothing_is_drawn_of_an_epoch_without_scores(tmp_path):
    trainer, board = sft_trainer(tmp_path, 12, num_train_epochs=2), Board()
    trainer.add_callback(board)
    select(trainer, keep=4, warmup_epochs=1)
    trainer.train()
    assert {step for _, step in board.histograms} == {6}


# ---- lists of keep --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "options", "said"),
    [
        ([0.5], {}, "keep has 1 entry, but the run has 3 epochs: the last entry (0.5) stands for epochs 1 to 2 too."),
        ([6, 4], {}, "keep has 2 entries, but the run has 3 epochs: the last entry (4) stands for epoch 2 too."),
        ([6, 4, 4, 3], {}, "keep has 4 entries, but the run has 3 epochs: 3 is not used."),
        ([6, 4, 4, 3, 2], {}, "keep has 5 entries, but the run has 3 epochs: 3, 2 are not used."),
        ([6, 4, 4], {}, None),
        (0.5, {}, None),
        ([6, 4], {"max_steps": 5}, None),
    ],
    ids=str,
)
def test_a_list_of_another_length_than_the_epochs_is_told_before_training(tmp_path, caplog, keep, options, said):
    trainer = sft_trainer(tmp_path, 24, **options)
    select(trainer, keep=keep)
    trainer.train()
    found = [record.message for record in caplog.records if record.message.startswith("keep has")]
    assert found == ([] if said is None else [said])
