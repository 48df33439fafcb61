"""A run trains on what it says, whatever other callbacks, trainers and users do beside it; or it says why not."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import transformers
import trl
from conftest import SMALL, build_model
from datasets import Dataset
from tiny_runs import (
    FIVE,
    INF,
    PREFERENCES,
    TOKENIZER,
    difference,
    plain_trainer,
    raw_rows,
    select,
    sft_trainer,
    text_rows,
    tokenised,
    train,
    weights_of,
)
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaModel,
    Trainer,
    TrainerCallback,
)
from transformers.trainer_utils import HPSearchBackend
from trl import SFTTrainer

from ifd_trainer import Anneal, IFDSelectionCallback
from ifd_trainer.errors import RunError, UserError
from ifd_trainer.report.tables import epoch_cells
from ifd_trainer.training.history import History

EVENTS = ("on_train_begin", "on_epoch_begin", "on_step_begin", "on_step_end", "on_epoch_end")


class At(TrainerCallback):
    """Does something at an event, once or each time."""

    def __init__(self, event, do, once=False):
        self.done = 0

        def call(args, state, control, **kwargs):
            if not (once and self.done):
                do(SimpleNamespace(state=state, control=control, **kwargs))
            self.done += 1

        setattr(self, event, call)


def recorded(callback, epochs):
    """Row ids by how often they were trained on, as the history has it."""
    tables = [callback.history.rows(epoch) for epoch in range(epochs)]
    return [{row.row_id: row.times for row in table.itertuples() if row.times} for table in tables]


def seen_times(seen):
    return [{row: rows.count(row) for row in rows} for rows in seen.epochs()]


# ---- other callbacks --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What a run trains on when nobody meddles."""
    trainer = sft_trainer(tmp_path_factory.mktemp("alone"), 16)
    select(trainer, keep=[8, 5, 7], max_ifd=INF)
    return SimpleNamespace(order=train(trainer).order(), weights=weights_of(trainer.model))


@pytest.mark.parametrize("first", [True, False], ids=["before_ours", "after_ours"])
@pytest.mark.parametrize("event", EVENTS)
def test_a_callback_that_asks_for_another_train_loader_changes_nothing(tmp_path, alone, event, first):
    trainer = sft_trainer(tmp_path, 16)
    batches = []
    meddler = At(event, lambda found: batches.append(len(trainer.get_train_dataloader())))
    if first:
        trainer.add_callback(meddler)
    callback = select(trainer, keep=[8, 5, 7], max_ifd=INF)
    if not first:
        trainer.add_callback(meddler)
    seen = train(trainer)
    assert seen.order() == alone.order
    assert difference(weights_of(trainer.model), alone.weights) == 0.0
    assert recorded(callback, 3) == seen_times(seen)
    assert set(batches) <= {4, 3}  # the epochs' own: 8, 5 and 7 rows in batches of two


def test_a_callback_that_reads_another_train_loader_to_its_end_changes_no_rows(tmp_path, alone):
    trainer = sft_trainer(tmp_path, 16)
    trainer.add_callback(At("on_step_end", lambda found: list(trainer.get_train_dataloader())))
    callback = select(trainer, keep=[8, 5, 7], max_ifd=INF)
    seen = train(trainer)
    assert seen.order() == alone.order
    assert recorded(callback, 3) == seen_times(seen)


def test_a_training_set_exchanged_while_training_runs_is_an_error(tmp_path):
    trainer = sft_trainer(tmp_path, 16)
    other = sft_trainer(tmp_path, text_rows(raw_rows(16, seed=5))).train_dataset
    select(trainer, keep=8, max_ifd=INF)
    trainer.add_callback(At("on_epoch_end", lambda found: setattr(trainer, "train_dataset", other), once=True))
    with pytest.raises(RunError, match="train_dataset was exchanged before epoch 1, but the train data loader reads"):
        trainer.train()
    assert trainer.state.global_step == 4


@pytest.mark.parametrize(
    ("change", "drawn"),
    [
        (lambda order: order.reverse(), 8),
        (lambda order: order.__setitem__(0, next(i for i in range(16) if i not in order)), 8),
        (lambda order: order.__setitem__(0, order[1]), 8),
        (lambda order: order.pop(), 7),
    ],
    ids=["reversed", "other_row", "repeated", "fewer"],
)
def test_an_epoch_whose_loader_drew_other_rows_is_an_error(tmp_path, change, drawn):
    trainer = sft_trainer(tmp_path, 16)
    callback = select(trainer, keep=8, max_ifd=INF)
    trainer.add_callback(
        At("on_epoch_begin", lambda found: change(callback.sampler.order) if found.state.global_step else None)
    )
    with pytest.raises(
        RunError, match=f"In epoch 1 the train data loader drew {drawn} rows, and 8 were trained on, but"
    ):
        trainer.train()
    assert trainer.state.global_step == 8


def test_an_order_changed_once_it_is_drawn_changes_nothing(tmp_path, alone):
    trainer = sft_trainer(tmp_path, 16)
    callback = select(trainer, keep=[8, 5, 7], max_ifd=INF)
    trainer.add_callback(At("on_step_begin", lambda found: callback.sampler.order.reverse(), once=True))
    assert train(trainer).order() == alone.order


# ---- what the history says --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "trained"),
    [
        ({"dataloader_drop_last": True}, [6, 4, 6]),  # 7, 5 and 6 rows in batches of two
        ({"max_steps": 6}, [7, 4]),
        ({"num_train_epochs": 1.5}, [7, 4]),
        ({"max_steps": 5, "gradient_accumulation_steps": 2}, [7, 5, 4]),
    ],
    ids=["drop_last", "max_steps", "half_an_epoch", "accumulation"],
)
def test_the_history_says_what_was_trained_on_and_not_what_was_planned(tmp_path, config, trained):
    trainer = sft_trainer(tmp_path, 16, **config)
    callback = select(trainer, keep=[7, 5, 6], max_ifd=INF)
    seen = train(trainer)
    epochs = len(trained)
    assert [sum(times.values()) for times in recorded(callback, epochs)] == trained
    assert recorded(callback, epochs) == seen_times(seen)
    assert [record["trained"] for record in History.load(tmp_path).epochs] == trained
    assert [record["budget"] for record in callback.history.epochs] == [7, 5, 6][:epochs]
    headers, lines = epoch_cells(callback.history)
    assert [line[headers.index("trained")] for line in lines] == list(map(str, trained))


def test_an_epoch_that_another_callback_ends_is_recorded_as_it_was(tmp_path):
    trainer = sft_trainer(tmp_path, 16)
    callback = select(trainer, keep=8, max_ifd=INF)

    def stop(found):
        found.control.should_epoch_stop = found.state.global_step == 3

    trainer.add_callback(At("on_step_end", stop))
    order = train(trainer).order()
    assert [record["trained"] for record in callback.history.epochs] == [6, 8, 8]
    parts = [order[:6], order[6:14], order[14:]]
    assert recorded(callback, 3) == [{row: part.count(row) for row in part} for part in parts]


def test_packed_rows_that_were_not_trained_on_are_not_recorded_as_such(tmp_path):
    trainer = sft_trainer(
        tmp_path, 40, packing=True, max_length=64, per_device_train_batch_size=1, max_steps=3, num_train_epochs=1
    )
    callback = select(trainer, keep=5, max_ifd=INF)
    tokens = []
    step = trainer.training_step
    trainer.training_step = lambda model, inputs, *rest: (
        tokens.append(inputs["input_ids"].tolist()[0]),
        step(model, inputs, *rest),
    )[1]
    trainer.train()
    assert callback.history.epochs[0]["trained"] == 3
    examples = [ids for ids, _ in trainer.selection_pool.tokens()]
    times = callback.history.rows(0)["times"].to_numpy()
    assert sum(len(examples[i]) for i in np.flatnonzero(times)) == sum(map(len, tokens))
    flat = [token for row in tokens for token in row]
    assert sorted(token for i in np.flatnonzero(times) for token in examples[i]) == sorted(flat)


def test_each_evaluation_set_keeps_its_own_loss(tmp_path):
    sets = {"one": text_rows(raw_rows(4, seed=8)), "two": text_rows(raw_rows(4, seed=9))}
    trainer = sft_trainer(tmp_path, 12, eval_dataset=sets, eval_strategy="epoch")
    callback = select(trainer, keep=4, max_ifd=INF)
    trainer.train()
    logs = trainer.state.log_history
    for epoch, record in enumerate(History.load(tmp_path).epochs):
        named = {name: [entry[f"eval_{name}_loss"] for entry in logs if f"eval_{name}_loss" in entry] for name in sets}
        assert record["eval_losses"] == {name: losses[epoch] for name, losses in named.items()}
        assert record["eval_loss"] is None
        assert record["eval_losses"]["one"] != record["eval_losses"]["two"]
    headers, lines = epoch_cells(callback.history)
    assert headers[-2:] == ["loss on one", "loss on two"]
    assert "held-out loss" not in headers
    losses = [record["eval_losses"] for record in callback.history.epochs]
    assert [line[-2:] for line in lines] == [[f"{loss['one']:.4f}", f"{loss['two']:.4f}"] for loss in losses]


def test_a_metric_of_ones_own_that_is_called_a_loss_is_not_the_held_out_loss(tmp_path):
    trainer = sft_trainer(tmp_path, 12, eval_dataset=text_rows(raw_rows(4, seed=9)), eval_strategy="epoch")
    callback = select(trainer, keep=4, max_ifd=INF)
    evaluate = trainer.evaluation_loop

    def with_another(*arguments, **options):
        output = evaluate(*arguments, **options)
        output.metrics.update({"eval_aux_loss": -1.0, **output.metrics})
        return output._replace(metrics={"eval_aux_loss": -1.0, **output.metrics})

    trainer.evaluation_loop = with_another
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert [record["eval_loss"] for record in callback.history.epochs] == losses
    assert min(losses) > 0


# ---- told before the first step ---------------------------------------------------------------------------------


def test_a_callback_that_was_made_and_never_added_is_an_error(tmp_path):
    trainer = sft_trainer(tmp_path, 8)
    IFDSelectionCallback(trainer, keep=0.5)
    with pytest.raises(UserError, match=r"The IFDSelectionCallback that was made .* Add it: trainer\.add_callback"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("remove", ["remove_callback", "pop_callback"])
def test_a_trainer_trains_on_everything_once_the_callback_is_removed(tmp_path, remove):
    trainer = sft_trainer(tmp_path, 8, num_train_epochs=1)
    callback = select(trainer, keep=0.5)
    getattr(trainer, remove)(callback)
    assert len(train(trainer).order()) == 8


@pytest.mark.parametrize(
    "options",
    [{"warmup_epochs": 3}, {"warmup_epochs": 7}, {"schedule": Anneal(0.5, share=1.0)}],
    ids=["as_many_as_epochs", "more_than_epochs", "annealing"],
)
def test_a_run_in_which_selection_never_has_a_turn_is_an_error(tmp_path, options):
    trainer = sft_trainer(tmp_path, 8)
    select(trainer, **options)
    with pytest.raises(UserError, match="None of 3 planned epochs selects rows"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_max_steps_that_end_in_the_warm_up_are_an_error(tmp_path):
    trainer = sft_trainer(tmp_path, 8, max_steps=4)
    select(trainer, keep=0.5, warmup_epochs=1)
    with pytest.raises(UserError, match="None of 1 planned epoch selects rows"):
        trainer.train()


@pytest.mark.parametrize(
    "name", ["_get_train_sampler", "_run_epoch" if FIVE else "_inner_training_loop", "create_scheduler"]
)
def test_a_method_assigned_to_the_trainer_that_would_hide_ours_is_refused(tmp_path, name):
    trainer = sft_trainer(tmp_path, 8)
    setattr(trainer, name, getattr(trainer, name))
    with pytest.raises(UserError, match=f"The trainer has {name} assigned on the instance"):
        IFDSelectionCallback(trainer)


def preferences(**columns):
    return Dataset.from_list(
        [{"prompt": row["instruction"], **{k: v(row) for k, v in columns.items()}} for row in raw_rows(8)]
    )


def of_trl(name, folder, rows):
    cls, config = getattr(trl, f"{name}Trainer"), getattr(trl, f"{name}Config")
    settings = {"output_dir": str(folder), "report_to": "none", "use_cpu": True, "bf16": False}
    return cls(
        model=build_model(len(TOKENIZER)),
        ref_model=build_model(len(TOKENIZER)),
        args=config(**settings, gradient_checkpointing=False),
        train_dataset=rows,
        processing_class=TOKENIZER,
    )


@PREFERENCES
def test_a_trainer_on_pairs_of_answers_is_refused(tmp_path):
    rows = preferences(chosen=lambda row: row["output"], rejected=lambda row: "no")
    trainer = of_trl("DPO", tmp_path, rows)
    with pytest.raises(UserError, match="DPOTrainer trains on pairs of a chosen and a rejected answer; IFD scores"):
        IFDSelectionCallback(trainer)


@PREFERENCES
def test_a_trainer_on_labelled_answers_is_refused(tmp_path):
    rows = preferences(completion=lambda row: row["output"], label=lambda row: row["row_id"] % 2 == 0)
    trainer = of_trl("KTO", tmp_path, rows)
    with pytest.raises(UserError, match="KTOTrainer trains on answers labelled as good or bad; IFD scores"):
        IFDSelectionCallback(trainer)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("RewardTrainer", "pairs of a chosen"),
        ("ORPOTrainer", "pairs of a chosen"),
        ("GRPOTrainer", "answers that the model makes in training"),
        ("OnlineDPOTrainer", "answers that the model makes in training"),
        ("RLOOTrainer", "answers that the model makes in training"),
        ("GKDTrainer", "answers of a model or a teacher"),
        ("DistillationTrainer", "answers of a model or a teacher"),
    ],
)
def test_other_trainers_of_trl_are_refused_by_what_they_train_on(tmp_path, name, what):
    trainer = sft_trainer(tmp_path, 8)
    trainer.__class__ = type(name, (SFTTrainer,), {"__module__": "trl.experimental.some"})
    with pytest.raises(UserError, match=f"{name} trains on {what}"):
        IFDSelectionCallback(trainer)


BART = {
    "vocab_size": 400, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
}  # fmt: skip


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (
            lambda: BartForConditionalGeneration(BartConfig(**BART)),
            "BartForConditionalGeneration is an encoder-decoder",
        ),
        (
            lambda: LlamaForSequenceClassification(LlamaConfig(**SMALL)),
            "LlamaForSequenceClassification is a classifier",
        ),
        (lambda: BertForMaskedLM(BertConfig(**SMALL)), "BertForMaskedLM lets tokens see those that follow"),
        (lambda: LlamaModel(LlamaConfig(**SMALL)), "LlamaModel has no language model head"),
    ],
    ids=["encoder_decoder", "classifier", "masked", "headless"],
)
def test_a_model_of_another_kind_is_refused_at_construction(tmp_path, make, what):
    trainer = plain_trainer(tmp_path, tokenised(sft_trainer(tmp_path, 4)))
    trainer.model = make()
    with pytest.raises(UserError, match=f"{what}.* Use a causal"):
        IFDSelectionCallback(trainer)


def test_a_trainer_class_of_ones_own_is_taken(tmp_path):
    class Mine(SFTTrainer):
        pass

    trainer = sft_trainer(tmp_path, 8, num_train_epochs=1)
    trainer.__class__ = Mine
    select(trainer, keep=4, max_ifd=INF)
    assert len(train(trainer).order()) == 4


@pytest.mark.parametrize("column", ["image", "images", "pixel_values"])
def test_rows_with_images_are_refused(tmp_path, column):
    rows = [{"input_ids": [5, 6], "labels": [-100, 6], column: [0.0]}] * 4
    with pytest.raises(UserError, match=rf"The training set has images \(column '{column}'\), which are not scored"):
        IFDSelectionCallback(plain_trainer(tmp_path, Dataset.from_list(rows)))


def test_a_training_set_of_which_nothing_is_left_is_refused(tmp_path):
    trainer = plain_trainer(tmp_path, tokenised(sft_trainer(tmp_path, 4)).select([]))
    with pytest.raises(UserError, match=r"The prepared training set has no rows\. .* raise max_length"):
        IFDSelectionCallback(trainer)


# ---- a later epoch without an eligible row ----------------------------------------------------------------------


def without_eligible_rows_from(callback, epoch):
    """From this epoch on all scores are above the limit."""
    score_pool = callback.score_pool

    def scored(description):
        scores = score_pool(description)
        if int(description.rsplit(" ", 1)[1]) >= epoch:
            scores.ifd[:] += 10
        return scores

    callback.score_pool = scored


@pytest.mark.parametrize("on_shortfall", ["repeat", "relax"])
def test_an_epoch_without_an_eligible_row_selects_by_the_last_scores_that_left_some(tmp_path, caplog, on_shortfall):
    plan = [6, 4, 5]
    trainer = sft_trainer(tmp_path, 16)
    callback = select(trainer, keep=plan, max_ifd=2.0, on_shortfall="repeat")
    without_eligible_rows_from(callback, 1)
    seen = train(trainer)
    first = callback.history.rows(0).sort_values("ifd", ascending=False)["row_id"].tolist()
    assert [set(rows) for rows in seen.epochs()] == [set(first[:rows]) for rows in plan]
    assert [record["scored_at"] for record in callback.history.epochs] == [0, 0, 0]
    assert "only 0 of 16 are eligible" in caplog.text
    assert "The rows are selected by the scores of epoch 0 again." in caplog.text


def test_without_scores_of_before_the_rows_nearest_to_the_limit_are_taken(tmp_path, caplog):
    trainer = sft_trainer(tmp_path, 16, num_train_epochs=2)
    callback = select(trainer, keep=4, max_ifd=2.0, warmup_epochs=1)
    without_eligible_rows_from(callback, 1)
    seen = train(trainer)
    lowest = callback.history.rows(1).sort_values("ifd")["row_id"].tolist()[:4]
    assert set(seen.epochs()[1]) == set(lowest)
    assert "The rows nearest to the limit are taken." in caplog.text


@pytest.mark.parametrize(("on_shortfall", "epoch"), [("repeat", 0), ("error", 1)], ids=["first_epoch", "asked_for"])
def test_no_eligible_row_ends_a_run_that_has_not_begun_or_is_to_end(tmp_path, on_shortfall, epoch):
    trainer = sft_trainer(tmp_path, 16)
    callback = select(trainer, keep=4, max_ifd=2.0, on_shortfall=on_shortfall)
    without_eligible_rows_from(callback, epoch)
    with pytest.raises(UserError, match="only 0 of 16 are eligible"):
        trainer.train()
    assert trainer.state.global_step == 2 * epoch


# ---- other people's eyes ----------------------------------------------------------------------------------------


def uploaded(trainer, monkeypatch, push):
    """Paths that a push takes along, as the hub's client filters them."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import filter_repo_objects

    paths = []

    def upload(self, *, folder_path, ignore_patterns=None, path_in_repo="", **rest):
        from pathlib import Path

        found = [path.relative_to(folder_path).as_posix() for path in Path(folder_path).rglob("*") if path.is_file()]
        paths.extend(
            f"{path_in_repo}/{path}".lstrip("/") for path in filter_repo_objects(found, ignore_patterns=ignore_patterns)
        )
        return SimpleNamespace(is_done=lambda: True, done=lambda: True)

    monkeypatch.setattr(HfApi, "upload_folder", upload)
    if hasattr(transformers.trainer, "upload_folder"):  # before 5.2x it holds the method itself
        monkeypatch.setattr(transformers.trainer, "upload_folder", partial(upload, None))
    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: SimpleNamespace(repo_id="me/model"))
    push()
    return paths


@pytest.mark.parametrize("asked", [False, True])
def test_a_push_to_a_hub_keeps_training_texts_at_home_unless_asked(tmp_path, monkeypatch, asked):
    trainer = sft_trainer(tmp_path, 8, num_train_epochs=1, hub_model_id="me/model")
    select(trainer, keep=4, max_ifd=INF, push_history=asked)
    trainer.train()
    (tmp_path / "report.html").write_text("texts")
    (tmp_path / "report_files").mkdir()
    (tmp_path / "report_files" / "kept.png").write_bytes(b"")
    monkeypatch.setattr(trainer, "hub_model_id", "me/model", raising=False)
    monkeypatch.setattr(trainer, "create_model_card", lambda *_, **__: None)
    paths = uploaded(trainer, monkeypatch, trainer.push_to_hub)
    private = {path for path in paths if path.startswith(("ifd_history/", "report"))}
    assert "model.safetensors" in paths
    assert private == ({"ifd_history/history.json", "ifd_history/epoch-000.parquet", "ifd_history/pool.parquet",
                        "report.html", "report_files/kept.png"} if asked else set())  # fmt: skip


def test_a_push_while_training_runs_keeps_them_too(tmp_path, monkeypatch):
    trainer = sft_trainer(
        tmp_path, 8, num_train_epochs=1, hub_model_id="me/model", save_strategy="epoch", hub_strategy="checkpoint"
    )
    trainer.args.push_to_hub, trainer.push_in_progress, trainer.hub_model_id = True, None, "me/model"
    select(trainer, keep=4, max_ifd=INF)
    paths = uploaded(trainer, monkeypatch, trainer.train)
    assert "model.safetensors" in paths
    assert "last-checkpoint/trainer_state.json" in paths
    assert not [path for path in paths if "history" in path or "pool" in path]


# ---- one history for each run -----------------------------------------------------------------------------------


def test_each_trial_of_a_hyperparameter_search_has_a_history_of_its_own(tmp_path, monkeypatch):
    def model_init():
        return build_model(len(TOKENIZER))

    trainer = plain_trainer(tmp_path, tokenised(sft_trainer(tmp_path, 12)), num_train_epochs=2, save_strategy="epoch")
    trainer = Trainer(
        model_init=model_init,
        args=trainer.args,
        train_dataset=trainer.train_dataset,
        data_collator=trainer.data_collator,
        processing_class=TOKENIZER,
    )
    callback = select(trainer, keep=4, max_ifd=INF)
    trainer.hp_search_backend, trainer.hp_name = HPSearchBackend.OPTUNA, None
    trainer.hp_space = lambda trial: trial.params
    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial.params)  # asks for optuna's class
    for number, seed in enumerate((3, 4)):
        trainer.train(trial=SimpleNamespace(number=number, params={"seed": seed}))
        assert callback.history.settings["seed"] == seed
    histories = [History.load(tmp_path / f"run-{number}") for number in range(2)]
    assert [history.settings["seed"] for history in histories] == [3, 4]
    assert [len(history.epochs) for history in histories] == [2, 2]
    assert not (tmp_path / "ifd_history").exists()


# ---- numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keep", [np.int64(5), np.float32(0.25), np.array([4, 2, 3]), [np.int32(4), np.float64(0.5), 3]], ids=str
)
def test_numbers_of_numpy_are_numbers(tmp_path, keep):
    trainer = sft_trainer(tmp_path, 8)
    select(trainer, keep=keep, max_ifd=INF)
    budgets = {"5": [5] * 3, "0.25": [2] * 3, "[4 2 3]": [4, 2, 3]}.get(str(keep), [4, 4, 3])
    assert [len(rows) for rows in train(trainer).epochs()] == budgets
