"""Policies and schedules as plain data: what is kept of them says all of them, and tells two of them apart."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ifd_trainer import Anneal, Brief, Cherry, Constant, Curriculum, Diverse, PerEpoch
from ifd_trainer.method.plain_data import as_text, from_repr, same, to_data, without_reprs

keeps = st.one_of(st.integers(1, 10**6), st.floats(0.001, 1))
limits = st.floats(0.01, allow_infinity=True, allow_nan=False)
schedules = st.one_of(
    st.builds(Constant, keeps),
    st.builds(PerEpoch, st.lists(keeps, min_size=1, max_size=4).map(tuple)),
    st.builds(Curriculum, keeps, st.integers(1, 5), st.sampled_from(["easy_to_hard", "hard_to_easy"])),
    st.builds(Anneal, keeps, st.floats(0.01, 1)),
)
things = st.one_of(
    schedules,
    st.builds(Anneal, schedules),
    st.builds(Cherry, limits, st.sampled_from(["ifd", "ifd_ppl"])),
    st.builds(Diverse, keeps, limits, on_shortfall=st.sampled_from(["repeat", "relax", "error"])),
    st.builds(Brief, st.sampled_from(["kmeans", "random"]), st.integers(1, 200)),
)


@given(things, things)
def test_data_tells_two_things_apart_exactly_where_they_differ(one, other):
    stored = json.loads(json.dumps(to_data(one), allow_nan=False))  # JSON of its own, not Python's
    assert same(stored, one)
    assert same(stored, other) == (one == other)


@given(things)
def test_the_repr_of_earlier_releases_is_read_as_the_same_data(thing):
    assert from_repr(repr(thing)) == to_data(thing)
    assert as_text(to_data(thing)) == repr(thing)
    assert without_reprs({"policy": repr(thing), "seed": 3}) == {"policy": to_data(thing), "seed": 3}
    assert without_reprs({"policy": to_data(thing), "warmup": "None"}) == {"policy": to_data(thing), "warmup": None}


@given(things, st.data())
def test_a_field_that_an_earlier_release_did_not_know_counts_as_its_default(thing, data):
    known = [field for field in dataclasses.fields(thing) if field.default is not dataclasses.MISSING]
    gone = data.draw(st.sampled_from([field.name for field in known])) if known else None
    if gone is None:
        assert isinstance(thing, (Constant, PerEpoch))  # of which every field is given
        return
    stored = {name: value for name, value in to_data(thing).items() if name != gone}
    default = {field.name: field.default for field in known}[gone]
    assert same(stored, thing) == (getattr(thing, gone) == default)


def test_a_field_that_this_release_does_not_know_is_a_difference():
    assert not same(to_data(Cherry()) | {"band": [0.2, 0.8]}, Cherry())
    assert not same(to_data(Constant(0.1)) | {"type": "PerEpoch"}, Constant(0.1))
    assert not same(None, Brief())
    assert not same(to_data(Brief()), None)


@dataclasses.dataclass(frozen=True)
class Own:
    keep: int = 3


class Plain:
    def __init__(self, keep):
        self.keep, self.model, self.shares = keep, object(), np.float32(0.5)


def test_a_users_own_objects_are_known_by_type_and_plain_attributes():
    assert to_data(Own()) == {"type": f"{__name__}.Own", "keep": 3}
    assert same({"type": "__main__.Own", "keep": 3}, Own())  # the module's name depends on how the script is started
    assert to_data(Plain(2)) == {"type": f"{__name__}.Plain", "keep": 2, "shares": 0.5}
    assert same(to_data(Plain(2)), Plain(2))
    assert not same(to_data(Plain(2)), Plain(3))
    assert to_data(to_data) == {"type": "to_data"}
    assert to_data(len) == {"type": "builtins.len"}


@pytest.mark.parametrize("text", ["<function f at 0x7f>", "Cherry", "Cherry(", "", "f(1)(2)", "Cherry(x=y)"])
def test_a_text_that_is_no_repr_stays_what_it_is(text):
    assert from_repr(text) == text
