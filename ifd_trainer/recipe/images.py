"""Rows with images as a recipe's trainer is given them: prompt and completion in parts, and a list of images.

What TRL's collator cannot render is left out here, and counted, as of rows of text; images are looked at when a row is
collated, and one that cannot be read is a status of its row (see `image_pool`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, Image, List, Value
from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from ..data.formats import MalformedRow, PromptFormat
from ..data.image_rows import IMAGE_CELLS, ImageRows, with_stored_images
from ..data.json_feature import Json
from ..errors import UserError
from ..method.number_words import many
from .rows import with_ids

logger = logging.getLogger(__name__)
_TRLS = ("messages", "conversations", "text")  # other forms of a row, which TRL's collator would take first


def sees_images(config: PretrainedConfig) -> bool:
    """Whether it is the config of a model that reads images and text, and that is no language model by itself."""
    return type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING


def prepare_images(
    rows: Dataset, format: PromptFormat, processor: Callable[[], Any], folder: Path | None = None
) -> tuple[Dataset, dict[Any, str]]:
    """Rows as TRL reads them, with an id and all columns that are none of the format's.

    Args:
        rows: rows with images.
        format: of the rows.
        processor: gives the processor whose chat template writes them.
        folder: where relative paths of images begin.

    Returns:
        The rows, and what is wrong with each that was left out, by its id.

    Raises:
        UserError: when no row can be rendered.
    """
    rows, ids = with_ids(rows)
    stored = with_stored_images(rows)
    read = [name for name in rows.column_names if name in {*format.columns, *IMAGE_CELLS, "tools"}]
    convert = _Convert(ImageRows(processor(), format), folder)
    problems = stored.select_columns(read).map(convert.check, remove_columns=read, desc="Checking rows")["problem"]
    bad = [i for i, problem in enumerate(problems) if problem]
    left_out = {}
    if bad:
        first = f"row {bad[0]}: {problems[bad[0]]}"
        if len(bad) == len(rows):
            raise UserError(f"None of {many(len(rows), 'row')} with images can be trained on; the first one, {first}.")
        said = "%s of %s with images cannot be trained on: left out of the pool; the first one, %s."
        logger.warning(said, f"{len(bad):,}", many(len(rows), "row"), first)
        left_out = dict(zip(rows.select(bad)[ids], [problems[i] for i in bad], strict=True))
        stored = stored.select(np.setdiff1d(np.arange(len(rows)), bad))
    gone = {*read, *_TRLS} & {*rows.column_names}
    removed = [name for name in gone if name not in ("prompt", "completion", "images")]
    kept = {name: kind for name, kind in stored.features.items() if name not in gone}
    first_row = stored.with_format(None)[0]
    kind = Value("string") if isinstance(convert(first_row)["prompt"], str) else List(Json())
    made = {"prompt": kind, "completion": kind, "images": List(Image())}
    features = Features(kept | made)
    return stored.map(convert, remove_columns=removed, features=features, desc="Formatting rows"), left_out


@dataclass(frozen=True)
class _Convert:
    """A row as TRL reads it, and what is wrong with one that cannot be."""

    read: ImageRows
    folder: Path | None

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        prompt, answer, images = self.read.parts(row)
        return {"prompt": prompt, "completion": answer, "images": [self._placed(image) for image in images]}

    def check(self, row: Mapping[str, Any]) -> dict[str, str]:
        """What is wrong with a row, "" for nothing."""
        try:
            if not self.read(row).whole.answer:
                return {"problem": "the row has no answer"}
        except MalformedRow as error:
            return {"problem": str(error) or "malformed"}
        return {"problem": ""}

    def _placed(self, image: Any) -> Any:
        """An image whose path begins at the root."""
        path = image.get("path") if isinstance(image, Mapping) else image
        if self.folder is None or not isinstance(path, str) or "://" in path:
            return image
        if isinstance(image, Mapping) and image.get("bytes") is not None:
            return image
        return str(self.folder / path)
