"""The rows of a published set held against a target set: `ifd-trainer select --targets`.

Choosing is where this is done, and not scoring: which row a target takes depends on which rows may be kept at all, so
that limits and drops come first, and only the rows that are left are embedded.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from ..data.files import load_rows
from ..data.format_choice import recorded_format
from ..errors import UserError
from ..method.number_words import many
from ..method.reasons import Status
from ..method.selection import ShortfallError
from ..method.target_set import most_like
from ..scoring.target_scorer import TargetScorer
from .provenance import Provenance

_ROWS = 1000  # embedded at a time


class LikeTargets:
    """How alike rows are to the examples of a target set, and to which of them they are most alike.

    Args:
        targets: a file or a hub name.
        rows: the rows with their texts, a file, a folder or a hub name.
        split: of a folder or a hub data set.
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
        self._rows = load_rows(rows, split).with_format(None)

    def similarities(self, among: np.ndarray, status: pd.Series) -> tuple[np.ndarray, pd.Series]:
        """Cosines of n rows with m targets, and the status of each row.

        Args:
            among: (n,) bool, the rows to embed.
            status: (n,) `ifd_status`.

        Returns:
            (n, m) float32, NaN for the other rows and those that cannot be embedded, whose status says why; and (n,).

        Raises:
            ShortfallError: where there is no row to embed.
        """
        found, status = None, status.astype(object).to_numpy().copy()
        rows = np.flatnonzero(among & (status == Status.OK.value))
        for start in range(0, len(rows), _ROWS):
            part = rows[start : start + _ROWS]
            similarities, status[part] = self._scorer.similarities(self._rows[part.tolist()])
            if found is None:
                found = np.full((len(status), similarities.shape[1]), np.nan, dtype=np.float32)
            found[part] = similarities
        if found is None:
            raise ShortfallError("No row is left that may be kept: nothing is held against the targets.")
        return found, pd.Series(pd.Categorical(status))

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
