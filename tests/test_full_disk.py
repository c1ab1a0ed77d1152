"""A disk that fills up: one line, and no work lost."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from running import SMALLEST, TINY, copy_repository, dvc, run_stage, set_params

from stages import files


class Disk:
    """A file system in memory, of so many kilobytes."""

    def __init__(self, path: Path) -> None:
        path.mkdir()
        self.path = path
        made = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=4k", "disk", path], capture_output=True, text=True, check=False
        )
        if made.returncode:
            pytest.skip(f"mounting a file system needs root: {made.stderr.strip()}")

    def mount(self, mode: str) -> None:
        """Mode: `ro` or `rw`."""
        subprocess.run(["mount", "-o", f"remount,{mode}", self.path], check=True)

    def enlarge(self, kilobytes: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", self.path], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    if os.geteuid():
        pytest.skip("mounting a file system needs root")
    made = Disk(tmp_path / "disk")
    yield made
    subprocess.run(["umount", made.path], check=True)


def test_an_out_on_a_full_disk_is_one_line_and_the_older_one_stays(disk: Disk, tmp_path: Path) -> None:
    set_params(tmp_path, {"split.prompts_per_iteration": 100, "split.hold_out": 100, "assets.prompts.count": 500})
    assert run_stage(tmp_path, "assets.prompts", "prompts.parquet").returncode == 0
    files.write_json([{"instruction": "Why?"}], tmp_path / "instructions.json")
    disk.enlarge(12)
    (disk.path / "split").mkdir()
    (disk.path / "split" / "older").touch()
    done = run_stage(tmp_path, "split", "prompts.parquet", "instructions.json", "disk/split")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("split: error: disk/.split.partial/")
    assert done.stderr.endswith(": no space left on the device: free some, then run again to go on\n")
    assert [path.name for path in disk.path.rglob("*")] == ["split", "older"]
    disk.enlarge(1000)
    assert run_stage(tmp_path, "split", "prompts.parquet", "instructions.json", "disk/split").returncode == 0
    assert run_stage(tmp_path, "split", "prompts.parquet", "instructions.json", "split").returncode == 0
    written = {path.name: path.read_bytes() for path in (disk.path / "split").iterdir()}
    assert written == {path.name: path.read_bytes() for path in (tmp_path / "split").iterdir()}


def test_an_out_on_a_read_only_disk_is_one_line_and_the_older_one_stays(disk: Disk, tmp_path: Path) -> None:
    set_params(tmp_path, {"assets.prompts.count": 8})
    (disk.path / "prompts.parquet").write_bytes(b"older")
    disk.mount("ro")
    done = run_stage(tmp_path, "assets.prompts", "disk/prompts.parquet")
    disk.mount("rw")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "prompts: error: disk/.prompts.parquet.partial: Read-only file system: see to its rights, or to how its disk is "
        "mounted, then run again"
    )
    assert (disk.path / "prompts.parquet").read_bytes() == b"older"


@pytest.mark.slow
def test_a_read_only_cache_loses_nothing(disk: Disk, tmp_path: Path) -> None:
    """DVC cannot take the outs over; when it can, they are the same ones."""
    folder = tmp_path / "sppo"
    copy_repository(folder, SMALLEST)
    dvc(folder, "cache", "dir", "--local", str(disk.path))
    disk.enlarge(1000)
    disk.mount("ro")
    with pytest.raises(AssertionError, match="Read-only file system"):
        dvc(folder, "repro", "assets-prompts")
    made = (folder / "data/prompts.parquet").read_bytes()
    disk.mount("rw")
    dvc(folder, "repro", "assets-prompts")
    assert (folder / "data/prompts.parquet").read_bytes() == made
    assert [path for path in disk.path.rglob("*") if path.is_file()], "the cache holds it now"


def test_scratch_on_a_full_disk_is_one_line(disk: Disk, tmp_path: Path) -> None:
    """Wherever it is that the space is wanted."""
    set_params(tmp_path, {})
    (disk.path / "filling").write_bytes(b"0" * 4096)
    done = run_stage(tmp_path, "assets.prompts", "prompts.parquet", SPPO_SCRATCH=str(disk.path / "scratch"))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("prompts: error: no space left on the device ([Errno 28]")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_shards_on_a_full_disk_are_gone_on_from(disk: Disk, tiny: Path) -> None:
    disk.enlarge(16)
    command = ["generate", "iter1", "base", "part.parquet", "full.parquet"]
    done = run_stage(tiny, *command, SPPO_SCRATCH=str(disk.path))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith(".parquet: no space left on the device: free some, then run again to go on")
    assert not (tiny / "full.parquet").exists()
    disk.enlarge(1000)
    done = run_stage(tiny, *command, SPPO_SCRATCH=str(disk.path))
    assert done.returncode == 0, done.stderr
    assert " of 3 shards are finished already" in done.stderr
    assert (tiny / "full.parquet").read_bytes() == (tiny / "responses.parquet").read_bytes()


@pytest.mark.slow
def test_a_policy_that_does_not_fit_is_one_line(disk: Disk, pairs: Path) -> None:
    set_params(pairs, TINY)
    disk.enlarge(100)
    done = run_stage(pairs, "train", "base", "pairs.parquet", disk.path / "iter1", "full.csv")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == (
        f"train: error: {disk.path}/iter1: no space left on the device: free some, then run again to go on"
    )
    assert list(disk.path.iterdir()) == []
    assert not (pairs / "full.csv").exists()
