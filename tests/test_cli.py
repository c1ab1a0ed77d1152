"""What every stage does around its main: environment, errors, exit codes, timings and records."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from running import run_stage, set_params

from stages import files
from stages.cli import ROOT

Completed = "subprocess.CompletedProcess[str]"


def split(folder: Path, **environment: str) -> Completed:
    """Run the stage `split` on a file that is not there, or is."""
    set_params(folder, {"split.prompts_per_iteration": 2, "split.hold_out": 2, "iterations": {"iter1": "base"}})
    files.write_json([{"instruction": "Why?"}], folder / "instructions.json")
    return run_stage(folder, "split", "prompts.parquet", "instructions.json", "out", **environment)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    set_params(tmp_path, {"assets.prompts.count": 8})
    done = run_stage(tmp_path, "assets.prompts", "prompts.parquet")
    assert done.returncode == 0, done.stderr
    return tmp_path


def test_bad_input_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    done = split(tmp_path)
    assert done.returncode == 1
    assert done.stderr == "split: error: prompts.parquet is missing: check the path, or make the file again\n"


def test_the_debug_variable_shows_where_it_came_from(tmp_path: Path) -> None:
    assert "Traceback" in split(tmp_path, SPPO_DEBUG="1").stderr


def test_a_stage_leaves_a_record_under_dvc_only(prompts: Path) -> None:
    assert split(prompts).returncode == 0
    assert not (prompts / "data").exists()
    assert split(prompts, DVC_STAGE="recipes/x/dvc.yaml:split").returncode == 0
    text = (prompts / "data/records/split.json").read_text()
    record = json.loads(text)
    assert record["python"] == ".".join(map(str, sys.version_info[:3]))
    assert record["tools"]["transformers"]
    assert record["device"]["count"] == 1
    assert split(prompts, DVC_STAGE="recipes/x/dvc.yaml:split").returncode == 0
    assert (prompts / "data/records/split.json").read_text() == text, "nothing in it varies from run to run"


def test_a_process_that_a_launcher_started_keeps_no_books(prompts: Path) -> None:
    assert split(prompts, DVC_STAGE="split", LOCAL_RANK="1").returncode == 0
    assert not (prompts / "data").exists()
    assert [json.loads(line)["stage"] for line in (prompts / "scratch/timings.jsonl").read_text().splitlines()] == ["prompts"]


def test_timings_are_shown_of_what_ran_since_the_start(prompts: Path) -> None:
    def timings(action: str) -> str:
        command = [sys.executable, "-m", "stages.timings", action]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.run(command, cwd=prompts, env=environment, capture_output=True, text=True, check=True).stdout

    assert "prompts" in timings("show")
    timings("start")
    assert "everything is up to date" in timings("show")
    split(prompts)
    shown = timings("show")
    assert "split" in shown
    assert "prompts" not in shown


def test_an_environment_that_is_not_there_is_named(tmp_path: Path) -> None:
    program = "from stages import cli; cli.run(lambda: None, environment='nowhere')"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "make it with `make env`" in done.stderr
