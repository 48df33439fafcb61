"""A policy of a user's own, written with public names alone: what it keeps is trained on, and its reasons are kept."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from tiny_runs import select, sft_trainer, train

from ifd_trainer import Selection, write_report


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
    ],
)
def test_what_is_no_selection_of_the_budget_is_refused(tmp_path, policy, words):
    trainer = sft_trainer(tmp_path, 24)
    select(trainer, keep=4, policy=policy)
    with pytest.raises(ValueError, match=words):
        trainer.train()
