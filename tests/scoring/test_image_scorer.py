"""Rows with images: each loss against a plain forward of the row alone, for two families of models."""

from __future__ import annotations

import io

import numpy as np
import pytest
from conftest import ROUNDING
from datasets import Dataset, Image
from vision_models import FAMILIES, build, by_hand, image_rows, picture

from ifd_trainer import IFDScorer, ImageIFDScorer
from ifd_trainer.errors import NotInstalledError, UserError

MODELS = {family: build(family) for family in FAMILIES}


def columns(scorer, rows) -> dict[str, list]:
    return scorer({name: [row.get(name) for row in rows] for name in rows[0]})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("without", ["both", "image"])
def test_losses_are_those_of_plain_forwards(family, without):
    model, processor = MODELS[family]
    rows = image_rows(5) + [{**row, "row_id": 200} for row in image_rows(1, images=2)]
    found = columns(ImageIFDScorer(model, processor, without=without, batch_size=3), rows)
    assert found["ifd_status"] == ["ok"] * 6
    cas, qas, das = (
        np.array([by_hand(model, processor, row, given) for row in rows]) for given in ("both", "question", "nothing")
    )
    direct = das if without == "both" else qas
    np.testing.assert_allclose(found["cas"], cas, rtol=ROUNDING)
    np.testing.assert_allclose(found["das"], direct, rtol=ROUNDING)
    np.testing.assert_allclose(found["qas"], qas, rtol=ROUNDING)
    np.testing.assert_allclose(found["ifd"], cas / direct, rtol=2 * ROUNDING)
    np.testing.assert_allclose(found["image_gain"], qas - cas, atol=20 * ROUNDING)
    assert np.abs(qas - cas).min() > 1e-3, "the images make a difference"


def test_each_image_is_read_and_seen_once():
    model, processor = build("llava")
    seen, made = [], []
    tower = model.model.vision_tower
    tower.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len((args or list(kwargs.values()))[0])), with_kwargs=True
    )
    pixels = processor.image_processor
    process = type(pixels).preprocess

    class Counting(type(pixels)):
        def preprocess(self, images, *args, **kwargs):
            made.append(len(images))
            return process(self, images, *args, **kwargs)

    pixels.__class__ = Counting
    found = columns(ImageIFDScorer(model, processor, batch_size=2), image_rows(5))
    assert found["ifd_status"] == ["ok"] * 5
    assert (sum(seen), sum(made)) == (5, 5)  # for three losses of five rows


def test_a_row_that_cannot_be_scored_has_a_status_and_all_others_are_scored(tmp_path, caplog):
    model, processor = MODELS["llava"]
    rows = image_rows(8)
    (tmp_path / "torn.png").write_bytes(b"no image at all")
    picture(3).save(tmp_path / "fine.png")
    rows[1]["images"] = [str(tmp_path / "torn.png")]
    rows[2]["images"] = [{"bytes": None, "path": "nowhere.png"}]
    rows[3]["images"] = ["https://example.org/cat.png"]
    rows[4]["images"] = [picture(n) for n in range(4)]
    rows[5]["messages"] = [{"role": "narrator", "content": "x"}]
    rows[6]["images"] = ["fine.png"]
    rows[7]["messages"] = [{"role": "user", "content": [{"type": "image"}, {"type": "image"}]}, rows[7]["messages"][1]]
    scorer = ImageIFDScorer(model, processor, max_images=3, image_folder=tmp_path)
    found = columns(scorer, rows)
    unreadable = ["unreadable_image"] * 3
    assert found["ifd_status"] == ["ok", *unreadable, "too_many_images", "malformed", "ok", "malformed"]
    assert [value is None for value in found["ifd"]] == [status != "ok" for status in found["ifd_status"]]
    assert found["answer_tokens"][1] == 0
    rows[6]["images"] = [picture(3)]
    np.testing.assert_allclose(found["cas"][6], by_hand(model, processor, rows[6], "both"), rtol=ROUNDING)
    assert (
        "2 rows of a batch cannot be rendered; the first one: message 0 has the unknown role 'narrator'" in caplog.text
    )


def test_images_that_leave_no_room_are_too_many():
    model, processor = MODELS["llava"]  # 4 tokens for an image and one for a line break
    rows = image_rows(1) + image_rows(1, images=20) + image_rows(1)
    rows[2]["messages"][0]["content"] = "cat " * 90
    found = columns(ImageIFDScorer(model, processor, max_length=80), rows)
    assert found["ifd_status"] == ["ok", "too_many_images", "prompt_too_long"]
    assert columns(ImageIFDScorer(model, processor), rows)["ifd_status"] == ["ok"] * 3


def test_an_answer_that_does_not_fit_is_truncated():
    model, processor = MODELS["idefics3"]
    rows = image_rows(2)
    tokens = len(
        processor(text=["<image>\n" + rows[0]["messages"][0]["content"]], images=[rows[0]["images"]])["input_ids"][0]
    )
    found = columns(ImageIFDScorer(model, processor, max_length=tokens + 16), rows)
    assert found["ifd_status"] == ["truncated", "truncated"]


def test_a_row_without_an_image_is_text():
    model, processor = MODELS["llava"]
    rows = image_rows(3)
    rows[1]["images"] = []
    both = columns(ImageIFDScorer(model, processor), rows)
    assert both["ifd_status"] == ["ok"] * 3
    given, alone = (by_hand(model, processor, rows[1], name) for name in ("question", "nothing"))
    np.testing.assert_allclose([both["cas"][1], both["das"][1]], [given, alone], rtol=ROUNDING)
    assert (both["image_gain"][1], both["qas"][1]) == (None, None)
    image = columns(ImageIFDScorer(model, processor, without="image"), rows)
    assert image["ifd_status"] == ["ok", "no_image", "ok"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_forms_of_a_row_score_alike(family):
    model, processor = MODELS[family]
    [row] = image_rows(1)
    question, answer = (message["content"] for message in row["messages"])
    [image] = row["images"]
    said = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    words = [{"type": "image"}, {"type": "text", "text": question}]
    held = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    forms = [
        {"images": [image], "messages": [{"role": "user", "content": words}, said]},
        {"image": image, "messages": row["messages"]},
        {"messages": [{"role": "user", "content": held}, said]},
        {
            "image": image,
            "conversations": [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}],
        },
        {"image": image, "prompt": [row["messages"][0]], "completion": [row["messages"][1]]},
        {
            "image": image,
            "prompt": f"<|im_start|>user\n<image>\n{question}<|im_end|>\n<|im_start|>assistant\n",
            "completion": answer,
        },
    ]
    found = [columns(ImageIFDScorer(model, processor), [form]) for form in forms]
    assert [each["ifd_status"] for each in found] == [["ok"]] * len(forms)
    cas = by_hand(model, processor, row, "both")
    np.testing.assert_allclose([each["cas"][0] for each in found], [cas] * len(forms), rtol=ROUNDING)
    np.testing.assert_allclose([each["qas"][0] for each in found], [found[0]["qas"][0]] * len(forms), rtol=ROUNDING)


def test_map_scores_around_an_image_that_datasets_cannot_decode():
    model, processor = MODELS["llava"]
    rows = image_rows(3)
    stored = [{**row, "images": [{"bytes": b"torn", "path": None}]} if i == 1 else row for i, row in enumerate(rows)]
    dataset = Dataset.from_list([{name: value for name, value in row.items() if name != "images"} for row in rows])
    cells = [[as_bytes(image) for image in row["images"]] for row in stored]
    dataset = dataset.add_column("images", cells).cast_column("images", [Image()])
    scorer = ImageIFDScorer(model, processor, scores="ira")
    scored = dataset.map(scorer, batched=True, batch_size=2)
    assert scored.remove_columns("images")["ifd_status"][:] == ["ok", "unreadable_image", "ok"]
    assert {"qas", "image_gain", "ira", "eot_loss", "row_id"} < set(scored.column_names)
    np.testing.assert_allclose(scored["cas"][2], by_hand(model, processor, rows[2], "both"), rtol=ROUNDING)
    np.testing.assert_allclose(scored["ira"][2], scored["das"][2] - scored["cas"][2])
    again = dataset.map(scorer, batched=True, batch_size=2)
    assert again._fingerprint == scored._fingerprint, "scoring leaves the processor as it was"
    other = dataset.map(ImageIFDScorer(model, processor, without="image", scores="ira"), batched=True, batch_size=2)
    assert other._fingerprint != scored._fingerprint
    again = scored.map(scorer, batched=True, batch_size=2)  # in the place of the columns that are there
    assert [again[name][:] == scored[name][:] for name in ("ifd", "qas", "ira")] == [True] * 3


def as_bytes(image) -> dict:
    if isinstance(image, dict):
        return image
    file = io.BytesIO()
    image.save(file, format="PNG")
    return {"bytes": file.getvalue(), "path": None}


def test_a_folder_is_loaded_by_its_name(tmp_path):
    model, processor = MODELS["llava"]
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    rows = image_rows(2)
    found = columns(ImageIFDScorer(str(tmp_path), device="cpu"), rows)
    assert found == columns(ImageIFDScorer(model, processor), rows)


def test_the_last_of_several_answers_is_scored_and_the_others_are_told(caplog):
    model, processor = MODELS["llava"]
    [row] = image_rows(1)
    row["messages"] += [{"role": "user", "content": "And now?"}, {"role": "assistant", "content": "It ran away."}]
    found = columns(ImageIFDScorer(model, processor), [row])
    np.testing.assert_allclose(found["cas"], [by_hand(model, processor, row, "both")], rtol=ROUNDING)
    assert "1 row of the first 1 row have several answers" in caplog.text or "several answers" in caplog.text


def test_what_cannot_be_is_refused(tmp_path):
    model, processor = MODELS["llava"]
    rows = image_rows(2)
    with pytest.raises(UserError, match="The rows have images, and IFDScorer reads text alone"):
        columns(IFDScorer(model, processor.tokenizer), rows)
    with pytest.raises(UserError, match="without must be one of both, image"):
        ImageIFDScorer(model, processor, without="text")
    with pytest.raises(UserError, match="reads no images beside text"):
        ImageIFDScorer(model, processor.tokenizer)
    with pytest.raises(UserError, match="prompt_ppl is of rows of text alone"):
        ImageIFDScorer(model, processor, scores="prompt_ppl")
    with pytest.raises(UserError, match="has no place for them"):
        columns(ImageIFDScorer(model, processor), [{"instruction": "a", "output": "b", "image": picture(1)}])
    dataset = Dataset.from_list([{"messages": row["messages"]} for row in rows])
    with pytest.raises(UserError, match="calibrate runs rows of text under other prompts"):
        ImageIFDScorer(model, processor).calibrate(dataset)
    processor.tokenizer.save_pretrained(tmp_path)
    model.config.text_config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="does not load as one that reads images and text"):
        columns(ImageIFDScorer(str(tmp_path)), rows)


def test_a_processor_that_needs_torchvision_is_told_in_a_sentence(tmp_path, monkeypatch):
    MODELS["llava"][0].save_pretrained(tmp_path)

    def lacking(*_, **__):
        raise ImportError("SomeVideoProcessor requires the Torchvision library but it was not found.")

    monkeypatch.setattr("ifd_trainer.scoring.image_scorer.AutoProcessor.from_pretrained", lacking)
    with pytest.raises(
        NotInstalledError, match=r"needs a package that is missing .* torchvision has to be of the release"
    ):
        columns(ImageIFDScorer(str(tmp_path), device="cpu"), image_rows(1))


def test_images_that_the_model_refuses_are_told_from_the_rows_beside_them(caplog):
    model, processor = build("llava")
    forward = model.forward

    def picky(*args, pixel_values=None, **kwargs):
        if pixel_values is not None and len(pixel_values) > 3 * len(kwargs["input_ids"]):
            raise ValueError("this model takes three images")
        return forward(*args, pixel_values=pixel_values, **kwargs)

    model.forward = picky
    rows = image_rows(2) + image_rows(2, images=4) + image_rows(1, images=3)
    found = columns(ImageIFDScorer(model, processor), rows)
    assert found["ifd_status"] == ["ok", "ok", "too_many_images", "too_many_images", "ok"]
    assert "2 rows of a batch cannot be scored with their images" in caplog.text
    assert "row 2: the model does not take it (ValueError: this model takes three images)" in caplog.text
