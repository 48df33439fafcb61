"""The LM head in chunks: equal to whole logits for every model, and memory that does not grow with the tokens."""

from __future__ import annotations

import math
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import ROUNDING, SMALL, build_model, product_widths, reference_nll
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

from ifd_trainer.data.encoding import Segment
from ifd_trainer.scoring import chunked_lm_head as head_module
from ifd_trainer.scoring import engine as engine_module
from ifd_trainer.scoring.chunked_lm_head import ChunkedHead, Targets, chunk_positions, tile_width, whole_losses
from ifd_trainer.scoring.engine import Engine
from ifd_trainer.scoring.losses import answer_nll
from ifd_trainer.scoring.onednn import rounded

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
    launch = engine_module.launch

    def noted(model, batch, device, logits, *rest, **options):
        seen.append(logits is not None)
        return launch(model, batch, device, logits, *rest, **options)

    monkeypatch.setattr(engine_module, "launch", noted)
    return seen


def built(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(CONFIGS[name][0]).eval()


# ---- the reduction ----------------------------------------------------------------------------------------------


class Projection(nn.Linear):
    """A head that is more than a matrix, as far as its type tells; notes how many positions each call is given."""

    def __init__(self, *sizes: int, **options) -> None:
        super().__init__(*sizes, **options)
        self.seen: list[int] = []

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.seen.append(hidden.shape[1])
        return super().forward(hidden)


def losses_of(
    logits: ChunkedHead, head: nn.Module, hidden: torch.Tensor, which: np.ndarray, tokens: np.ndarray
) -> np.ndarray:
    """Losses of tokens that are predicted at places in any order."""
    order, found = np.argsort(which, kind="stable"), np.empty(len(which))
    found[order] = logits.losses(head, hidden, Targets.on(torch.device("cpu"), which[order], tokens[order]))
    return found


def exact_losses(logits: torch.Tensor, which: np.ndarray, targets: np.ndarray) -> list[float]:
    """In float64; log1p of the others, so that a loss near 0 keeps its digits."""
    found = []
    for row, target in zip(logits.double()[which], targets, strict=True):
        others = torch.cat([row[:target], row[target + 1 :]]) - row[target]
        found.append(math.log1p(others.exp().sum().item()))
    return found


@pytest.mark.parametrize("kind", [Projection, nn.Linear])
@given(
    places=st.integers(1, 12),
    targets=st.integers(1, 15),
    vocabulary=st.integers(1, 40),
    values=st.integers(1, 200),
    least=st.sampled_from([1, 4]),
    bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_losses_are_those_of_whole_logits(kind, places, targets, vocabulary, values, least, bias, seed):
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    head = kind(3, vocabulary, bias=bias)
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=3.0, generator=generator)
    hidden = torch.randn(places, 3, generator=generator)
    which, wanted = rng.integers(0, places, targets), rng.integers(0, vocabulary, targets)
    with (
        mock.patch.multiple(head_module, CPU_CHUNK_VALUES=values, LEAST_TILE=least),
        torch.no_grad(),
    ):
        logits = nn.functional.linear(hidden, head.weight, head.bias)
        found = losses_of(ChunkedHead(vocabulary, lambda x: x * 0.5), head, hidden, which, wanted)
    np.testing.assert_allclose(found, exact_losses(logits * 0.5, which, wanted), rtol=ROUNDING, atol=1e-5)
    if kind is Projection:
        assert sum(head.seen) == places
        assert max(head.seen) <= max(values // vocabulary, 1)


def test_a_loss_near_zero_keeps_its_digits(monkeypatch):
    monkeypatch.setattr(head_module, "CPU_CHUNK_VALUES", 64)
    head = nn.Linear(1, 200, bias=False)
    with torch.no_grad():
        head.weight[:] = torch.linspace(20, 24, 200)[:, None]
        head.weight[150] = 36.0
        hidden = torch.ones(3, 1)
        logits = nn.functional.linear(hidden, head.weight)
        found = losses_of(ChunkedHead(200, lambda x: x), head, hidden, np.array([0, 1, 2]), np.array([150, 150, 3]))
    expected = exact_losses(logits, np.array([0, 1, 2]), np.array([150, 150, 3]))
    assert expected[0] < 1e-3
    np.testing.assert_allclose(found, expected, rtol=1e-3)  # of two float32 sums it would be 1e-2 off


def test_tokens_that_are_never_said(monkeypatch):
    """By a bias of minus infinity: the first token of a tile, and all of another one."""
    monkeypatch.setattr(head_module, "CPU_CHUNK_VALUES", 20)
    head = nn.Linear(2, 50)
    with torch.no_grad():
        head.bias[[0, 8]] = -math.inf
        head.bias[16:32] = -math.inf
        hidden = torch.randn(2, 2, generator=torch.Generator().manual_seed(0))
        which, targets = np.array([0, 1, 1]), np.array([1, 9, 40])
        found = losses_of(ChunkedHead(50, lambda x: x), head, hidden, which, targets)
        never = losses_of(ChunkedHead(50, lambda x: x), head, hidden, np.array([0, 1]), np.array([0, 20]))
        logits = nn.functional.linear(hidden, head.weight, head.bias)
    np.testing.assert_allclose(found, exact_losses(logits, which, targets), rtol=ROUNDING)
    assert not np.isfinite(never).any()


@pytest.mark.parametrize("values", [2**23 - 2**12, 10_000, 1])
@pytest.mark.parametrize("positions", [1, 55, 700, 4094])
def test_a_tile_is_the_vocabulary_or_a_power_of_two_that_fits(values, positions, monkeypatch):
    monkeypatch.setattr(head_module, "CPU_CHUNK_VALUES", values)
    for vocabulary in (1, 400, 151_936):
        width = tile_width(positions, vocabulary)
        assert width == vocabulary or width & (width - 1) == 0
        assert width == 1 or width * rounded(positions) <= values
        assert width == vocabulary or 2 * width * rounded(positions) > values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loss_is_computed_in_float32_whatever_the_logits_are(dtype):
    logits = (20 * torch.randn(5, 8, generator=torch.Generator().manual_seed(0))).to(dtype)
    logits[3] = 100  # whose exponential is no float32
    places, tokens = np.array([0, 0, 3, 4]), np.array([1, 0, 2, 7])
    exact, pairs = logits.double(), zip(places, tokens, strict=True)
    wanted = [math.log(sum(math.exp(x - exact[i][t]) for x in exact[i])) for i, t in pairs]
    found = whole_losses(logits.clone(), Targets.on(torch.device("cpu"), places, tokens))
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize(("vocabulary", "rows"), [(32_000, 4096), (128_256, 1024), (151_936, 768), (10**6, 256)])
def test_a_chunk_on_an_accelerator_has_as_many_rows_as_products_like(vocabulary, rows):
    assert chunk_positions(vocabulary, torch.device("cuda")) == rows
    assert rows * vocabulary <= head_module.ACCELERATOR_CHUNK_VALUES or rows == 256


# ---- models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["auto", "padded"])
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_changed_logits_are_exact_in_chunks(name, sharded, engine, chunk, projected):
    model = built(name)
    expected = [reference_nll(model, segment.ids, segment.start) for segment in segments_of()]
    found = answer_nll(model, segments_of(), device="cpu", engine=engine, sharded=sharded)
    np.testing.assert_allclose(found, expected, rtol=ROUNDING)
    assert projected[-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_change_of_logits_is_found_bit_for_bit(name, dtype):
    model = built(name).to(dtype)
    logits = Engine.for_model(model, torch.device("cpu")).chunked_head
    values = (torch.randn(3, VOCABULARY, generator=torch.Generator().manual_seed(1)) * 20).to(dtype)
    assert torch.equal(logits.transform(values), CONFIGS[name][1](values))
    assert logits.vocabulary == VOCABULARY


def test_logits_in_float32_times_a_number_of_the_config(projected):
    class Multiplied(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits.float() * self.config.lm_head_multiplier
            return out

    model = Multiplied(build_model(VOCABULARY, lm_head_multiplier=0.3).config).bfloat16().eval()
    change = Engine.for_model(model, torch.device("cpu")).chunked_head.transform
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
    np.testing.assert_allclose(answer_nll(model, segments), expected, rtol=ROUNDING)
    assert not any(projected)


def test_whole_logits_come_in_small_batches(monkeypatch):
    model = Masked(build_model(VOCABULARY).config).eval()
    sizes = []
    model.lm_head.register_forward_hook(lambda module, args, output: sizes.append(output[..., 0].numel()))
    monkeypatch.setattr(engine_module, "CPU_LOGITS_BUDGET", 40 * VOCABULARY)
    segments = segments_of(12)
    answer_nll(model, segments, engine="padded")
    assert max(sizes) <= 40 < sum(segment.scored for segment in segments)


def test_a_hook_on_the_head_that_changes_logits_still_does(chunk, projected):
    model = build_model(VOCABULARY)
    model.lm_head.register_forward_hook(lambda module, args, output: output * 0.5)
    expected = [reference_nll(model, segment.ids, segment.start) for segment in segments_of()]
    np.testing.assert_allclose(answer_nll(model, segments_of()), expected, rtol=ROUNDING)
    assert projected[-1]


@pytest.mark.parametrize("kind", ["hook", "hook before", "other method", "subclass", "bfloat16", "none"])
def test_only_a_head_that_is_nothing_but_a_matrix_is_taken_apart(kind, monkeypatch):
    """What is put around its product still happens, in each chunk; a plain head is called once, to go on with."""
    model = build_model(VOCABULARY)
    head, weight = model.lm_head, model.lm_head.weight
    if kind == "hook":
        head.register_forward_hook(lambda module, args, output: output * 0.5)
    elif kind == "hook before":
        head.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))
    elif kind == "other method":
        head.forward = lambda hidden: nn.functional.linear(hidden * 0.5, weight)
    elif kind == "subclass":
        model.lm_head = Projection(32, VOCABULARY, bias=False)
        model.lm_head.weight = weight
    elif kind == "bfloat16":
        model = model.bfloat16()
    monkeypatch.setattr(head_module, "CPU_CHUNK_VALUES", 4 * VOCABULARY)
    monkeypatch.setattr(head_module, "LEAST_TILE", 64)
    expected = [reference_nll(model, segment.ids, segment.start) for segment in segments_of()]
    widths = product_widths(monkeypatch, model.lm_head.weight)
    found = answer_nll(model, segments_of(), engine="padded")
    np.testing.assert_allclose(found, expected, rtol=0.05 if kind == "bfloat16" else ROUNDING)
    widths.clear()  # those of trials
    answer_nll(model, segments_of(), engine="padded")
    assert (min(widths) < VOCABULARY) is (kind == "none")
    assert (widths.count(VOCABULARY) == 1) is (kind == "none")
    with torch.autocast("cpu", torch.bfloat16):
        widths.clear()
        answer_nll(model, segments_of(), engine="padded")
        assert set(widths) == {VOCABULARY}


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
    np.testing.assert_allclose(found, expected, rtol=ROUNDING)
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
    np.testing.assert_allclose(answer_nll(model, segments_of(), sharded=sharded), expected, rtol=ROUNDING)
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
    np.testing.assert_allclose(answer_nll(model, segments_of()), expected, rtol=ROUNDING)


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


@pytest.mark.parametrize("tiled", [True, False])
@pytest.mark.parametrize("engine", ["auto", "padded"])
def test_the_largest_tensor_does_not_grow_with_scored_tokens(engine, tiled, monkeypatch):
    vocabulary = 20_000
    monkeypatch.setattr(head_module, "CPU_CHUNK_VALUES", 64 * vocabulary)  # more than the head's weight
    model = build_model(vocabulary, initializer_range=0.02)
    if not tiled:
        model.lm_head.register_forward_hook(lambda *_: None)  # more than a matrix, as far as anybody knows
    answer_nll(model, segments_of(1, vocabulary))
    largest = []
    for count in (10, 80):
        segments = segments_of(count, vocabulary, longest=40)
        with Largest() as found:
            answer_nll(model, segments, engine=engine, token_budget=10**6)
        largest.append(found.bytes)
        assert sum(segment.scored for segment in segments) > 100
    # A tile's size is a power of two: at least half of what is allowed.
    assert all(32 * vocabulary * 4 <= size <= 64 * vocabulary * 4 for size in largest), largest


def test_the_largest_tensor_is_seen_by_the_test():
    with Largest() as found:
        _ = torch.zeros(10, 3) + 1
    assert found.bytes == 120
