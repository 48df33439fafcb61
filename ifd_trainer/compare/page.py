"""The page of a comparison: one HTML file that says which arms differ from random rows, and at what cost."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from ..data.atomic import write_atomically
from ..errors import UserError
from ..evaluation.measured import BASELINE
from ..evaluation.statistics import POWER
from ..method.number_words import listed, many
from ..recipe.file import ALIASES
from ..report.page_parts import Plot, RowTable, rendered, texts_of
from ..report.score_frames import count_text, percent_text
from ..report.tables import label_cells, labels_of
from .arms import KNOWN, Arm
from .comparison import Comparison, read_record
from .exports import write_numbers
from .judging import Judging
from .plots import plot_intervals, plot_losses
from .results import EQUAL, VIEWS, Curves, Outcome, Results, read_curves, results_of
from .trained_rows import TrainedRows, read_trained_rows
from .wording import (
    COST_CAPTION,
    SHORT_CAPTION,
    caption_of,
    category_cells,
    cost_cells,
    difference_cells,
    interval_text,
    judged_cells,
    measured_cells,
    parts_cells,
    summary_of,
    title_of,
    unasked,
    verdict,
)

PAGE = "compare.html"
_LABELS = 30  # the most frequent ones


def write_comparison_report(
    folder: Path, output: Path | None = None, label: str | None = None, rows: int | None = None
) -> Path:
    """Write the page and the numbers of a comparison that is in a folder; arguments as for `write_page`.

    Raises:
        UserError: where no comparison is, or one of which fewer than two seeds have ended.
    """
    comparison = Comparison.load(folder)
    curves = read_curves(comparison)
    results = replace(results_of(curves), judging=Judging.load(folder, curves.seeds))
    path = write_page(comparison, curves, results, output, label, rows)
    write_numbers(results, path.parent)
    return path


def write_page(
    comparison: Comparison,
    curves: Curves,
    results: Results,
    output: Path | None = None,
    label: str | None = None,
    rows: int | None = None,
) -> Path:
    """Write `compare.html`, which needs no other file.

    Args:
        curves, results: of this comparison.
        output: the folder that it goes to, by default the comparison's.
        label: a column whose values are compared by the share of their rows that was trained on; by default the
            recipe's, else `quality` or `label`, if there is one.
        rows: most rows for each pair of arms that disagree; 3 by default.

    Returns:
        The path of `compare.html`.

    Raises:
        UserError: for a label that is no column of the rows.
    """
    record = read_record(comparison.folder)
    settings = _settings(record)
    trained = read_trained_rows(comparison, curves.seeds)
    labels, notes = _labels(trained, label, settings.get("label"))
    left = [seed for seed in comparison.seeds if seed not in curves.seeds]
    if left:
        notes.append(f"Of {many(len(left), 'seed')} not all arms have ended: {listed(map(str, left))} left out.")
    if missing := unasked(results):
        notes.append(missing)
    if results.left_out:
        notes.append(f"Too few rows to compare losses of: {listed(results.left_out)}.")
    if trained.unknown:
        notes.append(f"Which rows were trained on is not known of {listed(trained.unknown)}: no history is left.")
    content = {
        "title": f"Comparison {Path(comparison.folder).resolve().name}: which arms differ from {BASELINE} rows?",
        "summary": summary_of(results),
        "notes": notes,
        "glance": _glance(results),
        "plots": {plot.name: plot for plot in _plots(curves, results)},
        "views": [(title_of(results, view), *_view_cells(results, view)) for view in VIEWS],
        "caption": caption_of(results),
        "parts": parts_cells(results),
        "measured": measured_cells(results),
        "judged": judged_cells(results),
        "judged_categories": category_cells(results),
        "judge": results.judging,
        "baseline": BASELINE,
        "short_caption": SHORT_CAPTION,
        "costs": cost_cells(results),
        "cost_caption": COST_CAPTION,
        "arms": [(arm.name, _arm_words(arm)) for arm in comparison.arms],
        "overlap": _overlap_cells(trained),
        "label": str(labels.name) if labels is not None else None,
        "labels": _label_cells(trained, labels) if labels is not None else None,
        "tables": _row_tables(comparison, trained, labels, rows or 3),
        "facts": _facts(comparison, record, settings, results),
        "recipe": record["recipe"].strip(),
    }
    page = rendered(Path(__file__).with_name("compare.html.jinja"), content)
    path = (output or comparison.folder) / PAGE
    write_atomically(path, lambda part: part.write_text(page, encoding="utf-8"))
    return path


def _settings(record: dict[str, Any]) -> dict[str, Any]:
    given = yaml.safe_load(record["recipe"]) or {}
    return {ALIASES.get(key, key): value for key, value in {**given, **record["keys"]}.items()}


def _plots(curves: Curves, results: Results) -> list[Plot]:
    return [
        Plot.of("intervals", f"Differences from {BASELINE} rows", _INTERVALS, plot_intervals(results)),
        Plot.of("losses", "Held-out loss while training", _LOSSES, plot_losses(curves)),
    ]


_INTERVALS = (
    "Each dot is the held-out loss of an arm less that with random rows, left of zero where it is lower; the line is "
    "its interval, over other seeds and other held-out rows. A filled dot in colour is a difference that is shown: its "
    "interval leaves zero out, and so does that of a bootstrap. A hollow one is no difference shown, which is not the "
    "same as none. The grey bar reaches as far as a difference would have had to be to be shown with a probability of "
    f"{POWER:.0%} (“could show”). Each panel has its own scale; an arrow is a difference beyond it."
)
_LOSSES = (
    "A thick line is the mean of the seeds, through the points where the held-out rows were scored; thin lines are the "
    "seeds. All begin with the same model: an arm that scores rows before training begins later in seconds. Left and "
    "right have the same points. Where one arm used far more than another, the axis is logarithmic from its first "
    "point on."
)


def _glance(results: Results) -> tuple[list[str], list[list[str]]]:
    """Headers and lines: each arm's difference in each view, and what it took."""
    lines, base = [], results.costs[0].seconds
    of_view = {view: {outcome.arm: outcome for outcome in results.of(view)} for view in EQUAL}
    for cost in results.costs:
        cells = [_in_short(outcomes[cost.arm]) for outcomes in of_view.values()]
        times = f"{cost.seconds / base:.1f}" if base > 0 else "-"
        lines.append([cost.arm, *cells, f"{cost.tokens:,.0f}", f"{cost.seconds:,.1f}", times])
    return ["arm", *EQUAL.values(), "tokens", "seconds", f"times {BASELINE}'s seconds"], lines


def _in_short(outcome: Outcome) -> str:
    found = outcome.against
    if found is None:
        return ""
    if not found.shown:
        return "none shown"
    return f"{found.mean:+.4f},\N{NO-BREAK SPACE}{'lower' if found.mean < 0 else 'higher'}"


def _view_cells(results: Results, view: str) -> tuple[list[str], list[list[str]]]:
    headers = ["arm", "loss", f"less {BASELINE}", "interval", "of a bootstrap", "could show", "verdict"]
    lines = []
    for outcome in results.of(view):
        found = outcome.against
        difference, interval, could = difference_cells(outcome)
        drawn = interval_text(found.boot_low, found.boot_high) if found is not None else ""
        of_line = verdict(outcome) if found is not None else ""
        interval, drawn = (text.replace(" ", "\N{NO-BREAK SPACE}") for text in (interval, drawn))
        lines.append([outcome.arm, f"{outcome.loss:.4f}", difference, interval, drawn, could, of_line])
    return headers, lines


def _arm_words(arm: Arm) -> str:
    keys = ", ".join(f"{key}: {value}" for key, value in arm.keys.items())
    return f"{arm.words} ({keys})" if arm.name in KNOWN and keys else arm.words


def _overlap_cells(trained: TrainedRows) -> tuple[list[str], list[list[str]]] | None:
    if not trained.times:
        return None
    table = trained.overlap()
    return ["arm", *table.columns], [
        [name, *map(percent_text, row)] for name, row in zip(table.index, table.to_numpy(), strict=True)
    ]


def _labels(trained: TrainedRows, asked: str | None, of_recipe: Any) -> tuple[pd.Series | None, list[str]]:
    """The label of each row, and what is to be said where the recipe's is not there."""
    known = [] if trained.details is None else [str(name) for name in trained.details.columns]
    if asked is not None and asked not in known:
        raise UserError(
            f"There is no column {asked!r} to take labels from; the columns are {sorted(known)}. Pass another label."
        )
    name = asked or of_recipe or next((name for name in ("quality", "label") if name in known), None)
    if name is None:
        return None, []
    if name not in known:
        return None, [f"The rows have no column {name!r}, which the recipe names as their label."]
    return labels_of(trained.details[name]), []


def _label_cells(trained: TrainedRows, labels: pd.Series) -> tuple[list[str], list[list[str]]]:
    cells = label_cells(trained.label_shares(labels))
    shown = cells[:_LABELS] + cells[-1:] if len(cells) > _LABELS + 1 else cells
    return [str(labels.name), "rows", *trained.times], [[value, *line] for value, line in shown]


def _row_tables(comparison: Comparison, trained: TrainedRows, labels: pd.Series | None, most: int) -> list[RowTable]:
    """For each two arms that select, random rows left out: rows that one trains on with every seed, the other never."""
    arms = [arm.name for arm in comparison.arms if arm.selects and arm.name != BASELINE and arm.name in trained.times]
    tables = []
    for one, other in permutations(arms, 2):
        keys = trained.disagreed(one, other)
        if not keys:
            continue
        headers = ["row", "times", *([str(labels.name)] if labels is not None else [])]
        lines = []
        for key in keys[:most]:
            cells = [key, f"{trained.times[one].loc[key].mean():g}"]
            cells += [str(labels.get(key, "(none)"))] if labels is not None else []
            lines.append({"cells": cells, "texts": texts_of(trained.details, key)})
        tables.append(RowTable(f"{one}, never {other}", len(keys), headers, lines))
    return tables


def _facts(
    comparison: Comparison, record: dict[str, Any], settings: dict[str, Any], results: Results
) -> list[tuple[str, str]]:
    ended = [task.result() for task in comparison.tasks() if task.done]
    over = ", ".join(f"{key}: {value}" for key, value in record["keys"].items())
    facts = [
        ("Model", settings.get("model_name_or_path")),
        ("Training rows", f"{settings.get('dataset_name') or 'a mixture'}, {count_text(ended[0]['rows'])}"),
        (
            "Held-out rows",
            f"{settings.get('eval_dataset') or 'of the training rows'}, {count_text(results.rows)} with a loss",
        ),
        ("Seeds", listed(map(str, results.seeds))),
        ("Scored after steps", ", ".join(map(str, record["steps"]))),
        ("Keys over the recipe's", over),
        ("Versions", ", ".join(f"{name} {version}" for name, version in record["versions"].items())),
        ("Machine", record["machine"]),
        ("Trained on", listed(dict.fromkeys(run["device"] for run in ended))),
    ]
    return [(name, str(text)) for name, text in facts if text]
