"""Rows like a few examples of what a model is to be good at: RDS+, and the policy that selects with it.

A row and a target are vectors: each the mean of a model's last hidden states over prompt and answer, later tokens
weighted more. How alike they are is the cosine. The targets take turns: each takes the row most like it that none has
taken before, until the budget is spent, so that no target is left out because others have more rows near them.

    x = sum_t t * h_t / sum_t t        cos(x, y) = <x, y> / (|x| |y|)

Source: arXiv 2503.01807, in whose comparison of selection methods it was the strongest.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import UserError
from .calibrated_limit import CalibratedLimit
from .choices import Shortfall
from .number_words import many
from .reasons import KEPT, LESS_ALIKE, Status
from .selection import ROW_LIMIT, Cherry, Selection, ShortfallError, best_rows, check_rows_wanted, counted, repeats

SIMILARITIES = "target_similarities"  # the column of rows' cosines with all targets, (n, m)

BLOCK = 1 << 22  # numbers of rows' vectors in float64 at a time
_WAITING = 64  # rows that each target sorts at a time, at least


def cosines(rows: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """How alike n rows and m targets are, (n, m) float32 from -1 to 1; NaN for a row that is not finite.

        cos(x, y) = <x, y> / (|x| |y|)

    Vectors are rounded to integers just small enough that every dot product is exact in float64, which moves a cosine
    by less than float32 does. So what two vectors give depends on no block size, thread count, linear algebra library,
    or other row. Beside the result, memory is for some thousand rows.

    Args:
        rows: (n, d) numbers. A row of zeros is like none: 0.
        targets: (m, d) finite numbers, m at least 1.

    Raises:
        ValueError: for targets that are not finite, and for rows with another number of dimensions.

    >>> cosines(np.array([[3.0, 4.0], [0.0, 0.0]]), np.array([[1.0, 0.0], [6.0, 8.0]])).round(3).tolist()
    [[0.6000000238418579, 1.0], [0.0, 0.0]]
    """
    rows, targets = np.asarray(rows), np.asarray(targets)
    for name, vectors in (("Targets", targets), ("Rows", rows)):
        if vectors.ndim != 2 or vectors.dtype.kind not in "fiu":
            raise UserError(f"{name} must be vectors of numbers (n, d), got {vectors.dtype} {vectors.shape}.")
    if not targets.size:
        raise UserError("There is no target to hold rows against.")
    bad = np.flatnonzero(~np.isfinite(targets).all(axis=1))
    if len(bad):
        raise UserError(
            f"{len(bad)} of {many(len(targets), 'target')} have an embedding that is not finite, the first is number "
            f"{bad[0]}. Leave them out, or look at the model that made them: NaN often comes from float16."
        )
    out = np.full((len(rows), len(targets)), np.nan, dtype=np.float32)
    if len(rows) and rows.shape[1] not in (0, targets.shape[1]):
        raise UserError(
            f"Rows have {rows.shape[1]} dimensions and targets {targets.shape[1]}: they were embedded by two models. "
            "Embed both with the same one."
        )
    if not len(rows) or not rows.shape[1]:  # vectors of no row: nobody told how long they are
        return out
    others, others_squared = _integers(targets)  # (m, d), (m,)
    step = max(BLOCK // rows.shape[1], 1)
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        finite = np.isfinite(part).all(axis=1)
        units, squared = _integers(part[finite])
        lengths = np.sqrt(squared[:, None] * others_squared)  # (b, m)
        dots = units @ others.T
        out[start : start + step][finite] = np.divide(dots, lengths, out=np.zeros_like(dots), where=lengths > 0)
    return out


def most_like(similarities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of n rows, the target that each is most like, the first of equals, and how alike they are.

    Args:
        similarities: (n, m).

    Returns:
        (n,) numbers of targets, -1 for a row with NaN; (n,) float64, NaN for such a row.

    >>> [found.tolist() for found in most_like(np.array([[0.1, 0.5, 0.5], [0.2, np.nan, 0.1]]))]
    [[1, -1], [0.5, nan]]
    """
    known = np.isfinite(similarities).all(axis=1)
    most = np.where(known, np.argmax(similarities, axis=1), -1)
    return most, np.where(known, similarities[np.arange(len(most)), most], np.nan).astype(np.float64)


def round_robin(similarities: np.ndarray, budget: int, ids: np.ndarray | None = None) -> np.ndarray:
    """The rows that targets take in turn: the k-th is the one most like target k mod m of those not taken before.

    The rows of a smaller budget are the first ones of a larger. Where rows stand changes nothing: ties go to the lower
    id. Each target sorts few rows at a time: 100,000 of a million rows by a hundred targets took 4 s on two shared
    cores, and 29 s by targets that were all the same.

    Args:
        similarities: (n, m), larger is more alike; a row with NaN is taken by none.
        budget: number of rows.
        ids: (n,) row ids that break ties; positions by default.

    Returns:
        (k,) positions in the order taken, each once: `budget`, or all rows where there are fewer.

    >>> round_robin(np.array([[0.9, 0.8], [0.7, 0.6], [0.1, 0.5]]), 3).tolist()
    [0, 1, 2]
    >>> round_robin(np.array([[0.1, 0.9], [0.7, 0.8], [0.6, 0.2]]), 3).tolist()
    [1, 0, 2]
    """
    similarities = np.asarray(similarities)
    if similarities.ndim != 2 or not similarities.shape[1]:
        raise UserError(f"Similarities must be (rows, targets), with a target at least, got {similarities.shape}.")
    check_rows_wanted(budget)
    rows, targets = similarities.shape
    ids = np.arange(rows) if ids is None else np.asarray(ids)
    left = np.isfinite(similarities).all(axis=1)
    taken = np.empty(min(budget, int(left.sum())), dtype=np.int64)
    queues: list[list[int]] = [[] for _ in range(targets)]  # rows each target would take next, the next one last
    sizes = [max(_WAITING, 4 * math.ceil(len(taken) / targets))] * targets
    for turn in range(len(taken)):
        target, found = turn % targets, None
        while found is None:
            if not queues[target]:
                waiting = best_rows(similarities[:, target], ids, left, sizes[target])
                queues[target] = waiting[::-1].tolist()
                sizes[target] *= 2  # others take what it waits for: it looks further the next time
            row = queues[target].pop()
            found = row if left[row] else None
        taken[turn] = found
        left[found] = False
    return taken


@dataclass(frozen=True)
class TargetSet:
    """Keep the rows most like examples of what the model is to be good at: RDS+ (arXiv 2503.01807).

    Rows and targets are embedded by the model that scores, as they are trained on: prompt and answer together, a target
    without an answer by its prompt alone. A row is eligible when its status is `ok` and, with a limit, its IFD is below
    it; of these the targets take the rows most like them in turn (`round_robin`). Without a limit no row is scored.

    Args:
        targets: a file or a hub name, or the rows themselves (a list of mappings, a `datasets.Dataset`). Ten to some
            hundred are usual.
        format: of the targets, as for `IFDScorer`; told from their columns by default, and where they lack what it
            reads.
        max_ifd: rows at or above are dropped: a number, "calibrated" or a `CalibratedLimit`; None for no limit.
        on_shortfall: as for `Cherry`.

    >>> columns = {"ifd_status": np.full(3, "ok"), SIMILARITIES: np.array([[0.1, 0.9], [0.7, 0.8], [0.6, 0.2]])}
    >>> selection = TargetSet("my_task.jsonl")(columns, budget=2)
    >>> selection.kept.tolist(), selection.reasons.tolist()
    ([1, 0], ['kept', 'kept', 'less_like_targets'])
    """

    targets: Any
    format: Any = None
    max_ifd: float | CalibratedLimit | None = None
    on_shortfall: Shortfall = "repeat"

    def __post_init__(self) -> None:
        targets = self.targets
        if isinstance(targets, os.PathLike):
            targets = os.fspath(targets)
        elif hasattr(targets, "to_list"):  # a data set of `datasets`, which this room does not know
            targets = tuple(targets.to_list())
        elif isinstance(targets, (list, tuple)):
            targets = tuple(targets)
        named = isinstance(targets, str) and targets.strip()
        if not named and not (isinstance(targets, tuple) and all(isinstance(row, Mapping) for row in targets)):
            raise UserError(
                "A TargetSet needs a file, a hub name or rows (a list of mappings, a datasets.Dataset), got "
                f"{self.targets!r}."
            )
        if targets == ():
            raise UserError("The target set has no rows: a few examples of what the model is to be good at are needed.")
        object.__setattr__(self, "targets", targets)
        limit = self.candidates.max_ifd  # refuses what Cherry refuses
        object.__setattr__(self, "max_ifd", None if limit == math.inf else limit)

    @property
    def reads_scores(self) -> bool:
        """Whether it needs the IFD of rows: for its limit."""
        return self.max_ifd is not None

    @property
    def candidates(self) -> Cherry:
        """The policy that says which rows are eligible, where there is a limit."""
        return Cherry(math.inf if self.max_ifd is None else self.max_ifd, on_shortfall=self.on_shortfall)

    def __call__(
        self,
        columns: Mapping[str, np.ndarray],
        budget: int,
        *,
        ids: np.ndarray | None = None,
        rng: np.random.Generator | None = None,
    ) -> Selection:
        """Select `budget` of n rows.

        Args:
            columns: `ifd_status` (n,); `target_similarities`, (n, m), NaN for a row that was not embedded; with a limit
                `ifd`, and, if there is one, `row_limit`, as for `Cherry`.
            budget, ids, rng: as for `Cherry`.

        Returns:
            The selection in the order in which the targets took the rows; `less_like_targets` is the reason of eligible
            rows that none took.

        Raises:
            ShortfallError: as for `Cherry`.
            ValueError: without similarities.
        """
        check_rows_wanted(budget)
        similarities = self._similarities(columns)
        status = np.asarray(columns["ifd_status"], dtype=object).copy()
        ok = status == Status.OK.value
        status[ok & ~np.isfinite(similarities).all(axis=1)] = Status.NONFINITE.value
        ids = np.arange(len(status)) if ids is None else np.asarray(ids)
        if self.reads_scores or ROW_LIMIT in columns:
            ranked = {name: columns[name] for name in ("ifd", ROW_LIMIT) if name in columns} | {"ifd_status": status}
            selection = self.candidates(ranked, budget, ids=ids, rng=rng)
            if selection.eligible < budget:
                return selection
            selection = self.candidates(ranked, selection.eligible, ids=ids)
            reasons, eligible = selection.reasons.copy(), np.sort(selection.kept)
        else:
            reasons, eligible = status, np.flatnonzero(status == Status.OK.value)
            if not len(eligible) or (self.on_shortfall == "error" and len(eligible) < budget):
                raise ShortfallError(_too_few(budget, len(eligible), status))
        kept = eligible[round_robin(similarities[eligible], budget, ids[eligible])]
        reasons[eligible] = LESS_ALIKE
        reasons[kept] = KEPT
        missing = budget - len(kept)
        kept = np.concatenate([kept, repeats(kept, missing, rng)])
        return Selection(kept, reasons, float("nan"), len(eligible), missing)

    @staticmethod
    def _similarities(columns: Mapping[str, np.ndarray]) -> np.ndarray:
        if SIMILARITIES not in columns:
            raise UserError(f"TargetSet compares embeddings, but there is no column {SIMILARITIES!r} of {[*columns]}.")
        similarities, rows = np.asarray(columns[SIMILARITIES]), len(columns["ifd_status"])
        if similarities.ndim != 2 or len(similarities) != rows or not similarities.shape[1]:
            raise UserError(
                f"{SIMILARITIES!r} must be ({rows}, m), of each row its cosines with m targets; got "
                f"{similarities.shape}."
            )
        return similarities


def _too_few(budget: int, eligible: int, status: np.ndarray) -> str:
    others = {name: count for name, count in counted(status).items() if name != Status.OK.value}
    why = ", ".join(f"{count} {name}" for name, count in others.items())
    return (
        f"{many(budget, 'row is', 'rows are')} to be kept, but only {eligible} of {len(status)} are eligible"
        f"{f': the others are {why}' if why else ''}. Lower `keep`, or look at the prompt format."
    )


def _integers(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors times 2^26, rounded to integers, (n, d) float64, and the squares of their lengths; zeros stay zero.

    A float64 holds every integer up to 2^53. Rounding lengthens a vector by at most sqrt(d) / 2, so vectors are at most
    2^26 long, and by Cauchy and Schwarz no partial sum of a dot product, in whatever order, is above 2^52.
    """
    scale = 2.0**26 - math.sqrt(vectors.shape[1]) / 2
    units = vectors.astype(np.float64)
    largest = np.abs(units).max(axis=1, keepdims=True, initial=0)
    units /= np.where(largest > 0, largest, 1.0)  # the square of a large number would overflow
    lengths = np.sqrt((units * units).sum(axis=1, keepdims=True))
    units = np.rint(scale * units / np.where(lengths > 0, lengths, 1.0))
    return units, (units * units).sum(axis=1)
