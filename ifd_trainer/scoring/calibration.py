"""What a model says of answers that are not as they should be: the samples that measured limits are made of.

    wrong    scores of answers of the data set under the prompts of other rows      -> `method.calibrated_limit`
    cut      loss of the end of turn behind answers that were cut off at random     -> `method.unfinished`

Which rows those are is drawn by the rules of `method`; the training loop measures the same of its pool, with the model
as it is (`training.pool_scorer`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from datasets import Dataset
from tqdm.auto import tqdm

from ..data.encoding import EncodedPair, Segment, mismatched, with_ending
from ..data.row_ids import find_ids, ranks
from ..data.similar_prompts import SimilarPrompts
from ..data.table_reader import TableReader
from ..errors import UserError
from ..method.calibrated_limit import CalibratedLimit
from ..method.columns import EOT_LOSS
from ..method.error_rate import least_measured
from ..method.pairing_test import PairingTest
from ..method.reasons import Status
from ..method.unfinished import Unfinished
from .losses import Scores

_TESTED_ON = ("ifd", "answer_tokens")
_CALIBRATED_ON = (*_TESTED_ON, "das")
_CHECKED = 256  # rows that are read again, to see that they are read as they were
CHUNK = 8192  # rows tested at a time


@dataclass(frozen=True)
class Calibration:
    """What was measured of a data set.

    Attributes:
        wrong: scores of answers under the prompts of other rows.
        cut: (m,) losses of an end of turn behind answers that were cut off, in nats.
    """

    wrong: Scores
    cut: np.ndarray


@dataclass(frozen=True)
class Reader:
    """What reads rows, by their positions, and runs a model over them.

    Attributes:
        encode: encodes rows.
        score: scores encoded rows; calls a function with the number of tokens done.
        losses: mean losses of segments, and the losses of their tails.
        longest: the most tokens that a wrong prompt and an answer may have together; None for no limit.
    """

    encode: Callable[[np.ndarray], list[EncodedPair]]
    score: Callable[[list[EncodedPair], Callable[[int], Any]], Scores]
    losses: Callable[[list[Segment], Callable[[int], Any]], tuple[np.ndarray, np.ndarray]]
    longest: int | None = None

    def wrong_pairs(self, candidates: np.ndarray, wanted: int) -> list[tuple[int, Segment]]:
        """The first pairs of `candidates` (m, 2), answer of and prompt of, that are wrong ones and not too long.

        Of each the position of the answer's row, and prompt and answer.
        """
        pairs: list[tuple[int, Segment]] = []
        for start in range(0, len(candidates), max(wanted, 1)):
            rows, others = (self.encode(candidates[start : start + wanted, side]) for side in (0, 1))
            tried = (mismatched(row, other, self.longest).conditioned for row, other in zip(rows, others, strict=True))
            answers = candidates[start : start + wanted, 0].tolist()
            found = [(row, segment) for row, segment in zip(answers, tried, strict=True) if segment]
            pairs += found[: wanted - len(pairs)]
            if len(pairs) == wanted:
                break
        return pairs

    def cut_answers(self, rows: np.ndarray, left: np.ndarray) -> list[Segment]:
        """Rows of whose answers only `left` tokens (m,) are left, with what ends a turn behind them."""
        pairs = zip(self.encode(rows), left.tolist(), strict=True)
        return [with_ending(pair, tokens) for pair, tokens in pairs]

    def pairings(
        self, rows: np.ndarray, anchors: np.ndarray, wanted: int, tokens: int
    ) -> tuple[list[Segment], np.ndarray]:
        """The first `tokens` tokens of the answers of m rows, under their own prompts and under those of others.

        Of `anchors` (m, C) the first `wanted` that make wrong pairs and not too long ones. Beside the s segments their
        places (2, s) in a table (m, 1 + wanted), whose first column is of the own prompts.
        """
        others = np.unique(anchors)
        encoded = dict(zip(others.tolist(), self.encode(others), strict=True))
        segments: list[Segment] = []
        places: list[tuple[int, int]] = []
        for number, (pair, tried) in enumerate(zip(self.encode(rows), anchors.tolist(), strict=True)):
            wrong = (mismatched(pair, encoded[other], self.longest).conditioned for other in tried)
            found = [pair.conditioned, *islice(filter(None, wrong), wanted)]
            segments += [Segment(s.ids[: s.start + tokens], s.start) for s in found]
            places += [(number, column) for column in range(len(found))]
        return segments, np.array(places, dtype=np.int64).reshape(-1, 2).T

    def paired_losses(
        self,
        rows: np.ndarray,
        anchors: np.ndarray,
        wanted: int,
        tokens: int,
        losses: Callable[[list[Segment]], np.ndarray],
    ) -> np.ndarray:
        """What `losses` gives for `pairings`, (m, 1 + wanted), NaN where a row has fewer anchors."""
        segments, places = self.pairings(rows, anchors, wanted, tokens)
        table = np.full((len(rows), 1 + wanted), np.nan)
        table[tuple(places)] = losses(segments)
        return table


def wrong_scores(pairs: list[tuple[int, Segment]], cas: np.ndarray, das: np.ndarray) -> Scores:
    """Scores of m wrong pairs: their losses (m,) over those of the same answers alone, of all rows (n,)."""
    tokens = np.array([segment.scored for _, segment in pairs], dtype=np.int64)
    alone = das[[row for row, _ in pairs]] if pairs else np.empty(0)
    return Scores.from_nll(cas, alone, tokens, np.full(len(pairs), Status.OK.value, dtype=object))


def shortage(calibration: Calibration, definition: str) -> str | None:
    """What to tell a user of whose rows too little was measured for limits with the usual error rates."""
    found = int(np.isfinite(calibration.wrong.ifd).sum()), len(calibration.cut)
    needed = least_measured(CalibratedLimit().alpha), least_measured(Unfinished().alpha)
    if found[0] >= needed[0] and (found[1] >= needed[1] or definition != "paper"):
        return None
    return (
        f"too little to calibrate on: {found[0]} answers could be scored under a wrong prompt and {found[1]} be cut. "
        f"With the usual error rates a calibrated limit takes {needed[0]} of the former, and dropping unfinished "
        f"answers {needed[1]} of the latter."
    )


def measure(
    reader: Reader,
    rows: Dataset,
    limit: CalibratedLimit,
    unfinished: Unfinished,
    seed: int,
    prompts: Callable[[], Iterable[str]],
    show: bool,
) -> Calibration:
    """Draw rows and measure; see `IFDScorer.calibrate`.

    Args:
        rows: with the columns that the scorer attached.
        limit, unfinished: how rows are drawn.
        prompts: the prompts of all rows, as text; called for near ones alone.
        show: whether to show a progress bar.
    """
    table, ids, scored, tokens = _scored_rows(rows, _CALIBRATED_ON)
    das = _numbers(table, "das")
    ended = _numbers(table, EOT_LOSS) if EOT_LOSS in rows.column_names else np.full(len(rows), np.nan)
    candidates = limit.draw(ids, scored, seed, lambda of, k: SimilarPrompts(prompts()).nearest(of, k))
    wanted = limit.wanted(int(scored.sum()))
    cut, left = unfinished.draw(ids, np.where(np.isfinite(ended), tokens, 0), seed)
    _check_scored_so(reader, np.union1d(candidates[:wanted, 0], cut), tokens)
    pairs = reader.wrong_pairs(candidates, wanted)
    prompted, segments = [segment for _, segment in pairs], reader.cut_answers(cut, left)
    total = sum(len(segment.ids) for segment in prompted + segments)
    with tqdm(total=total, desc="Calibrating", unit="tok", unit_scale=True, disable=not show, leave=False) as bar:
        wrong = wrong_scores(pairs, reader.losses(prompted, bar.update)[0], das)
        return Calibration(wrong, reader.losses(segments, bar.update)[1])


def p_values(
    reader: Reader,
    rows: Dataset,
    which: np.ndarray | None,
    test: PairingTest,
    seed: int,
    prompts: Callable[[], Iterable[str]],
    show: bool,
) -> np.ndarray:
    """Test whether answers belong to their prompts; see `IFDScorer.pairing_p_values`, and `measure`."""
    _, ids, scored, tokens = _scored_rows(rows, _TESTED_ON)
    tested = np.zeros(len(rows), dtype=bool)
    tested[slice(None) if which is None else which] = True
    tested, pool = (np.flatnonzero(some)[np.argsort(ids[some], kind="stable")] for some in (tested & scored, scored))
    found = np.full(len(rows), np.nan)
    if not len(tested):
        return found
    _check_scored_so(reader, tested[:_CHECKED], tokens)
    similar = SimilarPrompts(prompts()) if test.prompts == "near" else None
    anchors = test.draw(tested, pool, seed, similar.nearest if similar else None)
    for start in range(0, len(tested), CHUNK):
        part = slice(start, start + CHUNK)

        def losses(segments: list[Segment], done: int = start) -> np.ndarray:
            total, what = sum(len(segment.ids) for segment in segments), f"Pairing test, from row {done + 1:,}"
            with tqdm(total=total, desc=what, unit="tok", unit_scale=True, disable=not show, leave=False) as bar:
                return reader.losses(segments, bar.update)[0]

        table = reader.paired_losses(tested[part], anchors[part], test.anchors, test.tokens, losses)
        found[tested[part]] = test.p_values(table[:, 0], table[:, 1:])
    return found


def _scored_rows(rows: Dataset, wanted: Sequence[str]) -> tuple[TableReader, np.ndarray, np.ndarray, np.ndarray]:
    """Of n rows with the wanted columns: these, by what they are known, whether they have a score, answer tokens."""
    table = TableReader(rows)
    missing = [name for name in wanted if name not in rows.column_names]
    if missing:
        raise UserError(
            f"The rows have no {' and no '.join(missing)}: score them first, with the same scorer: "
            "`rows.map(scorer, batched=True)`."
        )
    tokens = np.nan_to_num(_numbers(table, "answer_tokens")).astype(np.int64)
    return table, _order(table), np.isfinite(_numbers(table, "ifd")), tokens


def _check_scored_so(reader: Reader, rows: np.ndarray, tokens: np.ndarray) -> None:
    """Raise where rows are not read as they were when they were scored."""
    for row, pair in zip(rows.tolist(), reader.encode(rows) if len(rows) else [], strict=True):
        found = pair.conditioned.scored if pair.conditioned else 0
        if found != tokens[row]:
            raise UserError(
                f"Row {row} was scored on {tokens[row]} answer tokens, and this scorer reads {found} there: the scores "
                "are those of another tokenizer, format, max_length or text. Use the scorer that gave them."
            )


def _numbers(table: TableReader, name: str) -> np.ndarray:
    return table.column(name).to_pandas().to_numpy(dtype=np.float64, na_value=np.nan)


def _order(table: TableReader) -> np.ndarray:
    """By what rows are known, (n,): ids that are numbers, the places of texts in their order, or positions."""
    _, ids = find_ids(table.column_names, table.column)
    if ids is None:
        return np.arange(len(table))
    return ids if isinstance(ids, np.ndarray) else ranks(ids)
