"""`ifd-trainer score`: attach scores to a data set, as a job that can be interrupted and shared."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..data.definitions import DEFAULT_MAX_LENGTH, DEFINITIONS
from ..data.format_choice import columns_read, resolve_format
from ..data.paths import check_model, check_rows, check_writable
from ..errors import UserError
from ..method.choices import TOKEN_SHARE, TURN_RULES, WITHOUT
from ..method.columns import (
    IFD_COLUMNS,
    IMAGE_COLUMNS,
    KNOWN_COLUMNS,
    OWN_COLUMNS,
    SELECTIVE_COLUMNS,
    SPIN_COLUMNS,
)
from ..method.further_scores import FURTHER, SCORED_BY_MODEL, further_names, replaced_columns
from ..method.number_words import many
from ..method.text_agreement import AGREEMENTS
from .arguments import (
    GREEDY,
    above_zero,
    add_format,
    add_model,
    add_running,
    answer_count,
    going_with,
    not_negative,
    positive,
    rows_format,
    share_of_one,
    whole_number,
)
from .job import CHECKED_ROWS, counts_of, counts_text, device_of, job_of, part_rows, scored_in_parts
from .messages import say

if TYPE_CHECKING:
    from datasets import Dataset

    from ..publish.provenance import Provenance
    from ..scoring.knowledge import KnowledgeScorer
    from ..scoring.own_answers import OwnAnswerScorer
    from ..scoring.transform import IFDScorer

# Options that are the transform's by the same names.
_OF_SCORER = (
    *("definition", "max_length", "min_answer_tokens", "score_truncated", "turns", "dtype", "token_budget"),
    *("token_losses", "revision", "trust_remote_code", "guess"),
)
# Options of `--known` and of `--spin`, by what their transforms call them.
_OF_KNOWLEDGE = {
    name: f"known_{name}" for name in ("max_new_tokens", "agreement", "threshold", "temperature", "top_p", "seed")
}
_OF_NOISE = {"alpha": "noise", "seed": "noise_seed"}  # and of `--neighbours`
_OF_SPIN = {name: f"spin_{name}" for name in ("max_new_tokens", "agreement", "temperature", "top_p", "seed")}


def add_parser(commands: argparse._SubParsersAction) -> None:
    """The command and its options."""
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
    add_model(add, "model that scores")
    add_format(add)
    meanings = "; ".join(f"{name}: {each.meaning}" for name, each in DEFINITIONS.items())
    add("--definition", default="paper", choices=DEFINITIONS, help=f"{meanings} (default: paper)")
    limits = " and ".join(f"{name} {most}" for name, most in DEFAULT_MAX_LENGTH.items())
    add(
        "--max-length",
        type=positive,
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
    add("--min-answer-tokens", type=positive, default=1, help="shorter answers are not scored (default 1)")

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
    add("--max-images", type=positive, metavar="N", help="most images of a row (default: as many as fit)")
    add("--limit", type=positive, help="score the first N rows only")
    add_running(add)
    add(
        "--token-losses",
        action="store_true",
        help="attach the losses of single tokens too, the lists cas_tokens and das_tokens, for `select --score sifd`",
    )
    add(
        "--sifd",
        type=share_of_one,
        nargs="?",
        const=TOKEN_SHARE,
        metavar="K",
        help="attach S-IFD too, over this share of all tokens, those of which the prompt tells most "
        f"({TOKEN_SHARE} if none is given), and the losses of tokens that it is made of",
    )
    add(
        "--neighbours",
        type=positive,
        metavar="N",
        help="of rows that were scored with --sifd or --token-losses by this model: keep their scores, and attach how "
        "much of S-IFD stays under noise on the embeddings, as the mean and the spread of N neighbours (sifd_mean, "
        "sifd_std). Two forwards for each; saves fewer rows at a time (8 on a CPU, else 256)",
    )
    add("--noise", type=not_negative, metavar="X", help="size of that noise, as NEFTune's alpha (default 5)")
    add("--noise-seed", type=whole_number, metavar="N", help="of that noise (default 0)")
    add(
        "--calibrate",
        action="store_true",
        help="measure too how answers under the prompts of other rows score, and how answers end that were cut off "
        "(256 and 128 of them), for `select --max-ifd calibrated` and `--drop-unfinished`; kept in OUTPUT.ifd.yaml",
    )
    add(
        "--known",
        type=positive,
        metavar="N",
        help="let the model answer each prompt N times, and say how many of its answers agree with the row's: the "
        f"columns {', '.join(KNOWN_COLUMNS)}. Takes far longer than scoring; saves fewer rows at a time (8 on a CPU, "
        "else 256)",
    )
    add("--known-threshold", type=share_of_one, metavar="X", help="agreement from which an answer agrees (default 0.5)")
    _add_answers(add, "known", temperature=0.7)
    add(
        "--spin",
        type=answer_count,
        nargs="?",
        const=GREEDY,
        metavar="N",
        help="let the model answer each prompt, greedily or, with N, N times by sampling, and say how much more the "
        f"row's answer surprises it than its own (SPIN, arXiv 2401.01335): the columns {', '.join(SPIN_COLUMNS)}, for "
        "`--gates matched` of select. Saves fewer rows at a time, as --known does",
    )
    _add_answers(add, "spin", temperature=1)
    parser.set_defaults(run=_run, parser=parser)


def _add_answers(add: Callable[..., Any], name: str, temperature: float) -> None:
    """The options of answers that a model gives, for the option of that name."""
    add(f"--{name}-max-new-tokens", type=positive, metavar="N", help="most tokens of such an answer (default 128)")
    agreement = "how texts agree: F1 of their words (default), exact match, or ROUGE-L"
    add(f"--{name}-agreement", choices=AGREEMENTS, help=agreement)
    add(f"--{name}-temperature", type=above_zero, metavar="X", help=f"of sampling, above 0 (default {temperature:g})")
    likeliest = "probability of the likeliest tokens sampled from (default 1)"
    add(f"--{name}-top-p", type=share_of_one, metavar="X", help=likeliest)
    add(f"--{name}-seed", type=whole_number, metavar="N", help="of sampling (default 0)")


def _run(options: argparse.Namespace) -> int:
    words = options.parser.words_of(options, without=("model", "output"))
    further = further_names(" ".join(options.scores or ()))
    options.guess = options.guess and options.guess.replace("\\n", "\n")
    _check_neighbours(options)
    check_writable(options.output)
    check_model(options.model)
    check_rows(options.data)

    from ..data.files import check_apart, check_features, load_rows, source_digest, with_columns
    from ..data.image_rows import hold_images, with_stored_images
    from ..data.message_trees import as_chats
    from ..publish.provenance import calibrated
    from ..scoring.calibration import shortage
    from ..scoring.processes import Process
    from ..scoring.selective_columns import attach_selective_ifd

    check_apart(options.output, options.data, options.split)
    process = Process.from_environment()
    if (status := process.finished()) is not None:
        return status if process.main else 0
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
    scorer.format = resolve_format(rows_format(options), rows.column_names, bare, warn=process.main)
    process.main_first("check", lambda: scorer.check(rows[:CHECKED_ROWS]))  # no folder and no weights before that
    work = _work(options, scorer, knowledge or own, rows)
    digests = {"data": source_digest(options.data, source), "weights": work.weights}
    job = job_of(rows, part_rows(options, work.settings, work.asks), digests, work.settings)
    read = columns_read(scorer.format, rows.column_names)
    with scored_in_parts(rows, work.scorer, options.output, job, process, columns=read) as joined:
        if joined is None:
            return 0
        kept = rows.remove_columns([name for name in rows.column_names if name in work.replaced])
        rows, origin = with_columns(kept, joined.scores), work.origin
        if options.sifd is not None or options.neighbours is not None:
            share = options.sifd or TOKEN_SHARE
            rows = attach_selective_ifd(rows, share)
            chosen = {"share": share} if options.neighbours is None else work.scorer.settings
            origin = origin and replace(origin, sifd=chosen)
        if options.calibrate:
            calibration = scorer.calibrate(rows)
            origin = calibrated(origin, calibration)
        if origin is not None and options.neighbours is None:
            origin = replace(origin, options=words)
        joined.write(rows, options.output, origin)
        counts = counts_of(rows.data["ifd_status"])
        joined.finish(status := 0 if "ok" in counts else 1)
    shown = counts_text(counts)
    print(f"{many(len(rows), 'row')}: {shown}. Written to {options.output}.")
    if options.calibrate and (short := shortage(calibration, options.definition)):
        say(f"warning: {short}")
    if status:
        say(
            f"warning: none of {many(len(rows), 'row')} has a score ({shown}): nothing can be selected from "
            f"{options.output}. Check the format and the options; `ifd_status` says why for each row."
        )
    return status


class _Work(NamedTuple):
    """What is done with each row.

    Attributes:
        scorer: does it.
        settings: all that it depends on beside rows and weights.
        weights: digest of the model's.
        replaced: columns that go, since those that are attached take their place.
        origin: where the scores come from; None where nothing tells.
        asks: whether the model does more than one or two forwards of a row.
    """

    scorer: Any
    settings: dict[str, Any]
    weights: str
    replaced: Sequence[str]
    origin: Provenance | None
    asks: bool = False


def _work(
    options: argparse.Namespace, scorer: IFDScorer, asking: KnowledgeScorer | OwnAnswerScorer | None, rows: Dataset
) -> _Work:
    """What the options ask for beside the scores themselves, or in their place."""
    from ..publish.provenance import provenance_of, scored_before
    from ..scoring.knowledge import ScoredAndAsked
    from ..scoring.neighbourhood import NeighbourScorer

    settings, weights = scorer.settings(rows.column_names), scorer.digest()
    if options.neighbours is not None:
        noise = going_with(options, _OF_NOISE, None)
        worker = NeighbourScorer(scorer, rows, options.sifd or TOKEN_SHARE, neighbours=options.neighbours, **noise)
        settings |= {f"sifd_{name}": value for name, value in worker.settings.items()}
        origin = scored_before(options.data, rows, options.model, weights)
        return _Work(worker, settings, weights, SELECTIVE_COLUMNS, origin, asks=True)
    # Scored again: what was chosen by older scores goes with them.
    replaced = [*OWN_COLUMNS, *replaced_columns(rows.column_names, scorer.further_columns)]
    origin = provenance_of(settings, options.model, weights, options.data)
    if asking is None:
        return _Work(scorer, settings, weights, replaced, origin)
    asking.check()
    name, columns = ("known", KNOWN_COLUMNS) if options.known is not None else ("spin", SPIN_COLUMNS)
    origin = replace(origin, **{name: asking.settings()})
    settings |= {f"{name}_{of}": value for of, value in asking.settings().items()}
    return _Work(ScoredAndAsked(asking), settings, weights, [*replaced, *columns], origin, asks=True)


def _check_neighbours(options: argparse.Namespace) -> None:
    """Raise for what goes with neighbours alone, and for what does not go with them."""
    if options.neighbours is None:
        going_with(options, _OF_NOISE, "--neighbours N")
        options.token_losses |= options.sifd is not None
        return
    of_scoring = [name for name in ("scores", "guess", "turns", "calibrate", "known", "spin") if getattr(options, name)]
    of_scoring += ["token_losses"] if options.token_losses else []
    if of_scoring:
        raise UserError(
            f"--neighbours leaves the scores of rows as they are, and --{of_scoring[0].replace('_', '-')} is for "
            "scoring them: score them first, with --sifd, to a file, and then that file with --neighbours."
        )


def _image_scorer(options: argparse.Namespace, local_rank: int, further: Sequence[str]) -> IFDScorer:
    """What scores rows with images; paths of images begin beside the file of rows."""
    from ..scoring.image_scorer import ImageIFDScorer

    texts = {"turns": None, "token_losses": False, "score_truncated": False, "guess": None, "known": None}
    texts |= {"calibrate": False, "definition": "paper", "spin": None}
    if idle := [name for name, usual in texts.items() if getattr(options, name) != usual]:
        raise UserError(f"--{idle[0].replace('_', '-')} is of rows of text, and the rows have images: leave it out.")
    names = ("max_length", "min_answer_tokens", "max_images", "dtype", "token_budget", "revision", "trust_remote_code")
    given = {name: getattr(options, name) for name in names}
    folder = Path(options.data).resolve().parent if Path(options.data).is_file() else None
    given |= {"without": options.without or WITHOUT[0], "image_folder": folder, "scores": further}
    return ImageIFDScorer(options.model, device=device_of(options, local_rank), **given)


def _scorer(options: argparse.Namespace, local_rank: int, further: Sequence[str]) -> IFDScorer:
    from ..scoring.transform import IFDScorer

    device = device_of(options, local_rank)
    given = {name: getattr(options, name) for name in _OF_SCORER}
    return IFDScorer(options.model, device=device, scores=further, **given)


def _knowledge(options: argparse.Namespace, scorer: IFDScorer) -> KnowledgeScorer | None:
    """What asks the model, beside what scores; None where nothing is to be asked."""
    from ..scoring.knowledge import KnowledgeScorer

    given = going_with(options, _OF_KNOWLEDGE, None if options.known is not None else "--known N")
    if options.known is None:
        return None
    if options.spin is not None:
        raise UserError("--known and --spin are two jobs: score with one of them, and then that file with the other.")
    return KnowledgeScorer(scorer, samples=options.known, **given, **_budget(options))


def _own_answers(options: argparse.Namespace, scorer: IFDScorer) -> OwnAnswerScorer | None:
    """What compares rows' answers with the model's own, beside what scores; None where it is not asked for."""
    from ..scoring.own_answers import OwnAnswerScorer

    given = going_with(options, _OF_SPIN, None if options.spin is not None else "--spin")
    if options.spin is None:
        return None
    if options.spin == GREEDY:
        of_sampling = {name: option for name, option in _OF_SPIN.items() if name in ("temperature", "top_p", "seed")}
        going_with(options, of_sampling, "--spin N, which samples N answers")
    samples = None if options.spin == GREEDY else options.spin
    return OwnAnswerScorer(scorer, samples=samples, **given, **_budget(options))


def _budget(options: argparse.Namespace) -> dict[str, int]:
    return {} if options.token_budget is None else {"token_budget": options.token_budget}
