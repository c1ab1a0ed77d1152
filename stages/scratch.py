"""Unfinished work: what a killed stage goes on from. It lies outside the outs, ignored by Git and DVC.

A folder's name is a hash of everything that determines the work, so a changed parameter never picks up another's. What a
stage has finished stays until DVC has its outs: a run that is killed in between does not pay twice.
"""

import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stages import cli

FOLDER = Path(os.environ.get("SPPO_SCRATCH", "scratch"))
FINISHED = "finished"
LOCK = Path("dvc.lock")

CANNOT_CHANGE_RESULTS = {
    "stages/__init__.py",
    "stages/assets/__init__.py",
    "stages/cli.py",
    "stages/documents.py",
    "stages/params.py",
    "stages/scratch.py",
}
"""Of the code that stages import: neither part of a folder's name nor among the deps in dvc.yaml."""

_opened: dict[Path, int] = {}
"""Folders of this process, and the locked file in each."""


def folder(stage: str, key: Mapping[str, Any]) -> Path:
    """The stage's folder for `key`, JSON values that determine the results; code and versions of tools are added to them.

    It is made if need be, and locked for this process, the main one of its group. Raises StageError where another has it.
    """
    determined = {"key": key, "code": code(), "tools": cli.versions()}
    path = FOLDER / stage / hashlib.sha256(json.dumps(determined, sort_keys=True).encode()).hexdigest()[:16]
    if path in _opened or not cli.is_main():
        return path
    while True:
        path.mkdir(parents=True, exist_ok=True)
        handle = os.open(path / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(handle)
            raise cli.StageError(f"another process is at this very work, in {path}: wait for it, or stop it") from error
        if same(path / "lock", handle):
            break
        os.close(handle)  # the other process finished and removed the folder between our two steps
    _opened[path] = handle
    if (path / FINISHED).exists():
        cli.log.info("finished already, in %s, and not yet in DVC's cache: taken over from there", path)
    return path


def same(path: Path, handle: int) -> bool:
    """Whether an open file is the one at `path` still."""
    return path.exists() and os.path.samestat(path.stat(), os.fstat(handle))


def code() -> dict[str, str]:
    """The project's modules that are loaded, by their hashes, but for those that cannot change results."""
    found = {}
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if file and Path(file).is_relative_to(cli.ROOT / "stages"):
            name = Path(file).relative_to(cli.ROOT).as_posix()
            if name not in CANNOT_CHANGE_RESULTS:
                found[name] = hashlib.sha256(Path(file).read_bytes()).hexdigest()
    return found


def finish() -> None:
    """The stage has written its outs: its work is done with, under DVC as soon as DVC has taken the outs over."""
    for path, handle in _opened.items():
        if "DVC_STAGE" in os.environ:
            (path / FINISHED).touch()
        else:
            shutil.rmtree(path)
        os.close(handle)
    _opened.clear()


def sweep() -> None:
    """Remove finished work that DVC has: its lock file was written since."""
    for mark in FOLDER.glob(f"*/*/{FINISHED}"):
        if LOCK.exists() and LOCK.stat().st_mtime_ns > mark.stat().st_mtime_ns:
            shutil.rmtree(mark.parent)
