"""The CI job that runs the miniature afresh: it fails if, and only if, a committed result differs."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from stages.runtime.paths import ROOT
from support import revisions


def read_job() -> dict[str, Any]:
    job: dict[str, Any] = YAML(typ="safe").load(ROOT / ".github/workflows/test.yml")["jobs"]["repro"]
    return job


def test_it_runs_the_miniature_from_nothing_on_several_images() -> None:
    job = read_job()
    assert len(job["strategy"]["matrix"]["image"]) > 1
    assert job["strategy"]["fail-fast"] is False  # one image's difference must not hide the other's result
    commands = [step["run"] for step in job["steps"] if "run" in step]
    assert commands[:3] == ["make base", "make repro", "make attest"]
    caches = [step["with"]["path"] for step in job["steps"] if "actions/cache" in step.get("uses", "")]
    assert caches == [".venv"]  # no results: DVC would take them instead of running


@pytest.mark.parametrize(
    ("name", "fails"),
    [("dvc.lock", True), ("reports/metrics.json", True), ("README.md", False), ("reports/index.html", False), (None, False)],
)
def test_its_last_step_fails_if_a_committed_result_differs(name: str | None, fails: bool, tmp_path: Path) -> None:
    for file in ("dvc.lock", "reports/metrics.json", "README.md"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("committed")
    revisions.git(tmp_path, "init", "-q")
    revisions.commit(tmp_path, "run")
    if name:
        (tmp_path / name).write_text("other")
    command = read_job()["steps"][-1]["run"]
    done = subprocess.run(["bash", "-e", "-c", command], cwd=tmp_path, capture_output=True, check=False)
    assert bool(done.returncode) == fails
