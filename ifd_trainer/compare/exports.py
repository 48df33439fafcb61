"""The numbers of a comparison for other programs: a CSV file, and a table for LaTeX."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from ..data.atomic import write_atomically
from .arms import BASELINE
from .results import EQUAL, Results
from .wording import caption_of

_OF_DIFFERENCE = ("low", "high", "boot_low", "boot_high", "p", "smallest", "seeds_needed", "rows_needed")


def results_frame(results: Results) -> pd.DataFrame:
    """A line for each arm and view, all numbers as they are in `results.json`; empty where there is none.

    `difference` is the loss less that with random rows; steps, tokens and seconds are what the arm took to its end.
    """
    costs, lines = {cost.arm: cost for cost in results.costs}, []
    for outcome in results.outcomes:
        found, cost = outcome.against, costs[outcome.arm]
        line = {"arm": outcome.arm, "view": outcome.view, "at": outcome.at, "loss": outcome.loss}
        line |= {f"loss_seed_{seed}": loss for seed, loss in zip(results.seeds, outcome.by_seed, strict=True)}
        line |= {"difference": found and found.mean, "shown": found and found.shown}
        line |= {name: found and getattr(found, name) for name in _OF_DIFFERENCE}
        line |= {"steps": cost.steps, "tokens": cost.tokens, "seconds": cost.seconds, "beforehand": cost.beforehand}
        lines.append(line | {"rows": results.rows})
    frame = pd.DataFrame(lines)
    return frame.astype(dict.fromkeys(("seeds_needed", "rows_needed"), "Int64") | {"shown": "boolean"})


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
    """Write `results.json`, `results.csv` and `results.tex`."""
    results.save(folder / "results.json")
    frame = results_frame(results)
    write_atomically(folder / "results.csv", lambda path: frame.to_csv(path, index=False))
    text = latex_table(results)
    write_atomically(folder / "results.tex", lambda path: path.write_text(text, encoding="utf-8"))


def _number(value: float) -> str:
    return f"{value:.4f}"


def _signed(value: tuple[float]) -> str:
    return f"${value[0]:+.4f}$"


def _interval(ends: tuple[float, float]) -> str:
    return f"$[{ends[0]:+.4f}, {ends[1]:+.4f}]$"
