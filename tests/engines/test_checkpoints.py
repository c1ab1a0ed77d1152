from pathlib import Path

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
