"""Scoring speed on a GPU, with random weights of real configurations, so that no hub and no data are needed:

    python tests/gpu/bench_scoring.py --output bench         # on a machine with a CUDA device; bench/scoring-cuda.json
    python tests/gpu/bench_scoring.py --device cpu --tiny    # a dry run of all of it in less than a minute

This package against one row at a time with full logits and a loop over tokens, and against padded batches of 8 in data
order: models from 0.1B to 8B on rows with Alpaca's lengths; and, with one of them, rows of different lengths,
vocabularies, token budgets, engines and numbers of rows. See `measuring.py` for what is counted.

For each model it also says how long ALPACA_ROWS rows take at the rate that was measured, and the least that they take
at the peak. For Llama 2 7B these rows are 10.8 million tokens, 9.2 million of them without the repeated preamble, and
need 1.2e17 operations: 153 s at 790 TFLOP/s, and 300 s at 51 % of that. To score them all instead:

    python tests/gpu/bench_scoring.py --models "Llama 2 7B" --rows 52000 --runs 1 --no-sweeps

Expected, by counting for an H100 (products at 88 % of 790 TFLOP/s, all else bound by memory at 85 % of 3.35 TB/s, no
waiting for the host): a share of the peak of 20 % for 135M, 48 % for 1B, 53 % for 3B, 61 to 65 % for 7B and 8B, and 244
s for the rows above. What the smaller models lose are the elementwise kernels (RMSNorm most of all: 36 bytes for each
element where one fused kernel takes 4) and the log-softmax over a large vocabulary (24 bytes for each logit, 4 fused).
One row at a time in bfloat16 waits for launches, whatever the model: 25 times are within reach up to about 1B, 7 with
7B, where products alone would give 12.

So far only the dry run was run: this project had no GPU at hand, and there are no figures from one.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the package need not be installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from measuring import (
    OURS,
    Case,
    Sweep,
    alpaca_like,
    long_definition,
    machine,
    matmul_peaks,
    measured,
    printed,
    sweeps,
    write,
)

from ifd_trainer.scoring.span_attention import varlen_kernel


def llama(**values: Any) -> LlamaConfig:
    """A Llama configuration whose head dimension follows from its heads."""
    return LlamaConfig(**values, max_position_embeddings=8192)


def qwen2(**values: Any) -> Qwen2Config:
    """A Qwen2 configuration."""
    return Qwen2Config(**values, max_position_embeddings=8192)


def config_of(make: Callable[..., PretrainedConfig], *sizes: int, tied: bool) -> PretrainedConfig:
    """From vocabulary, hidden size, intermediate size, layers, heads and key heads."""
    names = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads"
    return make(**dict(zip(names.split(), sizes, strict=True)), tie_word_embeddings=tied)


# Sizes as the models of these names publish them in their configurations.
CONFIGS = {
    "SmolLM2 135M": config_of(llama, 49152, 576, 1536, 30, 9, 3, tied=True),
    "Qwen2.5 0.5B": config_of(qwen2, 151936, 896, 4864, 24, 14, 2, tied=True),
    "Llama 3.2 1B": config_of(llama, 128256, 2048, 8192, 16, 32, 8, tied=True),
    "Qwen2.5 1.5B": config_of(qwen2, 151936, 1536, 8960, 28, 12, 2, tied=True),
    "Qwen2.5 3B": config_of(qwen2, 151936, 2048, 11008, 36, 16, 2, tied=True),
    "Llama 2 7B": config_of(llama, 32000, 4096, 11008, 32, 32, 32, tied=False),
    "Qwen2.5 7B": config_of(qwen2, 152064, 3584, 18944, 28, 28, 4, tied=False),
    "Llama 3.1 8B": config_of(llama, 128256, 4096, 14336, 32, 32, 8, tied=False),
}
TINY = {
    "tiny Llama": config_of(llama, 500, 32, 64, 2, 4, 2, tied=True),
    "tiny Qwen2": config_of(qwen2, 800, 32, 64, 2, 4, 2, tied=False),
}

MODELS = "model"  # the group of the models, one case each
ALPACA_ROWS = 52_000  # about as many as the data set has

SWEEP = Sweep(
    lengths=(64, 256, 1024, 4096),
    vocabularies=(32_000, 64_000, 128_000, 256_000),
    budgets=(2048, 4096, 8192, 16384, 32768, 65536, None),
    counts=(1000, 10_000),
    rows=2000,
    baseline_rows=32,
    tokens=2**18,
    runs=2,
)
TINY_SWEEP = Sweep((16, 40), (300, 600), (64, 256, None), (6, 12), rows=12, baseline_rows=4, scale=0.2, tokens=480)


def model_cases(
    configs: dict[str, PretrainedConfig], device: torch.device, dtype: torch.dtype, tiny: bool, rows: int
) -> Iterator[Case]:
    """Sizes of models."""
    for name, config in configs.items():
        rows_of_it = alpaca_like(rows, config.vocab_size, scale=0.2 if tiny else 1.0)
        yield Case(MODELS, name, builder(config, device, dtype), rows_of_it, 4 if tiny else 32)


def sweep_cases(
    configs: dict[str, PretrainedConfig], device: torch.device, dtype: torch.dtype, tiny: bool
) -> Iterator[Case]:
    """Sweeps with a model of 1B (the first one, if it is not among them)."""
    rows, few = (12, 4) if tiny else (2000, 32)
    name = "Llama 3.2 1B" if "Llama 3.2 1B" in configs else next(iter(configs))
    config = configs[name]

    def build(vocabulary: int | None) -> Callable[[], nn.Module]:
        resized = {**config.to_dict(), "vocab_size": vocabulary or config.vocab_size}
        return builder(type(config).from_dict(resized), device, dtype)

    yield from sweeps(name, build, config.vocab_size, TINY_SWEEP if tiny else SWEEP)
    # Whether not padding and computing shared beginnings once pays there, too.
    shared = long_definition(rows, config.vocab_size, definition=40 if tiny else 300)
    plain = alpaca_like(rows, config.vocab_size, scale=0.2 if tiny else 1.0)
    engines = ("padded",) if device.type == "cuda" and varlen_kernel(device) is None else ("padded", "stream")
    for label, one in (("Alpaca", plain), ("long definition", shared)):
        for engine in engines:
            yield Case(f"engine, {name}", f"{label}, {engine}", build(None), one, few, engine=engine, others=())


def whole_set(result: dict[str, Any], peak: float) -> dict[str, float]:
    """Seconds that ALPACA_ROWS such rows take: as many times as long as those measured, and at the peak."""
    ours = result["procedures"][OURS]
    times = ALPACA_ROWS / ours["rows"]
    return {
        "at the measured rate": times * statistics.median(ours["seconds"]),
        "at the peak": times * ours["operations"] / peak,
    }


def builder(config: PretrainedConfig, device: torch.device, dtype: torch.dtype) -> Callable[[], nn.Module]:
    """Makes the model on its device, with random weights."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        with device:
            return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()

    return build


def main(arguments: list[str] | None = None) -> None:
    """Measure all cases that fit; write and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda", help="default: cuda")
    parser.add_argument("--dtype", default="bfloat16", help="default: bfloat16")
    parser.add_argument("--runs", type=int, default=3, help="turns of all procedures (default 3)")
    parser.add_argument("--models", nargs="*", help=f"names among: {', '.join(CONFIGS)} (default: all)")
    parser.add_argument("--rows", type=int, help="rows for each model (default 2000)")
    parser.add_argument("--no-sweeps", action="store_true", help="the models only")
    parser.add_argument("--tiny", action="store_true", help="models and rows of no size: a dry run")
    parser.add_argument("--output", type=Path, default=Path("runs/bench"), help="folder (default runs/bench)")
    options = parser.parse_args(arguments)

    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    if device.type != "cpu" and not torch.get_device_module(device).is_available():
        raise SystemExit(f"There is no {device.type} device here. For a dry run: --device cpu --tiny")
    configs = TINY if options.tiny else CONFIGS
    for name in options.models or ():
        if name not in configs:
            raise SystemExit(f"No configuration is named {name!r}; there are: {', '.join(configs)}")
    configs = {name: config for name, config in configs.items() if not options.models or name in options.models}
    peaks = matmul_peaks(device, dtype, 128 if options.tiny else 8192)
    results: dict[str, Any] = {
        "machine": machine(device),
        "dtype": options.dtype,
        "peak_flops": max(peaks.values()),
        "matmul_flops": peaks,
        "tiny": options.tiny,
        "cases": [],
        "left_out": [],
    }
    began = time.perf_counter()
    rows = options.rows or (12 if options.tiny else 2000)
    cases = model_cases(configs, device, dtype, options.tiny, rows)
    if not options.no_sweeps:
        cases = chain(cases, sweep_cases(configs, device, dtype, options.tiny))
    for case in cases:
        try:
            result = measured(case, device, results["peak_flops"], options.runs)
            print(printed(result), flush=True)
            if case.group == MODELS:
                result["whole_set_seconds"] = whole_set(result, results["peak_flops"])
                seconds = ", ".join(f"{value:.3g} s {how}" for how, value in result["whole_set_seconds"].items())
                print(f"  {ALPACA_ROWS} such rows: {seconds}", flush=True)
            results["cases"].append(result)
        except torch.OutOfMemoryError as error:
            results["left_out"].append({"group": case.group, "label": case.label, "reason": str(error)[:300]})
            print(f"{case.group}: {case.label}\n  out of memory", flush=True)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        # After each case: a run that ends early has written what it measured.
        if results["cases"]:
            write(options.output, f"scoring-{device.type}", results, plot=False)
    if results["cases"]:
        write(options.output, f"scoring-{device.type}", results)
    rate = max((case["procedures"][OURS]["tokens_per_s"][0] for case in results["cases"]), default=0)
    print(f"{len(results['cases'])} cases, fastest {rate:.0f} tok/s, {time.perf_counter() - began:.0f} s in all")
    print(f"Written: {options.output}/scoring-{device.type}.json and .png")


if __name__ == "__main__":
    main()
