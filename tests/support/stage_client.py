"""Ask a server of support.stage_server to run a command. As a program, this file is a `python` whose stages the server runs:
DVC finds it in place of the interpreter. It imports little, because it starts once for every stage."""

import json
import os
import socket
import sys
from typing import Any

STAGES = ("stages", "support.fused_stage")
"""The modules that run the stage of their first argument."""
SERVED = (*STAGES, "stages.tools", "dvc")
"""The modules that a server runs."""
HARMLESS = (
    "SPPO_",
    "DVC_",
    "PYTEST_",
    "OPENAI_API_KEY",
    "OPENAI_BASE_URL",
    "AWS_",
    "CUDA_VISIBLE_DEVICES",
    "RAY_ADDRESS",
    "OMP_NUM_THREADS",
)
"""Beginnings of the environment variables that no library which the server has imported reads while it is imported; stages
replace the last one by their own value."""
REPLACED = ("PATH", "PYTHONPATH", "PWD", "OLDPWD", "SHLVL", "_")
"""Those of the shell and of Python, which the fork takes over."""
OURS = ("PYTHONUTF8", "GOMP_SPINCOUNT", "TQDM_DISABLE", "VLLM_NO_USAGE_STATS", "HF_HUB_DISABLE_TELEMETRY")
OURS += ("TOKENIZERS_PARALLELISM", "TORCH_CPP_LOG_LEVEL", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
"""Those that `run.prepare_process` has set in the server, and sets in any process, such as one of pytest that has called it."""

IMPORTED = ("KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK", "RAY_CLIENT_MODE", "PYTORCH_NVML_BASED_CUDA_CHECK")
IMPORTED += (
    "TORCHINDUCTOR_CACHE_DIR",
    "TORCHINDUCTOR_COMPILE_THREADS",
    "TRITON_CACHE_AUTOTUNING",
    "TILELANG_CLEANUP_TEMP_FILES",
)
"""Those that libraries set when they are imported, by a test as well as in the server: scikit-learn, torch, vLLM and Ray."""


def is_served(module: str, before: dict[str, str], environment: dict[str, str]) -> bool:
    """Return whether the server, started with the environment `before`, can run a module with this environment."""
    return module in SERVED and not find_obstacles(before, environment)


def find_obstacles(before: dict[str, str], environment: dict[str, str]) -> set[str]:
    """Return the variables that keep the server, started with the environment `before`, from running anything."""
    changed = {name for name, _ in before.items() ^ environment.items()}
    return {name for name in changed if not name.startswith(HARMLESS) and name not in REPLACED + OURS + IMPORTED}


def ask(server: str, request: dict[str, Any], streams: tuple[int, int, int]) -> int:
    """Run `python -m MODULE ARGUMENTS` with these file handles as stdin, stdout and stderr, and return the exit code.

    server: the path of its socket. request: `module`, `arguments`, `folder`, `environment`.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(server)
        socket.send_fds(connection, [json.dumps(request).encode()], streams)
        return int(connection.recv(100))


def main(server: str, python: str, before: str, *command: str) -> None:
    """Run a command of Python: `-m MODULE ARGUMENTS` in the server if possible, anything else in the interpreter `python`."""
    environment = dict(os.environ)
    if command[:1] == ("-m",) and is_served(command[1], json.loads(before), environment):
        folder = os.getcwd()  # noqa: PTH109 (pathlib takes longer to import)
        request = {"module": command[1], "arguments": command[2:], "folder": folder, "environment": environment}
        sys.exit(ask(server, request, (0, 1, 2)))
    os.execv(python, [python, *command])


if __name__ == "__main__":
    main(*sys.argv[1:])
