"""Weights from a column, on top of a policy."""

from __future__ import annotations

import numpy as np
import pytest

from ifd_trainer import Cherry, InfoBatch, Weighted
from ifd_trainer.errors import UserError

COLUMNS = {"ifd": np.array([0.3, 0.9, 0.6]), "ifd_status": np.full(3, "ok", dtype=object)}


def weighted(values, policy=None, budget=2, **columns):
    return Weighted("trust", policy or Cherry())(COLUMNS | {"trust": np.array(values)} | columns, budget)


def test_the_rows_are_those_of_the_policy_and_the_weights_theirs():
    selection = weighted([1.0, 0.5, 2.0])
    assert (selection.kept.tolist(), selection.weights.tolist()) == ([1, 2], [0.5, 2.0])
    np.testing.assert_array_equal(selection.row_weights, [np.nan, 0.5, 2.0])
    assert weighted([7, 1, 1]).row_weights is None  # whole numbers do; and all that are kept weigh 1


def test_weights_of_both_are_multiplied():
    cas = np.array([0.1, 5.0, 0.1])
    assert sorted(weighted([2.0, 3.0, 2.0], InfoBatch(), cas=cas).weights.tolist()) == [3.0, 4.0]


@pytest.mark.parametrize("wrong", [-1.0, np.nan, np.inf, None])
def test_a_weight_that_is_none_is_refused_where_it_is_read(wrong):
    with pytest.raises(UserError, match=r"Row 2 has trust .*number of at least 0"):
        weighted([1.0, 1.0, wrong])
    assert weighted([wrong, 1.0, 1.0]).weights.tolist() == [1.0, 1.0]


def test_what_is_no_column_of_weights_is_refused():
    with pytest.raises(UserError, match="holds no numbers"):
        weighted(["a", "b", "c"])
    for by, policy in (("", Cherry()), ("trust", Cherry), ("trust", Weighted("trust")), ("trust", None)):
        with pytest.raises(UserError, match=r"by is the name|policy is what chooses"):
            Weighted(by, policy)
