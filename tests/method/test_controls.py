"""The controls keep exactly the budget, of the rows with a score, whatever the order in which rows stand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ifd_trainer import BalancedRandom, LongestAnswers, LowestScores, MiddleBand, RandomRows
from ifd_trainer.method.selection import ShortfallError

CONTROLS = [RandomRows(), BalancedRandom("source"), LongestAnswers(), LowestScores(), MiddleBand(10, 60)]
pools = st.lists(
    st.tuples(
        st.sampled_from(["ok", "ok", "ok", "truncated"]), st.integers(1, 9), st.integers(0, 20), st.sampled_from("abc")
    ),
    min_size=1,
    max_size=40,
)


def columns_of(pool):
    status, tokens, tenths, source = (np.array(values) for values in zip(*pool, strict=True))
    score = np.where(status == "ok", tenths / 10, np.nan)
    names = {"ifd": score, "ifd_ppl": score, "answer_tokens": tokens}
    return names | {"ifd_status": status.astype(object), "source": source}


@pytest.mark.parametrize("policy", CONTROLS, ids=repr)
@given(pool=pools, budget=st.integers(1, 50), seed=st.integers(0, 2**32))
def test_the_budget_is_kept_of_scored_rows_and_every_row_has_a_reason(policy, pool, budget, seed):
    columns, ids = columns_of(pool), np.random.default_rng(seed).permutation(len(pool))
    ok = columns["ifd_status"] == "ok"
    if not ok.any():
        with pytest.raises(ShortfallError, match="none of"):
            policy(columns, budget, ids=ids, rng=np.random.default_rng(seed))
        return
    selection = policy(columns, budget, ids=ids, rng=np.random.default_rng(seed))
    times = np.bincount(selection.kept, minlength=len(pool))
    assert len(selection.kept) == budget
    assert selection.shortfall == max(budget - selection.eligible, 0)
    assert times[~ok].sum() == 0
    assert times[times > 0].max() - times[times > 0].min() <= 1
    assert (selection.reasons == "kept").tolist() == (times > 0).tolist()
    assert (selection.reasons[~ok] == "truncated").all()
    order = np.random.default_rng(seed).permutation(len(pool))
    moved = {name: column[order] for name, column in columns.items()}
    again = policy(moved, budget, ids=ids[order], rng=np.random.default_rng(seed))
    assert sorted(ids[selection.kept]) == sorted(ids[order][again.kept])


@pytest.mark.parametrize("policy", CONTROLS, ids=repr)
@given(pool=pools, seed=st.integers(0, 2**32))
def test_a_larger_budget_keeps_what_a_smaller_one_keeps(policy, pool, seed):
    columns = columns_of([("ok", *row[1:]) for row in pool])
    kept = [policy(columns, n, rng=np.random.default_rng(seed)) for n in range(1, len(pool) + 1)]
    for smaller, larger in itertools.pairwise(kept):
        if larger.shortfall == 0:
            assert larger.kept[: len(smaller.kept)].tolist() == smaller.kept.tolist()


def test_random_rows_are_drawn_evenly():
    columns = columns_of([("ok", 1, 1, "a")] * 10)
    drawn = np.concatenate([RandomRows()(columns, 3, rng=np.random.default_rng(seed)).kept for seed in range(2000)])
    assert np.abs(np.bincount(drawn) - 600).max() < 5 * np.sqrt(2000 * 0.3 * 0.7)


def test_balanced_rows_are_as_many_of_each_value_as_there_are():
    columns = columns_of([("ok", 1, 1, "a")] * 20 + [("ok", 1, 1, "b")] * 3 + [("ok", 1, 1, "c")] * 9)
    kept = BalancedRandom("source")(columns, 18, rng=np.random.default_rng(1)).kept
    counts = dict(zip(*np.unique(columns["source"][kept], return_counts=True), strict=True))
    assert counts["b"] == 3
    assert sorted((counts["a"], counts["c"])) == [7, 8]


def test_the_ends_of_the_orders_are_kept():
    columns = columns_of([("ok", tokens, tokens, "a") for tokens in range(1, 10)])
    assert LongestAnswers()(columns, 2).kept.tolist() == [8, 7]
    assert LowestScores()(columns, 2).kept.tolist() == [0, 1]
    assert MiddleBand(25, 75)(columns, 9).kept.tolist()[:5] == [6, 5, 4, 3, 2]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: MiddleBand(50, 50), "low and high are percentiles"),
        (lambda: MiddleBand(-1, 50), "low and high are percentiles"),
        (lambda: MiddleBand(score=3), "score must be 'ifd', 'ifd_ppl', the name of another column, or a func.*, got 3"),
        (lambda: LowestScores(""), "score must be 'ifd', 'ifd_ppl', .*, got ''"),
    ],
)
def test_what_cannot_be_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
