"""Many segments packed into one sequence, a stream: no padding, and shared prefixes computed once.

The segments of a batch form a prefix tree: rows of one format share its preamble, rows of one instruction share the
prompt, equal rows share everything. Each edge of the tree becomes a span of the stream; its tokens attend to the
tokens on the path from the root and, causally, to each other. The result for every token is the one it has in its own
segment. Padded rows instead took SmolLM2-135M 1.3 times as long for Alpaca rows, and more where more is shared.

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
    """Tokens start to end of a stream, and the indices in it of the tokens before them, in order."""

    start: int
    end: int
    prefix: np.ndarray


@dataclass(frozen=True)
class Stream:
    """T tokens for n segments.

    Attributes:
        input_ids: (T,) token ids.
        position_ids: (T,) each token's position in its own segment.
        spans: partition of the stream, in order.
        token_indices: for each segment, the indices of its tokens in the stream.
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    spans: list[Span]
    token_indices: list[np.ndarray]


def build_stream(segments: Sequence[Sequence[int]]) -> Stream:
    """The stream of a batch of segments.

    >>> build_stream([[1, 2, 3], [1, 2, 3]]).input_ids.tolist()
    [1, 2, 3]
    """
    order = sorted(range(len(segments)), key=lambda i: segments[i])
    ids: list[int] = []
    positions: list[int] = []
    spans: list[Span] = []
    token_indices: list[np.ndarray] = [np.empty(0, dtype=np.int64)] * len(segments)

    def emit(tokens: Sequence[int], prefix: np.ndarray) -> np.ndarray:
        """Append a span behind `prefix`; the prefix that now includes it."""
        if not len(tokens):
            return prefix
        start = len(ids)
        ids.extend(tokens)
        positions.extend(range(len(prefix), len(prefix) + len(tokens)))
        spans.append(Span(start, len(ids), prefix))
        return np.concatenate([prefix, np.arange(start, len(ids))])

    todo = [(0, len(order), np.empty(0, dtype=np.int64))] if segments else []
    while todo:
        low, high, prefix = todo.pop()
        first, last = segments[order[low]], segments[order[high - 1]]
        depth, shared = len(prefix), common_prefix_length(first, last)
        if shared == len(last):  # all alike
            prefix = emit(first[depth:], prefix)
            for i in order[low:high]:
                token_indices[i] = prefix
            continue
        if (shared - depth) * (high - low - 1) >= SPAN_COST:
            prefix = emit(first[depth:shared], prefix)
        # Beyond `shared` the segments differ: one part for each next token (none for a segment that ends here).
        start = low
        for i in range(low + 1, high + 1):
            if i == high or segments[order[i]][: shared + 1] != segments[order[start]][: shared + 1]:
                todo.append((start, i, prefix))
                start = i
    return Stream(np.array(ids, dtype=np.int64), np.array(positions, dtype=np.int64), spans, token_indices)


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
