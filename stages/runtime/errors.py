"""Errors for users: one line that names the file, the row or key, and the remedy."""

import errno
import os
import sys
import unicodedata
from typing import NoReturn

DISK_FULL = "no space left on the device"
FREE_SPACE = "free some space, then re-run to resume"
REMEDIES = {
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "check its permissions and how the disk is mounted"),
    **dict.fromkeys((errno.EIO, errno.ESTALE), "check the disk"),
    **dict.fromkeys((errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG), "check the path"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "raise the limit on open files (`ulimit -n`)"),
}
"""The errors of the operating system, besides a full disk, that the user can fix -> how."""
OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "Cannot allocate memory",
)
"""What messages of libraries with their own exceptions say if the host's memory does not suffice."""
NOT_PRINTED = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode categories of characters that a terminal may obey, that break lines, or that UTF-8 cannot encode."""


class StageError(Exception):
    """Bad input, reported in one line that names the file, the row or key, and the remedy."""

    def __init__(self, message: str) -> None:
        super().__init__(escape_controls(" ".join(message.splitlines())))  # quoted text may contain line breaks


def escape_controls(text: str) -> str:
    """Replace characters of NOT_PRINTED by their escapes: the colours and titles that a terminal takes from third-party text,
    for example, or a lone surrogate."""
    if text.isprintable():
        return text
    return "".join(
        char.encode("unicode_escape").decode() if unicodedata.category(char) in NOT_PRINTED else char for char in text
    )


def quote(value: object) -> str:
    """Format a value for a message: its repr, at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def one_line(text: object) -> str:
    """Collapse third-party text, such as a library's error message, to one printable line of at most 300 characters."""
    return escape_controls(" ".join(str(text).split()))[:300]


def describe(error: Exception) -> str:
    """Describe an exception in one line: its type and message."""
    return f"{type(error).__name__}: {one_line(error)}"


def user_message(error: Exception) -> str | None:
    """Return the line to print for an error that the user can fix, or None for a bug.

    The user can fix a StageError, a full disk, too little memory, and what REMEDIES lists.
    """
    if isinstance(error, StageError):
        return str(error)
    if isinstance(error, MemoryError) or any(text in str(error) for text in OUT_OF_MEMORY):
        remedy = "end other programs or lower this stage's sizes in params.yaml (batches, shards, lengths)"
        return f"not enough memory on this machine ({one_line(error) or 'MemoryError'}): {remedy}, then re-run to resume"
    if is_disk_full(error):
        return f"{DISK_FULL} ({one_line(error)}): {FREE_SPACE}"
    if isinstance(error, OSError) and error.errno in REMEDIES:
        where = f"{one_line(error.filename)}: " if error.filename else ""
        return f"{where}{error.strerror}: {REMEDIES[error.errno]}, then re-run"
    return None


def is_disk_full(error: Exception) -> bool:
    """Return whether an error, raised by Python or by a library with its own exceptions, reports a full disk or quota."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return full or "No space left on device" in str(error)


def message_or_raise(error: Exception) -> str:
    """Return the line to print for an error that the user can fix; re-raise any other, and with SPPO_DEBUG set every error, to
    show its traceback."""
    line = user_message(error)
    if os.environ.get("SPPO_DEBUG") or not line:
        raise error
    return line


def exit_with(error: Exception, prefix: str = "") -> NoReturn:
    """Exit with code 1 and one line on stderr for an error that the user can fix; re-raise what `message_or_raise` does."""
    print(f"{prefix}error: {message_or_raise(error)}", file=sys.stderr)
    sys.exit(1)
