"""Checkpoints in train's scratch folder: which ones are complete, so that training can resume from them."""

from pathlib import Path

from stages.artifacts import files

MARKER = "complete"
"""The last file written to a checkpoint: the sizes and names of its other files."""


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return the path of the checkpoint after a step, as transformers.Trainer names it."""
    return folder / f"checkpoint-{step}"


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint in the folder (all files present, with the recorded sizes), or None."""
    complete = [path for path in folder.glob("checkpoint-*") if _is_complete(path)]
    return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def mark_complete(path: Path) -> None:
    """Mark a fully written checkpoint as complete and remove all others in the same folder."""
    (path / MARKER).write_text(list_files(path), encoding="utf-8")
    for other in set(path.parent.glob("checkpoint-*")) - {path}:
        files.remove(other)


def list_files(path: Path) -> str:
    """List the size in bytes and the name of every file in a checkpoint except MARKER, one per line."""
    paths = sorted(file for file in path.rglob("*") if file.is_file() and file.name != MARKER)
    return "".join(f"{file.stat().st_size} {file.relative_to(path)}\n" for file in paths)


def _is_complete(path: Path) -> bool:
    marker = path / MARKER
    return marker.exists() and marker.read_text(encoding="utf-8") == list_files(path)
