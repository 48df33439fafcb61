"""Policies, schedules and samples as plain data: what a history and a checkpoint keep of them, and compare.

    Curriculum(keep=0.5, tiers=2)   ->   {"type": "Curriculum", "keep": 0.5, "tiers": 2, ...}

A dataclass is the name of its type and its fields; of other objects (a user's own) the attributes that are plain values
are kept, of a function its name. JSON has no infinity: it is the text "inf".
"""

from __future__ import annotations

import ast
import dataclasses
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

_PACKAGE = __name__.partition(".")[0]
_UNKNOWN = object()


def to_data(value: Any) -> Any:
    """What JSON can hold of a value.

    >>> from ifd_trainer import Anneal, Constant
    >>> to_data(Anneal(Constant(0.1), share=0.2))
    {'type': 'Anneal', 'schedule': {'type': 'Constant', 'keep': 0.1}, 'share': 0.2}
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, (list, tuple)):
        return [to_data(entry) for entry in value]
    if isinstance(value, Mapping):
        return {str(key): to_data(entry) for key, entry in value.items()}
    if dataclasses.is_dataclass(value):
        return {"type": _name(type(value))} | {
            field.name: to_data(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
    if isinstance(value, partial):
        return {"type": "partial", **{name: to_data(getattr(value, name)) for name in ("func", "args", "keywords")}}
    if isinstance(value, type) or not hasattr(value, "__dict__") or hasattr(value, "__qualname__"):
        return {"type": _name(value if hasattr(value, "__qualname__") else type(value))}
    plain = {key: entry for key, entry in vars(value).items() if _is_plain(entry)}
    return {"type": _name(type(value))} | {key: to_data(entry) for key, entry in plain.items()}


def same(data: Any, value: Any) -> bool:
    """Whether data, perhaps of an earlier release, is that of a value: fields which it does not know count as default.

    >>> from ifd_trainer import Cherry
    >>> same({"type": "Cherry", "score": "ifd"}, Cherry()), same({"type": "Cherry", "max_ifd": 2.0}, Cherry())
    (True, False)
    """
    now = to_data(value)
    if not (isinstance(data, Mapping) and dataclasses.is_dataclass(value)):
        return data == now
    defaults = {field.name: to_data(field.default) for field in dataclasses.fields(value) if _has_default(field)}
    kind = str(data.get("type")).rpartition(".")[2]  # the module may have another name: __main__, in a script
    return kind == now["type"].rpartition(".")[2] and all(
        name in now and same(data.get(name, defaults.get(name, _UNKNOWN)), getattr(value, name))
        for name in {*data, *now} - {"type"}
    )


def as_text(data: Any) -> str:
    """The data as one would write it in Python.

    >>> as_text({"type": "Cherry", "max_ifd": "inf", "score": "ifd"})
    "Cherry(max_ifd=inf, score='ifd')"
    """
    if isinstance(data, Mapping) and "type" in data:
        return f"{data['type']}({', '.join(f'{name}={as_text(data[name])}' for name in data if name != 'type')})"
    if isinstance(data, list):
        return f"({', '.join(map(as_text, data))}{',' if len(data) == 1 else ''})"
    return data if data in ("inf", "-inf", "nan") else repr(data)


def from_repr(text: str) -> Any:
    """The data of a dataclass from its repr, which is what files of earlier releases hold; other texts unchanged.

    >>> from_repr("Anneal(schedule=PerEpoch(keep=(1.0, 5)), share=0.2)")["schedule"]
    {'type': 'PerEpoch', 'keep': [1.0, 5]}
    """
    try:
        return _of_node(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, TypeError):
        return text


def without_reprs(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of an earlier release, which held the repr of these, as those of today."""
    old = {name: from_repr(settings[name]) for name in ("policy", "schedule", "warmup") if name in settings}
    return {**settings, **{name: value for name, value in old.items() if isinstance(settings[name], str)}}


def _of_node(node: ast.expr) -> Any:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return {"type": node.func.id} | {keyword.arg: _of_node(keyword.value) for keyword in node.keywords}
    if isinstance(node, ast.Tuple):
        return [_of_node(entry) for entry in node.elts]
    return "inf" if isinstance(node, ast.Name) and node.id == "inf" else ast.literal_eval(node)


def _is_plain(value: Any) -> bool:
    """Whether a value says all that it is; a model or a data set does not."""
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.values()))
    scalar = value is None or isinstance(value, (bool, int, float, str, np.generic))
    return scalar or (dataclasses.is_dataclass(value) and not isinstance(value, type))


def _name(of: Any) -> str:
    """The name of a class or a function; with its module where it is not of this package."""
    module = getattr(of, "__module__", None) or ""
    return of.__qualname__ if module.partition(".")[0] == _PACKAGE else f"{module}.{of.__qualname__}"


def _has_default(field: dataclasses.Field) -> bool:
    return field.default is not dataclasses.MISSING
