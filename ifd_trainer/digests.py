"""What tells a model's weights from others: a digest that equal weights share."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
from transformers.utils import cached_file

_WEIGHT_FILES = (".safetensors", ".bin", ".gguf", ".json", ".jinja", ".model", ".txt")
# What a config says about a model's origin and use, not about its numbers.
_NOT_IN_DIGEST = ("_name_or_path", "architectures", "dtype", "transformers_version", "use_cache")


def weights_digest(model: torch.nn.Module) -> str:
    """A digest of all parameters and buffers, in their order, bit for bit, and of the model's config."""
    digest = hashlib.blake2b(digest_size=16)
    if hasattr(model, "config"):
        config = {key: value for key, value in model.config.to_dict().items() if key not in _NOT_IN_DIGEST}
        digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        data = tensor.detach().contiguous().flatten().view(torch.uint8).cpu().numpy()
        digest.update(memoryview(data))
    return digest.hexdigest()


def checkpoint_digest(name: str, revision: str | None = None) -> str:
    """A digest of a checkpoint's files (local path), or the commit that a hub name stands for."""
    if not os.path.isdir(name):
        # The cache has a folder for each commit. The config itself does not tell it, and may need remote code.
        return f"{name}@{Path(cached_file(name, 'config.json', revision=revision)).parent.name}"
    files = [path for path in sorted(Path(name).iterdir()) if path.suffix in _WEIGHT_FILES and path.is_file()]
    return _files_digest(tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in files))


@cache  # `map` asks for it once for its cache, and once more for each worker
def _files_digest(stamps: tuple[tuple[Path, int, int], ...]) -> str:
    """A digest of files, which are taken for unchanged where size and time are."""
    digest = hashlib.blake2b(digest_size=16)
    for path, _, _ in stamps:
        digest.update(path.name.encode())
        for block in blocks(path):
            digest.update(block)
    return digest.hexdigest()


def blocks(path: Path) -> Iterator[bytes]:
    """A file's bytes, 16 MiB at a time."""
    with path.open("rb") as file:
        while block := file.read(2**24):
            yield block
