"""Try odd input for a given time, with fresh seeds, and count the tracebacks that a user would see.

`python -m support.fuzz --minutes 30` runs tests/pipeline/test_fuzz.py again and again: parameters, artifacts, locks,
pipelines, small files of runs and models, runs on other machines, chat templates and judges' answers.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from stages.runtime.paths import ROOT

COUNTS = "SPPO_FUZZ_COUNTS"
"""Environment variable of the tests: the file to which they append how many inputs they have tried."""
EXAMPLES = 500
"""Inputs for each test and seed."""


@dataclass
class Figures:
    """What came of the inputs."""

    read: int = 0
    rejected: int = 0
    """Of these, those that ended in one line."""
    failures: list[str] = field(default_factory=list)
    """The tests that failed: an input that ended in a traceback, or in a result that is not valid."""
    seconds: float = 0


def fuzz(minutes: float, seed: int = 0) -> Figures:
    """Run the tests with one seed after another until the time is over."""
    figures, started = Figures(), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        counts = Path(folder) / "counts"
        while figures.seconds < 60 * minutes:
            run_once(seed, counts, figures)
            seed += 1
            figures.seconds = time.monotonic() - started
        for line in counts.read_text(encoding="utf-8").splitlines() if counts.exists() else ():
            figures.read += json.loads(line).get("read", 0)
            figures.rejected += json.loads(line).get("rejected", 0)
    return figures


def run_once(seed: int, counts: Path, figures: Figures) -> None:
    """Run the tests with a seed, and add those that fail."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", "", f"--hypothesis-seed={seed}", "--tb=no", "-rfE"]
    done = subprocess.run(
        [*command, "tests/pipeline/test_fuzz.py"],
        cwd=ROOT,
        env=os.environ | {COUNTS: str(counts), "SPPO_FUZZ": str(EXAMPLES)},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if done.returncode and not lines:
        lines = [f"ERROR pytest ended with exit code {done.returncode}: {done.stderr[-300:]}"]
    figures.failures += [f"{line} (seed {seed})" for line in lines]


def format_figures(figures: Figures) -> str:
    """Format a paragraph for docs/torture.md."""
    text = (
        f"{figures.read:,} inputs in {figures.seconds / 60:.0f} minutes; {figures.rejected:,} of them were refused in one "
        f"line, the others were valid or set aside. Tracebacks and invalid results: {len(figures.failures)}."
    )
    return "\n".join([text, *(f"- {line}" for line in figures.failures)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0, help="the first seed (%(default)s)")
    arguments = parser.parse_args()
    figures = fuzz(arguments.minutes, arguments.seed)
    print(format_figures(figures))
    sys.exit(bool(figures.failures))


if __name__ == "__main__":
    main()
