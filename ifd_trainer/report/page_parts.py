"""What pages are made of: plots in the colours of the page, tables of rows with their texts, one file for it all."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from ..data.readable_text import plain, shortened
from .figure_files import inline_svg, png

_LONGEST = 20_000  # characters of a text in a page


@dataclass(frozen=True)
class Plot:
    """A plot as the page shows it, with a caption that says how to read it."""

    name: str
    title: str
    caption: str
    png: bytes
    svg: Markup  # in the page: its colours follow the page's

    @classmethod
    def of(cls, name: str, title: str, caption: str, figure: Figure) -> Plot:
        """The plot that a figure makes."""
        return cls(name, title, caption, png(figure), Markup(inline_svg(figure, name)))


@dataclass(frozen=True)
class RowTable:
    """Some rows of a kind, for the macro `row_table`.

    Attributes:
        total: how many rows there are of the kind.
        headers: of the cells.
        rows: each a mapping with `cells`, and `texts` as `texts_of` returns them.
        words: what is to be said of the columns.
    """

    title: str
    total: int
    headers: list[str]
    rows: list[dict[str, Any]]
    words: str = ""


def texts_of(details: pd.DataFrame | None, key: str) -> dict[str, str] | None:
    """Instruction, input and answer of a row, shortened, and in whole where something is left out.

    Args:
        details: rows with these columns, by key.
    """
    if details is None or "answer" not in details or key not in details.index:
        return None
    row = details.loc[key]
    texts = {}
    for name, most, lines in (("instruction", 400, 8), ("input", 240, 5), ("answer", 500, 8)):
        whole = plain(row[name])
        texts[name] = shortened(whole, most, lines)
        # What is left out stands in the page too, up to a length at which a page of such rows still opens.
        longer = shortened(whole, _LONGEST, _LONGEST)
        texts[f"whole_{name}"] = longer if longer != texts[name] else ""
    return texts


def rendered(template: Path, content: Mapping[str, Any]) -> str:
    """The page that a template makes, in the frame of `layout.html.jinja`, with the script that sorts its tables."""
    here = Path(__file__).parent
    script = (here / "report.js").read_text(encoding="utf-8").strip()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = Environment(
        loader=FileSystemLoader([template.parent, here]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    of_layout = {"script": Markup(script), "script_digest": digest}
    return environment.get_template(template.name).render(content, **of_layout)
