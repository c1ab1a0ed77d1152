"""The page of what changed, on two commits of this repository's own files, and the workflows that make and post it."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML

from stages import diff
from stages.cli import ROOT, StageError

WORKFLOWS = ROOT / ".github/workflows"
ENVIRONMENT = os.environ | {
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "PYTHONPATH": str(ROOT),
    "DVC_NO_ANALYTICS": "1",
}


def git(folder: Path, *arguments: str) -> None:
    subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@t", *arguments], cwd=folder, check=True)


def commit(folder: Path, message: str) -> None:
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", message)


def metrics(shift: float) -> dict[str, Any]:
    """metrics.json: iter1 wins more by `shift`, its answers get longer, one task better; the other figures stay."""
    return {
        "alpaca_eval": {
            "base": {"win_rate": 50.0, "standard_error": 1.0, "avg_length": 52},
            "iter1": {"win_rate": 60.0 + shift, "standard_error": 1.0, "avg_length": 45 + shift},
        },
        "open_llm_leaderboard": {"iter1": {"mmlu": 28.0 + shift, "gsm8k": 1.0, "standard_errors": {"mmlu": 4.0, "gsm8k": 1.0}}},
        "training": {"iter1": {"kl": 0.125 + shift}},
    }


def step(workflow: str, name: str) -> str:
    """The shell script of a step."""
    jobs = YAML(typ="safe").load(WORKFLOWS / workflow)["jobs"].values()
    return next(step["run"] for job in jobs for step in job["steps"] if step.get("name") == name)


def run_step(folder: Path, script: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run it as GitHub does."""
    command = ["bash", "-e", "-c", script]
    return subprocess.run(command, cwd=folder, env=ENVIRONMENT | environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three commits: without results, with them, and with another eta, what that changes, and another recipe."""
    folder = tmp_path_factory.mktemp("repository")
    (folder / "recipes/llama-3-8b").mkdir(parents=True)
    (folder / "reports").mkdir()
    for name in ("params.yaml", "dvc.yaml", "recipes/llama-3-8b/params.yaml", "recipes/llama-3-8b/dvc.yaml"):
        shutil.copyfile(ROOT / name, folder / name)
    git(folder, "init", "-q", "-b", "main")
    commit(folder, "no results")
    (folder / "reports/metrics.json").write_text(json.dumps(metrics(0)))
    shutil.copyfile(ROOT / "dvc.lock", folder / "dvc.lock")
    commit(folder, "run")
    params = (folder / "params.yaml").read_text()
    (folder / "params.yaml").write_text(params.replace("eta: 10 ", "eta: 20 ").replace("judge: gold", "judge: <b>|x"))
    (folder / "reports/metrics.json").write_text(json.dumps(metrics(5)))
    lock = YAML(typ="safe").load(folder / "dvc.lock")
    stages = lock["stages"]
    for out in stages["train@iter1"]["outs"]:
        out["md5"] = "f" * 32
    stages["split"]["deps"][0]["md5"] = "e" * 32
    stages["train@iter9"] = stages.pop("train@iter3")
    with (folder / "dvc.lock").open("w") as file:
        YAML().dump(lock, file)
    recipe = folder / "recipes/llama-3-8b/params.yaml"
    recipe.write_text(recipe.read_text().replace("eta: 1000", "eta: 500"))
    commit(folder, "eta 20")
    return folder


@pytest.fixture
def page(repository: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    return between(repository, monkeypatch, "HEAD~1", "HEAD")


def between(folder: Path, monkeypatch: pytest.MonkeyPatch, a: str, b: str, recipe: str = "") -> str:
    monkeypatch.chdir(folder)
    return diff.page(diff.read(a, Path(recipe)), diff.read(b, Path(recipe)), Path(recipe))


def rows(page: str) -> list[list[str]]:
    """The cells of a page's tables."""
    return [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("|")]


def test_parameters_that_changed_stand_side_by_side_and_escaped(page: str) -> None:
    assert ["eta", "10", "20"] in rows(page)
    assert ["evaluate\\_alpaca.judge", '"gold"', '"&lt;b&gt;\\|x"'] in rows(page)
    assert sum(row[0].startswith("train.") for row in rows(page)) == 0


def test_metrics_are_told_from_noise_where_both_errors_are_known(page: str) -> None:
    assert ["alpaca\\_eval.iter1.win\\_rate", "60.00 ± 1.00", "65.00 ± 1.00", "+5.00", "yes"] in rows(page)
    assert ["open\\_llm\\_leaderboard.iter1.mmlu", "28.00 ± 4.00", "33.00 ± 4.00", "+5.00", "no"] in rows(page)
    assert ["alpaca\\_eval.iter1.avg\\_length", "45", "50", "+5", "–"] in rows(page)
    assert ["training.iter1.kl", "0.125", "5.125", "+5"] in rows(page)
    assert "1 of 2 changes are more than noise" in page
    assert not [row for row in rows(page) if "gsm8k" in row[0] or "standard" in row[0]]


def test_artifacts_are_compared_by_their_hashes_in_the_lock(page: str) -> None:
    made = YAML(typ="safe").load(ROOT / "dvc.lock")["stages"]["train@iter1"]["outs"]
    for out in made:
        path = out["path"].replace("_", "\\_")
        assert ["train@iter1", path, out["md5"][:7], "fffffff"] in rows(page)
    assert "Stages with other artifacts: train@iter1.\n" in page
    assert "New stages: train@iter9.\n" in page
    assert "Vanished stages: train@iter3.\n" in page
    assert "to the same artifacts: split.\n" in page


def test_win_rate_and_length_are_drawn_of_both(page: str) -> None:
    assert page.count("```mermaid\nxychart-beta\n") == 2
    assert (
        '  x-axis ["base", "iter1"]\n  y-axis "win rate (%)" 0 --> 100\n  bar [50.00, 65.00]\n  line [50.00, 60.00]\n' in page
    )
    assert "  bar [52.00, 50.00]\n  line [52.00, 45.00]\n" in page


def test_the_page_names_the_plots_that_dvc_draws() -> None:
    declared = [name for plot in YAML(typ="safe").load(ROOT / "dvc.yaml")["plots"] for name in plot]
    assert all(name in diff.PLOTS for name in declared), "say what `dvc plots diff` draws"


def test_a_model_cannot_leave_its_quotes_in_a_chart() -> None:
    def made(rate: float) -> diff.Revision:
        models = {name: {"win_rate": rate} for name in ("base", 'x"]\n```\n<b>')}
        return diff.Revision("r", {}, diff.flat({"alpaca_eval": models}), {})

    assert '["base", "x________b_"]' in diff.plots_section(made(1.0), made(2.0))


def test_a_page_without_changes_says_so(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = between(repository, monkeypatch, "HEAD", "workspace")
    assert text.splitlines()[2:] == ["No changes of parameters, metrics, artifacts."]


def test_what_a_revision_lacks_is_named(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = between(repository, monkeypatch, "HEAD~2", "main")
    assert "No reports/metrics.json at HEAD~2 (".replace("~", "\\~") in text
    assert "No dvc.lock at HEAD\\~2 (" in text
    assert ["alpaca\\_eval.base.win\\_rate", "–", "50.00 ± 1.00", "–", "–"] in rows(text)


def test_a_recipe_is_compared_by_its_own_files(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = between(repository, monkeypatch, "HEAD~1", "HEAD", "recipes/llama-3-8b")
    assert [row for row in rows(text) if row[0] == "eta"] == [["eta", "1000", "500"]]
    assert "No reports/metrics.json at HEAD\\~1 (" in text


def test_an_unknown_revision_and_a_broken_file_are_one_line_each(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "-m", "stages.diff", "nonesuch"]
    done = subprocess.run(command, cwd=repository, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (1, "", 1)
    assert done.stderr.startswith("diff: error: 'nonesuch' is no revision")
    git(tmp_path, "init", "-q")
    (tmp_path / "dvc.lock").write_text("<<<<<<< HEAD\na: b\n=======\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StageError, match=r"dvc\.lock at workspace: not YAML"):
        diff.read("workspace", Path())


def test_the_page_is_written_to_a_file_too(
    repository: Path, page: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["diff", "HEAD~1", "HEAD", "--out", str(tmp_path / "page.md")])
    diff.main()
    assert (tmp_path / "page.md").read_text() == page


@given(st.floats(-100, 100), st.floats(-100, 100), st.floats(0, 20), st.floats(0, 20))
def test_noise_is_the_two_sided_95_percent_of_both_errors(old: float, new: float, se_old: float, se_new: float) -> None:
    a, b = (
        diff.flat({"alpaca_eval": {"m": {"win_rate": value, "standard_error": error}}})
        for value, error in ((old, se_old), (new, se_new))
    )
    z, limit = abs(new - old), 1.96 * math.sqrt(se_old**2 + se_new**2)
    if abs(z - limit) > 1e-9:
        assert diff.beyond_noise(a, b, ("alpaca_eval", "m", "win_rate")) == (z > limit)


def test_noise_is_unknown_where_one_error_is() -> None:
    a = diff.flat({"t": {"x": 1.0, "standard_errors": {"x": 0.1}}})
    assert diff.beyond_noise(a, diff.flat({"t": {"x": 2.0}}), ("t", "x")) is None
    assert diff.beyond_noise(a, {}, ("t", "x")) is None


def test_nothing_heavy_is_imported() -> None:
    code = "import sys, stages.diff; print(*{'torch', 'pandas', 'pyarrow', 'transformers', 'vllm'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of two stages that ran, with its lock in Git and its outputs in DVC's cache."""
    folder = tmp_path_factory.mktemp("pipeline") / "origin"
    folder.mkdir()
    (folder / "params.yaml").write_text("eta: 10\n")
    (folder / "dvc.yaml").write_text(
        "stages:\n"
        "  train: {cmd: cp params.yaml model, params: [eta], outs: [model]}\n"
        "  report: {cmd: cp model reports.txt, deps: [code, model], outs: [reports.txt: {cache: false}]}\n"
    )
    (folder / "code").write_text("1")
    (folder / ".gitignore").write_text("/model\n")
    git(folder, "init", "-q")
    for key in ("user.name", "user.email"):  # which `dvc exp save` asks for
        git(folder, "config", key, "t@t")
    for command in (["init", "-q"], ["repro", "-q"]):
        subprocess.run(["dvc", *command], cwd=folder, env=ENVIRONMENT, check=True)
    commit(folder, "run")
    return folder


@pytest.mark.parametrize(
    ("name", "text", "stale"),
    [
        ("code", "1", []),
        ("params.yaml", "eta: 20\n", ["train"]),  # and report, which depends on it
        ("code", "2", ["report"]),
        ("reports.txt", "by hand", ["report"]),
        ("dvc.lock", None, ["train", "report"]),
    ],
)
def test_the_workflow_refuses_a_lock_of_other_code_or_parameters(
    pipeline: Path, tmp_path: Path, name: str, text: str | None, stale: list[str]
) -> None:
    """In a clone, so without DVC's cache."""
    git(tmp_path, "clone", "-q", str(pipeline), "clone")
    (tmp_path / "clone" / name).unlink()
    if text:
        (tmp_path / "clone" / name).write_text(text)
    done = run_step(tmp_path / "clone", step("report.yml", "dvc.lock matches code and parameters"))
    assert done.returncode == bool(stale), done.stdout + done.stderr
    if stale:
        error, _, *listed = done.stdout.splitlines()
        assert error.startswith("::error::dvc.lock is not of this code")
        assert listed == stale
    else:
        assert done.stdout == ""


def test_an_experiment_goes_by_its_name(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (pipeline / "params.yaml").write_text("eta: 30\n")
    subprocess.run(["dvc", "exp", "save", "-q", "-n", "larger"], cwd=pipeline, env=ENVIRONMENT, check=True)
    git(pipeline, "checkout", "-q", ".")
    text = between(pipeline, monkeypatch, "HEAD", "larger")
    assert text.splitlines()[0].partition(" to ")[2].startswith("larger (")
    assert ["eta", "10", "30"] in rows(text)


def test_the_workflow_makes_the_page_of_the_root_and_of_recipes_that_changed(
    repository: Path, page: str, tmp_path: Path
) -> None:
    git(tmp_path, "clone", "-q", str(repository), "clone")
    script = step("report.yml", "the page")
    done = run_step(tmp_path / "clone", script, NUMBER="7", GITHUB_STEP_SUMMARY=str(tmp_path / "summary"))
    assert done.returncode == 0, done.stderr
    made = (tmp_path / "clone/page/page.md").read_text()
    assert made.startswith(page.replace("HEAD\\~1", "HEAD^1"))
    assert [row for row in rows(made) if row[0] == "eta"] == [["eta", "10", "20"], ["eta", "1000", "500"]]
    assert (tmp_path / "clone/page/number").read_text() == "7\n"
    assert (tmp_path / "summary").read_text() == made


POST = """
const fs = require('fs')
const asked = JSON.parse(fs.readFileSync(0, 'utf8'))
const run = {head_sha: 'aaa', head_repository: {id: 5}, html_url: 'https://run'}
const done = []
const call = (name) => async (given) => { done.push([name, given]); return {data: asked.pull} }
const github = {
  rest: {
    pulls: {get: call('get')},
    issues: {listComments: 'comments', createComment: call('create'), updateComment: call('update')},
  },
  paginate: async () => asked.comments,
}
const core = {notice: () => {}}
const context = {repo: {owner: 'o', repo: 'r'}, payload: {workflow_run: run}}
const body = new (async () => {}).constructor('github', 'core', 'context', 'require', 'process', process.argv[1])
body(github, core, context, require, process).then(
  () => console.log(JSON.stringify(done)), (error) => { console.error(error.message); process.exit(1) })
"""
"""Runs actions/github-script's script with the calls it makes of GitHub written down."""


def post(folder: Path, number: str, page: str, comments: list[dict[str, Any]]) -> "subprocess.CompletedProcess[str]":
    """The posting script on an artifact, where pull request 7 is of the run's commit and every other of another's."""
    (folder / "page").mkdir()
    (folder / "page/number").write_text(number)
    (folder / "page/page.md").write_text(page)
    jobs = YAML(typ="safe").load(WORKFLOWS / "report-comment.yml")["jobs"]
    script = next(step["with"]["script"] for step in jobs["comment"]["steps"] if "script" in step.get("with", {}))
    head = {"sha": "aaa" if number == "7\n" else "bbb", "repo": {"id": 5}}
    asked = json.dumps({"pull": {"number": 7, "head": head}, "comments": comments})
    environment = os.environ | {"RUNNER_TEMP": str(folder)}
    command = ["node", "-e", POST, script]
    return subprocess.run(command, env=environment, input=asked, capture_output=True, text=True, check=False)


needs_node = pytest.mark.skipif(not shutil.which("node"), reason="GitHub's runners have Node, this machine has not")


def marked(login: str) -> dict[str, Any]:
    return {"id": 3, "user": {"login": login}, "body": "<!-- stages.diff -->\nold"}


@needs_node
def test_one_comment_is_made_and_then_edited(tmp_path: Path) -> None:
    for folder, comments, call in (
        ("first", [marked("somebody")], "create"),
        ("then", [marked("somebody"), marked("github-actions[bot]")], "update"),
    ):
        (tmp_path / folder).mkdir()
        done = post(tmp_path / folder, "7\n", "the page", comments)
        assert done.returncode == 0, done.stderr
        name, given = json.loads(done.stdout)[-1]
        assert name == call
        assert given["body"].startswith("<!-- stages.diff -->\nthe page\n")
        assert given.get("comment_id", given.get("issue_number")) == {"create": 7, "update": 3}[call]


@needs_node
def test_a_long_page_is_cut_to_what_github_takes(tmp_path: Path) -> None:
    _, given = json.loads(post(tmp_path, "7\n", "x" * 100_000, []).stdout)[-1]
    assert 60_000 < len(given["body"]) < 65_536


@needs_node
def test_nothing_is_posted_where_the_run_is_not_of_the_pull_request(tmp_path: Path) -> None:
    done = post(tmp_path, "8\n", "the page", [])
    assert [name for name, _ in json.loads(done.stdout)] == ["get"]


@needs_node
@pytest.mark.parametrize("number", ["", "7; x", "../7", "0", "7\n8"])
def test_what_is_no_number_is_refused(tmp_path: Path, number: str) -> None:
    assert "names no pull request" in post(tmp_path, number, "the page", []).stderr
