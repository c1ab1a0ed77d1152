"""The record of a stage's environment."""

import json
import platform
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from stages.artifacts import records
from stages.runtime.versions import tool_versions


def write(stage: str) -> dict[str, object]:
    records.write_record(stage)
    record: dict[str, object] = json.loads(Path("data/records", f"{stage}.json").read_text())
    return record


def test_a_record_names_python_the_tools_and_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert write("split") == {
        "python": ".".join(map(str, sys.version_info[:3])),
        "tools": tool_versions(),
        "device": {"kind": f"{platform.machine()} CPU", "count": 1},
    }


def test_a_stage_that_loaded_torch_used_its_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cuda = SimpleNamespace(is_available=lambda: True, get_device_name=lambda: "NVIDIA H100", device_count=lambda: 8)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    assert write("train")["device"] == {"kind": "NVIDIA H100", "count": 8}


def test_a_record_has_the_same_bytes_in_every_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write("split")
    text = Path("data/records/split.json").read_text()
    write("split")
    assert Path("data/records/split.json").read_text() == text
