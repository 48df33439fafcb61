"""Rows whose rotary frequencies depend on the longest row of a forward."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROUNDING, reference_nll
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config

from ifd_trainer.data.encoding import Segment
from ifd_trainer.scoring.losses import answer_nll
from ifd_trainer.scoring.rope_limits import kinds_of_lengths, window

SIZES = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "original_max_position_embeddings": 20,
    "short_factor": [1.0, 1.0, 1.0, 1.0],
    "long_factor": [1.5, 2.0, 3.0, 4.0],
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}
CONFIGS = {
    "longrope": Phi3Config(
        **SIZES, max_position_embeddings=80, original_max_position_embeddings=20, rope_parameters=LONGROPE
    ),
    "dynamic": LlamaConfig(**SIZES, max_position_embeddings=20, rope_parameters=DYNAMIC),
}


@pytest.mark.parametrize("engine", ["auto", "stream", "padded"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_long_row_changes_no_score_of_another(name, engine):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    rng = np.random.default_rng(0)
    lengths = [12, 40, 19, 8, 27, 21, 10]
    segments = [Segment(rng.integers(3, 100, length).tolist(), length // 2) for length in lengths]
    expected = []
    for segment in segments:
        model(torch.tensor([[3]]))  # beyond its window, a dynamic model goes on with the longest row since a short one
        expected.append(reference_nll(model, segment.ids, segment.start))
    together = torch.tensor([segments[0].ids + [0] * 28, segments[1].ids])  # what a plain padded batch computes
    logits = model(together).logits[0, : lengths[0]].log_softmax(-1)
    plain = -np.mean([logits[i - 1, segments[0].ids[i]].item() for i in range(6, 12)])
    assert abs(plain / expected[0] - 1) > 1e-3
    np.testing.assert_allclose(answer_nll(model, segments, engine=engine), expected, rtol=ROUNDING)


def test_a_call_forgets_the_long_rows_of_the_one_before():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIGS["dynamic"]).eval()
    ids = np.random.default_rng(0).integers(3, 100, 24).tolist()
    model(torch.tensor([[3]]))
    expected = reference_nll(model, ids, 12)
    for before in ([3] * 60, [3] * 30):
        answer_nll(model, [Segment(before, 5)])
        assert answer_nll(model, [Segment(ids, 12)])[0] == pytest.approx(expected, rel=ROUNDING)


@pytest.mark.parametrize(
    ("positions", "ropes", "tokens"),
    [
        (2048, {"rope_type": "default"}, 2048),
        (2048, {"rope_type": "linear", "factor": 4.0}, 8192),
        (2048, {"rope_type": "dynamic", "factor": 2.0}, 4096),
        (32_768, {"rope_type": "yarn", "factor": 4.0}, 131_072),
        (131_072, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768}, 131_072),
        (131_072, {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}, 131_072),
        (80, LONGROPE, 80),
        (2048, {"a": {"rope_type": "default"}, "b": {"rope_type": "linear", "factor": 8.0}}, 16_384),
        (1024, None, 1024),
        (None, None, None),
    ],
)
def test_the_window_of_a_scaled_rotary_embedding(positions, ropes, tokens):
    assert window(SimpleNamespace(max_position_embeddings=positions, rope_parameters=ropes)) == tokens


ROPES = [
    None,
    {},
    {"rope_type": "default"},
    LONGROPE,
    DYNAMIC,
    {"full_attention": LONGROPE, "sliding_attention": {"rope_type": "default"}},
    {"full_attention": LONGROPE, "sliding_attention": DYNAMIC},
]


@given(st.lists(st.integers(1, 60), max_size=30), st.sampled_from(ROPES))
def test_kinds_are_a_partition_by_what_changes_the_frequencies(lengths, ropes):
    kinds = kinds_of_lengths(lengths, SimpleNamespace(rope_parameters=ropes, max_position_embeddings=30))
    assert sorted(np.concatenate([*kinds, []]).tolist()) == list(range(len(lengths)))
    of_kind = [{lengths[i] for i in kind} for kind in kinds]
    text = str(ropes)
    for found in of_kind:
        assert "longrope" not in text or len({length > 20 for length in found}) == 1
        assert "dynamic" not in text or max(found) < 30 or len(found) == 1
    if "longrope" not in text and "dynamic" not in text:
        assert len(kinds) == bool(lengths)
    assert [max(found) for found in of_kind] == sorted(max(found) for found in of_kind)


def test_a_model_without_a_config_has_one_kind():
    assert [kind.tolist() for kind in kinds_of_lengths([5, 900], None)] == [[0, 1]]
