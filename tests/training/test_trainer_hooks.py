"""The loop: which rows each epoch trains on, in how many optimizer steps, with which learning rates."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from conftest import ROUNDING
from tiny_runs import (
    FIVE,
    INF,
    PEAK,
    difference,
    model_with,
    plain_trainer,
    raw_rows,
    reference_scores,
    reference_top,
    select,
    selection_logs,
    sft_trainer,
    text_rows,
    tokenised,
    train,
    training_logs,
    weights_of,
)
from transformers import ProgressCallback, TrainerCallback, get_scheduler
from trl import SFTTrainer

from ifd_trainer import IFDSelectionCallback
from ifd_trainer.training.trainer_hooks import SelectiveTrainer

ALL = {row["row_id"] for row in raw_rows(24)}


def expected_rates(name: str, planned: int, warmup: int = 0, **kwargs: float) -> list[float]:
    """Learning rates of `planned` updates and the one after them, from a scheduler that knows their number."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler = get_scheduler(name, optimizer, warmup, planned, scheduler_specific_kwargs=kwargs)
    rates = []
    for _ in range(planned + 1):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


# ---- sizes, steps and learning rates ----------------------------------------------------------------------------


# Budgets that shrink, grow and stay, even and odd, each in half of the four settings; odd ones in all.
@pytest.mark.parametrize(
    ("budgets", "accumulation", "drop_last"),
    [
        ([16, 8, 8], 1, False),
        ([16, 8, 8], 4, True),
        ([8, 8, 16], 1, True),
        ([8, 8, 16], 4, False),
        ([8, 8, 8], 4, False),
        *(([17, 11, 3], accumulation, drop_last) for accumulation in (1, 4) for drop_last in (False, True)),
        *(([3, 11, 17], accumulation, drop_last) for accumulation in (1, 4) for drop_last in (False, True)),
        ([11, 11, 11], 1, True),
    ],
    ids=str,
)
def test_all_planned_rows_are_trained_in_all_planned_steps(tmp_path, budgets, accumulation, drop_last):
    trainer = sft_trainer(
        tmp_path, 17, gradient_accumulation_steps=accumulation, dataloader_drop_last=drop_last, num_train_epochs=3
    )
    select(trainer, keep=budgets, max_ifd=INF)
    seen = train(trainer)

    rows = [budget - budget % 2 if drop_last else budget for budget in budgets]
    batches = [math.ceil(count / 2) for count in rows]
    steps = [math.ceil(count / accumulation) for count in batches]
    assert [len(epoch) for epoch in seen.epochs()] == rows
    assert [len(set(epoch)) for epoch in seen.epochs()] == rows
    assert seen.updates_per_epoch() == steps
    assert trainer.state.global_step == trainer.state.max_steps == seen.planned == sum(steps)
    assert seen.leftovers == []
    assert seen.learning_rates() == pytest.approx(expected_rates("linear", sum(steps))[:-1])
    assert seen.final_learning_rate == 0.0
    assert trainer.state.epoch == 3.0
    epochs = [e + min((i + 1) * accumulation / n, 1) for e, n in enumerate(batches) for i in range(steps[e])]
    assert [entry["epoch"] for entry in training_logs(trainer)] == pytest.approx(epochs)
    logged = selection_logs(trainer)  # the first comes with the first entry of the trainer's own
    assert [entry["ifd/kept"] for entry in logged] == budgets
    assert [entry["epoch"] for entry in logged[1:]] == list(range(1, len(budgets)))


def test_the_last_update_of_an_epoch_gathers_the_batches_that_are_left(tmp_path):
    trainer = sft_trainer(tmp_path, 16, gradient_accumulation_steps=4)
    select(trainer, keep=[16, 11, 3], max_ifd=INF)
    seen = train(trainer)
    sizes = [[len(batch) for batch in update.batches] for update in seen.updates]
    assert sizes == [[2, 2, 2, 2], [2, 2, 2, 2], [2, 2, 2, 2], [2, 1], [2, 1]]


@pytest.mark.parametrize(
    ("epochs", "steps"),
    [(0.5, [2]), (1.5, [4, 1]), (2.25, [4, 2, 1]), (2.5, [4, 2, 2])],
)
def test_a_fractional_last_epoch_ends_the_schedule_where_it_ends(tmp_path, epochs, steps):
    trainer = sft_trainer(tmp_path, 8, num_train_epochs=epochs)
    select(trainer, keep=[8, 4, 7], max_ifd=INF)
    seen = train(trainer)
    assert seen.updates_per_epoch() == steps
    assert seen.planned == trainer.state.global_step == sum(steps)
    assert trainer.state.epoch == pytest.approx(len(steps) - 1 + steps[-1] / [4, 2, 4][len(steps) - 1])
    assert seen.learning_rates() == pytest.approx(expected_rates("linear", sum(steps))[:-1])
    assert seen.final_learning_rate == 0.0
    assert seen.leftovers == []


@pytest.mark.parametrize(
    ("max_steps", "steps", "epoch"),
    [(3, [3], 0.75), (4, [4], 1.0), (5, [4, 1], 1.5), (6, [4, 2], 2.0), (9, [4, 2, 2, 1], 3.5)],
)
def test_max_steps_takes_as_many_epochs_as_it_needs(tmp_path, max_steps, steps, epoch):
    trainer = sft_trainer(tmp_path, 8, num_train_epochs=1, max_steps=max_steps)
    select(trainer, keep=[8, 4], max_ifd=INF)
    seen = train(trainer)
    assert seen.updates_per_epoch() == steps
    assert seen.planned == trainer.state.global_step == max_steps
    assert trainer.state.epoch == epoch
    assert seen.learning_rates() == pytest.approx(expected_rates("linear", max_steps)[:-1])
    assert seen.final_learning_rate == 0.0


@pytest.mark.parametrize(("options", "rows"), [({"max_steps": 3}, 6), ({"num_train_epochs": 1.5}, 10), ({}, 16)])
def test_throughput_counts_the_rows_that_were_trained(tmp_path, options, rows):
    trainer = sft_trainer(tmp_path, 8, **options)
    select(trainer, keep=[8, 4], max_ifd=INF)
    seen = train(trainer)
    assert len(seen.order()) == rows
    report = trainer.state.log_history[-1]
    assert report["train_samples_per_second"] / report["train_steps_per_second"] == pytest.approx(
        rows / len(seen.updates), rel=0.01
    )


@pytest.mark.parametrize(
    ("name", "options", "last"),
    [
        ("linear", {}, 0.0),
        ("cosine", {}, 0.0),
        ("cosine_with_restarts", {"num_cycles": 2}, 0.0),
        ("polynomial", {"lr_end": 1e-5, "power": 2.0}, 1e-5),
        ("cosine_with_min_lr", {"min_lr": 1e-4}, 1e-4),
        ("warmup_stable_decay", {"num_decay_steps": 3}, 0.0),
    ],
)
def test_a_schedule_with_an_end_reaches_it_after_its_warm_up(tmp_path, name, options, last):
    trainer = sft_trainer(tmp_path, 12, lr_scheduler_type=name, lr_scheduler_kwargs=options, warmup_steps=0.25)
    select(trainer, keep=[12, 6, 5], max_ifd=INF)
    seen = train(trainer)
    rates = expected_rates(name, planned=12, warmup=3, **options)  # 6 + 3 + 3 updates, a quarter of them warm-up
    assert seen.learning_rates() == pytest.approx(rates[:-1], abs=1e-12)
    assert max(seen.learning_rates()) == pytest.approx(PEAK)
    assert seen.final_learning_rate == pytest.approx(last, abs=1e-12)


def test_the_progress_bar_ends_at_the_planned_number_of_steps(tmp_path):
    class Look(TrainerCallback):
        def on_epoch_begin(self, args, state, control, **kwargs):
            bars.append((bar.training_bar.n, bar.training_bar.total))

        on_train_end = on_step_end = on_epoch_begin

    trainer = sft_trainer(tmp_path, 8, disable_tqdm=False)
    select(trainer, keep=[8, 4, 3], max_ifd=INF)
    bars = []
    bar = next(c for c in trainer.callback_handler.callbacks if isinstance(c, ProgressCallback))
    trainer.callback_handler.callbacks.insert(trainer.callback_handler.callbacks.index(bar), Look())
    trainer.train()
    assert {total for _, total in bars} == {8}
    assert bars[-1][0] == 8


# ---- orders -----------------------------------------------------------------------------------------------------


def orders(folder, *, train_options=None, **options):
    """The rows of each epoch, in their order, of a run whose scores stay the same."""
    trainer = sft_trainer(folder, 12, learning_rate=0.0, **(train_options or {}))
    select(trainer, keep=8, max_ifd=INF, **options)
    return train(trainer).epochs()


def test_each_epoch_has_an_order_of_its_own(tmp_path):
    first, second, third = orders(tmp_path)
    assert set(first) == set(second) == set(third)  # a learning rate of 0: the scores stay
    assert first != second != third != first


def test_the_same_seed_gives_the_same_orders(tmp_path):
    assert orders(tmp_path, seed=5) == orders(tmp_path, seed=5)


def test_another_seed_gives_other_orders_of_the_same_rows(tmp_path):
    one, other = orders(tmp_path, seed=5), orders(tmp_path, seed=6)
    assert [set(rows) for rows in one] == [set(rows) for rows in other]
    assert all(a != b for a, b in zip(one, other, strict=True))


def test_the_seed_is_the_trainers_by_default(tmp_path):
    assert orders(tmp_path, train_options={"seed": 7}) == orders(tmp_path, seed=7)
    assert orders(tmp_path, train_options={"seed": 7}) != orders(tmp_path)


@pytest.mark.parametrize("order", ["descending", "ascending"])
def test_rows_are_visited_by_score(tmp_path, order):
    trainer = sft_trainer(tmp_path, 12)
    select(trainer, keep=8, max_ifd=INF, order=order)
    seen = train(trainer)
    for epoch, rows in enumerate(seen.epochs()):
        expected = reference_top(reference_scores(trainer, model_with(seen.weights[epoch])), 8, limit=INF)
        assert rows == (expected if order == "descending" else expected[::-1])


def test_group_by_length_puts_rows_of_like_length_together(tmp_path):
    trainer = sft_trainer(tmp_path, 30, train_sampling_strategy="group_by_length")
    callback = select(trainer, keep=24, max_ifd=INF)
    length = {row["row_id"]: len(row["input_ids"]) for row in tokenised(trainer)}
    seen = train(trainer)
    generator = random.Random(0)

    def padding(rows):
        return sum(abs(length[a] - length[b]) for a, b in zip(rows[::2], rows[1::2], strict=True))

    for epoch, rows in enumerate(seen.epochs()):
        history = callback.history.rows(epoch)
        assert sorted(rows) == sorted(history["row_id"][history["times"] > 0])
        assert length[rows[0]] == max(length[row] for row in rows)  # if memory runs out, then at once
        assert padding(rows) < 0.75 * np.mean([padding(generator.sample(rows, len(rows))) for _ in range(100)])
    assert len({tuple(rows) for rows in seen.epochs()}) == 3


# ---- settings of the trainer that change how batches are made or run --------------------------------------------


def run(folder, rows=16, keep=(12, 5, 8), **config):
    """Train; the trainer, its callback, and what was seen."""
    trainer = sft_trainer(folder, rows, **config)
    callback = select(trainer, keep=list(keep), max_ifd=INF)
    return trainer, callback, train(trainer)


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    """The run that others are compared with."""
    return run(tmp_path_factory.mktemp("usual"))


@pytest.mark.parametrize(
    "config",
    [
        {"dataloader_num_workers": 2},
        {"dataloader_num_workers": 2, "dataloader_persistent_workers": True, "dataloader_prefetch_factor": 4},
    ],
    ids=["workers", "persistent_workers"],
)
def test_workers_train_the_same_rows_to_the_same_weights(tmp_path, usual, config):
    _, _, seen = run(tmp_path, **config)
    assert seen.epochs() == usual[2].epochs()
    assert difference(weights_of(seen.trainer.model), weights_of(usual[0].model)) == 0.0


def test_lora_selects_by_the_adapted_model_and_trains_the_adapter_alone(tmp_path):
    from peft import LoraConfig

    adapter = LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = sft_trainer(tmp_path, 16, peft_config=adapter)
    callback = select(trainer, keep=[12, 5, 8], max_ifd=INF)
    seen = train(trainer)
    assert seen.updates_per_epoch() == [6, 3, 4]
    assert seen.leftovers == []
    end = weights_of(trainer.model)
    changed = {name for name in end if (end[name] != seen.weights[0][name]).any()}
    assert changed
    assert all("lora_" in name for name in changed)
    trainer.model.load_state_dict(seen.weights[2])
    scores = reference_scores(trainer, trainer.model)
    assert set(seen.epochs()[2]) == set(reference_top(scores, 8, limit=INF))
    first, last = callback.history.rows(0), callback.history.rows(2)
    assert (first["ifd"] - last["ifd"]).abs().max() > 1e-3  # the adapter is part of what scores


@pytest.mark.parametrize("as_list", [False, True], ids=["datasets.Dataset", "list"])
def test_a_plain_trainer_follows_too(tmp_path, as_list):
    prepared = sft_trainer(tmp_path, 16)
    rows = tokenised(prepared)
    trainer = plain_trainer(tmp_path, rows.remove_columns("row_id").to_list() if as_list else rows)
    select(trainer, keep=[8, 5, 3])
    seen = train(trainer)
    assert seen.updates_per_epoch() == [4, 3, 2]
    assert seen.final_learning_rate == 0.0
    assert trainer.state.epoch == 3.0
    for epoch, trained in enumerate(seen.epochs()):
        expected = reference_top(reference_scores(prepared, model_with(seen.weights[epoch])), [8, 5, 3][epoch])
        assert set(trained) == ({row - 100 for row in expected} if as_list else set(expected))


# ---- around the loop --------------------------------------------------------------------------------------------


def test_a_second_train_call_starts_again_from_the_weights_of_the_first(tmp_path):
    trainer = sft_trainer(tmp_path, 16)
    select(trainer, keep=[8, 5, 3], max_ifd=INF)
    first = train(trainer)
    trained = weights_of(trainer.model)
    second = train(trainer)
    assert difference(second.weights[0], trained) == 0.0
    assert second.updates_per_epoch() == first.updates_per_epoch() == [4, 3, 2]
    assert second.learning_rates() == first.learning_rates()
    assert second.final_learning_rate == 0.0
    assert trainer.state.global_step == 9
    expected = reference_top(reference_scores(trainer, model_with(trained)), 8, limit=INF)
    assert set(second.epochs()[0]) == set(expected) != set(first.epochs()[0])


@pytest.mark.parametrize(
    ("strategy", "steps", "last"),
    [
        ({"eval_strategy": "epoch"}, [6, 9, 13], [6, 9, 13]),
        # transformers 4.57 does not evaluate once more at the end
        ({"eval_strategy": "steps", "eval_steps": 4}, [4, 8, 12, 13][: 3 + FIVE], [4, 8, 13 if FIVE else 12]),
    ],
    ids=["epoch", "steps"],
)
def test_evaluation_happens_on_time_and_changes_nothing(tmp_path, usual, strategy, steps, last):
    trainer = sft_trainer(tmp_path, 16, eval_dataset=text_rows(raw_rows(4, seed=9)), **strategy)
    callback = select(trainer, keep=[12, 5, 8], max_ifd=INF)
    seen = train(trainer)
    assert seen.evaluations == steps
    assert seen.epochs() == usual[2].epochs()
    assert difference(weights_of(trainer.model), weights_of(usual[0].model)) == 0.0
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    assert [record["eval_loss"] for record in callback.history.epochs] == [losses[step] for step in last]


@pytest.mark.parametrize(
    ("strategy", "steps"),
    [({"save_strategy": "epoch"}, [6, 9, 13]), ({"save_strategy": "steps", "save_steps": 4}, [4, 8, 12, 13])],
)
def test_saving_happens_on_time_and_changes_nothing(tmp_path, usual, strategy, steps):
    trainer, _, seen = run(tmp_path, **strategy)
    assert seen.saves == steps
    assert all((tmp_path / f"checkpoint-{step}" / "trainer_state.json").exists() for step in steps)
    assert seen.epochs() == usual[2].epochs()
    assert difference(weights_of(trainer.model), weights_of(usual[0].model)) == 0.0


def test_every_row_is_trained_once_an_epoch_when_all_are_kept(tmp_path):
    trainer = sft_trainer(tmp_path, 24)
    select(trainer, keep=1.0, max_ifd=INF)
    seen = train(trainer)
    assert [sorted(rows) for rows in seen.epochs()] == [sorted(ALL)] * 3


def test_the_trainer_stays_what_it_was(tmp_path):
    trainer = sft_trainer(tmp_path, 4)
    for _ in range(2):
        IFDSelectionCallback(trainer, keep=0.5)
    assert isinstance(trainer, SFTTrainer)
    assert type(trainer).__name__ == "SFTTrainer"
    assert type(trainer).__mro__.count(SelectiveTrainer) == 1
    assert not issubclass(SFTTrainer, SelectiveTrainer)


def test_an_order_that_was_changed_behind_the_plan_is_an_error(tmp_path):
    class Shorten(TrainerCallback):
        def on_epoch_begin(self, args, state, control, **kwargs):
            if state.epoch == 1:
                callback.sampler.order = callback.sampler.order[:3]

    trainer = sft_trainer(tmp_path, 12)
    callback = select(trainer, keep=8)
    trainer.add_callback(Shorten())
    with pytest.raises(RuntimeError, match="Epoch 1 has 2 batches, but 4 were planned"):
        trainer.train()


@pytest.mark.parametrize("removed_by", ["instance", "class"])
def test_a_trainer_whose_callback_was_removed_is_as_before(tmp_path, removed_by):
    before = train(sft_trainer(tmp_path, 12))
    trainer = sft_trainer(tmp_path, 12)
    callback = select(trainer, keep=0.5)
    trainer.remove_callback(callback if removed_by == "instance" else type(callback))
    after = train(trainer)
    assert after.order() == before.order()
    assert after.learning_rates() == before.learning_rates()
    assert difference(weights_of(trainer.model), weights_of(before.trainer.model)) == 0.0
    assert selection_logs(trainer) == []
    assert not (tmp_path / "ifd_history").exists()


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"gradient_accumulation_steps": 4},
        {"padding_free": True, "max_length": None},
        {"gradient_checkpointing": True},
        {"bf16": True},
    ],
    ids=lambda config: next(iter(config), "usual"),
)
def test_a_run_equals_a_plain_run_over_the_rows_that_it_selected(tmp_path, config):
    trainer = sft_trainer(tmp_path, 24, logging_steps=3, num_train_epochs=2, **config)
    callback = select(trainer, keep=[16, 8], max_ifd=INF)
    seen = train(trainer)
    scores = reference_scores(trainer, model_with(seen.weights[1]))
    for row in callback.history.rows(1).itertuples():
        assert (row.cas, row.das) == pytest.approx(scores[row.row_id], rel=0.02 if "bf16" in config else ROUNDING)
    selected = text_rows(raw_rows(24)).select([row - 100 for row in seen.order()])
    plain = sft_trainer(
        tmp_path, selected, logging_steps=3, num_train_epochs=1, train_sampling_strategy="sequential", **config
    )
    plain.train()
    assert difference(weights_of(trainer.model), weights_of(plain.model)) == 0.0
    keys = ("loss", "grad_norm", "learning_rate", "entropy", "mean_token_accuracy", "num_tokens", "step")
    logs = [[{key: entry[key] for key in keys} for entry in training_logs(t)] for t in (trainer, plain)]
    assert len(logs[0]) == len(seen.updates) // 3  # the log's steps do not end with the epochs
    assert logs[0] == logs[1]


def nll_behind_virtual_tokens(model, ids: list[int], start: int) -> float:
    """Mean loss of ids[start:] from all logits; those of the virtual tokens come first."""
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor([ids])).logits[0, -len(ids) :].double()
    return -sum(logits[i - 1].log_softmax(-1)[ids[i]].item() for i in range(start, len(ids))) / (len(ids) - start)


def test_prompt_tuning_selects_behind_its_virtual_tokens(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    trainer = sft_trainer(tmp_path, 12, peft_config=config, num_train_epochs=1)
    callback = select(trainer, keep=4, max_ifd=INF)
    header = trainer.processing_class("### Response:")["input_ids"]
    scores = {}
    for row in tokenised(trainer):
        start = next(i for i, label in enumerate(row["labels"]) if label != -100)
        ids = row["input_ids"][:-1]  # without EOS
        conditioned = nll_behind_virtual_tokens(trainer.model, ids, start)
        scores[row["row_id"]] = conditioned / nll_behind_virtual_tokens(
            trainer.model, header + ids[start:], len(header)
        )
    seen = train(trainer)
    assert sorted(seen.epochs()[0]) == sorted(sorted(scores, key=scores.get)[-4:])
    found = callback.history.rows(0).set_index("row_id")["ifd"].to_dict()
    assert found == {row: pytest.approx(score, rel=ROUNDING) for row, score in scores.items()}


def test_a_batch_size_that_is_found_automatically_is_planned_anew(tmp_path, monkeypatch):
    trainer = sft_trainer(tmp_path, 16, per_device_train_batch_size=8, auto_find_batch_size=True, num_train_epochs=2)
    callback = select(trainer, keep=[8, 6], max_ifd=INF)
    step, sizes = trainer.training_step, []

    def short_of_memory(model, inputs, *rest):
        if len(inputs["input_ids"]) > 4:
            raise RuntimeError("CUDA out of memory.")
        sizes.append(len(inputs["input_ids"]))
        return step(model, inputs, *rest)

    monkeypatch.setattr(trainer, "training_step", short_of_memory)
    trainer.train()
    assert sum(sizes) == 8 + 6
    assert max(sizes) <= 4
    assert trainer.state.global_step == callback.plan.max_steps == len(sizes)
    assert trainer.state.epoch == 2


def test_sequential_sampling_visits_the_kept_rows_in_the_pools_order(tmp_path):
    trainer = sft_trainer(tmp_path, 24, train_sampling_strategy="sequential")
    select(trainer, keep=[8, 6, 10], max_ifd=INF)
    place = {row: position for position, row in enumerate(trainer.train_dataset["row_id"])}
    for rows, size in zip(train(trainer).epochs(), (8, 6, 10), strict=True):
        positions = [place[row] for row in rows]
        assert positions == sorted(positions)
        assert len(positions) == size


def test_an_order_by_score_and_one_by_length_contradict_each_other(tmp_path):
    trainer = sft_trainer(tmp_path, 12, train_sampling_strategy="group_by_length")
    with pytest.raises(ValueError, match="Set one of them: order='shuffle', or train_sampling_strategy='random'"):
        select(trainer, keep=0.5, order="ascending")


def test_a_shorter_run_in_the_same_folder_leaves_no_rows_of_the_longer_one(tmp_path):
    for epochs in (3, 1):
        trainer = sft_trainer(tmp_path, 12, num_train_epochs=epochs)
        select(trainer, keep=4, max_ifd=INF)
        train(trainer)
    assert [path.name for path in (tmp_path / "ifd_history").glob("epoch-*")] == ["epoch-000.parquet"]


@pytest.mark.parametrize("warmup", [0.5, 2])
def test_a_polynomial_schedule_without_a_step_after_its_warm_up_is_refused(tmp_path, warmup):
    trainer = sft_trainer(tmp_path, 16, lr_scheduler_type="polynomial", warmup_steps=warmup, num_train_epochs=1)
    select(trainer, keep=2, max_ifd=INF)
    with pytest.raises(ValueError, match=r"but all 1 are warm-up\. Lower warmup_steps"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_polynomial_schedule_with_one_ends_where_it_should(tmp_path):
    trainer = sft_trainer(tmp_path, 16, lr_scheduler_type="polynomial", warmup_steps=1, num_train_epochs=1)
    select(trainer, keep=4, max_ifd=INF)
    seen = train(trainer)
    assert seen.learning_rates() == pytest.approx([0.0, PEAK])
    assert seen.final_learning_rate == pytest.approx(1e-7)
