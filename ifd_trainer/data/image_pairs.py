"""Rows with images to what a model reads: tokens of their texts, and how to find the answer in what a processor makes.

A processor puts as many tokens in the place of an image as its model wants, which nobody else knows. But an answer
stands behind all images, and so do the tokens from its first one on: they are counted from the end (`ImagePair.behind`)
and compared, since a processor may change a text otherwise too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..method.reasons import Status
from .chat_template import MalformedRow
from .encoding import EncodedPair, Encoder, Segment
from .image_rows import ImageExample

QUESTION = "qas"  # the loss that is measured without the image


@dataclass(frozen=True, slots=True)
class SeenPair(EncodedPair):
    """A row whose conditioned segment has images in it.

    Attributes:
        images: as the row holds them.
    """

    images: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True)
class ImagePair(SeenPair):
    """A row with images: `conditioned` has a single placeholder for each, until a processor reads `text` with them.

    Attributes:
        text: prompt and answer, as the processor takes them.
        behind: tokens of the text from the answer's first to the last one.
    """

    text: str = ""
    behind: int = 0

    def aligned(self, ids: Sequence[int]) -> Segment:
        """The row in the tokens that the processor made of it, to the end of its turn.

        Raises:
            MalformedRow: where the answer's tokens are others than those of the text.
        """
        start, answer = len(ids) - self.behind, self.conditioned.ids[self.conditioned.start :]
        end = start + len(answer)
        if start < 1 or list(ids[start:end]) != answer:
            raise MalformedRow("the processor makes other tokens of the answer than its tokenizer does")
        turn = end + len(self.ending)
        tail = len(self.ending) if tuple(ids[end:turn]) == self.ending else 0
        return Segment(list(ids[: end + tail]), start, tail)


def encode_image_rows(
    examples: Sequence[ImageExample | None], encoder: Encoder, max_images: int | None = None
) -> tuple[list[EncodedPair], MalformedRow | None]:
    """Encoded rows, those without images as any other; and what is wrong with the first one whose answer is not alike.

    Args:
        examples: rendered rows; None stands for one that could not be rendered.
        encoder: without limits of length, which hold for what the processor makes of a row.
        max_images: most images of a row.
    """
    pairs = encoder([example and example.whole for example in examples])
    bare = encoder([example and example.without for example in examples])
    first, encoded = None, []
    for example, pair, other in zip(examples, pairs, bare, strict=True):
        if example is None or not example.images:
            encoded.append(pair)
        elif max_images is not None and len(example.images) > max_images:
            encoded.append(EncodedPair.unscorable(Status.TOO_MANY_IMAGES))
        elif pair.conditioned is None:
            encoded.append(pair)
        else:
            try:
                encoded.append(_with_images(example, pair, other, encoder))
            except MalformedRow as error:
                first = first or error
                encoded.append(EncodedPair.unscorable(Status.MALFORMED))
    return encoded, first


def _with_images(example: ImageExample, pair: EncodedPair, bare: EncodedPair, encoder: Encoder) -> ImagePair:
    given, question = pair.conditioned, bare.conditioned
    if question is None or question.ids[question.start :] != given.ids[given.start :]:
        raise MalformedRow("the answer has other tokens where the question stands without its image")
    text = example.whole.prompt + example.whole.answer
    ids = encoder.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    more = {QUESTION: question}
    return ImagePair(
        given,
        pair.direct,
        ending=pair.ending,
        more=more,
        text=text,
        images=example.images,
        behind=len(ids) - given.start,
    )
