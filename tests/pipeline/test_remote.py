"""data/remote, from which `make repro` fetches the miniature's base policy and ranker."""

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from stages.runtime.paths import ROOT
from support.checkout import list_run
from support.committed import read_committed
from support.running import copy_repository, dvc

STAGES = ("assets-policy", "assets-ranker")
REMOTE = ROOT / "data" / "remote"
OBJECTS = Path("files") / "md5"


def read_outputs(lock: str) -> dict[str, str]:
    """Return path -> MD5 of what the two stages wrote. lock: the text of dvc.lock."""
    stages: dict[str, Any] = YAML(typ="safe").load(lock)["stages"]
    return {out["path"]: out["md5"] for stage in STAGES for out in stages[stage]["outs"]}


def locate(md5: str) -> Path:
    return OBJECTS / md5[:2] / md5[2:]


def fetch(folder: Path) -> "subprocess.CompletedProcess[str]":
    """Run what `make repro` runs before the pipeline, without installing."""
    command = ["make", "--no-print-directory", "-o", "env", "data/models/base"]
    (folder / ".venv").symlink_to(ROOT / ".venv")
    return subprocess.run(command, cwd=folder, env=os.environ, capture_output=True, text=True, check=False)


def test_it_holds_what_the_lock_names_and_nothing_else() -> None:
    outputs = read_outputs(read_committed("dvc.lock"))
    wanted = set(outputs.values())
    for md5 in outputs.values():
        if md5.endswith(".dir"):
            wanted |= {entry["md5"] for entry in json.loads((REMOTE / locate(md5)).read_text())}
    found = {path.relative_to(REMOTE) for path in REMOTE.rglob("*") if path.is_file()}
    assert found == {locate(md5) for md5 in wanted}
    for md5 in wanted:
        assert hashlib.md5((REMOTE / locate(md5)).read_bytes()).hexdigest() == md5.removesuffix(".dir"), md5


@pytest.mark.slow
def test_repro_trains_neither_of_what_was_fetched(tmp_path: Path) -> None:
    copy_repository(tmp_path, {})
    (tmp_path / "dvc.lock").write_text(read_committed("dvc.lock"))
    done = fetch(tmp_path)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    output = dvc(tmp_path, "repro", *STAGES)
    for stage in STAGES:
        assert f"Stage '{stage}' didn't change, skipping" in output
    assert read_outputs((tmp_path / "dvc.lock").read_text()) == read_outputs(read_committed("dvc.lock"))


@pytest.mark.slow
def test_without_the_remote_they_are_trained(tmp_path: Path) -> None:
    """As where data/ is a link to another disk, or dvc.lock is of other settings."""
    copy_repository(tmp_path, {})
    (tmp_path / "dvc.lock").write_text(read_committed("dvc.lock"))
    shutil.rmtree(tmp_path / "data" / "remote")
    done = fetch(tmp_path)
    assert done.returncode == 0
    assert "data/remote" in done.stdout
    assert "trained" in done.stdout
    assert not (tmp_path / "data" / "models" / "base" / "model.safetensors").exists()
    dvc(tmp_path, "repro", "assets-local")
    assert set(STAGES) <= list_run(dvc(tmp_path, "repro", "--dry", *STAGES))


@pytest.mark.slowest
def test_training_them_again_gives_the_same_bytes(tmp_path: Path) -> None:
    copy_repository(tmp_path, {})
    dvc(tmp_path, "repro", *STAGES)
    assert read_outputs((tmp_path / "dvc.lock").read_text()) == read_outputs(read_committed("dvc.lock"))
