"""The token budget from free memory, with a device made up here: it counts the tokens of each forward."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROUNDING, SMALL, build_model, reference_nll
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ifd_trainer.data.encoding import Segment
from ifd_trainer.scoring import engine as engine_module
from ifd_trainer.scoring import onednn
from ifd_trainer.scoring import token_budget as memory_module
from ifd_trainer.scoring.losses import answer_nll
from ifd_trainer.scoring.onednn import rounded_down
from ifd_trainer.scoring.token_budget import (
    LEAST_TOKENS,
    MOST_TOKENS,
    Footprint,
    device_memory,
    measure,
    planned_bytes,
    token_budget,
)

CPU = torch.device("cpu")
MIB = 2**20


class FakeMemory:
    """A device on which a forward of t tokens takes fixed + per_token * t bytes."""

    def __init__(self, model: nn.Module, total: int, fixed: int = 3 * MIB, per_token: int = 1000) -> None:
        self.total, self.fixed, self.per_token = total, fixed, per_token
        self.weights, self.peak, self.cached = 40 * MIB, 500 * MIB, 20 * MIB
        self.sizes: list[int] = []
        model.register_forward_pre_hook(self._forward, with_kwargs=True)

    def _forward(self, module, args, kwargs) -> None:
        tokens = (args[0] if args else kwargs["input_ids"]).numel()
        used = self.weights + self.fixed + self.per_token * tokens
        if used > self.total:
            raise torch.OutOfMemoryError("on purpose")
        self.sizes.append(tokens)
        self.peak = max(self.peak, used)

    def mem_get_info(self, device):
        return self.total - self.weights - self.cached, self.total

    def memory_allocated(self, device):
        return self.weights

    def memory_reserved(self, device):
        return self.weights + self.cached

    def max_memory_allocated(self, device):
        return self.peak

    def reset_peak_memory_stats(self, device):
        self.peak = self.weights


def many_segments(tokens: int) -> list[Segment]:
    rng = np.random.default_rng(0)
    segments = []
    while sum(len(segment.ids) for segment in segments) < tokens:
        ids = rng.integers(4, 400, rng.integers(100, 400)).tolist()
        segments.append(Segment(ids, len(ids) - 20))
    return segments


@pytest.fixture
def fake(monkeypatch):
    """Puts a made-up device under a model."""

    def under(model: nn.Module, total: int, **sizes: int) -> FakeMemory:
        engine_module.Engine.for_model(model, CPU)  # tried out before tokens are counted
        memory = FakeMemory(model, total, **sizes)
        monkeypatch.setattr(memory_module, "device_memory", lambda device: memory)
        return memory

    return under


@pytest.fixture
def budgets(monkeypatch) -> list[int]:
    """The budgets that batches are made with; rows are not scored."""
    seen: list[int] = []

    def noted(segments, token_budget, *others):
        seen.append(token_budget)
        return []

    monkeypatch.setattr(engine_module, "token_budget_batches", noted)
    monkeypatch.setattr(engine_module, "stream_batches", noted)
    return seen


@given(st.integers(0, 2**30), st.integers(1, 2**20), st.integers(0, 2**36))
def test_a_batch_of_the_budget_fits_into_what_is_planned(fixed, per_token, planned):
    tokens = Footprint(fixed, per_token).tokens(planned)
    assert LEAST_TOKENS <= tokens <= MOST_TOKENS
    if tokens > LEAST_TOKENS:
        assert fixed + per_token * tokens <= planned
    if tokens < MOST_TOKENS:
        assert fixed + per_token * tokens * 33 / 32 + per_token > planned or tokens == LEAST_TOKENS


@pytest.mark.parametrize(
    ("total", "free", "planned"),
    [
        (80 * 2**30, 78 * 2**30, 3 * 2**30),
        (80 * 2**30, 7 * 2**30, 3 * 2**30),  # a resumed run has the batches of the first
        (80 * 2**30, 2 * 2**30, 2**30),
        (8 * 2**30, 7 * 2**30, 2 * 2**30),
        (8 * 2**30, 5 * 2**30, 2 * 2**30),
    ],
)
def test_what_is_planned_does_not_go_by_what_is_free_while_there_is_enough(total, free, planned):
    memory = FakeMemory(nn.Linear(1, 1), total)
    memory.weights = total - free
    assert planned_bytes(memory, CPU) == planned


def test_forwards_of_two_sizes_tell_the_cost_of_a_token():
    memory = FakeMemory(nn.Linear(1, 1), 10**12, fixed=7 * MIB, per_token=333)

    def run(tokens, all_scored):
        memory._forward(None, (), {"input_ids": torch.zeros(tokens)})

    assert measure(run, (100, 400), memory, CPU) == Footprint(7 * MIB, 333)


@given(
    layers=st.integers(0, 2**30),
    per_token=st.integers(1, 2**18),
    logits=st.integers(0, 2**31),
    share=st.floats(0, 1),
    tokens=st.integers(4096, 65_536),
)
def test_logits_of_a_chunk_do_not_hide_the_cost_of_a_token(layers, per_token, logits, share, tokens):
    """The peak is in the layers or at the head, where a chunk of logits stands beside the last hidden states."""
    memory = FakeMemory(nn.Linear(1, 1), 10**12)

    def peak(tokens, all_scored):
        return max(layers + per_token * tokens, all_scored * logits + int(share * per_token) * tokens)

    def run(tokens, all_scored):
        memory.peak = max(memory.peak, memory.weights + peak(tokens, all_scored))

    found = measure(run, (1024, 4096), memory, CPU)
    assert found.fixed + found.per_token * tokens >= peak(tokens, True)
    assert found.per_token == per_token
    assert found.fixed <= max(layers, logits)


def test_processors_and_devices_that_do_not_tell_have_no_memory_to_measure(monkeypatch):
    assert device_memory(CPU) is None
    monkeypatch.setattr(torch, "get_device_module", lambda device: object())
    assert device_memory(torch.device("xpu")) is None
    whole = FakeMemory(nn.Linear(1, 1), 1)
    monkeypatch.setattr(torch, "get_device_module", lambda device: whole)
    assert device_memory(torch.device("cuda")) is whole


@pytest.mark.parametrize("engine", ["stream", "padded"])
def test_the_budget_is_what_the_planned_memory_holds_and_is_measured_once(fake, budgets, caplog, engine):
    caplog.set_level(logging.INFO, logger="ifd_trainer")
    model = build_model(400)
    memory = fake(model, 96 * MIB)
    answer_nll(model, many_segments(80_000), engine=engine)
    # A stream on a CPU has some tokens more, so that few numbers of tokens occur.
    holds = int((24 * MIB - 3 * MIB) / 1000)
    assert budgets == [21504]
    assert 21504 <= holds < 21504 * 33 / 32
    assert "Token budget on cpu: 21504" in caplog.records[-1].message
    assert "for 0.0 GiB; a forward takes 3 MiB and 1 KiB a token" in caplog.records[-1].message
    tried = len(memory.sizes)
    assert max(memory.sizes) <= 4096
    memory.weights = 84 * MIB  # as much as training takes between two scorings
    answer_nll(model, many_segments(80_000), engine=engine)
    assert len(memory.sizes) == tried
    assert budgets[1] == rounded_down(int((6 * MIB - 3 * MIB) / 1000))


def test_a_token_budget_that_is_given_is_taken(fake, budgets):
    model = build_model(400)
    memory = fake(model, 96 * MIB)
    answer_nll(model, many_segments(80_000), engine="padded", token_budget=777)
    assert budgets == [777]
    assert memory.sizes == []


def test_little_to_score_is_not_measured(fake, budgets):
    model = build_model(400)
    memory = fake(model, 96 * MIB)
    answer_nll(model, many_segments(1000), engine="padded")
    assert budgets == [memory_module.ACCELERATOR_TOKENS]
    assert memory.sizes == []


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        ({"intermediate_size": 1536}, 2048),
        ({"intermediate_size": 4864}, 1664),
        ({"ffn_dim": 11008, "intermediate_size": None}, 736),
        ({"n_inner": None, "hidden_size": 1600}, 1280),  # GPT-2: four times the hidden size
        ({"intermediate_size": 10**6}, 256),
        ({"hidden_size": None}, 2048),
        ({}, 2048),
    ],
)
def test_results_of_wide_layers_stay_below_32_mib_on_a_cpu(config, tokens):
    model = nn.Module()
    model.config = SimpleNamespace(**config)
    assert token_budget(model, [], 1, CPU, None) == tokens
    assert onednn.rounded(tokens) == tokens  # a stream of this length gets no longer
    width = max([size for size in config.values() if size] or [1])
    assert tokens == 256 or tokens * width * 4 < 32 * MIB


def test_the_budget_on_a_cpu_is_the_models(monkeypatch):
    monkeypatch.setattr(memory_module, "CPU_CHUNK_VALUES", 900 * SMALL["intermediate_size"])
    monkeypatch.setattr(memory_module, "LEAST_CPU_TOKENS", 16)
    model, sizes = build_model(400), []
    model.register_forward_pre_hook(lambda _, args, kwargs: sizes.append(kwargs["input_ids"].numel()), with_kwargs=True)
    answer_nll(model, many_segments(3000), engine="padded")
    assert 450 < max(sizes) <= 896


@pytest.mark.parametrize("wrapped", [False, True])
def test_forwards_that_other_processes_would_wait_for_are_not_spent_on_measuring(fake, budgets, wrapped):
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, **options):
            return self.module(**options)

    model = Wrapper(build_model(400)) if wrapped else build_model(400)
    memory = fake(model, 96 * MIB)
    answer_nll(model, many_segments(80_000), engine="padded", forwards=lambda batches: 0, sharded=not wrapped)
    assert budgets == [memory_module.ACCELERATOR_TOKENS]
    assert memory.sizes == []


def test_a_model_on_several_devices_is_not_measured(fake, budgets):
    model = build_model(400)
    memory = fake(model, 96 * MIB)
    model.register_parameter("elsewhere", nn.Parameter(torch.empty(2, device="meta")))
    answer_nll(model, many_segments(80_000), engine="padded", device="cpu")
    assert budgets == [memory_module.ACCELERATOR_TOKENS]
    assert memory.sizes == []


def test_a_large_trial_that_does_not_fit_leaves_the_small_one(fake, budgets):
    """Rows so long that a batch of four does not fit: a budget of one or two is better than the least."""
    model, row = build_model(400), Segment([4] * 6000, 10)
    memory = fake(model, 40 * MIB + 3 * MIB + 20_000_000, per_token=1000)
    answer_nll(model, [row] * 12, engine="padded")
    assert max(memory.sizes) == 6000
    assert budgets == [rounded_down(int(planned_bytes(memory, CPU) / ((3 * MIB + 6_000_000) / 6000)))]
    assert budgets[0] > 6000


def test_a_small_trial_that_does_not_fit_gives_the_least_budget(fake, budgets, caplog):
    model = build_model(400)
    memory = fake(model, 43 * MIB + 500_000)  # 500 tokens
    answer_nll(model, many_segments(80_000), engine="padded")
    assert budgets == [LEAST_TOKENS]
    assert memory.sizes == []
    assert "Token budget on cpu: 1024, since 798 did not fit" in caplog.records[-1].message
    answer_nll(model, many_segments(80_000), engine="padded")  # not tried again
    assert budgets == [LEAST_TOKENS] * 2
    assert len(caplog.records) == 1


def test_the_budget_is_measured_for_each_engine(fake, budgets):
    model = build_model(400)
    memory = fake(model, 96 * MIB)
    answer_nll(model, many_segments(80_000), engine="padded")
    tried = len(memory.sizes)
    answer_nll(model, many_segments(80_000), engine="stream")
    assert len(memory.sizes) == 2 * tried


def test_scores_are_those_of_single_tokens_and_batches_are_still_halved(fake, caplog):
    caplog.set_level(logging.WARNING)
    model, segments = build_model(400), many_segments(70_000)
    memory = fake(model, 96 * MIB)
    expected = [reference_nll(model, segment.ids, segment.start) for segment in segments[:5]]
    memory.sizes.clear()

    def shrink(module, args, kwargs):  # another process takes memory after the budget was found
        if kwargs["input_ids"].numel() > 5000:
            memory.total = 50 * MIB

    model.register_forward_pre_hook(shrink, with_kwargs=True, prepend=True)
    found = answer_nll(model, segments, engine="padded")
    np.testing.assert_allclose(found[:5], expected, rtol=ROUNDING)
    assert ["memory" in record.message for record in caplog.records] == [True]
    assert 1000 * max(memory.sizes) < 7 * MIB
