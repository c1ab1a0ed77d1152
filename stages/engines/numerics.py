"""Numerics of a stage's process: `portable` or `fast` (params.yaml, `numerics`). This affects CPUs only.

By default, each library picks the fastest kernels for the CPU, and these sum in different orders: the last digits of a matrix
product depend on the CPU's vector instructions, its vendor and the number of threads. Training amplifies such differences into
a different model. `portable` restricts every library to AVX2 kernels with a fixed order of summation:

- MKL (torch's matrix products): conditional numerical reproducibility, branch AVX2 in strict mode, which also makes results
  independent of the number of threads. MKL uses that branch only if its function `mkl_serv_intel_cpu_true` says that the CPU is
  from Intel; otherwise it falls back to slower code with different results. A shim, compiled by `make env` from mkl_shim.c and
  loaded before torch, overrides that function in our processes; MKL itself is not modified.
- ATen, oneDNN, OpenBLAS (of NumPy and SciPy), NumPy's and Arrow's own loops: AVX2 kernels.
- vLLM: its AVX2 library instead of one of its AVX-512 libraries, and attention in tiles for an L2 cache of a fixed size
  (`restrict_vllm`).
- Threads: ATen divides long sums among its threads, so the number of threads is the same for any number of cores.

`fast` leaves all of this to the libraries.
"""

import ctypes
import os
import sys
from pathlib import Path
from typing import Any, Literal

from stages.artifacts import machine
from stages.runtime import durable, scratch
from stages.runtime.errors import StageError, one_line
from stages.runtime.logs import log

Numerics = Literal["portable", "fast"]

THREADS = "2"
LIBRARIES = ("MKL_", "OMP_", "KMP_", "ATEN_", "ONEDNN_", "DNNL_", "OPENBLAS_", "NPY_", "ARROW_", "VLLM_CPU_")
"""Prefixes of these libraries' environment variables: what the user has set there must not reach the results."""
VARIABLES = {
    "MKL_CBWR": "AVX2,STRICT",
    "MKL_NUM_THREADS": THREADS,
    "MKL_DYNAMIC": "FALSE",  # otherwise MKL uses no more threads than there are cores
    "OMP_NUM_THREADS": THREADS,
    "OMP_DYNAMIC": "FALSE",
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "OPENBLAS_CORETYPE": "Haswell",
    "OPENBLAS_NUM_THREADS": "1",
    # Both NumPy 2.3's and 2.4's names; each version warns about the other's, in a category that Python hides by default.
    "NPY_DISABLE_CPU_FEATURES": "X86_V4 AVX512F AVX512CD AVX512_SKX AVX512_CLX AVX512_CNL AVX512_ICL AVX512_SPR",
    "ARROW_USER_SIMD_LEVEL": "AVX2",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # otherwise vLLM starts one thread per core
}
"""Environment variables of portable numerics. The libraries read them when they are imported or first used."""
MKL_AVX2_STRICT = 0x1000A
"""What MKL reports when the branch "AVX2,STRICT" is in effect (MKL_CBWR_AVX2 | MKL_CBWR_STRICT)."""

L2_CACHE = 256 * 1024
"""The size of the L2 cache in bytes, as vLLM is told: the size that it assumes when it cannot find out."""


def shim_path() -> Path:
    """Return the path of the compiled shim: beside the environments, in .venv."""
    return Path(sys.prefix).parent / "mkl_shim.so"


def apply(requested: Numerics) -> Numerics:
    """Set up this process and its children, before numerical libraries are imported. Returns the numerics in effect.

    Portable numerics need an x86-64 CPU with AVX2. On any other machine, `fast` is used instead, and one log line per run says
    so. Raises StageError if the shim has not been compiled or cannot be loaded.
    """
    os.environ[scratch.NUMERICS] = "fast"
    if requested == "fast":
        return "fast"
    _, instructions = machine.describe_processor()
    if instructions not in ("AVX2", "AVX-512"):
        log_once(f"numerics: portable needs an x86-64 processor with AVX2, not {instructions}: continuing with fast")
        return "fast"
    shim = shim_path()
    if not shim.exists():
        raise StageError(f"{shim} is missing, which numerics: portable needs: run `make env`, or set numerics: fast")
    for name in [name for name in os.environ if name.startswith(LIBRARIES)]:
        del os.environ[name]
    os.environ |= VARIABLES | {scratch.NUMERICS: "portable"}
    preloaded = os.environ.get("LD_PRELOAD", "")
    if str(shim) not in preloaded.split(":"):
        os.environ["LD_PRELOAD"] = f"{shim}:{preloaded}".rstrip(":")  # for processes that this one starts
    try:
        ctypes.CDLL(str(shim), mode=ctypes.RTLD_GLOBAL)  # for this one
    except OSError as error:
        raise StageError(f"{shim} cannot be loaded ({one_line(error)}): delete it and run `make env`") from error
    return "portable"


def log_once(message: str) -> None:
    """Log a message in the first stage of a `dvc repro` only: every stage of a run has the same parent process."""
    path, text = scratch.FOLDER / "numerics.txt", f"{os.getppid()} {message}"
    if "DVC_STAGE" not in os.environ or not path.is_file() or path.read_bytes() != text.encode():
        log.warning("%s", message)
        durable.write(path, text)


def verify(used: str) -> None:
    """Verify that torch, if this process has imported it, ran with the numerics that `apply` returned. Raises StageError."""
    torch = sys.modules.get("torch")
    if used == "fast" or torch is None:
        return
    library = Path(torch.__file__ or "").parent / "lib" / "libtorch_cpu.so"
    branch = getattr(ctypes.CDLL(str(library)), "mkl_serv_cbwr_get", None)
    found = branch(-1) if branch else None
    capability = torch.backends.cpu.get_cpu_capability()
    if found != MKL_AVX2_STRICT or capability != "AVX2":
        raise StageError(
            f"numerics: portable is not in effect (MKL's branch is {found}, ATen's kernels are {capability}): remove "
            "what it computed with `make clean`, and reinstall torch with `make env`; or set numerics: fast"
        )


def restrict_vllm() -> None:
    """Make vLLM load its AVX2 library if portable numerics are in effect. Call this before importing vLLM.

    vLLM (vllm/platforms/cpu.py, import_kernels) asks torch which instructions the processor has.
    """
    if os.environ.get(scratch.NUMERICS) != "portable":
        return
    import torch

    for name in ("_is_avx512_supported", "_is_avx512_bf16_supported", "_is_amx_tile_supported", "_is_amx_fp16_supported"):
        if not hasattr(torch.cpu, name):
            raise StageError(f"torch.cpu.{name}, which vLLM asks for its kernels, is missing: reinstall torch with `make env`")
        setattr(torch.cpu, name, _unsupported)
    _set_l2_cache(torch)


def _unsupported() -> bool:
    return False


def _set_l2_cache(torch: Any) -> None:
    """Make torch report L2_CACHE as the size of the L2 cache, which determines the tiles of vLLM's attention, and so the order
    of its sums (csrc/cpu/utils.hpp). Raises StageError if torch reports another size afterwards."""
    cpuinfo = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    cpuinfo.cpuinfo_get_l2_cache.restype = ctypes.POINTER(ctypes.c_uint32)  # to a struct that begins with the size
    if cpuinfo.cpuinfo_initialize() and (cache := cpuinfo.cpuinfo_get_l2_cache(0)):
        cache[0] = L2_CACHE
    found = torch.cpu.get_capabilities().get("l2_cache_size", 0)
    if found not in (0, L2_CACHE):
        raise StageError(
            f"numerics: portable: torch reports an L2 cache of {found} bytes instead of {L2_CACHE}: set numerics: fast"
        )
