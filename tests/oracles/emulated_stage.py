"""Run a stage as `python -m stages` does, without what QEMU 7.2 crashes in: NumPy's sort with AVX2, and threads of a forked
process."""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from stages.__main__ import main
from stages.engines import harness, numerics


def start_thread(_: list[str], data_sets: Path, folder: Path) -> ThreadPoolExecutor:
    """Return a thread of this process, in place of `harness.start_pool`'s processes."""
    os.environ |= harness.cache_paths(folder)
    os.chdir(data_sets)
    return ThreadPoolExecutor(1)


numerics.VARIABLES["NPY_DISABLE_CPU_FEATURES"] += " X86_V3 AVX2 FMA3"
harness.start_pool = start_thread
words = [str(Path(word).resolve()) if word.startswith("data/") else word for word in sys.argv[1:]]
main(words)
