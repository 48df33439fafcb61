"""How the scores of a data file were made (model, definition, options): a small YAML file beside it, for its data card.

`scored.parquet` has `scored.parquet.ifd.yaml`. It holds a digest of the scores, so that it is believed for these
scores only: after a file has been scored anew by something else, it says nothing.

It is not in the schema's metadata of a Parquet file, which JSON and CSV lack: `datasets` 5.2 drops what is there when
it reads and when it writes a file, and has no checksum for it (tried: of all files with one bit flipped, 2 % gave other
metadata without an error).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import yaml
from datasets import Dataset

from .. import __version__
from ..data.atomic import write_atomically
from ..data.definitions import KNOWN_DEFINITIONS
from ..data.format_choice import format_of_rows
from ..data.formats import PromptFormat
from ..data.readable_text import answers_of, text_sources
from ..errors import FileAccessError, UserError
from ..method.choices import RANKED_BY
from .imported_scores import read_scores

if TYPE_CHECKING:
    from ..scoring.calibration import Calibration

# All that `find_scores` reads of rows that are scored.
READ_COLUMNS = (*RANKED_BY, "answer_tokens", "ifd_status", "ifd_definition")
_MEASURED = ("wrong_ifd", "wrong_ifd_ppl", "cut_eot_loss")  # what `calibrated` adds
_CHECKSUM = "checksum: "  # begins the last line, about those before it; older files have none


@dataclass(frozen=True)
class Provenance:
    """How scores were made; None for what is not known.

    Attributes:
        definition: one of `data.definitions.KNOWN_DEFINITIONS`.
        model: hub name or path of the model that scored.
        weights: what tells its weights from others: a hub name with its commit, or a digest of a folder.
        format: of the prompts; its name, or what `format_record` says of one that is the user's own.
        max_length, min_answer_tokens, score_truncated, turns, guess, without, dtype: options of the scoring.
        source: the rows that were scored, a hub name or a file.
        program: name and version of the program that scored.
        wrong_ifd, wrong_ifd_ppl: scores of answers under the prompts of other rows, of which a limit is made.
        cut_eot_loss: losses of an end of turn behind answers that were cut off, in nats.
        known: how the model was asked for what it knows (`KnowledgeScorer.settings`).
        spin: how it was asked for answers of its own (`OwnAnswerScorer.settings`).
        reflected: of rows of which a version was chosen, where rewritten texts came from, and the limit.
        sifd: the share of tokens that S-IFD is of and, where there are neighbours, their number, noise and seed.
        options: words of the command line that scored the rows, beside these, the model and the output.
    """

    definition: str | None = None
    model: str | None = None
    weights: str | None = None
    format: str | None = None
    max_length: int | None = None
    min_answer_tokens: int | None = None
    score_truncated: bool | None = None
    turns: str | None = None
    guess: str | None = None
    without: str | None = None
    dtype: str | None = None
    source: str | None = None
    program: str | None = None
    wrong_ifd: list[float] | None = None
    wrong_ifd_ppl: list[float] | None = None
    cut_eot_loss: list[float] | None = None
    known: dict[str, Any] | None = None
    spin: dict[str, Any] | None = None
    reflected: dict[str, Any] | None = None
    sifd: dict[str, Any] | None = None
    options: list[str] | None = None

    @property
    def single(self) -> bool:
        """Whether noise can be measured by scoring the source once more: not of scores of several answers and of
        images, nor of rows that another command made of it."""
        made = self.without is not None or self.reflected is not None or "neighbours" in (self.sifd or {})
        return self.turns in (None, "last") and not made

    def rows_format(self, columns: Collection[str]) -> PromptFormat | None:
        """The format in which rows with these columns were scored; None where that is not known, or cannot be."""
        return format_of_rows(self.format, columns)


def provenance_of(settings: Mapping[str, Any], model: str, weights: str, source: str) -> Provenance:
    """The provenance of scores of this program, made with these `IFDScorer.settings` and weights of this digest."""
    names = ("definition", "format", "max_length", "min_answer_tokens", "score_truncated", "turns", "guess", "without")
    options = {name: settings.get(name) for name in (*names, "dtype")}
    return Provenance(model=model, weights=weights, source=source, program=f"ifd_trainer {__version__}", **options)


def calibrated(provenance: Provenance, calibration: Calibration) -> Provenance:
    """The provenance with what was measured of the data set, to six digits; a score that is not finite says nothing."""
    values = (calibration.wrong.ifd, calibration.wrong.ifd_ppl, calibration.cut)
    rounded = ([float(f"{value:.6g}") for value in some[np.isfinite(some)].tolist()] for some in values)
    return replace(provenance, **dict(zip(_MEASURED, rounded, strict=True)))


def provenance_path(data: str | os.PathLike) -> Path:
    """Where the provenance of a data file is.

    >>> provenance_path("runs/scored.csv").as_posix()
    'runs/scored.csv.ifd.yaml'
    """
    return Path(f"{os.fspath(data)}.ifd.yaml")


def write_provenance(data: str | os.PathLike, provenance: Provenance, scores: pd.DataFrame | Dataset) -> None:
    """Write the provenance of a data file with these scores."""
    known = {name: value for name, value in asdict(provenance).items() if value is not None}
    known["scores"] = scores_digest(scores)
    # Each name begins a line, and the numbers of a list follow one another.
    lines = (
        yaml.safe_dump({name: value}, allow_unicode=True, default_flow_style=None if name in _MEASURED else False)
        for name, value in known.items()
    )
    text = "".join(lines)
    text += f"{_CHECKSUM}{_digest(text)}\n"
    write_atomically(provenance_path(data), lambda temporary: temporary.write_bytes(text.encode()))


def read_provenance(data: str | os.PathLike, scores: pd.DataFrame) -> Provenance | None:
    """The provenance of a data file, None where there is none or where it speaks of other scores.

    Raises:
        ValueError: for a file that is no provenance.
        FileAccessError: for one that was changed since it was written.
    """
    path = provenance_path(data)
    if not path.is_file():
        return None
    try:
        text = path.read_bytes().decode()
        record = yaml.safe_load(text)
        digest, checksum = record.pop("scores"), record.pop(_CHECKSUM.strip(": "), None)
        provenance = Provenance(**record)
        for name in _MEASURED:
            _ = [float(value) for value in record.get(name) or []]
    except (UnicodeDecodeError, yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError) as error:
        wanted = ", ".join(field.name for field in fields(Provenance))
        raise UserError(f"{path} does not say how scores were made ({wanted}, scores). Delete it.") from error
    expected = scores_digest(scores)
    if len(str(digest)) != len(expected) or checksum not in (None, _digest(text.rpartition(_CHECKSUM)[0])):
        raise FileAccessError(
            f"{path} was changed after it was written, by hand or by damage: what it says of {data} may be wrong. "
            f"Delete it, or, if the change is yours, only its line `{_CHECKSUM.strip()}`."
        )
    return provenance if digest == expected else None


def scored_before(data: str, rows: Dataset, model: str, weights: str) -> Provenance | None:
    """How the scores of rows were made that are to be scored further by the model that gave them.

    Args:
        data: the file of the rows.
        rows: with the scores.
        model: that is to score further.
        weights: what tells its weights from others, see `Provenance`.

    Returns:
        None where nothing says how they were made, or only of other scores than these.

    Raises:
        UserError: where another model gave them.
    """
    if not {*RANKED_BY} <= {*rows.column_names}:
        return None
    known = read_provenance(data, rows.select_columns([*RANKED_BY]).to_pandas())
    if known is None or known.weights is None:
        return known
    # Where one is a commit and the other a digest of files, they say nothing of each other.
    found, before = weights.split("+")[0], known.weights.split("+")[0]
    if ("@" in found) == ("@" in before) and found != before:
        raise UserError(
            f"The rows of {data} were scored by {known.model} with the weights {before}, and {model} has {found}: name "
            "the model that gave the scores, or score the rows anew."
        )
    return known


def find_scores(
    rows: pd.DataFrame, data: str, scores: str | None = None, *, kind: str | None = None, model: str | None = None
) -> tuple[pd.DataFrame, pd.DataFrame, Provenance]:
    """The scores of a data set, from a file of their own or from its columns.

    Args:
        rows: all columns of the data set; of one that has scores, `READ_COLUMNS` are enough. Texts may be categorical.
        data: the file or hub name that it came from.
        scores: a file of scores, see `publish.imported_scores`; None for those in the rows.
        kind: what wrote the scores; told from their content by default.
        model: the model that gave the scores, if it is not recorded.

    Returns:
        The score columns, those of them that the rows do not have yet, and how they were made.

    Raises:
        ValueError: when there are no scores, or scores of several definitions.
    """
    if scores is None and "ifd_status" in rows and kind in (None, "ifd-trainer"):
        columns, kind, new = _own_scores(rows, data), "ifd-trainer", []
    else:
        answers = answers_of(rows) if text_sources(rows) else None
        try:
            imported = read_scores(scores or data, len(rows), kind=kind, answers=answers)
        except ValueError as error:
            if scores is not None:
                raise
            raise UserError(f"No scores: score it first with `ifd-trainer score`, or pass --scores. {error}") from error
        columns, kind, new = imported.columns, imported.kind, list(imported.columns)
    if kind == "ifd-trainer":
        provenance = read_provenance(scores or data, columns) or Provenance(definition=_one_definition(rows, data))
    else:
        provenance = Provenance(definition=kind, program=KNOWN_DEFINITIONS[kind].program, source=data)
    added = columns[new].copy()
    if provenance.definition:
        added["ifd_definition"] = pd.Categorical.from_codes(np.zeros(len(rows), np.int8), [provenance.definition])
    return columns, added, replace(provenance, model=model or provenance.model)


def _own_scores(rows: pd.DataFrame, data: str) -> pd.DataFrame:
    if not {*RANKED_BY} & {*rows}:
        raise UserError(f"{data} has ifd_status, but neither ifd nor ifd_ppl: score it first with `ifd-trainer score`.")
    numbers = {name: pd.to_numeric(rows[name]) if name in rows else np.nan for name in (*RANKED_BY, "answer_tokens")}
    _one_definition(rows, data)
    status = rows["ifd_status"]
    status = status if isinstance(status.dtype, pd.CategoricalDtype) else status.astype(str)
    return pd.DataFrame(numbers | {"ifd_status": status}, index=rows.index, copy=False)


def _one_definition(rows: pd.DataFrame, data: str) -> str | None:
    """What the column `ifd_definition` says, if it is there."""
    if "ifd_definition" not in rows:
        return None
    names = sorted(map(str, rows["ifd_definition"].unique()))
    if len(names) > 1:
        raise UserError(
            f"{data} holds scores of several definitions ({', '.join(names)}), which cannot be ranked together. Score "
            "all rows with one definition, or select from each part."
        )
    return rows["ifd_definition"].iloc[0] if names else None


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def scores_digest(scores: pd.DataFrame | Dataset) -> str:
    """A digest of the columns in `RANKED_BY`, the same in every file format; of a data set, chunk by chunk."""
    digest = hashlib.blake2b(digest_size=16)
    for name in RANKED_BY:
        if isinstance(scores, pd.DataFrame):
            chunks = [pd.to_numeric(scores[name]).to_numpy(dtype=np.float64, na_value=np.nan)]
        else:
            chunks = (chunk.to_numpy(zero_copy_only=False) for chunk in scores.data[name].chunks)
        for values in chunks:
            digest.update(np.where(np.isnan(values), np.nan, values).astype("<f8").tobytes())
    return digest.hexdigest()
