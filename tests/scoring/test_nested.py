"""Segments that are the beginning of others are run inside them, in one forward, and keep their own losses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import ROUNDING, build_model, reference_nll
from hypothesis import given
from hypothesis import strategies as st

from ifd_trainer.data.encoding import Segment
from ifd_trainer.scoring.losses import answer_nll, nll_with_tails
from ifd_trainer.scoring.nested import Families

CHAT = np.random.default_rng(3).integers(3, 400, 90).tolist()
TURNS = [
    Segment(CHAT[:end], end - size, tail) for end, size, tail in ((20, 6, 1), (41, 9, 0), (66, 12, 2), (90, 20, 1))
]
OTHER = Segment([*CHAT[:30], 7, 8, 9, 10], 31)  # has a beginning in common with them, and is in no family of theirs


@pytest.fixture(scope="module")
def model():
    return build_model(400)


@pytest.fixture
def tokens_run(model):
    """How many tokens each forward was given."""
    counts = []
    hook = model.register_forward_pre_hook(
        lambda module, args, inputs: counts.append((args[0] if args else inputs["input_ids"]).numel()), with_kwargs=True
    )
    yield counts
    hook.remove()


@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=5), min_size=1, max_size=12))
def test_the_longest_segment_of_a_family_begins_with_all_of_it(segments):
    families = Families.of(segments)
    longest = [segments[i] for i in families.longest]
    for ids, family in zip(segments, families.family, strict=True):
        assert longest[family][: len(ids)] == ids
    for i, ids in enumerate(longest):
        assert not any(other[: len(ids)] == ids for j, other in enumerate(longest) if i != j)
    assert families.sums([len(ids) for ids in segments]) == [
        sum(len(ids) for ids, family in zip(segments, families.family, strict=True) if family == f)
        for f in range(len(longest))
    ]
    assert sorted(families.members(np.arange(len(longest))).tolist()) == list(range(len(segments)))


@pytest.mark.parametrize("engine", ["stream", "padded"])
@pytest.mark.parametrize("budget", [1, 50, 10**6])
def test_turns_of_a_conversation_are_run_once_and_scored_each(model, tokens_run, engine, budget):
    segments = [TURNS[2], OTHER, TURNS[0], TURNS[3], TURNS[1], TURNS[1]]
    answer_nll(model, segments, engine=engine)  # what is found out about a model once is found out here
    tokens_run.clear()
    nll, tails = nll_with_tails(model, segments, engine=engine, token_budget=budget)
    # One row of 90 tokens and one of 34, of which 30 are the same.
    apart, together = [34, 90], {"padded": [2 * 90], "stream": [90 + 4]}[engine]
    assert sorted(tokens_run) == (together if budget == 10**6 else apart)
    expected = [reference_nll(model, s.ids[: len(s.ids) - s.tail], s.start) for s in segments]
    np.testing.assert_allclose(nll, expected, rtol=ROUNDING)
    ends = [s.tail and s.tail * reference_nll(model, s.ids, len(s.ids) - s.tail) for s in segments]
    np.testing.assert_allclose(np.nan_to_num(tails), ends, rtol=ROUNDING)


def test_an_adapter_that_reads_rows_as_a_whole_runs_each_by_itself():
    """It begins at the last tokens that invoke it: a beginning of a row has other ones."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], init_lora_weights=False, alora_invocation_tokens=[7, 8]
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = peft.get_peft_model(build_model(400), config)
    ids = [5, 7, 8, 9, 10, 11, 12, 7, 8, 20, 21]
    segments = [Segment(ids[:7], 4), Segment(ids, 9)]
    found = answer_nll(model, segments)
    np.testing.assert_allclose(found, [reference_nll(model, s.ids, s.start) for s in segments], rtol=ROUNDING)
