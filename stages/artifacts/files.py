"""Read and write JSON, replace files and folders atomically, and hash them."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from stages.runtime import durable, hashes, scratch
from stages.runtime.errors import DISK_FULL, FREE_SPACE, StageError, is_disk_full


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path for a file or folder; move it to `path`, flushed to the disk, if the block succeeds, and remove it
    otherwise.

    Leftovers of a killed process at the temporary path are removed first; DVC ignores them (.dvcignore). Raises StageError if
    the disk is full, or if the move would remove what the block has not written anew (see `refuse_foreign`).
    """
    partial = path.with_name(f".{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    remove(partial)
    try:
        yield partial
        refuse_foreign(path, set(list_names(partial)).__contains__ if partial.is_dir() else None)
        if path.is_dir() or partial.is_dir():
            remove(path)
        durable.replace(partial, path)
    except Exception as error:
        # The error may concern another disk, such as that of scratch/: report this file only if its own disk is full.
        if is_disk_full(error) and shutil.disk_usage(path.parent).free < 2**20:
            raise StageError(f"{path}: {DISK_FULL}: {FREE_SPACE}") from error
        raise
    finally:
        remove(partial)


def refuse_foreign(path: Path, is_part: Callable[[str], bool] | None) -> None:
    """Raise StageError if `path` is a folder in place of a file or the other way round, or contains a file or folder that is no
    part of the output that would replace it, which therefore an earlier run of the same stage has hardly written.

    is_part: whether a name, from `list_names`, is part of the output; None for an output that is a file. A link or an empty
    folder at `path` is not refused.
    """
    if path.is_symlink() or not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    remedy = "move it elsewhere, or remove it if you do not need it, then re-run; or name another path for the output"
    if path.is_dir() != bool(is_part):
        kinds = ("folder", "file") if path.is_dir() else ("file", "folder")
        raise StageError(f"{path} is a {kinds[0]}, and the output a {kinds[1]} that would replace it: {remedy}")
    for name in list_names(path) if is_part else ():
        if is_part and not is_part(name):
            raise StageError(f"{path / name} is not part of the output that would replace {path}: {remedy}")


def list_names(folder: Path) -> list[str]:
    """List everything below a folder, sorted: paths relative to it, those of folders with a slash at the end."""
    paths = sorted(folder.rglob("*"))
    return [path.relative_to(folder).as_posix() + "/" * path.is_dir() for path in paths]


def is_inside(name: object) -> bool:
    """Return whether a path that was read from a file stays below the folder that it is relative to."""
    if not isinstance(name, str) or "\0" in name:
        return False
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def is_file_name(name: object) -> bool:
    """Return whether a name that was read from a file is that of a file in the same folder."""
    return is_inside(name) and "/" not in str(name)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(value: Any, path: Path) -> None:
    """Write JSON with sorted keys, so that equal values give equal bytes. Raises ValueError for NaN and infinities."""
    with replacing(path) as partial:
        partial.write_text(
            json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8"
        )


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises StageError if it is missing, not valid JSON, or contains an unpaired surrogate."""
    require(path)
    try:
        text = path.read_text(encoding="utf-8")
        value = json.loads(text)
        if "\\u" in text:  # json accepts an escaped surrogate without its other half, which UTF-8 cannot encode
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, OSError, RecursionError) as error:
        raise StageError(f"{path}: not valid JSON ({error}): {suggest_remedy(path)}") from error
    return value


def read_records(path: Path, keys: list[str]) -> list[dict[str, Any]]:
    """Read a non-empty JSON list of objects, each with a string under every one of `keys`. Raises StageError."""
    records = read_json(path)
    if not isinstance(records, list) or not records:
        raise StageError(f"{path}: expected a non-empty JSON list of objects: {suggest_remedy(path)}")
    for index, record in enumerate(records):
        for key in keys:
            if not isinstance(record, dict) or not isinstance(record.get(key), str):
                raise StageError(f"{path}: record {index}: {key!r} is missing or not a string: {suggest_remedy(path)}")
    return records


def require(path: Path) -> Path:
    """Return `path`. Raises StageError if it does not exist."""
    if not path.exists():
        raise StageError(f"{path} is missing: {suggest_remedy(path)}")
    return path


def suggest_remedy(path: Path) -> str:
    """Say how to replace a missing or corrupted file, depending on who writes it."""
    if path.is_relative_to(scratch.FOLDER):
        return "remove it, then re-run the stage"
    return "create it with `dvc repro`" if path.parts[:1] == ("data",) else "check the path or recreate the file"


def digest(path: Path) -> str:
    """Hash a file's bytes, or the names and bytes of all files in a folder, as a key for unfinished work: a large file that
    has not changed is not read again (`hashes`). Raises StageError if `path` does not exist."""
    require(path)
    total = hashlib.blake2b(digest_size=16)
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            total.update(os.fsencode(file.relative_to(path)) + b"\0")
            total.update(hashes.digest_file(file))
    return total.hexdigest()


NEVER_LISTED = {".git", ".hg", ".dvc"}
"""Folders that DVC leaves out of a folder's listing."""
Inode = tuple[int, int]
"""Device and inode number."""


def dvc_md5(path: Path, known: dict[Inode, str] | None = None) -> str:
    """Return the MD5 in dvc.lock: of a file's bytes or, with the suffix `.dir`, of a folder's listing.

    known: MD5s computed by earlier calls, which this call reuses and extends. DVC may link workspace files to its cache;
    `known` avoids reading such a file twice.
    """
    known = {} if known is None else known
    if path.is_dir():
        listing = [
            {"md5": dvc_md5(file, known), "relpath": file.relative_to(path).as_posix()}
            for file in path.rglob("*")
            if file.is_file() and not NEVER_LISTED.intersection(file.relative_to(path).parts)
        ]
        text = json.dumps(sorted(listing, key=lambda entry: entry["relpath"]), sort_keys=True)
        return hashlib.md5(text.encode()).hexdigest() + ".dir"
    status = path.stat()
    inode = status.st_dev, status.st_ino
    if inode not in known:
        with path.open("rb") as handle:
            known[inode] = hashlib.file_digest(handle, "md5").hexdigest()
    return known[inode]
