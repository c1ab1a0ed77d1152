import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from stages.runtime import cluster
from stages.runtime.errors import StageError
from stages.runtime.paths import ROOT
from support.clusters import import_ray
from support.messages import assert_message


def refuse_to_connect(monkeypatch: pytest.MonkeyPatch, address: str) -> str:
    """Return the message with which `connect` refuses an address, which must take seconds at most."""
    import_ray()
    monkeypatch.setenv(cluster.ADDRESS, address)
    started = time.monotonic()
    with pytest.raises(StageError) as raised:
        cluster.connect()
    assert time.monotonic() - started < 30
    return str(raised.value)


@pytest.mark.parametrize("address", ["ray://10.0.0.1:10001", "local", "10.0.0.1", "10.0.0.1:port", ":6379"])
def test_an_address_of_another_form_is_one_line(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    assert_message(refuse_to_connect(monkeypatch, address), "RAY_ADDRESS", address, "HOST:PORT")


@pytest.mark.parametrize("address", ["127.0.0.1:1", "127.0.0.2:1", "127.0.0.2:99999", "no-such-host.invalid:6379"])
def test_a_cluster_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    assert_message(refuse_to_connect(monkeypatch, address), f"no Ray cluster at {address}", "docs/scaling.md")


@pytest.mark.parametrize("reply", [b"SSH-2.0-OpenSSH_9.2\r\n", b""])
def test_another_server_at_the_address_is_one_line(monkeypatch: pytest.MonkeyPatch, reply: bytes) -> None:
    with socket.create_server(("127.0.0.2", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            connection.sendall(reply)
            connection.close()

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        message = refuse_to_connect(monkeypatch, f"127.0.0.2:{server.getsockname()[1]}")
        thread.join(10)
    assert_message(message, "no Ray cluster at 127.0.0.2")


class Nodes:
    """Stands for the module `ray`, with nodes of these resources at 10.0.0.0, 10.0.0.1, ..."""

    def __init__(self, *resources: dict[str, float]) -> None:
        self.resources = resources

    def nodes(self) -> list[dict[str, Any]]:
        rows = enumerate(self.resources)
        return [{"Alive": "dead" not in row, "NodeManagerAddress": f"10.0.0.{i}", "Resources": row} for i, row in rows]


def test_two_kinds_of_gpu_are_one_line() -> None:
    nodes = Nodes({"GPU": 8, "accelerator_type:H100": 1}, {"CPU": 4}, {"GPU": 8, "accelerator_type:A100": 1})
    with pytest.raises(StageError) as raised:
        cluster.check_kinds(cluster.list_nodes(nodes))
    assert_message(str(raised.value), "two kinds of GPU", "A100: 10.0.0.2", "H100: 10.0.0.0")


def test_nodes_that_have_gone_do_not_count() -> None:
    kept = cluster.list_nodes(Nodes({"GPU": 8, "accelerator_type:H100": 1}, {"accelerator_type:A100": 1, "dead": 1}))
    assert [node["NodeManagerAddress"] for node in kept] == ["10.0.0.0"]
    assert cluster.has_gpus(kept)
    assert not cluster.has_gpus(cluster.list_nodes(Nodes({"CPU": 4})))


def test_two_amounts_of_memory_are_two_kinds_of_gpu() -> None:
    """Ray calls both A100-SXM4-40GB and A100-SXM4-80GB "A100"."""
    cluster.refuse_kinds([("A100, 80 GiB", "10.0.0.0"), ("A100, 80 GiB", "10.0.0.1"), ("", "10.0.0.2")])
    with pytest.raises(StageError) as raised:
        cluster.refuse_kinds([("A100, 80 GiB", "10.0.0.0"), ("A100, 40 GiB", "10.0.0.1"), ("A100, 40 GiB", "10.0.0.1")])
    assert_message(str(raised.value), "two kinds of GPU", "A100, 40 GiB: 10.0.0.1;", "A100, 80 GiB: 10.0.0.0)")


class Calls:
    """Stands for the module `ray`: each call has ended, with a message, None, or an error."""

    class exceptions:  # noqa: N801 - its name in Ray
        RayError = ConnectionError

    def wait(self, pending: list[Any], timeout: float | None) -> tuple[list[Any], list[Any]]:
        return pending[:1], pending[1:]

    def get(self, call: Any) -> Any:
        if isinstance(call, Exception):
            raise call
        return call, None


@pytest.mark.parametrize(
    ("calls", "expected"),
    [
        (["out of GPU memory: lower it", cluster.WORKER_FAILED], "out of GPU memory"),
        ([cluster.WORKER_FAILED, "out of GPU memory: lower it"], "out of GPU memory"),
        ([ConnectionError("gone"), "out of GPU memory: lower it"], "out of GPU memory"),
        ([cluster.WORKER_FAILED, ConnectionError("gone")], "node-1 failed"),
        (["", ConnectionError("gone")], "node-1 failed"),
    ],
    ids=["first", "second", "after a node", "a node is the cause", "node"],
)
def test_the_cause_is_said_and_not_what_follows_from_it(
    calls: list[Any], expected: str, caplog: pytest.LogCaptureFixture
) -> None:
    named = {call or None: f"node-{index}" for index, call in enumerate(calls)}
    with pytest.raises(StageError) as raised:
        cluster._wait(Calls(), named)
    assert expected in str(raised.value)
    assert len([record for record in caplog.records if record.levelname == "WARNING"]) == len([c for c in calls if c]) - 1


def test_a_node_keeps_its_own_variables_and_no_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What its `ray start` was given, such as TF32 in place of float32, must not reach the results."""
    here = {"HF_HOME": "/nfs", "CUDA_VISIBLE_DEVICES": "0", "OPENAI_API_KEY": "secret", "TOKENIZERS_PARALLELISM": "false"}
    monkeypatch.setattr(os, "environ", here.copy())
    handed, start = cluster.hand_over(), cluster.worker_environment()
    assert handed == {name: value for name, value in here.items() if name != "CUDA_VISIBLE_DEVICES"}
    assert start["py_executable"] == sys.executable
    names = {"HF_HOME": "/nfs", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT)}
    assert start["env_vars"] == names, "Ray logs them"
    there = {"CUDA_VISIBLE_DEVICES": "3", "NVIDIA_TF32_OVERRIDE": "1", "RAY_JOB_ID": "01", "HF_HOME": "/other"}
    monkeypatch.setattr(os, "environ", there)
    monkeypatch.setattr(cluster, "setup_logging", lambda: None)
    monkeypatch.chdir(ROOT)
    cluster.take_over(str(tmp_path), handed)
    assert os.environ == handed | {"CUDA_VISIBLE_DEVICES": "3", "RAY_JOB_ID": "01"}
    assert Path.cwd() == tmp_path


def test_a_path_that_a_node_does_not_see_is_one_line() -> None:
    cluster.refuse_missing("10.0.0.2", None)
    with pytest.raises(StageError) as raised:
        cluster.refuse_missing("10.0.0.2", "/data/models")
    assert_message(str(raised.value), "node 10.0.0.2", "/data/models", "mount")


IMPORTS = """
import sys
from stages.runtime import cluster
cluster.hide_ray()
from vllm import LLM
print(sys.modules.get("ray"))
"""


@pytest.mark.slow
def test_without_a_cluster_nothing_imports_ray() -> None:
    """vLLM otherwise would, wherever it is installed."""
    environment = {name: value for name, value in os.environ.items() if name != cluster.ADDRESS} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", IMPORTS], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "None"
