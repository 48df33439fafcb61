"""A tiny causal LM and tokenizer built in the process, and the real 135M model where it is installed."""

from __future__ import annotations

import atexit
import functools
import gc
import os
import shutil
import tempfile

if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes that share the tests, and has one core
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# Rows that older code has read are not for these tests; a process that one of them starts has the cache of its parent.
if f"ifd_trainer_tests_{os.environ.get('PYTEST_XDIST_WORKER')}_" not in os.environ.get("HF_DATASETS_CACHE", ""):
    os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(
        prefix=f"ifd_trainer_tests_{os.environ.get('PYTEST_XDIST_WORKER')}_"
    )
    atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

from pathlib import Path

import accelerate.utils.imports
import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# The system outlives its processes, killed ones too. Waiting 6 ms for the disk, some twenty times in a tiny run, was a
# third of its time.
os.fsync = lambda file: None
# Whether a package is installed is read from the disk, some 40 times in a tiny run.
accelerate.utils.imports._is_package_available = functools.cache(accelerate.utils.imports._is_package_available)
settings.register_profile("ifd_trainer", derandomize=True, deadline=None, database=None, max_examples=60)
settings.load_profile("ifd_trainer")

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
# Largest relative difference of losses that are computed in float32 in two ways (other batches, engines, processes,
# processors): each way rounds differently. What is computed twice in the same way is compared exactly.
ROUNDING = 2e-5
DEVICE = os.environ.get("IFD_TEST_DEVICE", "cpu")  # "cuda" for the tests in tests/gpu

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = [
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    "Below is an instruction that describes a task, paired with an input that provides further context.",
    "### Instruction:\nName three colours.\n\n### Response:Red, green and blue.",
    "### Instruction:\nAdd the numbers.\n\n### Input:\n12 and 30\n\n### Response:The sum is 42.",
    'He said: "Yes." She said: "No." The answer is: "maybe".',
    "user assistant system The cat sat on the mat and the dog ran in the park with a ball.",
]


def pytest_collection_finish() -> None:
    """Let the million objects that imports have made be: each run of a trainer has all garbage collected."""
    gc.collect()
    gc.freeze()


def build_tokenizer(bos: bool = True, add_bos: bool = False, extra: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of about 400 tokens with a chat template.

    Args:
        bos: whether there is a BOS token at all.
        add_bos: whether it is put in front of every text, as Llama's tokenizer does.
        extra: texts to learn merges from, beside the corpus.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 3 + list(extra), trainer)
    if add_bos:
        from tokenizers.processors import TemplateProcessing

        tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>" if bos else None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_model(vocabulary: int, seed: int = 0, **overrides: object) -> LlamaForCausalLM:
    """A two-layer Llama with random weights, large enough for its losses to differ from row to row."""
    config = LlamaConfig(
        **{
            "vocab_size": vocabulary,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "initializer_range": 0.4,
            "bos_token_id": 3,
            "eos_token_id": 2,
            "pad_token_id": 0,
            **overrides,
        }
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


# What configs of many architectures take, for tiny models.
SMALL = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.4,
    "pad_token_id": 0,
}


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return build_model(len(tokenizer))


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real rows and reference values, where they are at hand."""
    if not (SHARED / "data").is_dir():
        pytest.skip("no folder of real rows beside the repository")
    return SHARED


@pytest.fixture(scope="session")
def real_model_path() -> Path:
    """Folder of the 135M model: $IFD_TEST_MODEL, else where the recipes put it."""
    named = os.environ.get("IFD_TEST_MODEL")
    candidates = [Path(named)] if named else []
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    candidates.append(cache / "ifd_trainer" / "smollm2-135m")
    for path in candidates:
        if path.is_dir():
            return path
    pytest.skip("no folder with the 135M model; set IFD_TEST_MODEL")


def product_widths(monkeypatch: pytest.MonkeyPatch, weight: torch.Tensor) -> list[int]:
    """A list that grows by the rows of a weight that each product with it, or with a part of it, takes."""
    widths, linear, memory = [], torch.nn.functional.linear, weight.untyped_storage().data_ptr()

    def noted(x: torch.Tensor, used: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if used.untyped_storage().data_ptr() == memory:
            widths.append(len(used))
        return linear(x, used, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", noted)
    return widths


def reference_nll(model: torch.nn.Module, ids: list[int], start: int) -> float:
    """Mean loss of ids[start:], one token at a time from full logits: independent of the package."""
    model.eval()
    with torch.no_grad():
        logits = model(torch.tensor([ids], device=next(model.parameters()).device)).logits[0].double()
    losses = [-torch.log_softmax(logits[i - 1], dim=-1)[ids[i]].item() for i in range(start, len(ids))]
    return sum(losses) / len(losses)
