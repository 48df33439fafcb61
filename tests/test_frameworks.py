"""Modules for frameworks, beside stand-ins for those: what a framework hands over, and what is made of it.

`tests/frameworks` trains with the frameworks themselves.
"""

from __future__ import annotations

import importlib
import sys
from functools import partial
from types import ModuleType, SimpleNamespace

import pytest
from datasets import Dataset
from tiny_runs import FIVE, INF, TOKENIZER, plain_trainer, sft_trainer, tokenised, train
from torch.utils.data import DataLoader
from transformers import DataCollatorForSeq2Seq, Trainer

from ifd_trainer import Guard, IFDSelectionCallback
from ifd_trainer.errors import UserError

ROWS = 12


def stand_in(monkeypatch, name, **contents):
    """Put a module, and the packages that it is in, where imports find them."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), ModuleType(".".join(parts[:end])))
    vars(sys.modules[name]).update(contents)


def module_for(monkeypatch, framework):
    """The module for a framework, imported anew beside its stand-in."""
    name = f"ifd_trainer.frameworks.{framework}"
    monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module(name)
    monkeypatch.delitem(sys.modules, name)
    return module


# ---- axolotl ----------------------------------------------------------------------------------------------------


@pytest.fixture
def axolotl(monkeypatch):
    pytest.importorskip("pydantic")
    stand_in(monkeypatch, "axolotl.integrations.base", BasePlugin=type("BasePlugin", (), {}))
    return module_for(monkeypatch, "axolotl")


def of_axolotl(folder, **config):
    """A trainer with what axolotl counts before: the steps of all rows, and the warm-up's of those."""
    rows = tokenised(sft_trainer(folder, ROWS))
    return plain_trainer(folder, rows, num_train_epochs=2, **{"max_steps": 12, "warmup_steps": 4, **config})


def selecting(axolotl, trainer, **cfg):
    cfg = {"ifd_selection": {"keep": 6, "max_ifd": INF, "guard": None}, **cfg}
    plugin = axolotl.IFDSelectionPlugin()
    plugin.register(cfg)
    callbacks = plugin.add_callbacks_post_trainer(cfg, trainer)
    for callback in callbacks:
        trainer.add_callback(callback)
    return callbacks


def test_the_plugin_selects_in_as_many_epochs_as_axolotl_was_told(tmp_path, axolotl):
    trainer = of_axolotl(tmp_path)
    (callback,) = selecting(axolotl, trainer)
    assert isinstance(callback, IFDSelectionCallback)
    assert [len(rows) for rows in train(trainer).epochs()] == [6, 6]
    assert trainer.state.max_steps == 6


def test_steps_that_axolotl_was_told_are_kept(tmp_path, axolotl):
    trainer = of_axolotl(tmp_path, max_steps=4, warmup_steps=1)
    selecting(axolotl, trainer, max_steps=4, warmup_steps=1)
    assert [len(rows) for rows in train(trainer).epochs()] == [6, 2]
    assert trainer.args.get_warmup_steps(4) == 1


@pytest.mark.skipif(not FIVE, reason="warmup_steps may be a share since transformers 5")
@pytest.mark.parametrize(("cfg", "steps"), [({}, 1), ({"warmup_ratio": 0.5}, 3), ({"warmup_ratio": 0}, 0)])
def test_a_warm_up_that_is_a_share_is_one_of_the_planned_steps(tmp_path, axolotl, cfg, steps):
    trainer = of_axolotl(tmp_path)
    selecting(axolotl, trainer, **cfg)
    assert trainer.args.get_warmup_steps(6) == steps


def test_the_plugin_says_what_its_keys_are(axolotl):
    module, _, name = axolotl.IFDSelectionPlugin().get_input_args().rpartition(".")
    assert module == "ifd_trainer.frameworks.axolotl"
    options = {"keep": [1.0, 0.5], "guard": None}
    args = getattr(axolotl, name)(ifd_selection=options)
    assert args.model_dump(exclude_none=True) == {"ifd_selection": options}  # as axolotl reads them: no null is lost


def test_without_options_the_plugin_keeps_a_tenth(tmp_path, axolotl):
    (callback,) = selecting(axolotl, of_axolotl(tmp_path), ifd_selection=None)
    assert callback.schedule.keep == 0.10


def test_a_guard_may_be_said_in_yaml(tmp_path, axolotl):
    guard = {"on_misaligned": "warn", "unfinished": False}
    (callback,) = selecting(axolotl, of_axolotl(tmp_path), ifd_selection={"guard": guard})
    assert callback.guard == Guard(on_misaligned="warn", unfinished=None)


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"kep": 0.1}, TypeError, "unexpected keyword argument 'kep'; did you mean 'keep'"),
        (0.1, UserError, r"ifd_selection holds options of the callback, as in `ifd_selection: \{keep: 0.1\}`, got 0.1"),
    ],
)
def test_options_that_are_none_are_refused_before_rows_are_prepared(axolotl, options, error, sentence):
    with pytest.raises(error, match=sentence):
        axolotl.IFDSelectionPlugin().register({"ifd_selection": options})


@pytest.mark.parametrize(
    ("cfg", "sentence"),
    [
        ({"sample_packing": True}, "sample_packing: true packs whole batches .* Set sample_packing: false"),
        ({"use_pose": True}, "use_pose: true trains on positions that skip parts .* Set use_pose: false"),
        ({"expert_parallel_size": 2}, "expert_parallel_size: 2 lets processes wait .* Set expert_parallel_size: 1"),
    ],
)
def test_what_axolotl_does_and_selection_cannot_is_refused(tmp_path, axolotl, cfg, sentence):
    selecting(axolotl, of_axolotl(tmp_path / "as it is"), sample_packing=False, expert_parallel_size=1)
    with pytest.raises(UserError, match=sentence):
        selecting(axolotl, of_axolotl(tmp_path), **cfg)


# ---- ms-swift ---------------------------------------------------------------------------------------------------


class LazyLLMDataset:
    """As swift's: encodes a row when it is asked for, and another one where that fails."""

    def __init__(self, dataset, encode):
        self.dataset, self.encode = dataset, encode

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, position):
        try:
            return self.encode(self.dataset[position])
        except ValueError:
            return self.encode(self.dataset[0])


class EncodePreprocessor:
    def __init__(self, template):
        assert template.model is None
        self.template = template

    def __call__(self, dataset, strict):
        assert strict
        return dataset.map(self.template.encode, remove_columns=dataset.column_names)


class OfSwift(Trainer):
    """As swift's trainers: callbacks are made before the trainer is, batches by the loader's own batch sampler."""

    def __init__(self, args, template, callbacks, **kwargs):
        self.template, self.task_type = template, "causal_lm"
        super().__init__(args=args, callbacks=[make(args, self) for make in callbacks], **kwargs)

    def get_train_dataloader(self, skip_batches=0):
        return DataLoader(self.train_dataset, batch_size=2, collate_fn=self.data_collator)


@pytest.fixture
def swift(monkeypatch):
    stand_in(
        monkeypatch,
        "swift.dataset.utils",
        LazyLLMDataset=LazyLLMDataset,
        EncodePreprocessor=EncodePreprocessor,
    )
    return module_for(monkeypatch, "swift")


def encode(rows, row):
    encoded = {name: rows[row["number"]][name] for name in ("input_ids", "labels")}
    if "pixels" in row:
        encoded["pixel_values"] = [0.0]
    if row.get("too_long"):
        raise ValueError("row of 9 tokens,\nlonger than 8")
    return encoded | {"length": len(encoded["input_ids"])}


def of_swift(folder, make, raw=None, template=(), **args):
    plain = plain_trainer(folder, tokenised(sft_trainer(folder, ROWS)), num_train_epochs=2)
    raw = Dataset.from_list(raw or [{"number": number} for number in range(ROWS)])
    whole = {"model": object(), "mode": "train", "packing": False, "sequence_parallel_size": 1, **dict(template)}
    made = SimpleNamespace(**whole, encode=partial(encode, plain.train_dataset.to_list()))
    for name, value in {"train_dataloader_shuffle": True, "group_by_length": False, **args}.items():
        setattr(plain.args, name, value)
    return OfSwift(
        plain.args,
        made,
        [make],
        model=plain.model,
        train_dataset=LazyLLMDataset(raw, made.encode),
        data_collator=DataCollatorForSeq2Seq(TOKENIZER),
        processing_class=TOKENIZER,
    )


def trained_epochs(trainer):
    """Positions of the rows of each epoch's batches."""
    batches, step = [], trainer.training_step

    def watching(model, inputs, *args, **kwargs):
        ids = inputs["input_ids"], inputs["attention_mask"]
        batches.extend(row[mask.bool()].tolist() for row, mask in zip(*ids, strict=True))
        return step(model, inputs, *args, **kwargs)

    trainer.training_step = watching
    trainer.train()
    pool = [list(ids) for ids in trainer.train_dataset["input_ids"]]
    places = [pool.index(row) for row in batches]
    return places[:6], places[6:]


def test_a_callback_of_swifts_map_selects(tmp_path, swift):
    trainer = of_swift(tmp_path, swift.selection(keep=6, max_ifd=INF, guard=None))
    template = vars(trainer.template).copy()
    epochs = trained_epochs(trainer)
    assert [len(rows) for rows in epochs] == [6, 6]
    (callback,) = (one for one in trainer.callback_handler.callbacks if isinstance(one, IFDSelectionCallback))
    for epoch, rows in enumerate(epochs):
        chosen = callback.history.rows(epoch)
        assert sorted(rows) == chosen["row_id"][chosen["times"] > 0].tolist()
    assert vars(trainer.template) == template  # its model is back
    assert trainer.train_dataset.column_names == ["input_ids", "labels", "length"]


def test_the_papers_method_is_selected_by_name(tmp_path, swift):
    make = swift.selection(IFDSelectionCallback.cherry, keep=6, max_ifd=INF, brief=None)
    first, second = trained_epochs(of_swift(tmp_path, make))
    assert sorted(first) == sorted(second)
    assert len(first) == 6


@pytest.mark.parametrize(
    ("args", "strategy"),
    [
        ({}, "random"),
        ({"train_dataloader_shuffle": False}, "sequential"),
        ({"group_by_length": True}, "group_by_length"),
    ],
)
def test_rows_are_ordered_as_swift_would_order_them(tmp_path, swift, args, strategy):
    trainer = of_swift(tmp_path, swift.selection(keep=6, max_ifd=INF, guard=None), **args)
    first, _ = trained_epochs(trainer)
    (callback,) = (one for one in trainer.callback_handler.callbacks if isinstance(one, IFDSelectionCallback))
    assert callback.history.settings["train_sampling_strategy"] == strategy
    assert (first == sorted(first)) == (strategy == "sequential")


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"template": {"packing": True}}, "--packing true packs the whole training set .* Set --packing false"),
        ({"template": {"sequence_parallel_size": 2}}, "--sequence_parallel_size 2 lets several processes share a row"),
        (
            {"raw": [{"number": number, "too_long": number == 3} for number in range(ROWS)]},
            r"cannot be encoded \(row of 9 tokens, longer than 8\), and swift would train on another one in its place",
        ),
        (
            {"raw": [{"number": number, "pixels": 1} for number in range(ROWS)]},
            "The encoded training set has pixel_values: rows of images, videos or sounds are not scored yet",
        ),
    ],
)
def test_what_swift_does_and_selection_cannot_is_refused(tmp_path, swift, given, sentence):
    trainer = of_swift(tmp_path, swift.selection(keep=6), **given)
    with pytest.raises(UserError, match=sentence):
        trainer.train()
    assert trainer.state.global_step == 0


def test_an_evaluation_of_texts_is_refused(tmp_path, swift):
    trainer = of_swift(tmp_path, swift.selection(keep=6), predict_with_generate=True)
    with pytest.raises(UserError, match="--predict_with_generate true evaluates texts that the model makes"):
        trainer.train()


def test_a_task_without_answers_is_refused(tmp_path, swift):
    trainer = of_swift(tmp_path, swift.selection(keep=6))
    trainer.task_type = "seq_cls"
    with pytest.raises(UserError, match="--task_type seq_cls does not train on answers"):
        trainer.train()


def test_an_unknown_option_is_refused_when_the_plugin_is_imported(swift):
    with pytest.raises(TypeError, match="unexpected keyword argument 'kep'; did you mean 'keep'"):
        swift.selection(kep=0.1)
