"""A policy of a user's own, written with public names alone: what it keeps is trained on, and its reasons are kept."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
from tiny_runs import select, sft_trainer, train

from ifd_trainer import CalibratedLimit, Cherry, Selection, write_report


@dataclass(frozen=True)
class LongestAnswers:
    """The rows with the longest answers; ties by id."""

    at_least: int = 1

    def __call__(self, columns, budget, *, ids=None, rng=None):
        tokens = columns["answer_tokens"]
        order = np.lexsort((ids, -tokens))
        return Selection.without_scores(order[:budget], len(tokens), reason="shorter")


def at_random(columns, budget, *, ids, rng):
    rows = len(columns["ifd"])
    return Selection.without_scores(rng.choice(rows, size=budget, replace=False), rows, reason="not_drawn")


def given(kept, rows=24):
    """A policy that returns these positions, whatever it is asked."""
    selection = Selection(kept, np.full(rows, "kept", dtype=object), 0.0, rows, 0)
    return lambda columns, budget, **_: selection


def test_what_it_keeps_is_trained_on_and_the_others_have_its_reason(tmp_path):
    trainer = sft_trainer(tmp_path, 24)
    callback = select(trainer, keep=[4, 5, 6], policy=LongestAnswers())
    seen = train(trainer)
    lengths = {row["row_id"]: sum(label != -100 for label in row["labels"]) for row in trainer.train_dataset}
    longest = sorted(lengths, key=lambda row: (-lengths[row], row))
    for epoch, rows in enumerate(seen.epochs()):
        assert sorted(rows) == sorted(longest[: 4 + epoch])
        assert callback.history.epochs[epoch]["reasons"] == {"kept": 4 + epoch, "shorter": 20 - epoch}
    page = write_report(callback.history).read_text(encoding="utf-8")
    assert "LongestAnswers(at_least=1)" in page
    assert "shorter" in page


def test_its_generator_is_seeded_anew_in_each_epoch(tmp_path):
    runs = []
    for seed in (1, 1, 2):
        trainer = sft_trainer(tmp_path, 24)
        select(trainer, keep=6, policy=at_random, seed=seed)
        runs.append([sorted(rows) for rows in train(trainer).epochs()])
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]
    assert len(set(map(tuple, runs[0]))) == 3


def test_it_fills_packed_rows_too(tmp_path):
    trainer = sft_trainer(tmp_path, 24, num_train_epochs=1, packing=True, max_length=64)
    callback = select(trainer, keep=2, policy=LongestAnswers())
    trainer.train()
    rows = callback.history.rows(0)
    kept = rows[rows["times"] > 0]
    assert callback.history.epochs[0]["packed_rows"] == 2
    assert kept["answer_tokens"].min() >= rows.loc[rows["times"] == 0, "answer_tokens"].max()


def test_a_run_with_another_policy_is_not_resumed(tmp_path):
    trainer = sft_trainer(tmp_path, 24, save_strategy="steps", save_steps=2)
    select(trainer, keep=4, policy=LongestAnswers())
    train(trainer)
    again = sft_trainer(tmp_path, 24, save_strategy="steps", save_steps=2)
    select(again, keep=4, policy=LongestAnswers(at_least=2))
    with pytest.raises(
        ValueError, match=r"policy: .*LongestAnswers\(at_least=1\) in the checkpoint, .*at_least=2\) now"
    ):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        (lambda columns, budget, **_: [0, 1], r"A policy returns an ifd_trainer\.Selection, but .* returned \[0, 1\]"),
        (
            lambda columns, budget, **_: Selection.without_scores(np.arange(2), 24, reason="no"),
            "The budget is 4 rows, but .* kept 2",
        ),
        (given(np.array([True, False] * 12)), "are positions, whole numbers from 0 to 23, but .* kept"),
        (given([0, 1, 2, 24]), "are positions, whole numbers from 0 to 23, but"),
        (given([0, 1, 2, -1]), "are positions, whole numbers from 0 to 23, but"),
        (given([0.0, 1.0, 2.0, 3.0]), "are positions, whole numbers from 0 to 23, but"),
        (given([0, 1, 2, 3], rows=23), r"A Selection has a reason for each of 24 rows, but .* gave \(23,\)"),
    ],
)
def test_what_is_no_selection_of_the_budget_is_refused(tmp_path, policy, words):
    trainer = sft_trainer(tmp_path, 24)
    select(trainer, keep=4, policy=policy)
    with pytest.raises(ValueError, match=words):
        trainer.train()


def ranked(columns, budget, *, ids, rng, sign=1):
    order = np.argsort(sign * columns["das"], kind="stable")
    return Selection.without_scores(order[:budget], len(order), reason="other")


class Limited:
    """Cherry with a limit of its own."""

    score, on_shortfall = "ifd", "relax"

    def __init__(self, alpha):
        self.max_ifd = CalibratedLimit(alpha, 24)

    def __call__(self, columns, budget, **options):
        return Cherry(on_shortfall="relax")(columns, budget, **options)


@pytest.mark.parametrize(
    ("then", "now"),
    [
        (partial(ranked, sign=1), partial(ranked, sign=-1)),
        (Limited(0.3), Limited(0.1)),
        (ranked, partial(ranked, sign=1)),
    ],
)
def test_what_a_policy_is_made_of_is_compared_too(tmp_path, then, now):
    for policy in (then, now):
        trainer = sft_trainer(tmp_path, 24, num_train_epochs=1, save_strategy="steps", save_steps=1)
        callback = select(trainer, keep=4, policy=policy)
        if policy is then:
            train(trainer)
            assert (callback.history.epochs[0]["limit"] is None) == (then is not now and not isinstance(then, Limited))
    with pytest.raises(ValueError, match=r"cannot be resumed exactly: (policy|limit): "):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_a_policy_may_name_the_column_that_it_ranks_by(tmp_path, caplog):
    policy = partial(ranked)
    policy.score = "das"
    trainer = sft_trainer(tmp_path, 24, num_train_epochs=1)
    callback = select(trainer, keep=4, policy=policy)
    train(trainer)
    rows = callback.history.rows(0)
    kept = rows.nsmallest(4, "das")
    assert sorted(kept["row_id"]) == sorted(rows.loc[rows["times"] > 0, "row_id"])
    assert callback.history.epochs[0]["mean_kept"] == pytest.approx(kept["das"].mean())
    assert "their prompt does not help" not in caplog.text


@pytest.mark.parametrize(
    ("attributes", "words"),
    [
        ({"score": "quality"}, "score must be one of cas, das, ifd, ifd_ppl, but .* has 'quality'"),
        ({"score": "cas", "max_ifd": "calibrated"}, "A calibrated limit is one of ifd or ifd_ppl, not of cas"),
    ],
)
def test_attributes_that_cannot_be_used_are_told_at_once(tmp_path, attributes, words):
    policy = partial(ranked)
    vars(policy).update(attributes)
    with pytest.raises(ValueError, match=words):
        select(sft_trainer(tmp_path, 4), policy=policy)
