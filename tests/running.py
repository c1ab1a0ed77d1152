"""A way to run stages as users do, with the smallest parameters."""

import os
import subprocess
import sys
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
