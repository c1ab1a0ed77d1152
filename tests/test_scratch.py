"""Unfinished work: whose it is, what it depends on, and how long it stays."""

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
from running import alive, wait_for

from stages import cli, files, scratch
from stages.cli import ROOT, StageError

OTHER = """
import sys
from stages import cli, scratch
scratch.folder("stage", {"eta": 1})
print("has it", flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(scratch, "written", [])
    yield
    scratch.finish()


def other(program: str = OTHER, path: Path = ROOT) -> "subprocess.Popen[str]":
    """Another process, which asks for the folder that `scratch.folder("stage", {"eta": 1})` is here."""
    environment = os.environ | {"PYTHONPATH": str(path)}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", program], env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def said(process: "subprocess.Popen[str]") -> str:
    assert process.stdout
    return process.stdout.readline()


@pytest.mark.parametrize("end", ["killed", "ended"])
def test_work_is_one_process_at_a_time(end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "code", lambda: {})
    with other(OTHER.replace("scratch.folder", "scratch.code = lambda: {}; scratch.folder")) as process:
        assert said(process) == "has it\n"
        with pytest.raises(StageError, match="another process is at this very work, in scratch/stage/"):
            scratch.folder("stage", {"eta": 1})
        assert scratch.folder("stage", {"eta": 2}).is_dir(), "other work is nobody's"
        if end == "killed":
            process.kill()
        else:
            process.communicate()
    assert scratch.folder("stage", {"eta": 1}).is_dir()


def test_work_that_is_done_while_another_waits_for_its_lock_is_begun_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have the lock's file open, one finishes and removes it with the folder: the other must not go on in the void."""
    path = scratch.folder("stage", {})
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


def test_work_that_make_clean_removed_is_done_with() -> None:
    files.remove(scratch.folder("stage", {}).parent)
    scratch.finish("stage")


def test_a_command_runs_once_at_a_time() -> None:
    scratch.alone(["train", "a"])
    program = "import sys; from stages import scratch; scratch.alone(sys.argv[1:])"
    command = [sys.executable, "-c", program]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    second = subprocess.run([*command, "train", "a"], env=environment, capture_output=True, text=True, check=False)
    assert "another process runs this very command" in second.stderr
    subprocess.run([*command, "train", "b"], env=environment, check=True)
    (before,) = scratch._running
    scratch.finish()
    assert not before.exists()
    subprocess.run([*command, "train", "a"], env=environment, check=True)


def test_whatever_determines_the_work_gives_it_another_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [scratch.folder("stage", {"eta": 1, "seed": 1})]
    assert scratch.folder("stage", {"seed": 1, "eta": 1}) == paths[0]
    paths.append(scratch.folder("stage", {"eta": 2, "seed": 1}))
    paths.append(scratch.folder("another", {"eta": 1, "seed": 1}))
    with monkeypatch.context() as patch:
        patch.setattr(cli, "versions", lambda: {"vllm": "0"})
        paths.append(scratch.folder("stage", {"eta": 1, "seed": 1}))
    with monkeypatch.context() as patch:
        patch.setattr(scratch, "code", lambda: {"stages/sppo.py": "0"})
        paths.append(scratch.folder("stage", {"eta": 1, "seed": 1}))
    assert len(set(paths)) == len(paths)


def test_the_code_is_what_is_loaded_and_counts(tmp_path: Path) -> None:
    """In a checkout that is reached by a link, too."""
    checkout, link = tmp_path / "checkout", tmp_path / "link"
    for name in ("__init__", "cli", "processes", "scratch", "files", "documents"):
        files.remove(checkout / "stages" / f"{name}.py")
        (checkout / "stages").mkdir(parents=True, exist_ok=True)
        (checkout / "stages" / f"{name}.py").write_bytes((ROOT / "stages" / f"{name}.py").read_bytes())
    link.symlink_to(checkout)

    def code() -> dict[str, str]:
        process = other("import json; from stages import files, scratch; print(json.dumps(scratch.code()))", link)
        output, errors = process.communicate()
        assert not errors
        found: dict[str, str] = json.loads(output)
        return found

    before = code()
    assert set(before) == {"stages/files.py"}
    with (checkout / "stages/files.py").open("a") as file:
        file.write("# changed\n")
    assert code().keys() == before.keys()
    assert code() != before


def finished(stage: str = "train@iter1", **outs: str) -> Path:
    """The folder of a stage that has written `outs` and finished under DVC."""
    path = scratch.folder("train", {"stage": stage})
    files.write_json({"step": 1}, path / "step.json")
    for name, text in outs.items():
        files.write_json(text, Path(f"data/{name}.json"))
    scratch.finish(stage)
    scratch.written.clear()
    return path


def lock(stage: str, **outs: dict[str, Any]) -> None:
    """Write a dvc.lock that has the stage with these outs."""
    entry = {"outs": [{"path": path, **values} for path, values in outs.items()]}
    scratch.LOCK.write_text(json.dumps({"schema": "2.0", "stages": {"other": {"cmd": "x"}, stage: entry}}))


def md5(path: str) -> dict[str, Any]:
    return {"md5": subprocess.run(["md5sum", path], capture_output=True, text=True, check=True).stdout.split()[0], "size": 1}


def test_finished_work_stays_until_dvc_has_its_outs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_STAGE", "answer@iter1")
    lock("train@iter1", **{"data/a.json": {"md5": "0"}})
    path = finished(a="one", b="two")
    scratch.sweep()
    assert (path / "step.json").exists(), "the lock is of an earlier run"
    lock("train@iter1", **{"data/a.json": md5("data/a.json")})
    scratch.sweep()
    assert path.exists(), "one of two outs"
    lock("train@iter2", **{"data/a.json": md5("data/a.json"), "data/b.json": md5("data/b.json")})
    scratch.sweep()
    assert path.exists(), "another stage's"
    lock("train@iter1", **{"data/a.json": md5("data/a.json"), "data/b.json": md5("data/b.json"), "data/c.json": {}})
    monkeypatch.delenv("DVC_STAGE")
    scratch.sweep()
    assert path.exists(), "by hand nothing is swept"
    monkeypatch.setenv("DVC_STAGE", "answer@iter1")
    scratch.sweep()
    assert list(path.parent.iterdir()) == []


def test_finished_work_whose_out_is_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_STAGE", "answer@iter1")
    path = scratch.folder("train", {})
    with files.replacing(Path("data/model")) as partial:
        files.write_json(1, partial / "a.json")
        files.write_json(22, partial / "b.json")
    scratch.finish("train@iter1")
    lock("train@iter1", **{"data/model": {"md5": "0.dir", "size": 6, "nfiles": 2}})
    scratch.sweep()
    assert path.exists()
    lock("train@iter1", **{"data/model": {"md5": "0.dir", "size": 5, "nfiles": 2}})
    scratch.sweep()
    assert not path.exists()


def test_finished_work_that_another_process_takes_over_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_STAGE", "answer@iter1")
    path = finished(a="one")
    lock("train@iter1", **{"data/a.json": md5("data/a.json")})
    program = f"from pathlib import Path; from stages import scratch; scratch._lock(Path('{path}/lock')); print(); input()"
    with other(program) as process:
        said(process)
        scratch.sweep()
        assert (path / "step.json").exists()
        process.communicate("\n")
    scratch.sweep()
    assert not path.exists()


def test_work_by_hand_is_removed_at_its_end_but_not_dvcs(monkeypatch: pytest.MonkeyPatch) -> None:
    path = scratch.folder("train", {})
    scratch.finish()
    assert not path.exists()
    path = finished(a="one")
    assert scratch.folder("train", {"stage": "train@iter1"}) == path
    scratch.finish()
    assert (path / "step.json").exists()


def test_a_sweep_that_was_killed_is_ended_by_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half-removed work is not gone on from: it lies under another name."""
    monkeypatch.setenv("DVC_STAGE", "answer@iter1")
    path = finished(a="one")
    lock("train@iter1", **{"data/a.json": md5("data/a.json")})

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


STAGE = """
import atexit, os, signal
from pathlib import Path
from stages import cli, files, params, scratch

def main():
    eta = files.read_json(Path("params.json"))["eta"]
    folder = scratch.folder("stage", {"eta": eta})
    for step in range(3):
        path = folder / f"{step}.json"
        if not path.exists():
            with open("paid", "a") as bill:
                print(step, file=bill)
            files.write_json([eta, step], path)
            if os.environ.get("KILL") == "half-way" and step == 1:
                os.kill(os.getppid(), signal.SIGKILL)
                signal.pause()
    files.write_json([files.read_json(folder / f"{step}.json") for step in range(3)], Path("out.json"))

if os.environ.get("KILL") == "before the commit":
    atexit.register(os.kill, os.getppid(), signal.SIGKILL)
cli.run(main, record=False)
"""
"""Pays for three steps. KILL: kills DVC after the second, or when all is done and DVC has not taken the out yet."""


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    """A DVC repository of its own with that stage and another one."""
    (tmp_path / "stage.py").write_text(STAGE)
    (tmp_path / "params.json").write_text('{"eta": 1}')
    command = f"exec env PYTHONPATH={ROOT} {sys.executable} stage.py"
    stage = {"cmd": command, "deps": ["params.json"], "outs": ["out.json"]}
    another = {"cmd": "date > another", "outs": ["another"], "always_changed": True}
    (tmp_path / "dvc.yaml").write_text(json.dumps({"stages": {"stage": stage, "another": another}}))
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q", "--no-scm"], check=True)
    return tmp_path


def repro(*arguments: str, **environment: str) -> int:
    """`dvc repro`, and no process that is left when it returns."""
    mark = uuid.uuid4().hex
    command = [sys.executable, "-m", "dvc", "repro", "-q", *arguments]
    done = subprocess.run(command, env=os.environ | {"MARK": mark} | environment, check=False).returncode
    assert wait_for(lambda: not alive(mark), 10)
    return done


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["half-way", "before the commit"])
def test_a_killed_run_does_not_pay_twice(pipeline: Path, moment: str) -> None:
    assert repro("stage", KILL=moment) == -signal.SIGKILL
    assert repro("another") == 0  # and so writes dvc.lock
    assert repro("stage") == 0
    assert Path("paid").read_text() == "0\n1\n2\n"
    assert files.read_json(Path("out.json")) == [[1, 0], [1, 1], [1, 2]]
    assert repro() == 0, "a stage that DVC has is not run"
    assert Path("paid").read_text() == "0\n1\n2\n"
    assert repro("--force", "--single-item", "stage") == 0
    assert Path("paid").read_text() == "0\n1\n2\n" * 2, "by force all is computed again"


@pytest.mark.slow
def test_another_parameter_does_not_go_on_from_it(pipeline: Path) -> None:
    assert repro("stage", KILL="half-way") == -signal.SIGKILL
    (pipeline / "params.json").write_text('{"eta": 2}')
    assert repro("stage") == 0
    assert files.read_json(Path("out.json")) == [[2, 0], [2, 1], [2, 2]]
    (pipeline / "params.json").write_text('{"eta": 1}')
    assert repro("stage") == 0
    assert files.read_json(Path("out.json")) == [[1, 0], [1, 1], [1, 2]]
    assert Path("paid").read_text() == "0\n1\n" + "0\n1\n2\n" + "2\n", "the first goes on where it was"
