"""Start and end a stage or a tool: its environment, arguments, signals, errors and exit code."""

import argparse
import codecs
import contextlib
import gc
import io
import json
import locale
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypedDict

from stages.runtime import devices, durable, errors, processes, scratch
from stages.runtime.errors import StageError, exit_with
from stages.runtime.logs import log, setup_logging
from stages.runtime.paths import ROOT

AddArguments = Callable[[argparse.ArgumentParser], None]
Main = Callable[[argparse.Namespace], None]
RUNNING = "SPPO_ENVIRONMENT"
"""Environment variable that names the environment whose interpreter this process has switched to."""
UTF8 = "PYTHONUTF8"
"""Environment variable that makes Python's encoding UTF-8, whatever the locale."""
PROGRESS = "SPPO_PROGRESS"
"""Environment variable that makes each stage log how far the run has come, which `timings start` must precede."""
PLAN, TIMINGS = scratch.FOLDER / "plan.json", scratch.FOLDER / "timings.jsonl"
"""What `python -m stages.tools timings start` expects to run, and one line for each stage that has run since then."""


class Plan(TypedDict):
    """PLAN: what `python -m stages.tools timings start` found out."""

    started: float
    """Unix time, in seconds."""
    stages: dict[str, float | None]
    """The stages that are stale -> the seconds of their last run, None if unknown."""
    seconds: dict[str, float]
    """The seconds of the last run of every stage."""


class Timing(TypedDict):
    """A line of TIMINGS."""

    stage: str
    """As in DVC_STAGE: with the path of its dvc.yaml, except for the root's."""
    seconds: float
    peak_gb: float


def prepare_process(*, online: bool = False) -> None:
    """Prepare this process for a stage, before the imports that take seconds. online: whether it may use the network."""
    devices.forget_launchers()
    devices.forget_overrides()
    if "DVC_STAGE" in os.environ or devices.is_launched():  # either launcher may be killed during those imports
        processes.die_with_launcher()
    os.environ[UTF8] = "1"  # for the processes that this one starts
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    # OpenMP's waiting threads otherwise burn whole cores: several times slower when another process needs a core, no faster
    # when none does. OpenMP reads this when torch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    if not sys.stderr.isatty():  # progress bars are for terminals; tqdm reads this when it is imported
        os.environ.setdefault("TQDM_DISABLE", "1")
    gc.set_threshold(processes.GC_THRESHOLD)
    setup_logging(online)


@contextlib.contextmanager
def printing() -> Iterator[None]:
    """Print to stdout within the block. If its reader has gone, as after `| head`, end this process as programs do: with the
    exit code of SIGPIPE and without a message. If stdout cannot be written for another reason, end it with one line."""
    try:
        try:
            yield
        finally:
            if sys.stdout:  # None if it was closed from the start
                sys.stdout.flush()
    except OSError as error:
        if sys.stdout and _lost_reader(sys.stdout.fileno()):
            _discard_stdout()
            sys.exit(128 + signal.SIGPIPE)
        if errors.user_message(error):
            _discard_stdout()
        errors.exit_with(error)


def _lost_reader(handle: int) -> bool:
    """Return whether nothing will read what is written to a pipe or socket any more."""
    poll = select.poll()
    poll.register(handle, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _discard_stdout() -> None:
    """Let what is still to be written, when Python ends, go nowhere: otherwise Python reports that it failed."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def enter_environment(environment: str) -> None:
    """Replace this process with the same command in an environment's interpreter, unless it runs there already.

    Under a locale whose encoding is not UTF-8, also replace it with an interpreter that uses UTF-8, because libraries open
    files without naming an encoding. environment: a folder of .venv. Raises StageError if it is not installed.
    """
    is_utf8 = codecs.lookup(locale.getpreferredencoding(False)).name == "utf-8" or os.environ.get(UTF8) == "1"
    os.environ[UTF8] = "1"
    if Path(sys.prefix).name == environment or os.environ.get(RUNNING) == environment:
        if not is_utf8:
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
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
    launched = devices.is_launched()  # a torchrun worker; only the parent writes timings and the record
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
    timing: Timing = {"stage": stage, "seconds": round(seconds, 1), "peak_gb": round(peak / 2**20, 2)}
    durable.append_line(TIMINGS, json.dumps(timing))


def log_progress(name: str, stage: str) -> None:
    """Log how far a run of several stages has come before it runs this one, if asked to. stage: its name in dvc.yaml."""
    if stage and os.environ.get(PROGRESS) and (plan := read_plan()):
        log.info("%s: %s", name, describe_progress(plan["stages"], read_timings(), time.time() - plan["started"]))


def read_plan() -> Plan | None:
    """Return the plan of the run; None without one. A file that is not a plan is set aside."""
    return durable.read_json(PLAN, _check_plan)


def _check_plan(plan: Any) -> Plan:
    """Return a plan. Raises ValueError, KeyError, TypeError or AttributeError if it is not one."""
    times = [plan["started"], *plan["seconds"].values(), *(value for value in plan["stages"].values() if value is not None)]
    if not all(map(_is_duration, times)):
        raise ValueError("not the plan of a run")
    return Plan(started=plan["started"], stages=plan["stages"], seconds=plan["seconds"])


def _is_duration(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1e12


def read_rows() -> list[Timing]:
    """Return the timings of the stages that have run since `timings start`, without lines that a crash cut off."""
    if not TIMINGS.is_file():
        return []
    lines = TIMINGS.read_bytes().split(b"\n")
    return [timing for timing in map(_parse_timing, lines) if timing]


def _parse_timing(line: bytes) -> Timing | None:
    with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
        row = json.loads(line)
        if isinstance(row["stage"], str) and _is_duration(row["seconds"]) and _is_duration(row["peak_gb"]):
            return Timing(stage=row["stage"], seconds=row["seconds"], peak_gb=row["peak_gb"])
    return None


def read_timings() -> dict[str, float]:
    """Return the seconds of each stage that has run since `timings start`, by its name in dvc.yaml."""
    return {timing["stage"].rpartition(":")[2]: timing["seconds"] for timing in read_rows()}


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
