"""What the guards decide from numbers: thresholds, p-values, which duplicate stays, and when a scoring says nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare, spearmanr
from sklearn.metrics import roc_auc_score

from ifd_trainer.data.similar_prompts import SimilarPrompts
from ifd_trainer.method.calibrated_limit import CalibratedLimit
from ifd_trainer.method.duplicates import Duplicates, representatives, surplus
from ifd_trainer.method.guard import Guard
from ifd_trainer.method.pairing_test import PairingTest
from ifd_trainer.method.scoring_health import Freeze, health, rank_correlation, separation
from ifd_trainer.method.unfinished import Unfinished

# ---- the dataclass ----------------------------------------------------------------------------------------------


def test_guards_may_be_given_as_true_as_none_or_as_they_are():
    guard = Guard(limit=False, pairing=True, unfinished=None, duplicates=Duplicates(None))
    assert guard == Guard(None, PairingTest(), None, Duplicates(None), Freeze())
    assert guard.names == ["pairing", "duplicates", "freeze"]
    assert Guard().names == ["limit", "unfinished", "duplicates", "freeze"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"limit": 0.9}, "limit of a Guard must be a CalibratedLimit, True or None, got 0.9"),
        ({"pairing": CalibratedLimit()}, "pairing of a Guard must be a PairingTest"),
        ({"on_misaligned": "stop"}, "on_misaligned must be 'error' or 'warn', got 'stop'"),
    ],
)
def test_anything_else_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        Guard(**options)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: PairingTest(alpha=0.1, anchors=8), "anchors must be a whole number, and at least 9 with alpha=0.1"),
        (lambda: PairingTest(tokens=0), "tokens must be a whole number of at least 1, got 0"),
        (lambda: PairingTest(prompts="far"), "prompts must be 'random' or 'near', got 'far'"),
        (lambda: CalibratedLimit(prompts=None), "prompts must be 'random' or 'near', got None"),
        (lambda: Unfinished(alpha=0.01, cuts=50), "cuts must be a whole number, and at least 99 with alpha=0.01"),
        (lambda: Unfinished(alpha=True), "alpha must be a share"),
        (lambda: Duplicates(0.3), "similarity must be a share from 0.5 to 1, or None for equal texts, got 0.3"),
        (lambda: Freeze(spread=1), r"spread must be a number in \[0, 1\), got 1; 0 switches it off"),
    ],
)
def test_numbers_that_cannot_be_kept_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


# ---- unfinished answers -----------------------------------------------------------------------------------------


def losses(seed: int, whole: int = 300, unfinished: int = 0, ends: float = 1.3, cuts: float = 20.0):
    """End-of-turn losses as a model that knows its end-of-turn token gives them, and those of cut answers."""
    rng = np.random.default_rng(seed)
    pool = np.concatenate([rng.lognormal(math.log(ends), 0.7, whole), rng.normal(cuts, 4.0, unfinished)])
    return pool, np.concatenate([rng.normal(cuts, 4.0, 240), rng.lognormal(math.log(ends), 0.7, 8)])


@given(st.integers(0, 10**6), st.sampled_from([0, 10, 60, 150, 250]))
def test_unfinished_answers_are_found_and_whole_ones_are_not(seed, unfinished):
    pool, cut = losses(seed, unfinished=unfinished)
    threshold = Unfinished().threshold(pool, cut)
    assert np.mean(pool[300:] >= threshold) >= 0.9 if unfinished else math.isfinite(threshold)
    assert np.mean(pool[:300] >= threshold) <= 0.05


@given(st.integers(0, 10**6), st.floats(5.0, 30.0))
def test_a_model_to_which_all_ends_are_alike_tells_nothing(seed, loss):
    rng = np.random.default_rng(seed)
    pool, cut = rng.normal(loss, 1.0, 300), rng.normal(loss, 1.5, 256)
    assert Unfinished().threshold(pool, cut) == math.inf


def test_a_pool_that_is_mostly_unfinished_is_left_alone():
    pool, cut = losses(0, whole=100, unfinished=120)
    assert Unfinished().threshold(pool, cut) == math.inf


def test_too_few_cuts_tell_nothing():
    assert Unfinished().threshold(np.ones(20), np.full(8, 20.0)) == math.inf
    assert Unfinished().threshold(np.array([np.nan]), np.full(30, 20.0)) == math.inf
    assert Unfinished().threshold(np.ones(20), np.full(9, 20.0)) == 20.0


@given(st.integers(2, 40), st.integers(0, 2**32))
def test_the_same_answers_are_cut_at_the_same_places_wherever_they_stand(rows, seed):
    ids, tokens = np.arange(100, 100 + rows), np.random.default_rng(seed).integers(0, 9, rows)
    order = np.random.default_rng(seed).permutation(rows)
    here, there = Unfinished(cuts=30).draw(ids, tokens, seed), Unfinished(cuts=30).draw(ids[order], tokens[order], seed)
    assert ids[here[0]].tolist() == ids[order][there[0]].tolist()
    assert here[1].tolist() == there[1].tolist()
    assert ((here[1] >= 1) & (here[1] < tokens[here[0]])).all()
    assert len(here[0]) == min(30, (tokens > 1).sum())


# ---- the pairing test -------------------------------------------------------------------------------------------


def test_p_is_uniform_where_a_prompt_is_like_any_other():
    rng, test = np.random.default_rng(0), PairingTest(alpha=0.1, anchors=9)
    drawn = rng.lognormal(size=(5000, 10))  # ten exchangeable prompts, the first of them the row's own
    p = test.p_values(drawn[:, 0], drawn[:, 1:])
    counts = np.bincount(np.round(10 * p).astype(int), minlength=11)[1:]
    assert chisquare(counts).pvalue > 1e-3
    assert abs(test.passes(p).mean() - 0.1) < 4 * math.sqrt(0.09 / 5000)


def test_prompts_that_could_not_be_scored_do_not_count_and_too_few_tell_nothing():
    test = PairingTest(alpha=0.25, anchors=4)
    others = np.array([[2.0, 3.0, 0.5, np.nan], [2.0, np.nan, np.nan, 3.0], [1.0, 2.0, 3.0, 4.0]])
    p = test.p_values(np.array([1.0, 1.0, 1.0]), others)
    assert p[0] == 0.5
    assert np.isnan(p[1])
    assert p[2] == 0.4  # as good counts against the own prompt
    assert test.passes(p).tolist() == [False, True, False]


def test_a_few_rows_share_their_anchors_and_others_have_others():
    test = PairingTest(alpha=0.25, anchors=3)
    anchors = test.draw(np.arange(80), np.arange(1000), seed=0)
    assert anchors.shape == (80, 6)
    assert (anchors[:32] == anchors[0]).all()
    assert (anchors[32:64] == anchors[32]).all()
    assert len({tuple(row) for row in anchors.tolist()}) == 3
    assert test.draw(np.arange(2), np.arange(4), seed=0).shape == (2, 4)  # a pool of fewer rows than are tried


def test_near_anchors_are_shared_by_the_rows_that_are_tested_and_the_nearest_of_each_is_among_them():
    looked_among = []

    def nearest(rows: np.ndarray, k: int, among: np.ndarray) -> np.ndarray:
        looked_among.append(among)
        apart = np.abs(rows[:, None] - among).astype(float)
        apart[apart == 0] = np.inf
        return among[np.argsort(apart, axis=1, kind="stable")[:, :k]]

    rows, pool = np.arange(0, 1000, 25), np.arange(1000)
    found = PairingTest(alpha=0.25, anchors=3, prompts="near").draw(rows, pool, 0, nearest)
    sample, shared = looked_among
    assert (found.shape, len(sample), len(shared)) == ((40, 6), 256, 40)
    assert set(found.ravel()) <= set(shared) <= set(sample)
    assert found[:, 0].tolist() == nearest(rows, 1, sample)[:, 0].tolist()
    assert PairingTest(alpha=0.25, anchors=3, prompts="near").draw(rows[:1], pool, 0, nearest).shape == (1, 6)


@pytest.mark.parametrize(("rows", "pool"), [([], range(9)), ([0], [0])])
def test_without_rows_or_without_others_there_are_no_anchors(rows, pool):
    similar = SimilarPrompts(f"prompt {i}" for i in range(9))
    test = PairingTest(alpha=0.25, anchors=3, prompts="near")
    assert test.draw(np.array(rows, dtype=np.int64), np.array(pool), 0, similar.nearest).size == 0


# ---- duplicates -------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans(), st.booleans()), min_size=1, max_size=30), st.randoms())
def test_of_each_group_one_usable_row_stays_the_same_one_in_any_order(rows, random):
    groups, usable, trained = (np.array(values) for values in zip(*rows, strict=True))
    ids = np.arange(len(rows)) * 7 % 31
    goes = surplus(groups, ids, usable, trained)
    for group in set(groups[usable]):
        members = np.flatnonzero((groups == group) & usable)
        stays = members[~goes[members]]
        assert len(stays) == 1
        assert ids[stays[0]] == min(ids[members[trained[members]]] if trained[members].any() else ids[members])
    assert not goes[~usable].any()
    order = np.array(random.sample(range(len(rows)), len(rows)))
    assert surplus(groups[order], ids[order], usable[order], trained[order]).tolist() == goes[order].tolist()


def test_the_row_that_stands_for_a_duplicate_is_one_that_was_let_through():
    groups, ids = np.array([0, 0, 0, 3]), np.array([4, 5, 6, 7])
    reasons = np.array(["above_limit", "duplicate", "below_cut", "kept"], dtype=object)
    assert representatives(groups, ids, reasons).tolist() == [None, 6, None, None]


# ---- whether a scoring says anything ----------------------------------------------------------------------------

numbers = st.lists(st.integers(0, 6), min_size=3, max_size=30)


@given(numbers, numbers)
def test_separation_is_the_area_under_the_roc_curve(own, wrong):
    expected = roc_auc_score([0] * len(own) + [1] * len(wrong), own + wrong)
    assert separation(np.array(own, float), np.array(wrong, float)) == pytest.approx(expected)


@given(numbers, numbers)
def test_rank_correlation_is_spearmans(x, y):
    size = min(len(x), len(y))
    x, y = np.array(x[:size], float), np.array(y[:size], float)
    found = rank_correlation(x, y)
    if len(set(x)) > 1 and len(set(y)) > 1:
        assert found == pytest.approx(spearmanr(x, y).statistic)
    else:
        assert found is None


def test_of_a_few_unseen_rows_nothing_is_said():
    scores = np.linspace(0.2, 0.9, 40)
    unseen = np.arange(40) < 19
    assert set(health(scores, scores, scores + 1, unseen).values()) == {None}
    found = health(scores, scores, scores + 1, np.arange(40) < 20)
    assert (found["separation"], found["rank_correlation"]) == pytest.approx((1.0, 1.0))


@pytest.mark.parametrize(
    ("now", "first", "words"),
    [
        ({"separation": 0.95, "rank_correlation": 0.9, "spread": 0.2}, {"spread": 0.2}, None),
        ({"separation": 0.55}, {}, "in 55 % of cases"),
        (
            {"separation": 0.66},
            {"separation": 0.83},
            "66 % of cases, and the first ones did in 83 % (a coin does in 50 %",
        ),
        ({"separation": 0.67}, {"separation": 0.83}, None),  # 1/2 + 0.33 / 2 is 0.665
        ({"separation": 0.61}, {"separation": None}, None),
        ({"separation": 0.9, "rank_correlation": 0.1}, {}, r"otherwise than those before \(correlation 0.10"),
        ({"spread": 0.01}, {"spread": 0.2}, "hardly differ any more"),
        ({"separation": None, "rank_correlation": None, "spread": None}, {"spread": None}, None),
    ],
)
def test_a_scoring_without_information_is_told_by_what_it_lacks(now, first, words):
    reason = Freeze().reason(now, first)
    assert reason is None if words is None else words.split("\\")[0] in reason


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("separation", "wanted are 60 %"),
        ("retained", "the first ones did in 90 %"),
        ("agreement", "rank rows otherwise"),
        ("spread", "hardly differ"),
    ],
)
def test_each_part_of_the_rule_stands_alone_and_0_switches_it_off(part, words):
    forgetful, first = {"separation": 0.45, "rank_correlation": -0.2, "spread": 0.0}, {"separation": 0.9, "spread": 0.2}
    off = dict.fromkeys(["separation", "retained", "agreement", "spread"], 0)
    assert Freeze(**off).reason(forgetful, first) is None
    assert words in Freeze(**{**off, part: getattr(Freeze(), part)}).reason(forgetful, first)


def test_scores_of_a_scorer_that_forgets_prompts_freeze_and_earlier_ones_do_not():
    rng, wrong = np.random.default_rng(0), np.random.default_rng(1).normal(1.0, 0.05, 256)
    unseen, first = np.ones(300, bool), rng.normal(0.8, 0.15, 300)
    healthy = health(first + rng.normal(0, 0.03, 300), first, wrong, unseen)
    forgetful = health(rng.normal(1.0, 0.05, 300), first, wrong, unseen)
    assert Freeze().reason(healthy, health(first, None, wrong, unseen)) is None
    assert "with a wrong prompt in" in Freeze().reason(forgetful, healthy)
