"""What a comparison has found, in words and in tables for the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from ..method.number_words import many
from ..report.summary import Summary
from .arms import BASELINE
from .comparison import minutes
from .plan import PlannedArm
from .results import VIEWS, Outcome, Results
from .statistics import ALPHA, POWER

COST_CAPTION = (
    "Seconds of the processor (all threads), or of the clock on an accelerator, for training and scoring; before: for "
    "scoring before training, counted for each arm as if it had been alone."
)


def verdict(outcome: Outcome) -> str:
    """One sentence about an arm: better, worse, or no difference shown, and then what it would take."""
    found = outcome.against
    if found is None:
        return "what the others are held against"
    if found.shown:
        return f"{'lower' if found.mean < 0 else 'higher'} loss than {BASELINE} rows"
    ways = []
    if found.seeds_needed is not None and found.seeds_needed > found.seeds:
        ways.append(f"{found.seeds_needed:,} seeds")
    if found.rows_needed is not None and found.rows_needed > found.rows:
        ways.append(f"{found.rows_needed:,} held-out rows")
    would = f"; one of this size would take {' or '.join(ways)}" if ways else ""
    return f"no difference shown{would}"


def headline(results: Results) -> str:
    """What there is to say in the first place, of equal steps."""
    better, worse, others = _sorted(results, "steps")
    said = []
    if better:
        said.append(f"Lower held-out loss than with {BASELINE} rows: {', '.join(better)}.")
    if worse:
        said.append(f"Higher held-out loss than with {BASELINE} rows: {', '.join(worse)}.")
    if said and others:
        said.append(f"No difference shown: {', '.join(others)}.")
    if not said:
        smallest = max(outcome.against.smallest for outcome in results.of("steps") if outcome.against is not None)
        said.append(
            f"No arm differs from {BASELINE} rows, as far as {many(len(results.seeds), 'seed')} and "
            f"{many(results.rows, 'held-out row')} can show: differences from {smallest:.3f} nats per token on would "
            f"have been shown with a probability of {POWER:.0%}."
        )
    return " ".join(said)


def _sorted(results: Results, view: str) -> tuple[list[str], list[str], list[str]]:
    """Arms with a lower and with a higher loss than random rows in a view, and those that no difference is shown of."""
    found = {outcome.arm: outcome.against for outcome in results.of(view) if outcome.against is not None}
    better = [arm for arm, each in found.items() if each.shown and each.mean < 0]
    worse = [arm for arm, each in found.items() if each.shown and each.mean > 0]
    return better, worse, [arm for arm, each in found.items() if not each.shown]


def summary_of(results: Results) -> Summary:
    """What the page opens with: the headline, then the other views, and what arms took."""
    better, worse, _ = _sorted(results, "steps")
    points = [_view_sentence(results, view) for view in ("tokens", "compute")]
    fine = True if better else False if worse else None
    return Summary(fine, headline(results), [*points, _cost_sentence(results)])


def _view_sentence(results: Results, view: str) -> str:
    better, worse, others = _sorted(results, view)
    parts = [f"lower loss than {BASELINE} rows: {', '.join(better)}"] if better else []
    parts += [f"higher loss than {BASELINE} rows: {', '.join(worse)}"] if worse else []
    parts += [f"no difference shown: {', '.join(others)}"] if others else []
    return f"With {VIEWS[view]}, {'; '.join(parts)}."


def _cost_sentence(results: Results) -> str:
    """How the seconds of each arm compare with those of random rows."""
    base, *others = results.costs
    if not base.seconds > 0:
        return "What the arms took is not known."
    parts = [f"{cost.arm} {cost.seconds / base.seconds:.1f}" for cost in others]
    return f"Seconds for training and scoring, as multiples of those with {BASELINE} rows: {', '.join(parts)}."


def title_of(results: Results, view: str) -> str:
    """What a table of a view is called."""
    return f"Held-out loss with {VIEWS[view]} ({results.of(view)[0].at:,.0f})"


def difference_cells(outcome: Outcome) -> tuple[str, str, str]:
    """The difference from random rows, its interval, and what could have been shown."""
    found = outcome.against
    if found is None:
        return "", "", ""
    return f"{found.mean:+.4f}", interval_text(found.low, found.high), f"{found.smallest:.4f}"


def interval_text(low: float, high: float) -> str:
    """Both ends, "-" where one is not known.

    >>> interval_text(-0.25, 0.5)
    '-0.2500 to +0.5000'
    """
    return f"{low:+.4f} to {high:+.4f}" if math.isfinite(low + high) else "-"


def result_table(results: Results, view: str) -> Table:
    """The arms in one view."""
    table = Table(box=SIMPLE_HEAD, title=title_of(results, view), caption=caption_of(results))
    for header in ("arm", "loss", f"less {BASELINE}", "interval", "could show", "verdict"):
        table.add_column(header, justify="left" if header in ("arm", "verdict") else "right")
    for outcome in results.of(view):
        table.add_row(outcome.arm, f"{outcome.loss:.4f}", *difference_cells(outcome), verdict(outcome))
    return table


def caption_of(results: Results) -> str:
    """How the numbers of a view are to be read."""
    arms = len(results.costs) - 1
    return (
        f"Loss in nats per answer token, of {many(results.rows, 'held-out row')}, mean of "
        f"{many(len(results.seeds), 'seed')}"
        + (f"; {results.before:.4f} before training" if results.before is not None else "")
        + f". Intervals of {1 - ALPHA / arms:.1%}, over seeds and rows, so that all {many(arms, 'difference')} hold "
        f"together with {1 - ALPHA:.0%}. Could show: the smallest difference that would have been shown with a "
        f"probability of {POWER:.0%}."
    )


def cost_table(results: Results) -> Table:
    """What each arm took to its end."""
    table = Table(box=SIMPLE_HEAD, title="What the arms took", caption=COST_CAPTION)
    headers, lines = cost_cells(results)
    for header in headers:
        table.add_column(header, justify="left" if header == "arm" else "right")
    for line in lines:
        table.add_row(*line)
    return table


def cost_cells(results: Results) -> tuple[list[str], list[list[str]]]:
    """Headers and lines of what each arm took to its end."""
    lines = [
        [
            costs.arm,
            f"{costs.steps:,.0f}",
            f"{costs.tokens:,.0f}",
            f"{costs.seconds:,.1f}",
            f"{costs.beforehand:,.1f}",
        ]
        for costs in results.costs
    ]
    return ["arm", "steps", "tokens", "seconds", "of them before"], lines


def plan_text(arms: Sequence[PlannedArm], seeds: Sequence[int], rate: float) -> str:
    """What will be run, one arm a line, and how long it takes about."""
    width = max(len(planned.arm.name) for planned in arms)
    lines = []
    for planned in arms:
        lines.append(
            f"{planned.arm.name:{width}}  {many(planned.steps, 'update')}, about {planned.tokens:,} tokens trained on "
            f"and {planned.scored:,} scored: {planned.arm.words}"
        )
    seconds = len(seeds) * sum(planned.operations for planned in arms) / rate
    lines.append(
        f"{many(len(arms), 'arm')} with {many(len(seeds), 'seed')} each ({', '.join(map(str, seeds))}): about "
        f"{minutes(seconds)} of computing at the {rate / 1e9:,.0f} GFLOP/s that this machine's matrix products reach"
    )
    return "\n".join(lines)
