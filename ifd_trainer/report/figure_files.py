"""A figure as a file's content: PNG, and SVG that takes its colours from the page that it stands in."""

from __future__ import annotations

import io
import re
import warnings

import matplotlib
from matplotlib.figure import Figure

from .plots import COLOURS

_NAMES = {colour: name for name, colour in COLOURS.items()}
_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}  # the same page for the same run


def png(figure: Figure) -> bytes:
    """The figure as a PNG file, on white."""
    return _saved(figure, format="png", dpi="figure", facecolor=COLOURS["paper"])


def inline_svg(figure: Figure, name: str) -> str:
    """The figure as an `<svg>` element for a page.

    Colours are CSS variables (`var(--blue)`, see `plots.COLOURS`), texts are texts in the page's font, and what it
    names inside begins with `name`, for several figures in one page.
    """
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        text = _saved(figure, format="svg", metadata=_METADATA).decode("utf-8")
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*|<style.*?</style>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r'\1 aria-hidden="true"', text, count=1)
    used = set(re.findall(_NAMED, "".join(re.findall(_TAG, text))))
    # Tags alone: what stands between them is the text of labels.
    text = re.sub(_TAG, lambda tag: _of_page(tag[0], name, used), text)
    return re.sub(r"\s*\n\s*", " ", text).strip()


_TAG = r"<[^>]+>"
_NAMED = r'(?:(?<=href="#)|(?<=url\(#))[^")]+'


def _of_page(tag: str, name: str, used: set[str]) -> str:
    """A tag without colours, fonts and names of its own."""
    tag = re.sub(r"font: ([\d.]+px) [^;\"]*|font-size: ([\d.]+px); font-family: [^;\"]*", r"font-size: \1\2", tag)
    tag = re.sub(r"#[0-9a-f]{6}\b(?=[;\"])", lambda colour: _variable(colour[0]), tag)
    tag = re.sub(r' id="([^"]*)"', lambda hit: f' id="{name}-{hit[1]}"' if hit[1] in used else "", tag)
    return re.sub(_NAMED, lambda hit: f"{name}-{hit[0]}", tag)


def _variable(colour: str) -> str:
    # What is black by matplotlib's default (axes, ticks) is ink.
    name = "ink" if colour == "#000000" else _NAMES.get(colour)
    return f"var(--{name})" if name else colour


def _saved(figure: Figure, **options: object) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        # Labels may be in scripts that the plot font lacks; the page's table shows them in full.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(file, **options)
    return file.getvalue()
