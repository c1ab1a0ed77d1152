"""The pipeline that evaluates existing models, run by DVC as users run it: its figures are those of the training pipeline."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from stages.tools.sync import EVALUATION
from support import figures
from support.checkout import list_run
from support.hub import serve
from support.messages import assert_message
from support.running import dvc, run_tool

pytestmark = pytest.mark.slowest

MODELS = ["base", "iter1"]
SHARED = ("seed", "numerics", "engine", "answer", "evaluate_alpaca", "evaluate_lm")
RANKER = {"repo": "../../data/ranker/PairRM", "base": {"repo": "../../data/ranker/base"}}


def make_recipe(folder: Path, models: dict[str, Any], answers: dict[str, str], rankers: dict[str, Any]) -> Path:
    """Give the recipe the settings of the miniature in `folder`, and return the recipe's folder."""
    recipe = folder / EVALUATION
    (recipe / ".dvcignore").unlink(missing_ok=True)
    training = YAML(typ="safe").load(folder / "params.yaml")
    assets = {key: training["assets"][key] for key in ("alpaca_eval", "harness")}
    rank = {key: training["rank"][key] for key in ("scale", "shard_size", "tokens_per_batch", "attention")}
    sections = {"models": models, "answers": answers, "rankers": rankers, "assets": assets, "rank": rank}
    document = {key: training[key] for key in SHARED} | sections
    YAML().dump(document, recipe / "params.yaml")
    return recipe


def load_metrics(folder: Path) -> dict[str, Any]:
    metrics: dict[str, Any] = json.loads((folder / "reports/metrics.json").read_text())
    return metrics


def load_comparison(folder: Path) -> dict[str, Any]:
    comparison: dict[str, Any] = json.loads((folder / EVALUATION / "data/alpaca_eval/pairrm/comparison.json").read_text())
    return comparison


@pytest.fixture(scope="module")
def checkout(smallest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of `smallest` whose recipe has evaluated its models and, as answers that existed already, iter1's. Its ranker has
    compared them."""
    folder = tmp_path_factory.mktemp("evaluation") / "sppo"
    shutil.copytree(smallest, folder, symlinks=True)
    outputs = json.loads((folder / "data/answers/iter1.json").read_text())
    models = {name: {"repo": f"../../data/models/{name}"} for name in MODELS}
    recipe = make_recipe(folder, models, {"theirs": "theirs.json"}, {"pairrm": RANKER})
    theirs = [row | {"generator": "their-model"} for row in reversed(outputs)]
    (recipe / "theirs.json").write_text(json.dumps(theirs))
    dvc(folder, "repro", f"{EVALUATION}/dvc.yaml")
    return folder


def test_the_figures_are_those_of_the_training_pipeline(checkout: Path) -> None:
    trained, evaluated = load_metrics(checkout), load_metrics(checkout / EVALUATION)
    del evaluated["rankers"]
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


def test_the_ranker_compares_every_model_with_every_other(checkout: Path) -> None:
    """Two models with the same answers win half of the time against each other, and equally often against a third."""
    comparison = load_comparison(checkout)
    assert (comparison["models"], comparison["n"]) == (["base", "iter1", "theirs"], 40)
    rates, errors = comparison["win_rates"], comparison["standard_errors"]
    base_to_iter1, iter1_to_base = rates[0][1], rates[1][0]
    assert base_to_iter1 + iter1_to_base == pytest.approx(100)
    assert base_to_iter1 != iter1_to_base
    assert rates[0][1:] == [base_to_iter1] * 2
    assert rates[1:] == [[iter1_to_base, 50, 50]] * 2
    assert errors[1:] == [[errors[1][0], 0, 0]] * 2
    assert errors[1][0] == pytest.approx(errors[0][1])
    assert errors[0][1] > 0
    text = (checkout / EVALUATION / "reports/alpaca_eval.md").read_text()
    assert figures.read_tables(text)[-1][1][2] == f"{base_to_iter1:.2f} ± {errors[0][1]:.2f}"
    metrics = load_metrics(checkout / EVALUATION)["rankers"]["pairrm"]
    assert [metrics[name] for name in comparison["models"]] == pytest.approx([row[0] for row in rates], rel=1e-5)
    provenance = (checkout / EVALUATION / "reports/provenance.md").read_text()
    assert "compare-answers@pairrm" in provenance
    assert "| pairrm | ../../data/ranker/PairRM, ../../data/ranker/base |" in provenance


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


def test_without_a_ranker_only_its_matrix_is_missing(checkout: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sppo"
    shutil.copytree(checkout, folder, symlinks=True)
    params = YAML(typ="safe").load(folder / EVALUATION / "params.yaml")
    make_recipe(folder, params["models"], params["answers"], {})
    ran = list_run(dvc(folder, "repro", f"{EVALUATION}/dvc.yaml"))
    assert ran == {f"{EVALUATION}/dvc.yaml:report-models"}
    with_ranker, without = ((place / EVALUATION / "reports/alpaca_eval.md").read_text() for place in (checkout, folder))
    assert with_ranker.partition("\n## Win rates according to pairrm\n")[0] == without
    assert load_metrics(checkout / EVALUATION).keys() - load_metrics(folder / EVALUATION).keys() == {"rankers"}


def test_models_from_a_hub_have_the_same_figures(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The models are served by a stand-in for the Hub, pinned, fetched into its cache, and evaluated from there, offline."""
    folder = tmp_path / "sppo"
    shutil.copytree(checkout, folder, symlinks=True)
    ranker = {"repo": "org/PairRM", "revision": None, "base": {"repo": "org/deberta", "revision": None}}
    make_recipe(folder, {name: {"repo": f"org/{name}", "revision": None} for name in MODELS}, {}, {"pairrm": ranker})
    with serve() as hub:
        places = {name: f"data/models/{name}" for name in MODELS} | {
            "PairRM": "data/ranker/PairRM",
            "deberta": "data/ranker/base",
        }
        for name, place in places.items():
            files = (checkout / place).iterdir()
            hub.repos[f"models/org/{name}"] = {path.name: path.read_bytes() for path in files}
        settings = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
        for variable, value in settings.items():
            monkeypatch.setenv(variable, value)
        pinned = run_tool(folder, "hub", "--pin", "--recipe", EVALUATION, PYTHONPATH="")
        assert pinned.returncode == 0, pinned.stderr
        params = YAML(typ="safe").load(folder / EVALUATION / "params.yaml")
        ranker = params["rankers"]["pairrm"]
        assets = [*params["models"].values(), ranker, ranker["base"]]
        assert [asset["revision"] for asset in assets] == [hub.commit(f"models/org/{name}") for name in places]
        ran = list_run(dvc(folder, "repro", f"{EVALUATION}/dvc.yaml"))
    assert {f"{EVALUATION}/dvc.yaml:{stage}@{name}" for stage in ("assets-model", "answer") for name in MODELS} <= ran
    assert [path.name for path in (folder / EVALUATION / "data/models/iter1").iterdir()] == ["pointer.json"]
    trained, evaluated = load_metrics(folder), load_metrics(folder / EVALUATION)
    del evaluated["rankers"]
    assert evaluated == {key: trained[key] for key in evaluated}
    pair = [row[:2] for row in load_comparison(checkout)["win_rates"][:2]]
    assert load_comparison(folder)["win_rates"] == [pytest.approx(row, rel=1e-9) for row in pair]
    fetched = run_tool(folder, "hub", "--fetch", "--recipe", EVALUATION, PYTHONPATH="", HF_HUB_OFFLINE="1")
    assert fetched.returncode == 0, fetched.stderr
    revision = hub.commit("models/org/iter1")
    assert f"org/iter1@{revision}" in (folder / EVALUATION / "reports/provenance.md").read_text().replace("\\", "")
