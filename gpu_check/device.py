"""The device of this process, a GPU or, in a rehearsal, the CPU: its clock, its memory's peak, and its limits."""

import statistics
import time
from collections.abc import Callable

import torch

from benchmarks import measure

ROUNDS = 5
REPEATS = 20
"""Products, or copies, in a round."""


def name() -> str:
    """Return torch's name of the device's type."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def synchronize() -> None:
    """Wait until the device has done its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_bytes() -> int:
    """Return the most memory that this process's tensors have held on the GPU or, without one, that the process has held."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else measure.read_memory("VmHWM")


def time_calls(call: Callable[[], object], repeats: int = REPEATS) -> float:
    """Return the seconds of a call: the median of ROUNDS rounds of `repeats` calls, after a warm-up round."""
    seconds = []
    for _ in range(ROUNDS + 1):
        synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        synchronize()
        seconds.append((time.perf_counter() - start) / repeats)
    return statistics.median(seconds[1:])


def measure_flops(side: int) -> float:
    """Return the FLOP/s of a product of two square matrices in bfloat16."""
    left, right = (torch.randn(side, side, dtype=torch.bfloat16, device=name()) for _ in range(2))
    return 2 * side**3 / time_calls(lambda: left @ right)


def measure_bandwidth(size: int) -> float:
    """Return the bytes per second that the device reads and writes when it copies `size` bytes."""
    source = torch.zeros(size, dtype=torch.uint8, device=name())
    target = torch.empty_like(source)
    return 2 * size / time_calls(lambda: target.copy_(source))
