"""The devices that a stage runs on. Results do not depend on their number."""

import contextlib
import os
import re
from collections.abc import Iterator

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


def list_devices(*, cores: bool = False) -> list[str]:
    """Return the value of CUDA_VISIBLE_DEVICES for each worker: one GPU each, or "" for each worker on a CPU.

    Of CUDA_VISIBLE_DEVICES, CUDA ignores the first entry that is no GPU of this machine, and all after it.
    On a CPU, the environment variable SPPO_WORKERS sets the number of workers; the default is one or, with `cores` (for
    single-threaded workers), one per CPU core. Raises StageError if SPPO_WORKERS is not an integer from 1 to 999.
    """
    import torch

    if torch.cuda.is_available():
        gpus, visible = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
        return visible.split(",")[:gpus] if visible else [str(index) for index in range(gpus)]
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
