"""The record of a stage's environment."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from stages.artifacts import machine, records
from stages.runtime import devices
from stages.runtime.versions import tool_versions

CPUINFO = """processor\t: 0
model name\t: AMD EPYC 7763   64-Core
flags\t\t: fpu avx fma avx2

processor\t: 1
model name\t: another
flags\t\t: avx512f
"""


def write(stage: str, numerics: str | None) -> dict[str, object]:
    records.write_record(stage, numerics=numerics)
    record: dict[str, object] = json.loads(Path("data/records", f"{stage}.json").read_text(encoding="utf-8"))
    return record


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cpuinfo").write_text(CPUINFO)
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.delitem(sys.modules, "torch", raising=False)


@pytest.mark.parametrize(
    ("numerics", "kind"),
    [
        (None, "any CPU"),
        ("portable", "any x86-64 CPU with AVX2"),
        ("fast", "AMD EPYC 7763 64-Core, AVX2"),
    ],
)
def test_a_record_names_python_the_tools_numerics_and_as_much_of_the_processor_as_matters(
    numerics: str | None, kind: str
) -> None:
    """Only fast numerics depend on the processor: any other record must be the same on every machine."""
    assert write("train", numerics) == {
        "python": "3.11",
        "tools": tool_versions(),
        "numerics": numerics,
        "device": {"kind": kind, "count": 1},
    }


def test_a_stage_that_loaded_torch_used_its_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = SimpleNamespace(is_available=lambda: True, get_device_name=lambda: "NVIDIA H100", device_count=lambda: 8)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    assert write("train", "fast")["device"] == {"kind": "NVIDIA H100", "count": 8}


def test_the_gpus_of_a_cluster_count_and_not_those_of_the_machine_that_started_the_stage(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = SimpleNamespace(is_available=lambda: True, get_device_name=lambda: "NVIDIA H100", device_count=lambda: 8)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(devices, "REMOTE", {"NVIDIA A100": 32})
    assert write("train", "fast")["device"] == {"kind": "NVIDIA A100", "count": 32}


def test_a_record_has_the_same_bytes_in_every_run() -> None:
    write("split", None)
    text = Path("data/records/split.json").read_text(encoding="utf-8")
    write("split", None)
    assert Path("data/records/split.json").read_text(encoding="utf-8") == text
