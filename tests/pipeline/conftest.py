"""The whole pipeline at the smallest sizes, run once for all workers."""

import fcntl
import os
from pathlib import Path

import pytest

from support.checkout import run_and_commit


@pytest.fixture(scope="session")
def smallest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository that ran once; tests must not change it. pytest-xdist's workers share the folder."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with (shared / "smallest.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        folder = shared / "smallest" / "sppo"
        if not folder.exists():
            partial = shared / "smallest.partial" / "sppo"
            run_and_commit(partial)
            partial.parent.rename(folder.parent)
    return folder
