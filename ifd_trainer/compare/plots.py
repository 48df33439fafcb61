"""Plots of a comparison: results, or the curves of its arms, to a matplotlib Figure."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from ..data.readable_text import shortened
from ..evaluation.measured import BASELINE
from ..evaluation.statistics import Difference
from ..report.plots import COLOURS, inside, new_figure
from .results import EQUAL, Curves, Results

_AXES = {"tokens": "tokens trained on", "compute": "seconds for training and scoring"}
# An arm's colour, marker and line; random rows have the first.
_STYLES = [
    ("ink", "o", "--"), ("blue", "s", "-"), ("orange", "D", "-"), ("green", "^", "-"), ("pink", "v", "-"),
    ("sky", "P", "-"), ("grey", "X", "-"), ("blue", "<", ":"), ("orange", ">", ":"), ("green", "*", ":"),
]  # fmt: skip
_ON_PAPER = {"facecolor": COLOURS["paper"], "edgecolor": "none", "pad": 1.5}  # of texts over lines
_FAR = 4.0  # times what others used, or differ by, from where on an arm would press them together
_ABOVE = 1.0  # times what the arms span, from where on the loss before training is left out of the picture


def plot_intervals(results: Results) -> Figure:
    """The difference of each arm from random rows, with its interval and what could have been shown, in each view.

    A difference that is shown has a filled dot.
    """
    names = [cost.arm for cost in results.costs if cost.arm != BASELINE]
    at = np.arange(len(names))
    figure, axes = new_figure(1.5 + 0.36 * max(len(names), 2), columns=len(EQUAL), sharey=True)
    for ax, (view, title) in zip(axes[0], EQUAL.items(), strict=True):
        found = {outcome.arm: outcome.against for outcome in results.of(view)}
        found = [found[name] for name in names]
        could, reach = np.array([each.smallest for each in found]), _reach(found)
        ax.barh(at, 2 * could, left=-could, height=0.62, color=COLOURS["grey"], alpha=0.4)
        ax.axvline(0, color=COLOURS["ink"], linewidth=1)
        for y, each in zip(at, found, strict=True):
            colour = COLOURS["ink"] if not each.shown else COLOURS["green" if each.mean < 0 else "orange"]
            face = colour if each.shown else COLOURS["paper"]
            ax.plot([each.low, each.high], [y, y], color=colour, linewidth=1.6)
            beyond = abs(each.mean) > reach
            x, marker = (math.copysign(0.97 * reach, each.mean), "<>"[each.mean > 0]) if beyond else (each.mean, "o")
            ax.plot([x], [y], marker, color=colour, markerfacecolor=face, markersize=6)
            if beyond:
                side = {"ha": "right" if each.mean > 0 else "left", "va": "center", "transform": ax.transData}
                side["bbox"] = _ON_PAPER
                inside(ax, 0.9 * x, y, f"{each.mean:+.{_digits(abs(each.mean))}f}", **side)
            place = {"transform": ax.get_yaxis_transform(), "va": "center"}
            inside(ax, 1.02, y, f"{each.smallest:.{_digits(each.smallest)}f}", **place)
        ax.set_title(title, fontsize=9, color=COLOURS["ink"])
        inside(ax, 1.02, 1.01, "could\nshow", fontsize=7)
        ax.xaxis.set_major_locator(MaxNLocator(4, symmetric=True))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+.6g}" if value else "0"))
        ax.set_xlim(-reach, reach)
        ax.set_xlabel("lower  <  0  <  higher")
        ax.tick_params(axis="y", length=0)
    axes[0, 0].set_yticks(at, [shortened(name, 24) for name in names], parse_math=False)
    axes[0, 0].set_ylim(len(names) - 0.4, -0.6)
    figure.supxlabel(f"held-out loss, less that with {BASELINE} rows (nats per token)", fontsize=9)
    return figure


def _reach(found: list[Difference]) -> float:
    """How far a panel reaches on both sides: to all intervals, but those of arms far from most others."""
    reached = [max(abs(each.low), abs(each.high), each.smallest) for each in found]
    return 1.05 * min(max(reached), _FAR * float(np.median(reached))) or 1.0


def plot_losses(curves: Curves) -> Figure:
    """The held-out loss against tokens and against seconds: each arm's mean of seeds, and each seed as a thin line."""
    figure, axes = new_figure(4.0, columns=len(_AXES), sharey=True)
    handles = []
    for number, (name, each) in enumerate(curves.by_arm.items()):
        colour, marker, line = _STYLES[number % len(_STYLES)]
        style = {"color": COLOURS[colour], "linestyle": line, "zorder": 3 if name == BASELINE else 2}
        losses = np.array(_of_equal_length([curves.mean(curve.losses) for curve in each]))  # (seeds, points)
        for ax, view in zip(axes[0], _AXES, strict=True):
            used = np.array(_of_equal_length([curve.used[view] for curve in each]))
            for x, y in zip(used, losses, strict=True):
                ax.plot(x, y, linewidth=0.7, alpha=0.45, **style)
            ax.plot(used.mean(axis=0), losses.mean(axis=0), marker=marker, markersize=4.5, linewidth=1.8, **style)
        text = shortened(name, 24).replace("$", r"\$")
        label = f" {text}" if text.startswith("_") else text  # which would not be listed
        handles.append(Line2D([], [], marker=marker, markersize=4.5, linewidth=1.8, label=label, **style))
    for ax, view in zip(axes[0], _AXES, strict=True):
        ax.set_xlabel(_AXES[view])
        _amounts(ax, [curve.used[view] for each in curves.by_arm.values() for curve in each])
    axes[0, 0].set_ylabel("held-out loss (nats per token)")
    _losses(axes[0], curves)
    figure.legend(handles=handles, loc="outside upper center", ncols=5, frameon=False, fontsize=8)
    return figure


def _of_equal_length(series: list) -> list:
    shortest = min(len(each) for each in series)
    return [list(each[:shortest]) for each in series]


def _digits(value: float) -> int:
    """Digits after the point that show at least two of a number's own.

    >>> _digits(0.163), _digits(0.0123)
    (3, 3)
    """
    return 3 if not value > 0 else int(np.clip(1 - math.floor(math.log10(value)), 3, 6))


def _amounts(ax: Axes, used: list[list[float]]) -> None:
    """The axis of what was used: linear, and where arms used far more than others, logarithmic but for its start."""
    ends, firsts = [each[-1] for each in used], [min(x for x in each if x > 0) for each in used if max(each) > 0]
    if max(ends) <= _FAR * min(ends):
        ax.set_xlim(left=0)
        ax.xaxis.set_major_locator(MaxNLocator(5))
    else:
        _mostly_logarithmic(ax, min(firsts), max(ends))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 10 else f"{value:g}"))


def _mostly_logarithmic(ax: Axes, start: float, end: float) -> None:
    ax.set_xscale("symlog", linthresh=start, linscale=0.5)
    powers = range(math.floor(math.log10(start)), math.ceil(math.log10(end)) + 1)
    step = (1, 3) if len(powers) < 4 else (1,)
    ticks = [n * 10.0**power for power in powers for n in step if start <= n * 10.0**power <= 1.1 * end]
    ax.xaxis.set_major_locator(FixedLocator([0.0, *ticks]))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlim(0, 1.15 * end)


def _losses(axes: np.ndarray, curves: Curves) -> None:
    """The axis of losses; a loss before training that is far above all others is written, and not drawn."""
    if curves.start is None:
        return
    before = float(curves.mean(curves.start))
    later = [curves.mean(curve.losses)[1:] for each in curves.by_arm.values() for curve in each]
    later = np.concatenate([losses for losses in later if len(losses)] or [np.array([before])])
    low, high = float(later.min()), float(later.max())
    if before - high > _ABOVE * (high - low) > 0:
        axes[0].set_ylim(low - 0.1 * (high - low), high + 0.35 * (high - low))
        for ax in axes:
            inside(ax, 0.99, 0.99, f"before training {before:.3f}, above", va="top", ha="right", bbox=_ON_PAPER)
    else:
        for ax in axes:
            ax.axhline(before, linestyle=":", linewidth=0.8, color=COLOURS["ink"])
        inside(axes[-1], 0.99, before, "before training", ha="right", transform=axes[-1].get_yaxis_transform())
