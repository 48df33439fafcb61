"""Epochs in parts: rows are chosen anew within an epoch, and nothing else of the run is other than without parts."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import build_model
from tiny_runs import (
    FIVE,
    INF,
    PEAK,
    TOKENIZER,
    Stop,
    WeightsAt,
    difference,
    model_with,
    raw_rows,
    reference_scores,
    reference_top,
    select,
    selection_logs,
    sft_trainer,
    text_rows,
    train,
    training_logs,
    weights_of,
)
from transformers import Trainer, TrainerCallback

from ifd_trainer import Cherry, Diverse, Guard, RandomRows, Stratified, TargetSet
from ifd_trainer.method.duplicates import Duplicates
from ifd_trainer.method.schedule import Anneal, Curriculum
from ifd_trainer.method.selection import Selection
from ifd_trainer.report.page import page_html
from ifd_trainer.report.report_data import read_report_data
from ifd_trainer.report.tables import epoch_cells
from ifd_trainer.report.wording import settings_in_words
from ifd_trainer.training.history import History

pytestmark = pytest.mark.skipif(not FIVE, reason="every_steps needs transformers 5")
POOL = 20
DUPLICATES = Guard(None, None, None, Duplicates(), None, on_misaligned="warn")


class Epochs(TrainerCallback):
    """Keeps when epochs began and ended."""

    def __init__(self, trainer):
        self.epochs = []
        trainer.add_callback(self)

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.epochs.append(("begin", state.epoch, state.global_step))

    def on_epoch_end(self, args, state, control, **kwargs):
        self.epochs.append(("end", state.epoch, state.global_step))


def selecting(folder, rows=POOL, model=None, options=None, **config):
    """A trainer of one epoch with parts of two updates, and its callback."""
    config = {"num_train_epochs": 1, **config}
    trainer = sft_trainer(folder, rows, model=model, **config)
    callback = select(trainer, **{"keep": 12, "max_ifd": INF, "every_steps": 2, **(options or {})})
    callback.scored, score_pool = [], callback.score_pool

    def count(description, *rows):
        callback.scored.append((description, *map(len, rows)))
        return score_pool(description, *rows)

    callback.score_pool = count
    return trainer, callback


def run(folder, **given):
    """Train; all that was seen."""
    trainer, callback = selecting(folder, **given)
    weights, events = WeightsAt(trainer), Epochs(trainer)
    seen = train(trainer)
    return SimpleNamespace(trainer=trainer, callback=callback, weights=weights.after, events=events.epochs, seen=seen)


def rows_of(seen, first, last):
    """Row ids of the updates from `first` to before `last`."""
    return [row for update in seen.updates[first:last] for row in update.rows]


def chosen(found, step, used, budget, limit=INF):
    """The rows with the highest scores by the model after `step` updates among those that are not used."""
    scores = reference_scores(found.trainer, model_with(found.weights[step]))
    return set(reference_top({row: pair for row, pair in scores.items() if row not in used}, budget, limit))


# ---- which rows -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_epochs(tmp_path_factory):
    """12 and 7 of 20 rows: 6 and 4 updates, in parts of two."""
    return run(tmp_path_factory.mktemp("two"), options={"keep": [12, 7]}, num_train_epochs=2, logging_steps=1)


def test_each_part_trains_on_the_best_of_the_rows_that_are_left(two_epochs):
    for first, sizes in ((0, [4, 4, 4]), (6, [4, 3])):
        used, step = set(), first
        for size in sizes:
            trained = rows_of(two_epochs.seen, step, step + 2)
            assert set(trained) == chosen(two_epochs, step, used, size)
            assert len(trained) == size
            used |= set(trained)
            step += 2
        assert len(used) == sum(sizes)  # no row twice in an epoch
    assert two_epochs.callback.scored == [
        ("IFD, epoch 0, part 1 of 3",),
        ("IFD, epoch 0, part 2 of 3", 16),
        ("IFD, epoch 0, part 3 of 3", 12),
        ("IFD, epoch 1, part 1 of 2",),
        ("IFD, epoch 1, part 2 of 2", 16),
    ]


def test_scoring_within_an_epoch_changes_what_it_trains_on(two_epochs):
    assert set(rows_of(two_epochs.seen, 0, 6)) != chosen(two_epochs, 0, set(), 12)


def test_steps_rates_and_epochs_are_those_of_a_run_without_parts(two_epochs):
    trainer, seen = two_epochs.trainer, two_epochs.seen
    assert trainer.state.global_step == trainer.state.max_steps == seen.planned == 10
    assert seen.learning_rates() == pytest.approx([PEAK * (10 - step) / 10 for step in range(10)])
    assert seen.final_learning_rate == 0.0
    assert seen.leftovers == []
    epochs = [step / 6 for step in range(1, 7)] + [1 + step / 4 for step in range(1, 5)]
    assert [entry["epoch"] for entry in training_logs(trainer)] == pytest.approx(epochs)
    assert two_epochs.events == [("begin", 0, 0), ("end", 1.0, 6), ("begin", 1.0, 6), ("end", 2.0, 10)]
    assert [entry["epoch"] for entry in selection_logs(trainer)[1:]] == pytest.approx([2 / 6, 4 / 6, 1, 1.5])
    report = trainer.state.log_history[-1]
    assert report["train_samples_per_second"] / report["train_steps_per_second"] == pytest.approx(19 / 10, rel=0.01)


@pytest.mark.parametrize(
    ("strategy", "evaluations", "saves"),
    [
        ({"eval_strategy": "epoch", "save_strategy": "epoch"}, [6, 10], [6, 10]),
        (
            {"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 4},
            [3, 6, 9, 10],
            [4, 8, 10],
        ),
    ],
    ids=["epoch", "steps"],
)
def test_evaluations_and_checkpoints_come_when_they_should_and_change_nothing(
    tmp_path, two_epochs, strategy, evaluations, saves
):
    trainer, callback = selecting(
        tmp_path,
        options={"keep": [12, 7]},
        num_train_epochs=2,
        eval_dataset=text_rows(raw_rows(4, seed=9)),
        **strategy,
    )
    seen = train(trainer)
    assert (seen.evaluations, seen.saves) == (evaluations, saves)
    assert seen.order() == two_epochs.seen.order()
    assert difference(weights_of(trainer.model), two_epochs.weights[10]) == 0.0
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    last = {2: None, 4: 3, 6: 6, 8: None, 10: 10} if len(evaluations) > 2 else {6: 6, 10: 10}
    ends = [2, 4, 6, 8, 10]
    assert [record["eval_loss"] for record in callback.history.epochs] == [
        losses[last[end]] if last.get(end) else None for end in ends
    ]


def test_parts_as_long_as_the_epoch_are_the_run_without_them(tmp_path):
    options, steps = {"keep": [12, 8]}, 6
    plain = run(tmp_path / "plain", options={**options, "every_steps": None}, num_train_epochs=2)
    found = run(tmp_path / "parts", options={**options, "every_steps": steps}, num_train_epochs=2)
    assert found.seen.order() == plain.seen.order()
    assert difference(found.weights[10], plain.weights[10]) == 0.0
    drop = ("seconds_scoring", "seconds_training")
    records = [
        [{k: v for k, v in r.items() if k not in drop} for r in each.callback.history.epochs] for each in (found, plain)
    ]
    assert records[0] == records[1]
    assert str(found.callback.plan) == str(plain.callback.plan)


@pytest.mark.parametrize(
    ("config", "options", "updates", "rows"),
    [
        ({"gradient_accumulation_steps": 2}, {"keep": 13}, [4, 4, 4, 1], [[8], [5]]),
        ({"dataloader_drop_last": True}, {"keep": 11}, [2, 2, 2, 2, 2], [[4], [4], [2]]),
        ({"max_steps": 5}, {"keep": [8, 6]}, [2, 2, 2, 2, 2], [[4], [4], [2]]),
    ],
    ids=["accumulation", "drop_last", "max_steps"],
)
def test_other_settings_keep_their_meaning(tmp_path, config, options, updates, rows):
    found = run(tmp_path, options=options, **config)
    seen, budgets = found.seen, options["keep"]
    assert [len(update.rows) for update in seen.updates] == updates
    assert found.trainer.state.global_step == seen.planned == len(updates)
    assert seen.final_learning_rate == 0.0
    assert seen.leftovers == []
    used, step, epoch = set(), 0, 0
    for number, [size] in enumerate(rows):
        trained = rows_of(seen, step, step + 2)
        assert len(trained) == len(set(trained)) == size
        assert not used & set(trained)
        part = found.callback.history.epochs[number]["budget"]
        expected = chosen(found, step, used, part)
        assert set(trained) <= expected
        assert part > size or set(trained) == expected
        used |= set(trained)
        step = min(step + 2, len(updates))
        epoch_of_next = seen.updates[step].epoch if step < len(updates) else epoch
        if epoch_of_next != epoch:
            used, epoch = set(), epoch_of_next
    budgets = budgets if isinstance(budgets, list) else [budgets] * 2
    assert found.callback.plan.epochs[0].budget == budgets[0]


def test_workers_that_read_ahead_come_to_the_end_of_a_part_and_no_further(tmp_path, two_epochs):
    workers = {"dataloader_num_workers": 2, "dataloader_persistent_workers": True, "dataloader_prefetch_factor": 4}
    trainer, _ = selecting(tmp_path, options={"keep": [12, 7]}, num_train_epochs=2, **workers)
    seen = train(trainer)
    assert seen.order() == two_epochs.seen.order()
    assert difference(weights_of(trainer.model), two_epochs.weights[10]) == 0.0


def test_frozen_epochs_go_by_the_last_scores_of_all_rows(tmp_path):
    found = run(tmp_path, options={"keep": [8, 10], "freeze_after": 1}, num_train_epochs=2)
    assert [call[0] for call in found.callback.scored] == [f"IFD, epoch 0, part {part} of 2" for part in (1, 2)]
    assert set(rows_of(found.seen, 4, 9)) == chosen(found, 0, set(), 10)
    assert [record.get("part") for record in found.callback.history.epochs] == [1, 2, None]
    assert str(found.callback.plan) == (
        "9 updates (epoch 0: 8 rows, 4 updates in 2 parts of 2; epoch 1: 10 rows, 5 updates)"
    )


def test_a_warm_up_and_full_epochs_are_not_divided(tmp_path):
    options = {"schedule": Anneal(8, 0.3), "warmup_epochs": 1}
    found = run(tmp_path, rows=10, options=options, num_train_epochs=3)
    assert [(record["epoch"], record.get("part")) for record in found.callback.history.epochs] == [
        (0, None),
        (1, 1),
        (1, 2),
        (2, None),
    ]
    assert found.seen.updates_per_epoch() == [5, 4, 5]


def test_shares_of_a_column_hold_in_each_part(tmp_path):
    raw = raw_rows(POOL)
    rows = text_rows(raw).add_column("kind", ["code" if i % 4 == 0 else "web" for i in range(POOL)])
    policy = Stratified("kind", {"code": 0.25}, policy=Cherry(INF))
    found = run(tmp_path, rows=rows, options={"policy": policy, "max_ifd": None})
    code = {row["row_id"] for i, row in enumerate(raw) if i % 4 == 0}
    assert [len(code & set(rows_of(found.seen, at, at + 2))) for at in (0, 2, 4)] == [1, 1, 1]
    assert len(set(found.seen.order())) == 12


class SeesAll:
    """A policy of one's own, which keeps the rows that it is shown first and notes how many these were."""

    def __init__(self):
        self.shown = []

    def __call__(self, columns, budget, *, ids=None, rng=None):
        self.shown.append(ids.tolist())
        return Selection.without_scores(np.arange(budget), len(ids), reason="later")


def test_a_policy_of_ones_own_sees_the_rows_that_are_left(tmp_path):
    policy = SeesAll()
    found = run(tmp_path, options={"policy": policy, "max_ifd": None})
    ids = list(range(100, 100 + POOL))
    assert policy.shown == [ids, ids[4:], ids[8:]]
    assert [set(rows_of(found.seen, at, at + 2)) for at in (0, 2, 4)] == [
        set(ids[at * 2 : at * 2 + 4]) for at in (0, 2, 4)
    ]


def test_a_duplicate_of_a_row_that_was_trained_on_waits_for_the_next_epoch(tmp_path):
    raw = raw_rows(POOL)
    for i in range(10, POOL):  # each the same text as another, but for one space
        raw[i] = {**raw[i - 10], "row_id": raw[i]["row_id"], "output": raw[i - 10]["output"] + "  "}
    found = run(tmp_path, rows=text_rows(raw), options={"keep": 8, "guard": DUPLICATES})
    trained = found.seen.order()
    assert len({(row - 100) % 10 for row in trained}) == len(trained) == 8


# ---- too few rows -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def limited(two_epochs):
    """Runs on 20 rows of which so many are below the limit: a rate of 0 keeps the scores as they are."""
    scores = reference_scores(two_epochs.trainer, model_with(two_epochs.weights[0]))
    ranked = sorted((pair[0] / pair[1], row) for row, pair in scores.items())

    def with_limit(folder, eligible, **options):
        limit = (ranked[eligible - 1][0] + ranked[eligible][0]) / 2
        found = run(folder, learning_rate=0.0, options={"max_ifd": limit, **options})
        return found, {row for _, row in ranked[:eligible]}

    return with_limit


@pytest.mark.parametrize(("eligible", "budget"), [(6, 12), (3, 16)])
def test_after_a_shortfall_rows_of_the_epoch_are_repeated_evenly(tmp_path, limited, eligible, budget):
    found, rows = limited(tmp_path, eligible, keep=budget)
    times = np.unique(found.seen.order(), return_counts=True)
    assert set(times[0].tolist()) == rows
    assert times[1].sum() == budget
    assert times[1].max() - times[1].min() <= 1
    history = found.callback.history
    assert history.rows(0)["times"].sum() == budget
    assert sum(record["shortfall"] for record in history.epochs) == max(budget - eligible, 0)
    assert set(history.rows(0).loc[history.rows(0)["times"] > 0, "reason"]) == {"kept"}


def test_relaxed_parts_take_the_nearest_rows_above_the_limit(tmp_path, limited):
    found, _ = limited(tmp_path, 6, keep=12, policy=None, on_shortfall="relax")
    assert len(set(found.seen.order())) == 12
    assert found.callback.history.rows(0)["reason"].value_counts()["kept_above_limit"] == 6


def test_a_shortfall_ends_the_run_where_the_user_wants_it(tmp_path, limited):
    with pytest.raises(ValueError, match=r"4 rows are to be kept, but only 2 .* trained on 4 more in its parts before"):
        limited(tmp_path, 6, keep=12, on_shortfall="error")


# ---- resuming ---------------------------------------------------------------------------------------------------

PLACES = {"at_the_end_of_the_first_part": 2, "inside_a_part": 3, "at_the_end_of_the_epoch": 6, "of_a_later_part": 8}


def dropping():
    return build_model(len(TOKENIZER), attention_dropout=0.1)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The run of `two_epochs` with dropout, which draws random numbers, and a checkpoint after each update."""
    folder, options = tmp_path_factory.mktemp("saved"), {"keep": [12, 7]}
    found = run(folder, model=dropping(), options=options, num_train_epochs=2, save_strategy="steps", save_steps=1)
    found.folder = folder
    return found


@pytest.mark.parametrize("step", PLACES.values(), ids=PLACES.keys())
def test_a_resumed_run_ends_where_the_uninterrupted_one_does(tmp_path, saved, step):
    trainer, callback = selecting(tmp_path, model=dropping(), options={"keep": [12, 7]}, num_train_epochs=2)
    checkpoint = saved.folder / f"checkpoint-{step}"
    seen = train(trainer, resume_from_checkpoint=str(checkpoint))
    assert [update.batches for update in seen.updates] == [update.batches for update in saved.seen.updates[step:]]
    assert seen.learning_rates() == saved.seen.learning_rates()[step:]
    assert difference(weights_of(trainer.model), saved.weights[10]) == 0.0
    assert trainer.state.epoch == 2.0
    assert callback.scored == [
        call for call, at in zip(saved.callback.scored, (0, 2, 4, 6, 8), strict=True) if at >= step
    ]
    assert [entry["ifd/cut"] for entry in selection_logs(trainer)] == [
        entry["ifd/cut"] for entry in selection_logs(saved.trainer)
    ]


@pytest.mark.parametrize(
    ("step", "config", "options"),
    [
        (3, {"dataloader_num_workers": 1, "train_sampling_strategy": "group_by_length"}, {"keep": 8}),
        (5, {"num_train_epochs": 2}, {"freeze_after": 1, "policy": Diverse(0.9, INF), "max_ifd": None, "keep": [6, 8]}),
        (2, {}, {"guard": DUPLICATES, "scores": ("loss_change",), "keep": 8}),
    ],
    ids=["workers_by_length", "diverse_and_frozen", "guarded"],
)
def test_a_resume_is_exact_in_other_settings_too(tmp_path, step, config, options):
    whole = run(tmp_path, model=dropping(), options=options, save_strategy="steps", save_steps=step, **config)
    trainer, _ = selecting(tmp_path / "again", model=dropping(), options=options, **config)
    seen = train(trainer, resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert [update.rows for update in seen.updates] == [update.rows for update in whole.seen.updates[step:]]
    assert len(seen.updates) > 0
    assert difference(weights_of(trainer.model), weights_of(whole.trainer.model)) == 0.0


def test_a_run_that_was_stopped_goes_on_with_its_history(tmp_path, saved):
    def begun():
        saves = {"save_strategy": "steps", "save_steps": 3}
        return selecting(tmp_path, model=dropping(), options={"keep": [12, 7]}, num_train_epochs=2, **saves)

    trainer, _ = begun()
    trainer.add_callback(Stop(3))
    train(trainer)
    assert History.load(tmp_path).rows(0, 2)["times"].sum() == 2  # one update of the second part
    trainer, callback = begun()
    train(trainer, resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for mine, expected in zip(callback.history.epochs, saved.callback.history.epochs, strict=True):
        for key in ("epoch", "part", "parts", "left", "kept", "cut", "trained", "reasons"):
            assert mine[key] == expected[key], key
    for epoch, parts in ((0, 3), (1, 2)):
        for part in range(1, parts + 1):
            assert History.load(tmp_path).rows(epoch, part).equals(saved.callback.history.rows(epoch, part))


def test_a_checkpoint_of_other_parts_is_refused(tmp_path, saved):
    trainer, _ = selecting(tmp_path, options={"keep": [12, 7], "every_steps": 3}, num_train_epochs=2)
    with pytest.raises(ValueError, match="every_steps: 2 in the checkpoint, 3 now"):
        trainer.train(resume_from_checkpoint=str(saved.folder / "checkpoint-5"))


# ---- what a run says of it --------------------------------------------------------------------------------------


def test_the_history_has_a_record_and_rows_for_each_part(two_epochs):
    history = two_epochs.callback.history
    assert [(r["epoch"], r["part"], r["parts"], r["left"], r["kept"], r["trained"]) for r in history.epochs] == [
        (0, 1, 3, 20, 4, 4),
        (0, 2, 3, 16, 4, 4),
        (0, 3, 3, 12, 4, 4),
        (1, 1, 2, 20, 4, 4),
        (1, 2, 2, 16, 3, 3),
    ]
    assert sorted(path.name for path in history.folder.glob("epoch-*")) == [
        *(f"epoch-000-part-0{part}.parquet" for part in (1, 2, 3)),
        *(f"epoch-001-part-0{part}.parquet" for part in (1, 2)),
    ]
    second = history.rows(0, 2).set_index("row_id")
    assert second.index[second["times"] > 0].tolist() == sorted(rows_of(two_epochs.seen, 2, 4))
    used = second.loc[rows_of(two_epochs.seen, 0, 2)]
    assert set(used["reason"]) == {"earlier_part"}
    assert set(used["ifd_status"]) == {"not_scored"}
    assert used["ifd"].isna().all()
    assert (used["answer_tokens"] > 0).all()
    whole = history.rows(0).set_index("row_id")
    for part, at in ((1, 0), (2, 2), (3, 4)):
        assert set(whole.index[whole["part"] == part]) == set(rows_of(two_epochs.seen, at, at + 2))
    assert whole["times"].sum() == 12
    left = whole[whole["part"].isna()]
    assert len(left) == 8
    assert left["ifd"].equals(history.rows(0, 3).set_index("row_id").loc[left.index, "ifd"])


def test_plan_console_and_report_speak_of_parts(tmp_path, capsys):
    trainer, callback = selecting(tmp_path, disable_tqdm=True)
    train(trainer)
    assert str(callback.plan) == "6 updates (epoch 0: 12 rows, 6 updates in 3 parts of 2)"
    said = capsys.readouterr().out
    assert "IFD, epoch 0, part 1 of 3: 4 of 20 rows kept, cut at" in said
    assert "IFD, epoch 0, part 3 of 3: 4 of the 12 rows that are left kept, cut at" in said
    _, lines = epoch_cells(History.load(tmp_path))
    assert [line[:3] for line in lines] == [
        ["0, part 1", "20", "4"],
        ["0, part 2", "16", "4"],
        ["0, part 3", "12", "4"],
    ]
    page = page_html(read_report_data(tmp_path, None, None), [], 3)
    assert "One epoch trained on 12 of 20 rows (60 %)" in page
    assert "All rows are scored when an epoch begins and again by each of its parts, on the rows that are left" in page
    assert all(f"epoch 0, part {part}" in page for part in (1, 2, 3))
    facts = dict(settings_in_words(callback.history.settings, callback.history.epochs))
    assert facts["Epochs"] == "1 recorded of 1 planned"
    assert facts["Parts of an epoch"] == "2 updates each, whose rows were chosen when they began"


# ---- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scorer": "columns"}, "the scores of scorer='columns' stay as they are"),
        ({"schedule": Curriculum(12)}, "a Curriculum divides the rows of a whole epoch"),
        ({"policy": TargetSet(raw_rows(2, seed=7)), "max_ifd": None}, "a TargetSet holds rows against its targets"),
        ({"policy": Stratified("kind", at_least={"code": 3}), "max_ifd": None}, "Stratified has are of whole epochs"),
    ],
)
def test_what_has_no_meaning_part_by_part(tmp_path, options, message):
    trainer = sft_trainer(tmp_path, 8)
    with pytest.raises(ValueError, match=f"every_steps=2 chooses the rows of an epoch part by part, and .*{message}"):
        select(trainer, every_steps=2, **options)


def test_an_epoch_that_begins_again_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Set ignore_data_skip=False, or leave every_steps out"):
        selecting(tmp_path, ignore_data_skip=True)


def test_a_trainer_that_takes_its_batches_in_another_way_is_an_error(tmp_path, monkeypatch):
    trainer, _ = selecting(tmp_path)
    monkeypatch.setattr(type(trainer), "get_batch_samples", Trainer.get_batch_samples, raising=False)
    with pytest.raises(RuntimeError, match=r"Epoch 0 has ended after part 1 of 3.*Leave every_steps out"):
        trainer.train()


def test_a_control_that_reads_no_score_chooses_when_the_epoch_begins(tmp_path, caplog):
    found = run(tmp_path, options={"policy": RandomRows(), "max_ifd": None})
    assert found.callback.scored == []
    assert len(set(found.seen.order())) == 12
    assert "every_steps=2 has no effect: nothing in this run reads a score" in caplog.text
    assert math.isclose(found.trainer.state.epoch, 1.0)
