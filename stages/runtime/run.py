"""Start and end a stage or a tool: its environment, arguments, signals, errors and exit code."""

import argparse
import gc
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

from stages.runtime import processes, scratch
from stages.runtime.errors import StageError, exit_with
from stages.runtime.logs import log, setup_logging
from stages.runtime.paths import ROOT

AddArguments = Callable[[argparse.ArgumentParser], None]
Main = Callable[[argparse.Namespace], None]
RUNNING = "SPPO_ENVIRONMENT"
"""Environment variable that names the environment whose interpreter this process has switched to."""


def prepare_process(*, online: bool = False) -> None:
    """Prepare this process for a stage, before the imports that take seconds. online: whether it may use the network."""
    if os.environ.keys() & {"DVC_STAGE", "LOCAL_RANK"}:  # either launcher may be killed during those imports
        processes.die_with_launcher()
    # OpenMP's waiting threads otherwise burn whole cores: several times slower when another process needs a core, no faster
    # when none does. OpenMP reads this when torch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    if not sys.stderr.isatty():  # progress bars are for terminals; tqdm reads this when it is imported
        os.environ.setdefault("TQDM_DISABLE", "1")
    gc.set_threshold(processes.GC_THRESHOLD)
    setup_logging(online)


def enter_environment(environment: str) -> None:
    """Replace this process with the same command in an environment's interpreter, unless it runs there already.

    environment: a folder of .venv. Raises StageError if it is not installed.
    """
    if Path(sys.prefix).name == environment or os.environ.get(RUNNING) == environment:
        return
    for home in (Path(sys.prefix).parent, ROOT / ".venv"):
        python = home / environment / "bin" / "python"
        if python.exists():
            os.environ[RUNNING] = environment
            os.execv(python, [str(python), *sys.orig_argv[1:]])
    raise StageError(f"the environment {ROOT / '.venv' / environment} is not installed: run `make env`")


def build_parser(program: str, description: str | None, add_arguments: AddArguments) -> argparse.ArgumentParser:
    """Build the parser of a stage or tool from its docstring and its own `add_arguments`."""
    parser = argparse.ArgumentParser(program, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    return parser


def run_stage(name: str, main: Main, args: argparse.Namespace, write_record: Callable[[str], None] | None) -> None:
    """Run a stage's `main` and exit: 0, or 1 with one line on stderr for an error that the user can fix.

    Ctrl-C, SIGTERM and SIGHUP also end it with one line; the exit code is then 128 + the signal's number.
    write_record: called under DVC with the stage's name in dvc.yaml; None for a stage without a record.
    """
    stage = os.environ.get("DVC_STAGE", "").rpartition(":")[2]
    launched = "LOCAL_RANK" in os.environ  # a torchrun worker; only the parent writes timings and the record
    try:
        processes.handle_stop_signals()
        started = time.monotonic()
        if not launched:
            scratch.claim(sys.argv)
            scratch.sweep()
        main(args)
        scratch.finish(stage, output_paths(args))
        if launched:
            processes.exit_worker()
        log_timing(name, time.monotonic() - started)
        if stage and write_record:
            write_record(stage)
        gc.freeze()  # otherwise Python scans every object of torch and vLLM before it exits: seconds
    except processes.Stopped as stopped:
        print(f"{name}: stopped by {stopped.name}: re-run to resume", file=sys.stderr)
        raise
    except Exception as error:
        exit_with(error, f"{name}: ")


def output_paths(args: argparse.Namespace) -> list[Path]:
    """Return the outputs of a stage: the values of its options named --out or --out-*, without those that are not given."""
    return [value for option, value in vars(args).items() if value and (option == "out" or option.startswith("out_"))]


def log_timing(name: str, seconds: float) -> None:
    """Append seconds and peak memory to the timings that `python -m stages.tools timings show` prints after a run."""
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    stage = os.environ.get("DVC_STAGE", name)
    log.info("%s: %.1f s, peak memory %.1f GB", stage.rpartition(":")[2], seconds, peak / 2**20)
    scratch.FOLDER.mkdir(parents=True, exist_ok=True)
    with (scratch.FOLDER / "timings.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"stage": stage, "seconds": round(seconds, 1), "peak_gb": round(peak / 2**20, 2)}) + "\n")
