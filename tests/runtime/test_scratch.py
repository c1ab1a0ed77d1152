"""Unfinished work: who may use it, what it depends on, and how long it stays."""

import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stages.artifacts import files
from stages.runtime import scratch
from stages.runtime.errors import StageError
from stages.runtime.paths import ROOT
from support.messages import assert_message
from support.running import list_processes, wait_for

OTHER = """
import sys
from stages.runtime import scratch
scratch.folder("train", {"eta": 1})
print("has it", flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def _in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield
    scratch.finish()


def start_other(program: str = OTHER) -> "subprocess.Popen[str]":
    """Start another process, which asks for the folder of `scratch.folder("train", {"eta": 1})`."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", program], env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def read_line(process: "subprocess.Popen[str]") -> str:
    assert process.stdout
    return process.stdout.readline()


@pytest.mark.parametrize("end", ["killed", "ended"])
def test_one_process_at_a_time_uses_a_folder(end: str) -> None:
    with start_other() as process:
        assert read_line(process) == "has it\n"
        with pytest.raises(StageError) as error:
            scratch.folder("train", {"eta": 1})
        assert_message(str(error.value), "another process", "scratch/train/", "wait for it, or stop it")
        assert scratch.folder("train", {"eta": 2}).is_dir(), "other work is free"
        if end == "killed":
            process.kill()
        else:
            process.communicate()
    assert scratch.folder("train", {"eta": 1}).is_dir()


def test_work_that_finishes_while_another_process_waits_for_its_lock_starts_afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have the lock file open; one finishes and removes it with its folder. The other must not keep the old file."""
    path = scratch.folder("train", {})
    really_open = os.open

    def open_and_finish(*arguments: Any, **options: Any) -> int:
        monkeypatch.setattr(os, "open", really_open)
        handle = really_open(*arguments, **options)
        scratch.finish()
        return handle

    monkeypatch.setattr(os, "open", open_and_finish)
    handle = scratch._lock(path / "lock")
    assert os.path.samestat((path / "lock").stat(), os.fstat(handle))
    os.close(handle)


def test_work_that_make_clean_removed_can_finish() -> None:
    files.remove(scratch.folder("train", {}).parent)
    scratch.finish("stage")


def test_a_command_runs_once_at_a_time() -> None:
    scratch.claim(["train", "a"])
    program = "import sys; from stages.runtime import scratch; scratch.claim(sys.argv[1:])"
    command = [sys.executable, "-c", program]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    second = subprocess.run([*command, "train", "a"], env=environment, capture_output=True, text=True, check=False)
    assert "another process is running this same command" in second.stderr
    subprocess.run([*command, "train", "b"], env=environment, check=True)
    (before,) = scratch._claims
    scratch.finish()
    assert not before.exists()
    subprocess.run([*command, "train", "a"], env=environment, check=True)


def test_whatever_determines_the_work_gives_it_another_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [scratch.folder("train", {"eta": 1, "seed": 1})]
    assert scratch.folder("train", {"seed": 1, "eta": 1}) == paths[0]
    paths.append(scratch.folder("train", {"eta": 2, "seed": 1}))
    paths.append(scratch.folder("reference", {"eta": 1, "seed": 1}))
    for name, value in (("tool_versions", {"vllm": "0"}), ("fingerprint", {"stages/method/sppo.py": "0"})):
        with monkeypatch.context() as patch:
            patch.setattr(scratch, name, lambda *_, value=value: value)
            paths.append(scratch.folder("train", {"eta": 1, "seed": 1}))
    assert len(set(paths)) == len(paths)


def test_the_code_in_a_folders_name_is_that_of_the_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(scratch, "fingerprint", lambda stage: asked.append(stage) or {})
    scratch.folder("evaluate-lm", {})
    assert asked == ["evaluate-lm"]


def finish_stage(stage: str = "train@iter1", **outs: str) -> Path:
    """Finish a stage under DVC that has written `outs`; return its folder."""
    path = scratch.folder("train", {"stage": stage})
    files.write_json({"step": 1}, path / "step.json")
    for name, text in outs.items():
        files.write_json(text, Path(f"data/{name}.json"))
    scratch.finish(stage, [Path(f"data/{name}.json") for name in outs])
    return path


def write_lock(stage: str, **outs: dict[str, Any]) -> None:
    """Write a dvc.lock that has the stage with these outs."""
    entry = {"outs": [{"path": path, **values} for path, values in outs.items()]}
    scratch.LOCK.write_text(json.dumps({"schema": "2.0", "stages": {"other": {"cmd": "x"}, stage: entry}}))


def md5(path: str) -> dict[str, Any]:
    return {"md5": subprocess.run(["md5sum", path], capture_output=True, text=True, check=True).stdout.split()[0], "size": 1}


def test_finished_work_stays_until_dvc_has_its_outs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_STAGE", "answer@iter1")
    write_lock("train@iter1", **{"data/a.json": {"md5": "0"}})
    path = finish_stage(a="one", b="two")
    scratch.sweep()
    assert (path / "step.json").exists(), "the lock is from an earlier run"
    write_lock("train@iter1", **{"data/a.json": md5("data/a.json")})
    scratch.sweep()
    assert path.exists(), "one of two outs"
    write_lock("train@iter2", **{"data/a.json": md5("data/a.json"), "data/b.json": md5("data/b.json")})
    scratch.sweep()
    assert path.exists(), "another stage's"
    write_lock("train@iter1", **{"data/a.json": md5("data/a.json"), "data/b.json": md5("data/b.json"), "data/c.json": {}})
    monkeypatch.delenv("DVC_STAGE")
    scratch.sweep()
    assert path.exists(), "nothing is swept outside DVC"
    monkeypatch.setenv("DVC_STAGE", "answer@iter1")
    scratch.sweep()
    assert list(path.parent.iterdir()) == []


def test_finished_work_whose_out_is_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_STAGE", "answer@iter1")
    path = scratch.folder("train", {})
    with files.replacing(Path("data/model")) as partial:
        files.write_json(1, partial / "a.json")
        files.write_json(22, partial / "b.json")
    scratch.finish("train@iter1", [Path("data/model")])
    write_lock("train@iter1", **{"data/model": {"md5": "0.dir", "size": 6, "nfiles": 2}})
    scratch.sweep()
    assert path.exists()
    write_lock("train@iter1", **{"data/model": {"md5": "0.dir", "size": 5, "nfiles": 2}})
    scratch.sweep()
    assert not path.exists()


def test_finished_work_that_another_process_reuses_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_STAGE", "answer@iter1")
    path = finish_stage(a="one")
    write_lock("train@iter1", **{"data/a.json": md5("data/a.json")})
    program = (
        f"from pathlib import Path; from stages.runtime import scratch; scratch._lock(Path('{path}/lock')); print(); input()"
    )
    with start_other(program) as process:
        read_line(process)
        scratch.sweep()
        assert (path / "step.json").exists()
        process.communicate("\n")
    scratch.sweep()
    assert not path.exists()


def test_a_run_by_hand_removes_its_own_work_but_not_dvcs() -> None:
    path = scratch.folder("train", {})
    scratch.finish()
    assert not path.exists()
    path = finish_stage(a="one")
    assert scratch.folder("train", {"stage": "train@iter1"}) == path
    scratch.finish()
    assert (path / "step.json").exists()


def test_the_next_sweep_completes_one_that_was_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No process resumes from half-removed work: it lies under another name."""
    monkeypatch.setenv("DVC_STAGE", "answer@iter1")
    path = finish_stage(a="one")
    write_lock("train@iter1", **{"data/a.json": md5("data/a.json")})

    def killed(aside: Path, ignore_errors: bool = False) -> None:
        if aside.exists():
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(scratch.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            scratch.sweep()
    assert [left.name for left in path.parent.iterdir()] == [f"{path.name}.discarded"]
    scratch.sweep()
    assert list(path.parent.iterdir()) == []


ODD_MARKS = [b"", b"\xff", b"[]", b"null", b"{}", b'{"stage": 5, "outs": {}}', b'{"stage": "train@iter1"}', b"[" * 100_000]
ODD_MARKS += [
    b'{"stage": "train@iter1", "outs": []}',
    b'{"stage": "train@iter1", "outs": {"data/a.json": "0"}}',
    b'{"stage": "tr',
]


@pytest.mark.slow
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(content=st.binary(max_size=20) | st.sampled_from(ODD_MARKS))
def test_an_odd_mark_of_finished_work_is_set_aside_and_the_work_stays(content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_STAGE", "answer@iter1")
    path = finish_stage(a="one")
    write_lock("train@iter1", **{"data/a.json": md5("data/a.json")})
    (path / scratch.FINISHED).write_bytes(content)
    scratch.sweep()
    assert (path / "step.json").exists()
    assert (path / "finished.unreadable").read_bytes() == content
    assert finish_stage(a="one") == path, "the next run finds the work"
    scratch.sweep()
    assert not path.exists()


@pytest.mark.parametrize(
    "lock",
    [
        b"",
        b"\xff",
        b"stages: []",
        b"stages: null",
        b"stages: {train@iter1: null}",
        b"stages: {train@iter1: [1]}",
        b"stages: {train@iter1: {outs: 5}}",
        b"stages: {train@iter1: {outs: [null, 5, {path: 5}, {md5: x}]}}",
        b"stages: {train@iter1: {outs: []}}",
        b"stages: {5: {outs: [{path: data/a.json}]}}",
        b"a: &a [*a]",
    ],
)
def test_an_odd_lock_discards_no_finished_work(lock: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_STAGE", "answer@iter1")
    path = finish_stage(a="one")
    scratch.LOCK.write_bytes(lock)
    scratch.sweep()
    assert (path / scratch.FINISHED).exists()


def make_place(kind: str) -> str:
    """Make a place that cannot be a scratch folder; return its path."""
    Path("file").touch()
    Path("dangling").symlink_to("nowhere/at/all")
    Path("loop").symlink_to("loop")
    places = {"proc": "/proc/scratch", "a process": "/proc/self", "sys": "/sys/scratch", "below a file": "file/scratch"}
    return places.get(kind) or {"a device": "/dev/null", "a long name": "x" * 300}.get(kind, kind)


PLACES = ["proc", "a process", "sys", "file", "below a file", "dangling", "loop", "a device", "a long name"]


@pytest.mark.parametrize("variable", [True, False], ids=["SPPO_SCRATCH", "scratch"])
@pytest.mark.parametrize("kind", PLACES)
def test_a_place_that_cannot_be_the_folder_is_one_line(kind: str, variable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    place = make_place(kind)
    monkeypatch.setattr(scratch, "FOLDER", Path(place))
    monkeypatch.setenv(scratch.VARIABLE, place) if variable else monkeypatch.delenv(scratch.VARIABLE, raising=False)
    for ask in (lambda: scratch.claim(["train"]), lambda: scratch.folder("train", {})):
        with pytest.raises(StageError) as error:
            ask()
        remedy = f"unset {scratch.VARIABLE}" if variable else f"make {place}, or what {scratch.VARIABLE} names"
        assert_message(str(error.value), f"{place}/", "cannot be created or locked", remedy, "a folder on a local disk")
    monkeypatch.setattr(scratch, "FOLDER", Path("elsewhere"))
    scratch.claim(["train"])  # the remedy


def test_an_empty_variable_is_as_none() -> None:
    """Path("") is the working directory, whose folders would be taken for unfinished work."""
    command = [sys.executable, "-c", "from stages.runtime import scratch; print(scratch.FOLDER)"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "SPPO_SCRATCH": ""}
    assert subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout == "scratch\n"


@pytest.mark.parametrize("step", ["opened", "locked"])
def test_a_lock_that_keeps_disappearing_ends_in_one_line(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def disappear(*_: Any) -> None:
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(*((os, "open") if step == "opened" else (scratch.fcntl, "flock")), disappear)
    with pytest.raises(StageError) as error:
        scratch.folder("train", {})
    monkeypatch.undo()
    assert_message(str(error.value), "scratch/train/", "disappears", "folder on a local disk")


def test_a_disk_without_locks_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(scratch.fcntl, "flock", refuse)
    with pytest.raises(StageError) as error:
        scratch.folder("train", {})
    assert_message(str(error.value), "scratch/train/", "No locks available", "folder on a local disk")


STAGE = """
import argparse, atexit, os, signal
from pathlib import Path
from stages.artifacts import files
from stages.runtime import run, scratch

def main(args):
    eta = files.read_json(Path("params.json"))["eta"]
    folder = scratch.folder("train", {"eta": eta})
    for step in range(3):
        path = folder / f"{step}.json"
        if not path.exists():
            with open("paid", "a") as bill:
                print(step, file=bill)
            files.write_json([eta, step], path)
            if os.environ.get("KILL") == "half-way" and step == 1:
                os.kill(os.getppid(), signal.SIGKILL)
                signal.pause()
    files.write_json([files.read_json(folder / f"{step}.json") for step in range(3)], args.out)

if os.environ.get("KILL") == "before the commit":
    atexit.register(os.kill, os.getppid(), signal.SIGKILL)
run.prepare_process()
run.run_stage("stage", main, argparse.Namespace(out=Path("out.json")), None)
"""
"""Pays for three steps. KILL: kills DVC after the second, or at the end, before DVC has taken the output over."""


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    """A separate DVC repository with that stage and another one."""
    (tmp_path / "stage.py").write_text(STAGE)
    (tmp_path / "params.json").write_text('{"eta": 1}')
    command = f"exec env PYTHONPATH={ROOT} {sys.executable} stage.py"
    stage = {"cmd": command, "deps": ["params.json"], "outs": ["out.json"]}
    another = {"cmd": "date > another", "outs": ["another"], "always_changed": True}
    (tmp_path / "dvc.yaml").write_text(json.dumps({"stages": {"stage": stage, "another": another}}))
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q", "--no-scm"], check=True)
    return tmp_path


def repro(*arguments: str, **environment: str) -> int:
    """Run `dvc repro`; no process may be left when it returns."""
    mark = uuid.uuid4().hex
    command = [sys.executable, "-m", "dvc", "repro", "-q", *arguments]
    done = subprocess.run(command, env=os.environ | {"MARK": mark} | environment, check=False).returncode
    assert wait_for(lambda: not list_processes(mark), 10)
    return done


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["half-way", "before the commit"])
def test_a_killed_run_does_not_pay_twice(pipeline: Path, moment: str) -> None:
    assert repro("stage", KILL=moment) == -signal.SIGKILL
    assert repro("another") == 0  # and so writes dvc.lock
    assert repro("stage") == 0
    assert Path("paid").read_text(encoding="utf-8") == "0\n1\n2\n"
    assert files.read_json(Path("out.json")) == [[1, 0], [1, 1], [1, 2]]
    assert repro() == 0, "a stage whose outs DVC has does not run"
    assert Path("paid").read_text(encoding="utf-8") == "0\n1\n2\n"
    assert repro("--force", "--single-item", "stage") == 0
    assert Path("paid").read_text(encoding="utf-8") == "0\n1\n2\n" * 2, "--force computes everything again"


@pytest.mark.slow
def test_a_run_with_another_parameter_does_not_resume_from_it(pipeline: Path) -> None:
    assert repro("stage", KILL="half-way") == -signal.SIGKILL
    (pipeline / "params.json").write_text('{"eta": 2}')
    assert repro("stage") == 0
    assert files.read_json(Path("out.json")) == [[2, 0], [2, 1], [2, 2]]
    (pipeline / "params.json").write_text('{"eta": 1}')
    assert repro("stage") == 0
    assert files.read_json(Path("out.json")) == [[1, 0], [1, 1], [1, 2]]
    assert Path("paid").read_text(encoding="utf-8") == "0\n1\n" + "0\n1\n2\n" + "2\n", "the first resumes where it was"
