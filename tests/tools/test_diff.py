"""The page that compares two revisions, on commits of a repository with this one's parameters."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from markdown_it import MarkdownIt
from ruamel.yaml import YAML
from scipy import stats

from stages.runtime.errors import StageError
from stages.runtime.paths import ROOT
from stages.tools import diff, revisions
from support.messages import assert_message
from support.revisions import commit, commit_history, git, write_lock
from support.running import run_tool

HEAVY = {"torch", "pandas", "pyarrow", "pydantic", "transformers", "vllm"}


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repository")
    commit_history(folder)
    return folder


@pytest.fixture
def page(repository: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    return compare(repository, monkeypatch, "HEAD~1", "HEAD")


def compare(folder: Path, monkeypatch: pytest.MonkeyPatch, a: str, b: str, recipe: str = "") -> str:
    monkeypatch.chdir(folder)
    return diff.compare(revisions.read_revision(a, Path(recipe)), revisions.read_revision(b, Path(recipe)), Path(recipe))


def read_rows(page: str) -> list[list[str]]:
    """Return the cells of a page's tables."""
    return [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("|")]


def test_changed_parameters_are_side_by_side_and_escaped(page: str) -> None:
    assert ["eta", "10", "20"] in read_rows(page)
    assert ["evaluate\\_alpaca.judge", '"gold"', '"&lt;b&gt;\\|x"'] in read_rows(page)
    assert not [row for row in read_rows(page) if row[0].startswith("train.")]


def test_a_change_is_compared_with_both_errors_if_they_are_known(page: str) -> None:
    rows = read_rows(page)
    header = next(row for row in rows if row[0] == "metric")
    assert header[3:] == ["change", "its standard error", "beyond evaluation error", "beyond run-to-run noise"]
    independent = ["1.41 independent", "yes", "–"]
    assert ["alpaca\\_eval.iter1.win\\_rate", "60.00 ± 1.00", "65.00 ± 1.00", "+5.00", *independent] in rows
    unclear = ["5.66 independent", "no", "–"]
    assert ["open\\_llm\\_leaderboard.iter1.mmlu", "28.00 ± 4.00", "33.00 ± 4.00", "+5.00", *unclear] in rows
    assert ["alpaca\\_eval.iter1.avg\\_length", "45", "50", "+5", "–", "–", "–"] in rows
    assert ["training.iter1.kl", "0.125", "5.125", "+5", "–"] in rows
    assert "1 of 2 changes" in page
    assert "Run-to-run noise is not known" in page
    assert not [row for row in rows if "gsm8k" in row[0] or "standard" in row[0]]


PREFERENCES = [
    {"base": [1.1, 1.9, 1.5, 1.6, 1.3, 1.2], "iter1": [1.2, 1.95, 1.6, 1.6, 1.5, 1.4]},
    {"base": [1.1, 1.9, 1.5, 1.6, 1.3, 1.2], "iter1": [1.3, 1.96, 1.8, 1.7, 1.6, 1.4]},
]
"""Preferences at two revisions; iter1's are better at the second."""
SCORES = [[0, 1, 0, 1, 1, 0], [1, 1, 0, 1, 1, 0]]
"""iter1's scores for the six questions of gsm8k, and of two subjects of MMLU with three questions each."""
QUESTIONS = [("gsm8k", "gsm8k", index) for index in range(6)] + [("mmlu", name, index) for name in "ab" for index in range(3)]


def write_run(folder: Path, number: int, **hashes: str) -> None:
    """Write the reports and dvc.lock of run 0 or 1, computed by pandas. hashes: those of outputs below data/ in dvc.lock."""
    preferences = pd.DataFrame(PREFERENCES[number])
    scores = pd.DataFrame(QUESTIONS, columns=["task", "subtask", "question"])
    scores = scores.assign(base=[1, 0, 0, 1, 0, 0] * 2, iter1=SCORES[number] * 2)
    rates, difference = 100 * (preferences - 1), 100 * (preferences["iter1"] - preferences["base"])
    gsm8k = 100 * scores["iter1"][:6]
    metrics: dict[str, Any] = {
        "alpaca_eval": {
            name: {"win_rate": rates[name].mean(), "standard_error": rates[name].sem()} for name in ("base", "iter1")
        },
        "open_llm_leaderboard": {"iter1": {"gsm8k": gsm8k.mean(), "standard_errors": {"gsm8k": gsm8k.sem()}}},
        "training": {"iter1": {"kl": 1.0 + number}},
    }
    task = 100 * (scores["iter1"] - scores["base"])[:6]
    metrics["alpaca_eval"]["iter1"]["vs_base"] = {
        "difference": difference.mean(),
        "standard_error": difference.sem(),
        "lower": difference.mean() - 1.96 * difference.sem(),
        "upper": difference.mean() + 1.96 * difference.sem(),
        "wins": int((difference > 0).sum()),
        "losses": 0,
        "ties": int((difference == 0).sum()),
    }
    metrics["open_llm_leaderboard"]["iter1"]["vs_base"] = {"gsm8k": {"difference": task.mean(), "standard_error": task.sem()}}
    reports = folder / "reports"
    reports.mkdir(exist_ok=True)
    (reports / "metrics.json").write_text(json.dumps(metrics))
    preferences.reset_index().to_csv(reports / "preferences.csv", index=False)
    scores.to_csv(reports / "harness.csv", index=False)
    (folder / "params.yaml").write_text("iterations: {iter1: base}\nevaluate_alpaca: {judge: gold}\n")
    outs = {"alpaca_eval_set": "a" * 32, "harness_sets": "b" * 32, "reference_outputs.json": "c" * 32} | hashes
    stages = {name: {"outs": [{"path": f"data/{name}", "md5": md5}]} for name, md5 in outs.items()}
    write_lock(folder, stages)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with two runs, tagged `old` and `new`, and one of new's results on other data, `other`."""
    folder = tmp_path_factory.mktemp("runs")
    git(folder, "init", "-q", "-b", "main")
    for tag, number, hashes in (
        ("old", 0, {}),
        ("new", 1, {}),
        ("other", 1, {"alpaca_eval_set": "d" * 32, "harness_sets": "e" * 32, "reference_outputs.json": "f" * 32}),
    ):
        write_run(folder, number, **hashes)
        commit(folder, tag)
        git(folder, "tag", tag)
    figures = {
        "alpaca_eval.iter1.win_rate": [52.25, 50.0, 47.75],  # SD 2.25: two runs differ by up to 4.303 √2 2.25 = 13.69
        "alpaca_eval.iter1.vs_base.difference": [10.0, 10.5, 11.0],  # 0.5: up to 3.04
        "training.iter1.kl": [1.0, 1.0, 1.0],
    }
    git(folder, "checkout", "-q", "new")
    (folder / "reports/seeds.json").write_text(json.dumps({"seeds": [1, 2, 3], "figures": figures}))
    commit(folder, "seeds")
    git(folder, "tag", "measured")
    return folder


def find_row(page: str, metric: str) -> list[str]:
    (row,) = [row for row in read_rows(page) if row[0].replace("\\", "") == metric]
    return row


def test_changes_on_the_same_questions_have_paired_errors(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = compare(runs, monkeypatch, "old", "new")
    old, new = (np.array(run["iter1"]) for run in PREFERENCES)
    change = 100 * (new - old).mean()
    error = change / stats.ttest_rel(new, old).statistic
    assert find_row(page, "alpaca_eval.iter1.win_rate")[3:] == [f"{change:+.2f}", f"{error:.2f} paired", "yes", "–"]
    independent = math.hypot(100 * stats.sem(old), 100 * stats.sem(new))
    assert change < 1.96 * independent, "taken as independent, this change would not be significant"
    # The base policy's preferences are the same, so the change of the difference is that of iter1's win rate.
    assert find_row(page, "alpaca_eval.iter1.vs_base.difference")[3:5] == [f"{change:+.2f}", f"{error:.2f} paired"]
    assert find_row(page, "open_llm_leaderboard.iter1.gsm8k")[3:] == ["+16.67", "16.67 paired", "no", "–"]
    assert find_row(page, "open_llm_leaderboard.iter1.vs_base.gsm8k.difference")[3:5] == ["+16.67", "16.67 paired"]
    assert find_row(page, "alpaca_eval.iter1.vs_base.wins") == ["alpaca\\_eval.iter1.vs\\_base.wins", "5", "6", "+1", "–"]
    assert not [row for row in read_rows(page) if row[0].endswith(("lower", "upper"))]
    assert "2 of 4 changes" in page
    assert page.startswith(f"# Better in these runs: win rate of iter1 {change:+.2f} points\n")
    margin = stats.norm.ppf(0.975) * error
    assert f"{change - margin:+.2f} to {change + margin:+.2f} points, paired over 6 instructions" in page


def test_changes_on_other_questions_have_independent_errors(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = compare(runs, monkeypatch, "old", "other")
    error = math.hypot(*[100 * stats.sem(run["iter1"]) for run in PREFERENCES])
    assert find_row(page, "alpaca_eval.iter1.win_rate")[4:] == [f"{error:.2f} independent", "no", "–"]
    error = 100 * math.hypot(*[stats.sem(values) for values in SCORES])
    assert find_row(page, "open_llm_leaderboard.iter1.gsm8k")[4:] == [f"{error:.2f} independent", "no", "–"]
    assert "paired |" not in page
    assert page.startswith("# Not comparable: different instructions and reference outputs\n")


def test_a_missing_file_leaves_the_errors_independent(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git(tmp_path, "clone", "-q", str(runs), "clone")
    clone = tmp_path / "clone"
    git(clone, "checkout", "-q", "new")
    (clone / "reports/preferences.csv").unlink()
    page = compare(clone, monkeypatch, "old", "workspace")
    assert find_row(page, "alpaca_eval.iter1.win_rate")[4].endswith("independent")
    assert find_row(page, "open_llm_leaderboard.iter1.gsm8k")[4].endswith("paired")


@pytest.mark.parametrize(("a", "b"), [("old", "measured"), ("measured", "old")])
def test_changes_are_compared_with_the_noise_of_either_revision(
    a: str, b: str, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The change of about 8.5 points exceeds the evaluation's error; it exceeds the noise of the difference only."""
    page = compare(runs, monkeypatch, a, b)
    assert find_row(page, "alpaca_eval.iter1.win_rate")[-2:] == ["yes", "no"]
    assert find_row(page, "alpaca_eval.iter1.vs_base.difference")[-2:] == ["yes", "yes"]
    assert find_row(page, "open_llm_leaderboard.iter1.gsm8k")[-2:] == ["no", "–"]
    assert find_row(page, "training.iter1.kl")[-1] == "–", "all runs gave the same value"
    assert "1 of 2 changes are beyond run-to-run noise" in page
    assert "(reports/seeds.json at measured (" in page


def test_another_judge_is_named(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git(tmp_path, "clone", "-q", str(runs), "clone")
    git(tmp_path / "clone", "checkout", "-q", "new")
    (tmp_path / "clone/params.yaml").write_text("iterations: {iter1: base}\nevaluate_alpaca: {judge: gpt-4o}\n")
    page = compare(tmp_path / "clone", monkeypatch, "old", "workspace")
    assert page.startswith("# Not comparable: different judge (gold and gpt-4o)\n")


@pytest.mark.parametrize(
    ("name", "old", "new", "parts"),
    [
        ("preferences.csv", "1.95", "2.95", ["row 1", "'iter1'", "'2.95'", "`dvc repro`"]),
        ("harness.csv", "mmlu,a,1", "mmlu,a,2", ["row 7", "'question'", "`dvc repro`"]),
        ("seeds.json", "[1, 2, 3]", "[1]", ["'seeds'", "`make seeds`"]),
    ],
)
def test_an_odd_file_is_refused(
    name: str, old: str, new: str, parts: list[str], runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git(tmp_path, "clone", "-q", str(runs), "clone")
    path = tmp_path / "clone/reports" / name
    git(tmp_path / "clone", "checkout", "-q", "measured" if name == "seeds.json" else "old")
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    monkeypatch.chdir(tmp_path / "clone")
    with pytest.raises(StageError) as error:
        revisions.read_revision("workspace", Path())
    assert_message(str(error.value), name, "at workspace", *parts)


def test_everything_below_the_verdict_is_collapsed(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As GitHub renders it: Markdown in HTML, and no section within another."""
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(compare(runs, monkeypatch, "old", "measured"))
    top, *sections = html.split("<details>")
    assert [section.partition("</summary>")[0].partition("<summary>")[2].partition(":")[0] for section in sections] == [
        *["Metrics"] * 3,
        "Win rates of all models",
    ]
    assert [section.count("</details>") for section in sections] == [1] * 4
    assert (top.count("<table>"), top.count("<pre>"), html.count("<h1>")) == (1, 1, 1)
    assert "| ---" not in html
    assert html.startswith("<h1>Within noise: win rate of iter1 +8.50 points</h1>")


@pytest.mark.parametrize(
    ("stages", "parts"),
    [
        (None, ["'stages' is None"]),
        (["split"], ["'stages' is ['split']"]),
        ({"split": None}, ["stage 'split' is None"]),
        ({"split": {"outs": None}}, ["'outs' of stage split"]),
        ({"split": {"outs": [{"md5": "a"}]}}, ["'outs' of stage split"]),
        ({"split": {"outs": [{"path": "a", "md5": 1}]}}, ["'outs' of stage split"]),
        ({"split": {"outs": [], "deps": ["a"]}}, ["'deps' of stage split"]),
        ({"split": {"params": {"params.yaml": None}}}, ["'params' of stage split"]),
    ],
)
def test_an_odd_lock_is_named(stages: Any, parts: list[str]) -> None:
    with pytest.raises(StageError) as error:
        revisions.read_stages({"stages": stages}, "dvc.lock at HEAD")
    assert_message(str(error.value), "dvc.lock at HEAD", *parts, "`dvc repro`")


def test_the_committed_lock_is_read_as_it_is() -> None:
    lock = YAML(typ="safe").load(ROOT / "dvc.lock")
    assert revisions.read_stages(lock, "dvc.lock") == lock["stages"]
    assert revisions.read_stages({}, "dvc.lock") == {}


@pytest.mark.parametrize("value", [math.nan, math.inf, 10**400, -(10**400)], ids=["nan", "inf", "huge", "-huge"])
def test_a_number_that_no_metric_can_have_is_named(value: float) -> None:
    with pytest.raises(StageError) as error:
        revisions.read_metrics({"ranker": {"iter1": value}}, "metrics.json at HEAD")
    assert_message(str(error.value), "metrics.json at HEAD", "'ranker.iter1'", "`dvc repro`")
    others = {"a": {"b": 1, "c": "text", "d": None}, "e": True}
    assert revisions.read_metrics(others, "x") == {("a", "b"): 1, ("a", "c"): "text", ("a", "d"): None, ("e",): True}


PUBLISHED = """
published:
  models: {iter1: Theirs}
  alpaca_eval:
    source: a paper
    judge: gold
    models:
      iter1: {length_controlled_winrate: 50, win_rate: 45, standard_error: 3, avg_length: 1800}
  open_llm_leaderboard:
    source: a paper
    models:
      iter1: {gsm8k: 60}
"""


def test_published_results_are_compared_with_the_noise(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git(tmp_path, "clone", "-q", str(runs), "clone")
    clone = tmp_path / "clone"
    (clone / "published.yaml").write_text(PUBLISHED)
    for tag, known in (("new", False), ("measured", True)):
        git(clone, "checkout", "-q", tag)
        page = compare(clone, monkeypatch, "old", "workspace")
        assert ("<summary>Comparison with published results</summary>" in page) == known
    rows = read_rows(page.partition("Comparison with published results")[2].partition("</details>")[0])
    assert rows[0] == ["metric", "workspace", "published", "difference", "beyond evaluation error", "beyond run-to-run noise"]
    rates = 100 * (np.array(PREFERENCES[1]["iter1"]) - 1)
    ours = f"{rates.mean():.2f} ± {stats.sem(rates):.2f}"
    assert math.hypot(stats.sem(rates), 3) * 1.96 > rates.mean() - 45 > 13.69
    assert rows[2] == ["alpaca\\_eval.iter1.win\\_rate", ours, "45.00 ± 3.00", f"{rates.mean() - 45:+.2f}", "no", "yes"]
    assert rows[3] == ["open\\_llm\\_leaderboard.iter1.gsm8k", "66.67 ± 21.08", "60.00", "+6.67", "no", "–"]
    assert len(rows) == 4, "there is no LC win rate here to compare"


def test_artifacts_are_compared_by_their_hashes_in_the_lock(page: str) -> None:
    rows = read_rows(page)
    assert ["train@iter1", "data/models/iter1", "ccccccc", "fffffff"] in rows
    assert ["train@iter1", "data/logs/iter1\\_1.csv", "ddddddd", "fffffff"] in rows
    lines = [line.partition(": ") for line in page.splitlines()]
    stages = {title: names for title, _, names in lines if names}
    assert stages["Stages with different artifacts"] == "train@iter1."
    assert stages["New stages"] == "train@iter9."
    assert stages["Removed stages"] == "train@iter3."
    assert [title for title, names in stages.items() if names == "split." and "same artifacts" in title]


def test_a_page_without_changes_says_so(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = compare(repository, monkeypatch, "HEAD", "workspace")
    assert text.splitlines()[-1] == "No changes in parameters, metrics, artifacts."
    assert "<details>" not in text


def test_files_that_a_revision_lacks_are_named(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = compare(repository, monkeypatch, "HEAD~2", "main")
    assert "No reports/metrics.json at HEAD\\~2 (" in text
    assert "No dvc.lock at HEAD\\~2 (" in text
    assert ["alpaca\\_eval.base.win\\_rate", "–", "50.00 ± 1.00", "–", "–", "–", "–"] in read_rows(text)


def test_a_recipe_is_compared_by_its_own_files(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = compare(repository, monkeypatch, "HEAD~1", "HEAD", "recipes/llama-3-8b")
    assert [row for row in read_rows(text) if row[0] == "eta"] == [["eta", "1000", "500"]]
    assert text.startswith("# recipes/llama-3-8b: No verdict: no results at HEAD\\~1 (")
    assert "No reports/metrics.json at HEAD\\~1 (" in text


def test_an_unknown_revision_is_one_line(repository: Path) -> None:
    done = run_tool(repository, "diff", "nonesuch")
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (1, "", 1)
    assert_message(done.stderr, "diff: error: ", "'nonesuch'", "dvc exp show")


def test_the_traceback_of_an_error_is_shown_on_request(repository: Path) -> None:
    done = run_tool(repository, "diff", "nonesuch", SPPO_DEBUG="1")
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_a_file_that_is_not_yaml_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git(tmp_path, "init", "-q")
    (tmp_path / "dvc.lock").write_text("<<<<<<< HEAD\na: b\n=======\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StageError) as error:
        revisions.read_revision("workspace", Path())
    assert_message(str(error.value), "dvc.lock at workspace", "not valid YAML")


def test_a_folder_without_a_repository_is_refused(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository)
    with pytest.raises(StageError) as error:
        revisions.read_revision("HEAD", tmp_path)
    assert_message(str(error.value), str(tmp_path), "outside", "--recipe")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StageError) as error:
        revisions.read_revision("HEAD", Path())
    assert_message(str(error.value), str(tmp_path), "Git repository", "dvc.yaml")


@pytest.mark.slow
def test_the_page_can_be_written_to_a_file(repository: Path, page: str, tmp_path: Path) -> None:
    done = run_tool(repository, "diff", "HEAD~1", "HEAD", "--out", tmp_path / "page.md")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "page.md").read_text() == page
    assert run_tool(repository, "diff", "HEAD~1", "HEAD").stdout == page


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["diff", "means", "timings"])
def test_nothing_heavier_than_dvc_is_imported(tool: str) -> None:
    code = f"import sys, stages.tools.__main__, stages.tools.{tool}; print(*({HEAVY} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.slow
def test_an_experiment_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `dvc exp save` leaves it, outside every branch."""
    paths = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": paths, "DVC_NO_ANALYTICS": "1"}
    (tmp_path / "params.yaml").write_text("eta: 10\n")
    (tmp_path / "dvc.yaml").write_text("stages:\n  train: {cmd: cp params.yaml model, params: [eta], outs: [model]}\n")
    git(tmp_path, "init", "-q")
    for key in ("user.name", "user.email"):  # required by `dvc exp save`
        git(tmp_path, "config", key, "t@t")
    for command in (["init", "-q"], ["repro", "-q"]):
        subprocess.run(["dvc", *command], cwd=tmp_path, env=environment, check=True)
    commit(tmp_path, "run")
    (tmp_path / "params.yaml").write_text("eta: 30\n")
    subprocess.run(["dvc", "exp", "save", "-q", "-n", "larger"], cwd=tmp_path, env=environment, check=True)
    git(tmp_path, "checkout", "-q", ".")
    text = compare(tmp_path, monkeypatch, "HEAD", "larger")
    assert text.splitlines()[2].partition(" to ")[2].startswith("larger (")
    assert ["eta", "10", "30"] in read_rows(text)
