"""What judges have said, by a key of all that it depends on, so that nothing is asked and paid for twice.

A file of JSON lines that only grows: `{"key": ..., "record": ...}`, one for each answer, written and synced to the disk
when it comes. A process that is killed loses what was on its way. A line that was torn, or damaged later, is no JSON
and is left aside, and what comes after it begins a line of its own. Of two lines with one key the later one counts.
Threads, and processes on one machine, may write into the same file.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import Any

from ..data.atomic import writing
from ..errors import FileAccessError, one_line


class Cache:
    """Records by their keys, in memory and in a file.

    Args:
        path: the file; it need not be there.

    Attributes:
        damaged: lines that could not be read.

    Raises:
        FileAccessError: for a file that cannot be read, and later for one that cannot be written.

    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> Cache(Path(folder.name) / "said.jsonl").put("k", {"text": "8 7"})
    >>> Cache(Path(folder.name) / "said.jsonl").get("k")
    {'text': '8 7'}
    >>> folder.cleanup()
    """

    def __init__(self, path: Path) -> None:
        self.path, self.damaged = path, 0
        self._records: dict[str, dict[str, Any]] = {}
        self._lock = Lock()
        try:
            lines = path.read_bytes().split(b"\n") if path.exists() else []
        except OSError as error:
            raise FileAccessError(f"{path} cannot be read: {one_line(error)}.") from error
        for line in filter(None, lines):
            entry = _entry(line)
            if entry is None:
                self.damaged += 1
            else:
                self._records[entry[0]] = entry[1]

    def __len__(self) -> int:
        return len(self._records)

    def get(self, key: str) -> dict[str, Any] | None:
        """The record of a key; None without one."""
        return self._records.get(key)

    def put(self, key: str, record: Mapping[str, Any]) -> None:
        """Keep a record."""
        line = json.dumps({"key": key, "record": dict(record)}).encode() + b"\n"
        with self._lock, writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab+", buffering=0) as file:
                end = file.seek(0, os.SEEK_END)
                if end and (file.seek(end - 1), file.read(1))[1] != b"\n":
                    line = b"\n" + line  # after one that was torn
                while line:  # a disk that fills up takes a part, and refuses the rest
                    line = line[file.write(line) :]
                os.fsync(file.fileno())
            self._records[key] = dict(record)


def content_key(*parts: Any) -> str:
    """A digest of values that JSON can hold; the same in every process, other for any other values.

    >>> content_key("m", "ab", "c") == content_key("m", "a", "bc")
    False
    """
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _entry(line: bytes) -> tuple[str, dict[str, Any]] | None:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not (isinstance(entry, dict) and isinstance(entry.get("key"), str) and isinstance(entry.get("record"), dict)):
        return None
    return entry["key"], entry["record"]
