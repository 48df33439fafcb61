"""Rows with images: which images a row has, where they stand in its messages, and the same row without them.

Images are in a column `images` (a list) or `image`, or inside the parts of messages. They stand

- where a message has a part of the type `image`,
- where a text says `<image>`, as LLaVA's files do, or
- before the first message of the user, where neither is there,

which is TRL's rule but for the second. What a processor makes of such a place is its own affair: rows are rendered by
the processor's chat template.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Image, List

from ..errors import NotInstalledError, UserError, shown_value, with_kind
from .chat_template import MalformedRow, split_chat, template_options
from .formats import ChatFormat, Example, PromptCompletionFormat, PromptFormat, rows_of

IMAGE_CELLS = ("images", "image")
_LOOKED_AT = 1000  # rows at a time
_MARKER = "<image>"  # in texts of files in LLaVA's format
_MARK = "IFDx7image"  # stands for an image while messages are read as texts


class UnreadableImage(UserError):
    """An image that is not there, or is none."""


@dataclass(frozen=True, slots=True)
class ImageExample:
    """One rendered row with images.

    Attributes:
        whole: prompt and answer as the processor's template writes them, a placeholder where an image stands.
        without: the same without its images; None for a row without images.
        images: as the row holds them, in the order of their places.
    """

    whole: Example
    without: Example | None = None
    images: tuple[Any, ...] = ()


@dataclass(frozen=True)
class ImageRows:
    """Renders rows with images.

    Args:
        processor: of a `transformers` model that reads images and text.
        format: of the rows: chats, or prompt and completion.

    Raises:
        UserError: for another format, and for a processor without a chat template where rows are chats.
    """

    processor: Any
    format: PromptFormat

    def __post_init__(self) -> None:
        if not isinstance(self.format, (ChatFormat, PromptCompletionFormat)):
            raise UserError(
                f"The rows have images and are in the format {self.format.name!r}, which has no place for them. Write "
                "them as messages, or as prompt and completion."
            )

    def __call__(self, row: Mapping[str, Any]) -> ImageExample:
        """The row, rendered with its images and without.

        Raises:
            MalformedRow: for a row that cannot be rendered, an image in an answer, and images that are more or fewer
                than the places for them.
        """
        prompt, answer, images = self.parts(row)
        if isinstance(prompt, str):
            return self._of_texts(prompt, answer, images)
        if isinstance(self.format, ChatFormat) and not answer:
            return ImageExample(Example("", ""))
        if not getattr(self.processor, "chat_template", None):
            raise UserError(
                f"The rows are chat messages, but the {type(self.processor).__name__} has no chat template. Set "
                "`processor.chat_template`."
            )
        render = partial(self._rendered, answer=answer, options=template_options(row, self.processor))
        whole = render(prompt)
        if not images:
            return ImageExample(whole)
        bare = render([_without(message) for message in prompt])
        whole, without = (replace(example, asked=True) for example in (whole, bare))  # an image without a word asks
        return ImageExample(whole, without, tuple(images))

    def parts(self, row: Mapping[str, Any]) -> tuple[str | list[dict], str | list[dict], list[Any]]:
        """Prompt, answer and images of a row: two texts, or two lists of messages whose contents are parts.

        Raises:
            MalformedRow: see there.
        """
        images = image_cells(row)
        texts, inside = _marked(row, self.format.columns)
        prompt, answer = self.format.parts(texts)
        if isinstance(prompt, str):
            return prompt, answer, images
        if any(_MARK in str(message.get("content")) for message in answer):
            raise MalformedRow("the answer holds an image, and only the text of an answer is scored")
        placed = _placed(prompt, len(images), len(inside))
        images = _in_order(placed, inside, images)
        return [_in_parts(message) for message in placed], [_in_parts(message) for message in answer], images

    def _rendered(self, prompt: list[dict], answer: list[dict], options: dict[str, Any]) -> Example:
        before, rest, frame = split_chat(prompt, answer, options, _Template(self.processor))
        asked = any(
            part.get("text", "").strip()
            for message in prompt
            if message["role"] != "assistant"
            for part in message["content"]
        )
        return Example(before, rest, frame.before, special_tokens=False, end=frame.after, asked=asked)

    def _of_texts(self, prompt: str, answer: str, images: list[Any]) -> ImageExample:
        """Prompt and completion as texts, in which the processor's own placeholders stand."""
        row = {"prompt": prompt, "completion": answer}
        plain = PromptCompletionFormat(header=getattr(self.format, "header", None))
        whole = replace(plain.render(row, None), special_tokens=False)
        if not images:
            return ImageExample(whole)
        placeholder = getattr(self.processor, "image_token", None)
        places = prompt.count(placeholder) if placeholder else 0
        if places != len(images):
            raise MalformedRow(
                f"the row has {len(images)} images, and its prompt {places} placeholders {placeholder!r} of the "
                f"{type(self.processor).__name__}"
            )
        without = prompt.replace(f"{placeholder}\n", "").replace(placeholder, "")  # with the line that it stands on
        bare = plain.render(row | {"prompt": without}, None)
        whole, bare = (replace(example, special_tokens=False, asked=True) for example in (whole, bare))
        return ImageExample(whole, bare, tuple(images))


@dataclass(frozen=True)
class _Template:
    """A processor as far as `split_chat` asks: its chat template, and its tokenizer's EOS."""

    processor: Any

    @property
    def eos_token(self) -> str | None:
        return getattr(self.processor.tokenizer, "eos_token", None)

    def apply_chat_template(self, messages: list[dict], **options: Any) -> str:
        return self.processor.apply_chat_template(messages, **options)


def image_cells(row: Mapping[str, Any]) -> list[Any]:
    """The images in a row's own columns, as they are stored.

    >>> image_cells({"image": "cat.png"}), image_cells({"images": None})
    (['cat.png'], [])

    Raises:
        MalformedRow: for a row with both columns filled.
    """
    found = [_as_list(row[name]) for name in IMAGE_CELLS if name in row]
    if sum(map(bool, found)) > 1:
        raise MalformedRow("the row has both `image` and `images`")
    return next(filter(None, found), [])


def has_images(columns: Iterable[Any]) -> bool:
    """Whether any of the cells of image columns holds an image."""
    return any(_as_list(cell) for cell in columns)


def hold_images(rows: Dataset) -> bool:
    """Whether any row of a data set has an image in a column of images; none is decoded."""
    names = [name for name in IMAGE_CELLS if name in rows.column_names]
    if not names:
        return False
    batches = rows.select_columns(names).with_format("arrow").iter(_LOOKED_AT)
    return any(has_images(batch[name].to_pylist()) for batch in batches for name in names)


def with_stored_images(rows: Dataset) -> Dataset:
    """A data set whose images are read as they are stored, for whoever decodes them by `read_image`."""
    for name in IMAGE_CELLS:
        kind = rows.features.get(name)
        inner = getattr(kind, "feature", None)
        if isinstance(kind, Image):
            rows = rows.cast_column(name, Image(decode=False))
        elif isinstance(inner, Image):
            rows = rows.cast_column(name, List(Image(decode=False)))
    return rows


def stored_images(batch: Mapping[str, list]) -> dict[str, list]:
    """The image columns of a batch as they are stored.

    `datasets.map` decodes an image once a column is read, and stops at one that is damaged.
    """
    table = getattr(batch, "pa_table", None)
    return {name: batch[name] if table is None else table[name].to_pylist() for name in IMAGE_CELLS if name in batch}


def undecoded(batch: Mapping[str, list]) -> dict[str, list]:
    """A batch with its images as they are stored."""
    stored = stored_images(batch)
    return {name: stored[name] if name in stored else batch[name] for name in batch}


def read_image(cell: Any, folder: Path | None = None) -> Any:
    """An image as PIL has it, in RGB.

    Args:
        cell: an image of PIL, bytes, a path, `{"bytes": ..., "path": ...}` as `datasets` stores it, an array, or a
            `data:` address.
        folder: where relative paths begin.

    Raises:
        UnreadableImage: says what is wrong with it.
        NotInstalledError: where the package Pillow is missing.
    """
    try:
        import PIL.Image
        import PIL.ImageOps
    except ImportError as error:
        raise NotInstalledError("Rows with images need the package Pillow: pip install pillow.") from error

    try:
        given = isinstance(cell, PIL.Image.Image)
        image = cell if given else PIL.ImageOps.exif_transpose(_opened(cell, folder, PIL.Image))
        return image.convert("RGB")  # which reads all of it
    except UnreadableImage:
        raise
    except Exception as error:  # PIL raises OSError, ValueError, SyntaxError and errors of its own for damaged files
        raise UnreadableImage(f"the image {_shown(cell)} cannot be read ({with_kind(error)})") from error


def _opened(cell: Any, folder: Path | None, kind: Any) -> Any:
    """An image opened, not read yet."""
    if isinstance(cell, Mapping):
        stored = [cell.get(name) for name in ("bytes", "path", "image", "url")]
        cell = next((value for value in stored if value is not None), None)
    if isinstance(cell, str) and cell.startswith("data:"):
        cell = base64.b64decode(cell.partition(",")[2], validate=True)
    if isinstance(cell, str) and "://" in cell:
        raise UnreadableImage(f"the image {shown_value(cell)} is an address, and nothing is loaded from the net")
    if isinstance(cell, (bytes, bytearray)):
        return kind.open(io.BytesIO(cell))
    if isinstance(cell, (str, Path)):
        return kind.open(cell if folder is None else folder / cell)
    if isinstance(cell, (list, np.ndarray)):
        return kind.fromarray(np.asarray(cell, dtype=np.uint8))
    raise UnreadableImage(f"{_shown(cell)} is no image")


def _shown(cell: Any) -> str:
    if isinstance(cell, Mapping) and cell.get("path"):
        return shown_value(cell["path"])
    return shown_value(cell) if isinstance(cell, (str, Path)) or cell is None else f"of type {type(cell).__name__}"


def _as_list(cell: Any) -> list[Any]:
    if cell is None or (isinstance(cell, str) and not cell):
        return []
    return list(cell) if isinstance(cell, (list, tuple)) else [cell]


def without_images(row: Mapping[str, Any], placeholder: str | None) -> dict[str, Any]:
    r"""A row as TRL reads it, without its images and their places.

    Args:
        placeholder: what stands for an image in texts.

    >>> without_images({"image": "cat.png", "prompt": "<image>\nWhat?"}, "<image>")
    {'prompt': 'What?', 'images': []}
    """

    def bare(cell: Any) -> Any:
        if isinstance(cell, str) and placeholder:
            return cell.replace(f"{placeholder}\n", "").replace(placeholder, "")
        if isinstance(cell, (list, tuple)):
            return [bare(turn) for turn in cell if not (isinstance(turn, Mapping) and turn.get("type") == "image")]
        if isinstance(cell, Mapping) and "content" in cell:
            return {**cell, "content": bare(cell["content"])}
        return cell

    return {name: bare(cell) for name, cell in row.items() if name not in IMAGE_CELLS} | {"images": []}


def without_image_parts(batch: Mapping[str, list], columns: Sequence[str]) -> dict[str, list]:
    """These columns of a batch of rows, a text in the place of each part that is an image."""
    rows = [_marked(row, columns)[0] for row in rows_of({name: batch[name] for name in columns})]
    return {name: [row[name] for row in rows] for name in columns}


def _marked(row: Mapping[str, Any], columns: Sequence[str]) -> tuple[dict[str, Any], list[Any]]:
    """The row with a mark for each part that is an image, and what these parts hold; None for a mere place."""
    inside: list[Any] = []

    def of_part(part: Any) -> Any:
        if not isinstance(part, Mapping) or part.get("type") != "image":
            return part
        held = [part.get(name) for name in ("image", "path", "url", "base64")]
        inside.append(next((value for value in held if value is not None), None))
        return {"type": "text", "text": _MARK}

    def of_turn(turn: Any) -> Any:
        if not isinstance(turn, Mapping) or not isinstance(turn.get("content"), (list, tuple)):
            return turn
        return {**turn, "content": [of_part(part) for part in turn["content"]]}

    texts = dict(row)
    for name in columns:
        if isinstance(row.get(name), (list, tuple)):
            texts[name] = [of_turn(turn) for turn in row[name]]
    return texts, inside


def _placed(messages: list[dict], images: int, marked: int) -> list[dict]:
    """Messages with a mark for each image."""
    if not images or marked:
        return messages
    users = [number for number, message in enumerate(messages) if message["role"] == "user"]
    said = sum(str(messages[number].get("content")).count(_MARKER) for number in users)
    if not users or said not in (0, images):
        places = f"{said} places {_MARKER}" if users else "no message of a user"
        raise MalformedRow(f"the row has {images} images, and {places}")
    placed = list(messages)
    for number in users if said else users[:1]:
        text = messages[number].get("content") or ""
        parts = [part.strip("\n") for part in text.split(_MARKER)] if said else [""] * images + [text]
        placed[number] = messages[number] | {"content": _MARK.join(parts)}
    return placed


def _in_parts(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message whose content is a list of parts."""
    texts = str(message.get("content") or "").split(_MARK)
    parts: list[dict[str, Any]] = []
    for number, text in enumerate(texts):
        parts += [{"type": "image"}] if number else []
        parts += [{"type": "text", "text": text}] if text or len(texts) == 1 else []
    return {**message, "content": parts}


def _without(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message of parts without those that are images."""
    texts = [part for part in message["content"] if part["type"] != "image"]
    return {**message, "content": texts or [{"type": "text", "text": ""}]}


def _in_order(messages: list[dict], inside: list[Any], images: list[Any]) -> list[Any]:
    """The images in the order of their places: those that parts hold, and the row's own in the other places."""
    places = sum(str(message.get("content")).count(_MARK) for message in messages)
    held = inside or [None] * places
    if (free := sum(each is None for each in held)) != len(images):
        raise MalformedRow(f"the row has {len(images)} images, and {free} places for them")
    rest = iter(images)
    return [next(rest) if each is None else each for each in held]
