"""The whole miniature in a clone of the last commit, run from nothing by `dvc repro`: seconds per stage.

These are the only results whose baseline did not run at the same time: they are compared with the first version that worked,
on the machine of this page's first results. A stage's seconds run from the start of its work to its end; the whole run also
includes starting Python and DVC for each stage.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from benchmarks import measure
from stages.runtime.paths import ROOT

FIRST = {
    "assets-policy": 80,
    "assets-ranker": 68,
    "evaluate-lm": 24,
    "generate": 21,
    "answer": 18,
    "rank": 17,
    "train": 16,
    "reference": 10,
    "all": 654,
}
"""Seconds of the first version: of the slowest stages, and of the whole run."""


def run(folder: Path) -> tuple[float, dict[str, list[float]]]:
    """Clone the repository into `folder` and run the miniature. Returns its seconds, and stage -> seconds of each run."""
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    (folder / ".venv").symlink_to(ROOT / ".venv")
    path = f"{ROOT / '.venv' / 'main' / 'bin'}:{os.environ['PATH']}"
    start = time.perf_counter()
    done = subprocess.run(["dvc", "repro", "--quiet"], cwd=folder, env=os.environ | {"PATH": path}, check=False)
    seconds = time.perf_counter() - start
    if done.returncode:
        sys.exit("dvc repro failed: see its message above")
    stages = defaultdict(list)
    for line in (folder / "scratch" / "timings.jsonl").read_text().splitlines():
        record = json.loads(line)
        name = record["stage"].rpartition(":")[2].partition("@")[0].removesuffix("-base")
        stages[name].append(record["seconds"])
    return seconds, dict(stages)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        total, stages = run(Path(folder) / "miniature")
    comparisons = []
    for name, seconds in [("all", [total]), *sorted(stages.items(), key=lambda item: -sum(item[1]))]:
        if name in FIRST:
            first, target = float(FIRST[name]), ">= 2" if name == "all" else ""
            ratios = [first / each for each in seconds]
            size = f"runs: {len(seconds)}"
            comparisons.append(measure.summarize(f"{name}, seconds", size, seconds, [first], ratios, target))
    measure.report(comparisons)


if __name__ == "__main__":
    main()
