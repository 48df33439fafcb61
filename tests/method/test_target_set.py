"""Cosines are those of a plain computation, targets take rows in turn exactly, and every row has a reason."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from ifd_trainer import CalibratedLimit, TargetSet
from ifd_trainer.method.selection import ShortfallError
from ifd_trainer.method.target_set import SIMILARITIES, cosines, round_robin

TASK = TargetSet("task.jsonl")


def taken_in_turn(similarities, budget, ids):
    """Round robin by a plain loop: target after target looks at all rows."""
    left, taken = set(np.flatnonzero(np.isfinite(similarities).all(axis=1)).tolist()), []
    while left and len(taken) < budget:
        target = len(taken) % similarities.shape[1]
        taken.append(min(left, key=lambda row: (-similarities[row, target], ids[row])))
        left.remove(taken[-1])
    return taken


# ---- cosines ----------------------------------------------------------------------------------------------------


def test_cosines_by_hand():
    rows = np.array([[3.0, 4.0], [-3.0, -4.0], [4.0, -3.0], [0.0, 0.0], [np.nan, 1.0]], dtype=np.float32)
    found = cosines(rows, np.array([[6.0, 8.0], [1.0, 0.0]], dtype=np.float32))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found[:4, 0], [1, -1, 0, 0])
    np.testing.assert_allclose(found[:4, 1], [0.6, -0.6, 0.8, 0], rtol=1e-7)
    assert np.isnan(found[4]).all()


@given(
    rows=arrays.arrays(
        np.float32, st.tuples(st.integers(0, 12), st.just(5)), elements=st.floats(-(2.0**100), 2.0**100, width=32)
    ),
    targets=arrays.arrays(np.float32, (3, 5), elements=st.floats(-100, 100, width=32)),
)
def test_cosines_are_those_of_a_plain_computation(rows, targets):
    found = cosines(rows, targets)
    assert found.shape == (len(rows), 3)
    for i, row in enumerate(rows.astype(np.float64)):
        for j, target in enumerate(targets.astype(np.float64)):
            row, target = (v / (np.abs(v).max() or 1) for v in (row, target))
            length = math.sqrt((row @ row) * (target @ target))
            assert found[i, j] == pytest.approx(row @ target / length if length else 0, abs=2e-7)
    assert (np.abs(found) <= 1).all()


@pytest.mark.parametrize("block", [1, 7, 1 << 22])
def test_cosines_depend_on_no_block_and_on_no_other_row(block, monkeypatch):
    rng = np.random.default_rng(0)
    rows, targets = rng.normal(size=(40, 96)).astype(np.float32), rng.normal(size=(7, 96)).astype(np.float32)
    whole = cosines(rows, targets)
    monkeypatch.setattr("ifd_trainer.method.target_set.BLOCK", block * 96)
    order = rng.permutation(40)
    np.testing.assert_array_equal(cosines(rows[order], targets), whole[order])
    np.testing.assert_array_equal(np.concatenate([cosines(rows[i : i + 1], targets) for i in range(40)]), whole)
    np.testing.assert_array_equal(cosines(rows, targets[::-1]), whole[:, ::-1])


def test_no_row_has_no_similarity():
    assert cosines(np.empty((0, 0), np.float32), np.ones((2, 3))).shape == (0, 2)
    assert np.isnan(cosines(np.empty((3, 0), np.float32), np.ones((2, 3)))).all()  # embedded by no model


@pytest.mark.parametrize(
    ("rows", "targets", "message"),
    [
        (np.ones((2, 3)), np.ones((1, 4)), "Rows have 3 dimensions and targets 4: they were embedded by two models"),
        (np.ones((2, 3)), np.array([[1.0, 1, 1], [np.nan, 1, 1]]), "1 of 2 targets have an embedding that is not fini"),
        (np.ones((2, 3)), np.ones((0, 3)), "There is no target to hold rows against"),
        (np.ones(3), np.ones((1, 3)), r"Rows must be vectors of numbers \(n, d\), got float64 \(3,\)"),
        (np.full((2, 3), "a"), np.ones((1, 3)), "Rows must be vectors of numbers"),
    ],
)
def test_what_cannot_be_compared_is_said(rows, targets, message):
    with pytest.raises(ValueError, match=message):
        cosines(rows, targets)


# ---- round robin ------------------------------------------------------------------------------------------------


def test_targets_take_rows_in_turn_by_hand():
    similarities = np.array([[0.9, 0.8], [0.8, 0.9], [0.7, 0.1], [0.2, 0.3], [np.nan, 1.0]])
    # 0: row 0; 1: row 1; 0: row 2; 1: row 3, since rows 0 and 1 are gone; row 4 has no cosine with one of them
    assert round_robin(similarities, 9).tolist() == [0, 1, 2, 3]
    # Both are most like row 0: the first target takes it, the second takes its next best.
    assert round_robin(np.array([[0.9, 0.9], [0.8, 0.1], [0.1, 0.2]]), 2).tolist() == [0, 2]


def test_ties_go_to_the_lower_id():
    similarities = np.full((4, 2), 0.5)
    assert round_robin(similarities, 3, np.array([7, 3, 5, 1])).tolist() == [3, 1, 2]
    assert round_robin(similarities, 3, np.array(["d", "a", "c", "b"], dtype=object)).tolist() == [1, 3, 2]


tables = st.tuples(st.integers(1, 30), st.integers(1, 6)).flatmap(
    lambda shape: arrays.arrays(np.float32, shape, elements=st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0, np.nan]))
)


@given(similarities=tables, budget=st.integers(1, 40), seed=st.integers(0, 2**32))
def test_what_is_taken_is_what_a_plain_loop_takes_wherever_rows_stand(similarities, budget, seed):
    rng = np.random.default_rng(seed)
    ids, order = rng.permutation(len(similarities)), rng.permutation(len(similarities))
    taken = round_robin(similarities, budget, ids)
    assert taken.tolist() == taken_in_turn(similarities, budget, ids)
    assert len(set(taken.tolist())) == len(taken) == min(budget, np.isfinite(similarities).all(axis=1).sum())
    moved = round_robin(similarities[order], budget, ids[order])
    assert ids[order][moved].tolist() == ids[taken].tolist()
    assert round_robin(similarities, max(budget // 2, 1), ids).tolist() == taken[: max(budget // 2, 1)].tolist()


def test_targets_that_are_all_alike_look_far_enough():
    """Each waits for the same rows, which the others take: more than each sorts at a time."""
    similarities = np.repeat(np.random.default_rng(3).random((700, 1)), 90, axis=1)
    assert round_robin(similarities, 600).tolist() == np.argsort(-similarities[:, 0])[:600].tolist()


@pytest.mark.parametrize(("shape", "budget"), [((3, 0), 1), ((3,), 1), ((3, 2), 0)])
def test_a_round_robin_of_nothing_is_refused(shape, budget):
    with pytest.raises(ValueError, match=r"Similarities must be \(rows, targets\)|budget must be at least one row"):
        round_robin(np.zeros(shape), budget)


# ---- the policy -------------------------------------------------------------------------------------------------


def columns_of(similarities, status=None, ifd=None):
    rows = len(similarities)
    status = np.full(rows, "ok", dtype=object) if status is None else np.array(status, dtype=object)
    columns = {"ifd_status": status, SIMILARITIES: np.asarray(similarities, dtype=np.float32)}
    return columns if ifd is None else columns | {"ifd": np.asarray(ifd)}


def test_rows_are_kept_in_the_order_in_which_targets_take_them():
    columns = columns_of([[0.1, 0.9], [0.7, 0.8], [0.9, 0.2], [0.5, 0.5]], ["ok", "ok", "truncated", "ok"])
    selection = TASK(columns, 2)
    assert selection.kept.tolist() == [1, 0]
    assert selection.reasons.tolist() == ["kept", "kept", "truncated", "less_like_targets"]
    assert (selection.eligible, selection.shortfall) == (3, 0)
    assert np.isnan(selection.cut)
    assert columns["ifd_status"].tolist() == ["ok", "ok", "truncated", "ok"]


def test_a_row_without_an_embedding_is_not_finite():
    selection = TASK(columns_of([[np.nan, np.nan], [0.1, 0.2]]), 1)
    assert selection.reasons.tolist() == ["nonfinite", "kept"]


def test_a_limit_on_ifd_comes_first():
    columns = columns_of([[0.9], [0.8], [0.7], [0.6]], ["ok", "ok", "ok", "truncated"], [1.2, 0.9, 0.3, np.nan])
    selection = TargetSet("task.jsonl", max_ifd=1.0)(columns, 1)
    assert selection.kept.tolist() == [1]
    assert selection.reasons.tolist() == ["above_limit", "kept", "less_like_targets", "truncated"]
    assert selection.eligible == 2
    assert TASK(columns, 1).kept.tolist() == [0]


def test_limits_of_single_rows_hold_too():
    columns = columns_of([[0.9], [0.8]], ifd=[0.5, 0.5]) | {"row_limit": np.array([0.4, np.inf])}
    assert TASK(columns, 1).reasons.tolist() == ["above_limit", "kept"]


def test_too_few_rows_are_repeated_relaxed_or_refused():
    columns = columns_of([[0.9], [0.8], [0.7]], ["ok", "ok", "too_short"], [0.5, 1.5, np.nan])
    repeated = TASK(columns, 5, rng=np.random.default_rng(0))
    assert repeated.kept.tolist()[:2] == [0, 1]
    assert sorted(np.bincount(repeated.kept).tolist()) == [2, 3]
    assert repeated.shortfall == 3
    relaxed = TargetSet("task.jsonl", max_ifd=1.0, on_shortfall="relax")(columns, 2)
    assert relaxed.reasons.tolist() == ["kept", "kept_above_limit", "too_short"]
    refused = TargetSet("task.jsonl", on_shortfall="error")
    with pytest.raises(
        ShortfallError, match="3 rows are to be kept, but only 2 of 3 are eligible: the others are 1 to"
    ):
        refused(columns, 3)
    with pytest.raises(ShortfallError, match=r"only 1 of 3 are eligible"):
        TargetSet("task.jsonl", max_ifd=1.0, on_shortfall="error")(columns, 2)
    with pytest.raises(ShortfallError, match="only 0 of 1 are eligible: the others are 1 malformed"):
        TASK(columns_of([[np.nan]], ["malformed"]), 1)


@given(
    pool=st.lists(
        st.tuples(st.sampled_from(["ok", "ok", "truncated"]), st.integers(0, 4), st.integers(0, 4), st.integers(1, 20)),
        min_size=1,
        max_size=25,
    ),
    budget=st.integers(1, 30),
    limit=st.sampled_from([None, 1.0]),
    seed=st.integers(0, 2**32),
)
def test_the_budget_is_kept_of_eligible_rows_and_every_row_has_a_reason(pool, budget, limit, seed):
    status, one, other, tenths = (np.array(values) for values in zip(*pool, strict=True))
    ok = status == "ok"
    ifd = np.where(ok, tenths / 10, np.nan)
    columns = columns_of(np.where(ok[:, None], np.stack([one, other], axis=1) / 4, np.nan), status, ifd)
    ids = np.random.default_rng(seed).permutation(len(pool))
    eligible = ok & (ifd < 1) if limit else ok
    policy = TargetSet("task.jsonl", max_ifd=limit)
    if not eligible.any():
        with pytest.raises(ShortfallError):
            policy(columns, budget, ids=ids)
        return
    selection = policy(columns, budget, ids=ids)
    times = np.bincount(selection.kept, minlength=len(pool))
    assert len(selection.kept) == budget
    assert (selection.reasons == "kept").tolist() == (times > 0).tolist()
    assert not times[~eligible].any()
    assert times[times > 0].max() - times[times > 0].min() <= 1
    assert selection.eligible == eligible.sum()
    assert selection.shortfall == max(budget - eligible.sum(), 0)
    assert (selection.reasons[~ok] == "truncated").all()
    assert (selection.reasons[ok & ~eligible] == "above_limit").all()
    if budget < eligible.sum():
        rows = np.flatnonzero(eligible)
        expected = taken_in_turn(columns[SIMILARITIES][rows], budget, ids[rows])
        assert selection.kept.tolist() == rows[expected].tolist()
    order = np.random.default_rng(seed + 1).permutation(len(pool))
    again = policy({name: values[order] for name, values in columns.items()}, budget, ids=ids[order])
    assert sorted(ids[order][again.kept]) == sorted(ids[selection.kept])


def test_what_it_reads_of_scores():
    assert not TASK.reads_scores
    assert TargetSet("task.jsonl", max_ifd=math.inf) == TASK
    assert TargetSet("task.jsonl", max_ifd=0.9).reads_scores
    assert TargetSet("task.jsonl", max_ifd="calibrated").max_ifd == CalibratedLimit()


def test_targets_may_be_a_path_a_data_set_or_a_list(tmp_path):
    rows = [{"prompt": "a", "completion": "b"}]
    assert TargetSet(tmp_path / "task.jsonl").targets == str(tmp_path / "task.jsonl")
    assert TargetSet(rows) == TargetSet(Dataset.from_list(rows)) == TargetSet(tuple(rows))
    assert pickle.loads(pickle.dumps(TargetSet(rows))) == TargetSet(rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": []}, "The target set has no rows"),
        ({"targets": " "}, "A TargetSet needs a file, a hub name or rows"),
        ({"targets": None}, r"A TargetSet needs .* got None"),
        ({"targets": ["a", "b"]}, "A TargetSet needs a file"),
        ({"targets": "t.jsonl", "max_ifd": 0}, "max_ifd must be positive, got 0"),
        ({"targets": "t.jsonl", "on_shortfall": "cry"}, "on_shortfall must be 'repeat', 'relax' or 'error'"),
    ],
)
def test_what_is_no_target_set_is_said(options, message):
    with pytest.raises(ValueError, match=message):
        TargetSet(**options)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"ifd_status": np.full(2, "ok")}, "there is no column 'target_similarities'"),
        (columns_of(np.zeros((2, 0))), r"'target_similarities' must be \(2, m\)"),
        ({"ifd_status": np.full(2, "ok"), SIMILARITIES: np.zeros((3, 1))}, r"must be \(2, m\).*got \(3, 1\)"),
    ],
)
def test_similarities_of_other_rows_are_refused(columns, message):
    with pytest.raises(ValueError, match=message):
        TASK(columns, 1)
    with pytest.raises(ValueError, match="budget must be at least one row, got 0"):
        TASK(columns, 0)
