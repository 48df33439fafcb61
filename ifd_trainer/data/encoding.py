"""Text to token ids with the answer's span, and batches of bounded size.

Every row becomes two segments: the conditioned one (prompt and answer) and the direct one (what precedes a direct
answer, and the answer). A definition says how:

- `paper` (default): one joint tokenisation of prompt and answer. The answer begins where the tokens of the prompt
  alone and those of the whole part, which is TRL's rule, so that the transform and the training loop score the same
  tokens; what a chat template writes around it is left out by its text. Both segments hold the same answer tokens, and
  each of them is scored in both.
- `cherry`: what the program of arXiv 2308.12032 does. Prompt and `### Response:` + answer are tokenised separately;
  the direct answer is cut at max_length - prompt + 4 tokens; a row that does not fit then is skipped.
- `superfiltering`: what the program of arXiv 2402.00530 does. The direct answer has no header, so its first token is
  scored in the conditioned segment only; it is cut at max_length - prompt + 1 tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Any

import numpy as np

from ..errors import UserError
from ..method.number_types import is_whole
from ..method.reasons import Status
from .chat_template import Frame, common_prefix_length
from .definitions import DEFAULT_MAX_LENGTH, DEFINITIONS
from .formats import Example

IGNORE = -100
_ENDING = 8  # most tokens that a template writes before its end-of-turn token


@dataclass(frozen=True, slots=True)
class Segment:
    """Token ids of one forward; those from `start` on are scored, the last `tail` of them apart from the others.

    1 <= start < len(ids), and start + tail <= len(ids).
    """

    ids: list[int]
    start: int
    tail: int = 0

    @property
    def scored(self) -> int:
        """Number of tokens that the mean loss is of."""
        return len(self.ids) - self.start - self.tail

    @property
    def predicted(self) -> int:
        """Number of scored tokens, those of the tail among them."""
        return len(self.ids) - self.start


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """A row ready to be scored: two segments, or a status that says why there are none.

    Attributes:
        conditioned: prompt and answer.
        direct: what precedes a direct answer, and the answer.
        status: why there are none.
        ending: the tokens that end the turn right behind the answer; none where it was cut off.
        more: what else a model reads for further scores, by the name of its loss; see `further_segments`.
    """

    conditioned: Segment | None = None
    direct: Segment | None = None
    status: Status = Status.OK
    ending: tuple[int, ...] = ()
    more: Mapping[str, Segment] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Tokens that are read to score the row: all segments, and what ends its turn; 0 without a score."""
        if self.conditioned is None:
            return 0
        more = (segment.ids for segment in self.more.values())
        return sum(map(len, (self.conditioned.ids, self.ending, self.direct.ids, *more)))

    @classmethod
    def unscorable(cls, status: Status) -> EncodedPair:
        return cls(status=status)


def mismatched(row: EncodedPair, other: EncodedPair, longest: int | None) -> EncodedPair:
    """The answer of one row under the prompt of another: `malformed` where that is no wrong pair, or too long.

    The prompt keeps the row's own response header: where a header's last character merged with the answer's first into
    one token (`:` and a quote), that of another row would have it twice or not at all. Where a definition has no header
    and a direct answer begins with its own first token (`superfiltering`), prompts stay as they are.

    >>> row, other = (EncodedPair(Segment(ids, 2), Segment([9, ids[-1]], 1)) for ids in ([1, 9, 2], [3, 9, 4]))
    >>> mismatched(row, other, longest=8).conditioned
    Segment(ids=[3, 9, 2], start=2, tail=0)
    """
    if row.conditioned is None or other.conditioned is None:
        return EncodedPair.unscorable(Status.MALFORMED)
    answers = [pair.conditioned.ids[pair.conditioned.start :] for pair in (row, other)]
    prompts = [pair.conditioned.ids[: pair.conditioned.start] for pair in (row, other)]
    own, others = (_header(pair) for pair in (row, other))
    if own != others and own[:1] == others[:1] != prompts[1][-len(others) :][:1]:
        own, others = own[1:], others[1:]  # without the BOS before a direct answer
    ends = bool(others) and prompts[1][-len(others) :] == others
    prompt = prompts[1][: -len(others)] + own if ends else prompts[1]
    too_long = longest is not None and len(prompt) + len(answers[0]) > longest
    if answers[0] == answers[1] or prompts[0] == prompt or too_long:
        return EncodedPair.unscorable(Status.MALFORMED)
    return EncodedPair(Segment(prompt + answers[0], len(prompt)), row.direct)


def _header(pair: EncodedPair) -> list[int]:
    """What precedes the direct answer; nothing where that is the answer's own first token."""
    direct, answer = pair.direct, pair.conditioned.ids[pair.conditioned.start :]
    return [] if direct.ids == answer[: len(direct.ids)] else direct.ids[: direct.start]


def with_ending(pair: EncodedPair, answer_tokens: int | None = None) -> Segment:
    """Prompt and answer with what ends the turn behind them, apart: how surprised a model is that the answer ends.

    Args:
        answer_tokens: how many tokens of the answer are left; all by default.

    >>> with_ending(EncodedPair(Segment([5, 6, 7, 8], 1), ending=(2,)), answer_tokens=2)
    Segment(ids=[5, 6, 7, 2], start=1, tail=1)
    """
    ids, start = pair.conditioned.ids, pair.conditioned.start
    kept = ids if answer_tokens is None else ids[: start + answer_tokens]
    return Segment([*kept, *pair.ending], start, len(pair.ending))


def token_count(pairs: Iterable[EncodedPair]) -> int:
    """Tokens that are read to score rows: all segments of the scorable ones, and what ends their turns."""
    return sum(pair.tokens for pair in pairs)


@dataclass(frozen=True)
class Encoder:
    """Examples to encoded pairs under one definition.

    Args:
        tokenizer: a `transformers` tokenizer; used, never changed.
        definition: `paper`, `cherry` or `superfiltering`.
        max_length: most tokens of prompt and answer together; None for the window (for cherry 512 and for
            superfiltering 1024, as in their programs, where the window is not smaller).
        min_answer_tokens: rows with fewer answer tokens get the status `too_short`.
        score_truncated: score the part of an answer that fits (`paper` only) instead of the status `truncated`.
        window: most tokens that the model was made for; None for no limit.

    Raises:
        ValueError: for an unknown definition, numbers below 1, or a max_length above the window.
    """

    tokenizer: Any
    definition: str = "paper"
    max_length: int | None = None
    min_answer_tokens: int = 1
    score_truncated: bool = False
    window: int | None = None

    def __post_init__(self) -> None:
        if self.definition not in DEFINITIONS:
            raise UserError(f"Unknown definition {self.definition!r}; choose one of {', '.join(DEFINITIONS)}.")
        check_positive(max_length=self.max_length, min_answer_tokens=self.min_answer_tokens)
        limits = [limit for limit in (DEFAULT_MAX_LENGTH.get(self.definition), self.window) if limit is not None]
        if self.max_length is None:
            object.__setattr__(self, "max_length", min(limits, default=None))
        elif self.window is not None and self.max_length > self.window:
            # Learned positions end there; rotary ones go on, with numbers that the model never learned to use.
            raise UserError(
                f"max_length={self.max_length} is more than the model's window of {self.window} tokens. Lower it, or "
                f"leave it out: the default is {min(limits)}."
            )

    def __call__(self, examples: Sequence[Example | None]) -> list[EncodedPair]:
        """Encode a batch; `None` stands for a row that could not be rendered."""
        pairs = [EncodedPair.unscorable(Status.MALFORMED)] * len(examples)
        present = [(i, example) for i, example in enumerate(examples) if example is not None]
        blank = {i: _blank_status(example) for i, example in present}
        encode = getattr(self, f"_{self.definition}")
        # A batch is of one kind in practice; rows that add BOS and rows that do not are still kept apart.
        for special, group in groupby(sorted(present, key=_by_kind), key=_by_kind):
            positions, batch = zip(*group, strict=True)
            for position, pair in zip(positions, encode(batch, special), strict=True):
                if blank[position] is not None and pair.status is not Status.EMPTY_ANSWER:
                    pair = EncodedPair.unscorable(blank[position])
                pairs[position] = pair if self._in_window(pair) else EncodedPair.unscorable(Status.TRUNCATED)
        return pairs

    def _paper(self, examples: Sequence[Example], special: bool) -> Iterator[EncodedPair]:
        prompts = self._tokenize([example.prompt for example in examples], special)
        wholes = self._tokenize([example.prompt + example.answer for example in examples], special)
        headers = {example.header for example in examples}
        prefixes = {header: direct_prefix(self.tokenizer, header, special) for header in headers}
        for example, prompt, whole in zip(examples, prompts, wholes, strict=True):
            start = common_prefix_length(prompt, whole)
            frames = [] if special else [Frame(example.header, example.end)]
            header, start, end = self.turns(whole, start, len(whole), frames)
            prefix = prefixes[example.header] if header is None else whole[header:start]
            yield self.pair(whole[:end], start, prefix, self.turns.ending(whole[end:]))

    @cached_property
    def turns(self) -> Turns:
        """Where answers begin and end in tokens."""
        return Turns(self.tokenizer)

    def pair(self, ids: list[int], start: int, prefix: list[int], ending: tuple[int, ...] = ()) -> EncodedPair:
        """The pair for `ids` whose answer begins at `start`, with `prefix` before the direct answer.

        `ending` is what ends the turn behind the answer; a pair whose answer is cut, or that has no room for it in the
        window, has none.
        """
        prefix = header_before(ids[:start], prefix)
        bos = self.tokenizer.bos_token_id
        if bos is not None and ids[:1] == [bos] != prefix[:1]:
            prefix = [bos, *prefix]  # a model that reads BOS before every text reads it here too
        # Where the prompt's only token merged with the answer's first, that has nothing before it: IFD is 1.
        before, answer = ids[:start] or prefix, ids[start:]
        if self.turns.is_blank(answer):
            return EncodedPair.unscorable(Status.EMPTY_ANSWER)
        if self.max_length is not None and len(before) + len(answer) > self.max_length:
            if len(before) >= self.max_length:
                return EncodedPair.unscorable(Status.PROMPT_TOO_LONG)
            if not self.score_truncated:
                return EncodedPair.unscorable(Status.TRUNCATED)
            answer, ending = answer[: self.max_length - len(before)], ()
        if len(answer) < self.min_answer_tokens:
            return EncodedPair.unscorable(Status.TOO_SHORT)
        given, alone = Segment(before + answer, len(before)), Segment(prefix + answer, len(prefix))
        room = self.window is None or len(given.ids) + len(ending) <= self.window
        return EncodedPair(given, alone, ending=ending if room else ())

    def _cherry(self, examples: Sequence[Example], special: bool) -> Iterator[EncodedPair]:
        self._need_header(examples)
        prompts = self._tokenize([example.prompt for example in examples], special)
        counted = self._tokenize(
            [example.prompt if example.counted is None else example.counted for example in examples], special
        )
        wholes = self._tokenize([example.prompt + example.answer for example in examples], special)
        headers = self._tokenize([example.header for example in examples], special)
        directs = self._tokenize([example.header + example.answer for example in examples], special)
        limit = self.max_length
        for example, prompt, size, whole, header, direct in zip(
            examples, prompts, map(len, counted), wholes, headers, directs, strict=True
        ):
            used = min(size, limit)
            if not example.answer:
                yield EncodedPair.unscorable(Status.EMPTY_ANSWER)
            elif used >= limit:
                yield EncodedPair.unscorable(Status.PROMPT_TOO_LONG)
            else:
                alone = Segment(direct[: limit - used + 4], len(header))
                given = Segment(whole[:limit], len(prompt))
                if alone.scored <= 0 or given.scored <= 0:
                    yield EncodedPair.unscorable(Status.PROMPT_TOO_LONG)
                elif used + alone.scored > limit:
                    yield EncodedPair.unscorable(Status.TRUNCATED)
                else:
                    yield self._checked(given, alone)

    def _superfiltering(self, examples: Sequence[Example], special: bool) -> Iterator[EncodedPair]:
        prompts = self._tokenize([example.prompt for example in examples], special)
        wholes = self._tokenize([example.prompt + example.answer for example in examples], special)
        answers = self._tokenize([example.answer for example in examples], special)
        limit = self.max_length
        for example, prompt, whole, answer in zip(examples, prompts, wholes, answers, strict=True):
            given = Segment(whole[:limit], max(len(prompt), 1))
            alone = Segment(answer[: max(limit - min(len(prompt), limit) + 1, 0)], 1)
            if not example.answer:
                yield EncodedPair.unscorable(Status.EMPTY_ANSWER)
            elif len(prompt) >= limit:
                yield EncodedPair.unscorable(Status.PROMPT_TOO_LONG)
            elif given.scored <= 0 or alone.scored <= 0:
                yield EncodedPair.unscorable(Status.TOO_SHORT)
            else:
                yield self._checked(given, alone)

    def _in_window(self, pair: EncodedPair) -> bool:
        """Whether the direct answer fits too: the programs cut it a few tokens behind max_length."""
        return pair.direct is None or self.window is None or len(pair.direct.ids) <= self.window

    def _checked(self, given: Segment, alone: Segment) -> EncodedPair:
        if given.scored < self.min_answer_tokens:
            return EncodedPair.unscorable(Status.TOO_SHORT)
        return EncodedPair(given, alone)

    def _need_header(self, examples: Sequence[Example]) -> None:
        if any(not example.header or not example.special_tokens for example in examples):
            raise UserError(
                "definition='cherry' is defined for the Alpaca and WizardLM prompts only; the rows are in another "
                "format. Use definition='paper', or pass format='alpaca' or 'wizardlm'."
            )

    def _tokenize(self, texts: Sequence[str], special: bool) -> list[list[int]]:
        encoded = self.tokenizer(list(texts), add_special_tokens=special, return_attention_mask=False, verbose=False)
        return encoded["input_ids"]


def check_positive(**numbers: int | None) -> None:
    """Raise ValueError for what is no whole number of at least 1; None stands for a default.

    >>> check_positive(max_length=512, token_budget=None)
    """
    for name, number in numbers.items():
        whole = is_whole(number)
        if number is not None and not (whole and number >= 1):
            raise UserError(f"{name} must be a whole number of at least 1, got {number!r}.")


def direct_prefix(tokenizer: Any, header: str, special: bool) -> list[int]:
    """Token ids before a direct answer: the header, or BOS (else EOS) where a format has none.

    Raises:
        ValueError: when there is no header and the tokenizer has neither BOS nor EOS.
    """
    if header:
        ids = tokenizer(header, add_special_tokens=special, verbose=False)["input_ids"]
        return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return [token]
    raise UserError(
        "The format has no response header and the tokenizer has neither BOS nor EOS, so nothing can precede a direct "
        "answer. Set tokenizer.bos_token, or use a format with a header."
    )


class EndOfTurn:
    """Where an answer ends once a template's end-of-turn text is left out.

    Special tokens at the end, with white space between or after them, belong to the template (`<|im_end|>\\n`) or to
    the trainer (an EOS), not to the answer. Leaving them out makes the raw row and the tokenised row of the training
    loop score alike, and an answer that is nothing but EOS counts as empty.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.special = frozenset(tokenizer.all_special_ids)
        self._tokenizer = tokenizer
        self._blank: dict[int, bool] = {}

    def __call__(self, ids: Sequence[int], start: int) -> int:
        """The end (exclusive) of the answer in `ids[start:]`."""
        end, scan = len(ids), len(ids)
        while scan > start and (ids[scan - 1] in self.special or self._is_blank(ids[scan - 1])):
            scan -= 1
            if ids[scan] in self.special:
                end = scan
        return end

    def _is_blank(self, token: int) -> bool:
        if token not in self._blank:
            self._blank[token] = not self._tokenizer.decode([token]).strip()
        return self._blank[token]


class Turns:
    """Where answers begin and end in tokens, by the texts that a template writes around them (`Frame`).

    Labels or a prompt's tokens tell where an assistant's turn begins, which may be before, within or behind what the
    template writes before the answer. Tokens that hold more than the template's text are the answer's.

    Args:
        tokenizer: a `transformers` tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._trim = EndOfTurn(tokenizer)
        self._reaches: dict[str, int] = {}
        self._known: dict[str, tuple[list[int], list[int]]] = {}  # the last tokens that spelled a text, around a turn

    def __call__(
        self, ids: Sequence[int], start: int, end: int, frames: Sequence[Frame] = ()
    ) -> tuple[int | None, int, int]:
        """Where the header before the answer in `ids[start:end]`, the answer, and what follows it begin.

        The first of `frames` counts whose text stands around `start`; without one, there is no header to tell.
        """
        frames = [frame for frame in frames if frame.before]
        reach = max((self._reach(frame.before) for frame in frames), default=0)
        around: list[str] = []  # the texts before and behind `start`, if they are needed
        for frame in frames:
            opening = self._as_before(ids, start, frame.before)
            if opening is None:
                around = around or [
                    self._text(ids[max(start - reach, 0) : start]),
                    self._text(ids[start : start + reach]),
                ]
                opening = self._opening(ids, start, frame.before, *around)
            if opening is not None:
                afters = [other.after for other in frames if other.before == frame.before]
                end = min(self._closing(ids, opening[1], end, after) for after in afters)
                return *opening, self._trim(ids[:end], opening[1])
        return None, start, self._trim(ids[:end], start)

    def ending(self, after: Sequence[int]) -> tuple[int, ...]:
        """The tokens that end a turn, of those behind its answer: up to the first special one, which says so.

        Where nothing follows, the tokenizer's EOS, which trainers put there; without one, none. Where no special token
        follows at once, the template writes its end in words: then the first one.
        """
        special = self._trim.special
        if not len(after):
            eos = self._tokenizer.eos_token_id
            return () if eos is None else (eos,)
        size = next((size for size in range(1, min(len(after), _ENDING) + 1) if after[size - 1] in special), 1)
        return tuple(after[:size])

    def is_blank(self, ids: Sequence[int]) -> bool:
        """Whether tokens spell nothing but white space."""
        return not self._text(ids[:8]).strip() and not self._text(ids).strip()

    def _as_before(self, ids: Sequence[int], start: int, before: str) -> tuple[int, int] | None:
        """`_opening` for the tokens that spelled the text the last time: most rows are alike, and need no decoding."""
        left, right = self._known.get(before, (None, None))
        if left is None or ids[max(start - len(left), 0) : start] != left or ids[start : start + len(right)] != right:
            return None
        return start - len(left), start + len(right)

    def _opening(self, ids: Sequence[int], start: int, before: str, left: str, right: str) -> tuple[int, int] | None:
        """Tokens (first, end) that spell `before`, which stands around `start`; None where it does not.

        `left` and `right` are the texts before and behind `start`, long enough to hold it.
        """
        cuts = (cut for cut in range(len(before), -1, -1) if left.endswith(before[:cut]))
        cut = next((cut for cut in cuts if _starts(right, before[cut:])), None)
        if cut is None:
            return None
        size = self._spelled(ids[start:], before[cut:])
        said = before[:cut] + self._text(ids[start : start + size])
        first = start
        while first > 0 and not self._text(ids[first : start + size]).endswith(said):
            first -= 1
        if _alike(self._text(ids[start : start + size]), before[cut:]):
            self._known[before] = list(ids[first:start]), list(ids[start : start + size])
        return first, start + size

    def _closing(self, ids: Sequence[int], begin: int, end: int, after: str) -> int:
        """The end of an answer that ends at `end` with `after`, or with a start of it that goes on behind `end`."""
        core = after.rstrip()
        if not core:
            return end
        reach = self._reach(after)
        said = self._text(ids[max(end - reach, begin) : end]).rstrip()
        rest = self._text(ids[end : end + reach]).strip()
        for cut in range(len(core), 0, -1):
            part = core[:cut].rstrip()
            if said.endswith(part) and (cut == len(core) or (rest and rest.startswith(core[cut:].strip()))):
                first = end
                while first > begin and not self._text(ids[first:end]).rstrip().endswith(part):
                    first -= 1
                return first if _alike(self._text(ids[first:end]).rstrip(), part) else first + 1
        return end

    def _spelled(self, ids: Sequence[int], text: str) -> int:
        """How many tokens spell `text`, or the most of it that whole tokens do."""
        size = 0
        for count in range(1, min(len(ids), len(text.encode())) + 1):
            said = self._text(ids[:count])
            if _alike(said, text):
                return count
            if not _starts(text, said.rstrip("\N{REPLACEMENT CHARACTER}")):
                break
            size = size if said.endswith("\N{REPLACEMENT CHARACTER}") else count
        return size if text.strip(" ") else 0

    def _reach(self, text: str) -> int:
        """More tokens than spell a text, whatever it merges with at its ends."""
        if text not in self._reaches:
            self._reaches[text] = len(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) + 8
        return self._reaches[text]

    def _text(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _starts(text: str, start: str) -> bool:
    """Whether a text begins with another, whose first space a SentencePiece tokenizer leaves out at a start."""
    return text.startswith(start) or text.lstrip(" ").startswith(start.lstrip(" "))


def _alike(text: str, other: str) -> bool:
    return text == other or text.lstrip(" ") == other.lstrip(" ") != ""


def _blank_status(example: Example) -> Status | None:
    """What blank texts say of a row, under every definition."""
    if not example.answer.removesuffix(example.end).strip():
        return Status.EMPTY_ANSWER
    return None if example.asked else Status.EMPTY_PROMPT


def answer_span(labels: Sequence[int]) -> tuple[int, int]:
    """The last run of labels other than -100, as (start, end); (n, n) if there is none.

    >>> answer_span([-100, -100, 7, 8])
    (2, 4)
    """
    end = len(labels)
    while end and labels[end - 1] == IGNORE:
        end -= 1
    if not end:
        return len(labels), len(labels)
    start = end
    while start and labels[start - 1] != IGNORE:
        start -= 1
    return start, end


def header_before(prompt: Sequence[int], header: Sequence[int]) -> list[int]:
    """The part of `header` that stands before this answer: its longest start with which `prompt` ends.

    All of it, unless its last tokens merged with the answer's first; then the merged token is the answer's. The
    header's first tokens may be missing from the prompt's end: a BOS, or a token that reads otherwise inside a text.

    >>> header_before([7, 7, 1, 2], header=[1, 2, 3])
    [1, 2]
    """
    for first in range(len(header)):
        for size in range(len(header), first, -1):
            if list(prompt[-(size - first) :]) == list(header[first:size]):
                return list(header[:size])
    return list(header)


def token_budget_batches(
    lengths: Sequence[int], token_budget: int, scored: Sequence[int] | None = None, scored_budget: int | None = None
) -> list[np.ndarray]:
    """Partition segments into batches that, padded to their longest, hold at most `token_budget` tokens.

    Segments are sorted by length, longest first, so that a batch pads little and running out of memory shows at
    once. A segment longer than the budget is a batch of its own. `scored` and `scored_budget` bound the scored tokens
    of a batch (and with them its logits) in the same way.

    Returns:
        Index arrays, a partition of range(len(lengths)).

    >>> [batch.tolist() for batch in token_budget_batches([3, 9, 4], 8)]
    [[1], [2, 0]]
    """
    lengths = np.asarray(lengths)
    counts = np.zeros_like(lengths) if scored is None else np.asarray(scored)
    batches, batch, total = [], [], 0
    for index in np.argsort(-lengths, kind="stable"):
        longest = lengths[batch[0]] if batch else lengths[index]
        full = (len(batch) + 1) * longest > token_budget
        full |= scored_budget is not None and total + counts[index] > scored_budget
        if batch and full:
            batches.append(np.array(batch))
            batch, total = [], 0
        batch.append(int(index))
        total += counts[index]
    if batch:
        batches.append(np.array(batch))
    return batches


def _by_kind(item: tuple[int, Example]) -> bool:
    return item[1].special_tokens
