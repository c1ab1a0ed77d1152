"""A way to run stages as users do, with the smallest parameters."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from stages.cli import ROOT

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


def set_params(folder: Path, overrides: dict[str, Any], source: Path = ROOT / "params.yaml") -> None:
    """Write `source` with overrides (dotted keys) as the folder's params.yaml."""
    document = YAML(typ="safe").load(source)
    for key, value in overrides.items():
        *parents, last = key.split(".")
        section = document
        for parent in parents:
            section = section[parent]
        section[last] = value
    with (folder / "params.yaml").open("w") as file:
        YAML().dump(document, file)


def run_stage(folder: Path, module: str, *arguments: object, **environment: str) -> "subprocess.CompletedProcess[str]":
    """`python -m stages.<module> <arguments>` with `folder`, which holds params.yaml, as the working directory."""
    command = [sys.executable, "-m", f"stages.{module}", *map(str, arguments)]
    values = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(command, cwd=folder, env=values, capture_output=True, text=True, check=False)


def alive(mark: str) -> dict[int, str]:
    """The processes with `mark` in their environment, which all that a process starts inherit: pid -> command line."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (path / "environ").read_bytes():  # empty of a process that has ended
                found[int(path.name)] = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
    return found


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether the condition comes true within so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True
