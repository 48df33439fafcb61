"""The `datasets.map` transform that says how alike each row is to examples of what a model is to be good at (RDS+)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..data.encoding import EncodedPair
from ..data.format_choice import FormatOptions
from ..data.formats import PromptFormat
from ..data.table_reader import arrow_type
from ..data.target_rows import EncodedTargets, Targets
from ..method.columns import TARGET_COLUMNS
from ..method.reasons import Status
from ..method.target_set import TargetSet, cosines, most_like
from .losses import position_weighted_embeddings, statuses
from .transform import IFDScorer, mapped_columns, need_batch, shows_progress, table_with

TARGETS_VERSION = 1  # raised when the same weights, rows and targets would give other similarities
_MADE = ("encoded", "_embedded")  # attributes that are made on first use


@dataclass(frozen=True)
class RowsToEmbed:
    """Rows as tokens.

    Attributes:
        pairs: the rows, encoded; a row without a conditioned segment is not embedded.
    """

    pairs: list[EncodedPair]

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def ids(self) -> list[list[int]]:
        """The tokens of each row, none of one that is not embedded."""
        return [pair.conditioned.ids if pair.conditioned else [] for pair in self.pairs]

    @property
    def tokens(self) -> list[int]:
        """How many these are."""
        return [len(ids) for ids in self.ids]


class TargetScorer:
    """Attach how alike rows are to a target set: `ds.map(TargetScorer(model, "my_task.jsonl"), batched=True)`.

    A row, prompt and answer of T tokens with the last hidden states h_t, is the vector x; so is a target, which may
    have no answer: then its prompt alone (RDS+, arXiv 2503.01807).

        x = sum_t t * h_t / sum_t t        similarity = max over targets y of <x, y> / (|x| |y|)

    Columns: `target_similarity` (float64, from -1 to 1), `target_row` (the `row_id` or `id` of the target most like
    the row, the first of equals, else its position in the target set) and `target_status`: "ok", or why the other two
    are null. What is embedded is what `IFDScorer` scores: without the end-of-turn tokens, cut at max_length.

    To keep the rows with the highest similarity to any target is not yet RDS+, where targets take turns: see
    `TargetSet`.

    Args:
        model: a hub name, a local path, or a loaded causal LM.
        targets: a file, a hub name, a data set or a list of rows.
        tokenizer: as for `IFDScorer`.
        format: of the rows, as for `IFDScorer`.
        targets_format: of the targets; by default that of the rows, and where they lack its columns, told from those.
        max_length: most tokens of a row or a target; by default the model's window.
        device, dtype, token_budget, revision, trust_remote_code: as for `IFDScorer`.

    Attributes:
        encoded: the targets as tokens, once rows have told in which format they are read.

    Raises:
        FileNotFoundError, UserError: for targets that are not there, have no rows, or of which none can be read; and as
            `IFDScorer` does.

    >>> ds = ds.map(TargetScorer("HuggingFaceTB/SmolLM2-135M", "my_task.jsonl"), batched=True)   # doctest: +SKIP
    >>> ds = ds.sort("target_similarity", reverse=True).select(range(1000))                      # doctest: +SKIP
    """

    def __init__(
        self,
        model: str | os.PathLike | PreTrainedModel,
        targets: str | os.PathLike | Iterable[Mapping[str, Any]],
        tokenizer: Any = None,
        *,
        format: str | PromptFormat | FormatOptions | None = None,
        targets_format: str | PromptFormat | FormatOptions | None = None,
        max_length: int | None = None,
        device: str | None = None,
        dtype: torch.dtype | str | None = None,
        token_budget: int | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self.scorer = IFDScorer(
            model,
            tokenizer,
            format=format,
            max_length=max_length,
            score_truncated=True,
            device=device,
            dtype=dtype,
            token_budget=token_budget,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
        self.targets = Targets.read(TargetSet(targets).targets)
        self.targets_format = targets_format
        self.encoded: EncodedTargets | None = None
        self._embedded: np.ndarray | None = None

    def __call__(
        self, batch: Mapping[str, list] | pa.Table, rank: int | None = None, *more: Any
    ) -> dict[str, list] | pa.Table:
        """Columns for a batch of rows, as `datasets.map(batched=True)` passes and takes them.

        An Arrow table, as Ray passes it with `batch_format="pyarrow"`, comes back whole, with the columns at its end.
        """
        if isinstance(batch, pa.Table):
            return table_with(batch, self._columns(batch.to_pydict(), rank), TARGET_COLUMNS)
        need_batch("TargetScorer", batch, rank, *more)
        return mapped_columns(self._columns(batch, rank))

    def _columns(self, batch: Mapping[str, list], rank: int | None) -> dict[str, np.ndarray | pa.Array]:
        similarities, status = self.similarities(batch, rank)
        most, highest = most_like(similarities)
        ids = self.encoded.ids
        like = np.where(most >= 0, ids[most].astype(object), None)
        kind = pa.int64() if ids.dtype.kind in "iu" else arrow_type(ids.dtype)
        return dict(zip(TARGET_COLUMNS, (highest, pa.array(like, kind), status), strict=True))

    def similarities(self, batch: Mapping[str, list], rank: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Cosines of n rows with all m targets that can be read, (n, m) float32, and the status of each row, (n,).

        NaN where the status is not "ok".
        """
        rows = self.encode_rows(batch, rank)
        hidden = not shows_progress()
        with tqdm(total=sum(rows.tokens), unit="tok", unit_scale=True, disable=hidden, leave=False) as bar:
            return self.similarities_of(rows, bar.update)

    def encode_rows(self, batch: Mapping[str, list], rank: int | None = None) -> RowsToEmbed:
        """What is embedded of a batch of rows; loads the model on first use."""
        self.read_targets(batch)
        return RowsToEmbed(self.scorer.encode(batch, rank))

    def similarities_of(
        self, rows: RowsToEmbed, progress: Callable[[int], Any] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """`similarities` of rows that are encoded; `progress` gets the number of tokens done after each batch."""
        status = statuses(rows.pairs)
        if not len(rows):
            return np.empty((0, len(self.encoded)), dtype=np.float32), status
        if self._embedded is None:
            self._embedded = self._embed(self.encoded.tokens)
        similarities = cosines(self._embed(rows.ids, progress), self._embedded)
        status[(status == Status.OK.value) & ~np.isfinite(similarities).all(axis=1)] = Status.NONFINITE.value
        return similarities, status

    def read_targets(self, columns: Iterable[str]) -> EncodedTargets:
        """The targets as tokens; in the format of rows with these columns, unless another was named."""
        if self.encoded is None:
            usual = self.scorer.rows_format(columns) if self.targets_format is None else self.targets_format
            format = self.targets.format(usual)
            self.encoded = self.targets.encoded(format, self.scorer.encoder)
        return self.encoded

    def _embed(self, sequences: Sequence[list[int]], progress: Callable[[int], Any] | None = None) -> np.ndarray:
        options = {"token_budget": self.scorer.token_budget, "progress": progress}
        return position_weighted_embeddings(self.scorer.model, sequences, **options)

    def __getstate__(self) -> dict[str, Any]:
        # What identifies the similarities: the scorer's options with a digest of its weights, and the targets' rows.
        return {key: value for key, value in vars(self).items() if key not in _MADE} | {"_version": TARGETS_VERSION}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, **dict.fromkeys(_MADE))

    def __repr__(self) -> str:
        return f"TargetScorer({self.scorer!r}, {self.targets.name}, {len(self.targets)} rows)"
