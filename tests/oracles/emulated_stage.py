"""Run a stage as `python -m stages` does, without what QEMU 7.2 crashes in: NumPy's sort with AVX2."""

import sys

from stages.__main__ import main
from stages.engines import numerics

numerics.VARIABLES["NPY_DISABLE_CPU_FEATURES"] += " X86_V3 AVX2 FMA3"
main(sys.argv[1:])
