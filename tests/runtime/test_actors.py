"""Workers on a Ray cluster of two nodes, whose stage is a program that deals tasks."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stages.runtime import actors, devices
from stages.runtime import cluster as clusters_of_ray
from stages.runtime.errors import StageError
from support import clusters
from support.messages import assert_message
from support.workers import load_play


class FakeRay:
    """Stands for the module `ray`: nodes by name, each with its resources, and the actors on them."""

    class exceptions:  # noqa: N801 - its name in Ray
        RayError = ConnectionError
        RayTaskError = ZeroDivisionError

    def __init__(self, **nodes: dict[str, float]) -> None:
        self.found, self.killed = nodes, list[Any]()

    def nodes(self) -> list[dict[str, Any]]:
        rows = self.found.items()
        return [{"Alive": True, "NodeID": name, "NodeManagerAddress": f"at-{name}", "Resources": row} for name, row in rows]

    def get(self, reference: Any) -> Any:
        if isinstance(reference, Exception):
            raise reference
        return reference

    def kill(self, handle: Any) -> None:
        self.killed.append(handle)

    def shutdown(self) -> None: ...


class FakeActor:
    """Stands for actors.Actor."""

    def __init__(self, ray: FakeRay, slot: actors.Slot, host: str, gpus: int, folder: Path | None) -> None:
        self.slot, self.host, self.gpus = slot, host, gpus
        self.handle, self.task, self.since, self.pending, self.loaded = self, None, None, None, False
        self.load = SimpleNamespace(remote=lambda *_: "loading")


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Without a cluster: node -> the path that it does not see."""
    missing: dict[str, str] = {}
    monkeypatch.setattr(actors, "Actor", FakeActor)
    monkeypatch.setattr(clusters_of_ray, "on_node", lambda node: node)
    monkeypatch.setattr(clusters_of_ray, "find_missing", lambda ray, paths, node: ("", missing.get(node), 0))
    return missing


def make_crew(ray: FakeRay, devices: list[str]) -> actors.Actors:
    crew = actors.Actors(ray, (None, (), None), devices, [])
    crew.add_nodes()
    return crew


@pytest.mark.parametrize(
    ("nodes", "devices", "tasks", "slots", "gpus"),
    [
        ({"a": {"CPU": 4}, "b": {"CPU": 4}}, [""], 9, "a0 b0", 0),
        ({"a": {"CPU": 4}, "b": {"CPU": 4}}, ["", ""], 9, "a0 a1 b0 b1", 0),
        ({"a": {"CPU": 4, "GPU": 2}, "b": {"CPU": 4}}, [""], 9, "a0 a1", 1),
        ({"a": {"GPU": 8}, "b": {"GPU": 3}}, ["0,1,2,3"], 9, "a0 a1", 4),
        ({"a": {"GPU": 2}, "b": {"GPU": 2}}, ["0"], 3, "a0 a1 b0", 1),
    ],
    ids=["nodes", "cores", "head without GPUs", "tensor parallelism", "few tasks"],
)
def test_there_is_one_worker_per_device_and_no_more_than_tasks(
    fakes: dict[str, str], nodes: Any, devices: list[str], tasks: int, slots: str, gpus: int
) -> None:
    crew = make_crew(FakeRay(**nodes), devices).staff(tasks)
    assert " ".join(f"{name}{index}" for name, index in (worker.slot for worker in crew.workers)) == slots
    assert {worker.gpus for worker in crew.workers} == {gpus}  # type: ignore[attr-defined]


def test_a_node_that_does_not_see_a_path_stops_the_stage_at_its_start_only(
    fakes: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    fakes["b"] = "/models"
    with pytest.raises(StageError) as raised:
        make_crew(FakeRay(a={"CPU": 1}, b={"CPU": 1}), [""])
    assert_message(str(raised.value), "at-b", "/models")
    ray = FakeRay(a={"CPU": 1})
    crew = make_crew(ray, [""]).staff(5)
    ray.found["b"] = {"CPU": 1}
    crew.add_nodes()
    assert [worker.slot[0] for worker in crew.staff(5).workers] == ["a"]
    assert "/models" in caplog.text


def test_a_file_that_a_node_lacks_is_one_line(fakes: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Such as one of PairRM's in the Hub's cache, which is noticed before a worker starts to load it."""
    snapshot = "hub/models--llm-blender--PairRM/snapshots/5b880cc73776ac75a835b3e0bdfb1c6be1c2f5c0"
    files = [tmp_path / snapshot / name for name in ("config.json", "model.safetensors")]

    def find_missing(_: FakeRay, paths: list[str], node: str) -> tuple[str, str | None, int]:
        return "", str(files[1]) if node == "b" and str(files[1]) in paths else None, 0

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(clusters_of_ray, "find_missing", find_missing)
    monkeypatch.setattr(clusters_of_ray, "connect", lambda: FakeRay(a={"CPU": 1}, b={"CPU": 1}))
    with pytest.raises(StageError) as raised, actors.start(load_play, (), [""], None, files):
        pass
    assert_message(str(raised.value), "node at-b", str(files[1]), "mount", "HF_HOME")


def test_a_lost_worker_is_replaced_only_where_its_node_lives_on(fakes: dict[str, str]) -> None:
    ray = FakeRay(a={"CPU": 1}, b={"CPU": 1})
    crew = make_crew(ray, [""]).staff(2)
    first, second = crew.workers
    task = ("task",)
    first.task = second.task = task  # type: ignore[assignment]
    first.loaded = second.loaded = True
    del ray.found["b"]
    second.pending = ConnectionError("node died")
    assert crew._read(second) == [(second, "lost", "its worker on node at-b is lost")]
    assert [worker.slot for worker in crew.workers] == [("a", 0)]
    assert ray.killed == [second]
    first.pending = ConnectionError("actor died")
    assert crew._read(first) == [(first, "lost", "its worker on node at-a is lost")]
    (third,) = crew.workers
    assert third.slot == ("a", 0)
    third.task, third.loaded, third.pending = task, True, ConnectionError("actor died")  # type: ignore[assignment]
    ((_, kind, message),) = crew._read(third)
    assert kind == "failed"
    assert_message(message, "died 2 times", "same task", "re-run")
    ray.found["c"] = {"CPU": 1}
    crew.add_nodes()
    assert not crew.staff(2).workers, "the stage ends"


def test_workers_that_die_while_loading_count_for_their_device(fakes: dict[str, str]) -> None:
    """A broken node of many must not end the stage; a device on which loading fails twice does."""
    crew = make_crew(FakeRay(a={"CPU": 1}, b={"CPU": 1}, c={"CPU": 1}), [""]).staff(3)
    for worker in list(crew.workers):
        worker.pending = ConnectionError("actor died")
        ((_, kind, _),) = crew._read(worker)
        assert kind == "lost"
    again = crew.workers[0]
    again.pending = ConnectionError("actor died")
    ((_, kind, message),) = crew._read(again)
    assert kind == "failed"
    assert_message(message, "died 2 times", "loading", "re-run")


def test_a_stage_that_starts_on_cpus_stays_there_and_one_on_gpus_too(fakes: dict[str, str]) -> None:
    """Otherwise one result would hold numbers of both."""
    on_cpus, on_gpus = FakeRay(a={"CPU": 4}), FakeRay(a={"CPU": 4, "GPU": 1})
    crews = [make_crew(on_cpus, [""]), make_crew(on_gpus, [""])]
    for ray, crew in zip((on_cpus, on_gpus), crews, strict=True):
        ray.found |= {"b": {"CPU": 4, "GPU": 2}, "c": {"CPU": 4}}
        crew.add_nodes()
    assert [slot[0] for slot in crews[0].slots] == ["a", "c"]
    assert [slot[0] for slot in crews[1].slots] == ["a", "b", "b"]
    del on_gpus.found["a"], on_gpus.found["b"]
    crews[1].add_nodes()
    assert crews[1].slots == []


def test_a_node_with_another_kind_of_gpu_is_refused_first_and_left_out_later(
    fakes: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    one, other = ({"GPU": 1, f"accelerator_type:{kind}": 1} for kind in ("H100", "A100"))
    with pytest.raises(StageError) as raised:
        make_crew(FakeRay(a=one, b=other), ["0"])
    assert_message(str(raised.value), "H100", "A100")
    ray = FakeRay(a=one)
    crew = make_crew(ray, ["0"])
    ray.found["b"] = other
    crew.add_nodes()
    ray.found["c"] = one
    crew.add_nodes()
    assert crew.slots == [("a", 0), ("c", 0)]
    assert "A100" in caplog.text


def let_load(crew: actors.Actors, worker: Any, *answer: str) -> list[Any]:
    """Let a worker answer that it has loaded. Returns the reports that follow."""
    worker.pending = answer
    return crew._read(worker)


def test_gpus_that_ray_does_not_tell_apart_end_the_stage(fakes: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As those with other memory: what torch sees in the worker's process counts."""
    monkeypatch.setattr(devices, "REMOTE", {})
    resources = {"GPU": 2, "accelerator_type:A100": 1}
    crew = make_crew(FakeRay(a=resources, b=resources), ["0"]).staff(3)
    first, second, third = crew.workers
    assert let_load(crew, first, "placed", "") == []
    assert first.pending == "loading"
    for worker in (first, second):
        assert let_load(crew, worker, "ready", "A100, 80 GiB") == [(worker, "ready", "A100, 80 GiB")]
    ((worker, kind, message),) = let_load(crew, third, "ready", "A100, 40 GiB")
    assert (worker, kind, third.loaded) == (third, "failed", False)
    assert_message(message, "two kinds", "A100, 40 GiB: at-b", "A100, 80 GiB: at-a")
    assert devices.REMOTE == {"A100": 4}, "of a cluster with four GPUs, though there were three tasks"


@pytest.mark.parametrize("answer", [("ready", "A100, 40 GiB"), ("unfit", "node b: torch sees 0")])
def test_a_node_whose_gpus_cannot_be_used_is_left_out_if_it_joins_later(
    fakes: dict[str, str], caplog: pytest.LogCaptureFixture, answer: tuple[str, str]
) -> None:
    resources = {"GPU": 2, "accelerator_type:A100": 1}
    ray = FakeRay(a=resources)
    crew = make_crew(ray, ["0"]).staff(9)
    let_load(crew, crew.workers[0], "ready", "A100, 80 GiB")
    ray.found |= {"b": resources, "c": resources}
    crew.add_nodes()
    late = crew.staff(9).workers[2:4]
    assert [worker.slot for worker in late] == [("b", 0), ("b", 1)]  # type: ignore[attr-defined]
    reports = let_load(crew, late[1], *answer)
    assert [(worker, kind) for worker, kind, _ in reports] == [(worker, "lost") for worker in late]
    assert ray.killed == late
    assert_message(caplog.text, "without node at-b")
    assert [slot[0] for slot in crew.slots] == ["a", "a", "c", "c"]
    assert [worker.slot[0] for worker in crew.staff(9).workers] == ["a", "a", "c", "c"]


def test_gpus_that_cannot_be_used_end_the_stage_at_its_start(fakes: dict[str, str]) -> None:
    crew = make_crew(FakeRay(a={"GPU": 1}), ["0"]).staff(1)
    (worker,) = crew.workers
    assert let_load(crew, worker, "unfit", "node a: torch sees 0") == [(worker, "failed", "node a: torch sees 0")]


def test_a_node_that_cannot_be_asked_is_asked_again(fakes: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    ray = FakeRay(a={"CPU": 1})
    answers = iter([ConnectionError("no memory"), ("", None, 0)])
    monkeypatch.setattr(clusters_of_ray, "find_missing", lambda ray, paths, node: next(answers))
    crew = make_crew(ray, [""])
    assert crew.slots == []
    crew.add_nodes()
    assert crew.slots == [("a", 0)]


def test_waiting_for_a_device_is_said(fakes: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    crew = make_crew(FakeRay(a={"GPU": 1}), ["0"]).staff(1)
    crew.warn_if_idle()
    assert not caplog.records
    crew.idle_since -= actors.IDLE_SECONDS
    crew.warn_if_idle()
    assert_message(caplog.text, "waiting", "ray status")
    caplog.clear()
    crew.workers[0].since, crew.idle_since = 1.0, 0.0
    crew.warn_if_idle()
    assert not caplog.records


RUN = """
from stages.runtime import cluster, devices
from stages.runtime.errors import exit_with

try:
    cluster.run_on_nodes(1, 1, [], devices.check_granted, 1)
except Exception as error:
    exit_with(error)
"""


@pytest.mark.slow
def test_gpus_that_torch_does_not_see_are_one_line(tmp_path: Path) -> None:
    """As with a driver that is too old: the stage would compute on CPUs. Ray believes what it is told of this machine."""
    (tmp_path / "run.py").write_text(RUN)
    if torch.cuda.is_available():
        pytest.skip("torch sees the GPUs of this machine")
    with clusters.start(1, num_gpus=1) as cluster:
        deal = clusters.deal(tmp_path, cluster, [("", 1)])
        run = clusters.start_program(tmp_path, "run.py", RAY_ADDRESS=cluster.address)
        for process in (deal, run):
            message = clusters.failure(process)
            assert_message(message, f"node {os.uname().nodename}", "1 GPU", "torch sees 0", "restart Ray")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with clusters.start(2) as cluster:
        yield cluster


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 200
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.1)


@pytest.mark.slow
def test_every_node_works_and_a_dead_worker_is_replaced(tmp_path: Path, cluster: Any) -> None:
    found = clusters.results(clusters.deal(tmp_path, cluster, [("meet", 2), ("meet", 2), ("die once", 7), ("", 8)]))
    assert found[0] != found[1]
    assert (found[2], found[3]) == ("7", "8")


@pytest.mark.slow
def test_a_hanging_worker_is_given_up(tmp_path: Path, cluster: Any) -> None:
    tasks = [("hang once", 3), ("", 4)]
    assert clusters.results(clusters.deal(tmp_path, cluster, tasks, SPPO_TIMEOUT="30")) == {0: "3", 1: "4"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tasks", "arguments", "words"),
    [
        ([("fail", "row 3 is wrong: fix it"), ("", 1)], [], ["row 3 is wrong: fix it"]),
        ([("die", 1)], [], ["died 2 times", "re-run"]),
        ([("crash", 1)], [], ["a worker on node 127.0.0.", "failed", "re-run"]),
        ([("", 1)], ["fail"], ["a worker on node 127.0.0.", "failed"]),
    ],
    ids=["fail", "die", "crash", "load"],
)
def test_a_failing_task_is_one_line(
    tmp_path: Path, cluster: Any, tasks: list[tuple[str, Any]], arguments: list[str], words: list[str]
) -> None:
    assert_message(clusters.failure(clusters.deal(tmp_path, cluster, tasks, *arguments)), *words)


@pytest.mark.slow
def test_a_node_that_joins_late_is_used_and_the_tasks_of_one_that_is_lost_are_dealt_again(tmp_path: Path, cluster: Any) -> None:
    process = clusters.deal(
        tmp_path, cluster, [("meet", 3), ("meet", 3), ("meet", 3), *[("hang on the node", "127.0.0.4")] * 4]
    )
    while len(list(tmp_path.glob("here-*"))) < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    late = clusters.add_node(cluster, 2)
    wait_for(tmp_path / "hangs-127.0.0.4")
    cluster.remove_node(late, allow_graceful=False)
    found = clusters.results(process)
    assert len({found[index] for index in range(3)}) == 3
    assert [found[index] for index in range(3, 7)] == ["127.0.0.4"] * 4
