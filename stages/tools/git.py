"""Queries of the Git repository, shared by tools."""

import os
import subprocess
from pathlib import Path

from stages.runtime.errors import StageError, one_line

INPUTS = ("stages", "requirements")
"""What determines results, besides an experiment's own files; relative to the root of the repository."""
EXPERIMENT = ("dvc.yaml", "params.yaml", "published.yaml")
"""The same in the folder of an experiment."""
REDIRECTIONS = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR", "GIT_OBJECT_DIRECTORY", "GIT_NAMESPACE")
"""Environment variables that name another repository than that of the current folder, or another part of one."""


def clean_environment() -> dict[str, str]:
    """Return this process's environment variables without REDIRECTIONS, for processes that run in a given folder."""
    return {name: value for name, value in os.environ.items() if name not in REDIRECTIONS}


def run_git(folder: Path, *arguments: str) -> str:
    """Run Git in a folder and return its output, without the last line break. Raises StageError if it fails."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=folder, env=clean_environment(), capture_output=True, text=True, check=False
        )
    except FileNotFoundError as error:
        raise StageError("git is not installed: install it") from error
    if done.returncode:
        raise StageError(f"`git {arguments[0]}` failed in {folder.resolve()}: {one_line(done.stderr)}: check the repository")
    return done.stdout.rstrip("\n")


def head(folder: Path) -> str:
    """Return the 40-digit commit of HEAD. Raises StageError if the folder is in no repository, or it has no commit."""
    return run_git(folder, "rev-parse", "--verify", "HEAD")


def root(folder: Path) -> Path:
    """Return the root of the repository that a folder is in. Raises StageError if it is in none."""
    return Path(run_git(folder, "rev-parse", "--show-toplevel"))


def list_inputs(folder: Path) -> list[str]:
    """Return Git's path specifications of what determines an experiment's results; folder: that of its dvc.yaml."""
    return [*(f":/{name}" for name in INPUTS), *EXPERIMENT]


def find_uncommitted(folder: Path) -> list[str]:
    """Return the files among the inputs of the experiment in `folder` that differ from HEAD or that Git does not track."""
    lines = run_git(folder, "status", "--porcelain", "--untracked-files=all", "--", *list_inputs(folder)).splitlines()
    return [line[3:] for line in lines]


def has_same_inputs(folder: Path, a: str, b: str) -> bool:
    """Return whether two commits have the same inputs of the experiment in `folder`."""
    return not run_git(folder, "diff", "--name-only", a, b, "--", *list_inputs(folder))
