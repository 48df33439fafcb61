"""What tells a model from others: a digest that models share whose forwards compute the same.

A loaded model's forward depends on more than its weights: on the config, on the settings of its modules (which
adapters are active, how they are scaled, whether they are merged or switched off), on buffers that are not saved, on
hooks, and on code that is of no installed package. All of it is in the digest. What a forward, a load or training
leaves in a module without changing what it computes is not: caches, train or eval mode, where the model came from.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import sys
import sysconfig
import types
from collections.abc import Collection, Iterator, Mapping
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from ..data.arrow_files import blocks as blocks  # a name of this module too
from .model_parts import text_config
from .rope_limits import remembers_lengths

_WEIGHT_FILES = (".safetensors", ".bin", ".gguf", ".json", ".jinja", ".model", ".txt", ".py")
# What a config says about a model's origin and use, not about its numbers; of an adapter's config too.
_NOT_IN_DIGEST = ("_name_or_path", "architectures", "dtype", "transformers_version", "use_cache")
_NOT_OF_ADAPTERS = (
    *("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping", "task_type"),
    *("target_modules", "init_lora_weights"),  # the one is seen in the modules, the other in the weights
)
# Attributes of modules that tell no forward apart, but how a model was loaded, saved or trained.
_BOOKKEEPING = (
    *vars(nn.Module()),
    *("name_or_path", "generation_config", "warnings_issued", "hf_device_map"),
    *("all_tied_weights_keys", "_is_hf_initialized", "loss_type", "model_tags", "add_model_tags"),
    *("targeted_module_names", "targeted_parameter_names", "special_peft_forward_args", "peft_type", "kwargs"),
)
_PASSING = ("cache", "_state", "gradient_checkpointing")
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
# Tables of positions grow when a longer row comes along: what they begin with is what they are.
_TABLE_ROWS = 16
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype)
_INSTALLED = ("site-packages", "dist-packages")


def weights_digest(model: nn.Module) -> str:
    """A digest of what a loaded model computes: weights and buffers bit for bit, config, settings, code of its own.

    Equal in all processes, before and after a forward, in train and in eval mode, and whatever the order in which
    adapters were added.
    """
    digest = hashlib.blake2b(digest_size=16)
    texts = _StableText()
    for name, module in sorted(model.named_modules()):
        digest.update(f"\n{name} {texts.of_module(module)}".encode())
    if hasattr(model, "config"):
        digest.update(texts.of(model.config).encode())
    state = model.state_dict()
    for name in sorted(state):
        _update(digest, name, state[name])
    # Buffers that are not saved, but for caches and for what is made anew from the lengths of rows.
    grows = remembers_lengths(text_config(model))
    for name, buffer in sorted((name, buffer) for name, buffer in model.named_buffers() if name not in state):
        own = name.rpartition(".")[2]
        if "cache" not in own and not (grows and "inv_freq" in own):
            _update(digest, name, buffer[:_TABLE_ROWS] if buffer.dim() else buffer)
    return digest.hexdigest()


def checkpoint_digest(name: str, revision: str | None = None, trust_remote_code: bool = False) -> str:
    """A digest of a checkpoint's files (local path), or the commit that a hub name stands for.

    With `trust_remote_code` also of code that it takes from other repositories.
    """
    if os.path.isdir(name):
        folder = Path(name)
        files = [path for path in sorted(folder.iterdir()) if path.suffix in _WEIGHT_FILES and path.is_file()]
        digests = [_files_digest(tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in files))]
        config = folder / "config.json"
    else:
        # The cache has a folder for each commit. The config itself does not tell it, and may need remote code.
        config = Path(cached_file(name, "config.json", revision=revision))
        digests = [f"{name}@{config.parent.name}"]
    for repo, file in sorted(_code_elsewhere(config).items() if trust_remote_code else ()):
        local = os.path.isdir(repo)
        digests.append(checkpoint_digest(repo) if local else f"{repo}@{Path(cached_file(repo, file)).parent.name}")
    return "+".join(digests)


def _code_elsewhere(config: Path) -> dict[str, str]:
    """Other repositories that a checkpoint takes code from, and a file of each."""
    values = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    classes = (values.get("auto_map") or {}).values()
    references = [name for value in classes for name in ([value] if isinstance(value, str) else value) if name]
    parts = [reference.split("--", 1) for reference in references if "--" in reference]
    return {repo: f"{path.split('.')[0]}.py" for repo, path in parts}


@cache  # `map` asks for it once for its cache, and once more for each worker
def _files_digest(stamps: tuple[tuple[Path, int, int], ...]) -> str:
    """A digest of files, which are taken for unchanged where size and time are."""
    digest = hashlib.blake2b(digest_size=16)
    for path, _, _ in stamps:
        digest.update(path.name.encode())
        for block in blocks(path):
            digest.update(block)
    return digest.hexdigest()


def _update(digest: Any, name: str, tensor: Any) -> None:
    if not isinstance(tensor, torch.Tensor):  # what a module saves beside its tensors
        digest.update(f"{name}{_StableText().of(tensor)}".encode())
        return
    digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
    digest.update(memoryview(_bytes(tensor)))


def _bytes(tensor: torch.Tensor) -> Any:
    return tensor.detach().contiguous().flatten().view(torch.uint8).cpu().numpy()


class _StableText:
    """Texts that tell values, modules and code apart, the same in every process; code is told once."""

    def __init__(self) -> None:
        self._seen: set[int] = set()

    def of_module(self, module: nn.Module) -> str:
        """Its class, and its settings: plain values, what hooks it has, functions that stand in for its own."""
        bookkeeping = isinstance(module, PreTrainedModel)
        settings = {
            name: [value] if name.endswith("active_adapter") and isinstance(value, str) else value
            for name, value in vars(module).items()
            if name not in _BOOKKEEPING
            and not any(part in name for part in _PASSING)
            and not (bookkeeping and name.startswith("_"))
            and not isinstance(value, (nn.Module, PretrainedConfig))
        }
        # Those of libraries place weights and gradients.
        hooks = [hook for name in _HOOKS for hook in vars(module)[name].values() if _own(_made_in(hook))]
        return f"{self._of_code(type(module))}{self.of(settings)}{self.of(hooks)}"

    def of(self, value: Any) -> str:
        """A value that settings hold; of an object that is none of the known kinds, its class."""
        if isinstance(value, Enum):
            return self.of(value.value)  # saved and loaded it is that
        if isinstance(value, _PLAIN):
            return repr(value)
        if isinstance(value, Mapping):
            return "{" + ",".join(sorted(f"{self.of(key)}:{self.of(item)}" for key, item in value.items())) + "}"
        if isinstance(value, (set, frozenset)):
            return "{" + ",".join(sorted(map(self.of, value))) + "}"
        if isinstance(value, (list, tuple)):
            return "[" + ",".join(map(self.of, value)) + "]"
        if isinstance(value, torch.Tensor):
            return f"{value.dtype}{tuple(value.shape)}{hashlib.blake2b(_bytes(value), digest_size=16).hexdigest()}"
        if isinstance(value, functools.partial):
            return f"partial({self.of(value.func)},{self.of(value.args)},{self.of(value.keywords)})"
        if isinstance(value, types.MethodType):
            return f"method({self.of(value.__func__)},{self.of(value.__self__)})"
        if isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType)):
            return self._of_code(value)
        if isinstance(value, PretrainedConfig):
            settings = _without(value.to_dict(), _NOT_IN_DIGEST)
            return self.of(settings | {"attention": getattr(value, "_attn_implementation", None)})
        if hasattr(value, "peft_type") and hasattr(value, "to_dict"):
            return self.of(_without(value.to_dict(), _NOT_OF_ADAPTERS))
        kind = self._of_code(type(value))
        if isinstance(value, nn.Module) or not _own(type(value).__module__) or self._known(value):
            return kind
        return f"{kind}{self.of(getattr(value, '__dict__', None))}"

    def _of_code(self, thing: type | types.FunctionType | types.BuiltinFunctionType) -> str:
        """The name of a class or function, and its code if that is of no installed package."""
        if isinstance(thing, types.BuiltinFunctionType) or not _own(thing.__module__):
            return f"{thing.__module__}.{thing.__qualname__}"
        if self._known(thing):
            return thing.__qualname__
        return self._of_class(thing) if isinstance(thing, type) else self._of_function(thing)

    def _of_class(self, kind: type) -> str:
        parts = []
        for base in kind.__mro__:
            if not _own(base.__module__):
                parts.append(f"{base.__module__}.{base.__qualname__}")
                continue
            parts.append(base.__qualname__)
            for name, value in sorted(vars(base).items()):
                code = getattr(value, "__func__", value)  # of class and static methods
                if isinstance(code, property):
                    parts.append(f"{name}={[self.of(one) for one in (code.fget, code.fset) if one is not None]}")
                elif isinstance(code, types.FunctionType) or not name.startswith("__"):
                    parts.append(f"{name}={self.of(code)}")
        return "class " + ";".join(parts)

    def _of_function(self, function: types.FunctionType) -> str:
        """The code of a function, and of those that it calls by a name of its module."""
        cells = [cell.cell_contents for cell in function.__closure__ or () if _filled(cell)]
        held = [cells, function.__defaults__, function.__kwdefaults__]
        named = [
            f"{name}={self.of(value)}" for name, value in _globals(function) if not isinstance(value, types.ModuleType)
        ]
        return f"{function.__qualname__}({_code(function.__code__)}{self.of(held)}{named})"

    def _known(self, thing: Any) -> bool:
        known = id(thing) in self._seen
        self._seen.add(id(thing))
        return known


def _without(value: Any, names: Collection[str]) -> Any:
    """A dictionary, and those in it, without these keys."""
    if not isinstance(value, dict):
        return value
    return {key: _without(item, names) for key, item in value.items() if key not in names}


def _globals(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """What a function's code may mean by its names: globals, and what is in those of them that are own modules."""
    names = sorted(_names(function.__code__))
    for name in names:
        if name not in function.__globals__:
            continue
        value = function.__globals__[name]
        yield name, value
        if isinstance(value, types.ModuleType) and _own(value.__name__):
            yield from ((f"{name}.{inner}", vars(value)[inner]) for inner in names if inner in vars(value))


def _names(code: types.CodeType) -> set[str]:
    inner = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return set(code.co_names).union(*map(_names, inner))


def _code(code: types.CodeType) -> str:
    """What code does, without where it stands."""
    constants = [_code(one) if isinstance(one, types.CodeType) else _StableText().of(one) for one in code.co_consts]
    return f"{code.co_code.hex()}{code.co_names}{code.co_varnames}{code.co_freevars}{constants}"


def _filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:  # a function that is not made yet
        return False


def _made_in(hook: Any) -> str | None:
    """The module that a callable's code is in."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    code = getattr(hook, "__func__", hook)
    return code.__module__ if isinstance(code, types.FunctionType) else type(code).__module__


def _own(module: str | None) -> bool:
    """Whether a module is of no installed package, such as a script, a notebook or a checkpoint's own code."""
    if module is None or module.split(".")[0] in sys.builtin_module_names:
        return False
    loaded = sys.modules.get(module)
    file = getattr(loaded, "__file__", None)
    if file is None:
        return getattr(getattr(loaded, "__spec__", None), "origin", None) not in ("built-in", "frozen")
    installed = any(part in _INSTALLED for part in Path(file).parts)
    return not installed and not file.startswith(sysconfig.get_path("stdlib"))
