"""Scores against a loop over single tokens with full logits, on token ids put together here and not by the package."""

from __future__ import annotations

import logging
import math
import random
import weakref
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROUNDING, SMALL, build_model, build_tokenizer, reference_nll
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForCausalLM,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    BlenderbotSmallConfig,
    BloomConfig,
    DogeConfig,
    FalconH1Config,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    Qwen2Config,
    RobertaConfig,
    RobertaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    XGLMConfig,
)

from ifd_trainer.data.encoding import EncodedPair, Encoder, Segment
from ifd_trainer.data.formats import ALPACA, MESSAGES, PROMPT_COMPLETION, SHAREGPT, WIZARDLM, Example
from ifd_trainer.errors import UserError
from ifd_trainer.method.reasons import Status
from ifd_trainer.scoring import engine as engine_module
from ifd_trainer.scoring.engine import check_causal_lm, streams
from ifd_trainer.scoring.eval_guard import eval_mode
from ifd_trainer.scoring.forward import LaunchedBatch, streamed
from ifd_trainer.scoring.losses import (
    MemoryLimit,
    Scores,
    answer_nll,
    nll_with_tails,
    prompt_features,
    run_in_turn,
    score_pairs,
    token_progress,
)
from ifd_trainer.scoring.model_parts import lm_head
from ifd_trainer.scoring.span_attention import NotExact
from ifd_trainer.scoring.transfer import HostCopy

CPU = torch.device("cpu")
MERGES = ('### Response:"Yes."',) * 40
TOKENIZERS = {
    "no BOS added": build_tokenizer(),
    "BOS added": build_tokenizer(add_bos=True),
    "no BOS": build_tokenizer(bos=False),
    "merging": build_tokenizer(add_bos=True, extra=MERGES),
}
NO_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response:"
)
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\n{}\n\n### Input:\n{}\n\n### Response:"
)
CHAT_HEADER = "<|im_start|>assistant\n"
# name: (format, row, prompt, answer, header, whether the tokenizer may add a BOS)
ROWS = {
    "alpaca": (
        ALPACA,
        {"instruction": "Name three colours.", "input": "", "output": "Red, green and blue."},
        NO_INPUT.format("Name three colours."),
        "Red, green and blue.",
        "### Response:",
        True,
    ),
    "alpaca with input": (
        ALPACA,
        {"instruction": "Add the numbers.", "input": "12 and 30", "output": "The sum is 42."},
        WITH_INPUT.format("Add the numbers.", "12 and 30"),
        "The sum is 42.",
        "### Response:",
        True,
    ),
    "alpaca with a quote": (
        ALPACA,
        {"instruction": "What did he say?", "input": None, "output": '"Yes."'},
        NO_INPUT.format("What did he say?"),
        '"Yes."',
        "### Response:",
        True,
    ),
    "wizardlm": (
        WIZARDLM,
        {"instruction": "Who sat on the mat?", "output": "The cat."},
        "Who sat on the mat?\n\n### Response:",
        "The cat.",
        "### Response:",
        True,
    ),
    "prompt-completion": (
        PROMPT_COMPLETION,
        {"prompt": "The cat sat on ", "completion": "the mat."},
        "The cat sat on ",
        "the mat.",
        "",
        True,
    ),
    "prompt-completion chat": (
        PROMPT_COMPLETION,
        {
            "prompt": [{"role": "user", "content": "Hi!"}],
            "completion": [{"role": "assistant", "content": "Hello 🙂"}],
        },
        f"<|im_start|>user\nHi!<|im_end|>\n{CHAT_HEADER}",
        "Hello 🙂<|im_end|>\n",
        CHAT_HEADER,
        False,
    ),
    "messages": (
        MESSAGES,
        {
            "messages": [
                {"role": "user", "content": "Name a colour."},
                {"role": "assistant", "content": "Red."},
                {"role": "user", "content": "Another."},
                {"role": "assistant", "content": "Blue."},
            ]
        },
        "<|im_start|>user\nName a colour.<|im_end|>\n<|im_start|>assistant\nRed.<|im_end|>\n"
        f"<|im_start|>user\nAnother.<|im_end|>\n{CHAT_HEADER}",
        "Blue.<|im_end|>\n",
        CHAT_HEADER,
        False,
    ),
    "sharegpt": (
        SHAREGPT,
        {"conversations": [{"from": "human", "value": "مرحبا"}, {"from": "gpt", "value": "你好, hello."}]},
        f"<|im_start|>user\nمرحبا<|im_end|>\n{CHAT_HEADER}",
        "你好, hello.<|im_end|>\n",
        CHAT_HEADER,
        False,
    ),
}


@pytest.fixture(scope="module")
def shared_model() -> LlamaForCausalLM:
    return build_model(400)


@pytest.fixture(params=["auto", "padded"])
def engine(request) -> str:
    return request.param


def paper_segments(tokenizer, prompt: str, answer: str, header: str, special: bool) -> list[tuple[list[int], int]]:
    """The definition in words: one tokenisation; the same answer tokens, without end-of-turn, behind the header."""
    alone = tokenizer(prompt, add_special_tokens=special)["input_ids"]
    whole = tokenizer(prompt + answer, add_special_tokens=special)["input_ids"]
    start = len(alone)
    while alone[:start] != whole[:start]:
        start -= 1
    if answer.endswith("<|im_end|>\n"):
        whole = whole[:-2]
    none = [tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id]
    before = tokenizer(header, add_special_tokens=special)["input_ids"] if header else none
    if header:
        before = before[: len(before) - (len(alone) - start)]  # without what merged into the answer's first token
    return [(whole, start), (before + whole[start:], len(before))]


def cherry_segments(tokenizer, prompt: str, counted: str, answer: str, max_length: int) -> list[tuple[list[int], int]]:
    """As in the published program: the prompt is counted, the direct text is cut at what is left and four tokens."""
    used = min(len(tokenizer(counted)["input_ids"]), max_length)
    direct = tokenizer("### Response:" + answer)["input_ids"][: max_length - used + 4]
    whole = tokenizer(prompt + answer)["input_ids"][:max_length]
    return [(whole, len(tokenizer(prompt)["input_ids"])), (direct, len(tokenizer("### Response:")["input_ids"]))]


def superfiltering_segments(tokenizer, prompt: str, answer: str, max_length: int) -> list[tuple[list[int], int]]:
    """As in the published program: the answer alone, in which a first token has nothing to be predicted from."""
    size = len(tokenizer(prompt)["input_ids"])
    whole = tokenizer(prompt + answer)["input_ids"][:max_length]
    return [(whole, size), (tokenizer(answer)["input_ids"][: max_length - size + 1], 1)]


def assert_scores(scores: Scores, model, expected: list[list[tuple[list[int], int]]]) -> None:
    assert scores.ifd_status.tolist() == ["ok"] * len(expected)
    cas, das = np.array([[reference_nll(model, *segment) for segment in pair] for pair in expected]).T
    np.testing.assert_allclose(scores.cas, cas, rtol=ROUNDING)
    np.testing.assert_allclose(scores.das, das, rtol=ROUNDING)
    np.testing.assert_allclose(scores.ifd, cas / das, rtol=ROUNDING)
    np.testing.assert_allclose(scores.ifd_ppl, np.exp(cas - das), rtol=ROUNDING)
    assert scores.answer_tokens.tolist() == [len(ids) - start for (ids, start), _ in expected]


def some_segments(count: int = 12, seed: int = 0) -> list[Segment]:
    """Segments of 2 to 40 tokens, some with a common beginning."""
    rng = np.random.default_rng(seed)
    head = rng.integers(4, 400, 20).tolist()
    segments = []
    for i in range(count):
        ids = head[: rng.integers(0, 20)] * (i % 2) + rng.integers(4, 400, rng.integers(2, 20)).tolist()
        segments.append(Segment(ids, int(rng.integers(1, len(ids)))))
    return segments


def expected_nll(model, segments: list[Segment]) -> list[float]:
    return [reference_nll(model, segment.ids, segment.start) for segment in segments]


# ---- every format and definition --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(ROWS))
@pytest.mark.parametrize("kind", sorted(TOKENIZERS))
def test_paper_scores_of_every_format(shared_model, kind, name):
    tokenizer = TOKENIZERS[kind]
    format, row, *texts = ROWS[name]
    pairs = Encoder(tokenizer)([format.render(row, tokenizer)])
    assert_scores(score_pairs(shared_model, pairs), shared_model, [paper_segments(tokenizer, *texts)])


@pytest.mark.parametrize("budget", [1, 64, 10**6])
@pytest.mark.parametrize("side", ["left", "right"])
def test_paper_scores_of_a_mixed_batch(shared_model, engine, budget, side):
    tokenizer = build_tokenizer()
    tokenizer.padding_side = side
    pairs = Encoder(tokenizer)([format.render(row, tokenizer) for format, row, *_ in ROWS.values()])
    scores = score_pairs(shared_model, pairs, token_budget=budget, engine=engine)
    assert_scores(scores, shared_model, [paper_segments(tokenizer, *texts) for _, _, *texts in ROWS.values()])
    assert tokenizer.padding_side == side


@pytest.mark.parametrize("kind", sorted(TOKENIZERS))
@pytest.mark.parametrize("max_length", [512, 70])
def test_cherry_scores(shared_model, kind, max_length):
    tokenizer = TOKENIZERS[kind]
    rows = [
        ({"instruction": "Name three colours.", "output": "Red, green."}, "Name three colours."),
        ({"instruction": "What did he say?", "output": '"Yes."'}, "What did he say?"),
    ]
    if tokenizer("")["input_ids"]:  # without a BOS the program skips what it cuts
        rows.append(({"instruction": "Count.", "output": "one two three " * 40}, "Count."))
    pairs = Encoder(tokenizer, "cherry", max_length)([WIZARDLM.render(row) for row, _ in rows])
    expected = [
        cherry_segments(tokenizer, f"{counted}\n\n### Response:", counted, row["output"], max_length)
        for row, counted in rows
    ]
    assert_scores(score_pairs(shared_model, pairs), shared_model, expected)


def test_cherry_scores_of_alpaca_rows(shared_model):
    tokenizer = TOKENIZERS["BOS added"]
    format, row, prompt, answer, _, _ = ROWS["alpaca with input"]
    pairs = Encoder(tokenizer, "cherry")([format.render(row)])
    expected = cherry_segments(tokenizer, prompt, prompt, answer, 512)
    assert_scores(score_pairs(shared_model, pairs), shared_model, [expected])


@pytest.mark.parametrize("kind", sorted(TOKENIZERS))
@pytest.mark.parametrize("max_length", [1024, 30])
def test_superfiltering_scores(shared_model, kind, max_length):
    tokenizer = TOKENIZERS[kind]
    texts = [("Name three colours.\n", "Red, green."), ("Add.\n12, 30\n", "42."), ("Count.\n", "one two three " * 9)]
    pairs = Encoder(tokenizer, "superfiltering", max_length)([Example(*text) for text in texts])
    expected = [superfiltering_segments(tokenizer, *text, max_length) for text in texts]
    assert_scores(score_pairs(shared_model, pairs), shared_model, expected)


# ---- batches ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [1, 7, 64, 10**6, None])
def test_nll_of_any_segments_in_any_batches(shared_model, engine, budget):
    segments = some_segments()
    found = answer_nll(shared_model, segments, token_budget=budget, engine=engine)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected_nll(shared_model, segments), rtol=ROUNDING)


@pytest.mark.parametrize("budget", [1, 64, 10**6])
def test_a_tail_is_scored_apart_and_as_a_whole(shared_model, engine, budget):
    segments = some_segments(16)
    tailed = [Segment([*s.ids, 2, 7][: len(s.ids) + n % 3], s.start, n % 3) for n, s in enumerate(segments)]
    nll, tail_nll = nll_with_tails(shared_model, tailed, token_budget=budget, engine=engine)
    np.testing.assert_allclose(nll, expected_nll(shared_model, segments), rtol=ROUNDING)
    for segment, found in zip(tailed, tail_nll, strict=True):
        ends = len(segment.ids) - segment.tail
        expected = segment.tail * reference_nll(shared_model, segment.ids, ends) if segment.tail else math.nan
        np.testing.assert_allclose(found, expected, rtol=ROUNDING)


def test_the_end_of_turn_loss_is_no_part_of_the_answers(shared_model, engine):
    pairs = pairs_of(some_segments(8))
    ended = [replace(pair, ending=(2,) * n) for n, pair in enumerate(pairs)]
    expected, found = (score_pairs(shared_model, rows, engine=engine) for rows in (pairs, ended))
    for name in ("cas", "das", "ifd", "ifd_ppl"):
        np.testing.assert_allclose(found.columns()[name], expected.columns()[name], rtol=ROUNDING)
    assert found.answer_tokens.tolist() == expected.answer_tokens.tolist()
    assert np.isnan(expected.eot_loss).all()
    ids = [[*pair.conditioned.ids, *[2] * n] for n, pair in enumerate(pairs)]
    losses = [n * reference_nll(shared_model, row, len(row) - n) if n else math.nan for n, row in enumerate(ids)]
    np.testing.assert_allclose(found.eot_loss, losses, rtol=ROUNDING)


def test_nll_of_token_probabilities_worked_by_hand():
    # p(7) = 1/2, p(8) = 1/4, p(9) = 1/4 at every position.
    model = Fixed({7: math.log(2), 8: 0.0, 9: 0.0})
    found = answer_nll(model, [Segment([7, 7, 8], 1), Segment([7, 8, 9, 8], 2)])
    np.testing.assert_allclose(found, [1.5 * math.log(2), 2 * math.log(2)], rtol=ROUNDING)


@pytest.mark.parametrize("seed", [1, 2])
def test_order_of_rows_does_not_matter(shared_model, engine, seed):
    segments = some_segments()
    order = np.random.default_rng(seed).permutation(len(segments))
    expected = answer_nll(shared_model, segments, token_budget=64, engine=engine)
    found = answer_nll(shared_model, [segments[i] for i in order], token_budget=64, engine=engine)
    np.testing.assert_allclose(found, expected[order], rtol=ROUNDING)


def test_equal_rows_get_equal_scores(shared_model, engine):
    segments = some_segments(3) * 3
    found = answer_nll(shared_model, segments, engine=engine)
    np.testing.assert_allclose(found, np.tile(expected_nll(shared_model, segments[:3]), 3), rtol=ROUNDING)


def test_a_token_that_pads_elsewhere_is_scored_like_any_other(shared_model, engine):
    segments = [Segment([5, 0, 0, 6, 0], 1), Segment([0, 0], 1), Segment([5, 6, 7, 8, 9, 10, 11], 3)]
    found = answer_nll(shared_model, segments, engine=engine)
    np.testing.assert_allclose(found, expected_nll(shared_model, segments), rtol=ROUNDING)


@pytest.mark.parametrize("pairs", [[], [EncodedPair(status=Status.EMPTY_ANSWER)] * 2])
def test_nothing_to_score(shared_model, pairs):
    scores = score_pairs(shared_model, pairs)
    assert len(scores) == len(pairs)
    assert np.isnan(scores.cas).all()
    assert scores.ifd_status.tolist() == ["empty_answer"] * len(pairs)


def test_progress_counts_every_token_once(shared_model, engine):
    pairs = [EncodedPair(a, b) for a, b in zip(some_segments(6), some_segments(6, seed=1), strict=True)]
    pairs.insert(2, EncodedPair(status=Status.TRUNCATED))
    done = []
    score_pairs(shared_model, pairs, token_budget=64, progress=done.append, engine=engine)
    total = sum(len(pair.conditioned.ids) + len(pair.direct.ids) for pair in pairs if pair.conditioned)
    assert len(done) > 1
    assert sum(done) == total
    with token_progress(pairs, "x", enabled=False) as bar:
        assert bar.total == total


@pytest.mark.parametrize("count", [0, 6])
def test_forwards_that_other_processes_need_change_no_score(engine, count):
    model, segments, asked, ran = build_model(400), some_segments(count), [], []
    pairs = [EncodedPair(segment, segment) for segment in segments]
    answer_nll(model, some_segments(1), engine=engine)  # so that what is tried out once is not counted
    model.register_forward_pre_hook(lambda *_: ran.append(len(asked)))

    def forwards(batches):
        asked.append(batches)
        return batches + 3

    scores = score_pairs(model, pairs, token_budget=64, engine=engine, forwards=forwards)
    assert len(asked) == 1
    assert ran == [1] * (asked[0] + 3)  # asked before the first forward
    np.testing.assert_allclose(scores.cas, expected_nll(model, segments), rtol=ROUNDING)


@pytest.mark.parametrize("counted", [False, True])
def test_a_process_without_rows_tries_the_engines_like_the_others(counted):
    ran = [[], []]
    for calls, segments in zip(ran, (some_segments(2), []), strict=True):
        model = build_model(400)
        model.register_forward_pre_hook(lambda *_, calls=calls: calls.append(0))
        answer_nll(model, segments, forwards=(lambda batches: 1) if counted else None)
    assert (len(ran[0]) == len(ran[1])) is counted


def test_bfloat16_scores_are_near_those_of_float32(shared_model):
    segments = some_segments()
    found = answer_nll(build_model(400).to(torch.bfloat16), segments)
    np.testing.assert_allclose(found, expected_nll(shared_model, segments), rtol=0.05)


# ---- rows without a score ---------------------------------------------------------------------------------------


def pairs_of(segments: list[Segment]) -> list[EncodedPair]:
    return [EncodedPair(a, b) for a, b in zip(segments[0::2], segments[1::2], strict=True)]


def test_scores_are_nan_and_carry_the_status_where_there_is_no_pair(shared_model):
    good = pairs_of(some_segments(4))
    bad = [EncodedPair(status=status) for status in Status if status is not Status.OK]
    scores = score_pairs(shared_model, [good[0], *bad, good[1]])
    assert scores.ifd_status.tolist() == ["ok", *(pair.status.value for pair in bad), "ok"]
    for name in ("cas", "das", "ifd", "ifd_ppl"):
        assert np.isnan(scores.columns()[name]).tolist() == [False, *[True] * len(bad), False]
    assert scores.answer_tokens[1:-1].tolist() == [0] * len(bad)


def test_rows_without_a_pair_change_no_score(shared_model, engine):
    good = pairs_of(some_segments(8))
    bad = EncodedPair(status=Status.MALFORMED)
    expected = score_pairs(shared_model, good, engine=engine)
    found = score_pairs(shared_model, [good[0], bad, *good[1:3], bad, good[3]], engine=engine)
    for name, values in found.columns().items():
        np.testing.assert_array_equal(values[[0, 2, 3, 5]], expected.columns()[name])


def test_nan_weights_make_every_row_nonfinite(engine):
    model = build_model(400)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.fill_(math.nan)
    scores = score_pairs(model, pairs_of(some_segments(4)), engine=engine)
    assert scores.ifd_status.tolist() == ["nonfinite"] * 2
    assert np.isnan(np.stack([scores.cas, scores.das, scores.ifd, scores.ifd_ppl])).all()
    assert (scores.answer_tokens > 0).all()


@pytest.mark.parametrize("budget", [64, 10**6])
def test_a_token_without_a_finite_embedding_spoils_its_own_row_only(engine, budget):
    model = build_model(400)
    segments = some_segments(10)
    expected = score_pairs(model, pairs_of(segments), token_budget=budget, engine=engine)
    with torch.no_grad():
        model.model.embed_tokens.weight[399] = math.nan
    segments[4] = Segment([*segments[4].ids[:3], 399, *segments[4].ids[3:]], 2)
    assert all(399 not in segment.ids for i, segment in enumerate(segments) if i != 4)
    found = score_pairs(model, pairs_of(segments), token_budget=budget, engine=engine)
    assert found.ifd_status.tolist() == ["ok", "ok", "nonfinite", "ok", "ok"]
    others = [0, 1, 3, 4]
    np.testing.assert_allclose(found.cas[others], expected.cas[others], rtol=ROUNDING)
    np.testing.assert_allclose(found.das[others], expected.das[others], rtol=ROUNDING)


class Fixed(nn.Module):
    """The same logits at every position, minus infinity for all other tokens; no config, no LM head."""

    def __init__(self, logits: dict[int, float], vocabulary: int = 16) -> None:
        super().__init__()
        values = torch.full((vocabulary,), -math.inf)
        for token, value in logits.items():
            values[token] = value
        self.logits = nn.Parameter(values)

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, -1))


def test_an_answer_that_the_model_knows_by_heart_is_nonfinite():
    model = Fixed({7: 100.0, 8: 0.0})
    known, unknown = Segment([8, 7, 7], 1), Segment([7, 8, 8], 1)
    scores = score_pairs(model, [EncodedPair(known, known), EncodedPair(unknown, unknown), EncodedPair(known, unknown)])
    assert scores.ifd_status.tolist() == ["nonfinite", "ok", "ok"]
    np.testing.assert_allclose(scores.ifd, [np.nan, 1.0, 0.0], atol=1e-7)


def test_losses_leave_a_device_as_float32_and_in_the_order_of_their_segments():
    """An Apple GPU has no float64: only what is on the host is widened."""

    class OnDevice:
        device = torch.device("mps")

        def cpu(self):
            return torch.tensor([1.0, 2.0, 3.0, 4.0])

    batch = streamed([Segment([4, 5, 6], 1)] * 2, CPU)  # one place predicts a token of each
    assert batch.targets.tolist() == [5, 5, 6, 6]
    assert LaunchedBatch(batch, HostCopy(OnDevice()), None).nll().tolist() == [2.0, 3.0]


def test_results_are_copied_behind_what_computes_them_and_waited_for_alone(monkeypatch):
    """As on CUDA, whose copies stand in one queue with what is launched."""
    happened = []

    class Event:
        def record(self, stream):
            happened.append(f"record on {stream}")

        def synchronize(self):
            happened.append("wait")

    class OnDevice:
        device = torch.device("cuda")

        def to(self, device, non_blocking):
            happened.append(f"copy to {device}, {non_blocking=}")
            return torch.tensor([1.0])

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the stream of {device}")
    fetched = HostCopy(OnDevice())
    assert happened == ["copy to cpu, non_blocking=True", "record on the stream of cuda"]
    assert fetched.array().tolist() == [1.0]
    assert happened[2:] == ["wait"]


def test_an_impossible_token_is_nonfinite():
    possible, impossible = Segment([7, 7, 8], 1), Segment([7, 3], 1)
    scores = score_pairs(Fixed({7: 0.0, 8: 0.0}), [EncodedPair(impossible, possible), EncodedPair(possible, possible)])
    assert scores.ifd_status.tolist() == ["nonfinite", "ok"]


# ---- models of other kinds --------------------------------------------------------------------------------------


class HeadAsFunction(LlamaForCausalLM):
    """Multiplies with the head's weight without calling the head, so that a hook on it never runs."""

    def forward(self, input_ids=None, position_ids=None, use_cache=None, **kwargs):
        hidden = self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False)[0]
        return SimpleNamespace(logits=nn.functional.linear(hidden, self.lm_head.weight))


class NoHead(LlamaForCausalLM):
    def get_output_embeddings(self):
        return None


class RefusesToTell(LlamaForCausalLM):
    def get_output_embeddings(self):
        raise NotImplementedError


class SoftCapped(LlamaForCausalLM):
    """Changes its logits after the head, as Gemma and Cohere models do."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = 3.0 * torch.tanh(out.logits / 3.0)
        return out


@pytest.mark.parametrize("kind", [HeadAsFunction, NoHead, RefusesToTell, SoftCapped])
def test_models_with_unusual_heads(shared_model, engine, kind):
    model = kind(shared_model.config).eval()
    model.load_state_dict(shared_model.state_dict())
    segments = some_segments()
    found = answer_nll(model, segments, token_budget=64, engine=engine)
    np.testing.assert_allclose(found, expected_nll(model, segments), rtol=ROUNDING)


def test_lm_head(shared_model):
    assert lm_head(shared_model) is shared_model.lm_head
    assert lm_head(Fixed({7: 0.0})) is None
    assert lm_head(RefusesToTell(shared_model.config)) is None


def test_tied_embeddings(engine):
    model = build_model(400, tie_word_embeddings=True)
    segments = some_segments()
    found = answer_nll(model, segments, engine=engine)
    np.testing.assert_allclose(found, expected_nll(model, segments), rtol=ROUNDING)


def test_lora_adapters_are_part_of_the_model(engine):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = peft.get_peft_model(build_model(400), config)
    segments = some_segments()
    found = answer_nll(model, segments, token_budget=64, engine=engine)
    np.testing.assert_allclose(found, expected_nll(model, segments), rtol=ROUNDING)
    assert not np.allclose(found, expected_nll(build_model(400), segments), rtol=1e-3)


def in_front(model: nn.Module, segments: list[Segment]) -> list[float]:
    """Losses of segments from the logits of their own places, behind what a model puts in front of a row."""
    expected = []
    for segment in segments:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([segment.ids])).logits[0, -len(segment.ids) :].double()
        losses = -torch.log_softmax(logits, -1)[torch.arange(len(segment.ids) - 1), segment.ids[1:]]
        expected.append(losses[segment.start - 1 :].mean().item())
    return expected


VIRTUAL = {
    "prompt tuning": ("PromptTuningConfig", {}),
    "prefix tuning": ("PrefixTuningConfig", {}),
    "P-tuning": ("PromptEncoderConfig", {"encoder_hidden_size": 32}),
}


def with_virtual_tokens(kind: str, **overrides: object) -> nn.Module:
    peft = pytest.importorskip("peft")
    name, options = VIRTUAL[kind]
    config = getattr(peft, name)(task_type="CAUSAL_LM", num_virtual_tokens=5, **options)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return peft.get_peft_model(build_model(400, **overrides), config)


@pytest.mark.parametrize("kind", sorted(VIRTUAL))
def test_virtual_tokens_stand_in_front(engine, kind):
    model, segments = with_virtual_tokens(kind), some_segments(4)
    found = answer_nll(model, segments, token_budget=64, engine=engine)
    np.testing.assert_allclose(found, in_front(model, segments), rtol=ROUNDING)


@pytest.mark.filterwarnings("ignore:Position ids are not supported")  # as a user's would
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", sorted(VIRTUAL))
def test_rows_behind_virtual_tokens_are_no_stream_in_any_precision(kind, dtype):
    """Fresh weights hardly attend, so that losses are near whatever is attended to."""
    model, segments = with_virtual_tokens(kind, initializer_range=0.02).to(dtype), some_segments()
    assert not streams(model)
    found = answer_nll(model, segments)
    np.testing.assert_allclose(found, in_front(model, segments), rtol=ROUNDING if dtype == torch.float32 else 2e-4)


@pytest.mark.filterwarnings("ignore:Position ids are not supported")
@pytest.mark.parametrize("kind", ["prompt tuning", "prefix tuning"])
def test_a_stream_that_is_forced_on_other_tokens_is_an_error_and_no_number(kind):
    with pytest.raises(NotExact, match="other tokens than those of the stream"):
        answer_nll(with_virtual_tokens(kind).bfloat16(), some_segments(), engine="stream")


def test_an_adapter_that_begins_at_tokens_of_a_row_is_no_stream():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], init_lora_weights=False, alora_invocation_tokens=[7, 8]
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = peft.get_peft_model(build_model(400), config)
    segments = [Segment([*s.ids[:1], 7, 8, *s.ids[1:]], s.start) for s in some_segments()]
    found = answer_nll(model, segments)
    np.testing.assert_allclose(found, expected_nll(model, segments), rtol=ROUNDING)
    with model.disable_adapter():
        assert not np.allclose(found, expected_nll(model, segments), rtol=1e-3)


# ---- no trace ---------------------------------------------------------------------------------------------------


def test_every_module_gets_its_own_mode_back(engine):
    model = build_model(400).train()
    model.model.layers[0].eval()
    model.lm_head.eval()
    before = [module.training for module in model.modules()]
    answer_nll(model, some_segments(), engine=engine)
    assert [module.training for module in model.modules()] == before
    assert len(set(before)) == 2


def test_modes_come_back_after_an_error():
    model = build_model(400).train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]

    def fail() -> None:
        with eval_mode(model, torch.device("cpu")):
            assert not any(module.training for module in model.modules())
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail()
    assert [module.training for module in model.modules()] == before


def test_dropout_is_off_while_scoring(engine):
    model = build_model(400, attention_dropout=0.9).train()
    segments = some_segments()
    found = answer_nll(model, segments, engine=engine)
    assert model.training
    np.testing.assert_allclose(found, expected_nll(model, segments), rtol=ROUNDING)


def random_states() -> list[str]:
    return [str(random.getstate()), str(np.random.get_state()), str(torch.get_rng_state().tolist())]  # noqa: NPY002


def test_random_states_are_as_before_even_if_the_model_draws(engine):
    model, drawn = build_model(400), []
    model.lm_head.register_forward_hook(lambda module, inputs, output: drawn.append(torch.rand(3)))
    before = random_states()
    answer_nll(model, some_segments(), engine=engine)
    assert drawn
    assert random_states() == before


def test_random_states_of_accelerators_are_as_before(monkeypatch):
    states = {0: "first", 1: "second", 2: "third"}
    module = SimpleNamespace(
        current_device=lambda: 2,
        get_rng_state=lambda device: states[device],
        set_rng_state=lambda state, device: states.__setitem__(device, state),
    )
    model = build_model(400)
    monkeypatch.setattr(torch, "get_device_module", lambda kind: module)
    monkeypatch.setattr(torch, "cuda", module)  # where PyTorch 2.6 looks
    with eval_mode(model, torch.device("cuda")):  # the model's weights are on the CPU, as with offloading
        states.update({0: "a", 1: "b", 2: "c"})
    assert states == {0: "a", 1: "b", 2: "third"}
    monkeypatch.setattr(model, "parameters", lambda: [SimpleNamespace(device=torch.device("cuda", 1))])
    with eval_mode(model, torch.device("cuda", 0)):
        states.update({0: "d", 1: "e", 2: "f"})
    assert states == {0: "a", 1: "b", 2: "f"}


def test_gradients_and_config_are_as_before(engine):
    model = build_model(400)
    model.lm_head.weight.requires_grad_(False)
    model.model.embed_tokens.weight.grad = torch.ones_like(model.model.embed_tokens.weight)
    wanted = [p.requires_grad for p in model.parameters()]
    config, attention = model.config.to_dict(), model.config._attn_implementation
    answer_nll(model, some_segments(), engine=engine)
    assert [p.requires_grad for p in model.parameters()] == wanted
    assert (model.model.embed_tokens.weight.grad == 1).all()
    assert (model.config.to_dict(), model.config._attn_implementation) == (config, attention)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("use_cache", [True, False])
def test_no_key_value_cache_is_built_and_no_setting_or_hook_is_left_behind(engine, use_cache):
    model, caches = build_model(400), []
    model.config.use_cache = use_cache
    watch = model.register_forward_hook(lambda module, inputs, output: caches.append(output.past_key_values))
    answer_nll(model, some_segments(), engine=engine)
    watch.remove()
    assert set(caches) == {None}
    assert model.config.use_cache is use_cache
    assert all(not module._forward_pre_hooks and not module._forward_hooks for module in model.modules())


def test_weights_and_later_losses_are_as_before(engine):
    model = build_model(400)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.tensor([some_segments(1)[0].ids])
    loss = model(input_ids=ids, labels=ids).loss
    answer_nll(model, some_segments(), engine=engine)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model(input_ids=ids, labels=ids).loss, loss)


# ---- out of memory ----------------------------------------------------------------------------------------------


def small_memory(model: nn.Module, tokens: int) -> list[int]:
    """Let `model` run out of memory above a number of tokens; the sizes that did fit."""
    sizes: list[int] = []

    def allocate(module, args, kwargs):
        size = kwargs["input_ids"].numel()
        if size > tokens:
            raise torch.OutOfMemoryError("on purpose")
        sizes.append(size)

    model.register_forward_pre_hook(allocate, with_kwargs=True)
    return sizes


def warnings_of(caplog) -> list[str]:
    return [record.message for record in caplog.records if record.name.startswith("ifd_trainer")]


@pytest.mark.parametrize("tokens", [45, 80, 150])
def test_out_of_memory_halves_batches_with_one_warning(shared_model, engine, caplog, tokens):
    caplog.set_level(logging.WARNING)
    model, segments = build_model(400), some_segments(20)
    answer_nll(model, segments[:1], engine=engine)
    sizes = small_memory(model, tokens)
    found = answer_nll(model, segments, token_budget=10**6, engine=engine)
    np.testing.assert_allclose(found, expected_nll(shared_model, segments), rtol=ROUNDING)
    assert len(sizes) > 1
    assert len(warnings_of(caplog)) == 1
    assert "memory" in warnings_of(caplog)[0]


def test_what_did_not_fit_once_is_not_tried_by_the_next_call(shared_model, engine, caplog):
    caplog.set_level(logging.WARNING)
    model, segments = build_model(400), some_segments(20)
    answer_nll(model, segments[:1], engine=engine)
    small_memory(model, 80)
    answer_nll(model, segments, token_budget=10**6, engine=engine)
    tried: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: tried.append(kwargs["input_ids"].numel()), with_kwargs=True, prepend=True
    )
    found = answer_nll(model, segments, token_budget=10**6, engine=engine)
    hook.remove()
    np.testing.assert_allclose(found, expected_nll(shared_model, segments), rtol=ROUNDING)
    assert sum(size > 80 for size in tried) <= 1  # the least that did not fit was just below twice as many
    assert len(warnings_of(caplog)) == 1


def in_turn(
    sizes: dict[int, int], batches: list[list[int]], fits: int, device: str = "mps"
) -> tuple[list[str], list[list[int]]]:
    """What happens in turn, and the rows of the forwards that fit, for rows of so many tokens."""
    happened, forwards = [], []

    def lay_out(rows):
        happened.append(f"laid out {rows.tolist()}")
        return SimpleNamespace(input_ids=np.empty((1, sum(sizes[row] for row in rows))))

    def launch(rows, batch):
        if batch.input_ids.size > fits:
            raise torch.OutOfMemoryError("on purpose")
        happened.append(f"launched {rows.tolist()}")
        return rows.tolist()

    for rows, pending in run_in_turn(
        lay_out, launch, [np.array(batch) for batch in batches], torch.device(device), MemoryLimit()
    ):
        assert rows.tolist() == pending
        happened.append(f"waited for {pending}")
        forwards.append(pending)
    return happened, forwards


def test_an_accelerator_has_its_next_batch_before_the_host_waits_for_the_last():
    happened, _ = in_turn({0: 5, 1: 5, 2: 5}, [[0], [1], [2]], fits=10, device="mps")
    assert happened == [
        *("laid out [0]", "launched [0]", "laid out [1]", "launched [1]", "waited for [0]"),
        *("laid out [2]", "launched [2]", "waited for [1]", "waited for [2]"),
    ]


def test_a_cpu_gives_each_result_at_once():
    happened, _ = in_turn({0: 5, 1: 5}, [[0], [1]], fits=10, device="cpu")
    assert happened == [
        *("laid out [0]", "launched [0]", "waited for [0]"),
        *("laid out [1]", "launched [1]", "waited for [1]"),
    ]


def test_what_is_halved_are_tokens_not_rows():
    """Two long rows do not fit; many short ones that are fewer tokens do. What is too large then is not tried."""
    sizes = {0: 60, 1: 60, **dict.fromkeys(range(2, 8), 9), 8: 40, 9: 40}
    happened, forwards = in_turn(sizes, [[0, 1], [*range(2, 8)], [8, 9]], fits=110)
    assert forwards == [[0], [1], [2, 3, 4, 5, 6, 7], [8], [9]]
    assert "launched [8, 9]" not in happened  # 80 tokens, more than half of the 120 that did not fit


def test_halves_that_are_not_of_quite_the_same_size_are_not_quartered():
    _, forwards = in_turn({0: 31, 1: 31, 2: 29, 3: 29}, [[0, 1, 2, 3]], fits=65)
    assert forwards == [[0, 1], [2, 3]]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=12), st.integers(1, 4), st.integers(50, 200))
def test_every_row_is_run_once_in_order_however_small_the_memory(sizes, rows, fits):
    batches = [list(range(start, min(start + rows, len(sizes)))) for start in range(0, len(sizes), rows)]
    _, forwards = in_turn(dict(enumerate(sizes)), batches, fits)
    assert [row for forward in forwards for row in forward] == list(range(len(sizes)))
    assert all(len(forward) == 1 or sum(sizes[row] for row in forward) <= fits for forward in forwards)


def test_what_a_failed_forward_held_is_gone_before_the_next_one():
    held = []

    class Activations:
        pass

    def launch(rows, batch):
        assert all(reference() is None for reference in held)
        activations = Activations()
        held.append(weakref.ref(activations))
        if len(rows) > 1:
            raise torch.OutOfMemoryError("on purpose")
        return rows

    batches = [np.array([0, 1])]
    found = list(run_in_turn(lambda rows: SimpleNamespace(input_ids=rows), launch, batches, CPU, MemoryLimit()))
    assert [rows.tolist() for rows, _ in found] == [[0], [1]]
    assert len(held) == 3


def test_enough_memory_gives_no_warning(shared_model, engine, caplog):
    caplog.set_level(logging.WARNING)
    answer_nll(shared_model, some_segments(20), engine=engine)
    assert warnings_of(caplog) == []


def test_a_single_row_that_does_not_fit_is_a_clear_error(engine):
    model = build_model(400).train()
    answer_nll(model, some_segments(1), engine=engine)
    small_memory(model, 3)
    with pytest.raises(torch.OutOfMemoryError, match=r"single row.*max_length"):
        answer_nll(model, some_segments(), engine=engine)
    assert model.training


def test_a_sharded_model_is_not_halved(engine, caplog):
    model = build_model(400)
    answer_nll(model, some_segments(1), engine=engine)
    sizes = small_memory(model, 45)
    with pytest.raises(torch.OutOfMemoryError, match=r"rows in a batch with a model whose weights.*token_budget"):
        answer_nll(model, some_segments(20), token_budget=10**6, engine=engine, sharded=True)
    assert sizes == []
    assert warnings_of(caplog) == []


def test_a_wrapper_around_the_model_is_what_runs(shared_model, engine):
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module, self.calls = module, 0

        def forward(self, *arguments, **options):
            self.calls += 1
            return self.module(*arguments, **options)

    wrapper = Wrapper(shared_model)
    found = answer_nll(wrapper, some_segments(), engine=engine)
    np.testing.assert_allclose(found, expected_nll(shared_model, some_segments()), rtol=ROUNDING)
    assert wrapper.calls > 0
    assert lm_head(wrapper) is shared_model.lm_head


def test_progress_counts_every_token_once_when_batches_are_halved(engine):
    model, segments, done = build_model(400), some_segments(20), []
    small_memory(model, 100)
    answer_nll(model, segments, token_budget=10**6, progress=done.append, engine=engine)
    assert sum(done) == sum(len(segment.ids) for segment in segments)


@pytest.mark.parametrize(
    ("config", "stream"),
    [
        (LlamaConfig(**SMALL), True),
        (Qwen2Config(**SMALL), True),
        (GPT2Config(vocab_size=400, n_embd=32, n_layer=2, n_head=4, n_positions=256, initializer_range=0.4), True),
        (MistralConfig(**SMALL, sliding_window=16), False),
        (Gemma2Config(**SMALL, head_dim=8), False),  # soft-capped scores and a sliding window
        (MambaConfig(vocab_size=400, hidden_size=32, num_hidden_layers=2, state_size=4), False),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, bool) else None,
)
def test_the_engine_is_chosen_so_that_every_architecture_gets_its_own_numbers(config, stream):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    rng = np.random.default_rng(0)
    preamble = rng.integers(5, 400, 30).tolist()
    segments = [Segment(preamble + rng.integers(5, 400, size).tolist(), 30) for size in (3, 9, 20, 40)]
    assert streams(model) is stream
    expected = [reference_nll(model, segment.ids, segment.start) for segment in segments]
    np.testing.assert_allclose(answer_nll(model, segments, device="cpu"), expected, rtol=ROUNDING)


@pytest.mark.parametrize(
    "config",
    [
        BloomConfig(vocab_size=400, hidden_size=32, n_layer=2, n_head=4),
        XGLMConfig(vocab_size=400, d_model=32, ffn_dim=48, num_layers=2, attention_heads=4),
        OpenAIGPTConfig(vocab_size=400, n_embd=32, n_layer=2, n_head=4, n_positions=128),
        FalconH1Config(
            **(SMALL | {"hidden_size": 32}), mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8
        ),
    ],
    ids=lambda config: type(config).__name__,
)
def test_fresh_weights_that_hardly_attend_do_not_pass_for_attention_by_the_plan(config):
    """What is tried out of a model then holds once it has been trained."""
    torch.manual_seed(0)
    model, segments = AutoModelForCausalLM.from_config(config).eval(), some_segments(12)
    assert not streams(model)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(10 if weight.ndim == 2 else 1)
    expected = [reference_nll(model, segment.ids, segment.start) for segment in segments]
    np.testing.assert_allclose(answer_nll(model, segments), expected, rtol=ROUNDING)


class Shifted(LlamaForCausalLM):
    """Adds a little of the token before to each token, wherever rows begin in a stream."""

    def forward(self, input_ids=None, **kwargs):
        embedded = self.model.embed_tokens(input_ids)
        before = torch.cat([torch.zeros_like(embedded[:, :1]), embedded[:, :-1]], 1)
        return super().forward(inputs_embeds=embedded + 0.01 * before, **kwargs)


FRESH = SMALL | {"initializer_range": 0.02}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "build",
    [
        lambda: Shifted(LlamaConfig(**FRESH)),
        # Positions of its own, which `position_ids` do not change.
        lambda: AutoModelForCausalLM.from_config(
            BlenderbotSmallConfig(
                vocab_size=400, d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48
            )
        ),
        # A mask that is computed from the hidden states, and is nothing before training.
        lambda: AutoModelForCausalLM.from_config(DogeConfig(**FRESH)),
    ],
    ids=["a token shift", "positions of its own", "a mask of its own"],
)
def test_rounding_does_not_hide_that_a_stream_is_not_exact(build, dtype):
    torch.manual_seed(0)
    assert not streams(build().eval().to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mixture_of_experts_is_causal_though_it_rounds_by_what_a_batch_holds(dtype):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MixtralConfig(**SMALL, num_local_experts=4)).eval().to(dtype)
    segments = some_segments()
    expected = expected_nll(model, segments)
    np.testing.assert_allclose(
        answer_nll(model, segments), expected, rtol=0.05 if dtype == torch.bfloat16 else ROUNDING
    )


# ---- what is no causal language model -----------------------------------------------------------------------------

TINY_BERT = {
    "vocab_size": 400,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spread", [0.02, 0.4])
def test_tokens_that_see_what_follows_are_found_out_by_their_numbers(monkeypatch, engine, dtype, spread):
    """Fresh weights hardly attend: a limit that leaves room for rounding lets them through."""
    monkeypatch.setattr(engine_module, "check_causal_lm", lambda model: None)
    torch.manual_seed(0)
    config = BertConfig(**TINY_BERT, initializer_range=spread)
    model = AutoModelForCausalLM.from_config(config).to(dtype).train()
    for _ in range(2):
        with pytest.raises(UserError, match=r"BertLMHeadModel lets tokens see those that follow.*decoder-only"):
            answer_nll(model, some_segments(3), engine=engine)
    config.is_decoder = True
    model = AutoModelForCausalLM.from_config(config).eval()
    segments = some_segments(3)
    np.testing.assert_allclose(answer_nll(model, segments), expected_nll(model, segments), rtol=ROUNDING)


T5 = {"vocab_size": 400, "d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
BART = {
    "vocab_size": 400,
    "d_model": 16,
    **{f"{side}_{name}": 2 for side in ("encoder", "decoder") for name in ("layers", "attention_heads")},
}
OTHERS = {
    "encoder-decoder": (lambda: T5ForConditionalGeneration(T5Config(**T5)), "is an encoder-decoder"),
    "encoder-decoder with a decoder of its own": (
        lambda: BartForConditionalGeneration(BartConfig(**BART)),
        "is an encoder-decoder",
    ),
    "classifier of texts": (lambda: LlamaForSequenceClassification(LlamaConfig(**SMALL)), "is a classifier"),
    "classifier of tokens": (lambda: LlamaForTokenClassification(LlamaConfig(**SMALL)), "is a classifier"),
    "masked": (lambda: BertForMaskedLM(BertConfig(**TINY_BERT)), "lets tokens see those that follow them"),
    "encoder with a causal head": (
        lambda: BertLMHeadModel(BertConfig(**TINY_BERT)),
        "lets tokens see those that follow them",
    ),
    "encoder with a causal head of its own": (
        lambda: RobertaForCausalLM(RobertaConfig(**TINY_BERT)),
        "lets tokens see those that follow them",
    ),
    "bidirectional": (
        lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=8, use_bidirectional_attention=True)),
        "lets tokens see those that follow them",
    ),
    "no head": (lambda: LlamaModel(LlamaConfig(**SMALL)), "has no language model head"),
}


class Around(nn.Module):
    """What a trainer puts around a model."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


@pytest.mark.parametrize("kind", sorted(OTHERS))
def test_each_kind_of_other_model_is_refused_in_a_sentence_about_it(kind):
    build, words = OTHERS[kind]
    model = build()
    wanted = rf"^{type(model).__name__} {words}.* Use a causal \(decoder-only\) language model"
    for one in (model, Around(model), torch.compile(model)):
        with pytest.raises(UserError, match=wanted):
            check_causal_lm(one)
        with pytest.raises(UserError, match=wanted):
            score_pairs(one, pairs_of(some_segments(2)))


def test_an_adapter_does_not_hide_a_classifier():
    peft = pytest.importorskip("peft")
    model = LlamaForSequenceClassification(LlamaConfig(**SMALL))
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"]))
    with pytest.raises(UserError, match=r"^LlamaForSequenceClassification is a classifier"):
        check_causal_lm(adapted)


@pytest.mark.parametrize(
    "build",
    [
        lambda: build_model(400),
        lambda: BertLMHeadModel(BertConfig(**TINY_BERT, is_decoder=True)),
        lambda: BartForCausalLM(BartConfig(**BART)),
        lambda: GPT2LMHeadModel(GPT2Config(vocab_size=400, n_embd=16, n_layer=1, n_head=2)),
        lambda: OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=400, n_embd=16, n_layer=1, n_head=2)),
        lambda: nn.Linear(2, 2),
    ],
)
def test_causal_language_models_and_what_tells_nothing_are_not_refused(build):
    assert check_causal_lm(build()) is None


# ---- prompts ----------------------------------------------------------------------------------------------------


def reference_features(model: nn.Module, ids: list[int]) -> tuple[np.ndarray, float]:
    """Mean of the last hidden states, and perplexity, of one prompt alone."""
    with torch.no_grad():
        out = model(torch.tensor([ids]), output_hidden_states=True)
    perplexity = math.exp(reference_nll(model, ids, 1)) if len(ids) > 1 else math.nan
    return out.hidden_states[-1][0].mean(0).numpy(), perplexity


def test_the_engine_is_chosen_anew_for_another_dtype():
    model, forwards = build_model(400), []
    model.register_forward_pre_hook(lambda *_: forwards.append(1))

    def tried() -> bool:
        forwards.clear()
        assert streams(model)
        return bool(forwards)

    assert [tried(), tried()] == [True, False]
    with torch.autocast("cpu", torch.bfloat16):
        assert [tried(), tried()] == [True, False]
    model.bfloat16()
    assert [tried(), tried()] == [True, False]
    model.float()
    assert not tried()


@pytest.mark.filterwarnings("ignore:Guards may run slower")  # what PyTorch says on Python 3.13.0
def test_a_compiled_model_is_run_as_it_is(shared_model):
    """Compiled, it would be compiled anew for each shape of a batch."""
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    segments = some_segments()
    for model in (torch.compile(shared_model, backend=backend), build_model(400)):
        model.compile(backend=backend)
        np.testing.assert_allclose(answer_nll(model, segments), expected_nll(shared_model, segments), rtol=ROUNDING)
    assert compiled == []
    if hasattr(torch.compiler, "is_exporting"):  # without it transformers 5 does not compile
        model(torch.tensor([[1, 2, 3]]))
        assert compiled != []
    torch.compiler.reset()


@pytest.mark.parametrize("budget", [1, 64, 10_000])
def test_features_of_prompts(shared_model, engine, budget):
    prompts = [segment.ids for segment in some_segments(12)] + [[5], [5, 6], []]
    embeddings, perplexity = prompt_features(shared_model, prompts, engine=engine, token_budget=budget)
    assert embeddings.shape == (15, shared_model.config.hidden_size)
    for ids, embedding, value in zip(prompts[:-1], embeddings, perplexity, strict=False):
        expected, ppl = reference_features(shared_model, ids)
        np.testing.assert_allclose(embedding, expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(value, ppl, rtol=1e-4)
    assert np.isnan(embeddings[-1]).all()
    assert np.isnan(perplexity[[12, 14]]).all()


def test_features_need_hidden_states():
    model = build_model(400)
    model.get_output_embeddings = lambda: None
    with pytest.raises(ValueError, match="LlamaForCausalLM does not tell its output embeddings"):
        prompt_features(model, [[1, 2]])


def test_features_behind_virtual_tokens_are_those_of_the_prompt(engine):
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(build_model(400), config)
    found, perplexity = prompt_features(model, [[4, 5, 6, 7], [8, 9]], engine=engine)
    assert found.shape == (2, 32)
    assert np.isfinite(found).all()
    assert np.isfinite(perplexity).all()
