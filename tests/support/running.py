"""Run stages, tools and DVC as users do, with the smallest parameters."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from stages.runtime.paths import ROOT
from support import stage_client, stage_server

TINY: dict[str, Any] = {
    "assets.policy.miniature": {
        "hidden_size": 32,
        "layers": 2,
        "vocabulary": 500,
        "right_answers": 640,
        "mixed_answers": 640,
        "learning_rate": 3.0e-3,
    },
    "generate.samples": 3,
    "generate.shard_size": 8,
    "generate.max_new_tokens": 24,
    "answer.max_new_tokens": 24,
    "engine.max_model_length": 256,
    "train.global_batch": 8,
    "train.device_batch": 4,
}
"""Overrides of the root's params.yaml."""


SMALLEST = TINY | {
    "iterations": {"iter1": "base"},
    "assets.ranker.miniature.prompts": 60,
    "assets.prompts.count": 120,
    "assets.alpaca_eval.count": 40,
    "split.prompts_per_iteration": 32,
    "split.hold_out": 8,
    "assets.harness": {
        **{
            task: {"repo": "miniature", "count": 4}
            for task in ("arc_challenge", "truthfulqa_mc2", "winogrande", "gsm8k", "hellaswag")
        },
        "mmlu": {"repo": "miniature", "count": 2},
    },
}
"""One iteration of the whole pipeline at the smallest sizes."""


ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
"""What stages and tools find in addition to the environment of the tests."""
ALONE = {"PYTHONHASHSEED": "1"}
"""With this in addition, a stage runs in a process of its own, in which sets of strings may have another order than in a fork
of a server: for tests that compare two runs, or that are about how a process starts."""


def set_params(folder: Path, overrides: dict[str, Any], source: Path = ROOT / "params.yaml") -> None:
    """Write `source` with overrides (dotted keys) to the folder's params.yaml."""
    document = YAML(typ="safe").load(source)
    for key, value in overrides.items():
        *parents, last = key.split(".")
        section = document
        for parent in parents:
            section = section[parent]
        section[last] = value
    with (folder / "params.yaml").open("w") as file:
        YAML().dump(document, file)


def run_stage(folder: Path, name: str, *arguments: object, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run `python -m stages NAME ARGUMENTS` in `folder`, which holds params.yaml."""
    return run_module(folder, "stages", name, *arguments, **environment)


def run_tool(folder: Path, name: str, *arguments: object, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run `python -m stages.tools NAME ARGUMENTS` in `folder`."""
    return run_module(folder, "stages.tools", name, *arguments, **environment)


def run_module(folder: Path, module: str, *arguments: object, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run `python -m MODULE ARGUMENTS` in `folder`: in a server if it can, otherwise in a process of its own."""
    check_environment()
    words, values = list(map(str, arguments)), os.environ | ENVIRONMENT | environment
    if stage_client.is_served(module, stage_server.ENVIRONMENT, values):
        return stage_server.run(module, folder, words, values)
    command = [sys.executable, "-m", module, *words]
    return subprocess.run(command, cwd=folder, env=values, capture_output=True, text=True, check=False)


def run_sampling(folder: Path, program: str, *arguments: object) -> "subprocess.CompletedProcess[str]":
    """Run a program in `folder` that uses the module stages.engines.sampling."""
    return run_program(folder, "generate", program, *arguments)


def run_program(folder: Path, stage: str, program: str, *arguments: object) -> "subprocess.CompletedProcess[str]":
    """Run a program in `folder` that uses what a stage imports, in the server of that stage."""
    check_environment()
    (folder / "program.py").write_text(program)
    route = stage_server.ROUTES[stage]
    return stage_server.run("program", folder, list(map(str, arguments)), os.environ | ENVIRONMENT, route=route)


def check_environment() -> None:
    """Fail if a fixture or an import has left a variable with which no server would run any stage of the tests that follow."""
    left = stage_client.find_obstacles(stage_server.ENVIRONMENT, os.environ | ENVIRONMENT)
    assert not left, f"restore these environment variables: {sorted(left)}"


def copy_repository(folder: Path, overrides: dict[str, Any]) -> None:
    """Make a Git repository of the working tree with these parameters, as if it had never run: no dvc.lock, no reports."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in names.splitlines():
        if (ROOT / name).is_file() and name != "dvc.lock" and not name.startswith("reports/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    set_params(folder, overrides)
    for command in (
        ["init", "-q"],
        ["config", "user.name", "t"],
        ["config", "user.email", "t@t"],
        ["add", "-A"],
        ["commit", "-qm", "smallest"],
    ):
        subprocess.run(["git", *command], cwd=folder, check=True)


def run_dvc(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run DVC, and the stages that it starts, with stdout and stderr in one stream."""
    check_environment()
    paths = f"{stage_server.start()}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": paths, "OMP_NUM_THREADS": "2"}
    return stage_server.run("dvc", folder, list(arguments), environment, merged=True)


def dvc(folder: Path, *arguments: str) -> str:
    """Run DVC, which must succeed, and return its output."""
    done = run_dvc(folder, *arguments)
    assert done.returncode == 0, done.stdout
    return done.stdout


def list_processes(mark: str) -> dict[int, str]:
    """Return the processes with `mark` in their environment, which child processes inherit: PID -> command line."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (path / "environ").read_bytes():  # empty for a process that has ended
                found[int(path.name)] = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
    return found


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    """Return whether the condition becomes true within so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True
