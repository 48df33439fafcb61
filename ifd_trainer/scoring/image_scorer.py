"""`ImageIFDScorer`: the `datasets.map` transform for rows whose prompts hold images.

The IFD of an answer (arXiv 2308.12032), which is text, conditioned on image and question. What the direct score leaves
out is a choice, and a question of its own:

    without="both"     ifd = s(A | I, Q) / s(A)        do image and question help?
    without="image"    ifd = s(A | I, Q) / s(A | Q)    does the image help, where the question is known?

The answer's tokens are the same in all of them. Only s(A | I, Q) has an image in it, so that each image is read and
encoded once; the others are texts, and run as all texts do.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import torch
from datasets.formatting.formatting import LazyBatch
from transformers import AutoModelForImageTextToText, AutoProcessor, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from ..data.encoding import EncodedPair, check_positive
from ..data.format_choice import FormatOptions
from ..data.formats import MalformedRow, PromptFormat, rows_of
from ..data.image_pairs import QUESTION, ImagePair, encode_image_rows
from ..data.image_rows import ImageExample, ImageRows, undecoded, without_image_parts
from ..errors import FileAccessError, UserError, one_line
from ..method.choices import WITHOUT, Without
from ..method.columns import IMAGE_COLUMNS
from ..method.equations import further_scores, ira
from ..method.further_scores import losses_read
from ..method.number_words import many
from ..method.reasons import Status
from .image_forwards import ProcessorReader, image_row_losses, need_image_processor, not_installed
from .losses import Scores
from .transform import IFDScorer
from .turns import EncodedTurns, answer_counts

logger = logging.getLogger(__name__)


class ImageIFDScorer(IFDScorer):
    """Attach IFD columns to rows with images: `ds.map(ImageIFDScorer(model), batched=True)`.

    For each row, with the answer's N tokens a_i, its image (or images) I and its question Q:

        cas = -1/N * sum_i log P(a_i | I, Q, a_<i)     qas = -1/N * sum_i log P(a_i | Q, a_<i)
        das = -1/N * sum_i log P(a_i | header, a_<i)   or qas, with without="image"
        ifd = cas / das                                image_gain = qas - cas

    Columns: those of `IFDScorer`, and `qas` and `image_gain` (float64, nats per token; null for a row without an
    image). Rows are messages, or prompt and completion, with images in a column `images` or `image`, or in the parts of
    messages; see `data.image_rows`. The last answer of a conversation is scored. Rows without an image may be among
    them, and are scored as `IFDScorer` scores them, but with without="image", where they are `no_image`.

    A row with an image that cannot be read is `unreadable_image`, one with more images than max_images, or than leave
    room in max_length, `too_many_images`; all others are scored. The first of each batch is named in a warning.

    Args:
        model: a hub name, a local path, or a loaded model that reads images and text.
        processor: of the model; by default loaded by the model's name.
        without: what the direct score leaves out: "both", image and question, or "image" alone.
        format: of the rows; told from the columns by default.
        max_length: most tokens of prompt and answer, those of the images among them; by default the model's window.
        max_images: most images of a row; by default as many as fit.
        min_answer_tokens: rows with fewer answer tokens are `too_short`.
        image_folder: where relative paths of images begin; by default the working directory.
        batch_size: rows with images in a forward.
        device, dtype, token_budget, revision, trust_remote_code: as of `IFDScorer`; the budget is that of texts.
        scores: further scores that follow from `cas` and `das`: `ira`, `answer_ppl`, `direct_ppl`.

    Raises:
        UserError: for options outside of their ranges, and a model or processor that reads no images.
        NotInstalledError: where the processor needs a package that is not there, such as torchvision.

    >>> ds = load_dataset("HuggingFaceH4/llava-instruct-mix-vsft", split="train")                 # doctest: +SKIP
    >>> ds = ds.map(ImageIFDScorer("llava-hf/llava-1.5-7b-hf", without="image"), batched=True)    # doctest: +SKIP
    """

    auto_class: ClassVar[Any] = AutoModelForImageTextToText
    more_columns: ClassVar[tuple[str, ...]] = IMAGE_COLUMNS

    def __init__(
        self,
        model: str | os.PathLike | PreTrainedModel,
        processor: Any = None,
        *,
        without: Without = "both",
        format: str | PromptFormat | FormatOptions | None = None,
        max_length: int | None = None,
        max_images: int | None = None,
        min_answer_tokens: int = 1,
        image_folder: str | os.PathLike | None = None,
        batch_size: int = 8,
        device: str | None = None,
        dtype: torch.dtype | str | None = None,
        token_budget: int | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        scores: str | Iterable[str] = (),
    ) -> None:
        if without not in WITHOUT:
            raise UserError(f"without must be one of {', '.join(WITHOUT)}, got {without!r}.")
        check_positive(max_images=max_images, batch_size=batch_size)
        super().__init__(
            model,
            None if processor is None else need_image_processor(processor).tokenizer,
            format=format,
            max_length=max_length,
            min_answer_tokens=min_answer_tokens,
            device=device,
            dtype=dtype,
            token_budget=token_budget,
            revision=revision,
            trust_remote_code=trust_remote_code,
            scores=scores,
        )
        if lacking := [name for name in self.scores if losses_read([name])]:
            raise UserError(f"{', '.join(lacking)} is of rows of text alone: leave it out of scores.")
        self.without, self.max_images, self.batch_size = without, max_images, batch_size
        self.image_folder = None if image_folder is None else Path(image_folder)
        self.processor = processor
        self._processor: Any = None
        self._warned = False

    def __call__(
        self, batch: Mapping[str, list] | pa.Table, rank: int | None = None, *more: Any
    ) -> dict[str, list] | pa.Table:
        """Columns for a batch of rows, or a whole Arrow table with them; see `IFDScorer`."""
        return super().__call__(undecoded(batch) if isinstance(batch, LazyBatch) else batch, rank, *more)

    def encode_rows(self, batch: Mapping[str, list], rank: int | None = None) -> EncodedTurns:
        """Render and tokenise a batch; images are read once they are scored. Loads the model on first use."""
        return super().encode_rows(undecoded(batch), rank)

    def encode(self, batch: Mapping[str, list], rank: int | None = None) -> list[EncodedPair]:
        """The rows of a batch, rendered and tokenised; loads the model on first use."""
        return super().encode(undecoded(batch), rank)

    def score(self, pairs: list[EncodedPair], progress: Callable[[int], Any] | None = None) -> Scores:
        """Scores of encoded rows; `progress` is called with the number of tokens done after each batch."""
        reader = ProcessorReader(self._image_processor(), pairs, self._encoder.max_length, self.image_folder)
        options = {"batch_size": self.batch_size, "token_budget": self.token_budget, "progress": progress}
        losses, tokens, status = image_row_losses(self._model, pairs, reader, **options)
        self._say_what_is_refused(reader)
        if self.without == "image":
            losses[QUESTION] = losses["das"]
        further = {QUESTION: losses[QUESTION], "image_gain": ira(losses["cas"], losses[QUESTION])}
        further |= further_scores(self.scores, losses)
        return Scores.from_nll(losses["cas"], losses["das"], tokens, status, losses["eot_loss"], further)

    def settings(self, columns: Iterable[str]) -> dict[str, str | int | bool | None]:
        """The options in force for rows with these columns; see `IFDScorer.settings`."""
        folder = None if self.image_folder is None else str(self.image_folder)
        return super().settings(columns) | {
            "without": self.without,
            "max_images": self.max_images,
            "image_folder": folder,
        }

    def _need_text(self, batch: Mapping[str, list]) -> None:
        """Images are what this scorer reads."""

    def _encoded(self, batch: Mapping[str, list], format: PromptFormat) -> tuple[list[EncodedPair], str | None]:
        render, first = ImageRows(self._image_processor(), format), None
        examples: list[ImageExample | None] = []
        for row in rows_of(batch):
            try:
                examples.append(render(row))
            except MalformedRow as error:
                first = first or error
                examples.append(None)
        encoder = replace(self._encoder, max_length=None, window=None)
        pairs, unlike = encode_image_rows(examples, encoder, self.max_images)
        pairs = [self._limited(pair) for pair in pairs]
        error, given = first or unlike, [pair.status.value for pair in pairs]
        problem = self._problem(pairs, given, error, format)
        if error is not None and problem is None and not self._warned:
            self._warned = True
            malformed = given.count(Status.MALFORMED.value)
            logger.warning("%s of a batch cannot be rendered; the first one: %s.", many(malformed, "row"), error)
        return pairs, problem

    def _limited(self, pair: EncodedPair) -> EncodedPair:
        """A pair with the direct segment that is asked for; one of text alone within max_length."""
        if pair.conditioned is None:
            return pair
        if isinstance(pair, ImagePair):
            return pair if self.without == "both" else replace(pair, direct=pair.more[QUESTION], more={})
        if self.without == "image":
            return EncodedPair.unscorable(Status.NO_IMAGE)
        longest, given = self._encoder.max_length, pair.conditioned
        if longest is None or len(given.ids) <= longest:
            return pair
        return EncodedPair.unscorable(Status.PROMPT_TOO_LONG if given.start >= longest else Status.TRUNCATED)

    def _answer_counts(self, batch: Mapping[str, list]) -> list[int]:
        format = self._format(batch)
        return answer_counts(without_image_parts(batch, format.columns), format, self._image_processor())

    def _say_what_is_refused(self, reader: ProcessorReader) -> None:
        """Say once what is wrong with the first row whose images cannot be scored."""
        if reader.problem is None or self._warned:
            return
        self._warned = True
        row, problem = reader.problem
        logger.warning(
            "%s of a batch cannot be scored with their images, and have a status that says so; the first one, row %d: "
            "%s.",
            many(len(reader.statuses), "row"),
            row,
            problem,
        )

    def _reading(self, rows: Any, caller: str) -> dict[str, Any]:
        raise UserError(
            f"{caller} runs rows of text under other prompts or with other texts, which says nothing of rows with "
            "images: no model measures it of them."
        )

    def _check_config(self, config: PretrainedConfig) -> None:
        own = "AutoModelForImageTextToText" in (getattr(config, "auto_map", None) or {})
        if not own and type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
            raise UserError(
                f"{self.name} is a model of the type {config.model_type!r}, which transformers does not load as one "
                "that reads images and text (AutoModelForImageTextToText). Score rows of text with IFDScorer."
            )

    def _tokenizer(self) -> Any:
        return self._image_processor().tokenizer

    def _image_processor(self) -> Any:
        """The processor, read by the model's name where none was given."""
        if self.processor is not None:
            return self.processor
        if self._processor is None:
            source = self.name or self._config.name_or_path
            if not source:
                raise UserError("Pass the processor too: the loaded model does not say where it came from.")
            try:
                self._processor = need_image_processor(AutoProcessor.from_pretrained(source, **self.hub))
            except ImportError as error:
                raise not_installed(str(source), error) from error
            except (OSError, ValueError) as error:
                if isinstance(error, UserError):
                    raise
                raise FileAccessError(f"{source} has no processor that can be read: {one_line(error)}") from error
        return self._processor

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name not in ("_processor", "_warned")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._processor, self._warned = None, False

    def __repr__(self) -> str:
        model = self.name or type(self._model).__name__
        return f"ImageIFDScorer({model!r}, without={self.without!r}, format={self.format!r})"
