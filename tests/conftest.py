"""A tiny base policy, made once a session, and a way to run stages as users do."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
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


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with params.yaml, a tiny base policy, 20 prompts and the responses to them."""
    import pyarrow as pa

    from stages import domain, files

    folder = tmp_path_factory.mktemp("tiny")
    set_params(folder, TINY)
    done = run_stage(folder, "assets.policy", "base")
    assert done.returncode == 0, done.stderr
    prompts = domain.distinct_prompts("tests", "training", 20)
    part = pa.table({"prompt_id": [f"{index:064}" for index in range(20)], "prompt": prompts}, schema=files.PART)
    files.write_table(part, files.PART, folder / "part.parquet")
    done = run_stage(folder, "generate", "iter1", "base", "part.parquet", "responses.parquet")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def pairs(tiny: Path) -> Path:
    """`tiny` with rankings of the responses by chance and the pairs with their reference log-probabilities."""
    import torch

    from stages import files, sppo

    rows = []
    torch.manual_seed(0)
    for row in files.read_table(tiny / "responses.parquet", files.RESPONSES).to_pylist():
        logits = torch.randn(3, 3)
        scores = sppo.pairwise_scores(logits.double())
        winner, loser = (int(index) for index in sppo.choose_pair(scores))
        rows.append(
            {
                "prompt_id": row["prompt_id"],
                "logits": logits.tolist(),
                "probabilities": sppo.win_probabilities(scores).tolist(),
                "winner": winner,
                "loser": loser,
                "tie": False,
            }
        )
    files.write_table(rows, files.RANKINGS, tiny / "rankings.parquet")
    done = run_stage(tiny, "reference", "base", "responses.parquet", "rankings.parquet", "pairs.parquet")
    assert done.returncode == 0, done.stderr
    return tiny


RunStage = Callable[..., "subprocess.CompletedProcess[str]"]
