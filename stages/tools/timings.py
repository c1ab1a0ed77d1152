"""Show the seconds and peak memory of each stage of a run: `start` before the run, `show` after it.

`start` also writes the plan of the run, from which the stages say how far it has come.
"""

import argparse
import json
import time
from pathlib import Path

from dvc.exceptions import DvcException

from stages.runtime import durable, run
from stages.runtime.errors import StageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=["start", "show"], help="forget earlier runs, or show the stages since then")


def main(args: argparse.Namespace) -> None:
    if args.action == "start":
        start()
    else:
        print(format_timings(run.read_rows()))


def start() -> None:
    """Write the plan of a run of the pipeline in the current folder, and forget the timings of the run before.

    The plan: `started` (Unix time), `stages` (those that are stale -> the seconds of their last run, or None) and `seconds` (of
    the last run of every stage). If DVC cannot tell the stages, there are none: `dvc repro` then says what is wrong.
    """
    from stages.tools import plan

    before = run.read_plan()
    seconds = (before["seconds"] if before else {}) | run.read_timings()
    try:
        stale = list(plan.find_stale_stages(Path()))
    except (DvcException, StageError):
        stale = []
    current: run.Plan = {"started": time.time(), "stages": {name: seconds.get(name) for name in stale}, "seconds": seconds}
    durable.write(run.PLAN, json.dumps(current))
    run.TIMINGS.unlink(missing_ok=True)


def format_timings(rows: list[run.Timing]) -> str:
    """Format a table of the stages' seconds and peak memory in GB, with the total and the maximum in the last line."""
    if not rows:
        return "No stage had to run: everything is up to date."
    lines = [f"\n{'stage':<28}{'seconds':>9}{'peak GB':>9}"]
    lines += [f"{row['stage']:<28}{row['seconds']:>9.1f}{row['peak_gb']:>9.2f}" for row in rows]
    seconds, peak = sum(row["seconds"] for row in rows), max(row["peak_gb"] for row in rows)
    return "\n".join([*lines, f"{'total, maximum':<28}{seconds:>9.1f}{peak:>9.2f}"])
