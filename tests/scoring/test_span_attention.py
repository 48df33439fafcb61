"""The kernel's way through a stream, with kernels made up here: what they are given, and what wrong ones lead to."""

from __future__ import annotations

import inspect
import sys
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import ROUNDING, build_model, reference_nll
from hypothesis import given
from hypothesis import strategies as st
from transformers import AttentionInterface

from ifd_trainer.data.encoding import Segment
from ifd_trainer.scoring import span_attention as attention_module
from ifd_trainer.scoring.engine import streams
from ifd_trainer.scoring.losses import answer_nll
from ifd_trainer.scoring.prefix_stream import Span
from ifd_trainer.scoring.span_attention import AttentionPlan, NotExact, attending, varlen_kernel

CPU = torch.device("cpu")


class Kernel:
    """Causal attention of n spans in float64, one query at a time, aligned with the last key or with the first."""

    def __init__(self, aligned: str = "last") -> None:
        self.aligned, self.calls = aligned, []

    def __call__(self, q, k, v, query_ends, key_ends, longest_query, longest_key, scale):
        self.calls.append((q, k, v, query_ends, key_ends, longest_query, longest_key, scale))
        out = torch.empty_like(q)
        for span in range(len(query_ends) - 1):
            queries = range(int(query_ends[span]), int(query_ends[span + 1]))
            first, last = int(key_ends[span]), int(key_ends[span + 1])
            skipped = last - first - len(queries) if self.aligned == "last" else 0
            for i, query in enumerate(queries):
                for head in range(q.shape[1]):
                    key_head = head * k.shape[1] // q.shape[1]
                    seen = slice(first, first + skipped + i + 1)
                    weights = torch.softmax(k[seen, key_head].double() @ q[query, head].double() * scale, 0)
                    out[query, head] = (weights @ v[seen, key_head].double()).to(q.dtype)
        return out


@pytest.fixture
def use(monkeypatch):
    """Gives every device a kernel, for float32 too."""

    def given_kernel(kernel):
        monkeypatch.setattr(attention_module, "varlen_kernel", lambda device: kernel)
        monkeypatch.setattr(attention_module, "HALF", (torch.float32, torch.bfloat16))
        return kernel

    return given_kernel


HEAD = [9, 8, 7, 6, 5, 4, 3, 9, 9, 8]
SEGMENTS = [
    Segment([*HEAD, 5, 6], 10),
    Segment([*HEAD, 6, 6, 7], 4),
    Segment([*HEAD, 6, 6, 7, 11, 12, 13, 14, 15, 16], 12),
    Segment([*HEAD, 6, 6, 7, 11, 12, 13, 14, 15, 16], 11),
    Segment([30, 31], 1),
]
TOKENS = 10 + 2 + 9 + 2  # of the stream: the head once, what follows it in two ways, and the last segment


def test_scores_by_the_kernel_are_those_of_single_tokens(use):
    model, kernel = build_model(400), use(Kernel())
    assert streams(model)
    kernel.calls.clear()
    found = answer_nll(model, SEGMENTS, engine="stream")
    np.testing.assert_allclose(found, [reference_nll(model, s.ids, s.start) for s in SEGMENTS], rtol=ROUNDING)
    layers = model.config.num_hidden_layers
    assert [q.shape[0] for q, *_ in kernel.calls] == [TOKENS] * layers  # one call in each layer


@given(st.lists(st.lists(st.integers(1, 3), min_size=2, max_size=14), min_size=1, max_size=6))
def test_any_segments(segments):
    model, segments = build_model(400), [Segment(ids, 1) for ids in segments]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_module, "varlen_kernel", lambda device: Kernel())
        patch.setattr(attention_module, "HALF", (torch.float32,))
        found = answer_nll(model, segments, engine="stream")
    np.testing.assert_allclose(found, [reference_nll(model, s.ids, 1) for s in segments], rtol=ROUNDING)


def test_what_the_kernel_is_given(use):
    model, kernel = build_model(400).bfloat16(), use(Kernel())
    answer_nll(model, [Segment([*HEAD, 5, 6], 10), Segment([*HEAD, 6, 6, 7], 10)], engine="stream")
    q, k, v, query_ends, key_ends, longest_query, longest_key, scale = kernel.calls[-1]
    config = model.config
    size = config.hidden_size // config.num_attention_heads
    assert q.shape == (10 + 2 + 3, config.num_attention_heads, size)
    assert k.shape == v.shape == (10 + 12 + 13, config.num_key_value_heads, size)
    assert {q.dtype, k.dtype, v.dtype} == {torch.bfloat16}
    assert {query_ends.dtype, key_ends.dtype} == {torch.int32}
    assert sorted(np.diff(query_ends)) == [2, 3, 10]
    assert sorted(np.diff(key_ends)) == [10, 12, 13]
    assert (longest_query, longest_key) == (10, 13)
    assert scale == pytest.approx(size**-0.5)


def test_segments_that_share_nothing_gather_no_keys(use):
    kernel = use(Kernel())
    answer_nll(build_model(400), [Segment([4, 5, 6], 1), Segment([7, 5], 1)], engine="stream")
    q, k, _, query_ends, key_ends, *_ = kernel.calls[-1]
    assert q.shape[0] == k.shape[0] == 5
    assert query_ends.tolist() == key_ends.tolist()


def test_each_device_of_a_spread_model_has_its_own_lengths(use):
    use(Kernel())
    spans = [Span(0, 10, np.empty(0, int)), Span(10, 12, np.arange(10))]
    plan = AttentionPlan(spans, CPU)
    keys, query_ends, key_ends, *longest = plan.packed(CPU)
    assert (keys.tolist(), longest) == ([*range(10), *range(12)], [10, 12])
    assert (query_ends.tolist(), key_ends.tolist()) == ([0, 10, 12], [0, 10, 22])
    assert plan.packed(CPU)[0] is keys
    elsewhere = plan.packed(torch.device("meta"))
    assert {part.device.type for part in elsewhere[:3]} == {"meta"}
    assert plan.packed(torch.device("meta")) is elsewhere


def test_under_autocast_the_kernel_gets_half_precision(use, monkeypatch):
    model, kernel = build_model(400), use(Kernel())
    monkeypatch.setattr(attention_module, "HALF", (torch.bfloat16,))
    with torch.autocast("cpu", torch.bfloat16):
        found = answer_nll(model, SEGMENTS, engine="stream")
    assert {x.dtype for call in kernel.calls for x in call[:3]} == {torch.bfloat16}
    np.testing.assert_allclose(found, [reference_nll(model, s.ids, s.start) for s in SEGMENTS], rtol=0.05)


def failing(*args):
    raise RuntimeError("no such kernel")


@pytest.mark.parametrize(
    "kernel", [Kernel("first"), failing, lambda q, *rest: q * torch.nan], ids=["aligned with the first", "none", "nan"]
)
def test_a_kernel_that_gives_other_numbers_is_found_out_and_not_used(use, kernel):
    use(kernel)
    model = build_model(400, initializer_range=0.02)  # whose losses hardly depend on its attention
    assert not streams(model)
    found = answer_nll(model, SEGMENTS)
    np.testing.assert_allclose(found, [reference_nll(model, s.ids, s.start) for s in SEGMENTS], rtol=ROUNDING)


def test_a_device_without_a_kernel_pads(monkeypatch):
    """A call for each span would be slow there: only the check says so, to the choice of an engine."""
    monkeypatch.setattr(attention_module, "varlen_kernel", lambda device: None)
    query = SimpleNamespace(device=torch.device("mps"), dtype=torch.float32, shape=(1, 1, 2, 8))
    spans = [Span(0, 2, np.empty(0, int))]
    wanted = pytest.raises(NotExact, match=r"no variable-length kernel for torch\.float32")
    with attending(build_model(400), AttentionPlan(spans, query.device), check=True), wanted:
        AttentionInterface()["ifd_stream"](None, query, query, query, None)


def test_kernels_of_pytorch(monkeypatch):
    varlen = pytest.importorskip("torch.nn.attention.varlen", reason="this PyTorch has none")
    assert varlen_kernel(CPU) is None

    signature = inspect.signature(varlen.varlen_attn)
    if {"scale", "window_size"} <= set(signature.parameters):  # this release's own, called as it lets itself be called
        own = mock.create_autospec(varlen.varlen_attn)
        monkeypatch.setattr(varlen, "varlen_attn", own)
        varlen_kernel(torch.device("cuda"))("q", "k", "v", "q ends", "k ends", 3, 4, 0.5)
        given = signature.bind(*own.call_args.args, **own.call_args.kwargs).arguments
        assert list(given.values())[:7] == ["q", "k", "v", "q ends", "k ends", 3, 4]
        assert (given["scale"], given["window_size"]) == (0.5, (-1, 0))  # causal, aligned with the last key
        assert given.get("enable_gqa", True) is True

    def varlen_attn_of_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        return query, scale, window_size

    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn_of_2_11)
    given_kernel = varlen_kernel(torch.device("cuda"))
    assert given_kernel("q", "k", "v", "q ends", "k ends", 3, 4, 0.5) == ("q", 0.5, (-1, 0))
    monkeypatch.setattr(varlen, "varlen_attn", lambda query, key, value, is_causal: None)  # an older one
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    assert varlen_kernel(torch.device("cuda")) is None
