"""What is measured of each arm: the losses of held-out rows in any case, and what a recipe asks for beside them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..data.format_choice import FormatOptions
from ..errors import UserError

MAIN = "held-out rows"  # the recipe's own set, whose losses the verdict is about
_OF_SET = ("path", "split", "config", *(option.name for option in dataclasses.fields(FormatOptions)))


@dataclass(frozen=True)
class Measures:
    """What is measured beside the losses of the recipe's held-out rows.

    Attributes:
        held_out_sets: further sets of held-out rows by name: where each is, and, if they are not the recipe's, its
            split, configuration and format.
        category_column: of held-out rows, whose values get a table of losses each.
        group_column: of held-out rows; rows of one group are taken to be alike, and intervals are clustered by them.

    Raises:
        UserError: for values of other types, and for a set without a path or with a key that there is not.

    >>> Measures(held_out_sets={"code": "code.jsonl"}).held_out_sets
    {'code': {'path': 'code.jsonl'}}
    """

    held_out_sets: Mapping[str, Any] = field(default_factory=dict)
    category_column: str | None = None
    group_column: str | None = None

    def __post_init__(self) -> None:
        sets = self.held_out_sets or {}
        if not isinstance(sets, Mapping):
            raise UserError(
                f"held_out_sets wants a mapping from names to files, such as code: code.jsonl, got {sets!r}."
            )
        object.__setattr__(
            self, "held_out_sets", {str(name): _source(str(name), given) for name, given in sets.items()}
        )
        for name in ("category_column", "group_column"):
            if not (getattr(self, name) is None or isinstance(getattr(self, name), str)):
                raise UserError(f"{name} wants the name of a column, got {getattr(self, name)!r}.")


def read_measures(settings: Mapping[str, Any]) -> Measures:
    """What the keys of a recipe ask for; keys that are not of measures are passed over."""
    names = {value.name for value in dataclasses.fields(Measures)}
    return Measures(**{key: value for key, value in settings.items() if key in names and value is not None})


def _source(name: str, given: Any) -> dict[str, Any]:
    """Where a set is, as a mapping."""
    source = {"path": given} if isinstance(given, str) else given
    if name == MAIN:
        raise UserError(f"held_out_sets: {MAIN!r} are the rows of eval_dataset. Give this set another name.")
    if not isinstance(source, Mapping) or not isinstance(source.get("path"), str):
        raise UserError(f"held_out_sets: {name} wants a file or a name, or a mapping with its path, got {given!r}.")
    if unknown := [key for key in source if key not in _OF_SET]:
        raise UserError(f"held_out_sets: {name}: there is no key {unknown[0]!r}. Known are {', '.join(_OF_SET)}.")
    return dict(source)
