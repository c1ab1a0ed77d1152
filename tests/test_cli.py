"""What every stage does around its main: environment, errors, exit codes, timings and records."""

import json
import os
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from running import alive, run_stage, set_params, wait_for

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


STAGE = """
import os, sys, time
from pathlib import Path
from stages import cli, files, processes, schemas

def work(*_):
    Path(f"working-{os.getpid()}").touch()
    time.sleep(float(os.environ.get("SECONDS", "600")))

def load():
    return lambda shard: work() or shard

def main():
    with files.replacing(Path("out")) as partial:
        partial.write_text("half")
        if sys.argv[1] == "alone":
            work()
        elif sys.argv[1] == "deaf":
            processes.PATIENCE = 1
            while True:
                try:
                    work()
                except BaseException:
                    pass
        elif sys.argv[1] == "workers":
            import pyarrow as pa
            from stages import shards
            values = [["a", "b"], [-1.0, -1.0], [-2.0, -2.0]]
            columns = [pa.array(value, field.type) for value, field in zip(values, schemas.LOGPS)]
            table = pa.Table.from_arrays(columns, schema=schemas.LOGPS)
            shards.map_shards("stage", table, 1, load, (), table.schema, {})
        elif sys.argv[1] == "ranks":
            from stages import policy
            policy.launch(2, {}, lambda _: work())
        partial.write_text("whole")

if __name__ == "__main__":
    cli.run(main)
"""
"""A stage that takes its time, alone or in two processes more, and says in a file that each is at work."""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """Starts a command in a folder that has stage.py and waits until `count` of its processes are at work."""
    (tmp_path / "stage.py").write_text(STAGE)
    started = []

    def run(count: int, *command: str, **environment: str) -> "subprocess.Popen[str]":
        mark = uuid.uuid4().hex
        values = os.environ | {"PYTHONPATH": str(ROOT), "SPPO_WORKERS": "2", "OMP_NUM_THREADS": "1", "MARK": mark} | environment
        with (tmp_path / "stderr").open("w") as log:
            process = subprocess.Popen(command, cwd=tmp_path, env=values, stderr=log, text=True, start_new_session=True)
        process.mark = mark  # type: ignore[attr-defined]
        started.append(process)
        assert wait_for(lambda: len(list(tmp_path.glob("working-*"))) >= count, 60), (tmp_path / "stderr").read_text()
        return process

    yield run
    for process in started:
        for pid in alive(process.mark):  # type: ignore[attr-defined]
            os.kill(pid, signal.SIGKILL)
        process.wait()


def ended(process: "subprocess.Popen[str]") -> bool:
    """Whether nothing that the command started is there any more, ten seconds from now at the latest."""
    process.wait(10)
    return wait_for(lambda: not alive(process.mark), 10)  # type: ignore[attr-defined]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stopped_stage_says_so_in_one_line_and_leaves_nothing_half_written(
    start: Callable[..., "subprocess.Popen[str]"], tmp_path: Path, number: signal.Signals
) -> None:
    (tmp_path / "out").write_text("earlier")
    process = start(1, sys.executable, "stage.py", "alone")
    assert (tmp_path / ".out.partial").exists()
    process.send_signal(number)
    assert process.wait(10) == 128 + number
    assert (tmp_path / "stderr").read_text() == f"stage: stopped by {number.name}: run again to go on\n"
    assert not (tmp_path / ".out.partial").exists()
    assert (tmp_path / "out").read_text() == "earlier"


def test_what_is_to_be_ignored_is(start: Callable[..., "subprocess.Popen[str]"]) -> None:
    process = start(1, "nohup", sys.executable, "stage.py", "alone", SECONDS="1")
    process.send_signal(signal.SIGHUP)
    assert process.wait(10) == 0


def test_a_library_that_swallows_the_exception_delays_the_end_only(start: Callable[..., "subprocess.Popen[str]"]) -> None:
    process = start(1, sys.executable, "stage.py", "deaf")
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == -signal.SIGALRM


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "stop"), [("workers", "SIGINT to the group"), ("workers", "SIGKILL"), ("ranks", "SIGTERM"), ("ranks", "SIGKILL")]
)
def test_a_stage_takes_its_processes_along(
    start: Callable[..., "subprocess.Popen[str]"], tmp_path: Path, kind: str, stop: str
) -> None:
    process = start(2, sys.executable, "stage.py", kind)
    number = signal.Signals[stop.split()[0]]
    (os.killpg if "group" in stop else os.kill)(process.pid, number)
    assert ended(process)
    said = (tmp_path / "stderr").read_text()
    if number != signal.SIGKILL:
        assert process.returncode == 128 + number
        assert [line for line in said.splitlines() if "stage" in line or "Traceback" in line] == [
            f"stage: stopped by {number.name}: run again to go on"
        ]


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    """A DVC repository of its own with one stage, stage.py."""
    stage = {
        "cmd": f"exec {sys.executable} stage.py workers",
        "deps": ["params.yaml"],
        "outs": ["out", "data/records/slow.json"],
    }
    (tmp_path / "dvc.yaml").write_text(json.dumps({"stages": {"slow": stage}}))
    (tmp_path / "params.yaml").write_text("{}")
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q", "--no-scm"], cwd=tmp_path, check=True)
    shutil.copyfile(ROOT / ".dvcignore", tmp_path / ".dvcignore")
    return tmp_path


REPRO = [sys.executable, "-m", "dvc", "repro"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stop", "shell"), [("SIGINT to the group", "/bin/bash"), ("SIGTERM", "/bin/bash"), ("SIGKILL", "/bin/sh")]
)
def test_a_stage_ends_with_dvc(start: Callable[..., "subprocess.Popen[str]"], pipeline: Path, stop: str, shell: str) -> None:
    process = start(2, *REPRO, SHELL=shell)
    (os.killpg if "group" in stop else os.kill)(process.pid, signal.Signals[stop.split()[0]])
    assert ended(process)
    assert "Traceback" not in (pipeline / "stderr").read_text()
    assert not (pipeline / "out").exists()
    assert not (pipeline / ".out.partial").exists()
    for path in pipeline.glob("working-*"):
        path.unlink()
    done = start(2, *REPRO, SECONDS="0")  # whatever DVC's locks were left like
    assert done.wait(60) == 0, (pipeline / "stderr").read_text()
    assert (pipeline / "out").read_text() == "whole"


@pytest.mark.slow
def test_a_second_run_stops_and_the_first_goes_on(start: Callable[..., "subprocess.Popen[str]"], pipeline: Path) -> None:
    first = start(2, *REPRO, SECONDS="8")
    by_dvc = subprocess.run(REPRO, cwd=pipeline, capture_output=True, text=True, check=False)
    assert by_dvc.returncode == 255
    assert "is busy, it is being blocked by" in by_dvc.stderr
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    by_hand = subprocess.run(
        [sys.executable, "stage.py", "workers"], cwd=pipeline, env=environment, capture_output=True, text=True, check=False
    )
    assert by_hand.returncode == 1
    assert "another process runs this very command" in by_hand.stderr
    assert len(by_hand.stderr.splitlines()) == 1
    assert first.wait(60) == 0, (pipeline / "stderr").read_text()
    assert (pipeline / "out").read_text() == "whole"


def test_a_stage_that_starts_after_dvc_was_killed_does_not_stay(tmp_path: Path) -> None:
    (tmp_path / "stage.py").write_text(STAGE)
    mark = uuid.uuid4().hex
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MARK": mark, "DVC_STAGE": "slow"}
    orphaned = f"(sleep 0.5; exec {sys.executable} stage.py alone) & exit"
    subprocess.run(["/bin/sh", "-c", orphaned], cwd=tmp_path, env=environment, start_new_session=True, check=True)
    assert alive(mark)
    assert wait_for(lambda: not alive(mark), 10)
    assert not list(tmp_path.glob("working-*"))


def test_what_a_killed_stage_left_half_written_is_nothing_to_dvc(pipeline: Path) -> None:
    (pipeline / "dvc.yaml").write_text("stages:\n  count: {cmd: ls data > out, deps: [data], outs: [out]}\n")
    (pipeline / "data").mkdir()
    (pipeline / "data/one").touch()
    subprocess.run(REPRO, cwd=pipeline, check=True)
    (pipeline / "data/.two.partial").touch()
    (pipeline / "data/.three.partial").mkdir()
    (pipeline / "data/.three.partial/four").touch()
    done = subprocess.run(REPRO, cwd=pipeline, capture_output=True, text=True, check=True)
    assert "up to date" in done.stdout
