"""Compare two sides: they take turns in one run; reported are the median of the rounds' ratios, and their range."""

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

ROUNDS = 5
PREFIX = "COMPARISON "
"""Starts each line of a benchmark's output that holds a comparison."""


@dataclass(frozen=True)
class Comparison:
    """One row of benchmarks/results.md: by what factor `ours` is better than `baseline`."""

    subject: str
    """What is measured, in which unit and against what: "pairs per second, against ..."."""
    size: str
    ours: float
    baseline: float
    ratio: float
    low: float
    high: float
    """ratio, low, high: the median, minimum and maximum of the rounds' ratios; above 1, ours is better."""
    target: str = ""
    """What the ratio should be: ">= 6"."""


def time_in_turn(sides: Mapping[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Return the seconds of each side in each round, after a warm-up round. The sides take turns in going first."""
    for run in sides.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds):
        for name in rotate(list(sides), turn):
            start = time.perf_counter()
            sides[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def rotate(names: list[str], turn: int) -> list[str]:
    """Return the names in the order of a turn: each turn, another one goes first."""
    first = turn % len(names)
    return names[first:] + names[:first]


def summarize(
    subject: str, size: str, ours: list[float], baseline: list[float], ratios: list[float], target: str = ""
) -> Comparison:
    """Summarize each round's values and ratio."""
    medians = statistics.median(ours), statistics.median(baseline), statistics.median(ratios)
    return Comparison(subject, size, *medians, min(ratios), max(ratios), target)


def compare_rates(
    subject: str, size: str, count: float, ours: list[float], baseline: list[float], target: str = ""
) -> Comparison:
    """Compare rates, in items per second. count: items processed in a round. ours, baseline: each round's seconds."""
    ratios = [theirs / mine for mine, theirs in zip(ours, baseline, strict=True)]
    our_rates, baseline_rates = ([count / seconds for seconds in times] for times in (ours, baseline))
    return summarize(subject, size, our_rates, baseline_rates, ratios, target)


def compare_times(subject: str, size: str, ours: list[float], baseline: list[float], target: str = "") -> Comparison:
    """Compare each round's seconds."""
    return summarize(
        subject, size, ours, baseline, [theirs / mine for mine, theirs in zip(ours, baseline, strict=True)], target
    )


def read_memory(name: str) -> int:
    """Return VmRSS (resident memory) or VmHWM (its peak) of this process, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def report(comparisons: list[Comparison]) -> None:
    """Print comparisons: to stdout for `python -m benchmarks` to read, to stderr for people."""
    for comparison in comparisons:
        print(PREFIX + json.dumps(asdict(comparison)), flush=True)
        print(
            f"{comparison.subject}, {comparison.size}: {comparison.ours:.3g} against {comparison.baseline:.3g}, "
            f"{comparison.ratio:.2f}x",
            file=sys.stderr,
        )
