"""The numbers of a comparison for other programs: a CSV file, and a table for LaTeX."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from ..data.atomic import write_atomically
from ..evaluation.measured import BASELINE
from ..evaluation.measures import MAIN
from ..evaluation.statistics import Difference
from .results import EQUAL, Part, Results
from .wording import caption_of

_OF_DIFFERENCE = ("low", "high", "boot_low", "boot_high", "p", "smallest", "seeds_needed", "rows_needed")
_TYPES = dict.fromkeys(("seeds_needed", "rows_needed"), "Int64") | {"shown": "boolean"}


def results_frame(results: Results) -> pd.DataFrame:
    """A line for each set of held-out rows or category, arm and view; numbers are those of `results.json`.

    `difference` is the loss less that with random rows; steps, tokens and seconds are what the arm took to its end.
    """
    costs, lines = {cost.arm: cost for cost in results.costs}, []
    own = Part(MAIN, None, results.rows, results.outcomes, results.before)
    for part in (own, *results.parts):
        for outcome in part.outcomes:
            cost = costs[outcome.arm]
            line = {"set": part.of, "category": part.category, "arm": outcome.arm, "view": outcome.view}
            line |= {"at": outcome.at, "loss": outcome.loss} | _of_seeds("loss", results.seeds, outcome.by_seed)
            line |= _of_difference(outcome.against)
            line |= {"steps": cost.steps, "tokens": cost.tokens, "seconds": cost.seconds, "beforehand": cost.beforehand}
            lines.append(line | {"rows": part.rows})
    return pd.DataFrame(lines).astype(_TYPES)


def measured_frame(results: Results) -> pd.DataFrame:
    """A line for each measure and arm; `higher` says whether a higher value is better, empty where neither is."""
    lines = []
    for each in results.measured:
        for arm in each.arms:
            line = {"set": each.of, "measure": each.measure, "higher": each.higher, "arm": arm.arm, "value": arm.value}
            line |= _of_seeds("value", results.seeds, arm.by_seed) | _of_difference(arm.against)
            lines.append(line | {"documents": each.documents, "lacking": each.lacking})
    return pd.DataFrame(lines).astype(_TYPES | {"higher": "boolean"}) if lines else pd.DataFrame()


def _of_seeds(what: str, seeds: list[int], values: list[float]) -> dict[str, float]:
    return {f"{what}_seed_{seed}": value for seed, value in zip(seeds, values, strict=True)}


def _of_difference(found: Difference | None) -> dict[str, Any]:
    return {
        "difference": found and found.mean,
        "shown": found and found.shown,
        **{name: found and getattr(found, name) for name in _OF_DIFFERENCE},
    }


def latex_table(results: Results) -> str:
    """A table of all arms and views for LaTeX, which needs the package booktabs."""
    columns = {("", "Arm"): [cost.arm for cost in results.costs]}
    for view, title in EQUAL.items():
        outcomes = results.of(view)
        columns[title, "loss"] = [outcome.loss for outcome in outcomes]
        # Neither is text, so that only names are escaped.
        columns[title, "difference"] = [outcome.against and (outcome.against.mean,) for outcome in outcomes]
        columns[title, "interval"] = [o.against and (o.against.low, o.against.high) for o in outcomes]
    columns["cost", "tokens"] = [cost.tokens for cost in results.costs]
    columns["cost", "seconds"] = [cost.seconds for cost in results.costs]
    frame = pd.DataFrame(columns)
    formats = [str, *[_number, _signed, _interval] * len(EQUAL), "{:.0f}".format, "{:.1f}".format]
    table = frame.to_latex(
        index=False,
        escape=True,
        na_rep="",
        formatters=formats,
        column_format="l" + "rrr" * len(EQUAL) + "rr",
        multicolumn_format="c",
    )
    note = f"Differences are losses less those with {BASELINE} rows. {caption_of(results)}"
    return "".join(f"% {line}\n" for line in ("\\usepackage{booktabs}", *note.split("\n"))) + table


def write_numbers(results: Results, folder: Path) -> None:
    """Write `results.json`, `results.csv` and `results.tex`, and `measured.csv` of what else was measured."""
    results.save(folder / "results.json")
    frame = results_frame(results)
    write_atomically(folder / "results.csv", lambda path: frame.to_csv(path, index=False))
    measured = measured_frame(results)
    write_atomically(folder / "measured.csv", lambda path: measured.to_csv(path, index=False))
    text = latex_table(results)
    write_atomically(folder / "results.tex", lambda path: path.write_text(text, encoding="utf-8"))


def _number(value: float) -> str:
    return f"{value:.4f}"


def _signed(value: tuple[float]) -> str:
    return f"${value[0]:+.4f}$"


def _interval(ends: tuple[float, float]) -> str:
    return f"$[{ends[0]:+.4f}, {ends[1]:+.4f}]$"
