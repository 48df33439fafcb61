"""Plots of scores and selections: data frames to a matplotlib Figure; no pyplot, nothing global is touched.

A plot takes one data frame as `report.score_frames` describes it, one for each epoch (`{0: frame, 1: frame}`), or the
`History` of a run. What it returns is drawn by `figure.savefig("name.png")`, or `.svg`, or `.pdf`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from ..data.readable_text import shortened
from ..errors import UserError
from ..method.reasons import ABOVE_LIMIT, KEPT, MEANINGS, REDUNDANT
from ..method.scoring_health import rank_correlation
from ..training.history import History
from .score_frames import (
    LIMIT,
    SCORE_EQUATIONS,
    SCORE_NAMES,
    WITHOUT_GUARDS,
    Rows,
    by_epoch,
    cut_of,
    epoch_name,
    further_columns,
    held_out_losses,
    number_text,
    percent_text,
    rows_text,
)

_WIDTH, _DPI = 8.0, 192  # inches; at 192 the page shows two pixels of the file on one of its own
_BLUE, _SKY, _GREEN, _ORANGE, _GREY = "#0072b2", "#56b4e9", "#009e73", "#d55e00", "#b3b3b3"  # Okabe and Ito
_PINK = "#cc79a7"  # theirs too
_INK, _PAPER = "#333333", "#ffffff"
_ON_STRONG, _ON_PALE = "#fefefe", "#010101"  # numbers on bars: white and black, each with a name of its own
# What a page may give other values in the dark; see `report.figure_files`.
COLOURS = {
    "blue": _BLUE, "sky": _SKY, "green": _GREEN, "orange": _ORANGE, "grey": _GREY, "pink": _PINK, "ink": _INK,
    "paper": _PAPER, "on-strong": _ON_STRONG, "on-pale": _ON_PALE,
}  # fmt: skip
_FARTHEST = 3.0  # a histogram never reaches farther: perplexity ratios of short answers go to the thousands
_MOST_POINTS = 20_000
_VECTORS = 2_000  # points of a panel that a vector file holds one by one; more of them are an image in it


def plot_ifd_histogram(rows: Rows, *, score: str = "ifd", max_ifd: float | None = None) -> Figure:
    """How many rows have which score: one panel for each epoch (five at most), the cut in each of them.

    Scores beyond 3, or far beyond the 95th percentile, are not drawn; each panel says how many there are.

    Args:
        rows: scored rows, or such frames by epoch.
        score: "ifd", "ifd_ppl", or a further score that the rows have.
        max_ifd: the policy's limit; without one the line stands at 1, from where on the prompt does not help.
    """
    return histogram_of(by_epoch(rows, most=5), score, max_ifd)


def histogram_of(epochs: Mapping[Any, pd.DataFrame], score: str, max_ifd: float | None) -> Figure:
    """`plot_ifd_histogram` of rows that are normalised already; only the score, `kept` and `reason` are looked at."""
    values = pd.concat([frame[score] for frame in epochs.values()]).dropna()
    edges = _edges_of(values, score)
    figure, axes = new_figure(1.1 + 1.5 * max(len(epochs), 1.4), rows=len(epochs), sharex=True)
    for ax, (epoch, frame) in zip(axes[:, 0], epochs.items(), strict=True):
        groups = _groups(frame, score)
        ax.hist(
            [frame.loc[group.mask, score] for group in groups],
            bins=edges,
            stacked=True,
            color=[group.color for group in groups],
        )
        ax.set_ylabel(f"{epoch_name(epoch)}\nrows" if epoch is not None else "rows")
        ax.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        _score_lines(ax, edges, cut_of(frame, score), frame.attrs.get(LIMIT) or max_ifd)
        beyond = int((frame[score] > edges[-1]).sum())
        if beyond:
            inside(ax, 0.995, 0.88, f"{rows_text(beyond)} beyond {edges[-1]:.4g}", ha="right")
        if _say_if_empty(ax, frame[score]):
            ax.set_ylim(0, 1)
    own = score.replace("$", r"\$")  # no formula
    axes[-1, 0].set_xlabel(f"{SCORE_EQUATIONS[score]} (no unit)" if score in SCORE_EQUATIONS else own)
    axes[-1, 0].set_xlim(edges[0], edges[-1])
    _legend_of_groups(figure, epochs.values(), score)
    return figure


def plot_cas_das(rows: Rows, *, score: str = "ifd", max_ifd: float | None = None) -> Figure:
    """Conditioned against direct answer score (nats per token), with the lines of equal score at 1 and at the cut.

    Of several epochs the first and the last are shown. Of more than 20,000 rows a seeded sample is drawn.
    """
    epochs = by_epoch(rows, most=2)
    points = pd.concat([frame[["cas", "das"]] for frame in epochs.values()]).dropna()
    right, top = 1.05 * _reach(points["das"]), 1.05 * _reach(points["cas"])
    figure, axes = new_figure(4.3, columns=len(epochs), sharex=True, sharey=True)
    for ax, (epoch, frame) in zip(axes[0], epochs.items(), strict=True):
        drawn = _scatter(ax, frame, "das", "cas", score)
        cut = cut_of(frame, score)
        limit = frame.attrs.get(LIMIT) or max_ifd
        lines = [(1.0, "-", f"{SCORE_NAMES[score]} 1: cas = das"), (cut, "--", f"cut {_cut_text(cut, limit)}")]
        if score not in SCORE_EQUATIONS:  # another score does not follow from these two as a line
            lines, limit = [(1.0, "-", "cas = das")], None
        if limit is not None and limit != 1:
            lines.append((limit, ":", f"limit {limit:.4g}"))
        direct = np.linspace(0, right, 2)
        for level, style, text in lines:
            if level is not None:
                conditioned = direct + np.log(level) if score == "ifd_ppl" else level * direct
                ax.plot(direct, conditioned, style, color=_INK, linewidth=1, label=text)
        ax.legend(loc="upper left", frameon=False, fontsize=8)
        ax.set(xlim=(0, right), ylim=(0, top), xlabel="direct answer score, das (nats per token)")
        ax.set_title(_panel_title(epoch, drawn, frame[score]), fontsize=9, loc="left", color=_INK)
        beyond = int(((frame["das"] > right) | (frame["cas"] > top)).sum())
        if beyond:
            inside(ax, 0.99, 0.02, f"{rows_text(beyond)} beyond the axes", ha="right")
        _say_if_empty(ax, frame["cas"])
    axes[0, 0].set_ylabel("conditioned answer score, cas\n(nats per token)")
    _legend_of_groups(figure, epochs.values(), score)
    return figure


def plot_ifd_length(rows: Rows, *, score: str = "ifd") -> Figure:
    """The score against the number of answer tokens, with Spearman's rank correlation of the two.

    Of several epochs the first and the last are shown. Of more than 20,000 rows a seeded sample is drawn; the
    correlation is that of all.
    """
    epochs = by_epoch(rows, most=2)
    edges = _edges_of(pd.concat([frame[score] for frame in epochs.values()]).dropna(), score)
    figure, axes = new_figure(3.8, columns=len(epochs), sharex=True, sharey=True)
    for ax, (epoch, frame) in zip(axes[0], epochs.items(), strict=True):
        frame = frame.assign(answer_tokens=frame["answer_tokens"].where(frame["answer_tokens"] > 0))
        drawn = _scatter(ax, frame, "answer_tokens", score, score)
        rho = rank_correlation(frame["answer_tokens"], frame[score])
        title = f"{_panel_title(epoch, drawn, frame[score])}Spearman {number_text(rho, 2)}"
        ax.set_title(title, fontsize=9, loc="left", color=_INK)
        cut, beyond = cut_of(frame, score), int((frame[score] > edges[-1]).sum())
        if cut is not None and cut <= edges[-1]:
            ax.axhline(cut, linestyle="--", color=_INK, linewidth=1)
            inside(
                ax,
                1.01,
                cut,
                f"cut\n{_cut_text(cut, frame.attrs.get(LIMIT) or 1.0)}",
                va="center",
                transform=ax.get_yaxis_transform(),
            )
        if beyond:
            inside(ax, 0.01, 0.96, f"{rows_text(beyond)} beyond {edges[-1]:.4g}", va="top")
        _say_if_empty(ax, frame[score])
        ax.set(ylim=(edges[0], edges[-1]), xlabel="answer length (tokens, logarithmic)")
        _log_ticks(ax, frame.loc[frame[score].notna(), "answer_tokens"])
    axes[0, 0].set_ylabel(f"{SCORE_EQUATIONS[score]} (no unit)" if score in SCORE_EQUATIONS else score)
    _legend_of_groups(figure, epochs.values(), score)
    return figure


def plot_further_scores(rows: Rows) -> Figure:
    """How the further scores of rows are distributed, a panel for each; of several epochs the last one is shown.

    Values far beyond the 95th percentile are not drawn; each panel says how many there are.

    Raises:
        ValueError: for rows without further scores.
    """
    frame = list(by_epoch(rows).values())[-1]
    names = further_columns(frame)
    if not names:
        raise UserError("The rows have no further scores: name some when they are scored, scores=('ira',).")
    figure, axes = new_figure(0.6 + 1.9 * ((len(names) + 1) // 2), rows=(len(names) + 1) // 2, columns=2)
    for ax in axes.flat[len(names) :]:
        ax.set_visible(False)
    for ax, name in zip(axes.flat, names, strict=False):
        groups, edges = _groups(frame, name), _edges_of(frame[name].dropna(), name)
        parts = [frame.loc[group.mask, name] for group in groups]
        ax.hist(parts, bins=edges, stacked=True, color=[group.color for group in groups])
        ax.set(xlabel=name, ylabel="rows", xlim=(edges[0], edges[-1]))
        ax.xaxis.set_major_locator(MaxNLocator(5))
        ax.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        if beyond := int((frame[name] > edges[-1]).sum()):
            end = number_text(edges[-1], 0 if abs(edges[-1]) >= 100 else 2)
            inside(ax, 0.995, 0.88, f"{rows_text(beyond)} beyond {end}", ha="right")
    _legend_of_groups(figure, [frame], "ifd")
    return figure


def plot_kept_flow(
    epochs: Mapping[Any, pd.DataFrame] | History, *, sample: Collection[Any] = (), restart: int | None = None
) -> Figure:
    """How the kept rows change: for each epoch those kept again, back again and new, and below the axis those gone.

    "Again" and "gone" compare with the epoch before it in `epochs`.

    Args:
        epochs: rows by epoch.
        sample: epochs that trained on a sample drawn without scores; nothing is compared with these.
        restart: the epoch before which training started anew: a line stands there.

    Raises:
        ValueError: when the rows do not say what was kept.
    """
    flow = _flow(by_epoch(epochs), sample)
    figure, axes = new_figure(3.4)
    ax, at = axes[0, 0], np.arange(len(flow))
    base = np.zeros(len(flow))
    tallest = max(flow.drop(columns="gone").sum(axis=1).max(), flow["gone"].max(), 1) if len(flow) else 1
    styles = {
        "again": (_BLUE, _ON_STRONG, "kept in the epoch before too"),
        "back": (_SKY, _ON_PALE, "kept in an earlier epoch, not in the one before"),
        "new": (_GREEN, _ON_STRONG, "kept for the first time"),
        "gone": (_GREY, _ON_PALE, "kept in the epoch before, dropped now"),
    }
    if flow["sample"].any():
        styles = {"sample": (_PINK, _ON_PALE, "sample of the brief experience")} | styles
    for column, (color, ink, text) in styles.items():
        counts = flow[column].to_numpy()
        heights, bottoms = (-counts, np.zeros(len(flow))) if column == "gone" else (counts, base.copy())
        label = text if counts.any() else None  # the legend lists what is drawn
        ax.bar(at, heights, width=0.7, bottom=bottoms, color=color, label=label, edgecolor=_PAPER, linewidth=0.8)
        for x, count, height, bottom in zip(at, counts, heights, bottoms, strict=True):
            if count > 0.07 * tallest and len(flow) <= 16:
                ax.text(x, bottom + height / 2, f"{count:,}", ha="center", va="center", color=ink, fontsize=8)
        base += 0 if column == "gone" else counts
    ax.axhline(0, color=_INK, linewidth=0.8)
    anew = next((i for i, epoch in enumerate(flow.index) if restart is not None and epoch >= restart), 0)
    if anew:
        ax.axvline(anew - 0.5, linestyle="--", color=_INK, linewidth=1)
        where = {"transform": ax.get_xaxis_transform(), "va": "bottom"}
        inside(ax, anew - 0.5, 1.01, "training starts anew", ha="center", **where)
    ax.set_xlim(-0.6, max(len(flow), 1) - 0.4)
    step = -(-len(flow) // 20)
    ax.set_xticks(at[::step], [str(epoch) for epoch in flow.index[::step]])
    ax.set_xlabel("epoch")
    ax.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{abs(value):,.0f}"))
    ax.set_ylabel("rows")
    ax.set_ylim(-1.05 * flow["gone"].max() if flow["gone"].any() else 0, 1.05 * tallest)
    if ax.get_legend_handles_labels()[0]:
        figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    return figure


def _flow(epochs: Mapping[Any, pd.DataFrame], sample: Collection[Any]) -> pd.DataFrame:
    """Numbers of rows by epoch: `sample`, or `again`, `back`, `new` (together those kept) and `gone`."""
    counts, before, ever = [], set(), set()
    for epoch, rows in epochs.items():
        if "kept" not in rows:
            raise UserError("The rows do not say what was kept: they have no column `reason`.")
        kept = set(rows.loc[rows["kept"], "row_id"])
        if epoch in sample:
            counts.append([len(kept), 0, 0, 0, 0])
            continue
        parts = (kept & before, (kept & ever) - before, kept - ever, before - kept)
        counts.append([0, *(len(part) for part in parts)])
        before, ever = kept, ever | kept
    return pd.DataFrame(counts, index=list(epochs), columns=["sample", "again", "back", "new", "gone"], dtype=int)


def plot_held_out_loss(history: History) -> Figure:
    """The held-out loss of each evaluation set before training and after each epoch, in nats per token.

    Epochs of a brief experience are left out: the weights after it are the original ones again.

    Raises:
        ValueError: when the run measured none.
    """
    losses = held_out_losses(history)
    if losses.empty:
        raise UserError("The history holds no held-out loss: the trainer had no eval_dataset, or never evaluated.")
    figure, axes = new_figure(2.8)
    ax, at = axes[0, 0], np.arange(len(losses))
    for name, color, marker in zip(losses, (_BLUE, _ORANGE, _GREEN, _PINK, _SKY, _GREY), "oDs^vX", strict=False):
        known = losses[name].notna().to_numpy()
        ax.plot(at[known], losses[name][known], color=color, marker=marker, markersize=5, label=name)
        if len(losses) <= 16:
            for x, loss in zip(at[known], losses[name][known], strict=True):
                place = {"xytext": (0, 7), "textcoords": "offset points", "ha": "center"}
                ax.annotate(number_text(loss), (x, loss), fontsize=8, color=_INK, **place)
    step = -(-len(losses) // 20)
    ax.set_xticks(at[::step], list(losses.index[::step]))
    ax.margins(x=0.06, y=0.25)
    ax.set_xlabel("before training, and after each epoch")
    ax.set_ylabel("held-out loss\n(nats per token)")
    if len(losses.columns) > 1:
        figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    return figure


def plot_kept_by_label(shares: pd.DataFrame) -> Figure:
    """The share of each label's rows that was kept, beside the share of all rows; without guards, as a hollow mark.

    Args:
        shares: what `label_table` returns. Of more than 15 labels the most frequent are drawn, and of more than
            five epochs five, the first and the last included.
    """
    epochs = [column for column in shares.columns[1:] if not column.endswith(WITHOUT_GUARDS)]
    epochs = [epochs[i] for i in np.unique(np.linspace(0, len(epochs) - 1, 5).round().astype(int))] if epochs else []
    shown = shares.iloc[:15]
    thickness = 0.8 / max(len(epochs), 1)
    figure, axes = new_figure(1.2 + max(len(shown), 2) * max(0.3, 0.17 * len(epochs)))
    ax, at = axes[0, 0], np.arange(len(shown))
    shades = np.linspace(0.35, 1.0, len(epochs)) if len(epochs) > 1 else [1.0]
    for i, (epoch, shade) in enumerate(zip(epochs, shades, strict=False)):
        y = at - 0.4 + (i + 0.5) * thickness
        ax.barh(y, 100 * shown[epoch], height=0.9 * thickness, color=_BLUE, alpha=shade, label=epoch)
        without = epoch + WITHOUT_GUARDS
        if without in shown:
            label = "without guards, by the same scores" if epoch == epochs[0] else None
            ax.plot(
                100 * shown[without], y, "D", markersize=4, fillstyle="none", color=_ORANGE, label=label, clip_on=False
            )
        for height, share in zip(y, shown[epoch], strict=True):
            ax.annotate(
                percent_text(share),
                (100 * share, height),
                xytext=(3, 0),
                textcoords="offset points",
                va="center",
                fontsize=7,
                color=_INK,
                bbox={"facecolor": _PAPER, "edgecolor": "none", "pad": 0.5},  # over the dashed line
            )
    if epochs:
        overall = 100 * (shares[epochs[-1]] * shares["rows"]).sum() / shares["rows"].sum()
        ax.axvline(overall, linestyle="--", color=_INK, linewidth=1, label=f"all rows, {epochs[-1]}: {overall:.0f} %")
    names = [f"{shortened(str(value), 30)} ({count:,})" for value, count in shown["rows"].items()]
    ax.set_yticks(at, names, parse_math=False)
    ax.invert_yaxis()
    ax.set_xlim(0, max(10.0, 100 * shown.iloc[:, 1:].max().max() * 1.1) if epochs and len(shown) else 100)
    ax.set_xlabel("rows kept (per cent of the label's rows; their number in brackets)")
    if epochs:
        handles = sorted(ax.get_legend_handles_labels()[0], key=lambda handle: isinstance(handle, Line2D))
        figure.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False, fontsize=8)
    return figure


@dataclass(frozen=True)
class _Group:
    name: str
    mask: pd.Series
    color: str
    marker: str


def _groups(rows: pd.DataFrame, score: str) -> list[_Group]:
    """Scored rows by what became of them, each with a colour and a marker of its own."""
    scored = rows[score].notna()
    if "kept" not in rows:
        return [_Group("rows with a score", scored, _BLUE, "o")]
    above, redundant = rows["reason"] == ABOVE_LIMIT, rows["reason"] == REDUNDANT
    return [
        _Group("not kept", scored & ~rows["kept"] & ~above & ~redundant, _GREY, "o"),
        _Group(MEANINGS[KEPT], scored & rows["kept"], _BLUE, "D"),
        _Group(MEANINGS[ABOVE_LIMIT], scored & above & ~rows["kept"], _ORANGE, "^"),
        _Group(MEANINGS[REDUNDANT], scored & redundant, _SKY, "v"),
    ]


def new_figure(height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, np.ndarray]:
    """A figure as wide as a page, `height` inches high, and its (rows, columns) axes; options as for `subplots`."""
    figure = Figure(figsize=(_WIDTH, height), dpi=_DPI, layout="constrained", facecolor=_PAPER)
    axes = figure.subplots(max(rows, 1), max(columns, 1), squeeze=False, **options)
    for ax in axes.flat:
        ax.set_facecolor(_PAPER)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=9)
        ax.xaxis.label.set_size(9)
        ax.yaxis.label.set_size(9)
    return figure, axes


def _edges(values: pd.Series) -> np.ndarray:
    """Bin edges that hold 1 and nearly all values, between 0 and 3."""
    if values.empty:
        return np.linspace(0, 1.2, 13)
    low = np.floor(10 * min(values.min(), 0.9)) / 10
    high = np.ceil(10 * max(1.05, _reach(values))) / 10
    low, high = max(low, 0.0), min(high, _FARTHEST)
    wanted = (high - low) / np.clip(4 * np.sqrt(len(values)), 20, 80)
    width = next((width for width in (0.01, 0.02, 0.025, 0.05) if width >= wanted), 0.1)  # 1 is always an edge
    return np.linspace(low, high, round((high - low) / width) + 1)


def _edges_of(values: pd.Series, score: str) -> np.ndarray:
    """Bin edges of any score: of an IFD those above, of others all but values far above the others."""
    if score in SCORE_EQUATIONS or values.empty:
        return _edges(values)
    low, high, (few, most) = values.min(), values.max(), values.quantile([0.05, 0.95])
    high = high if len(values) < 20 else min(high, most + 1.5 * (most - few))
    margin = 0.02 * (high - low)
    return np.histogram_bin_edges(values, 40, (low - margin, high + margin))


def _reach(values: pd.Series) -> float:
    """Upper end of an axis: the greatest value, unless it is far from nearly all others."""
    if values.empty:
        return 1.0
    most = values.quantile(0.95, interpolation="lower")
    few = len(values) < 20
    return float(max(values.max() if few or values.max() <= 2 * most else 1.5 * most, 1e-3))


def _score_lines(ax: Axes, edges: np.ndarray, cut: float | None, max_ifd: float | None) -> None:
    """The cut, and the limit (or 1), each with its value above the panel."""
    lines = [(1.0, "-", "1: the prompt does not help") if max_ifd is None else (max_ifd, "-", f"limit {max_ifd:.4g}")]
    if cut is not None:
        lines.append((cut, "--", f"cut {_cut_text(cut, max_ifd or 1.0)}"))
    lines = sorted(line for line in lines if edges[0] <= line[0] <= edges[-1])
    for i, (x, style, text) in enumerate(lines):
        ax.axvline(x, linestyle=style, color=_INK, linewidth=1)
        side = "right" if i == 0 and len(lines) > 1 else "left"  # the texts of close lines must not meet
        ax.text(x, 1.01, f" {text} ", transform=ax.get_xaxis_transform(), ha=side, va="bottom", fontsize=8, color=_INK)


def _cut_text(cut: float | None, limit: float | None) -> str:
    return number_text(cut, below=limit)


def _scatter(ax: Axes, rows: pd.DataFrame, x: str, y: str, score: str) -> int:
    """Draw the rows that have both values; how many were drawn if it is a sample, else 0."""
    points = rows.dropna(subset=[x, y])
    sampled = len(points) > _MOST_POINTS
    points = points.sample(_MOST_POINTS, random_state=0) if sampled else points
    size = float(np.clip(3000 / max(len(points), 1), 2, 16))
    for group in _groups(points, score):
        part = points[group.mask]
        drawn = ax.scatter(part[x], part[y], s=size, marker=group.marker, color=group.color, alpha=0.75, linewidths=0)
        drawn.set_rasterized(len(points) > _VECTORS)
    return _MOST_POINTS if sampled else 0


def _legend_of_groups(figure: Figure, frames: Iterable[pd.DataFrame], score: str) -> None:
    groups = [group for frame in frames for group in _groups(frame, score) if group.mask.any()]
    named = {group.name: group for group in groups}
    if len(named) < 2:
        return
    points = any(ax.collections for ax in figure.axes)
    handles = [
        Line2D([], [], linestyle="", marker=group.marker, color=group.color, markersize=5, label=name)
        if points
        else Patch(color=group.color, label=name)
        for name, group in named.items()
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False, fontsize=8)


def _log_ticks(ax: Axes, tokens: pd.Series) -> None:
    if tokens.notna().any():
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        ax.xaxis.set_minor_formatter(NullFormatter())


def _panel_title(epoch: Any, drawn: int, values: pd.Series) -> str:
    count = f"{drawn:,} of {values.notna().sum():,} rows drawn" if drawn else f"{rows_text(int(values.notna().sum()))}"
    return f"{epoch_name(epoch)}: {count}   " if epoch is not None else f"{count}   "


def inside(ax: Axes, x: float, y: float, text: str, **where: Any) -> None:
    """Write a note in a panel, at shares of its width and height if `where` names no other `transform`."""
    ax.text(x, y, text, **{"transform": ax.transAxes, "va": "bottom", "fontsize": 8, "color": _INK} | where)


def _say_if_empty(ax: Axes, values: pd.Series) -> bool:
    empty = not values.notna().any()
    if empty:
        inside(ax, 0.5, 0.5, "No row has a score.", ha="center", va="center")
    return empty
