"""KAKURENBO: which rows are hidden first, with exact budgets."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ifd_trainer import Kakurenbo
from ifd_trainer.errors import UserError
from ifd_trainer.method.selection import ShortfallError

LEARNT = 0.3  # exp(-0.3) is 0.74


def columns_of(losses, changes=None) -> dict[str, np.ndarray]:
    changes = [np.nan] * len(losses) if changes is None else changes
    return {
        "cas": np.array(losses, dtype=float),
        "recent_loss_change": np.array(changes, dtype=float),
        "ifd_status": np.full(len(losses), "ok", dtype=object),
    }


def test_the_lowest_losses_are_hidden_in_the_first_epoch():
    selection = Kakurenbo()(columns_of([0.1, 2.0, 0.2, 0.3, 1.0]), 3)
    assert selection.kept.tolist() == [1, 4, 3]
    assert selection.reasons.tolist() == ["hidden", "kept", "hidden", "kept", "kept"]
    assert (selection.weights, selection.cut) == (None, 0.3)


def test_a_row_whose_loss_rose_or_of_which_the_model_is_not_confident_moves_back():
    losses, changes = [0.1, 0.2, LEARNT, 0.4, 2.0], [0.05, -0.1, -0.1, -0.9, 0.0]
    hidden = Kakurenbo()(columns_of(losses, changes), 3).reasons == "hidden"
    assert np.flatnonzero(hidden).tolist() == [1, 2]  # the first one's loss rose, so the next ready one is hidden
    # exp(-0.4) is 0.67. Where too few are ready, the lowest losses are hidden all the same.
    assert np.flatnonzero(Kakurenbo()(columns_of(losses, changes), 2).reasons == "hidden").tolist() == [0, 1, 2]
    assert np.flatnonzero(Kakurenbo(0.6)(columns_of(losses, changes), 2).reasons == "hidden").tolist() == [1, 2, 3]


@given(
    st.lists(st.tuples(st.floats(0, 3), st.floats(-1, 1)), min_size=1, max_size=25),
    st.integers(1, 30),
    st.floats(0, 1),
)
def test_budgets_are_exact_and_no_ready_row_is_kept_for_one_that_is_not(rows, budget, tau):
    losses, changes = np.array(rows).T
    selection = Kakurenbo(tau)(columns_of(losses, changes), budget)
    assert len(selection.kept) == budget
    assert selection.shortfall == max(budget - len(rows), 0)
    hidden = selection.reasons == "hidden"
    assert hidden.sum() == max(len(rows) - budget, 0)
    ready = (np.exp(-losses) >= tau) & (changes <= 0)
    if (hidden & ~ready).any():
        assert hidden[ready].all()
    for group in (ready, ~ready):  # within each, the lowest losses
        if (hidden & group).any() and (~hidden & group).any():
            assert losses[hidden & group].max() <= losses[~hidden & group].min()


def test_rows_without_a_loss_and_numbers_that_make_no_sense():
    columns = columns_of([np.nan, 1.0])
    assert Kakurenbo()(columns, 1).reasons.tolist() == ["nonfinite", "kept"]
    with pytest.raises(ShortfallError, match="none of 2 has a loss"):
        Kakurenbo()(columns_of([np.nan, np.nan]), 1)
    with pytest.raises(UserError, match="at least one row"):
        Kakurenbo()(columns, 0)
    with pytest.raises(UserError, match="from 0 to 1"):
        Kakurenbo(2)
