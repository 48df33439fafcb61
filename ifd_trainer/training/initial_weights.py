"""The weights that training starts from, kept on disk: after the brief experience it starts from them anew.

    ifd_original/part-000.safetensors   trainable parameters, at most 1 GiB a file unless one alone is larger
    ifd_original/index.json             the files; written last, so that a snapshot cut off is known for what it is

Only what training changes is kept: all weights in full fine-tuning, the adapter's with LoRA. With sharded weights each
process keeps its own part, in a folder of its own.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ..data.atomic import write_atomically, write_json
from ..errors import FileAccessError, UserError

FOLDER = "ifd_original"
_INDEX = "index.json"


class Snapshot:
    """The trainable parameters of a model at one moment, in `folder`.

    >>> snapshot = Snapshot(Path("outputs/run/ifd_original"))            # doctest: +SKIP
    >>> snapshot.save(model); train(model); snapshot.restore(model)      # doctest: +SKIP
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @staticmethod
    def size(model: nn.Module) -> int:
        """Bytes that `save` writes for this model (and this process)."""
        return sum(tensor.numel() * tensor.element_size() for _, tensor in _trained(model))

    @property
    def complete(self) -> bool:
        """Whether there is one to restore."""
        return (self.folder / _INDEX).is_file()

    def save(self, model: nn.Module, part_bytes: int = 2**30) -> None:
        """Write the snapshot in place of an older one.

        Args:
            model: whose trainable parameters are kept.
            part_bytes: most bytes of a file, unless one parameter alone has more.

        Raises:
            OSError: when there is less free space than it needs.
        """
        self.remove()
        self.folder.mkdir(parents=True)
        needed, free = self.size(model), shutil.disk_usage(self.folder).free
        if needed > free:
            raise FileAccessError(
                f"The original weights take {needed / 1e9:.2f} GB in {self.folder}, but only {free / 1e9:.2f} GB are "
                "free. Make room, set another output_dir, or go without the brief experience."
            )
        index: dict[str, list[str]] = {}
        for number, part in enumerate(_parts(model, part_bytes)):
            name = f"part-{number:03d}.safetensors"
            tensors = {key: tensor.contiguous().cpu() for key, tensor in part.items()}
            try:
                write_atomically(self.folder / name, lambda path, tensors=tensors: save_file(tensors, path))
            except SafetensorError as error:  # what it raises for a disk that is full by now
                raise FileAccessError(f"The original weights cannot be written to {self.folder}: {error}") from error
            index[name] = list(part)
        write_json(self.folder / _INDEX, index)

    def restore(self, model: nn.Module) -> None:
        """Put the saved values into the model's parameters, in place.

        Raises:
            ValueError: when there is no whole snapshot, or it is of another model.
        """
        if not self.complete:
            raise UserError(
                f"The original weights are not in {self.folder}: the snapshot was deleted or cut off, so training "
                "cannot start from them. Start the run anew, without resume_from_checkpoint."
            )
        index = json.loads((self.folder / _INDEX).read_text(encoding="utf-8"))
        wanted = dict(_trained(model))
        stored = {name for names in index.values() for name in names}
        if stored != wanted.keys():
            raise UserError(
                f"The snapshot in {self.folder} is of another model: {len(stored - wanted.keys())} of its parameters "
                f"are not trained here, {len(wanted.keys() - stored)} trained ones are not in it. Start the run anew."
            )
        with torch.no_grad():
            for file, names in index.items():
                with safe_open(self.folder / file, framework="pt") as part:
                    for name in names:
                        value = part.get_tensor(name)
                        if value.shape != wanted[name].shape:
                            raise UserError(
                                f"{name} has shape {tuple(value.shape)} in {self.folder}, {tuple(wanted[name].shape)} "
                                "in the model: it was saved by another number of processes or of another model."
                            )
                        wanted[name].copy_(value)

    def remove(self) -> None:
        """Delete the snapshot, if there is one."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _trained(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The values that training changes: a process's own part of a sharded parameter."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name, parameter.detach().to_local() if hasattr(parameter, "to_local") else parameter.detach()


def _parts(model: nn.Module, most: int) -> Iterator[dict[str, torch.Tensor]]:
    """Parameters in groups of at most so many bytes; a larger one is a group of its own."""
    part: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in _trained(model):
        more = tensor.numel() * tensor.element_size()
        if part and size + more > most:
            yield part
            part, size = {}, 0
        part[name] = tensor
        size += more
    if part:
        yield part
