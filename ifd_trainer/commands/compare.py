"""`ifd-trainer compare RECIPE.yaml`: train the arms of a recipe, and say what their differences are worth."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..compare.arms import DEFAULT, KNOWN, left_out_of_arms, read_arms
from ..errors import NotFoundError, UserError
from ..evaluation.measures import Measures, read_measures
from ..method.number_words import many
from ..recipe.file import check_recipe, overrides, read_recipe
from .arguments import OneLineParser

if TYPE_CHECKING:
    from ..compare.comparison import Comparison
    from ..compare.judging import Judging
    from ..judge.pairs import Judge

logger = logging.getLogger(__name__)

_DESCRIPTION = """Train the same model on the same rows, chosen in several ways (arms), each with several seeds, and say
which of them end with another loss on held-out rows than random rows do, and how well that is known: here, and on a
page, compare.html, in output_dir."""


def parser() -> argparse.ArgumentParser:
    """The command's own options; all others are keys of the recipe."""
    known = "".join(f"\n  {name:<15}{words}" for name, (words, _) in KNOWN.items())
    made = OneLineParser(
        prog="ifd-trainer compare",
        usage="ifd-trainer compare RECIPE.yaml [--plan] [options] [--KEY VALUE ...]",
        description=_DESCRIPTION,
        epilog=f"Arms:{known}\nOthers are written in the recipe, each with the keys that it takes:\n\n"
        "  arms:\n    guarded:\n    near: {guards: auto pairing, wrong_prompts: near}\n"
        "    mine: {policy: module.Mine}\n\n"
        "A comparison that was interrupted goes on with the same command; what has ended is not done again.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = made.add_argument
    add("recipe", help="a recipe, with held-out rows (eval_dataset)")
    add("--arms", nargs="+", help=f"arms beside random rows (default: the recipe's, else {' '.join(DEFAULT[1:])})")
    add("--seeds", nargs="+", type=int, help="how many, or which ones (default: the recipe's, else 3)")
    add("--superfilter", help="the model that scores for the arm superfiltering")
    add("--category_column", help="a column of held-out rows; losses are compared for each of its values, too")
    add("--group_column", help="a column of held-out rows; those of one value count as alike")
    add("--answers", type=int, help="rows of each held-out set that the trained models answer (default: none)")
    add("--max_new_tokens", type=int, help="most tokens of an answer (default 256)")
    add("--tasks", nargs="+", help="of lm-evaluation-harness, that the trained models are asked")
    add("--judge", metavar="MODEL", help="of an OpenAI-compatible server, which judges the answers")
    add("--judge_url", metavar="URL", help="of that server (default: OPENAI_BASE_URL, or OpenAI's)")
    add("--judge_again", action="store_true", help="ask the judge again where it said nothing that can be read")
    add("--workers", type=int, default=1, metavar="N", help="runs at a time (default 1)")
    add("--devices", nargs="+", help="CUDA devices that the runs take in turn (default: as they are)")
    add("--plan", action="store_true", help="print arms, steps, tokens and about how long it takes, and stop")
    return made


def compare(arguments: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    options, words = parser().parse_known_args(arguments)
    if options.workers < 1:
        raise UserError(f"--workers must be at least 1, got {options.workers}.")
    if not Path(options.recipe).is_file():
        raise NotFoundError(f"No such recipe: {options.recipe}. `ifd-trainer recipes` lists those of this package.")
    given = read_recipe(options.recipe)
    settings: dict[str, Any] = {**given, **overrides(words)}
    if not settings.get("eval_dataset") and not settings.get("test_split_size"):
        raise UserError(
            "A comparison needs held-out rows: eval_dataset: FILE_OR_NAME in the recipe, or --eval_dataset."
        )
    check_recipe(options.recipe, words, plan=True)
    model, output = settings["model_name_or_path"], settings.get("output_dir")
    superfilter = options.superfilter or given.get("superfilter")
    scores = _scores(given.get("scores"), words)
    named = {name: settings.get(name) for name in ("balance_by", "target_set", "every_steps")} | {"scores": scores}
    arms = read_arms(_chosen(options.arms, given.get("arms")), str(model), superfilter=superfilter, **named)
    seeds = _seeds(options.seeds if options.seeds is not None else given.get("seeds", 3))
    measures = read_measures({**given, **{key: value for key, value in vars(options).items() if value is not None}})
    judge = _judge(options, given.get("judge"), measures)

    from rich.console import Console

    from ..compare.comparison import Comparison
    from ..compare.exports import write_numbers
    from ..compare.page import write_page
    from ..compare.plan import idle_lines, operations_per_second, planned_arm, planned_measures
    from ..compare.results import read_curves, results_of
    from ..compare.wording import (
        cost_table,
        further_tables,
        headline,
        plan_of_measures,
        plan_text,
        result_table,
        unasked,
    )
    from ..recipe.plan import only_the_plan

    with only_the_plan() if options.plan else nullcontext():
        planned = [planned_arm(options.recipe, words, arm) for arm in arms]
        measured = planned_measures(options.recipe, words, measures)
    for line in idle_lines(options.recipe, words, planned):
        logger.warning(line)
    runs = len(seeds) * (len(arms) - 1)
    if left_out := left_out_of_arms(arms, scores):
        print(left_out)
    of_measures = plan_of_measures(measured, measures, runs, judge and judge.name)
    print(plan_text(planned, seeds, operations_per_second(), of_measures), flush=True)
    if options.plan:
        return 0
    folder = Path(str(output or "runs/compare"))
    comparison = Comparison(folder, options.recipe, list(words), arms, seeds, planned[0].epochs, measures)
    comparison.save()
    cost = {each.arm.name: each.operations for each in planned}
    comparison.run(options.workers, options.devices or (), _say, cost=cost)
    curves = read_curves(comparison)
    results = results_of(curves)
    if judge is not None:
        results = replace(results, judging=_judged(comparison, curves.seeds, judge, options.judge_again))
    write_numbers(results, folder)
    console = Console()
    for view in ("steps", "tokens", "compute"):
        console.print(result_table(results, view))
    for table in (*further_tables(results), cost_table(results)):
        console.print(table)
    print(headline(results))
    if missing := unasked(results):
        print(missing)
    print(f"Numbers: {folder / 'results.json'} (.csv, .tex)")
    print(f"Page: {write_page(comparison, curves, results)}")
    return 0


def _chosen(named: Sequence[str] | None, of_recipe: Any) -> Any:
    """The arms of the command line, with the keys that the recipe has for them; else those of the recipe."""
    if isinstance(of_recipe, str):
        of_recipe = of_recipe.replace(",", " ").split()
    if not (of_recipe is None or isinstance(of_recipe, (list, dict))):
        raise UserError(f"arms wants names, or a mapping from names to recipe keys, got {of_recipe!r}.")
    if named is None:
        return of_recipe
    keys = of_recipe if isinstance(of_recipe, dict) else {}
    return {name: keys.get(name) for word in named for name in word.split(",") if name}


def _scores(of_recipe: Any, words: Sequence[str]) -> Any:
    """The further scores of the command line, else those of the recipe.

    >>> _scores("ira", ["--scores", "rifd", "loss_change", "--keep", "3"]), _scores("ira", ["--keep", "3"])
    (['rifd', 'loss_change'], 'ira')
    """
    for place in range(len(words) - 1, -1, -1):
        name, equals, value = words[place].partition("=")
        if name == "--scores":
            following = takewhile(lambda word: not word.startswith("--"), words[place + 1 :])
            return [value] if equals else list(following)
    return of_recipe


def _seeds(given: Any) -> list[int]:
    """Seeds by their number, or themselves.

    >>> _seeds(3), _seeds([7, 8])
    ([0, 1, 2], [7, 8])
    """
    listed = given if isinstance(given, list) else [given]
    seeds = list(range(listed[0])) if len(listed) == 1 and isinstance(listed[0], int) else listed
    if len(set(seeds)) < max(len(seeds), 2) or not all(isinstance(seed, int) and seed >= 0 for seed in seeds):
        raise UserError(f"seeds wants how many there are, at least 2, or two or more different ones, got {given!r}.")
    return seeds


def _judge(options: argparse.Namespace, of_recipe: Any, measures: Measures) -> Judge | None:
    """The judge of the command line, or of the recipe; None for none."""
    given = of_recipe
    if options.judge is not None:
        given = {**(of_recipe if isinstance(of_recipe, dict) else {}), "model": options.judge}
        given.pop("reward_model", None)
    if options.judge_url is not None:
        given = {**(given or {}), "base_url": options.judge_url}
    if not given:
        return None
    from ..compare.judging import judged_sets, read_judge

    judge = read_judge(given)
    judged_sets(measures)
    judge.check()
    return judge


def _judged(comparison: Comparison, seeds: list[int], judge: Judge, again: bool) -> Judging:
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from ..compare.judging import answer_pairs, judged, questions

    pairs = answer_pairs(comparison, seeds)
    count = questions(comparison, pairs, judge, again)
    _say(f"{judge.name} judges: {many(count.asked, 'question')} to ask, {count.known:,} answered before")
    with Progress(TextColumn("{task.description}"), MofNCompleteColumn(), TimeRemainingColumn()) as progress:
        bar = progress.add_task("questions to the judge", total=count.asked)
        found = judged(comparison, seeds, pairs, judge, lambda done, total: progress.update(bar, advance=1), again)
    found.save(comparison.folder)
    return found


def _say(text: str) -> None:
    print(text, flush=True)
