"""The `datasets.map` transform that says how alike each row is to examples of what a model is to be good at (RDS+)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets.formatting.formatting import LazyRow
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..data.format_choice import FormatOptions
from ..data.formats import PromptFormat
from ..data.table_reader import arrow_type
from ..data.target_rows import EncodedTargets, Targets
from ..errors import UserError
from ..method.columns import TARGET_COLUMNS
from ..method.reasons import Status
from ..method.target_set import TargetSet, cosines, most_like
from .losses import position_weighted_embeddings, statuses
from .transform import IFDScorer, TypedColumn, shows_progress

TARGETS_VERSION = 1  # raised when the same weights, rows and targets would give other similarities
_MADE = ("encoded", "_embedded")  # attributes that are made on first use


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

    def __call__(self, batch: Mapping[str, list], rank: int | None = None, *more: Any) -> dict[str, list]:
        """Columns for a batch of rows, as `datasets.map(batched=True)` passes and takes them."""
        rows = isinstance(batch, Mapping) and not isinstance(batch, LazyRow)
        if more or not rows or isinstance(rank, (list, str)) or any(isinstance(value, str) for value in batch.values()):
            raise UserError(
                "TargetScorer reads batches of whole rows as Python values: call `dataset.map(scorer, batched=True)` "
                "without input_columns and with_indices, on `dataset.with_format(None)`."
            )
        similarities, status = self.similarities(batch, rank)
        most, highest = most_like(similarities)
        ids = self.encoded.ids
        like = np.where(most >= 0, ids[most].astype(object), None)
        kind = pa.int64() if ids.dtype.kind in "iu" else arrow_type(ids.dtype)
        values = (TypedColumn(highest), TypedColumn(like, kind), TypedColumn(status))
        return dict(zip(TARGET_COLUMNS, values, strict=True))

    def similarities(self, batch: Mapping[str, list], rank: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Cosines of n rows with all m targets that can be read, (n, m) float32, and the status of each row, (n,).

        NaN where the status is not "ok".
        """
        pairs = self.scorer.encode(batch, rank)
        if self._embedded is None:
            self._embedded = self._embed(self._targets(batch).tokens)
        status = statuses(pairs)
        embeddings = self._embed([pair.conditioned.ids if pair.conditioned else [] for pair in pairs])
        similarities = cosines(embeddings, self._embedded)
        status[(status == Status.OK.value) & ~np.isfinite(similarities).all(axis=1)] = Status.NONFINITE.value
        return similarities, status

    def _targets(self, columns: Iterable[str]) -> EncodedTargets:
        """The targets as tokens; in the format of rows with these columns, unless another was named."""
        if self.encoded is None:
            usual = self.scorer.rows_format(columns) if self.targets_format is None else self.targets_format
            format = self.targets.format(usual)
            self.encoded = self.targets.encoded(format, self.scorer.encoder)
        return self.encoded

    def _embed(self, sequences: list[list[int]]) -> np.ndarray:
        hidden = not shows_progress()
        with tqdm(total=sum(map(len, sequences)), unit="tok", unit_scale=True, disable=hidden, leave=False) as bar:
            return position_weighted_embeddings(
                self.scorer.model, sequences, token_budget=self.scorer.token_budget, progress=bar.update
            )

    def __getstate__(self) -> dict[str, Any]:
        # What identifies the similarities: the scorer's options with a digest of its weights, and the targets' rows.
        return {key: value for key, value in vars(self).items() if key not in _MADE} | {"_version": TARGETS_VERSION}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, **dict.fromkeys(_MADE))

    def __repr__(self) -> str:
        return f"TargetScorer({self.scorer!r}, {self.targets.name}, {len(self.targets)} rows)"
