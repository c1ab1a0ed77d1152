"""A disk that fills up or is read-only: one line, and no work is lost."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from stages.artifacts import files
from support.messages import assert_message
from support.running import SMALLEST, TINY, copy_repository, dvc, run_stage, set_params


class Disk:
    """A file system in memory of a few kilobytes."""

    def __init__(self, path: Path) -> None:
        path.mkdir()
        self.path = path
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=4k", "disk", path], capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.skip(f"mounting a file system requires root: {done.stderr.strip()}")

    def remount(self, mode: str) -> None:
        """mode: `ro` or `rw`."""
        subprocess.run(["mount", "-o", f"remount,{mode}", self.path], check=True)

    def enlarge(self, kilobytes: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", self.path], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    if os.geteuid():
        pytest.skip("mounting a file system requires root")
    mounted = Disk(tmp_path / "disk")
    yield mounted
    subprocess.run(["umount", mounted.path], check=True)


def split(folder: Path, out: str) -> "subprocess.CompletedProcess[str]":
    return run_stage(folder, "split", "--prompts", "prompts.parquet", "--instructions", "instructions.json", "--out", out)


@pytest.mark.slow
def test_an_output_on_a_full_disk_is_named_and_the_previous_one_stays(disk: Disk, tmp_path: Path) -> None:
    set_params(tmp_path, {"split.prompts_per_iteration": 100, "split.hold_out": 100, "assets.prompts.count": 500})
    assert run_stage(tmp_path, "assets-prompts", "--out", "prompts.parquet").returncode == 0
    files.write_json([{"instruction": "Why?"}], tmp_path / "instructions.json")
    disk.enlarge(12)
    (disk.path / "split").mkdir()
    (disk.path / "split" / "iter1.parquet").touch()  # as an earlier run leaves it
    done = split(tmp_path, "disk/split")
    assert done.returncode == 1
    assert_message(done.stderr, "split: error: disk/.split.partial/", "no space left on the device", "free some space")
    assert [path.name for path in disk.path.rglob("*")] == ["split", "iter1.parquet"]
    disk.enlarge(1000)
    assert split(tmp_path, "disk/split").returncode == 0
    assert split(tmp_path, "split").returncode == 0
    written = {path.name: path.read_bytes() for path in (disk.path / "split").iterdir()}
    assert written == {path.name: path.read_bytes() for path in (tmp_path / "split").iterdir()}


def test_an_output_on_a_read_only_disk_is_named_and_the_previous_one_stays(disk: Disk, tmp_path: Path) -> None:
    set_params(tmp_path, {"assets.prompts.count": 8})
    (disk.path / "prompts.parquet").write_bytes(b"older")
    disk.remount("ro")
    done = run_stage(tmp_path, "assets-prompts", "--out", "disk/prompts.parquet")
    disk.remount("rw")
    assert done.returncode == 1
    assert_message(done.stderr, "assets-prompts: error: disk/.prompts.parquet.partial", "Read-only file system", "permissions")
    assert (disk.path / "prompts.parquet").read_bytes() == b"older"


@pytest.mark.slow
def test_a_read_only_cache_loses_nothing(disk: Disk, tmp_path: Path) -> None:
    """DVC cannot store the outputs; once it can, they are the same."""
    folder = tmp_path / "sppo"
    copy_repository(folder, SMALLEST)
    dvc(folder, "cache", "dir", "--local", str(disk.path))
    disk.enlarge(1000)
    dvc(folder, "repro", "code")
    disk.remount("ro")
    with pytest.raises(AssertionError, match="Read-only file system"):
        dvc(folder, "repro", "assets-prompts")
    written = (folder / "data/prompts.parquet").read_bytes()
    disk.remount("rw")
    dvc(folder, "repro", "assets-prompts")
    assert (folder / "data/prompts.parquet").read_bytes() == written
    assert [path for path in disk.path.rglob("*") if path.is_file()], "now the cache has it"


@pytest.mark.slow
def test_a_full_disk_below_scratch_is_one_line(disk: Disk, tmp_path: Path) -> None:
    set_params(tmp_path, {})
    (disk.path / "filler").write_bytes(b"0" * 4096)
    scratch = str(disk.path / "scratch")
    done = run_stage(tmp_path, "assets-prompts", "--out", "prompts.parquet", SPPO_SCRATCH=scratch)
    assert done.returncode == 1
    assert_message(done.stderr, "assets-prompts: error: no space left on the device", "[Errno 28]", "free some space")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_shards_on_a_full_disk_are_resumed(disk: Disk, tiny: Path) -> None:
    disk.enlarge(16)
    options = ("--iteration", "iter1", "--model", "base", "--prompts", "prompts.parquet", "--out", "full.parquet")
    done = run_stage(tiny, "generate", *options, SPPO_SCRATCH=str(disk.path))
    assert done.returncode == 1
    assert_message(done.stderr, f"{disk.path}/", ".parquet: no space left on the device", "free some space", "resume")
    assert not (tiny / "full.parquet").exists()
    disk.enlarge(1000)
    done = run_stage(tiny, "generate", *options, SPPO_SCRATCH=str(disk.path))
    assert done.returncode == 0, done.stderr
    assert " of 3 shards are already finished" in done.stderr
    assert (tiny / "full.parquet").read_bytes() == (tiny / "responses.parquet").read_bytes()


@pytest.mark.slow
def test_a_policy_that_does_not_fit_on_the_disk_is_one_line(disk: Disk, pairs: Path) -> None:
    set_params(pairs, TINY)
    disk.enlarge(100)
    out = disk.path / "iter1"
    outputs = ("--out", out, "--out-log", "full.csv", "--out-update", "full.json")
    done = run_stage(pairs, "train", "--model", "base", "--pairs", "pairs.parquet", *outputs)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert_message(done.stderr, f"train: error: {out}: no space left on the device", "free some space")
    assert list(disk.path.iterdir()) == []
    assert not (pairs / "full.csv").exists()
    assert not (pairs / "full.json").exists()
