"""A copy of the repository at the smallest sizes, run once."""

import subprocess
from pathlib import Path

from support.running import SMALLEST, copy_repository, dvc


def run_and_commit(folder: Path) -> None:
    """Copy the working tree to `folder` with the smallest parameters, run the pipeline and commit the results."""
    copy_repository(folder, SMALLEST)
    dvc(folder, "repro")
    subprocess.run(["git", "add", "-A"], cwd=folder, check=True)
    subprocess.run(["git", "commit", "-qm", "run"], cwd=folder, check=True)


def restore(folder: Path) -> None:
    """Return to the last commit, as after an experiment that is not kept."""
    subprocess.run(["git", "checkout", "-q", "."], cwd=folder, check=True)
    dvc(folder, "checkout", "--quiet", "--force", "dvc.yaml")


def list_run(output: str) -> set[str]:
    """Return the stages that `dvc repro` or `dvc exp run` reports to have run."""
    return {line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage '")}
