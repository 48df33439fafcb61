"""The LM head in chunks: equal to whole logits for every model, and memory that does not grow with the tokens."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import SMALL, build_model, reference_nll
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaForCausalLM,
)

from ifd_trainer import head as head_module
from ifd_trainer import scorer as scorer_module
from ifd_trainer.encoding import Segment
from ifd_trainer.head import chunked_losses
from ifd_trainer.scorer import answer_nll

VOCABULARY = 400
# Configs with what their models do to logits; the numbers are none of the defaults.
CONFIGS = {
    "Cohere": (CohereConfig(**SMALL, logit_scale=0.375), lambda x: x * 0.375),
    "Granite": (GraniteConfig(**SMALL, logits_scaling=7.0), lambda x: x / 7.0),
    "Gemma2": (Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=9.0), lambda x: torch.tanh(x / 9.0) * 9.0),
    "GPT2": (GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=256), lambda x: x),
}


def segments_of(count: int = 8, vocabulary: int = VOCABULARY, longest: int = 30) -> list[Segment]:
    rng = np.random.default_rng(0)
    head = rng.integers(4, vocabulary, 12).tolist()
    tails = [rng.integers(4, vocabulary, rng.integers(3, longest)).tolist() for _ in range(count)]
    return [Segment((head if i % 2 else []) + tail, 1 + i % 2 * 12) for i, tail in enumerate(tails)]


@pytest.fixture(params=[1, 7, 10**6])
def chunk(request, monkeypatch) -> int:
    """Positions in a chunk."""
    monkeypatch.setattr(head_module, "CPU_CHUNK_VALUES", request.param * VOCABULARY)
    return request.param


@pytest.fixture
def projected(monkeypatch) -> list[bool]:
    """Whether the logits of each forward are taken in chunks."""
    seen: list[bool] = []
    mean_nll = scorer_module._mean_nll

    def noted(model, segments, places, inputs, logits, *rest):
        seen.append(logits is not None)
        return mean_nll(model, segments, places, inputs, logits, *rest)

    monkeypatch.setattr(scorer_module, "_mean_nll", noted)
    return seen


def built(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(CONFIGS[name][0]).eval()


# ---- the reduction ----------------------------------------------------------------------------------------------


@given(st.integers(1, 12), st.integers(1, 15), st.integers(1, 14), st.integers(0, 2**31))
def test_losses_are_those_of_whole_logits(places, targets, chunk, seed):
    rng = np.random.default_rng(seed)
    hidden, weight = rng.normal(size=(places, 3)), rng.normal(size=(5, 3))
    which, wanted = rng.integers(0, places, targets), rng.integers(0, 5, targets)
    sizes = []

    def project(rows: torch.Tensor) -> torch.Tensor:
        sizes.append(rows.shape[1])
        return rows @ torch.from_numpy(weight).T

    found = chunked_losses(project, torch.from_numpy(hidden), which, wanted, chunk)
    logits = hidden @ weight.T
    expected = [
        math.log(sum(math.exp(x) for x in logits[i])) - logits[i, token] for i, token in zip(which, wanted, strict=True)
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert sum(sizes) == places
    assert max(sizes) <= chunk


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduced", [head_module._in_place, head_module._in_parts])
def test_both_ways_to_a_loss_and_what_they_need_of_logits(reduced, dtype, monkeypatch):
    """Accelerators take the second one."""
    monkeypatch.setattr(head_module, "PART_VALUES", 20)  # two rows
    logits = (20 * torch.randn(5, 8, generator=torch.Generator().manual_seed(0))).to(dtype)
    logits[3] = 100  # whose exponential is no float32
    rows, tokens = torch.tensor([4, 0, 3, 0]), torch.tensor([7, 1, 2, 0])
    exact, pairs = logits.double(), zip(rows, tokens, strict=True)
    wanted = [math.log(sum(math.exp(x - exact[i][t]) for x in exact[i])) for i, t in pairs]
    found = reduced(logits.clone(), rows, tokens)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=3e-5)


# ---- models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["auto", "padded"])
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_changed_logits_are_exact_in_chunks(name, sharded, engine, chunk, projected):
    model = built(name)
    expected = [reference_nll(model, segment.ids, segment.start) for segment in segments_of()]
    found = answer_nll(model, segments_of(), device="cpu", engine=engine, sharded=sharded)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert projected[-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_change_of_logits_is_found_bit_for_bit(name, dtype):
    model = built(name).to(dtype)
    logits = scorer_module._logits(model, torch.device("cpu"), False)
    values = (torch.randn(3, VOCABULARY, generator=torch.Generator().manual_seed(1)) * 20).to(dtype)
    assert torch.equal(logits.change(values), CONFIGS[name][1](values))
    assert logits.vocabulary == VOCABULARY


def test_logits_in_float32_times_a_number_of_the_config(projected):
    class Multiplied(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits.float() * self.config.lm_head_multiplier
            return out

    model = Multiplied(build_model(VOCABULARY, lm_head_multiplier=0.3).config).bfloat16().eval()
    change = scorer_module._logits(model, torch.device("cpu"), False).change
    assert change(torch.tensor([2.0], dtype=torch.bfloat16)).tolist() == [pytest.approx(0.6, rel=1e-7)]


class Masked(LlamaForCausalLM):
    """Never says some tokens: what it does to a logit depends on the token."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits[..., 100:110] = -1e9
        return out


class TwoHeads(LlamaForCausalLM):
    """Calls its head twice."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        self.lm_head(torch.zeros(*kwargs.get("input_ids", args[0] if args else None).shape, 32))
        return out


class CappedByHand(LlamaForCausalLM):
    """A cap that no config tells, and too wide to show in small logits."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits.clamp(-500, 500)
        return out


@pytest.mark.parametrize("kind", [Masked, TwoHeads, CappedByHand])
def test_models_that_no_known_change_explains_keep_whole_logits(kind, chunk, projected):
    model = kind(build_model(VOCABULARY).config).eval()
    model.load_state_dict(build_model(VOCABULARY).state_dict())
    segments = [segment for segment in segments_of() if not set(range(100, 110)) & set(segment.ids)]
    expected = [reference_nll(model, segment.ids, segment.start) for segment in segments]
    np.testing.assert_allclose(answer_nll(model, segments), expected, rtol=1e-5)
    assert not any(projected)


def test_whole_logits_come_in_small_batches(monkeypatch):
    model = Masked(build_model(VOCABULARY).config).eval()
    sizes = []
    model.lm_head.register_forward_hook(lambda module, args, output: sizes.append(output[..., 0].numel()))
    monkeypatch.setattr(scorer_module, "CPU_LOGITS_BUDGET", 40 * VOCABULARY)
    segments = segments_of(12)
    answer_nll(model, segments, engine="padded")
    assert max(sizes) <= 40 < sum(segment.scored for segment in segments)


def test_a_hook_on_the_head_that_changes_logits_still_does(chunk, projected):
    model = build_model(VOCABULARY)
    model.lm_head.register_forward_hook(lambda module, args, output: output * 0.5)
    expected = [reference_nll(model, segment.ids, segment.start) for segment in segments_of()]
    np.testing.assert_allclose(answer_nll(model, segments_of()), expected, rtol=1e-5)
    assert projected[-1]


def test_weights_gathered_for_the_call_of_the_head_only(chunk, projected):
    """As ZeRO-3 does it: each call of the head gathers its weight before, and lets go of it after."""
    model, gathered = build_model(VOCABULARY), []
    expected = [reference_nll(model, segment.ids, segment.start) for segment in segments_of()]
    weight = model.lm_head.weight.data

    def gather(module, args):
        module.weight.data = weight
        gathered.append(1)

    def let_go(module, args, output):
        module.weight.data = torch.empty(0)

    model.lm_head.register_forward_pre_hook(gather)
    model.lm_head.register_forward_hook(let_go)
    let_go(model.lm_head, None, None)
    answer_nll(model, segments_of(1), sharded=True)
    gathered.clear()
    projected.clear()
    found = answer_nll(model, segments_of(), engine="padded", token_budget=64, sharded=True)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert all(projected)
    assert len(gathered) == len(projected) > 1  # once a forward, whatever the number of chunks


@pytest.mark.parametrize("sharded", [False, True])
def test_an_adapter_inside_the_head(sharded, chunk, projected):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = peft.get_peft_model(build_model(VOCABULARY), config)
    expected = [reference_nll(model, segment.ids, segment.start) for segment in segments_of()]
    np.testing.assert_allclose(answer_nll(model, segments_of(), sharded=sharded), expected, rtol=1e-5)
    assert projected[-1] is not sharded  # its modules would gather weights once a chunk


def test_an_error_in_the_head_leaves_no_hook_behind():
    model = build_model(VOCABULARY)
    answer_nll(model, segments_of(1))

    def fail(*_):
        raise RuntimeError("on purpose")

    hook = model.lm_head.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        answer_nll(model, segments_of())
    hook.remove()
    assert not model.lm_head._forward_pre_hooks
    expected = [reference_nll(model, segment.ids, segment.start) for segment in segments_of()]
    np.testing.assert_allclose(answer_nll(model, segments_of()), expected, rtol=1e-5)


# ---- memory -----------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that an operation gives back."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.numel() * tensor.element_size())
        return out


@pytest.mark.parametrize("engine", ["auto", "padded"])
def test_the_largest_tensor_does_not_grow_with_scored_tokens(engine, monkeypatch):
    vocabulary = 20_000
    monkeypatch.setattr(head_module, "CPU_CHUNK_VALUES", 64 * vocabulary)  # more than the head's weight
    model = build_model(vocabulary, initializer_range=0.02)
    answer_nll(model, segments_of(1, vocabulary))
    largest = []
    for count in (10, 80):
        segments = segments_of(count, vocabulary, longest=40)
        with Largest() as found:
            answer_nll(model, segments, engine=engine, token_budget=10**6)
        largest.append(found.bytes)
        assert sum(segment.scored for segment in segments) > 100
    assert largest == [64 * vocabulary * 4] * 2


def test_the_largest_tensor_is_seen_by_the_test():
    with Largest() as found:
        _ = torch.zeros(10, 3) + 1
    assert found.bytes == 120
