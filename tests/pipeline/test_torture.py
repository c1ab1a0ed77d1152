"""What `make torture` does to a stage, tried on a small one, and that it notices what it is there to notice."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from stages.runtime.paths import ROOT
from support import fuzz, torture
from support.running import wait_for

STAGE = """
import argparse, os, time
from pathlib import Path
from stages.artifacts import files
from stages.runtime import durable, run, scratch

def main(args):
    start = files.read_json(Path("data/input.json"))["start"]
    folder = scratch.folder("train", {"start": start})
    for step in range(4):
        path = folder / f"{step}.json"
        if BOOKS(path) is None:
            time.sleep(0.1)
            durable.write(path, str(start + step))
    files.write_json([int((folder / f"{step}.json").read_text()) for step in range(4)], args.out)

run.prepare_process()
run.run_stage("train", main, argparse.Namespace(out=Path("out.json")), None)
"""
GOOD, BAD = "durable.read_json(path, [10, 11, 12, 13].index)", "path.exists() or None"
"""Of what a step left, the first accepts the four numbers and not their first digit, which a power cut may leave."""


class Chance(random.Random):
    """Never chooses `dvc repro`, which one run in four is: the bench is no repository of DVC's."""

    def random(self) -> float:
        return 0.25 + 0.75 * super().random()


def make_bench(folder: Path, books: str) -> torture.Bench:
    """Return a bench with a stage of four steps. books: how it finds out whether a step is finished."""
    (folder / "data").mkdir()
    (folder / "data/input.json").write_text('{"start": 10}', encoding="utf-8")
    (folder / "stage.py").write_text(STAGE.replace("BOOKS(path)", f"({books})"), encoding="utf-8")
    command = f"exec env PYTHONPATH={ROOT} {sys.executable} stage.py"
    bench = torture.Bench(folder, command, ["data/input.json"], ["out.json"], torture.Row("train"), Chance(0))
    bench.run_uninterrupted()
    return bench


def test_every_stage_of_the_pipeline_is_killed() -> None:
    document = YAML(typ="safe").load(ROOT / "dvc.yaml")
    modules = {}
    for name, stage in document["stages"].items():
        modules[name] = stage.get("do", stage)["cmd"].split(" -m stages ")[-1].split()[0]
    rows = torture.list_rows("http://127.0.0.1")
    assert {modules[row.stage.partition("@")[0]] for row in rows} == set(modules.values())


@pytest.mark.slow
def test_a_stage_that_survives_has_no_faults(tmp_path: Path) -> None:
    bench = make_bench(tmp_path, GOOD)
    for how in torture.HOW:
        bench.kill_once(how)
    bench.complete_and_check()
    bench.start_over()
    for _ in range(6):
        bench.cut_power_once()
    assert not bench.row.faults
    assert bench.row.cuts.total() == 6
    assert bench.expected.keys() == {"out.json"}


@pytest.mark.slow
def test_a_stage_that_has_no_file_yet_to_lose_is_restarted(tmp_path: Path) -> None:
    """`code` reads nothing below data/, and may be killed before it has written anything to scratch/."""
    bench = make_bench(tmp_path, GOOD)
    bench.deps, bench.most_work, bench.duration = [], 0, 0
    bench.cut_power_once()
    assert not bench.row.faults
    assert not bench.row.cuts


@pytest.mark.slow
def test_a_stage_that_trusts_what_a_power_cut_left_is_noticed(tmp_path: Path) -> None:
    bench = make_bench(tmp_path, BAD)
    for _ in range(12):
        bench.cut_power_once()
        if bench.row.faults:
            break
    assert any(fault.startswith(("different", "a run")) for fault in bench.row.faults)


def test_a_worker_is_told_from_its_stage(tmp_path: Path) -> None:
    program = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(300)'])"
    environment = os.environ | {"MARK": "mark-of-this-test"}
    with subprocess.Popen([sys.executable, "-c", program], env=environment, start_new_session=True) as process:
        assert wait_for(lambda: bool(torture.list_workers("mark-of-this-test", process.pid)), 30)
        workers = torture.list_workers("mark-of-this-test", process.pid)
        os.killpg(process.pid, signal.SIGKILL)
    assert len(workers) == 1
    assert process.pid not in workers


@pytest.mark.parametrize(
    ("log", "faults"),
    [
        ("train: error: data/x: not valid JSON", 0),
        ("a warning\ntrain: error: x\nERROR: failed to reproduce 'train'", 0),
        ("Traceback (most recent call last):\nKeyError: 'x'", 1),
        ("Traceback (most recent call last):\ntrain: error: x", 1),
        ("", 1),
    ],
)
def test_a_refusal_without_its_line_is_a_fault(log: str, faults: int, tmp_path: Path) -> None:
    (tmp_path / "log").write_text(log, encoding="utf-8")
    run = torture.Run(None, "mark", tmp_path / "log")  # type: ignore[arg-type]
    assert len(torture.find_message_faults(run)) == faults


def test_the_document_has_every_row_and_the_power_cuts() -> None:
    row = torture.Row("train@iter1", "two processes", restarts=3, resumed=2, ends=1, slowest=1.25)
    row.kills.update(SIGKILL=2, SIGINT=1)
    row.cuts.update(continued=7, refused=3)
    text = torture.format_document([row, torture.Row("split")], 20, 10, 0)
    assert "| train, two processes | 2 | 0 | 1 | 2 of 3 | 1 of 1 | 1.2 s | 0 | 7 + 3 |" in text
    assert "| split | 0 | 0 | 0 | 0 of 0 | 0 of 0 | 0.0 s | 0 | – |" in text


def test_odd_input_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []

    def run(command: list[str], *, env: dict[str, str], **_: object) -> "subprocess.CompletedProcess[str]":
        seeds.append(int(next(word for word in command if "seed" in word).partition("=")[2]))
        with Path(env[fuzz.COUNTS]).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"read": 10, "rejected": 4}) + "\n")
        return subprocess.CompletedProcess(command, 1, "FAILED tests/x.py::test_y - KeyError\n1 failed", "")

    times = iter([0.0, 30.0, 61.0])
    monkeypatch.setattr(fuzz.subprocess, "run", run)
    monkeypatch.setattr(fuzz.time, "monotonic", lambda: next(times))
    figures = fuzz.fuzz(1, seed=7)
    assert (seeds, figures.read, figures.rejected) == ([7, 8], 20, 8)
    assert figures.failures == [f"FAILED tests/x.py::test_y - KeyError (seed {seed})" for seed in (7, 8)]
    assert "20 inputs" in fuzz.format_figures(figures)
    assert "Tracebacks and invalid results: 2" in fuzz.format_figures(figures)


def test_only_a_lock_file_of_dvc_that_is_cut_is_removed(tmp_path: Path) -> None:
    lock = tmp_path / ".dvc/tmp/rwlock"
    lock.parent.mkdir(parents=True)
    assert not torture.remove_cut_lock(tmp_path)
    for text, cut in (("", True), ('{"read": {', True), ('{"read": {}}', False)):
        lock.write_text(text)
        assert torture.remove_cut_lock(tmp_path) == cut
        assert lock.exists() != cut
