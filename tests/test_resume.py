"""train and reference killed by SIGKILL, and run again: the outs are those of a run that nothing stopped, byte for byte."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from running import TINY, run_stage, set_params

from stages import files, train
from stages.cli import ROOT

TRAIN = ["train", "../base", "../pairs.parquet", "iter1", "iter1.csv"]
REFERENCE = ["reference", "../base", "../responses.parquet", "../rankings.parquet", "pairs.parquet"]


def killed(folder: Path, stage: list[str], found: str) -> None:
    """Run a stage in the folder and kill it as soon as there is a path `found`, a pattern, below its folder in scratch."""
    command = [sys.executable, "-m", f"stages.{stage[0]}", *stage[1:]]
    values = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=folder, env=values, stderr=subprocess.PIPE)
    while process.poll() is None and not list(folder.glob(f"scratch/{stage[0]}/*/{found}")):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()  # until all processes that write there are gone
    assert process.returncode == -signal.SIGKILL, errors


def finished(folder: Path, stage: list[str]) -> str:
    """Run a stage in the folder. Returns its log."""
    done = run_stage(folder, *stage)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "overrides", "steps", "moment"),
    [
        ("alone", {}, 3, "checkpoint-3/whole"),
        ("saving", {"train.dtype": "bfloat16"}, 2, "checkpoint-4"),  # not whole yet, nor the one before it gone
        ("two", {"train.devices": 2, "train.lora.rank": 4}, 3, "checkpoint-3/whole"),
    ],
)
def test_a_killed_training_goes_on_to_the_same_bytes(
    pairs: Path, name: str, overrides: dict[str, Any], steps: int, moment: str
) -> None:
    """Six steps in three epochs. What cannot change the result may be another when it goes on."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    overrides = TINY | {"train.stop_epoch": 3} | overrides
    never, once = pairs / f"{name}-never", pairs / f"{name}-once"
    for folder, checkpoint_steps in ((never, 0), (once, steps)):
        folder.mkdir()
        set_params(folder, overrides | {"train.checkpoint_steps": checkpoint_steps})
    finished(never, TRAIN)
    killed(once, TRAIN, moment)
    assert not (once / "iter1").exists()
    (work,) = once.glob("scratch/train/*")
    start = train.newest_checkpoint(work)
    assert start
    set_params(once, overrides | {"train.checkpoint_steps": 0, "train.report_to": "tensorboard"})
    assert f"going on from {start.relative_to(once)}\n" in finished(once, TRAIN)
    assert files.digest(once / "iter1") == files.digest(never / "iter1")
    assert (once / "iter1.csv").read_bytes() == (never / "iter1.csv").read_bytes()
    assert not work.exists()
    events = EventAccumulator(str(once / "scratch" / "tensorboard" / "iter1"))
    events.Reload()
    first = int(start.name.removeprefix("checkpoint-")) + 1
    assert [event.step for event in events.Scalars("train/loss")] == list(range(first, 7))  # no step twice


@pytest.mark.slow
def test_a_killed_reference_goes_on_to_the_same_bytes(pairs: Path) -> None:
    """Two shards, the second of four pairs."""
    never, once = pairs / "reference-never", pairs / "reference-once"
    for folder in (never, once):
        folder.mkdir()
        set_params(folder, TINY | {"train.device_batch": 1})
    finished(never, REFERENCE)
    killed(once, REFERENCE, "00000.parquet")
    assert not (once / "pairs.parquet").exists()
    for shard in once.glob("scratch/reference/*/00001.parquet"):
        shard.unlink()  # made in the same moment
    assert "1 of 2 shards are finished already" in finished(once, REFERENCE)
    assert (once / "pairs.parquet").read_bytes() == (never / "pairs.parquet").read_bytes()


def test_only_a_whole_checkpoint_is_gone_on_from(tmp_path: Path) -> None:
    assert train.newest_checkpoint(tmp_path) is None
    for step in (9, 10, 11, 12, 13):
        path = tmp_path / f"checkpoint-{step}"
        for name in ("latest", "global_step/part.pt"):
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(b"1234")
        (path / train.WHOLE).write_text(train.listing(path))
    assert train.newest_checkpoint(tmp_path) == tmp_path / "checkpoint-13"
    (tmp_path / "checkpoint-13" / train.WHOLE).write_text("")  # killed between its making and its writing
    assert train.newest_checkpoint(tmp_path) == tmp_path / "checkpoint-12"
    (tmp_path / "checkpoint-12" / "latest").unlink()
    (tmp_path / "checkpoint-11" / "global_step" / "part.pt").write_bytes(b"123")
    assert train.newest_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    (tmp_path / "checkpoint-10" / train.WHOLE).unlink()
    assert train.newest_checkpoint(tmp_path) == tmp_path / "checkpoint-9"
