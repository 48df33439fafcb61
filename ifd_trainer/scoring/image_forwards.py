"""Losses of answers whose prompts hold images: forwards with all that a processor made of a batch of rows.

Nothing is known here of how a model sees: a batch goes through the model's own forward, padded, with `pixel_values` and
whatever else its processor or a trainer's collator returned. An image is read, and encoded, in the one forward of its
row that has it; what is scored without it are texts like any other, for the engines of `scoring.engine`.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from ..data.chat_template import MalformedRow
from ..data.encoding import EncodedPair, Segment, with_ending
from ..data.image_pairs import QUESTION, ImagePair, SeenPair
from ..data.image_rows import UnreadableImage, read_image
from ..errors import NotInstalledError, UserError, one_line, with_kind
from ..method.reasons import Status
from .engine import Engine, model_device
from .eval_guard import eval_mode
from .forward import Batch, LaunchedBatch
from .losses import answer_tokens, nll_with_tails, statuses
from .model_parts import unwrapped

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReadBatch:
    """Rows as a model reads them.

    Attributes:
        rows: (n,) their positions; none where nothing of a batch could be read.
        segments: of each, all of its tokens up to the end of its turn.
        inputs: of the model, padded: `input_ids` and `attention_mask` (n, T), and what else there is.
    """

    rows: np.ndarray
    segments: list[Segment] = field(default_factory=list)
    inputs: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def laid_out(self, dtype: torch.dtype) -> Batch:
        """The batch on the host, its pixels in the model's dtype."""
        ids, mask = (self.inputs[name].numpy() for name in ("input_ids", "attention_mask"))
        places = [
            row * ids.shape[1] + np.flatnonzero(attended)[: len(segment.ids)]
            for row, (attended, segment) in enumerate(zip(mask, self.segments, strict=True))
        ]
        more = {name: value for name, value in self.inputs.items() if isinstance(value, torch.Tensor)}
        more = {name: value.to(dtype) if value.is_floating_point() else value for name, value in more.items()}
        batch = Batch.from_segments(self.segments, ids, places)
        return replace(batch, more={name: value for name, value in more.items() if name not in ("input_ids", "labels")})


class NotTogether(Exception):
    """Rows that cannot be read as one batch: each may be, or the error is of one of them."""


class Reader(Protocol):
    """What reads the rows of a batch, images and all.

    Attributes:
        statuses: of the rows that could not be read, by their positions.
    """

    statuses: dict[int, Status]

    def __call__(self, rows: np.ndarray) -> ReadBatch:
        """Those of the rows that can be read; raises NotTogether for several that cannot be told apart."""
        ...

    def refuse(self, row: int, problem: str) -> None:
        """A row that the model does not take."""
        ...


def image_losses(
    model: nn.Module,
    batches: Sequence[np.ndarray],
    rows: int,
    read: Reader,
    device: torch.device,
    progress: Callable[[np.ndarray], Any] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Mean losses of answers given their prompts and images, and losses of the ends of their turns, (n,) each, in nats.

    Args:
        model: what the processor belongs to; put into eval mode and back.
        batches: positions of the rows that share a forward. One that does not fit in memory, or that the model or its
            processor refuse, is run in halves.
        rows: n; NaN stands for those that are in no batch, or could not be read.
        read: reads the rows of a batch.
        device: where the model runs.
        progress: called with the positions of the rows done after each batch.

    Raises:
        torch.OutOfMemoryError: when one row alone does not fit.
    """
    nll, ends = np.full(rows, np.nan), np.full(rows, np.nan)
    if not batches:
        return nll, ends
    with eval_mode(model, device):
        engine = Engine.for_model(model, device, "padded")
        dtype = getattr(unwrapped(model), "dtype", None) or next(model.parameters()).dtype
        queue = [np.asarray(batch) for batch in batches][::-1]
        while queue:
            wanted = queue.pop()
            found = _read_and_run(engine, dtype, wanted, read)
            if found is None:
                half = len(wanted) // 2
                queue += [wanted[half:], wanted[:half]]
                continue
            done, launched = found
            if launched is not None:
                nll[done], ends[done] = launched.nll(), launched.tail_nll()
            if progress is not None:
                progress(wanted)
    return nll, ends


def _read_and_run(
    engine: Engine, dtype: torch.dtype, rows: np.ndarray, read: Reader
) -> tuple[np.ndarray, LaunchedBatch | None] | None:
    """The rows that could be read and what was launched of them; None where the rows have to be run in halves."""
    try:
        found = read(rows)
        if not len(found.rows):
            return found.rows, None
        launched = engine.launch(found.laid_out(dtype))
        launched.wait()
        return found.rows, launched
    except NotTogether:
        return None
    except torch.OutOfMemoryError as error:
        if len(rows) == 1:
            raise torch.OutOfMemoryError(
                f"Out of memory on {engine.device} while scoring a single row with images. Lower max_length or "
                "max_images, or let the processor make images smaller."
            ) from error
        logger.warning("Out of memory on %s with %d rows with images: going on with half.", engine.device, len(rows))
    except UserError:
        raise
    except ValueError as error:  # what models raise for images that they do not take
        if len(rows) == 1:
            read.refuse(int(rows[0]), f"the model does not take it ({with_kind(error)})")
            return rows[:0], None
    return None


def image_row_losses(
    model: nn.Module,
    pairs: Sequence[EncodedPair],
    read: Reader,
    batch_size: int,
    device: torch.device | None = None,
    progress: Callable[[int], Any] | None = None,
    **options: Any,
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Losses of encoded rows with images and without, by name, (n,) each: `cas`, `das`, `qas` and `eot_loss`.

    A loss that a row does not have is NaN.

    Args:
        model: what the processor belongs to.
        pairs: n encoded rows; those with images are `SeenPair`.
        read: reads them.
        batch_size: rows with images in a forward.
        device: where the model runs.
        progress: called with the number of tokens done after each batch.
        options: of texts, see `losses.Options`.

    Returns:
        The losses, and of each row the answer's tokens and the status, (n,).
    """
    device = device or model_device(model)
    losses = {name: np.full(len(pairs), np.nan) for name in ("cas", "das", QUESTION, "eot_loss")}
    seen = [row for row, pair in enumerate(pairs) if isinstance(pair, SeenPair)]

    def done(rows: np.ndarray) -> None:
        if progress is not None:
            progress(sum(len(with_ending(pairs[row]).ids) for row in rows))

    batches = _batches(pairs, seen, batch_size)
    losses["cas"], losses["eot_loss"] = image_losses(model, batches, len(pairs), read, device, done)
    status, tokens = statuses(pairs), answer_tokens(pairs)
    for row, refused in read.statuses.items():
        status[row], tokens[row] = refused.value, 0
    scored = np.flatnonzero(status == Status.OK.value).tolist()
    texts = [("das", row, pairs[row].direct) for row in scored]
    texts += [("cas", row, with_ending(pairs[row])) for row in scored if not isinstance(pairs[row], SeenPair)]
    texts += [(QUESTION, row, pairs[row].more[QUESTION]) for row in scored if QUESTION in pairs[row].more]
    segments = [segment for *_, segment in texts]
    nll, ends = nll_with_tails(model, segments, device=device, progress=progress, **options)
    for (name, row, _), loss, end in zip(texts, nll.tolist(), ends.tolist(), strict=True):
        losses[name][row] = loss
        if name == "cas":
            losses["eot_loss"][row] = end
    return losses, tokens, status


def _batches(pairs: Sequence[SeenPair], rows: Sequence[int], size: int) -> list[np.ndarray]:
    """Rows that share a forward, at most `size`: of equally many images, and of like length, the longest first."""
    order = sorted(rows, key=lambda row: (-len(pairs[row].images), -len(pairs[row].conditioned.ids), row))
    batches: list[list[int]] = []
    for row in order:
        if batches and len(batches[-1]) < size and len(pairs[batches[-1][0]].images) == len(pairs[row].images):
            batches[-1].append(row)
        else:
            batches.append([row])
    return [np.array(batch) for batch in batches]


@dataclass
class ProcessorReader:
    """Reads rows with the processor of a model; those that cannot be read get a status.

    Args:
        processor: of the model.
        pairs: of all rows.
        longest: most tokens of a row, those of its images among them; None for no limit.
        folder: where relative paths of images begin.

    Attributes:
        statuses: of the rows that were not read, by their positions.
        problem: what is wrong with the first of them, and its position.
        tokens: of the rows that were read, those that the model reads.
    """

    processor: Any
    pairs: Sequence[ImagePair]
    longest: int | None = None
    folder: Path | None = None
    statuses: dict[int, Status] = field(default_factory=dict)
    problem: tuple[int, str] | None = None

    def __call__(self, rows: np.ndarray) -> ReadBatch:
        """The rows of a batch that can be read."""
        images = {}
        for row in rows.tolist():
            try:
                images[row] = [read_image(cell, self.folder) for cell in self.pairs[row].images]
            except UnreadableImage as error:
                self._note(row, Status.UNREADABLE_IMAGE, str(error))
        left = list(images)
        while left:
            inputs = self._processed(left, images)
            if inputs is None:
                break
            segments = [self._segment(row, ids) for row, ids in zip(left, unpadded(inputs), strict=True)]
            if all(segments):
                return ReadBatch(np.array(left), segments, inputs)
            left = [row for row, segment in zip(left, segments, strict=True) if segment]
        return ReadBatch(np.array([], dtype=np.int64))

    def refuse(self, row: int, problem: str) -> None:
        """A row that is not taken: for its images, where it has several."""
        several = len(self.pairs[row].images) > 1
        self._note(row, Status.TOO_MANY_IMAGES if several else Status.MALFORMED, problem)

    def _processed(self, rows: list[int], images: Mapping[int, list[Any]]) -> Mapping[str, torch.Tensor] | None:
        """What the processor makes of rows; None for a single one that it does not take."""
        try:
            with _padding_given_back(self.processor.tokenizer):
                return self.processor(
                    text=[self.pairs[row].text for row in rows],
                    images=[images[row] for row in rows],
                    padding=True,
                    padding_side="right",
                    return_tensors="pt",
                    add_special_tokens=False,
                )
        except ImportError as error:
            raise not_installed(self.processor, error) from error
        except Exception as error:  # of whatever kind a processor raises for a row that it does not take
            if len(rows) > 1:
                raise NotTogether from error
            self.refuse(rows[0], f"the processor does not take it ({with_kind(error)})")
            return None

    def _segment(self, row: int, ids: list[int]) -> Segment | None:
        """The row in the processor's tokens; None where it is refused."""
        pair = self.pairs[row]
        try:
            segment = pair.aligned(ids)
        except MalformedRow as error:
            return self._note(row, Status.MALFORMED, str(error))
        if self.longest is not None and segment.start + segment.scored > self.longest:
            alone = pair.conditioned
            if len(pair.images) > 1 and len(alone.ids) <= self.longest:
                return self._note(row, Status.TOO_MANY_IMAGES)
            return self._note(row, Status.PROMPT_TOO_LONG if segment.start >= self.longest else Status.TRUNCATED)
        return segment

    def _note(self, row: int, status: Status, problem: str | None = None) -> None:
        self.statuses[row] = status
        if problem is not None and self.problem is None:
            self.problem = row, problem


def unpadded(inputs: Mapping[str, torch.Tensor]) -> list[list[int]]:
    """Token ids of each row of a batch, without padding."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    return [row[kept.bool()].tolist() for row, kept in zip(ids, mask, strict=True)]


@contextlib.contextmanager
def _padding_given_back(tokenizer: Any) -> Iterator[None]:
    """Leave the tokenizer as it was: how it pads is a part of it, and of what `datasets` knows it by."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    before = None if backend is None else backend.padding
    try:
        yield
    finally:
        if backend is not None:
            backend.no_padding() if before is None else backend.enable_padding(**before)


def not_installed(processor: Any, error: ImportError) -> NotInstalledError:
    """The error of a processor that needs another package, such as torchvision, in a sentence."""
    name = processor if isinstance(processor, str) else type(processor).__name__
    return NotInstalledError(
        f"The processor of images, {name}, needs a package that is missing or cannot be imported here: "
        f"{one_line(error)}. torchvision has to be of the release that belongs to the installed torch."
    )


def need_image_processor(processor: Any) -> Any:
    """The processor, if it reads images and has a tokenizer.

    Raises:
        UserError: for anything else.
    """
    if getattr(processor, "tokenizer", None) is None or getattr(processor, "image_processor", None) is None:
        raise UserError(
            f"{type(processor).__name__} reads no images beside text. Pass the model's own processor, as AutoProcessor "
            "loads it."
        )
    return processor
