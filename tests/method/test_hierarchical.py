"""Two stages by hand, and on any pool: exactly the budget, of the candidates alone, whatever the order of the rows."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ifd_trainer import Hierarchical
from ifd_trainer.method.reasons import MEANINGS
from ifd_trainer.method.selection import ShortfallError

NAN, INF = math.nan, math.inf
tenths = st.integers(0, 14)
pools = st.lists(
    st.tuples(st.sampled_from(["ok", "ok", "ok", "truncated"]), tenths | st.none(), tenths | st.none()),
    min_size=1,
    max_size=30,
)


def columns_of(pool):
    status, mean, std = zip(*pool, strict=True)
    numbers = [np.array([NAN if value is None else value / 10 for value in values]) for values in (mean, std)]
    return {"sifd_mean": numbers[0], "sifd_std": numbers[1], "ifd_status": np.array(status, dtype=object)}


def stages(columns, ids, budget, gamma, limit):
    """By sorted lists of tuples: the candidates' and the kept rows' ids, and how many rows are eligible."""
    rows = zip(columns["sifd_mean"], columns["sifd_std"], columns["ifd_status"], ids, strict=True)
    eligible = sorted(
        (-mean, id, std) for mean, std, status, id in rows if status == "ok" and mean < limit and std >= 0
    )
    candidates = eligible[: math.ceil(gamma * budget)]
    kept = sorted((std, mean, id) for mean, id, std in candidates)[:budget]
    return {id for _, id, _ in candidates}, {id for *_, id in kept}, len(eligible)


def test_the_highest_means_come_first_and_of_these_the_lowest_spreads():
    mean = [0.9, 0.8, 0.7, 0.6, 1.2, 0.5, NAN, NAN]
    std = [0.3, 0.1, 0.2, 0.0, 0.0, NAN, 0.1, NAN]
    status = ["ok"] * 7 + ["truncated"]
    columns = {"sifd_mean": np.array(mean), "sifd_std": np.array(std), "ifd_status": np.array(status, dtype=object)}
    selection = Hierarchical(gamma=1.5)(columns, 2)
    assert selection.kept.tolist() == [1, 2]  # row 3 is the steadiest, and no candidate
    reasons = ["unstable", "kept", "kept", "below_cut", "above_limit", "no_value", "no_value", "truncated"]
    assert selection.reasons.tolist() == reasons
    assert set(reasons) <= set(MEANINGS)
    assert (selection.cut, selection.eligible, selection.shortfall) == (0.7, 4, 0)
    assert Hierarchical(gamma=1)(columns, 2).kept.tolist() == [0, 1]  # the mean alone
    assert Hierarchical(gamma=9)(columns, 2).kept.tolist() == [1, 3]  # the spread alone
    assert Hierarchical(gamma=2, max_ifd=INF)(columns, 1).kept.tolist() == [4]


def test_equal_means_are_told_apart_by_id_and_equal_spreads_by_the_higher_mean():
    columns = {"sifd_mean": np.array([0.5, 0.5, 0.5]), "sifd_std": np.array([0.2, 0.1, 0.1]), "ifd_status": ["ok"] * 3}
    assert Hierarchical(gamma=1)(columns, 1, ids=np.array([7, 9, 8])).kept.tolist() == [0]
    assert Hierarchical(gamma=3)(columns, 1, ids=np.array([7, 9, 8])).kept.tolist() == [2]
    columns["sifd_mean"] = np.array([0.5, 0.6, 0.7])
    assert Hierarchical(gamma=3)(columns, 1, ids=np.array([7, 8, 9])).kept.tolist() == [2]


@given(
    pool=pools,
    budget=st.integers(1, 35),
    gamma=st.sampled_from([1, 1.5, 2.0, 7]),
    limit=st.sampled_from([0.5, 1.0, INF]),
    seed=st.integers(0, 99),
)
def test_exactly_the_budget_is_kept_of_the_candidates_in_any_order_of_the_rows(pool, budget, gamma, limit, seed):
    columns, policy = columns_of(pool), Hierarchical(gamma=gamma, max_ifd=limit)
    ids = np.random.default_rng(seed).permutation(len(pool))
    candidates, kept, eligible = stages(columns, ids, budget, gamma, limit)
    if not eligible:
        with pytest.raises(ShortfallError, match=f"none of {len(pool)} is eligible"):
            policy(columns, budget, ids=ids)
        return
    selection = policy(columns, budget, ids=ids, rng=np.random.default_rng(seed))
    times = np.bincount(selection.kept, minlength=len(pool))
    assert len(selection.kept) == budget
    assert set(ids[selection.kept]) == kept
    assert times[times > 0].max() - times[times > 0].min() <= 1
    assert (selection.eligible, selection.shortfall) == (eligible, max(budget - eligible, 0))
    means = columns["sifd_mean"][selection.rows]
    assert (np.diff(means) <= 0).all()
    assert selection.cut == means[-1]
    assert set(ids[selection.reasons == "kept"]) == kept
    assert set(ids[selection.reasons == "unstable"]) == candidates - kept
    assert ((selection.reasons == "truncated") == (columns["ifd_status"] == "truncated")).all()
    order = np.random.default_rng(seed + 1).permutation(len(pool))
    moved = policy({name: column[order] for name, column in columns.items()}, budget, ids=ids[order])
    assert set(ids[order][moved.kept]) == kept


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Hierarchical(gamma=0.5), "gamma is how many candidates .* at least 1, got 0.5"),
        (lambda: Hierarchical(gamma=NAN), "gamma is how many candidates .*, got nan"),
        (lambda: Hierarchical(gamma=INF), "gamma is how many candidates .*, got inf"),
        (lambda: Hierarchical(gamma="2"), "gamma is how many candidates .*, got '2'"),
        (lambda: Hierarchical(max_ifd=0), "max_ifd must be a positive number, inf for no limit, got 0"),
        (lambda: Hierarchical(max_ifd="calibrated"), "max_ifd must be a positive number, .*, got 'calibrated'"),
        (
            lambda: Hierarchical()({"ifd_status": ["ok"]}, 1),
            "no column 'sifd_mean'.*IFDScorer.neighbourhood attaches it",
        ),
        (lambda: Hierarchical()(columns_of([("ok", 1, 1)]), 0), "at least one row, got 0"),
    ],
)
def test_what_two_stages_cannot_be_made_of_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_why_no_row_is_eligible_is_counted():
    columns = columns_of([("ok", 12, 1), ("ok", 3, None), ("ok", None, 1), ("truncated", None, None)])
    with pytest.raises(ShortfallError, match=r"1 has no score, 2 have no sifd_mean or sifd_std, and 1 has .* >= 1\.0"):
        Hierarchical()(columns, 2)
