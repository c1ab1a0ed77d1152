import argparse
import json
from io import StringIO
from pathlib import Path

import pandas as pd
import pytest

from stages import report
from stages.reporting import charts
from stages.runtime.paths import ROOT
from support.plots import load_plots
from support.reports import ALPACA, ITEMS, read_rows, write_evaluations, write_iteration, write_provenance
from support.running import set_params


def write_reports(folder: Path, published: Path) -> dict[str, str]:
    """Run the stage on a data folder of base and iter1, and return the reports' contents by name."""
    set_params(folder, {"iterations": {"iter1": "base"}})
    for write in (write_evaluations, write_iteration, write_provenance):
        write(folder / "data")
    parser = argparse.ArgumentParser()
    report.add_arguments(parser)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(charts, "bundle_vega", lambda: "")  # takes seconds
        report.main(parser.parse_args(["--data", "data", "--published", str(published), "--out", "reports"]))
    reports = folder / "reports"
    return {path.relative_to(reports).as_posix(): path.read_text() for path in reports.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_reports(tmp_path_factory.mktemp("reports"), ROOT / "published.yaml")


def test_the_reports_cover_every_model_and_iteration(reports: dict[str, str]) -> None:
    pages = ["alpaca_eval", "open_llm_leaderboard", "ranker", "health", "samples", "provenance"]
    plots = {Path(source).name for plot in load_plots().values() for source in plot["y"]}
    items = {"preferences.csv", "harness.csv", "metrics.json", "summary.json", "listings.json"}
    assert set(reports) == {f"{name}.md" for name in pages} | plots | items | {"index.html", "cards/iter1.md"}
    for name in ("alpaca_eval.md", "open_llm_leaderboard.md", "ranker.md"):
        assert [row[0] for row in read_rows(reports[name])[2:4]] == ["base", "iter1"]
    assert read_rows(reports["health.md"])[0] == ["metric", "iter1"]
    assert ["Who?", "base says so.", "iter1 says so."] in read_rows(reports["samples.md"])
    assert all(f'<section id="{name.replace("_", "-")}">' in reports["index.html"] for name in pages if name != "samples")
    assert "iter1 says so." in reports["index.html"]
    assert "[iter1](iter1.md) (this model)" in reports["cards/iter1.md"]


def test_the_metrics_are_those_of_the_pages(reports: dict[str, str]) -> None:
    metrics = json.loads(reports["metrics.json"])
    assert set(metrics) == {"alpaca_eval", "open_llm_leaderboard", "ranker", "training"}
    values = {key: value for key, value in ALPACA.items() if key not in ("n_total", "judge")}
    assert metrics["alpaca_eval"]["base"] == values | {"win_rate": 22.6543}
    assert metrics["alpaca_eval"]["iter1"].keys() == values.keys() | {"vs_base", "vs_previous"}
    assert metrics["open_llm_leaderboard"]["base"]["average"] == 50
    assert metrics["ranker"] == {"base": 50, "iter1": 60, "standard_errors": {"base": 0, "iter1": 1}}
    assert metrics["training"]["iter1"]["pairs"] == 1


def test_every_preference_and_score_is_written(reports: dict[str, str]) -> None:
    assert reports["preferences.csv"] == "index,base,iter1\n0,1.1,1.3\n1,1.35309,1.15309\n"
    rows = pd.read_csv(StringIO(reports["harness.csv"]))
    for name in ("base", "iter1"):
        expected = [
            (task, subtask, question, score)
            for task in ITEMS[name]
            for subtask, scores in sorted(ITEMS[name][task].items())
            for question, score in enumerate(scores)
        ]
        assert list(rows[["task", "subtask", "question", name]].itertuples(index=False, name=None)) == expected


def test_the_paired_differences_are_in_metrics_pages_and_html(reports: dict[str, str]) -> None:
    """iter1's preferences differ from the base policy's by 0.2 and -0.2, and its scores as ITEMS says."""
    metrics = json.loads(reports["metrics.json"])
    rates = pd.read_csv(StringIO(reports["preferences.csv"])).eval("100 * (iter1 - base)")
    expected = {
        "difference": 0,
        "standard_error": rates.sem(),
        "lower": -39.2,
        "upper": 39.2,
        "wins": 1,
        "losses": 1,
        "ties": 0,
    }
    for key in ("vs_base", "vs_previous"):
        assert metrics["alpaca_eval"]["iter1"][key] == pytest.approx(expected, abs=1e-9)
    scores = pd.read_csv(StringIO(reports["harness.csv"])).assign(
        difference=lambda frame: 100 * (frame["iter1"] - frame["base"])
    )
    errors = scores.groupby(["task", "subtask"])["difference"].sem().groupby("task").agg(lambda x: (x**2).sum() ** 0.5 / len(x))
    tasks = metrics["open_llm_leaderboard"]["iter1"]["vs_previous"]
    assert {task: value["standard_error"] for task, value in tasks.items() if task != "average"} == pytest.approx(
        errors.to_dict(), rel=1e-5
    )
    assert tasks["average"]["standard_error"] == pytest.approx((errors**2).sum() ** 0.5 / 6, rel=1e-5)
    assert all(value["difference"] == pytest.approx(0, abs=1e-9) for value in tasks.values())
    row = ["iter1", "base", "+0.00", "20.00", "-39.20 to +39.20", "1", "1", "0"]
    assert row in read_rows(reports["alpaca_eval.md"])
    assert reports["index.html"].count("<h3>Paired differences</h3>") == 2
    assert "-39.20 to +39.20" in reports["index.html"]


def test_the_plots_data_have_the_columns_that_the_plots_name(reports: dict[str, str]) -> None:
    tables = {name: pd.read_csv(StringIO(text)) for name, text in reports.items() if name.endswith(".csv")}
    for plot in load_plots().values():
        ((source, y),) = plot["y"].items()
        assert {plot["x"], y} <= set(tables[Path(source).name].columns)
    win_rate = tables["win_rate.csv"].iloc[0]
    assert win_rate.to_dict() == {"model": "base", "win_rate": 22.6543, "lower": 19.9103, "upper": 25.3983}
    assert set(tables["probabilities.csv"]["response"]) == {"chosen", "rejected"}


def test_published_results_are_compared_with(tmp_path: Path) -> None:
    reports = write_reports(tmp_path, ROOT / "recipes/llama-3-8b/published.yaml")
    for name in ("alpaca_eval.md", "open_llm_leaderboard.md"):
        assert [row for row in read_rows(reports[name]) if "published" in row]
