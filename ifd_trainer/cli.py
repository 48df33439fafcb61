"""The command line: `ifd-trainer score | select | histogram | threshold | reflect | gate | train | report | recipes`.

Each command is a module of `commands`. Heavy imports wait until one runs, so that `--help` answers at once, and until
the paths it is given are there. Exit codes: 0 done; 1 `score` is done, but no row has a score (a warning on standard
error), or a fault of this program (with its trace); 2 wrong input or usage, or too little memory or disk (one line on
standard error that says how to mend it; with --debug the trace too); 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from . import __version__
from .commands import gates, recipes, reflect, report, score, select, sites
from .commands.arguments import OneLineParser
from .commands.messages import say, told
from .commands.train import check_trl, train
from .errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [word for word in arguments if word != "--debug"]
    try:
        if arguments[:1] == ["train"]:  # its options are TRL's dataclasses, parsed by TRL's parser
            return train(arguments[1:])
        if arguments[:1] == ["compare"]:  # and these are a recipe's keys
            return _compare(arguments[1:])
        options = _parser().parse_args([_hyphened(word) for word in arguments])
        _check_words(options)
        return options.run(options)
    except KeyboardInterrupt:
        say("interrupted; what is saved stays: run the same command again to go on")
        return 130
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes at exit
        return 141
    except Exception as error:
        line = told(error, arguments)
        if line is None:
            say(
                "this error is not yours but a fault of this program, or of one that it uses, and worth a report with "
                "the lines below:"
            )
        if line is None or debug:
            traceback.print_exc()
        if line is not None:
            say(f"error: {line}")
        return 1 if line is None else 2


def _hyphened(word: str) -> str:
    """An option with hyphens in its name, whichever way it is written; anything else as it is.

    >>> _hyphened("--max_length"), _hyphened("--output=a_b"), _hyphened("a_b")
    ('--max-length', '--output=a_b', 'a_b')
    """
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="ifd-trainer",
        description="Self-guided data selection for instruction tuning (IFD, arXiv 2308.12032): score rows, select the "
        "ones worth training on, train with selection inside the loop, and report what happened.",
        epilog="Each command has its own help: ifd-trainer score --help. With --debug, each shows the trace of an "
        "error. Exit codes: 0 done, 1 a fault of this program, 2 wrong input or usage, 130 interrupted.",
    )
    parser.add_argument("--version", action="version", version=f"ifd_trainer {__version__}")
    commands = parser.add_subparsers(
        title="commands",
        required=True,
        metavar="score | select | histogram | threshold | reflect | gate | train | compare | report | recipes",
    )
    score.add_parser(commands)
    select.add_parser(commands)
    sites.add_histogram(commands)
    sites.add_threshold(commands)
    commands.add_parser("train", help="fine-tune with selection inside the loop (see: ifd-trainer train --help)")
    commands.add_parser("compare", help="train several ways to choose rows, and say what their differences are worth")
    reflect.add_parser(commands)
    gates.add_parser(commands)
    report.add_parser(commands)
    recipes.add_parser(commands)
    return parser


def _check_words(options: argparse.Namespace) -> None:
    for name, value in vars(options).items():
        if isinstance(value, str) and not value.strip() and name != "response_header":  # there may be none
            raise UserError(f"{name.replace('_', '-')} is empty: give it a value, or leave it out.")
    # Of a file there is one split, and of a folder one revision: what is asked for would be ignored without a word.
    if getattr(options, "split", "train") != "train" and Path(options.data).is_file():
        raise UserError(f"--split {options.split}: the file {options.data} has no splits. Leave it out.")
    if getattr(options, "revision", None) is not None and Path(options.model).is_dir():
        raise UserError(f"--revision {options.revision}: the folder {options.model} has no revisions. Leave it out.")


def _compare(arguments: list[str]) -> int:
    from .commands.compare import compare

    if {"-h", "--help"}.isdisjoint(arguments):
        check_trl()
    return compare(arguments or ["--help"])
