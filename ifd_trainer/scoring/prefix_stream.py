"""Many segments as one stream of tokens: no padding, and shared beginnings computed once.

The segments of a batch form a prefix tree: rows of one format share its preamble, rows of one instruction share the
prompt, equal rows share everything. Each edge of the tree becomes a span of the stream; its tokens attend to the
tokens on the path from the root and, causally, to each other. The result for every token is the one it has in its own
segment.

    "Below is ... Instruction:\\n" + "Name a fruit." ...        spans: preamble | Name a ... | Add 2 ...
    "Below is ... Instruction:\\n" + "Add 2 and 2." ...
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..data.chat_template import common_prefix_length

# A further span costs about as much as computing this many tokens (one attention call in each layer).
SPAN_COST = 8


@dataclass(frozen=True)
class Span:
    """Tokens start to end of a stream, and the stream positions of the tokens before them, in order."""

    start: int
    end: int
    path: np.ndarray


@dataclass(frozen=True)
class Stream:
    """T tokens for n segments.

    Attributes:
        ids: (T,) token ids.
        positions: (T,) each token's position in its own segment.
        spans: partition of the stream, in order.
        places: for each segment, the stream position of each of its tokens.
    """

    ids: np.ndarray
    positions: np.ndarray
    spans: list[Span]
    places: list[np.ndarray]

    def lengthened(self, tokens: int) -> Stream:
        """With tokens at its end that are of no segment, so that it has so many.

        >>> build_stream([[7, 8, 9]]).lengthened(4).ids.tolist()
        [7, 8, 9, 0]
        """
        length, added = len(self.ids), tokens - len(self.ids)
        if not added:
            return self
        behind = Span(length, tokens, np.empty(0, dtype=np.int64))
        ids = np.concatenate([self.ids, np.zeros(added, dtype=np.int64)])
        return Stream(ids, np.concatenate([self.positions, np.arange(added)]), [*self.spans, behind], self.places)


def build_stream(segments: Sequence[Sequence[int]]) -> Stream:
    """The stream of a batch of segments.

    >>> build_stream([[1, 2, 3], [1, 2, 3]]).ids.tolist()
    [1, 2, 3]
    """
    order = sorted(range(len(segments)), key=lambda i: segments[i])
    ids: list[int] = []
    positions: list[int] = []
    spans: list[Span] = []
    places: list[np.ndarray] = [np.empty(0, dtype=np.int64)] * len(segments)

    def emit(tokens: Sequence[int], path: np.ndarray) -> np.ndarray:
        """Append a span behind `path`; the path that now includes it."""
        if not len(tokens):
            return path
        start = len(ids)
        ids.extend(tokens)
        positions.extend(range(len(path), len(path) + len(tokens)))
        spans.append(Span(start, len(ids), path))
        return np.concatenate([path, np.arange(start, len(ids))])

    todo = [(0, len(order), np.empty(0, dtype=np.int64))] if segments else []
    while todo:
        low, high, path = todo.pop()
        first, last = segments[order[low]], segments[order[high - 1]]
        depth, shared = len(path), common_prefix_length(first, last)
        if shared == len(last):  # all alike
            path = emit(first[depth:], path)
            for i in order[low:high]:
                places[i] = path
            continue
        if (shared - depth) * (high - low - 1) >= SPAN_COST:
            path = emit(first[depth:shared], path)
        # Beyond `shared` the segments differ: one part for each next token (none for a segment that ends here).
        start = low
        for i in range(low + 1, high + 1):
            if i == high or segments[order[i]][: shared + 1] != segments[order[start]][: shared + 1]:
                todo.append((start, i, path))
                start = i
    return Stream(np.array(ids, dtype=np.int64), np.array(positions, dtype=np.int64), spans, places)


def stream_batches(
    segments: Sequence[Sequence[int]],
    token_budget: int,
    scored: Sequence[int],
    scored_budget: int,
    seen_budget: int | None = None,
) -> list[np.ndarray]:
    """Partition segments into batches whose streams hold about `token_budget` tokens, neighbours sharing prefixes.

    The tokens of a batch are counted as if every shared prefix were computed once; a segment longer than the budget
    is a batch of its own. Scored tokens are bounded by `scored_budget` in the same way, and the tokens of all segments
    together, shared ones counted for each, by `seen_budget`.

    >>> [batch.tolist() for batch in stream_batches([[1, 2, 3], [5, 6], [1, 2, 4]], 4, [1, 1, 1], 9)]
    [[0, 2], [1]]
    """
    batches: list[np.ndarray] = []
    batch: list[int] = []
    most_seen = float("inf") if seen_budget is None else seen_budget
    tokens = total = seen = 0
    for i in sorted(range(len(segments)), key=lambda i: segments[i]):
        size = len(segments[i])
        new = size - (common_prefix_length(segments[batch[-1]], segments[i]) if batch else 0)
        full = tokens + new > token_budget or total + scored[i] > scored_budget or seen + size > most_seen
        if batch and full:
            batches.append(np.array(batch))
            batch, tokens, total, seen, new = [], 0, 0, 0, size
        batch.append(i)
        tokens, total, seen = tokens + new, total + scored[i], seen + size
    if batch:
        batches.append(np.array(batch))
    return batches
