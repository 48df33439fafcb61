"""What a model reads for further scores, beside the two segments of a row: `EncodedPair.more`.

The prompt's tokens begin the conditioned segment, so that they share its forward. Of several answers of a conversation,
the prompt of each is what stands behind the answer before it, read behind all that was said. A row turned round (see
`reversed_rows`) is encoded as any row of the definition `paper` is: its answer, the instruction, behind the request,
and alone behind the header. One that is empty, or too long, has no such segments, and the row's other scores stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import islice

from ..method.further_scores import PROMPT, REVERSED, REVERSED_DIRECT, losses_read
from .encoding import EncodedPair, Encoder, Segment
from .formats import Example


def with_further(
    pairs: list[EncodedPair],
    scores: Iterable[str],
    encoder: Encoder,
    turned: Callable[[int], Example | None],
    counts: Sequence[int] | None = None,
) -> list[EncodedPair]:
    """Encoded rows with what further scores read.

    Args:
        pairs: of the rows.
        scores: names of further scores.
        encoder: of the rows; its limits of length hold for rows turned round too.
        turned: gives a row, by its place among the pairs, turned round.
        counts: of rows with several answers, one pair behind another's, how many each row has.
    """
    losses = losses_read(scores)
    if not losses:
        return pairs
    found: list[dict[str, Segment]] = [{} for _ in pairs]
    scored = [place for place, pair in enumerate(pairs) if pair.conditioned is not None]
    if PROMPT in losses:
        begins = [1] * len(pairs) if counts is None else _prompt_begins(pairs, counts)  # nothing precedes a first token
        for place in scored:
            given = pairs[place].conditioned
            if given.start > begins[place]:
                found[place][PROMPT] = Segment(given.ids[: given.start], begins[place])
    if losses & {REVERSED, REVERSED_DIRECT}:
        encoder = replace(encoder, definition="paper", min_answer_tokens=1)
        for place, pair in zip(scored, encoder([turned(place) for place in scored]), strict=True):
            segments = {REVERSED: pair.conditioned, REVERSED_DIRECT: pair.direct}
            found[place] |= {name: each for name, each in segments.items() if name in losses and each is not None}
    return [replace(pair, more=more) if more else pair for pair, more in zip(pairs, found, strict=True)]


def _prompt_begins(pairs: Sequence[EncodedPair], counts: Sequence[int]) -> list[int]:
    """For each answer the first token of its prompt: behind the one before it that has a score, and what ends that."""
    answers, begins = iter(pairs), []
    for count in counts:
        begin = 1
        for pair in islice(answers, count):
            begins.append(begin)
            if pair.conditioned is not None:
                begin = len(pair.conditioned.ids) + len(pair.ending)
    return begins
