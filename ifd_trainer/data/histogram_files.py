"""Files that sites exchange: a `ScoreHistogram` and the `Threshold` that was agreed on, as JSON.

They hold numbers, the name of the score and the digest of a model's weights: no id and no text of a row. JSON has no
infinity: an end that is open is null.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import FileAccessError, NotFoundError, UserError, one_line
from ..method.score_histogram import ScoreHistogram, SiteShare, Threshold, agreed_threshold
from .atomic import write_json

VERSION = 1
_HISTOGRAM, _THRESHOLD = "score histogram", "score threshold"


def write_histogram(path: Path, histogram: ScoreHistogram) -> None:
    """Write what a site shows of its scores."""
    write_json(path, {"kind": _HISTOGRAM, "version": VERSION, **asdict(histogram)})


def read_histogram(path: Path) -> ScoreHistogram:
    """Read what a site shows of its scores.

    Raises:
        UserError: for a file that is none of these, or was changed so that it is none any more.
    """
    content = _read(path, _HISTOGRAM, "`ifd-trainer histogram`")
    try:
        return ScoreHistogram(**content | {name: tuple(content[name]) for name in ("edges", "counts")})
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} holds no histogram: {one_line(error)}. Let the site write it again.") from error


def agreed(paths: Sequence[Path], keep: float | int) -> Threshold:
    """The threshold for a share of the rows of all sites, or a number of them, from the files of their histograms."""
    sites = {path.name: read_histogram(path) for path in paths}
    if len(sites) < len(paths):  # two folders may hold files of one name
        sites = {str(path): read_histogram(path) for path in paths}
    if len(sites) < len(paths):
        raise UserError("A file is named twice: the rows of its site would be counted twice.")
    rows = sum(histogram.rows for histogram in sites.values())
    return agreed_threshold(sites, max(round(keep * rows), 1) if isinstance(keep, float) else keep, keep)


def write_threshold(path: Path, threshold: Threshold) -> None:
    """Write what was agreed on."""
    content = asdict(threshold)
    content["between"] = [number if math.isfinite(number) else None for number in threshold.between]
    write_json(path, {"kind": _THRESHOLD, "version": VERSION, **content})


def read_threshold(path: Path) -> Threshold:
    """Read what was agreed on.

    Raises:
        UserError: for a file that is none of these.
    """
    content = _read(path, _THRESHOLD, "`ifd-trainer threshold`")
    try:
        low, high = content["between"]
        content["between"] = (-math.inf if low is None else low, math.inf if high is None else high)
        content["sites"] = tuple(SiteShare(**site) for site in content["sites"])
        found = Threshold(**content)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} holds no threshold: {one_line(error)}. Write it again.") from error
    if not (isinstance(found.value, (int, float)) and math.isfinite(found.value) and isinstance(found.score, str)):
        raise UserError(f"{path} holds no threshold: its value is {found.value!r} of {found.score!r}. Write it again.")
    return found


def threshold_of(text: str | float) -> Threshold:
    """A number, or what was agreed on, from its file.

    >>> threshold_of("0.25").value
    0.25
    """
    wanted = "threshold wants a number, or the file that `ifd-trainer threshold` wrote"
    try:
        value = float(text)
    except ValueError as error:
        if not Path(text).is_file():
            raise NotFoundError(f"{wanted}; {text!r} is no number, and there is no such file.") from error
        return read_threshold(Path(text))
    if not math.isfinite(value):
        raise UserError(f"{wanted}, got {text!r}.")
    return Threshold(value)


def _read(path: Path, kind: str, command: str) -> dict[str, Any]:
    """The content of a file of some kind, without its kind and version."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise NotFoundError(f"No such file: {path}.") from error
    except OSError as error:
        raise FileAccessError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({one_line(error)}). A {kind} is written by {command}.") from error
    if not isinstance(content, dict) or content.pop("kind", None) != kind:
        raise UserError(f"{path} is no {kind}, which is written by {command}.")
    if (version := content.pop("version", None)) != VERSION:
        raise UserError(f"{path} has version {version}, and this program reads version {VERSION}.")
    return content
