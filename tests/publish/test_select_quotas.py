"""`ifd-trainer select` by other columns, by several, and with quotas and floors: rows, reasons, counts and the card."""

from __future__ import annotations

import math
from decimal import Decimal
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from ifd_trainer.cli import main
from ifd_trainer.data.files import load_rows, write_rows
from ifd_trainer.method.quotas import Quotas, within_bounds
from ifd_trainer.method.ranking import Ranking
from ifd_trainer.publish.provenance import Provenance, write_provenance

#       web x 6, code x 4, and two rows without a source
SOURCES = ["web", "code", "web", "web", "code", "web", None, "code", "web", "code", "web", None]
IFD = [0.9, 0.8, 0.7, 0.6, 0.5, 1.2, 0.4, 0.3, 0.2, 0.1, None, 0.05]
REWARD = [1, 5, 2, 8, 3, 9, None, 7, 4, 6, 10, 11]
LABELS = "abcdefghijkl"


def pool() -> pd.DataFrame:
    frame = pd.DataFrame({"id": list(LABELS), "instruction": "Ask.", "output": [f"Answer {i}." for i in range(12)]})
    frame["source"], frame["ifd"], frame["reward"] = SOURCES, IFD, REWARD
    frame["ifd_ppl"] = [None if value is None else value / 2 for value in IFD]
    frame["answer_tokens"] = range(12, 0, -1)
    frame["ifd_status"] = ["empty_answer" if value is None else "ok" for value in IFD]
    return frame


@pytest.fixture
def scored(tmp_path: Path) -> str:
    path, frame = tmp_path / "scored.parquet", pool()
    write_rows(Dataset.from_pandas(frame), path)
    write_provenance(path, Provenance("paper", "org/model", program="ifd_trainer 0"), frame)
    return str(path)


def reasons(source: str, tmp_path: Path, *options: object) -> str:
    """One letter for each row: its place among the kept ones, or what became of it."""
    out = tmp_path / "out.parquet"
    assert main(["select", source, "--all", "--output", str(out), *map(str, options)]) == 0
    rows = load_rows(str(out)).to_pandas()
    short = {"below_cut": "-", "above_limit": "L", "empty_answer": "E", "over_quota": "Q", "no_value": "N"}
    pairs = zip(rows["ifd_rank"], rows["ifd_reason"], strict=True)
    return "".join(str(int(rank)) if reason == "kept" else short[reason] for rank, reason in pairs)


def card(tmp_path: Path) -> str:
    return (tmp_path / "out.md").read_text(encoding="utf-8")


# ---- other columns ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--score", "ifd", "--keep", 2], "12---L----E-"),
        (["--score", "ifd_ppl", "--keep", 2, "--max-ifd", 0.45], "L12--L----E-"),
        (["--score", "reward", "--keep", 3], "---3-2N---E1"),  # no limit of IFD unless there is one
        (["--score", "reward", "--keep", 3, "--max-ifd", 1], "---2-LN3--E1"),
        (["--score", "reward:-1", "--keep", 3], "1-2-3-N---E-"),
        (["--score", "answer_tokens", "--keep", 2], "12--------E-"),
    ],
)
def test_rows_are_ranked_by_any_column_of_numbers(scored, tmp_path, options, expected):
    assert reasons(scored, tmp_path, *options) == expected


def test_ranks_of_several_columns_are_added_with_their_weights(scored, tmp_path, capsys):
    frame = pool()
    whole = frame[frame["ifd"].notna() & frame["reward"].notna()]
    combined = 0.7 * whole["ifd"].rank() / len(whole) + 0.3 * whole["reward"].rank() / len(whole)
    best = combined[whole["ifd"] < 1].nlargest(4)
    out = tmp_path / "out.parquet"
    options = ["--score", "ifd:0.7", "--score", "reward:0.3", "--keep", "4", "--output", str(out)]
    assert main(["select", scored, *options]) == 0
    found = load_rows(str(out)).to_pandas()
    assert dict(zip(found["id"], found["ifd_rank"], strict=True)) == {LABELS[i]: n for n, i in enumerate(best.index, 1)}
    assert f"0.7 ifd + 0.3 reward >= {best.min():.4f}. Not kept: 5 below_cut, 1 above_limit, 1 empty_answer, 1 no" in (
        capsys.readouterr().out
    )
    text = card(tmp_path)
    assert "| ranked by | 0.7 x rank by `ifd` + 0.3 x rank by `reward`, each rank the share of" in text
    assert "| limit | `ifd` < 1 |" in text
    assert "| `no_value` | 1 | 8.33 % | no score: a column that is ranked by holds no number |" in text
    assert "the 4 rows with the highest weighted ranks" in text


def test_rows_without_scores_are_ranked_by_their_own_column(tmp_path, capsys):
    rows = pool().drop(columns=["ifd", "ifd_ppl", "answer_tokens", "ifd_status"])
    write_rows(Dataset.from_pandas(rows), tmp_path / "rows.jsonl")
    assert reasons(str(tmp_path / "rows.jsonl"), tmp_path, "--score", "reward", "--keep", 0.25) == "-----3N---21"
    assert "reward >= 9.0000. Not kept: 8 below_cut, 1 no_value." in capsys.readouterr().out
    text = card(tmp_path)
    assert "the 3 rows with the highest `reward`" in text
    assert "IFD is confounded" not in text
    assert "| limit | none |" in text
    for options, words in (
        (["--score", "ifd"], "No scores: score it first"),
        (["--score", "reward", "--max-ifd", "1"], "has no IFD. Score it, or leave the limit out."),
    ):
        command = ["select", str(tmp_path / "rows.jsonl"), "--output", str(tmp_path / "x.jsonl"), *options]
        assert main(command) == 2
        assert words in capsys.readouterr().err


def test_numbers_of_any_width_rank_rows(tmp_path):
    """Decimals, and integers that no float holds exactly."""
    columns = {"ns": pa.array([2**53 + 1, 2**62, 5]), "big": pa.array([2**64 - 1, 0, 3], pa.uint64())}
    columns["price"] = pa.array([Decimal("1.25"), Decimal("0.5"), None])
    texts = {"instruction": ["a", "b", "c"], "output": ["d", "e", "f"]}
    pq.write_table(pa.table(texts | columns), tmp_path / "rows.parquet")
    for name, expected in (("ns", "21-"), ("big", "1-2"), ("price", "12N")):
        assert reasons(str(tmp_path / "rows.parquet"), tmp_path, "--score", name, "--keep", 2) == expected


@pytest.mark.parametrize("name", ["kept", "reason"])
def test_a_column_to_rank_by_may_have_a_name_that_a_card_uses_itself(tmp_path, name):
    rows = pool().assign(**{name: REWARD})
    write_rows(Dataset.from_pandas(rows), tmp_path / "rows.parquet")
    assert reasons(str(tmp_path / "rows.parquet"), tmp_path, "--score", name, "--keep", 2) == "-----2N---E1"
    assert "| 100 % (highest) | 11.0000 | 11.0000 |" in card(tmp_path)


def test_a_column_of_bytes_has_no_quotas_and_one_without_numbers_ranks_nothing(tmp_path, capsys):
    texts = {"instruction": ["a", "b"], "output": ["d", "e"], "raw": [b"\xff", b"\xfe"], "empty": [math.nan] * 2}
    pq.write_table(pa.table(texts), tmp_path / "rows.parquet")
    command = ["select", str(tmp_path / "rows.parquet"), "--output", str(tmp_path / "x.parquet"), "--keep", "1"]
    assert main([*command, "--score", "empty"]) == 2
    assert "No row with a score has a number to rank by (empty): name other columns" in capsys.readouterr().err
    assert main([*command, "--score", "empty", "--per", "raw", "--floor", "1"]) == 2
    assert "--per raw: the column holds binary, and quotas are of texts or numbers." in capsys.readouterr().err


# ---- quotas and floors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # web: abdi are a c d i (5 eligible, f is over the limit); code: b e h j; null: g l
        (["--quota", 2], "123Q4L5QQQE6"),
        (["--quota", 0.5], "12345L6QQQEQ"),
        (["--quota", "web=1", "--keep", 4], "12QQ3L4-Q-E-"),
        (["--quota", "web=0", "--keep", 2], "Q1QQ2L--Q-E-"),
        (["--quota", 1, "--quota", "code=3"], "12QQ3L45QQEQ"),
        (["--floor", "code=3", "--keep", 5], "123-4L-5--E-"),
        (["--floor", 1, "--keep", 4], "123--L4---E-"),
        (["--floor", "null=2", "--quota", "web=1", "--keep", 4], "12QQ-L3-Q-E4"),
    ],
)
def test_quotas_are_exact_and_floors_the_least(scored, tmp_path, options, expected):
    assert reasons(scored, tmp_path, "--per", "source", *options) == expected


def test_the_card_counts_the_rows_of_each_value(scored, tmp_path, capsys):
    assert reasons(scored, tmp_path, "--per", "source", "--quota", "web=1", "--floor", "null=1", "--keep", 4)
    text = card(tmp_path)
    assert "| `source` | rows | eligible | asked for | kept |\n|---|---:|---:|---:|---:|\n" in text
    for line in ("| `web` | 6 | 4 | 1 | 1 |", "| `code` | 4 | 4 |  | 2 |", "| `null` | 2 | 2 | at least 1 | 1 |"):
        assert line in text
    assert "| `over_quota` | 3 | 25.00 % | dropped: the quota of its value is filled |" in text
    assert ", by quotas of `source`." in text
    assert "Not kept: 3 below_cut, 3 over_quota, 1 above_limit, 1 empty_answer." in capsys.readouterr().out


def test_values_with_too_few_rows_are_said(scored, tmp_path, capsys):
    assert reasons(scored, tmp_path, "--per", "source", "--quota", 3, "--quota", "web=6") == "1234" + "5L67" + "8QE9"
    error = capsys.readouterr().err
    assert (
        "12 rows asked for (of 12 rows in the pool), only 10 are eligible (1 above_limit, 1 empty_answer; by source: "
        in error
    )
    assert "4 of 6 web, 2 of 3 null)." in error
    command = ["select", scored, "--per", "source", "--quota", "3", "--strict", "--output", str(tmp_path / "x.jsonl")]
    assert main(command) == 2
    assert "2 of 3 null" in capsys.readouterr().err
    assert reasons(scored, tmp_path, "--per", "source", "--floor", "null=3", "--keep", 4)
    assert "Fewer rows than asked for are eligible by source: 2 of 3 null. Lower the quotas" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--quota", "2"], "--quota and --floor go with --per COLUMN"),
        (["--per", "source"], "--per source goes with --quota or --floor"),
        (["--per", "source", "--quota", "2", "--keep", "5"], "--keep is what the quotas of all values add up to"),
        (["--per", "source", "--quota", "web=many"], "--quota web=many: wants a number or VALUE=NUMBER, got 'many'."),
        (["--per", "source", "--quota", "1.5"], "a number of rows or a fraction up to 1.0, got 1.5"),
        (
            ["--per", "source", "--quota", "books=2"],
            "The column 'source' has no value 'books'; it has code, null, web.",
        ),
        (["--per", "sauce", "--floor", "2"], "--per sauce: there is no such column; the columns are ["),
        (
            ["--per", "source", "--floor", "2", "--keep", "5"],
            "Quotas and floors ask for 6 rows, and --keep for 5 in all",
        ),
        (["--score", "price"], "--score price: there is no such column"),
        (["--score", "output"], "--score output: the column holds no numbers, but"),
        (["--score", "ifd:0", "--score", "reward"], "The weight of 'ifd' has to be a number other than 0"),
        (["--score", "ifd:0.5", "--score", "ifd"], "--score: 'ifd' is named twice."),
        (["--score", "ifd_status"], "--score ifd_status: the column holds no numbers, but"),
        (["--per", "source", "--quota", "web=1", "--quota", "web=2"], "--quota is given twice for 'web'."),
        (["--per", "source", "--floor", "1", "--floor", "0.5"], "--floor is given twice for all values."),
        (["--per", "source", "--quota", "web=1", "--floor", "web=2"], "'web' has a quota, which is exact, and a floor"),
        (["--per", "source", "--quota", "1", "--floor", "2"], "A value that is not named has a quota"),
    ],
)
def test_what_does_not_go_together_is_told(scored, tmp_path, capsys, options, words):
    assert main(["select", scored, "--output", str(tmp_path / "x.jsonl"), *options]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "x.jsonl").exists()


@given(
    st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=30),
    st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=4, max_size=4),
    st.one_of(st.none(), st.integers(0, 30)),
)
def test_what_quotas_keep_is_what_an_independent_count_keeps(rows, amounts, extra):
    groups = np.array([group for group, _ in rows])
    least, exact = np.array([n for n, _ in amounts]), np.array([only for _, only in amounts])
    sure = sum(min(least[group], (groups == group).sum()) for group in range(4))
    budget = None if extra is None else sure + extra
    kept, counts, spare = [], dict.fromkeys(range(4), 0), math.inf if budget is None else budget - sure
    for group in groups.tolist():
        place = counts[group]
        counts[group] += 1
        take = place < least[group]
        if not take and not exact[group] and budget is not None and spare > 0:
            take, spare = True, spare - 1
        kept.append(take)
    most = np.where(exact, least, len(groups))
    assert within_bounds(groups, least, most, budget).tolist() == kept


def test_a_named_floor_goes_before_the_quota_of_the_rest():
    quotas = Quotas("source", quotas={None: 0.5, "web": 1}, floors={"code": 2})
    least, exact = quotas.budgets(["books", "code", "web"], [10, 10, 10])
    assert (least.tolist(), exact.tolist()) == ([5, 2, 1], [True, False, True])


def test_equal_values_share_the_mean_of_their_ranks():
    columns = {"a": np.array([1.0, 1.0, 3.0, np.nan]), "b": np.array([0.0, 5.0, 1.0, 2.0])}
    values = Ranking({"a": 1.0, "b": -1.0}).values(columns, np.ones(4, dtype=bool))
    assert values[:3] == pytest.approx([0.5 * (1.5 - 1) / 3, 0.5 * (1.5 - 3) / 3, 0.5 * (3 - 2) / 3])
    assert np.isnan(values[3])
