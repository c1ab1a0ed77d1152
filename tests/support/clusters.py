"""A Ray cluster on this machine, whose nodes have addresses of their own on the loopback interface."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from stages.runtime.paths import ROOT

MEMORY = 80_000_000
"""Bytes of a node's object store; Ray accepts no less than 75 MiB."""


NICENESS = {"RAY_worker_niceness": "0"}
"""Ray's default is 15: what else this machine does would come first."""


def add_node(cluster: Any, index: int, **resources: Any) -> Any:
    """Add a node with one CPU, at 127.0.0.(2 + index), and wait for it."""
    address = f"127.0.0.{2 + index}"
    with mock.patch.dict(os.environ, NICENESS):
        return cluster.add_node(num_cpus=1, node_ip_address=address, object_store_memory=MEMORY, **resources)


def import_ray(module: str = "ray") -> Any:
    """Import a module of Ray, even if a stage that ran in this process has hidden it; skip the test if Ray is not installed."""
    if "ray" in sys.modules and sys.modules["ray"] is None:
        del sys.modules["ray"]
    return pytest.importorskip(module, reason="Ray is not installed: requirements/shared.in")


@contextlib.contextmanager
def start(nodes: int, **resources: Any) -> Iterator[Any]:
    """Start nodes of one CPU and these resources each; yield the `ray.cluster_utils.Cluster`."""
    cluster = import_ray("ray.cluster_utils").Cluster()
    try:
        for index in range(nodes):
            add_node(cluster, index, **resources, **({} if index else {"include_dashboard": False}))
        yield cluster
    finally:
        cluster.shutdown()


def start_program(folder: Path, *command: str, **environment: str) -> "subprocess.Popen[str]":
    """Start a Python program in `folder`, which can import `stages` and `support`."""
    values = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"} | environment
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, *command], cwd=folder, env=os.environ | values, stdout=pipe, stderr=pipe, text=True
    )


DEAL = """
import json, sys
from stages.runtime import errors, logs, workers
from support.workers import load_play

logs.setup_logging()
try:
    with workers.start(load_play, tuple(sys.argv[2:]), [""]) as deal:
        for index, result in deal([tuple(task) for task in json.loads(sys.argv[1])], lambda index: f"task {index}"):
            print("result", index, result, flush=True)
except Exception as error:
    errors.exit_with(error)
"""
"""A program that deals the tasks in its first argument to workers of `support.workers.load_play`, which gets the others."""


def deal(
    folder: Path, cluster: Any, tasks: list[tuple[str, Any]], *arguments: str, **environment: str
) -> "subprocess.Popen[str]":
    """Start DEAL on a cluster, in `folder`."""
    (folder / "deal.py").write_text(DEAL)
    return start_program(folder, "deal.py", json.dumps(tasks), *arguments, RAY_ADDRESS=cluster.address, **environment)


def results(process: "subprocess.Popen[str]") -> dict[int, str]:
    """Wait for the end of DEAL, which must succeed. Returns the results of the tasks."""
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    lines = [line.split(" ", 2) for line in output.splitlines() if line.startswith("result ")]
    return {int(index): result for _, index, result in lines}


def failure(process: "subprocess.Popen[str]") -> str:
    """Wait for the end of DEAL, which must fail. Returns the last line of stderr."""
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1, errors
    return errors.splitlines()[-1]
