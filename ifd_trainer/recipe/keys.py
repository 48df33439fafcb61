"""Whether what a recipe says has the types and lies in the ranges that TRL, transformers and this package take.

TRL's parser converts texts, and lets through whatever else a YAML file holds: a list for a number, null, a fraction
for a whole number.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import types
from collections.abc import Iterable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ..errors import UserError
from ..method.calibrated_limit import CALIBRATED
from ..method.number_types import is_number
from .file import ALIASES, FILES

# Keys that TRL's parser or this program reads in another way than their type says.
_FREE = ("env", "resume_from_checkpoint")
_WANTED = {"max_ifd": f"a number or {CALIBRATED}"}  # of texts that are not any text
_LEAST: dict[str, float] = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "max_length": 1,
    "dataset_num_proc": 1,
    "save_total_limit": 1,
    "dataloader_num_workers": 0,
    "learning_rate": 0,
    "weight_decay": 0,
    "max_grad_norm": 0,
    "warmup_steps": 0,
    "seed": 0,
}
_MOST = {"seed": 2**32 - 1}


def check_keys(given: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raise ValueError for a key that there is not, with the one that may have been meant."""
    known = sorted(known)
    for key in given:
        if key not in known:
            near = [name for name in known if name.startswith(f"{key}_")][:1] if key in ALIASES else []
            near = near or difflib.get_close_matches(key, known, n=1, cutoff=0.6)
            meant = f"Did you mean {near[0]}?" if near else "ifd-trainer train --help-all lists all keys."
            raise UserError(f"{where}: there is no key {key!r}. {meant}")


def typed(given: Mapping[str, Any], classes: Iterable[type], where: str) -> dict[str, Any]:
    """The values as their fields take them: a number for a text is one.

    Raises:
        ValueError: for a value of a type that its field does not take; texts are left to the parser.
    """
    values = dict(given)
    for cls in classes:
        hints = get_type_hints(cls)
        for field in dataclasses.fields(cls):
            if field.name not in given or field.name in _FREE:
                continue
            value, hint = given[field.name], hints[field.name]
            if isinstance(value, str) or _fits(value, hint) or (value is None and field.default is None):
                kinds = _kinds(hint)
                if isinstance(value, (int, float)) and str in kinds and not {bool, int, float} & set(kinds):
                    values[field.name] = str(value)
                continue
            quotes = (
                " (in YAML, yes, no, on and off are that: put the word in quotes)" if isinstance(value, bool) else ""
            )
            shown = "null" if value is None else repr(value)
            raise UserError(
                f"{where}: {field.name} wants {_WANTED.get(field.name) or _in_words(hint)}, got {shown}{quotes}."
            )
    return values


def check_mappings(given: Mapping[str, Any], classes: Iterable[type]) -> None:
    """Raise ValueError for a text that is to be a mapping in JSON, or the name of a file with one, and is neither."""
    for cls in classes:
        for name, hint in get_type_hints(cls).items():
            text = given.get(name)
            if not isinstance(text, str) or not text.strip() or dict not in _kinds(hint):
                continue
            try:
                text = Path(text).read_text(encoding="utf-8") if name in FILES and Path(text).is_file() else text
                mapping = isinstance(json.loads(text), dict)
            except ValueError:
                mapping = False
            if not mapping:
                file = f" or the name of a {FILES[name][0]} file" if name in FILES else ""
                raise UserError(f"{name} wants a mapping{file}, such as '{{\"key\": 1}}', got {text!r}.")


def _kinds(hint: Any) -> list[Any]:
    """The types that a union is made of, without what is inside them."""
    parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return [get_origin(part) or part for part in parts]


def check_ranges(settings: Iterable[Any]) -> None:
    """Raise ValueError for a number that is none, or out of the range of its key."""
    for values in settings:
        for field in dataclasses.fields(values):
            value = getattr(values, field.name)
            least, most = _LEAST.get(field.name, -math.inf), _MOST.get(field.name, math.inf)
            number = is_number(value)
            if number and not least <= value <= most:  # false of nan too
                wanted = "a number" if least == -math.inf else f"at least {least:g}"
                wanted += f" and at most {most}" if field.name in _MOST else ""
                raise UserError(f"{field.name} must be {wanted}, got {value}.")


def _fits(value: Any, hint: Any) -> bool:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, kind) for kind in inner)
    if hint is Any:
        return True
    if hint in (type(None), None):
        return value is None
    if origin is Literal:
        return value in inner
    if (origin or hint) is list:
        items = value if isinstance(value, list) else [value]  # one stands for a list of one
        return not isinstance(value, (bool, dict)) and all(_fits(item, inner[0] if inner else Any) for item in items)
    if (origin or hint) is dict:
        return isinstance(value, dict)
    if hint is bool:
        return isinstance(value, (bool, str))
    if isinstance(value, bool):
        return False
    if hint is int:
        return isinstance(value, (int, str))
    if hint is float:
        return isinstance(value, (int, float, str))
    if hint is str:
        return isinstance(value, (str, int, float))
    if isinstance(hint, type) and issubclass(hint, Enum):
        return isinstance(value, str)
    if dataclasses.is_dataclass(hint):
        return isinstance(value, (dict, str))  # a text is its first field
    return isinstance(hint, type) and isinstance(value, hint)


def _in_words(hint: Any) -> str:
    """What values of a type are called in a recipe."""
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_in_words(kind) for kind in get_args(hint)))
    if get_origin(hint) is Literal:
        return " or ".join(map(str, get_args(hint)))
    if (get_origin(hint) or hint) is list:
        return "a list"
    if isinstance(hint, type) and issubclass(hint, Enum):
        return " or ".join(str(member.value) for member in hint)
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", dict: "a mapping"}
    return names.get(get_origin(hint) or hint, "null" if hint is type(None) else "another value")
