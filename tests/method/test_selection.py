"""Scores to kept rows: which ones, in which order, and why the others were dropped."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ifd_trainer.method.reasons import ABOVE_LIMIT, BELOW_CUT, KEPT, OTHER_TIER, RELAXED, Status
from ifd_trainer.method.selection import Cherry, Selection, ShortfallError

NAN, INF = math.nan, math.inf
DROPPED = [status.value for status in Status if status is not Status.OK]


def columns_of(scores, statuses=None, name="ifd") -> dict[str, np.ndarray]:
    scores = np.asarray(scores, dtype=np.float64)
    statuses = np.where(np.isnan(scores), "truncated", "ok") if statuses is None else np.asarray(statuses)
    return {name: scores, "ifd_status": statuses}


def select(scores, budget: int, statuses=None, ids=None, rng=None, **options) -> Selection:
    return Cherry(**options)(columns_of(scores, statuses), budget, ids=ids, rng=rng)


# At least one score is under the limit.
scores_and_budget = (
    st.lists(st.sampled_from([NAN, 0.1, 0.2, 0.3, 0.7, 0.9, 1.0, 1.4]), min_size=1, max_size=25)
    .filter(lambda scores: any(score < 1 for score in scores))
    .flatmap(lambda scores: st.tuples(st.just(scores), st.integers(1, 2 * len(scores))))
)


# ---- enough rows ------------------------------------------------------------------------------------------------


def test_the_highest_scores_under_the_limit_are_kept_highest_first():
    selection = select([0.5, 0.9, 1.2, 0.1, 0.7], budget=3)
    assert selection.kept.tolist() == [1, 4, 0]
    assert selection.reasons.tolist() == [KEPT, KEPT, ABOVE_LIMIT, BELOW_CUT, KEPT]
    assert (selection.cut, selection.eligible, selection.shortfall) == (0.5, 4, 0)


@pytest.mark.parametrize("status", DROPPED)
def test_an_unscorable_row_is_dropped_with_its_status(status):
    selection = select([0.5, NAN, 0.4], budget=1, statuses=["ok", status, "ok"])
    assert selection.reasons.tolist() == [KEPT, status, BELOW_CUT]
    assert selection.eligible == 2


def test_a_status_decides_even_where_a_score_is_present():
    selection = select([0.5, 0.9], budget=1, statuses=["ok", "truncated"])
    assert selection.kept.tolist() == [0]
    assert selection.reasons.tolist() == [KEPT, "truncated"]


@pytest.mark.parametrize("score", [NAN, INF, -INF])
def test_a_score_that_is_not_finite_is_no_score_whatever_the_status_says(score):
    selection = select([0.5, score], budget=1, statuses=["ok", "ok"])
    assert selection.reasons.tolist() == [KEPT, "nonfinite"]
    assert selection.eligible == 1


def test_statuses_may_be_members_of_the_enumeration():
    statuses = np.array([Status.OK, Status.MALFORMED], dtype=object)
    assert select([0.5, NAN], budget=1, statuses=statuses).reasons.tolist() == [KEPT, "malformed"]


def test_a_score_at_the_limit_is_dropped():
    selection = select([1.0, 0.999], budget=1)
    assert selection.kept.tolist() == [1]
    assert selection.reasons.tolist() == [ABOVE_LIMIT, KEPT]


def test_another_limit():
    assert select([0.5, 0.3, 0.6], budget=1, max_ifd=0.5).kept.tolist() == [1]


def test_an_infinite_limit_drops_nothing():
    selection = select([0.5, 7.0, 1.0], budget=2, max_ifd=INF)
    assert selection.kept.tolist() == [1, 2]
    assert selection.reasons.tolist() == [BELOW_CUT, KEPT, KEPT]


def test_ranking_by_the_other_score():
    columns = columns_of([0.9, 0.1]) | {"ifd_ppl": np.array([0.1, 0.9])}
    assert Cherry(score="ifd_ppl")(columns, 1).kept.tolist() == [1]
    assert Cherry()(columns, 1).kept.tolist() == [0]


def test_ties_go_to_the_lowest_position():
    assert select([0.5] * 4, budget=2).kept.tolist() == [0, 1]


@pytest.mark.parametrize(
    "ids",
    [[30, 4, 20, 5], ["b", "a", "d", "aa"], np.array(["b", "a", "d", "aa"], dtype=object)],
    ids=["numbers", "strings", "objects"],
)
def test_ties_go_to_the_lowest_id(ids):
    assert select([0.5] * 4, budget=2, ids=ids).kept.tolist() == [1, 3]


def test_ids_do_not_outweigh_scores():
    assert select([0.5, 0.6, 0.5], budget=2, ids=[0, 9, 1]).kept.tolist() == [1, 0]


@given(data=scores_and_budget)
def test_ties_and_order_do_not_depend_on_where_rows_stand(data):
    scores, budget = data
    ids = np.arange(len(scores)) * 7 % 101
    there = np.random.default_rng(0).permutation(len(scores))
    one = select(scores, budget, ids=ids)
    two = select(np.array(scores)[there], budget, ids=ids[there])
    assert ids[one.rows].tolist() == ids[there][two.rows].tolist()


@given(data=scores_and_budget)
def test_counts_and_reasons_add_up(data):
    scores, budget = data
    eligible = sum(score < 1 for score in scores)
    selection = select(scores, budget)
    rows = min(budget, eligible)
    assert len(selection.kept) == budget
    assert selection.eligible == eligible
    assert selection.shortfall == max(budget - eligible, 0)
    assert len(selection.rows) == len(set(selection.kept.tolist())) == rows
    reasons = selection.reasons.tolist()
    assert len(reasons) == len(scores)
    assert [i for i, reason in enumerate(reasons) if reason == KEPT] == sorted(selection.rows.tolist())
    assert reasons.count(BELOW_CUT) == eligible - rows
    assert reasons.count(ABOVE_LIMIT) == sum(score >= 1 for score in scores)
    assert reasons.count("truncated") == sum(math.isnan(score) for score in scores)
    kept = [scores[i] for i in selection.rows]
    assert kept == sorted(kept, reverse=True) == sorted((s for s in scores if s < 1), reverse=True)[:rows]
    assert selection.cut == kept[-1]


# ---- too few rows -----------------------------------------------------------------------------------------------


@given(
    eligible=st.lists(st.sampled_from([0.1, 0.5, 0.9]), min_size=1, max_size=12),
    others=st.lists(st.sampled_from([NAN, 1.0, 1.4]), max_size=4),
    missing=st.integers(1, 40),
    seed=st.integers(0, 3),
)
@example(eligible=[0.5] * 12, others=[], missing=11, seed=0)
def test_repeats_are_even(eligible, others, missing, seed):
    count = len(eligible)
    selection = select([*eligible, *others], count + missing, rng=np.random.default_rng(seed))
    times = np.bincount(selection.kept, minlength=count + len(others))
    assert times.sum() == count + missing
    assert (times[count:] == 0).all()
    assert times[:count].max() - times[:count].min() <= 1
    assert sorted(selection.kept[:count].tolist()) == list(range(count))  # every row once before any row twice


def test_the_generator_decides_which_rows_are_repeated_once_more():
    def repeated(seed):
        return tuple(select(np.linspace(0.1, 0.9, 20), 27, rng=np.random.default_rng(seed)).kept[20:].tolist())

    assert repeated(1) == repeated(1)
    assert len({repeated(seed) for seed in range(5)}) == 5


def test_without_a_generator_repeats_are_the_same_each_time():
    assert select([0.1, 0.2, 0.3], 5).kept.tolist() == select([0.1, 0.2, 0.3], 5).kept.tolist()


def test_the_global_random_state_is_left_alone():
    before = str(np.random.get_state())  # noqa: NPY002
    select([0.1, 0.2, 0.3], 5)
    assert str(np.random.get_state()) == before  # noqa: NPY002


def test_relax_fills_with_the_nearest_rows_above_the_limit():
    selection = select([0.5, 3.0, 1.1, NAN, 1.5], budget=3, on_shortfall="relax")
    assert selection.kept.tolist() == [0, 2, 4]
    assert selection.reasons.tolist() == [KEPT, ABOVE_LIMIT, RELAXED, "truncated", RELAXED]
    assert (selection.eligible, selection.shortfall) == (1, 2)


def test_relax_breaks_ties_by_id():
    assert select([0.5, 2.0, 2.0, 2.0], 2, ids=[0, 3, 1, 2], on_shortfall="relax").kept.tolist() == [0, 2]


def test_relax_repeats_when_even_that_is_too_little():
    selection = select([0.5, 1.5, NAN], budget=5, on_shortfall="relax")
    assert selection.kept[:2].tolist() == [0, 1]
    assert sorted(np.bincount(selection.kept)) == [2, 3]
    assert selection.reasons.tolist() == [KEPT, RELAXED, "truncated"]


def test_relax_takes_nothing_above_the_limit_without_need():
    assert select([0.5, 0.4, 1.1], budget=2, on_shortfall="relax").kept.tolist() == [0, 1]


def test_error_says_how_many_rows_there_are_and_what_to_do():
    with pytest.raises(
        ShortfallError, match=r"3 rows .* only 2 of 5 are eligible: 2 have no score and 1 has ifd >= 1"
    ) as e:
        select([0.5, 0.4, 1.1, NAN, NAN], budget=3, on_shortfall="error")
    assert "Lower `keep`" in str(e.value)


def test_error_does_not_trouble_a_budget_that_fits():
    assert len(select([0.5, 0.4, 1.1], budget=2, on_shortfall="error").kept) == 2


@pytest.mark.parametrize("on_shortfall", ["repeat", "error"])
@pytest.mark.parametrize("scores", [[NAN, NAN], [1.5, NAN], []])
def test_no_eligible_row_is_an_error(scores, on_shortfall):
    with pytest.raises(ShortfallError, match=f"only 0 of {len(scores)} are eligible"):
        select(scores, budget=1, on_shortfall=on_shortfall)


@pytest.mark.parametrize(("scores", "reason"), [([0.5, 0.4, 0.3], BELOW_CUT), ([0.5, 1.1, 1.2], ABOVE_LIMIT)])
def test_a_kept_row_that_no_tier_has_room_for_is_dropped_as_if_it_had_not_been_kept(scores, reason):
    selection = select(scores, budget=3, on_shortfall="relax")
    tiers = {0: np.array([0]), 1: np.array([1])}
    first = selection.in_tiers(np.array(scores), tiers, trained=[0])
    assert first.kept.tolist() == [0]
    assert first.reasons.tolist() == [KEPT, OTHER_TIER, reason]
    assert first.tier.tolist() == [0, 1, -1]


@pytest.mark.parametrize("scores", [[NAN, NAN], []])
def test_nothing_can_be_relaxed_where_no_row_has_a_score(scores):
    with pytest.raises(ShortfallError, match=f"only 0 of {len(scores)} are eligible: {len(scores)} have no score"):
        select(scores, budget=1, on_shortfall="relax")


# ---- options ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"max_ifd": 0}, "max_ifd must be positive, got 0"),
        ({"max_ifd": NAN}, "max_ifd must be positive, got nan"),
        ({"score": 3}, "the name of another column, or a function of columns, got 3"),
        ({"on_shortfall": "skip"}, "'repeat', 'relax' or 'error', got 'skip'"),
    ],
)
def test_wrong_options(options, match):
    with pytest.raises(ValueError, match=match):
        Cherry(**options)


@pytest.mark.parametrize("budget", [0, -1])
def test_a_budget_without_rows(budget):
    with pytest.raises(ValueError, match=f"at least one row, got {budget}"):
        select([0.5], budget)


def test_the_policy_is_a_frozen_value():
    policy = Cherry(max_ifd=0.9, on_shortfall="relax")
    assert pickle.loads(pickle.dumps(policy)) == policy
    assert repr(policy) == "Cherry(max_ifd=0.9, score='ifd', on_shortfall='relax')"
    with pytest.raises(AttributeError, match="cannot assign to field 'max_ifd'"):
        policy.max_ifd = 2.0


def test_the_columns_are_not_changed():
    columns = columns_of([0.5, NAN, 1.2])
    before = {name: values.copy() for name, values in columns.items()}
    Cherry()(columns, 3)
    for name, values in columns.items():
        np.testing.assert_array_equal(values, before[name])


# ---- many rows --------------------------------------------------------------------------------------------------


def test_reasons_of_many_rows_are_a_few_texts_and_not_one_object_for_each_row():
    statuses = np.array(["ok", "trunc" + "ated"], dtype=object)[np.arange(1000) % 2]
    selection = select(np.arange(1000) / 1000, budget=10, statuses=statuses)
    assert len({id(reason) for reason in selection.reasons}) == 3
    assert set(selection.reasons) == {KEPT, BELOW_CUT, "truncated"}


@given(data=scores_and_budget)
def test_the_rows_kept_are_those_of_a_full_sort(data):
    scores, budget = data
    eligible = [i for i, score in enumerate(scores) if score < 1]
    ids = [(7 * i) % 101 for i in range(len(scores))]
    expected = sorted(eligible, key=lambda i: (-scores[i], ids[i]))[:budget]
    assert select(scores, budget, ids=ids).kept[: len(expected)].tolist() == expected
