"""Options that several commands have, and the types of options: what a word on the command line has to be."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields
from typing import Any, NoReturn

from ..data.format_choice import FormatOptions
from ..data.formats import FORMATS
from ..errors import UserError
from ..method.choices import CALIBRATED

GREEDY = "greedy"  # of --spin


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. See {self.prog} --help.")

    def words_of(self, options: argparse.Namespace, without: Collection[str] = ()) -> list[str]:
        """The words that give these options, those that are not as they are by default.

        Args:
            without: options that are left out; positional ones always are.
        """
        words: list[str] = []
        for action in self._actions:
            value = getattr(options, action.dest, None)
            if not action.option_strings or action.dest in without or value == action.default or value is None:
                continue
            name = action.option_strings[0]
            if isinstance(action, argparse.BooleanOptionalAction):
                words.append(action.option_strings[0 if value else 1])
            elif action.nargs == 0:
                words.append(name)
            elif isinstance(value, list) and action.nargs is None:  # one that is given several times
                words += [word for each in value for word in (name, str(each))]
            else:
                words += [name, *map(str, value if isinstance(value, list) else [value])]
        return words


def positive(text: str) -> int:
    """The type of options that count something."""
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"wants a whole number of at least 1, got {text!r}")
    return int(text)


def answer_count(text: str) -> int | str:
    """The type of how many answers are sampled, or that the greedy one is taken."""
    return text if text == GREEDY else positive(text)


def whole_number(text: str) -> int:
    """The type of a seed."""
    if not text.strip().isdecimal():
        raise argparse.ArgumentTypeError(f"wants a whole number of at least 0, got {text!r}")
    return int(text)


def real_number(text: str) -> float:
    """The type of options that take a number, which nan is not."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if value != value:
        raise argparse.ArgumentTypeError(f"wants a number, got {text!r}")
    return value


def share_of_one(text: str) -> float:
    """The type of options that take a share of 1, which is not 0."""
    value = real_number(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"wants a number above 0 and at most 1, got {text!r}")
    return value


def above_zero(text: str) -> float:
    """The type of a temperature."""
    value = real_number(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"wants a number above 0, got {text!r}")
    return value


def above_zero_or_inf(text: str) -> float:
    """The type of a limit that may be switched off."""
    value = real_number(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"wants a number above 0, or inf, got {text!r}")
    return value


def not_negative(text: str) -> float:
    """The type of a size, which may be 0."""
    value = real_number(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"wants a number of at least 0, got {text!r}")
    return value


def limit_or_calibrated(text: str) -> float | str:
    """The type of a limit: a number, or that it is to be measured."""
    if text == CALIBRATED:
        return text
    try:
        return real_number(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"wants a number or {CALIBRATED}, got {text!r}") from None


def add_model(add: Callable[..., Any], what: str) -> None:
    """The options of the model that scores, and of where its scores go; `what` it is, for the help."""
    add("--model", required=True, help=f"{what}: a hub name or a local path")
    add("--revision", help="branch, tag or commit of a hub name (default: its main branch)")
    add("--trust-remote-code", action="store_true", help="run code that comes with the model")
    add("--output", required=True, help="file to write: .json, .jsonl, .csv or .parquet")


def add_running(add: Callable[..., Any]) -> None:
    """The options of how a model runs over a data set."""
    add("--split", default="train", help="split of a hub data set (default train)")
    add("--device", help="cuda, mps or cpu (default: the first there is)")
    add("--dtype", help="float32, bfloat16 or float16 (default: float32 on a CPU, else the model's)")
    add(
        "--token-budget",
        type=positive,
        help="tokens of a batch (default: on a CPU 2048, fewer for a model with wide layers; elsewhere what a "
        "quarter of the device's memory holds, or 3 GiB, as measured on a few batches)",
    )
    add("--part-rows", type=positive, help="rows saved at a time (default 64 on a CPU, else 2048)")


def add_format(add: Callable[..., Any]) -> None:
    """The options that say how rows are read."""
    add("--format", help=f"prompt format: {', '.join(FORMATS)}; told from the columns by default")
    add("--prompt-column", metavar="NAME", help="column of instructions or questions, where its name does not tell")
    add("--input-column", metavar="NAME", help="column of what an instruction is about: a context, a document")
    add("--answer-column", metavar="NAME", help="column of answers")
    add(
        "--system-column",
        metavar="NAME",
        help="column of system prompts: a system turn before a chat without one, {system} in a template",
    )
    add("--messages-column", metavar="NAME", help="column of chats")
    add(
        "--template",
        metavar="TEXT",
        help="prompt of a row, with {instruction} for the text of the prompt column, and perhaps {input} and {system}; "
        "\\n is a line break",
    )
    add("--template-with-input", metavar="TEXT", help="prompt of a row with an input (default: the template)")
    add(
        "--response-header",
        metavar="TEXT",
        help="what stands before an answer that is scored alone (default: the template's last line)",
    )


def rows_format(options: argparse.Namespace) -> FormatOptions:
    """What the options of `add_format` say."""
    return FormatOptions(**{field.name: getattr(options, field.name) for field in fields(FormatOptions)})


def going_with(options: argparse.Namespace, names: Mapping[str, str], needed: str | None) -> dict[str, Any]:
    """The options that were given, by what they are for.

    Args:
        names: for what, to the option.
        needed: the option that they go with, where it was not given; None where it was.

    Raises:
        UserError: for an option without the one that it goes with.
    """
    given = {name: getattr(options, option) for name, option in names.items() if getattr(options, option) is not None}
    if given and needed is not None:
        raise UserError(f"--{names[min(given)].replace('_', '-')} goes with {needed}.")
    return given
