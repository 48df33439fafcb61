"""What a run selects from: the rows of a training set, or the examples inside its packed rows.

Two things are counted. Examples are scored and selected. Training rows are what the loop batches and what a budget
is given in: an example each, or with packing a bin of examples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..data.answer_finder import AnswerFinder, SaidAnswers
from ..data.distinct_prompts import WINDOW, Prompts, first_tokens, tails
from ..data.encoding import IGNORE, answer_span
from ..data.row_ids import as_array, find_ids
from ..errors import UserError
from ..method.selection import Selection, ShortfallError
from .packing import PackedRows, best_fit_decreasing, largest, spread, unpack
from .row_tokens import TOKEN_COLUMNS, Padding, RowTokens, lists_of

_LOOKED_AT, _AT_FIRST = 1000, 20  # rows by which it is told how answers are found, so many at a time
TrainingRow = int | tuple[int, ...]
FindAnswers = Callable[..., AnswerFinder | SaidAnswers]


class Pool:
    """The rows of a training set; each is an example and a training row.

    Args:
        dataset: the trainer's prepared training set, with input_ids and labels.
        answers: gives what finds the answers in rows like some (their token ids), where labels do not tell them; None
            where labels have to.
        padding: of the rows.
        tokens: the columns of tokens as the trainer's collator leaves them, where it changes them; see
            `collated_labels`.

    Attributes:
        whole: whether all of a row is taken for its answer, since nobody can tell it and no policy asks for it.
    """

    packed = whole = False

    def __init__(
        self, dataset: Any, answers: FindAnswers | None = None, padding: Padding | None = None, tokens: Any = None
    ) -> None:
        self.source = self.examples = dataset
        self._answers, self._padding, self._tokens = answers, padding or Padding(), tokens
        self._lengths: np.ndarray | None = None
        self._spans: np.ndarray | None = None
        self._counts: np.ndarray | None = None
        self._ids: dict[str | None, tuple[str | None, np.ndarray]] = {}

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.examples)

    @property
    def training_rows(self) -> int:
        """Training rows that all examples make: the whole of which `keep` is a fraction."""
        return len(self)

    @property
    def dataset(self) -> Any:
        """What the train loader reads by the training rows that the sampler yields."""
        return self.examples

    # ---- what examples hold -------------------------------------------------------------------------------------

    def tokens(self, positions: np.ndarray | None = None) -> Iterator[tuple[list[int], list[int]]]:
        """(input_ids, labels) of the examples at `positions`, of all by default; read a thousand at a time."""
        positions = np.arange(len(self)) if positions is None else positions
        rows = self._rows
        for start in range(0, len(positions), 1000):
            ids, labels, sizes = rows(positions[start : start + 1000])
            yield from zip(lists_of(ids, sizes), lists_of(labels, sizes), strict=True)

    @property
    def _rows(self) -> RowTokens:
        return RowTokens(self.examples if self._tokens is None else self._tokens, self._padding)

    def trained_labels(self, positions: np.ndarray) -> list[list[int]]:
        """Labels of the examples at `positions` as they are trained on: -100 nowhere but where no loss is."""
        _, labels, sizes = self._rows(positions, trained=True)
        return lists_of(labels, sizes)

    @cached_property
    def finder(self) -> AnswerFinder | SaidAnswers | None:
        """What finds the answers of rows of which every token is trained on; None where labels tell them.

        Raises:
            UserError: where nobody can tell answers from prompts.
        """
        if self._answers is None or self.whole or not len(self):
            return None
        rows: list[list[int]] = []
        positions: list[int] = []
        looked_at = np.unique(np.linspace(0, len(self) - 1, min(len(self), _LOOKED_AT)).astype(np.int64))
        for first in range(0, len(looked_at), _AT_FIRST):
            some = looked_at[first : first + _AT_FIRST]
            for ids, labels in self.tokens(some):
                start, end = answer_span(labels)
                if 0 < start < end:
                    return None
                rows.append(ids)
            positions += some.tolist()
        return self._answers(rows, positions=positions)

    def read(self) -> tuple[Prompts, str]:
        """All tokens in one pass: the distinct prompts of answers, and a digest of all ids and labels in their order.

        Lengths, answers' places and their number are kept, for `lengths`, `spans` and `answer_counts`. Called when a
        run starts: what was found before, of a data set that may have changed since, is forgotten.

        Raises:
            ValueError: for a data set without the columns, or a row whose input_ids and labels differ in length.
        """
        digest, rows, done = hashlib.blake2b(digest_size=16), len(self), 0
        lengths, spans, counts = np.empty(rows, np.int64), np.empty((rows, 2), np.int64), np.empty(rows, np.int64)
        keys, firsts, last = np.empty(rows, np.int64), np.empty(rows, np.int64), np.empty((rows, WINDOW), np.int32)
        for ids, labels, sizes in self._batches():
            part = slice(done, done := done + len(sizes))
            digest.update(_rows_in_turn(ids, labels, sizes))
            lengths[part], spans[part] = sizes, _answer_spans(labels, sizes)
            counts[part] = np.bincount(_runs(labels, sizes)[2], minlength=len(sizes))
            if self.finder is not None:
                self._find(ids, sizes, spans[part], counts[part], part.start)
            starts = np.cumsum(sizes) - sizes
            ends = starts + spans[part, 0]
            keys[part] = _keys(ids, starts, ends)
            firsts[part], last[part] = first_tokens(ids, starts, ends), tails(ids, starts, ends, WINDOW)
        digest.update(self._packed_into())
        self._lengths, self._spans, self._counts, self._ids = lengths, spans, counts, {}
        # A row without an answer was cut before it, or has no header: its end is no prompt's. Unless none has one.
        asked = np.flatnonzero(spans[:, 0] < spans[:, 1]) if (spans[:, 0] < spans[:, 1]).any() else np.arange(rows)
        # In an order that no process's hashes change.
        distinct = asked[np.sort(np.unique(keys[asked], return_index=True)[1])]
        if len(distinct) == rows:
            distinct = slice(None)  # no copy
        wider = lambda width: self._tails(width)[distinct]  # noqa: E731
        return Prompts(spans[distinct, 0], firsts[distinct], last[distinct], wider), digest.hexdigest()

    def _find(self, ids: np.ndarray, sizes: np.ndarray, spans: np.ndarray, counts: np.ndarray, first: int) -> None:
        """Set the spans (n, 2) and the numbers (n,) of answers of the rows that are trained on from their first token;
        (size, size) and 0 for none."""
        for number, row in enumerate(lists_of(ids, sizes)):
            if spans[number, 0] == 0:
                found = self.finder.answers(row, first + number)
                spans[number] = found[-1] if found else (len(row), len(row))
                counts[number] = len(found)

    def _tails(self, width: int) -> np.ndarray:
        """The last tokens of all prompts; see `Prompts`."""
        out, done = np.empty((len(self), width), np.int32), 0
        for ids, _, sizes in self._batches():
            part = slice(done, done := done + len(sizes))
            starts = np.cumsum(sizes) - sizes
            out[part] = tails(ids, starts, starts + self._spans[part, 0], width)
        return out

    def segments(self, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Token ids of all examples in their order, `size` examples at a time, and where their parts begin.

        Of each example three parts: prompt, answer, and what stands after it; the last bound is the end of the ids.
        """
        done = 0
        for ids, _, sizes in self._batches(size):
            firsts = np.cumsum(sizes) - sizes
            spans = self.spans(np.arange(done, done := done + len(sizes)))
            yield ids, np.append(firsts[:, None] + np.column_stack([np.zeros_like(sizes), spans]), len(ids))

    def _packed_into(self) -> bytes:
        """What the digest says beside the tokens."""
        return b""

    def _batches(self, size: int = 1000) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """All tokens, `size` rows at a time: flat input_ids and labels, and the size of each row; int64."""
        rows = self._rows
        for start in range(0, len(self), size):
            yield rows(slice(start, min(start + size, len(self))))

    def lengths(self, positions: np.ndarray) -> np.ndarray:
        """Tokens of the examples at `positions`."""
        if self._lengths is None:
            self.read()
        return self._lengths[positions]

    def spans(self, positions: np.ndarray) -> np.ndarray:
        """Start and end of the last answers of the n examples at `positions`, (n, 2); see `encoding.answer_span`."""
        if self._spans is None:
            self.read()
        return self._spans[positions]

    def answer_counts(self) -> np.ndarray:
        """How many answers each example has, (n,)."""
        if self._counts is None:
            self.read()
        return self._counts

    def all_spans(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Start and end of every answer of the n examples at `positions`, one example's behind another's, (m, 2); and
        how many each example has, (n,). One without an answer has the one span that `spans` gives."""
        counts = np.maximum(self.answer_counts()[positions], 1)
        spans = self.spans(positions).repeat(counts, axis=0)
        ends = np.cumsum(counts)
        several = np.flatnonzero(counts > 1)
        for start in range(0, len(several), 1000):
            some = several[start : start + 1000]
            ids, labels, sizes = self._rows(positions[some])
            *bounds, row = _runs(labels, sizes)
            runs = np.split(np.stack(bounds, axis=1), np.cumsum(np.bincount(row, minlength=len(some)))[:-1])
            for place, tokens, found in zip(some.tolist(), lists_of(ids, sizes), runs, strict=True):
                if len(found) == 1:  # every token is trained on
                    found = self.finder.answers(tokens, int(positions[place]))
                spans[ends[place] - counts[place] : ends[place]] = found
        return spans, counts

    def has_answer(self) -> np.ndarray:
        """Which examples have an answer, (n,) bool."""
        starts, ends = self.spans(np.arange(len(self))).T
        return ends > starts

    def ids(self, column: str | None) -> np.ndarray:
        """Row ids: those in `column`, else in "row_id" or "id" where that serves, else positions; see `find_ids`.

        Raises:
            ValueError: when there is no such column, or its values are null, not plain or not unique.
        """
        return self._named_ids(column)[1]

    def id_name(self, column: str | None) -> str | None:
        """The column that `ids` reads; None for positions."""
        return self._named_ids(column)[0]

    def _named_ids(self, column: str | None) -> tuple[str | None, np.ndarray]:
        if column not in self._ids:
            self._ids[column] = self._find_ids(column)
        return self._ids[column]

    def _find_ids(self, column: str | None) -> tuple[str | None, np.ndarray]:
        names = getattr(self.examples, "column_names", None) or []
        name, ids = find_ids(names, self._column, column)
        return name, np.arange(len(self)) if name is None else as_array(ids)

    @property
    def column_names(self) -> list[str]:
        """Columns other than those of tokens."""
        return sorted(set(getattr(self.examples, "column_names", None) or []) - {*TOKEN_COLUMNS})

    def column(self, name: str) -> np.ndarray:
        """The values of a column of the data set, (n,).

        Raises:
            UserError: where it has no such column.
        """
        if name not in (getattr(self.examples, "column_names", None) or []):
            lost = " (packing drops all others)" if self.packed else ""
            raise UserError(f"The training set has no column {name!r}; it has {self.column_names}{lost}.")
        return self._column(name).to_pandas().to_numpy()

    def _column(self, name: str) -> pa.ChunkedArray:
        values = self.examples.select_columns([name]).with_format("arrow")[:][name]
        return values if isinstance(values, pa.ChunkedArray) else pa.chunked_array([values])

    def columns(self, start: int, stop: int, without: Collection[str]) -> dict[str, pa.ChunkedArray]:
        """Columns other than token ids and `without`, of the examples from `start` to `stop`."""
        names = getattr(self.examples, "column_names", None) or []
        names = [name for name in names if name not in {*TOKEN_COLUMNS, *without}]
        if not names:
            return {}
        part = self.examples.select_columns(names).with_format("arrow")[start:stop]
        return {name: part[name] for name in names}

    def columns_digest(self) -> str:
        """A digest of all columns other than those of tokens, of which `read` makes one."""
        digest = hashlib.blake2b(digest_size=16)
        for start in range(0, len(self), 10_000):
            table = pa.table(self.columns(start, min(start + 10_000, len(self)), without=())).combine_chunks()
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, table.schema) as stream:
                stream.write_table(table)
            digest.update(sink.getvalue())
        return digest.hexdigest()

    # ---- from a budget to training rows -------------------------------------------------------------------------

    def choose(self, budget: int, policy: Callable[[int], Selection]) -> Selection:
        """The selection that fills `budget` training rows.

        Args:
            budget: number of training rows.
            policy: selects the given number of examples; called with the same number, it selects the same ones.
        """
        return policy(budget)

    def divide(self, ranked: np.ndarray, rows: Sequence[int]) -> list[np.ndarray]:
        """Chosen examples, highest score first, cut into parts that fill so many training rows each."""
        return np.split(ranked, np.cumsum(rows)[:-1])

    def arrange(self, kept: np.ndarray, budget: int) -> list[TrainingRow]:
        """`budget` training rows made of the kept examples (highest score first), highest score first."""
        return kept.tolist()

    def to_arrays(self, order: list[TrainingRow]) -> dict[str, np.ndarray]:
        """Training rows in the form that a checkpoint keeps."""
        return {"positions": np.asarray(order, dtype=np.int64)}

    def from_arrays(self, arrays: Mapping[str, np.ndarray]) -> list[TrainingRow]:
        """Training rows from what a checkpoint kept."""
        return arrays["positions"].tolist()


class PackedPool(Pool):
    """The examples inside the rows that TRL packed with packing_strategy="bfd"; a training row is a bin of them.

    Args:
        dataset: a `datasets.Dataset` with input_ids, labels and seq_lengths.
        capacity: tokens of a bin, the trainer's max_length.
        answers: see `Pool`.
        tokens: these three columns as the trainer's collator leaves them, where it changes them.
    """

    packed = True

    def __init__(self, dataset: Any, capacity: int, answers: FindAnswers | None = None, tokens: Any = None) -> None:
        super().__init__(dataset, answers)
        self.capacity = capacity
        packed = dataset if tokens is None else tokens
        packed = packed.select_columns(["input_ids", "labels", "seq_lengths"]).with_format("arrow")
        self.examples = packed.map(unpack, batched=True, desc="Unpacking train dataset").with_format(None)
        table = self.examples.with_format("arrow")[:]
        self._lengths = pc.list_value_length(table["input_ids"]).to_numpy().astype(np.int64)

    @cached_property
    def training_rows(self) -> int:
        return len(best_fit_decreasing(self._lengths, self.capacity))

    @property
    def dataset(self) -> PackedRows:
        return PackedRows(self.examples, self.training_rows)

    def _find_ids(self, column: str | None) -> tuple[None, np.ndarray]:
        if column is not None:
            raise UserError(
                f"id_column={column!r} cannot be used with packing=True, which drops all columns but the tokens. "
                "Leave it out: rows are then known by their position in the unpacked training set."
            )
        return None, np.arange(len(self))

    def _packed_into(self) -> bytes:
        return f"packed into {self.capacity}".encode()

    def choose(self, budget: int, policy: Callable[[int], Selection]) -> Selection:
        """The selection of as many examples as fit into `budget` bins; a shortfall is one of bins.

        Eligible examples are taken from the highest score downwards until the next one would need another bin. Only
        where all of them together leave bins empty, the policy's way with a shortfall fills the bins.

        Raises:
            ShortfallError: when no example is eligible, or when the eligible ones are too few and the policy refuses.
        """

        def fits(examples: int) -> bool:
            return self._bins(policy(examples).kept) <= budget

        eligible = policy(1).eligible
        count = largest(fits, 1, max(eligible, 1))  # none is, and the policy relaxes its limit: one at least
        selection = policy(count)
        filled = self._bins(selection.kept)
        if filled == budget or count < eligible:
            return selection
        try:
            policy(count + 1)
        except ShortfallError as error:
            raise ShortfallError(
                f"{budget} packed rows are to be trained, but the eligible examples fill {filled}: {error}"
            ) from error
        low, high = count, count + 1
        while fits(high):
            low, high = high, 2 * high
        return policy(largest(fits, low, high - 1))

    def divide(self, ranked: np.ndarray, rows: Sequence[int]) -> list[np.ndarray]:
        """Each part takes examples until the next one would need another bin, as if it were an epoch of its own.

        Parts are cut by score alone: every example of a part scores at least as high as all of the next. There need
        not be a cut for which all examples fit (of the lengths 6, 6, 4, 4 in two bins of 10, one is left over):
        examples that were chosen for all bins together and do not fit are the lowest ones, and are left out. A part
        leaves one example at least for each bin of the parts after it, so none stays empty.
        """
        assert len(ranked) >= sum(rows), f"{len(ranked)} examples cannot fill {sum(rows)} bins"
        tokens = np.concatenate([[0], np.cumsum(self._lengths[ranked])])
        parts, start = [], 0
        for number, bins in enumerate(rows):
            room = tokens[start] + bins * self.capacity
            end = min(int(np.searchsorted(tokens, room, side="right")) - 1, len(ranked) - sum(rows[number + 1 :]))
            end = largest(lambda n, a=start, bins=bins: self._bins(ranked[a:n]) <= bins, start + bins, end)
            parts.append(ranked[start:end])
            start = end
        return parts

    def arrange(self, kept: np.ndarray, budget: int) -> list[TrainingRow]:
        """Bins ordered by the mean rank of their examples."""
        bins = spread(best_fit_decreasing(self._lengths[kept], self.capacity), budget)
        assert len(bins) == budget, f"{len(kept)} examples fill {len(bins)} bins, not {budget}"
        return [tuple(kept[list(ranks)].tolist()) for ranks in sorted(bins, key=lambda ranks: sum(ranks) / len(ranks))]

    def to_arrays(self, order: list[TrainingRow]) -> dict[str, np.ndarray]:
        flat = [position for members in order for position in members]
        sizes = [len(members) for members in order]
        return {"positions": np.asarray(flat, dtype=np.int64), "bins": np.asarray(sizes, dtype=np.int64)}

    def from_arrays(self, arrays: Mapping[str, np.ndarray]) -> list[TrainingRow]:
        parts = np.split(arrays["positions"], np.cumsum(arrays["bins"])[:-1])
        return [tuple(part.tolist()) for part in parts]

    def _bins(self, kept: np.ndarray) -> int:
        return len(best_fit_decreasing(self._lengths[kept], self.capacity))


def _rows_in_turn(ids: np.ndarray, labels: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """[size, *ids, *labels] of each row, one row after the other; from flat ids and labels.

    >>> _rows_in_turn(np.array([5, 6, 7]), np.array([-100, 6, 7]), np.array([2, 1])).tolist()
    [2, 5, 6, -100, 6, 1, 7, 7]
    """
    firsts = np.cumsum(2 * sizes + 1) - 2 * sizes - 1
    within = np.arange(len(ids)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    places = np.repeat(firsts, sizes) + 1 + within
    out = np.empty(len(sizes) + 2 * len(ids), dtype=np.int64)
    out[firsts], out[places], out[places + np.repeat(sizes, sizes)] = sizes, ids, labels
    return out


def _keys(ids: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> list[int]:
    """A number of 64 bits for each of the parts of `ids` from `starts` to `ends`: equal parts have the same one.

    Of a million different parts, two have the same one with a probability of 3e-8.
    """
    data, size = ids.tobytes(), ids.itemsize
    return [hash(data[start:end]) for start, end in zip((size * starts).tolist(), (size * ends).tolist(), strict=True)]


def _runs(labels: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where the m runs of labels of n rows begin and end in their rows, and their rows, (m,) each; from flat labels.

    >>> [part.tolist() for part in _runs(np.array([-100, 6, 7, -100, 8, 9]), np.array([5, 1]))]
    [[1, 4, 0], [3, 5, 1], [0, 0, 1]]
    """
    row = np.repeat(np.arange(len(sizes)), sizes)
    firsts = np.cumsum(sizes) - sizes
    labelled, within = labels != IGNORE, np.arange(len(labels)) - firsts[row]
    before, behind = np.roll(labelled, 1), np.roll(labelled, -1)
    starts = np.flatnonzero(labelled & (~before | (within == 0)))
    ends = np.flatnonzero(labelled & (~behind | (within == sizes[row] - 1)))
    return within[starts], within[ends] + 1, row[starts]


def _answer_spans(labels: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """`answer_span` of n rows at once, (n, 2); from flat labels.

    >>> _answer_spans(np.array([-100, 6, 7, -100, -100]), np.array([4, 1])).tolist()
    [[1, 3], [1, 1]]
    """
    ends = np.cumsum(sizes)
    firsts, places = ends - sizes, np.arange(len(labels))
    answers = labels != IGNORE
    # before[i]: the last place before i with (without) a label, -1 if there is none
    before = [np.concatenate([[-1], np.maximum.accumulate(np.where(mask, places, -1))]) for mask in (answers, ~answers)]
    last = before[0][ends]
    start = np.maximum(before[1][last + 1] + 1, firsts) - firsts
    answered = last >= firsts
    return np.stack([np.where(answered, start, sizes), np.where(answered, last + 1 - firsts, sizes)], axis=1)
