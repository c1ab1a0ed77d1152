"""A ranker that exists already is fetched by its name, with its base model; the weights of the latter are not needed."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from stages.artifacts import pointers
from support.hub import FakeHub, Run
from support.messages import assert_message


def write_ranker(folder: Path, name: str) -> dict[str, Any]:
    """Write a ranker's files, whose content is its name, and return its entry in params.yaml."""
    for part in (name, f"{name}-base"):
        (folder / part).mkdir()
        (folder / part / "config.json").write_text(json.dumps(part))
        (folder / part / "model.safetensors").write_text(part)
    return {"repo": f"./{name}", "base": {"repo": f"./{name}-base"}}


def fetch(run: Run, folder: Path, rankers: dict[str, Any], name: str, **options: Any) -> "subprocess.CompletedProcess[str]":
    (folder / "params.yaml").write_text(json.dumps({"rankers": rankers}))
    return run("-m", "stages", "assets-pairrm", "--name", name, "--out", "out", **options)


@pytest.mark.slow
def test_the_named_ranker_is_copied(run: Run, tmp_path: Path) -> None:
    rankers = {name: write_ranker(tmp_path, name) for name in ("one", "other")}
    done = fetch(run, tmp_path, rankers, "other")
    assert done.returncode == 0, done.stderr
    found = {str(path.relative_to(tmp_path / "out")): path.read_text() for path in (tmp_path / "out").rglob("*.*")}
    expected = {"PairRM/config.json": '"other"', "PairRM/model.safetensors": "other", "base/config.json": '"other-base"'}
    assert found == expected


@pytest.mark.slow
def test_a_ranker_on_the_hub_becomes_two_pointers(run: Run, fake_hub: FakeHub, tmp_path: Path) -> None:
    fake_hub.repos |= {
        "models/org/PairRM": {"config.json": b"{}", "model.safetensors": b"w"},
        "models/org/deberta": {"config.json": b"{}", "spm.model": b"t", "pytorch_model.bin": b"pickle"},
    }
    commits = {name: fake_hub.commit(f"models/org/{name}") for name in ("PairRM", "deberta")}
    base = {"repo": "org/deberta", "revision": commits["deberta"]}
    rankers = {"pairrm": {"repo": "org/PairRM", "revision": commits["PairRM"], "base": base}}
    done = fetch(run, tmp_path, rankers, "pairrm", endpoint=fake_hub.endpoint)
    assert done.returncode == 0, done.stderr
    ranker, deberta = (pointers.read(tmp_path / "out" / name) for name in ("PairRM", "base"))
    assert (ranker["repo"], ranker["revision"]) == ("org/PairRM", commits["PairRM"])
    assert (deberta["repo"], set(deberta["files"])) == ("org/deberta", {"config.json", "spm.model"})


@pytest.mark.slow
def test_an_unknown_name_is_one_line_and_writes_nothing(run: Run, tmp_path: Path) -> None:
    for rankers, known in (({"one": write_ranker(tmp_path, "one")}, "one"), ({}, "none")):
        done = fetch(run, tmp_path, rankers, "two")
        assert done.returncode == 1
        assert_message(done.stderr, "assets-pairrm: error: ", "params.yaml: rankers", "'two'", known, "--name")
        assert not (tmp_path / "out").exists()
