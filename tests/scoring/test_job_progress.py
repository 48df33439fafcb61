"""What a scoring job says of its length: in tokens, before it starts and after its first batch, without jumps."""

from __future__ import annotations

import itertools
import re
from types import SimpleNamespace

import pytest
from datasets import Dataset

from ifd_trainer import IFDScorer
from ifd_trainer.data.encoding import token_count
from ifd_trainer.data.text_bytes import text_bytes
from ifd_trainer.scoring.job_progress import JobProgress
from ifd_trainer.scoring.turns import EncodedTurns

SIZE = 16
# Four parts of short and long answers in turn, and one part of both.
LENGTHS = [2] * SIZE + [20] * SIZE + [3] * SIZE + [30] * SIZE + [5, 25] * (SIZE // 2)
SIZES = [SIZE] * 5


@pytest.fixture
def rows() -> Dataset:
    texts = [" ".join(f"word{(i * 7 + j) % 50}" for j in range(n)) for i, n in enumerate(LENGTHS)]
    return Dataset.from_dict(
        {"instruction": ["Name a few."] * len(texts), "output": texts, "other": ["x" * 999] * len(texts)}
    )


@pytest.fixture
def encoded(rows, model, tokenizer) -> list:
    return IFDScorer(model, tokenizer).encode(rows[:])


def seconds(text: str) -> int:
    values = [int(value) for value in text.split(":")]
    return sum(value * 60**i for i, value in enumerate(reversed(values)))


def run(rows, encoded, monkeypatch, capsys, order=range(5), columns=("instruction", "output")) -> tuple[str, list[int]]:
    """What is said by a device of 100 tokens a second; the last rate, and what is left after each batch of 4 rows."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("tqdm.std.time", lambda: clock.now)
    monkeypatch.setattr("ifd_trainer.scoring.job_progress.time", SimpleNamespace(monotonic=lambda: clock.now))
    expected, done = [], 0
    total = token_count(encoded)
    with JobProgress(rows, SIZES, [], columns) as progress:
        for number in order:
            pairs = encoded[number * SIZE : (number + 1) * SIZE]
            after = progress.begin(number, EncodedTurns.single(pairs).tokens)
            for start in range(0, SIZE, 4):
                tokens = token_count(pairs[start : start + 4])
                done += tokens
                clock.now += tokens / (100 if expected else 5)  # in the first batch, a model is made ready
                after(tokens)
                expected.append((total - done) / 100)
            progress.update(SIZE * (list(order).index(number) + 1))
    said = capsys.readouterr().err
    return said, expected


def test_the_length_of_a_job_is_told_from_its_texts_before_it_starts(rows, encoded, monkeypatch, capsys):
    said, _ = run(rows, encoded, monkeypatch, capsys, order=(4, 0, 1, 2, 3))
    tokens = int(re.search(r"Scoring 80 rows: about ([\d,]+) tokens\.", said)[1].replace(",", ""))
    assert tokens == pytest.approx(token_count(encoded), rel=0.05)
    assert token_count(encoded) // 100 in range(150, 210)
    assert "Scoring runs at 100 tokens/s: what is left takes about 2 min." in said


def test_what_is_left_does_not_jump_between_parts_of_short_and_of_long_rows(rows, encoded, monkeypatch, capsys):
    said, expected = run(rows, encoded, monkeypatch, capsys, order=(4, 0, 1, 2, 3))
    shown = [seconds(text) for text in re.findall(r"<([\d:]+), +[\d.]+k?tok/s\]", said)]
    # Nothing is said of the first batch, and the bar's last line comes again.
    assert shown[: len(expected) - 1] == pytest.approx(expected[1:], abs=0.03 * expected[0])
    assert re.findall(r"Scoring (\d+)/80 rows: 100%", said)[-1] == "80"


def test_no_rate_is_below_zero(rows, encoded, monkeypatch, capsys):
    clock = itertools.count()
    monkeypatch.setattr("tqdm.std.time", lambda: 1e-6 * next(clock))  # some time goes by between any two looks
    with JobProgress(rows, SIZES, [], ["instruction", "output"]) as progress:
        pairs = encoded[:SIZE]
        after = progress.begin(0, EncodedTurns.single(pairs).tokens)
        for pair in pairs:
            after(token_count([pair]))
    said = capsys.readouterr().err
    assert "tok/s" in said
    assert not re.search(r"-[\d.]+[kM]?tok/s|<-", said)


def test_rows_that_were_scored_before_are_said(rows, encoded, capsys):
    with JobProgress(rows, SIZES, [0, 1, 2], ["instruction", "output"]) as progress:
        progress.begin(3, EncodedTurns.single(encoded[3 * SIZE : 4 * SIZE]).tokens)
    said = capsys.readouterr().err
    tokens = int(
        re.search(r"Scoring 80 rows, of which 48 are done already: about ([\d,]+) tokens\.", said)[1].replace(",", "")
    )
    assert tokens == pytest.approx(token_count(encoded[3 * SIZE :]), rel=0.2)


def test_a_process_that_shows_nothing_says_nothing(rows, encoded, capsys):
    with JobProgress(rows, SIZES, [], shown=False) as progress:
        progress.begin(0, EncodedTurns.single(encoded[:SIZE]).tokens)(10)
        progress.update(SIZE)
    assert capsys.readouterr().err == ""


def test_texts_are_measured_wherever_they_are():
    rows = Dataset.from_list(
        [
            {
                "messages": [{"role": "user", "content": "é"}, {"role": "a", "content": None}],
                "n": 1,
                "tags": [["ab"], ["c"]],
            },
            {"messages": [], "n": 2, "tags": None},
            {"messages": None, "n": 3, "tags": [[], ["xyz"]]},
        ]
    )
    assert text_bytes(rows).tolist() == [4 + 2 + 1 + 3, 0, 3]
    assert text_bytes(rows.select([2, 0]), ["messages"]).tolist() == [0, 7]
