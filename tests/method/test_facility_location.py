"""Facility location: the rows that plain greedy chooses, and the policy that selects with it."""

from __future__ import annotations

import itertools
import math
import pickle
import tracemalloc

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ifd_trainer.method.facility_location import Diverse, facility_location
from ifd_trainer.method.reasons import ABOVE_LIMIT, BELOW_CUT, KEPT, REDUNDANT, RELAXED
from ifd_trainer.method.selection import Cherry, Selection, ShortfallError

NAN, INF = math.nan, math.inf


def cosines(embeddings) -> list[list[float]]:
    """Cosine similarities, one pair at a time, negative ones as 0; a zero vector is similar to none."""
    rows = [[float(value) for value in row] for row in embeddings]
    lengths = [math.hypot(*row) for row in rows]
    return [
        [
            max(sum(x * y for x, y in zip(a, b, strict=True)) / (p * q), 0.0) if p and q else 0.0
            for b, q in zip(rows, lengths, strict=True)
        ]
        for a, p in zip(rows, lengths, strict=True)
    ]


def integer_units(embeddings) -> np.ndarray:
    """Unit vectors times a scale, rounded, one row at a time, (n, d) int64: at most 4095 long, zeros stay zeros."""
    scale = 4095 - math.sqrt(embeddings.shape[1]) / 2
    lengths = [math.hypot(*map(float, row)) or 1.0 for row in embeddings]
    rows = [[round(scale * (float(x) / p)) for x in row] for row, p in zip(embeddings, lengths, strict=True)]
    return np.array(rows, dtype=np.int64)


def value(similar, chosen) -> float:
    """f(S): over all rows, how similar the most similar chosen row is."""
    return sum(max((row[j] for j in chosen), default=0) for row in similar)


def plain_greedy(similar, k: int) -> list[int]:
    """Each step evaluates f for every row that is left; the lowest position wins a tie."""
    chosen: list[int] = []
    for _ in range(k):
        left = [j for j in range(len(similar)) if j not in chosen]
        chosen.append(max(left, key=lambda j: (value(similar, [*chosen, j]), -j)))
    return chosen


def clustered(rows: int, centres: int, dimensions: int = 16, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    middle = rng.standard_normal((centres, dimensions))
    noise = 0.3 * rng.standard_normal((rows, dimensions))
    return (middle[rng.integers(centres, size=rows)] + noise).astype(np.float32)


coarse = st.sampled_from([-2.0, -1.0, 0.0, 0.0, 0.5, 1.0, 3.0])  # ties, duplicates and zero vectors are common
matrices = st.tuples(st.integers(1, 12), st.integers(1, 4)).flatmap(
    lambda shape: arrays(np.float32, shape, elements=coarse)
)
problems = matrices.flatmap(lambda matrix: st.tuples(st.just(matrix), st.integers(1, len(matrix))))


# ---- the optimiser ----------------------------------------------------------------------------------------------


@given(problem=problems)
@example(problem=(np.zeros((5, 2), np.float32), 3))
@example(problem=(np.ones((6, 3), np.float32), 6))
def test_it_chooses_what_plain_greedy_chooses(problem):
    embeddings, k = problem
    units = integer_units(embeddings)
    similar = np.maximum(units @ units.T, 0).tolist()  # exact
    assert facility_location(embeddings, k).tolist() == plain_greedy(similar, k)


@pytest.mark.parametrize("seed", range(3))
def test_it_chooses_what_plain_greedy_chooses_among_many_rows(seed):
    embeddings = clustered(300, centres=12, dimensions=40, seed=seed)
    units = integer_units(embeddings)
    similar = np.maximum(units @ units.T, 0)
    covered, expected = np.zeros(300, dtype=np.int64), []
    for _ in range(60):
        gains = np.array([np.maximum(similar[:, j] - covered, 0).sum() for j in range(300)])
        gains[expected] = -1
        expected.append(int(gains.argmax()))
        covered = np.maximum(covered, similar[expected[-1]])
    assert facility_location(embeddings, 60).tolist() == expected


@pytest.mark.parametrize("seed", range(3))
def test_it_chooses_what_plain_greedy_chooses_where_rows_hardly_differ(seed):
    angles = np.random.default_rng(seed).uniform(0, 0.1, 40)
    embeddings = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    units = integer_units(embeddings)
    assert facility_location(embeddings, 12).tolist() == plain_greedy((units @ units.T).tolist(), 12)


@given(problem=problems)
def test_each_step_is_the_best_by_the_true_cosines_but_for_rounding(problem):
    embeddings, k = problem
    similar, chosen = cosines(embeddings), facility_location(embeddings, k).tolist()
    for step, row in enumerate(chosen):
        before = chosen[:step]
        best = max(value(similar, [*before, j]) for j in range(len(similar)))
        assert value(similar, [*before, row]) >= best - 2e-3 * len(similar)


@settings(max_examples=30)
@given(seed=st.integers(0, 10_000), k=st.integers(1, 4))
def test_it_reaches_the_bound_of_greedy(seed, k):
    similar = cosines(embeddings := np.random.default_rng(seed).standard_normal((9, 3)))
    best = max(value(similar, rows) for rows in itertools.combinations(range(9), k))
    assert value(similar, facility_location(embeddings, k).tolist()) >= (1 - 1 / math.e) * best - 1e-2


@given(problem=problems, block=st.integers(1, 13), held=st.booleans())
def test_memory_and_blocks_do_not_change_the_choice(problem, block, held):
    embeddings, k = problem
    memory = 4 * len(embeddings) ** 2 - (not held)
    assert (
        facility_location(embeddings, k, memory_bytes=memory, block=block) == facility_location(embeddings, k)
    ).all()


@pytest.mark.parametrize("block", [1, 7, 64, 500])
def test_blocks_of_many_rows(block):
    embeddings = clustered(200, centres=9, dimensions=100)
    expected = facility_location(embeddings, 40)
    np.testing.assert_array_equal(facility_location(embeddings, 40, memory_bytes=0, block=block), expected)


@pytest.mark.parametrize("held", [True, False])
def test_similarities_are_held_only_where_they_fit(held):
    embeddings, matrix = clustered(1000, centres=9), 4 * 1000**2
    tracemalloc.start()
    facility_location(embeddings, 3, memory_bytes=matrix - (not held), block=16)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert matrix < peak < 1.5 * matrix if held else peak < 0.5 * matrix


def test_fewer_rows_are_the_first_of_more():
    embeddings = clustered(80, centres=5)
    np.testing.assert_array_equal(facility_location(embeddings, 10), facility_location(embeddings, 80)[:10])


def test_one_row_of_each_group_comes_before_a_second_of_any():
    group = np.repeat(np.arange(6), 5)
    embeddings = np.eye(6)[group] + 0.05 * np.random.default_rng(0).standard_normal((30, 6))
    assert sorted(group[facility_location(embeddings, 6)]) == [0, 1, 2, 3, 4, 5]


def test_one_row_is_the_most_central_one():
    angles = np.radians([0, 20, 30, 45, 80])
    assert facility_location(np.stack([np.cos(angles), np.sin(angles)], axis=1), 1).tolist() == [2]


def test_all_rows_are_chosen_once():
    assert sorted(facility_location(clustered(50, centres=4), 50)) == list(range(50))


def test_duplicates_come_last_by_position():
    embeddings = np.array([[1, 0], [0, 1], [1, 0], [0, 1], [0, 1]])
    assert facility_location(embeddings, 5).tolist() == [1, 0, 2, 3, 4]


def test_a_zero_vector_stands_for_none_not_even_itself():
    embeddings = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
    assert facility_location(embeddings, 4).tolist() == [1, 3, 0, 2]


def test_an_opposite_row_is_as_little_covered_as_an_unrelated_one():
    # With negative similarities as they are, row 1 would lose row 2's -1 and row 0 would come first.
    embeddings = np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.1], [-1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    assert facility_location(embeddings, 3).tolist() == [1, 0, 2]


@given(problem=problems, power=st.sampled_from([-900, -30, 0, 3, 30, 1000]))
def test_lengths_do_not_matter(problem, power):
    embeddings, k = problem
    scaled = embeddings.astype(np.float64) * 2.0**power
    assert facility_location(scaled, k).tolist() == facility_location(embeddings, k).tolist()


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int32])
def test_other_kinds_of_numbers(dtype):
    embeddings = np.random.default_rng(0).integers(-5, 6, (30, 4))
    chosen = facility_location(embeddings.astype(dtype), 10)
    np.testing.assert_array_equal(chosen, facility_location(embeddings.astype(np.float32), 10))


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("dimensions", [2, 7, 576, 20_000])
def test_sums_are_exact_whatever_the_order_of_dimensions(dimensions, held):
    """Two groups without a similarity between them, the same but for the order of dimensions: all gains are tied."""
    rng, rows = np.random.default_rng(dimensions), 16
    one = rng.standard_normal((rows, dimensions)) + rng.standard_normal(dimensions)
    other = one[:, rng.permutation(dimensions)]
    embeddings = np.block([[one, np.zeros_like(one)], [np.zeros_like(one), other]])
    chosen = facility_location(embeddings, 2 * rows, memory_bytes=2 << 30 if held else 0, block=5).tolist()
    assert chosen[1::2] == [row + rows for row in chosen[::2]]
    assert sorted(chosen) == list(range(2 * rows))


def test_progress_counts_the_rows_chosen():
    seen: list[int] = []
    facility_location(clustered(20, centres=3), 4, progress=seen.append)
    assert seen == [1, 2, 3, 4]


@pytest.mark.parametrize("k", [0, -1, 5])
def test_a_count_that_cannot_be_chosen(k):
    with pytest.raises(ValueError, match=f"k={k} rows cannot be chosen of 4; k must be 1 to 4"):
        facility_location(np.eye(4), k)


@pytest.mark.parametrize("shape", [(3,), (0, 2), (2, 0), (2, 2, 2)])
def test_embeddings_of_another_shape(shape):
    with pytest.raises(ValueError, match=r"must be numbers \(n, d\)"):
        facility_location(np.zeros(shape), 1)


def test_embeddings_that_are_no_numbers():
    with pytest.raises(ValueError, match=r"must be numbers .* got object"):
        facility_location(np.array([[None, 1.0]]), 1)


@pytest.mark.parametrize("bad", [NAN, INF])
def test_embeddings_that_are_not_finite(bad):
    with pytest.raises(ValueError, match="2 of 3 embeddings are not finite, the first in row 1"):
        facility_location(np.array([[1.0, 1.0], [1.0, bad], [bad, bad]]), 1)


def test_a_block_without_rows():
    with pytest.raises(ValueError, match="block must be at least one row, got 0"):
        facility_location(np.eye(2), 1, block=0)


# ---- the policy -------------------------------------------------------------------------------------------------


def columns_of(scores, embeddings=None, statuses=None) -> dict[str, np.ndarray]:
    scores = np.asarray(scores, dtype=np.float64)
    statuses = np.where(np.isnan(scores), "truncated", "ok") if statuses is None else np.asarray(statuses)
    embeddings = np.eye(len(scores)) if embeddings is None else np.asarray(embeddings)
    return {"ifd": scores, "ifd_status": statuses, "embedding": embeddings}


def same(one: Selection, two: Selection) -> bool:
    return (
        one.kept.tolist() == two.kept.tolist()
        and one.reasons.tolist() == two.reasons.tolist()
        and (one.cut, one.eligible, one.shortfall) == (two.cut, two.eligible, two.shortfall)
    )


selections = st.integers(1, 16).flatmap(
    lambda n: st.tuples(
        st.lists(st.sampled_from([NAN, 0.1, 0.2, 0.3, 0.7, 0.9, 1.0, 1.4]), min_size=n, max_size=n).filter(
            lambda scores: any(score < 1 for score in scores)
        ),
        arrays(np.float32, (n, 2), elements=coarse),
        st.integers(1, n),
        st.sampled_from([0.2, 0.5, 1.0, 1, 4, 100]),
    )
)


def test_candidates_by_score_and_among_them_those_that_differ():
    east, north = [1.0, 0.0], [0.0, 1.0]
    scores = [0.1, 0.9, 0.8, 1.2, 0.7, NAN]
    selection = Diverse(share=3)(columns_of(scores, [north, east, east, north, north, north]), budget=2)
    assert selection.kept.tolist() == [1, 4]
    assert selection.reasons.tolist() == [BELOW_CUT, KEPT, REDUNDANT, ABOVE_LIMIT, KEPT, "truncated"]
    assert (selection.cut, selection.eligible, selection.shortfall) == (0.7, 4, 0)


@given(case=selections)
def test_counts_and_reasons_add_up(case):
    scores, embeddings, budget, share = case
    eligible = sorted((score for score in scores if score < 1), reverse=True)
    selection = Diverse(share=share)(columns_of(scores, embeddings), budget)
    of = share if isinstance(share, int) else round(share * len(eligible))
    of = min(max(of, budget), len(eligible))  # candidates
    assert len(selection.kept) == budget
    assert (selection.eligible, selection.shortfall) == (len(eligible), max(budget - len(eligible), 0))
    rows = selection.rows.tolist()
    assert len(rows) == min(budget, len(eligible))
    reasons = selection.reasons.tolist()
    assert [i for i, reason in enumerate(reasons) if reason == KEPT] == sorted(rows)
    assert reasons.count(REDUNDANT) == max(of - budget, 0)
    assert reasons.count(BELOW_CUT) == len(eligible) - of
    assert reasons.count(ABOVE_LIMIT) == sum(score >= 1 for score in scores)
    candidates = [score for score, reason in zip(scores, reasons, strict=True) if reason in (KEPT, REDUNDANT)]
    assert sorted(candidates, reverse=True) == eligible[:of]
    kept = [scores[i] for i in rows]
    assert kept == sorted(kept, reverse=True)
    assert selection.cut == kept[-1]


@given(case=selections)
def test_the_choice_does_not_depend_on_where_rows_stand(case):
    scores, embeddings, budget, share = case
    ids = np.arange(len(scores)) * 7 % 101
    there = np.random.default_rng(0).permutation(len(scores))
    one = Diverse(share=share)(columns_of(scores, embeddings), budget, ids=ids)
    two = Diverse(share=share)(columns_of(np.array(scores)[there], embeddings[there]), budget, ids=ids[there])
    assert ids[one.rows].tolist() == ids[there][two.rows].tolist()


@given(case=selections, on_shortfall=st.sampled_from(["repeat", "relax"]), more=st.integers(0, 9))
def test_with_nothing_to_choose_it_selects_as_cherry_does(case, on_shortfall, more):
    scores, embeddings, _, share = case
    eligible = sum(score < 1 for score in scores)
    columns, budget = columns_of(scores, embeddings), eligible + more
    one = Diverse(share=share, on_shortfall=on_shortfall)(columns, budget, rng=np.random.default_rng(1))
    assert same(one, Cherry(on_shortfall=on_shortfall)(columns, budget, rng=np.random.default_rng(1)))


def test_a_share_of_the_budget_or_less_leaves_nothing_to_choose():
    columns = columns_of(np.linspace(0.9, 0.1, 10), np.ones((10, 2)))
    for share in (0.1, 0.3, 1, 3):
        assert same(Diverse(share=share)(columns, 3), Cherry()(columns, 3))


def test_equal_rows_are_taken_by_score_then_id():
    columns = columns_of([0.5, 0.6, 0.5, 0.5], np.ones((4, 2)))
    assert Diverse(share=1.0)(columns, 1, ids=[1, 9, 0, 2]).kept.tolist() == [1]
    assert Diverse(share=1.0)(columns, 3, ids=["c", "z", "b", "a"]).kept.tolist() == [1, 3, 2]


def test_the_same_rows_as_facility_location_over_the_candidates():
    embeddings, scores = clustered(200, centres=8), np.random.default_rng(1).uniform(0.3, 0.99, 200)
    candidates = sorted(range(200), key=lambda i: -scores[i])[:40]
    expected = {candidates[i] for i in facility_location(embeddings[candidates], 8)}
    selection = Diverse()(columns_of(scores, embeddings), 8)
    assert set(selection.kept.tolist()) == expected
    similar = cosines(embeddings[candidates])
    by_score = value(similar, range(8))
    assert value(similar, [candidates.index(i) for i in selection.kept]) > 1.05 * by_score


def test_the_other_score_and_another_limit():
    columns = columns_of([0.1, 0.2, 0.9]) | {"ifd_ppl": np.array([0.5, 0.4, 0.3])}
    assert Diverse(share=2, score="ifd_ppl", max_ifd=0.45)(columns, 1).reasons.tolist() == [
        ABOVE_LIMIT,
        KEPT,
        REDUNDANT,
    ]


def test_relax_takes_rows_above_the_limit():
    selection = Diverse(on_shortfall="relax")(columns_of([0.5, 3.0, 1.1]), 2)
    assert selection.reasons.tolist() == [KEPT, ABOVE_LIMIT, RELAXED]


@pytest.mark.parametrize("scores", [[0.5, 1.2, NAN], [NAN, NAN, NAN]])
def test_a_shortfall_can_be_an_error(scores):
    with pytest.raises(ShortfallError, match="2 rows are to be kept, but only"):
        Diverse(on_shortfall="error")(columns_of(scores), 2)


def test_no_eligible_row_is_always_an_error():
    with pytest.raises(ShortfallError, match="only 0 of 2"):
        Diverse()(columns_of([NAN, 1.5]), 1)


def test_embeddings_matter_for_candidates_only():
    columns = columns_of([0.9, 0.8, 0.1, NAN], [[1, 0], [0, 1], [NAN, 0], [NAN, NAN]])
    assert len(Diverse(share=2)(columns, 1).kept) == 1
    with pytest.raises(ValueError, match="1 of 3 embeddings are not finite"):
        Diverse(share=3)(columns, 1)


def test_without_embeddings():
    columns = columns_of([0.5, 0.4])
    del columns["embedding"]
    with pytest.raises(ValueError, match=r"no column 'embedding' in \['ifd', 'ifd_status'\]"):
        Diverse()(columns, 1)


@pytest.mark.parametrize("embeddings", [np.ones((3, 2)), np.ones(2), np.ones((2, 2, 2))])
def test_embeddings_of_other_rows(embeddings):
    with pytest.raises(ValueError, match=r"must be \(2, d\), one row per score; got shape"):
        Diverse()(columns_of([0.5, 0.4], embeddings), 1)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"share": 0.0}, "share must be a fraction"),
        ({"share": 1.5}, "got 1.5"),
        ({"share": 0}, "got 0"),
        ({"share": True}, "got True"),
        ({"share": NAN}, "got nan"),
        ({"max_ifd": 0}, "max_ifd must be positive"),
        ({"score": 3}, "the name of another column, or a function of columns, got 3"),
        ({"on_shortfall": "skip"}, "'repeat', 'relax' or 'error', got 'skip'"),
    ],
)
def test_wrong_options(options, match):
    with pytest.raises(ValueError, match=match):
        Diverse(**options)


def test_a_budget_without_rows():
    with pytest.raises(ValueError, match="at least one row, got 0"):
        Diverse()(columns_of([0.5]), 0)


def test_the_policy_is_a_frozen_value():
    policy = Diverse(share=0.5, max_ifd=0.9)
    assert pickle.loads(pickle.dumps(policy)) == policy
    assert repr(policy) == "Diverse(share=0.5, max_ifd=0.9, score='ifd', on_shortfall='repeat', by='facility_location')"
    with pytest.raises(AttributeError, match="cannot assign to field 'share'"):
        policy.share = 0.1


def test_the_columns_are_not_changed():
    columns = columns_of([0.5, 0.9, NAN, 0.7], np.eye(4))
    before = {name: values.copy() for name, values in columns.items()}
    Diverse(share=1.0)(columns, 2)
    for name, values in columns.items():
        np.testing.assert_array_equal(values, before[name])
