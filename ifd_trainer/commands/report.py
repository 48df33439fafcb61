"""`ifd-trainer report`: a page about a run, a scored data set, or a comparison."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..data.paths import check_folder, check_rows
from ..errors import NotFoundError
from ..method.choices import RANKED_BY
from .arguments import positive

if TYPE_CHECKING:
    import pandas as pd

    from ..report.report_data import Origin


def add_parser(commands: argparse._SubParsersAction) -> None:
    """The command and its options."""
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
    add("--rows", type=positive, help="rows in each table (default 10; of a comparison 3)")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
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
        from ..compare.page import write_comparison_report

        print(f"Page: {write_comparison_report(source, Path(folder), options.label, options.rows)}")
        return 0

    from ..data.files import load_rows
    from ..report.page import write_report

    data, origin = source, None
    if not source.is_dir():
        data = load_rows(options.source).to_pandas()
        origin = _origin(options.source, data)
    print(f"Report: {write_report(data, folder, label=options.label, rows=options.rows or 10, origin=origin)}")
    return 0


def _origin(file: str, rows: pd.DataFrame) -> Origin:
    """Where the rows of a scored file come from, by what was written beside it."""
    from ..publish.provenance import read_provenance
    from ..report.report_data import Origin

    known = read_provenance(file, rows) if {*RANKED_BY} <= {*rows} else None
    if known is None:
        return Origin(file)
    names = ("source", "model", "definition", "format", "program", "turns", "options", "single")
    return Origin(file, **{name: getattr(known, name) for name in names}, measured=known.wrong_ifd is not None)
