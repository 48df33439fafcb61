"""What the benchmarks share: procedures, synthetic rows, arithmetic, clocks, and the JSON and PNG of a run.

All procedures of a case score rows of the same kind with the same model, in turn, several times; what is reported are
rates, and ratios of rates within one turn, with their median and range. Scores are compared too: a fast wrong number
is no result.

    share of peak = (2 * body weights * tokens + 2 * H * V * scored tokens) / seconds / peak

counts the multiplications that the scores need, without attention, padding and unscored positions; `tokens` are those
that ran where shared beginnings are computed once. The peak is that of a square matrix product in the same dtype by the
faster of PyTorch's own and oneDNN's (which scoring uses on a CPU), measured in the same run.
"""

from __future__ import annotations

import ctypes
import json
import platform
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from matplotlib.figure import Figure
from torch import nn

from ifd_trainer.data.encoding import EncodedPair, Segment
from ifd_trainer.scoring.engine import EngineName
from ifd_trainer.scoring.losses import score_pairs
from ifd_trainer.scoring.model_parts import lm_head
from ifd_trainer.scoring.onednn import OneDNN, available

OURS, ONE_ROW, PADDED = "this package", "one row at a time", "padded batches of 8"
_COLORS = {OURS: "#0072B2", ONE_ROW: "#D55E00", PADDED: "#009E73"}


# ---- procedures -------------------------------------------------------------------------------------------------


def one_row_at_a_time(model: nn.Module, segments: Sequence[Segment]) -> np.ndarray:
    """Full-vocabulary logits of one row, then a loop over its tokens: what the published programs do."""
    device = next(model.parameters()).device
    out = []
    for segment in segments:
        logits = model(torch.tensor([segment.ids], device=device)).logits[0]
        losses = []
        for i in range(segment.start, len(segment.ids)):
            losses.append(-torch.log_softmax(logits[i - 1].float(), dim=-1)[segment.ids[i]].item())
        out.append(sum(losses) / len(losses))
    return np.array(out)


def padded_batches(model: nn.Module, segments: Sequence[Segment], size: int = 8) -> np.ndarray:
    """Batches of 8 in data order, padded to their longest, with full-vocabulary logits."""
    device = next(model.parameters()).device
    out = []
    for first in range(0, len(segments), size):
        batch = segments[first : first + size]
        longest = max(len(segment.ids) for segment in batch)
        ids = torch.tensor([segment.ids + [0] * (longest - len(segment.ids)) for segment in batch])
        mask = torch.tensor([[1] * len(segment.ids) + [0] * (longest - len(segment.ids)) for segment in batch])
        logits = model(ids.to(device), attention_mask=mask.to(device)).logits
        for row, segment in enumerate(batch):
            target = torch.tensor(segment.ids[segment.start :], device=device)
            part = logits[row, segment.start - 1 : len(segment.ids) - 1].float()
            out.append(nn.functional.cross_entropy(part, target).item())
    return np.array(out)


def ours(
    model: nn.Module, pairs: Sequence[EncodedPair], token_budget: int | None = None, engine: EngineName = "auto"
) -> np.ndarray:
    """Both losses of each row, in the order of `segments_of`."""
    scores = score_pairs(model, pairs, token_budget=token_budget, engine=engine)
    return np.stack([scores.cas, scores.das], axis=1).ravel()


def segments_of(pairs: Sequence[EncodedPair]) -> list[Segment]:
    """Conditioned and direct segment of each row."""
    return [segment for pair in pairs for segment in (pair.conditioned, pair.direct)]


# ---- rows -------------------------------------------------------------------------------------------------------


def alpaca_like(rows: int, vocabulary: int, seed: int = 0, scale: float = 1.0) -> list[EncodedPair]:
    """Random tokens with lengths like those of Alpaca's rows.

    A preamble of 30 tokens that all rows share, an instruction (log-normal, median 15), for two of five rows an input
    (median 12), a header of 5 tokens, and an answer (median 45, sigma 1.0, at most 512 tokens). `scale` multiplies
    what is not shared.
    """
    rng = np.random.default_rng(seed)
    preamble, header = rng.integers(5, vocabulary, 30).tolist(), rng.integers(5, vocabulary, 5).tolist()

    def tokens(median: float, sigma: float, most: int) -> list[int]:
        size = int(np.clip(scale * median * np.exp(sigma * rng.normal()), 2, scale * most + 2))
        return rng.integers(5, vocabulary, size).tolist()

    pairs = []
    for _ in range(rows):
        prompt = preamble + tokens(15, 0.5, 200) + (tokens(12, 0.9, 300) if rng.random() < 0.4 else []) + header
        pairs.append(pair_of(prompt, tokens(45, 1.0, 512), header))
    return pairs


def fixed_length(rows: int, length: int, vocabulary: int, seed: int = 0) -> list[EncodedPair]:
    """Random rows of one length, of which half is the answer; nothing is shared but the last 5 prompt tokens."""
    rng = np.random.default_rng(seed)
    header = rng.integers(5, vocabulary, 5).tolist()
    half = max(length // 2, 6)
    draw = lambda size: rng.integers(5, vocabulary, size).tolist()  # noqa: E731
    return [pair_of(draw(half - 5) + header, draw(half), header) for _ in range(rows)]


def long_definition(rows: int, vocabulary: int, definition: int = 300, seed: int = 0) -> list[EncodedPair]:
    """Rows of one task: a definition that all share, an instance of 10 to 30 tokens, an answer of 1 to 5."""
    rng = np.random.default_rng(seed)
    task, header = rng.integers(5, vocabulary, definition).tolist(), rng.integers(5, vocabulary, 5).tolist()
    draw = lambda low, high: rng.integers(5, vocabulary, rng.integers(low, high + 1)).tolist()  # noqa: E731
    return [pair_of(task + draw(10, 30) + header, draw(1, 5), header) for _ in range(rows)]


def pair_of(prompt: list[int], answer: list[int], header: list[int]) -> EncodedPair:
    """A row from its token ids."""
    return EncodedPair(Segment(prompt + answer, len(prompt)), Segment(header + answer, len(header)))


# ---- the machine ------------------------------------------------------------------------------------------------


def synchronize(device: torch.device) -> None:
    """Wait for what was launched."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


def matmul_peaks(device: torch.device, dtype: torch.dtype, size: int, runs: int = 10) -> dict[str, float]:
    """Operations a second of a square matrix product, two for each multiplication and addition, by library.

    Each is that of the fastest of some runs.
    """
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

    def seconds(library: AbstractContextManager) -> float:
        with torch.no_grad(), library:
            synchronize(device)
            began = time.perf_counter()
            nn.functional.linear(a, b)
            synchronize(device)
            return time.perf_counter() - began

    libraries = {"PyTorch's own": nullcontext()}
    if device.type == "cpu" and dtype == torch.float32 and available():
        with torch.no_grad():
            libraries["oneDNN"] = OneDNN()
    # Two runs more: the first ones wake the device up.
    return {name: 2 * size**3 / min(seconds(library) for _ in range(runs + 2)) for name, library in libraries.items()}


def operations(model: nn.Module, tokens: int, scored: int) -> float:
    """What `tokens` through the body and `scored` through the LM head take; attention is left out."""
    head = lm_head(model)
    body = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear) and m is not head)
    return 2.0 * body * tokens + 2.0 * head.weight.numel() * scored


@contextmanager
def peak_bytes(device: torch.device) -> Iterator[list[int]]:
    """Puts the peak of memory over what was there before into the list; on a CPU, that of the process."""
    found: list[int] = []
    if device.type != "cpu":
        memory = torch.get_device_module(device)
        memory.empty_cache()
        before = memory.memory_allocated(device)
        memory.reset_peak_memory_stats(device)
        yield found
        synchronize(device)
        found.append(memory.max_memory_allocated(device) - before)
        return
    with suppress(OSError, AttributeError):  # glibc gives back what earlier cases have freed
        ctypes.CDLL(None).malloc_trim(0)
    process, done = psutil.Process(), threading.Event()
    before = peak = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, process.memory_info().rss)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        peak = max(peak, process.memory_info().rss)
        done.set()
        thread.join()
        found.append(peak - before)


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on."""
    if device.type == "cpu":
        name = platform.processor() or platform.machine()
        cpuinfo = Path("/proc/cpuinfo")
        if cpuinfo.exists():
            lines = cpuinfo.read_text().splitlines()
            name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    else:
        name = torch.get_device_module(device).get_device_name(device)
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "load": psutil.getloadavg()[0],
    }


# ---- cases ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One model and its rows.

    Attributes:
        group, label: where it stands in the plot.
        model: makes the model, in eval mode.
        pairs: rows for this package.
        baseline_rows: how many of the first rows the other procedures get; rates are compared.
        token_budget, engine: of ours.
        others: procedures to compare with.
        runs: at most so many turns.
    """

    group: str
    label: str
    model: Callable[[], nn.Module]
    pairs: Sequence[EncodedPair] = field(repr=False)
    baseline_rows: int | None = None
    token_budget: int | None = None
    engine: EngineName = "auto"
    others: tuple[str, ...] = (ONE_ROW, PADDED)
    runs: int | None = None


@dataclass(frozen=True)
class Sweep:
    """What is varied, with one model: values of each kind, and how many rows."""

    lengths: tuple[int, ...]
    vocabularies: tuple[int, ...]
    budgets: tuple[int | None, ...]
    counts: tuple[int, ...]
    rows: int
    baseline_rows: int
    scale: float = 1.0
    tokens: int = 2**19  # of all rows of one length
    runs: int | None = None


_BASELINE_LENGTH = 256  # tokens of a row; of longer ones the other procedures get fewer


def sweeps(
    name: str, build: Callable[[int | None], Callable[[], nn.Module]], vocabulary: int, how: Sweep
) -> list[Case]:
    """Cases over lengths of rows, vocabularies, token budgets and numbers of rows.

    Args:
        name: of the model.
        build: from a vocabulary, None for its own, to what makes the model.
        vocabulary: its own.
        how: the values.
    """
    own, found = build(None), []

    def add(
        group: str, label: str, model: Callable[[], nn.Module], pairs: Sequence[EncodedPair], **options: Any
    ) -> None:
        options = {"baseline_rows": how.baseline_rows, "runs": how.runs, **options}
        found.append(Case(f"{group}, {name}", label, model, pairs, **options))

    for length in how.lengths:
        pairs = fixed_length(max(how.tokens // length, 1), length, vocabulary)
        few = min(how.baseline_rows, max(_BASELINE_LENGTH * how.baseline_rows // length, 2))
        add("tokens of a row", str(length), own, pairs, baseline_rows=few)
    for size in how.vocabularies:
        add("vocabulary", str(size), build(size), alpaca_like(how.rows, size, scale=how.scale))
    pairs = alpaca_like(how.rows, vocabulary, scale=how.scale)
    for budget in how.budgets:
        label = "automatic" if budget is None else str(budget)
        add("token budget", label, own, pairs, token_budget=budget, others=())
    for count in how.counts:
        add("rows", str(count), own, alpaca_like(count, vocabulary, scale=how.scale), others=(ONE_ROW,))
    return found


def measured(case: Case, device: torch.device, peak: float, runs: int) -> dict[str, Any]:
    """Rates, shares of the peak, memory and ratios of a case."""
    model = case.model()
    few = case.pairs[: case.baseline_rows]
    rows = {OURS: case.pairs, ONE_ROW: few, PADDED: few}
    run = {
        OURS: lambda: ours(model, case.pairs, case.token_budget, case.engine),
        ONE_ROW: lambda: one_row_at_a_time(model, segments_of(few)),
        PADDED: lambda: padded_batches(model, segments_of(few)),
    }
    names = [OURS, *case.others]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    values, memory, ran = {}, {}, {}
    with torch.no_grad():
        ours(model, few[:1])  # what is tried out once is not counted
        for name in names:  # warms up, too
            with peak_bytes(device) as found:
                values[name] = run[name]()
            memory[name] = found[0]
        for _ in range(min(runs, case.runs or runs)):
            for name in names:
                tokens = _Tokens(model)
                synchronize(device)
                began = time.perf_counter()
                run[name]()
                synchronize(device)
                seconds[name].append(time.perf_counter() - began)
                ran[name] = tokens.close()
    result: dict[str, Any] = {"group": case.group, "label": case.label, "procedures": {}}
    rates = {}
    for name in names:
        segments = segments_of(rows[name])
        tokens, scored = sum(len(s.ids) for s in segments), sum(s.scored for s in segments)
        rates[name] = [tokens / s for s in seconds[name]]
        needed = operations(model, min(tokens, ran[name]), scored)
        result["procedures"][name] = {
            "rows": len(rows[name]),
            "tokens": tokens,
            "tokens_run": ran[name],
            "operations": needed,
            "seconds": seconds[name],
            "rows_per_s": len(rows[name]) / statistics.median(seconds[name]),
            "tokens_per_s": rates[name],
            "share_of_peak": needed / statistics.median(seconds[name]) / peak,
            "peak_bytes": memory[name],
            "ratio": [own / other for own, other in zip(rates[OURS], rates[name], strict=True)],
            "largest_relative_difference": float(np.abs(values[name] / values[OURS][: len(values[name])] - 1).max()),
        }
    return result


class _Tokens:
    """Counts the tokens, padding included, that a model is run on."""

    def __init__(self, model: nn.Module) -> None:
        self.count = 0
        self._hook = model.register_forward_pre_hook(self._forward, with_kwargs=True)

    def _forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.count += (args[0] if args else kwargs["input_ids"]).numel()

    def close(self) -> int:
        self._hook.remove()
        return self.count


# ---- results ----------------------------------------------------------------------------------------------------


def printed(result: dict[str, Any]) -> str:
    """A case as lines of a table."""
    lines = [f"{result['group']}: {result['label']}"]
    for name, found in result["procedures"].items():
        ratio = found["ratio"]
        lines.append(
            f"  {name:20s} {found['rows_per_s']:10.2f} rows/s {statistics.median(found['tokens_per_s']):12.0f} tok/s "
            f"{found['share_of_peak']:6.1%} of peak {found['peak_bytes'] / 2**20:8.0f} MiB   ours is "
            f"{statistics.median(ratio):.2f} times as fast ({min(ratio):.2f} to {max(ratio):.2f}), "
            f"differs by {found['largest_relative_difference']:.1e}"
        )
    return "\n".join(lines)


def write(folder: Path, name: str, results: dict[str, Any], plot: bool = True) -> None:
    """The results as `name`.json and, which takes a second or two, `name`.png."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if plot:
        drawn(results).savefig(folder / f"{name}.png", dpi=144)


def drawn(results: dict[str, Any]) -> Figure:
    """Tokens a second of each case and procedure, median and range; a panel for each group."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for case in results["cases"]:
        groups.setdefault(case["group"], []).append(case)
    figure = Figure(figsize=(8.0, 0.9 + 2.4 * len(groups)), layout="constrained")
    axes = figure.subplots(len(groups), 1, squeeze=False)[:, 0]
    for ax, (group, cases) in zip(axes, groups.items(), strict=True):
        for offset, name in zip((-0.12, 0, 0.12), _COLORS, strict=True):
            found = [(i, case["procedures"][name]) for i, case in enumerate(cases) if name in case["procedures"]]
            if not found:
                continue
            middle = np.array([statistics.median(one["tokens_per_s"]) for _, one in found])
            low = np.array([min(one["tokens_per_s"]) for _, one in found])
            high = np.array([max(one["tokens_per_s"]) for _, one in found])
            at = [i + offset for i, _ in found]
            ax.errorbar(
                at, middle, [middle - low, high - middle], fmt="o", ms=5, capsize=3, color=_COLORS[name], label=name
            )
        ax.set(title=group, ylabel="tokens / s", xlim=(-0.5, len(cases) - 0.5))
        ax.set_ylim(0, 1.08 * ax.get_ylim()[1])  # what a procedure gains is seen as a ratio of heights
        ax.yaxis.set_major_formatter("{x:,.0f}")
        ax.set_xticks(range(len(cases)), [case["label"] for case in cases])
        ax.grid(axis="y", color="#DDDDDD", lw=0.6)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.12))
    about = results["machine"]
    figure.suptitle(f"{about['device']}, {results['dtype']}, peak {results['peak_flops'] / 1e12:.2f} TFLOP/s")
    return figure
