"""Pointers lead to complete snapshots in the Hub cache, and models are validated before they are loaded."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from stages.artifacts import pointers
from stages.runtime.errors import StageError
from stages.runtime.paths import ROOT
from support import models
from support.messages import assert_message

REVISION = "0123456789" * 4
POINTER = {
    "repo": "some/model",
    "revision": REVISION,
    "repo_type": "model",
    "files": {"config.json": {"size": 2, "sha256": "-"}, "model.safetensors": {"size": 7, "sha256": "-"}},
}


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    """A folder with a pointer, and the snapshot it stands for in a Hub cache beside it."""
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / pointers.NAME).write_text(json.dumps(POINTER))
    snapshot = snapshot_of(tmp_path)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot / "model.safetensors").write_text("weights")
    return tmp_path / "policy"


def snapshot_of(folder: Path) -> Path:
    return folder / "hf" / "hub" / "models--some--model" / "snapshots" / REVISION


def resolve(policy: Path, environment: str = "main") -> str:
    """Return the result of `pointers.resolve`, or its message, in an environment: their huggingface-hub differ."""
    code = (
        "from pathlib import Path; from stages.artifacts import pointers; from stages.runtime.errors import StageError\n"
        f"try: print(pointers.resolve(Path({str(policy)!r})))\nexcept StageError as error: print('error:', error)"
    )
    python = Path(sys.prefix).parent / environment / "bin" / "python"
    settings = {"PYTHONPATH": str(ROOT), "HF_HOME": str(policy.parent / "hf"), "HF_ENDPOINT": "http://127.0.0.1:9"}
    others = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run([python, "-c", code], env=others | settings, capture_output=True, text=True, check=True)
    return done.stdout.rstrip("\n")


def test_a_folder_without_a_pointer_is_returned_itself(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert pointers.resolve(tmp_path) == tmp_path
    with pytest.raises(StageError) as error:
        pointers.resolve(tmp_path / "none")
    assert_message(str(error.value), f"{tmp_path}/none is missing", "check the path")


@pytest.mark.slow
@pytest.mark.parametrize("environment", ["main", "rank", "harness"])
def test_a_pointer_leads_to_its_snapshot_in_every_environment(policy: Path, environment: str) -> None:
    assert resolve(policy, environment) == str(snapshot_of(policy.parent))


@pytest.mark.slow
@pytest.mark.parametrize("environment", ["main", "rank"])
def test_a_missing_snapshot_is_reported_with_both_remedies(policy: Path, environment: str) -> None:
    snapshot_of(policy.parent).rename(policy.parent / "hf" / "elsewhere")
    assert_message(
        resolve(policy, environment),
        f"error: {policy}: some/model at {REVISION}",
        "Hub cache",
        "`python -m stages.tools hub --fetch --recipe RECIPE`",
        "`dvc repro --force --single-item STAGE`",
    )


def test_the_files_of_a_ranker_are_its_pointers_and_what_they_point_to(policy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(policy.parent / "hf" / "hub"))
    ranker, weights = policy.parent / "ranker", policy.parent / "weights"
    shutil.copytree(policy, ranker / "PairRM")
    (ranker / "base").mkdir()
    weights.write_text("")
    (ranker / "base" / "config.json").symlink_to(weights)
    snapshot = snapshot_of(policy.parent)
    expected = [
        ranker / "PairRM" / "pointer.json",
        ranker / "base" / "config.json",
        snapshot / "config.json",
        snapshot / "model.safetensors",
    ]
    assert pointers.list_files(ranker) == expected
    assert pointers.list_files(weights) == [weights]


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (Path.unlink, ["is missing", "hub --fetch"]),
        (lambda path: path.write_text("weigh"), ["5 bytes", "expected 7", "remove it", "hub --fetch"]),
    ],
)
def test_an_incomplete_snapshot_is_rejected(policy: Path, change: Callable[[Path], object], parts: list[str]) -> None:
    weights = snapshot_of(policy.parent) / "model.safetensors"
    change(weights)
    assert_message(resolve(policy), f"error: {weights} ", *parts)


@pytest.mark.parametrize(
    ("pointer", "parts"),
    [
        ([], ["repo, repo_type, revision"]),
        ({}, ["repo, repo_type, revision"]),
        (POINTER | {"more": 1}, ["repo, repo_type, revision"]),
        ({key: value for key, value in POINTER.items() if key != "revision"}, ["repo, repo_type, revision"]),
        (POINTER | {"files": {}}, ["files"]),
        (POINTER | {"files": []}, ["files"]),
        (POINTER | {"files": {"config.json": {"size": 2}}}, ["files.config.json", "size and sha256"]),
        (POINTER | {"files": {"../config.json": {"size": 2, "sha256": "-"}}}, ["files.../config.json"]),
        (POINTER | {"files": {"..": {"size": 2, "sha256": "-"}}}, ["files..."]),
        (POINTER | {"files": {"": {"size": 2, "sha256": "-"}}}, ["files."]),
        (POINTER | {"files": {"a\0b": {"size": 2, "sha256": "-"}}}, ["files.a"]),
        (POINTER | {"files": {"a": {"size": "2", "sha256": "-"}}}, ["files.a", "size and sha256"]),
        (POINTER | {"files": {"a": {"size": 2, "sha256": None}}}, ["files.a", "size and sha256"]),
        (POINTER | {"files": {"a": [2, "-"]}}, ["files.a", "size and sha256"]),
        (POINTER | {"repo": "../model"}, ["repo is '../model'"]),
        (POINTER | {"repo": "/etc"}, ["repo is '/etc'"]),
        (POINTER | {"repo": ["some/model"]}, ["repo is ['some/model']"]),
        (POINTER | {"repo_type": "space"}, ["repo_type is 'space'"]),
        (POINTER | {"revision": "main"}, ["revision is 'main'"]),
        (POINTER | {"revision": "../../elsewhere"}, ["revision is '../../elsewhere'"]),
        (POINTER | {"revision": None}, ["revision is None"]),
    ],
)
def test_an_invalid_pointer_is_rejected(policy: Path, pointer: object, parts: list[str]) -> None:
    (policy / pointers.NAME).write_text(json.dumps(pointer))
    with pytest.raises(StageError) as error:
        pointers.resolve(policy)
    assert_message(str(error.value), f"{policy}/{pointers.NAME}: ", *parts, "`dvc repro`")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.make_model(tmp_path_factory.mktemp("original") / "model")


@pytest.fixture
def model(original: Path, tmp_path: Path) -> Path:
    """A model to corrupt."""
    shutil.copytree(original, tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("corrupt", "parts"),
    [
        (models.truncate_weights, ["model.safetensors is corrupted", "recreate it", "`make verify`"]),
        (models.flip_header_bit, ["model.safetensors is corrupted", "recreate it", "`make verify`"]),
        (models.pickle_weights, ["no weights as .safetensors", "convert them once"]),
        (models.lose_a_shard, ["model-00002-of-", "is missing"]),
        (models.remove_config, ["no config.json", "recreate it"]),
        (models.truncate_config, ["config.json: not valid JSON", "recreate the file"]),
        (models.rename_architecture, ["configuration or tokenizer", "ValueError", "check that config.json"]),
        (models.require_code, ["code of its own", "supports natively"]),
        (models.remove_tokenizer, ["configuration or tokenizer", "tokenizer.json or tokenizer.model"]),
        (models.add_token, ["token IDs up to ", " embeddings", "the model's own tokenizer"]),
    ],
)
def test_a_corrupted_model_is_rejected_before_it_is_loaded(
    model: Path, corrupt: Callable[[Path], object], parts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model.parent)
    assert pointers.check_model(model) == model
    corrupt(model)
    with pytest.raises(StageError) as error:
        pointers.check_model(model)
    assert_message(str(error.value), str(model), *parts)
    assert not (model.parent / "ran").exists()


NOT_WEIGHTS = [
    "../model.safetensors",
    "/model.safetensors",
    "sub/model.safetensors",
    "..",
    "",
    "pytorch_model.bin",
    "x\0.safetensors",
    5,
    None,
    ["model.safetensors"],
]


@pytest.mark.parametrize("name", NOT_WEIGHTS)
def test_an_index_names_weights_in_its_own_folder_only(tmp_path: Path, name: object) -> None:
    (tmp_path / "model.safetensors").write_text("another model's")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / pointers.INDEX).write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": name}}))
    with pytest.raises(StageError) as error:
        pointers.list_weights(folder)
    assert_message(str(error.value), f"{folder / pointers.INDEX}: weight_map: b: ", repr(name)[:20], "use another one")


@pytest.mark.parametrize("index", [[], {}, None, 5, {"weight_map": None}, {"weight_map": {}}, {"weight_map": ["a"]}])
def test_an_index_without_a_map_is_refused(tmp_path: Path, index: object) -> None:
    (tmp_path / pointers.INDEX).write_text(json.dumps(index))
    with pytest.raises(StageError) as error:
        pointers.list_weights(tmp_path)
    assert_message(str(error.value), f"{tmp_path / pointers.INDEX}: weight_map: ", "use another one")


def test_all_weights_are_listed(tmp_path: Path) -> None:
    assert pointers.list_weights(tmp_path) == ["model.safetensors"]
    (tmp_path / pointers.INDEX).write_text(json.dumps({"weight_map": {"a": "2.safetensors", "b": "1.safetensors"}}))
    assert pointers.list_weights(tmp_path) == ["1.safetensors", "2.safetensors"]
    (tmp_path / "model.safetensors").touch()
    assert pointers.list_weights(tmp_path) == ["1.safetensors", "2.safetensors", "model.safetensors"]


@pytest.mark.parametrize("config", [[], "x", 5, None])
def test_a_configuration_that_is_no_object_is_refused(model: Path, config: object) -> None:
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(StageError) as error:
        pointers.check_model(model)
    assert_message(str(error.value), f"{model / 'config.json'}: ", "JSON object")


def test_only_what_is_required_is_checked(model: Path) -> None:
    models.remove_tokenizer(model)
    assert pointers.check_model(model, tokenizer=False) == model
    models.truncate_weights(model)
    assert pointers.check_model(model, weights=False, tokenizer=False) == model


@pytest.mark.parametrize(("softcapping", "kernels"), [(50.0, ["eager"]), (None, [])])
def test_attention_is_capped_only_if_the_configuration_says_so(softcapping: float | None, kernels: list[str]) -> None:
    selected: list[str] = []
    config = SimpleNamespace(attn_logit_softcapping=softcapping)
    pointers.cap_attention(SimpleNamespace(config=config, set_attn_implementation=selected.append))
    assert selected == kernels
