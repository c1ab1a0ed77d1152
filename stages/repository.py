"""DVC's repository, for the commands that ask it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dvc.exceptions import NotDvcRepoError
from dvc.repo import Repo

from stages.cli import StageError


@contextmanager
def opened(folder: Path) -> Iterator[Any]:
    """The repository that a folder of dvc.yaml is in. Raises StageError where it is in none."""
    try:
        with Repo(str(folder)) as repo:
            yield repo
    except NotDvcRepoError as error:
        raise StageError(f"{folder.resolve()} is in no DVC repository: go where dvc.yaml is") from error
