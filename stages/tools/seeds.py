"""Run the miniature with several seeds, and write the noise between these runs to reports/seeds.md and seeds.json.

Each seed has a clone of HEAD in scratch/seeds/ that shares this repository's DVC cache, so results with the same seed are not
computed again. Interrupted runs resume, and finished ones are kept until code or parameters change.
"""

import argparse
import contextlib
import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stages.artifacts import files
from stages.reporting import seeds
from stages.runtime import params, processes, scratch
from stages.runtime.errors import StageError, one_line
from stages.tools import editing, git, repository, revisions

FOLDER = scratch.FOLDER / "seeds"
REPORTS = Path("reports")
DEFAULT = [1, 2, 3, 4, 42]
NOTE = Path("scratch/finished.json")
"""In a clone: the commit and the digest of dvc.lock of its finished run."""
LOG = Path("scratch/run.log")
"""In a clone: the output of its last run."""
POLL_SECONDS = 0.2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=int, nargs="+", default=DEFAULT, metavar="SEED", help=f"default: {DEFAULT}")
    parser.add_argument("--jobs", type=int, default=1, help="seeds to run at the same time (default: 1; each uses two cores)")
    parser.add_argument("--collect", action="store_true", help="run nothing, only collect the finished runs")


def main(args: argparse.Namespace) -> None:
    """Run the seeds that have no finished run, then write the reports."""
    wanted = list(dict.fromkeys(args.seeds))
    if len(wanted) < 2 or min(wanted) < 0 or args.jobs < 1:
        raise StageError("--seeds needs at least two numbers, none of them negative, and --jobs at least 1: correct the option")
    if not args.collect:
        run_all(wanted, args.jobs)
    write_reports([seed for seed in wanted if is_finished(seed)])


def write_reports(finished: list[int]) -> None:
    """Write seeds.md and seeds.json from the clones of these seeds. Raises StageError for fewer than two."""
    runs = {seed: _flatten(files.read_json(FOLDER / str(seed) / revisions.METRICS)) for seed in finished}
    document = seeds.collect_figures(runs)
    files.write_json(document, REPORTS / "seeds.json")
    with files.replacing(REPORTS / "seeds.md") as partial:
        partial.write_text(seeds.format_seeds(document), encoding="utf-8")
    print(f"{REPORTS}/seeds.md: seeds {', '.join(map(str, finished))}")


def _flatten(metrics: dict[str, Any]) -> seeds.Flat:
    return {".".join(key): value for key, value in revisions.flatten(metrics).items()}


def is_finished(seed: int) -> bool:
    """Return whether a seed's clone holds a finished run of HEAD's code and parameters."""
    folder = FOLDER / str(seed)
    if not (folder / NOTE).exists() or not (folder / revisions.LOCK).exists():
        return False
    note = files.read_json(folder / NOTE)
    same = note["lock"] == files.digest(folder / revisions.LOCK) and params.read(folder / revisions.PARAMS).get("seed") == seed
    return same and git.has_same_inputs(Path(), note["commit"], "HEAD")


def run_all(wanted: list[int], jobs: int) -> None:
    """Run the seeds that are not finished, `jobs` at a time. Raises StageError when the first one fails."""
    changed = git.find_uncommitted(Path())
    if changed:
        raise StageError(f"{changed[0]} differs from HEAD, which the runs would use: commit or stash it")
    pending = [seed for seed in wanted if not is_finished(seed)]
    running: dict[int, subprocess.Popen[bytes]] = {}
    with _terminate(running):
        while pending or running:
            while pending and len(running) < jobs:
                seed = pending.pop(0)
                running[seed] = start(seed)
            ended = [seed for seed, process in running.items() if process.poll() is not None]
            for seed in ended:
                finish(seed, running.pop(seed).returncode)
            if not ended:
                time.sleep(POLL_SECONDS)


@contextlib.contextmanager
def _terminate(running: dict[int, "subprocess.Popen[bytes]"]) -> Iterator[None]:
    """End the processes that are still running when the block ends for any reason."""
    try:
        yield
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()


def start(seed: int) -> "subprocess.Popen[bytes]":
    """Start DVC in the clone of a seed."""
    folder = prepare(seed)
    log = folder / LOG
    log.parent.mkdir(exist_ok=True)
    print(f"seed {seed}: running in {folder}, output in {log}", flush=True)
    program = Path(sys.executable).parent
    environment = git.clean_environment()
    for name in ("SPPO_SCRATCH", "SPPO_ENVIRONMENT"):
        environment.pop(name, None)
    environment["PATH"] = f"{program}:{environment.get('PATH', '')}"
    die_with_tool = functools.partial(processes.die_with_parent, os.getpid(), signal.SIGTERM)
    command = [str(program / "dvc"), "repro"]
    with log.open("wb") as output:
        return subprocess.Popen(
            command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT, preexec_fn=die_with_tool
        )


def prepare(seed: int) -> Path:
    """Create or update the clone for a seed: HEAD with this seed, sharing this repository's environments and DVC cache.

    A clone of an earlier commit is reset; DVC takes what is still valid from its cache.
    """
    folder = FOLDER / str(seed)
    if not (folder / ".git").exists():
        files.remove(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        git.run_git(folder.parent, "clone", "--quiet", "--shared", "--no-checkout", str(git.root(Path())), folder.name)
    commit = git.head(Path())
    if not (folder / revisions.PARAMS).exists() or git.head(folder) != commit:
        git.run_git(folder, "fetch", "--quiet", "origin", "HEAD")
        git.run_git(folder, "checkout", "--quiet", "--force", "--detach", commit)
    link = folder / ".venv"
    if not link.is_symlink():
        link.symlink_to(Path(sys.prefix).parent)
    with repository.open_repository(Path()) as repo:
        (folder / ".dvc" / "config.local").write_text(f"[cache]\n    dir = {repo.cache.local_cache_dir}\n", encoding="utf-8")
    document = editing.load(folder / revisions.PARAMS)
    if document["seed"] != seed:
        document["seed"] = seed
        (folder / revisions.PARAMS).write_text(editing.dump(document), encoding="utf-8")
    return folder


def finish(seed: int, code: int) -> None:
    """Record that a seed's run is finished. Raises StageError if it failed."""
    folder = FOLDER / str(seed)
    if code:
        log = folder / LOG
        last = (log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no output"])[-1]
        raise StageError(f"{folder}: seed {seed} failed ({one_line(last)}): see {log}, then run this again to resume")
    note = {"commit": git.head(folder), "lock": files.digest(folder / revisions.LOCK)}
    files.write_json(note, folder / NOTE)
    print(f"seed {seed}: finished", flush=True)
