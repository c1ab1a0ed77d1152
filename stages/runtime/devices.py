"""The devices that a stage runs on. Results do not depend on their number."""

import contextlib
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

from stages.runtime.errors import StageError, quote

LAUNCH_FOLDER = "SPPO_LAUNCH_FOLDER"
"""Environment variable of the distributed workers that a stage launches: the folder through which they communicate with it."""
LAUNCHER = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""The environment variables that torchrun and DeepSpeed's launcher give each of their workers."""
LAUNCHER_DETAILS = ("LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_NAME", "ROLE_WORLD_SIZE")
"""What torchrun gives them in addition, besides variables that begin with TORCHELASTIC_."""

OVERRIDES = (
    *("USE_TORCH", "USE_TF", "USE_JAX", "USE_FLAX", "FORCE_TF_AVAILABLE"),  # the Hugging Face libraries then leave out PyTorch
    *("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "NVIDIA_TF32_OVERRIDE"),  # TF32 in place of float32; NVIDIA's images set the first
    "DS_ACCELERATOR",
    *("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "VLLM_BATCH_INVARIANT", "VLLM_MAX_N_SEQUENCES", "VLLM_USE_MODELSCOPE"),
    *("VLLM_MODEL_REDIRECT_PATH", "VLLM_MOE_ROUTING_SIMULATION_STRATEGY", "VLLM_DP_", "VLLM_RAY_"),
)
"""Beginnings of environment variables, for other programs or other models, by which libraries would compute something else than
params.yaml says, or would not start."""

VISIBLE = "CUDA_VISIBLE_DEVICES"
NO_GPU = ("", "-1", "NoDevFiles")
"""Values of CUDA_VISIBLE_DEVICES that hide every GPU on purpose; Slurm sets the last one for a job without GPUs."""
REMOTE: dict[str, int] = {}
"""GPUs of a cluster that were there for this process's work: their name (one at most) -> how many, at most, at a time."""
DRIVER = Path("/proc/driver/nvidia/version")
OLDEST_DRIVER = {"13": 580, "12": 525}
"""Major version of CUDA that torch was built for -> the oldest driver that it works with (CUDA's release notes, table 2)."""


def has_gpus() -> bool:
    """Return whether this process is to use GPUs: torch sees some.

    Without any it uses the CPU, which is on purpose where torch is a build for CPUs, CUDA_VISIBLE_DEVICES hides the GPUs, or
    there is no NVIDIA driver. Raises StageError if torch could use the GPUs of this machine but sees none, as with a driver
    that is too old: a run meant for GPUs would take months on the CPU. Raises it also if the GPUs that it sees are not all of
    one kind, because results and memory would then depend on which of them computes what.
    """
    import torch

    if torch.cuda.is_available():
        _check_kinds()
        return True
    visible = os.environ.get(VISIBLE)
    if torch.version.cuda and visible not in NO_GPU and (driver := find_driver()):
        raise StageError(_explain_unseen_gpus(driver, torch.version.cuda, visible))
    return False


def find_driver() -> str:
    """Return the version of the loaded NVIDIA driver, such as "535.129.03"; "" without a driver."""
    if DRIVER.is_file():
        text = DRIVER.read_text(encoding="utf-8", errors="replace")
        return found[0] if (found := re.search(r"\b\d{3,}(\.\d+)+\b", text)) else "unknown"
    return next(iter(query_gpus("driver_version")), "")


def query_gpus(field: str) -> list[str]:
    """Return what nvidia-smi says of each GPU, such as its `name`; an empty list if it is missing, fails or hangs."""
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def _is_too_old(driver: str, cuda: str) -> bool:
    """Return whether a driver is known to be too old for a version of CUDA. driver: of `find_driver`."""
    major = driver.partition(".")[0]
    return major.isdecimal() and int(major) < OLDEST_DRIVER.get(cuda.partition(".")[0], 0)


def _explain_unseen_gpus(driver: str, cuda: str, visible: str | None) -> str:
    if _is_too_old(driver, cuda):
        oldest = OLDEST_DRIVER[cuda.partition(".")[0]]
        cause = f"CUDA {cuda}, for which torch is built, needs driver {oldest} or newer: update the driver"
    elif visible is not None:
        cause = f"{VISIBLE} is {quote(visible)}, whose first entry is no GPU of this machine: correct it or unset it"
    else:
        cause = "check that `nvidia-smi` lists the GPUs and, in a container or a job, that they were passed to it"
    return f"torch sees no GPU, although NVIDIA's driver {driver} is loaded: {cause}; to run on the CPU, set {VISIBLE}=''"


def _check_kinds() -> None:
    """Raise StageError if the visible GPUs differ in name or memory."""
    gpus = _visible_gpus()
    if len(gpus) < 2:
        return
    kinds: dict[str, list[str]] = {}
    for index, gpu in enumerate(gpus):
        kinds.setdefault(describe_gpu(index), []).append(gpu)
    if len(kinds) > 1:
        choices = " or ".join(f"{VISIBLE}={','.join(same)} ({len(same)} x {kind})" for kind, same in kinds.items())
        raise StageError(f"the GPUs are not all of one kind, on which results and memory would depend: set {choices}")


def describe_gpu(index: int = 0) -> str:
    """Return the name and the memory of a GPU that torch sees, such as "NVIDIA H100 80GB HBM3, 79 GiB"."""
    import torch

    properties = torch.cuda.get_device_properties(index)
    return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"


def check_granted(count: int) -> str:
    """Return what `describe_gpu` says of the GPUs that Ray gave this process, "" if it gave none. count: their number.

    Raises StageError, which names this machine, if torch sees another number of GPUs, so that the process would compute on the
    CPU or on those of other workers, or if they are of two kinds.
    """
    if not count:
        return ""
    import torch

    node = f"node {os.uname().nodename}: Ray gave a process {count} GPU{'s' * (count > 1)}"
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if seen != count:
        raise StageError(f"{node}, and torch sees {seen}: {_explain_granted(seen > count)}, then restart Ray there")
    kinds = sorted({describe_gpu(index) for index in range(count)})
    if len(kinds) > 1:
        raise StageError(
            f"{node} of two kinds ({'; '.join(kinds)}): set {VISIBLE} to those of one kind, then restart Ray there"
        )
    return kinds[0]


def _explain_granted(too_many: bool) -> str:
    """Say what to do on a node of a cluster where torch sees more, or fewer, GPUs than Ray gave a process."""
    import torch

    cuda, driver = torch.version.cuda, find_driver()
    if not cuda:
        return "its torch is a build for CPUs: run `make env` without BUILD=cpu"
    if too_many:
        return "unset RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"
    if _is_too_old(driver, cuda):
        oldest = OLDEST_DRIVER[cuda.partition(".")[0]]
        return f"CUDA {cuda}, for which torch is built, needs driver {oldest} or newer, not {driver}: update it"
    return f"check that `nvidia-smi` lists them, and that {VISIBLE} names no others"


def note_remote(kind: str, count: int) -> None:
    """Note in REMOTE that a cluster has so many GPUs of a kind for this process's work. kind: of `check_granted`."""
    if kind:
        name = kind.rpartition(", ")[0]
        REMOTE[name] = max(count, REMOTE.get(name, 0))


def _visible_gpus() -> list[str]:
    """Return the entries of CUDA_VISIBLE_DEVICES that are GPUs of this machine, or those that would name its GPUs.

    CUDA ignores the first entry that is no GPU of this machine, and all after it.
    """
    import torch

    gpus, visible = torch.cuda.device_count(), os.environ.get(VISIBLE)
    return visible.split(",")[:gpus] if visible else [str(index) for index in range(gpus)]


def list_devices(*, cores: bool = False, gpus: int = 1) -> list[str]:
    """Return the value of CUDA_VISIBLE_DEVICES for each worker: `gpus` GPUs each, or "" for each worker on a CPU.

    On a CPU, the environment variable SPPO_WORKERS sets the number of workers; the default is one or, with `cores` (for
    single-threaded workers), one per CPU core. Raises StageError if SPPO_WORKERS is not an integer from 1 to 999, if there are
    not a multiple of `gpus` GPUs (engine.tensor_parallel), and as `has_gpus` does.
    """
    visible = _visible_gpus() if has_gpus() else []
    if gpus > 1 and (not visible or len(visible) % gpus):
        raise StageError(
            f"engine.tensor_parallel is {gpus}, but the number of GPUs is {len(visible)}, which is not a multiple of it: "
            f"change it, or choose GPUs with {VISIBLE}"
        )
    if visible:
        return [",".join(visible[start : start + gpus]) for start in range(0, len(visible), gpus)]
    default = len(os.sched_getaffinity(0)) if cores else 1
    count = os.environ.get("SPPO_WORKERS", str(default))
    if not re.fullmatch("[1-9][0-9]{0,2}", count):
        raise StageError(
            f"SPPO_WORKERS is {quote(count)} but must be a number of processes from 1 to 999: correct it or unset it"
        )
    return [""] * int(count)


def is_launched() -> bool:
    """Return whether this process is a distributed worker: of a stage or, unless DVC started it, of another launcher.

    A variable of LAUNCHER alone proves nothing: clusters and shells leave some of them in the environment.
    """
    return "LOCAL_RANK" in os.environ and (
        LAUNCH_FOLDER in os.environ or ("DVC_STAGE" not in os.environ and os.environ.keys() >= set(LAUNCHER))
    )


def forget_launchers() -> None:
    """Remove what launchers of other programs left in this process's environment, unless it is a distributed worker.

    Otherwise libraries would wait for other processes, or train in another precision than params.yaml says.
    """
    launched = is_launched()
    for name in list(os.environ):
        by_launcher = name in (*LAUNCHER, *LAUNCHER_DETAILS) or name.startswith("TORCHELASTIC_")
        if name.startswith(("ACCELERATE_", "FSDP_")) or (by_launcher and not launched):
            del os.environ[name]


def forget_overrides() -> None:
    """Remove from this process's environment what would make a result depend on more than params.yaml, or stop a library."""
    for name in list(os.environ):
        if name.startswith(OVERRIDES):
            del os.environ[name]


def is_main_process() -> bool:
    """Return whether this process writes the outputs: it has rank 0 in its distributed group, or has no group."""
    return os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def explain_out_of_memory(remedy: str) -> Iterator[None]:
    """Convert CUDA out-of-memory errors into a StageError that names the parameter to lower."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise StageError(f"out of GPU memory: {remedy}") from error
