"""The devices that a stage runs on. Results do not depend on their number."""

import contextlib
import os
from collections.abc import Iterator

from stages.runtime.errors import StageError


def list_devices(*, cores: bool = False) -> list[str]:
    """Return the value of CUDA_VISIBLE_DEVICES for each worker: one GPU each, or "" for each worker on a CPU.

    On a CPU, the environment variable SPPO_WORKERS sets the number of workers; the default is one or, with `cores` (for
    single-threaded workers), one per CPU core. Raises StageError if SPPO_WORKERS is not a positive integer.
    """
    import torch

    if torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        return visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]
    default = len(os.sched_getaffinity(0)) if cores else 1
    count = os.environ.get("SPPO_WORKERS", str(default))
    if not count.isdecimal() or not int(count):
        raise StageError(f"SPPO_WORKERS is {count!r} but must be a positive number of processes: correct it or unset it")
    return [""] * int(count)


def is_main_process() -> bool:
    """Return whether this process writes the outputs: it has rank 0 in its distributed group, or has no group."""
    return os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def explain_out_of_memory(remedy: str) -> Iterator[None]:
    """Convert CUDA out-of-memory errors into a StageError that names the parameter to lower."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise StageError(f"out of GPU memory: {remedy}") from error
