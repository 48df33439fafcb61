"""The stream of a batch against what it stands for: each segment's own tokens at its own positions."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ifd_trainer.scoring.prefix_stream import SPAN_COST, build_stream, stream_batches

# Few different tokens and some long runs, so that segments share beginnings of every length.
SEGMENTS = st.lists(
    st.tuples(
        st.sampled_from([(), (1,) * 3, (1,) * 20, (2, 1) * 10]), st.lists(st.integers(1, 3), min_size=1, max_size=9)
    ),
    min_size=1,
    max_size=12,
).map(lambda parts: [[*start, *rest] for start, rest in parts])


@given(SEGMENTS)
def test_each_segment_is_found_in_the_stream_at_its_own_positions(segments):
    stream = build_stream(segments)
    for segment, places in zip(segments, stream.token_indices, strict=True):
        assert stream.input_ids[places].tolist() == segment
        assert stream.position_ids[places].tolist() == list(range(len(segment)))


@given(SEGMENTS)
def test_spans_partition_the_stream_and_see_exactly_the_tokens_before_them(segments):
    stream = build_stream(segments)
    assert [i for span in stream.spans for i in range(span.start, span.end)] == list(range(len(stream.input_ids)))
    before = {i: span for span in stream.spans for i in range(span.start, span.end)}
    for places in stream.token_indices:
        for depth, place in enumerate(places.tolist()):
            span = before[place]
            seen = [*span.prefix.tolist(), *range(span.start, place)]
            assert seen == places[:depth].tolist()


@given(SEGMENTS)
def test_a_stream_is_never_longer_than_its_segments(segments):
    assert len(build_stream(segments).input_ids) <= sum(map(len, segments))


def test_a_shared_beginning_is_computed_once_where_it_pays():
    long, short = list(range(SPAN_COST)), list(range(SPAN_COST - 1))
    assert len(build_stream([[*long, 100], [*long, 200]]).input_ids) == SPAN_COST + 2
    assert len(build_stream([[*short, 100], [*short, 200]]).input_ids) == 2 * SPAN_COST
    assert len(build_stream([[*short, 100]] * 5).input_ids) == SPAN_COST  # equal segments are one


def test_no_segments_make_an_empty_stream():
    assert build_stream([]).spans == []


@given(SEGMENTS, st.integers(1, 40), st.integers(1, 30), st.one_of(st.none(), st.integers(1, 80)))
def test_batches_are_a_partition_within_all_budgets(segments, budget, scored_budget, seen_budget):
    scored = [1 + len(segment) % 3 for segment in segments]
    batches = stream_batches(segments, budget, scored, scored_budget, seen_budget)
    assert sorted(i for batch in batches for i in batch.tolist()) == list(range(len(segments)))
    for batch in batches:
        if len(batch) > 1:
            assert sum(scored[i] for i in batch) <= scored_budget
            assert seen_budget is None or sum(len(segments[i]) for i in batch) <= seen_budget
            distinct = {tuple(segments[i][: end + 1]) for i in batch for end in range(len(segments[i]))}
            assert len(distinct) <= budget  # a prefix tree has one node for each distinct prefix
