"""Gates for synthetic rows: what a model wrote is let through or held back, each row with a reason.

Source: SELF-GUIDE (arXiv 2407.12874), whose filters are a list of phrases, and the lengths of the examples that rows
were generated from: mean +- 2 standard deviations, in characters. Repetition, answers that repeat their prompt, and
copies are beyond the paper, as is `MatchedGate` (see `method.spin`).

A gate decides from numbers, which are measured on texts in `data.gate_measures`. It sees which rows the gates before it
let through: what it drops is counted once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol, get_args

import numpy as np

from ..errors import UserError
from .choices import SIMILARITY
from .duplicates import Duplicates, surplus
from .number_types import is_number, is_whole
from .reasons import BOILERPLATE, COPY, DUPLICATE, ECHO, KEPT, LENGTH, NEAR_EMPTY, REPETITIVE

Part = Literal["answer", "prompt", "both"]  # which texts' lengths count
Compared = Literal["row", "prompt"]  # which texts are the same in a copy

# How an assistant begins that answers a person, and not an exercise. At the start of an answer alone.
GREETINGS = (
    *("sure, here", "sure! here", "sure, i", "sure! i", "of course!", "certainly!", "absolutely!", "great question"),
    *(
        "good question",
        "that's a good question",
        "that's a great question",
        "thanks for asking",
        "thank you for asking",
    ),
    *("i'm glad you asked", "i'm here to help", "i'd be happy to help", "i would be happy to help", "let me help you"),
    *("i apologize", "my apologies", "based on the examples", "based on your example", "based on the given example"),
)
# What a generation prompt or a chat template writes, and no answer. Anywhere.
LEAKS = (
    *("### instruction", "### input", "### response", "### human", "### assistant", "[input]=", "[output]="),
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "[inst]", "[/inst]", "<start_of_turn>"),
)


@dataclass(frozen=True)
class GateMeasures:
    """What gates decide from, of n rows and of m examples that they were generated from.

    Attributes:
        answer_lengths, prompt_lengths: (n,) characters, without white space at the ends.
        letters: (n,) letters and digits of the answers.
        repetition: (n,) share of an answer's runs of four words that stood in it before; 0 of a shorter one.
        echo: (n,) how far the answer's runs of four words are the prompt's (Jaccard), from 0 to 1.
        boilerplate: (n,) bool, answers with a phrase that a `NoiseGate` looks for.
        example_answer_lengths, example_prompt_lengths: (m,) of the examples.
        groups: (m + n,) the group of each example and, behind them, of each row, of texts that say the same; None where
            nobody looked.
        order: (n,) numbers; of rows that say the same, the one with the lowest stays.
        columns: (n,) each, other numbers of the rows by name.
    """

    answer_lengths: np.ndarray
    prompt_lengths: np.ndarray
    letters: np.ndarray
    repetition: np.ndarray
    echo: np.ndarray
    boilerplate: np.ndarray
    example_answer_lengths: np.ndarray = field(default_factory=lambda: np.zeros(0))
    example_prompt_lengths: np.ndarray = field(default_factory=lambda: np.zeros(0))
    groups: np.ndarray | None = None
    order: np.ndarray | None = None
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.answer_lengths)


class Gate(Protocol):
    """Anything with a `name` that maps measures, and the rows let through so far, to reasons: None for a row to keep.

    One that reads columns of the data set names them in `columns`.
    """

    name: ClassVar[str]

    def __call__(self, measures: GateMeasures, passed: np.ndarray) -> np.ndarray: ...


def gate(measures: GateMeasures, gates: Sequence[Gate], usable: np.ndarray | None = None) -> np.ndarray:
    """The reason of each row, (n,): `kept`, or that of the first gate that holds it back; None for a row not looked at.

    Args:
        measures: of the rows.
        gates: in their order; each of a kind once.
        usable: (n,) bool, rows to look at; all by default.

    Raises:
        UserError: for no gate, or two of a kind.

    >>> lengths = np.array([10.0, 12.0, 11.0, 90.0])
    >>> zeros, no = np.zeros(4), np.zeros(4, dtype=bool)
    >>> of_examples = {"example_answer_lengths": np.array([9.0, 13.0])}
    >>> measures = GateMeasures(lengths, lengths, lengths, zeros, zeros, no, **of_examples)
    >>> gate(measures, [LengthGate()]).tolist()
    ['kept', 'kept', 'kept', 'length_outlier']
    """
    names = [each.name for each in gates]
    if not names or len(set(names)) < len(names):
        raise UserError(f"Each gate is given once, and one at least; got {', '.join(names) or 'none'}.")
    passed = np.ones(len(measures), dtype=bool) if usable is None else np.array(usable, dtype=bool)
    reasons = np.where(passed, KEPT, None).astype(object)
    for each in gates:
        found = np.asarray(each(measures, passed.copy()), dtype=object)
        dropped = passed & np.array([reason is not None for reason in found], dtype=bool)
        reasons[dropped] = found[dropped]
        passed &= ~dropped
    return reasons


@dataclass(frozen=True)
class LengthGate:
    """Hold back rows whose length is far from that of the examples: `length_outlier`.

    With the mean m and the standard deviation s (of the population) of the examples' lengths in characters, a row is
    let through from m - deviations * s to m + deviations * s, the ends included. Without examples, m and s are those of
    the rows that were let through so far. A long tail of lengths makes s large: few short rows are found then.

    Args:
        deviations: above 0; the paper takes 2.
        of: "answer", "prompt", or "both", where each has to be in the range of its own (so the paper).

    Raises:
        UserError: on use, for fewer than two examples and, without any, fewer than two rows.
    """

    name: ClassVar[str] = "length"
    deviations: float = 2.0
    of: Part = "answer"

    def __post_init__(self) -> None:
        _check_number("deviations", self.deviations, above=0.0)
        _check_word("of", self.of, get_args(Part))

    def __call__(self, measures: GateMeasures, passed: np.ndarray) -> np.ndarray:
        found = np.full(len(measures), None, dtype=object)
        of_rows = {"answer": measures.answer_lengths, "prompt": measures.prompt_lengths}
        examples = {"answer": measures.example_answer_lengths, "prompt": measures.example_prompt_lengths}
        for part in ("answer", "prompt") if self.of == "both" else (self.of,):
            low, high = self.range(examples[part] if len(examples[part]) else of_rows[part][passed])
            found[(of_rows[part] < low) | (of_rows[part] > high)] = LENGTH
        return found

    def range(self, lengths: np.ndarray) -> tuple[float, float]:
        """The shortest and the longest length that are let through, by those of the examples.

        >>> LengthGate(2.0).range(np.array([2.0, 4.0]))
        (1.0, 5.0)
        """
        lengths = np.asarray(lengths, dtype=np.float64)
        if len(lengths) < 2:
            raise UserError(
                f"The gate length goes by the mean and the standard deviation of lengths, and there "
                f"{'is one' if len(lengths) else 'is none'}: give two examples or more, or leave the gate out."
            )
        mean, most = float(lengths.mean()), self.deviations * float(lengths.std())
        return mean - most, mean + most


@dataclass(frozen=True)
class NoiseGate:
    """Hold back answers that are no answers, told by rules; of several reasons the first one here.

    - `near_empty`: fewer than `least` letters and digits.
    - `boilerplate`: begins with one of `greetings`, holds one of `leaks`, or, with `refusals`, looks like a refusal or
      speaks of itself as a language model (see `data.refused_answers`). English phrases.
    - `repetitive`: of its runs of four words, a share of `repetition` or more stood in it before.
    - `echoes_prompt`: its runs of four words are those of the prompt, to a share (Jaccard) of `echo` or more; of texts
      of fewer words, the same words.

    Args:
        least: a whole number of at least 0.
        repetition, echo: shares above 0; above 1 for never.
        greetings, leaks: phrases; case, kinds of apostrophes and white space do not count.
        refusals: whether refusals are noise.
    """

    name: ClassVar[str] = "noise"
    least: int = 1
    repetition: float = 0.6
    echo: float = 0.8
    greetings: tuple[str, ...] = GREETINGS
    leaks: tuple[str, ...] = LEAKS
    refusals: bool = True

    def __post_init__(self) -> None:
        if not is_whole(self.least) or self.least < 0:
            raise UserError(f"least must be a whole number of at least 0, got {self.least!r}.")
        _check_number("repetition", self.repetition, above=0.0)
        _check_number("echo", self.echo, above=0.0)
        for field_name in ("greetings", "leaks"):
            phrases = getattr(self, field_name)
            if isinstance(phrases, str) or not all(isinstance(each, str) and each.strip() for each in phrases):
                raise UserError(f"{field_name} are phrases, none of them blank, got {phrases!r}.")
            object.__setattr__(self, field_name, tuple(phrases))

    def __call__(self, measures: GateMeasures, passed: np.ndarray) -> np.ndarray:
        found = np.full(len(measures), None, dtype=object)
        found[measures.echo >= self.echo] = ECHO
        found[measures.repetition >= self.repetition] = REPETITIVE
        found[measures.boilerplate] = BOILERPLATE
        found[measures.letters < self.least] = NEAR_EMPTY
        return found


@dataclass(frozen=True)
class CopyGate:
    """Hold back rows that say what an example says, `copy_of_example`, or what another row says, `duplicate`.

    Of rows that say the same the one with the lowest id stays. What is the same is told as by `data.duplicates`.

    Args:
        similarity: from which share of common shingles on texts are the same, from 0.5 to 1; None for equal texts.
        of: "row", prompt and answer alike, or "prompt", whatever the answers.
    """

    name: ClassVar[str] = "copies"
    similarity: float | None = SIMILARITY
    of: Compared = "row"

    def __post_init__(self) -> None:
        Duplicates(self.similarity)  # refuses what is no similarity
        _check_word("of", self.of, get_args(Compared))

    def __call__(self, measures: GateMeasures, passed: np.ndarray) -> np.ndarray:
        found = np.full(len(measures), None, dtype=object)
        if measures.groups is None:
            raise UserError("The gate copies goes by groups of texts that say the same, which were not measured.")
        examples, groups = np.split(measures.groups, [len(measures.groups) - len(measures)])
        copies = np.isin(groups, examples)
        order = np.arange(len(measures)) if measures.order is None else measures.order
        found[surplus(groups, order, passed & ~copies, np.zeros(len(measures), dtype=bool))] = DUPLICATE
        found[copies] = COPY
        return found


def _check_number(name: str, value: object, above: float) -> None:
    if not (is_number(value) and value > above and np.isfinite(value)):
        raise UserError(f"{name} must be a number above {above:g}, got {value!r}.")


def _check_word(name: str, value: object, words: Sequence[str]) -> None:
    if value not in words:
        raise UserError(f"{name} must be one of {', '.join(words)}, got {value!r}.")
