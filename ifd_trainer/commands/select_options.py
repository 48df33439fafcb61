"""What `ifd-trainer select` is told: its options, and what several of them say together."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ..data.definitions import SCORE_KINDS
from ..errors import UserError
from ..method.choices import CALIBRATED, RANKED_BY, SIMILARITY
from ..method.columns import SIFD
from .arguments import limit_or_calibrated, real_number
from .gates import add_gates

if TYPE_CHECKING:
    from ..method.duplicates import Duplicates
    from ..method.quotas import Quotas
    from ..method.ranking import Ranking
    from ..method.score_histogram import Threshold

ALL = "all"  # of --keep


def add_options(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """The command's parser, with all of its options."""
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
        type=limit_or_calibrated,
        metavar="X",
        help="drop rows with an IFD of X or more (default 1 where rows are ranked by IFD or sifd, else none; inf: "
        "none; calibrated: the limit that a share --alpha of mismatched rows stays below, by what `score --calibrate` "
        "measured)",
    )
    alpha = "share of mismatched rows that a calibrated limit may let through (default 0.05)"
    add("--alpha", type=real_number, metavar="A", help=alpha)
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
        type=real_number,
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
        type=real_number,
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
    add_gates(add)
    add("--all", action="store_true", help="write all rows, the dropped ones with their reason")
    add("--strict", action="store_true", help="fail when fewer rows are eligible than asked for")
    add("--card", action=argparse.BooleanOptionalAction, default=True, help="write a data card (default)")
    add("--push-to-hub", metavar="USER/NAME", help="push rows and card to this data set")
    add("--private", action="store_true", help="make the pushed data set private if it is new")
    return parser


def at_or_above(options: argparse.Namespace) -> Threshold | None:
    """The threshold that rows have to reach, and what it says of the score and its limit, as options; None without."""
    if options.threshold is None:
        return None
    if given := [name for name in ("keep", "per", "targets", "quota", "floor") if getattr(options, name)]:
        raise UserError(f"--threshold says how many rows are kept, and so does --{given[0]}: leave one out.")

    from ..data.histogram_files import threshold_of

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


def guards_of(options: argparse.Namespace) -> tuple[float | None, Duplicates | None]:
    """The alpha of a calibrated limit, and which rows are duplicates; None for what was not asked for."""
    from ..method.calibrated_limit import CalibratedLimit
    from ..method.duplicates import Duplicates

    if options.max_ifd != CALIBRATED and options.alpha is not None:
        raise UserError(f"--alpha goes with --max-ifd {CALIBRATED}.")
    alpha = None
    if options.max_ifd == CALIBRATED:
        alpha = CalibratedLimit.of(CalibratedLimit().alpha if options.alpha is None else options.alpha).alpha
    return alpha, None if options.drop_duplicates is None else Duplicates(options.drop_duplicates)


def ranking_of(options: argparse.Namespace) -> Ranking | None:
    """What rows are ranked by; None where that is for the scores to say."""
    from ..method.ranking import Ranking

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


def by_sifd(options: argparse.Namespace, ranking: Ranking | None) -> bool:
    """Whether S-IFD is ranked by, perhaps among others."""
    from ..method.selective_ifd import check_share

    ranked = ranking is not None and SIFD in ranking.weights
    if options.token_share is not None:
        check_share(options.token_share, "--token-share")
        if not ranked:
            raise UserError(f"--token-share goes with --score {SIFD}, which is made of that share of the tokens.")
    return ranked


def quotas_of(options: argparse.Namespace) -> Quotas | None:
    """Quotas and floors of the values of a column; None without one."""
    from ..method.quotas import REST, Quotas, parse_amounts

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
