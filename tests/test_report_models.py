"""The reports on existing models. Values that `report` writes too are tested in tests/test_report_values.py."""

import argparse
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from stages import report_models
from stages.artifacts import files
from stages.reporting import charts
from stages.runtime.errors import StageError
from stages.runtime.paths import ROOT
from support import figures
from support.messages import assert_message
from support.plots import load_plots, name_source
from support.reports import ALPACA, HARNESS, QUESTIONS, RECORD, read_rows, write_evaluations
from support.running import set_params

RECIPE = ROOT / "recipes/miniature-published/params.yaml"
THEIRS = [1.5, 1.25]
"""The judge's preferences for the model of which only the answers exist."""
COMPARISON = {
    "models": ["base", "iter1", "theirs"],
    "win_rates": [[50, 40, 25], [60, 50, 30], [75, 70, 50]],
    "standard_errors": [[0, 1, 2], [1, 0, 3], [2, 3, 0]],
    "n": 2,
}


def write_data(data: Path) -> None:
    """Write the artifacts of base, iter1 and, as answers that existed already, theirs."""
    write_evaluations(data)
    (data / "comparison.json").unlink()
    rate = 100 * (sum(THEIRS) / 2 - 1)
    files.write_json(ALPACA | {"win_rate": rate}, data / "alpaca_eval/theirs/metrics.json")
    rows = [{"instruction": text, "preference": value} for text, value in zip(QUESTIONS, THEIRS, strict=True)]
    files.write_json(rows, data / "alpaca_eval/theirs/annotations.json")
    answers = [{"instruction": text, "output": "They say so, at length."} for text in QUESTIONS]
    files.write_json(answers, data / "answers/theirs.json")
    for name in ("models/base", "models/iter1", "alpaca_eval_set", "harness_sets"):
        (data / name).mkdir(parents=True)
        (data / name / "file").write_text(name)
    files.write_json(RECORD, data / "records/answer@iter1.json")


def run(folder: Path, **overrides: Any) -> None:
    """Run the stage in a folder with data/. overrides: of the recipe's params.yaml, with __ for dots."""
    models = {name: {"repo": f"./{name}"} for name in ("base", "iter1")}
    changes = {key.replace("__", "."): value for key, value in overrides.items()}
    defaults = {"models": models, "answers": {"theirs": "theirs.json"}, "rankers": {}}
    set_params(folder, defaults | changes, source=RECIPE)
    parser = argparse.ArgumentParser()
    report_models.add_arguments(parser)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(charts, "bundle_vega", lambda: "")  # takes seconds
        published = ROOT / "recipes/llama-3-8b/published.yaml"
        report_models.main(parser.parse_args(["--data", "data", "--published", str(published), "--out", "reports"]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report_models")
    write_data(folder / "data")
    run(folder)
    return folder


def test_the_reports_are_the_declared_ones(folder: Path) -> None:
    declared = {"alpaca_eval.md", "open_llm_leaderboard.md", "samples.md", "provenance.md", "metrics.json", "index.html"}
    items = {"preferences.csv", "harness.csv", "win_rate.csv", "length.csv", "summary.json", "listings.json"}
    assert {path.name for path in (folder / "reports").iterdir()} == declared | items
    html = (folder / "reports/index.html").read_text()
    assert html.count("<figure>") == 3
    assert "They say so, at length." in html
    sources = {name_source(plot) for plot in load_plots().values()}
    assert sources & items == {"win_rate.csv", "length.csv"}


def test_every_model_is_in_the_tables_and_compared_with_base_and_the_one_before(folder: Path) -> None:
    tables = figures.read_tables((folder / "reports/alpaca_eval.md").read_text())
    assert [row[0] for row in tables[0][1:]] == ["base", "iter1", "theirs"]
    assert [row[:2] for row in tables[1][1:]] == [["iter1", "base"], ["theirs", "base"], ["theirs", "iter1"]]
    assert {row[0] for row in tables[2][1:]} == {"base", "iter1"}, "what is published about these models"
    metrics = json.loads((folder / "reports/metrics.json").read_text())
    assert set(metrics) == {"alpaca_eval", "open_llm_leaderboard"}
    differences = 100 * pd.Series(THEIRS) - 100 * pd.Series([1.3, 1.15309])
    found = metrics["alpaca_eval"]["theirs"]["vs_previous"]
    assert found["difference"] == pytest.approx(differences.mean(), rel=1e-5)
    assert found["standard_error"] == pytest.approx(differences.sem(), rel=1e-5)
    header = (folder / "reports/preferences.csv").read_text().splitlines()[0]
    assert header == "index,base,iter1,theirs"


def test_the_harness_has_models_only_and_says_so(folder: Path) -> None:
    text = (folder / "reports/open_llm_leaderboard.md").read_text()
    tables = figures.read_tables(text)
    assert [row[0] for row in tables[0][1:]] == ["base", "iter1"]
    assert [row[:2] for row in tables[1][1:]] == [["iter1", "base"]]
    assert [row[1] for row in tables[2][1:]] == ["ours", "published", "difference"] * 2
    assert "only its answers exist: theirs." in text
    metrics = json.loads((folder / "reports/metrics.json").read_text())
    assert set(metrics["open_llm_leaderboard"]) == {"base", "iter1"}
    assert metrics["open_llm_leaderboard"]["iter1"]["vs_base"] == metrics["open_llm_leaderboard"]["iter1"]["vs_previous"]


def test_fewer_tasks_are_reported_as_such(tmp_path: Path) -> None:
    """Results of other tasks, which an earlier run has left, are ignored."""
    write_data(tmp_path / "data")
    for name in ("base", "iter1"):
        files.write_json({"gsm8k": HARNESS["gsm8k"], "mmlu": "old"}, tmp_path / f"data/harness/{name}/summary.json")
    run(tmp_path, evaluate_lm__tasks=["gsm8k"])
    text = (tmp_path / "reports/open_llm_leaderboard.md").read_text()
    assert read_rows(text)[0] == ["model", "gsm8k"]
    assert "**Only 1 of the 6 tasks**" in text
    metrics = json.loads((tmp_path / "reports/metrics.json").read_text())
    assert set(metrics["open_llm_leaderboard"]["base"]) == {"gsm8k", "standard_errors"}
    rows = (tmp_path / "reports/harness.csv").read_text().splitlines()
    assert {row.partition(",")[0] for row in rows[1:]} == {"gsm8k"}


def test_a_rankers_matrix_follows_the_judges_tables(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_data(tmp_path / "data")
    files.write_json(COMPARISON, tmp_path / "data/alpaca_eval/pairrm/comparison.json")
    files.write_json("weights", tmp_path / "data/models/pairrm/PairRM/x.json")
    run(tmp_path, rankers={"pairrm": {"repo": "./r", "base": {"repo": "./b"}}})
    assert not caplog.records, "pairrm belongs to a ranker in params.yaml"
    before, after = ((parent / "reports/alpaca_eval.md").read_text() for parent in (folder, tmp_path))
    assert after.startswith(before + "\n## Win rates according to pairrm\n")
    assert figures.read_tables(after)[-1][1:] == [
        ["base", "–", "40.00 ± 1.00", "25.00 ± 2.00"],
        ["iter1", "60.00 ± 1.00", "–", "30.00 ± 3.00"],
        ["theirs", "75.00 ± 2.00", "70.00 ± 3.00", "–"],
    ]
    before, after = (json.loads((parent / "reports/metrics.json").read_text()) for parent in (folder, tmp_path))
    errors = {"base": 0, "iter1": 1, "theirs": 2}
    assert after.pop("rankers") == {"pairrm": {"base": 50, "iter1": 60, "theirs": 75, "standard_errors": errors}}
    assert before == after
    assert "Win rates according to pairrm" in (tmp_path / "reports/index.html").read_text()


def test_a_matrix_of_other_models_stops_the_stage(tmp_path: Path) -> None:
    write_data(tmp_path / "data")
    files.write_json(COMPARISON | {"models": ["base", "theirs", "iter1"]}, tmp_path / "data/alpaca_eval/pairrm/comparison.json")
    with pytest.raises(StageError) as error:
        run(tmp_path, rankers={"pairrm": {"repo": "./r", "base": {"repo": "./b"}}})
    assert_message(
        str(error.value), "data/alpaca_eval/pairrm/comparison.json", "'models'", "base, iter1, theirs", "`dvc repro`"
    )


def test_a_model_without_results_stops_the_stage(tmp_path: Path) -> None:
    write_data(tmp_path / "data")
    (tmp_path / "data/answers/theirs.json").unlink()
    with pytest.raises(StageError) as error:
        run(tmp_path)
    assert_message(str(error.value), "data/answers/theirs.json", "missing", "`dvc repro`")
    assert not (tmp_path / "reports").exists()
