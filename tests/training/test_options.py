"""What the callback is told: groups and the names of their fields say the same, and contradictions are refused."""

from __future__ import annotations

import pytest
from tiny_runs import sft_trainer

from ifd_trainer import (
    Anneal,
    Brief,
    CalibratedLimit,
    Cherry,
    Curriculum,
    Diverse,
    Guard,
    IFDSelectionCallback,
    RandomRows,
)
from ifd_trainer.errors import UserError
from ifd_trainer.method.schedule import Constant, Timing
from ifd_trainer.recipe.run import selection_of
from ifd_trainer.recipe.selection import SelectionConfig
from ifd_trainer.training.options import Scoring, reads_scores

BRIEF = Brief("random", clusters=2, per_cluster=2)


def said(callback):
    return callback.policy, callback.schedule, callback.timing, callback.scoring


@pytest.mark.parametrize(
    ("by_name", "in_groups"),
    [
        ({}, {}),
        ({"max_ifd": 1.5, "score": "ifd_ppl"}, {"policy": Cherry(1.5, "ifd_ppl")}),
        ({"on_shortfall": "relax", "keep": 3}, {"policy": Cherry(on_shortfall="relax"), "schedule": Constant(3)}),
        ({"diverse": 0.2, "max_ifd": 2.0}, {"policy": Diverse(0.2, 2.0)}),
        ({"diverse": None, "score": "ifd"}, {"policy": Cherry()}),
        ({"every": 2, "freeze_after": 3}, {"timing": Timing(every=2, freeze_after=3)}),
        ({"warmup_epochs": 1, "warmup": BRIEF, "start_anew": True}, {"timing": Timing(1, 1, None, BRIEF, True)}),
        ({"min_answer_tokens": 4, "header": "A:"}, {"scoring": Scoring("A:", 4)}),
        ({"token_budget": 99, "warn_share": 1.0, "embedder": "e"}, {"scoring": Scoring(None, 1, 99, "e", 1.0)}),
    ],
    ids=lambda options: "-".join(options),
)
def test_fields_by_name_are_the_groups(tmp_path, by_name, in_groups):
    one, other = (IFDSelectionCallback(sft_trainer(tmp_path, 8), **options) for options in (by_name, in_groups))
    assert said(one) == said(other)


@pytest.mark.parametrize(
    ("change", "read"),
    [
        ({}, False),
        ({"policy": Cherry()}, True),
        ({"policy": lambda columns, budget, **_: None}, True),
        ({"schedule": Curriculum(4)}, True),
        ({"guard": Guard()}, True),
        ({"scorer": "gpt2"}, True),
        ({"scorer": "columns"}, True),
        ({"order": "ascending"}, True),
    ],
)
def test_scores_are_computed_where_something_reads_them(change, read):
    plain = {"policy": RandomRows(), "schedule": Constant(4), "guard": None, "scorer": None, "order": "shuffle"}
    assert reads_scores(**{**plain, **change}) is read


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"policy": Cherry(), "score": "ifd"}, "score is a part of `policy`, which was given too"),
        ({"policy": Cherry(), "max_ifd": 1.5}, "max_ifd is a part of `policy`"),
        ({"policy": Diverse(), "diverse": 0.1, "on_shortfall": "relax"}, "on_shortfall, diverse is a part of `policy`"),
        ({"timing": Timing(), "every": 2}, "every is a part of `timing`"),
        ({"scoring": Scoring(), "header": "A:"}, "header is a part of `scoring`"),
        ({"policy": "cherry"}, r"policy must be .* callable of your own \(no class, but one of it\), got 'cherry'"),
        ({"policy": Cherry}, "policy must be .* got <class "),
        ({"timing": 2}, "timing must be a Timing, got 2"),
        ({"scoring": {}}, "scoring must be a Scoring, got {}"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_contradiction_is_refused(tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        IFDSelectionCallback(sft_trainer(tmp_path, 4), **options)


@pytest.mark.parametrize(("name", "hint"), [("evry", "; did you mean 'every'"), ("max_idf", "'max_ifd'"), ("zzz", "$")])
def test_an_unknown_name_is_refused_as_python_does_with_the_nearest_one(tmp_path, name, hint):
    with pytest.raises(TypeError, match=rf"unexpected keyword argument '{name}'.*{hint}"):
        IFDSelectionCallback(sft_trainer(tmp_path, 4), **{name: 1})


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, (Cherry(), Constant(0.1), Timing())),
        ({"keep": ["4"], "curriculum": "easy_to_hard", "tiers": 2}, (Cherry(), Curriculum(4, 2), Timing())),
        ({"diverse": "0.3", "anneal_share": 0.5}, (Diverse(0.3), Anneal(0.1, 0.5), Timing())),
        ({"every_steps": 9, "freeze_after": 2}, (Cherry(), Constant(0.1), Timing(freeze_after=2, every_steps=9))),
        ({"every_steps": 0, "scorer": "gpt2"}, (Cherry(), Constant(0.1), Timing())),
        (
            {"rescore": "candidates", "rescore_budget": 0.3},
            (Cherry(), Constant(0.1), Timing(rescore="candidates", rescore_budget=0.3)),
        ),
        ({"method": "cherry"}, (Cherry(), Constant(0.1), Timing(1, 1, 0, Brief(), True))),
        ({"method": "cherry", "brief": "none", "freeze_after": 2}, (Cherry(), Constant(0.1), Timing(1, 0, 2))),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_recipe_says_the_same_groups(keys, expected):
    config = SelectionConfig(**keys)
    assert (config.chosen_policy(), config.schedule(), config.timing()) == expected
    assert config.scoring() == Scoring()
    assert config.scoring(embedder="e").embedder == "e"


def test_what_a_recipe_cannot_score_anew_is_told_at_once():
    assert SelectionConfig(rescore_budget=0.3).idle_keys() == {"rescore: candidates": ["rescore_budget"]}
    for keys, words in (
        ({"scorer": "gpt2"}, "the scores of scorer='gpt2' do not change with training"),
        ({"policy": "random"}, "the policy is a RandomRows"),
        ({"method": "cherry"}, "With freeze_after=0 rows are scored once"),
        ({"warmup_epochs": 2, "freeze_after": 3}, "With freeze_after=3 rows are scored once"),
    ):
        with pytest.raises(UserError, match=words):
            SelectionConfig(rescore="candidates", **keys)


def test_the_cherry_method_is_a_timing(tmp_path):
    trainer = sft_trainer(tmp_path, 8)
    trainer.add_callback(IFDSelectionCallback.cherry(trainer, keep=2, brief=BRIEF, every=2, score="ifd_ppl"))
    callback = selection_of(trainer)
    assert callback.timing == Timing(2, 1, 0, BRIEF, True)
    assert (callback.policy, callback.schedule) == (Cherry(score="ifd_ppl"), Constant(2))
    assert IFDSelectionCallback.cherry(sft_trainer(tmp_path, 8), scorer="columns").timing == Timing(freeze_after=0)


def test_a_recipe_whose_scores_stay_has_no_parts():
    with pytest.raises(ValueError, match="every_steps=5 chooses the rows of an epoch part by part, and the scores of"):
        SelectionConfig(every_steps=5, scorer="gpt2")


def test_a_recipe_says_how_a_limit_is_measured():
    assert SelectionConfig(max_ifd="calibrated").chosen_policy() == Cherry(CalibratedLimit())
    assert SelectionConfig(max_ifd="calibrated", alpha=0.001).chosen_policy() == Cherry(CalibratedLimit(0.001, 999))
    assert SelectionConfig(max_ifd="calibrated", diverse="0.3").chosen_policy() == Diverse(0.3, CalibratedLimit())


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"max_ifd": "high"}, "max_ifd: 'high' is no number, and not calibrated"),
        ({"max_ifd": None}, "max_ifd: None is no number, and not calibrated"),
        ({"max_ifd": "calibrated", "alpha": 7.0}, "alpha must be a share in"),
        ({"max_ifd": "calibrated", "scorer": "gpt2"}, "scorer='gpt2' scores the rows before the run, so nothing"),
    ],
)
def test_a_limit_that_cannot_be_is_refused_before_anything_is_loaded(keys, words):
    with pytest.raises(ValueError, match=words):
        SelectionConfig(**keys)
