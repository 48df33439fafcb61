"""Row weights in the loss and losses read off the training forward, against a loop over single rows."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain, permutations
from typing import ClassVar

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny_runs import (
    FIVE,
    INF,
    RECIPES,
    Stop,
    difference,
    model_with,
    plain_trainer,
    raw_rows,
    select,
    sft_trainer,
    text_rows,
    tokenised,
    train,
    training_logs,
    weights_of,
)
from trl import SFTTrainer
from weighted_steps import DESCENT, descended, losses_of, rows_of, watched

from ifd_trainer import Anneal, Cherry, Diverse, InfoBatch, Kakurenbo, Selection, Stages, Weighted, write_report
from ifd_trainer.errors import RunError, UserError
from ifd_trainer.recipe.selection import SelectionConfig
from ifd_trainer.report.wording import settings_in_words
from ifd_trainer.training.history import History
from ifd_trainer.training.row_weights import BatchTokens, TrainLosses

ROWS = 12
TRUST = [[1.0, 0.25, 3.0, 0.0, 1.0, 2.0][i % 6] for i in range(ROWS)]
PACKED = {"packing": True, "max_length": 96, "per_device_train_batch_size": 1}


@dataclass(frozen=True)
class Fixed:
    """All rows of a pool in their order, or as many of them as the budget is, with weights."""

    weights: tuple[float, ...] | None = tuple(TRUST)

    reads_scores: ClassVar[bool] = False

    def __call__(self, columns, budget, *, ids=None, rng=None):
        rows = len(columns["ifd_status"])
        weights = None if self.weights is None else np.array(self.weights)[:budget]
        return Selection(np.arange(budget), np.full(rows, "kept", dtype=object), 0.0, rows, 0, weights=weights)


def chats(folder) -> Dataset:
    """Tokenised rows with two answers each; of some, all tokens are trained on."""
    rows = []
    for number, row in enumerate(tokenised(sft_trainer(folder, ROWS))):
        ids, labels = row["input_ids"] + row["input_ids"][::-1], row["labels"] + row["labels"][::-1]
        rows.append({"row_id": row["row_id"], "input_ids": ids, "labels": ids if number % 3 == 0 else labels})
    return Dataset.from_list(rows)


def rule_of(callback) -> str:
    """What the report says of how rows were chosen."""
    return dict(settings_in_words(callback.history.settings, callback.history.epochs))["Rule"]


TRAINERS = {
    "sft": lambda folder, **config: sft_trainer(folder, ROWS, **config),
    "plain": lambda folder, **config: plain_trainer(folder, tokenised(sft_trainer(folder, ROWS)), **config),
    "several answers": lambda folder, **config: plain_trainer(folder, chats(folder), **config),
    "whole rows": lambda folder, **config: sft_trainer(folder, ROWS, completion_only_loss=False, **config),
    "packed": lambda folder, **config: sft_trainer(folder, ROWS, **{**PACKED, **config}),
    "without padding": lambda folder, **config: sft_trainer(folder, ROWS, padding_free=True, max_length=None, **config),
}


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("sft", {}),
        ("sft", {"gradient_accumulation_steps": 4}),
        ("plain", {"gradient_accumulation_steps": 4}),
        ("several answers", {"per_device_train_batch_size": 3}),
        ("whole rows", {"gradient_accumulation_steps": 2}),
        ("packed", {"gradient_accumulation_steps": 2}),
        ("without padding", {}),
        ("sft", {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}),
        ("sft", {"train_sampling_strategy": "group_by_length"}),
        ("plain", {"per_device_train_batch_size": 5, "dataloader_drop_last": True}),
    ],
)
def test_each_step_is_that_of_the_weighted_losses_of_its_rows(tmp_path, kind, config):
    trainer = TRAINERS[kind](tmp_path, num_train_epochs=2 if len(config) > 1 else 1, **DESCENT, **config)
    start = weights_of(trainer.model)
    callback, items = select(trainer, keep=1.0, policy=Fixed()), []
    updates = watched(trainer, callback, items)
    rows = rows_of(callback)
    assert len({row for update in updates for row in update}) > 9
    expected = descended(start, rows, updates, TRUST, items)
    assert difference(weights_of(trainer.model), expected) < 2e-5
    assert difference(descended(start, rows, updates, np.ones(ROWS)), expected) > 1e-2


@pytest.mark.parametrize("kind", ["sft", "plain", "packed"])
def test_a_run_with_weights_of_one_is_bit_for_bit_the_run_without(tmp_path, kind):
    runs = []
    for number, policy in enumerate((Fixed(None), Fixed((1.0,) * ROWS), Fixed(None))):
        trainer = TRAINERS[kind](tmp_path / str(number), num_train_epochs=1, gradient_accumulation_steps=2)
        select(trainer, keep=0.75, policy=policy, train_losses=number == 2)
        trainer.train()
        runs.append((weights_of(trainer.model), [log["loss"] for log in training_logs(trainer)]))
    for weights, losses in runs[1:]:
        assert difference(weights, runs[0][0]) == 0.0
        assert losses == runs[0][1]


def test_the_expected_gradient_of_infobatch_is_that_of_all_rows(tmp_path):
    """Over every draw there is, exactly, and by a trainer's own steps: n/b times the mean gradient of all rows.

    All rows have the same number of trained tokens, so that the trainer's N is that of its batch size.
    """
    rows = tokenised(sft_trainer(tmp_path, 6)).to_list()
    for row in rows:
        answer = [i for i, label in enumerate(row["labels"]) if label != -100]
        row["labels"] = [label if i in answer[:4] else -100 for i, label in enumerate(row["labels"])]
    cas = [3.0, 0.5, 2.0, 0.7, 2.5, 0.6]  # three above the mean; of the others one is drawn
    rows = Dataset.from_list(rows).add_column("loss_before", cas)

    def step(policy, keep, name):
        config = {"per_device_train_batch_size": 6, "num_train_epochs": 1}
        trainer = plain_trainer(tmp_path / name, rows, **DESCENT, **config)
        start = weights_of(trainer.model)
        select(trainer, keep=keep, policy=policy)
        trainer.train()
        assert trainer.state.global_step == 1
        return {name: weights - start[name] for name, weights in weights_of(trainer.model).items()}

    @dataclass(frozen=True)
    class Dealt:
        order: tuple[int, ...]
        gives_weights: ClassVar[bool] = True
        reads_scores: ClassVar[bool] = False

        def permutation(self, count):
            return np.array(self.order)

        def __call__(self, columns, budget, *, ids=None, rng=None):
            return InfoBatch("loss_before")(columns, budget, ids=ids, rng=self)

    whole = step(Fixed(None), 6, "whole")
    draws = {order[:1]: step(Dealt(order), 4, f"draw{order[0]}") for order in list(permutations(range(3)))[::2]}
    assert len(draws) == 3  # each draw there is, once
    for name, full in whole.items():
        mean = sum(draw[name] for draw in draws.values()) / 3
        torch.testing.assert_close(mean, 6 / 4 * full, rtol=2e-4, atol=1e-6)
    assert max((draw["lm_head.weight"] - 1.5 * whole["lm_head.weight"]).abs().max() for draw in draws.values()) > 1e-3


# ---- resuming ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [{"gradient_accumulation_steps": 2}, {**PACKED, "save_steps": 4}], ids=str)
def test_a_resume_inside_an_epoch_has_the_same_weights_and_losses(tmp_path, config):
    config = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 4, **config}

    def made(folder):
        trainer = sft_trainer(folder, ROWS, **config)
        keep = [3, 4] if "packing" in config else [9, 10]
        return trainer, select(trainer, keep=keep, policy=InfoBatch(), train_losses=True)

    expected, callback = made(tmp_path / "whole")
    updates = watched(expected, callback)
    cut, callback = made(tmp_path / "cut")
    cut.add_callback(Stop(4))
    before = watched(cut, callback)
    rest, callback = made(tmp_path / "cut")
    after = watched(rest, callback, resume_from_checkpoint=True)
    assert before + after == updates
    assert len(before) == 4
    assert difference(weights_of(rest.model), weights_of(expected.model)) == 0.0
    for epoch in range(2):
        one, other = (History.load(tmp_path / name).rows(epoch) for name in ("whole", "cut"))
        assert one["weight"].nunique() == 2
        for column in ("weight", "times"):
            np.testing.assert_array_equal(one[column], other[column])
        np.testing.assert_allclose(one["train_loss"], other["train_loss"], rtol=1e-6)
        assert (one["train_loss"].notna() == (one["times"] > 0)).all()


def test_weights_of_another_column_do_not_go_on_with_a_run(tmp_path):
    rows = text_rows(raw_rows(ROWS)).add_column("trust", TRUST).add_column("other", TRUST)
    config = {"num_train_epochs": 1, "save_strategy": "steps", "save_steps": 2}
    trainer = sft_trainer(tmp_path, rows, **config)
    select(trainer, keep=8, policy=Weighted("trust", Cherry(INF)))
    trainer.train()
    trainer = sft_trainer(tmp_path, rows, **config)
    select(trainer, keep=8, policy=Weighted("other", Cherry(INF)))
    with pytest.raises(UserError, match="row_weights: 'trust' in the checkpoint, 'other' now"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


# ---- a column, and policies -------------------------------------------------------------------------------------


def test_a_column_weighs_the_rows_of_a_policy_and_those_of_epochs_on_all_rows(tmp_path):
    rows = text_rows(raw_rows(ROWS)).add_column("trust", TRUST)
    trainer = sft_trainer(tmp_path, rows, **DESCENT)
    start = weights_of(trainer.model)
    policy = Weighted("trust", Stages("trust", ["1.0", "3.0"], policy=Cherry(INF)))
    callback = select(trainer, schedule=Anneal(1.0, 0.3), policy=policy, train_losses=True)
    updates = watched(trainer, callback)
    assert [sorted(chain(*part)) for part in (updates[:2], updates[2:3], updates[3:])] == [
        [0, 4, 6, 10],
        [2, 8],
        list(range(ROWS)),
    ]
    assert difference(weights_of(trainer.model), descended(start, rows_of(callback), updates, TRUST)) < 2e-5
    last = callback.history.rows(2)
    assert last["weight"].tolist() == TRUST
    assert callback.history.settings["row_weights"] == "trust"
    assert callback.history.settings["policy"]["type"] == "Stages"
    page = write_report(tmp_path).read_text()
    for words in ("the column trust", "Weight: what the row", "Train loss: mean loss"):
        assert words in page


def test_weights_follow_a_diverse_policy(tmp_path):
    rows = text_rows(raw_rows(ROWS)).add_column("trust", TRUST)
    trainer = sft_trainer(tmp_path, rows, num_train_epochs=1)
    callback = select(trainer, keep=4, policy=Weighted("trust", Diverse(0.8, INF)))
    trainer.train()
    kept = callback.history.rows(0)
    np.testing.assert_array_equal(kept["weight"], np.where(kept["times"] > 0, TRUST, np.nan))


def test_infobatch_prunes_below_the_mean_and_ends_on_all_rows(tmp_path):
    trainer = sft_trainer(tmp_path, 24)
    callback = select(trainer, schedule=Anneal(0.75, 0.3), policy=InfoBatch())
    seen = train(trainer)
    assert [len(rows) for rows in seen.epochs()] == [18, 18, 24]
    for epoch in (0, 1):
        rows = callback.history.rows(epoch)
        above = rows["cas"] >= rows["cas"].mean()
        assert (rows["reason"][above] == "kept").all()
        count = above.sum()
        assert rows["weight"][above].tolist() == [1.0] * count
        assert rows["weight"][~above].dropna().tolist() == pytest.approx([(24 - count) / (18 - count)] * (18 - count))
        assert (rows["reason"] == "not_drawn").sum() == 6
    assert set(seen.epochs()[0]) != set(seen.epochs()[1])
    assert "weight" not in callback.history.rows(2)
    assert callback.guard is None
    assert "drawn, whose losses weigh so much more" in rule_of(callback)


def test_kakurenbo_hides_the_lowest_losses_but_those_that_rose(tmp_path):
    trainer = sft_trainer(tmp_path, 24)
    callback = select(trainer, keep=16, policy=Kakurenbo(tau=0.01))
    assert callback.further == ("recent_loss_change",)
    train(trainer)
    before = None
    for epoch in range(3):
        rows = callback.history.rows(epoch)
        change = np.zeros(24) if before is None else rows["cas"] - before
        np.testing.assert_array_equal(rows["recent_loss_change"].isna(), before is None)
        if before is not None:
            np.testing.assert_allclose(rows["recent_loss_change"], change)
        ready = (np.exp(-rows["cas"]) >= 0.01) & (change <= 0)
        order = np.lexsort((rows["cas"], ~ready))
        assert set(order[:8]) == set(np.flatnonzero(rows["reason"] == "hidden"))
        before = rows["cas"]
    assert "rows whose answers have a probability of 0.01 by token" in rule_of(callback)


# ---- losses -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("sft", {"gradient_accumulation_steps": 2}),
        ("plain", {}),
        ("several answers", {}),
        ("whole rows", {}),
        ("packed", {}),
    ],
)
def test_losses_are_those_of_the_rows_that_are_trained_on(tmp_path, kind, config):
    trainer = TRAINERS[kind](tmp_path, num_train_epochs=1, **{**DESCENT, "learning_rate": 0.0}, **config)
    callback = select(trainer, keep=0.5, policy=Fixed(), train_losses=True)
    updates = watched(trainer, callback)
    found, trained = callback.history.rows(0)["train_loss"], {row for update in updates for row in update}
    rows, model = rows_of(callback), model_with(weights_of(trainer.model))
    for row, loss in enumerate(found):
        if row in trained:
            assert loss == pytest.approx(losses_of(model, rows[row]).mean().item(), rel=1e-4)
        else:
            assert np.isnan(loss)
    assert 0 < len(trained) < ROWS


def test_losses_of_a_row_that_is_trained_on_again_are_averaged_over_its_tokens():
    losses = TrainLosses(4)
    losses.add(np.array([2, 0, 2]), torch.tensor([3.0, 8.0, 1.0]), torch.tensor([3, 2, 1]))
    losses.gather()
    losses.add(np.array([2]), torch.tensor([4.0]), torch.tensor([4]))
    losses.gather()
    np.testing.assert_array_equal(losses.means(), [4.0, np.nan, 1.0, np.nan])
    again = TrainLosses(4)
    again.from_arrays(losses.to_arrays())
    np.testing.assert_array_equal(again.means(), losses.means())


def test_no_losses_are_kept_unless_they_are_asked_for(tmp_path):
    trainer = sft_trainer(tmp_path, ROWS, num_train_epochs=1)
    callback = select(trainer, keep=4)
    trainer.train()
    assert not {"train_loss", "weight"} & {*callback.history.rows(0)}


# ---- what tokens are whose --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "place"),
    [
        ([[-100, 5, 6], [-100, 7, -100]], [[-1, 0, 0], [-1, 1, -1]]),  # padded on the right
        ([[-100, 5, 6], [-100, -100, 7]], [[-1, 0, 0], [-1, -1, 1]]),  # on the left
        ([[-100, 5, 6, -100, 7]], [[-1, 0, 0, -1, 1]]),  # not at all
        ([[-100, 5, 6], [-100, 6, 7]], None),
        ([[-100, 5, 6, 7, -100, 7]], None),
    ],
)
def test_tokens_are_told_by_what_they_are(labels, place):
    found = BatchTokens.of(np.array([4, 9]), [[-100, 5, 6], [-100, 7]], torch.tensor(labels))
    assert (None if found is None else found.place.tolist()) == place


# ---- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor smooths labels"),
        ({"loss_type": "dft"}, "loss_type='dft' is another one"),
    ],
)
@pytest.mark.parametrize("options", [{"policy": InfoBatch()}, {"train_losses": True}])
@pytest.mark.filterwarnings("ignore:`label_smoothing_factor` is deprecated:FutureWarning")
def test_a_loss_that_is_no_sum_over_tokens_is_refused_at_once(tmp_path, config, why, options):
    trainer = sft_trainer(tmp_path, ROWS, **config)
    with pytest.raises(UserError, match=why):
        select(trainer, keep=4, **options)
    select(trainer, keep=4)  # without either it is nobody's concern


def test_weights_of_a_policy_that_says_nothing_are_refused_before_the_first_step(tmp_path):
    trainer = plain_trainer(tmp_path, tokenised(sft_trainer(tmp_path, ROWS)), label_smoothing_factor=0.1)
    select(trainer, keep=1.0, policy=Fixed())
    with pytest.raises(UserError, match=r"A policy with weights .* label_smoothing_factor smooths labels"):
        trainer.train()
    assert trainer.state.global_step == 0


class OwnLoss(SFTTrainer):
    """Makes its loss of the logits by itself, whatever the model returns."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        logits, labels = outputs.logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten()
        return torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / num_items_in_batch


class Hidden(SFTTrainer):
    """Asks the model inside of the one that it is given."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super().compute_loss(model.forward, inputs, return_outputs, num_items_in_batch)


class Twice(SFTTrainer):
    """Runs the model once more than it has to."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        with torch.no_grad():
            model(**inputs)
        return super().compute_loss(model, inputs, *args, **kwargs)


class Logs(SFTTrainer):
    """Looks at its loss, and leaves it as it is."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        self.seen = [*getattr(self, "seen", []), loss.item()]
        return loss


def of_class(folder, kind):
    trainer = sft_trainer(folder, ROWS, num_train_epochs=1, **DESCENT)
    trainer.__class__ = kind
    return trainer


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (OwnLoss, "The loss that OwnLoss computes is not that of the model's tokens"),
        (Hidden, "Hidden calls the model 0 times"),
        (Twice, "Twice calls the model 2 times"),
    ],
)
def test_a_trainer_that_would_not_weigh_is_refused_before_its_first_step(tmp_path, kind, why):
    trainer = of_class(tmp_path, kind)
    start = weights_of(trainer.model)
    select(trainer, keep=1.0, policy=Fixed((3.0,) * ROWS))
    with pytest.raises(UserError, match=why):
        trainer.train()
    assert difference(weights_of(trainer.model), start) == 0.0


def test_a_trainer_that_only_looks_is_not_in_the_way(tmp_path):
    trainer = of_class(tmp_path, Logs)
    start = weights_of(trainer.model)
    callback = select(trainer, keep=1.0, policy=Fixed())
    updates = watched(trainer, callback)
    assert difference(weights_of(trainer.model), descended(start, rows_of(callback), updates, TRUST)) < 2e-5
    assert len(trainer.seen) == 6


@pytest.mark.parametrize("kind", ["sft", "plain"])
def test_rows_without_weight_teach_nothing(tmp_path, kind):
    trainer = TRAINERS[kind](tmp_path, num_train_epochs=1, **DESCENT)
    start = weights_of(trainer.model)
    select(trainer, keep=4, policy=Fixed((0.0,) * ROWS))
    trainer.train()
    assert difference(weights_of(trainer.model), start) < 1e-7


def test_a_step_that_goes_another_way_is_refused(tmp_path):
    trainer = sft_trainer(tmp_path, ROWS)
    trainer.training_step = trainer.training_step  # bound to the class as it was before
    select(trainer, keep=1.0, policy=Fixed())
    with pytest.raises(UserError, match="training_step of SFTTrainer does not go through that of its class"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_model_that_hides_its_logits_is_refused(tmp_path):
    trainer = plain_trainer(tmp_path, tokenised(sft_trainer(tmp_path, ROWS)))
    trainer.model.register_forward_hook(lambda module, inputs, outputs: {"loss": outputs.loss})
    select(trainer, keep=1.0, policy=Fixed())
    with pytest.raises(UserError, match="returns loss in training, which is no loss with logits"):
        trainer.train()


def test_a_collator_that_changes_labels_is_an_error_of_the_run(tmp_path):
    trainer = plain_trainer(tmp_path, tokenised(sft_trainer(tmp_path, ROWS)))
    inner = trainer.data_collator

    def collate(rows):
        batch = inner(rows)
        batch["labels"][:, -3:] = -100
        return batch

    trainer.data_collator = collate
    select(trainer, keep=1.0, policy=Fixed())
    with pytest.raises(RunError, match="its labels are not those of these rows"):
        trainer.train()


@pytest.mark.parametrize(
    ("weights", "why"),
    [
        ((1.0,) * 3, r"gave float64 \(3,\) for 12 rows"),
        ((1.0, -1.0) * 6, "gave -1.0"),
        ((1.0, np.nan) * 6, "gave nan"),
    ],
)
def test_weights_that_are_none_are_refused(tmp_path, weights, why):
    trainer = sft_trainer(tmp_path, ROWS)
    select(trainer, keep=1.0, policy=Fixed(weights))
    with pytest.raises(UserError, match=why):
        trainer.train()


def test_repeats_of_a_row_have_one_weight(tmp_path):
    def twice(columns, budget, *, ids=None, rng=None):
        kept, rows = np.array([0, 1, 0, 1]), np.full(ROWS, "kept", dtype=object)
        return Selection(kept, rows, 0.0, 2, 2, weights=np.array([1.0, 2.0, 1.0, 3.0]))

    trainer = sft_trainer(tmp_path, ROWS)
    select(trainer, keep=4, policy=twice)
    with pytest.raises(UserError, match="All repeats of a row have one weight"):
        trainer.train()


def test_a_column_that_is_not_there_is_told_at_once(tmp_path):
    trainer = sft_trainer(tmp_path, ROWS)
    with pytest.raises(UserError, match="has no column 'trust'"):
        select(trainer, keep=4, policy=Weighted("trust"))
    with pytest.raises(UserError, match=r"has no column 'trust'.*packing drops all others"):
        select(sft_trainer(tmp_path, ROWS, **PACKED), keep=4, policy=Weighted("trust"))


# ---- recipes ----------------------------------------------------------------------------------------------------


@RECIPES
def test_the_keys_of_recipes(tmp_path):
    rows = text_rows(raw_rows(ROWS)).add_column("trust", TRUST)
    config = SelectionConfig(keep=["0.5"], row_weights="trust", train_losses=True, guards=["none"])
    callback = config.callback(sft_trainer(tmp_path, rows))
    assert (callback.weighted.by, callback.policy, callback.scoring.train_losses) == ("trust", Cherry(), True)
    assert SelectionConfig(policy="infobatch").chosen_policy() == InfoBatch()
    assert SelectionConfig(policy="kakurenbo").further() == ("recent_loss_change",)
    assert SelectionConfig(policy="infobatch", score="das").idle_keys() == {"policy: cherry": ["score"]}
    with pytest.raises(UserError, match="recent_loss_change is how the model in training changes"):
        SelectionConfig(policy="kakurenbo", scorer="gpt2")


# ---- with epochs in parts ---------------------------------------------------------------------------------------


def in_parts(folder, **config):
    """A trainer of one epoch of six updates in parts of two, whose rows have weights of their own."""
    trainer = plain_trainer(folder, tokenised(sft_trainer(folder, ROWS)), num_train_epochs=1, **DESCENT, **config)
    policy = Weighted("trust", Cherry(INF))
    trainer.train_dataset = trainer.train_dataset.add_column("trust", TRUST)
    options = {"keep": 1.0, "policy": policy, "max_ifd": None, "every_steps": 2, "train_losses": True, "guard": None}
    return trainer, select(trainer, **options)


@pytest.mark.skipif(not FIVE, reason="every_steps needs transformers 5")
def test_rows_of_each_part_have_their_own_weights_and_losses(tmp_path):
    trainer, callback = in_parts(tmp_path / "through", save_steps=3, save_strategy="steps")
    start = weights_of(trainer.model)
    updates = watched(trainer, callback)
    assert sorted(chain(*updates)) == list(range(ROWS))
    assert difference(weights_of(trainer.model), descended(start, rows_of(callback), updates, TRUST)) < 2e-5
    for part in (1, 2, 3):
        rows = callback.history.rows(0, part)
        trained = sorted(chain(*updates[2 * part - 2 : 2 * part]))
        assert np.flatnonzero(rows["times"]).tolist() == trained
        assert np.flatnonzero(rows["train_loss"].notna()).tolist() == trained
        assert rows["weight"][trained].tolist() == [TRUST[row] for row in trained]

    before = [callback.history.rows(0, part)["train_loss"] for part in (2, 3)]
    other, resumed = in_parts(tmp_path / "through", save_strategy="no")
    more = watched(other, resumed, resume_from_checkpoint=str(tmp_path / "through" / "checkpoint-3"))
    assert more == updates[3:]
    assert difference(weights_of(other.model), weights_of(trainer.model)) == 0.0
    for part, losses in zip((2, 3), before, strict=True):
        np.testing.assert_array_equal(resumed.history.rows(0, part)["train_loss"], losses)
