from pathlib import Path

import pytest

from stages.engines import checkpoints


def make_checkpoint(folder: Path, step: int) -> Path:
    path = checkpoints.checkpoint_path(folder, step)
    for name in ("latest", "global_step/shard.pt"):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(b"1234")
    (path / checkpoints.MARKER).write_text(checkpoints.list_files(path))
    return path


def test_only_a_complete_checkpoint_is_resumed_from(tmp_path: Path) -> None:
    assert checkpoints.newest_checkpoint(tmp_path) is None
    for step in (9, 10, 11, 12, 13):
        make_checkpoint(tmp_path, step)
    assert checkpoints.newest_checkpoint(tmp_path) == tmp_path / "checkpoint-13"
    (tmp_path / "checkpoint-13" / checkpoints.MARKER).write_text("")  # killed after creating it, before writing to it
    assert checkpoints.newest_checkpoint(tmp_path) == tmp_path / "checkpoint-12"
    (tmp_path / "checkpoint-12" / "latest").unlink()
    (tmp_path / "checkpoint-11" / "global_step" / "shard.pt").write_bytes(b"123")
    assert checkpoints.newest_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    (tmp_path / "checkpoint-10" / checkpoints.MARKER).unlink()
    assert checkpoints.newest_checkpoint(tmp_path) == tmp_path / "checkpoint-9"


def test_a_complete_checkpoint_replaces_the_older_ones(tmp_path: Path) -> None:
    for step in (3, 6):
        path = make_checkpoint(tmp_path, step)
    (path / checkpoints.MARKER).unlink()
    (tmp_path / "other").touch()
    checkpoints.mark_complete(path)
    assert checkpoints.newest_checkpoint(tmp_path) == path
    assert {entry.name for entry in tmp_path.iterdir()} == {"checkpoint-6", "other"}


@pytest.mark.parametrize("name", ["checkpoint-x", "checkpoint-", "checkpoint-1-2", "checkpoint--3", "checkpoint-99.unreadable"])
def test_folders_with_other_names_are_not_resumed_from(tmp_path: Path, name: str) -> None:
    make_checkpoint(tmp_path, 2).rename(tmp_path / name)
    assert checkpoints.newest_checkpoint(tmp_path) is None
    assert checkpoints.newest_checkpoint(make_checkpoint(tmp_path, 1).parent) == tmp_path / "checkpoint-1"


def test_any_file_cut_or_emptied_by_a_power_cut_makes_a_checkpoint_incomplete(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, 5)
    checkpoints.mark_complete(path)
    for file in [file for file in path.rglob("*") if file.is_file()]:
        content = file.read_bytes()
        for damaged in (b"", content[:-1], b"\xff" + content):
            file.write_bytes(damaged)
            assert checkpoints.newest_checkpoint(tmp_path) is None
        file.write_bytes(content)
        assert checkpoints.newest_checkpoint(tmp_path) == path


def test_a_checkpoint_is_flushed_before_it_is_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, flushed = make_checkpoint(tmp_path, 5), []
    (path / checkpoints.MARKER).unlink()
    monkeypatch.setattr(
        checkpoints.durable, "flush", lambda flushed_path: flushed.append((flushed_path, (path / checkpoints.MARKER).exists()))
    )
    checkpoints.mark_complete(path)
    assert flushed[0] == (path, False)
