"""The record of a stage's environment, which the report's provenance page reads.

A record is an output in dvc.lock, so it must be the same on all machines that produce the same results. Everything else about
the machine is written to scratch/machines, for `python -m stages.tools attest`.
"""

import platform
import sys
from pathlib import Path
from typing import Any

from stages.artifacts import files, machine
from stages.runtime import devices, scratch
from stages.runtime.versions import tool_versions

FOLDER = Path("data/records")
MACHINES = scratch.FOLDER / "machines"


def write_record(stage: str, *, numerics: str | None) -> None:
    """Write data/records/<stage>.json, an output of the stage, and a description of the machine to MACHINES.

    The record contains the versions of Python and of the libraries that can affect results, the numerics in effect (None if the
    results do not depend on them), and the kind and number of devices.
    """
    version = ".".join(platform.python_version_tuple()[:2])
    record = {"python": version, "tools": tool_versions(), "numerics": numerics, "device": describe_device(numerics)}
    files.write_json(record, FOLDER / f"{stage}.json")
    files.write_json(machine.describe_machine(), MACHINES / f"{stage}.json")


def describe_device(numerics: str | None) -> dict[str, Any]:
    """Return the kind and number of devices: GPUs, of a cluster or this machine, or what can affect results about the CPU."""
    for name, count in devices.REMOTE.items():
        return {"kind": name, "count": count}
    torch = sys.modules.get("torch")  # a stage that has not imported torch uses no GPU
    if torch and torch.cuda.is_available():
        return {"kind": torch.cuda.get_device_name(), "count": torch.cuda.device_count()}
    if numerics == "fast":
        return {"kind": ", ".join(machine.describe_processor()), "count": 1}
    return {"kind": "any x86-64 CPU with AVX2" if numerics == "portable" else "any CPU", "count": 1}
