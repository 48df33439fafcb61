"""Two tiny models that see, of two families, with their processors: built in the process, without torchvision."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import build_tokenizer
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% for p in m['content'] %}{% if p['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ p['text'] }}{% endif %}"
    "{% endfor %}{{ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_TOKENS = ["<|im_start|>", "<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
_SIGHT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
FAMILIES = ("llava", "idefics3")


def build(family: str, seed: int = 0, **text: Any) -> tuple[PreTrainedModel, Any]:
    """A model and its processor: LLaVA puts 4 tokens in the place of an image, Idefics3 one between three others."""
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": _TOKENS})
    tokenizer.chat_template = None
    size = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    size |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    language = LlamaConfig(**size | {"bos_token_id": 3, "eos_token_id": 2, "pad_token_id": 0} | text)
    image = tokenizer.convert_tokens_to_ids("<image>")
    if family == "llava":
        pixels = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
        options = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
        processor = LlavaProcessor(pixels, tokenizer, chat_template=TEMPLATE, **options)
        config = LlavaConfig(
            vision_config=CLIPVisionConfig(**_SIGHT),
            text_config=language,
            image_token_index=image,
            vision_feature_layer=-1,
        )
        made = LlavaForConditionalGeneration
    else:
        edge = {"longest_edge": 16}
        pixels = Idefics3ImageProcessorPil(size=edge, max_image_size=edge, do_image_splitting=False)
        processor = Idefics3Processor(pixels, tokenizer, image_seq_len=1, chat_template=TEMPLATE)
        config = Idefics3Config(vision_config=_SIGHT, text_config=language, image_token_id=image, scale_factor=2)
        made = Idefics3ForConditionalGeneration
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = made(config).eval()
        for name, weight in model.named_parameters():  # large enough for images to make a difference
            if weight.dim() > 1:
                weight.data.normal_(0, 0.4 if "vision" not in name else 0.6)
    return model, processor


def saved(family: str, folder: Path) -> str:
    """A folder with a tiny model of a family and its processor."""
    model, processor = build(family)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def picture(seed: int, size: tuple[int, int] = (24, 20)) -> Image.Image:
    """An image of noise."""
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def image_rows(count: int, images: int = 1) -> list[dict[str, Any]]:
    """Rows with `images` images each, a question and an answer, each unlike any other."""
    words = ("cat", "dog", "ball", "park", "red", "blue", "three", "numbers")
    return [
        {
            "row_id": 100 + i,
            "images": [picture(10 * i + n) for n in range(images)],
            "messages": [
                {"role": "user", "content": f"Question {i}: what is {words[i % 8]}?"},
                {"role": "assistant", "content": f"The {words[(3 * i + 1) % 8]} is {words[(5 * i + 2) % 8]} {i}."},
            ],
        }
        for i in range(count)
    ]


def stored_rows(rows: list[dict[str, Any]]) -> Dataset:
    """Rows whose images are PNG files in them, as `datasets` stores them; those that are stored already as they are."""

    def stored(image: Any) -> dict[str, Any]:
        if isinstance(image, dict):
            return image
        image.save(file := io.BytesIO(), format="PNG")
        return {"bytes": file.getvalue(), "path": None}

    cells = [{**row, "images": [stored(image) for image in row["images"]]} for row in rows]
    return Dataset.from_list(cells).cast_column("images", [ImageFeature()])


def by_hand(model: PreTrainedModel, processor: Any, row: dict[str, Any], given: str) -> float:
    """Mean loss of a row's last answer by a plain forward of this row alone: given "both", "question" or "nothing"."""
    *asked, said = row["messages"]
    text = ""
    for message in asked if given != "nothing" else []:
        seen = "<image>\n" * len(row["images"]) if message is asked[0] and given == "both" else ""
        text += f"<|im_start|>{message['role']}\n{seen}{message['content']}<|im_end|>\n"
    text += "<|im_start|>assistant\n"
    images = [row["images"]] if given == "both" and row["images"] else None
    inputs = processor(text=[text + said["content"]], images=images, return_tensors="pt", add_special_tokens=False)
    if images is None and given != "nothing":
        inputs = {name: value for name, value in inputs.items() if name in ("input_ids", "attention_mask")}
    answer = len(processor.tokenizer(said["content"], add_special_tokens=False)["input_ids"])
    bos = torch.tensor([[3]])  # none is written by this template
    assert inputs["input_ids"][0, 0] != bos
    with torch.no_grad():
        logits = model(**inputs).logits[0].double()
    ids = inputs["input_ids"][0]
    places = range(len(ids) - answer, len(ids))
    return float(np.mean([-torch.log_softmax(logits[i - 1], -1)[ids[i]].item() for i in places]))
