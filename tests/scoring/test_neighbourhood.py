"""Neighbours of rows against a loop that embeds, disturbs and reads one at a time; and what their noise depends on."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import ROUNDING
from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel

from ifd_trainer import IFDScorer, attach_selective_ifd
from ifd_trainer.scoring.neighbourhood import Neighbour, neighbour_scores

TEXTS = {
    "instruction": ["Name three colours.", "Add the numbers.", "", "Who sat on the mat?"],
    "input": ["", "12 and 30", "", ""],
    "output": ["Red, green and blue.", "The sum is 42.", "", "The cat sat on the mat with a ball."],
}
TURNS = (
    ["Name a colour.", "Red."],
    ["Name a colour.", "Red.", "Another.", "Blue and green."],
    ["Hello!", "你好, hello."],
)
ROLES = ("user", "assistant")
CHATS = {"messages": [[{"role": ROLES[i % 2], "content": text} for i, text in enumerate(turns)] for turns in TURNS]}
FORMATS = {"text": TEXTS, "chat": CHATS}


@pytest.fixture
def scorer(model, tokenizer) -> IFDScorer:
    return IFDScorer(model, tokenizer, token_losses=True)


@pytest.fixture(params=FORMATS)
def rows(request, scorer) -> Dataset:
    return Dataset.from_dict(FORMATS[request.param]).map(scorer, batched=True)


def numbers(rows: Dataset, name: str) -> np.ndarray:
    return np.array(rows[name][:], dtype=float)


def disturbed_losses(model, ids: list[int], start: int, noise: np.ndarray) -> np.ndarray:
    """Losses of ids[start:] of one row alone, whose embeddings are given to the model in the place of its tokens."""
    with torch.no_grad():
        embeddings = model.get_input_embeddings()(torch.tensor([ids])) + torch.from_numpy(noise)
        logits = model(inputs_embeds=embeddings).logits[0].double()
    return np.array([-torch.log_softmax(logits[i - 1], -1)[ids[i]].item() for i in range(start, len(ids))])


def looped(model, scorer, rows: Dataset, share: float, neighbours: int, alpha: float, seed: int) -> list[list[float]]:
    """S-IFD of each neighbour of each row that has one, in loops over rows, neighbours and tokens."""
    deltas = [np.float32(row["das_tokens"] or []) - np.float32(row["cas_tokens"] or []) for row in rows]
    largest = sorted(np.abs(np.concatenate(deltas)).tolist(), reverse=True)
    threshold = largest[math.ceil(share * len(largest)) - 1]
    found = []
    for pair, delta in zip(scorer.encode(rows.to_dict()), deltas, strict=True):
        counted = [abs(float(of)) >= threshold for of in delta]
        of_row = []
        for number in range(neighbours if any(counted) else 0):
            given, alone = pair.conditioned, pair.direct
            noise = Neighbour(given.ids, number, seed, alpha).noise(model.config.hidden_size)
            cas = disturbed_losses(model, given.ids, given.start, noise)
            das = disturbed_losses(model, alone.ids, alone.start, noise[-len(alone.ids) :])
            of_row.append(math.exp(np.mean((cas - das)[counted])))
        found.append(of_row)
    return found


@pytest.mark.parametrize(("share", "alpha"), [(0.5, 5.0), (0.2, 1.0), (1.0, 5.0)])
def test_mean_and_spread_are_those_of_a_loop_over_disturbed_rows(scorer, model, rows, share, alpha):
    found = scorer.neighbourhood(rows, share=share, neighbours=3, alpha=alpha, seed=7)
    assert found.column_names == [*rows.column_names, "sifd_mean", "sifd_std"]
    expected = looped(model, scorer, rows, share, neighbours=3, alpha=alpha, seed=7)
    for row, of_row in zip(found, expected, strict=True):
        if not of_row:
            assert row["sifd_mean"] is row["sifd_std"] is None
            continue
        assert row["sifd_mean"] == pytest.approx(np.mean(of_row), rel=1e-4)
        assert row["sifd_std"] == pytest.approx(np.std(of_row), rel=1e-3)
        assert row["sifd_std"] > 0


@pytest.mark.parametrize("share", [0.2, 0.5, 1.0])
def test_without_noise_each_neighbour_is_the_row_itself(scorer, rows, share):
    found = scorer.neighbourhood(attach_selective_ifd(rows, share), share=share, neighbours=2, alpha=0)
    np.testing.assert_allclose(numbers(found, "sifd_mean"), numbers(found, "sifd"), rtol=10 * ROUNDING)
    np.testing.assert_allclose(numbers(found, "sifd_std"), 0 * numbers(found, "sifd"), atol=1e-6)


def test_neighbours_depend_on_nothing_but_seed_row_and_number(scorer, model, rows):
    before = torch.random.get_rng_state()
    found = scorer.neighbourhood(rows, neighbours=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    mean = numbers(found, "sifd_mean")
    torch.manual_seed(5)
    again = scorer.neighbourhood(found, neighbours=3)
    assert again.to_dict() == found.to_dict()
    # In another order, twice, and in batches of another size.
    order = np.random.default_rng(0).permutation(len(rows))
    moved = scorer.neighbourhood(rows.select(order), neighbours=3)
    np.testing.assert_allclose(numbers(moved, "sifd_mean"), mean[order], rtol=10 * ROUNDING)
    small = IFDScorer(model, scorer.tokenizer, token_losses=True, token_budget=16)
    alone = small.neighbourhood(rows, neighbours=3)
    np.testing.assert_allclose(numbers(alone, "sifd_mean"), mean, rtol=10 * ROUNDING)
    np.testing.assert_allclose(numbers(alone, "sifd_std"), numbers(found, "sifd_std"), rtol=1e-3)
    # Each seed has neighbours of its own, and the first ones are among more of them.
    other = scorer.neighbourhood(rows, neighbours=3, seed=1)
    assert (np.abs(numbers(other, "sifd_mean") / mean - 1)[np.isfinite(mean)] > 1e-3).all()
    pairs = scorer.encode(rows.to_dict())
    chosen = [None if pair.conditioned is None else np.ones(pair.conditioned.scored, dtype=bool) for pair in pairs]
    few, many = (neighbour_scores(model, pairs, chosen, count, alpha=5.0, seed=0) for count in (2, 5))
    np.testing.assert_allclose(many[:, :2], few, rtol=10 * ROUNDING)


def test_scores_are_the_same_bits_after_neighbours_were_scored(scorer, rows):
    before = scorer(rows.to_dict())
    scorer.neighbourhood(rows, neighbours=1)
    assert scorer(rows.to_dict()) == before


def test_noise_is_uniform_and_of_the_size_that_is_named():
    noise = Neighbour(list(range(400)), number=0, seed=0, alpha=5.0).noise(64)
    scale = 5.0 / math.sqrt(400 * 64)
    assert (noise.shape, noise.dtype) == ((400, 64), np.float32)
    assert np.abs(noise).max() <= scale
    assert np.abs(noise).max() > 0.999 * scale
    assert abs(noise.mean()) < 4 * scale / math.sqrt(3 * noise.size)
    assert noise.var() == pytest.approx(scale**2 / 3, rel=0.03)
    others = [([0, *range(2, 401)], 0, 0), (range(400), 1, 0), (range(400), 0, 1)]
    assert all(
        not np.allclose(Neighbour([*ids], n, seed, 5.0).noise(64), noise, atol=scale / 9) for ids, n, seed in others
    )
    longer = Neighbour([1, 2], 0, 0, 5.0).noise(4, last=3)
    assert (longer[0] == 0).all()
    np.testing.assert_array_equal(longer[1:], Neighbour([1, 2], 0, 0, 5.0).noise(4))


def test_a_model_of_another_family_is_disturbed_where_its_tokens_are_embedded(tokenizer):
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2, n_positions=256, initializer_range=0.4
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config).eval()
    scorer = IFDScorer(model, tokenizer, token_losses=True)
    rows = Dataset.from_dict(TEXTS).map(scorer, batched=True)
    found = numbers(scorer.neighbourhood(rows, neighbours=2, seed=3), "sifd_mean")
    expected = [np.mean(of_row) if of_row else np.nan for of_row in looped(model, scorer, rows, 0.5, 2, 5.0, 3)]
    np.testing.assert_allclose(found, expected, rtol=1e-4)


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"share": 50}, "share is a share of all tokens"),
        ({"neighbours": 0}, "neighbours must be a whole number of at least 1, got 0"),
        ({"alpha": -1}, "alpha is the size of noise, a number of at least 0, got -1"),
        ({"alpha": float("nan")}, "alpha is the size of noise"),
    ],
)
def test_what_neighbours_cannot_have_is_refused(scorer, options, words):
    with pytest.raises(ValueError, match=words):
        scorer.neighbourhood(Dataset.from_dict(TEXTS), **options)


def test_rows_without_losses_of_tokens_or_with_those_of_another_reading_are_refused(scorer, model, tokenizer):
    with pytest.raises(ValueError, match="The rows have no cas_tokens and no das_tokens"):
        scorer.neighbourhood(Dataset.from_dict(TEXTS).map(IFDScorer(model, tokenizer), batched=True))
    rows = Dataset.from_dict(TEXTS).map(scorer, batched=True)
    with pytest.raises(ValueError, match=r"Row 0 has losses of \d+ tokens, and this scorer reads 0 in its answer"):
        IFDScorer(model, tokenizer, max_length=8).neighbourhood(rows)
    with pytest.raises(ValueError, match="token_losses go with definition='paper'"):
        IFDScorer(model, tokenizer, definition="cherry").neighbourhood(rows)


@pytest.mark.parametrize(
    ("embedding", "words"),
    [
        (lambda model: torch.nn.Embedding(4, 4), "a forward called its embedding 0 times"),
        (lambda model: model.model.layers[1].input_layernorm, "a forward called its embedding 2 times"),
        (lambda model: model.lm_head, "it gave embeddings of the shape"),
        (lambda model: None, "it does not tell its input embeddings"),
    ],
    ids=["unused", "twice", "other shape", "not told"],
)
def test_a_model_whose_embeddings_cannot_be_disturbed_is_refused(scorer, model, embedding, words, monkeypatch):
    rows = Dataset.from_dict(TEXTS).map(scorer, batched=True)
    model.model.layers[0].input_layernorm = model.model.layers[1].input_layernorm  # for the one that is called twice
    told = embedding(model)
    monkeypatch.setattr(type(model), "get_input_embeddings", lambda self: told)
    with pytest.raises(ValueError, match=f"embeddings of LlamaForCausalLM cannot be disturbed: {words}"):
        scorer.neighbourhood(rows, neighbours=1)
