"""Small files that survive a crash or a power cut: written whole, flushed to the disk, and set aside if they cannot be read."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from stages.runtime.errors import describe
from stages.runtime.logs import log

UNREADABLE = ".unreadable"
"""Ending of the name that `set_aside` gives a file."""
NOT_SUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.EROFS)
"""What fsync fails with on file systems and devices that have nothing to flush."""

Value = TypeVar("Value")


def write(path: Path, text: str) -> None:
    """Write a text file in UTF-8. After a crash or a power cut it has either its earlier content or all of the new one.

    Creates the folder if necessary, and sets aside what is no file in its place. Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    set_aside_unless_file(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def replace(new: Path, path: Path) -> None:
    """Move a file or folder that is complete to `path`, in place of what is there: on the disk first, then under its name.

    Raises OSError, also if `path` is a folder that is not empty.
    """
    flush(new)
    new.replace(path)
    _fsync(path.parent)


def append_line(path: Path, line: str) -> None:
    """Append a line to a text file in UTF-8, on a line of its own even if a crash cut off the last one.

    Creates the folder if necessary, and sets aside what is no file in its place. Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    set_aside_unless_file(path)
    with path.open("ab+") as file:
        end = file.tell()
        file.seek(max(0, end - 1))
        cut_off = file.read(1) not in (b"", b"\n")
        file.write(b"\n" * cut_off + line.encode() + b"\n")
    flush(path)


def flush(path: Path) -> None:
    """Flush a file, or a folder with everything in it, to the disk, before it is renamed or relied on. Raises OSError."""
    for folder, _, names in os.walk(path):
        for name in names:
            if (file := Path(folder, name)).is_file() and not file.is_symlink():
                _fsync(file)
        _fsync(Path(folder))
    if not path.is_dir():
        _fsync(path)


def read_json(path: Path, check: Callable[[Any], Value]) -> Value | None:
    """Return `check(value)` for the value in a JSON file; None if there is no file, or if it had to be set aside.

    check: returns what the caller needs of the value, and raises ValueError, TypeError, KeyError or AttributeError if it is not
    as the caller wrote it. Raises OSError if the file must not be read.
    """
    set_aside_unless_file(path)
    try:
        return check(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        set_aside(path, describe(error))
        return None


def set_aside_unless_file(path: Path) -> None:
    """Set aside what is in a file's place and is none: a folder, or a pipe or device, which may block a reader for ever."""
    if path.exists() and not path.is_file():
        set_aside(path, "not a regular file")


def set_aside(path: Path, reason: str) -> None:
    """Rename a file or folder that cannot be used, in place of an earlier one, and log it: the work goes on without it."""
    aside = path.with_name(path.name + UNREADABLE)
    if aside.is_dir() and not aside.is_symlink():
        shutil.rmtree(aside)
    elif path.is_dir():
        aside.unlink(missing_ok=True)
    path.replace(aside)
    log.warning("%s cannot be used (%s): continuing without it; it is now %s", path, reason, aside.name)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise
    finally:
        os.close(handle)
