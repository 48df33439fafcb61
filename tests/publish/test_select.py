"""Budgets that mean what they say."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset
from hypothesis import assume, given
from hypothesis import strategies as st

from ifd_trainer.data.table_reader import TableReader
from ifd_trainer.errors import UserError
from ifd_trainer.method.selection import ShortfallError
from ifd_trainer.publish.select import choose, tie_ids

OK = "ok"


@st.composite
def pools(draw):
    n = draw(st.integers(1, 40))
    score = draw(st.lists(st.sampled_from([0.1, 0.5, 0.5, 0.9, 1.0, 1.2]), min_size=n, max_size=n))
    status = draw(st.lists(st.sampled_from([OK, OK, OK, "empty_answer", "failed"]), min_size=n, max_size=n))
    refusals = draw(st.lists(st.booleans(), min_size=n, max_size=n))
    score = np.where(np.array(status) == OK, score, np.nan)
    return score, np.array(status), np.array(refusals)


@given(pools(), st.one_of(st.integers(1, 40), st.floats(0.01, 1.0)))
def test_the_count_is_exact_and_every_row_has_a_reason(pool, keep):
    score, status, refusals = pool
    n = len(score)
    asked = keep if isinstance(keep, int) else max(1, round(keep * n))
    eligible = [i for i in range(n) if status[i] == OK and not refusals[i] and score[i] < 1]
    if asked > n:
        with pytest.raises(ValueError, match="the pool has only"):
            choose(score, status, keep, dropped={"refusal": refusals})
        return
    if not eligible:
        with pytest.raises(ShortfallError, match="only 0 are eligible"):
            choose(score, status, keep, dropped={"refusal": refusals})
        return
    chosen = choose(score, status, keep, dropped={"refusal": refusals})
    best = sorted(eligible, key=lambda i: (-score[i], i))[:asked]
    assert [i for i in range(n) if chosen.selection.reasons[i] == "kept"] == sorted(best)
    assert chosen.ranks[best].tolist() == list(range(1, len(best) + 1))
    assert chosen.ranks.notna().sum() == len(best) == chosen.kept_rows
    assert (chosen.pool_rows, chosen.asked_rows, chosen.selection.eligible) == (n, asked, len(eligible))
    assert sum(chosen.counts.values()) == n
    assert chosen.counts.get("refusal", 0) == refusals.sum()
    assert chosen.counts.get("above_limit", 0) == sum(score[i] >= 1 for i in range(n) if not refusals[i])
    assert (chosen.warning is None) == (len(eligible) >= asked)
    if len(eligible) < asked:
        with pytest.raises(ShortfallError, match=rf"only {len(eligible)} (is|are) eligible"):
            choose(score, status, keep, dropped={"refusal": refusals}, strict=True)


@given(pools(), st.one_of(st.integers(1, 40), st.floats(0.01, 1.0)), st.sampled_from([int, float, str]), st.data())
def test_rows_and_ranks_are_those_of_an_independent_sort(pool, keep, kind, data):
    score, status, _ = pool
    n = len(score)
    score[list(data.draw(st.sets(st.integers(0, n - 1))))] = data.draw(st.sampled_from([np.nan, np.inf, 0.5]))
    values = [kind(i) for i in data.draw(st.permutations(range(90, 90 + 11 * n, 11)))]  # as texts, "101" before "90"
    eligible = [i for i in range(n) if status[i] == OK and score[i] < 1]
    asked = keep if isinstance(keep, int) else max(1, round(keep * n))
    assume(eligible and asked <= n)
    name, ids = tie_ids(TableReader(Dataset.from_dict({"id": values})))
    chosen = choose(score, pd.Series(status).astype("category"), keep, ids=ids)
    best = sorted(eligible, key=lambda i: (-score[i], values[i]))[:asked]
    ranks = {row: rank for rank, row in enumerate(best, start=1)}
    assert name == "id"
    assert [None if pd.isna(rank) else rank for rank in chosen.ranks] == [ranks.get(i) for i in range(n)]
    for i, reason in enumerate(chosen.selection.reasons):
        unscored = "nonfinite" if np.isnan(score[i]) or np.isinf(score[i]) else "above_limit"
        fate = "kept" if i in best else "below_cut" if i in eligible else unscored
        assert reason == (fate if status[i] == OK else status[i])


@given(pools(), st.randoms(use_true_random=False))
def test_ties_do_not_depend_on_the_order_of_the_rows(pool, random):
    score, status, _ = pool
    assume(((status == OK) & (score < 1)).any())
    names = [f"row {i:02d}" for i in range(len(score))]
    order = list(range(len(score)))
    random.shuffle(order)
    kept = []
    for rows in (list(range(len(score))), order):
        _, ids = tie_ids(TableReader(Dataset.from_dict({"row_id": [names[i] for i in rows]})))
        chosen = choose(score[rows], status[rows], 0.3, ids=ids)
        kept.append({names[i] for i, reason in zip(rows, chosen.selection.reasons, strict=True) if reason == "kept"})
    assert kept[0] == kept[1]


def test_a_fraction_is_one_of_all_rows():
    score = np.array([0.1, 0.2, 0.3, 0.4, np.nan, np.nan, np.nan, np.nan, 1.5, 2.0])
    status = np.array([OK] * 4 + ["empty_answer"] * 4 + [OK] * 2)
    chosen = choose(score, status, 0.3)
    reasons = ["below_cut"] + ["kept"] * 3 + ["empty_answer"] * 4 + ["above_limit"] * 2
    assert chosen.selection.reasons.tolist() == reasons
    assert chosen.counts == {"kept": 3, "empty_answer": 4, "above_limit": 2, "below_cut": 1}
    assert chosen.selection.cut == 0.2


def test_a_shortfall_says_what_is_missing():
    chosen = choose(
        np.array([0.5, 1.5, np.nan, 0.6]), np.array([OK, OK, "failed", OK]), 1.0, dropped={"refusal": np.arange(4) == 3}
    )
    assert chosen.warning == (
        "4 rows asked for (100 % of all 4 rows in the pool), only 1 is eligible (1 above_limit, 1 failed, 1 refusal). "
        "Lower --keep, or raise --max-ifd (inf: no limit)."
    )


def test_columns_that_break_ties():
    columns = {"row_id": [1, 1, 2], "id": [30, 4, 5], "name": ["b", "a", "c"]}
    rows = TableReader(Dataset.from_dict(columns))
    name, ids = tie_ids(rows)
    assert (name, ids.tolist()) == ("id", [30, 4, 5])  # row_id repeats itself; numbers, not texts
    assert tie_ids(TableReader(Dataset.from_dict({"name": columns["name"]}))) == (None, None)
    name, ids = tie_ids(rows, "name")
    assert (name, ids.to_pylist()) == ("name", ["b", "a", "c"])
    with pytest.raises(UserError, match=r"'row_id', named with --id-column, .* 1 of 3 values are there more than once"):
        tie_ids(rows, "row_id")


@pytest.mark.parametrize(
    "values", [["a", "b", "a"], ["b", "a", None], [2, 1, 2], [1.5, None, 2.5], [0.5, math.nan, 1.5]]
)
def test_ids_with_repeats_or_without_values_are_not_taken(values):
    assert tie_ids(TableReader(Dataset.from_dict({"id": values}))) == (None, None)


def test_texts_with_one_digest_are_still_told_apart(monkeypatch):
    monkeypatch.setattr(pd.util, "hash_array", lambda values, categorize: np.zeros(len(values), np.uint64))
    assert tie_ids(TableReader(Dataset.from_dict({"id": ["a", "b", "c"]})))[0] == "id"
    assert tie_ids(TableReader(Dataset.from_dict({"id": ["a", "b", "a"]})))[0] is None


def test_a_limit_that_is_measured_in_a_run_is_refused_here():
    with pytest.raises(ValueError, match="A calibrated limit is measured with a model; here max_ifd has to be a"):
        choose(np.array([0.5]), np.array(["ok"]), 1, max_ifd="calibrated")
