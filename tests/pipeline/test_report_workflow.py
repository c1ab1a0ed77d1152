"""The workflows that check a pull request's dvc.lock and post what it changes, run step by step as GitHub runs them."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from stages.runtime.paths import ROOT
from support.revisions import commit_history, git
from support.running import run_tool

pytestmark = pytest.mark.slow

WORKFLOWS = ROOT / ".github/workflows"
ENVIRONMENT = os.environ | {
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "PYTHONPATH": str(ROOT),
    "DVC_NO_ANALYTICS": "1",
}


def read_steps(workflow: str) -> list[dict[str, Any]]:
    jobs = YAML(typ="safe").load(WORKFLOWS / workflow)["jobs"].values()
    return [step for job in jobs for step in job["steps"]]


def find_script(part: str) -> str:
    """Return the only shell script of report.yml that contains `part`."""
    (script,) = [step["run"] for step in read_steps("report.yml") if part in step.get("run", "")]
    return str(script)


def run_script(folder: Path, script: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = ["bash", "-e", "-c", script]
    return subprocess.run(command, cwd=folder, env=ENVIRONMENT | environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("eta", "code"), [(10, 0), (20, 1)])
def test_a_lock_of_other_parameters_is_refused(eta: int, code: int, tmp_path: Path) -> None:
    """tests/tools/test_gate.py has everything else that is refused."""
    (tmp_path / "params.yaml").write_text(f"eta: {eta}\n")
    (tmp_path / "dvc.yaml").write_text("stages: {train: {cmd: 'true', params: [eta], outs: [model]}}\n")
    (tmp_path / ".gitignore").write_text("/model\n")
    entry = {"cmd": "true", "params": {"params.yaml": {"eta": 10}}, "outs": [{"path": "model", "md5": "0" * 32}]}
    (tmp_path / "dvc.lock").write_text(json.dumps({"schema": "2.0", "stages": {"train": entry}}))
    git(tmp_path, "init", "-q")
    subprocess.run(["dvc", "init", "-q"], cwd=tmp_path, env=ENVIRONMENT, check=True)
    done = run_script(tmp_path, find_script("stages.tools gate"))
    assert done.returncode == code, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert ("dvc.lock: train: eta in params.yaml is modified" in lines) == bool(code)
    assert lines[-1].startswith("::error::") == bool(code)


def test_the_page_is_made_for_the_root_and_for_recipes_that_changed(tmp_path: Path) -> None:
    (tmp_path / "origin").mkdir()
    commit_history(tmp_path / "origin")
    git(tmp_path, "clone", "-q", str(tmp_path / "origin"), "clone")
    git(tmp_path / "clone", "checkout", "-q", "--detach")  # as actions/checkout does
    git(tmp_path / "clone", "branch", "-qD", "main")
    environment = {"BASE": "main", "NUMBER": "7", "GITHUB_STEP_SUMMARY": str(tmp_path / "summary")}
    done = run_script(tmp_path / "clone", find_script("stages.tools diff"), **environment)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "clone/page/page.md").read_text()
    git(tmp_path / "origin", "branch", "-m", "main", "pull-request")
    git(tmp_path / "origin", "branch", "main", "HEAD~1")
    assert page.startswith(run_tool(tmp_path / "origin", "diff", "main", "pull-request").stdout)
    assert page.startswith("# No verdict: no win rate of iter3 at main (")
    assert "\n# recipes/llama-3-8b: No verdict: " in page
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| eta ")]
    assert rows == [["eta", "10", "20"], ["eta", "1000", "500"]]
    assert (tmp_path / "clone/page/number").read_text() == "7\n"
    assert (tmp_path / "summary").read_text() == page


POST = """
const fs = require('fs')
const given = JSON.parse(fs.readFileSync(0, 'utf8'))
const run = {head_sha: 'aaa', head_repository: {id: 5}, html_url: 'https://run'}
const calls = []
const call = (name) => async (options) => { calls.push([name, options]); return {data: given.pull} }
const github = {
  rest: {
    pulls: {get: call('get')},
    issues: {listComments: 'comments', createComment: call('create'), updateComment: call('update')},
  },
  paginate: async () => given.comments,
}
const core = {notice: () => {}}
const context = {repo: {owner: 'o', repo: 'r'}, payload: {workflow_run: run}}
const body = new (async () => {}).constructor('github', 'core', 'context', 'require', 'process', process.argv[1])
body(github, core, context, require, process).then(
  () => console.log(JSON.stringify(calls)), (error) => { console.error(error.message); process.exit(1) })
"""
"""Runs the script of actions/github-script and prints the calls to GitHub that it makes."""


def find_post_script() -> str:
    (script,) = [step["with"]["script"] for step in read_steps("report-comment.yml") if "script" in step.get("with", {})]
    return str(script)


def find_marker() -> str:
    """Return the HTML comment by which the script finds its own comment again."""
    match = re.search(r"'(<!-- .* -->)'", find_post_script())
    assert match
    return match[1]


def post(folder: Path, number: str, page: str, comments: list[dict[str, Any]]) -> "subprocess.CompletedProcess[str]":
    """Run the posting script on an artifact. Pull request 7 is at the run's commit, every other one is not."""
    (folder / "page").mkdir()
    (folder / "page/number").write_text(number)
    (folder / "page/page.md").write_text(page)
    head = {"sha": "aaa" if number == "7\n" else "bbb", "repo": {"id": 5}}
    given = json.dumps({"pull": {"number": 7, "head": head}, "comments": comments})
    environment = os.environ | {"RUNNER_TEMP": str(folder)}
    command = ["node", "-e", POST, find_post_script()]
    return subprocess.run(command, env=environment, input=given, capture_output=True, text=True, check=False)


needs_node = pytest.mark.skipif(not shutil.which("node"), reason="Node is not installed; GitHub's runners have it")


def make_comment(login: str) -> dict[str, Any]:
    """Return an earlier comment with the page, by a user."""
    return {"id": 3, "user": {"login": login}, "body": f"{find_marker()}\nold"}


@needs_node
def test_one_comment_is_created_and_then_edited(tmp_path: Path) -> None:
    for folder, comments, call in (
        ("first", [make_comment("somebody")], "create"),
        ("then", [make_comment("somebody"), make_comment("github-actions[bot]")], "update"),
    ):
        (tmp_path / folder).mkdir()
        done = post(tmp_path / folder, "7\n", "the page", comments)
        assert done.returncode == 0, done.stderr
        name, options = json.loads(done.stdout)[-1]
        assert name == call
        assert options["body"].startswith(f"{find_marker()}\nthe page\n")
        assert options.get("comment_id", options.get("issue_number")) == {"create": 7, "update": 3}[call]


@needs_node
def test_a_long_page_is_cut_to_what_github_accepts(tmp_path: Path) -> None:
    _, options = json.loads(post(tmp_path, "7\n", "x" * 100_000, []).stdout)[-1]
    assert 60_000 < len(options["body"]) < 65_536


@needs_node
def test_a_long_page_is_cut_after_a_whole_section(tmp_path: Path) -> None:
    section = f"\n<details><summary>x</summary>\n\n{'x' * 700}\n</details>\n"
    _, options = json.loads(post(tmp_path, "7\n", f"# Better\n{section * 100}", []).stdout)[-1]
    body = options["body"]
    assert body.count(section) == body.count("<details>") == 60_000 // len(section)
    assert body.partition("\n")[2].startswith("# Better\n")
    assert "The rest of the page" in body.rpartition("</details>\n")[2]


@needs_node
def test_nothing_is_posted_if_the_pull_request_is_at_another_commit(tmp_path: Path) -> None:
    done = post(tmp_path, "8\n", "the page", [])
    assert [name for name, _ in json.loads(done.stdout)] == ["get"]


@needs_node
@pytest.mark.parametrize("number", ["", "7; x", "../7", "0", "7\n8"])
def test_an_invalid_number_is_refused(tmp_path: Path, number: str) -> None:
    done = post(tmp_path, number, "the page", [])
    assert done.returncode == 1
    assert "pull request" in done.stderr
    assert done.stdout == ""
