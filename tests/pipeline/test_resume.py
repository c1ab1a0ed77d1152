"""train and reference killed by SIGKILL and run again: their outputs equal those of an uninterrupted run, byte for byte."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from stages.artifacts import files
from stages.engines import checkpoints
from stages.runtime.paths import ROOT
from support.running import TINY, run_stage, set_params

TRAIN = ["train", "--model", "../base", "--pairs", "../pairs.parquet"]
TRAIN += ["--out", "iter1", "--out-log", "iter1.csv", "--out-update", "iter1.json"]
REFERENCE = ["reference", "--model", "../base", "--responses", "../responses.parquet"]
REFERENCE += ["--rankings", "../rankings.parquet", "--out", "pairs.parquet"]


def kill_stage(folder: Path, stage: list[str], moment: str) -> None:
    """Run a stage in the folder and kill it once a path that matches the pattern `moment` exists in its scratch folder."""
    command = [sys.executable, "-m", "stages", *stage]
    values = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=folder, env=values, stderr=subprocess.PIPE)
    while process.poll() is None and not list(folder.glob(f"scratch/{stage[0]}/*/{moment}")):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()  # returns when every process that writes to stderr has ended
    assert process.returncode == -signal.SIGKILL, errors


def finish_stage(folder: Path, stage: list[str]) -> str:
    """Run a stage in the folder and return its log."""
    done = run_stage(folder, *stage)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "overrides", "steps", "moment"),
    [
        ("alone", {}, 3, f"checkpoint-3/{checkpoints.MARKER}"),
        ("saving", {"train.dtype": "bfloat16"}, 2, "checkpoint-4"),  # not complete yet, and the one before it not removed
        pytest.param(
            *("two", {"train.devices": 2, "train.lora.rank": 4}, 3, f"checkpoint-3/{checkpoints.MARKER}"),
            marks=pytest.mark.slowest,
        ),
    ],
)
def test_a_killed_training_resumes_to_the_same_bytes(
    pairs: Path, name: str, overrides: dict[str, Any], steps: int, moment: str
) -> None:
    """Six steps in three epochs. Parameters that do not affect the result may change before it resumes."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    overrides = TINY | {"train.stop_epoch": 3} | overrides
    uninterrupted, killed = pairs / f"{name}-uninterrupted", pairs / f"{name}-killed"
    for folder, checkpoint_steps in ((uninterrupted, 0), (killed, steps)):
        folder.mkdir()
        set_params(folder, overrides | {"train.checkpoint_steps": checkpoint_steps})
    finish_stage(uninterrupted, TRAIN)
    kill_stage(killed, TRAIN, moment)
    assert not (killed / "iter1").exists()
    (scratch,) = killed.glob("scratch/train/*")
    start = checkpoints.newest_checkpoint(scratch)
    assert start
    set_params(killed, overrides | {"train.checkpoint_steps": 0, "train.report_to": "tensorboard"})
    assert f"resuming from {start.relative_to(killed)}\n" in finish_stage(killed, TRAIN)
    assert files.digest(killed / "iter1") == files.digest(uninterrupted / "iter1")
    for name in ("iter1.csv", "iter1.json"):
        assert (killed / name).read_bytes() == (uninterrupted / name).read_bytes()
    assert not scratch.exists()
    events = EventAccumulator(str(killed / "scratch" / "tensorboard" / "iter1"))
    events.Reload()
    first = int(start.name.removeprefix("checkpoint-")) + 1
    assert [event.step for event in events.Scalars("train/loss")] == list(range(first, 7))  # no step twice


@pytest.mark.slow
def test_a_training_whose_checkpoint_was_damaged_ends_with_the_same_bytes(pairs: Path) -> None:
    """The last checkpoint has its size, but zeros in place of the optimizer's state and the master weights."""
    uninterrupted, killed = pairs / "intact", pairs / "damaged"
    for folder, checkpoint_steps in ((uninterrupted, 0), (killed, 2)):
        folder.mkdir()
        set_params(folder, TINY | {"train.stop_epoch": 2, "train.checkpoint_steps": checkpoint_steps})
    finish_stage(uninterrupted, TRAIN)
    kill_stage(killed, TRAIN, f"checkpoint-2/{checkpoints.MARKER}")
    for file in killed.glob("scratch/train/*/checkpoint-2/*/*optim_states.pt"):
        file.write_bytes(bytes(file.stat().st_size))
    log = finish_stage(killed, TRAIN)
    assert "checkpoint-2 cannot be used" in log
    assert "resuming from" not in log
    assert files.digest(killed / "iter1") == files.digest(uninterrupted / "iter1")
    assert (killed / "iter1.csv").read_bytes() == (uninterrupted / "iter1.csv").read_bytes()


@pytest.fixture(scope="module")
def killed_reference(pairs: Path) -> Path:
    """A folder in which reference was killed once it had built the pairs."""
    folder = pairs / "pairs-killed"
    folder.mkdir()
    set_params(folder, TINY)
    kill_stage(folder, REFERENCE, "unscored.parquet")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["cut", "zeros", "a pipe"])
def test_damaged_pairs_of_a_killed_reference_are_built_again(pairs: Path, killed_reference: Path, damage: str) -> None:
    killed = pairs / f"pairs-killed-{damage}"
    shutil.copytree(killed_reference, killed)
    (path,) = killed.glob("scratch/reference/*/unscored.parquet")
    content = path.read_bytes()
    path.unlink()
    os.mkfifo(path) if damage == "a pipe" else path.write_bytes(content[:-9] if damage == "cut" else bytes(len(content)))
    assert "unscored.parquet cannot be used" in finish_stage(killed, REFERENCE)
    assert (killed / "pairs.parquet").read_bytes() == (pairs / "pairs.parquet").read_bytes()


@pytest.mark.slow
def test_a_killed_reference_resumes_to_the_same_bytes(pairs: Path) -> None:
    """Two shards, the second of four pairs."""
    uninterrupted, killed = pairs / "reference-uninterrupted", pairs / "reference-killed"
    for folder in (uninterrupted, killed):
        folder.mkdir()
        set_params(folder, TINY | {"train.device_batch": 1})
    finish_stage(uninterrupted, REFERENCE)
    kill_stage(killed, REFERENCE, "00000.parquet")
    assert not (killed / "pairs.parquet").exists()
    for shard in killed.glob("scratch/reference/*/00001.parquet"):
        shard.unlink()  # finished before the signal arrived
    assert "1 of 2 shards are already finished" in finish_stage(killed, REFERENCE)
    assert (killed / "pairs.parquet").read_bytes() == (uninterrupted / "pairs.parquet").read_bytes()
