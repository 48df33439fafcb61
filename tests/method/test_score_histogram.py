"""Histograms that tell of no single row, and the threshold of several against the exact one of the pooled scores."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ifd_trainer.errors import UserError
from ifd_trainer.method.score_histogram import EDGES, ScoreHistogram, agreed_threshold

GRID = np.linspace(0.0, 4.0, 17)  # bins of 0.25
INSIDE = st.floats(0.0, 3.999, allow_nan=False)
BEYOND = st.floats(-3.0, 9.0, allow_nan=False)
SITES = st.lists(st.lists(INSIDE, min_size=1, max_size=40), min_size=1, max_size=4)


def exact(sites: list[list[float]], budget: int) -> float:
    """The score of the last row that is kept where all rows are in one place."""
    return sorted(np.concatenate(sites).tolist(), reverse=True)[budget - 1]


def histograms(sites: list[list[float]], least: int) -> dict[str, ScoreHistogram]:
    return {str(i): ScoreHistogram.of(np.array(values), GRID, least=least) for i, values in enumerate(sites)}


@given(SITES, st.data())
def test_the_threshold_is_within_a_bin_of_the_exact_one(sites, data):
    budget = data.draw(st.integers(1, sum(map(len, sites))))
    found = agreed_threshold(histograms(sites, least=1), budget)
    expected = exact(sites, budget)
    assert abs(found.value - expected) <= 0.25
    assert math.floor(found.value * 4) == math.floor(expected * 4)  # in the same bin
    low, high = found.between
    low, high = max(low, 0.0), min(high, 4.0)
    assert high - low == 0.25
    assert low <= expected < high


@given(st.lists(st.lists(BEYOND, min_size=6, max_size=40), min_size=1, max_size=4), st.integers(2, 6), st.data())
def test_what_merged_bins_and_scores_beyond_the_edges_leave_open_is_said(sites, least, data):
    budget = data.draw(st.integers(1, sum(map(len, sites))))
    found = agreed_threshold(histograms(sites, least), budget)
    low, high = found.between
    assert low <= exact(sites, budget) < high
    assert max(low, 0.0) <= found.value < min(high, 4.0)
    assert math.isclose(sum(site.expected for site in found.sites), budget, abs_tol=1e-6)
    for site, values in zip(found.sites, sites, strict=True):
        inside = np.clip(values, 0.0, np.nextafter(4.0, 0.0))
        assert site.fewest <= (inside >= found.value).sum() <= site.most
        assert site.fewest - 1e-9 <= site.expected <= site.most + 1e-9
        assert site.rows == len(values)


@given(st.lists(BEYOND, min_size=1, max_size=60), st.integers(1, 9), st.integers(0, 12))
def test_no_bin_tells_of_fewer_rows_than_that(values, least, without):
    rows = len(values) + without
    if len(values) < least:
        with pytest.raises(UserError, match="would be told one by one"):
            ScoreHistogram.of(np.array(values), GRID, rows, least=least)
        return
    found = ScoreHistogram.of(np.array(values), GRID, rows, least=least)
    counts = np.array(found.counts)
    assert counts.sum() == len(values)
    assert ((counts == 0) | (counts >= least)).all()
    assert set(found.edges) <= set(GRID.tolist())
    assert (found.edges[0], found.edges[-1]) == (0.0, 4.0)
    assert found.rows == (rows if without >= least else len(values))
    inside = np.clip(values, 0.0, np.nextafter(4.0, 0.0))
    assert found.above.tolist() == [int((inside >= edge).sum()) for edge in found.edges]


def test_a_threshold_worked_by_hand():
    one = ScoreHistogram("ira", (0.0, 1.0, 2.0, 3.0), (20, 10, 10), rows=50)
    other = ScoreHistogram("ira", (0.0, 2.0, 3.0), (30, 30), rows=60)
    found = agreed_threshold({"one": one, "other": other}, budget=45, keep=0.41)
    # 40 rows are at or above 2; of the bin [1, 2) of one and the upper half of [0, 2) of the other, 25 rows are.
    assert found.value == pytest.approx(1.8)
    assert found.between == (1.0, 2.0)  # 50 rows are at or above 1, though 30 of [0, 2) may lie anywhere in it
    assert [site.expected for site in found.sites] == pytest.approx([12.0, 33.0])
    assert [(site.fewest, site.most) for site in found.sites] == [(10, 20), (30, 60)]
    assert (found.rows, found.budget, found.keep) == (110, 45, 0.41)


def test_where_bins_are_empty_the_highest_threshold_is_taken():
    histogram = ScoreHistogram("ira", (0.0, 1.0, 2.0, 3.0), (10, 0, 10), rows=20)
    assert agreed_threshold({"a": histogram}, budget=10).value == 2.0  # and not 1, which keeps the same rows
    assert agreed_threshold({"a": histogram}, budget=20).value == 0.0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"score": "ifd"}, "The score is ira in a and ifd in b"),
        ({"max_ifd": 1.0}, "The limit of IFD is None in a and 1.0 in b"),
        ({"edges": (0.0, 1.0, 3.0)}, r"The range of edges is \(0.0, 2.0\) in a and \(0.0, 3.0\) in b"),
        ({"weights": "2"}, "a was scored by the weights 1 and b by 2: scores of different models"),
    ],
)
def test_histograms_that_cannot_be_added_are_refused(change, said):
    told = {"score": "ira", "edges": (0.0, 1.0, 2.0), "counts": (10, 10), "rows": 20, "weights": "1"}
    with pytest.raises(UserError, match=said):
        agreed_threshold({"a": ScoreHistogram(**told), "b": ScoreHistogram(**told | change)}, 5)


def test_a_model_that_one_site_does_not_know_is_no_other_one():
    told = {"score": "ira", "edges": (0.0, 1.0), "counts": (10,), "rows": 10}
    sites = {"a": ScoreHistogram(**told), "b": ScoreHistogram(**told, weights="1")}
    assert agreed_threshold(sites, 5).weights == "1"


@pytest.mark.parametrize("budget", [0, 21])
def test_more_rows_than_have_a_score_are_refused(budget):
    histogram = ScoreHistogram("ira", (0.0, 1.0), (20,), rows=30)
    with pytest.raises(UserError, match="of 30 rows at 1 site, of which 20 have a score"):
        agreed_threshold({"a": histogram}, budget)
    with pytest.raises(UserError, match="there is none"):
        agreed_threshold({}, 1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"edges": (0.0,)}, "at least two ascending numbers"),
        ({"edges": (0.0, 2.0, 1.0)}, "at least two ascending numbers"),
        ({"edges": (0.0, 1.0, math.inf)}, "at least two ascending numbers"),
        ({"counts": (10,)}, "counts are 2 numbers of rows"),
        ({"counts": (10, -10)}, "counts are 2 numbers of rows"),
        ({"counts": (10, 3)}, "A bin has 3 rows, and none or at least 10 are shown"),
        ({"rows": 19}, "The bins hold 20 rows, and there are 19"),
    ],
)
def test_what_is_no_histogram_is_refused(change, said):
    told = {"score": "ira", "edges": (0.0, 1.0, 2.0), "counts": (10, 10), "rows": 20}
    with pytest.raises(UserError, match=said):
        ScoreHistogram(**told | change)


def test_the_usual_edges_are_the_same_for_all_sites():
    for low, high, bins in EDGES.values():
        assert low < high
        assert bins >= 100
