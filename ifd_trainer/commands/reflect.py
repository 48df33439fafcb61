"""`ifd-trainer reflect`: rewritten instructions and answers, taken where they are worth more to a model."""

from __future__ import annotations

import argparse
from dataclasses import replace

from ..data.format_choice import resolve_format
from ..data.paths import check_model, check_rows, check_writable
from ..errors import UserError
from ..method.columns import KNOWN_COLUMNS, OWN_COLUMNS, REFLECTED_COLUMNS, SPIN_COLUMNS
from ..method.further_scores import replaced_columns
from ..method.number_words import many
from .arguments import above_zero_or_inf, add_format, add_model, add_running, positive, rows_format
from .job import CHECKED_ROWS, counts_of, counts_text, device_of, job_of, part_rows, scored_in_parts
from .messages import say

# Options that are the transform's by the same names.
_OF_SCORER = ("max_length", "score_truncated", "dtype", "token_budget", "revision", "trust_remote_code", "guess")


def add_parser(commands: argparse._SubParsersAction) -> None:
    """The command and its options."""
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
    add_model(add, "model that is to be trained, which scores")
    add_format(add)
    add(
        "--limit",
        type=above_zero_or_inf,
        default=1.0,
        metavar="X",
        help="IFD and r-IFD of what is taken are below it (default 1; inf: no limit)",
    )
    add("--guess", metavar="TEXT", help="what r-IFD asks a model that is shown an answer, with {answer} for that")
    add("--max-length", type=positive, help="most tokens of prompt and answer (default: the model's window)")
    add("--score-truncated", action="store_true", help="score the part of a too long answer that fits")
    add_running(add)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    options.guess = options.guess and options.guess.replace("\\n", "\n")
    columns = _rewritten_columns(options)
    check_writable(options.output)
    check_model(options.model)
    sources = [options.data, *filter(None, [options.rewritten])]
    for source in sources:
        check_rows(source)

    from ..data.files import check_apart, check_features, load_rows, source_digest, with_columns
    from ..method.reflection import KEPT_ORIGINAL, REWRITTEN_ANSWER, REWRITTEN_INSTRUCTION
    from ..publish.provenance import provenance_of
    from ..publish.reflect import joined, with_taken_texts
    from ..scoring.processes import Process
    from ..scoring.reflection import ReflectionScorer
    from ..scoring.transform import IFDScorer

    for source in sources:
        check_apart(options.output, source, options.split)
    process = Process.from_environment()
    if (status := process.finished()) is not None:
        return status if process.main else 0
    format = rows_format(options)
    given = {name: getattr(options, name) for name in _OF_SCORER}
    scorer = IFDScorer(options.model, device=device_of(options, process.local_rank), scores="rifd", **given)
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
    process.main_first("check", lambda: reflection.check(rows[:CHECKED_ROWS]))  # no folder and no weights before that
    check_features(rows.features, options.output)
    settings, weights = reflection.settings(rows.column_names), scorer.digest()
    reflected = {"rewritten": options.rewritten or settings["rewritten"], "limit": settings["limit"]}
    origin = replace(provenance_of(settings, options.model, weights, options.data), reflected=reflected)
    digests = {"data": source_digest(options.data, source), "weights": weights}
    digests["rewritten_data"] = None if other is None else source_digest(options.rewritten, other)
    job = job_of(rows, part_rows(options, settings), digests, settings)
    with scored_in_parts(rows, reflection, options.output, job, process, doing="Comparing") as scored:
        if scored is None:
            return 0
        # What was found out about the texts as they were.
        replaced = {*OWN_COLUMNS, *KNOWN_COLUMNS, *SPIN_COLUMNS, *REFLECTED_COLUMNS}
        replaced |= {*replaced_columns(rows.column_names, scorer.further_columns)}
        kept = rows.remove_columns([name for name in rows.column_names if name in replaced])
        rows = with_taken_texts(with_columns(kept, scored.scores), reflection).remove_columns(beside)
        scored.write(rows, options.output, origin)
        counts = counts_of(rows.data["reflect_reason"])
        scored.finish()
    without = f" ({many(missing, 'row')} without a rewritten one)" if missing else ""
    print(f"{many(len(rows), 'row')}: {counts_text(counts)}{without}. Written to {options.output}.")
    if not {KEPT_ORIGINAL, REWRITTEN_INSTRUCTION, REWRITTEN_ANSWER} & {*counts}:
        say(f"warning: no row of {options.data} could be compared: `reflect_reason` says why for each.")
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
