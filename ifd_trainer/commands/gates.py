"""`ifd-trainer gate`: hold back synthetic rows by their texts; and the options of gates, which `select` has too."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.format_choice import resolve_format
from ..data.paths import check_rows, check_writable
from ..errors import UserError
from ..method.choices import GATES
from ..method.number_words import many
from .arguments import add_format, rows_format

if TYPE_CHECKING:
    from ..method.gates import Gate


def add_gates(add: Callable[..., Any], required: bool = False) -> None:
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


def gates_of(options: argparse.Namespace) -> list[Gate]:
    """The gates for synthetic rows, in their order."""
    from ..method.gate_names import parse_gates

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


def add_parser(commands: argparse._SubParsersAction) -> None:
    """The command and its options."""
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
    add_gates(add, required=True)
    add_format(add)
    add("--split", default="train", help="split of a folder or a hub data set (default train)")
    add("--id-column", help="of rows that say the same, the lowest id stays (default: row_id or id, else position)")
    add("--all", action="store_true", help="write all rows, the dropped ones with their reason")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    gates = gates_of(options)
    check_writable(options.output)
    check_rows(options.data)

    import numpy as np
    import pandas as pd

    from ..data.files import check_apart, check_features, write_tables
    from ..data.table_reader import TableReader, selected_tables
    from ..method.reasons import KEPT
    from ..publish.gates import gated_rows
    from ..publish.select import tie_ids

    check_apart(options.output, options.data, options.split)
    rows = TableReader(options.data, options.split)
    check_features(rows.features, Path(options.output))
    if not len(rows):
        raise UserError(f"{options.data} has no rows.")
    format = rows_format(options)
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
