"""Kills every stage again and again, at random moments, and compares what comes out in the end with an uninterrupted run.

`make torture` writes docs/torture.md. Most runs are the stage's command as DVC gives it, one in four is `dvc repro`.
"""

import argparse
import contextlib
import hashlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dvc.repo import Repo
from endpoint import chosen, serve
from running import alive, set_params, wait_for
from test_miniature import SMALLEST, clone

from stages.cli import ROOT

DOCUMENT = ROOT / "docs/torture.md"
PATIENCE = 20
"""Seconds within which all processes of a killed stage must be gone."""
SHARDS = {"generate.shard_size": 4, "answer.shard_size": 8, "rank.shard_size": 2, "train.checkpoint_steps": 1}
"""Overrides, so that there is something to go on from."""
JUDGE = {"judge": "judge", "workers": 2}
HOW = ["SIGKILL", "SIGTERM", "SIGINT group", "SIGKILL group"]
"""To the one process, or to its group, as a terminal does."""


@dataclass
class Row:
    """A stage, what it is run with, and what was seen."""

    stage: str
    note: str = ""
    overrides: dict[str, Any] = field(default_factory=dict)
    workers: int = 2
    kills: Counter[str] = field(default_factory=Counter)
    restarts: int = 0
    went_on: int = 0
    """Restarts that found finished work in scratch."""
    ends: int = 0
    """Runs that ended by themselves, compared with the uninterrupted one."""
    slowest: float = 0
    """Seconds from a kill to the end of the last process."""
    faults: list[str] = field(default_factory=list)


def rows(url: str) -> list[Row]:
    """Every kind of stage. url: of an endpoint that judges."""
    judge = {"evaluate_alpaca": JUDGE | {"base_url": url}}
    return [
        Row("assets-prompts"),
        Row("split"),
        Row("generate@iter1", "two workers"),
        Row("rank@iter1", "two workers"),
        Row("reference@iter1", overrides={"train.device_batch": 1}),
        Row("train@iter1"),
        Row("train@iter1", "two processes under torchrun", {"train.devices": 2}),
        Row("answer@iter1", "one worker", workers=1),
        Row("evaluate-alpaca@iter1", "gold judge"),
        Row("evaluate-alpaca@iter1", "model at an endpoint", judge),
        Row("evaluate-lm@iter1", "two workers"),
        Row("compare", "two workers"),
        Row("report"),
    ]


@contextlib.contextmanager
def endpoint() -> Iterator[Any]:
    """A judge that takes a tenth of a second for an answer, which depends on the question alone."""

    def reply(number: int, prompt: str) -> tuple[int, Any]:
        time.sleep(0.1)
        return chosen((hashlib.sha256(prompt.encode()).digest()[0] + 1) / 257)

    with serve(reply) as served:
        yield served


@dataclass
class Run:
    """A running stage."""

    process: "subprocess.Popen[bytes]"
    mark: str
    log: Path

    def kill(self, how: str) -> float:
        """Send a signal, to the group or to the one process, and wait until nothing is left. Returns the seconds, or -1."""
        name, _, group = how.partition(" ")
        started = time.monotonic()
        (os.killpg if group else os.kill)(self.process.pid, signal.Signals[name])
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(PATIENCE)
        return time.monotonic() - started if wait_for(lambda: not alive(self.mark), PATIENCE) else -1

    def clear(self) -> None:
        for pid in alive(self.mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


def start(folder: Path, row: Row, command: str, by_dvc: bool) -> Run:
    mark, log = uuid.uuid4().hex, folder / "log"
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "OPENAI_API_KEY": "none",
        "SPPO_WORKERS": str(row.workers),
        "MARK": mark,
    }
    if by_dvc:
        command = f"exec dvc repro --force --single-item {row.stage}"
    else:
        environment["DVC_STAGE"] = row.stage
    with log.open("wb") as file:
        process = subprocess.Popen(
            ["/bin/sh", "-c", command], cwd=folder, env=environment, stdout=file, stderr=file, start_new_session=True
        )
    return Run(process, mark, log)


def finished_work(folder: Path) -> int:
    """The number of files in scratch that a restart can use."""
    kept = re.compile(
        r"/(lock|finished|finishing|timings.jsonl)$|\.(log|lock|partial)$|/cache/|/trainer/|\.discarded/|\.partial/"
    )
    with contextlib.suppress(FileNotFoundError):  # removed as we look
        return sum(path.is_file() and not kept.search(f"/{path}") for path in (folder / "scratch").rglob("*"))
    return 0


def digests(folder: Path, outs: list[str]) -> dict[str, str]:
    """Hashes of the files in a stage's outs."""
    found = {}
    for out in outs:
        for path in [folder / out, *(folder / out).rglob("*")]:
            if path.is_file():
                found[path.relative_to(folder).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def remove(folder: Path, names: list[str]) -> None:
    for name in names:
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).unlink(missing_ok=True)


def complete(folder: Path, row: Row, command: str, by_dvc: bool = False) -> float:
    """Run to the end. Returns the seconds."""
    started = time.monotonic()
    run = start(folder, row, command, by_dvc)
    if run.process.wait():
        row.faults.append(f"a run failed: {run.log.read_text().splitlines()[-1:]}")
    return time.monotonic() - started


def torture(checkout: Path, row: Row, kills: int, seed: int) -> Row:
    """Kill a stage `kills` times in a copy of the checkout, start it again after each, and note what that changed."""
    chance = random.Random(f"{seed}/{row.stage}/{row.note}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "sppo"
        shutil.copytree(checkout, folder, symlinks=True)
        set_params(folder, SHARDS | row.overrides, folder / "params.yaml")
        with Repo(str(folder)) as repo:
            stage = repo.stage.load_one(str(folder / "dvc.yaml"), row.stage)
            outs = [out.def_path for out in stage.outs]
        others = {path for path in folder.rglob("*") if not path.is_relative_to(folder / ".dvc")}

        def afresh() -> None:
            remove(folder, [*outs, "scratch", "dvc.lock"])

        afresh()
        duration = complete(folder, row, stage.cmd)
        wanted, most = digests(folder, outs), finished_work(folder)
        assert wanted, row.faults
        afresh()
        order = HOW * (kills // len(HOW) + 1)
        chance.shuffle(order)
        while sum(row.kills.values()) < kills:
            how = order[sum(row.kills.values())]
            by_dvc = chance.random() < 0.25
            have = finished_work(folder)
            row.restarts += 1
            row.went_on += have > 0
            started = time.monotonic()
            run = start(folder, row, stage.cmd, by_dvc)
            if most > have and chance.random() < 0.75:  # at work
                target = chance.randint(have, most - 1)
                wait_for(lambda run=run, target=target: finished_work(folder) > target or run.process.poll() is not None, 600)
                pause = chance.uniform(0, 0.3)
            else:
                pause = duration * chance.uniform(0.2 if most else 0.6, 1) + 2 * by_dvc
            with contextlib.suppress(subprocess.TimeoutExpired):
                run.process.wait(pause)
            if run.process.poll() is None:
                row.kills[how.split()[0]] += 1
                seconds = run.kill(how)
                row.slowest = max(row.slowest, seconds)
                if seconds < 0:
                    row.faults.append(f"left after {how}: {list(alive(run.mark).values())}")
                run.clear()
            else:
                duration = min(duration, time.monotonic() - started)
                check(folder, row, run, outs, wanted)
                afresh()
        row.went_on += finished_work(folder) > 0
        row.restarts += 1
        run = start(folder, row, stage.cmd, by_dvc=False)
        run.process.wait()
        check(folder, row, run, outs, wanted)
        remove(folder, ["scratch", "log"])
        new = {path for path in folder.rglob("*") if not path.is_relative_to(folder / ".dvc")} - others
        row.faults += [f"left: {path.relative_to(folder)}" for path in sorted(new)]
    return row


def check(folder: Path, row: Row, run: Run, outs: list[str], wanted: dict[str, str]) -> None:
    """Note what is wrong with a run that has ended by itself."""
    row.ends += 1
    if run.process.returncode:
        row.faults.append(f"a run failed: {' '.join(run.log.read_text().splitlines()[-3:])}")
    elif digests(folder, outs) != wanted:
        row.faults.append("other bytes")
    if not wait_for(lambda: not alive(run.mark), PATIENCE):
        row.faults.append(f"left: {list(alive(run.mark).values())}")


def table(done: list[Row], kills: int, seed: int) -> str:
    """docs/torture.md."""
    lines = [
        "# Killed, and gone on",
        "",
        f"Every stage of the smallest pipeline (tests/torture.py) killed at least {kills} times, at random moments that lie in "
        "its work rather than its start, and started again: by SIGKILL, of the one process or of its group, SIGTERM and "
        "Ctrl-C; one in four under `dvc repro`, where the signal is DVC's. "
        f"Made by `make torture` (seed {seed}).",
        "",
        "| stage | SIGKILL | SIGTERM | SIGINT | finished work found | byte-identical | last process gone | orphans |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in done:
        name = row.stage.partition("@")[0] + (f", {row.note}" if row.note else "")
        bad = sum(fault.startswith(("other", "a run")) for fault in row.faults)
        left = sum(fault.startswith("left") for fault in row.faults)
        killed = " | ".join(str(row.kills[number]) for number in ("SIGKILL", "SIGTERM", "SIGINT"))
        found, same = f"{row.went_on} of {row.restarts}", f"{row.ends - bad} of {row.ends}"
        lines.append(f"| {name} | {killed} | {found} | {same} | {row.slowest:.1f} s | {left} |")
    lines += [
        "",
        "Finished work found: restarts with files in scratch to go on from; stages without any are a few seconds long, or "
        "begin again. byte-identical: of the runs that came to their end, with the outs of one that was never killed. last "
        "process gone: the longest time from the signal to the end of the stage's last process. orphans: processes or "
        "half-written files that stayed.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="of each stage (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="a part of the names of the stages to kill; docs/torture.md stays as it is")
    parser.add_argument("--checkout", type=Path, help="a checkout of this kind, run already")
    arguments = parser.parse_args()
    done = []
    with tempfile.TemporaryDirectory() as name, endpoint() as judge:
        checkout = arguments.checkout or Path(name) / "sppo"
        if not arguments.checkout:
            clone(checkout)
        for row in rows(judge.url):
            if arguments.only in row.stage:
                started = time.monotonic()
                done.append(torture(checkout, row, arguments.kills, arguments.seed))
                if row.overrides.get("evaluate_alpaca"):
                    again = len(judge.requests) - SMALLEST["assets.alpaca_eval.count"] * (row.ends + 1)
                    row.note += f", answers on their way at a kill and asked for again: {again}"
                    if again > JUDGE["workers"] * arguments.kills:
                        row.faults.append("answers that had come asked for again")
                print(f"{row.stage} {row.note}: {time.monotonic() - started:.0f} s, {row.faults or 'no fault'}", flush=True)
    text = table(done, arguments.kills, arguments.seed)
    if arguments.only:
        print(text)
    else:
        DOCUMENT.write_text(text)
    sys.exit(any(row.faults for row in done))


if __name__ == "__main__":
    main()
