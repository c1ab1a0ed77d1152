"""`make repro` of the miniature, whole, in a copy of the last commit: seconds of each stage.

The only figures without a baseline in the same run: what they stand beside is the first version that ran, on the machine
that the first results of this page were made on. Seconds within a stage are those from the start of its command's work to
its end; the whole run is longer by Python's and DVC's start for each of them.
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
from stages import cli

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
"""Seconds of the first version, of the stages that took longest, and of all of `make repro`."""


def run(folder: Path) -> tuple[float, dict[str, list[float]]]:
    """Seconds of all, and stage -> seconds of each of its runs."""
    subprocess.run(["git", "clone", "--quiet", str(cli.ROOT), str(folder)], check=True)
    (folder / ".venv").symlink_to(cli.ROOT / ".venv")
    path = f"{cli.ROOT / '.venv' / 'main' / 'bin'}:{os.environ['PATH']}"
    start = time.perf_counter()
    done = subprocess.run(["dvc", "repro", "--quiet"], cwd=folder, env=os.environ | {"PATH": path}, check=False)
    seconds = time.perf_counter() - start
    if done.returncode:
        sys.exit("dvc repro failed: its message stands above")
    stages = defaultdict(list)
    for line in (folder / "scratch" / "timings.jsonl").read_text().splitlines():
        record = json.loads(line)
        name = record["stage"].rpartition(":")[2].partition("@")[0].removesuffix("-base")
        stages[name].append(record["seconds"])
    return seconds, dict(stages)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        seconds, stages = run(Path(folder) / "miniature")
    figures = []
    for name, took in [("all", [seconds]), *sorted(stages.items(), key=lambda item: -sum(item[1]))]:
        if name not in FIRST:
            continue
        first, wanted = float(FIRST[name]), ">= 2" if name == "all" else ""
        ratios = [first / one for one in took]
        figures.append(measure.of_rounds(f"{name}, seconds", f"runs: {len(took)}", took, [first], ratios, wanted))
    measure.report(figures)


if __name__ == "__main__":
    main()
