"""What commands say on standard error, and errors as one line that says how to mend them."""

from __future__ import annotations

import errno
import sys
from collections.abc import Sequence

from ..errors import UserError, one_line


def say(text: str) -> None:
    """Say something that is no result."""
    print(f"ifd-trainer: {text}", file=sys.stderr)


def told(error: Exception, arguments: Sequence[str]) -> str | None:
    """The line for an error that a user can mend; None for a fault of the program."""
    if isinstance(error, UserError):
        return " ".join(str(error).splitlines())
    if _out_of_memory(error):
        return (str(error).splitlines() or ["out of memory"])[0]
    file = getattr(error, "filename", None) or "a file"
    code = error.errno if isinstance(error, OSError) else None
    if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or "No space left on device" in str(error):
        more = "add --resume_from_checkpoint true to go on" if arguments[:1] == ["train"] else "then go on"
        room = f"Make room; the same command will {more} ({one_line(error)})."
        return f"{file} cannot be written: no space is left. {room}"
    if code in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{file} cannot be read or written: {error.strerror}. Change its permissions, or name another place."
    return None


def _out_of_memory(error: Exception) -> bool:
    torch = sys.modules.get("torch")  # what was not imported has raised nothing
    kinds = (MemoryError,) if torch is None else (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or "DefaultCPUAllocator: can't allocate memory" in str(error)
