"""What gates for synthetic rows decide from, measured on the rows' texts; what they decide is in `method.gates`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset

from ..errors import UserError
from ..method.gates import CopyGate, Gate, GateMeasures, NoiseGate, gate
from ..method.text_agreement import word_splitter
from .duplicates import duplicate_groups
from .formats import PromptFormat
from .readable_text import row_texts
from .refused_answers import looks_like_refusal
from .table_reader import TableReader

Texts = tuple[str, str]  # prompt and answer of a row

RUN = 4  # words: runs of them are what repeats, and what an answer has of its prompt
_APOSTROPHES = re.compile("[‘’ʼ＇`´′]")


def measured(
    texts: Iterable[Texts],
    gates: Sequence[Gate],
    examples: Iterable[Texts] = (),
    columns: Mapping[str, np.ndarray] | None = None,
    order: np.ndarray | None = None,
) -> GateMeasures:
    """Measure what these gates decide from; what none of them reads is not looked for.

    Args:
        texts: prompt and answer of n rows.
        gates: of which the phrases of a `NoiseGate` and the similarity of a `CopyGate` are taken.
        examples: prompt and answer of the m examples that rows were generated from.
        columns: numbers of the rows, (n,) each, by name.
        order: (n,) numbers that sort as the ids of rows do; positions by default.

    >>> rows = [("Name a cat.", "Name a cat."), ("Name a dog.", "Sure! Here is one: Rex.")]
    >>> found = measured(rows, [NoiseGate()])
    >>> found.echo.tolist(), found.boilerplate.tolist(), found.groups is None
    ([1.0, 0.0], [False, True], True)
    """
    noise = next((each for each in gates if isinstance(each, NoiseGate)), None)
    copies = next((each for each in gates if isinstance(each, CopyGate)), None)
    noisy, words = _phrases(noise), word_splitter() if noise is not None else None
    examples, held = list(examples), []
    numbers: list[tuple[float, ...]] = []

    def looked_at() -> Iterable[Texts]:
        for prompt, answer in texts:
            of_noise = (0, 0.0, 0.0, False)
            if words is not None:
                said = words(answer)
                of_noise = (_letters(answer), repetition(said), echo(said, words(prompt)), noisy(answer))
            numbers.append((len(answer.strip()), len(prompt.strip()), *of_noise))
            yield prompt, answer

    if copies is None:
        for _ in looked_at():
            pass
        groups = None
    else:
        held = [*examples, *looked_at()]
        compared = ((prompt, answer if copies.of == "row" else "") for prompt, answer in held)
        groups = duplicate_groups(compared, copies.similarity)
    found = np.array(numbers, dtype=np.float64).reshape(len(numbers), 6)
    lengths = [[len(text.strip()) for text in (answer, prompt)] for prompt, answer in examples]
    of_examples = np.array(lengths, dtype=np.float64).reshape(len(lengths), 2)
    return GateMeasures(
        *found[:, :5].T,
        boilerplate=found[:, 5].astype(bool),
        example_answer_lengths=of_examples[:, 0],
        example_prompt_lengths=of_examples[:, 1],
        groups=groups,
        order=order,
        columns=columns or {},
    )


def gate_rows(
    rows: Dataset,
    gates: Sequence[Gate],
    examples: Dataset | Iterable[Mapping[str, Any]] = (),
    format: PromptFormat | None = None,
) -> np.ndarray:
    """What becomes of each row of a data set, (n,): `kept`, or the reason for which a gate holds it back.

    Args:
        rows: the data set.
        gates: `LengthGate`, `NoiseGate`, `CopyGate`, `MatchedGate`, or of your own; see `method.gates`.
        examples: rows that these were generated from, in a format of their own perhaps. Chats are compared with the
            roles of their messages, and so are alike to chats alone.
        format: how the rows are read; told from the names of their columns by default.

    Raises:
        UserError: for rows or examples without texts of a known kind, and for a column that a gate reads and is not
            there or holds no numbers.

    >>> ds = Dataset.from_dict({"instruction": ["Name a cat."] * 2, "output": ["Tom.", "tom"]})
    >>> gate_rows(ds, [CopyGate()]).tolist()
    ['kept', 'duplicate']
    """
    if not isinstance(rows, Dataset):
        raise UserError(f"gate_rows reads a datasets.Dataset, got a {type(rows).__name__}: load it first.")
    reader = TableReader(rows)
    columns = numbers_read(gates, reader.column_names, reader.column)
    return gate(measured(row_texts(reader, format), gates, example_texts(examples), columns), gates)


def example_texts(examples: Dataset | Iterable[Mapping[str, Any]]) -> list[Texts]:
    """Prompt and answer of examples, read in the format that the names of their columns tell."""
    if not isinstance(examples, Dataset):
        examples = list(examples)
        if not examples:
            return []
        examples = Dataset.from_list([dict(row) for row in examples])
    return list(row_texts(TableReader(examples)))


def numbers_read(
    gates: Sequence[Gate], names: Sequence[str], read: Callable[[str], pa.ChunkedArray]
) -> dict[str, np.ndarray]:
    """The columns that gates read, (n,) float64 each, NaN for null; those that are not there are left out.

    Raises:
        UserError: for a column without numbers.
    """
    found = {}
    for name in dict.fromkeys(name for each in gates for name in getattr(each, "columns", ())):
        if name not in names:
            continue
        values = read(name)
        numbers = pa.types.is_integer(values.type) or pa.types.is_floating(values.type) or pa.types.is_null(values.type)
        if not numbers:
            raise UserError(f"A gate reads numbers in the column {name!r}, which holds {values.type}.")
        found[name] = values.cast(pa.float64(), safe=False).to_pandas().to_numpy(dtype=float)
    return found


def repetition(words: Sequence[str]) -> float:
    """The share of a text's runs of four words that stood in it before; 0 of a text without two such runs.

    >>> repetition("a b c d a b c d".split()), repetition("a b c d".split())
    (0.2, 0.0)
    """
    runs = _runs(words)
    return (len(runs) - len(set(runs))) / len(runs) if len(runs) > 1 else 0.0


def echo(answer: Sequence[str], prompt: Sequence[str]) -> float:
    """How far the runs of four words of an answer are those of its prompt: shared runs by all; of short texts 0 or 1.

    >>> echo("add one and two".split(), "add one and two now".split()), echo(["yes"], ["yes"]), echo([], [])
    (0.5, 1.0, 0.0)
    """
    said, asked = set(_runs(answer)), set(_runs(prompt))
    if said and asked:
        return len(said & asked) / len(said | asked)
    return float(bool(answer) and list(answer) == list(prompt))


def _runs(words: Sequence[str]) -> list[tuple[str, ...]]:
    return list(zip(*(words[start:] for start in range(RUN)), strict=False))


def _letters(text: str) -> int:
    return sum(map(str.isalnum, text))


def _phrases(gate: NoiseGate | None) -> Callable[[str], bool]:
    """Whether an answer holds one of the gate's phrases."""
    if gate is None:
        return lambda answer: False
    greetings, leaks = (tuple(map(_folded, phrases)) for phrases in (gate.greetings, gate.leaks))

    def found(answer: str) -> bool:
        text = _folded(answer)
        return (
            (bool(greetings) and text.startswith(greetings))
            or any(leak in text for leak in leaks)
            or (gate.refusals and looks_like_refusal(answer))
        )

    return found


def _folded(text: str) -> str:
    return " ".join(_APOSTROPHES.sub("'", text).casefold().split())
