"""What a comparison has found, in words and in tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from ..method.number_words import many
from .arms import BASELINE
from .comparison import minutes
from .plan import PlannedArm
from .results import VIEWS, Outcome, Results
from .statistics import ALPHA, POWER


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
    outcomes = [outcome for outcome in results.of("steps") if outcome.against is not None]
    better = [outcome.arm for outcome in outcomes if outcome.against.shown and outcome.against.mean < 0]
    worse = [outcome.arm for outcome in outcomes if outcome.against.shown and outcome.against.mean > 0]
    said = []
    if better:
        said.append(f"Lower held-out loss than with {BASELINE} rows: {', '.join(better)}.")
    if worse:
        said.append(f"Higher held-out loss than with {BASELINE} rows: {', '.join(worse)}.")
    if not said:
        smallest = max(outcome.against.smallest for outcome in outcomes)
        said.append(
            f"No arm differs from {BASELINE} rows, as far as {many(len(results.seeds), 'seed')} and "
            f"{many(results.rows, 'held-out row')} can show: differences from {smallest:.3f} nats per token on would "
            f"have been shown with a probability of {POWER:.0%}."
        )
    return " ".join(said)


def result_table(results: Results, view: str) -> Table:
    """The arms in one view."""
    outcomes = results.of(view)
    table = Table(box=SIMPLE_HEAD, title=f"Held-out loss with {VIEWS[view]} ({outcomes[0].at:,.0f})")
    for header in ("arm", "loss", f"less {BASELINE}", "interval", "could show", "verdict"):
        table.add_column(header, justify="left" if header in ("arm", "verdict") else "right")
    for outcome in outcomes:
        found = outcome.against
        numbers = ("", "", "")
        if found is not None:
            numbers = f"{found.mean:+.4f}", f"{found.low:+.4f} to {found.high:+.4f}", f"{found.smallest:.4f}"
        table.add_row(outcome.arm, f"{outcome.loss:.4f}", *numbers, verdict(outcome))
    arms = len(outcomes) - 1
    table.caption = (
        f"Loss in nats per answer token, of {many(results.rows, 'held-out row')}, mean of "
        f"{many(len(results.seeds), 'seed')}"
        + (f"; {results.before:.4f} before training" if results.before is not None else "")
        + f". Intervals of {1 - ALPHA / arms:.1%}, over seeds and rows, so that all {many(arms, 'difference')} hold "
        f"together with {1 - ALPHA:.0%}. Could show: the smallest difference that would have been shown with a "
        f"probability of {POWER:.0%}."
    )
    return table


def cost_table(results: Results) -> Table:
    """What each arm took to its end."""
    table = Table(box=SIMPLE_HEAD, title="What the arms took")
    for header in ("arm", "steps", "tokens", "seconds", "of them before"):
        table.add_column(header, justify="left" if header == "arm" else "right")
    for costs in results.costs:
        table.add_row(
            costs.arm,
            f"{costs.steps:,.0f}",
            f"{costs.tokens:,.0f}",
            f"{costs.seconds:,.1f}",
            f"{costs.beforehand:,.1f}",
        )
    table.caption = (
        "Seconds of the processor (all threads), or of the clock on an accelerator, for training and scoring; before: "
        "for scoring before training, counted for each arm as if it had been alone."
    )
    return table


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
