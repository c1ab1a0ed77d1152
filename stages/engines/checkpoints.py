"""Checkpoints in train's scratch folder: which ones are complete and intact, so that training can resume from them.

The processes of the group share the hashing, about 1 GB/s each. Sizes alone would not show that a disk changed a file's bytes:
training would end in a traceback, or go on with other weights.
"""

import re
from pathlib import Path

from stages.artifacts import files
from stages.runtime import durable, hashes
from stages.runtime.devices import is_main_process

PREFIX = "checkpoint-"
"""Of the names that transformers.Trainer gives its checkpoints."""
MARKER = "complete"
"""The last file written to a checkpoint: the sizes and names of its other files."""
DIGESTS = "digests"
"""The file written before it: the digests and names of those that the training wrote."""


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return the path of the checkpoint after a step, as transformers.Trainer names it."""
    return folder / f"{PREFIX}{step}"


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint in the folder (all files present, with the recorded sizes), or None."""
    complete = [path for path in folder.glob(f"{PREFIX}*") if _is_complete(path)]
    return max(complete, key=lambda path: int(path.name.removeprefix(PREFIX)), default=None)


def find_start(folder: Path) -> Path | None:
    """Return the newest complete checkpoint whose bytes are those that were saved, or None. Any newer one is set aside.

    Every process of the group, which must exist, calls this and gets the same.
    """
    import torch.distributed as group

    while path := newest_checkpoint(folder):
        written, found = _read_digests(path), hash_files(path)
        if written == found:
            return path
        if is_main_process():
            changed = sorted({line.partition(" ")[2] for line in set(written) ^ set(found)})
            durable.set_aside(path, f"its bytes are not those that were saved: {', '.join(changed)}")
        group.barrier()  # the others must not find it again
    return None


def mark_complete(path: Path) -> None:
    """Hash and flush a fully written checkpoint, mark it as complete, and remove all others in the same folder.

    Every process of the group, which must exist, calls this; the main one writes.
    """
    digests = hash_files(path)
    if is_main_process():
        durable.write(path / DIGESTS, "".join(f"{line}\n" for line in digests))
        durable.flush(path)
        durable.write(path / MARKER, list_files(path))
        for other in set(path.parent.glob(f"{PREFIX}*")) - {path}:
            files.remove(other)


def hash_files(path: Path) -> list[str]:
    """Return the digest and the name of every file in a checkpoint except DIGESTS and MARKER, sorted.

    Every process of the group, which must exist, calls this, hashes a part of the files, and gets the whole.
    """
    import torch.distributed as group

    sizes = {file: file.stat().st_size for file in path.rglob("*") if file.is_file() and file.name not in (DIGESTS, MARKER)}
    dealt = sorted(sizes, key=lambda file: (-sizes[file], file))  # the largest first, so that every process gets about as much
    lines = []
    for file in dealt[group.get_rank() :: group.get_world_size()]:
        with file.open("rb") as handle:
            digest = hashes.hash_content(handle)
        lines.append(f"{digest.hex()} {file.relative_to(path)}")
    gathered: list[list[str]] = [[] for _ in range(group.get_world_size())]
    group.all_gather_object(gathered, lines)
    return sorted(line for part in gathered for line in part)


def _read_digests(path: Path) -> list[str]:
    return (path / DIGESTS).read_text(encoding="utf-8", errors="replace").splitlines() if (path / DIGESTS).is_file() else []


def list_files(path: Path) -> str:
    """List the size in bytes and the name of every file in a checkpoint except MARKER, one per line."""
    paths = sorted(file for file in path.rglob("*") if file.is_file() and file.name != MARKER)
    return "".join(f"{file.stat().st_size} {file.relative_to(path)}\n" for file in paths)


def _is_complete(path: Path) -> bool:
    marker = path / MARKER
    if not re.fullmatch(f"{PREFIX}[0-9]+", path.name) or not marker.is_file():
        return False
    return marker.read_bytes() == list_files(path).encode()
