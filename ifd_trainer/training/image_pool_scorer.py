"""A pool with images through the trainer's model: batches are those of the trainer's own collator.

What cannot be measured of such rows is refused here, or turned off with a sentence: other prompts, cut answers and
likeness of texts say nothing where an answer is about an image that the text does not hold.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from transformers import Trainer

from ..data.encoding import EncodedPair, Segment, answer_span, with_ending
from ..data.image_pairs import SeenPair
from ..data.image_rows import without_images
from ..errors import RunError, UserError
from ..method.calibrated_limit import CalibratedLimit
from ..method.choices import CALIBRATED, MEASURING_GUARDS
from ..method.equations import further_scores
from ..method.facility_location import Diverse
from ..method.further_scores import losses_read
from ..method.guard import Guard
from ..method.number_words import many
from ..method.reasons import Status
from ..method.schedule import Timing
from ..method.selection import Policy
from ..method.target_set import TargetSet
from ..scoring.image_forwards import ReadBatch, image_row_losses, unpadded
from ..scoring.losses import Scores
from .image_pool import ImagePool, as_trained, collated
from .pool_scorer import PoolScorer
from .row_tokens import Padding, RowTokens, lists_of
from .trainer_hooks import scoring_model

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CollatedPair(SeenPair):
    """A row with images as the collator leaves it; `row` is its position in the pool."""

    row: int = 0


class ImagePoolScorer(PoolScorer):
    """Runs the rows of a pool with images through the trainer's model.

    Attributes:
        without: what the direct score leaves out, "both" or "image"; see `scoring.image_scorer`.
    """

    without = "both"

    def _own_pair(self, row: int, ids: list[int], start: int, end: int, prefix: Sequence[int]) -> EncodedPair:
        if (refused := self.pool.status(row)) is not None:
            return EncodedPair.unscorable(refused)
        pair = super()._own_pair(row, ids, start, end, prefix)
        count = int(self.pool.images[row])
        if pair.conditioned is None:
            return pair
        if not count:
            return pair if self.without == "both" else EncodedPair.unscorable(Status.NO_IMAGE)
        if self.without == "image":
            question = self._question(row, prefix)
            if question.conditioned is None:
                return question
            if not _same_answer(question.conditioned, pair.conditioned):
                return EncodedPair.unscorable(Status.MALFORMED)
            pair = replace(pair, direct=question.conditioned)
        return CollatedPair(pair.conditioned, pair.direct, ending=pair.ending, images=(None,) * count, row=row)

    def _question(self, row: int, prefix: Sequence[int]) -> EncodedPair:
        """The row without its image."""
        ids, labels, sizes = self._without_images(np.array([row]))
        [ids], [labels] = lists_of(ids, sizes), lists_of(labels, sizes)
        start, end = answer_span(labels)
        finder = self.pool.finder
        if finder is not None and start == 0:
            start, end = finder(ids, row) or (len(ids), len(ids))
        return super()._own_pair(row, ids, start, end, prefix)

    @cached_property
    def _without_images(self) -> RowTokens:
        """All rows as the collator leaves them without their images."""
        processor = getattr(self.trainer.data_collator, "processor", self.trainer.processing_class)
        placeholder = getattr(processor, "image_token", None)
        read = collated(self.trainer, lambda row: without_images(row, placeholder))
        token = self.encoder.tokenizer.pad_token_id
        return RowTokens(read.tokens, Padding(token, token == self.encoder.tokenizer.bos_token_id))

    def _own_scores(self, pairs: list[EncodedPair], progress: Callable[[int], Any]) -> Scores:
        running, read = self._running(), _CollatorReader(self.trainer, pairs)
        running.pop("sharded")
        size = self.trainer.args.per_device_eval_batch_size
        losses, tokens, status = image_row_losses(
            running.pop("model"), pairs, read, size, running.pop("device"), progress, **running
        )
        if read.statuses:
            logger.warning("%s with images cannot be scored: %s.", many(len(read.statuses), "row"), read.problem)
        further = further_scores(self.further, losses)
        return Scores.from_nll(losses["cas"], losses["das"], tokens, status, losses["eot_loss"], further)


@dataclass
class _CollatorReader:
    """Reads rows with the trainer's collator, as they are trained on."""

    trainer: Trainer
    pairs: Sequence[CollatedPair]
    statuses: dict[int, Status] = field(default_factory=dict)
    problem: str | None = None

    def __post_init__(self) -> None:
        self.rows = as_trained(self.trainer)

    def __call__(self, rows: np.ndarray) -> ReadBatch:
        pairs = [self.pairs[row] for row in rows.tolist()]
        inputs = self.trainer.data_collator([self.rows[pair.row] for pair in pairs])
        segments = [self._segment(pair, ids) for pair, ids in zip(pairs, unpadded(inputs), strict=True)]
        return ReadBatch(rows, segments, {name: value for name, value in inputs.items() if name != "labels"})

    def _segment(self, pair: CollatedPair, ids: list[int]) -> Segment:
        wanted, given = with_ending(pair), pair.conditioned
        if ids[: len(given.ids)] != given.ids:
            raise RunError(
                f"The trainer's collator gives other tokens for row {pair.row} than when the run began. Selection "
                "scores what is trained on: let the collator read a row alike each time."
            )
        return wanted if ids[: len(wanted.ids)] == wanted.ids else given

    def refuse(self, row: int, problem: str) -> None:
        several = len(self.pairs[row].images) > 1
        self.statuses[row] = Status.TOO_MANY_IMAGES if several else Status.MALFORMED
        self.problem = self.problem or problem


def _same_answer(one: Segment, other: Segment) -> bool:
    return one.ids[one.start :] == other.ids[other.start :]


def guard_of_images(guard: Guard | None, asked: Any) -> Guard | None:
    """The guards of a run on rows with images.

    Args:
        guard: those that the run would have on rows of text.
        asked: what the user said of guards; "auto" for nothing.

    Raises:
        UserError: for a guard that was asked for, and runs or compares texts alone.
    """
    off = [name for name in (guard.names if guard else ()) if name in (*MEASURING_GUARDS, "duplicates")]
    if not off:
        return guard
    if asked != "auto":
        raise UserError(
            f"The rows have images, and the guards {', '.join(off)} run or compare texts alone: set these to None in "
            "Guard(...)."
        )
    logger.warning(
        "The rows have images: the guards %s, which run or compare texts alone, are off, so that nothing but the limit "
        "of the policy keeps noise out.",
        ", ".join(off),
    )
    return replace(guard, **dict.fromkeys(off))


def check_image_run(
    trainer: Trainer, policy: Policy, timing: Timing, scorer: Any, further: Sequence[str], max_ifd: Any
) -> None:
    """Raise for what a selection from rows with images cannot do, before the first step."""
    problem = None
    if trainer.selection_pool.whole:
        problem = "nobody can tell their answers: use prompt and completion, or say what begins an answer (header=)"
    elif scoring_model(trainer)[1]:
        problem = "the weights are spread over processes (FSDP, ZeRO-3), whose numbers of forwards differ: use DDP"
    elif isinstance(policy, (Diverse, TargetSet)):
        problem = f"{type(policy).__name__} compares texts alone: use another policy"
    elif timing.warmup is not None and timing.warmup.method != "random":
        problem = "a brief experience by k-means reads prompts alone: use brief='random', or brief=None"
    elif scorer not in (None, "columns"):
        problem = "another model reads texts alone: attach its scores with ImageIFDScorer, and set scorer='columns'"
    elif lacking := [name for name in further if losses_read([name])]:
        problem = f"{', '.join(lacking)} is of texts alone: leave it out"
    elif isinstance(max_ifd, CalibratedLimit) or max_ifd == CALIBRATED:
        problem = (
            "a calibrated limit runs answers under other prompts, without their images: set a number (max_ifd=1.0)"
        )
    if problem is not None:
        raise UserError(f"The training set has images, and {problem}.")


def pool_scorer_of(trainer: Trainer, without: str, *given: Any) -> PoolScorer:
    """What scores the pool of a trainer; `given` as of `PoolScorer`.

    Raises:
        UserError: for what is to be left out of rows that have no images.
    """
    if isinstance(trainer.selection_pool, ImagePool):
        scorer = ImagePoolScorer(trainer, *given)
        scorer.without, scorer.rule = without, "last"  # an image may belong to one of several answers
        return scorer
    if without != "both":
        raise UserError(f"without={without!r} leaves the image out of the direct score, and the rows have none.")
    return PoolScorer(trainer, *given)
