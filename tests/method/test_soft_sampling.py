"""Rows drawn by their scores: the probabilities, and both ends of the temperature; k-centre; weighted ranks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ifd_trainer import Cherry, Diverse, Ranking, SoftSampling
from ifd_trainer.errors import UserError
from ifd_trainer.method.facility_location import k_center

SCORES = np.array([0.1, 0.3, 0.5, 0.7, 1.2])
COLUMNS = {"ifd": SCORES, "ifd_status": np.full(5, "ok")}


@pytest.mark.parametrize("temperature", [0.2, 0.5, np.inf])
def test_the_first_row_is_drawn_with_the_probability_of_its_score(temperature):
    expected = np.exp(SCORES[:4] / temperature)
    expected /= expected.sum()
    rng, draws = np.random.default_rng(0), 4000
    policy = SoftSampling(temperature)
    first = np.bincount([policy(COLUMNS, 1, rng=rng).kept[0] for _ in range(draws)], minlength=4) / draws
    assert np.abs(first - expected).max() < 4 * np.sqrt(0.25 / draws)


@given(st.integers(1, 4), st.integers(0, 10**6))
def test_a_low_temperature_keeps_the_highest_scores(budget, seed):
    cold = SoftSampling(1e-9)(COLUMNS, budget, rng=np.random.default_rng(seed))
    assert cold.kept.tolist() == Cherry()(COLUMNS, budget).kept.tolist()
    drawn = SoftSampling(1.0)(COLUMNS, budget, rng=np.random.default_rng(seed))
    assert len(set(drawn.kept.tolist())) == budget
    assert (np.diff(SCORES[drawn.kept]) < 0).all()
    assert drawn.reasons[4] == "above_limit"
    assert set(drawn.reasons[:4]) <= {"kept", "not_drawn"}
    again = SoftSampling(1.0)(COLUMNS, budget, rng=np.random.default_rng(seed))
    assert drawn.kept.tolist() == again.kept.tolist()


def test_too_few_rows_are_as_for_cherry():
    rng = [np.random.default_rng(3) for _ in range(2)]
    assert SoftSampling()(COLUMNS, 7, rng=rng[0]).kept.tolist() == Cherry()(COLUMNS, 7, rng=rng[1]).kept.tolist()
    for wrong in (0, -1.0, True, "warm"):
        with pytest.raises(UserError, match="temperature must be a positive number"):
            SoftSampling(wrong)


@given(st.integers(1, 12), st.integers(0, 1000))
def test_k_center_takes_the_row_that_is_farthest_from_all_chosen(k, seed):
    points = np.random.default_rng(seed).normal(size=(12, 4))
    units = points / np.linalg.norm(points, axis=1, keepdims=True)
    chosen = k_center(points, k)
    assert len(set(chosen.tolist())) == k
    for step in range(1, k):
        alike = (units @ units[chosen[:step]].T).max(axis=1)
        left = np.setdiff1d(np.arange(12), chosen[:step])
        assert alike[chosen[step]] <= alike[left].min() + 1e-3  # unit vectors are compared as integers
    with pytest.raises(UserError, match="k must be 1 to 12"):
        k_center(points, 13)


def test_a_diverse_selection_may_choose_by_k_center():
    columns = {"ifd": np.array([0.9, 0.8, 0.7]), "ifd_status": np.full(3, "ok")}
    columns["embedding"] = np.array([[1.0, 0.0], [0.8, 0.6], [-1.0, 0.1]])
    assert Diverse(share=3, by="k_center")(columns, 2).kept.tolist() == [0, 2]
    with pytest.raises(UserError, match="by must be 'facility_location' or 'k_center'"):
        Diverse(by="middle")


def test_weighted_ranks_are_a_score():
    columns = {"ifd": np.array([0.9, 0.5, 0.1]), "reward": np.array([1.0, 9.0, 5.0]), "ifd_status": np.full(3, "ok")}
    assert Cherry(score=Ranking({"ifd": 1.0, "reward": 2.0}))(columns, 1).kept.tolist() == [1]
    assert Cherry(score=Ranking.parse(["ifd:3", "reward"]))(columns, 1).kept.tolist() == [0]
    with pytest.raises(UserError, match="'ifd' is named twice"):
        Ranking.parse(["ifd", "ifd:2"])
