import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.artifacts import files
from stages.engines import distributed
from stages.runtime import cluster, devices
from stages.runtime.errors import StageError
from stages.runtime.paths import ROOT
from support.messages import assert_message

LAUNCH = """
import os
from pathlib import Path
from stages.artifacts import files
from stages.engines import distributed
from stages.runtime.errors import StageError

def work(group):
    rank = os.environ["RANK"]
    if os.environ.get("FAIL") in (rank, "all"):
        raise StageError("row 3 is wrong: fix it")
    if os.environ.get("FULL") == rank:
        raise OSError(28, "No space left on device")
    Path(rank).write_text(f"{group.devices} {group.digests['input']}")

if "LOCAL_RANK" in os.environ:  # a worker
    files.digest = None
distributed.launch(2, {"input": Path("input")}, work)
"""


def launch_two(folder: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run LAUNCH, a program that launches two processes, in the folder."""
    (folder / "input").write_text("weights")
    (folder / "launch.py").write_text(LAUNCH)
    values = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run([sys.executable, "launch.py"], cwd=folder, env=values, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_launched_processes_do_not_hash_the_inputs_again(tmp_path: Path) -> None:
    done = launch_two(tmp_path)
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / rank).read_text() for rank in "01"] == [f"2 {files.digest(tmp_path / 'input')}"] * 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variable", "rank", "message"),
    [
        ("FAIL", "0", "row 3 is wrong: fix it"),
        ("FAIL", "1", "row 3 is wrong: fix it"),
        ("FAIL", "all", "row 3 is wrong: fix it"),
        ("FULL", "1", "free some space"),
    ],
)
def test_the_error_of_launched_processes_is_reported_once_and_last(
    tmp_path: Path, variable: str, rank: str, message: str
) -> None:
    done = launch_two(tmp_path, **{variable: rank})
    assert done.returncode == 1
    assert message in done.stderr.splitlines()[-1]
    assert done.stderr.count(message) == 1


def test_more_devices_than_gpus_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(distributed, "has_gpus", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    with pytest.raises(StageError) as raised:
        distributed.launch(4, {}, lambda group: None)
    assert_message(str(raised.value), "train.devices", "4", "3 GPUs", "lower train.devices")


@pytest.mark.parametrize("count", [1025, 10**6])
def test_more_processes_than_the_cores_can_run_are_one_line(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    with pytest.raises(StageError) as raised:
        distributed.launch(count, {}, lambda group: None)
    assert_message(str(raised.value), f"train.devices is {count}", "16 processes", "lower train.devices")


@pytest.mark.parametrize(
    ("devices", "nodes", "address", "words"),
    [
        (4, 2, "", ["train.nodes is 2", "RAY_ADDRESS is not set", "docs/scaling.md"]),
        (4, 3, "10.0.0.1:6379", ["train.devices", "4", "not a multiple of train.nodes, 3"]),
    ],
)
def test_several_nodes_need_a_cluster_and_equal_shares(
    devices: int, nodes: int, address: str, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(StageError) as raised:
        distributed.launch(devices, {}, lambda group: None, nodes)
    assert_message(str(raised.value), *words)


def test_a_node_runs_its_share_of_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun numbers the processes by node; their threads are those of as many processes on one machine."""
    started: list[Any] = []
    monkeypatch.setattr(distributed, "_run_torchrun", lambda *arguments: started.append(arguments))
    monkeypatch.setattr(os, "environ", {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"})
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    distributed._run_node(cluster.Place(1, 2, "10.0.0.1", 29500), 4, 8, ["-m", "stages"], {"model": "0"})
    options = ["--nnodes=2", "--node_rank=1", "--nproc_per_node=4", "--master_addr=10.0.0.1", "--master_port=29500"]
    assert started == [(options, ["-m", "stages"], {"model": "0"})]
    assert os.environ["OMP_NUM_THREADS"] == "2"


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this process look like a launcher's worker, and restore its environment variables afterwards."""
    for name in (*devices.LAUNCHER, "DS_ACCELERATOR", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}.get(name, "0"))
    for name in (devices.LAUNCH_FOLDER, "DVC_STAGE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("launched")
def test_a_process_of_another_launcher_hashes_the_inputs_itself(tmp_path: Path) -> None:
    (tmp_path / "input").write_text("weights")
    groups: list[distributed.Group] = []
    distributed.launch(2, {"input": tmp_path / "input"}, groups.append)
    assert groups == [distributed.Group(2, {"input": files.digest(tmp_path / "input")})]


@pytest.mark.usefixtures("launched")
def test_too_little_gpu_memory_names_its_parameter() -> None:
    def run_out_of_memory(group: distributed.Group) -> None:
        raise torch.OutOfMemoryError

    with pytest.raises(StageError) as raised:
        distributed.launch(1, {}, run_out_of_memory)
    assert_message(str(raised.value), "out of GPU memory", "lower train.device_batch")


@pytest.mark.usefixtures("launched")
def test_another_number_of_processes_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import deepspeed

    monkeypatch.setattr(deepspeed, "init_distributed", lambda **_: None)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(StageError) as raised:
        distributed.start_group(distributed.Group(2, {}))
    assert_message(str(raised.value), "launcher started 3 processes", "train.devices is 2")
