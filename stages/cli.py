"""How every stage starts and ends: its environment, its log, its errors and its exit code."""

import gc
import json
import logging
import os
import resource
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRATCH = Path(os.environ.get("SPPO_SCRATCH", "scratch"))
"""Unfinished work and timings: never a stage's input or output, ignored by Git and DVC."""

log = logging.getLogger("stages")


class StageError(Exception):
    """Bad input, stated for people: one message that names the file, the row or key, and the remedy."""


def run(main: Callable[[], None], *, environment: str = "main", online: bool = False) -> None:
    """Run a stage's `main` in its environment and exit: 0, or 1 with one line on stderr for a StageError.

    environment: `main`, `rank` or `harness`, a folder of .venv; another interpreter hands over to that one.
    online: whether the stage may ask the Hugging Face Hub. Only `assets` does; all others read local files.
    SPPO_DEBUG=1 shows the traceback of a StageError.
    """
    name = Path(sys.argv[0]).stem
    try:
        _enter(environment)
        quiet(online)
        started = time.monotonic()
        main()
        _record(name, time.monotonic() - started)
        gc.freeze()  # else Python looks through torch's and vLLM's every object before it exits: seconds
    except StageError as error:
        if os.environ.get("SPPO_DEBUG"):
            raise
        print(f"{name}: error: {error}", file=sys.stderr)
        sys.exit(1)


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


def _record(name: str, seconds: float) -> None:
    """Append seconds and peak memory to the timings that `python -m stages.timings` prints after a run."""
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    stage = os.environ.get("DVC_STAGE", name)
    log.info("%s: %.1f s, peak memory %.1f GB", stage.rpartition(":")[2], seconds, peak / 2**20)
    SCRATCH.mkdir(parents=True, exist_ok=True)
    with (SCRATCH / "timings.jsonl").open("a") as file:
        file.write(json.dumps({"stage": stage, "seconds": round(seconds, 1), "peak_gb": round(peak / 2**20, 2)}) + "\n")
