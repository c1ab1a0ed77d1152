"""Hub models without copies: a folder that holds `pointer.json` stands for a snapshot in the local Hub cache.

A pointer is {"repo", "revision", "repo_type", "files": {name: {"size" in bytes, "sha256"}}}: what a stage depends on is
the pointer, a few lines that change when the weights do; the weights themselves stay in the Hub's cache.
"""

from pathlib import Path
from typing import Any

from stages import files
from stages.cli import StageError

NAME = "pointer.json"


def resolve(path: Path) -> Path:
    """The directory to load a model from: `path` itself or, where it holds a pointer, the snapshot it points to.

    No network. Raises StageError where `path`, the snapshot or one of its files is missing, or a file's size differs.
    """
    if not (files.present(path) / NAME).exists():
        return path
    pointer = read(path)
    from huggingface_hub import snapshot_download

    remedy = "fetch it with `python -m stages.assets --fetch RECIPE` (RECIPE: the folder of params.yaml)"
    try:
        snapshot = Path(
            snapshot_download(
                pointer["repo"],
                repo_type=pointer["repo_type"],
                revision=pointer["revision"],
                allow_patterns=list(pointer["files"]),
                local_files_only=True,
            )
        )
    except (OSError, ValueError) as error:
        raise StageError(
            f"{path}: {pointer['repo']} at {pointer['revision']} is not in this machine's Hub cache, or not whole: {remedy}, "
            "or by forcing the stage that wrote the pointer: `dvc repro --force --single-item STAGE`"
        ) from error
    for name, expected in pointer["files"].items():
        file = snapshot / name
        size = file.stat().st_size if file.is_file() else None
        if size != expected["size"]:
            found = "is missing" if size is None else f"has {size} bytes, not {expected['size']}: remove it"
            raise StageError(f"{file} {found}: {remedy}")
    return snapshot


def read(path: Path) -> dict[str, Any]:
    """The pointer in folder `path`. Raises StageError where it lacks a key."""
    pointer = files.read_json(path / NAME)
    keys = {"repo", "revision", "repo_type", "files"}
    if not isinstance(pointer, dict) or set(pointer) != keys or not isinstance(pointer["files"], dict) or not pointer["files"]:
        raise StageError(f"{path / NAME}: an object with {', '.join(sorted(keys))} is wanted: make it with `dvc repro`")
    for name, expected in pointer["files"].items():
        if not isinstance(expected, dict) or set(expected) != {"size", "sha256"}:
            raise StageError(f"{path / NAME}: files.{name}: size and sha256 are wanted: make it with `dvc repro`")
    return pointer
