"""Unfinished work that a killed stage resumes from. It lies outside the stage's outputs, ignored by Git and DVC.

A folder's name is a hash of everything that determines the work, so a run with other parameters never resumes from it. Finished
work is kept until DVC has recorded the stage's outputs, so that a run killed in between need not repeat it.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from stages.runtime import durable
from stages.runtime.devices import is_main_process
from stages.runtime.errors import StageError, is_disk_full
from stages.runtime.fingerprint import fingerprint
from stages.runtime.logs import log
from stages.runtime.versions import tool_versions

VARIABLE = "SPPO_SCRATCH"
"""Environment variable that moves this folder, to another disk for example."""
FOLDER = Path(os.environ.get(VARIABLE) or "scratch")
NUMERICS = "SPPO_NUMERICS"
"""Environment variable that a stage's process sets to its numerics, `portable` or `fast`, which are part of the key."""
FINISHED = "finished"
"""The file that marks finished work; it contains the stage's name and the expected dvc.lock entry of each output."""
LOCK = Path("dvc.lock")
ATTEMPTS = 1000
"""How often to try to lock a file that other processes keep removing, before giving up."""

_open_folders: dict[Path, int] = {}
"""Folders that this process uses -> handle of the locked file in the folder."""
_claims: dict[Path, int] = {}
"""Locked file that marks this command as running -> its handle."""


def claim(command: list[str]) -> None:
    """Claim the command until it finishes or the process ends. Raises StageError if another process is running it."""
    path = FOLDER / "running" / f"{_hash([str(Path.cwd()), *command])}.lock"
    try:
        _claims[path] = _lock(path)
    except BlockingIOError as error:
        raise StageError(f"another process is running this same command ({path} is locked): wait for it, or stop it") from error


def folder(stage: str, key: Mapping[str, Any]) -> Path:
    """Return the stage's folder for `key`: JSON values that determine its results besides its code, tools and numerics.

    stage: its name in `python -m stages NAME`. The main process of a group creates the folder if necessary and locks it.
    Raises StageError if another process uses it.
    """
    numerics = os.environ.get(NUMERICS)
    path = FOLDER / stage / _hash({"key": key, "code": fingerprint(stage), "tools": tool_versions(), "numerics": numerics})
    if path in _open_folders or not is_main_process():
        return path
    try:
        _open_folders[path] = _lock(path / "lock")
    except BlockingIOError as error:
        raise StageError(f"another process is doing this same work, in {path}: wait for it, or stop it") from error
    if (path / FINISHED).exists():
        log.info("reusing finished work in %s, which DVC has not recorded yet", path)
    return path


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _lock(path: Path) -> int:
    """Create a file and lock it until the returned handle is closed. Raises BlockingIOError if another process holds it, and
    StageError if there is no folder for it or if it cannot be locked."""
    for _ in range(ATTEMPTS):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if (handle := _try_lock(path)) is not None:
                return handle
        except (BlockingIOError, StageError):
            raise
        except OSError as error:
            if is_disk_full(error):
                raise
            raise _unusable(path, error.strerror) from error
    raise _unusable(path, "it disappears again and again")


def _try_lock(path: Path) -> int | None:
    """Lock a file as `_lock` does; None if the process that finished removed the file or its folder meanwhile."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(path.stat(), os.fstat(handle)):
            return handle
    except FileNotFoundError:
        pass
    except OSError:
        os.close(handle)
        raise
    os.close(handle)
    return None


def _unusable(path: Path, reason: str | None) -> StageError:
    remedy = f"unset {VARIABLE}, or set it to" if VARIABLE in os.environ else f"make {FOLDER}, or what {VARIABLE} names,"
    return StageError(f"{path}: cannot be created or locked ({reason}): {remedy} a folder on a local disk")


def finish(stage: str = "", outs: Iterable[Path] = ()) -> None:
    """Release the work once the outputs are written: discard it now or, under DVC, once DVC has recorded them.

    stage: its name in dvc.yaml, empty when run by hand.
    """
    folders = [path for path in _open_folders if path.exists()]  # `make clean` may have removed some
    if stage and folders:
        note = {"stage": stage, "outs": {str(path): _lock_entry(path) for path in outs if path.exists()}}
        for path in folders:
            durable.write(path / FINISHED, json.dumps(note))
    for path in folders:
        if not (path / FINISHED).exists():
            _discard(path)
    for path in _claims:
        path.unlink(missing_ok=True)
    for handle in (*_open_folders.values(), *_claims.values()):
        os.close(handle)
    _open_folders.clear()
    _claims.clear()


def sweep() -> None:
    """Remove finished work whose outputs DVC has recorded in dvc.lock. Only runs under DVC leave such work."""
    if "DVC_STAGE" not in os.environ:
        return
    for path in FOLDER.glob("*/*.discarded"):
        shutil.rmtree(path, ignore_errors=True)
    marks = list(FOLDER.glob(f"*/*/{FINISHED}"))
    recorded = _read_recorded_outs() if marks and LOCK.exists() else {}
    for mark in marks:
        with contextlib.suppress(FileNotFoundError, BlockingIOError):  # another process sweeps it, or is reusing it
            note = durable.read_json(mark, _check_note)
            outs = recorded.get(note["stage"]) if note else None
            if note and outs and all(entry.items() <= outs.get(path, {}).items() for path, entry in note["outs"].items()):
                handle = _lock(mark.parent / "lock")
                _discard(mark.parent)
                os.close(handle)


def _check_note(note: Any) -> dict[str, Any]:
    """Return the content of FINISHED. Raises ValueError, TypeError or AttributeError if it is not as `finish` writes it."""
    if set(note) != {"stage", "outs"} or not isinstance(note["stage"], str):
        raise ValueError("expected a stage and its outs")
    if not all(isinstance(entry, dict) for entry in note["outs"].values()):
        raise ValueError("expected an entry of dvc.lock for each out")
    return dict(note)


def _read_recorded_outs() -> dict[str, dict[str, dict[str, Any]]]:
    """Return what dvc.lock records: stage -> path of an out -> its entry. Of a lock that is not as DVC writes it, return what
    can be read: DVC itself says what is wrong."""
    from stages.runtime import documents

    try:
        stages = documents.load_mapping(LOCK.read_bytes(), str(LOCK)).get("stages")
    except StageError:
        return {}
    recorded = {}
    for stage, entry in stages.items() if isinstance(stages, dict) else ():
        outs = entry.get("outs") if isinstance(entry, dict) else None
        rows = [out for out in outs if isinstance(out, dict)] if isinstance(outs, list) else []
        recorded[stage] = {out["path"]: out for out in rows if isinstance(out.get("path"), str)}
    return recorded


def _lock_entry(path: Path) -> dict[str, Any]:
    """Return the cheap part of an output's dvc.lock entry: a file's MD5, or a folder's size in bytes and file count."""
    if path.is_dir():
        sizes = [file.stat().st_size for file in path.rglob("*") if file.is_file()]
        return {"size": sum(sizes), "nfiles": len(sizes)}
    with path.open("rb") as file:
        return {"md5": hashlib.file_digest(file, "md5").hexdigest()}


def _discard(path: Path) -> None:
    """Delete a locked folder atomically (rename, then remove), so that no process resumes from a half-deleted folder."""
    aside = path.with_name(f"{path.name}.discarded")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    shutil.rmtree(aside)
