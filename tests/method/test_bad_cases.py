"""Shares that follow held-out losses: worked by hand, and what holds of any of them."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ifd_trainer import BadCases, Cherry, Stratified
from ifd_trainer.errors import UserError
from ifd_trainer.method.selection import ShortfallError, base

POOL = {"code": 10, "web": 30, "chat": 60}
NAMES = np.array(["code", "web", "chat", "maths"])


@pytest.mark.parametrize(
    ("policy", "losses", "expected"),
    [
        (BadCases("source"), {"code": 1.0, "web": 1.0, "chat": 2.0}, [0.25, 0.25, 0.5]),
        # chat has no held-out rows and keeps its 0.6; the other 0.4 are shared 3 to 1
        (BadCases("source"), {"code": 3.0, "web": 1.0}, [0.3, 0.1, 0.6]),
        (BadCases("source"), {"code": 3.0, "web": 1.0, "chat": math.nan, "poems": 9.0}, [0.3, 0.1, 0.6]),
        # a floor of 0.1 for each of two; the other 0.2 of 0.4 are shared 3 to 1
        (BadCases("source", at_least=0.1), {"code": 3.0, "web": 1.0}, [0.25, 0.15, 0.6]),
        (BadCases("source", temperature=1.0), {"code": math.log(6), "web": math.log(3), "chat": 0.0}, [0.6, 0.3, 0.1]),
        (BadCases("source", temperature=0.5), {"code": math.log(3), "web": 0.0, "chat": 0.0}, [9 / 11, 1 / 11, 1 / 11]),
        (BadCases("source"), {"code": 0.0, "web": 0.0, "chat": 0.0}, [1 / 3, 1 / 3, 1 / 3]),
        (BadCases("source"), {}, [0.1, 0.3, 0.6]),
    ],
)
def test_shares_worked_by_hand(policy, losses, expected):
    shares = policy.shares(losses, POOL)
    assert list(shares) == list(POOL)
    assert list(shares.values()) == pytest.approx(expected)


pools = st.lists(st.integers(1, 50), min_size=1, max_size=4)
some_losses = st.lists(st.one_of(st.none(), st.floats(0, 1e3), st.just(math.inf)), min_size=4, max_size=4)


@given(pools, some_losses, st.floats(0, 0.2), st.one_of(st.none(), st.floats(0.01, 100)))
def test_shares_add_up_floors_hold_and_a_higher_loss_gives_no_less(sizes, losses, floor, temperature):
    pool = dict(zip(NAMES.tolist(), sizes, strict=False))
    given = {name: loss for name, loss in zip(pool, losses, strict=False) if loss is not None}
    policy = BadCases("source", floor, temperature)
    known = {name: loss for name, loss in given.items() if math.isfinite(loss)}
    left = sum(size for name, size in pool.items() if name in known) / sum(sizes)
    if len(known) * floor > left + 1e-6:
        with pytest.raises(UserError, match="is more than all rows"):
            policy.shares(given, pool)
        return
    if len(known) * floor > left - 1e-6:
        return  # at the edge either may be
    shares = policy.shares(given, pool)
    assert sum(shares.values()) == pytest.approx(1)
    for name, size in pool.items():
        if name in known:
            assert shares[name] >= floor - 1e-12
        else:
            assert shares[name] == pytest.approx(size / sum(sizes))
    ordered = sorted(known, key=known.get)
    assert all(shares[low] <= shares[high] + 1e-12 for low, high in pairwise(ordered))


@given(pools, st.lists(st.floats(0.01, 9), min_size=4, max_size=4), st.integers(1, 60), st.floats(0, 0.2))
def test_the_rows_of_all_values_are_exactly_the_budget(sizes, losses, budget, floor):
    pool = dict(zip(NAMES.tolist(), sizes, strict=False))
    group = np.repeat(np.arange(len(sizes)), sizes)
    columns = {"ifd": np.linspace(0.1, 0.9, len(group)), "ifd_status": np.full(len(group), "ok")}
    columns["source"] = NAMES[group]
    policy = BadCases("source", floor)
    shares = policy.shares(dict(zip(NAMES.tolist(), losses, strict=True)), pool)
    selection = policy.given(shares)(columns, budget)
    kept = np.bincount(group[selection.kept], minlength=len(sizes))
    assert kept.sum() == budget == len(selection.kept)
    for count, share in zip(kept, shares.values(), strict=True):
        assert abs(count - share * budget) < 1
        assert count >= math.floor(floor * budget + 1e-9)
    for value in range(len(sizes)):  # of each value the best rows
        rows = np.flatnonzero(group == value)
        assert set(selection.kept[group[selection.kept] == value]) == set(rows[::-1][: kept[value]])


def test_it_has_what_its_policy_has_and_reasons_of_quotas():
    policy = BadCases("source", policy=Cherry(0.8, "ifd_ppl"))
    assert (policy.score, policy.max_ifd, policy.on_shortfall, policy.reads_scores) == ("ifd_ppl", 0.8, "repeat", True)
    assert base(policy) == Cherry(0.8, "ifd_ppl")
    columns = {"ifd": np.array([0.9, 0.8, 0.7, 1.2]), "ifd_status": np.full(4, "ok")}
    columns["source"] = np.array(["web", "web", "code", "code"])
    selection = BadCases("source").given({"web": 0.5, "code": 0.5})(columns, 2)
    assert selection.reasons.tolist() == ["kept", "over_quota", "kept", "above_limit"]


def test_without_losses_values_keep_their_share():
    columns = {"ifd": np.linspace(0.1, 0.9, 10), "ifd_status": np.full(10, "ok")}
    columns["source"] = np.array(["web"] * 8 + ["code"] * 2)
    kept = BadCases("source")(columns, 5).kept
    assert sorted(kept.tolist()) == [4, 5, 6, 7, 9]


def test_a_value_without_a_row_left_is_a_shortfall():
    columns = {"ifd": np.array([0.9, 0.8]), "ifd_status": np.full(2, "ok"), "source": np.array(["web", "web"])}
    with pytest.raises(ShortfallError, match="No row with source 'code' is left to choose from"):
        BadCases("source").given({"web": 0.5, "code": 0.5})(columns, 2)
    with pytest.raises(UserError, match="has no value 'code'"):
        Stratified("source", {"web": 0.5, "code": 0.5})(columns, 2)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"by": ""}, "by is the name of a column"),
        ({"at_least": 1.5}, "at_least is a fraction"),
        ({"at_least": True}, "at_least is a fraction"),
        ({"temperature": 0.0}, "temperature is a positive number"),
        ({"temperature": math.inf}, "temperature is a positive number"),
        ({"policy": Stratified("source")}, "policy is one that ranks each row by itself"),
        ({"policy": Cherry(on_shortfall="relax")}, "on_shortfall='relax' fills with rows above the limit"),
    ],
)
def test_what_it_does_not_take_is_refused(options, said):
    with pytest.raises(UserError, match=said):
        BadCases(**{"by": "source", **options})
    with pytest.raises(UserError, match="policy is one that ranks each row by itself"):
        Stratified("source", policy=BadCases("source"))
