"""Compare and replace on files: `ifd-trainer reflect`.

Which version of a row is taken is said in `method.reflection`. Rewritten texts are columns of the data set, or those of
a second one whose rows have the ids of the first's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pyarrow as pa
from datasets import Dataset
from datasets.table import table_cast

from ..data.files import with_columns
from ..data.format_choice import FormatOptions, columns_read, resolve_format
from ..data.row_ids import as_array, find_ids
from ..errors import UserError, one_line
from ..method.number_words import many
from ..scoring.reflection import BESIDE, ReflectionScorer


@dataclass(frozen=True)
class Joined:
    """A data set with the rewritten texts of another one beside its own.

    Attributes:
        rows: the original rows, with a column `rewritten_NAME` for each column of their format that both have.
        columns: these columns.
        missing: rows of which there is no rewritten one.
    """

    rows: Dataset
    columns: dict[str, str]
    missing: int


def joined(
    original: Dataset, rewritten: Dataset, format: FormatOptions | None = None, id_column: str | None = None
) -> Joined:
    """Put the texts of rewritten rows beside those of the rows with the same id.

    Rows are known by a column of ids in both, `id_column` or `row_id` or `id`; without one in either by their
    positions. A rewritten set may have fewer rows, in any order, and may lack columns: what it lacks stays.

    Raises:
        UserError: for rewritten rows of unknown ids, one without any column of texts or with another type of them, ids
            in one of the two alone, and, without ids, another number of rows.

    >>> one = Dataset.from_dict({"id": [1, 2], "instruction": ["Add.", "Name a cat."], "output": ["3", "Tom"]})
    >>> other = Dataset.from_dict({"id": [2], "output": ["Felix"]})
    >>> joined(one, other).rows["rewritten_output"][:]
    [None, 'Felix']
    """
    read = columns_read(resolve_format(format, original.column_names, warn=False), original.column_names)
    there = [name for name in read if name in rewritten.column_names]
    if not there:
        raise UserError(
            f"The rewritten rows have none of the columns {read} that the rows are read by; theirs are "
            f"{sorted(rewritten.column_names)}. Give them the same names."
        )
    places = _places(original, rewritten, id_column)
    taken = _columns(rewritten, there).take(pa.array(places, pa.int64()))
    schema = original.with_format(None).select_columns(there).features.arrow_schema
    try:
        taken = table_cast(taken, schema)
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise UserError(
            f"The columns {there} of the rewritten rows are of other types than those of the rows "
            f"({one_line(error)[:200]}). Write both in the same way."
        ) from error
    columns = {name: BESIDE + name for name in there}
    beside = Dataset(taken.rename_columns([columns[name] for name in taken.column_names]))
    return Joined(with_columns(original, beside), columns, sum(place is None for place in places))


def _places(original: Dataset, rewritten: Dataset, id_column: str | None) -> list[int | None]:
    """For each row the position of its rewritten one, or None."""
    found = [
        find_ids(rows.column_names, lambda name, rows=rows: _columns(rows, [name])[name], id_column, "--id-column")
        for rows in (original, rewritten)
    ]
    (name, own), (other, theirs) = found
    if name != other:
        with_ids, without = ("rows", "rewritten rows") if other is None else ("rewritten rows", "rows")
        said = f"The {with_ids} have ids in the column {name or other!r} and the {without} do not"
        said = f"The rows have ids in {name!r} and the rewritten rows in {other!r}" if name and other else said
        raise UserError(f"{said}: give both the same column of ids (--id-column), or neither.")
    if name is None:
        if len(original) != len(rewritten):
            raise UserError(
                f"There are {many(len(original), 'row')} and {many(len(rewritten), 'rewritten row')}, and no column of "
                "ids (row_id, id or --id-column) says which belong together."
            )
        return list(range(len(original)))
    of_ids = {each: place for place, each in enumerate(as_array(theirs).tolist())}
    places = [of_ids.get(each) for each in as_array(own).tolist()]
    if unknown := len(of_ids) - sum(place is not None for place in places):
        known = {*as_array(own).tolist()}
        first = next(each for each in of_ids if each not in known)
        raise UserError(
            f"{many(unknown, 'rewritten row has', 'rewritten rows have')} an id ({name}) that no row has, the first "
            f"{first!r}: the two data sets do not belong together."
        )
    return places


def _columns(rows: Dataset, names: list[str]) -> pa.Table:
    """Columns in memory, in the order of the rows."""
    return rows.select_columns(names).with_format("arrow")[:]


class Taken:
    """Gives the texts of the versions that are taken, for `Dataset.map`.

    Args:
        reflection: what has chosen.
    """

    def __init__(self, reflection: ReflectionScorer) -> None:
        self.reflection = reflection

    def __call__(self, batch: Mapping[str, list]) -> dict[str, list]:
        columns = {name: batch[name] for name in batch}
        return self.reflection.taken_texts(columns, columns["reflect_reason"])


def with_taken_texts(rows: Dataset, reflection: ReflectionScorer) -> Dataset:
    """Rows of which versions were chosen, with the texts of these."""
    return rows.map(Taken(reflection), batched=True, features=rows.features, load_from_cache_file=False)
