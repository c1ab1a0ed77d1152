from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stages.engines import checkpoints
from support.messages import assert_message


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A group of one process."""
    place = tmp_path_factory.mktemp("group") / "meeting"
    torch.distributed.init_process_group("gloo", init_method=f"file://{place}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


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
    assert (path, False) in flushed


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(["latest", "global_step/shard.pt", checkpoints.DIGESTS]), data=st.data())
def test_a_checkpoint_of_the_right_size_with_other_bytes_is_set_aside(
    name: str, data: st.DataObject, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One bit, some bytes, or all of them."""
    caplog.clear()
    checkpoints.mark_complete(make_checkpoint(tmp_path, 5))
    path = checkpoints.find_start(tmp_path)
    assert path == tmp_path / "checkpoint-5"
    content = (path / name).read_bytes()
    flips = data.draw(st.binary(min_size=len(content), max_size=len(content)).filter(any))
    (path / name).write_bytes(bytes(a ^ b for a, b in zip(content, flips, strict=True)))
    assert checkpoints.newest_checkpoint(tmp_path) == path, "its sizes are right"
    assert checkpoints.find_start(tmp_path) is None
    (line,) = caplog.messages
    assert_message(line, str(path), "checkpoint-5.unreadable", "" if name == checkpoints.DIGESTS else name)
    assert not path.exists()


def test_training_goes_on_from_the_checkpoint_before_the_damaged_one(tmp_path: Path) -> None:
    for step in (3, 6):
        path = make_checkpoint(tmp_path / f"{step}", step)
        checkpoints.mark_complete(path)
        path.rename(tmp_path / path.name)
    (tmp_path / "checkpoint-6/latest").write_bytes(bytes(4))
    (tmp_path / "checkpoint-9").mkdir()  # never complete
    assert checkpoints.find_start(tmp_path) == tmp_path / "checkpoint-3"
    checkpoints.mark_complete(make_checkpoint(tmp_path, 12))
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-12"], "what was set aside takes space"


def test_a_checkpoint_without_digests_is_set_aside(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, 5)
    assert checkpoints.newest_checkpoint(tmp_path) == path
    assert checkpoints.find_start(tmp_path) is None


def test_every_process_hashes_a_part_and_gets_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files of eight processes, each of which writes a large one and a small one."""
    for rank in range(8):
        for name, size in (("optimizer", 1000), ("weights", 10)):
            (tmp_path / f"{rank}-{name}").write_bytes(bytes([rank]) * size)
    whole = checkpoints.hash_files(tmp_path)
    parts: list[list[str]] = []

    def gather(gathered: list[list[str]], lines: list[str]) -> None:
        parts.append(lines)
        gathered[: len(parts)] = parts

    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 8)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    for rank in range(8):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        result = checkpoints.hash_files(tmp_path)
    assert result == whole
    assert [[line.endswith("optimizer") for line in part] for part in parts] == [[True, False]] * 8
