"""The measured token budget and the memory of a large vocabulary, on a GPU; see `test_in_loop.py` for how to run it."""

from __future__ import annotations

import logging
import os

import numpy as np
import pytest
import torch
from conftest import DEVICE, reference_nll
from transformers import LlamaConfig, LlamaForCausalLM

from ifd_trainer.data.encoding import Segment
from ifd_trainer.scoring.losses import answer_nll

pytestmark = pytest.mark.skipif("IFD_TEST_DEVICE" not in os.environ, reason="set IFD_TEST_DEVICE=cuda")
needs_cuda = pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")


def model_of(vocabulary: int, hidden: int, intermediate: int, layers: int = 4) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 128 or 4,
        num_key_value_heads=4,
        initializer_range=0.1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def segments_of(count: int, vocabulary: int, longest: int = 300) -> list[Segment]:
    rng = np.random.default_rng(0)
    return [Segment(rng.integers(4, vocabulary, rng.integers(20, longest)).tolist(), 10) for _ in range(count)]


def test_scores_with_the_budget_of_the_device_are_those_of_single_tokens():
    model, segments = model_of(1000, 64, 192), segments_of(600, 1000)
    expected = [reference_nll(model, segment.ids, segment.start) for segment in segments[:10]]
    found = answer_nll(model.to(DEVICE), segments)
    np.testing.assert_allclose(found[:10], expected, rtol=1e-4)


@needs_cuda
def test_the_measured_budget_fits_and_is_logged(caplog):
    caplog.set_level(logging.INFO, logger="ifd_trainer")
    answer_nll(model_of(32_000, 512, 1536).to(DEVICE), segments_of(1000, 32_000))
    (message,) = [record.message for record in caplog.records]
    assert message.startswith("Token budget on cuda")


@needs_cuda
def test_a_large_vocabulary_and_wide_layers_take_less_than_four_gigabytes():
    """The widths of a 7B model."""
    model = model_of(152_000, 3584, 18_944, layers=2).to(DEVICE, torch.bfloat16)
    segments = segments_of(2000, 152_000)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    answer_nll(model, segments)
    assert torch.cuda.max_memory_allocated() - before < 4e9
