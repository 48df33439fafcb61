"""Compare and replace: the transform that takes of each row the version that is worth more to the model.

Which version that is, and where the rule comes from, is in `method.reflection`. Rewritten texts stand in columns beside
those that they would replace: one for each column of the format, or some of them. A version is a row like any other,
and is scored as one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..data.encoding import EncodedPair
from ..data.format_choice import FormatOptions, columns_read
from ..data.formats import Example, PromptCompletionFormat, PromptFormat, TemplateFormat
from ..errors import UserError
from ..method.columns import IFD_COLUMNS, REFLECTED_COLUMNS
from ..method.further_scores import further_names
from ..method.reasons import Status
from ..method.reflection import (
    ANSWER,
    INSTRUCTION,
    KEPT_ORIGINAL,
    NO_RIFD,
    NOT_REWRITTEN,
    ORIGINAL,
    REWRITTEN_ANSWER,
    REWRITTEN_INSTRUCTION,
    choose_rewritten,
)
from .transform import IFDScorer, mapped_columns, need_batch, shows_progress

REFLECTION_VERSION = 1  # raised when the same weights and options would give other choices
BESIDE = "rewritten_"  # begins the name of a column of rewritten texts
RIFD = further_names("rifd")  # the scores that a version has beside IFD


@dataclass(frozen=True)
class EncodedVersions:
    """The versions of n rows, ready to be scored.

    Attributes:
        pairs: of each version, by its name; (n,) each, None where a row has no such version.
    """

    pairs: Mapping[str, list[EncodedPair | None]]

    def __len__(self) -> int:
        return len(self.pairs[ORIGINAL])

    @property
    def tokens(self) -> list[int]:
        """Tokens that are read at most to score the versions of each row."""
        versions = zip(*self.pairs.values(), strict=True)
        return [sum(pair.tokens for pair in pairs if pair is not None) for pairs in versions]


class ReflectionScorer:
    """Take a rewritten instruction or answer where it is worth more to the model: `ds.map(scorer, batched=True)`.

    Of a row with the instruction x and the answer y, and its rewritten texts x' and y' (the row's own, where there are
    none), these versions are scored, and one of them is taken (see `choose_rewritten`):

        instruction   (x', y')    where x' is another one: taken where its IFD is the higher one
        answer        (x, y')     where y' is another one, and (x', y') is not taken: taken where its r-IFD is the lower
        original      (x, y)      else

    IFD and r-IFD of what is taken are below the limit. A rewritten instruction is judged with the answer that came with
    it, as in the paper (arXiv 2402.10110): an old answer to a new instruction has a high IFD because it does not belong
    there. The paper's teacher then writes a better answer to the instruction that was chosen: a second pass, over
    these rows and those answers. Of a chat the last answer is scored, and a version is taken whole, (x, y') only where
    x' is x.

    The texts that are taken replace the row's; the rewritten ones stay where they are. Columns are added for the
    version that is taken, those of an `IFDScorer` with `rifd`, `rcas` and `rdas`, and beside them `original_ifd`,
    `original_rifd`, `instruction_ifd`, `instruction_rifd`, `answer_ifd`, `answer_rifd` (null for a version that a row
    does not have or that was not asked for) and `reflect_reason`: `rewritten_instruction`, `rewritten_answer`,
    `kept_original`, `not_rewritten`, or, where the original stays since a version cannot be scored, that version's
    status or `no_rifd`.

    Args:
        model: a hub name, a local path, a loaded causal LM, or an `IFDScorer` with `scores="rifd"`: then the arguments
            for it are refused.
        tokenizer, format, max_length, score_truncated, guess, device, dtype, token_budget, revision,
            trust_remote_code: as of `IFDScorer`.
        rewritten: the column of the rewritten texts for each column of the format; by default those of the same names
            behind "rewritten_", which are there. A null says that a text was not rewritten.
        limit: see `choose_rewritten`.

    Raises:
        UserError: for rows without a column of rewritten texts, and what `IFDScorer` raises.

    >>> ds = ds.map(ReflectionScorer("HuggingFaceTB/SmolLM2-135M"), batched=True)               # doctest: +SKIP
    >>> ds["reflect_reason"]                                                                    # doctest: +SKIP
    ['kept_original', 'rewritten_instruction', 'rewritten_answer', ...]
    """

    def __init__(
        self,
        model: str | os.PathLike | PreTrainedModel | IFDScorer,
        tokenizer: Any = None,
        *,
        rewritten: Mapping[str, str] | None = None,
        limit: float = 1.0,
        format: str | PromptFormat | FormatOptions | None = None,
        max_length: int | None = None,
        score_truncated: bool = False,
        guess: str | None = None,
        device: str | None = None,
        dtype: torch.dtype | str | None = None,
        token_budget: int | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        choose_rewritten({ORIGINAL: ([], [])}, limit)  # refuses what is no limit
        self.rewritten, self.limit = None if rewritten is None else dict(rewritten), float(limit)
        options = {"format": format, "max_length": max_length, "score_truncated": score_truncated, "guess": guess}
        options |= {"device": device, "dtype": dtype, "token_budget": token_budget, "revision": revision}
        options |= {"trust_remote_code": trust_remote_code}
        if isinstance(model, IFDScorer):
            given = [name for name, value in {"tokenizer": tokenizer, **options}.items() if value not in (None, False)]
            if given:
                raise UserError(f"An IFDScorer was given, which has its own {', '.join(given)}: leave out what it has.")
            if "rifd" not in model.scores or model.turns is not None:
                raise UserError("A ReflectionScorer needs an IFDScorer with scores='rifd', and without turns.")
            self.scorer = model
        else:
            self.scorer = IFDScorer(model, tokenizer, scores="rifd", **options)

    def __call__(self, batch: Mapping[str, list], rank: int | None = None, *more: Any) -> dict[str, list]:
        """Columns for a batch of rows, as `datasets.map(batched=True)` passes and takes them."""
        need_batch("ReflectionScorer", batch, rank, *more)
        rows = self.encode_rows(batch, rank)
        total, hidden = sum(rows.tokens), not shows_progress()
        with tqdm(total=total, desc="Comparing", unit="tok", unit_scale=True, disable=hidden, leave=False) as bar:
            columns = self.score_rows(rows, bar.update)
        texts = self.taken_texts(batch, columns["reflect_reason"])
        return self.scorer.outdated(batch) | texts | mapped_columns(columns)

    def columns(self, present: Iterable[str]) -> dict[str, str]:
        """The column of the rewritten texts for each column of the format that has one.

        Raises:
            UserError: where there is none.
        """
        present = list(present)
        read = columns_read(self._format(present), self._own(present))
        if self.rewritten is None:
            found = {name: BESIDE + name for name in read if BESIDE + name in present}
            if not found:
                raise UserError(
                    f"No column holds rewritten texts: looked for {', '.join(BESIDE + name for name in read)} among "
                    f"{sorted(present)}. Rename columns, or say which they are with rewritten={{'instruction': ...}}."
                )
            return found
        for name, column in self.rewritten.items():
            if name not in read or column not in present:
                what, where = (name, read) if name not in read else (column, sorted(present))
                raise UserError(f"rewritten: there is no column {what!r} to read; the columns are {where}.")
        if not self.rewritten:
            raise UserError("rewritten names no column.")
        return self.rewritten

    def check(self, batch: Mapping[str, list]) -> None:
        """Raise now what comparing such rows would raise once the weights are loaded; see `IFDScorer.check`."""
        self.columns(batch)
        self._answer_column(batch)
        self.scorer.check({name: batch[name] for name in self._own(batch)})

    def encode_rows(self, batch: Mapping[str, list], rank: int | None = None) -> EncodedVersions:
        """The versions of a batch's rows as tokens; loads the model on first use."""
        columns = self.columns(batch)
        answer = self._answer_column(batch)
        own = {name: batch[name] for name in self._own(batch)}
        texts = {name: _replaced(batch[name], batch[column]) for name, column in columns.items()}
        whole = own | texts
        before, after = self.scorer.examples(own), self.scorer.examples(whole)
        asked = np.array([_differ(one, other, "prompt") for one, other in zip(before, after, strict=True)], dtype=bool)
        said = np.array([_differ(one, other, "answer") for one, other in zip(before, after, strict=True)], dtype=bool)
        pairs: dict[str, list[EncodedPair | None]] = {ORIGINAL: self.scorer.encode(own, rank)}
        pairs[INSTRUCTION] = self._encoded(whole, asked)
        if answer in texts:
            pairs[ANSWER] = self._encoded(own | {answer: texts[answer]}, said)
        else:  # of chats the whole, where what is asked is the same
            pairs[ANSWER] = self._encoded(whole, said & ~asked)
        return EncodedVersions(pairs)

    def score_rows(self, rows: EncodedVersions, progress: Callable[[int], Any] | None = None) -> dict[str, np.ndarray]:
        """Columns of encoded rows, without their texts; `progress` gets the number of tokens done after each batch."""
        found: dict[str, dict[str, np.ndarray]] = {}
        places = {name: np.flatnonzero([pair is not None for pair in pairs]) for name, pairs in rows.pairs.items()}
        for name in (ORIGINAL, INSTRUCTION):
            found[name] = self._scored(rows.pairs[name], places[name], progress)
        taken = self._chosen(found)
        places[ANSWER] = places[ANSWER][taken[places[ANSWER]] == ORIGINAL]
        found[ANSWER] = self._scored(rows.pairs[ANSWER], places[ANSWER], progress)
        taken = self._chosen(found)
        scores = {f"{name}_{score}": of[score] for name, of in found.items() for score in ("ifd", "rifd")}
        reasons = np.full(len(rows), NOT_REWRITTEN, dtype=object)
        for name in (ANSWER, INSTRUCTION):
            reasons[places[name]] = KEPT_ORIGINAL
        for name in (ANSWER, INSTRUCTION, ORIGINAL):  # the first version that has no score says why
            status = np.where(np.isnan(found[name]["rifd"]), NO_RIFD, Status.OK.value).astype(object)
            status = np.where(found[name]["ifd_status"] == Status.OK.value, status, found[name]["ifd_status"])
            unscored = (status != Status.OK.value) & (reasons != NOT_REWRITTEN)
            unscored &= np.isin(np.arange(len(rows)), places[name])
            reasons[unscored] = status[unscored]
        reasons[taken == INSTRUCTION], reasons[taken == ANSWER] = REWRITTEN_INSTRUCTION, REWRITTEN_ANSWER
        of_taken = {name: values.copy() for name, values in found[ORIGINAL].items()}
        for version in (INSTRUCTION, ANSWER):
            for name, values in of_taken.items():
                values[taken == version] = found[version][name][taken == version]
        return of_taken | scores | {REFLECTED_COLUMNS[-1]: reasons}

    def taken_texts(self, batch: Mapping[str, list], reasons: Sequence[str]) -> dict[str, list]:
        """The texts of the versions that are taken, by the columns whose texts may be replaced."""
        columns, answer = self.columns(batch), self._answer_column(batch)
        found = {}
        for name, column in columns.items():
            reading = (REWRITTEN_INSTRUCTION, REWRITTEN_ANSWER) if answer in (name, None) else (REWRITTEN_INSTRUCTION,)
            texts = _replaced(batch[name], batch[column])
            found[name] = [
                new if reason in reading else old for old, new, reason in zip(batch[name], texts, reasons, strict=True)
            ]
        return found

    def settings(self, columns: Iterable[str]) -> dict[str, Any]:
        """The options that a choice depends on, for rows with these columns."""
        columns = list(columns)
        rewritten = " ".join(f"{name}={column}" for name, column in self.columns(columns).items())
        own = {"rewritten": rewritten, "limit": self.limit, "reflection_version": REFLECTION_VERSION}
        return self.scorer.settings(self._own(columns)) | own

    def _own(self, present: Iterable[str]) -> list[str]:
        """The columns of a data set without those of rewritten texts."""
        present = list(present)
        beside = {BESIDE + name for name in present} if self.rewritten is None else {*self.rewritten.values()}
        return [name for name in present if name not in beside]

    def _format(self, columns: Iterable[str]) -> PromptFormat:
        return self.scorer.rows_format(self._own(columns))

    def _answer_column(self, columns: Iterable[str]) -> str | None:
        """The column that holds the answer alone; None of chats.

        Raises:
            UserError: for rows whose answer stands with their input in one column.
        """
        format = self._format(columns)
        if isinstance(format, PromptCompletionFormat):
            return format.completion
        if isinstance(format, TemplateFormat):
            if format.instances is not None:
                raise UserError(
                    f"The rows hold input and answer together in the column {format.instances!r}: write them to "
                    "columns of their own first."
                )
            return format.output
        return None

    def _encoded(self, columns: Mapping[str, list], which: np.ndarray) -> list[EncodedPair | None]:
        places = np.flatnonzero(which).tolist()
        pairs: list[EncodedPair | None] = [None] * len(which)
        if places:
            some = {name: [values[place] for place in places] for name, values in columns.items()}
            for place, pair in zip(places, self.scorer.encode(some), strict=True):
                pairs[place] = pair
        return pairs

    def _scored(
        self, pairs: Sequence[EncodedPair | None], places: np.ndarray, progress: Callable[[int], Any] | None
    ) -> dict[str, np.ndarray]:
        """Scores of a version, (n,) by column; NaN, 0 tokens and no status where a row has none."""
        found = {name: np.full(len(pairs), np.nan) for name in (*IFD_COLUMNS, *RIFD)}
        found["answer_tokens"] = np.zeros(len(pairs), dtype=np.int64)
        found["ifd_status"] = np.full(len(pairs), None, dtype=object)
        if len(places):
            scores = self.scorer.score([pairs[place] for place in places], progress).columns()
            for name in found:
                found[name][places] = scores[name]
        return found

    def _chosen(self, found: Mapping[str, Mapping[str, np.ndarray]]) -> np.ndarray:
        return choose_rewritten({name: (of["ifd"], of["rifd"]) for name, of in found.items()}, self.limit)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_version": REFLECTION_VERSION}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update({name: value for name, value in state.items() if name != "_version"})

    def __repr__(self) -> str:
        return f"ReflectionScorer({self.scorer!r}, rewritten={self.rewritten!r}, limit={self.limit!r})"


def _replaced(own: Sequence[Any], rewritten: Sequence[Any]) -> list[Any]:
    """The rewritten texts, and the row's own where there are none."""
    return [old if new is None else new for old, new in zip(own, rewritten, strict=True)]


def _differ(one: Example | None, other: Example | None, part: str) -> bool:
    """Whether two versions of a row differ in a part: a prompt but for white space, an answer but for that at its ends.

    One that cannot be read differs from one that can, in its prompt.
    """
    if one is None or other is None:
        return part == "prompt" and one is not other
    if part == "prompt":  # where a template writes white space of its own around what is asked
        return "".join(one.prompt.split()) != "".join(other.prompt.split())
    return one.answer.strip() != other.answer.strip()
