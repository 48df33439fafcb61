"""`ifd-trainer recipes`: list the recipes of this package, or copy one."""

from __future__ import annotations

import argparse

from ..errors import UserError
from ..recipe.file import COMPARED, copy_recipe, read_recipe, recipe_titles


def add_parser(commands: argparse._SubParsersAction) -> None:
    """The command and its options."""
    parser = commands.add_parser(
        "recipes",
        help="list the recipes of this package, or copy one",
        description="List the recipes that come with this package, or copy one to change it and run it with "
        "`ifd-trainer train`.",
        epilog="Example: ifd-trainer recipes alpaca_cherry_5pct",
    )
    parser.add_argument("name", nargs="?", help="recipe to copy; without one, all are listed")
    parser.add_argument("--output", metavar="PATH", help="file or folder to write to (default: NAME.yaml, here)")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    if options.name is None:
        if options.output:
            raise UserError("--output goes with the name of a recipe: ifd-trainer recipes NAME --output PATH.")
        titles = recipe_titles()
        width = max(map(len, titles))
        for name, title in titles.items():
            print(f"{name:{width}}  {title}")
        return 0
    recipe, *others = copy_recipe(options.name, options.output)
    command = "train" if read_recipe(str(recipe)).keys().isdisjoint(COMPARED) else "compare"
    print(f"Copied to {recipe}{''.join(f', {path}' for path in others)}. Run it with: ifd-trainer {command} {recipe}")
    return 0
