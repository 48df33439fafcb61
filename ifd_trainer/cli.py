"""The command line: `ifd-trainer score | select | histogram | threshold | reflect | gate | train | report | recipes`.

Heavy imports wait until a command runs, so that `--help` answers at once, and until the paths it is given are there.
Exit codes: 0 done; 1 `score` is done, but no row has a score (a warning on standard error), or a fault of this program
(with its trace); 2 wrong input or usage, or too little memory or disk (one line on standard error that says how to mend
it; with --debug the trace too); 130 interrupted.
"""

from __future__ import annotations

import argparse
import atexit
import errno
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import fields, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from packaging.version import Version

from . import __version__
from .data.definitions import DEFAULT_MAX_LENGTH, DEFINITIONS, KNOWN_DEFINITIONS, SCORE_KINDS
from .data.format_choice import FormatOptions, columns_read, resolve_format
from .data.formats import FORMATS
from .data.paths import check_folder, check_model, check_readable, check_rows, check_writable
from .errors import NotFoundError, NotInstalledError, RunError, UserError, one_line
from .method.choices import (
    CALIBRATED,
    GATES,
    RANKED_BY,
    ROWS_TOGETHER,
    SIMILARITY,
    TOKEN_SHARE,
    TURN_RULES,
    WITHOUT,
)
from .method.columns import (
    EOT_LOSS,
    IFD_COLUMNS,
    IMAGE_COLUMNS,
    KNOWN_COLUMNS,
    OWN_COLUMNS,
    REFLECTED_COLUMNS,
    SELECTIVE_COLUMNS,
    SIFD,
    SPIN_COLUMNS,
)
from .method.further_scores import FURTHER, SCORED_BY_MODEL, further_names, replaced_columns
from .method.number_words import many
from .method.text_agreement import AGREEMENTS
from .training.recipe_file import COMPARED, check_recipe, copy_recipe, read_recipe, recipe_titles
from .training.recipe_help import train_help

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from .data.table_reader import TableReader
    from .method.duplicates import Duplicates
    from .method.gates import Gate
    from .method.quotas import Quotas
    from .method.ranking import Ranking
    from .method.score_histogram import Threshold
    from .publish.select import PoolSelection
    from .report.report_data import Origin
    from .scoring.knowledge import KnowledgeScorer
    from .scoring.own_answers import OwnAnswerScorer
    from .scoring.transform import IFDScorer

_TRL = "1.8"  # the first one that recipes were run with
ALL = "all"  # of --keep
GREEDY = "greedy"  # of --spin
_CHECKED_ROWS = 64  # to find out whether rows, format, definition and tokenizer go together
# Options of `score` that are the transform's by the same names.
_OF_SCORER = (
    *("definition", "max_length", "min_answer_tokens", "score_truncated", "turns", "dtype", "token_budget"),
    *("token_losses", "revision", "trust_remote_code", "guess"),
)
# Options of `score --known`, by what the transform calls them.
_OF_KNOWLEDGE = {
    "max_new_tokens": "known_max_new_tokens",
    "agreement": "known_agreement",
    "threshold": "known_threshold",
    "temperature": "known_temperature",
    "top_p": "known_top_p",
    "seed": "known_seed",
    "token_budget": "token_budget",
}
# Options of `reflect` that are the transform's by the same names.
_OF_REFLECTION = ("max_length", "score_truncated", "dtype", "token_budget", "revision", "trust_remote_code", "guess")
# Options of `score --spin`, likewise.
_OF_SPIN = {name: f"spin_{name}" for name in ("max_new_tokens", "agreement", "temperature", "top_p", "seed")}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [word for word in arguments if word != "--debug"]
    try:
        if arguments[:1] == ["train"]:  # its options are TRL's dataclasses, parsed by TRL's parser
            return _train(arguments[1:])
        if arguments[:1] == ["compare"]:
            return _compare(arguments[1:])
        options = _parser().parse_args([_hyphened(word) for word in arguments])
        _check_words(options)
        return options.run(options)
    except KeyboardInterrupt:
        _say("interrupted; what is saved stays: run the same command again to go on")
        return 130
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes at exit
        return 141
    except Exception as error:
        told = _told(error, arguments)
        if told is None:
            _say(
                "this error is not yours but a fault of this program, or of one that it uses, and worth a report with "
                "the lines below:"
            )
        if told is None or debug:
            traceback.print_exc()
        if told is not None:
            _say(f"error: {told}")
        return 1 if told is None else 2


def _hyphened(word: str) -> str:
    """An option with hyphens in its name, whichever way it is written; anything else as it is.

    >>> _hyphened("--max_length"), _hyphened("--output=a_b"), _hyphened("a_b")
    ('--max-length', '--output=a_b', 'a_b')
    """
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


def _say(text: str) -> None:
    print(f"ifd-trainer: {text}", file=sys.stderr)


def _told(error: Exception, arguments: Sequence[str]) -> str | None:
    """The line for an error that a user can mend; None for a fault of the program."""
    if isinstance(error, UserError):
        return " ".join(str(error).splitlines())
    if _out_of_memory(error):
        return (str(error).splitlines() or ["out of memory"])[0]
    file = getattr(error, "filename", None) or "a file"
    code = error.errno if isinstance(error, OSError) else None
    if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or "No space left on device" in str(error):
        more = "add --resume_from_checkpoint true to go on" if arguments[:1] == ["train"] else "then go on"
        room = f"Make room; the same command will {more} ({one_line(error)})."
        return f"{file} cannot be written: no space is left. {room}"
    if code in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{file} cannot be read or written: {error.strerror}. Change its permissions, or name another place."
    return None


def _out_of_memory(error: Exception) -> bool:
    torch = sys.modules.get("torch")  # what was not imported has raised nothing
    kinds = (MemoryError,) if torch is None else (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or "DefaultCPUAllocator: can't allocate memory" in str(error)


def _positive(text: str) -> int:
    """The type of options that count something."""
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"wants a whole number of at least 1, got {text!r}")
    return int(text)


def _answers(text: str) -> int | str:
    """The type of how many answers are sampled, or that the greedy one is taken."""
    return text if text == GREEDY else _positive(text)


def _whole(text: str) -> int:
    """The type of a seed."""
    if not text.strip().isdecimal():
        raise argparse.ArgumentTypeError(f"wants a whole number of at least 0, got {text!r}")
    return int(text)


def _number(text: str) -> float:
    """The type of options that take a number, which nan is not."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if value != value:
        raise argparse.ArgumentTypeError(f"wants a number, got {text!r}")
    return value


def _share(text: str) -> float:
    """The type of options that take a share of 1, which is not 0."""
    value = _number(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"wants a number above 0 and at most 1, got {text!r}")
    return value


def _above_zero(text: str) -> float:
    """The type of a temperature."""
    value = _number(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"wants a number above 0, got {text!r}")
    return value


def _above_zero_or_inf(text: str) -> float:
    """The type of a limit that may be switched off."""
    value = _number(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"wants a number above 0, or inf, got {text!r}")
    return value


def _not_negative(text: str) -> float:
    """The type of a size, which may be 0."""
    value = _number(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"wants a number of at least 0, got {text!r}")
    return value


def _limit(text: str) -> float | str:
    """The type of a limit: a number, or that it is to be measured."""
    if text == CALIBRATED:
        return text
    try:
        return _number(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"wants a number or {CALIBRATED}, got {text!r}") from None


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. See {self.prog} --help.")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
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
    _add_score(commands)
    _add_select(commands)
    _add_histogram(commands)
    _add_threshold(commands)
    commands.add_parser("train", help="fine-tune with selection inside the loop (see: ifd-trainer train --help)")
    commands.add_parser("compare", help="train several ways to choose rows, and say what their differences are worth")
    _add_reflect(commands)
    _add_gate(commands)
    _add_report(commands)
    _add_recipes(commands)
    return parser


def _add_score(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "score",
        help="attach IFD columns to a data set",
        description=f"Attach the columns {', '.join(IFD_COLUMNS[:-1])} and {IFD_COLUMNS[-1]} to every row. Can be "
        "interrupted and run again with the same options: rows that are done are not scored twice. Under torchrun or "
        "accelerate launch the processes share the rows, each on its own device.",
        epilog="Examples: ifd-trainer score alpaca.json --model HuggingFaceTB/SmolLM2-135M --output scored.parquet; "
        "torchrun --nproc-per-node 8 -m ifd_trainer score alpaca.json --model ... --output scored.parquet; accelerate "
        "launch --multi_gpu --num_processes 8 -m ifd_trainer score ... (with --cpu it starts one process only)",
    )
    add = parser.add_argument
    add("data", help="rows: a .json, .jsonl, .csv or .parquet file, or a hub name")
    add("--model", required=True, help="model that scores: a hub name or a local path")
    add("--revision", help="branch, tag or commit of a hub name (default: its main branch)")
    add("--trust-remote-code", action="store_true", help="run code that comes with the model")
    add("--output", required=True, help="file to write: .json, .jsonl, .csv or .parquet")
    _add_format(add)
    meanings = "; ".join(f"{name}: {each.meaning}" for name, each in DEFINITIONS.items())
    add("--definition", default="paper", choices=DEFINITIONS, help=f"{meanings} (default: paper)")
    limits = " and ".join(f"{name} {most}" for name, most in DEFAULT_MAX_LENGTH.items())
    add(
        "--max-length",
        type=_positive,
        help=f"most tokens of prompt and answer (default: the model's window; {limits}, where the window is not "
        "smaller)",
    )
    add(
        "--turns",
        choices=TURN_RULES,
        help="score every answer of a conversation, in columns of lists, and the row by that rule over them (default: "
        "the last answer alone); tokens is the loss that a run on all answers trains on; further scores have such "
        "columns too",
    )
    add("--min-answer-tokens", type=_positive, default=1, help="shorter answers are not scored (default 1)")

    add(
        "--score-truncated",
        action="store_true",
        help="score the part of a too long answer that fits, as the paper does",
    )
    further = "; ".join(f"{name}: {FURTHER[name].meaning}" for name in SCORED_BY_MODEL)
    add(
        "--scores",
        nargs="+",
        metavar="NAME",
        help=f"further scores to attach, each a column of its name ({further}); rifd attaches rcas and rdas too",
    )
    add(
        "--guess",
        metavar="TEXT",
        help="what rifd asks a model that is shown an answer, with {answer} where that stands; \\n is a line break",
    )
    add(
        "--without",
        choices=WITHOUT,
        help="of rows with images: what a direct score leaves out, image and question (both, the default) or the "
        f"image; of such rows {' and '.join(IMAGE_COLUMNS)} are attached too",
    )
    add("--max-images", type=_positive, metavar="N", help="most images of a row (default: as many as fit)")
    add("--split", default="train", help="split of a hub data set (default train)")
    add("--limit", type=_positive, help="score the first N rows only")
    add("--device", help="cuda, mps or cpu (default: the first there is)")
    add("--dtype", help="float32, bfloat16 or float16 (default: float32 on a CPU, else the model's)")
    add(
        "--token-budget",
        type=_positive,
        help="tokens of a batch (default: on a CPU 2048, fewer for a model with wide layers; elsewhere what a "
        "quarter of the device's memory holds, or 3 GiB, as measured on a few batches)",
    )
    add(
        "--token-losses",
        action="store_true",
        help="attach the losses of single tokens too, the lists cas_tokens and das_tokens, for `select --score sifd`",
    )
    add(
        "--sifd",
        type=_share,
        nargs="?",
        const=TOKEN_SHARE,
        metavar="K",
        help="attach S-IFD too, over this share of all tokens, those of which the prompt tells most "
        f"({TOKEN_SHARE} if none is given), and the losses of tokens that it is made of",
    )
    add(
        "--neighbours",
        type=_positive,
        metavar="N",
        help="of rows that were scored with --sifd or --token-losses by this model: keep their scores, and attach how "
        "much of S-IFD stays under noise on the embeddings, as the mean and the spread of N neighbours (sifd_mean, "
        "sifd_std). Two forwards for each; saves fewer rows at a time (8 on a CPU, else 256)",
    )
    add("--noise", type=_not_negative, metavar="X", help="size of that noise, as NEFTune's alpha (default 5)")
    add("--noise-seed", type=_whole, metavar="N", help="of that noise (default 0)")
    add("--part-rows", type=_positive, help="rows saved at a time (default 64 on a CPU, else 2048)")
    add(
        "--calibrate",
        action="store_true",
        help="measure too how answers under the prompts of other rows score, and how answers end that were cut off "
        "(256 and 128 of them), for `select --max-ifd calibrated` and `--drop-unfinished`; kept in OUTPUT.ifd.yaml",
    )
    add(
        "--known",
        type=_positive,
        metavar="N",
        help="let the model answer each prompt N times, and say how many of its answers agree with the row's: the "
        f"columns {', '.join(KNOWN_COLUMNS)}. Takes far longer than scoring; saves fewer rows at a time (8 on a CPU, "
        "else 256)",
    )
    add("--known-max-new-tokens", type=_positive, metavar="N", help="most tokens of such an answer (default 128)")
    add(
        "--known-agreement",
        choices=AGREEMENTS,
        help="how texts agree: F1 of their words (default), exact match, or ROUGE-L",
    )
    add("--known-threshold", type=_share, metavar="X", help="agreement from which an answer agrees (default 0.5)")
    add("--known-temperature", type=_above_zero, metavar="X", help="of sampling, above 0 (default 0.7)")
    add("--known-top-p", type=_share, metavar="X", help="probability of the likeliest tokens sampled from (default 1)")
    add("--known-seed", type=_whole, metavar="N", help="of sampling (default 0)")
    add(
        "--spin",
        type=_answers,
        nargs="?",
        const=GREEDY,
        metavar="N",
        help="let the model answer each prompt, greedily or, with N, N times by sampling, and say how much more the "
        f"row's answer surprises it than its own (SPIN, arXiv 2401.01335): the columns {', '.join(SPIN_COLUMNS)}, for "
        "`--gates matched` of select. Saves fewer rows at a time, as --known does",
    )
    add("--spin-max-new-tokens", type=_positive, metavar="N", help="most tokens of such an answer (default 128)")
    add("--spin-agreement", choices=AGREEMENTS, help="how texts agree (default f1)")
    add("--spin-temperature", type=_above_zero, metavar="X", help="of sampling, above 0 (default 1)")
    add("--spin-top-p", type=_share, metavar="X", help="probability of the likeliest tokens sampled from (default 1)")
    add("--spin-seed", type=_whole, metavar="N", help="of sampling (default 0)")
    parser.set_defaults(run=_score)


def _add_format(add: Callable[..., Any]) -> None:
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


def _add_select(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "select",
        help="keep the rows with the highest IFD, with a data card",
        description="Keep the rows with the highest IFD under a limit. All columns stay; the scores, ifd_definition "
        "(where it is known), ifd_rank (1 is the highest) and ifd_reason are added. A data card says where the rows "
        "come from and what became of the rest.",
        epilog="Examples: ifd-trainer select scored.parquet --keep 0.05 --output cherry.jsonl; "
        "ifd-trainer select alpaca.json --scores alpaca_cherry.pt --keep 0.05 --output cherry/",
    )
    add = parser.add_argument
    add(
        "data",
        help="scored rows, as `ifd-trainer score` wrote them, or rows for --scores: a .json, .jsonl, .csv or .parquet "
        "file, a folder, or a hub name",
    )
    add(
        "--output",
        required=True,
        help="file to write (.json, .jsonl, .csv or .parquet; its card beside it as .md), or a folder for "
        "train.parquet, README.md and histogram.png",
    )
    add(
        "--scores",
        help="file of scores for the rows, matched by position: of Cherry_LLM (.pt), Superfiltering or data-juicer; by "
        "default those in DATA",
    )
    add("--scores-format", choices=SCORE_KINDS, help="what wrote the scores; told from their content by default")
    add("--scored-by", metavar="MODEL", help="model that gave the scores, for the card and for --drop-mismatched")
    add("--trust-remote-code", action="store_true", help="run code that comes with that model")
    add("--split", default="train", help="split of a folder or a hub data set (default train)")
    add(
        "--keep",
        help=f"a fraction of all rows, scored or not (0.1, the default), a number (1000), or {ALL}: every row that is "
        "not dropped",
    )
    add(
        "--max-ifd",
        type=_limit,
        metavar="X",
        help="drop rows with an IFD of X or more (default 1 where rows are ranked by IFD or sifd, else none; inf: "
        "none; calibrated: the limit that a share --alpha of mismatched rows stays below, by what `score --calibrate` "
        "measured)",
    )
    alpha = "share of mismatched rows that a calibrated limit may let through (default 0.05)"
    add("--alpha", type=_number, metavar="A", help=alpha)
    add(
        "--score",
        action="append",
        metavar="COLUMN[:WEIGHT]",
        help="column of numbers to rank by, highest first, such as a further score (default: ifd_ppl for scores of "
        "Superfiltering's definition, else ifd); given several times, ranks are added with these weights; a negative "
        "one ranks lowest first (rifd:-1), and rows without a number are not kept",
    )
    add(
        "--token-share",
        type=_number,
        metavar="K",
        help="with --score sifd: make it of this share of all tokens, those of which the prompt tells most (default "
        "0.5, where there is no such column yet), from what `score --token-losses` attached",
    )
    add(
        "--targets",
        metavar="FILE",
        help="keep the rows most like these examples of what a model is to be good at (RDS+, arXiv 2503.01807): rows, "
        "some of which may have no answer, that take turns; each takes the row most like it. Adds the columns "
        "target_similarity and target_row",
    )
    add(
        "--embedder",
        metavar="MODEL",
        help="model that says how alike rows and targets are (default: the one that gave the scores)",
    )
    add("--per", metavar="COLUMN", help="column, such as a source, whose values have the quotas or floors that follow")
    add(
        "--quota",
        action="append",
        metavar="[VALUE=]N",
        help="keep exactly so many rows of each value, or of this one, the best: a number or a fraction of its rows "
        "(--quota 0.1 --quota web=500)",
    )
    add(
        "--floor",
        action="append",
        metavar="[VALUE=]N",
        help="keep at least so many rows of each value, or of this one; --keep says how many in all",
    )
    add(
        "--threshold",
        metavar="FILE",
        help="keep the rows with the score at or above this: a number, or the file that `ifd-trainer threshold` wrote, "
        "which names the score too. How many that are is counted; it takes the place of --keep",
    )
    add("--id-column", help="column that breaks ties (default: row_id or id if its values are unique, else position)")
    add("--drop-refusals", action="store_true", help="drop rows whose answer looks like a refusal (English phrases)")
    add(
        "--drop-unfinished",
        action="store_true",
        help="drop rows whose answer stops before its end, by the loss of the end of turn behind it and what `score "
        "--calibrate` measured; none where that says too little",
    )
    add(
        "--drop-duplicates",
        type=_number,
        nargs="?",
        const=SIMILARITY,
        metavar="SIMILARITY",
        help="keep one of the rows that say the same: with so large a share of common shingles (four bytes of text) in "
        f"prompts and in answers, 0.5 to 1, {SIMILARITY} if none is given; holds all texts in memory",
    )
    add(
        "--drop-mismatched",
        action="store_true",
        help="drop rows whose answer fits one of 9 other prompts at least as well as its own, by the model that gave "
        "the scores; of the rows that would be kept alone, which takes about 9 forwards of each",
    )
    _add_gates(add)
    add("--all", action="store_true", help="write all rows, the dropped ones with their reason")
    add("--strict", action="store_true", help="fail when fewer rows are eligible than asked for")
    add("--card", action=argparse.BooleanOptionalAction, default=True, help="write a data card (default)")
    add("--push-to-hub", metavar="USER/NAME", help="push rows and card to this data set")
    add("--private", action="store_true", help="make the pushed data set private if it is new")
    parser.set_defaults(run=_select)


def _add_histogram(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "histogram",
        help="what a site may show of its scores: counts between fixed edges",
        description="Count scored rows between edges that are the same for every site, and write the counts: no id, no "
        "text and no score of a row. A bin that would hold fewer than --least rows is merged with its neighbours. "
        "`ifd-trainer threshold` adds the files of all sites up.",
        epilog="Example: ifd-trainer histogram scored.jsonl --score ira --output site_a.json",
    )
    add = parser.add_argument
    add("data", help="scored rows, as `ifd-trainer score` wrote them")
    add("--output", required=True, metavar="FILE", help="file to write (JSON)")
    add("--score", default="ira", metavar="COLUMN", help="column of numbers that is counted (default ira)")
    add(
        "--least",
        type=_positive,
        default=ROWS_TOGETHER,
        metavar="N",
        help=f"rows of a bin that is shown (default {ROWS_TOGETHER})",
    )
    add(
        "--edges",
        nargs=3,
        type=_number,
        metavar=("LOW", "HIGH", "BINS"),
        help="lowest edge, highest one and number of bins, the same for all sites (default: usual ones of ifd, ifd_ppl "
        "and ira)",
    )
    add("--max-ifd", type=_number, metavar="X", help="leave out rows with an IFD of X or more (default: 1 of an IFD)")
    add("--split", default="train", help="split of a folder or a hub data set (default train)")
    parser.set_defaults(run=_histogram)


def _add_threshold(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "threshold",
        help="the score at which sites keep a share of all their rows, from their histograms",
        description="Agree on a threshold: the score at or above which a share of the rows of all sites lies, by "
        "their histograms alone. It is exact to the bin that it lies in, which the file tells, and how many rows it "
        "keeps at each site, about and at least and at most.",
        epilog="Example: ifd-trainer threshold site_*.json --keep 0.2 --output threshold.json; then at each site "
        "ifd-trainer select scored.jsonl --threshold threshold.json --output kept.jsonl",
    )
    add = parser.add_argument
    add("sites", nargs="+", metavar="FILE", help="histograms, one of each site")
    add("--keep", required=True, help="a fraction of the rows of all sites (0.2), or a number (1000)")
    add("--output", required=True, metavar="FILE", help="file to write (JSON)")
    parser.set_defaults(run=_threshold)


def _add_gates(add: Callable[..., Any], required: bool = False) -> None:
    """The options of gates for synthetic rows."""
    add(
        "--gates",
        nargs="+",
        required=required,
        metavar="NAME[:NUMBER]",
        help=f"hold back synthetic rows ({', '.join(GATES)}), in this order: answers whose length in characters is "
        "further from the mean of the examples' than so many standard deviations (length:2); that are no answers, by "
        "rules and English phrases (noise); rows that say what an example or another row says (copies:0.85); rows "
        "whose spin_gap, which `score --spin` attached, is at most so many nats per token (matched:0.1)",
    )
    add(
        "--gate-examples",
        metavar="FILE",
        help="rows that the data was generated from, for the gates length and copies (default: the data's own lengths)",
    )


def _add_reflect(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "reflect",
        help="take rewritten instructions and answers where they are worth more to a model",
        description="Of each row and its rewritten version, take the rewritten instruction where its IFD rises, else "
        "the rewritten answer where its r-IFD falls, both below a limit, else the row as it is (Selective "
        "Reflection-Tuning, arXiv 2402.10110). Writes the texts that are taken, their scores, those of the versions, "
        "and reflect_reason. Can be interrupted, and shares rows over processes, as `score` does.",
        epilog="Examples: ifd-trainer reflect alpaca.jsonl --rewritten rewritten.jsonl --model ... --output "
        "reflected.jsonl; ifd-trainer reflect both.jsonl --rewritten-column output=better --model ... --output "
        "reflected.jsonl",
    )
    add = parser.add_argument
    add("data", help="rows: a .json, .jsonl, .csv or .parquet file, or a hub name")
    add("--rewritten", metavar="FILE", help="rewritten rows, with the ids (row_id, id or --id-column) of DATA's")
    add(
        "--rewritten-column",
        action="append",
        metavar="NAME=COLUMN",
        help="without --rewritten: the column of DATA with rewritten texts for its column NAME (default: those called "
        "rewritten_NAME)",
    )
    add(
        "--id-column",
        metavar="NAME",
        help="column by which rewritten rows are found (default: row_id or id, else none)",
    )
    add("--model", required=True, help="model that is to be trained, which scores: a hub name or a local path")
    add("--revision", help="branch, tag or commit of a hub name (default: its main branch)")
    add("--trust-remote-code", action="store_true", help="run code that comes with the model")
    add("--output", required=True, help="file to write: .json, .jsonl, .csv or .parquet")
    _add_format(add)
    add(
        "--limit",
        type=_above_zero_or_inf,
        default=1.0,
        metavar="X",
        help="IFD and r-IFD of what is taken are below it (default 1; inf: no limit)",
    )
    add("--guess", metavar="TEXT", help="what r-IFD asks a model that is shown an answer, with {answer} for that")
    add("--max-length", type=_positive, help="most tokens of prompt and answer (default: the model's window)")
    add("--score-truncated", action="store_true", help="score the part of a too long answer that fits")
    add("--split", default="train", help="split of a hub data set (default train)")
    add("--device", help="cuda, mps or cpu (default: the first there is)")
    add("--dtype", help="float32, bfloat16 or float16 (default: float32 on a CPU, else the model's)")
    add("--token-budget", type=_positive, help="tokens of a batch (default: as for `score`)")
    add("--part-rows", type=_positive, help="rows saved at a time (default 64 on a CPU, else 2048)")
    parser.set_defaults(run=_reflect)


def _add_gate(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "gate",
        help="hold back synthetic rows by their texts, before they are scored",
        description="Write the rows that pass all gates, or with --all all rows, each with its gate_reason "
        "(SELF-GUIDE, arXiv 2407.12874). No model runs. `select --gates` does the same among scored rows.",
        epilog="Example: ifd-trainer gate synthetic.jsonl --gates noise length copies --gate-examples seeds.jsonl "
        "--output clean.jsonl",
    )
    add = parser.add_argument
    add("data", help="rows: a .json, .jsonl, .csv or .parquet file, a folder, or a hub name")
    add("--output", required=True, help="file to write: .json, .jsonl, .csv or .parquet")
    _add_gates(add, required=True)
    _add_format(add)
    add("--split", default="train", help="split of a folder or a hub data set (default train)")
    add("--id-column", help="of rows that say the same, the lowest id stays (default: row_id or id, else position)")
    add("--all", action="store_true", help="write all rows, the dropped ones with their reason")
    parser.set_defaults(run=_gate)


def _add_report(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "report",
        help="an HTML page about a run or a scored data set",
        description="Write report.html and its plots for a training run (its output folder), for scored rows, or for "
        "the folder that `ifd-trainer select` wrote; compare.html for the folder of a comparison.",
        epilog="Example: ifd-trainer report scored.parquet --output report/",
    )
    add = parser.add_argument
    add(
        "source",
        help="output folder of a run or of a comparison, folder of selected rows (with train.parquet), or a scored "
        ".json, .jsonl, .csv or .parquet file",
    )
    add("--output", help="folder to write to (default: beside the source)")
    add("--label", help="column of labels to show")
    add("--rows", type=_positive, help="rows in each table (default 10; of a comparison 3)")
    parser.set_defaults(run=_report)


def _add_recipes(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "recipes",
        help="list the recipes of this package, or copy one",
        description="List the recipes that come with this package, or copy one to change it and run it with "
        "`ifd-trainer train`.",
        epilog="Example: ifd-trainer recipes alpaca_cherry_5pct",
    )
    parser.add_argument("name", nargs="?", help="recipe to copy; without one, all are listed")
    parser.add_argument("--output", metavar="PATH", help="file or folder to write to (default: NAME.yaml, here)")
    parser.set_defaults(run=_recipes)


# Each command looks at the paths that it is given before it imports anything slow.


def _check_words(options: argparse.Namespace) -> None:
    for name, value in vars(options).items():
        if isinstance(value, str) and not value.strip() and name != "response_header":  # there may be none
            raise UserError(f"{name.replace('_', '-')} is empty: give it a value, or leave it out.")
    # Of a file there is one split, and of a folder one revision: what is asked for would be ignored without a word.
    if getattr(options, "split", "train") != "train" and Path(options.data).is_file():
        raise UserError(f"--split {options.split}: the file {options.data} has no splits. Leave it out.")
    if getattr(options, "revision", None) is not None and Path(options.model).is_dir():
        raise UserError(f"--revision {options.revision}: the folder {options.model} has no revisions. Leave it out.")


def _score(options: argparse.Namespace) -> int:
    further = further_names(" ".join(options.scores or ()))
    options.guess = options.guess and options.guess.replace("\\n", "\n")
    _check_neighbours(options)
    check_writable(options.output)
    check_model(options.model)
    check_rows(options.data)

    import pyarrow.compute as pc

    from .data.files import check_apart, check_features, load_rows, source_digest, with_columns, write_rows
    from .data.image_rows import hold_images, with_stored_images
    from .data.message_trees import as_chats
    from .publish.provenance import calibrated, provenance_of, scored_before, write_provenance
    from .scoring.calibration import shortage
    from .scoring.job_parts import Parts, kept
    from .scoring.knowledge import ScoredAndAsked
    from .scoring.neighbourhood import NeighbourScorer
    from .scoring.processes import Process
    from .scoring.scoring_job import join_parts, score_parts
    from .scoring.selective_columns import attach_selective_ifd
    from .scoring.transform import SCORES_VERSION

    check_apart(options.output, options.data, options.split)
    process = Process.from_environment()
    if (status := process.finished()) is not None:
        return status if process.main else 0
    format = FormatOptions(**{field.name: getattr(options, field.name) for field in fields(FormatOptions)})
    scorer = _scorer(options, process.local_rank, further)
    if options.calibrate:
        scorer.check_single("--calibrate")
    knowledge, own = _knowledge(options, scorer), _own_answers(options, scorer)
    # What is read is cached on disk: the other processes find it there.
    source = process.main_first("rows", lambda: load_rows(options.data, options.split))
    rows = as_chats(source, process.main)
    rows = rows.select(range(min(options.limit, len(rows)))) if options.limit else rows
    if not len(rows):
        raise UserError(f"{options.data} has no rows to score.")
    if hold_images(rows):
        rows, scorer = with_stored_images(rows), _image_scorer(options, process.local_rank, further)
    elif options.without or options.max_images:
        given = "--without" if options.without else "--max-images"
        raise UserError(f"{given} is of rows with images, and the rows have none in a column `images` or `image`.")
    check_features(rows.features, options.output)
    bare = options.definition == "superfiltering"
    scorer.format = resolve_format(format, rows.column_names, bare, warn=process.main)
    process.main_first("check", lambda: scorer.check(rows[:_CHECKED_ROWS]))  # no folder and no weights before that
    settings = scorer.settings(rows.column_names)
    size = options.part_rows or (64 if settings["device"] == "cpu" else 2048)
    weights = scorer.digest()
    origin = provenance_of(settings, options.model, weights, options.data)
    # Scored again: what was chosen by older scores goes with them.
    worker, replaced = scorer, [*OWN_COLUMNS, *replaced_columns(rows.column_names, scorer.further_columns)]
    more = {}
    if knowledge is not None or own is not None or options.neighbours is not None:
        size = options.part_rows or (8 if settings["device"] == "cpu" else 256)
    if knowledge is not None:
        knowledge.check()
        worker, replaced = ScoredAndAsked(knowledge), [*replaced, *KNOWN_COLUMNS]
        origin = replace(origin, known=knowledge.settings())
        more = {f"known_{name}": value for name, value in knowledge.settings().items()}
    if own is not None:
        own.check()
        worker, replaced = ScoredAndAsked(own), [*replaced, *SPIN_COLUMNS]
        origin = replace(origin, spin=own.settings())
        more = {f"spin_{name}": value for name, value in own.settings().items()}
    if options.neighbours is not None:
        origin = scored_before(options.data, rows, options.model, weights)
        noise = {"neighbours": options.neighbours, "alpha": options.noise, "seed": options.noise_seed}
        noise = {name: value for name, value in noise.items() if value is not None}
        worker, replaced = NeighbourScorer(scorer, rows, options.sifd or TOKEN_SHARE, **noise), SELECTIVE_COLUMNS
        more = {f"sifd_{name}": value for name, value in worker.settings.items()}
    # The same for all processes, and for any number of them.
    job = {"data": source_digest(options.data, source), "rows": len(rows), "part_rows": size}
    job |= {"weights": weights, **settings, **more, "scores_version": SCORES_VERSION}
    del job["token_budget"]  # with another one, after trouble with memory, scores differ by rounding alone
    with closing(process.main_first("parts", lambda: Parts(options.output, job, process.main))) as parts:
        try:
            read = columns_read(scorer.format, rows.column_names)
            score_parts(rows, worker, parts, size, process, columns=read)
        except RunError:  # the parts are gone
            if process.finished() is None:
                raise
        if not process.main:
            if process.finished() is not None:
                parts.remove()  # what this process, started again, has made after it was finished
            return 0
        scores = join_parts(rows, worker, parts, size)
        rows = with_columns(rows.remove_columns([name for name in rows.column_names if name in replaced]), scores)
        if options.sifd is not None or options.neighbours is not None:
            share = options.sifd or TOKEN_SHARE
            rows = attach_selective_ifd(rows, share)
            chosen = {"share": share} if options.neighbours is None else worker.settings
            origin = origin and replace(origin, sifd=chosen)
        if options.calibrate:
            calibration = scorer.calibrate(rows)
            origin = calibrated(origin, calibration)
        with kept():
            write_rows(rows, options.output, parts.folder)
            if origin is not None:
                write_provenance(options.output, origin, rows)
        counted = sorted(pc.value_counts(rows.data["ifd_status"]).to_pylist(), key=lambda status: -status["counts"])
        parts.check_joined()
        counts = {status["values"]: status["counts"] for status in counted}
        process.finish(status := 0 if "ok" in counts else 1)
        parts.remove()
    shown = ", ".join(f"{count:,} {status}" for status, count in counts.items())
    print(f"{many(len(rows), 'row')}: {shown}. Written to {options.output}.")
    if options.calibrate and (short := shortage(calibration, options.definition)):
        _say(f"warning: {short}")
    if status:
        _say(
            f"warning: none of {many(len(rows), 'row')} has a score ({shown}): nothing can be selected from "
            f"{options.output}. Check the format and the options; `ifd_status` says why for each row."
        )
    return status


def _check_neighbours(options: argparse.Namespace) -> None:
    """Raise for what goes with neighbours alone, and for what does not go with them."""
    if options.neighbours is None:
        if idle := [name for name in ("noise", "noise_seed") if getattr(options, name) is not None]:
            raise UserError(f"--{idle[0].replace('_', '-')} goes with --neighbours N.")
        options.token_losses |= options.sifd is not None
        return
    of_scoring = [name for name in ("scores", "guess", "turns", "calibrate", "known", "spin") if getattr(options, name)]
    of_scoring += ["token_losses"] if options.token_losses else []
    if of_scoring:
        raise UserError(
            f"--neighbours leaves the scores of rows as they are, and --{of_scoring[0].replace('_', '-')} is for "
            "scoring them: score them first, with --sifd, to a file, and then that file with --neighbours."
        )


def _device(options: argparse.Namespace, local_rank: int) -> str:
    """The device that scores: each process on a machine has one of its own."""
    import torch

    from .scoring.devices import default_device

    device = options.device
    return default_device(local_rank) if device is None or (device == "cuda" and torch.cuda.is_available()) else device


def _image_scorer(options: argparse.Namespace, local_rank: int, further: Sequence[str]) -> IFDScorer:
    """What scores rows with images; paths of images begin beside the file of rows."""
    from .scoring.image_scorer import ImageIFDScorer

    texts = {"turns": None, "token_losses": False, "score_truncated": False, "guess": None, "known": None}
    texts |= {"calibrate": False, "definition": "paper", "spin": None}
    if idle := [name for name, usual in texts.items() if getattr(options, name) != usual]:
        raise UserError(f"--{idle[0].replace('_', '-')} is of rows of text, and the rows have images: leave it out.")
    names = ("max_length", "min_answer_tokens", "max_images", "dtype", "token_budget", "revision", "trust_remote_code")
    given = {name: getattr(options, name) for name in names}
    folder = Path(options.data).resolve().parent if Path(options.data).is_file() else None
    given |= {"without": options.without or WITHOUT[0], "image_folder": folder, "scores": further}
    return ImageIFDScorer(options.model, device=_device(options, local_rank), **given)


def _scorer(options: argparse.Namespace, local_rank: int, further: Sequence[str]) -> IFDScorer:
    from .scoring.transform import IFDScorer

    device = _device(options, local_rank)
    given = {name: getattr(options, name) for name in _OF_SCORER}
    return IFDScorer(options.model, device=device, scores=further, **given)


def _knowledge(options: argparse.Namespace, scorer: IFDScorer) -> KnowledgeScorer | None:
    """What asks the model, beside what scores; None where nothing is to be asked."""
    from .scoring.knowledge import KnowledgeScorer

    given = {name: getattr(options, option) for name, option in _OF_KNOWLEDGE.items()}
    given = {name: value for name, value in given.items() if value is not None}
    if options.known is None:
        if idle := sorted(given.keys() - {"token_budget"}):
            raise UserError(f"--{_OF_KNOWLEDGE[idle[0]].replace('_', '-')} goes with --known N.")
        return None
    return KnowledgeScorer(scorer, samples=options.known, **given)


def _histogram(options: argparse.Namespace) -> int:
    check_rows(options.data)
    output = _json_file(options.output)

    from .data.histogram_files import write_histogram
    from .publish.histograms import site_histogram

    told = {name: getattr(options, name) for name in ("split", "edges", "least", "max_ifd")}
    histogram = site_histogram(options.data, options.score, **told)
    write_histogram(output, histogram)
    filled = sum(count > 0 for count in histogram.counts)
    print(
        f"{many(sum(histogram.counts), 'row')} of {many(histogram.rows, 'row')} counted by {histogram.score} in "
        f"{many(filled, 'bin')} of at least {many(histogram.least, 'row')}. Written to {output}."
    )
    return 0


def _threshold(options: argparse.Namespace) -> int:
    output, paths = _json_file(options.output), [Path(site) for site in options.sites]
    for path in paths:
        check_readable(path)
        if output.exists() and output.samefile(path):
            raise UserError(f"--output {output} is a histogram that this command reads. Write to another file.")

    from .data.histogram_files import agreed, write_threshold
    from .method.schedule import Constant, parse_keep

    found = agreed(paths, Constant(parse_keep(options.keep)).keep)
    write_threshold(output, found)
    low, high = found.between
    print(
        f"{found.score} >= {found.value:.6g} keeps about {many(found.budget, 'row')} of {many(found.rows, 'row')} at "
        f"{many(len(found.sites), 'site')}; exactly so many are kept from somewhere in {low:.6g} to {high:.6g} on. "
        f"Written to {output}."
    )
    for site in found.sites:
        print(f"  {site.name}: about {site.expected:,.1f} of {many(site.rows, 'row')} ({site.fewest} to {site.most})")
    return 0


def _json_file(path: str) -> Path:
    """Where a histogram or a threshold is written."""
    if Path(path).suffix.lower() not in (".json", ".jsonl"):
        raise UserError(f"--output {path}: a histogram and a threshold are JSON. Name a file that ends in .json.")
    check_writable(path)
    return Path(path)


def _own_answers(options: argparse.Namespace, scorer: IFDScorer) -> OwnAnswerScorer | None:
    """What compares rows' answers with the model's own, beside what scores; None where it is not asked for."""
    from .scoring.own_answers import OwnAnswerScorer

    given = {name: getattr(options, option) for name, option in _OF_SPIN.items()}
    given = {name: value for name, value in given.items() if value is not None}
    if options.spin is None:
        if given:
            raise UserError(f"--{_OF_SPIN[min(given)].replace('_', '-')} goes with --spin.")
        return None
    if options.known is not None:
        raise UserError("--known and --spin are two jobs: score with one of them, and then that file with the other.")
    of_sampling = sorted(given.keys() & {"temperature", "top_p", "seed"})
    if options.spin == GREEDY and of_sampling:
        raise UserError(f"--{_OF_SPIN[of_sampling[0]].replace('_', '-')} goes with --spin N, which samples N answers.")
    given |= {} if options.token_budget is None else {"token_budget": options.token_budget}
    return OwnAnswerScorer(scorer, samples=None if options.spin == GREEDY else options.spin, **given)


def _reflect(options: argparse.Namespace) -> int:
    options.guess = options.guess and options.guess.replace("\\n", "\n")
    columns = _rewritten_columns(options)
    check_writable(options.output)
    check_model(options.model)
    sources = [options.data, *filter(None, [options.rewritten])]
    for source in sources:
        check_rows(source)

    import pyarrow.compute as pc

    from .data.files import check_apart, check_features, load_rows, source_digest, with_columns, write_rows
    from .method.reflection import KEPT_ORIGINAL, REWRITTEN_ANSWER, REWRITTEN_INSTRUCTION
    from .publish.provenance import provenance_of, write_provenance
    from .publish.reflect import joined, with_taken_texts
    from .scoring.job_parts import Parts, kept
    from .scoring.processes import Process
    from .scoring.reflection import ReflectionScorer
    from .scoring.scoring_job import join_parts, score_parts
    from .scoring.transform import SCORES_VERSION, IFDScorer

    for source in sources:
        check_apart(options.output, source, options.split)
    process = Process.from_environment()
    if (status := process.finished()) is not None:
        return status if process.main else 0
    format = FormatOptions(**{field.name: getattr(options, field.name) for field in fields(FormatOptions)})
    given = {name: getattr(options, name) for name in _OF_REFLECTION}
    scorer = IFDScorer(options.model, device=_device(options, process.local_rank), scores="rifd", **given)
    rows = source = process.main_first("rows", lambda: load_rows(options.data, options.split))
    if not len(rows):
        raise UserError(f"{options.data} has no rows to compare.")
    beside, other, missing = [], None, 0
    if options.rewritten is not None:
        other = process.main_first("rewritten rows", lambda: load_rows(options.rewritten))
        found = joined(rows, other, format, options.id_column)
        rows, beside, missing = found.rows, [*found.columns.values()], found.missing
        columns = found.columns
    reflection = ReflectionScorer(scorer, rewritten=columns, limit=options.limit)
    scorer.format = resolve_format(format, source.column_names, warn=process.main)
    process.main_first("check", lambda: reflection.check(rows[:_CHECKED_ROWS]))  # no folder and no weights before that
    check_features(rows.features, options.output)
    settings, weights = reflection.settings(rows.column_names), scorer.digest()
    size = options.part_rows or (64 if settings["device"] == "cpu" else 2048)
    reflected = {"rewritten": options.rewritten or settings["rewritten"], "limit": settings["limit"]}
    origin = replace(provenance_of(settings, options.model, weights, options.data), reflected=reflected)
    job = {"data": source_digest(options.data, source), "rows": len(rows), "part_rows": size}
    job |= {"rewritten_data": None if other is None else source_digest(options.rewritten, other)}
    job |= {"weights": weights, **settings, "scores_version": SCORES_VERSION}
    del job["token_budget"]  # as for `score`
    with closing(process.main_first("parts", lambda: Parts(options.output, job, process.main))) as parts:
        try:
            score_parts(rows, reflection, parts, size, process, doing="Comparing")
        except RunError:  # the parts are gone
            if process.finished() is None:
                raise
        if not process.main:
            if process.finished() is not None:
                parts.remove()
            return 0
        scores = join_parts(rows, reflection, parts, size)
        # What was found out about the texts as they were.
        replaced = {*OWN_COLUMNS, *KNOWN_COLUMNS, *SPIN_COLUMNS, *REFLECTED_COLUMNS}
        replaced |= {*replaced_columns(rows.column_names, scorer.further_columns)}
        rows = with_columns(rows.remove_columns([name for name in rows.column_names if name in replaced]), scores)
        rows = with_taken_texts(rows, reflection).remove_columns(beside)
        with kept():
            write_rows(rows, options.output, parts.folder)
            write_provenance(options.output, origin, rows)
        counted = sorted(pc.value_counts(rows.data["reflect_reason"]).to_pylist(), key=lambda each: -each["counts"])
        parts.check_joined()
        process.finish(0)
        parts.remove()
    shown = ", ".join(f"{each['counts']:,} {each['values']}" for each in counted)
    without = f" ({many(missing, 'row')} without a rewritten one)" if missing else ""
    print(f"{many(len(rows), 'row')}: {shown}{without}. Written to {options.output}.")
    if not any(each["values"] in (KEPT_ORIGINAL, REWRITTEN_INSTRUCTION, REWRITTEN_ANSWER) for each in counted):
        _say(f"warning: no row of {options.data} could be compared: `reflect_reason` says why for each.")
    return 0


def _rewritten_columns(options: argparse.Namespace) -> dict[str, str] | None:
    """The column of rewritten texts for each column of the rows' format, where they are named."""
    pairs = [word.partition("=") for word in options.rewritten_column or ()]
    if options.rewritten is not None and pairs:
        raise UserError("--rewritten names a second data set, --rewritten-column columns of the first: leave one out.")
    if options.rewritten is None and options.id_column is not None:
        raise UserError("--id-column goes with --rewritten FILE, whose rows it finds.")
    if wrong := [name + equals + column for name, equals, column in pairs if not (name and column)]:
        raise UserError(f"--rewritten-column wants NAME=COLUMN, got {wrong[0]!r}.")
    return {name: column for name, _, column in pairs} or None


def _gate(options: argparse.Namespace) -> int:
    gates = _gates(options)
    check_writable(options.output)
    check_rows(options.data)

    import numpy as np
    import pandas as pd

    from .data.files import check_apart, check_features, write_tables
    from .data.table_reader import TableReader, selected_tables
    from .method.reasons import KEPT
    from .publish.gates import gated_rows
    from .publish.select import tie_ids

    check_apart(options.output, options.data, options.split)
    rows = TableReader(options.data, options.split)
    check_features(rows.features, Path(options.output))
    if not len(rows):
        raise UserError(f"{options.data} has no rows.")
    format = FormatOptions(**{field.name: getattr(options, field.name) for field in fields(FormatOptions)})
    format = resolve_format(format, rows.column_names)
    _, ids = tie_ids(rows, options.id_column)
    held = gated_rows(rows, gates, np.ones(len(rows), dtype=bool), ids, options.gate_examples, format)
    reasons = np.full(len(rows), KEPT, dtype=object)
    for reason, which in held.items():
        reasons[which] = reason
    added = pd.DataFrame({"gate_reason": pd.Categorical(reasons)})
    kept = reasons == KEPT
    tables, features = selected_tables(rows, added, kept | options.all)
    write_tables(tables, features, options.output)
    counts = sorted(((int(which.sum()), reason) for reason, which in held.items()), reverse=True)
    shown = ", ".join(f"{count:,} {reason}" for count, reason in counts) or "none"
    print(f"{int(kept.sum()):,} of {many(len(rows), 'row')} kept. Not kept: {shown}. Written to {options.output}.")
    return 0


def _select(options: argparse.Namespace) -> int:
    with ExitStack() as stack:
        return _select_rows(options, stack)


def _select_rows(options: argparse.Namespace, stack: ExitStack) -> int:
    """What `select` does; what has to be closed at its end, well or not, goes on the stack."""
    check_rows(options.data)
    if options.scores is not None:
        if not Path(options.scores).is_file():
            raise NotFoundError(f"No such file of scores: {options.scores}.")
        check_readable(Path(options.scores))
    alpha, duplicates = _guards(options)
    threshold = _at_or_above(options)
    ranking, quotas = _ranking(options), _quotas(options)
    by_sifd = _by_sifd(options, ranking)
    gates = _gates(options)
    if options.keep == ALL and (quotas is not None or options.targets is not None):
        raise UserError(f"--keep {ALL} keeps every row that is not dropped: leave out --per and --targets.")
    if options.targets is not None:
        check_rows(options.targets)
        if options.embedder is not None:
            check_model(options.embedder)

    import numpy as np

    from .data.files import check_features, output_file, write_tables
    from .data.refused_answers import refused_rows
    from .data.table_reader import TableReader, selected_tables
    from .method.quotas import REST
    from .method.ranking import Ranking
    from .method.schedule import parse_keep
    from .method.score_histogram import of_other_models
    from .method.target_set import TargetSet
    from .publish.card import card_paths, check_card, public_name, write_card
    from .publish.gates import gated_rows
    from .publish.guards import dropped_rows, measured_limit, unfinished_rows
    from .publish.hub import check_repository, push_files
    from .publish.provenance import READ_COLUMNS, find_scores
    from .publish.select import choose, choose_above, no_scores, numbers_of, texts_of, tie_ids
    from .scoring.selective_columns import selective_column

    data, in_folder = output_file(options.output)
    if data.is_file():
        _check_apart(data, options)
    card, image = card_paths(data, in_folder)
    check_writable(data)
    if options.card:
        check_card(card)
    if options.push_to_hub:
        check_repository(options.push_to_hub)
        if not options.card:
            raise UserError("--push-to-hub pushes the card too: leave out --no-card.")
    elif options.private:
        raise UserError("--private goes with --push-to-hub USER/NAME.")
    rows = TableReader(options.data, options.split)
    check_features(rows.features, data)
    unscored = ranking is not None and ranking.ifd is None and options.scores is None
    unscored &= "ifd_status" not in rows.features
    own = options.scores is None and options.scores_format in (None, "ifd-trainer") and "ifd_status" in rows.features
    if unscored and options.max_ifd is not None:
        raise UserError(f"--max-ifd {options.max_ifd}: {options.data} has no IFD. Score it, or leave the limit out.")
    if unscored:
        scores, added, provenance = no_scores(len(rows), options.data)
    else:
        # Without scores of their own the texts are wanted too: of answers that another program did not score.
        table = rows.coded_frame(READ_COLUMNS) if own else rows.frame(rows.column_names)
        scores, added, provenance = find_scores(
            table, options.data, options.scores, kind=options.scores_format, model=options.scored_by
        )
        del table
    if threshold is not None and of_other_models(threshold.weights, provenance.weights):
        _say(
            f"warning: the threshold was agreed on for scores by the weights {threshold.weights}, and those of "
            f"{options.data} were made by {provenance.weights}."
        )
    definition = KNOWN_DEFINITIONS.get(provenance.definition)
    usual = definition.ranked_by if definition else "ifd"
    ranking = ranking or Ranking({usual: 1.0})
    selective = {}
    if by_sifd and (options.token_share is not None or SIFD not in rows.features):
        selective[SIFD] = selective_column(rows, options.token_share or TOKEN_SHARE)
    # How alike rows are to targets is known later, of those that may be kept.
    names = [name for name in ranking.weights if name not in selective]
    no_numbers = np.full(len(rows), np.nan)
    columns = selective | {
        name: numbers_of(name, rows, scores) if options.targets is None else no_numbers for name in names
    }
    name = ranking.ifd or usual  # of the limit
    if ranking.ifd and scores[name].isna().all() and (scores["ifd_status"] == "ok").any():
        raise UserError(f"The scores have no {name}; rank by another one with --score.")
    origin = options.scores or options.data
    limit = (1.0 if ranking.ifd or by_sifd else float("inf")) if options.max_ifd is None else options.max_ifd
    limit = limit if alpha is None else measured_limit(provenance, name, alpha, origin)
    unfinished = None
    if options.drop_unfinished:
        unfinished, too_little = unfinished_rows(_end_of_turn(rows, scores, own), provenance, origin)
        if too_little:
            _say(f"warning: {too_little}")
    mismatched = None
    if options.drop_mismatched:
        from .publish.mismatched import MismatchedRows

        trust = options.trust_remote_code
        mismatched = MismatchedRows(options.data, options.split, scores, provenance, origin, trust)
    elif options.trust_remote_code and options.targets is None:
        raise UserError("--trust-remote-code goes with --drop-mismatched or --targets.")
    like = None
    if options.targets is not None:
        from .publish.targets import LikeTargets

        trust = options.trust_remote_code
        like = LikeTargets(options.targets, options.data, options.split, data, provenance, options.embedder, trust)
        stack.enter_context(closing(like))
    id_column, ids = tie_ids(rows, options.id_column)
    status, of_limit = scores["ifd_status"], scores[name].to_numpy(dtype=float, na_value=np.nan)
    values = ranking.values(columns, (status == "ok").to_numpy())
    format = provenance.rows_format(rows.column_names)
    refusals = refused_rows(rows, format) if options.drop_refusals else None
    usable = (np.isfinite(values) | (like is not None)) & ~(of_limit >= limit)
    dropped = dropped_rows(rows, usable, status, ids, refusals, unfinished, duplicates, format)
    if gates:
        left = usable & (status == "ok").to_numpy() & ~np.logical_or.reduce([np.zeros_like(usable), *dropped.values()])
        for reason, held in gated_rows(rows, gates, left, ids, options.gate_examples, format).items():
            dropped[reason] = dropped.get(reason, False) | held
    if like is not None:
        usable &= ~np.logical_or.reduce([np.zeros(len(rows), dtype=bool), *dropped.values()])
        similarities, status = like.similarities(usable, status)
        values = similarities.max(axis=1).astype(np.float64)
        added = added.assign(target_similarity=values, target_row=like.most_like(similarities))
        scores = scores.assign(ifd_status=status)
    choice = {"ranking": ranking, "max_ifd": limit, "limited": (name, of_limit), "ids": ids, "alpha": alpha}
    choice |= {"strict": options.strict, "quotas": quotas}
    if like is not None:
        choice["targets"] = TargetSet(options.targets, on_shortfall="error"), similarities
    if quotas is not None:
        choice["groups"] = texts_of(quotas.column, rows)
    without = options.keep == ALL or (quotas is not None and REST in quotas.quotas)
    keep = None if without else parse_keep(options.keep or "0.1")

    def choose_from(dropped: dict[str, np.ndarray]) -> PoolSelection:
        if threshold is None:
            return choose(values, status, keep, dropped=dropped, **choice)
        # As many as there are: a row that is dropped later on has none below the threshold take its place.
        return choose_above(threshold.value, values, status, dropped, **choice)

    chosen = mismatched.choose(choose_from, dropped) if mismatched else choose_from(dropped)
    if like is not None:
        words = like.words(public_name(options.targets), public_name(like.model))
        chosen = replace(chosen, targets=words)
    del unfinished, refusals, dropped, mismatched
    if chosen.warning:
        _say(f"warning: {chosen.warning}")
    added = added.assign(**selective, ifd_rank=chosen.ranks, ifd_reason=chosen.selection.reasons)
    tables, features = selected_tables(rows, added, chosen.is_kept | options.all)
    write_tables(tables, features, data)
    scores = scores[["answer_tokens", "ifd_status"]].assign(**{ranking.label: values})
    columns = list(features)
    del added, ids, tables  # of ten million rows, as much again as the card needs
    if options.card:
        write_card(
            card,
            image,
            data=data.name,
            source=options.data,
            rows=scores,
            chosen=chosen,
            provenance=provenance,
            id_column=id_column,
            columns=columns,
            everything=options.all,
        )
    if like is not None:
        like.finish()
    print(f"{chosen.summary} Written to {data}{f' with its card {card}' if options.card else ''}.")
    if options.push_to_hub:
        files = {data.name: data, "README.md": card, image.name: image}
        print(f"Pushed to {push_files(options.push_to_hub, files, options.private)}.")
    return 0


def _at_or_above(options: argparse.Namespace) -> Threshold | None:
    """The threshold that rows have to reach, and what it says of the score and its limit, as options; None without."""
    if options.threshold is None:
        return None
    if given := [name for name in ("keep", "per", "targets", "quota", "floor") if getattr(options, name)]:
        raise UserError(f"--threshold says how many rows are kept, and so does --{given[0]}: leave one out.")

    from .data.histogram_files import threshold_of

    found = threshold_of(options.threshold)
    if found.score is not None:
        if options.score and options.score != [found.score]:
            raise UserError(
                f"--threshold {options.threshold} is one of {found.score}, and --score {' '.join(options.score)} ranks "
                "by another: leave --score out."
            )
        options.score = [found.score]
        limit = float("inf") if found.max_ifd is None and found.score in RANKED_BY else found.max_ifd
        options.max_ifd = limit if options.max_ifd is None else options.max_ifd
    return found


def _guards(options: argparse.Namespace) -> tuple[float | None, Duplicates | None]:
    """The alpha of a calibrated limit, and which rows are duplicates; None for what was not asked for."""
    from .method.calibrated_limit import CalibratedLimit
    from .method.duplicates import Duplicates

    if options.max_ifd != CALIBRATED and options.alpha is not None:
        raise UserError(f"--alpha goes with --max-ifd {CALIBRATED}.")
    alpha = None
    if options.max_ifd == CALIBRATED:
        alpha = CalibratedLimit.of(CalibratedLimit().alpha if options.alpha is None else options.alpha).alpha
    return alpha, None if options.drop_duplicates is None else Duplicates(options.drop_duplicates)


def _ranking(options: argparse.Namespace) -> Ranking | None:
    """What rows are ranked by; None where that is for the scores to say."""
    from .method.ranking import Ranking

    if options.targets is not None:
        if options.score:
            raise UserError("--score and --targets both say which rows are kept: leave one out.")
        return Ranking({"target_similarity": 1.0})
    if options.embedder is not None:
        raise UserError("--embedder goes with --targets FILE, the examples that rows are held against.")
    try:
        return Ranking.parse(options.score) if options.score else None
    except UserError as error:
        raise UserError(f"--score: {error}") from error


def _by_sifd(options: argparse.Namespace, ranking: Ranking | None) -> bool:
    """Whether S-IFD is ranked by, perhaps among others."""
    from .method.selective_ifd import check_share

    ranked = ranking is not None and SIFD in ranking.weights
    if options.token_share is not None:
        check_share(options.token_share, "--token-share")
        if not ranked:
            raise UserError(f"--token-share goes with --score {SIFD}, which is made of that share of the tokens.")
    return ranked


def _gates(options: argparse.Namespace) -> list[Gate]:
    """The gates for synthetic rows, in their order."""
    from .method.gate_names import parse_gates

    if options.gates is None:
        if options.gate_examples is not None:
            raise UserError("--gate-examples goes with --gates, which compare rows with them.")
        return []
    if options.gate_examples is not None:
        check_rows(options.gate_examples)
    try:
        return parse_gates(options.gates)
    except UserError as error:
        raise UserError(f"--gates: {error}") from error


def _quotas(options: argparse.Namespace) -> Quotas | None:
    """Quotas and floors of the values of a column; None without one."""
    from .method.quotas import REST, Quotas, parse_amounts

    if not options.per:
        if options.quota or options.floor:
            raise UserError("--quota and --floor go with --per COLUMN, whose values they are for.")
        return None
    if not options.quota and not options.floor:
        raise UserError(f"--per {options.per} goes with --quota or --floor: how many rows of each value are kept.")
    quotas = Quotas(options.per, parse_amounts(options.quota, "--quota"), parse_amounts(options.floor, "--floor"))
    if REST in quotas.quotas and options.keep is not None:
        raise UserError("--keep is what the quotas of all values add up to: leave it out, or give quotas to some only.")
    return quotas


def _end_of_turn(rows: TableReader, scores: pd.DataFrame, own: bool) -> np.ndarray | None:
    """The losses of the end of turn, (n,), of the scores that rows are ranked by; None where they have none."""
    if EOT_LOSS in scores:
        values = scores[EOT_LOSS]
    elif own and EOT_LOSS in rows.features:
        values = rows.column(EOT_LOSS).to_pandas()
    else:
        return None
    return values.to_numpy(dtype=float, na_value=float("nan"))


def _check_apart(output: Path, options: argparse.Namespace) -> None:
    """Raise ValueError where the rows that are kept would be written over the rows or scores they are chosen from."""
    # With all rows, none of the data's would be lost; scores are another program's file.
    sources = [options.scores] if options.all else [options.data, options.scores]
    for source in map(Path, filter(None, sources)):
        whole = source / f"{options.split}.parquet"  # what is read of a folder, if it is there
        files = [whole] if whole.is_file() else [source, *source.rglob("*")]
        if any(output.samefile(path) for path in files if path.is_file()):
            raise UserError(
                f"--output {output} is read by this command, and what is not kept of it would be lost. Write to "
                "another file, or, to keep all rows of DATA, add --all."
            )


def _check_trl() -> None:
    """Raise unless the TRL that recipes need is there; it is not imported yet."""
    found = version("trl") if find_spec("trl") is not None else None
    if found is None or Version(found) < Version(_TRL):
        raise NotInstalledError(
            f"ifd-trainer train fine-tunes with trl {_TRL} or later, and {found or 'none'} is installed: pip install "
            "'ifd_trainer[trl]'."
        )


def _train(arguments: list[str]) -> int:
    if not arguments or not {"-h", "--help"}.isdisjoint(arguments):
        print(train_help())
        return 0
    _check_trl()
    plan = "--plan" in arguments
    arguments = [word for word in arguments if word != "--plan"]
    if not {"--help-all", "--help_all"}.isdisjoint(arguments):
        from .training.recipe import make_parser

        make_parser().print_help()
        return 0
    recipe = arguments.pop(0) if arguments and not arguments[0].startswith("-") else None
    recipe, arguments = _named_recipe(recipe, arguments)
    check_recipe(recipe, arguments, plan)

    from rich.console import Console

    from .report.page import write_report
    from .report.share_table import share_table
    from .report.tables import epoch_table, guard_table, label_rich_table
    from .training.recipe import parse_recipe
    from .training.recipe_plan import only_the_plan, planned
    from .training.recipe_run import build_run, selection_of

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


def _compare(arguments: list[str]) -> int:
    from .compare.command import compare

    if {"-h", "--help"}.isdisjoint(arguments):
        _check_trl()
    return compare(arguments or ["--help"])


def _recipes(options: argparse.Namespace) -> int:
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


def _report(options: argparse.Namespace) -> int:
    source = Path(options.source)
    if not source.exists():
        raise NotFoundError(
            f"No such file or folder: {options.source!r}. A report is made from the output folder of a run, from a "
            "folder that `ifd-trainer select` wrote, or from a scored file."
        )
    check_rows(options.source)
    folder = options.output or (source if source.is_dir() else source.parent)
    check_folder(folder)
    if (source / "comparison.json").exists():
        from .compare.page import write_comparison_report

        print(f"Page: {write_comparison_report(source, Path(folder), options.label, options.rows)}")
        return 0

    from .data.files import load_rows
    from .report.page import write_report

    data, origin = source, None
    if not source.is_dir():
        data = load_rows(options.source).to_pandas()
        origin = _origin(options.source, data)
    print(f"Report: {write_report(data, folder, label=options.label, rows=options.rows or 10, origin=origin)}")
    return 0


def _origin(file: str, rows: pd.DataFrame) -> Origin:
    """Where the rows of a scored file come from, by what was written beside it."""
    from .publish.provenance import read_provenance
    from .report.report_data import Origin

    known = read_provenance(file, rows) if {*RANKED_BY} <= {*rows} else None
    if known is None:
        return Origin(file)
    names = ("source", "model", "definition", "format", "program")
    return Origin(file, **{name: getattr(known, name) for name in names}, measured=known.wrong_ifd is not None)
