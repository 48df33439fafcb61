"""What a comparison has found, in words and in tables for the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from ..evaluation.harness import STANDS_FOR
from ..evaluation.measured import BASELINE
from ..evaluation.measures import MAIN, Measures
from ..evaluation.statistics import ALPHA, POWER, Difference
from ..method.number_words import listed, many
from ..report.summary import Summary
from .comparison import minutes
from .plan import PlannedArm, PlannedMeasures
from .results import VIEWS, Outcome, Results

COST_CAPTION = (
    "Seconds of the processor (all threads), or of the clock on an accelerator, for training and scoring; before: for "
    "scoring before training, counted for each arm that reads scores as if it had been alone."
)


SHORT_CAPTION = (
    f"A difference from {BASELINE} rows with half of its interval, over seeds and documents, whose level holds for all "
    "arms of a line together; of several lines some show a difference by chance. Where nothing is said behind it, no "
    "difference is shown."
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


def parts_cells(results: Results, view: str = "steps") -> tuple[list[str], list[list[str]]]:
    """Headers and lines: of each further set and category, the loss with random rows, and each arm's difference."""
    others = [cost.arm for cost in results.costs[1:]]
    lines = []
    for part in results.parts:
        base, *found = part.in_view(view)
        name = part.of if part.category is None else f"{part.category} ({part.of})"
        before = "" if part.before is None else f"{part.before:.4f}"
        lines.append([name, f"{part.rows:,}", before, f"{base.loss:.4f}", *(in_short(each.against) for each in found)])
    return ["rows of", "rows", "before", BASELINE, *others], lines


def measured_cells(results: Results) -> tuple[list[str], list[list[str]]]:
    """Headers and lines: of each measure, its mean with random rows, and each arm's difference."""
    others = [cost.arm for cost in results.costs[1:]]
    lines = []
    for each in results.measured:
        base, *found = each.arms
        documents = f"{each.documents:,}" + (f" (of {each.documents + each.lacking:,})" if each.lacking else "")
        cells = (in_short(arm.against, each.higher) for arm in found)
        lines.append([each.measure, each.of, documents, f"{base.value:.4f}", *cells])
    return ["measure", "of", "documents", BASELINE, *others], lines


def unasked(results: Results) -> str:
    """What of knowledge, maths and code no task was asked for, as a sentence; "" for none."""
    asked = {each.of for each in results.measured}
    left = [f"{what} ({task})" for task, what in STANDS_FOR.items() if task not in asked]
    if not left:
        return ""
    return f"Not measured: {listed(left)}, where selection may cost most; tasks: default in the recipe measures them."


def judged_cells(results: Results) -> tuple[list[str], list[list[str]]]:
    """Headers and lines: of each arm and set, verdicts, the winning score, and that of equally long answers; what is
    preferred, where that is shown."""
    headers = ["arm", "answers to", "prompts", "won, tied, lost", "winning score", "length-controlled"]
    lines = []
    for arm in results.judging.arms if results.judging is not None else ():
        counts = f"{arm.wins:,}, {arm.ties:,}, {arm.losses:,}"
        cells = (f"{arm.documents:,}", counts, _score_cell(arm.score), _score_cell(arm.length_controlled))
        lines.append([arm.arm, arm.of, *cells])
    return headers, lines


def category_cells(results: Results) -> tuple[list[str], list[list[str]]]:
    """Headers and lines: of each category of prompts, the winning score of each arm."""
    judged = [arm for arm in (results.judging.arms if results.judging is not None else ()) if arm.by_category]
    names = list(dict.fromkeys(arm.arm for arm in judged))
    scores = {(arm.of, category, arm.arm): score for arm in judged for category, score in arm.by_category.items()}
    lines = []
    for of, category in dict.fromkeys((of, category) for of, category, _ in scores):
        cells = (scores.get((of, category, name)) for name in names)
        lines.append([category, of, *("" if score is None else f"{score:.3f}" for score in cells)])
    return ["category", "of", *names], lines


def _score_cell(found: Difference) -> str:
    text = f"{1 + found.mean:.3f} ± {(found.high - found.low) / 2:.3f}".replace(" ", "\N{NO-BREAK SPACE}")
    return f"{text}, {'preferred' if found.mean > 0 else f'{BASELINE} preferred'}" if found.shown else text


def in_short(found: Difference, higher_is_better: bool | None = None) -> str:
    """A difference with half of its interval and, where one is shown, which way it goes.

    >>> some = Difference(0.5, 0.25, 0.75, 0.3, 0.7, 0.01, 0.4, 3, 99, None, None, 0.1, 0.1)
    >>> in_short(some), in_short(some, higher_is_better=True)
    ('+0.5000 ± 0.2500, higher', '+0.5000 ± 0.2500, better')
    """
    if found.low == found.high == 0:
        return "the same"
    text = f"{found.mean:+.4f} ± {(found.high - found.low) / 2:.4f}"
    if not found.shown:
        return text
    if higher_is_better is None:
        return f"{text}, {'higher' if found.mean > 0 else 'lower'}"
    return f"{text}, {'better' if (found.mean > 0) == higher_is_better else 'worse'}"


def grid_table(title: str, headers: Sequence[str], lines: Sequence[Sequence[str]], caption: str, texts: int) -> Table:
    """A table for the terminal whose first so many columns are texts."""
    table = Table(box=SIMPLE_HEAD, title=title, caption=caption)
    for number, header in enumerate(headers):
        table.add_column(header, justify="left" if number < texts else "right")
    for line in lines:
        table.add_row(*line)
    return table


def further_tables(results: Results) -> list[Table]:
    """The tables of further sets and categories, and of what else was measured, as far as there is any."""
    tables = []
    if results.parts:
        tables.append(
            grid_table(f"Losses of other rows, with {VIEWS['steps']}", *parts_cells(results), SHORT_CAPTION, 1)
        )
    if results.judging is not None:
        notes = " ".join(results.judging.notes)
        tables.append(grid_table(f"What {results.judging.judge} prefers", *judged_cells(results), notes, 2))
    if results.measured:
        tables.append(grid_table("Measured at the end of each run", *measured_cells(results), SHORT_CAPTION, 2))
    return tables


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
    return grid_table("What the arms took", *cost_cells(results), COST_CAPTION, 1)


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


def plan_of_measures(planned: PlannedMeasures, measures: Measures, runs: int, judge: str | None) -> list[str]:
    """What is measured of each run, a line for each thing; how long that takes is not known.

    Args:
        runs: of all arms but random rows.
        judge: its name, if there is one.
    """
    sets = (f"{count:,} {name}" if name == MAIN else f"{count:,} of {name}" for name, count in planned.held_out.items())
    lines = [f"each is measured by the losses of {listed(sets)}"]
    answered = {name: min(measures.answers, count) for name, count in planned.held_out.items() if measures.answers}
    answered |= planned.prompts
    if answered:
        sets = listed(f"{count:,} of {name}" for name, count in answered.items())
        lines.append(f"at its end, it answers {sets}, in at most {measures.max_new_tokens:,} tokens each")
    if planned.tasks:
        asked = listed(f"{task.name} ({task.documents:,})" for task in planned.tasks)
        lines.append(f"at its end, it is asked the tasks {asked}")
    if judge is not None:
        pairs = sum((planned.prompts or answered).values()) * runs
        lines.append(f"{judge} judges at most {pairs:,} pairs of answers; what it has said before is not asked again")
    return lines


def plan_text(arms: Sequence[PlannedArm], seeds: Sequence[int], rate: float, measured: Sequence[str] = ()) -> str:
    """What will be run, one arm a line, and how long it takes about; `measured` are lines of `plan_of_measures`."""
    width = max(len(planned.arm.name) for planned in arms)
    lines = []
    for planned in arms:
        lines.append(
            f"{planned.arm.name:{width}}  {many(planned.steps, 'update')}, about {planned.tokens:,} tokens trained on "
            f"and {planned.scored:,} scored: {planned.arm.words}"
        )
    lines += measured
    seconds = len(seeds) * sum(planned.operations for planned in arms) / rate
    lines.append(
        f"{many(len(arms), 'arm')} with {many(len(seeds), 'seed')} each ({', '.join(map(str, seeds))}): about "
        f"{minutes(seconds)} of computing at the {rate / 1e9:,.0f} GFLOP/s that this machine's matrix products reach"
    )
    return "\n".join(lines)
