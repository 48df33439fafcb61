"""What a release of transformers that the tests do not know is asked when a callback is attached."""

from __future__ import annotations

import logging

import pytest
import transformers
from accelerate.logging import MultiProcessAdapter
from tiny_runs import FIVE, select, sft_trainer
from transformers import Trainer

from ifd_trainer import IFDSelectionCallback

of_five = pytest.mark.skipif(not FIVE, reason=f"these are hooks of transformers 5; this is {transformers.__version__}")


@pytest.fixture
def trainer(tmp_path):
    return sft_trainer(tmp_path, 8)


def refused(trainer) -> str:
    with pytest.raises(ImportError) as raised:
        IFDSelectionCallback(trainer)
    assert "SelectiveTrainer" not in {cls.__name__ for cls in type(trainer).__mro__}  # it is as it was
    return str(raised.value)


@of_five
@pytest.mark.parametrize("hook", ["_get_train_sampler", "set_initial_training_values", "_run_epoch"])
def test_a_release_without_a_hook_is_named(trainer, monkeypatch, hook):
    monkeypatch.delattr(Trainer, hook)
    assert refused(trainer) == (
        f"Trainer has no {hook} in transformers {transformers.__version__}; selection works with transformers 4.57 "
        "and 5.5 to 5.24. Install one of those."
    )


def one_more(self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial, state):
    """Another release's."""


def other_order(self, dataloader, args):
    """Another release's."""


@of_five
@pytest.mark.parametrize(
    ("hook", "other", "words"),
    [
        (
            "_init_training_state",
            one_more,
            "takes (max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial, state), "
            "not (max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial),",
        ),
        ("set_initial_training_values", other_order, "takes (dataloader, args), not (args, dataloader),"),
        ("_run_epoch", lambda self, **kwargs: None, "takes (kwargs), not (model, epoch, train_dataloader, "),
    ],
)
def test_a_hook_that_takes_something_else_is_named(trainer, monkeypatch, hook, other, words):
    monkeypatch.setattr(Trainer, hook, other)
    assert refused(trainer).startswith(f"Trainer.{hook} {words}")


@of_five
@pytest.mark.parametrize(
    ("changed", "found"),
    [
        (lambda values: (*values, 0), "(3, 6, 22, 66, 4, 11, 18, 0)"),
        (lambda values: (values[0], values[5], *values[2:5], values[1], values[6]), "(3, 11, 22, 66, 4, 6, 18)"),
        (lambda values: values[:6], "(3, 6, 22, 66, 4, 11)"),
    ],
)
def test_a_release_that_counts_otherwise_is_named(trainer, monkeypatch, changed, found):
    values = Trainer.set_initial_training_values

    def other(self, args, dataloader):
        return changed(values(self, args, dataloader))

    monkeypatch.setattr(Trainer, "set_initial_training_values", other)
    assert refused(trainer).startswith(
        f"For 3 epochs of 11 batches, Trainer.set_initial_training_values returns {found}, not (3, 6, 22, 66, 4, 11, "
        "18), in transformers "
    )


@pytest.mark.parametrize(("version", "warned"), [("5.24.7", 0), ("5.25.0.dev0", 1), ("6.0.0", 1)])
def test_a_release_newer_than_the_tests_is_tried_with_one_warning(
    tmp_path, trainer, monkeypatch, caplog, version, warned
):
    MultiProcessAdapter.warning_once.cache_clear()
    monkeypatch.setattr(transformers, "__version__", version)
    with caplog.at_level(logging.WARNING):
        select(trainer, keep=0.5)
        select(sft_trainer(tmp_path, 8), keep=0.5)
    told = [record.getMessage() for record in caplog.records if "newer than" in record.getMessage()]
    wanted = (
        f"transformers {version} is newer than the releases that selection was tested with, 5.5 to 5.24. The methods "
        "of its Trainer that selection builds on are the same, so it is tried."
    )
    assert [text.partition("] ")[2] for text in told] == [wanted] * warned
    trainer.train()
    assert trainer.state.global_step == 3 * 2
