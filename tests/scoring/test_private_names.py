"""A release of PyTorch or transformers that renamed what it never promised: the same scores, and one warning."""

from __future__ import annotations

import builtins
import logging
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROUNDING, build_model, product_widths, reference_nll
from torch import nn
from transformers import LlamaForCausalLM, PretrainedConfig

from ifd_trainer.data.encoding import Segment
from ifd_trainer.scoring import chunked_lm_head as head_module
from ifd_trainer.scoring import onednn, private_names
from ifd_trainer.scoring import span_attention as attention_module
from ifd_trainer.scoring.engine import Engine, streams
from ifd_trainer.scoring.losses import answer_nll
from ifd_trainer.scoring.span_attention import varlen_kernel

CPU = torch.device("cpu")
# Switching oneDNN off and on again sets an option that this build of PyTorch has no use for, and says so.
pytestmark = pytest.mark.filterwarnings("ignore:TF32 acceleration")
TRIED = (
    private_names.has_onednn_linear,
    private_names.can_set_attention,
    private_names.tells_hooks,
    private_names.tells_compiled,
    attention_module.warn_without_kernel,
)
BEGINNING = [9, 8, 7, 6, 5, 4, 3, 9, 9, 8]
SEGMENTS = [Segment([*BEGINNING, 5, 6], 10), Segment([*BEGINNING, 6, 6, 7], 4), Segment([30, 31], 1)]


@pytest.fixture(autouse=True)
def anew():
    """Each is tried out once in a process: here once in each test."""
    for function in TRIED:
        function.cache_clear()
    yield
    for function in TRIED:
        function.cache_clear()


@pytest.fixture
def warnings(caplog):
    """The warnings of this package so far."""
    caplog.set_level(logging.WARNING, "ifd_trainer")
    return lambda: [record.getMessage() for record in caplog.records if record.name.startswith("ifd_trainer")]


def check_scores(engine: str = "auto", model: nn.Module | None = None) -> None:
    """Two calls and two models, of which the second of each is not to warn again."""
    for one in (model or build_model(400), build_model(400, seed=1)):
        wanted = [reference_nll(one, segment.ids, segment.start) for segment in SEGMENTS]
        for _ in range(2):
            np.testing.assert_allclose(answer_nll(one, SEGMENTS, engine=engine), wanted, rtol=ROUNDING)


def small_tiles(monkeypatch, model: nn.Module) -> list[int]:
    """Let the head of 400 tokens be taken apart where it can be; the rows of its weight in each product."""
    monkeypatch.setattr(head_module, "CPU_CHUNK_VALUES", 4 * 400)
    monkeypatch.setattr(head_module, "LEAST_TILE", 64)
    return product_widths(monkeypatch, model.lm_head.weight)


def test_this_release_has_all_of_them(monkeypatch, warnings):
    model = build_model(400)
    widths = small_tiles(monkeypatch, model)
    check_scores(model=model)
    assert min(widths) < 400
    assert private_names.can_set_attention()
    assert private_names.tells_hooks()
    assert private_names.tells_compiled()
    assert warnings() == []


def other_signature(x, weight, bias):
    raise AssertionError("not reached")


@pytest.mark.parametrize(
    ("operators", "found"),
    [
        (SimpleNamespace(), r"AttributeError: .*_linear_pointwise"),
        (SimpleNamespace(_linear_pointwise=other_signature), r"TypeError: .*takes 3 positional arguments"),
        (SimpleNamespace(_linear_pointwise=lambda x, weight, *_: x @ weight), "it does something else"),
    ],
    ids=["gone", "another signature", "another meaning"],
)
def test_without_onednns_product(monkeypatch, warnings, operators, found):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.ops, "mkldnn", operators)
    check_scores()
    assert not onednn.available()
    (warning,) = warnings()
    assert re.search(found, warning)
    assert re.search(r"^torch.ops.mkldnn._linear_pointwise does not .* products on a CPU .* twice as long\.$", warning)


@pytest.mark.parametrize(
    ("build", "capability"), [(False, "AVX512"), (True, "DEFAULT")], ids=["no such build", "another processor"]
)
def test_where_onednn_is_not_wanted_its_product_is_not_missed(monkeypatch, warnings, build, capability):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: build)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace())
    check_scores()
    assert warnings() == []


@pytest.mark.parametrize("engine", ["auto", "stream", "padded"])
def test_where_transformers_keeps_the_attention_under_another_name(monkeypatch, warnings, engine):
    def write(config, name):
        config.__dict__["_name_of_attention"] = name

    renamed = property(lambda config: config.__dict__.get("_name_of_attention") or "sdpa", write)
    monkeypatch.setattr(PretrainedConfig, "_attn_implementation", renamed)
    assert not streams(build_model(400))
    assert Engine.for_model(build_model(400), CPU, engine).name == "padded"
    check_scores(engine)
    (warning,) = warnings()
    assert warning.startswith(
        "PretrainedConfig._attn_implementation_internal does not work as expected in transformers"
    )
    assert "rows are padded" in warning


def test_where_modules_keep_their_hooks_under_another_name(monkeypatch, warnings):
    """The head is not taken apart, since nobody knows what is put around it."""
    monkeypatch.setattr(private_names, "nn", SimpleNamespace(Identity=Bare))
    model = build_model(400)
    widths = small_tiles(monkeypatch, model)
    check_scores(model=model)
    assert set(widths) == {400}
    found = sorted(warning.split(" does not work")[0] for warning in warnings())
    assert found == ["nn.Module._compiled_call_impl", "nn.Module._forward_hooks"]


class Bare:
    """A module without private attributes."""

    def register_forward_hook(self, hook):
        pass

    register_forward_pre_hook = register_forward_hook


class OutsideItsWindow(LlamaForCausalLM):
    """Cannot be run on a row of another length than its window allows."""

    def forward(self, input_ids, position_ids=None, **kwargs):
        if position_ids is not None:
            raise IndexError("position\nout of range")
        return super().forward(input_ids, **kwargs)


class WithoutPositions(LlamaForCausalLM):
    """Its forward has no position_ids."""

    def forward(self, input_ids, use_cache=False):
        return super().forward(input_ids, use_cache=use_cache)


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (
            OutsideItsWindow,
            [
                "OutsideItsWindow is padded, which is slower: as a stream it raised IndexError: position out of range",
            ],
        ),
        (WithoutPositions, []),
    ],
)
def test_what_a_model_raises_as_a_stream_is_told_once(warnings, caplog, kind, told):
    caplog.set_level(logging.INFO, "ifd_trainer")
    model = kind(build_model(400).config).eval()
    model.load_state_dict(build_model(400).state_dict())
    check_scores(model=model)
    assert [text for text in warnings() if "which is slower" in text] == told
    if not told:
        assert warnings().count("WithoutPositions is padded: its forward takes no positions.") == 1


def test_what_is_no_error_of_a_forward_is_not_caught():
    class Other(Exception):
        pass

    class FailsAsAStream(LlamaForCausalLM):
        def forward(self, input_ids, position_ids=None, **kwargs):
            if position_ids is not None:
                raise Other
            return super().forward(input_ids, **kwargs)

    with pytest.raises(Other):
        streams(FailsAsAStream(build_model(400).config).eval())


def test_what_a_head_raises_on_other_logits_is_told_once(warnings):
    class Particular(LlamaForCausalLM):
        """Takes no logits but its own."""

        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            if out.logits.abs().max() > 9e3:
                raise ValueError("too large")
            return out

    model = Particular(build_model(400).config).eval()
    model.load_state_dict(build_model(400).state_dict())
    check_scores(model=model)
    assert warnings() == [
        "Particular is scored with whole logits, which takes more memory: with logits of two positions it raised "
        "ValueError: too large"
    ]


@pytest.mark.parametrize(("dtype", "told"), [(torch.bfloat16, 1), (torch.float16, 1), (torch.float32, 0)])
def test_half_precision_on_cuda_without_a_kernel_is_told_once(monkeypatch, warnings, dtype, told):
    """In float32 no kernel would be used."""
    monkeypatch.setattr(attention_module, "varlen_kernel", lambda device: None)
    for _ in range(2):
        assert not streams(build_model(400).to(dtype), torch.device("cuda"))
    assert [warning.startswith("Rows are padded, since neither PyTorch") for warning in warnings()] == [True] * told


@pytest.mark.parametrize("kind", [ImportError, OSError, RuntimeError])
def test_broken_kernel_packages_are_logged_by_what_they_raise(monkeypatch, caplog, tmp_path, kind):
    caplog.set_level(logging.INFO, "ifd_trainer")
    error = kind(f"no symbol, {tmp_path.name}")  # one that this process has not told yet
    imported = builtins.__import__

    def broken(name, *args, **kwargs):
        if name in ("torch.nn.attention.varlen", "flash_attn"):
            raise error
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", broken)
    assert [varlen_kernel(torch.device("cuda")) for _ in range(3)] == [None] * 3
    what = f"{type(error).__name__}: {error}"
    assert [record.getMessage() for record in caplog.records] == [
        f"No variable-length attention kernel from {name}: {what}"
        for name in ("torch.nn.attention.varlen", "flash_attn")
    ]
