"""From the scores of a conversation's answers to one score for the row, on numpy arrays.

For answers k of N_k tokens, with losses cas_k and das_k (of those that could be scored):

    tokens   cas = sum_k N_k cas_k / sum_k N_k, das likewise, IFD = cas / das: the loss that is trained on
    mean     mean_k of each score
    min, max the answer with the lowest or the highest IFD, all columns being its own; of equal ones the first
    last     the last answer, whether or not it could be scored
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ..errors import UserError
from .choices import TURN_RULES
from .columns import LAST_COLUMNS
from .equations import FROM_LOSSES
from .reasons import Status


def check_turns(rule: str | None, none: bool = True) -> None:
    """Raise a UserError for what is no rule; None, where it is one, stands for the last answer alone."""
    if rule not in TURN_RULES and not (none and rule is None):
        last = ", or None to score the last answer of a row alone" if none else ""
        raise UserError(f"turns must be one of {', '.join(TURN_RULES)}{last}, got {rule!r}.")


def row_scores(
    turns: Mapping[str, np.ndarray], counts: Sequence[int], rule: str, empty: Sequence[str]
) -> dict[str, np.ndarray]:
    """Scores of n rows from those of their answers.

    Args:
        turns: columns of all answers, (sum of counts,), one row's behind another's: `cas`, `das`, `ifd`, `ifd_ppl`,
            `eot_loss`, `answer_tokens`, `ifd_status`.
        counts: (n,) answers of each row.
        rule: how they become one; see above.
        empty: (n,) the status of a row without an answer.

    Returns:
        The same columns, (n,). A row has a score if any of its answers has one, else the status of its last answer;
        `answer_tokens` counts those of the answers that the score is of, and `eot_loss` is that of the last answer.

    >>> columns = {"cas": np.array([1.0, 2.0]), "das": np.array([2.0, 2.5]), "answer_tokens": np.array([1, 3])}
    >>> columns |= {"ifd": np.array([0.5, 0.8]), "ifd_ppl": np.exp([-1.0, -0.5]), "eot_loss": np.array([0.1, 0.2])}
    >>> columns["ifd_status"] = np.array(["ok", "ok"], dtype=object)
    >>> {name: values.tolist() for name, values in row_scores(columns, [2], "tokens", ["ok"]).items()}["cas"]
    [1.75]
    """
    counts = np.asarray(counts, dtype=np.int64)
    rows, row = len(counts), np.repeat(np.arange(len(counts)), counts)
    ends, some = np.cumsum(counts), counts > 0
    last = ends[some] - 1
    ok = turns["ifd_status"] == Status.OK.value
    status = np.array(empty, dtype=object)
    status[some] = turns["ifd_status"][last]
    if rule != "last":
        status[np.unique(row[ok])] = Status.OK.value
    scored = status == Status.OK.value
    tokens = turns["answer_tokens"]
    found = {name: np.full(rows, np.nan) for name in ("cas", "das", *FROM_LOSSES, "eot_loss")}
    found["answer_tokens"] = np.zeros(rows, dtype=np.int64)
    found["eot_loss"][some] = turns["eot_loss"][last]
    found["eot_loss"][~scored] = np.nan

    def sums(values: np.ndarray) -> np.ndarray:
        """Of the answers with a score, of each row that has one."""
        return np.bincount(row[ok], weights=values[ok], minlength=rows)[scored]

    if rule in ("tokens", "mean"):
        weights = tokens if rule == "tokens" else np.ones(len(tokens))
        for name in ("cas", "das", *FROM_LOSSES):
            found[name][scored] = sums(weights * turns[name]) / sums(weights)
        if rule == "tokens":
            found |= {name: score(found["cas"], found["das"]) for name, score in FROM_LOSSES.items()}
        found["answer_tokens"][scored] = sums(tokens)
    else:
        chosen = last
        if rule != "last":
            key = turns["ifd"] if rule == "min" else -turns["ifd"]
            order = np.lexsort((np.where(ok, key, np.inf), row))
            chosen = order[ends[some] - counts[some]]  # the first of each row's answers, in that order
        for name in ("cas", "das", *FROM_LOSSES):
            found[name][some] = turns[name][chosen]
        found["answer_tokens"][some] = tokens[chosen]
    return found | {"ifd_status": status}


def last_scores(turns: Mapping[str, np.ndarray], counts: Sequence[int]) -> dict[str, np.ndarray]:
    """The scores of the last answers of n rows, each of which has at least one, (n,) by column of `LAST_COLUMNS`.

    Args:
        turns, counts: as for `row_scores`.
    """
    last = np.cumsum(counts) - 1
    return {name: turns[name.removeprefix("last_")][last] for name in LAST_COLUMNS}
