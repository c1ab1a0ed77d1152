"""Queries of the DVC repository and of the stages' code fingerprints, shared by tools."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dvc.exceptions import NotDvcRepoError
from dvc.ignore import DvcIgnoreFilter
from dvc.parsing import DataResolver
from dvc.repo import Repo

from stages.artifacts import files
from stages.runtime import params
from stages.runtime.errors import StageError
from stages.runtime.fingerprint import fingerprint
from stages.tools import locks

FINGERPRINTS = Path("data/code")
"""Where the stage `code` writes the fingerprints that the other stages depend on; relative to the folder of dvc.yaml."""


@contextmanager
def open_repository(folder: Path) -> Iterator[Any]:
    """Open the DVC repository (dvc.repo.Repo) that contains a folder of dvc.yaml. Raises StageError if there is none."""
    try:
        with Repo(str(folder)) as repo:
            yield repo
    except NotDvcRepoError as error:
        raise StageError(f"{folder.resolve()} is not in a DVC repository: use a folder with a dvc.yaml") from error


def hash_path(path: Path, ignore: DvcIgnoreFilter, known: dict[files.Inode, str] | None = None) -> str:
    """Return the MD5 that `dvc repro` would record in dvc.lock: of a file's bytes or, with the suffix `.dir`, of a folder's
    listing, without what DVC ignores. ignore: that of the repository, `repo.dvcignore`. known: see `files.dvc_md5`."""
    if not path.is_dir():
        return files.dvc_md5(path, known)
    md5s = {file.as_posix(): files.dvc_md5(file, known) for file in list_files(path, ignore)}
    return locks.hash_listing(md5s, path.as_posix())


def list_files(folder: Path, ignore: DvcIgnoreFilter) -> list[Path]:
    """Return all files under a folder that DVC does not ignore, sorted."""
    found = map(Path, ignore.find(ignore.fs, str(folder)))
    return sorted(path for path in found if path.is_file())


def list_stages(repo: Any, folder: Path) -> list[str]:
    """Return the names of the stages of folder/dvc.yaml, even if a .dvcignore hides it from DVC. Raises StageError."""
    definitions = params.read(folder / "dvc.yaml")
    return list(DataResolver(repo, str(folder.resolve()), definitions).get_keys())


def find_changed_code(stage: str, path: Path) -> list[str]:
    """Return the files whose code differs from a stage's fingerprint.

    stage: its name in `python -m stages NAME`. path: its fingerprint, data/code/NAME.json or a copy of it. The files are
    relative to the repository. Raises StageError if the fingerprint is missing or not valid JSON.
    """
    before, now = files.read_json(path), fingerprint(stage)
    return [name for name in {**before, **now} if before.get(name) != now.get(name)]
