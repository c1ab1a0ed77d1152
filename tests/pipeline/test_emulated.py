"""Portable numerics: every stage gives the same bytes under an emulated Intel and an emulated AMD processor as on this one.

qemu-user executes exact IEEE arithmetic, so what differs is which kernels the libraries choose for the processor that it shows
them. It emulates no AVX-512. An import of torch takes minutes: these tests are for `make test-all`.
"""

import os
import platform
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from stages.artifacts import files
from stages.runtime import catalog
from stages.runtime.paths import ROOT
from support.running import SMALLEST, copy_repository, dvc

QEMU = shutil.which("qemu-x86_64")
CPUS = ("Haswell", "EPYC-Rome")
STAGES = (
    "assets-policy",
    "assets-ranker",
    "generate@iter1",
    "rank@iter1",
    "reference@iter1",
    "train@iter1",
    "answer@iter1",
    "evaluate-alpaca@iter1",
    "evaluate-lm@iter1",
    "compare",
    "report",
)
SIZES = SMALLEST | {
    "assets.ranker.miniature.prompts": 32,
    "assets.ranker.miniature.candidates": 2,
    "assets.prompts.count": 60,
    "assets.alpaca_eval.count": 10,
    "split.prompts_per_iteration": 16,
    "split.hold_out": 4,
}
"""Emulation takes about 60 times as long."""
NOT_EMULATED: dict[str, str] = {}
"""Stage -> why qemu-user cannot run it."""
CRASHING = ("evaluate-alpaca", "evaluate-lm")
"""Stages in which QEMU 7.2 crashes unless ADAPTED runs them."""
ADAPTED = ROOT / "tests" / "oracles" / "emulated_stage.py"
LENGTH_CONTROL = ROOT / "tests" / "oracles" / "length_control.py"

pytestmark = [
    pytest.mark.slowest,
    pytest.mark.skipif(QEMU is None, reason="qemu-x86_64 is not installed (Debian's qemu-user)"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="portable numerics need an x86-64 processor"),
]


def emulate(cpu: str, environment: str, folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run an environment's interpreter in `folder` on an emulated processor. What it starts by exec would not be emulated.

    One thread: emulated threads that wait for each other take many times as long.
    """
    python = ROOT / ".venv" / environment / "bin" / "python"
    return subprocess.run(
        [str(QEMU), "-cpu", cpu, str(python), *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "SPPO_WORKERS": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository that ran once on this processor."""
    folder = tmp_path_factory.mktemp("native") / "sppo"
    copy_repository(folder, SIZES)
    dvc(folder, "repro")
    return folder


@pytest.mark.parametrize("cpu", CPUS)
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_has_the_same_bytes_on_an_emulated_processor(native: Path, tmp_path: Path, stage: str, cpu: str) -> None:
    name = stage.partition("@")[0]
    if name in NOT_EMULATED:
        pytest.skip(f"qemu-user cannot run {name}: {NOT_EMULATED[name]}")
    lock: dict[str, Any] = YAML(typ="safe").load(native / "dvc.lock")["stages"][stage]
    folder = tmp_path / "emulated"
    shutil.copytree(native, folder, ignore=shutil.ignore_patterns("scratch", ".git"))
    outs = [out for out in lock["outs"] if "records" not in out["path"]]
    for out in outs:
        files.remove(folder / out["path"])
    command = shlex.split(lock["cmd"].rpartition(" python -m stages ")[2])
    program = [str(ADAPTED)] if name in CRASHING else ["-m", "stages"]
    done = emulate(cpu, catalog.environment_of(name), folder, *program, *command)
    assert done.returncode == 0, done.stderr
    assert {out["path"]: files.dvc_md5(folder / out["path"]) for out in outs} == {out["path"]: out["md5"] for out in outs}


@pytest.mark.parametrize("cpu", CPUS)
def test_length_control_has_the_same_bytes_on_an_emulated_processor(tmp_path: Path, cpu: str) -> None:
    """The miniature has no length-controlled win rates, so their fit runs on annotations made up for the 805 instructions."""
    python = ROOT / ".venv" / "main" / "bin" / "python"
    native = subprocess.run(
        [python, LENGTH_CONTROL],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    emulated = emulate(cpu, "main", tmp_path, str(LENGTH_CONTROL), "emulated")
    assert emulated.returncode == 0, emulated.stderr
    assert emulated.stdout == native.stdout != ""
