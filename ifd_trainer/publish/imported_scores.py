"""Scores that other programs wrote, as the columns of this one: nobody has to score twice to move over.

Known files, told apart by what they hold:

- `cherry`: what Cherry_LLM's analysis saves with `torch.save`, a list with `{"ppl": [0, direct, conditioned],
  "token_loss": [[], direct, conditioned]}` for each row; or rows with `ifd_score`. A perplexity there is exp of the
  mean loss of the answer's tokens, so cas and das are its logarithm; `token_loss` holds the losses of all tokens of
  the text, prompt included, and says how many of the last ones are the answer's.
- `superfiltering`: JSON lines with `{"ppl": [0, direct, 0, conditioned], "loss": [...]}`, `{}` for an empty answer and
  (0, 0) where its program swallowed an exception; or rows with `ppl_A_direct` and `ppl_A_condition`.
- `data-juicer`: rows with `__dj__stats__`, or its file of such stats alone, with `ifd_score` in them.
- `ifd-trainer`: rows that `ifd-trainer score` wrote.

Scores and rows are matched by position. Programs differ in what precedes a direct answer: see `data.encoding`.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..data.definitions import SCORE_KINDS
from ..data.files import ENDINGS, READERS, data_ending, load_rows, read_records
from ..errors import NotFoundError, UserError
from ..method.columns import IFD_COLUMNS, SCORES
from ..method.equations import FROM_LOSSES
from ..method.number_words import many
from ..method.reasons import FAILED, Status

STATS = "__dj__stats__"
_SAME_LOSS = 1e-5  # relative difference of a mean loss and the logarithm of its perplexity, both in float32
# Keys that tell who wrote a file; the first that are all there count.
_TOLD_BY = (
    *(("ifd-trainer", {"ifd_status"}), ("data-juicer", {STATS}), ("cherry", {"token_loss"}), ("cherry", {"sent_emb"})),
    *(("superfiltering", {"ppl", "loss"}), ("superfiltering", {"ppl_A_direct", "ppl_A_condition"})),
    ("cherry", {"ifd_score"}),
)


@dataclass(frozen=True)
class ImportedScores:
    """Scores of n rows that another program computed.

    Attributes:
        kind: one of `SCORE_KINDS`.
        columns: `cas`, `das` (nats per token), `ifd`, `ifd_ppl` (NaN where there is none), `answer_tokens` (null where
            the file does not tell) and `ifd_status`.
    """

    kind: str
    columns: pd.DataFrame


@dataclass(frozen=True)
class _Row:
    """What a file says about one row: the two mean losses, or a ratio, or why there is neither."""

    cas: float = math.nan
    das: float = math.nan
    ifd: float = math.nan
    tokens: int | None = None
    status: str = Status.OK.value


def read_scores(
    path: str | Path, rows: int, *, kind: str | None = None, answers: Sequence[str] | None = None
) -> ImportedScores:
    """Read a file of scores for `rows` rows, matched by position.

    Args:
        path: a `.pt` file of Cherry_LLM, or rows or scores as .json, .jsonl, .csv or .parquet.
        rows: number of rows that the scores are for.
        kind: one of `SCORE_KINDS`; told from the content by default.
        answers: the rows' answers; a row without a score and with an empty answer gets the status `empty_answer`.

    Raises:
        ValueError: for a file of no known kind, of another kind than `kind`, or with scores for another number of rows.
        FileNotFoundError: when there is no such file.
    """
    path = Path(path)
    if kind is not None and kind not in SCORE_KINDS:
        raise UserError(f"Unknown kind of scores {kind!r}; choose one of {', '.join(SCORE_KINDS)}.")
    if not path.is_file():
        raise NotFoundError(f"No such file of scores: {path}.")
    records = _load(path)
    kind = kind or _kind(records, path)
    if len(records) != rows:
        raise UserError(
            f"{path} holds scores for {many(len(records), 'row')}, the data has {rows:,}. Scores and rows are matched "
            "by position: pass the rows that were scored, all of them and in their order."
        )
    if kind == "ifd-trainer":
        return ImportedScores(kind, _own(records, path))
    read = {"cherry": _cherry, "superfiltering": _superfiltering, "data-juicer": _data_juicer}[kind]
    parsed = []
    for number, record in enumerate(records):
        try:
            parsed.append(read(record))
        except (KeyError, IndexError, TypeError, ValueError) as error:
            held = f"the keys {sorted(map(str, record))}" if isinstance(record, Mapping) else type(record).__name__
            more = error if isinstance(error, UserError) else f"Pass --scores-format, one of {', '.join(SCORE_KINDS)}."
            raise UserError(f"{path}, row {number}, is not what {kind} writes: found {held}. {more}") from error
    return ImportedScores(kind, _frame(parsed, answers))


def _frame(parsed: Sequence[_Row], answers: Sequence[str] | None) -> pd.DataFrame:
    cas, das, given = (np.array([getattr(row, name) for row in parsed], dtype=float) for name in ("cas", "das", "ifd"))
    values = {"cas": cas, "das": das} | {name: score(cas, das) for name, score in FROM_LOSSES.items()}
    values["ifd"] = np.where(np.isnan(values["ifd"]) & np.isfinite(given) & (given >= 0), given, values["ifd"])
    status = np.array([row.status for row in parsed], dtype=object)
    status[(status == Status.OK.value) & ~np.isfinite(values["ifd"])] = Status.NONFINITE.value
    if answers is not None:
        empty = np.array([answer == "" for answer in answers], dtype=bool)
        status[(status == Status.NONFINITE.value) & empty] = Status.EMPTY_ANSWER.value
    blank = status != Status.OK.value
    columns = {name: np.where(blank, np.nan, value) for name, value in values.items()}
    counts = [0 if why == Status.EMPTY_ANSWER.value else row.tokens for row, why in zip(parsed, status, strict=True)]
    return pd.DataFrame({**columns, "answer_tokens": pd.array(counts, dtype="Int64"), "ifd_status": status})


def _load(path: Path) -> list:
    ending = data_ending(path)
    if ending in (".csv", ".parquet"):
        return load_rows(str(path)).to_list()
    if ending in READERS:
        records = read_records(path)
    elif zipfile.is_zipfile(path) or ending in (".pt", ".pth", ".bin"):
        records = _load_torch(path)
    else:
        raise UserError(f"Cannot read scores from {path}; use a file ending in .pt or {ENDINGS}.")
    if not isinstance(records, list):
        raise UserError(f"{path} holds a {type(records).__name__}, wanted a list with one entry for each row.")
    return records


def _load_torch(path: Path) -> Any:
    """Tensors, numbers, lists and dicts only: a file that would run code is refused."""
    import pickle

    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{path} cannot be read as tensors, numbers, lists and dicts alone; reading the rest would run code from "
            f"the file, which is never done. Where you trust the file, load it with torch.load(..., "
            f"weights_only=False) yourself and save its ppl and token_loss as plain numbers. ({first})"
        ) from error


def _kind(records: Sequence[Any], path: Path) -> str:
    keys: set[str] = set()
    for record in records:
        keys |= set(record) if isinstance(record, Mapping) else set()
    for kind, told_by in _TOLD_BY:
        if told_by <= keys:
            return kind
    raise UserError(
        f"{path} holds no scores of a known kind, only {sorted(map(str, keys))[:12]}. Known: Cherry_LLM (ppl and "
        "token_loss in a .pt file, or rows with ifd_score), Superfiltering (ppl and loss, or rows with ppl_A_direct "
        f"and ppl_A_condition), data-juicer ({STATS} with ifd_score), and what `ifd-trainer score` writes."
    )


def _cherry(record: Mapping[str, Any]) -> _Row:
    if "sent_emb" in record:
        raise UserError("This is the file of `--mod pre`, with no score of an answer; pass that of `--mod cherry`.")
    if "ifd_score" in record:
        return _Row(ifd=_number(record["ifd_score"]))
    _, direct, conditioned = record["ppl"]
    cas, losses = _log(conditioned), record["token_loss"][2] if "token_loss" in record else []
    return _Row(cas, _log(direct), tokens=answer_length(losses, cas))


def _superfiltering(record: Mapping[str, Any]) -> _Row:
    if not record:
        return _Row(status=Status.EMPTY_ANSWER.value)
    if "ppl_A_direct" in record:
        direct, conditioned = _number(record["ppl_A_direct"]), _number(record["ppl_A_condition"])
        das, cas = _log(direct), _log(conditioned)
    else:
        (_, direct, _, conditioned), (_, das, _, cas) = record["ppl"], record["loss"]
        direct, conditioned, das, cas = map(_number, (direct, conditioned, das, cas))
    if direct == 0 or conditioned == 0:  # a perplexity is at least 1
        return _Row(status=FAILED)
    if math.isnan(das) and math.isfinite(cas):  # the direct pass does not score the first token, and there is no other
        return _Row(status=Status.TOO_SHORT.value)
    return _Row(cas, das)


def _data_juicer(record: Mapping[str, Any]) -> _Row:
    return _Row(ifd=_number(record.get(STATS, record)["ifd_score"]))


def _own(records: Sequence[Mapping[str, Any]], path: Path) -> pd.DataFrame:
    frame = pd.DataFrame(records, columns=list(IFD_COLUMNS))
    frame[[*SCORES]] = frame[[*SCORES]].apply(pd.to_numeric)
    frame["answer_tokens"] = pd.to_numeric(frame["answer_tokens"]).astype("Int64")
    if frame["ifd_status"].isna().any():
        raise UserError(f"{path} has rows without ifd_status; score it with `ifd-trainer score`.")
    return frame


def answer_length(losses: Sequence[float], mean: float) -> int | None:
    """How many of the last losses have this mean; None if no number does, or several do.

    >>> answer_length([9.0, 8.0, 1.0, 2.0, 3.0], mean=2.0)
    3
    """
    if not len(losses) or not math.isfinite(mean):
        return None
    means = np.cumsum(np.asarray(losses, dtype=float)[::-1]) / np.arange(1, len(losses) + 1)
    fits = np.flatnonzero(np.abs(means - mean) <= _SAME_LOSS * max(1.0, abs(mean)))
    return int(fits[0]) + 1 if len(fits) == 1 else None


def _number(value: Any) -> float:
    """A float of a number or of a tensor with one; NaN for None."""
    return math.nan if value is None else float(value)


def _log(perplexity: Any) -> float:
    value = _number(perplexity)
    return math.log(value) if value > 0 and math.isfinite(value) else math.nan
