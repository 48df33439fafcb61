"""Rows of a pool that say the same as another one: equal after normalisation, or nearly equal.

Two rows (prompt, answer) are duplicates when they are equal after normalisation, or when the Jaccard similarity of
their sets of shingles

    J(A, B) = |A & B| / |A | B|

reaches a threshold t for the prompts AND for the answers: the same prompt with another answer is no duplicate, nor is
the same answer to another prompt. One case is judged as a whole: where the answers are equal, J >= t of the prompts and
answers together, and J >= 0.6 of the prompts. For a wrong letter is a large part of a short prompt, and a long answer
word for word is no chance (of ten pairs among 6,126 real rows that have one answer and similar prompts, eight ask for
the same; none reaches these limits); a short one ("yes") leaves the prompts to decide. All of this has to hold for the
J of all shingles, and again for the J of those that count. Numbers and signs of calculation (`12 + 7`, `x < 3`) have to
be the same in the same order: other ones are another exercise.

What is compared are letters, not meanings. One word more or less ("not") is nearly the same in a long text and not the
same in a short one; a paraphrase is another text.

- A shingle is four successive bytes of a text in UTF-8: without a tokenizer, in any script, and as one integer. Of
  three bytes, long texts of one language share too many (J = 0.5 between unrelated texts of 40,000 characters, 0.3 of
  five); of five, a wrong letter weighs more in a short text.
- A shingle that more than a tenth of the rows share does not count: the preamble of a template, words that every text
  has. A text of which no shingle counts is a duplicate only of an equal one. The other side of it: near duplicates that
  are themselves more than a tenth of the rows are not found.
- Candidates are found by MinHash and locality sensitive hashing (`datasketch`; Broder 1997; Leskovec, Rajaraman and
  Ullman, Mining of Massive Datasets, chapter 3) and compared by J itself. Of the pairs at the threshold, at most one in
  a thousand is missed, and far fewer above it.

52,000 rows of 850 characters took 30 s on one core and 450 MB, 200,000 took 178 s and 1.4 GB (a busy machine); half of
the time and most of the memory are those of `datasketch`, whose hash tables are Python's.
"""

from __future__ import annotations

import heapq
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b

import numpy as np

from ..errors import UserError
from ..method.choices import SIMILARITY

SHINGLE_BYTES = 4
PROMPTS_OF_ONE_ANSWER = 0.6  # J from which on they ask for the same, if the answers are long and equal
COMMON_SHARE = 0.1  # of the rows: a shingle that more of them have does not count
COMMON_ROWS = 10  # at least: in a pool of a few rows, two duplicates are a large share
SAMPLED_ROWS = 2000  # by which that share is estimated
PERMUTATIONS = 96
MISSED = 0.001  # of the pairs whose similarity is just the threshold

Row = tuple[bytes, bytes]  # prompt and answer, normalised

_WRITTEN_ALIKE = str.maketrans(
    {
        **dict.fromkeys('‘’‚‛“”„‟«»‹›「」『』"`´ʼ', "'"),
        **dict.fromkeys("‐‑‒–—―−", "-"),
        **dict.fromkeys("。、，！？；：¿¡؟،؛।", " "),  # the last of a sentence or clause, as _STOPS is in ASCII
        **dict.fromkeys("\u00ad\u200b\u2060\ufeff", None),  # not to be seen
    }
)
_STOPS = re.compile(r"[.!?,;:]+(?=[')\]}]*\s)")
_BESIDE_PUNCTUATION = re.compile(r" (?=[!-/:-@\[-^{-~])|(?<=[!-/:-@\[-^{-~]) ")
_LONG_RUN = re.compile(r"([\W_])\1{3,}")
_EXERCISE = re.compile(r"\d+|!=|[+*/%^<>=&|~×÷±≤≥≠≈]")

_PART = 8 * SHINGLE_BYTES  # the bit above a shingle tells answer (1) from prompt (0)
_BLOCK_BYTES = 1 << 20  # of text whose shingles are held at a time


def duplicate_groups(texts: Iterable[tuple[str, str]], similarity: float | None = SIMILARITY) -> np.ndarray:
    """Which of n rows say the same: the connected components of the pairs that are duplicates.

    The groups depend on the texts alone: not on the order of the rows, the platform or a seed.

    Args:
        texts: prompt and answer of each row; held, normalised, until the end.
        similarity: the threshold t of the Jaccard similarity, 0.5 to 1; None finds only rows that are equal after
            `normalised`.

    Returns:
        (n,) int64, for each row the position of the first row of its group; its own where there is no duplicate before.

    Raises:
        ValueError: for a similarity outside 0.5 to 1.

    >>> rows = [("Name a colour.", "Red"), ("name a  colour", "Red."), ("Name a colour.", "Blue")]
    >>> duplicate_groups(rows).tolist()
    [0, 0, 2]
    """
    if similarity is not None and not 0.5 <= similarity <= 1:
        raise UserError(
            f"similarity must be 0.5 to 1, or None for rows that are equal after normalisation; got {similarity!r}."
        )
    distinct: dict[Row, int] = {}  # each row that differs, and its number among them
    firsts, numbers = [], []
    for position, (prompt, answer) in enumerate(texts):
        row = _encoded(prompt), _encoded(answer)
        number = distinct.setdefault(row, len(distinct))
        if number == len(firsts):
            firsts.append(position)
        numbers.append(number)
    roots = np.arange(len(distinct)) if similarity is None else _joined(list(distinct), similarity)
    return np.array(firsts, dtype=np.int64)[roots[np.array(numbers, dtype=np.int64)]]


def normalised(text: str) -> str:
    """A text as it is compared: without case, kinds of quotes and dashes, white space, and stops at the end of words.

    Unicode's NFKC and case folding; stops (`. ! ? , ; :`) go where white space or the end follows, so `3.14`, `a.b` and
    `!=` stay; white space becomes one space, and none beside the punctuation of ASCII, so that `a+b` is `a + b` and
    never `a-b`; a run of more than three of the same character that is no letter becomes three (lines, `!!!!`), as
    `=`, `==` and `===` differ.

    >>> normalised("What is “3.14 +  x”?"), normalised("if (x<3) { return; }")
    ("what is'3.14+x'", 'if(x<3){return}')
    """
    text = text.translate(_WRITTEN_ALIKE)
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    text = " ".join(_STOPS.sub(" ", text + " ").split())
    return _LONG_RUN.sub(r"\1\1\1", _BESIDE_PUNCTUATION.sub("", text))


def _encoded(text: str) -> bytes:
    return normalised(text).encode("utf-8", "surrogatepass")


def _joined(rows: Sequence[Row], similarity: float) -> np.ndarray:
    """(n,) for each of n distinct rows the first one of its group."""
    from datasketch import MinHash, MinHashLSH  # imports parts of SciPy

    parents = list(range(len(rows)))

    def root(row: int) -> int:
        while parents[row] != row:
            parents[row] = row = parents[parents[row]]
        return row

    common, exercises = _common_shingles(rows), [_exercise(row) for row in rows]
    empty = MinHash(num_perm=PERMUTATIONS, hashfunc=_as_it_is)
    index = MinHashLSH(num_perm=PERMUTATIONS, params=_bands(similarity))
    for row, hashes in _hashes(rows, exercises, common):
        sketch = empty.copy()
        sketch.update_batch([hashes])  # one value, for which datasketch calls a function, not one for each shingle
        for other in index.query(sketch):
            mine, others = root(row), root(other)
            if mine == others or exercises[row] != exercises[other]:
                continue
            if _alike(rows[row], rows[other], common, similarity):
                parents[max(mine, others)] = min(mine, others)
        index.insert(row, sketch, check_duplication=False)
    return np.array([root(row) for row in range(len(rows))], dtype=np.int64)


def _as_it_is(hashes: np.ndarray) -> np.ndarray:
    return hashes


def _bands(similarity: float) -> tuple[int, int]:
    """Bands and their height h, as high as can be with (1 - similarity^h)^bands at most `MISSED`.

    Pairs are looked for by the J of prompts and answers together, which is at least the lower one of the two.

    >>> _bands(0.85)
    (16, 6)
    """
    heights = range(1, PERMUTATIONS // 2 + 1)
    height = max(h for h in heights if (1 - similarity**h) ** (PERMUTATIONS // h) <= MISSED)
    return PERMUTATIONS // height, height


def _exercise(row: Row) -> int:
    """A number for the figures and signs of a row, in their order: rows that differ here have no shingle in common."""
    found = ("\t".join(_EXERCISE.findall(part.decode("utf-8", "surrogatepass"))) for part in row)
    return int.from_bytes(blake2b("\n".join(found).encode(), digest_size=8).digest(), "little")


def _shingles(rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray]:
    """All shingles of some rows, (s,) uint64, and the number of the row of each, (s,) int64, in its order.

    A text has a space before and after it, so that words at its ends are as those within.
    """
    parts = [b" %b " % part for row in rows for part in row]
    text = np.frombuffer(b"".join(parts), dtype=np.uint8).astype(np.uint64)
    lengths = np.array([len(part) for part in parts], dtype=np.int64)
    values = text[: len(text) - SHINGLE_BYTES + 1].copy()
    for place in range(1, SHINGLE_BYTES):
        values |= text[place : place + len(values)] << np.uint64(8 * place)
    part = np.repeat(np.arange(len(parts)), lengths)[: len(values)]
    whole = np.arange(SHINGLE_BYTES, SHINGLE_BYTES + len(values)) <= np.cumsum(lengths)[part]
    values, part = values[whole], part[whole]
    return values | ((part & 1).astype(np.uint64) << np.uint64(_PART)), part >> 1


def _common_shingles(rows: Sequence[Row]) -> np.ndarray:
    """The shingles that do not count, (c,) uint64, sorted.

    A sample tells: rows that their digests choose, so that it is the same sample in any order of the rows.
    """
    sample = heapq.nsmallest(SAMPLED_ROWS, rows, key=lambda row: blake2b(b"\xff".join(row), digest_size=8).digest())
    of_rows = [np.zeros(0, dtype=np.uint64)]
    for _, block in _blocks(sample):
        values, row = _shingles(block)
        once = _sorted_unique(values | (row.astype(np.uint64) << np.uint64(_PART + 1)))
        of_rows.append(once & np.uint64((1 << _PART + 1) - 1))
    values = np.sort(np.concatenate(of_rows))
    most = max(COMMON_ROWS, int(COMMON_SHARE * len(sample)))
    return _sorted_unique(values[most:][values[most:] == values[: max(len(values) - most, 0)]])


def _hashes(rows: Sequence[Row], exercises: Sequence[int], common: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Each row that has shingles that count, and their hashes, uint32."""
    for start, block in _blocks(rows):
        values, row = _shingles(block)
        counts = ~_among(values, common)
        values, row = values[counts], row[counts]
        values ^= np.array(exercises[start : start + len(block)], dtype=np.uint64)[row]
        hashes = ((values * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(32)).astype(np.uint32)
        edges = np.searchsorted(row, np.arange(len(block) + 1))
        for number in np.flatnonzero(np.diff(edges)).tolist():
            yield start + number, hashes[edges[number] : edges[number + 1]]


def _blocks(rows: Sequence[Row]) -> Iterator[tuple[int, Sequence[Row]]]:
    """Rows in parts of about `_BLOCK_BYTES`, each with the number of its first row."""
    start = held = 0
    for number, row in enumerate(rows):
        held += len(row[0]) + len(row[1])
        if held >= _BLOCK_BYTES or number + 1 == len(rows):
            yield start, rows[start : number + 1]
            start, held = number + 1, 0


def _alike(first: Row, second: Row, common: np.ndarray, similarity: float) -> bool:
    """Whether two distinct rows are duplicates, by all their shingles and by those that count."""
    equal = np.array([a == b for a, b in zip(first, second, strict=True)])  # (2,) prompts, answers
    a, b = (_sorted_unique(_shingles([row])[0]) for row in (first, second))
    for _ in range(2):
        both = np.sort(np.concatenate([a, b]))
        shared = _by_part(both[1:][both[1:] == both[:-1]])
        together = _by_part(both) - shared
        if equal[1]:
            prompts = shared[0] >= PROMPTS_OF_ONE_ANSWER * together[0] > 0
            alike = prompts and shared.sum() >= similarity * together.sum()
        else:
            alike = (equal | (together > 0) & (shared >= similarity * together)).all()
        if not alike:
            return False
        a, b = a[~_among(a, common)], b[~_among(b, common)]
    return True


def _by_part(values: np.ndarray) -> np.ndarray:
    """How many of the sorted shingles are the prompt's and the answer's, (2,)."""
    prompt = int(np.searchsorted(values, np.uint64(1 << _PART)))
    return np.array([prompt, len(values) - prompt])


def _among(values: np.ndarray, some: np.ndarray) -> np.ndarray:
    """Which values are among some, which are sorted; (s,) bool."""
    if not len(some):
        return np.zeros(len(values), dtype=bool)
    return some[np.minimum(np.searchsorted(some, values), len(some) - 1)] == values


def _sorted_unique(values: np.ndarray) -> np.ndarray:
    """As np.unique, which hashes integers first: 4 to 20 times slower here."""
    values = np.sort(values)
    return values[np.append(True, values[1:] != values[:-1])[: len(values)]]
