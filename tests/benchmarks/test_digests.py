"""The second hash reads nothing; the baseline reads every byte."""

import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import digests
from stages.runtime import hashes


def test_ours_reads_each_file_once_in_all_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    original = hashes.hash_content

    def spy(file: Any) -> bytes:
        read.append(Path(file.name).name)
        return original(file)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hashes, "hash_content", spy)
    monkeypatch.setattr(hashes, "LARGE", 1)
    monkeypatch.setattr(hashes, "SETTLED", 0.05)
    monkeypatch.setattr(time, "sleep", lambda _, sleep=time.sleep: sleep(0.1))
    row = digests.compare(tmp_path / "model", 2**20)
    assert sorted(read) == [f"model-{index}.safetensors" for index in range(4)]
    assert row.size == "0.0039 GiB"


def test_the_baseline_depends_on_every_file(tmp_path: Path) -> None:
    digests.write_model(tmp_path / "model", 100)
    seen = {digests.hash_bytes(tmp_path / "model")}
    for path in (tmp_path / "model").iterdir():
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        seen.add(digests.hash_bytes(tmp_path / "model"))
    assert len(seen) == 1 + 4
