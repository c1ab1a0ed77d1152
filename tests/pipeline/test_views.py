"""What DVC shows of the results: `dvc exp show` in 80 columns, plots that a browser draws, and no recipe that was never run."""

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from dvc.cli import main as dvc
from dvc.repo import Repo
from ruamel.yaml import YAML

from stages.reporting import results
from stages.reporting.published import TASKS
from stages.runtime.paths import ROOT
from stages.tools import sync
from support.browser import launch, open_page
from support.revisions import commit, git

RECIPES = sorted(path.parent for path in ROOT.glob("recipes/*/dvc.yaml"))
SCRIPTS = "https://cdn.jsdelivr.net/npm/"
"""Where DVC's HTML loads Vega from."""


def make_metrics(**last: Any) -> dict[str, Any]:
    """Make the content of metrics.json, before rounding, of two models; last: what iter1 has instead."""
    alpaca = {"win_rate": 61.23456, "standard_error": 1.0932, "avg_length": 44, "vs_base": {"difference": -1.23456}} | last
    harness = dict.fromkeys(TASKS, 40.0) | {"average": 40.125, "average_weighted": 41.0}
    return {
        "alpaca_eval": {"base": {"win_rate": 50.0, "standard_error": 1.0, "avg_length": 52}, "iter1": alpaca},
        "open_llm_leaderboard": {"base": harness | {"average": 30.0}, "iter1": harness},
        "training": {"iter1": {"kl": 0.0012345}},
    }


def test_the_summary_has_the_last_models_figures_rounded_as_in_the_tables() -> None:
    summary = results.summarize(make_metrics())
    expected = {"win_rate": 61.23, "se": 1.09, "vs_base": -1.23, "kl": 0.00123, "length": 44, "harness": 40.12}
    assert list(summary.items()) == list(expected.items())  # in this order: DVC's columns


def test_the_length_controlled_win_rate_comes_first() -> None:
    summary = results.summarize(make_metrics(length_controlled_winrate=38.776, lc_standard_error=1.5))
    assert next(iter(summary.items())) == ("lc_win_rate", 38.78)
    assert len(summary) <= 8


def test_what_an_experiment_does_not_have_is_left_out() -> None:
    """A single existing model, evaluated on one task: no training, nothing to compare with, no average of six."""
    metrics = make_metrics()
    del metrics["training"], metrics["alpaca_eval"]["iter1"]
    metrics["open_llm_leaderboard"]["base"] = {"gsm8k": 80.0, "average": 80.0}
    assert results.summarize(metrics) == {"win_rate": 50, "se": 1, "length": 52}
    del metrics["open_llm_leaderboard"]["base"]
    assert results.summarize(metrics) == {"win_rate": 50, "se": 1, "length": 52}


@pytest.mark.parametrize("folder", [ROOT, *RECIPES], ids=lambda path: path.name)
def test_the_summary_is_what_dvc_shows(folder: Path) -> None:
    assert YAML(typ="safe").load(folder / "dvc.yaml")["metrics"] == [f"reports/{results.SUMMARY}"]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_dvc_sees_a_recipe_only_if_it_has_been_run(recipe: Path) -> None:
    """Otherwise every command of DVC reports missing results, and some fail. The file says how to run the recipe."""
    ignore = recipe / ".dvcignore"
    assert ignore.exists() != (recipe / "dvc.lock").exists()
    if ignore.exists():
        assert f"`rm {ignore.relative_to(ROOT)}`" in ignore.read_text(encoding="utf-8")


def test_deleting_the_file_shows_the_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / sync.EVALUATION
    recipe.mkdir(parents=True)
    (tmp_path / "dvc.yaml").write_text("stages: {one: {cmd: 'true'}}\n")
    for name in (".dvcignore", "dvc.yaml", "params.yaml"):
        shutil.copyfile(ROOT / sync.EVALUATION / name, recipe / name)
    Repo.init(str(tmp_path), no_scm=True)
    assert [stage.name for stage in Repo(str(tmp_path)).index.stages] == ["one"]
    (recipe / ".dvcignore").unlink()
    assert len(Repo(str(tmp_path)).index.stages) > 10


@pytest.fixture
def experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with the committed results, and, not committed, those of another eta with a loss 10000 times as large."""
    folder = tmp_path / "repository"
    shutil.copytree(ROOT / ".dvc/plots", folder / ".dvc/plots")
    (folder / "reports").mkdir()
    for name in [".dvc/config", "params.yaml", *[f"reports/{path.name}" for path in ROOT.glob("reports/*.csv")]]:
        shutil.copyfile(ROOT / name, folder / name)
    pipeline = YAML(typ="safe").load(ROOT / "dvc.yaml")
    (folder / "dvc.yaml").write_text(json.dumps({key: pipeline[key] for key in ("metrics", "plots")}))
    summary = results.summarize(make_metrics())
    (folder / "reports" / results.SUMMARY).write_text(json.dumps(summary))
    git(folder, "init", "-q", "-b", "main")
    (folder / ".gitignore").write_text("/.dvc/tmp\n/.dvc/cache\n")
    commit(folder, "run")
    (folder / "reports" / results.SUMMARY).write_text(json.dumps(summary | {"win_rate": 71.25}))
    params = (folder / "params.yaml").read_text(encoding="utf-8")
    (folder / "params.yaml").write_text(params.replace("eta: 10 ", "eta: 1000 "), encoding="utf-8")
    log = folder / "reports/training.csv"
    pd.read_csv(log).assign(loss=lambda rows: rows["loss"] * 1e4).to_csv(log, index=False)
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.slow
def test_80_columns_answer_which_experiment_is_better(experiment: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert dvc(["exp", "show"]) == 0
    lines = [line[:80] for line in capfd.readouterr().out.splitlines()]
    (header,) = [line for line in lines if "Experiment" in line]
    assert header.split() == ["Experiment", "Created", "win_rate", "se", "vs_base", "kl", "length", "harness"]
    rows = {line.split()[0]: line.split() for line in lines if line.split()[:1] in (["workspace"], ["main"])}
    assert rows["workspace"][-6:] == ["71.25", "1.09", "-1.23", "0.00123", "44", "40.12"]
    assert rows["main"][-6:] == ["61.23", "1.09", "-1.23", "0.00123", "44", "40.12"]
    assert dvc(["exp", "show", "--only-changed", "--drop", ".*/"]) == 0
    assert "Experiment Created win_rate eta" in " ".join(capfd.readouterr().out.split())
    assert dvc(["metrics", "diff", "main"]) == 0
    assert [line.split()[1:] for line in capfd.readouterr().out.splitlines()[1:]] == [["win_rate", "61.23", "71.25", "10.02"]]


@pytest.mark.slow
def test_a_browser_draws_every_plot(experiment: Path) -> None:
    import vl_convert

    assert dvc(["plots", "diff", "main", "workspace", "--out", "drawn"]) == 0
    vega = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    scripts = {f"{SCRIPTS}vega-embed@": vega, SCRIPTS: ""}
    with launch() as browser, open_page(browser, experiment / "drawn/index.html", responses=scripts) as (page, complaints):
        names = [name for plot in json.loads(Path("dvc.yaml").read_text(encoding="utf-8"))["plots"] for name in plot]
        page.wait_for_function(f"document.querySelectorAll('canvas, svg.marks').length >= {len(names)}", timeout=60_000)
        drawn = page.evaluate("[...document.querySelectorAll('div.vega-embed')].map(plot => plot.id)")
        assert sorted(drawn) == sorted(name.replace(" ", "_") for name in names)
        # Vega-Embed comments on the version in `$schema`, also for DVC's own templates.
        assert [text for text in complaints if " spec uses Vega" not in text] == []
    text = (experiment / "drawn/index.html").read_text(encoding="utf-8")
    assert text.count('"rev": "main"') == text.count('"rev": "workspace"') > 0
