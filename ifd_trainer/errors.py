"""What is raised where the mend is the user's: the command line prints such an error as one line, without a trace.

Each is also the built-in error that a caller of the library would look for. Whatever else is raised is a fault of
this program or of a library, and keeps its trace.
"""

from __future__ import annotations


class UserError(ValueError):
    """What was asked for cannot be done. The message says what was found, what is wanted, and how to mend it."""


class NotFoundError(UserError, FileNotFoundError):
    """A file, folder or name that is not there."""


class NotInstalledError(UserError, ImportError):
    """A package, or a version of one, that what was asked for needs."""


class FileAccessError(UserError, OSError):
    """A file that cannot be read or written as it is: no permission, no space, damaged."""


class HubError(UserError, ConnectionError):
    """A hub that cannot be reached, or refuses."""


class JudgeError(UserError, ConnectionError):
    """A judge's server that cannot be reached, or refuses."""


class RunError(UserError, RuntimeError):
    """A run that cannot go on through no fault of this program: processes that stall, a loader changed by others."""


def one_line(error: BaseException | str) -> str:
    """The message of an error, in which Arrow, YAML and transformers write several lines."""
    return " ".join(str(error).split())


def shown_value(value: object) -> str:
    """A value as a message shows it, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def with_kind(error: BaseException) -> str:
    """An error's class and message on one line, for a log: one of a library often says more by its class."""
    return f"{type(error).__name__}: {one_line(error)}"
