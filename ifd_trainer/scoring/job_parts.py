"""The parts of a scoring job on disk: each saved as soon as it is scored, told intact or damaged, joined at the end.

A folder beside the output holds them, with the job that they belong to: parts of another job, or another version of the
same one, are not mixed with them. A lock keeps two jobs from writing to one output.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import platform
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from io import BufferedWriter, FileIO
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import Dataset

from ..data.arrow_files import file_digest
from ..data.atomic import is_temporary, write_atomically, write_json, writing
from ..data.table_reader import Lists, arrow_array
from ..errors import FileAccessError, RunError, UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

logger = logging.getLogger(__name__)

_JOB, _LOCK, _JOINED, _FINISHED = "ifd-job.json", "ifd-lock", "ifd-joined.arrow", "ifd-finished.json"
_CHUNK_ROWS = 10_000  # of small parts, joined at a time
_PART = re.compile(r"ifd-part-(\d{6,})\.arrow")
_DIGEST = 16  # bytes


class Parts:
    """Finished parts of a job beside its output file, so that it can be interrupted and run again.

    A part is an Arrow stream and a digest of it, of the job and of the part's number: one that is damaged, cut off, of
    another job or in the place of another part is none. Files of others in the folder are left alone.

    Args:
        output: the file that the job makes; parts are kept in `<output>.parts`, beside the file that a link leads to.
        job: what the parts depend on, by name; parts of another job are not taken over.
        main: whether this is the process of the job that writes the output. It keeps other jobs out of the folder until
            it ends, and makes the folder its own when an earlier job has finished no part there.

    Raises:
        ValueError: when the folder holds parts of another job, or such of which nothing says whose they are, and when
            another job is at work in it.
        FileAccessError: when the folder cannot be made.
    """

    def __init__(
        self, output: str | os.PathLike, job: Mapping[str, str | int | float | None], main: bool = False
    ) -> None:
        self.output = Path(output)
        self.folder = Path(f"{os.path.realpath(output) if self.output.is_symlink() else os.fspath(output)}.parts")
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        self._key = json.dumps(dict(job), sort_keys=True).encode()
        self._lock = _lock(self.folder / _LOCK, output) if main else None
        self._done: set[int] = set()
        self._joined: str | None = None
        self._warned = False
        path = self.folder / _JOB
        try:
            if main and (self.folder / _FINISHED).exists():  # an earlier job was killed while it deleted its parts
                self._delete()
            if not self._goes_on(path, job, main):
                write_json(path, dict(job))
        except BaseException:
            self.close()
            raise

    def path(self, part: int) -> Path:
        return self.folder / f"ifd-part-{part:06d}.arrow"

    def done(self, part: int, rows: int) -> bool:
        """Whether a part is there, whole, of so many rows. Each is read once."""
        if part not in self._done and self._table(part, rows) is not None:
            self._done.add(part)
        return part in self._done

    def damaged(self, count: int) -> list[int]:
        """The parts, of so many, whose file is there and was not found whole by `done`."""
        return [part for part in range(count) if part not in self._done and self.path(part).exists()]

    def save(self, part: int, columns: Mapping[str, np.ndarray | Lists | pa.Array]) -> None:
        """Write the columns of a part, numbers, texts or lists of them; NaN becomes null.

        Raises:
            FileAccessError: when it cannot be written; the message says that the job can go on.
            RunError: when the folder is not there any more.
        """
        with kept():
            self._save(part, columns)

    def join(
        self, sizes: Sequence[int], again: Callable[[int], Mapping[str, np.ndarray | Lists | pa.Array]]
    ) -> Dataset:
        """The parts one after another, on disk: valid until `remove`.

        Args:
            sizes: the number of rows of each part.
            again: gives the columns of a part whose file is not whole; it is saved, with one warning for all of them.

        Raises:
            FileAccessError: when they cannot be written.
            RunError: when the folder is not there any more.
        """
        digest, path = hashlib.blake2b(digest_size=16), self.folder / _JOINED

        def write(temporary: Path) -> None:
            with _Digested(FileIO(temporary, "w"), digest) as file:
                writer, step = None, max(_CHUNK_ROWS // max(sizes), 1)
                for first in range(0, len(sizes), step):
                    parts = range(len(sizes))[first : first + step]
                    table = pa.concat_tables([self._whole(part, sizes[part], again) for part in parts]).combine_chunks()
                    writer = writer or pa.ipc.new_stream(file, table.schema)
                    writer.write_table(table)
                writer.close()

        self.check_there()
        with kept():
            write_atomically(path, write)
        self._joined = digest.hexdigest()
        return Dataset.from_file(str(path))

    def check_joined(self) -> None:
        """Raise RunError if what `join` has written is not what it was, after it has been read for the last time."""
        path = self.folder / _JOINED
        if not path.is_file() or file_digest(path) != self._joined:
            raise RunError(
                f"{path} was changed or deleted while {self.output} was written from it, so that {self.output} may be "
                "wrong. Run the same command again: the parts are kept."
            )

    def remove(self) -> None:
        """Delete the parts, and the folder if nothing else is in it.

        One that is interrupted leaves no parts that a later job could take for its own.
        """
        with suppress(FileNotFoundError):  # deleted by someone else, which is as well
            (self.folder / _JOB).replace(self.folder / _FINISHED)
        self._delete()
        self._leave()

    def close(self) -> None:
        """Let other jobs into the folder; they go on with the parts that are there."""
        if self._lock is not None:
            if not self._numbers():
                self._delete()
            self._leave()

    def _save(self, part: int, columns: Mapping[str, np.ndarray | Lists | pa.Array]) -> None:
        table = pa.table({name: arrow_array(values) for name, values in columns.items()})
        self.check_there()
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        data = sink.getvalue().to_pybytes()
        write_atomically(self.path(part), lambda temporary: temporary.write_bytes(data + self._digest(part, data)))

    def _goes_on(self, path: Path, job: Mapping[str, str | int | float | None], main: bool) -> bool:
        """Whether the folder is this job's already. One of another job is refused; without parts it is taken over."""
        parts = self._numbers()
        if not parts and (main or not path.exists()):
            return False
        try:
            _check_job(path, job)
        except UserError:
            # The file may be damaged: a part can say too that it is of this job.
            if all(self._table(part) is None for part in parts):
                raise
            return False
        return True

    def _numbers(self) -> list[int]:
        """The numbers of the parts whose files are there, whole or not."""
        matches = (_PART.fullmatch(path.name) for path in self.folder.glob("ifd-part-*"))
        return [int(name[1]) for name in matches if name is not None]

    def check_there(self) -> None:
        """Raise RunError if the folder is not there any more."""
        if not (self.folder / _JOB).is_file():
            raise RunError(
                f"{self.folder} was deleted or moved while its job was at work. Run the same command again: it goes on "
                "with the parts that are there."
            )

    def _digest(self, part: int, data: bytes | memoryview) -> bytes:
        digest = hashlib.blake2b(self._key + f" part {part} ".encode(), digest_size=_DIGEST)
        digest.update(data)
        return digest.digest()

    def _table(self, part: int, rows: int | None = None) -> pa.Table | None:
        """The table of a part; None where its file is missing, damaged, or of another part, job or number of rows."""
        try:
            content = self.path(part).read_bytes()
        except OSError:
            return None
        data, digest = memoryview(content)[:-_DIGEST], content[-_DIGEST:]
        if digest != self._digest(part, data):
            return None
        table = pa.ipc.open_stream(pa.py_buffer(data)).read_all()
        return table if rows in (None, table.num_rows) else None

    def _whole(
        self, part: int, rows: int, again: Callable[[int], Mapping[str, np.ndarray | Lists | pa.Array]]
    ) -> pa.Table:
        table = self._table(part, rows)
        if table is None:
            self.warn([part])
            self._save(part, again(part))
            table = self._table(part, rows)
        if table is None:
            raise RunError(
                f"{self.path(part)} is not what was written there a moment ago: the disk is at fault, or another "
                "program. Write to another disk."
            )
        return table

    def warn(self, damaged: Sequence[int]) -> None:
        """Say that parts are damaged, the first time that some are."""
        if damaged and not self._warned:
            self._warned = True
            shown = ", ".join(self.path(part).name for part in damaged[:3])
            more = f" and {len(damaged) - 3} more" if len(damaged) > 3 else ""
            logger.warning("Damaged, or of another job, and so scored again: %s%s in %s.", shown, more, self.folder)

    def _delete(self) -> None:
        """Delete the files of jobs, which is all that has such names, but for the lock."""
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            if path.name in (_JOB, _JOINED) or _PART.fullmatch(path.name) or is_temporary(path):
                path.unlink(missing_ok=True)
        (self.folder / _FINISHED).unlink(missing_ok=True)  # last: until then, the others may have to be deleted

    def _leave(self) -> None:
        """Give the lock back; the folder goes if it is empty."""
        if self._lock is not None:
            if not self._numbers():
                (self.folder / _LOCK).unlink(missing_ok=True)
            os.close(self._lock)  # on network file systems an open file keeps its folder
            self._lock = None
        with suppress(OSError):  # there are files of others in it
            self.folder.rmdir()


class _Digested(BufferedWriter):
    """A file to write to, and a digest of what is written."""

    def __init__(self, file: FileIO, digest: hashlib.blake2b) -> None:
        super().__init__(file)
        self._update = digest.update

    def write(self, data: bytes) -> int:
        self._update(data)
        return super().write(data)


@contextmanager
def kept() -> Iterator[None]:
    """Errors of writing while a job's parts are kept: the message says that the same command goes on."""
    try:
        yield
    except FileAccessError as error:
        raise FileAccessError(
            f"{error} What is scored so far is kept. Mend this (make room, or allow writing there), and run the same "
            "command again to go on."
        ) from error


def _lock(path: Path, output: str | os.PathLike) -> int | None:
    """A lock that ends with this process, also when it is killed; None on systems that have no locks.

    Raises:
        ValueError: when another process has it.
        FileAccessError: when the lock's file cannot be opened, or is a symbolic link, to whatever file of others.
    """
    if fcntl is None:
        return None
    while True:
        with writing(path):
            # Never closed by the garbage collector, which ends the lock.
            if path.is_symlink():
                raise FileAccessError(f"{path} is a symbolic link, which no lock of a job is. Delete it.")
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(file, 1000, 0).decode(errors="replace")
            os.close(file)
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                path.unlink(missing_ok=True)
                return None
            raise UserError(
                f"Another job is making {os.fspath(output)} ({holder}). Wait until it is done, end it, or write to "
                "another file."
            ) from error
        if path.exists() and os.path.samestat(path.stat(), os.fstat(file)):
            break
        os.close(file)  # the job before deleted it in between
    os.truncate(file, 0)
    os.write(file, f"process {os.getpid()} on {platform.node()}".encode())
    return file


def _check_job(path: Path, job: Mapping[str, str | int | float | None]) -> None:
    """Raise ValueError if the parts beside this file are not known to be of the job."""
    folder, remedy = path.parent, "Delete the folder to start anew, or write to another file."
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
        differs = [key for key in {**job, **there} if there.get(key) != job.get(key)]
    except FileNotFoundError as error:
        raise UserError(f"{folder} holds parts, but no {path.name} to say of which job. {remedy}") from error
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}), so the parts may be of another job. {remedy}") from error
    if differs:
        values = ((key, *("not set" if of.get(key) is None else of[key] for of in (there, job))) for key in differs)
        changes = "; ".join(f"{key}: {before} there, {now} now" for key, before, now in values)
        raise UserError(f"{folder} holds parts of another job: {changes}. {remedy}")
