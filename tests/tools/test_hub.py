"""Pinning revisions and fetching models, against a small Hub on this machine."""

import hashlib
import json
import subprocess
from pathlib import Path

import pytest

from stages.artifacts import pointers
from stages.runtime import params
from stages.runtime.paths import ROOT
from support.hub import FakeHub, run_python
from support.messages import assert_message

REPOS = {
    "ranker": "models/llm-blender/PairRM",
    "prompts.assignment": "datasets/snorkelai/Snorkel-Mistral-PairRM-DPO-Dataset",
    "alpaca_eval": "datasets/tatsu-lab/alpaca_eval",
    "harness.arc_challenge": "datasets/allenai/ai2_arc",
    "harness.truthfulqa_mc2": "datasets/truthfulqa/truthful_qa",
    "harness.winogrande": "datasets/allenai/winogrande",
    "harness.gsm8k": "datasets/openai/gsm8k",
    "harness.hellaswag": "datasets/Rowan/hellaswag",
    "harness.mmlu": "datasets/cais/mmlu",
}
"""The assets of recipes/llama-3-8b without a revision."""


def run_hub(folder: Path, hub: FakeHub, action: str) -> "subprocess.CompletedProcess[str]":
    return run_python(folder, "-m", "stages.tools", "hub", action, "--recipe", "recipe", endpoint=hub.endpoint)


def pin(folder: Path, hub: FakeHub, text: str) -> "subprocess.CompletedProcess[str]":
    (folder / "recipe").mkdir(exist_ok=True)
    (folder / "recipe/params.yaml").write_text(text)
    return run_hub(folder, hub, "--pin")


def test_pinning_writes_the_missing_revisions_and_nothing_else(fake_hub: FakeHub, tmp_path: Path) -> None:
    text = (ROOT / "recipes/llama-3-8b/params.yaml").read_text()
    fake_hub.repos.update({repo: {} for repo in REPOS.values()})
    done = pin(tmp_path, fake_hub, text)
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    assert lines == [f"assets.{name}: {repo.partition('/')[2]} {fake_hub.commit(repo)}" for name, repo in REPOS.items()]
    assert_message(last, "recipe/params.yaml", "9")

    pinned = (tmp_path / "recipe/params.yaml").read_text()
    changed = [(old, new) for old, new in zip(text.splitlines(), pinned.splitlines(), strict=True) if old != new]
    for (old, new), repo in zip(changed, REPOS.values(), strict=True):
        assert new.split() == old.replace("null", fake_hub.commit(repo)).split()
    assert params.validate(tmp_path / "recipe/params.yaml").assets.ranker.revision == fake_hub.commit(REPOS["ranker"])

    fake_hub.requested.clear()
    assert_message(pin(tmp_path, fake_hub, pinned).stdout, "recipe/params.yaml", "already pinned")
    assert fake_hub.requested == []
    assert (tmp_path / "recipe/params.yaml").read_text() == pinned


def test_pinning_adds_an_absent_revision_and_leaves_local_assets(fake_hub: FakeHub, tmp_path: Path) -> None:
    fake_hub.repos["datasets/some/rows"] = {}
    text = "# head\nassets:\n  policy: {repo: ./here}\n  prompts:  # tail\n    repo: some/rows\n    split: train\neta: null\n"
    assert pin(tmp_path, fake_hub, text).returncode == 0
    revision = f"    revision: {fake_hub.commit('datasets/some/rows')}\n"
    assert (tmp_path / "recipe/params.yaml").read_text() == text.replace("    split", f"{revision}    split")


def test_pinning_replaces_a_branch_by_its_commit(fake_hub: FakeHub, tmp_path: Path) -> None:
    fake_hub.repos["models/some/model"] = {}
    text = "assets:\n  policy: {repo: some/model, revision: main}\n"
    assert pin(tmp_path, fake_hub, text).returncode == 0
    pinned = text.replace("main", fake_hub.commit("models/some/model"))
    assert (tmp_path / "recipe/params.yaml").read_text() == pinned


def test_pinning_an_unknown_asset_writes_nothing(fake_hub: FakeHub, tmp_path: Path) -> None:
    fake_hub.repos["models/some/model"] = {}
    text = "assets:\n  policy: {repo: some/model, revision: null}\n  prompts: {repo: no/where}\n"
    done = pin(tmp_path, fake_hub, text)
    assert done.returncode == 1
    assert_message(done.stderr, "hub: error: ", "no/where", "params.yaml")
    assert (tmp_path / "recipe/params.yaml").read_text() == text


def test_the_model_of_a_pointer_is_fetched_on_another_machine(fake_hub: FakeHub, tmp_path: Path) -> None:
    fake_hub.repos["models/some/model"] = {"model.safetensors": b"weights", "config.json": b"{}"}
    files = {"model.safetensors": {"size": 7, "sha256": hashlib.sha256(b"weights").hexdigest()}}
    pointer = {"repo": "some/model", "revision": fake_hub.commit("models/some/model"), "repo_type": "model", "files": files}
    path = tmp_path / "recipe/data/policy" / pointers.NAME
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(pointer))
    done = run_hub(tmp_path, fake_hub, "--fetch")
    assert done.returncode == 0, done.stderr
    assert {name.rpartition("/")[2] for name in fake_hub.requested if "/resolve/" in name} == {"model.safetensors"}

    files["model.safetensors"]["sha256"] = "0" * 64
    path.write_text(json.dumps(pointer))
    done = run_hub(tmp_path, fake_hub, "--fetch")
    assert done.returncode == 1
    assert_message(done.stderr, "hub: error: ", "model.safetensors", "recipe/data/policy/pointer.json", "fetch")


def test_a_recipe_without_pointers_has_nothing_to_fetch(fake_hub: FakeHub, tmp_path: Path) -> None:
    done = run_hub(tmp_path, fake_hub, "--fetch")
    assert done.returncode == 1
    assert_message(done.stderr, "hub: error: ", "pointer.json", "recipe/data", "dvc pull")


@pytest.mark.parametrize("actions", [[], ["--pin", "--fetch"]])
def test_exactly_one_action_is_required(actions: list[str], tmp_path: Path) -> None:
    done = run_python(tmp_path, "-m", "stages.tools", "hub", *actions)
    assert done.returncode == 2
    assert_message(done.stderr, "--fetch")
