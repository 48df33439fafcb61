"""`ifd-trainer train`: fine-tune with selection inside the loop. TRL parses its options, which are its dataclasses."""

from __future__ import annotations

import atexit
from contextlib import nullcontext
from importlib.metadata import version
from importlib.util import find_spec

from packaging.version import Version

from ..errors import NotInstalledError, UserError
from ..recipe.file import check_recipe
from ..recipe.help import train_help

_TRL = "1.8"  # the first one that recipes were run with


def check_trl() -> None:
    """Raise unless the TRL that recipes need is there; it is not imported yet."""
    found = version("trl") if find_spec("trl") is not None else None
    if found is None or Version(found) < Version(_TRL):
        raise NotInstalledError(
            f"ifd-trainer train fine-tunes with trl {_TRL} or later, and {found or 'none'} is installed: pip install "
            "'ifd_trainer[trl]'."
        )


def train(arguments: list[str]) -> int:
    """Run the command; returns its exit code."""
    if not arguments or not {"-h", "--help"}.isdisjoint(arguments):
        print(train_help())
        return 0
    check_trl()
    plan = "--plan" in arguments
    arguments = [word for word in arguments if word != "--plan"]
    if not {"--help-all", "--help_all"}.isdisjoint(arguments):
        from ..recipe.parsing import make_parser

        make_parser().print_help()
        return 0
    recipe = arguments.pop(0) if arguments and not arguments[0].startswith("-") else None
    recipe, arguments = _named_recipe(recipe, arguments)
    check_recipe(recipe, arguments, plan)

    from rich.console import Console

    from ..recipe.parsing import parse_recipe
    from ..recipe.plan import only_the_plan, planned
    from ..recipe.run import build_run, selection_of
    from ..report.page import write_report
    from ..report.share_table import share_table
    from ..report.tables import epoch_table, guard_table, label_rich_table

    with only_the_plan() if plan else nullcontext():
        parsed = parse_recipe(recipe, arguments, plan)
        run = build_run(parsed)
        text = planned(run)  # on every process: with packing they wait for one another
    trainer = run.trainer
    if trainer.is_world_process_zero():
        print(f"Plan: {text}", flush=True)
    if trainer.args.world_size > 1:
        # A process that ends with its connections open may be aborted (SIGABRT), and its launcher then ends the others.
        atexit.register(trainer.accelerator.end_training)
    if plan:
        return 0
    trainer.train(resume_from_checkpoint=parsed.sft.resume_from_checkpoint)
    trainer.save_model(parsed.sft.output_dir)
    if trainer.is_world_process_zero():
        history = selection_of(trainer).history
        console = Console()
        console.print(epoch_table(history))
        if (guarded := guard_table(history)) is not None:
            console.print(guarded)
        if (shares := share_table(history)) is not None:
            console.print(shares)
        if parsed.selection.label:
            console.print(label_rich_table(history, parsed.selection.label))
        path = write_report(history, parsed.sft.output_dir, label=parsed.selection.label)
        print(f"Model: {parsed.sft.output_dir}")  # as it is: rich would take brackets in a name for its markup
        print(f"Report: {path}")
    trainer.accelerator.wait_for_everyone()  # for the report: the launcher ends when the first process does
    return 0


def _named_recipe(recipe: str | None, arguments: list[str]) -> tuple[str | None, list[str]]:
    """The recipe, also if it is named with --config, as TRL's command line has it; and the other words."""
    for i, word in enumerate(arguments):
        name, equals, value = word.partition("=")
        if name != "--config":
            continue
        rest = arguments[i + 1 :]
        if not equals:
            value, rest = (rest[0], rest[1:]) if rest else ("", [])
        if recipe is not None or not value:
            raise UserError("--config names a recipe: give it one, or name the recipe without --config.")
        return value, arguments[:i] + rest
    return recipe, arguments
