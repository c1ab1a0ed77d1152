"""Run every benchmark and write benchmarks/results.md (`make bench`), or only print some: `python -m benchmarks rank`.

Each runs in a process of its own, in the environment that its stage has.
"""

import argparse
import ast
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.measure import FIGURE, ROUNDS
from stages import cli

ENVIRONMENTS = {"rank": "rank", "generate": "main", "train": "bench", "data": "main", "miniature": "main", "gpu": "main"}
RESULTS = Path(__file__).parent / "results.md"


def measured(name: str) -> list[dict[str, Any]]:
    """The figures of one benchmark, none where the machine lacks what it is of. Exits where it fails."""
    python = cli.ROOT / ".venv" / ENVIRONMENTS[name] / "bin" / "python"
    command = [str(python), "-m", f"benchmarks.{name}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        figures = [json.loads(line.removeprefix(FIGURE)) for line in process.stdout if line.startswith(FIGURE)]
    if process.returncode:
        sys.exit(f"benchmark {name} failed: its message stands above")
    return figures


def machine() -> str:
    """Processor, cores, memory and GPU of this machine."""
    import torch

    models = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{models[0] if models else platform.machine()}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GB, {gpu}"


def page(figures: dict[str, list[dict[str, Any]]]) -> str:
    """The results as Markdown: of each benchmark what its module says of itself, and a table."""
    lines = [
        "# Speed",
        "",
        "By `make bench`; do not edit.",
        f"Both sides ran in turn in one run, one round to warm up and {ROUNDS} that count. Given are each side's median, the",
        "median of the rounds' ratios, above 1 where this repository is the better, and the least and greatest of them.",
        "",
        f"Machine: {machine()}.",
    ]
    for name, found in figures.items():
        docstring = ast.get_docstring(ast.parse((RESULTS.parent / f"{name}.py").read_text()))
        lines += ["", f"## {name}", "", docstring or "", ""]
        if not found:
            lines += ["Not run: there is no GPU here."]
            continue
        lines += ["| what | size | here | baseline | ratio | spread | wanted |", "|---|---|---:|---:|---:|---|---|"]
        lines += [
            "| {subject} | {size} | {ours:.3g} | {baseline:.3g} | {ratio:.2f} | {low:.2f} to {high:.2f} | {wanted} |".format(
                **one
            )
            for one in found
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", choices=[[], *ENVIRONMENTS], help=", ".join(ENVIRONMENTS))
    names = parser.parse_args().names
    text = page({name: measured(name) for name in names or ENVIRONMENTS})
    if names:
        print(text)
    else:
        RESULTS.write_text(text)


if __name__ == "__main__":
    main()
