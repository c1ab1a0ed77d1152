"""The miniature's ranker is determined by the seed and contains no paths; other rankers need the model they are based on."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from stages.runtime.paths import ROOT
from support.hub import Run
from support.messages import assert_message
from support.running import ALONE, run_stage

pytestmark = pytest.mark.slow

SIZE = {"hidden_size": 32, "layers": 1, "prompts": 60, "candidates": 2, "noise": 0.5, "learning_rate": 3.0e-3}


def write_params(folder: Path, asset: dict[str, Any], seed: int = 1) -> None:
    (folder / "params.yaml").write_text(json.dumps({"seed": seed, "numerics": "portable", "assets": {"ranker": asset}}))


def fetch(run: Run, folder: Path, asset: dict[str, Any]) -> "subprocess.CompletedProcess[str]":
    """Run the stage without a Hub."""
    write_params(folder, asset)
    return run("-m", "stages", "assets-ranker", "--out", "out")


def read_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_seed_determines_every_byte_of_the_miniature_s_ranker(tmp_path: Path) -> None:
    for folder, seed, environment in (("a", 1, {}), ("b", 1, ALONE), ("c", 2, {})):
        write_params(tmp_path, {"repo": "miniature", "miniature": SIZE}, seed)
        done = run_stage(tmp_path, "assets-ranker", "--out", f"{folder}/out", **environment)
        assert done.returncode == 0, done.stderr
        assert "agrees with the gold preference on" in done.stderr
    one, two, other = (read_bytes(tmp_path / folder / "out") for folder in ("a", "b", "c"))
    assert one == two
    assert one["PairRM/model.safetensors"] != other["PairRM/model.safetensors"]
    assert {"PairRM/config.json", "PairRM/model.safetensors", "base/config.json", "base/spm.model"} <= one.keys()
    assert not [name for name, data in one.items() if str(tmp_path).encode() in data or str(ROOT).encode() in data]


def test_local_models_are_copied_without_the_base_model_s_weights(run: Run, tmp_path: Path) -> None:
    for folder in ("PairRM", "deberta"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text("{}")
    (tmp_path / "PairRM" / "model.safetensors").write_text("weights")
    (tmp_path / "deberta" / "pytorch_model.bin").write_text("pickle")
    (tmp_path / "deberta" / "spm.model").write_text("tokens")
    done = fetch(run, tmp_path, {"repo": "./PairRM", "base": {"repo": "./deberta"}})
    assert done.returncode == 0, done.stderr
    assert read_bytes(tmp_path / "out").keys() == {
        "PairRM/config.json",
        "PairRM/model.safetensors",
        "base/config.json",
        "base/spm.model",
    }


@pytest.mark.parametrize(
    ("asset", "parts"),
    [
        ({"repo": "org/ranker", "revision": "0" * 40}, ["params.yaml", "assets.ranker.base is missing", "deberta-v3-large"]),
        ({"repo": "./nowhere", "base": {"repo": "./nowhere"}}, ["./nowhere", "params.yaml"]),
    ],
)
def test_a_ranker_that_cannot_be_fetched_is_one_line_and_writes_nothing(
    run: Run, tmp_path: Path, asset: dict[str, Any], parts: list[str]
) -> None:
    done = fetch(run, tmp_path, asset)
    assert done.returncode == 1
    assert_message(done.stderr, "assets-ranker: error: ", *parts)
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert not (tmp_path / "out").exists()
