"""Scoring and selection on a GPU: what the other tests, on a CPU, cannot see. On a machine with one GPU or more:

    IFD_TEST_DEVICE=cuda python -m pytest tests/gpu

Skipped without the variable; with "cpu" it is the dry run of everything that does not need a GPU.
"""

from __future__ import annotations

import json
import logging
import os
from importlib.util import find_spec
from itertools import chain

import numpy as np
import pytest
import torch
from conftest import build_model, reference_nll
from distributed_run import RESUME_FROM
from scipy.stats import spearmanr
from test_distributed import launch
from training import DEVICE, INF, difference, raw_rows, select, sft_trainer, text_rows, train, weights_of
from transformers import LlamaConfig, LlamaForCausalLM

from ifd_trainer.encoding import Segment
from ifd_trainer.scorer import answer_nll

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


@pytest.mark.parametrize("bf16", [False, True])
def test_a_resumed_run_ends_where_the_uninterrupted_one_does(tmp_path, bf16):
    def run(folder, resume=None):
        model = build_model(400, attention_dropout=0.1)
        trainer = sft_trainer(
            folder, text_rows(raw_rows(24)), model=model, bf16=bf16, save_strategy="steps", save_steps=7
        )
        select(trainer, keep=[12, 9, 14], max_ifd=INF)
        return train(trainer, resume_from_checkpoint=resume), weights_of(trainer.model)

    whole, weights = run(tmp_path / "whole")
    assert [len(epoch) for epoch in whole.epochs()] == [12, 9, 14]
    resumed, again = run(tmp_path / "again", str(tmp_path / "whole" / "checkpoint-7"))
    assert resumed.order() == whole.order()[len(list(chain(*(u.rows for u in whole.updates[:7])))) :]
    assert difference(weights, again) == 0


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "zero3"])
def test_processes_agree_and_resume(tmp_path, kind):
    if kind == "zero3" and not find_spec("deepspeed"):
        pytest.skip("needs deepspeed")
    processes = torch.cuda.device_count() if DEVICE == "cuda" else 2
    code, text = launch(kind, tmp_path, limit=500, processes=processes)
    assert code == 0, text[-8000:]
    found = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(processes)]
    for case in found[0]:
        for key in ("orders", "ifd", "forwards", "global_step", "max_steps", "epoch", "weights", "leftovers"):
            assert all(other[case][key] == found[0][case][key] for other in found), (case, key)
        assert found[0][case]["leftovers"] == []
        assert found[0][case]["global_step"] == found[0][case]["max_steps"]
    for one in found:
        whole, resumed = one["base"], one["resumed"]
        assert list(chain(*resumed["batches"])) == list(chain(*whole["batches"]))[RESUME_FROM:]
        assert resumed["weights"] == whole["weights"]
