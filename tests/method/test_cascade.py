"""A column of others' making first, then IFD: which rows are left, which are kept, and why not the others."""

from __future__ import annotations

import numpy as np
import pytest

from ifd_trainer import Cascade
from ifd_trainer.errors import UserError

COLUMNS = {
    "reward": np.array([5.0, 4.0, np.nan, 3.0, 2.0, 9.0]),
    "ifd": np.array([0.2, 0.9, 0.95, 1.2, 0.5, np.nan]),
    "ifd_status": np.array(["ok", "ok", "ok", "ok", "ok", "truncated"]),
}


def test_the_best_by_the_column_are_left_and_ifd_chooses_among_them():
    selection = Cascade("reward", share=3)(COLUMNS, 1)
    assert selection.kept.tolist() == [1]
    assert selection.reasons.tolist() == ["below_cut", "kept", "no_value", "above_limit", "less_preferred", "truncated"]
    assert (selection.eligible, selection.cut) == (2, 0.9)


def test_a_fraction_is_one_of_all_rows():
    reasons = Cascade("reward", share=0.5)(COLUMNS, 1).reasons.tolist()
    assert reasons == Cascade("reward", share=3)(COLUMNS, 1).reasons.tolist()
    assert Cascade("reward", share=1.0)(COLUMNS, 1).reasons.tolist().count("less_preferred") == 0


def test_ties_are_broken_by_id_and_a_shortfall_is_that_of_cherry():
    columns = {**COLUMNS, "reward": np.ones(6), "ifd": np.full(6, 0.5)}
    ids = np.array([15, 14, 13, 12, 11, 10])
    selection = Cascade("reward", share=2)(columns, 4, ids=ids)
    assert sorted(set(selection.kept.tolist())) == [3, 4]
    assert selection.shortfall == 2
    with pytest.raises(UserError, match="only 2 of 6 are eligible"):
        Cascade("reward", share=2, on_shortfall="error")(columns, 4)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"by": ""}, "by must be the name of a column"),
        ({"by": "reward", "share": 0}, "share must be a fraction"),
        ({"by": "reward", "share": 1.5}, "share must be a fraction"),
        ({"by": "reward", "share": True}, "share must be a fraction"),
        ({"by": "reward", "max_ifd": -1}, "max_ifd must be positive"),
    ],
)
def test_what_cannot_be_is_refused(options, said):
    with pytest.raises(UserError, match=said):
        Cascade(**options)


def test_a_column_of_words_is_refused():
    with pytest.raises(UserError, match="The column 'reward' holds no numbers"):
        Cascade("reward")({**COLUMNS, "reward": np.array(["good"] * 6)}, 1)
