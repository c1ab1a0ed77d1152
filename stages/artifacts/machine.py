"""Describe the machine that this process runs on: CPU, cores, memory and GPUs. On CPUs, none of this can affect results
under portable numerics (stages/engines/numerics.py)."""

import os
import platform
from pathlib import Path
from typing import Any

from stages.runtime.devices import query_gpus

CPUINFO = Path("/proc/cpuinfo")


def describe_machine() -> dict[str, Any]:
    """Describe this machine without importing torch.

    Keys: `processor` (the CPU's model name), `instruction_set` ("AVX-512", "AVX2" or the architecture, such as "x86_64"),
    `cores` (the number that this process may use), `memory_gib` and `gpus` (a list with the name of each NVIDIA GPU).
    """
    processor, instruction_set = describe_processor()
    return {
        "processor": processor,
        "instruction_set": instruction_set,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpus": query_gpus("name"),
    }


def describe_processor() -> tuple[str, str]:
    """Return the processor's `processor` and `instruction_set` as in `describe_machine`."""
    model, flags = parse_cpuinfo(CPUINFO.read_text(encoding="utf-8", errors="replace") if CPUINFO.exists() else "")
    return model or platform.machine(), name_instruction_set(flags)


def parse_cpuinfo(text: str) -> tuple[str, set[str]]:
    """Return the model name and the flags of the first CPU in the text of /proc/cpuinfo; empty if it has none."""
    lines = [line.partition(":") for line in text.partition("\n\n")[0].splitlines()]
    values = {key.strip(): value for key, _, value in lines}
    return " ".join(values.get("model name", "").split()), set(values.get("flags", "").split())


def name_instruction_set(flags: set[str]) -> str:
    """Name the widest vector instruction set among a CPU's flags for which numerical libraries have kernels."""
    if "avx512f" in flags:
        return "AVX-512"
    return "AVX2" if flags >= {"avx2", "fma"} else platform.machine()
