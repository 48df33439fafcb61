"""The sample for the brief experience: from every cluster, from the middle of its perplexities, evenly."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_info, threadpool_limits

from ifd_trainer.method import brief_experience as brief
from ifd_trainer.method.brief_experience import brief_sample, sample_shape

NAN, INF = math.nan, math.inf


def blobs(sizes, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(embeddings, perplexity, group) of groups far from each other, rows shuffled."""
    rng = np.random.default_rng(seed)
    group = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    embeddings = 50 * np.eye(len(sizes))[group] + rng.standard_normal((len(group), len(sizes)))
    return embeddings.astype(np.float32), np.exp(rng.normal(3, 1, len(group))), group


def quartiles(values) -> tuple[float, float]:
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third


# ---- which rows -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_every_cluster_gives_evenly_spaced_rows_of_its_middle_half(seed):
    embeddings, perplexity, group = blobs([40, 57, 100, 203], seed)
    chosen = brief_sample(embeddings, perplexity, clusters=4, per_cluster=5, seed=seed)
    assert len(chosen) == 20
    for label in range(4):
        first, third = quartiles(perplexity[group == label])
        middle = sorted(value for value in perplexity[group == label] if first <= value <= third)
        ranks = [middle.index(value) for value in sorted(perplexity[chosen[group[chosen] == label]])]
        # Five stretches of equal length, a row from the middle of each.
        assert ranks == [math.floor((stretch + 0.5) * len(middle) / 5) for stretch in range(5)]


def test_worked_by_hand():
    # Perplexities 1 to 12 in one cluster: the percentiles are 3.75 and 9.25, the middle 4 to 9, two of six.
    perplexity = np.array([7.0, 1, 12, 4, 9, 2, 11, 5, 8, 3, 10, 6])
    chosen = brief_sample(np.ones((12, 1)), perplexity, clusters=1, per_cluster=2, max_share=1)
    assert perplexity[chosen].tolist() == [5.0, 8.0]


def test_other_percentiles():
    perplexity = np.arange(100.0)
    chosen = brief_sample(np.ones((100, 1)), perplexity, clusters=1, per_cluster=10, low=90, high=100)
    assert chosen.tolist() == list(range(90, 100))


def test_a_cluster_with_fewer_rows_than_asked_for_gives_all():
    embeddings, perplexity, group = blobs([3, 120])
    chosen = brief_sample(embeddings, perplexity, clusters=2, per_cluster=6)
    assert np.bincount(group[chosen]).tolist() == [3, 6]


def test_a_middle_with_fewer_rows_than_asked_for_is_taken_whole():
    perplexity = np.arange(8.0)  # the quartiles are 1.75 and 5.25
    assert brief_sample(np.ones((8, 1)), perplexity, clusters=1, per_cluster=7, max_share=1).tolist() == [2, 3, 4, 5]


def test_two_rows_have_no_middle_half_and_give_the_lower_one():
    assert brief_sample(np.ones((2, 1)), np.array([5.0, 3.0]), clusters=1, per_cluster=1, max_share=0.5).tolist() == [1]


def test_equal_perplexities_are_taken_by_id():
    ids = np.array([5, 3, 9, 1])
    chosen = brief_sample(np.ones((4, 1)), np.full(4, 2.0), clusters=1, per_cluster=1, max_share=1, ids=ids)
    assert ids[chosen].tolist() == [5]  # the third of four: floor(0.5 * 4)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_rows_without_a_perplexity_or_an_embedding_take_no_part(bad):
    embeddings, perplexity, _ = blobs([60, 60])
    odd = np.arange(0, 120, 3)
    usable = np.setdiff1d(np.arange(120), odd)
    expected = usable[brief_sample(embeddings[usable], perplexity[usable])]
    for spoil in (embeddings, perplexity):
        spoiled = spoil.copy()
        spoiled[odd] = bad
        arguments = (spoiled, perplexity) if spoil is embeddings else (embeddings, spoiled)
        np.testing.assert_array_equal(brief_sample(*arguments), expected)


def test_equal_embeddings_are_one_cluster_however_many_are_asked_for():
    embeddings = np.repeat(np.eye(2), 100, axis=0)
    chosen = brief_sample(embeddings, np.tile(np.arange(100.0), 2), clusters=5, per_cluster=4)
    assert (chosen < 100).tolist() == [True] * 4 + [False] * 4


def test_zero_embeddings():
    assert len(brief_sample(np.zeros((50, 3)), np.arange(50.0), clusters=5, per_cluster=1)) == 1


def test_as_many_clusters_as_rows():
    assert brief_sample(np.eye(6), np.arange(6.0), clusters=6, per_cluster=1, max_share=1).tolist() == list(range(6))


def test_a_large_pool_is_clustered_in_batches(monkeypatch):
    embeddings, perplexity, group = blobs([500, 400, 300])
    monkeypatch.setattr(brief, "LARGEST_KMEANS", 1000)
    monkeypatch.setattr("sklearn.cluster.KMeans", None)  # would fail if it were used
    chosen = brief_sample(embeddings, perplexity, clusters=3, per_cluster=10)
    assert np.bincount(group[chosen]).tolist() == [10, 10, 10]
    assert len(brief_sample(np.ones((1200, 2)), np.arange(1200.0), clusters=3, per_cluster=10)) == 10


# ---- any input --------------------------------------------------------------------------------------------------

pools = st.integers(1, 40).flatmap(
    lambda n: st.tuples(
        arrays(np.float32, (n, 2), elements=st.sampled_from([-1.0, 0.0, 0.5, 3.0, NAN])),
        arrays(np.float64, n, elements=st.sampled_from([1.0, 2.5, 4.0, 9.0, 1e9, INF, NAN])),
    )
)


@settings(max_examples=60)
@given(pool=pools, clusters=st.integers(1, 9), per_cluster=st.integers(1, 9), share=st.sampled_from([0.1, 0.5, 1.0]))
@example(pool=(np.zeros((40, 2), np.float32), np.ones(40)), clusters=9, per_cluster=1, share=1.0)
def test_usable_rows_each_once_and_never_too_many(pool, clusters, per_cluster, share):
    embeddings, perplexity = pool
    usable = [i for i in range(len(perplexity)) if all(map(math.isfinite, [*embeddings[i], perplexity[i]]))]
    options = {"clusters": clusters, "per_cluster": per_cluster, "max_share": share}
    if not usable:
        with pytest.raises(ValueError, match=rf"None of {len(perplexity)} rows? can be sampled"):
            brief_sample(embeddings, perplexity, **options)
        return
    chosen = brief_sample(embeddings, perplexity, **options).tolist()
    assert chosen == sorted(set(chosen))
    assert set(chosen) <= set(usable)
    assert 1 <= len(chosen) <= max(1, min(clusters * per_cluster, int(share * len(usable))))


@settings(max_examples=20)
@given(order=st.permutations(range(60)))
def test_with_ids_it_does_not_matter_where_rows_stand(order):
    embeddings, perplexity, _ = blobs([30, 20, 10])
    perplexity = np.round(perplexity, -1)  # ties
    options = {"clusters": 9, "per_cluster": 3, "max_share": 0.5}
    ids = np.arange(60)
    expected = brief_sample(embeddings, perplexity, ids=ids, **options)
    there = np.array(order)
    again = brief_sample(embeddings[there], perplexity[there], ids=ids[there], **options)
    assert sorted(there[again]) == expected.tolist()


def test_the_same_seed_gives_the_same_rows_and_another_one_others():
    rng = np.random.default_rng(0)
    embeddings, perplexity = rng.standard_normal((400, 5)), rng.uniform(1, 9, 400)
    samples = [brief_sample(embeddings, perplexity, seed=seed).tolist() for seed in (0, 0, 1, 2)]
    assert samples[0] == samples[1]
    assert len(set(map(tuple, samples))) == 3


def test_global_states_are_left_alone():
    embeddings, perplexity, _ = blobs([80, 80])
    random, threads = str(np.random.get_state()), threadpool_info()  # noqa: NPY002
    before = embeddings.copy(), perplexity.copy()
    chosen = brief_sample(embeddings, perplexity)
    assert str(np.random.get_state()) == random  # noqa: NPY002
    assert [pool["num_threads"] for pool in threadpool_info()] == [pool["num_threads"] for pool in threads]
    np.testing.assert_array_equal(embeddings, before[0])
    np.testing.assert_array_equal(perplexity, before[1])
    np.random.seed(7)  # noqa: NPY002
    np.testing.assert_array_equal(brief_sample(embeddings, perplexity), chosen)


def test_k_means_runs_on_one_thread(monkeypatch):
    seen = []

    class Watched(KMeans):
        def fit(self, *arguments):
            seen.extend(pool["num_threads"] for pool in threadpool_info())
            return super().fit(*arguments)

    monkeypatch.setattr("sklearn.cluster.KMeans", Watched)
    with threadpool_limits(2):
        brief_sample(np.eye(20), np.arange(20.0))
    assert set(seen) == {1}


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_kinds_of_numbers(dtype):
    embeddings, perplexity, _ = blobs([80, 80])
    chosen = brief_sample(np.round(embeddings).astype(dtype), perplexity)
    np.testing.assert_array_equal(chosen, brief_sample(np.round(embeddings), perplexity))


# ---- how many ---------------------------------------------------------------------------------------------------


@given(
    rows=st.integers(1, 200_000),
    clusters=st.integers(1, 300),
    per_cluster=st.integers(1, 50),
    share=st.floats(0.001, 1.0),
)
def test_a_small_pool_gets_fewer_of_both(rows, clusters, per_cluster, share):
    found = sample_shape(rows, clusters, per_cluster, share)
    allowed = max(1, rows * share)
    assert 1 <= found[0] <= clusters
    assert 1 <= found[1] <= per_cluster
    assert found[0] * found[1] <= allowed + 1e-6
    assert found[0] <= rows
    if clusters * per_cluster <= rows * share:
        assert found == (clusters, per_cluster)


@given(rows=st.integers(300, 9_999))
def test_the_proportion_is_kept_as_far_as_whole_numbers_go(rows):
    clusters, per_cluster = sample_shape(rows)
    scale = math.sqrt(rows / 10_000)
    assert abs(per_cluster - 10 * scale) <= 0.5
    assert rows / 10 - per_cluster < clusters * per_cluster <= rows / 10  # not a cluster less than fits


def test_the_paper_s_size_from_ten_thousand_rows_on():
    assert [sample_shape(rows) for rows in (10_000, 52_002)] == [(100, 10)] * 2
    assert sample_shape(9_999) != (100, 10)


def test_a_share_is_not_rounded_down_by_its_binary_form():
    assert 0.29 * 100 < 29
    assert sample_shape(100, clusters=29, per_cluster=1, max_share=0.29) == (29, 1)


def test_a_small_pool_is_not_used_up():
    rng = np.random.default_rng(0)
    chosen = brief_sample(rng.standard_normal((300, 8)), rng.uniform(1, 9, 300))
    assert 15 <= len(chosen) <= 30


# ---- wrong input ------------------------------------------------------------------------------------------------


def test_no_usable_row_says_what_there_is():
    with pytest.raises(ValueError, match=r"None of 3 rows .* 0 have a finite perplexity, 2 a finite embedding"):
        brief_sample(np.array([[1.0], [NAN], [2.0]]), np.full(3, NAN))
    with pytest.raises(ValueError, match="None of 0 rows can be sampled"):
        brief_sample(np.ones((0, 2)), np.ones(0))


@pytest.mark.parametrize(("low", "high"), [(50, 50), (75, 25), (-1, 50), (0, 101), (NAN, 50)])
def test_percentiles_out_of_order(low, high):
    with pytest.raises(ValueError, match="0 <= low < high <= 100, got"):
        brief_sample(np.ones((3, 1)), np.ones(3), low=low, high=high)


@pytest.mark.parametrize(
    ("embeddings", "perplexity", "ids"),
    [((3, 1), (2,), None), ((3,), (3,), None), ((3, 1), (3, 1), None), ((3, 1), (3,), [1, 2])],
)
def test_arrays_that_do_not_belong_together(embeddings, perplexity, ids):
    with pytest.raises(ValueError, match=r"embeddings must be \(n, d\), perplexity and ids \(n,\); got shapes"):
        brief_sample(np.ones(embeddings), np.ones(perplexity), ids=ids)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"clusters": 0}, "clusters and per_cluster must be at least 1, got 0 and 10"),
        ({"per_cluster": -1}, "got 100 and -1"),
        ({"max_share": 0}, r"max_share must be in \(0, 1\], got 0"),
        ({"max_share": 1.1}, "got 1.1"),
    ],
)
def test_sizes_out_of_range(options, match):
    with pytest.raises(ValueError, match=match):
        brief_sample(np.ones((3, 1)), np.ones(3), **options)
