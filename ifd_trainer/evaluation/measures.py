"""What is measured of each arm: the losses of held-out rows in any case, and what a recipe asks for beside them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..data.format_choice import FormatOptions
from ..errors import UserError

MAIN = "held-out rows"  # the recipe's own set, whose losses the verdict is about
# Of lm-evaluation-harness, "default" in a recipe.
CODE = "humaneval_bpb"  # defined by `harness`
DEFAULT_TASKS = ("arc_challenge", "hellaswag", "mmlu", "truthfulqa_mc2", "gsm8k", "ifeval", CODE)
_OF_PROMPTS = ("path", "split", "config", "column", "category_column")
_OF_SET = ("path", "split", "config", *(option.name for option in dataclasses.fields(FormatOptions)))


@dataclass(frozen=True)
class Measures:
    """What is measured beside the losses of the recipe's held-out rows.

    Attributes:
        held_out_sets: further sets of held-out rows by name: where each is, and, if they are not the recipe's, its
            split, configuration and format.
        category_column: of held-out rows, whose values get a table of losses each.
        group_column: of held-out rows; rows of one group are taken to be alike, and intervals are clustered by them.
        answers: how many rows of each set the trained models answer greedily; exact match and ROUGE-L against the rows'
            own answers are compared.
        max_new_tokens: of an answer.
        prompts: sets of prompts without answers, for a judge, by name: where each is, and the `column` of its texts.
        tasks: of lm-evaluation-harness, that the trained models are asked; "default" stands for `DEFAULT_TASKS`.
        task_limit: most documents of each of their tasks, or a share of them.
        task_folder: with definitions of further ones.
        confirm_run_unsafe_code: whether tasks may run the programs that a model writes.

    Raises:
        UserError: for values of other types, and for a set without a path or with a key that there is not.

    >>> Measures(held_out_sets={"code": "code.jsonl"}).held_out_sets
    {'code': {'path': 'code.jsonl'}}
    """

    held_out_sets: Mapping[str, Any] = field(default_factory=dict)
    category_column: str | None = None
    group_column: str | None = None
    answers: int = 0
    max_new_tokens: int = 256
    prompts: Mapping[str, Any] = field(default_factory=dict)
    tasks: Sequence[str] = ()
    task_limit: float | None = None
    task_folder: str | None = None
    confirm_run_unsafe_code: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "held_out_sets", _sources("held_out_sets", "code", self.held_out_sets, _OF_SET))
        if MAIN in self.held_out_sets:
            raise UserError(f"held_out_sets: {MAIN!r} are the rows of eval_dataset. Give this set another name.")
        object.__setattr__(self, "prompts", _sources("prompts", "vicuna", self.prompts, _OF_PROMPTS))
        names = _names("tasks", self.tasks)
        names = [each for name in names for each in (DEFAULT_TASKS if name == "default" else [name])]
        object.__setattr__(self, "tasks", tuple(dict.fromkeys(names)))
        for name, least in (("answers", 0), ("max_new_tokens", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise UserError(f"{name} wants a whole number of at least {least}, got {value!r}.")
        for name in ("category_column", "group_column", "task_folder"):
            if not (getattr(self, name) is None or isinstance(getattr(self, name), str)):
                raise UserError(f"{name} wants a name, got {getattr(self, name)!r}.")


def read_measures(settings: Mapping[str, Any]) -> Measures:
    """What the keys of a recipe ask for; keys that are not of measures are passed over."""
    return Measures(**{key: settings[key] for key in KEYS if settings.get(key) is not None})


def _sources(key: str, example: str, given: Any, known: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Where sets of rows are, by name, each as a mapping with its path."""
    given = given or {}
    if not isinstance(given, Mapping):
        raise UserError(
            f"{key} wants a mapping from names to files, such as {example}: {example}.jsonl, got {given!r}."
        )
    sets = {}
    for name, source in given.items():
        source = {"path": source} if isinstance(source, str) else source
        if not isinstance(source, Mapping) or not isinstance(source.get("path"), str):
            raise UserError(f"{key}: {name} wants a file or a name, or a mapping with its path, got {source!r}.")
        if unknown := [each for each in source if each not in known]:
            raise UserError(f"{key}: {name}: there is no key {unknown[0]!r}. Known are {', '.join(known)}.")
        sets[str(name)] = dict(source)
    return sets


def _names(key: str, given: Any) -> list[str]:
    """Names in a list, or in a text with blanks or commas between them."""
    names = given.replace(",", " ").split() if isinstance(given, str) else given
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{key} wants a list of names, got {given!r}.")
    return list(names)


KEYS = tuple(value.name for value in dataclasses.fields(Measures))
