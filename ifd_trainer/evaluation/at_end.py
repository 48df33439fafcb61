"""What is measured of a model once its run has ended: its answers to prompts, and tasks of lm-evaluation-harness.

Each thing is measured once: what is in the run's folder already is not measured again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from ..data.atomic import write_atomically
from ..data.chat_template import MalformedRow
from ..data.paths import folder_name
from ..recipe.file import beside
from .agreement import agreement
from .answers import answers_to, window_for
from .documents import joined, long_form
from .harness import PlannedTask, check_tasks, main_measures, run_tasks
from .held_out_sets import HeldOutSet, question_of, rows_frame
from .measured import documents_path, write_documents
from .measures import Measures

_LENGTHS = {"answer tokens": "answer_tokens", "cut off": "cut_off"}


def measure_at_end(
    model: nn.Module,
    tokenizer: Any,
    sets: Sequence[HeldOutSet],
    prompts: Sequence[HeldOutSet],
    measures: Measures,
    folder: Path,
    recipes: Path = Path(),
) -> None:
    """Measure what `measures` asks for, into the folder of the run.

    Args:
        sets: of held-out rows, whose own answers the model's are held against.
        prompts: without answers of their own, for a judge.
        recipes: the recipe's folder, beside which a folder of tasks may lie.
    """
    answered = [(each, asked_rows(len(each.rows), measures.answers), True) for each in sets if measures.answers]
    answered += [(each, range(len(each.rows)), False) for each in prompts]
    for number, (each, chosen, compared) in enumerate(answered):  # in the order that tables have
        answers = _answers(model, tokenizer, each, chosen, measures, folder)
        parts = [agreement(answers, each.name, list(answers["group"]))] if compared else []
        write_documents(folder, f"answers-{number}", joined([*parts, lengths(answers, each.name)]))
    if measures.tasks and not documents_path(folder, "tasks").exists():
        found = run_tasks(
            model,
            tokenizer,
            measures.tasks,
            limit=measures.task_limit,
            include_path=_task_folder(measures, recipes),
            confirm_run_unsafe_code=measures.confirm_run_unsafe_code,
        )
        # All measures of the tasks are kept; the usual one of each is compared.
        write_atomically(folder / "tasks.csv", lambda path: found.aggregates.to_csv(path, index=False))
        write_atomically(folder / "tasks.parquet", lambda path: found.values.to_parquet(path, index=False))
        write_documents(folder, "tasks", main_measures(found.values))


def checked(
    model: nn.Module, tokenizer: Any, sets: Sequence[HeldOutSet], measures: Measures, recipes: Path = Path()
) -> list[PlannedTask]:
    """The tasks that will be asked, once all that a run will measure is known to be possible.

    Args:
        model: may be without weights.
        sets: of held-out rows.
        recipes: as of `measure_at_end`.

    Raises:
        UserError: for a package that is not installed, rows that the tokenizer cannot write, answers as long as the
            model's window, and tasks that are not known or whose data cannot be read.
    """
    for each in sets:
        with contextlib.suppress(MalformedRow):  # others may be well
            each.format.render(each.rows[0], tokenizer)
    most = window_for(model, measures.max_new_tokens) if measures.answers or measures.prompts else None
    if measures.answers:
        agreement(pd.DataFrame(columns=["document", "reference", "answer", "status"]))
    if not measures.tasks:
        return []
    return check_tasks(
        measures.tasks,
        _task_folder(measures, recipes),
        limit=measures.task_limit,
        window=most or window_for(model, 1),
        confirm_run_unsafe_code=measures.confirm_run_unsafe_code,
    )


def lengths(answers: pd.DataFrame, name: str) -> pd.DataFrame:
    """How long answers are, in tokens, and which were cut off, as documents; neither is better or worse.

    Args:
        answers: of `answers_to`, with the `group` of each.
        name: of the set that they answer.
    """
    said = answers[answers["answer"].notna()]
    of = (list(said["document"]), {"groups": list(said["group"]), "higher": None})
    return joined(
        [long_form(name, measure, of[0], list(said[column]), **of[1]) for measure, column in _LENGTHS.items()]
    )


def _task_folder(measures: Measures, recipes: Path) -> str | None:
    return None if measures.task_folder is None else beside(measures.task_folder, recipes)


def asked_rows(rows: int, most: int) -> list[int]:
    """Which of a set's rows are answered: the same in all runs, from all over the set.

    >>> asked_rows(3, most=5)
    [0, 1, 2]
    """
    return sorted(np.random.default_rng(0).permutation(rows)[:most].tolist())


def answers_path(folder: Path, name: str) -> Path:
    """Where a run keeps its answers to the prompts of a set."""
    return folder / f"answers-{folder_name(name)}.parquet"


def _answers(
    model: nn.Module, tokenizer: Any, each: HeldOutSet, chosen: Sequence[int], measures: Measures, folder: Path
) -> pd.DataFrame:
    """The answers to some rows of a set, with `category`, `group` and `question`; `document` is the row's position."""
    path = answers_path(folder, each.name)
    if path.exists():
        return pd.read_parquet(path)
    answers = answers_to(model, tokenizer, each.rows.select(chosen), each.format, measures.max_new_tokens)
    rows = rows_frame([each]).iloc[list(chosen)].reset_index(drop=True)
    answers = answers.assign(document=[str(place) for place in chosen], category=rows["category"], group=rows["group"])
    answers["question"] = [question_of(each.rows[place], each.format) for place in chosen]
    write_atomically(path, lambda part: answers.to_parquet(part, index=False))
    return answers
