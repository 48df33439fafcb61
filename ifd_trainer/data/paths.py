"""What a command is given by path, looked at before anything slow is imported: a wrong path is told at once."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from ..errors import FileAccessError, NotFoundError, UserError
from .model_kinds import WANTED, kind_of_class

KINDS = (".json", ".jsonl", ".csv", ".parquet")  # of files of rows
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".xz": "xz"}  # by the ending
ENDINGS = f"{', '.join(KINDS)} (all but .parquet also with {', '.join(COMPRESSIONS)})"
_A_MODEL = "A model is a folder with config.json, weights and tokenizer, or a hub name."


def model_name(name: str | os.PathLike) -> str:
    """A hub name as it is; a folder by its real path, so that all spellings of it are one.

    Raises:
        FileNotFoundError: for a path, which no hub name could be, without a folder.
    """
    name = os.fspath(name)
    if os.path.isdir(name):
        return os.path.realpath(name)
    if name.lower().endswith(".gguf"):
        raise NotFoundError(f"{name!r} is the name of a GGUF file. {_A_MODEL} {_UNPACK_GGUF}")
    if os.path.isfile(name):
        raise NotFoundError(f"No such folder: {name!r} is a file. {_A_MODEL}")
    if not name.strip() or name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name:
        raise NotFoundError(f"No such folder: {name!r}. {_A_MODEL}")
    return name


_UNPACK_GGUF = (
    "transformers neither trains nor scores with a GGUF file as it is: load it with "
    "AutoModelForCausalLM.from_pretrained(folder, gguf_file=...), and copy its weights into a model that is saved "
    "with save_pretrained, as recipes/demo_model.py does."
)


def check_model(name: str | os.PathLike) -> str:
    """`model_name`; raises ValueError for a folder that holds no causal language model."""
    name = model_name(name)
    folder = Path(name)
    if not folder.is_dir():
        return name
    config = folder / "config.json"
    if not config.is_file():
        if (folder / "adapter_config.json").is_file():
            raise UserError(
                f"{name} holds an adapter and no model. Merge it first (`model.merge_and_unload()`, then "
                "`save_pretrained`), or, in Python, pass the loaded PeftModel."
            )
        if any(path.suffix.lower() == ".gguf" for path in folder.iterdir()):
            raise UserError(f"{name} holds a GGUF file and no config.json. {_UNPACK_GGUF}")
        raise NotFoundError(f"{name} holds no config.json. {_A_MODEL}")
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FileAccessError(f"{config} cannot be read ({error}). Download or copy the model again.") from error
    if not isinstance(values, dict):
        raise FileAccessError(f"{config} holds no mapping. Download or copy the model again.")
    for architecture in values.get("architectures") or ():
        if kind := kind_of_class(str(architecture), bool(values.get("is_encoder_decoder"))):
            raise UserError(f"{name} ({architecture}) {kind}. {WANTED}")
    return name


def is_path(source: str) -> bool:
    """Whether this text names something on disk, there or not, and no data set on a hub."""
    named = data_ending(Path(source)) in KINDS or source.startswith((".", "/", "~")) or source.count("/") > 1
    return named or not source.strip() or Path(source).exists()


def check_rows(source: str) -> None:
    """Raise ValueError unless this is a file or folder of rows, or may be the name of a data set on a hub."""
    path = Path(source)
    if source.strip() and (not is_path(source) or path.is_dir()):
        return
    if not source.strip() or not path.exists():
        raise NotFoundError(f"No such file: {source!r}. Files end in {ENDINGS}; other names are hub names.")
    ending = data_ending(path)
    if ending not in KINDS:
        raise UserError(f"Cannot tell the format of {path} from its ending; use one of {ENDINGS}.")
    if ending == ".parquet" and path.suffix.lower() != ".parquet":
        raise UserError(f"{path} cannot be read in passing. Decompress it, and pass the .parquet file.")
    check_readable(path)
    if not path.stat().st_size:
        raise UserError(f"{path} is empty: it has no bytes. Write or download it again.")


def data_ending(path: Path) -> str:
    """What kind of file a name stands for: its ending in small letters, without that of a compression.

    >>> data_ending(Path("rows.jsonl.GZ"))
    '.jsonl'
    """
    return (Path(path.stem) if path.suffix.lower() in COMPRESSIONS else path).suffix.lower()


def check_readable(path: Path) -> None:
    """Raise ValueError for a file that cannot be opened."""
    try:
        path.open("rb").close()
    except OSError as error:
        raise FileAccessError(f"{path} cannot be read: {error.strerror}.") from error


def ending_of(path: Path) -> str:
    """The ending of a file to write rows to, in small letters.

    Raises:
        ValueError: for another ending.
    """
    ending = path.suffix.lower()
    if ending not in KINDS:
        raise UserError(f"Cannot tell the format of {path} from its ending; use one of {', '.join(KINDS)}.")
    return ending


def check_writable(path: str | os.PathLike) -> None:
    """Raise ValueError now if rows could not be written to this path after hours of work."""
    path = Path(path)
    ending = ending_of(path)
    if path.is_dir():
        raise UserError(f"Cannot write to {path}: it is a folder. Name a file, such as {path / f'scored{ending}'}.")
    if path.exists() and not path.is_file():
        raise UserError(f"Cannot write to {path}: it is there already, and is no regular file. Name another one.")
    if path.exists() and not os.access(path, os.W_OK):
        raise UserError(f"Cannot write to {path}: it is there already, and read-only. Name another file.")
    _check_place(path)


def check_folder(path: str | os.PathLike) -> None:
    """Raise ValueError now if this is no folder to write to, and none could be made."""
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise UserError(f"Cannot write to {path}: it is a file, and a folder is wanted. Name another one.")
    _check_place(path / "file")


def _check_place(path: Path) -> None:
    """Raise ValueError if the folder of this path cannot be written to, or made."""
    parent = path.resolve().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise UserError(f"Cannot write to {path}: {parent} is a file, not a folder. Write to another folder.")
    try:
        tempfile.TemporaryFile(dir=parent).close()  # os.access knows neither of quotas nor of a mount that is read-only
    except OSError as error:
        raise FileAccessError(
            f"Cannot write to {path}: the folder {parent} is not writable ({error.strerror}). Write to another one."
        ) from error


def check_checkpoint(given: str | bool | None, output: str) -> str | None:
    """The checkpoint to resume from, or None; `true` stands for the last one in the output folder.

    Raises:
        FileNotFoundError: when it is not there.
    """
    text = str(given).strip().lower()
    if given is None or text in ("", "false", "none", "null"):
        return None
    there = _checkpoints(output)
    held = f"{output} holds {', '.join(path.name for path in there)}" if there else f"{output} holds no checkpoint"
    if text == "true":
        if not there:
            raise NotFoundError(
                f"resume_from_checkpoint is true, but {held}. Leave it out to start training, or name a checkpoint "
                "(checkpoints are written if save_strategy is not no)."
            )
        return str(there[-1])
    if not Path(str(given)).is_dir():
        raise NotFoundError(
            f"No such checkpoint: {given!r} is no folder. {held}. Name one, write true for the last one of the output "
            "folder, or leave resume_from_checkpoint out to start anew."
        )
    return str(given)


def _checkpoints(output: str) -> list[Path]:
    """Checkpoints in an output folder, the last one last."""
    folders = [path for path in Path(output).glob("checkpoint-*") if path.is_dir()]
    numbers = ((path.name.removeprefix("checkpoint-"), path) for path in folders)
    return [path for _, path in sorted((int(number), path) for number, path in numbers if number.isdecimal())]


def folder_name(name: str) -> str:
    """A name of anything as one of a folder or a file.

    >>> folder_name("guarded, near/far")
    'guarded,_near_far'
    """
    return name.replace("/", "_").replace(" ", "_")
