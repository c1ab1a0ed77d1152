"""The record of a stage's environment, which the report's provenance page reads."""

import platform
import sys
from pathlib import Path

from stages.artifacts import files
from stages.runtime.versions import tool_versions

FOLDER = Path("data/records")


def write_record(stage: str) -> None:
    """Write data/records/<stage>.json, an output of every stage: the versions of Python and of the libraries that can affect
    results, and the kind and number of available devices."""
    device = {"kind": f"{platform.machine()} CPU", "count": 1}
    torch = sys.modules.get("torch")  # a stage that has not imported torch uses no GPU
    if torch and torch.cuda.is_available():
        device = {"kind": torch.cuda.get_device_name(), "count": torch.cuda.device_count()}
    record = {"python": platform.python_version(), "tools": tool_versions(), "device": device}
    files.write_json(record, FOLDER / f"{stage}.json")
