"""Files that are written whole or not at all: a reader, or a run that is killed, never sees half a file.

A file is written under a temporary name, `.NAME-ifdtmp-PLACE-PROCESS-RANDOM.ENDING`, and renamed when it is complete. A
process that is killed leaves that file; the next one that writes into the folder deletes it.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from secrets import token_hex
from typing import Any

from ..errors import FileAccessError, UserError

STALE = 86_400.0  # seconds after which a temporary file is no longer in use, whoever wrote it
_TEMPORARY = re.compile(r"\..*-ifdtmp-(?P<place>[0-9a-f]{8})-(?P<process>\d+)-[0-9a-f]{8}(\..*)?", re.DOTALL)


def write_atomically(path: Path, write: Callable[[Path], Any], folder: Path | None = None) -> None:
    """Call `write(temporary_path)`, then put the file in the place of `path`.

    A symbolic link is followed, as `open` follows it, and stays. A new file has the mode that the umask leaves; one
    that is replaced keeps its mode, and its owner and group where the system allows that.

    Args:
        path: the file to be made or replaced; folders on its way are made.
        write: writes the file that it is given.
        folder: where the temporary file is, if that is on the same file system; by default beside `path`.

    Raises:
        FileAccessError: when the file cannot be written: no space, no permission, or no regular file in its place.
    """
    path = Path(os.path.realpath(path))
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        place = path.parent
        if folder is not None and folder.stat().st_dev == place.stat().st_dev:
            place = folder
        _clear_once(place)
        old = _replaced(path)
        temporary = place / f".{path.stem[:50]}-ifdtmp-{_place()}-{os.getpid()}-{token_hex(4)}{path.suffix}"
        # What replaces a private file is private from its first byte on.
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666 if old is None else 0o600))
        try:
            write(temporary)
            if old is not None:
                with suppress(OSError, AttributeError):  # only root may give files away, and not on every system
                    os.chown(temporary, old.st_uid, old.st_gid)
                temporary.chmod(stat.S_IMODE(old.st_mode))
            _sync(temporary)
            temporary.replace(path)
            with suppress(OSError):  # a system that cannot open folders keeps their entries in its own way
                _sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write what JSON can hold, one thing a line, as `write_atomically` writes.

    Raises:
        FileAccessError: when the file cannot be written.
        TypeError: for what JSON cannot hold; the file is as before.
    """
    text = json.dumps(value, indent=1, ensure_ascii=False)
    write_atomically(path, lambda part: part.write_text(text + "\n", encoding="utf-8"))


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the system refuses while this file or folder is written, told in a sentence with its name.

    Raises:
        FileAccessError: in the place of an error of the system that is about this path or a temporary file.
    """
    try:
        yield
    except OSError as error:
        # Without a number it is no answer of the system; with another name it is about a file that is read.
        if isinstance(error, UserError) or error.errno is None or not _about(path, error.filename):
            raise
        raise FileAccessError(f"Cannot write {path}: {os.strerror(error.errno)}.") from error


def is_temporary(path: Path) -> bool:
    """Whether a file has the name of one that `write_atomically` has begun."""
    return _TEMPORARY.fullmatch(path.name) is not None


def clear_stale(folder: Path) -> None:
    """Delete what killed processes have left: temporary files of processes that are gone, or older than a day."""
    with suppress(OSError):  # files come and go, and some are not ours to delete
        for path in folder.iterdir():
            with suppress(OSError):
                if (name := _TEMPORARY.fullmatch(path.name)) and (
                    time.time() - path.stat().st_mtime > STALE
                    or (name["place"] == _place() and not _alive(int(name["process"])))
                ):
                    path.unlink()


_clear_once = cache(clear_stale)  # a folder of many files is not read for each of them


def _about(path: Path, name: str | bytes | None) -> bool:
    named = path if name is None else Path(os.fsdecode(name))
    return named in (path, *path.parents) or is_temporary(named)


def _replaced(path: Path) -> os.stat_result | None:
    """The file that is there already, if there is one."""
    try:
        old = path.stat()
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(old.st_mode):
        raise FileAccessError(f"Cannot write {path}: it is there already, and is no regular file. Name another one.")
    if not os.access(path, os.W_OK):  # the folder would allow it, but the file is not to be changed
        raise FileAccessError(f"Cannot write {path}: it is there already, and read-only. Name another one.")
    return old


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


@cache
def _place() -> str:
    """What tells machines and containers apart: in another one, the number of a process says nothing."""
    place = platform.node()
    with suppress(OSError):
        place += f" {os.readlink('/proc/self/ns/pid')}"
    return hashlib.blake2b(place.encode(), digest_size=4).hexdigest()


def _alive(process: int) -> bool:
    if os.name == "nt":  # where 0 is a signal that ends the process
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        pass
    return True
