"""`ifd-trainer histogram` and `threshold`: sites agree on a threshold without showing rows."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..data.paths import check_readable, check_rows, check_writable
from ..errors import UserError
from ..method.choices import ROWS_TOGETHER
from ..method.number_words import many
from .arguments import positive, real_number


def add_histogram(commands: argparse._SubParsersAction) -> None:
    """The command `histogram` and its options."""
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
        type=positive,
        default=ROWS_TOGETHER,
        metavar="N",
        help=f"rows of a bin that is shown (default {ROWS_TOGETHER})",
    )
    add(
        "--edges",
        nargs=3,
        type=real_number,
        metavar=("LOW", "HIGH", "BINS"),
        help="lowest edge, highest one and number of bins, the same for all sites (default: usual ones of ifd, ifd_ppl "
        "and ira)",
    )
    add(
        "--max-ifd",
        type=real_number,
        metavar="X",
        help="leave out rows with an IFD of X or more (default: 1 of an IFD)",
    )
    add("--split", default="train", help="split of a folder or a hub data set (default train)")
    parser.set_defaults(run=_histogram)


def _histogram(options: argparse.Namespace) -> int:
    check_rows(options.data)
    output = _json_file(options.output)

    from ..data.histogram_files import write_histogram
    from ..publish.histograms import site_histogram

    told = {name: getattr(options, name) for name in ("split", "edges", "least", "max_ifd")}
    histogram = site_histogram(options.data, options.score, **told)
    write_histogram(output, histogram)
    filled = sum(count > 0 for count in histogram.counts)
    print(
        f"{many(sum(histogram.counts), 'row')} of {many(histogram.rows, 'row')} counted by {histogram.score} in "
        f"{many(filled, 'bin')} of at least {many(histogram.least, 'row')}. Written to {output}."
    )
    return 0


def add_threshold(commands: argparse._SubParsersAction) -> None:
    """The command `threshold` and its options."""
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


def _threshold(options: argparse.Namespace) -> int:
    output, paths = _json_file(options.output), [Path(site) for site in options.sites]
    for path in paths:
        check_readable(path)
        if output.exists() and output.samefile(path):
            raise UserError(f"--output {output} is a histogram that this command reads. Write to another file.")

    from ..data.histogram_files import agreed, write_threshold
    from ..method.schedule import Constant, parse_keep

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
