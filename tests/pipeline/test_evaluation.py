"""The pipeline that evaluates existing models, run by DVC as users run it: its figures are those of the training pipeline."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from stages.tools.sync import EVALUATION
from support.checkout import list_run
from support.hub import serve
from support.messages import assert_message
from support.running import dvc, run_tool

pytestmark = pytest.mark.slow

MODELS = ["base", "iter1"]
SHARED = ("seed", "numerics", "engine", "answer", "evaluate_alpaca", "evaluate_lm")


def make_recipe(folder: Path, models: dict[str, Any], answers: dict[str, str]) -> Path:
    """Give the recipe the settings of the miniature in `folder`, and return the recipe's folder."""
    recipe = folder / EVALUATION
    training = YAML(typ="safe").load(folder / "params.yaml")
    assets = {key: training["assets"][key] for key in ("alpaca_eval", "harness")}
    document = {key: training[key] for key in SHARED} | {"models": models, "answers": answers, "assets": assets}
    YAML().dump(document, recipe / "params.yaml")
    return recipe


def load_metrics(folder: Path) -> dict[str, Any]:
    metrics: dict[str, Any] = json.loads((folder / "reports/metrics.json").read_text())
    return metrics


@pytest.fixture(scope="module")
def checkout(smallest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of `smallest` whose recipe has evaluated its models and, as answers that existed already, iter1's."""
    folder = tmp_path_factory.mktemp("evaluation") / "sppo"
    shutil.copytree(smallest, folder, symlinks=True)
    outputs = json.loads((folder / "data/answers/iter1.json").read_text())
    models = {name: {"repo": f"../../data/models/{name}"} for name in MODELS}
    recipe = make_recipe(folder, models, {"theirs": "theirs.json"})
    theirs = [row | {"generator": "their-model"} for row in reversed(outputs)]
    (recipe / "theirs.json").write_text(json.dumps(theirs))
    dvc(folder, "repro", f"{EVALUATION}/dvc.yaml")
    return folder


def test_the_figures_are_those_of_the_training_pipeline(checkout: Path) -> None:
    trained, evaluated = load_metrics(checkout), load_metrics(checkout / EVALUATION)
    assert set(evaluated) == {"alpaca_eval", "open_llm_leaderboard"}
    theirs = evaluated["alpaca_eval"].pop("theirs")
    assert evaluated == {key: trained[key] for key in evaluated}
    iter1 = trained["alpaca_eval"]["iter1"]
    assert theirs["vs_base"] == iter1["vs_base"]
    assert (theirs["win_rate"], theirs["avg_length"]) == (iter1["win_rate"], iter1["avg_length"])
    assert (theirs["vs_previous"]["difference"], theirs["vs_previous"]["ties"]) == (0, 40)
    for name in ("harness.csv", "win_rate.csv", "length.csv"):
        lines = (checkout / EVALUATION / "reports" / name).read_text().splitlines()
        assert [line for line in lines if not line.startswith("theirs")] == (
            checkout / "reports" / name
        ).read_text().splitlines()


def test_answers_and_judgements_are_the_same_bytes(checkout: Path) -> None:
    for name in MODELS:
        for path in (
            f"data/answers/{name}.json",
            f"data/alpaca_eval/{name}/annotations.json",
            f"data/harness/{name}/items.json",
        ):
            assert (checkout / EVALUATION / path).read_bytes() == (checkout / path).read_bytes()


def test_nothing_runs_twice_and_tools_apply(checkout: Path) -> None:
    assert list_run(dvc(checkout, "repro", f"{EVALUATION}/dvc.yaml")) == set()
    done = run_tool(checkout, "verify", "--recipe", EVALUATION, PYTHONPATH="")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no faults" in done.stdout
    assert "the reports regenerated" in done.stdout
    done = run_tool(checkout, "plan", "--recipe", EVALUATION, PYTHONPATH="")
    assert (done.returncode, "Nothing would run" in done.stdout) == (0, True)
    done = run_tool(checkout, "recipe", "new", "--recipe", EVALUATION, PYTHONPATH="")
    assert done.returncode == 1
    assert_message(done.stderr, f"{EVALUATION}/params.yaml", "evaluates existing models", "docs/reproducing.md")


@pytest.mark.slowest
def test_models_from_a_hub_have_the_same_figures(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The models are served by a stand-in for the Hub, pinned, fetched into its cache, and evaluated from there, offline."""
    folder = tmp_path / "sppo"
    shutil.copytree(checkout, folder, symlinks=True)
    make_recipe(folder, {name: {"repo": f"org/{name}", "revision": None} for name in MODELS}, {})
    with serve() as hub:
        for name in MODELS:
            files = (checkout / "data/models" / name).iterdir()
            hub.repos[f"models/org/{name}"] = {path.name: path.read_bytes() for path in files}
        settings = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
        for variable, value in settings.items():
            monkeypatch.setenv(variable, value)
        pinned = run_tool(folder, "hub", "--pin", "--recipe", EVALUATION, PYTHONPATH="")
        assert pinned.returncode == 0, pinned.stderr
        models = YAML(typ="safe").load(folder / EVALUATION / "params.yaml")["models"]
        assert {name: asset["revision"] for name, asset in models.items()} == {
            name: hub.commit(f"models/org/{name}") for name in MODELS
        }
        ran = list_run(dvc(folder, "repro", f"{EVALUATION}/dvc.yaml"))
    assert {f"{EVALUATION}/dvc.yaml:{stage}@{name}" for stage in ("assets-model", "answer") for name in MODELS} <= ran
    assert [path.name for path in (folder / EVALUATION / "data/models/iter1").iterdir()] == ["pointer.json"]
    trained, evaluated = load_metrics(folder), load_metrics(folder / EVALUATION)
    assert evaluated == {key: trained[key] for key in evaluated}
    fetched = run_tool(folder, "hub", "--fetch", "--recipe", EVALUATION, PYTHONPATH="", HF_HUB_OFFLINE="1")
    assert fetched.returncode == 0, fetched.stderr
    revision = hub.commit("models/org/iter1")
    assert f"org/iter1@{revision}" in (folder / EVALUATION / "reports/provenance.md").read_text().replace("\\", "")
