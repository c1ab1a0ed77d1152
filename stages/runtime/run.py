"""Start and end a stage or a tool: its environment, arguments, signals, errors and exit code."""

import argparse
import gc
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from stages.runtime import processes, scratch
from stages.runtime.errors import StageError, exit_with
from stages.runtime.logs import log, setup_logging
from stages.runtime.paths import ROOT

AddArguments = Callable[[argparse.ArgumentParser], None]
Main = Callable[[argparse.Namespace], None]
RUNNING = "SPPO_ENVIRONMENT"
"""Environment variable that names the environment whose interpreter this process has switched to."""
PROGRESS = "SPPO_PROGRESS"
"""Environment variable that makes each stage log how far the run has come, which `timings start` must precede."""
PLAN, TIMINGS = scratch.FOLDER / "plan.json", scratch.FOLDER / "timings.jsonl"
"""What `python -m stages.tools timings start` expects to run, and one line for each stage that has run since then."""


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
            log_progress(name, stage)
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
    TIMINGS.parent.mkdir(parents=True, exist_ok=True)
    with TIMINGS.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"stage": stage, "seconds": round(seconds, 1), "peak_gb": round(peak / 2**20, 2)}) + "\n")


def log_progress(name: str, stage: str) -> None:
    """Log how far a run of several stages has come before it runs this one, if asked to. stage: its name in dvc.yaml."""
    if stage and os.environ.get(PROGRESS) and PLAN.exists():
        plan = json.loads(PLAN.read_text(encoding="utf-8"))
        log.info("%s: %s", name, describe_progress(plan["stages"], read_timings(), time.time() - plan["started"]))


def read_timings() -> dict[str, float]:
    """Return the seconds of each stage that has run since `timings start`, by its name in dvc.yaml."""
    rows = [json.loads(line) for line in TIMINGS.read_text(encoding="utf-8").splitlines()] if TIMINGS.exists() else []
    return {row["stage"].rpartition(":")[2]: row["seconds"] for row in rows}


def describe_progress(planned: Mapping[str, float | None], done: Mapping[str, float], seconds: float) -> str:
    """Describe a run of which another stage starts: `stage 12 of 34, 3 min so far, about 6 min left`.

    planned: the stages that were stale when the run started -> what each took the last time, in seconds, or None. The run may
    skip some of them: those whose inputs turn out unchanged, or whose outputs are in DVC's cache. done: the stages that have
    run -> seconds. seconds: the time since the start.
    """
    left = [last for stage, last in planned.items() if stage not in done]
    known = [last for last in left if last is not None]
    word = "about" if len(known) == len(left) else "at least"
    estimate = f", {word} {format_duration(sum(known))} left" if known else ""
    return f"stage {len(done) + 1} of {max(len(planned), len(done) + 1)}, {format_duration(seconds)} so far{estimate}"


def format_duration(seconds: float) -> str:
    """Format a duration in seconds below a minute and a half, otherwise in minutes."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
