"""The machine's description, from the text of /proc/cpuinfo and the output of nvidia-smi."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from stages.artifacts import machine
from stages.runtime import devices
from stages.runtime.paths import ROOT

CPUINFO = """processor\t: 0
vendor_id\t: GenuineIntel
model name\t: Intel(R) Xeon(R)  Platinum 8370C CPU @ 2.80GHz
flags\t\t: fpu sse2 avx avx2 fma {}

processor\t: 1
model name\t: Another
flags\t\t: fpu
"""


def test_the_first_processor_is_described() -> None:
    model, flags = machine.parse_cpuinfo(CPUINFO.format("avx512f avx512dq"))
    assert model == "Intel(R) Xeon(R) Platinum 8370C CPU @ 2.80GHz"
    assert flags == {"fpu", "sse2", "avx", "avx2", "fma", "avx512f", "avx512dq"}
    assert machine.parse_cpuinfo("") == ("", set())


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ({"avx512f", "avx2", "fma"}, "AVX-512"),
        ({"avx2", "fma", "avx"}, "AVX2"),
        ({"avx2"}, platform.machine()),  # the kernels need both
        ({"fma", "avx"}, platform.machine()),
        (set(), platform.machine()),
    ],
)
def test_instruction_sets_are_those_with_kernels(flags: set[str], name: str) -> None:
    assert machine.name_instruction_set(flags) == name


def test_this_machine_is_described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpuinfo").write_text(CPUINFO.format(""))
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nprintf 'NVIDIA H100\\nNVIDIA H100\\n'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 2, 5})
    found = machine.describe_machine()
    kibibytes = int(Path("/proc/meminfo").read_text(encoding="utf-8").partition("MemTotal:")[2].split()[0])
    assert found.pop("memory_gib") == pytest.approx(kibibytes / 2**20, abs=0.1)
    assert found == {
        "processor": "Intel(R) Xeon(R) Platinum 8370C CPU @ 2.80GHz",
        "instruction_set": "AVX2",
        "cores": 3,
        "gpus": ["NVIDIA H100", "NVIDIA H100"],
    }


@pytest.mark.parametrize("script", [None, "#!/bin/sh\necho 'NVIDIA-SMI has failed'\nexit 9\n"])
def test_without_a_working_driver_there_are_no_gpus(
    script: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if script:
        (tmp_path / "nvidia-smi").write_text(script)
        (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin" if script else str(tmp_path))
    assert devices.query_gpus("name") == []


def test_names_that_are_not_utf_8_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nvidia-smi").write_bytes(b"#!/bin/sh\nprintf 'GPU \\377\\n'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    (tmp_path / "cpuinfo").write_bytes(b"model name\t: CPU \xff\n")
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    assert devices.query_gpus("name") == ["GPU \ufffd"]
    assert machine.describe_processor()[0] == "CPU \ufffd"


def test_without_cpuinfo_the_processor_is_the_architecture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    assert machine.describe_processor() == (platform.machine(), platform.machine())


def test_torch_is_not_imported() -> None:
    code = "import sys; from stages.artifacts import machine; machine.describe_machine(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
