"""What frameworks do to a Trainer: a sampler or a `train` of their own, callbacks that come before trainers."""

from __future__ import annotations

import math
from collections import defaultdict

import pytest
from datasets import Dataset
from tiny_runs import (
    INF,
    PEAK,
    TOKENIZER,
    plain_trainer,
    raw_rows,
    select,
    sft_trainer,
    since_trl,
    text_rows,
    tokenised,
    train,
    weights_of,
)
from torch.utils.data import RandomSampler, SequentialSampler, WeightedRandomSampler
from transformers import DataCollatorForSeq2Seq, Trainer
from trl import SFTTrainer

from ifd_trainer import IFDSelectionCallback, SelectLater
from ifd_trainer.errors import RunError, UserError
from ifd_trainer.method.brief_experience import Brief

UNLABELLED = since_trl("1.7", "rows are packed with labels")


class Delegating(SFTTrainer):
    """As LLaMA-Factory's trainer: a sampler of its own only where shuffling is turned off."""

    shuffles = True

    def _get_train_sampler(self, *args):
        return super()._get_train_sampler(*args) if self.shuffles else SequentialSampler(self.train_dataset)


def delegating(folder, shuffles=True, **config):
    trainer = sft_trainer(folder, 12, num_train_epochs=2, **config)
    trainer.__class__ = Delegating
    trainer.shuffles = shuffles
    return trainer


# ---- samplers of their own --------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_a_sampler_that_is_the_trainers_own_changes_nothing(tmp_path, strategy):
    orders = []
    for trainer in (
        delegating(tmp_path / "a", train_sampling_strategy=strategy),
        sft_trainer(tmp_path / "b", 12, num_train_epochs=2, train_sampling_strategy=strategy),
    ):
        callback = select(trainer, keep=6, max_ifd=INF)
        orders.append(train(trainer).epochs())
        assert callback.history.settings["train_sampling_strategy"] == strategy
    assert orders[0] == orders[1]


def test_a_sampler_that_does_not_shuffle_is_heard(tmp_path):
    trainer = delegating(tmp_path, shuffles=False)
    select(trainer, keep=6, max_ifd=INF)
    epochs = train(trainer).epochs()
    assert epochs == [sorted(rows) for rows in epochs]
    assert [len(rows) for rows in epochs] == [6, 6]


@pytest.mark.parametrize(
    ("sampler", "name"),
    [
        (lambda rows: WeightedRandomSampler([1.0] * len(rows), len(rows)), "WeightedRandomSampler"),
        (lambda rows: RandomSampler(rows, replacement=True), "RandomSampler"),
        (lambda rows: RandomSampler(rows, num_samples=3), "RandomSampler"),
        (lambda rows: list(range(len(rows))), "list"),
    ],
)
def test_a_sampler_with_another_order_is_refused_by_name(tmp_path, sampler, name):
    class Sorted(SFTTrainer):
        def _get_train_sampler(self, train_dataset=None):
            return sampler(self.train_dataset)

    trainer = sft_trainer(tmp_path, 8)
    trainer.__class__ = Sorted
    with pytest.raises(UserError, match=f"Sorted has a _get_train_sampler of its own, which orders rows by a {name};"):
        IFDSelectionCallback(trainer)


def test_shuffling_that_was_turned_off_in_between_is_another_run(tmp_path):
    trainer = delegating(tmp_path, save_strategy="steps", save_steps=2)
    select(trainer, keep=6, max_ifd=INF)
    train(trainer)
    resumed = delegating(tmp_path, shuffles=False)
    select(resumed, keep=6, max_ifd=INF)
    with pytest.raises(UserError, match="train_sampling_strategy: 'random' in the checkpoint, 'sequential' now"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


# ---- a train of their own ---------------------------------------------------------------------------------------


def test_a_train_assigned_on_the_instance_is_called_and_selects(tmp_path):
    """As Unsloth does: it wraps the method that the class had, before the callback is made."""
    trainer = sft_trainer(tmp_path, 12, num_train_epochs=2, save_strategy="steps", save_steps=3)
    inner, calls = trainer.train, []

    def around(*args, **kwargs):
        calls.append((args, kwargs))
        return inner(*args, **kwargs)

    trainer.train = around
    select(trainer, keep=6, max_ifd=INF)
    assert [len(rows) for rows in train(trainer).epochs()] == [6, 6]
    assert len(calls) == 1

    (tmp_path / "checkpoint-3" / "trainer_state.json").write_text("{")
    with pytest.raises(UserError, match="has a damaged"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert len(calls) == 1


def test_an_assigned_train_does_not_forget_a_callback_that_was_never_added(tmp_path):
    trainer = sft_trainer(tmp_path, 8)
    trainer.train = trainer.train
    IFDSelectionCallback(trainer)
    with pytest.raises(UserError, match="is not among its callbacks"):
        trainer.train()


# ---- columns that are empty -------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [[None, None], [[], None], [[], []]])
def test_columns_for_images_without_any_are_text(tmp_path, values):
    rows = tokenised(sft_trainer(tmp_path, 8))
    for name in ("images", "videos", "audios"):
        rows = rows.add_column(name, values * 4)
    trainer = plain_trainer(tmp_path, rows, num_train_epochs=1)
    select(trainer, keep=4, max_ifd=INF)
    assert len(train(trainer).order()) == 4


@pytest.mark.parametrize(("column", "what"), [("images", "images"), ("videos", "videos"), ("audio", "sounds")])
def test_one_row_with_an_image_is_refused(tmp_path, column, what):
    rows = Dataset.from_list(
        [{"input_ids": [5, 6], "labels": [-100, 6], column: [] if i < 3 else ["a.png"]} for i in range(4)]
    )
    with pytest.raises(UserError, match=rf"The training set has {what} \(column '{column}'\)"):
        IFDSelectionCallback(plain_trainer(tmp_path, rows))


# ---- trainers of TRL that a framework writes anew ---------------------------------------------------------------


def rewritten(name):
    """A class as Unsloth makes it of TRL's: in a module of its own name."""
    return type(name, (SFTTrainer,), {"__module__": name})


def test_trainers_on_preferences_are_refused_as_unsloth_writes_them_too(tmp_path):
    trainer = sft_trainer(tmp_path, 8)
    trainer.__class__ = rewritten("UnslothDPOTrainer")
    with pytest.raises(UserError, match="UnslothDPOTrainer trains on pairs of a chosen and a rejected answer;"):
        IFDSelectionCallback(trainer)


def test_the_sft_trainer_that_unsloth_writes_selects(tmp_path):
    trainer = sft_trainer(tmp_path, 8, num_train_epochs=1)
    trainer.__class__ = rewritten("UnslothSFTTrainer")
    select(trainer, keep=4, max_ifd=INF)
    assert len(train(trainer).order()) == 4


# ---- packed rows without labels ---------------------------------------------------------------------------------


@UNLABELLED
def test_packed_rows_without_labels_are_read_as_they_are_trained_on(tmp_path):
    """As Unsloth prepares texts: of all tokens."""
    texts = text_rows(raw_rows(16)).map(
        lambda row: {"text": row["prompt"] + row["completion"]}, remove_columns=["prompt", "completion", "row_id"]
    )
    tables = []
    for without in ((), ("labels",)):
        trainer = sft_trainer(tmp_path, texts, num_train_epochs=2, packing=True, max_length=128)
        assert "labels" in trainer.train_dataset.column_names
        trainer.train_dataset = trainer.train_dataset.remove_columns(list(without))
        callback = select(trainer, keep=2, max_ifd=INF)
        trainer.train()
        tables.append([callback.history.rows(epoch) for epoch in (0, 1)])
    for labelled, unlabelled in zip(*tables, strict=True):
        assert labelled.equals(unlabelled)
        assert 0 < (labelled["times"] > 0).sum() < len(labelled)


# ---- rows that a framework packed -------------------------------------------------------------------------------


def test_rows_of_several_examples_are_refused(tmp_path):
    """As LLaMA-Factory packs: its own arguments say so, and no column but the positions."""
    alone = {"input_ids": [5, 6, 7, 0], "labels": [-100, 6, 7, -100], "position_ids": [0, 1, 2, 0]}
    several = {"input_ids": [5, 6, 7, 8], "labels": [-100, 6, -100, 8], "position_ids": [0, 1, 0, 1]}
    with pytest.raises(UserError, match="Row 1200 of the training set holds several examples: its position_ids begin"):
        IFDSelectionCallback(plain_trainer(tmp_path, Dataset.from_list([alone] * 1200 + [several])))


@pytest.mark.parametrize("positions", [None, 1, [[0, 1], [0, 1]]])
def test_positions_of_another_kind_tell_nothing(tmp_path, positions):
    row = {"input_ids": [5, 6], "labels": [-100, 6], "position_ids": positions}
    IFDSelectionCallback(plain_trainer(tmp_path, Dataset.from_list([row] * 4)), guard=None)


def test_positions_that_begin_once_are_no_packing(tmp_path):
    """Padding has position 0 again."""
    rows = tokenised(sft_trainer(tmp_path, 8))
    positions = [[*range(len(ids) - 2), 0, 0] for ids in rows["input_ids"]]
    trainer = plain_trainer(tmp_path, rows.add_column("position_ids", positions), num_train_epochs=1)
    trainer.data_collator = lambda batch: DataCollatorForSeq2Seq(TOKENIZER)(
        [{name: row[name] for name in ("input_ids", "labels")} for row in batch]
    )
    select(trainer, keep=4, max_ifd=INF)
    assert len(train(trainer).order()) == 4


# ---- Alpaca's prompt with a line break --------------------------------------------------------------------------


def test_the_alpaca_header_with_a_line_break_precedes_direct_answers(tmp_path):
    """All prompts end with ".\\n\\n### Response:\\n": of what they share, the header alone is meant."""
    rows = text_rows(raw_rows(8)).map(lambda row: {"prompt": row["prompt"] + "\n"})
    assert all(prompt.endswith(".\n\n### Response:\n") for prompt in rows["prompt"])
    trainer = sft_trainer(tmp_path, rows, num_train_epochs=1)
    callback = select(trainer, keep=4, max_ifd=INF)
    train(trainer)
    assert callback.history.settings["direct_prefix"] == "### Response:\n"


# ---- a schedule whose parts a framework fills in ----------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Both num_training_steps and num_stable_steps")
def test_a_schedule_that_is_filled_in_begins_anew_with_the_steps_of_its_part(tmp_path):
    """As LLaMA-Factory does for warmup_stable_decay: a third of the steps stays, the rest decays."""

    class Filling(SFTTrainer):
        def create_scheduler(self, num_training_steps, optimizer=None):
            stable = num_training_steps // 3
            filled = {"num_stable_steps": stable, "num_decay_steps": num_training_steps - stable}
            self.args.lr_scheduler_kwargs = {**filled, **(self.args.lr_scheduler_kwargs or {})}
            return super().create_scheduler(num_training_steps, optimizer)

    trainer = sft_trainer(tmp_path, 24, num_train_epochs=3, lr_scheduler_type="warmup_stable_decay")
    trainer.__class__ = Filling
    brief = Brief("random", clusters=3, per_cluster=2, max_share=0.25)
    trainer.add_callback(IFDSelectionCallback.cherry(trainer, keep=8, max_ifd=INF, brief=brief))
    rates = [rate / PEAK for rate in train(trainer).learning_rates()]
    assert len(rates) == 3 + 3 * 4
    for part, stable in ((rates[:3], 1), (rates[3:], 4)):
        decay = [(1 + math.cos(math.pi * i / (len(part) - stable))) / 2 for i in range(len(part) - stable)]
        assert part == pytest.approx([1.0] * stable + decay)


# ---- a model that cuts rows -------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole_logits", [False, True])
def test_a_model_that_cuts_rows_by_itself_is_refused(tmp_path, whole_logits):
    """As Unsloth's do beyond max_seq_length: nothing but the number of hidden states tells of it."""
    trainer = sft_trainer(tmp_path, 8)
    longest = max(len(ids) for ids in tokenised(trainer)["input_ids"])
    backbone, inner = trainer.model.model, trainer.model.model.forward
    backbone.forward = lambda input_ids=None, **more: inner(input_ids=input_ids[:, : longest - 3], **more)
    if whole_logits:
        trainer.model.get_output_embeddings = lambda: None
    select(trainer, keep=4, max_ifd=INF)
    cut = rf"The model cut rows of {longest} tokens to {longest - 3}, so their answers cannot be scored\. Unsloth does"
    with pytest.raises(UserError, match=cut):
        trainer.train()
    assert trainer.state.global_step == 0


# ---- callbacks before trainers ----------------------------------------------------------------------------------


def framework(folder, callbacks, cls=Trainer):
    """A trainer as a framework makes it: callbacks are handed to the constructor."""
    plain = plain_trainer(folder, tokenised(sft_trainer(folder, 12)), num_train_epochs=2)
    return cls(
        model=plain.model,
        args=plain.args,
        train_dataset=plain.train_dataset,
        data_collator=DataCollatorForSeq2Seq(TOKENIZER),
        processing_class=TOKENIZER,
        callbacks=callbacks,
    )


def test_selecting_later_trains_as_the_callback_does(tmp_path):
    known = framework(tmp_path / "known", [])
    select(known, keep=6, max_ifd=INF)
    epochs = train(known).epochs()

    later = SelectLater(keep=6, max_ifd=INF, guard=None)
    trainer = framework(tmp_path / "later", [later])
    assert train(trainer).epochs() == epochs
    assert isinstance(later.made, IFDSelectionCallback)
    assert later not in trainer.callback_handler.callbacks
    assert all((weights_of(trainer.model)[k] == v).all() for k, v in weights_of(known.model).items())
    assert train(trainer).epochs()  # a second call selects too


def test_selecting_later_waits_for_what_a_class_sets_up_behind_its_trainer(tmp_path):
    class Late(Trainer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.shuffles = False
            inner = self.train
            self.train = lambda *args, **kwargs: inner(*args, **kwargs)

        def _get_train_sampler(self, *args):
            return super()._get_train_sampler(*args) if self.shuffles else SequentialSampler(self.train_dataset)

    later = SelectLater(keep=6, max_ifd=INF, guard=None)
    epochs = train(framework(tmp_path, [later], Late)).epochs()
    assert epochs == [sorted(rows) for rows in epochs]
    assert [len(rows) for rows in epochs] == [6, 6]


def test_one_later_selection_serves_trainers_in_turn(tmp_path):
    later = SelectLater(keep=6, max_ifd=INF, guard=None)
    made = []
    for name in "ab":
        assert [len(rows) for rows in train(framework(tmp_path / name, [later])).epochs()] == [6, 6]
        made.append(later.made)
    assert made[0] is not made[1]


def test_selecting_later_by_the_papers_method(tmp_path):
    later = SelectLater(IFDSelectionCallback.cherry, keep=4, max_ifd=INF, brief=None)
    trainer = framework(tmp_path, [later])
    epochs = train(trainer).epochs()
    assert len(epochs) == 2
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert len(epochs[0]) == 4


def test_what_the_callback_refuses_is_refused_before_the_first_step(tmp_path):
    trainer = framework(tmp_path, [SelectLater(keep=1.5)])
    with pytest.raises(ValueError, match="keep"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_an_unknown_option_is_refused_at_once():
    with pytest.raises(TypeError, match="unexpected keyword argument 'kep'; did you mean 'keep'"):
        SelectLater(kep=0.1)


def test_selecting_later_in_a_trainer_that_is_there_already_is_refused(tmp_path):
    trainer = sft_trainer(tmp_path, 8)
    trainer.add_callback(SelectLater(keep=0.5))
    with pytest.raises(RunError, match=r"was handed to a trainer that was made before\. Make the callback with the"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_selecting_later_without_any_trainer_is_refused():
    with pytest.raises(RunError, match="found no Trainer"):
        SelectLater(keep=0.5).on_init_end(None, None, None)


# ---- metrics of their own ---------------------------------------------------------------------------------------


def test_metrics_that_a_trainer_gathers_between_two_logs_are_not_cut_by_the_selections(tmp_path):
    """As ms-swift's trainers do: what was gathered since the last log is averaged and cleared by the next."""

    class Gathering(Trainer):
        def training_step(self, *args, **kwargs):
            self.custom_metrics["train"]["steps"].append(1)
            return super().training_step(*args, **kwargs)

        def log(self, logs, *args, **kwargs):
            for name, values in self.custom_metrics["train"].items():
                logs[name] = len(values)
                values.clear()
            super().log(logs, *args, **kwargs)

    trainer = plain_trainer(tmp_path, tokenised(sft_trainer(tmp_path, 12)), num_train_epochs=2, logging_steps=2)
    trainer.__class__ = Gathering
    trainer.custom_metrics = {"train": defaultdict(list)}
    select(trainer, keep=6, max_ifd=INF)
    train(trainer)
    logs = [log for log in trainer.state.log_history if "loss" in log or "ifd/kept" in log]
    assert [log.get("steps") for log in logs] == [2, None, 2, 2]
