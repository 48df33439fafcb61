"""Scoring on a GPU, without a trainer; see `test_in_loop.py` for how to run it."""

from __future__ import annotations

import logging
import os

import numpy as np
import pytest
import torch
from conftest import DEVICE, build_model, reference_nll
from scipy.stats import spearmanr
from transformers import LlamaConfig, LlamaForCausalLM

from ifd_trainer.data.encoding import Segment
from ifd_trainer.scoring.engine import streams
from ifd_trainer.scoring.losses import answer_nll, position_weighted_embeddings, prompt_features
from ifd_trainer.scoring.transfer import HostCopy

pytestmark = pytest.mark.skipif("IFD_TEST_DEVICE" not in os.environ, reason="set IFD_TEST_DEVICE=cuda")
needs_cuda = pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")


def some_segments(count: int, vocabulary: int = 400, longest: int = 60) -> list[Segment]:
    """Segments of unequal lengths, every second one with a beginning that others share."""
    rng = np.random.default_rng(0)
    head = rng.integers(4, vocabulary, 12).tolist()
    tails = [rng.integers(4, vocabulary, rng.integers(3, longest)).tolist() for _ in range(count)]
    return [Segment((head if i % 2 else []) + tail, 1 + i % 2 * 12) for i, tail in enumerate(tails)]


def test_scores_are_those_of_single_tokens_on_the_cpu():
    model, segments = build_model(400), some_segments(40)
    expected = [reference_nll(model, segment.ids, segment.start) for segment in segments]
    found = answer_nll(model.to(DEVICE), segments, token_budget=512)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_bfloat16_keeps_the_ranking():
    config = LlamaConfig(vocab_size=8000, hidden_size=256, intermediate_size=512, num_hidden_layers=4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).to(DEVICE)
    segments = some_segments(300, 8000, 200)
    whole = answer_nll(model, segments)
    rounded = answer_nll(model.bfloat16(), segments)
    np.testing.assert_allclose(rounded, whole, rtol=0.02)
    assert spearmanr(whole, rounded).statistic >= 0.999


@needs_cuda
def test_random_state_of_the_gpu_is_as_before_even_if_the_model_draws():
    model = build_model(400).to(DEVICE)
    model.lm_head.register_forward_hook(lambda module, inputs, output: output + 0 * torch.rand(1, device=DEVICE))
    before = torch.cuda.get_rng_state()
    answer_nll(model, some_segments(4))
    assert torch.equal(torch.cuda.get_rng_state(), before)


@needs_cuda
def test_real_out_of_memory_halves_the_batches(caplog):
    caplog.set_level(logging.WARNING)
    config = LlamaConfig(vocab_size=8000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=2)
    model = LlamaForCausalLM(config).to(DEVICE)
    segments = some_segments(4000, 8000, 200)
    expected = answer_nll(model, segments, token_budget=4096)
    torch.cuda.empty_cache()
    used, total = torch.cuda.memory_allocated(), torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((used + 2**30) / total)
    try:
        found = answer_nll(model, segments, token_budget=10**6)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert ["memory" in record.message for record in caplog.records] == [True]


@needs_cuda
@pytest.mark.parametrize("engine", ["stream", "padded"])
def test_nothing_in_a_forward_waits_for_the_gpu(engine):
    """From the first layer on: before it, where batches are padded, transformers looks for packed rows."""
    model = build_model(400, hidden_size=128).to(DEVICE, torch.bfloat16)
    segments = some_segments(40)
    answer_nll(model, segments, engine=engine)  # what is tried out once may wait
    seen = []

    def forbid(*_):
        seen.append(torch.cuda.get_sync_debug_mode())
        torch.cuda.set_sync_debug_mode("error")

    model.model.layers[0].register_forward_pre_hook(forbid)
    model.register_forward_hook(lambda *_: torch.cuda.set_sync_debug_mode("default"))
    try:
        answer_nll(model, segments, engine=engine, token_budget=500)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(seen) > 2
    assert set(seen) == {0}


@needs_cuda
def test_a_result_is_there_before_what_was_launched_after_it_has_ended():
    fetched, later = HostCopy(torch.ones(3, device=DEVICE)), torch.cuda.Event()
    torch.cuda._sleep(2 * 10**9)  # cycles: a second or so
    later.record()
    assert fetched.array().tolist() == [1.0, 1.0, 1.0]
    assert not later.query()


@needs_cuda
def test_features_of_prompts_are_those_of_the_cpu():
    model = build_model(400)
    prompts = [segment.ids for segment in some_segments(20)]
    assert streams(model)
    embeddings, perplexity = prompt_features(model, prompts)
    there = prompt_features(model.to(DEVICE), prompts, token_budget=300)
    np.testing.assert_allclose(there[0], embeddings, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(there[1], perplexity, rtol=1e-3)
    weighted = position_weighted_embeddings(model, prompts, token_budget=300)
    np.testing.assert_allclose(weighted, position_weighted_embeddings(model.cpu(), prompts), rtol=1e-3, atol=1e-4)


@needs_cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_spread_over_gpus():
    model, segments = build_model(400, hidden_size=128), some_segments(40)
    expected = np.array([reference_nll(model, segment.ids, segment.start) for segment in segments])
    model.to(DEVICE, torch.bfloat16)
    for part in (model.model.layers[-1], model.model.norm, model.lm_head):
        part.to("cuda:1")
        part.register_forward_pre_hook(
            lambda module, args, kwargs: (
                tuple(arg.to("cuda:1") for arg in args),
                {name: _moved(value) for name, value in kwargs.items()},
            ),
            with_kwargs=True,
        )
    assert streams(model)
    np.testing.assert_allclose(answer_nll(model, segments), expected, rtol=0.05)


def _moved(value):
    if isinstance(value, tuple):
        return tuple(_moved(part) for part in value)
    return value.to("cuda:1") if isinstance(value, torch.Tensor) else value
