"""A Ray cluster on this machine, whose nodes have addresses of their own on the loopback interface."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stages.runtime.paths import ROOT

MEMORY = 80_000_000
"""Bytes of a node's object store; Ray accepts no less than 75 MiB."""


def add_node(cluster: Any, index: int, **resources: Any) -> Any:
    """Add a node with one CPU, at 127.0.0.(2 + index), and wait for it."""
    return cluster.add_node(num_cpus=1, node_ip_address=f"127.0.0.{2 + index}", object_store_memory=MEMORY, **resources)


@contextlib.contextmanager
def start(nodes: int) -> Iterator[Any]:
    """Start nodes of one CPU each; yield the `ray.cluster_utils.Cluster`."""
    cluster_utils = pytest.importorskip("ray.cluster_utils", reason="Ray is not installed: requirements/cluster.in")
    os.environ["RAY_worker_niceness"] = "0"  # Ray's default is 15: what else this machine does would come first
    cluster = cluster_utils.Cluster()
    try:
        for index in range(nodes):
            add_node(cluster, index, **({} if index else {"include_dashboard": False}))
        yield cluster
    finally:
        cluster.shutdown()
        del os.environ["RAY_worker_niceness"]


def run_program(folder: Path, *command: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run a Python program in `folder`, from where it can import `stages`."""
    values = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run([sys.executable, *command], cwd=folder, env=values, capture_output=True, text=True, check=False)
