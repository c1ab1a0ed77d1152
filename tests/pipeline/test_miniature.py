"""The whole pipeline, run by DVC as users run it, in a copy of the repository: one iteration at the smallest sizes."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from ruamel.yaml import YAML

from support import torture
from support.checkout import list_run, restore
from support.running import dvc, run_dvc, run_tool

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkout(smallest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of `smallest` for these tests to change."""
    folder = tmp_path_factory.mktemp("checkout") / "sppo"
    shutil.copytree(smallest, folder, symlinks=True)
    return folder


def test_the_reports_hold_every_model_and_metric(checkout: Path) -> None:
    reports = checkout / "reports"
    for page in ("alpaca_eval.md", "open_llm_leaderboard.md"):
        rows = [line.split("|")[1].strip() for line in (reports / page).read_text().splitlines() if line.startswith("|")]
        assert rows[2:4] == ["base", "iter1"]
    metrics = json.loads((reports / "metrics.json").read_text())
    assert set(metrics) == {"alpaca_eval", "open_llm_leaderboard", "ranker", "training"}
    annotations = json.loads((checkout / "data/alpaca_eval/iter1/annotations.json").read_text())
    mean = 100 * sum(row["preference"] - 1 for row in annotations) / 40
    assert metrics["alpaca_eval"]["iter1"]["win_rate"] == pytest.approx(mean, rel=1e-4)
    tasks = ["arc_challenge", "truthfulqa_mc2", "winogrande", "gsm8k", "hellaswag", "mmlu"]
    board = metrics["open_llm_leaderboard"]["base"]
    assert board["average"] == pytest.approx(sum(board[task] for task in tasks) / 6, rel=1e-4)
    log = pd.read_csv(reports / "training.csv")
    assert set(log["iteration"]) == {"iter1"}
    assert len(log) == metrics["training"]["iter1"]["steps"] == metrics["training"]["iter1"]["pairs"] // 8


def test_nothing_runs_twice(checkout: Path) -> None:
    assert list_run(dvc(checkout, "repro")) == set()
    status = subprocess.run(["git", "status", "--short"], cwd=checkout, capture_output=True, text=True, check=True)
    assert status.stdout == ""


def test_the_lock_names_every_output(checkout: Path) -> None:
    lock = YAML(typ="safe").load(checkout / "dvc.lock")
    assert all(out["md5"] for stage in lock["stages"].values() for out in stage["outs"])


def test_eta_reruns_training_and_what_follows_it(checkout: Path) -> None:
    before = json.loads((checkout / "reports/metrics.json").read_text())
    output = dvc(checkout, "exp", "run", "-n", "large-eta", "-S", "eta=1000")
    evaluated = {"answer@iter1", "evaluate-alpaca@iter1", "evaluate-lm@iter1"}
    assert list_run(output) == {"train@iter1", *evaluated, "compare", "report"}
    after = json.loads((checkout / "reports/metrics.json").read_text())
    ratio = after["training"]["iter1"]["theoretical_first_loss"] / before["training"]["iter1"]["theoretical_first_loss"]
    assert ratio == pytest.approx(1e4, rel=1e-3)
    assert "large-eta" in dvc(checkout, "exp", "show", "--csv")
    assert "reports/summary.json  kl" in dvc(checkout, "metrics", "diff", "HEAD")
    restore(checkout)
    assert list_run(dvc(checkout, "repro")) == set()


@pytest.mark.parametrize(
    ("name", "fault"),
    [("published.yaml", "published: {alpaca_eval: {}}\n"), ("params.yaml", "eta: -1\n"), ("params.yaml", "]")],
)
def test_a_fault_in_a_file_leaves_the_reports_as_they_were(checkout: Path, name: str, fault: str) -> None:
    files = [path for path in (checkout / "reports").rglob("*") if path.is_file()]
    before = {path: path.read_bytes() for path in files}
    (checkout / name).write_text(f"{(checkout / name).read_text()}\n{fault}" if name == "params.yaml" else fault)
    done = run_dvc(checkout, "repro")
    assert done.returncode != 0
    assert name in done.stdout
    assert {path: path.read_bytes() for path in files} == before
    restore(checkout)


@pytest.mark.slowest
def test_a_further_iteration_runs_only_itself(checkout: Path) -> None:
    output = dvc(checkout, "exp", "run", "-S", "+iterations.iter2=iter1")
    new = {f"{stage}@iter2" for stage in ("generate", "rank", "reference", "train", "answer", "evaluate-alpaca", "evaluate-lm")}
    assert list_run(output) == new | {"split", "compare", "report"}
    assert "| iter2 |" in (checkout / "reports/alpaca_eval.md").read_text()
    restore(checkout)


def test_a_plot_is_drawn_for_every_declaration(checkout: Path) -> None:
    output = dvc(checkout, "plots", "show", "--json")
    found, _ = json.JSONDecoder().raw_decode(output[output.index('{"') :])
    missing = [error["name"] for error in found.get("errors", [])]
    assert missing == []
    drawn = {name.removeprefix("dvc.yaml::") for name, plots in found["data"].items() if plots}
    assert drawn == {"training loss", "win rate", "response length", "ranker win rates", "win probabilities"}


NOW = ["evaluate-alpaca@iter1, model at an endpoint"]
LATER = [
    "train@iter1",
    "generate@iter1",
    "evaluate-lm@iter1",
    "split",
    "rank@iter1",
    "reference@iter1",
    "train@iter1, two processes",
    "answer@iter1",
    "compare",
    "report",
]


@pytest.mark.parametrize("name", [*NOW, *(pytest.param(name, marks=pytest.mark.slowest) for name in LATER)])
def test_a_stage_that_is_killed_ends_with_the_same_bytes(checkout: Path, name: str) -> None:
    """One kill at a random moment of its work; `make torture` has more, test_resume.py some of reference and train."""
    with torture.serve_judge() as judge:
        row = next(row for row in torture.list_rows(judge.url) if f"{row.stage}, {row.note}".startswith(name))
        done = torture.torture(checkout, row, kills=1, seed=0)
    assert not done.faults
    assert done.kills.total() == 1


@pytest.fixture(params=["directory", pytest.param("s3", marks=pytest.mark.slowest)])
def remote(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """The settings of a DVC remote: a directory, or a bucket of a local S3 server."""
    if request.param == "directory":
        yield {"url": str(tmp_path / "remote")}
        return
    import boto3
    from moto.server import ThreadedMotoServer

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    endpoint = "http://{}:{}".format(*server.get_host_and_port())
    boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1").create_bucket(Bucket="artifacts")
    yield {"url": "s3://artifacts/sppo", "endpointurl": endpoint}
    server.stop()


def test_a_clone_pulls_what_was_pushed_and_is_up_to_date(checkout: Path, remote: dict[str, str], tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(checkout), str(clone)], check=True)
    for folder in (checkout, clone):
        dvc(folder, "remote", "add", "--local", "--force", "shared", remote["url"])
        for key in remote.keys() - {"url"}:
            dvc(folder, "remote", "modify", "--local", "shared", key, remote[key])
    dvc(checkout, "push", "-r", "shared", "dvc.yaml")
    in_git = {"README.md", "remote"}
    assert {path.name for path in (clone / "data").iterdir()} == in_git

    dvc(clone, "pull", "-r", "shared", "data/models/iter1")
    assert {path.name for path in (clone / "data").iterdir()} == in_git | {"models"}, "only what was asked for"
    dvc(clone, "pull", "-r", "shared", "dvc.yaml")
    assert list_run(dvc(clone, "repro")) == {"assets-local"}, "its links are not in the cache"
    assert list_run(dvc(clone, "repro")) == set()
    status = subprocess.run(["git", "status", "--short"], cwd=clone, capture_output=True, text=True, check=True)
    assert status.stdout == ""
    page = "reports/index.html"
    assert (clone / page).read_bytes() == (checkout / page).read_bytes()
    dvc(checkout, "remote", "remove", "--local", "shared")


@pytest.mark.slowest
def test_a_sweep_is_queued_run_compared_and_kept(checkout: Path) -> None:
    dvc(checkout, "exp", "run", "--queue", "-n", "sweep", "-S", "eta=3,30")
    dvc(checkout, "exp", "run", "--run-all")
    table = dvc(checkout, "exp", "show", "--md")
    assert all(name in table for name in ("sweep-1", "sweep-2"))
    page = run_tool(checkout, "diff", "sweep-1", "sweep-2", PYTHONPATH="").stdout
    assert "| eta | 3 | 30 |" in page
    dvc(checkout, "exp", "branch", "sweep-2", "kept")
    subprocess.run(["git", "switch", "-q", "kept"], cwd=checkout, check=True)
    dvc(checkout, "checkout", "dvc.yaml")
    assert "eta: 30" in (checkout / "params.yaml").read_text()
    assert list_run(dvc(checkout, "repro")) == set()
    subprocess.run(["git", "switch", "-q", "-"], cwd=checkout, check=True)
    restore(checkout)


@pytest.mark.slowest
def test_another_base_policy_does_not_rerun_split(checkout: Path) -> None:
    output = dvc(checkout, "exp", "run", "-S", "assets.policy.miniature.learning_rate=0.002", "split", "assets-policy")
    assert list_run(output) == {"assets-policy"}
    restore(checkout)


@pytest.mark.slowest
def test_only_the_evaluations_run_again(checkout: Path) -> None:
    output = dvc(checkout, "exp", "run", "-S", "evaluate_lm.batch_size=16")
    assert list_run(output) - {"report"} == {"evaluate-lm-base", "evaluate-lm@iter1"}
    restore(checkout)
    assert list_run(dvc(checkout, "repro", "--single-item", "--force", "report")) == {"report"}
    dvc(checkout, "repro")


@pytest.mark.slowest
def test_seeds_have_a_mean_and_a_deviation(checkout: Path) -> None:
    dvc(checkout, "exp", "run", "-n", "seed1", "-S", "seed=1")
    restore(checkout)
    page = run_tool(checkout, "means", "HEAD", "seed1", PYTHONPATH="").stdout
    rates = [json.loads((checkout / "reports/metrics.json").read_text())["alpaca_eval"]["iter1"]["win_rate"]]
    assert f"{rates[0]:.2f}, " in page


@pytest.mark.slowest
def test_a_second_run_gives_the_same_lock(checkout: Path) -> None:
    before = (checkout / "dvc.lock").read_bytes()
    dvc(checkout, "repro", "--force")
    assert (checkout / "dvc.lock").read_bytes() == before


def edit(checkout: Path, path: str, old: str, new: str) -> None:
    text = (checkout / path).read_text()
    assert old in text
    (checkout / path).write_text(text.replace(old, new, 1))


def list_stale(checkout: Path) -> set[str]:
    """Return the stages that would run, once stage `code` has run."""
    dvc(checkout, "repro", "code")
    return list_run(dvc(checkout, "repro", "--dry"))


def test_a_change_of_a_comment_or_docstring_makes_no_stage_stale(checkout: Path) -> None:
    before = list_stale(checkout)  # compare and report read folders in which earlier experiments have left files
    edit(checkout, "stages/method/sppo.py", '"""', '"""Another text. ')
    edit(checkout, "stages/artifacts/files.py", "\n\n\ndef ", "\n\n\n# A comment\ndef ")
    assert list_run(dvc(checkout, "repro", "--dry")) - before == {"code"}
    assert list_stale(checkout) == before
    restore(checkout)
    assert list_stale(checkout) == before


def test_a_change_of_the_loss_makes_training_stale(checkout: Path) -> None:
    before = list_stale(checkout)
    edit(checkout, "stages/engines/trainer.py", "\nimport ", "\nimport math as _  # noqa\nimport ")
    assert list_stale(checkout) - before == {"train@iter1", "reference@iter1"}
    restore(checkout)
    edit(checkout, "stages/judges/gold.py", "\nimport ", "\nimport math as _  # noqa\nimport ")
    assert list_stale(checkout) - before == {"evaluate-alpaca-base", "evaluate-alpaca@iter1"}
    restore(checkout)
    edit(checkout, "stages/tools/diff.py", "\nimport ", "\nimport math as _  # noqa\nimport ")
    edit(checkout, "stages/runtime/processes.py", "GRACE_PERIOD = 60", "GRACE_PERIOD = 61")
    assert list_stale(checkout) == before
    restore(checkout)
    assert list_stale(checkout) == before
