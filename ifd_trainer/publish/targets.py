"""The rows of a published set held against a target set: `ifd-trainer select --targets`.

Choosing is where this is done, and not scoring: which row a target takes depends on which rows may be kept at all, so
that limits and drops come first, and only the rows that are left are embedded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from ..data.files import load_rows, source_digest
from ..data.format_choice import columns_read, recorded_format
from ..errors import UserError
from ..method.number_words import many
from ..method.reasons import Status
from ..method.selection import ShortfallError
from ..method.target_set import most_like
from ..scoring.job_parts import Parts
from ..scoring.processes import Process
from ..scoring.scoring_job import join_parts, score_parts
from ..scoring.target_scorer import TARGETS_VERSION, RowsToEmbed, TargetScorer
from .provenance import Provenance

PART_ROWS = 256  # embedded at a time, and kept


class LikeTargets:
    """How alike rows are to the examples of a target set, and to which of them they are most alike.

    Args:
        targets: a file or a hub name.
        rows: the rows with their texts, a file, a folder or a hub name.
        split: of a folder or a hub data set.
        output: the file that is made of them, beside which parts are kept.
        provenance: how the rows were scored: by which model, and how it read them.
        embedder: another model to embed rows and targets.
        trust_remote_code: run code that comes with the model.

    Raises:
        UserError: where no model is known, or the targets cannot be read.
    """

    def __init__(
        self,
        targets: str,
        rows: str,
        split: str,
        output: Path,
        provenance: Provenance,
        embedder: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self.model = embedder or provenance.model
        if self.model is None:
            raise UserError(
                f"--targets embeds rows and targets with a model, and nothing says which one scored {rows}: name one "
                "with --embedder."
            )
        own = self.model == provenance.model
        self._scorer = TargetScorer(
            self.model,
            targets,
            format=recorded_format(provenance.format),
            max_length=provenance.max_length if own else None,
            dtype=provenance.dtype if own else None,
            trust_remote_code=trust_remote_code,
        )
        self._source, self._output = rows, output
        self._rows = load_rows(rows, split).with_format(None)
        self._parts: Parts | None = None

    def similarities(self, among: np.ndarray, status: pd.Series) -> tuple[np.ndarray, pd.Series]:
        """Cosines of n rows with m targets, and the status of each row.

        Some rows at a time, each of these parts kept beside the output until `finish`: interrupted, the same command
        goes on.

        Args:
            among: (n,) bool, the rows to embed.
            status: (n,) `ifd_status`.

        Returns:
            (n, m) float32, NaN for the other rows and those that cannot be embedded, whose status says why; and (n,).

        Raises:
            ShortfallError: where there is no row to embed.
            UserError: where parts of another choice are kept beside the output.
        """
        status = status.astype(object).to_numpy().copy()
        places = np.flatnonzero(among & (status == Status.OK.value))
        if not len(places):
            raise ShortfallError("No row is left that may be kept: nothing is held against the targets.")
        rows = self._rows.select(places)
        self._parts = Parts(self._output, self._job(places), main=True)
        read = columns_read(self._scorer.scorer.rows_format(rows.column_names), rows.column_names)
        score_parts(rows, self, self._parts, PART_ROWS, Process(), columns=read, doing="Embedding")
        joined = join_parts(rows, self, self._parts, PART_ROWS).data
        found = np.full((len(status), len(self._scorer.encoded)), np.nan, dtype=np.float32)
        found[places] = pc.list_flatten(joined["similarities"]).to_numpy().reshape(len(places), -1)
        status[places] = joined["status"].to_numpy()
        return found, pd.Series(pd.Categorical(status))

    def encode_rows(self, batch: Mapping[str, list]) -> RowsToEmbed:
        """What is embedded of a part of the rows; see `scoring_job`."""
        return self._scorer.encode_rows(batch)

    def score_rows(self, rows: RowsToEmbed, progress: Callable[[int], Any] | None = None) -> dict[str, Any]:
        """Columns of a part: its rows' cosines with all targets, in lists, and their statuses."""
        similarities, status = self._scorer.similarities_of(rows, progress)
        numbers = pa.array(similarities.ravel())
        return {
            "similarities": pa.FixedSizeListArray.from_arrays(numbers, similarities.shape[1]),
            "status": status,
        }

    def finish(self) -> None:
        """Delete the parts: what was to be written is."""
        if self._parts is not None:
            self._parts.remove()
            self._parts = None

    def close(self) -> None:
        """Keep the parts for the same command."""
        if self._parts is not None:
            self._parts.close()

    def _job(self, places: np.ndarray) -> dict[str, Any]:
        """What the cosines depend on."""
        settings = self._scorer.scorer.settings(self._rows.column_names)
        targets = self._scorer.read_targets(self._rows.column_names)
        return {
            "data": source_digest(self._source, self._rows),
            "rows": hashlib.blake2b(places.astype("<i8").tobytes(), digest_size=16).hexdigest(),
            "targets": targets.digest,
            "weights": self._scorer.scorer.digest(),
            **{name: settings[name] for name in ("format", "max_length", "dtype")},
            "targets_version": TARGETS_VERSION,
        }

    def most_like(self, similarities: np.ndarray) -> pd.Series:
        """The id of the target that each row is most like, (n,) whole numbers or texts; null for a row without one."""
        most, _ = most_like(similarities)
        known, ids = most >= 0, self._scorer.encoded.ids[most]
        if ids.dtype.kind in "iu":
            return pd.Series(pd.arrays.IntegerArray(ids.astype(np.int64), ~known))
        return pd.Series(np.where(known, ids.astype(object).astype(str), None))

    def words(self, name: str, model: str) -> str:
        """What rows were held against, for a card; known once they were.

        Args:
            name: of the target set, as a card may tell it.
            model: that of the model.
        """
        encoded = self._scorer.encoded
        bare = f", {encoded.without_answer:,} of them without an answer" if encoded.without_answer else ""
        return (
            f"{many(len(encoded), 'row')} of {name}{bare}; the targets took the rows most like them in turn, by "
            f"position-weighted mean hidden states of {model} (RDS+, arXiv 2503.01807)"
        )
