"""Models that exist already; how a model is fetched is tested in tests/artifacts/test_hub.py."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from stages.artifacts import pointers
from support.hub import FakeHub, Run
from support.messages import assert_message
from support.models import make_model

REVISION = "0" * 40


def fetch(run: Run, folder: Path, models: dict[str, Any], name: str, **options: str) -> "subprocess.CompletedProcess[str]":
    """Run the stage with an empty Hub cache. endpoint: the Hub's address."""
    (folder / "params.yaml").write_text(json.dumps({"models": models}))
    return run("-m", "stages", "assets-model", "--name", name, "--out", "out", **options)


@pytest.mark.slow
def test_a_directory_is_copied(run: Run, tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        for name in ("config.json", "model.safetensors"):
            (tmp_path / folder / name).write_text(f"{folder} {name}")
    done = fetch(run, tmp_path, {"base": {"repo": "./one"}, "iter1": {"repo": "./two"}}, "iter1")
    assert done.returncode == 0, done.stderr
    assert {path.name: path.read_text() for path in (tmp_path / "out").iterdir()} == {
        name: f"two {name}" for name in ("config.json", "model.safetensors")
    }


@pytest.mark.slow
def test_a_model_on_the_hub_becomes_a_pointer(run: Run, fake_hub: FakeHub, tmp_path: Path) -> None:
    fake_hub.repos["models/some/model"] = {"config.json": b"{}", "model.safetensors": b"weights"}
    revision = fake_hub.commit("models/some/model")
    models = {"base": {"repo": "./one"}, "iter1": {"repo": "some/model", "revision": revision}}
    done = fetch(run, tmp_path, models, "iter1", endpoint=fake_hub.endpoint)
    assert done.returncode == 0, done.stderr
    pointer = pointers.read(tmp_path / "out")
    assert (pointer["repo"], pointer["revision"], set(pointer["files"])) == (
        "some/model",
        revision,
        {"config.json", "model.safetensors"},
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("models", "parts"),
    [
        ({"base": {"repo": "./one"}}, ["params.yaml", "models", "'iter1'", "base", "add it"]),
        ({"base": {"repo": "./one"}, "iter1": {"repo": "./nowhere"}}, ["./nowhere", "params.yaml"]),
        ({"base": {"repo": "./one"}, "iter1": {"repo": "a/b"}}, ["models.iter1", "a/b", "hub --pin"]),
        (
            {"base": {"repo": "./one"}, "iter1": {"repo": "a/b", "revision": REVISION}},
            ["a/b", "not on the Hub", "hf auth login"],
        ),
    ],
)
def test_a_model_that_cannot_be_had_stops_the_stage(
    models: dict[str, Any], parts: list[str], run: Run, fake_hub: FakeHub, tmp_path: Path
) -> None:
    done = fetch(run, tmp_path, models, "iter1", endpoint=fake_hub.endpoint)
    assert done.returncode == 1
    assert_message(done.stderr, "assets-model: error: ", *parts)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_gated_model_is_named_with_the_page_to_accept_its_license_at(run: Run, fake_hub: FakeHub, tmp_path: Path) -> None:
    fake_hub.respond = lambda path: (403, {"X-Error-Code": "GatedRepo"}, b"{}")
    models = {"base": {"repo": "a/b", "revision": REVISION}}
    done = fetch(run, tmp_path, models, "base", endpoint=fake_hub.endpoint)
    assert done.returncode == 1
    assert_message(done.stderr, "a/b", "license", "https://huggingface.co/a/b", "hf auth login")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_model_that_disagrees_with_its_golden_ids_is_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    make_model(tmp_path / "one")
    golden = [{"text": "Hi", "ids": [1]}]
    done = fetch(run, tmp_path, {"base": {"repo": "./one"}, "iter1": {"repo": "./one", "golden": golden}}, "iter1")
    assert done.returncode == 1
    assert_message(done.stderr, "assets-model: error: ", "params.yaml", "models.iter1.golden.0", "'Hi'", "./one")
    assert not (tmp_path / "out").exists()
