"""The page that compares two revisions, on commits of a repository with this one's parameters."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML

from stages.runtime.errors import StageError
from stages.runtime.paths import ROOT
from stages.tools import diff
from support.messages import assert_message
from support.revisions import commit, commit_history, git
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
    return diff.compare(diff.read_revision(a, Path(recipe)), diff.read_revision(b, Path(recipe)), Path(recipe))


def read_rows(page: str) -> list[list[str]]:
    """Return the cells of a page's tables."""
    return [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("|")]


def test_changed_parameters_are_side_by_side_and_escaped(page: str) -> None:
    assert ["eta", "10", "20"] in read_rows(page)
    assert ["evaluate\\_alpaca.judge", '"gold"', '"&lt;b&gt;\\|x"'] in read_rows(page)
    assert not [row for row in read_rows(page) if row[0].startswith("train.")]


def test_a_change_is_compared_with_noise_if_both_errors_are_known(page: str) -> None:
    rows = read_rows(page)
    assert ["alpaca\\_eval.iter1.win\\_rate", "60.00 ± 1.00", "65.00 ± 1.00", "+5.00", "yes"] in rows
    assert ["open\\_llm\\_leaderboard.iter1.mmlu", "28.00 ± 4.00", "33.00 ± 4.00", "+5.00", "no"] in rows
    assert ["alpaca\\_eval.iter1.avg\\_length", "45", "50", "+5", "–"] in rows
    assert ["training.iter1.kl", "0.125", "5.125", "+5"] in rows
    assert "1 of 2 changes" in page
    assert not [row for row in rows if "gsm8k" in row[0] or "standard" in row[0]]


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


def test_win_rates_and_lengths_of_both_are_drawn(page: str) -> None:
    assert page.count("```mermaid\nxychart-beta\n") == 2
    assert (
        '  x-axis ["base", "iter1"]\n  y-axis "win rate (%)" 0 --> 100\n  bar [50.00, 65.00]\n  line [50.00, 60.00]\n' in page
    )
    assert "  bar [52.00, 50.00]\n  line [52.00, 45.00]\n" in page


def test_the_page_names_the_plots_that_dvc_draws(page: str) -> None:
    names = [name for plot in YAML(typ="safe").load(ROOT / "dvc.yaml")["plots"] for name in plot]
    assert names
    assert not [name for name in names if name not in page]


def test_a_models_name_cannot_end_its_quotes_in_a_chart() -> None:
    def make_revision(rate: float) -> diff.Revision:
        models = {name: {"win_rate": rate} for name in ("base", 'x"]\n```\n<b>')}
        return diff.Revision("r", {}, diff.flatten({"alpaca_eval": models}), {})

    assert '["base", "x________b_"]' in diff.draw_charts(make_revision(1.0), make_revision(2.0))


def test_a_page_without_changes_says_so(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = compare(repository, monkeypatch, "HEAD", "workspace")
    assert text.splitlines()[2:] == ["No changes in parameters, metrics, artifacts."]


def test_files_that_a_revision_lacks_are_named(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = compare(repository, monkeypatch, "HEAD~2", "main")
    assert "No reports/metrics.json at HEAD\\~2 (" in text
    assert "No dvc.lock at HEAD\\~2 (" in text
    assert ["alpaca\\_eval.base.win\\_rate", "–", "50.00 ± 1.00", "–", "–"] in read_rows(text)


def test_a_recipe_is_compared_by_its_own_files(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = compare(repository, monkeypatch, "HEAD~1", "HEAD", "recipes/llama-3-8b")
    assert [row for row in read_rows(text) if row[0] == "eta"] == [["eta", "1000", "500"]]
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
        diff.read_revision("workspace", Path())
    assert_message(str(error.value), "dvc.lock at workspace", "not valid YAML")


def test_a_folder_without_a_repository_is_refused(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository)
    with pytest.raises(StageError) as error:
        diff.read_revision("HEAD", tmp_path)
    assert_message(str(error.value), str(tmp_path), "outside", "--recipe")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StageError) as error:
        diff.read_revision("HEAD", Path())
    assert_message(str(error.value), str(tmp_path), "Git repository", "dvc.yaml")


def test_the_page_can_be_written_to_a_file(repository: Path, page: str, tmp_path: Path) -> None:
    done = run_tool(repository, "diff", "HEAD~1", "HEAD", "--out", tmp_path / "page.md")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "page.md").read_text() == page
    assert run_tool(repository, "diff", "HEAD~1", "HEAD").stdout == page


@given(st.floats(-100, 100), st.floats(-100, 100), st.floats(0, 20), st.floats(0, 20))
def test_noise_is_the_two_sided_95_percent_of_both_errors(old: float, new: float, se_old: float, se_new: float) -> None:
    a, b = (
        diff.flatten({"alpaca_eval": {"m": {"win_rate": value, "standard_error": error}}})
        for value, error in ((old, se_old), (new, se_new))
    )
    z, limit = abs(new - old), 1.96 * math.sqrt(se_old**2 + se_new**2)
    if abs(z - limit) > 1e-9:
        assert diff.exceeds_noise(a, b, ("alpaca_eval", "m", "win_rate")) == (z > limit)


def test_noise_is_unknown_if_one_error_is() -> None:
    a = diff.flatten({"t": {"x": 1.0, "standard_errors": {"x": 0.1}}})
    assert diff.exceeds_noise(a, diff.flatten({"t": {"x": 2.0}}), ("t", "x")) is None
    assert diff.exceeds_noise(a, {}, ("t", "x")) is None


@pytest.mark.parametrize("tool", ["diff", "means", "timings"])
def test_nothing_heavier_than_dvc_is_imported(tool: str) -> None:
    code = f"import sys, stages.tools.__main__, stages.tools.{tool}; print(*({HEAVY} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


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
    assert text.splitlines()[0].partition(" to ")[2].startswith("larger (")
    assert ["eta", "10", "30"] in read_rows(text)
