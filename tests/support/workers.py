"""Functions for worker processes, which import them by this module's name."""

import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa

from stages.artifacts import schemas
from stages.runtime.errors import StageError
from support import tables


def load_echo(samples: int) -> Callable[[pa.Table], pa.Table]:
    """Return a function that responds to each prompt with the prompt itself, `samples` times."""
    return lambda shard: respond(shard, lambda prompt: [prompt] * samples)


def load_visible_device() -> Callable[[pa.Table], pa.Table]:
    """Return a function that responds to each prompt with the GPUs that this process may see, once all of two workers have
    loaded: each gets one of two shards."""
    device = os.environ.get("CUDA_VISIBLE_DEVICES", "all")

    def compute(shard: pa.Table) -> pa.Table:
        meet(2)
        return respond(shard, lambda _: [device])

    return compute


def load_failure() -> Callable[[pa.Table], pa.Table]:
    """Raise the error of a model that does not load."""
    raise OSError(13, "Permission denied", "model")


def load_death(samples: int, text: str) -> Callable[[pa.Table], pa.Table]:
    """Return `load_echo`'s function, which kills this process if the text is one of the prompts."""
    echo = load_echo(samples)

    def compute(shard: pa.Table) -> pa.Table:
        if text in shard["prompt"].to_pylist():
            os.kill(os.getpid(), signal.SIGKILL)
        return echo(shard)

    return compute


def respond(shard: pa.Table, answer: Callable[[str], list[str]]) -> pa.Table:
    return pa.Table.from_pylist(tables.add_responses(shard.to_pylist(), answer), schema=schemas.RESPONSES)


def meet(count: int) -> None:
    """Wait until as many processes have called this, in the same folder."""
    Path(f"here-{os.getpid()}").touch()
    while len(list(Path().glob("here-*"))) < count:
        time.sleep(0.01)


def load_play(start: str = "") -> Callable[[tuple[str, Any]], Any]:
    """Return a function that does what a task says: `play`. start: what to do first, while loading."""
    play((start, None))
    print("loaded")
    return play


def play(task: tuple[str, Any]) -> Any:
    """Compute a task for tests: what to do, and a value."""
    what, value = task
    if what == "pid":
        return os.getpid(), value
    if what == "meet":
        meet(value)
        return os.getpid()
    if what == "meet and fail":
        meet(2)
        raise StageError(value)
    if what == "large":
        return bytes(value)
    if what == "fail":
        raise StageError(value)
    if what == "crash":
        raise ZeroDivisionError(value)
    if what in ("die", "die once") and is_due(what, value):
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "stop in the middle":
        stop_in_the_middle(value)
    if what in ("hang", "hang once", "hang on the node") and is_due(what, value):
        time.sleep(600)
    return value


def has_been(name: str) -> bool:
    """Return whether this was called before with the same name, in the same folder."""
    path = Path(f"been-{name}")
    before = path.exists()
    path.touch()
    return before


def is_due(what: str, value: Any) -> bool:
    """Return whether to do it now: always, the first time with this value, or on the node of a Ray cluster at this address."""
    if what == "hang on the node":
        import ray

        there = ray.util.get_node_ip_address() == value
        return there and Path(f"hangs-{value}").touch() is None
    return not what.endswith(" once") or not has_been(value)


def stop_in_the_middle(number: signal.Signals) -> None:
    """Let this process get a signal while it sends its result, of which a part has arrived then."""

    def send_half(to: socket.socket, data: bytes) -> None:
        to.send(data[: len(data) // 2])
        os.kill(os.getpid(), number)

    socket.socket.sendall = send_half  # type: ignore[method-assign, assignment]
