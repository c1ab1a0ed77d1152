"""Kill every stage repeatedly at random moments, and compare its final outputs with those of an uninterrupted run.

`make torture` writes docs/torture.md. Most runs are the stage's command as DVC runs it, one in four is `dvc repro`. Then the
power is cut: the stage is killed, one file of its inputs or of its unfinished work is emptied or shortened, and the stage is
restarted. In the end, odd input is tried (support/fuzz.py).
"""

import argparse
import contextlib
import hashlib
import json
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

from stages.runtime.paths import ROOT
from support import fuzz
from support.checkout import restore, run_and_commit
from support.endpoint import chosen, serve
from support.running import SMALLEST, list_processes, set_params, wait_for

DOCUMENT = ROOT / "docs/torture.md"
PATIENCE = 20
"""Seconds within which all processes of a killed stage must be gone."""
SHARDS = {"generate.shard_size": 4, "answer.shard_size": 8, "rank.shard_size": 2, "train.checkpoint_steps": 1}
"""Overrides that leave something to resume from."""
JUDGE = {"judge": "judge", "workers": 2}
HOW = ["SIGKILL", "SIGTERM", "SIGINT group", "SIGKILL group", "SIGKILL worker"]
"""Sent to the one process, to its group, as a terminal does, or to one of its workers, as the out-of-memory killer may."""
MD5 = re.compile(rb"\b[0-9a-f]{32}\b")
"""In a report: the hash of something that it was made from."""
LONGEST = 600
"""Seconds that a run may take, also after the end of one of its workers."""


@dataclass
class Row:
    """A stage, its settings, and the results."""

    stage: str
    note: str = ""
    overrides: dict[str, Any] = field(default_factory=dict)
    workers: int = 2
    tool: str = ""
    """The command of DVC that all runs use; "": the stage's own command, and one run in four is `dvc repro`."""
    kills: Counter[str] = field(default_factory=Counter)
    restarts: int = 0
    resumed: int = 0
    """Restarts that found finished work in scratch."""
    ends: int = 0
    """Runs that ended by themselves, compared with the uninterrupted one."""
    slowest: float = 0
    """Seconds from a kill to the end of the last process."""
    locks: int = 0
    """Times that DVC, killed while it wrote its lock file, left half of it."""
    cuts: Counter[str] = field(default_factory=Counter)
    """Restarts after a power cut: those that `continued`, and those that were `refused` in one line and then continued."""
    faults: list[str] = field(default_factory=list)


def list_rows(url: str) -> list[Row]:
    """Return at least one row for every stage of the root's dvc.yaml. url: the endpoint of a judge."""
    judge = {"evaluate_alpaca": JUDGE | {"base_url": url}}
    return [
        Row("code"),
        Row("assets-local"),
        Row("assets-policy"),
        Row("assets-ranker"),
        Row("assets-prompts"),
        Row("assets-alpaca-eval"),
        Row("assets-harness"),
        Row("split"),
        Row("generate@iter1", "two workers"),
        Row("generate@iter1", "two workers, in dvc exp run", tool="exp run"),
        Row("rank@iter1", "two workers"),
        Row("reference@iter1", overrides={"train.device_batch": 1}),
        Row("train@iter1"),
        Row("train@iter1", "two processes under torchrun", {"train.devices": 2}),
        Row("train@iter1", "in dvc exp run", tool="exp run"),
        Row("answer-reference"),
        Row("answer@iter1", "one worker", workers=1),
        Row("evaluate-alpaca@iter1", "gold judge"),
        Row("evaluate-alpaca@iter1", "model at an endpoint", judge),
        Row("evaluate-lm@iter1", "two workers"),
        Row("compare", "two workers"),
        Row("report"),
    ]


@contextlib.contextmanager
def serve_judge() -> Iterator[Any]:
    """Serve a judge that takes a tenth of a second per answer, which depends on the question only."""

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
        """Send a signal as in HOW, and wait until no process is left. Returns the seconds, or -1."""
        name, _, target = how.partition(" ")
        workers = list_workers(self.mark, self.process.pid) if target == "worker" else []
        started = time.monotonic()
        with contextlib.suppress(ProcessLookupError):
            if target == "group":
                os.killpg(self.process.pid, signal.Signals[name])
            else:
                os.kill(random.choice(workers) if workers else self.process.pid, signal.Signals[name])
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(LONGEST if workers else PATIENCE)  # the stage's other workers may complete what they do
        started = time.monotonic() if workers else started
        return time.monotonic() - started if wait_for(lambda: not list_processes(self.mark), PATIENCE) else -1

    def clear(self) -> None:
        for pid in list_processes(self.mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


def list_workers(mark: str, pid: int) -> list[int]:
    """Return the processes that a stage has started. pid: the stage's process or, if DVC started it, DVC's."""
    commands, parents = list_processes(mark), {}
    for other, command in commands.items():
        with contextlib.suppress(OSError):  # it has ended meanwhile
            status = Path(f"/proc/{other}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
            if "resource_tracker" not in command:
                parents[other] = int(status[1])
    by_dvc = "/dvc " in commands.get(pid, "")
    stages = [child for child, parent in parents.items() if parent == pid] if by_dvc else [pid]
    return [other for other in parents if other not in (pid, *stages)]


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
        command = f"exec dvc {row.tool or 'repro'} --force --single-item {row.stage}"
    else:
        environment["DVC_STAGE"] = row.stage
    with log.open("wb") as file:
        process = subprocess.Popen(
            ["/bin/sh", "-c", command], cwd=folder, env=environment, stdout=file, stderr=file, start_new_session=True
        )
    return Run(process, mark, log)


def count_finished_work(folder: Path) -> int:
    """Return the number of files in scratch that a restart can use."""
    kept = re.compile(
        r"/(lock|finished|finishing|timings.jsonl)$|\.(log|lock|partial)$|/cache/|/trainer/|\.discarded/|\.partial/"
    )
    with contextlib.suppress(FileNotFoundError):  # a file may be removed meanwhile
        return sum(path.is_file() and not kept.search(f"/{path}") for path in (folder / "scratch").rglob("*"))
    return 0


def hash_outs(folder: Path, outs: list[str], *, without_md5s: bool = False) -> dict[str, str]:
    """Return the hashes of the files in a stage's outs. without_md5s: of their contents except MD5s.

    Reports state the MD5s of what was read: they follow an input that was cut, even if what was cut means nothing to them.
    """
    found = {}
    for out in outs:
        for path in [folder / out, *(folder / out).rglob("*")]:
            if path.is_file():
                content = MD5.sub(b"", path.read_bytes()) if without_md5s else path.read_bytes()
                found[path.relative_to(folder).as_posix()] = hashlib.sha256(content).hexdigest()
    return found


def remove(folder: Path, names: list[str]) -> None:
    for name in names:
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).unlink(missing_ok=True)


def complete(folder: Path, row: Row, command: str, by_dvc: bool = False) -> float:
    """Run the command to its end. Returns the seconds."""
    started = time.monotonic()
    run = start(folder, row, command, by_dvc)
    if run.process.wait():
        row.faults.append(f"a run failed: {run.log.read_text().splitlines()[-1:]}")
    return time.monotonic() - started


def remove_cut_lock(folder: Path) -> bool:
    """Remove DVC's lock file if it is not whole, as docs/troubleshooting.md says. Returns whether it was not."""
    lock = folder / ".dvc/tmp/rwlock"
    try:
        json.loads(lock.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    except ValueError:
        lock.unlink()
        return True
    return False


@dataclass
class Bench:
    """A copy of the checkout in which one stage is killed repeatedly."""

    folder: Path
    command: str
    deps: list[str]
    outs: list[str]
    row: Row
    chance: random.Random
    duration: float = 0
    """Seconds of an uninterrupted run."""
    most_work: int = 0
    """Files of finished work that an uninterrupted run leaves."""
    expected: dict[str, str] = field(default_factory=dict)
    """Hashes of the outs of an uninterrupted run."""
    expected_without_md5s: dict[str, str] = field(default_factory=dict)
    """The same, of their contents except MD5s."""

    def start_over(self) -> None:
        if self.row.tool:  # it may have been killed while it had the commit's own files in the workspace
            restore(self.folder)
        else:
            remove(self.folder, ["dvc.lock"])
        remove(self.folder, [*self.outs, "scratch"])

    def run_uninterrupted(self) -> None:
        self.start_over()
        self.duration = complete(self.folder, self.row, self.command)
        self.expected, self.most_work = hash_outs(self.folder, self.outs), count_finished_work(self.folder)
        self.expected_without_md5s = hash_outs(self.folder, self.outs, without_md5s=True)
        assert self.expected, self.row.faults
        self.start_over()

    def wait_for_moment(self, run: Run, before: int, by_dvc: bool) -> None:
        """Wait until a random moment of the stage's work, or the end of the run."""
        if self.most_work > before and self.chance.random() < 0.75:
            target = self.chance.randint(before, self.most_work - 1)
            wait_for(lambda: count_finished_work(self.folder) > target or run.process.poll() is not None, 600)
            pause = self.chance.uniform(0, 0.3)
        else:
            pause = self.duration * self.chance.uniform(0.2 if self.most_work else 0.6, 1) + 2 * by_dvc
        with contextlib.suppress(subprocess.TimeoutExpired):
            run.process.wait(pause)

    def kill_once(self, how: str) -> None:
        """Restart the stage and kill it; if it completes first, check its outs."""
        by_dvc = bool(self.row.tool) or self.chance.random() < 0.25
        before = count_finished_work(self.folder)
        self.row.restarts += 1
        self.row.resumed += before > 0
        started = time.monotonic()
        run = start(self.folder, self.row, self.command, by_dvc)
        self.wait_for_moment(run, before, by_dvc)
        if run.process.poll() is None:
            self.row.kills[how.split()[0]] += 1
            seconds = run.kill(how)
            self.row.slowest = max(self.row.slowest, seconds)
            if seconds < 0:
                self.row.faults.append(f"left after {how}: {list(list_processes(run.mark).values())}")
            if how.endswith("worker") and run.process.poll() not in (0, None, -signal.SIGKILL):
                self.row.faults += find_message_faults(run)
            run.clear()
            self.row.locks += remove_cut_lock(self.folder)
        else:
            self.duration = min(self.duration, time.monotonic() - started)
            check(self.folder, self.row, run, self.outs, self.expected)
            self.start_over()

    def list_files(self) -> list[Path]:
        """Return the files that a power cut may damage: the stage's inputs and its unfinished work."""
        places = [self.folder / "scratch", *(self.folder / dep for dep in self.deps)]
        paths = [path for place in places for path in (place, *place.rglob("*"))]
        return sorted(path for path in paths if path.is_file() and path.suffix not in (".log", ".lock"))

    def cut_power_once(self) -> None:
        """Kill the stage with one file emptied or shortened, restart it, and do what its message says, if it refuses."""
        run = start(self.folder, self.row, self.command, by_dvc=False)
        self.wait_for_moment(run, 0, by_dvc=False)
        run.clear()
        if not (files := self.list_files()):  # the stage reads nothing below data/, and has written nothing yet
            self.start_over()
            return
        path = self.chance.choice(files)
        whole = path.read_bytes()
        path.unlink()  # it may be a link to DVC's cache
        path.write_bytes(whole[: self.chance.choice([0, self.chance.randint(0, max(0, len(whole) - 1))])])
        run = start(self.folder, self.row, self.command, by_dvc=False)
        outcome = "refused" if run.process.wait() else "continued"
        self.row.cuts[outcome] += 1
        if outcome == "refused":
            self.row.faults += find_message_faults(run)
            path.unlink(missing_ok=True)
            if not path.is_relative_to(self.folder / "scratch"):
                path.write_bytes(whole)  # as `dvc checkout` does
            run = start(self.folder, self.row, self.command, by_dvc=False)
            run.process.wait()
            check(self.folder, self.row, run, self.outs, self.expected)
        else:
            check(self.folder, self.row, run, self.outs, self.expected_without_md5s, without_md5s=True)
        if path.exists() and not path.is_relative_to(self.folder / "scratch"):
            path.unlink()
            path.write_bytes(whole)
        self.start_over()

    def complete_and_check(self) -> None:
        """Let the stage complete after the last kill, and check its outs."""
        self.row.resumed += count_finished_work(self.folder) > 0
        self.row.restarts += 1
        run = start(self.folder, self.row, self.command, by_dvc=False)
        run.process.wait()
        check(self.folder, self.row, run, self.outs, self.expected)


def list_all(folder: Path) -> set[Path]:
    """Return the paths of a checkout, except for what Git and DVC keep for themselves."""
    own = (folder / ".dvc", folder / ".git")
    return {path for path in folder.rglob("*") if not any(path.is_relative_to(other) for other in own)}


def torture(checkout: Path, row: Row, kills: int, seed: int, cuts: int = 0) -> Row:
    """Kill a stage `kills` times in a copy of the checkout, restart it after each, cut the power, and record the results."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "sppo"
        shutil.copytree(checkout, folder, symlinks=True)
        set_params(folder, SHARDS | row.overrides, folder / "params.yaml")
        if row.tool:
            subprocess.run(["git", "commit", "-qam", "parameters"], cwd=folder, check=True)
        with Repo(str(folder)) as repo:
            stage = repo.stage.load_one(str(folder / "dvc.yaml"), row.stage)
            outs = [out.def_path for out in stage.outs]
            deps = [dep.def_path for dep in stage.deps if dep.def_path.startswith("data/")]
        bench = Bench(folder, stage.cmd, deps, outs, row, random.Random(f"{seed}/{row.stage}/{row.note}"))
        others = list_all(folder)
        bench.run_uninterrupted()
        order = HOW * (kills // len(HOW) + 1)
        bench.chance.shuffle(order)
        while row.kills.total() < kills:
            bench.kill_once(order[row.kills.total()])
        bench.complete_and_check()
        bench.start_over()
        for _ in range(0 if row.tool else cuts):
            bench.cut_power_once()
        remove(folder, ["scratch", "log"])
        new = list_all(folder) - others
        row.faults += [f"left: {path.relative_to(folder)}" for path in sorted(new)]
    return row


def find_message_faults(run: Run) -> list[str]:
    """Return what is wrong with how a stage has refused to go on: there must be one line with the reason, and no traceback."""
    text = run.log.read_text(encoding="utf-8")
    own = [line for line in text.splitlines() if ": error: " in line]
    if len(own) != 1 or ("Traceback" in text and "torch/distributed" not in text):
        return [f"a run failed without one line that says why: {' '.join(text.splitlines()[-3:])}"]
    return []


def check(folder: Path, row: Row, run: Run, outs: list[str], expected: dict[str, str], *, without_md5s: bool = False) -> None:
    """Record what is wrong with a run that has ended by itself. expected: of an uninterrupted run, from `hash_outs`."""
    row.ends += 1
    if run.process.returncode:
        row.faults.append(f"a run failed: {' '.join(run.log.read_text().splitlines()[-3:])}")
    elif differ := {name for name, _ in expected.items() ^ hash_outs(folder, outs, without_md5s=without_md5s).items()}:
        row.faults.append(f"different bytes: {', '.join(sorted(differ))}")
    if not wait_for(lambda: not list_processes(run.mark), PATIENCE):
        row.faults.append(f"left: {list(list_processes(run.mark).values())}")


def format_document(done: list[Row], kills: int, cuts: int, seed: int) -> str:
    """Format docs/torture.md, except for the last paragraph."""
    lines = [
        "# Kill-and-resume stress test",
        "",
        f"Every stage of the smallest pipeline was killed at least {kills} times, at random moments after start-up, and "
        "restarted each time. The signals were SIGKILL (to the process, its group or one of its workers), SIGTERM, and "
        "SIGINT (Ctrl-C). One run in four was a `dvc repro`, with the signal sent to DVC; some stages were run by `dvc exp "
        f"run` only. After that, the power was cut at least {cuts} times: the stage was killed, and one file of its inputs or "
        "of scratch/ emptied or shortened. Generated by tests/support/torture.py with "
        f"`--kills {kills} --cuts {cuts} --seed {seed}`.",
        "",
        "| stage | SIGKILL | SIGTERM | SIGINT | resumed | byte-identical | time to stop | left behind | power cuts |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in done:
        name = row.stage.partition("@")[0] + (f", {row.note}" if row.note else "")
        bad = sum(fault.startswith(("different", "a run")) for fault in row.faults)
        left = sum(fault.startswith("left") for fault in row.faults)
        killed = " | ".join(str(row.kills[number]) for number in ("SIGKILL", "SIGTERM", "SIGINT"))
        resumed, same = f"{row.resumed} of {row.restarts}", f"{row.ends - bad} of {row.ends}"
        cut = f"{row.cuts['continued']} + {row.cuts['refused']}" if row.cuts else "–"
        lines.append(f"| {name} | {killed} | {resumed} | {same} | {row.slowest:.1f} s | {left} | {cut} |")
    if locks := sum(row.locks for row in done):
        lines += [
            "",
            f"DVC, killed while it wrote .dvc/tmp/rwlock, left half of it {locks} times: it was removed, as "
            "[troubleshooting.md](troubleshooting.md) says.",
        ]
    lines += [
        "",
        "Resumed: restarts that found finished work in scratch/; stages that keep no such work take only seconds or start"
        " over. Byte-identical: completed runs whose outputs equal those of an uninterrupted run. Time to stop: the "
        "longest time from a signal to the end of the last process. Left behind: processes or half-written files that "
        "remained. Power cuts: restarts that continued, plus those that were refused in one line and continued once the file "
        "was restored or, below scratch/, removed.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="kills per stage (%(default)s)")
    parser.add_argument("--cuts", type=int, default=10, help="power cuts per stage (%(default)s)")
    parser.add_argument("--fuzz", type=float, default=30, help="minutes of odd input in the end (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="part of the names of the stages to kill; leaves docs/torture.md unchanged")
    parser.add_argument("--checkout", type=Path, help="a checkout with the smallest parameters that has been run")
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's background job ignores it, and so would the stages
    done = []
    with tempfile.TemporaryDirectory() as name, serve_judge() as judge:
        checkout = arguments.checkout or Path(name) / "sppo"
        if not arguments.checkout:
            run_and_commit(checkout)
        for row in list_rows(judge.url):
            if arguments.only in row.stage:
                started = time.monotonic()
                done.append(torture(checkout, row, arguments.kills, arguments.seed, arguments.cuts))
                if row.overrides.get("evaluate_alpaca"):
                    again = len(judge.requests) - SMALLEST["assets.alpaca_eval.count"] * (row.ends + 1)
                    row.note += f", in-flight requests repeated after a kill: {again}"
                    if again > JUDGE["workers"] * (arguments.kills + arguments.cuts):
                        row.faults.append("answers that had arrived were requested again")
                print(f"{row.stage} {row.note}: {time.monotonic() - started:.0f} s, {row.faults or 'no fault'}", flush=True)
    text = format_document(done, arguments.kills, arguments.cuts, arguments.seed)
    if arguments.only:
        print(text)
        sys.exit(any(row.faults for row in done))
    figures = fuzz.fuzz(arguments.fuzz, arguments.seed)
    print(fuzz.format_figures(figures))
    DOCUMENT.write_text(f"{text}\n## Odd input\n\n{fuzz.format_figures(figures)}\n", encoding="utf-8")
    sys.exit(bool(figures.failures) or any(row.faults for row in done))


if __name__ == "__main__":
    main()
