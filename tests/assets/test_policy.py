import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from stages.artifacts import pointers
from stages.runtime.paths import ROOT
from support.hub import FakeHub, Run
from support.messages import assert_message
from support.running import run_stage

SIZE = {
    "hidden_size": 32,
    "layers": 1,
    "vocabulary": 300,
    "right_answers": 64,
    "mixed_answers": 64,
    "learning_rate": 3.0e-3,
}


def write_params(folder: Path, asset: dict[str, Any], seed: int = 1) -> None:
    (folder / "params.yaml").write_text(json.dumps({"seed": seed, "numerics": "portable", "assets": {"policy": asset}}))


def fetch(run: Run, folder: Path, asset: dict[str, Any], **options: str) -> "subprocess.CompletedProcess[str]":
    """Run the stage with an empty Hub cache. endpoint: the Hub's address."""
    write_params(folder, asset)
    return run("-m", "stages", "assets-policy", "--out", "out", **options)


def read_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
def test_the_seed_determines_every_byte_of_the_miniature_s_policy(tmp_path: Path) -> None:
    for name, seed in (("one", 1), ("two", 1), ("other", 2)):
        write_params(tmp_path, {"repo": "miniature", "miniature": SIZE}, seed)
        done = run_stage(tmp_path, "assets-policy", "--out", name)
        assert done.returncode == 0, done.stderr
        assert "64 right and 64 mixed answers" in done.stderr
    one, two, other = (read_bytes(tmp_path / name) for name in ("one", "two", "other"))
    assert one == two
    assert one["model.safetensors"] != other["model.safetensors"]
    assert one["tokenizer.json"] != other["tokenizer.json"]
    assert {"config.json", "generation_config.json", "tokenizer_config.json"} <= one.keys()
    assert not [name for name, data in one.items() if str(tmp_path).encode() in data or str(ROOT).encode() in data]
    assert pointers.check_model(tmp_path / "one") == tmp_path / "one"


def test_a_local_model_is_copied(run: Run, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for name in ("config.json", "model.safetensors", "pytorch_model.bin"):
        (tmp_path / "mine" / name).write_bytes(name.encode())
    done = fetch(run, tmp_path, {"repo": "./mine"})
    assert done.returncode == 0, done.stderr
    assert read_bytes(tmp_path / "out") == {name: name.encode() for name in ("config.json", "model.safetensors")}


def test_a_hub_model_becomes_a_pointer(run: Run, fake_hub: FakeHub, tmp_path: Path) -> None:
    fake_hub.repos["models/some/model"] = {"config.json": b"{}", "model.safetensors": b"weights"}
    revision = fake_hub.commit("models/some/model")
    asset = {"repo": "some/model", "revision": revision}
    done = fetch(run, tmp_path, asset, endpoint=fake_hub.endpoint)
    assert done.returncode == 0, done.stderr
    assert read_bytes(tmp_path / "out").keys() == {pointers.NAME}
    assert pointers.read(tmp_path / "out")["revision"] == revision


def test_a_missing_model_is_one_line_and_writes_nothing(run: Run, tmp_path: Path) -> None:
    done = fetch(run, tmp_path, {"repo": "./nowhere"})
    assert done.returncode == 1
    assert_message(done.stderr, "assets-policy: error: ", "./nowhere", "params.yaml")
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()
