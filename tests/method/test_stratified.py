"""Selection within the values of a column: budgets, shares, floors and caps against an independent count."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ifd_trainer import Cherry, Diverse, LongestAnswers, Mixture, RandomRows, Selection, Stages, Stratified, TargetSet
from ifd_trainer.errors import UserError
from ifd_trainer.method.selection import ShortfallError, base, coded
from ifd_trainer.method.stratified import OneOf

NAMES = np.array(["code", "web", "chat"])


def columns(ifd, sources, **more):
    ifd = np.asarray(ifd, dtype=float)
    return {"ifd": ifd, "ifd_status": np.full(len(ifd), "ok"), "source": np.asarray(sources), **more}


def times(selection: Selection, rows: int) -> np.ndarray:
    return np.bincount(selection.kept, minlength=rows)


pools = st.lists(st.tuples(st.floats(0.01, 1.4), st.integers(0, 2)), min_size=1, max_size=40)
bounds = st.tuples(st.integers(0, 8), st.one_of(st.none(), st.integers(0, 12)))


@given(pools, st.integers(1, 30), st.lists(bounds, min_size=3, max_size=3))
def test_floors_and_caps_hold_and_the_best_rows_fill_what_is_left(pool, budget, wanted):
    ifd, group = np.array([score for score, _ in pool]), np.array([value for _, value in pool])
    of = columns(ifd, NAMES[group])
    there = [int(((group == value) & (ifd < 1)).sum()) for value in range(3)]
    named = {str(NAMES[value]): bound for value, bound in enumerate(wanted) if (group == value).any()}
    floors = {name: low for name, (low, _) in named.items()}
    caps = {name: max(high, floors[name]) for name, (_, high) in named.items() if high is not None}
    policy = Stratified("source", at_least=floors, at_most=caps)
    places = {str(NAMES[value]): value for value in range(3)}
    if sum(floors.values()) > budget:
        with pytest.raises(UserError):
            policy(of, budget)
        return
    try:
        selection = policy(of, budget)
    except ShortfallError:
        empty = not sum(there) or any(low and not there[places[name]] for name, low in floors.items())
        limits = [caps.get(str(NAMES[value]), math.inf) for value in range(3)]
        room = sum(min(max(there[value], floors.get(str(NAMES[value]), 0)), limits[value]) for value in range(3))
        open_to_all = any(there[value] and limits[value] >= budget for value in range(3))
        assert empty or (room < budget and not open_to_all)
        return
    kept = times(selection, len(ifd))
    assert kept.sum() == budget == len(selection.kept)
    assert (ifd[selection.kept] < 1).all()
    for name, low in floors.items():
        assert kept[group == places[name]].sum() >= low
    for name, high in caps.items():
        assert kept[group == places[name]].sum() <= high
    # Nothing that is left out would be better than what was taken beyond the floors, in a value that has room.
    for row in np.flatnonzero((kept == 0) & (ifd < 1)):
        name = str(NAMES[group[row]])
        if kept[group == group[row]].sum() < caps.get(name, math.inf):
            beyond = [
                other
                for other in np.flatnonzero(kept)
                if kept[group == group[other]].sum() > floors.get(str(NAMES[group[other]]), 0)
            ]
            assert all(ifd[other] >= ifd[row] for other in beyond if group[other] != group[row])
        assert all(ifd[other] >= ifd[row] for other in np.flatnonzero(kept) if group[other] == group[row])
    assert (np.asarray(selection.reasons)[kept > 0] == "kept").all()
    assert set(np.asarray(selection.reasons)[kept == 0]) <= {"below_cut", "over_quota", "above_limit"}


@given(
    st.lists(st.integers(1, 30), min_size=2, max_size=3),
    st.lists(st.integers(1, 9), min_size=3, max_size=3),
    st.integers(1, 25),
)
def test_shares_of_one_give_exactly_the_budget(sizes, weights, budget):
    group = np.repeat(np.arange(len(sizes)), sizes)
    weights = np.array(weights[: len(sizes)], dtype=float)
    shares = dict(zip(NAMES.tolist(), (weights / weights.sum()).tolist(), strict=False))
    of = columns(np.linspace(0.1, 0.9, len(group)), NAMES[group])
    selection = Stratified("source", shares)(of, budget)
    kept = times(selection, len(group))
    assert kept.sum() == budget
    for value, share in enumerate(shares.values()):
        assert abs(kept[group == value].sum() - share * budget) < 1
        if kept[group == value].any():  # repeated evenly
            assert np.ptp(kept[group == value][kept[group == value] > 0]) <= 1


@given(st.lists(st.integers(1, 12), min_size=1, max_size=3), st.integers(1, 40))
def test_equal_shares_level_the_values(sizes, budget):
    group = np.repeat(np.arange(len(sizes)), sizes)
    of = columns(np.linspace(0.1, 0.9, len(group)), NAMES[group])
    selection = Stratified("source", "equal")(of, budget)
    kept = np.bincount(group[selection.rows], minlength=len(sizes))
    assert len(selection.kept) == budget
    assert kept.sum() == min(budget, len(group))
    short = kept < sizes  # a value that could have had more has as many as any other, give or take one
    assert all(kept[value] >= kept.max() - 1 for value in np.flatnonzero(short))


def test_buckets_are_of_equally_many_rows():
    lengths = np.array([3, 50, 7, 90, 12, 31, 2, 64])
    of = columns(np.linspace(0.1, 0.9, 8), np.full(8, "web"), answer_tokens=lengths)
    selection = Stratified("answer_tokens", at_least={"1": 1, "4": 1}, buckets=4, policy=RandomRows())(of, 2)
    assert sorted(lengths[selection.kept].tolist())[0] in (2, 3)
    assert sorted(lengths[selection.kept].tolist())[1] in (64, 90)
    known = columns([0.5, 0.6], ["web", "web"], reward=np.array([np.nan, 1.0]))
    with pytest.raises(UserError, match="holds no numbers"):
        Stratified("reward", buckets=2)(columns([0.5], ["web"], reward=np.array([np.nan])), 1)
    assert Stratified("reward", at_least={"none": 1}, buckets=2)(known, 1).kept.tolist() == [0]


def test_the_order_is_that_of_the_other_policy():
    of = columns(np.full(4, 0.5), ["web", "code", "web", "code"], answer_tokens=np.array([9, 1, 5, 3]))
    selection = Stratified("source", at_least={"code": 0.5}, policy=LongestAnswers())(of, 2)
    assert selection.kept.tolist() == [0, 3]
    assert not Stratified("source", at_least={"code": 0.5}, policy=LongestAnswers()).reads_scores
    assert base(Stratified("source", policy=Cherry(0.7))) == Cherry(0.7)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Stratified("source", {"code": 0.5}, at_least={"code": 0.1}), "a share, which is exact, and a floor"),
        (lambda: Stratified("source", at_least={"code": 0.5}, at_most={"code": 0.1}), "at least 0.5 and at most 0.1"),
        (lambda: Stratified("source", {"code": 0.7, "web": 0.4}), "add up to 1.1"),
        (lambda: Stratified("source", {"code": 1.5}), "a fraction of the kept rows up to 1.0"),
        (lambda: Stratified("source", "some"), "shares is 'equal', alone"),
        (lambda: Stratified("source", buckets=1), "buckets is a number of at least 2"),
        (lambda: Stratified("", {"code": 0.5}), "by is the name of a column"),
        (lambda: Stratified("source", policy=Diverse()), "ranks each row by itself"),
        (lambda: Stratified("source", policy=TargetSet("targets.jsonl")), "ranks each row by itself"),
        (lambda: Stratified("source", policy=Cherry(on_shortfall="relax")), "on_shortfall='relax' fills"),
        (lambda: Mixture("source", {"code": 0.5}), "an entry for each epoch"),
        (lambda: Mixture("source", [{"code": 2.0}]), "a fraction of the kept rows up to 1.0"),
        (lambda: Stages("source", ["a", "a"]), "each once"),
        (lambda: Stages("source", ["a", "b"], epochs=[1]), "one for each of 2 stages"),
        (lambda: Stages("source", ["a", "b"]).rows(1, *coded(np.array(["a"]))), "has no value 'b'"),
        (lambda: Stratified("source", {"maths": 0.5})(columns([0.5], ["web"]), 1), "has no value 'maths'; it has web"),
        (lambda: Stratified("source", {"web": 3})(columns([0.5], ["web"]), 2), "ask for 3 rows, and 2 are kept"),
    ],
)
def test_what_cannot_be_is_told(make, said):
    with pytest.raises(UserError, match=said):
        make()


def test_too_few_rows_of_a_value_are_repeated_or_an_error():
    of = columns([0.9, 0.8, 0.7, 1.2], ["web", "web", "code", "chat"])
    selection = Stratified("source", {"code": 0.5, "web": 0.5})(of, 4)
    assert sorted(selection.kept.tolist()) == [0, 1, 2, 2]
    assert selection.shortfall == 1
    with pytest.raises(ShortfallError, match="2 rows with source 'code' are to be kept, and 1 of them"):
        Stratified("source", {"code": 0.5}, policy=Cherry(on_shortfall="error"))(of, 4)
    with pytest.raises(ShortfallError, match="'chat' are to be kept, and 0 of them"):
        Stratified("source", {"chat": 0.5})(of, 2)
    with pytest.raises(ShortfallError, match="leave 2 of 3 that are eligible"):
        Stratified("source", at_most={"web": 1, "code": 1})(of, 3)


def test_a_mixture_has_other_shares_in_each_epoch():
    mixture = Mixture("source", [{"web": 1.0}, {"web": 0.5, "code": 0.5}])
    of = columns([0.9, 0.8, 0.7, 0.6], ["web", "web", "code", "code"])
    assert [sorted(mixture.in_epoch(epoch)(of, 2).kept.tolist()) for epoch in range(3)] == [[0, 1], [0, 2], [0, 2]]
    assert mixture(of, 2).kept.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("options", "values"),
    [
        ({}, ["a", "b", "c", "c"]),
        ({"epochs": 2}, ["a", "a", "b", "b", "c", "c", "c"]),
        ({"epochs": [1, 3, 1]}, ["a", "b", "b", "b", "c", "c"]),
    ],
)
def test_stages_follow_one_another(options, values):
    stages = Stages("level", ["a", "b", "c"], **options)
    assert [stages.in_epoch(epoch).values for epoch in range(len(values))] == [(value,) for value in values]
    grown = Stages("level", ["a", "b", "c"], growing=True, **options)
    for epoch, value in enumerate(values):
        assert grown.in_epoch(epoch).values == ("a", "b", "c")[: "abc".index(value) + 1]


def test_rows_of_other_stages_wait_and_keep_their_status():
    of = columns([0.5, 0.9, 0.7, np.nan], ["a", "b", "a", "b"])
    of["ifd_status"] = np.array(["ok", "ok", "ok", "truncated"])
    selection = OneOf("source", ("a",))(of, 1, ids=np.array([7, 8, 9, 10]))
    assert selection.kept.tolist() == [2]
    assert selection.reasons.tolist() == ["below_cut", "other_stage", "kept", "truncated"]
    with pytest.raises(ShortfallError, match="No row has source 'c'"):
        OneOf("source", ("c",))(of, 1)
