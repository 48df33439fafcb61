"""The pairing test of the rows that a published set would keep, by the model that scored them.

What the test is, and what its p-values mean, stands with `method.pairing_test`. It takes K forwards of a row, and so is
of the rows that would be kept alone: where some fail, the next best take their places, and are tested too.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import pandas as pd
from datasets import Dataset

from ..data.files import load_rows, with_columns
from ..data.format_choice import recorded_format
from ..errors import UserError
from ..method.pairing_test import PairingTest
from ..method.reasons import MISMATCHED
from ..scoring.transform import IFDScorer
from .provenance import Provenance
from .select import PoolSelection

logger = logging.getLogger(__name__)


class MismatchedRows:
    """The pairing test at work.

    Args:
        rows: the rows with their texts, a file, a folder or a hub name.
        split: of a folder or a hub data set.
        scores: (n,) `ifd`, and `answer_tokens`.
        provenance: how the scores were made.
        origin: the file of the scores, for messages.
        trust_remote_code: run code that comes with the model.

    Raises:
        UserError: where the model that scored is not known, not there, or is another one now.
    """

    def __init__(
        self,
        rows: str,
        split: str,
        scores: pd.DataFrame,
        provenance: Provenance,
        origin: str,
        trust_remote_code: bool = False,
    ) -> None:
        self.test = PairingTest()
        self._scorer = _scorer_of(provenance, origin, trust_remote_code)
        columns = Dataset.from_pandas(scores[["ifd", "answer_tokens"]], preserve_index=False)
        self._rows = with_columns(load_rows(rows, split), columns)

    def choose(
        self, choose: Callable[[dict[str, np.ndarray]], PoolSelection], dropped: dict[str, np.ndarray]
    ) -> PoolSelection:
        """Choose rows that have all passed the test.

        Args:
            choose: chooses by the rows that are dropped.
            dropped: by reason, (n,) rows that are dropped for others.

        Raises:
            ShortfallError: as `choose` does.
        """
        chosen = choose(dropped)
        tested, failed = np.zeros((2, chosen.pool_rows), dtype=bool)
        while len(new := np.flatnonzero(chosen.is_kept & ~tested)):
            tested[new] = True
            failed[new] = ~self.test.passes(self._scorer.pairing_p_values(self._rows, new, self.test)[new])
            if failed[new].any():
                chosen = choose({**dropped, MISMATCHED: failed})
        return chosen


def _scorer_of(provenance: Provenance, origin: str, trust_remote_code: bool) -> IFDScorer:
    """The model that gave the scores, to read rows as it did."""
    if not (provenance.program or "").startswith("ifd_trainer ") or not (provenance.model and provenance.weights):
        raise UserError(
            f"--drop-mismatched asks the model that gave the scores, and nothing says which that was of {origin}: "
            "score it with `ifd-trainer score`."
        )
    known = provenance.weights.split("+")[0]
    name, _, commit = known.rpartition("@")
    scorer = IFDScorer(
        provenance.model,
        format=recorded_format(provenance.format),
        definition=provenance.definition,
        max_length=provenance.max_length,
        min_answer_tokens=provenance.min_answer_tokens,
        score_truncated=provenance.score_truncated,
        turns=provenance.turns,
        dtype=provenance.dtype,
        revision=commit if name == provenance.model else None,
        trust_remote_code=trust_remote_code,
    )
    found = scorer.digest()
    if ("@" in found) != ("@" in known):
        logger.warning(
            "Whether %s holds the weights that gave the scores, %s, cannot be told.", provenance.model, known
        )
    elif found.split("+")[0] != known:
        raise UserError(
            f"--drop-mismatched asks the model that gave the scores, and {provenance.model} has other weights now "
            f"({found} in place of {known}): score {origin} anew, or name a copy of that model with --scored-by."
        )
    return scorer
