"""How every figure is taken: both sides in turn in one run, the median of the rounds' ratios, and their spread."""

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

ROUNDS = 5
FIGURE = "FIGURE "
"""Before each figure on a benchmark's output."""


@dataclass(frozen=True)
class Figure:
    """One line of benchmarks/results.md: how many times `ours` is better than `baseline`."""

    subject: str
    """What is compared, with what and in which unit: rank, pairs a second against ..."""
    size: str
    ours: float
    baseline: float
    ratio: float
    low: float
    high: float
    """Median, least and greatest of the rounds' ratios, better than the baseline above 1."""
    wanted: str = ""
    """What the ratio should be, `>= 6` for example."""


def in_turn(sides: dict[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Seconds of each side in each round, after a round that does not count; the sides take turns in who is first."""
    for run in sides.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds):
        for name in rotated(list(sides), turn):
            start = time.perf_counter()
            sides[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def rotated(names: list[str], turn: int) -> list[str]:
    """The names in the order of a turn: another one is first each time."""
    first = turn % len(names)
    return names[first:] + names[:first]


def of_rounds(
    subject: str, size: str, ours: list[float], baseline: list[float], ratios: list[float], wanted: str = ""
) -> Figure:
    """The figure of each round's values and of its ratio."""
    medians = statistics.median(ours), statistics.median(baseline), statistics.median(ratios)
    return Figure(subject, size, *medians, min(ratios), max(ratios), wanted)


def figure(subject: str, size: str, count: float, ours: list[float], baseline: list[float], wanted: str = "") -> Figure:
    """The figure of `count` things done in each round's seconds, in things a second."""
    ratios = [theirs / mine for mine, theirs in zip(ours, baseline, strict=True)]
    mine, other = ([count / taken for taken in times] for times in (ours, baseline))
    return of_rounds(subject, size, mine, other, ratios, wanted)


def memory(name: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def report(figures: list[Figure]) -> None:
    """Hand figures to `python -m benchmarks`, which reads them from this process' output."""
    for one in figures:
        print(FIGURE + json.dumps(asdict(one)), flush=True)
        print(f"{one.subject}, {one.size}: {one.ours:.3g} to {one.baseline:.3g}, {one.ratio:.2f}x", file=sys.stderr)
