"""Show the seconds and peak memory of each stage of a run: `start` before the run, `show` after it."""

import argparse
import json
from typing import Any

from stages.runtime import scratch

FILE = scratch.FOLDER / "timings.jsonl"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=["start", "show"], help="forget earlier runs, or show the stages since then")


def main(args: argparse.Namespace) -> None:
    if args.action == "start":
        FILE.unlink(missing_ok=True)
    else:
        print(
            format_timings(
                [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()] if FILE.exists() else []
            )
        )


def format_timings(rows: list[dict[str, Any]]) -> str:
    """Format a table of the stages' seconds and peak memory in GB, with the total and the maximum in the last line."""
    if not rows:
        return "No stage had to run: everything is up to date."
    lines = [f"\n{'stage':<28}{'seconds':>9}{'peak GB':>9}"]
    lines += [f"{row['stage']:<28}{row['seconds']:>9.1f}{row['peak_gb']:>9.2f}" for row in rows]
    seconds, peak = sum(row["seconds"] for row in rows), max(row["peak_gb"] for row in rows)
    return "\n".join([*lines, f"{'total, maximum':<28}{seconds:>9.1f}{peak:>9.2f}"])
