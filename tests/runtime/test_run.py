"""What the launcher does around every stage: environment, errors, exit codes, timings, records and signals."""

import argparse
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
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stages.artifacts import files
from stages.runtime import devices, processes, run
from stages.runtime.paths import ROOT
from support.messages import assert_message
from support.running import ENVIRONMENT, list_processes, run_module, run_stage, run_tool, set_params, wait_for

Completed = "subprocess.CompletedProcess[str]"


def split(folder: Path, **environment: str) -> Completed:
    """Run the stage `split`, whether or not its prompts exist."""
    set_params(folder, {"split.prompts_per_iteration": 2, "split.hold_out": 2, "iterations": {"iter1": "base"}})
    files.write_json([{"dataset": "d", "instruction": "Why?"}], folder / "instructions.json")
    options = ("--prompts", "prompts.parquet", "--instructions", "instructions.json", "--out", "out")
    return run_stage(folder, "split", *options, **environment)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    set_params(tmp_path, {"assets.prompts.count": 8})
    done = run_stage(tmp_path, "assets-prompts", "--out", "prompts.parquet")
    assert done.returncode == 0, done.stderr
    return tmp_path


def test_bad_input_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    done = split(tmp_path)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("split: error: ")
    assert_message(done.stderr, "prompts.parquet", "check the path")


def test_the_debug_variable_shows_the_traceback(tmp_path: Path) -> None:
    assert "Traceback" in split(tmp_path, SPPO_DEBUG="1").stderr


@pytest.mark.slow
def test_a_stage_writes_a_record_under_dvc_only(prompts: Path) -> None:
    assert split(prompts).returncode == 0
    assert not (prompts / "data").exists()
    assert split(prompts, DVC_STAGE="recipes/x/dvc.yaml:split").returncode == 0
    text = (prompts / "data/records/split.json").read_text()
    record = json.loads(text)
    assert record["python"] == "3.11"
    assert record["tools"]["transformers"]
    assert record["device"]["count"] == 1
    assert split(prompts, DVC_STAGE="recipes/x/dvc.yaml:split").returncode == 0
    assert (prompts / "data/records/split.json").read_text() == text, "nothing in it varies from run to run"


def test_outputs_are_the_options_named_out_that_are_given() -> None:
    args = argparse.Namespace(out=Path("a"), out_log=Path("b"), out_hold_out=None, output=Path("c"), model=Path("d"))
    assert run.output_paths(args) == [Path("a"), Path("b")]


@pytest.mark.slow
def test_a_torchrun_worker_writes_neither_record_nor_timings(prompts: Path) -> None:
    assert split(prompts, DVC_STAGE="split", LOCAL_RANK="1", **{devices.LAUNCH_FOLDER: str(prompts)}).returncode == 0
    assert not (prompts / "data").exists()
    timings = (prompts / "scratch/timings.jsonl").read_text().splitlines()
    assert [json.loads(line)["stage"] for line in timings] == ["assets-prompts"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "stray",
    [
        {"LOCAL_RANK": "1"},
        {"LOCAL_RANK": "0", "RANK": "3", "WORLD_SIZE": "8", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"},
        {"ACCELERATE_MIXED_PRECISION": "fp8", "ACCELERATE_USE_FSDP": "true", "RANK": "x", "WORLD_SIZE": ""},
    ],
)
def test_a_stage_of_dvc_ignores_what_other_launchers_left_in_the_environment(prompts: Path, stray: dict[str, str]) -> None:
    done = split(prompts, DVC_STAGE="split", **stray)
    assert done.returncode == 0, done.stderr
    assert (prompts / "data/records/split.json").exists()


LOCALES = [
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"},
    {"LANG": "nowhere", "LC_ALL": "", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
]


@pytest.mark.slow
@pytest.mark.parametrize("environment", LOCALES)
def test_text_is_utf_8_under_any_locale(prompts: Path, environment: dict[str, str]) -> None:
    name = "Fragen-日本-é"
    (prompts / name).mkdir()
    shutil.move(prompts / "prompts.parquet", prompts / name / "prompts.parquet")
    files.write_json([{"dataset": "d", "instruction": "Où? 日本 🙂"}], prompts / name / "instructions.json")
    set_params(prompts, {"split.prompts_per_iteration": 2, "split.hold_out": 2, "iterations": {"iter1": "base"}})
    options = ("--prompts", f"{name}/prompts.parquet", "--instructions", f"{name}/instructions.json", "--out", f"{name}/out")
    done = run_stage(prompts, "split", *options, **environment)
    assert done.returncode == 0, done.stderr
    assert (prompts / name / "out/iter1.parquet").exists()
    done = run_stage(prompts, "split", "--prompts", f"{name}/none.parquet", *options[2:], **environment)
    assert_message(done.stderr, f"split: error: {name}/none.parquet is missing")


@pytest.mark.slow
def test_timings_show_what_has_run_since_the_start(prompts: Path) -> None:
    def timings(action: str) -> str:
        done = run_tool(prompts, "timings", action)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "assets-prompts" in timings("show")
    timings("start")
    assert "up to date" in timings("show")
    split(prompts)
    table = timings("show")
    assert "split" in table
    assert "assets-prompts" not in table


PLANNED = {"split": 2.0, "train@iter1": 60.0, "report": 100.0}


@pytest.mark.parametrize(
    ("planned", "done", "seconds", "expected"),
    [
        (PLANNED, {}, 3, "stage 1 of 3, 3 s so far, about 3 min left"),
        (PLANNED, {"split": 9}, 9, "stage 2 of 3, 9 s so far, about 3 min left"),
        (PLANNED, {"split": 9, "train@iter1": 80}, 89.4, "stage 3 of 3, 89 s so far, about 2 min left"),
        (PLANNED | {"train@iter1": None}, {"split": 9}, 600, "stage 2 of 3, 10 min so far, at least 2 min left"),
        (dict.fromkeys(PLANNED), {}, 3, "stage 1 of 3, 3 s so far"),
        ({}, {"split": 9}, 9, "stage 2 of 2, 9 s so far"),
    ],
)
def test_a_run_says_how_far_it_has_come(
    planned: dict[str, float | None], done: dict[str, float], seconds: float, expected: str
) -> None:
    assert run.describe_progress(planned, done, seconds) == expected


def test_only_a_stage_of_a_run_that_asked_for_it_logs_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(run, "TIMINGS", tmp_path / "timings.jsonl")
    monkeypatch.setattr(run, "PLAN", tmp_path / "plan.json")
    monkeypatch.setenv("DVC_STAGE", "recipes/x/dvc.yaml:split")
    run.log_timing("split", 12)
    caplog.clear()
    run.PLAN.write_text(json.dumps({"started": 0, "stages": PLANNED, "seconds": {}}))
    monkeypatch.setattr(run.time, "time", lambda: 15.0)
    run.log_progress("train", "train@iter1")
    assert not caplog.messages, "dvc repro by itself"
    monkeypatch.setenv(run.PROGRESS, "1")
    run.log_progress("train", "")
    assert not caplog.messages, "a stage that is not run by DVC"
    run.log_progress("train", "train@iter1")
    assert caplog.messages == ["train: stage 2 of 3, 15 s so far, about 3 min left"]
    run.PLAN.unlink()
    run.log_progress("train", "train@iter1")
    assert len(caplog.messages) == 1


GOOD = [{"stage": "split", "seconds": 1.5, "peak_gb": 0.2}, {"stage": "x/dvc.yaml:train@iter1", "seconds": 60, "peak_gb": 4}]
ODD = [b"", b"\xff", b"null", b"[]", b"{}", b'{"stage": "split"', b'{"stage": 5, "seconds": 1, "peak_gb": 1}', b"[" * 100_000]
ODD += [b'{"stage": "split", "seconds": "1", "peak_gb": 1}', b'{"stage": "split", "seconds": NaN, "peak_gb": 1}']
ODD += [b'{"stage": "split", "seconds": 1' + b"0" * 5000 + b', "peak_gb": 1}', b'{"seconds": 1, "peak_gb": 1}']


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(odd=st.lists(st.binary(max_size=20).filter(lambda line: b"\n" not in line) | st.sampled_from(ODD), max_size=3))
def test_lines_of_the_timings_that_cannot_be_read_are_left_out(
    odd: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "TIMINGS", tmp_path / "timings.jsonl")
    lines = [json.dumps(GOOD[0]).encode(), *odd, json.dumps(GOOD[1]).encode()]
    run.TIMINGS.write_bytes(b"\n".join(lines))
    assert run.read_rows() == GOOD
    assert run.read_timings() == {"split": 1.5, "train@iter1": 60}
    monkeypatch.setenv("DVC_STAGE", "rank@iter1")
    run.log_timing("rank", 2.0)
    assert [row["stage"] for row in run.read_rows()][2:] == ["rank@iter1"], "on a line of its own after the cut one"


PLAN = {"started": 0, "stages": PLANNED | {"rank@iter1": None}, "seconds": {"split": 2.0}}
ODD_PLANS = [b"", b"[]", b"null", b"{}", b'{"started": 0', b'{"started": "0", "stages": {}, "seconds": {}}', b"\xff"]
ODD_PLANS += [b'{"started": 0, "stages": [], "seconds": {}}', b'{"started": 0, "stages": {"a": "b"}, "seconds": {}}']
ODD_PLANS += [b'{"started": 0, "stages": {}, "seconds": {"a": null}}', b'{"started": NaN, "stages": {}, "seconds": {}}']


@pytest.mark.parametrize("content", ODD_PLANS)
def test_a_plan_that_cannot_be_read_is_set_aside(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "PLAN", tmp_path / "plan.json")
    monkeypatch.setenv(run.PROGRESS, "1")
    run.PLAN.write_text(json.dumps(PLAN))
    assert run.read_plan() == PLAN
    run.PLAN.write_bytes(content)
    run.log_progress("train", "train@iter1")
    assert not run.PLAN.exists()
    assert run.PLAN.with_name("plan.json.unreadable").read_bytes() == content


def test_what_others_wrote_reaches_the_log_without_control_characters(capfd: pytest.CaptureFixture[str]) -> None:
    program = (
        "from stages.runtime.logs import log, setup_logging; setup_logging()\n"
        "log.warning('%s: %s', 'judge', '\\x1b[31mred\\x07 \\u202e \\ud800 é'); log.info('a\\nb\\tc')"
    )
    subprocess.run([sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
    assert capfd.readouterr().err.splitlines() == ["judge: \\x1b[31mred\\x07 \\u202e \\ud800 é", "a", "b       c"]


def test_a_missing_environment_is_named(tmp_path: Path) -> None:
    program = (
        "from stages.runtime import errors, run\n"
        "try: run.enter_environment('nowhere')\n"
        "except Exception as error: errors.exit_with(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert_message(done.stderr, ".venv/nowhere", "`make env`")


@pytest.mark.parametrize("module", ["stages", "stages.tools"])
def test_help_lists_every_command_with_what_it_does(tmp_path: Path, module: str) -> None:
    done = run_module(tmp_path, module, "--help")
    assert done.returncode == 0, done.stderr
    folders = {"stages": ["stages", "stages/assets"], "stages.tools": ["stages/tools"]}[module]
    modules = [path for folder in folders for path in (ROOT / folder).glob("*.py") if "\ndef main(" in path.read_text()]
    assert modules
    for path in modules:
        if not path.name.startswith("__"):
            name = ("assets-" if path.parent.name == "assets" else "") + path.stem.replace("_", "-")
            (line,) = [line for line in done.stdout.splitlines() if line.split()[:1] == [name]]
            assert len(line.split()) > 3, line


@pytest.mark.parametrize("module", ["stages", "stages.tools"])
def test_an_unknown_command_is_refused(tmp_path: Path, module: str) -> None:
    done = run_module(tmp_path, module, "trian")
    assert done.returncode == 1
    assert_message(done.stderr, "'trian'", f"python -m {module} --help")


@pytest.mark.parametrize("module", ["stages", "stages.tools"])
def test_a_reader_that_has_gone_ends_a_command_without_a_message(tmp_path: Path, module: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)  # as `| head` does
    done = run_printing(tmp_path, module, writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


@pytest.mark.parametrize("module", ["stages", "stages.tools"])
def test_a_full_disk_for_what_is_printed_is_one_line(tmp_path: Path, module: str) -> None:
    with Path("/dev/full").open("wb") as full:
        done = run_printing(tmp_path, module, full.fileno())
    assert done.returncode == 1
    assert_message(done.stderr, "error: no space left", "free some space")
    assert len(done.stderr.splitlines()) == 1


def run_printing(folder: Path, module: str, stdout: int) -> "subprocess.CompletedProcess[str]":
    """Run a command that only prints. stdout: a file descriptor."""
    command = [sys.executable, "-m", module, "--help"]
    return subprocess.run(
        command, cwd=folder, env=os.environ | ENVIRONMENT, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False
    )


STAGE = """
import argparse, functools, os, sys, time
from pathlib import Path
from stages.runtime import processes, run
if __name__ == "__main__":
    run.prepare_process()
from stages.artifacts import files, records, schemas

def work(*_):
    Path(f"working-{os.getpid()}").touch()
    time.sleep(float(os.environ.get("SECONDS", "600")))

def load():
    return lambda shard: work() or shard

def main(args):
    with files.replacing(args.out) as partial:
        partial.write_text("half")
        if sys.argv[1] == "alone":
            work()
        elif sys.argv[1] == "deaf":
            processes.GRACE_PERIOD = 1
            while True:
                try:
                    work()
                except BaseException:
                    pass
        elif sys.argv[1] == "workers":
            import pyarrow as pa
            from stages.artifacts import shards
            values = [["a", "b"], [-1.0, -1.0], [-2.0, -2.0]]
            columns = [pa.array(value, field.type) for value, field in zip(values, schemas.LOGPS)]
            table = pa.Table.from_arrays(columns, schema=schemas.LOGPS)
            shards.map_shards("generate", table, 1, load, (), table.schema, {})
        elif sys.argv[1] == "ranks":
            from stages.engines import distributed
            distributed.launch(2, {}, lambda _: work())
        elif sys.argv[1] == "aborting ranks":
            import ctypes
            from stages.engines import distributed
            libc = ctypes.CDLL(None)
            abort_at_exit = lambda _: libc.__cxa_atexit(libc.abort, None, None) or work()
            distributed.launch(2, {}, abort_at_exit)
        partial.write_text("whole")

if __name__ == "__main__":
    run.run_stage("stage", main, argparse.Namespace(out=Path("out")), functools.partial(records.write_record, numerics=None))
"""
"""A slow stage, alone or with two more processes; each reports in a file that it is working."""


def obey_signals() -> None:
    """Undo what whoever started the tests ignores: SIGINT in a script's background job, SIGHUP under nohup."""
    for number in processes.STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """Start a command in a folder that has stage.py, and wait until `count` of its processes are working."""
    (tmp_path / "stage.py").write_text(STAGE)
    started = []

    def run(count: int, *command: str, **environment: str) -> "subprocess.Popen[str]":
        mark = uuid.uuid4().hex
        values = os.environ | {"PYTHONPATH": str(ROOT), "SPPO_WORKERS": "2", "OMP_NUM_THREADS": "1", "MARK": mark} | environment
        with (tmp_path / "stderr").open("w") as log:
            process = subprocess.Popen(
                command,
                cwd=tmp_path,
                env=values,
                stderr=log,
                text=True,
                start_new_session=True,
                preexec_fn=obey_signals,
            )
        process.mark = mark  # type: ignore[attr-defined]
        started.append(process)
        assert wait_for(lambda: len(list(tmp_path.glob("working-*"))) >= count, 60), (tmp_path / "stderr").read_text()
        return process

    yield run
    for process in started:
        for pid in list_processes(process.mark):  # type: ignore[attr-defined]
            os.kill(pid, signal.SIGKILL)
        process.wait()


def has_ended(process: "subprocess.Popen[str]") -> bool:
    """Return whether nothing that the command started is left within ten seconds."""
    process.wait(10)
    return wait_for(lambda: not list_processes(process.mark), 10)  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stopped_stage_reports_it_in_one_line_and_leaves_nothing_half_written(
    start: Callable[..., "subprocess.Popen[str]"], tmp_path: Path, number: signal.Signals
) -> None:
    (tmp_path / "out").write_text("earlier")
    process = start(1, sys.executable, "stage.py", "alone")
    assert (tmp_path / ".out.partial").exists()
    process.send_signal(number)
    assert process.wait(10) == 128 + number
    stderr = (tmp_path / "stderr").read_text()
    assert len(stderr.splitlines()) == 1
    assert_message(stderr, "stage: ", number.name, "re-run to resume")
    assert not (tmp_path / ".out.partial").exists()
    assert (tmp_path / "out").read_text() == "earlier"


@pytest.mark.slow
def test_an_ignored_signal_stays_ignored(start: Callable[..., "subprocess.Popen[str]"]) -> None:
    process = start(1, "nohup", sys.executable, "stage.py", "alone", SECONDS="1")
    process.send_signal(signal.SIGHUP)
    assert process.wait(10) == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["alone", "workers", "ranks"])
def test_a_stage_that_was_started_with_sigint_ignored_stops_on_sigterm(
    start: Callable[..., "subprocess.Popen[str]"], tmp_path: Path, kind: str
) -> None:
    """As a script's background job, and what some CI runners and cron start."""
    process = start(1, "/bin/sh", "-c", f"trap '' INT; exec {sys.executable} stage.py {kind}")
    os.killpg(process.pid, signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    process.terminate()
    assert has_ended(process)
    assert process.returncode == 128 + signal.SIGTERM
    (line,) = [line for line in (tmp_path / "stderr").read_text().splitlines() if "stage" in line or "Traceback" in line]
    assert_message(line, "stage: ", "SIGTERM", "re-run to resume")


@pytest.mark.slow
def test_a_library_that_swallows_the_exception_only_delays_the_end(start: Callable[..., "subprocess.Popen[str]"]) -> None:
    process = start(1, sys.executable, "stage.py", "deaf")
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == -signal.SIGALRM


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "stop"), [("workers", "SIGINT to the group"), ("workers", "SIGKILL"), ("ranks", "SIGTERM"), ("ranks", "SIGKILL")]
)
def test_a_stage_ends_its_worker_processes(
    start: Callable[..., "subprocess.Popen[str]"], tmp_path: Path, kind: str, stop: str
) -> None:
    process = start(2, sys.executable, "stage.py", kind)
    number = signal.Signals[stop.split()[0]]
    (os.killpg if "group" in stop else os.kill)(process.pid, number)
    assert has_ended(process)
    stderr = (tmp_path / "stderr").read_text()
    if number != signal.SIGKILL:
        assert process.returncode == 128 + number
        (line,) = [line for line in stderr.splitlines() if "stage" in line or "Traceback" in line]
        assert_message(line, "stage: ", number.name, "re-run to resume")


@pytest.mark.slow
def test_workers_ignore_the_terminals_ctrl_c(start: Callable[..., "subprocess.Popen[str]"], tmp_path: Path) -> None:
    start(2, sys.executable, "stage.py", "workers")
    for path in tmp_path.glob("working-*"):
        status = Path(f"/proc/{path.name.partition('-')[2]}/status").read_text(encoding="utf-8")
        (blocked,) = [int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigBlk:")]
        assert blocked >> (signal.SIGINT - 1) & 1


@pytest.mark.slow
def test_a_library_that_aborts_at_exit_does_not_undo_the_workers_work(
    start: Callable[..., "subprocess.Popen[str]"], tmp_path: Path
) -> None:
    process = start(2, sys.executable, "stage.py", "aborting ranks", SECONDS="0")
    assert process.wait(60) == 0, (tmp_path / "stderr").read_text()
    assert (tmp_path / "out").read_text() == "whole"


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    """A separate DVC repository with one stage, stage.py."""
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
    assert has_ended(process)
    assert "Traceback" not in (pipeline / "stderr").read_text()
    assert not (pipeline / "out").exists()
    assert not (pipeline / ".out.partial").exists()
    for path in pipeline.glob("working-*"):
        path.unlink()
    done = start(
        1, *REPRO, SECONDS="0"
    )  # in whatever state DVC's locks were left; one worker may be done before the other starts
    assert done.wait(60) == 0, (pipeline / "stderr").read_text()
    assert (pipeline / "out").read_text() == "whole"


@pytest.mark.slow
def test_a_second_run_stops_while_the_first_continues(start: Callable[..., "subprocess.Popen[str]"], pipeline: Path) -> None:
    first = start(2, *REPRO, SECONDS="8")
    by_dvc = subprocess.run(REPRO, cwd=pipeline, capture_output=True, text=True, check=False)
    assert by_dvc.returncode == 255
    assert "is busy, it is being blocked by" in by_dvc.stderr
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    by_hand = subprocess.run(
        [sys.executable, "stage.py", "workers"], cwd=pipeline, env=environment, capture_output=True, text=True, check=False
    )
    assert by_hand.returncode == 1
    assert "another process is running this same command" in by_hand.stderr
    assert len(by_hand.stderr.splitlines()) == 1
    assert first.wait(60) == 0, (pipeline / "stderr").read_text()
    assert (pipeline / "out").read_text() == "whole"


def test_a_stage_that_starts_after_dvc_was_killed_does_not_stay(tmp_path: Path) -> None:
    (tmp_path / "stage.py").write_text(STAGE)
    mark = uuid.uuid4().hex
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MARK": mark, "DVC_STAGE": "slow"}
    orphaned = f"(sleep 0.5; exec {sys.executable} stage.py alone) & exit"
    subprocess.run(["/bin/sh", "-c", orphaned], cwd=tmp_path, env=environment, start_new_session=True, check=True)
    assert list_processes(mark)
    assert wait_for(lambda: not list_processes(mark), 10)
    assert not list(tmp_path.glob("working-*"))


@pytest.mark.slow
def test_dvc_ignores_what_a_killed_stage_left_half_written(pipeline: Path) -> None:
    (pipeline / "dvc.yaml").write_text("stages:\n  count: {cmd: ls data > out, deps: [data], outs: [out]}\n")
    (pipeline / "data").mkdir()
    (pipeline / "data/one").touch()
    subprocess.run(REPRO, cwd=pipeline, check=True)
    (pipeline / "data/.two.partial").touch()
    (pipeline / "data/.three.partial").mkdir()
    (pipeline / "data/.three.partial/four").touch()
    done = subprocess.run(REPRO, cwd=pipeline, capture_output=True, text=True, check=True)
    assert "up to date" in done.stdout
