"""Unfinished work: what a killed stage goes on from. It lies outside the outs, ignored by Git and DVC.

A folder's name is a hash of everything that determines the work, so a changed parameter never picks up another's. What a
stage has finished stays until DVC has its outs: a run that is killed in between does not pay twice.
"""

import contextlib
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
"""The file in a folder of finished work: the stage, and of each of its outs what dvc.lock will say of it."""
LOCK = Path("dvc.lock")

CANNOT_CHANGE_RESULTS = {
    "stages/__init__.py",
    "stages/assets/__init__.py",
    "stages/cli.py",
    "stages/documents.py",
    "stages/params.py",
    "stages/processes.py",
    "stages/scratch.py",
}
"""Of the code that stages import: neither part of a folder's name nor among the deps in dvc.yaml."""

written: list[Path] = []
"""What this process has written by `files.replacing`, the outs among it."""
_opened: dict[Path, int] = {}
"""Folders of this process, and the locked file in each."""
_running: dict[Path, int] = {}
"""The locked file that says that this command runs."""


def alone(command: list[str]) -> None:
    """Claim the command, until it is finished or the process ends. Raises StageError where another process runs it."""
    path = FOLDER / "running" / f"{_name([str(Path.cwd()), *command])}.lock"
    try:
        _running[path] = _lock(path)
    except BlockingIOError as error:
        raise cli.StageError(f"another process runs this very command ({path} is locked): wait for it, or stop it") from error


def folder(stage: str, key: Mapping[str, Any]) -> Path:
    """The stage's folder for `key`, JSON values that determine the results; code and versions of tools are added to them.

    It is made if need be, and locked for this process, the main one of its group. Raises StageError where another has it.
    """
    path = FOLDER / stage / _name({"key": key, "code": code(), "tools": cli.versions()})
    if path in _opened or not cli.is_main():
        return path
    try:
        _opened[path] = _lock(path / "lock")
    except BlockingIOError as error:
        raise cli.StageError(f"another process is at this very work, in {path}: wait for it, or stop it") from error
    if (path / FINISHED).exists():
        cli.log.info("finished already, in %s, and not yet in DVC's cache: taken over from there", path)
    return path


def _name(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _lock(path: Path) -> int:
    """Make a file and lock it, until what is returned is closed. Raises BlockingIOError where another process has it."""
    while True:
        with contextlib.suppress(FileNotFoundError):  # its folder removed between our two steps, by who finished
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(path.stat(), os.fstat(handle)):
                    return handle
            except OSError:
                os.close(handle)
                raise
            os.close(handle)  # the file is another one by now


def code() -> dict[str, str]:
    """The project's modules that are loaded, by their hashes, but for those that cannot change results."""
    found = {}
    for module in list(sys.modules.values()):
        file = Path(getattr(module, "__file__", None) or os.devnull).resolve()
        if file.is_relative_to(cli.ROOT / "stages"):
            name = file.relative_to(cli.ROOT).as_posix()
            if name not in CANNOT_CHANGE_RESULTS:
                found[name] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def finish(stage: str = "") -> None:
    """The outs are written, the work is done with: by hand at once, in DVC's stage as soon as DVC has taken the outs over."""
    opened = [path for path in _opened if path.exists()]  # not where `make clean` was quicker
    if stage and opened:
        outs = [path for path in written if path.exists() and not path.resolve().is_relative_to(FOLDER.resolve())]
        note = {"stage": stage, "outs": {str(path): _fingerprint(path) for path in outs}}
        for path in opened:
            (path / "finishing").write_text(json.dumps(note))
            (path / "finishing").replace(path / FINISHED)
    for path in opened:
        if not (path / FINISHED).exists():
            _discard(path)
    for path in _running:
        path.unlink(missing_ok=True)
    for handle in (*_opened.values(), *_running.values()):
        os.close(handle)
    _opened.clear()
    _running.clear()


def sweep() -> None:
    """Remove finished work whose outs DVC has: its lock file names them. Only for DVC, which alone makes such work."""
    if "DVC_STAGE" not in os.environ:
        return
    for path in FOLDER.glob("*/*.discarded"):
        shutil.rmtree(path, ignore_errors=True)
    marks = list(FOLDER.glob(f"*/*/{FINISHED}"))
    if not marks or not LOCK.exists():
        return
    from stages import documents

    stages = documents.mapping(LOCK.read_bytes(), str(LOCK)).get("stages", {})
    for mark in marks:
        with contextlib.suppress(FileNotFoundError, BlockingIOError):  # another process swept it, or takes it over
            note = json.loads(mark.read_text())
            outs = {out["path"]: out for out in stages.get(note["stage"], {}).get("outs", [])}
            if all(found.items() <= outs.get(path, {}).items() for path, found in note["outs"].items()):
                handle = _lock(mark.parent / "lock")
                _discard(mark.parent)
                os.close(handle)


def _fingerprint(path: Path) -> dict[str, Any]:
    """Of what dvc.lock says of an out as much as costs little: a file's hash, a folder's size in bytes and number of files."""
    if path.is_dir():
        sizes = [file.stat().st_size for file in path.rglob("*") if file.is_file()]
        return {"size": sum(sizes), "nfiles": len(sizes)}
    with path.open("rb") as file:
        return {"md5": hashlib.file_digest(file, "md5").hexdigest()}


def _discard(path: Path) -> None:
    """Remove a folder that is locked by us, at once as others see it: a half-removed one would be gone on from."""
    aside = path.with_name(f"{path.name}.discarded")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    shutil.rmtree(aside)
