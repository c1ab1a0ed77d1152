"""Seeds run in clones of HEAD, once each, and their figures are collected."""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from stages.runtime import params
from stages.runtime.errors import StageError
from stages.runtime.paths import ROOT
from stages.tools import seeds
from support import revisions, runs
from support.messages import assert_message
from support.running import list_processes, run_tool, wait_for

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An experiment whose seeds 1, 2 and 42 have run."""
    folder = tmp_path_factory.mktemp("experiment")
    runs.make_experiment(folder)
    done = run_tool(folder, "seeds", "--seeds", 1, 2, 42, "--jobs", 2, RUNS=str(folder / "data/runs"))
    assert done.returncode == 0, done.stderr
    assert "reports/seeds.md" in done.stdout
    return folder


@pytest.fixture
def inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    return folder


def run(*wanted: int, collect: bool = False) -> None:
    seeds.main(argparse.Namespace(seeds=list(wanted), jobs=1, collect=collect))


def read_figures() -> dict[str, list[float]]:
    figures: dict[str, list[float]] = json.loads(Path("reports/seeds.json").read_text(encoding="utf-8"))["figures"]
    return figures


def test_the_figures_of_every_seed_are_collected(inside: Path) -> None:
    run(1, 2, 42, collect=True)
    document = json.loads((inside / "reports/seeds.json").read_text())
    assert document["seeds"] == [1, 2, 42]
    rates = [60.25, 60.5, 70.5]
    assert document["figures"] == {
        "alpaca_eval.base.win_rate": [50.0] * 3,
        "alpaca_eval.base.standard_error": [1.0] * 3,
        "alpaca_eval.iter1.win_rate": rates,
        "alpaca_eval.iter1.standard_error": [0.75] * 3,
        "alpaca_eval.iter1.vs_base.difference": [rate - 50 for rate in rates],
        "alpaca_eval.iter1.vs_base.standard_error": [0.5] * 3,
    }
    page = (inside / "reports/seeds.md").read_text()
    assert f"| win rate of iter1 | 63.75 | {statistics.stdev(rates):.2f} | 60.25 to 70.50 | 0.75 |" in page


def test_each_seed_ran_in_its_own_clone_and_42_came_from_the_cache(folder: Path) -> None:
    """The report is in Git, not in the cache, and its inputs and outputs are those of the commit."""
    lines = (folder / "data/runs").read_text().splitlines()
    assert sorted(lines) == [f"{seed} {(folder / 'scratch/seeds' / seed).resolve()}" for seed in ("1", "2")]
    for seed in (1, 2, 42):
        clone = folder / f"scratch/seeds/{seed}"
        text = (clone / "params.yaml").read_text()
        assert text == runs.FILES["params.yaml"].replace("42 ", f"{seed:<3}")  # with its comment
        assert (clone / ".venv").is_symlink()
        assert not (clone / ".dvc/cache").exists()
    assert (folder / "params.yaml").read_text() == runs.FILES["params.yaml"]


def test_finished_seeds_are_not_run_again(inside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seeds, "start", lambda seed: pytest.fail(f"{seed} is run again"))
    run(2, 1)
    assert read_figures()["alpaca_eval.iter1.win_rate"] == [60.5, 60.25]
    (inside / "README.md").write_text("words")  # changes no result
    revisions.commit(inside, "words")
    run(1, 2, 42)
    assert read_figures()["alpaca_eval.iter1.win_rate"] == [60.25, 60.5, 70.5]


def test_a_seed_is_finished_only_as_long_as_its_run_is_that_of_head(inside: Path) -> None:
    clone = inside / "scratch/seeds/1"
    lock, settings = (clone / "dvc.lock").read_text(), (clone / "params.yaml").read_text()
    assert seeds.is_finished(1)
    assert not seeds.is_finished(9)
    (clone / "dvc.lock").write_text(lock + "#")
    assert not seeds.is_finished(1)
    (clone / "dvc.lock").write_text(lock)
    (clone / "params.yaml").write_text(settings.replace("seed: 1", "seed: 11"))
    assert not seeds.is_finished(1)
    (clone / "params.yaml").write_text(settings)
    (inside / "requirements/main.txt").write_text("torch==2\n")
    revisions.commit(inside, "another torch")
    assert not seeds.is_finished(1)
    revisions.git(inside, "reset", "-q", "--hard", "HEAD~1")
    assert seeds.is_finished(1)


def test_one_finished_run_is_not_enough(inside: Path) -> None:
    with pytest.raises(StageError) as error:
        run(1, 9, collect=True)
    assert_message(str(error.value), "found 1", "make seeds")


def test_uncommitted_changes_are_refused(inside: Path) -> None:
    (inside / "params.yaml").write_text("eta: 3\n")
    with pytest.raises(StageError) as error:
        run(1, 2)
    assert_message(str(error.value), "params.yaml", "HEAD", "commit")
    revisions.git(inside, "checkout", "-q", "params.yaml")


@pytest.mark.parametrize("options", [{"seeds": [1, -2], "jobs": 1}, {"seeds": [1, 1], "jobs": 1}, {"seeds": [1, 2], "jobs": 0}])
def test_impossible_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(StageError) as error:
        seeds.main(argparse.Namespace(**options, collect=False))
    assert_message(str(error.value), "--seeds", "--jobs", "correct")


def test_a_failed_seed_is_named_and_resumes_with_the_next_commit(tmp_path: Path) -> None:
    runs.make_experiment(tmp_path)
    (tmp_path / "fail").write_text("7")
    revisions.commit(tmp_path, "fail")
    done = run_tool(tmp_path, "seeds", "--seeds", 7, 42)
    assert done.returncode == 1
    assert_message(done.stderr, "seeds: error: ", "scratch/seeds/7", "seed 7", "scratch/run.log", "to resume")
    assert "the disk is on fire" in (tmp_path / "scratch/seeds/7/scratch/run.log").read_text()
    assert not (tmp_path / "reports/seeds.json").exists()
    assert not (tmp_path / "scratch/seeds/42").exists()
    (tmp_path / "fail").write_text("never")
    (tmp_path / "params.yaml").write_text(runs.FILES["params.yaml"].replace("eta: 10", "eta: 5"))
    revisions.commit(tmp_path, "repaired")
    done = run_tool(tmp_path, "seeds", "--seeds", 7, 42)
    assert done.returncode == 0, done.stderr
    assert params.read(tmp_path / "scratch/seeds/7/params.yaml") == {"seed": 7, "eta": 5, "iterations": {"iter1": "base"}}
    assert json.loads((tmp_path / "reports/seeds.json").read_text())["figures"]["alpaca_eval.iter1.win_rate"] == [61.75, 70.5]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_run_outlives_the_tool(number: signal.Signals, tmp_path: Path) -> None:
    runs.make_experiment(tmp_path)
    mark = f"MARK_{tmp_path.name}"
    command = [sys.executable, "-m", "stages.tools", "seeds", "--seeds", "7", "42"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "SLEEP": "600", mark: "1"}
    tool = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        assert wait_for(lambda: any("report.py" in line for line in list_processes(mark).values()), 120)
        tool.send_signal(number)
        tool.wait()
        assert wait_for(lambda: not any("dvc repro" in line for line in list_processes(mark).values()), 60)
    finally:
        for pid in list_processes(mark):
            os.kill(pid, signal.SIGKILL)
