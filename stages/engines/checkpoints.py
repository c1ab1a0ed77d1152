"""Checkpoints in train's scratch folder: which ones are complete, so that training can resume from them."""

import re
from pathlib import Path

from stages.artifacts import files
from stages.runtime import durable

PREFIX = "checkpoint-"
"""Of the names that transformers.Trainer gives its checkpoints."""
MARKER = "complete"
"""The last file written to a checkpoint: the sizes and names of its other files."""


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return the path of the checkpoint after a step, as transformers.Trainer names it."""
    return folder / f"{PREFIX}{step}"


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint in the folder (all files present, with the recorded sizes), or None."""
    complete = [path for path in folder.glob(f"{PREFIX}*") if _is_complete(path)]
    return max(complete, key=lambda path: int(path.name.removeprefix(PREFIX)), default=None)


def mark_complete(path: Path) -> None:
    """Flush a fully written checkpoint to the disk, mark it as complete, and remove all others in the same folder."""
    durable.flush(path)
    durable.write(path / MARKER, list_files(path))
    for other in set(path.parent.glob(f"{PREFIX}*")) - {path}:
        files.remove(other)


def list_files(path: Path) -> str:
    """List the size in bytes and the name of every file in a checkpoint except MARKER, one per line."""
    paths = sorted(file for file in path.rglob("*") if file.is_file() and file.name != MARKER)
    return "".join(f"{file.stat().st_size} {file.relative_to(path)}\n" for file in paths)


def _is_complete(path: Path) -> bool:
    marker = path / MARKER
    if not re.fullmatch(f"{PREFIX}[0-9]+", path.name) or not marker.is_file():
        return False
    return marker.read_bytes() == list_files(path).encode()
