"""The callback on rows with images, along TRL's vision path: what is scored, trained on, resumed and refused."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROUNDING
from tiny_runs import INF, Stop, difference, sft_trainer, since_trl, train, weights_of
from transformers import Trainer, TrainingArguments
from vision_models import FAMILIES, build, by_hand, image_rows, stored_rows

from ifd_trainer import Diverse, Guard, IFDSelectionCallback, ImageIFDScorer
from ifd_trainer.errors import UserError

pytestmark = since_trl("1.8", "rows with images are collated as they are here")


def as_prompts(rows: list[dict]) -> list[dict]:
    """Prompt and completion, of which the completion alone is trained on."""
    kept = ("row_id", "images")
    return [
        {**{name: row[name] for name in kept}, "prompt": row["messages"][:-1], "completion": row["messages"][-1:]}
        for row in rows
    ]


def trainer_of(folder, rows, family="llava", model=None, **config):
    built, processor = build(family)
    given = {"num_train_epochs": 2, "max_length": None, "model": model or built, "tokenizer": processor}
    return sft_trainer(folder, stored_rows(rows), **{**given, **config})


def selecting(trainer, **options):
    callback = IFDSelectionCallback(trainer, **{"guard": None, "max_ifd": INF, **options})
    trainer.add_callback(callback)
    return callback


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", ["prompts", "messages"])
@pytest.mark.parametrize("without", ["both", "image"])
def test_scores_are_those_of_plain_forwards_and_the_highest_are_trained_on(tmp_path, family, form, without):
    rows = image_rows(8)
    model, processor = build(family)
    cas, direct = (
        np.array([by_hand(model, processor, row, given) for row in rows])
        for given in ("both", "nothing" if without == "both" else "question")
    )
    trainer = trainer_of(tmp_path, as_prompts(rows) if form == "prompts" else rows, family, num_train_epochs=1)
    callback = selecting(trainer, keep=4, without=without)
    witness = train(trainer)
    np.testing.assert_allclose(callback.scores.cas, cas, rtol=ROUNDING)
    np.testing.assert_allclose(callback.scores.das, direct, rtol=ROUNDING)
    best = [rows[i]["row_id"] for i in np.argsort(-cas / direct)[:4]]
    assert sorted(witness.order()) == sorted(best)
    assert witness.updates_per_epoch() == [2]
    assert witness.leftovers == []


def test_each_epoch_is_scored_by_the_weights_that_it_begins_with(tmp_path):
    rows = image_rows(8)
    trainer = trainer_of(tmp_path, as_prompts(rows))
    callback = selecting(trainer, keep=[4, 2])
    witness = train(trainer)
    model, processor = build("llava")
    model.load_state_dict(witness.weights[1])
    cas, das = (np.array([by_hand(model, processor, row, given) for row in rows]) for given in ("both", "nothing"))
    np.testing.assert_allclose(callback.scores.ifd, cas / das, rtol=4 * ROUNDING)
    assert sorted(witness.epochs()[1]) == sorted(rows[i]["row_id"] for i in np.argsort(-cas / das)[:2])
    assert (witness.updates_per_epoch(), trainer.state.global_step) == ([2, 1], 3)
    assert witness.final_learning_rate == 0


@pytest.mark.parametrize("family", FAMILIES)  # transformers saves LLaVA with other names than it resumes it by
def test_a_run_that_is_resumed_is_the_same_run(tmp_path, family):
    rows = as_prompts(image_rows(8))
    settings = {"save_strategy": "steps", "save_steps": 1}
    whole = trainer_of(tmp_path / "whole", rows, family, **settings)
    selecting(whole, keep=[6, 4])
    order = train(whole).order()
    part = trainer_of(tmp_path / "part", rows, family, **settings)
    selecting(part, keep=[6, 4])
    part.add_callback(Stop(4))  # inside the second epoch
    done = train(part).order()
    resumed = trainer_of(tmp_path / "part", rows, family, **settings)
    selecting(resumed, keep=[6, 4])
    assert done + train(resumed, resume_from_checkpoint=True).order() == order
    assert difference(weights_of(resumed.model), weights_of(whole.model)) == 0
    other = trainer_of(tmp_path / "part", rows, family, **settings)
    selecting(other, keep=[6, 4], without="image")
    with pytest.raises(UserError, match="without: 'both' in the checkpoint, 'image' now"):
        other.train(resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-4"))
    changed = as_prompts(image_rows(8))
    changed[0]["images"] = image_rows(9)[8]["images"]
    other = trainer_of(tmp_path / "part", changed, family, **settings)
    selecting(other, keep=[6, 4])
    with pytest.raises(UserError, match=r"training set: '\w+' in the checkpoint"):
        other.train(resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-4"))


def test_rows_that_cannot_be_read_have_a_status_and_are_not_trained_on(tmp_path):
    rows = as_prompts(image_rows(8))
    rows[2]["images"] = [{"bytes": b"torn", "path": None}]
    rows[5]["prompt"] = [
        {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "?"}]}
    ]
    rows = [{**row, "prompt": in_parts(row["prompt"])} for row in rows]
    trainer = trainer_of(tmp_path, rows)
    callback = selecting(trainer, keep=6)
    trainer.train()
    status = callback.scores.ifd_status.tolist()
    assert (status[2], status[5], status.count("ok")) == ("unreadable_image", "malformed", 6)
    assert trainer.state.global_step == 6
    told = pq.read_table(tmp_path / "ifd_history" / "epoch-000.parquet").to_pylist()
    assert {row["row_id"]: row["reason"] for row in told if row["reason"] != "kept"} == {
        102: "unreadable_image",
        105: "malformed",
    }


def in_parts(messages):
    return [
        {**m, "content": [{"type": "image", "text": None}, {"type": "text", "text": m["content"]}]}
        if isinstance(m["content"], str)
        else m
        for m in messages
    ]


def test_rows_without_an_image_are_scored_among_the_others(tmp_path):
    rows = image_rows(6)
    rows[1]["images"], rows[4]["images"] = [], []
    model, processor = build("llava")
    given = ["both" if row["images"] else "question" for row in rows]
    cas = [by_hand(model, processor, row, name) for row, name in zip(rows, given, strict=True)]
    trainer = trainer_of(tmp_path, as_prompts(rows), num_train_epochs=1, per_device_train_batch_size=1)
    callback = selecting(trainer, keep=2)
    trainer.train()
    np.testing.assert_allclose(callback.scores.cas, cas, rtol=ROUNDING)
    trainer = trainer_of(tmp_path, as_prompts(rows), num_train_epochs=1, per_device_train_batch_size=1)
    callback = selecting(trainer, keep=2, without="image")
    trainer.train()
    assert callback.scores.ifd_status.tolist() == ["ok", "no_image", "ok", "ok", "no_image", "ok"]


def test_a_collator_of_ones_own_is_scored_as_it_trains(tmp_path):
    rows = image_rows(6)
    model, processor = build("idefics3")

    def collate(batch):
        texts = [
            processor.apply_chat_template(in_parts(row["messages"][:1]) + said(row), tokenize=False) for row in batch
        ]
        opened = [
            processor.apply_chat_template(in_parts(row["messages"][:1]), add_generation_prompt=True) for row in batch
        ]
        images = [row["images"] for row in batch]
        inputs = processor(text=texts, images=images, padding=True, return_tensors="pt")
        prompts = [
            len(processor(text=[one], images=[image])["input_ids"][0])
            for one, image in zip(opened, images, strict=True)
        ]
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        for label, prompt in zip(labels, prompts, strict=True):
            label[:prompt] = -100
        return {**inputs, "labels": labels}

    def said(row):
        return [{"role": "assistant", "content": [{"type": "text", "text": row["messages"][1]["content"]}]}]

    args = TrainingArguments(
        output_dir=str(tmp_path),
        remove_unused_columns=False,
        per_device_train_batch_size=2,
        num_train_epochs=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(
        model=model, args=args, train_dataset=stored_rows(rows), data_collator=collate, processing_class=processor
    )
    cas = [by_hand(model, processor, row, "both") for row in rows]
    callback = selecting(trainer, keep=2)
    trainer.train()
    np.testing.assert_allclose(callback.scores.cas, cas, rtol=ROUNDING)
    assert trainer.state.global_step == 1


def test_scores_that_were_attached_before_are_read(tmp_path):
    rows = as_prompts(image_rows(6))
    model, processor = build("llava")
    scored = stored_rows(rows).map(ImageIFDScorer(model, processor, without="image"), batched=True)
    trainer = trainer_of(tmp_path, rows, num_train_epochs=1)
    trainer.train_dataset = scored
    callback = selecting(trainer, keep=2, scorer="columns", score="image_gain")
    witness = train(trainer)
    best = np.argsort(-np.array(scored["image_gain"]))[:2]
    assert sorted(witness.order()) == sorted(rows[i]["row_id"] for i in best)
    assert callback.scores.cas.tolist() == scored["cas"][:]


def test_the_history_has_texts_and_no_images(tmp_path):
    trainer = trainer_of(tmp_path, as_prompts(image_rows(4)), num_train_epochs=1)
    selecting(trainer, keep=2)
    trainer.train()
    [pool] = [pq.read_table(tmp_path / "ifd_history" / "pool.parquet")]
    assert "images" not in pool.column_names
    assert pool["prompt"][0].as_py().count("<image>") == 1
    assert pool["answer"][0].as_py().startswith(image_rows(1)[0]["messages"][1]["content"])


def test_guards_that_read_texts_alone_are_off_and_said_to_be(tmp_path, caplog):
    trainer = trainer_of(tmp_path, as_prompts(image_rows(4)))
    callback = IFDSelectionCallback(trainer, keep=2)
    assert callback.guard.names == ["freeze"]
    assert "the guards limit, unfinished, duplicates, which run or compare texts alone, are off" in caplog.text
    with pytest.raises(UserError, match="and the guards limit, unfinished, duplicates run or compare texts alone"):
        IFDSelectionCallback(trainer, keep=2, guard=Guard())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_ifd": "calibrated"}, "a calibrated limit runs answers under other prompts"),
        ({"policy": Diverse(0.5)}, "Diverse compares texts alone"),
        ({"scorer": "some/model"}, "another model reads texts alone"),
        ({"scores": ("prompt_ppl",)}, "prompt_ppl is of texts alone"),
    ],
)
def test_what_says_nothing_of_images_is_refused(tmp_path, options, said):
    trainer = trainer_of(tmp_path, as_prompts(image_rows(4)))
    with pytest.raises(UserError, match=f"The training set has images, and {said}"):
        IFDSelectionCallback(trainer, keep=2, guard=None, **options)


def test_to_leave_out_an_image_takes_one(tmp_path):
    with pytest.raises(UserError, match="without='image' leaves the image out of the direct score, and the rows have"):
        IFDSelectionCallback(sft_trainer(tmp_path, 8), keep=2, without="image")
    with pytest.raises(UserError, match="without must be one of both, image"):
        IFDSelectionCallback(sft_trainer(tmp_path, 8), keep=2, without="text")


def test_scoring_leaves_the_model_in_its_mode(tmp_path):
    trainer = trainer_of(tmp_path, as_prompts(image_rows(4)))
    callback = selecting(trainer, keep=2)
    trainer.model.train()
    trainer.model.model.vision_tower.eval()
    before = torch.get_rng_state()
    trainer.selection_pool.read()
    callback.pool_scorer.scores([1])
    assert (trainer.model.training, trainer.model.model.vision_tower.training) == (True, False)
    assert torch.equal(torch.get_rng_state(), before)
