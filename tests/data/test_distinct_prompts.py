"""Ends of prompts as arrays, against the same questions asked of whole prompts one by one."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ifd_trainer.data.distinct_prompts import Prompts

prompts_of = st.lists(st.lists(st.integers(0, 3), max_size=9), max_size=12)
shares = st.sampled_from([0.6, 0.75, 0.9, 1.0])


def suffix_one_by_one(prompts, share):
    """The longest suffix that a share of the distinct prompts has, by a loop over whole prompts."""
    matching = list({tuple(prompt) for prompt in prompts})
    needed, suffix = share * len(matching), []
    while len(matching) > 1:
        tokens = Counter(prompt[-1 - len(suffix)] for prompt in matching if len(prompt) > len(suffix))
        token, count = tokens.most_common(1)[0] if tokens else (None, 0)
        if count < max(needed, 2):
            break
        matching = [p for p in matching if len(p) > len(suffix) and p[-1 - len(suffix)] == token]
        suffix.append(token)
    return suffix[::-1]


@pytest.mark.parametrize("window", [1, 2, 32])
@given(prompts=prompts_of, share=shares)
def test_the_shared_suffix_is_that_of_whole_prompts(window, prompts, share):
    assert Prompts.of(prompts, window).shared_suffix(share) == suffix_one_by_one(prompts, share)


@pytest.mark.parametrize("window", [1, 2, 32])
@given(
    prompts=prompts_of.filter(any),
    parts=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=12), max_size=4),
    token=st.integers(0, 3),
)
def test_shares_are_those_of_whole_prompts(window, prompts, parts, token):
    distinct = {tuple(prompt) for prompt in prompts}
    found = Prompts.of(prompts, window)
    ending = sum(any(prompt[-len(part) :] == tuple(part) for part in parts) for prompt in distinct)
    assert found.share_ending_with(parts) == ending / len(distinct)
    assert found.all_begin_with(token) == all(prompt[:1] == (token,) for prompt in distinct)
    assert len(found) == len(distinct)


def test_tails_grow_when_the_suffix_does_and_no_further_than_the_longest_prompt():
    ends = [*range(100, 140)]
    prompts = Prompts.of([[i, *ends] for i in range(5)], window=4)
    asked, wider = [], prompts.wider
    prompts.wider = lambda width: (asked.append(width), wider(width))[1]
    assert prompts.shared_suffix() == ends
    assert asked == [16, 41]
    assert prompts.shared_suffix() == ends
    assert asked == [16, 41]


def test_a_few_merged_headers_are_forgiven():
    prompts = Prompts.of([[i, 8, 9] for i in range(19)] + [[99, 8]])
    assert prompts.shared_suffix() == [8, 9]
    assert prompts.shared_suffix(share=1.0) == []


def test_prompts_are_counted_once():
    assert Prompts.of([[1, 9]] * 50 + [[2, 9], [3, 9], [4, 8]]).shared_suffix(share=0.75) == [9]
    assert Prompts.of([[1, 9]] * 50 + [[2, 7], [3, 8], [4, 8]]).shared_suffix(share=0.75) == []


@pytest.mark.parametrize("prompts", [[], [[1, 2]], [[1, 2], [1, 2]], [[], []], [[1, 2], [3, 4]]])
def test_prompts_that_say_nothing_about_a_header(prompts):
    assert Prompts.of(prompts).shared_suffix() == []
