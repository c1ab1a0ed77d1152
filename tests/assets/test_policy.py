import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from stages.artifacts import pointers
from stages.runtime.paths import ROOT
from support.hub import FakeHub, Run
from support.messages import assert_message
from support.models import make_model
from support.running import ALONE, run_stage

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
    for name, seed, environment in (("one", 1, {}), ("two", 1, ALONE), ("other", 2, {})):
        write_params(tmp_path, {"repo": "miniature", "miniature": SIZE}, seed)
        done = run_stage(tmp_path, "assets-policy", "--out", name, **environment)
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


@pytest.mark.slow
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


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model and its tokenizer, which tests must not change."""
    return make_model(tmp_path_factory.mktemp("model"))


def make_golden(model: Path, text: str) -> dict[str, Any]:
    """Encode a chat in Llama 3's template, written out by hand, with the model's tokenizer."""
    from transformers import AutoTokenizer

    parts = [f"<|start_header_id|>{role}<|end_header_id|>\n\n" for role in ("user", "assistant")]
    rendered = f"<|begin_of_text|>{parts[0]}{text}<|eot_id|>{parts[1]}"
    return {"text": text, "ids": AutoTokenizer.from_pretrained(model)(rendered, add_special_tokens=False)["input_ids"]}


@pytest.mark.slow
@pytest.mark.parametrize("on_hub", [True, False], ids=["Hub", "directory"])
def test_a_model_that_disagrees_is_refused_before_its_weights_are_fetched(
    run: Run, fake_hub: FakeHub, tmp_path: Path, model: Path, on_hub: bool
) -> None:
    fake_hub.repos["models/some/model"] = read_bytes(model)
    source = {"repo": "some/model", "revision": fake_hub.commit("models/some/model")} if on_hub else {"repo": str(model)}
    right = make_golden(model, "What is 2 plus 2?")
    wrong = right | {"ids": [*right["ids"][:-1], 9]}

    done = fetch(run, tmp_path, source | {"golden": [right, wrong]}, endpoint=fake_hub.endpoint)
    assert done.returncode == 1
    assert_message(done.stderr, "assets-policy: error: ", "params.yaml", "assets.policy.golden.1", source["repo"], "expected 9")
    assert not (tmp_path / "out").exists()
    assert not [path for path in fake_hub.requested if path.endswith(".safetensors")]

    done = fetch(run, tmp_path, source | {"golden": [right]}, endpoint=fake_hub.endpoint)
    assert done.returncode == 0, done.stderr
    assert (pointers.NAME if on_hub else "model.safetensors") in read_bytes(tmp_path / "out")


@pytest.mark.slow
def test_golden_ids_that_are_not_checked_are_refused(run: Run, tmp_path: Path) -> None:
    """The miniature's tokenizer is not pinned, and an empty list checks nothing."""
    golden = [{"text": "Hi", "ids": [1]}]
    for asset, key in (
        ({"repo": "miniature", "miniature": SIZE, "golden": golden}, "golden"),
        ({"repo": "./mine", "golden": []}, "assets.policy.golden"),
        ({"repo": "./mine", "golden": [{"text": "Hi", "ids": [-1]}]}, "assets.policy.golden.0.ids.0"),
    ):
        done = fetch(run, tmp_path, asset)
        assert done.returncode == 1
        assert_message(done.stderr, "params.yaml", key)
