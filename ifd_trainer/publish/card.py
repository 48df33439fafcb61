"""The data card of a selected data set: README.md as data hubs read it, and a histogram of the scores.

The card is written to be published: of local files and models it gives the last part of the path only. It is a
`huggingface_hub.DatasetCard`; what others named (files, models, columns, statuses) is escaped here, which no template
engine does for Markdown.
"""

from __future__ import annotations

import glob
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pandas as pd
from huggingface_hub import DatasetCard, DatasetCardData

from .. import __version__
from ..data.atomic import write_atomically
from ..data.definitions import KNOWN_DEFINITIONS
from ..errors import UserError
from ..method.choices import RANKED_BY
from ..method.columns import (
    COLUMN_MEANINGS,
    IMAGE_MEANINGS,
    OWN_ANSWER_MEANINGS,
    REFLECTED_MEANINGS,
    TARGET_MEANINGS,
)
from ..method.further_scores import FURTHER, turn_column
from ..method.number_words import many
from ..method.reasons import MEANINGS, Status
from ..method.scoring_health import rank_correlation
from ..report.plots import histogram_of
from ..report.score_frames import number_text, rows_text
from .provenance import Provenance
from .select import PoolSelection

MARKER = "<!-- Written by ifd-trainer select. -->"
UNKNOWN = "not recorded"
# Characters that may begin markup; an underscore inside a word does not, nor does `#` but at the start of a line.
_MARKUP = re.compile(r"[\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_])|^[#+-]")
_OWN = ("kept", "reason")  # names of columns that a card needs itself
_MOST_VALUES = 100  # of a column with quotas, in the table
_OTHER_SCORE = (
    "What the rows are ranked by is not a score of this method: what it says of them is for its source to tell. "
    "A score does not remove label noise by itself."
)
_SIZES = ("1K", "10K", "100K", "1M", "10M", "100M", "1B")  # categories of the hub end at powers of ten from 10^3 on


def check_card(path: Path) -> None:
    """Raise ValueError now if a card would be written over a file that is none."""
    if path.is_file() and MARKER not in path.read_text(encoding="utf-8", errors="replace"):
        raise UserError(
            f"{path} is there already and was not written by `ifd-trainer select`. Write to another place, or pass "
            "--no-card."
        )


def write_card(
    path: Path,
    image: Path,
    *,
    data: str,
    source: str,
    rows: pd.DataFrame,
    chosen: PoolSelection,
    provenance: Provenance,
    id_column: str | None = None,
    columns: Sequence[str] = (),
    everything: bool = False,
) -> None:
    """Write the card and its histogram.

    Args:
        path, image: the files to write, in one folder.
        data: name of the data file in that folder.
        source: the rows that were chosen from, a hub name or a file.
        rows: (n rows) score columns and `ifd_status` of the whole pool.
        chosen: what was chosen of it.
        provenance: how the scores were made.
        id_column: what broke ties; None for the position.
        columns: names of all columns of the data file.
        everything: whether the data file holds the rows that were not kept too.
    """
    score = chosen.ranking.label
    column = f"{score} (ranked by)" if score in _OWN else score
    frame = _scored(rows, chosen, column)
    figure = histogram_of({None: frame}, column, chosen.limit if chosen.limited == score else float("inf"))
    write_atomically(image, lambda temporary: figure.savefig(temporary, format="png"))
    name = public_name(source)
    written = chosen.pool_rows if everything else chosen.kept_rows
    what = f"{'all rows, marked ' if everything else ''}the {rows_text(chosen.kept_rows)} {_which(chosen)}"
    title = f"{' '.join(name.split())}: {what}"
    meanings = COLUMN_MEANINGS | {name: further.meaning for name, further in FURTHER.items()}
    meanings |= TARGET_MEANINGS | IMAGE_MEANINGS | OWN_ANSWER_MEANINGS | REFLECTED_MEANINGS
    meanings |= {turn_column(name): f"{name} of each answer of a conversation" for name in FURTHER}
    content = {
        "marker": MARKER,
        "title": _plain(title),
        "opening": _opening(chosen, _plain(name), everything),
        "facts": _facts(chosen, name, provenance, id_column),
        "pool": rows_text(chosen.pool_rows),
        "counts": [
            (_code(reason), f"{count:,}", f"{100 * count / chosen.pool_rows:.2f} %", MEANINGS.get(reason, ""))
            for reason, count in chosen.counts.items()
        ],
        "counted": f"{chosen.pool_rows:,}",
        "column": _code(chosen.column or "", cell=False),
        "values": _values(chosen),
        "statuses": ", ".join(
            f"{count:,} {_code(str(status), cell=False)}" for status, count in rows["ifd_status"].value_counts().items()
        ),
        "caption": f"Histogram of {_plain(score)} over the pool, kept rows apart",
        "image": quote(os.fsencode(image.name)),
        "score": _code(score),
        "scored": f"{len(frame):,}",
        "kept": f"{chosen.kept_rows:,}",
        "quantiles": _quantiles(frame, column, chosen.limit if chosen.limited == score else math.inf),
        "columns": {name: meaning for name, meaning in meanings.items() if name in columns},
        "limits": _limits(frame, score) if chosen.ranking.ifd else _OTHER_SCORE,
        "program": f"ifd_trainer {__version__}",
    }
    template = Path(__file__).with_name("card.md.jinja")
    card = DatasetCard.from_template(_metadata(title, written, data), template_path=str(template), **content)
    write_atomically(path, card.save)


def public_name(name: str) -> str:
    """A hub name as it is; of a local file or folder the last part, which says nothing about a machine.

    >>> public_name("tatsu-lab/alpaca"), public_name("/home/someone/rows.jsonl"), public_name("../model/")
    ('tatsu-lab/alpaca', 'rows.jsonl', 'model')
    """
    local = os.path.exists(name) or name.startswith((".", "/", "~")) or os.path.isabs(name)
    shown = (Path(name).name or Path(name).resolve().name) if local else name
    return shown.encode(errors="replace").decode()  # a file's name may be of bytes that are no text


def size_category(rows: int) -> str:
    """The hub's category of a data set's size.

    >>> size_category(1000)
    '1K<n<10K'
    """
    power = min(len(str(rows)) - 4, len(_SIZES) - 2)
    return f"{_SIZES[power]}<n<{_SIZES[power + 1]}" if rows >= 1000 else f"n<{_SIZES[0]}"


def _metadata(title: str, rows: int, data: str) -> DatasetCardData:
    matter = DatasetCardData(
        pretty_name=title,
        task_categories=["text-generation"],
        size_categories=[size_category(rows)],
        tags=["instruction-tuning", "data-selection", "ifd", "ifd_trainer"],
    )
    # train.parquet is found without being named. Named, `datasets` 5.2 would cache a local folder by this card alone,
    # and show the rows of an earlier folder of the same name and card.
    if not data.startswith("train."):
        # The path is a pattern: brackets and stars in a name would stand for others. A line of `---` in it would end
        # the front matter for readers that look for one.
        path = "".join(char if char.isprintable() else "?" for char in glob.escape(data))
        matter["configs"] = [{"config_name": "default", "data_files": [{"split": "train", "path": path}]}]
    return matter


def _opening(chosen: PoolSelection, name: str, everything: bool) -> str:
    kept = f"{rows_text(chosen.kept_rows)} of the {chosen.pool_rows:,} of {name}"
    what = (
        f"the {'row' if chosen.kept_rows == 1 else 'rows'} {_which(chosen, 'Instruction-Following Difficulty (IFD)')}"
    )
    if chosen.limit != float("inf"):
        what += f" below {chosen.limit:g}" if chosen.ranking.plain in RANKED_BY else f", IFD below {chosen.limit:g}"
    what += f", by quotas of {_code(chosen.column, cell=False)}" if chosen.column else ""
    if everything:
        of_all = f"All {chosen.pool_rows:,} rows" if chosen.pool_rows > 1 else "The only row"
        marked = "is" if chosen.kept_rows == 1 else "are"
        return f"{of_all} of {name}, each with its score; {kept} {marked} marked `kept`: {what}."
    return f"{kept[0].upper()}{kept[1:]}: {what}."


def _facts(chosen: PoolSelection, name: str, provenance: Provenance, id_column: str | None) -> list[tuple[str, str]]:
    limit, selection = chosen.limit, chosen.selection
    pool = f"% of all {rows_text(chosen.pool_rows)} of the pool"
    fraction = f"{100 * chosen.keep:g} {pool} = " if isinstance(chosen.keep, float) else ""
    known = KNOWN_DEFINITIONS.get(provenance.definition)
    definition = f"{provenance.definition}: {known.meaning}" if known else _plain(provenance.definition or UNKNOWN)
    options = {
        "maximal length": provenance.max_length,
        "least answer tokens": provenance.min_answer_tokens,
        "too long answers scored in part": provenance.score_truncated or None,
        "answers of a conversation": provenance.turns,
        "request to guess the instruction": provenance.guess,
        "dtype": provenance.dtype,
        **{f"S-IFD, {name}": value for name, value in (provenance.sifd or {}).items()},
    }
    listed = ", ".join(f"{key}: {value}" for key, value in options.items() if value is not None)
    facts = [
        ("source", _plain(name)),
        ("scoring model", _plain(public_name(provenance.model) if provenance.model else UNKNOWN)),
        ("its weights", _plain(provenance.weights or "")),
        ("definition of the scores", definition),
        ("prompt format", _plain(provenance.format or UNKNOWN)),
        ("options of the scoring", _plain(listed)),
        ("scored with", _plain(provenance.program or UNKNOWN)),
        ("target set", _plain(chosen.targets or "")),
        ("ranked by", f"{_by(chosen)}, ties by {_code(id_column) if id_column else 'position in the source'}"),
        (
            "limit",
            "none" if limit == float("inf") else f"`{chosen.limited}` < {limit:g}{_measured(chosen, provenance)}",
        ),
        ("asked for", f"{fraction}{rows_text(chosen.asked_rows)}"),
        ("kept", f"{rows_text(chosen.kept_rows)}, {100 * chosen.kept_rows / chosen.pool_rows:.2f} {pool}"),
        ("highest score kept", number_text(-selection.cut, 4))
        if chosen.ranking.lowest
        else ("lowest score kept", number_text(selection.cut, 4, below=limit)),
    ]
    short = f"{rows_text(selection.shortfall)}: only {many(selection.eligible, 'was', 'were')} eligible"
    facts.append(("shortfall", short if selection.shortfall else ""))
    return [(key, value) for key, value in facts if value]


def _which(chosen: PoolSelection, ifd: str = "IFD") -> str:
    """Which rows were kept, behind the word for them."""
    if chosen.targets:
        return "most like the examples of a target set"
    if chosen.ranking.lowest:
        return f"with the lowest {_code(chosen.ranking.lowest, cell=False)}"
    return f"with the highest {ifd if chosen.ranking.plain in RANKED_BY else _ranked(chosen)}"


def _ranked(chosen: PoolSelection) -> str:
    """What is ranked by, as a word."""
    if chosen.ranking.plain in RANKED_BY:
        return "IFD"
    return _code(chosen.ranking.label, cell=False) if chosen.ranking.plain else "weighted ranks"


def _by(chosen: PoolSelection) -> str:
    """What is ranked by, with its weights."""
    if chosen.ranking.plain:
        return _code(chosen.ranking.plain)
    if chosen.ranking.lowest:
        return f"{_code(chosen.ranking.lowest)}, the lowest first"
    ranks = " + ".join(f"{weight:g} x rank by {_code(name)}" for name, weight in chosen.ranking.weights.items())
    return f"{ranks}, each rank the share of the rows with a score that are not above the row"


def _values(chosen: PoolSelection) -> list[tuple[str, ...]]:
    """Rows by the values of a column with quotas, the most frequent ones."""
    shown = [
        (
            _code(each.value),
            f"{each.pool:,}",
            f"{each.eligible:,}",
            f"{'' if each.exact else 'at least '}{each.least:,}" if each.exact or each.least else "",
            f"{each.kept:,}",
        )
        for each in chosen.values[:_MOST_VALUES]
    ]
    if rest := chosen.values[_MOST_VALUES:]:
        sums = (sum(each.pool for each in rest), sum(each.eligible for each in rest), sum(each.kept for each in rest))
        shown.append((f"{len(rest):,} others", f"{sums[0]:,}", f"{sums[1]:,}", "", f"{sums[2]:,}"))
    return shown


def _measured(chosen: PoolSelection, provenance: Provenance) -> str:
    """How a limit came about that is no round number."""
    if not chosen.alpha:
        return ""
    wrong = {"ifd": provenance.wrong_ifd, "ifd_ppl": provenance.wrong_ifd_ppl}[chosen.limited] or []
    return (
        f", calibrated with alpha = {chosen.alpha:g} on {many(len(wrong), 'answer')} under the prompts of other rows: "
        "at most this share of rows that are mismatched like them is expected below it"
    )


def _plain(text: str) -> str:
    """Text of others on one line, shown in Markdown as it is: no markup, no HTML, no end of a table's cell.

    >>> _plain("a_b *c* <i> x|y")
    'a_b \\\\*c\\\\* &lt;i&gt; x\\\\|y'
    """
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _MARKUP.sub(r"\\\g<0>", text)


def _code(text: str, cell: bool = True) -> str:
    """Text of others as code, in a table's cell or elsewhere.

    >>> _code("a_b"), _code("a`|b")
    ('`a_b`', '`` a`\\\\|b ``')
    """
    text = " ".join(text.split()) or " "
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    if len(fence) > 1:
        text = f" {text} "  # which is not shown
    return fence + (text.replace("|", "\\|") if cell else text) + fence


def _scored(rows: pd.DataFrame, chosen: PoolSelection, column: str) -> pd.DataFrame:
    """The rows with a score, and what the card shows of them, no more: ten million rows have to fit.

    What is ranked by is in `column`.
    """
    name = chosen.ranking.label
    score, tokens = (rows[each].to_numpy(dtype=float, na_value=np.nan) for each in (name, "answer_tokens"))
    scored = (rows["ifd_status"] == Status.OK.value).to_numpy() & np.isfinite(score)
    columns = {column: score, "answer_tokens": tokens, "kept": chosen.is_kept, "reason": chosen.selection.reasons}
    return pd.DataFrame({name: values[scored] for name, values in columns.items()}, copy=False)


def _quantiles(frame: pd.DataFrame, score: str, limit: float) -> list[tuple[str, str, str]]:
    levels = {i / 10: f"{10 * i} %" for i in range(11)}
    levels |= {0.0: "0 % (lowest)", 0.5: "50 % (median)", 1.0: "100 % (highest)"}
    both = [scores.quantile(list(levels)) for scores in (frame[score], frame.loc[frame["kept"], score])]
    # What is kept is below the limit, and must not look as if it were not.
    return [(name, *(number_text(values[level], 4, below=limit) for values in both)) for level, name in levels.items()]


def _limits(frame: pd.DataFrame, score: str) -> str:
    rho = rank_correlation(frame["answer_tokens"], frame[score])
    length = "" if rho is None else f" (Spearman's rank correlation of `{score}` and answer tokens here: {rho:.2f})"
    return (
        f"IFD is confounded with the length of the answer{length}, so that selecting by IFD can select by length. It "
        "does not remove label noise: answers that are wrong or belong to another prompt often score high and stay "
        "under the limit. Scores hold for one model, one prompt format and one definition, and cannot be compared "
        "with others."
    )


def card_paths(data: Path, folder: bool) -> tuple[Path, Path]:
    """Where the card and the histogram of a data file go: README.md in a folder, beside a file under its name.

    >>> [path.as_posix() for path in card_paths(Path("out/cherry.jsonl"), folder=False)]
    ['out/cherry.md', 'out/cherry.png']
    """
    if folder:
        return data.with_name("README.md"), data.with_name("histogram.png")
    return data.with_suffix(".md"), data.with_suffix(".png")
