"""Workers on a Ray cluster: on each node, one actor per GPU or, without GPUs, as many as this machine would start.

Nodes may join and leave while a stage works: the task of a worker that is lost is dealt again. stages.runtime.workers deals.
"""

import contextlib
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from stages.runtime import cluster, devices, processes
from stages.runtime.errors import StageError, describe, message_or_raise
from stages.runtime.logs import log

POLL_SECONDS = 5
"""How often to look for new nodes."""
IDLE_SECONDS = 60
"""How often to say that no worker has a device."""
LOSSES = 2
"""How many workers may die on the same task, or while loading on the same device, on nodes that live on, before the
stage ends."""

Slot = tuple[str, int]
"""A node's ID, and a number below the number of its workers."""


@contextlib.contextmanager
def start(
    load: Callable[..., Any], arguments: tuple[Any, ...], devices: list[str], folder: Path | None, inputs: Sequence[Path]
) -> Iterator["Actors"]:
    """Join the cluster; yield a crew that has no workers yet. The arguments are those of `workers.start`.

    Raises StageError if there is no cluster or it fails, if one of its nodes does not see this folder or one of the inputs, and
    if none has room for a worker.
    """
    ray = cluster.connect()
    crew = None
    try:
        with cluster.shared_paths(inputs, folder) as shared:
            crew = Actors(ray, (load, arguments, folder and folder.resolve()), devices, shared)
            crew.add_nodes()
            if not crew.slots:
                raise StageError(
                    f"no node of the Ray cluster has {crew.gpus} GPUs for a worker: add nodes, or lower engine.tensor_parallel"
                )
            yield crew
    except ray.exceptions.RayError as error:
        raise StageError(f"the Ray cluster failed ({describe(error)}): restart it, then re-run to resume") from error
    finally:
        if crew:
            crew.kill()
        ray.shutdown()


class Actor:
    """A worker of the crew: an actor of Ray, which is starting, loading, free, computing, or lost."""

    def __init__(self, ray: Any, slot: Slot, host: str, gpus: int, folder: Path | None) -> None:
        self.slot, self.host, self.task = slot, host, None
        self.since: float | None = None
        self.loaded = False
        options = {
            "num_cpus": 0,
            "num_gpus": gpus,
            "max_restarts": 0,
            "runtime_env": cluster.worker_environment(),
            "scheduling_strategy": cluster.on_node(slot[0]),
        }
        self.handle = ray.remote(_Computer).options(**options).remote(str(Path.cwd()), cluster.hand_over(), folder, gpus)
        self.pending = self.handle.wait_for_device.remote()

    def is_free(self) -> bool:
        return self.loaded and self.pending is None

    def send(self, task: Any) -> None:
        self.task, self.since = task, time.monotonic()
        self.pending = self.handle.compute.remote(task)


class Actors:
    """A crew of actors."""

    def __init__(self, ray: Any, job: tuple[Any, ...], devices: list[str], shared: list[str]) -> None:
        self.ray, self.job, self.shared = ray, job, shared
        self.devices = devices
        self.gpus = len(devices[0].split(","))  # of each worker, where there are any: several for tensor parallelism
        self.hosts: dict[str, str] = {}
        self.first: set[str] = set()  # the nodes that were there when the stage started
        self.kind: tuple[str, str] | None = None  # of the first worker's GPUs, and its host
        self.slots: list[Slot] = []
        self.workers: list[Actor] = []
        self.with_gpus = False
        self.losses: Counter[Any] = Counter()
        self.lost: list[Any] = []  # their tasks, kept so that no other task gets the identity of one
        self.most, self.polled, self.idle_since = 0, 0.0, time.monotonic()
        self.hires = True

    def staff(self, tasks: int) -> "Actors":
        """Start workers for so many tasks, as far as there are devices; those on new nodes follow. Returns the crew."""
        self.most = max(self.most, tasks)
        taken = {worker.slot for worker in self.workers}
        for slot in self.slots:
            if self.hires and slot not in taken and len(self.workers) < self.most:
                self.workers.append(self._hire(slot))
        return self

    def _hire(self, slot: Slot) -> Actor:
        return Actor(self.ray, slot, self.hosts[slot[0]], self.gpus if self.with_gpus else 0, self.job[-1])

    def add_nodes(self) -> None:
        """Find the nodes that are alive, and check new ones. Raises StageError if one of the first does not see a path or has
        another kind of GPU; one that joins later is left out, with a warning.

        The first nodes decide whether the stage computes on GPUs or on CPUs, so that no result comes from both.
        """
        nodes = cluster.list_nodes(self.ray)
        first, self.polled = not self.hosts, time.monotonic()
        if first:
            self.with_gpus = cluster.has_gpus(nodes)
            self.first = {node["NodeID"] for node in nodes}
        self.slots = [slot for slot in self.slots if slot[0] in {node["NodeID"] for node in nodes}]
        new = [node for node in nodes if node["NodeID"] not in self.hosts]
        checks = [cluster.find_missing(self.ray, self.shared, cluster.on_node(node["NodeID"])) for node in new]
        for node, check in zip(new, checks, strict=True):
            name, host = node["NodeID"], node["NodeManagerAddress"]
            self.hosts[name] = host
            try:
                cluster.check_kinds([node, *(other for other in nodes if other["NodeID"] in {slot[0] for slot in self.slots})])
                cluster.refuse_missing(host, self.ray.get(check)[1])
            except StageError as error:
                if first:
                    raise
                log.warning("%s; continuing without it", error)
                continue
            except self.ray.exceptions.RayError:  # it has gone again, or is looked at once more
                del self.hosts[name]
                continue
            gpus = int(node["Resources"].get("GPU", 0))
            count = gpus // self.gpus if self.with_gpus else 0 if gpus else len(self.devices)
            self.slots += [(name, index) for index in range(count)]
            if not first:
                log.info("node %s has joined the cluster: %d more workers", host, count)

    def wait(self, seconds: float | None) -> list[tuple[Actor, str, Any]]:
        """Wait as `workers.Crew` says, and start workers on nodes that have joined."""
        if time.monotonic() - self.polled >= POLL_SECONDS:
            self.add_nodes()
            self.staff(self.most)
            self.warn_if_idle()
        busy = {worker.pending: worker for worker in self.workers if worker.pending is not None}
        timeout = POLL_SECONDS if seconds is None else min(seconds, POLL_SECONDS)
        if not busy:
            time.sleep(timeout)
            return []
        done, _ = self.ray.wait(list(busy), num_returns=1, timeout=timeout)
        if done:
            done, _ = self.ray.wait(list(busy), num_returns=len(busy), timeout=0)
        return [report for reference in done if busy[reference].pending is reference for report in self._read(busy[reference])]

    def warn_if_idle(self) -> None:
        """Say once a minute that no worker has a device: others use the cluster's GPUs, or its nodes have left."""
        now = time.monotonic()
        if any(worker.loaded or worker.since is not None for worker in self.workers):
            self.idle_since = now
        elif now - self.idle_since >= IDLE_SECONDS:
            log.warning("waiting for a free device of the Ray cluster; see `ray status`")
            self.idle_since = now

    def _read(self, worker: Actor) -> list[tuple[Actor, str, Any]]:
        """Return what a worker reports whose call has ended, and start its next one."""
        try:
            kind, value = self.ray.get(worker.pending)
        except self.ray.exceptions.RayTaskError as error:
            log.warning("%s", error)
            kind, value = "failed", f"a worker on node {worker.host} failed; see its message above: fix the cause, then re-run"
        except self.ray.exceptions.RayError as error:
            return [self._lose(worker, describe(error))]
        worker.pending, worker.since = None, None
        if kind == "placed":
            load, arguments, _ = self.job
            worker.since, worker.pending = time.monotonic(), worker.handle.load.remote(load, arguments)
            return []
        fault = value if kind == "unfit" else self._find_fault(worker, value) if kind == "ready" else ""
        if fault:
            return self._refuse(worker, fault)
        worker.loaded = True
        return [(worker, kind, value)]

    def _find_fault(self, worker: Actor, kind: str) -> str:
        """Return why a worker that has loaded must not compute: its GPUs are of another kind than the first worker's. Returns
        "" if it may. kind: of `devices.check_granted`."""
        self.kind = self.kind or (kind, worker.host)
        try:
            cluster.refuse_kinds([self.kind, (kind, worker.host)])
        except StageError as error:
            return str(error)
        devices.note_remote(kind, self.gpus * len(self.slots))
        return ""

    def _refuse(self, worker: Actor, reason: str) -> list[tuple[Actor, str, Any]]:
        """Report what ends the stage or, if the worker's node has joined later, leave the node out, with a warning."""
        node = worker.slot[0]
        if node in self.first:
            return [(worker, "failed", reason)]
        log.warning("%s; continuing without node %s", reason, worker.host)
        self.slots = [slot for slot in self.slots if slot[0] != node]
        there = [other for other in self.workers if other.slot[0] == node]
        for other in there:
            self.replace(other)
        return [(other, "lost", f"node {worker.host} is left out") for other in there]

    def _lose(self, worker: Actor, reason: str) -> tuple[Actor, str, Any]:
        """Report that a worker has ended, and start another in its place if its node is still there."""
        self.add_nodes()
        cause: Any = id(worker.task) if worker.loaded else worker.slot
        self.lost.append(worker.task)
        if worker.slot in self.slots:
            self.losses[cause] += 1
        if self.losses[cause] < LOSSES:
            self.replace(worker)
            return worker, "lost", f"its worker on node {worker.host} is lost"
        self.stop_hiring()
        self.replace(worker)
        log.warning("node %s: %s", worker.host, reason)
        how = f"died {LOSSES} times {'on the same task' if worker.loaded else 'while loading'} (out of memory?)"
        return worker, "failed", f"workers on the cluster {how}: fix the cause, then re-run to resume"

    def replace(self, worker: Any) -> None:
        """Kill a worker and start another in its place, unless its node has gone or `stop_hiring` was called."""
        worker.since, worker.pending = None, None
        self.ray.kill(worker.handle)
        self.workers.remove(worker)
        if self.hires and worker.slot in self.slots:
            self.workers.append(self._hire(worker.slot))

    def stop_hiring(self) -> None:
        self.hires = False

    def end(self) -> None:
        self.kill()

    def kill(self) -> None:
        for worker in self.workers:
            self.ray.kill(worker.handle)
        self.workers.clear()


class _Computer:
    """What an actor does in its process."""

    def __init__(self, folder: str, environment: dict[str, str], logs: Path | None, gpus: int) -> None:
        self.folder, self.environment, self.logs, self.gpus = folder, environment, logs, gpus

    def wait_for_device(self) -> tuple[str, Any]:
        def prepare() -> None:
            cluster.take_over(self.folder, self.environment)
            if self.logs:
                processes.redirect_output(self.logs / f"worker-{os.uname().nodename}-{os.getpid()}.log")

        return self._try("placed", prepare)

    def load(self, load: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[str, Any]:
        """Return "ready" and the kind of GPU, "" without any; or "unfit" and what is wrong with the GPUs of this process."""
        try:
            kind = devices.check_granted(self.gpus)
        except StageError as error:
            return "unfit", str(error)

        def prepare() -> str:
            self.work = load(*arguments)
            return kind

        return self._try("ready", prepare)

    def compute(self, task: Any) -> tuple[str, Any]:
        return self._try("result", lambda: self.work(task))

    def _try(self, kind: str, function: Callable[[], Any]) -> tuple[str, Any]:
        try:
            return kind, function()
        except Exception as error:
            return "failed", message_or_raise(error)
