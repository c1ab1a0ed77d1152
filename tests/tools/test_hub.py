"""Pinning revisions and golden token IDs, and fetching models, against a small Hub on this machine."""

import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from stages.artifacts import pointers
from stages.runtime import params
from stages.runtime.paths import ROOT
from stages.tools.hub import GOLDEN_PROMPTS
from support.hub import FakeHub, run_python
from support.messages import assert_message
from support.models import make_model

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


POLICY = "models/meta-llama/Meta-Llama-3-8B-Instruct"
GOLDEN = "    golden: [{text: Hi, ids: [1, 2]}]\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a small model: name -> contents."""
    folder = make_model(tmp_path_factory.mktemp("model"))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def read_recipe(hub: FakeHub) -> str:
    """Return params.yaml of recipes/llama-3-8b, its policy at the revision that the fake Hub has."""
    text = (ROOT / "recipes/llama-3-8b/params.yaml").read_text(encoding="utf-8")
    return text.replace("e1945c40cd546c78e41f1151f4db032b271faeaa", hub.commit(POLICY))


def run_hub(folder: Path, hub: FakeHub, action: str) -> "subprocess.CompletedProcess[str]":
    return run_python(folder, "-m", "stages.tools", "hub", action, "--recipe", "recipe", endpoint=hub.endpoint)


def pin(folder: Path, hub: FakeHub, text: str) -> "subprocess.CompletedProcess[str]":
    (folder / "recipe").mkdir(exist_ok=True)
    (folder / "recipe/params.yaml").write_text(text)
    return run_hub(folder, hub, "--pin")


@pytest.mark.slow
def test_pinning_writes_the_missing_revisions_and_nothing_else(fake_hub: FakeHub, tmp_path: Path) -> None:
    revision = f"    revision: {fake_hub.commit(POLICY)}    # from mid-2024, closest to the published runs\n"
    text = read_recipe(fake_hub).replace(revision, revision + GOLDEN)
    assert GOLDEN in text
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


def write_golden(folder: Path, model: dict[str, bytes]) -> list[dict[str, Any]]:
    """Encode the golden chats, written out by hand, with the model's own tokenizer, whose files are put into `folder`."""
    from transformers import AutoTokenizer

    folder.mkdir()
    for name, data in model.items():
        (folder / name).write_bytes(data)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    head, tail = "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"
    chats = [f"{head}{prompt.strip()}{tail}<|start_header_id|>assistant<|end_header_id|>\n\n" for prompt in GOLDEN_PROMPTS]
    return [
        {"text": prompt, "ids": tokenizer(chat, add_special_tokens=False)["input_ids"]}
        for prompt, chat in zip(GOLDEN_PROMPTS, chats, strict=True)
    ]


@pytest.mark.slow
def test_pinning_writes_the_golden_token_ids_of_the_policys_tokenizer(
    fake_hub: FakeHub, tmp_path: Path, model: dict[str, bytes]
) -> None:
    """The weights are not fetched."""
    fake_hub.repos.update({repo: {} for repo in REPOS.values()} | {POLICY: model})
    text = read_recipe(fake_hub)
    done = pin(tmp_path, fake_hub, text)
    assert done.returncode == 0, done.stderr
    *_, golden, last = done.stdout.splitlines()
    assert_message(golden, "assets.policy", "5 chats")
    assert_message(last, "recipe/params.yaml", "9", "golden")
    assert not [path for path in fake_hub.requested if path.endswith(".safetensors")]

    pinned = params.validate(tmp_path / "recipe/params.yaml").assets.policy
    assert pinned.golden
    assert [row.model_dump() for row in pinned.golden] == write_golden(tmp_path / "local", model)

    lines = (tmp_path / "recipe/params.yaml").read_text(encoding="utf-8").splitlines()
    start = lines.index("    golden:")
    assert lines[start - 1].split()[:2] == ["revision:", fake_hub.commit(POLICY)]
    assert all(line.startswith("    - {text: ") for line in lines[start + 1 : start + 6])
    del lines[start : start + 6]
    assert len(lines) == len(text.splitlines()), "nothing else is added"

    fake_hub.requested.clear()
    assert_message(run_hub(tmp_path, fake_hub, "--pin").stdout, "recipe/params.yaml", "already pinned")
    assert fake_hub.requested == []


@pytest.mark.slow
def test_a_policy_whose_tokenizer_cannot_be_read_pins_nothing(
    fake_hub: FakeHub, tmp_path: Path, model: dict[str, bytes]
) -> None:
    fake_hub.repos["models/some/model"] = {name: data for name, data in model.items() if not name.startswith("tokenizer")}
    text = "assets:\n  policy: {repo: some/model, revision: null}\n"
    done = pin(tmp_path, fake_hub, text)
    assert done.returncode == 1
    assert_message(done.stderr, "hub: error: ", "tokenizer")
    assert (tmp_path / "recipe/params.yaml").read_text() == text


@pytest.mark.slow
def test_the_models_of_an_evaluation_are_pinned(fake_hub: FakeHub, tmp_path: Path, model: dict[str, bytes]) -> None:
    """Each on the Hub gets its commit and, unless it has them, its golden token IDs; a directory gets neither."""
    fake_hub.repos |= {"models/some/model": model, "models/other/model": {}}
    golden = [{"text": "Hi", "ids": [1, 2]}]
    models = {
        "base": {"repo": "./here"},
        "iter1": {"repo": "some/model", "revision": None},
        "iter2": {"repo": "other/model", "revision": None, "golden": golden},
    }
    done = pin(tmp_path, fake_hub, json.dumps({"models": models}))
    assert done.returncode == 0, done.stderr
    one, other = (fake_hub.commit(f"models/{name}/model") for name in ("some", "other"))
    assert done.stdout.splitlines()[:-1] == [
        f"models.iter1: some/model {one}",
        f"models.iter2: other/model {other}",
        "models.iter1: golden token IDs of 5 chats",
    ]
    assert YAML(typ="safe").load(tmp_path / "recipe/params.yaml")["models"] == {
        "base": {"repo": "./here"},
        "iter1": {"repo": "some/model", "revision": one, "golden": write_golden(tmp_path / "local", model)},
        "iter2": {"repo": "other/model", "revision": other, "golden": golden},
    }


@pytest.mark.slow
def test_the_rankers_of_an_evaluation_and_their_base_models_are_pinned(fake_hub: FakeHub, tmp_path: Path) -> None:
    fake_hub.repos |= {"models/org/PairRM": {}, "models/org/deberta": {}}
    text = "rankers:\n  pairrm: {repo: org/PairRM, revision: null, base: {repo: org/deberta, revision: null}}\n"
    done = pin(tmp_path, fake_hub, text)
    assert done.returncode == 0, done.stderr
    ranker = YAML(typ="safe").load(tmp_path / "recipe/params.yaml")["rankers"]["pairrm"]
    commits = [fake_hub.commit(f"models/org/{name}") for name in ("PairRM", "deberta")]
    assert [ranker["revision"], ranker["base"]["revision"]] == commits
    assert "golden" not in ranker, "rankers have no chat template"


@pytest.mark.slow
def test_pinning_adds_an_absent_revision_and_leaves_local_assets(fake_hub: FakeHub, tmp_path: Path) -> None:
    fake_hub.repos["datasets/some/rows"] = {}
    text = "# head\nassets:\n  policy: {repo: ./here}\n  prompts:  # tail\n    repo: some/rows\n    split: train\neta: null\n"
    assert pin(tmp_path, fake_hub, text).returncode == 0
    revision = f"    revision: {fake_hub.commit('datasets/some/rows')}\n"
    assert (tmp_path / "recipe/params.yaml").read_text() == text.replace("    split", f"{revision}    split")


@pytest.mark.slow
def test_pinning_replaces_a_branch_by_its_commit(fake_hub: FakeHub, tmp_path: Path) -> None:
    fake_hub.repos["models/some/model"] = {}
    text = "assets:\n  ranker: {repo: some/model, revision: main}\n"
    assert pin(tmp_path, fake_hub, text).returncode == 0
    pinned = text.replace("main", fake_hub.commit("models/some/model"))
    assert (tmp_path / "recipe/params.yaml").read_text() == pinned


@pytest.mark.slow
def test_pinning_an_unknown_asset_writes_nothing(fake_hub: FakeHub, tmp_path: Path) -> None:
    fake_hub.repos["models/some/model"] = {}
    text = "assets:\n  ranker: {repo: some/model, revision: null}\n  prompts: {repo: no/where}\n"
    done = pin(tmp_path, fake_hub, text)
    assert done.returncode == 1
    assert_message(done.stderr, "hub: error: ", "no/where", "params.yaml")
    assert (tmp_path / "recipe/params.yaml").read_text() == text


@pytest.mark.slow
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
