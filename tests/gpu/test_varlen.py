"""The variable-length kernel on a GPU; see `test_in_loop.py` for how to run it."""

from __future__ import annotations

import os

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import DEVICE, build_model, reference_nll

from ifd_trainer.data.encoding import Segment
from ifd_trainer.method.scoring_health import rank_correlation
from ifd_trainer.scoring.engine import streams
from ifd_trainer.scoring.losses import answer_nll
from ifd_trainer.scoring.span_attention import varlen_kernel

pytestmark = pytest.mark.skipif("IFD_TEST_DEVICE" not in os.environ, reason="set IFD_TEST_DEVICE=cuda")
needs_cuda = pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")


def segments_of(count: int) -> list[Segment]:
    """Some share their first 30 tokens."""
    rng = np.random.default_rng(0)
    head = rng.integers(4, 400, 30).tolist()
    tails = [rng.integers(4, 400, rng.integers(20, 60)).tolist() for _ in range(count)]
    return [Segment((head if i % 2 else []) + tail, 5 + i % 2 * 30) for i, tail in enumerate(tails)]


@needs_cuda
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_a_model_in_bfloat16_streams_and_its_scores_are_those_of_single_tokens(key_heads):
    assert varlen_kernel(torch.device(DEVICE)) is not None, "neither PyTorch nor flash-attn has the kernel"
    model = build_model(400, hidden_size=128, num_key_value_heads=key_heads, initializer_range=0.1)
    segments = segments_of(40)
    expected = np.array([reference_nll(model, segment.ids, segment.start) for segment in segments])
    model.to(DEVICE, torch.bfloat16)
    assert streams(model)
    for engine in ("stream", "padded"):
        found = answer_nll(model, segments, engine=engine)
        np.testing.assert_allclose(found, expected, rtol=0.05)
        assert rank_correlation(pd.Series(found), pd.Series(expected)) > 0.99


def test_float32_is_padded():
    model = build_model(400).to(DEVICE)
    assert streams(model) is (DEVICE == "cpu")
