"""Digests of large files: looked up only if nothing about the file has changed since it was hashed."""

import hashlib
import json
import os
from pathlib import Path

import pytest

from stages.runtime import durable, hashes

OLD = 1_600_000_000
"""A time of modification in the past, in seconds."""


@pytest.fixture(autouse=True)
def _small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 10 bytes, a file is large. Its inode's last change, which no program can set, counts as long ago."""
    monkeypatch.setattr(hashes, "FOLDER", tmp_path / "scratch/hashes")
    monkeypatch.setattr(hashes, "LARGE", 10)
    monkeypatch.setattr(hashes.time, "time_ns", lambda: 2 * 10**18)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return write(tmp_path / "weights", b"0123456789")


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    os.utime(path, (OLD, OLD))
    return path


def expect(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


def is_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Return whether the file is read: `digest_file` then returns what reading it is made to give here."""
    with monkeypatch.context() as patch:
        patch.setattr(hashes, "hash_content", lambda file: b"was read")
        patch.setattr(durable, "write", lambda path, text: None)
        return hashes.digest_file(path) == b"was read"


def test_a_large_file_is_read_once(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hashes.digest_file(weights) == expect(b"0123456789")
    assert not is_read(weights, monkeypatch)
    assert hashes.digest_file(weights) == expect(b"0123456789")
    link = weights.with_name("link")
    link.symlink_to(weights)
    assert not is_read(link, monkeypatch)


def test_a_small_file_leaves_no_entry(tmp_path: Path) -> None:
    assert hashes.digest_file(write(tmp_path / "small", b"012345678")) == expect(b"012345678")
    assert not hashes.FOLDER.exists()


def test_whatever_changes_the_file_it_is_hashed_anew(weights: Path) -> None:
    hashes.digest_file(weights)
    for content in (b"9876543210", b"98765432101", b"x" * 10):  # the same size and time, another size, the same size
        assert hashes.digest_file(write(weights, content)) == expect(content)
    other = write(weights.with_name("other"), b"y" * 10)
    other.replace(weights)
    assert hashes.digest_file(weights) == expect(b"y" * 10)


@pytest.mark.parametrize("index", range(5))
def test_every_part_of_the_state_counts(index: int, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Device, inode, size, and both times."""
    hashes.digest_file(weights)
    (entry,) = hashes.FOLDER.iterdir()
    value = json.loads(entry.read_text())
    status = weights.stat()
    assert value["state"] == [status.st_dev, status.st_ino, 10, OLD * 10**9, status.st_ctime_ns]
    value["state"][index] += 1
    entry.write_text(json.dumps(value))
    assert is_read(weights, monkeypatch)


@pytest.mark.parametrize(("age", "kept"), [(1.9, False), (2.1, True), (-5, False)])
@pytest.mark.parametrize("changed", ["content", "inode"])
def test_a_file_that_has_just_changed_is_not_remembered(
    age: float, kept: bool, changed: str, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = weights.stat()
    last = status.st_ctime_ns  # later than the content's last change
    if changed == "content":
        os.utime(weights, ns=(last + 10**12, last + 10**12))  # and now the content's is later
        last = weights.stat().st_mtime_ns
    monkeypatch.setattr(hashes.time, "time_ns", lambda: last + int(age * 1e9))
    assert hashes.digest_file(weights) == expect(b"0123456789")
    assert is_read(weights, monkeypatch) != kept


def test_a_file_that_changes_while_it_is_read_is_not_remembered(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_and_change(file: object) -> bytes:
        weights.write_bytes(b"9876543210")
        return b"a mixture"

    with monkeypatch.context() as patch:
        patch.setattr(hashes, "hash_content", read_and_change)
        assert hashes.digest_file(weights) == b"a mixture"
    assert hashes.digest_file(weights) == expect(b"9876543210")


GOOD = "0" * 32


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        "\0",
        "{}",
        json.dumps({"digest": GOOD}),
        *[json.dumps({"digest": odd, "state": []}) for odd in (1, "00", "g" * 32)],
    ],
)
def test_an_entry_that_is_cut_or_odd_is_ignored(text: str, weights: Path) -> None:
    hashes.digest_file(weights)
    (entry,) = hashes.FOLDER.iterdir()
    entry.write_text(text)
    assert hashes.digest_file(weights) == expect(b"0123456789")
    assert json.loads(entry.read_text())["digest"] == expect(b"0123456789").hex(), "and written again"


def test_a_scratch_folder_that_cannot_be_used_is_no_error(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "scratch").write_text("a file")
    assert hashes.digest_file(weights) == expect(b"0123456789")


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        hashes.digest_file(tmp_path / "missing")
