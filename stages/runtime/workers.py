"""Deal tasks to workers, one per device; each gets its next task when it has finished the last.

A worker loads once what it computes with. The stage's own process receives the results and alone writes files. It knows its
workers only as a `Crew`, so they need not be processes of this machine.
"""

import contextlib
import gc
import multiprocessing
import os
import pickle
import re
import signal
import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection
from pathlib import Path
from typing import Any, Protocol

from stages.runtime import actors, cluster, processes
from stages.runtime.errors import StageError, message_or_raise, quote
from stages.runtime.logs import log, setup_logging

TIMEOUT = "SPPO_TIMEOUT"
"""Environment variable: after how many seconds with one task, or with loading, a worker is abandoned. Default: never."""
ATTEMPTS = 2
"""How many workers may be abandoned over the same task."""
END_SECONDS = 10
"""How long a worker may take to end once it has nothing left to do."""
SIZE_BYTES = 8
"""A message between the processes is the size of its pickle, as an integer of so many bytes, and the pickle."""

Load = Callable[..., Callable[[Any], Any]]
Deal = Callable[..., Iterator[tuple[int, Any]]]
"""`deal(tasks, describe)`: yields each task's index and result as soon as it is finished. describe: index -> the task's name,
for messages. Raises StageError if a worker fails, dies, or is abandoned over the same task for the second time; before that,
it yields the results of the tasks that the other workers are still computing."""


class Worker(Protocol):
    """Computes one task at a time."""

    since: float | None
    """Since when, by time.monotonic(), it has been loading or computing; None if it is free, or waits for its device."""

    def is_free(self) -> bool:
        """Return whether it has loaded and has no task."""

    def send(self, task: Any) -> None:
        """Give it a task."""


class Crew(Protocol):
    """The workers of a stage. Workers may be added while it works."""

    @property
    def workers(self) -> Sequence[Worker]:
        """Those that work, or will."""

    def wait(self, seconds: float | None) -> Sequence[tuple[Worker, str, Any]]:
        """Wait, at most so many seconds, for what workers report, and return it: a worker and "ready", None; "result", its
        value; "failed", a message; or "lost", why: the worker has ended, and its task is dealt again."""

    def replace(self, worker: Worker) -> None:
        """Kill a worker and, unless `stop_hiring` was called, start another in its place."""

    def stop_hiring(self) -> None:
        """Start no more workers."""

    def end(self) -> None:
        """End the workers, which have nothing left to do."""

    def kill(self) -> None:
        """Kill the workers."""


@contextlib.contextmanager
def start(
    load: Load,
    arguments: tuple[Any, ...],
    devices: list[str],
    *,
    fork: bool = False,
    folder: Path | None = None,
    inputs: Sequence[Path] = (),
) -> Iterator[Deal]:
    """Start one worker per device; yield the function that deals tasks to them. One device: this process computes.

    Where RAY_ADDRESS names a cluster, its devices take the place of this machine's: see `actors.start`.

    load: a module-level function; `load(*arguments)` returns the function that computes one task. devices: see `list_devices`.
    fork: start workers on CPUs as copies of this process, so that they need not repeat its imports. folder: where each worker
    writes what it prints, to worker-PID.log; None: it prints to this process's stderr. inputs: files that workers read, which
    all nodes of a cluster must see.
    Raises StageError if SPPO_TIMEOUT is not a positive integer.
    """
    timeout = read_timeout()
    if cluster.is_asked_for():
        with actors.start(load, arguments, devices, folder, inputs) as remote:
            yield lambda tasks, describe: deal(remote.staff(len(tasks)), tasks, describe, timeout)
        return
    if len(devices) == 1:
        if timeout:
            log.warning("%s has no effect here: a single device's work is done by the stage's own process", TIMEOUT)
        compute = load(*arguments)
        yield lambda tasks, _: ((index, compute(task)) for index, task in enumerate(tasks))
        return
    context = multiprocessing.get_context("fork" if fork and not devices[0] else "spawn")  # CUDA does not survive a fork
    crew = _Processes(context, (load, arguments, folder), devices)
    try:
        crew.start()
        yield lambda tasks, describe: deal(crew, tasks, describe, timeout)
        crew.end()
    finally:
        crew.kill()


def read_timeout() -> int | None:
    """Return the value of SPPO_TIMEOUT, in seconds; None without one. Raises StageError if it is not a positive integer."""
    value = os.environ.get(TIMEOUT)
    if value is not None and not re.fullmatch("[1-9][0-9]{0,6}", value):
        raise StageError(
            f"{TIMEOUT} is {quote(value)} but must be a number of seconds from 1 to 9999999: correct it or unset it"
        )
    return int(value) if value else None


def deal(crew: Crew, tasks: Sequence[Any], describe: Callable[[int], str], timeout: float | None) -> Iterator[tuple[int, Any]]:
    """Deal tasks, in order, to the workers that are free: see `Deal`. timeout: seconds."""
    waiting, held = deque(range(len(tasks))), dict[Worker, int]()
    given_up, failure, finished = Counter[int | None](), "", list[tuple[int, Any]]()
    while True:
        if failure:
            waiting.clear()
        _hand_out(crew, tasks, waiting, held)
        yield from finished  # the caller may take its time: every worker has its next task
        if not held and not waiting:
            break
        finished = []
        for worker, kind, value in crew.wait(_seconds_left(crew, timeout)):
            index = held.pop(worker, None)
            if kind == "result" and index is not None:
                finished.append((index, value))
            elif kind == "lost" and index is not None:
                waiting.appendleft(index)
                log.warning("%s: %s; starting again", describe(index), value)
            elif kind == "failed":
                failure = failure or value
        hanging = _find_hanging(crew, timeout)
        for worker in hanging:
            index = held.pop(worker, None)
            waiting.extendleft([] if index is None else [index])
            given_up[index] += 1
            failure = failure or _judge_timeout("loading" if index is None else describe(index), given_up[index], timeout)
        _replace(crew, hanging, failure)
    if failure:
        raise StageError(failure)


def _hand_out(crew: Crew, tasks: Sequence[Any], waiting: deque[int], held: dict[Worker, int]) -> None:
    """Give each free worker one of the waiting tasks, as long as there are any."""
    for worker in crew.workers:
        if waiting and worker.is_free():
            held[worker] = waiting.popleft()
            worker.send(tasks[held[worker]])


def _replace(crew: Crew, hanging: Sequence[Worker], failure: str) -> None:
    """Kill workers and start others in their place, unless there is a failure: the stage ends once all others are free."""
    if failure:
        crew.stop_hiring()
    for worker in hanging:
        crew.replace(worker)


def _judge_timeout(what: str, attempts: int, timeout: float | None) -> str:
    """Return why not to try again after so many attempts; "", after a warning, if there is another."""
    if attempts < ATTEMPTS:
        log.warning("%s: not finished after %s seconds (%s): starting again", what, timeout, TIMEOUT)
        return ""
    remedy = f"find out what hangs, or raise or unset {TIMEOUT}, then re-run to resume"
    return f"{what}: not finished after {timeout} seconds, {attempts} times: {remedy}"


def _seconds_left(crew: Crew, timeout: float | None) -> float | None:
    """Return how long to wait for the next report, at most: until a worker has worked too long."""
    starts = [worker.since for worker in crew.workers if worker.since is not None]
    return None if timeout is None or not starts else max(0.0, min(starts) + timeout - time.monotonic())


def _find_hanging(crew: Crew, timeout: float | None) -> list[Worker]:
    now = time.monotonic()
    return [worker for worker in crew.workers if timeout and worker.since is not None and now - worker.since >= timeout]


class _Process:
    """A worker process of this machine."""

    def __init__(self, context: Any, job: tuple[Any, ...], device: str) -> None:
        self.device, self.buffer = device, bytearray()
        self.since: float | None = time.monotonic()
        self.ended = False
        self.socket, theirs = socket.socketpair()
        self.process = context.Process(target=_run_worker, args=(theirs, *job), daemon=True)
        with processes.block_sigint(), _visible_device(device):
            self.process.start()
        theirs.close()  # so that the process's end closes the connection

    def is_free(self) -> bool:
        return self.since is None and not self.ended

    def send(self, task: Any) -> None:
        self.since = time.monotonic()
        with contextlib.suppress(OSError):  # it has ended, which `wait` reports
            _send(self.socket, (task,))

    def receive(self) -> tuple[str, Any] | None:
        """Return the message of which the last part has arrived, None before that. It never waits for the rest of a message,
        which a killed or stopped process may owe. Raises EOFError if the process has ended."""
        has_ended = connection.wait([self.process.sentinel], 0)  # before reading: it may end just after its last message
        try:
            part = self.socket.recv(2**20, socket.MSG_DONTWAIT)
        except BlockingIOError:
            if has_ended:
                raise EOFError from None
            return None
        except OSError:
            part = b""
        if not part:
            raise EOFError
        self.buffer += part
        self.since = time.monotonic()  # a large result may take a while to arrive
        end = SIZE_BYTES + int.from_bytes(self.buffer[:SIZE_BYTES], "little")
        if len(self.buffer) < max(end, SIZE_BYTES + 1):
            return None
        message: tuple[str, Any] = pickle.loads(self.buffer[SIZE_BYTES:])
        self.buffer.clear()
        self.since = None
        return message

    def end(self) -> None:
        self.ended, self.since = True, None
        self.process.join(END_SECONDS)
        self.kill()

    def kill(self) -> None:
        self.ended, self.since = True, None
        if self.process.is_alive():
            with contextlib.suppress(ProcessLookupError):  # it has no group of its own yet
                os.killpg(self.process.pid, signal.SIGKILL)  # with vLLM's processes for its other GPUs
            self.process.kill()
        self.process.join(END_SECONDS)  # the kernel cannot end one that waits for a GPU's driver
        self.socket.close()


class _Processes:
    """A crew of processes of this machine."""

    def __init__(self, context: Any, job: tuple[Any, ...], devices: list[str]) -> None:
        self.context, self.job, self.devices = context, job, devices
        self.workers: list[_Process] = []
        self.hires = True

    def start(self) -> None:
        for device in self.devices:
            self.workers.append(_Process(self.context, self.job, device))

    def wait(self, seconds: float | None) -> list[tuple[_Process, str, Any]]:
        alive = [worker for worker in self.workers if not worker.ended]
        ready = connection.wait([source for worker in alive for source in (worker.socket, worker.process.sentinel)], seconds)
        reports = []
        for worker in alive:
            if worker.socket in ready or worker.process.sentinel in ready:
                try:
                    message = worker.receive()
                except EOFError:
                    worker.end()
                    message = "failed", self.explain_end(worker)
                reports += [(worker, *message)] if message else []
        return reports

    def explain_end(self, worker: _Process) -> str:
        """Return the message for a worker that ended by itself: nothing says that another would do better."""
        code, folder = worker.process.exitcode, self.job[-1]
        how = f"was ended by signal {-code} (out of memory?)" if code < 0 else "failed"
        where = f"its log in {folder}" if folder else "its message above"
        seen = f"; see {where}" if folder or code >= 0 else ""
        return f"worker {self.workers.index(worker)} of {len(self.workers)} {how}{seen}: fix the cause, then re-run to resume"

    def replace(self, worker: Worker) -> None:
        index = next(index for index, other in enumerate(self.workers) if other is worker)
        self.workers[index].kill()
        if self.hires:
            self.workers[index] = _Process(self.context, self.job, self.workers[index].device)

    def stop_hiring(self) -> None:
        self.hires = False

    def end(self) -> None:
        for worker in self.workers:
            with contextlib.suppress(OSError):
                _send(worker.socket, ())
        for worker in self.workers:
            worker.end()

    def kill(self) -> None:
        for worker in self.workers:
            worker.kill()


@contextlib.contextmanager
def _visible_device(device: str) -> Iterator[None]:
    """Make only this GPU visible to processes that start within the block; "" changes nothing."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    if device:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    try:
        yield
    finally:
        if device and before is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        elif device and before is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = before


def _run_worker(stage: socket.socket, load: Load, arguments: tuple[Any, ...], folder: Path | None) -> None:
    processes.setup_worker()
    os.setpgrp()  # so that what it starts can be killed with it
    setup_logging()
    if folder:
        processes.redirect_output(folder / f"worker-{os.getpid()}.log")
    tasks = stage.makefile("rb")
    try:
        compute = load(*arguments)
        _send(stage, ("ready", None))
        while task := _read(tasks):
            _send(stage, ("result", compute(*task)))
    except Exception as error:
        _send(stage, ("failed", message_or_raise(error)))
    gc.freeze()  # otherwise Python scans every object of torch before it exits: seconds


def _send(to: socket.socket, message: Any) -> None:
    data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    to.sendall(len(data).to_bytes(SIZE_BYTES, "little") + data)


def _read(tasks: Any) -> Any:
    return pickle.loads(tasks.read(int.from_bytes(tasks.read(SIZE_BYTES), "little")))
