"""Check the GPU code on this machine's GPU and write the table of results (`make gpu-check`).

Each part runs in a process of its own, whose end frees the GPU, in its environment in .venv or, without one, in this one. What
is not installed is skipped. Exits with code 1 if any row fails.
"""

import argparse
import datetime
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from importlib import metadata
from pathlib import Path

from gpu_check import rows
from gpu_check.sizes import CPU, GPU
from stages.runtime.paths import ROOT

BUDGET = 480.0
"""Seconds for all parts together."""
PARTS = {
    "limits": "main",
    "training": "main",
    "ranking": "rank",
    "sampling": "main",
    "harness": "harness",
    "invariance": "main",
}
"""Part -> its environment. All but `limits` are modules of this folder."""
PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "vllm", "llm-blender", "lm-eval")
FOLDER = ROOT / "docs" / "gpu"


def run_part(name: str, folder: Path, limits: dict[str, float], rehearsal: bool) -> None:
    """Run a part in this process."""
    sizes = CPU if rehearsal else GPU
    if name == "limits":
        from gpu_check import device

        found = {"flops": device.measure_flops(sizes.product), "bandwidth": device.measure_bandwidth(sizes.copy)}
        (folder / "limits.json").write_text(json.dumps(found))
    else:
        importlib.import_module(f"gpu_check.{name}").run(sizes, folder, limits, rehearsal)


def start_part(name: str, folder: Path, limits: dict[str, float], rehearsal: bool) -> subprocess.Popen[str]:
    """Start a part as a process that leads a session of its own. folder: an empty one for its files."""
    own = ROOT / ".venv" / PARTS[name] / "bin" / "python"
    command = [str(own) if own.exists() else sys.executable, "-m", "gpu_check", "--part", name, "--folder", str(folder)]
    command += ["--limits", json.dumps(limits), *(["--rehearsal"] if rehearsal else [])]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=make_environment(folder, rehearsal),
        stdout=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )


def make_environment(folder: Path, rehearsal: bool) -> dict[str, str]:
    """Return the environment of a part: one GPU of this machine, without what the user has set for runs of the pipeline."""
    kept = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS" and not name.startswith("SPPO_")}
    return kept | {
        "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}".rstrip(":"),
        "SPPO_SCRATCH": str(folder / "scratch"),
        "CUDA_VISIBLE_DEVICES": "" if rehearsal else pick_gpu(),
    }


def pick_gpu() -> str:
    """Return the value of CUDA_VISIBLE_DEVICES for one GPU: the first that this process may use."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]


def collect(name: str, process: subprocess.Popen[str], seconds: float) -> list[rows.Row]:
    """Wait for a part and return its rows, with a failed one if the part fails or takes longer than `seconds`."""
    ended_late = threading.Event()

    def stop() -> None:
        ended_late.set()
        os.killpg(process.pid, 9)

    timer = threading.Timer(seconds, stop)
    timer.start()
    found = []
    assert process.stdout
    for line in process.stdout:
        if row := rows.parse(line):
            found.append(row)
            print(rows.format_line(row), flush=True)
        else:
            print(line, end="", file=sys.stderr)
    code = process.wait()
    timer.cancel()
    if code:
        reason = f"not finished after {seconds:.0f} s" if ended_late.is_set() else "ended with an error: see its message above"
        found.append(rows.Row(f"the part {name}", "", "to finish", rows.FAIL, reason))
        print(rows.format_line(found[-1]), flush=True)
    return found


def run_all(folder: Path, rehearsal: bool, budget: float) -> list[rows.Row]:
    """Run all parts and return their rows. budget: seconds."""
    end, found = time.monotonic() + budget, []
    limits: dict[str, float] = {}
    for name in PARTS:
        own = folder / name
        own.mkdir()
        left = end - time.monotonic()
        if left <= 0:
            found.append(rows.Row(f"the part {name}", "", "to finish", rows.FAIL, "no time left"))
            continue
        found += collect(name, start_part(name, own, limits, rehearsal), left)
        if name == "limits":
            if found:
                break  # the GPU does not work
            limits = json.loads((own / "limits.json").read_text())
    return found


def describe(rehearsal: bool, seconds: float) -> tuple[str, list[str]]:
    """Return the device's name, and lines that describe it and the software."""
    import torch

    from stages.artifacts import machine
    from stages.runtime import devices

    host = machine.describe_machine()
    versions = []
    for package in PACKAGES:
        try:
            versions.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            versions.append(f"{package} not in the main environment")
    if rehearsal:
        name, details = f"rehearsal on {host['processor']}", "no GPU was used"
    else:
        found = torch.cuda.get_device_properties(0)
        name = found.name
        details = (
            f"{found.total_memory / 1e9:.1f} GB, compute capability {found.major}.{found.minor}, "
            f"driver {devices.find_driver() or 'unknown'}, CUDA {torch.version.cuda}"
        )
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    lines = [
        f"- device: {name} ({details})",
        f"- host: {host['processor']}, {host['cores']} cores, {host['memory_gib']:.0f} GiB, Python {sys.version.split()[0]}",
        f"- packages: {', '.join(versions)}",
        f"- {today}, {seconds:.0f} seconds",
    ]
    return name, lines


def format_page(name: str, lines: list[str], found: list[rows.Row]) -> str:
    """Format the page of results."""
    counts = ", ".join(f"{sum(row.verdict == each for row in found)} {each}" for each in rows.VERDICTS)
    head = [f"# GPU check: {name}", "", "Generated by `make gpu-check`; do not edit.", "", *lines, f"- rows: {counts}", "", ""]
    return "\n".join(head) + rows.format_table(found)


def find_problem(rehearsal: bool) -> str:
    """Return why the check cannot run here, empty if it can."""
    try:
        import torch
    except ImportError:
        return "torch is not installed in this environment: run `make env`, or see docs/gpu-check.md"
    if not rehearsal and not torch.cuda.is_available():
        return (
            f"torch {torch.__version__} sees no GPU: compare the driver's version (nvidia-smi) with the CUDA that torch was "
            "built for, or rehearse on the CPU with `python -m gpu_check --rehearsal`"
        )
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m gpu_check", description=__doc__)
    parser.add_argument("--rehearsal", action="store_true", help="run the same code with tiny shapes on the CPU")
    parser.add_argument("--out", type=Path, help="file to write (default: docs/gpu/DEVICE.md; a rehearsal writes none)")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for all parts (default: %(default).0f)")
    parser.add_argument("--part", choices=PARTS, help="internal: run one part in this process")
    parser.add_argument("--folder", type=Path, help="internal: its files")
    parser.add_argument("--limits", type=json.loads, help="internal: the GPU's measured limits")
    args = parser.parse_args()
    if args.part:
        run_part(args.part, args.folder, args.limits, args.rehearsal)
        return 0
    if problem := find_problem(args.rehearsal):
        print(f"gpu_check: error: {problem}", file=sys.stderr)
        return 1
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        found = run_all(Path(folder), args.rehearsal, args.budget)
    name, lines = describe(args.rehearsal, time.monotonic() - start)
    page = format_page(name, lines, found)
    out = args.out or (None if args.rehearsal else FOLDER / f"{re.sub('[^A-Za-z0-9]+', '-', name)}.md")
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page, encoding="utf-8")
        print(f"written to {out}")
    print(f"\n{page}")
    return int(any(row.verdict == rows.FAIL for row in found))


if __name__ == "__main__":
    sys.exit(main())
