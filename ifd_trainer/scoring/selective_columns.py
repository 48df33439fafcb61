"""From columns of token losses to a column of S-IFD, some rows at a time; no model runs here.

`IFDScorer(..., token_losses=True)` attaches `cas_tokens` and `das_tokens`. What S-IFD is, and how its threshold is
found in two passes, is in `method.selective_ifd`.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, Value

from ..data.files import with_columns
from ..data.table_reader import TableReader
from ..errors import UserError
from ..method.columns import SIFD, TOKEN_COLUMNS
from ..method.selective_ifd import SHARE, check_counts, check_share, delta_threshold, selective_scores

TOKEN_TYPE = pa.list_(pa.float32())
_NUMBER = Value("float64")
_ROWS = 10_000  # in memory at a time


def attach_selective_ifd(rows: Dataset, share: float = SHARE) -> Dataset:
    """The data set with a column `sifd`: the IFD of each row over the tokens of which the prompt tells most, alone.

        sifd = exp(mean of cas_t - das_t over the tokens with |cas_t - das_t| >= threshold)

    where the threshold is the smallest |cas_t - das_t| of the share of all tokens of the data set with the largest
    (T-SHIRT, arXiv 2506.01317); float64, null for a row without a score or of which no token passes. The columns of
    losses are read three times, some rows at a time, and no model is run. A share of 1 gives `ifd_ppl`.

    Args:
        rows: with the columns `cas_tokens` and `das_tokens` of `IFDScorer(..., token_losses=True)`.
        share: of all tokens, in (0, 1]; the paper takes 0.5 to 0.75.

    Raises:
        UserError: for rows without such columns, or a share that is none.

    >>> rows = Dataset.from_dict({"cas_tokens": [[1.0, 2.0], None], "das_tokens": [[2.0, 2.1], None]})
    >>> [value and round(value, 4) for value in attach_selective_ifd(rows)["sifd"]]
    [0.3679, None]
    """
    if not isinstance(rows, Dataset):
        raise UserError(f"attach_selective_ifd takes a datasets.Dataset, one split of it, got a {type(rows).__name__}.")
    check_share(share)
    return with_numbers(rows, {SIFD: selective_column(TableReader(rows, table_rows=_ROWS), share)})


def with_numbers(rows: Dataset, columns: dict[str, np.ndarray]) -> Dataset:
    """The data set with columns of numbers, (n,) each, at its end, in the place of old ones; NaN becomes null."""
    arrays = {name: pa.array(values, pa.float64(), from_pandas=True) for name, values in columns.items()}
    shown, rows = rows.format, rows.with_format(None)
    # Of data sets without rows, joining them leaves the columns of none.
    attached = with_columns(rows, Dataset(pa.table(arrays))) if len(rows) else _empty(rows, arrays)
    some = None if shown["columns"] == rows.column_names else list(dict.fromkeys([*shown["columns"], *columns]))
    return attached.with_format(shown["type"], some, **shown["format_kwargs"])


def _empty(rows: Dataset, columns: dict[str, pa.Array]) -> Dataset:
    kept = {name: feature for name, feature in rows.features.items() if name not in columns}
    return Dataset.from_dict({name: [] for name in (*kept, *columns)}, Features(kept | dict.fromkeys(columns, _NUMBER)))


def selective_column(rows: TableReader, share: float = SHARE) -> np.ndarray:
    """S-IFD of all rows of a data set, (n,) float64, NaN for null; see `attach_selective_ifd`."""
    threshold = threshold_of(rows, share)
    parts = [selective_scores(*part, threshold) for part in deltas_in_parts(rows)]
    return np.concatenate([np.empty(0), *parts])


def threshold_of(rows: TableReader, share: float = SHARE) -> float:
    """The threshold of a data set; see `delta_threshold`."""
    _check_columns(rows)
    return delta_threshold(lambda: (deltas for deltas, _ in deltas_in_parts(rows)), share)


def deltas_in_parts(rows: TableReader) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """What prompts tell of tokens, as `token_deltas` gives it, for some rows at a time."""
    for table in rows.tables(TOKEN_COLUMNS):
        for start in range(0, len(table), _ROWS):
            (cas, counts), (das, of_das) = (_flat(table[name].slice(start, _ROWS)) for name in TOKEN_COLUMNS)
            check_counts(counts, of_das)
            with np.errstate(invalid="ignore"):
                yield das - cas, counts


def _flat(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """The numbers in the lists of a column, one list after another, and how many are in each; in null there are 0."""
    counts = pc.fill_null(pc.list_value_length(column), 0)
    return pc.list_flatten(column).cast(pa.float32()).to_numpy(), counts.to_numpy().astype(np.int64)


def _check_columns(rows: TableReader) -> None:
    missing = [name for name in TOKEN_COLUMNS if name not in rows.column_names]
    if missing:
        raise UserError(
            f"The rows have no {' and no '.join(missing)}, the losses of tokens that S-IFD is made of: score them with "
            "IFDScorer(..., token_losses=True), or `ifd-trainer score --token-losses`."
        )
    schema = rows.features.arrow_schema
    for name in TOKEN_COLUMNS:
        kind = schema.field(name).type
        lists = pa.types.is_list(kind) or pa.types.is_large_list(kind)
        if not lists or not (pa.types.is_floating(kind.value_type) or pa.types.is_null(kind.value_type)):
            raise UserError(
                f"The column {name!r} holds {kind}, and S-IFD is made of lists of numbers. CSV has no lists: score to "
                "a .parquet or .jsonl file."
            )
