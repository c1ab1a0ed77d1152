"""The miniature's ranker: the same bytes from the same seed, and nothing in them of where it was made."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from stages.cli import ROOT

SIZE = {"hidden_size": 32, "layers": 1, "prompts": 60, "candidates": 2, "noise": 0.5, "learning_rate": 3.0e-3}


def make(folder: Path, seed: int = 1, **ranker: object) -> "subprocess.CompletedProcess[str]":
    folder.mkdir()
    with (folder / "params.yaml").open("w") as file:
        YAML().dump({"seed": seed, "assets": {"ranker": ranker or {"repo": "miniature", "miniature": SIZE}}}, file)
    command = [sys.executable, "-m", "stages.assets.ranker", "out"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_ENDPOINT": "http://127.0.0.1:9"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.slow
def test_the_seed_alone_decides_every_byte(tmp_path: Path) -> None:
    for name, seed in (("one", 1), ("two", 1), ("other", 2)):
        done = make(tmp_path / name, seed)
        assert done.returncode == 0, done.stderr
        assert "agrees with the gold preference on" in done.stderr
    one, two, other = (content(tmp_path / name / "out") for name in ("one", "two", "other"))
    assert one == two
    assert one["PairRM/model.safetensors"] != other["PairRM/model.safetensors"]
    assert {"PairRM/config.json", "PairRM/model.safetensors", "base/config.json", "base/spm.model"} <= one.keys()
    assert not [name for name, data in one.items() if str(tmp_path).encode() in data or str(ROOT).encode() in data]


@pytest.mark.parametrize(
    ("ranker", "message"),
    [
        ({"repo": "org/ranker", "revision": "0" * 40}, "assets.ranker.base is missing"),
        ({"repo": "./nowhere", "base": {"repo": "./nowhere"}}, "./nowhere is no directory"),
    ],
)
def test_what_cannot_be_made_leaves_nothing(tmp_path: Path, ranker: dict[str, object], message: str) -> None:
    done = make(tmp_path / "work", **ranker)
    assert done.returncode == 1
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not (tmp_path / "work" / "out").exists()
