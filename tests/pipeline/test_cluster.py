"""Stages on a Ray cluster of two nodes give the same bytes as on this machine."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stages.artifacts import files
from support import clusters
from support.messages import assert_message
from support.running import TINY, run_stage, set_params

REFERENCE = ["--responses", "../responses.parquet", "--rankings", "../rankings.parquet", "--out", "pairs.parquet"]
TRAIN = ["--pairs", "pairs.parquet", "--out", "iter1", "--out-log", "iter1.csv", "--out-update", "iter1.json"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with clusters.start(2) as cluster:
        yield cluster


def run_training(folder: Path, nodes: int, **environment: str) -> None:
    """Run reference and train with two processes, in a new folder beside the policy `base` and its responses."""
    folder.mkdir()
    set_params(folder, TINY | {"train.devices": 2, "train.nodes": nodes})
    for stage, options in (("reference", REFERENCE), ("train", TRAIN)):
        done = run_stage(folder, stage, "--model", "../base", *options, **environment)
        assert done.returncode == 0, done.stderr
        assert not [path for path in (folder / "scratch").glob("*/*") if path.parent.name == stage]


@pytest.mark.slow
def test_two_nodes_train_the_same_policy_as_two_processes(pairs: Path, cluster: Any) -> None:
    run_training(pairs / "one-node", 1)
    run_training(pairs / "two-nodes", 2, RAY_ADDRESS=cluster.address)
    for name in ("pairs.parquet", "iter1", "iter1.csv", "iter1.json"):
        assert files.digest(pairs / "two-nodes" / name) == files.digest(pairs / "one-node" / name), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"train.devices": 4, "train.nodes": 4, "train.device_batch": 2}, ["4 nodes", "cluster has 2", "lower train.nodes"]),
        ({"train.devices": 1, "train.nodes": 2}, ["train.devices", "is 1, not a multiple of train.nodes, 2"]),
    ],
)
def test_too_few_nodes_are_one_line(pairs: Path, cluster: Any, overrides: dict[str, Any], words: list[str]) -> None:
    folder = pairs / f"few-{overrides['train.devices']}"
    folder.mkdir()
    set_params(folder, TINY | overrides)
    done = run_stage(folder, "reference", "--model", "../base", *REFERENCE, RAY_ADDRESS=cluster.address)
    assert done.returncode == 1
    assert_message(done.stderr.splitlines()[-1], *words)
    assert not (folder / "pairs.parquet").exists()


LAUNCH = """
import os
from pathlib import Path
from stages.engines import distributed
from stages.runtime.errors import StageError, exit_with

def work(group):
    if os.environ["RANK"] == "1":
        raise StageError("row 3 is wrong: fix it")

try:
    distributed.launch(2, {"input": Path("input")}, work, 2)
except Exception as error:
    exit_with(error)
"""


@pytest.mark.slow
def test_the_error_of_one_node_is_reported_once_and_last(tmp_path: Path, cluster: Any) -> None:
    (tmp_path / "input").write_text("weights")
    (tmp_path / "launch.py").write_text(LAUNCH)
    done = clusters.run_program(tmp_path, "launch.py", RAY_ADDRESS=cluster.address)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "error: row 3 is wrong: fix it"
    assert done.stderr.count("row 3") == 1
