"""InfoBatch: what is kept, what it weighs, and that the expected weighted sum over rows is the sum over all of them."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ifd_trainer import InfoBatch, Selection, Stratified
from ifd_trainer.errors import UserError
from ifd_trainer.method.selection import ShortfallError


class Dealt:
    """A generator whose next permutation is given."""

    def __init__(self, order: tuple[int, ...]) -> None:
        self.order = np.array(order)

    def permutation(self, count: int) -> np.ndarray:
        assert len(self.order) == count
        return self.order


def columns_of(losses) -> dict[str, np.ndarray]:
    return {"cas": np.array(losses, dtype=float), "ifd_status": np.full(len(losses), "ok", dtype=object)}


def test_rows_from_the_mean_on_are_kept_and_the_others_count_for_the_pruned_ones():
    losses = [4.0, 1.0, 3.0, 0.5, 1.5, 2.0]  # their mean is 2, which counts as above
    selection = InfoBatch()(columns_of(losses), 5, rng=Dealt((2, 0, 1)))  # of the rows 1, 3 and 4
    assert selection.kept.tolist() == [0, 2, 5, 4, 1]
    assert selection.weights.tolist() == [1, 1, 1, 1.5, 1.5]
    assert selection.reasons.tolist() == ["kept", "kept", "kept", "not_drawn", "kept", "kept"]
    assert (selection.eligible, selection.shortfall, selection.cut) == (6, 0, 1.0)


@pytest.mark.parametrize("budget", [1, 2, 3, 4, 5])
def test_the_expected_weighted_sum_of_gradients_is_that_of_all_rows(budget):
    """Exactly: over every draw there is, each as often as any other, at budgets below, at and above the split."""
    losses, gradients = [3.0, 2.5, 1.0, 0.5, 0.7], np.random.default_rng(0).normal(size=(5, 7))
    drawn = 3 if budget > 2 else 5
    sums = []
    for order in permutations(range(drawn)):
        selection = InfoBatch()(columns_of(losses), budget, rng=Dealt(order))
        sums.append((selection.weights[:, None] * gradients[selection.kept]).sum(axis=0))
    np.testing.assert_allclose(np.mean(sums, axis=0), gradients.sum(axis=0), rtol=1e-12)
    if budget < 5:  # no single draw is
        assert np.ptp(sums, axis=0).max() > 0.1


@given(
    st.lists(st.floats(0, 10), min_size=1, max_size=30),
    st.integers(1, 40),
    st.sets(st.integers(0, 29)),
    st.integers(0, 5),
)
def test_budgets_are_exact_and_the_weights_add_up_to_the_rows_that_they_stand_for(losses, budget, unscored, seed):
    columns = columns_of(losses)
    columns["ifd_status"][[row for row in unscored if row < len(losses)]] = "truncated"
    eligible = np.flatnonzero(columns["ifd_status"] == "ok")
    if not len(eligible):
        with pytest.raises(ShortfallError, match="none of"):
            InfoBatch()(columns, budget)
        return
    selection = InfoBatch()(columns, budget, rng=np.random.default_rng(seed))
    assert len(selection.kept) == len(selection.weights) == budget
    assert set(selection.kept) <= set(eligible)
    np.testing.assert_allclose(selection.weights.sum(), len(eligible))
    above = eligible[columns["cas"][eligible] >= columns["cas"][eligible].mean()]
    if budget > len(above):
        assert set(above) <= set(selection.kept)
    times = np.bincount(selection.kept, minlength=len(losses))
    assert times[eligible].max() - times[eligible].min() <= 1 or budget < len(eligible)
    assert selection.shortfall == max(budget - len(eligible), 0)
    assert sorted(selection.reasons[times > 0].tolist()) == ["kept"] * (times > 0).sum()


def test_a_row_that_is_repeated_counts_once_in_all():
    selection = InfoBatch()(columns_of([1.0, 2.0]), 5, rng=np.random.default_rng(1))
    times = np.bincount(selection.kept)
    assert sorted(times) == [2, 3]
    assert [selection.weights[selection.kept == row].sum() for row in (0, 1)] == pytest.approx([1, 1])


def test_the_draw_is_one_of_row_ids_and_other_scores_have_other_means():
    losses, ids = np.array([1.0, 1.1, 1.2, 9.0, 1.3]), np.array([5, 3, 9, 1, 7])
    order = np.array([3, 0, 4, 1, 2])
    one = InfoBatch()(columns_of(losses), 3, ids=ids, rng=np.random.default_rng(4))
    other = InfoBatch()(columns_of(losses[order]), 3, ids=ids[order], rng=np.random.default_rng(4))
    assert ids[one.kept].tolist() == ids[order][other.kept].tolist()
    columns = columns_of(losses) | {"reward": np.array([0.0, 0, 0, 0, 1])}
    assert InfoBatch("reward")(columns, 2).kept[0] == 4


def test_no_number_is_no_loss_and_what_makes_no_sense_is_refused():
    columns = columns_of([1.0, np.nan, 3.0])
    assert InfoBatch()(columns, 2).reasons.tolist() == ["kept", "nonfinite", "kept"]
    with pytest.raises(UserError, match="at least one row"):
        InfoBatch()(columns, 0)
    with pytest.raises(UserError, match="score must be"):
        InfoBatch(3)
    with pytest.raises(UserError, match="ranks each row by itself"):
        Stratified("source", {"web": 1.0}, policy=InfoBatch())


def test_weights_follow_their_rows_into_tiers():
    selection = Selection(np.array([2, 0, 1]), np.full(3, "kept", dtype=object), 0.0, 3, 0, weights=np.array([1, 2, 3]))
    tiers = {1: np.array([2]), 0: np.array([0, 1])}
    part = selection.in_tiers(np.array([0.2, 0.1, 0.9]), tiers, trained={0})
    assert (part.kept.tolist(), part.weights.tolist()) == ([0, 1], [2.0, 3.0])
    np.testing.assert_array_equal(part.row_weights, [2, 3, np.nan])
