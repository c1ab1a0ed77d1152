"""Shards of tables: any text and any number of responses pass through, corrupted shards do not, each worker has its device."""

import contextlib
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from stages.artifacts import schemas, shards, tables
from stages.runtime import scratch
from stages.runtime.errors import StageError
from support import workers
from support.messages import assert_message
from support.tables import STRANGE


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory, whose scratch folders are released at the end."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPPO_WORKERS", "1")
    yield tmp_path
    scratch.finish()


def make_table(texts: list[str]) -> pa.Table:
    return pa.table({"prompt_id": [schemas.prompt_id(text) for text in texts], "prompt": texts}, schema=schemas.SPLIT)


def map_echo(samples: int, size: int, texts: list[str] = STRANGE) -> pa.Table:
    key = {"samples": samples}
    return shards.map_shards("generate", make_table(texts), size, workers.load_echo, (samples,), schemas.RESPONSES, key)


@pytest.mark.parametrize("samples", [1, 2, 8])
@pytest.mark.parametrize("size", [1, 5, 1000])
def test_any_text_and_identical_responses_pass_through(samples: int, size: int) -> None:
    table = map_echo(samples, size)
    assert table["prompt"].to_pylist() == STRANGE
    assert table["responses"].to_pylist() == [[text] * samples for text in STRANGE]
    tables.write(table, schemas.RESPONSES, Path("responses.parquet"))
    assert tables.read(Path("responses.parquet"), schemas.RESPONSES).equals(table)


def test_workers_read_the_files_of_the_folders_that_they_load(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "ranker" / "base").mkdir(parents=True)
    (folder / "ranker" / "base" / "config.json").touch()
    given: list[list[Path]] = []

    def start(*_: Any, inputs: list[Path], fork: bool) -> Any:
        assert not fork, "its workers may have several threads"
        given.append(inputs)
        return contextlib.nullcontext(lambda *_: iter(()))

    monkeypatch.setattr(shards.workers, "start", start)
    with pytest.raises(StageError):  # nothing is computed
        shards.map_shards("rank", make_table(["Why?"]), 1, workers.load_echo, (Path("ranker"), 2), schemas.RESPONSES, {})
    assert given == [[Path("ranker/base/config.json")]]


def test_a_single_prompt_is_a_shard() -> None:
    assert map_echo(5, 128, ["Why?"]).num_rows == 1


@pytest.mark.parametrize("damage", ["empty", "short", "without its end", "zeros", "text", "a folder", "a pipe"])
def test_a_corrupted_shard_is_set_aside_and_computed_again(damage: str, caplog: pytest.LogCaptureFixture) -> None:
    complete = map_echo(2, 5)
    path = sorted(Path("scratch").glob("generate/*/*.parquet"))[1]
    whole = path.read_bytes()
    ends = {"empty": b"", "short": whole[:100], "without its end": whole[:-1], "zeros": bytes(len(whole)), "text": b"PAR1" * 9}
    path.unlink()
    if damage == "a folder":
        path.mkdir()
    elif damage == "a pipe":
        os.mkfifo(path)
    else:
        path.write_bytes(ends[damage])
    assert map_echo(2, 5).equals(complete)
    (line,) = [message for message in caplog.messages if "cannot be used" in message]
    assert str(path) in line
    assert path.read_bytes() == whole
    assert path.with_name(f"{path.name}.unreadable").exists()


def test_a_shard_with_other_columns_is_named_with_its_remedy() -> None:
    map_echo(2, 5)
    path = sorted(Path("scratch").glob("generate/*/*.parquet"))[1]
    tables.write(make_table(["Why?"]), schemas.SPLIT, path)
    with pytest.raises(StageError) as error:
        map_echo(2, 5)
    assert_message(str(error.value), f"{path}: ", "missing column", "remove it, then re-run the stage")
    path.unlink()
    assert map_echo(2, 5)["prompt"].to_pylist() == STRANGE


def test_only_the_main_process_sets_shards_aside_and_all_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("work").mkdir()
    Path("work/00001.parquet").write_bytes(b"cut")
    monkeypatch.setattr(shards, "is_main_process", lambda: False)
    assert shards.list_shards(Path("work"), 3)[1] == [0, 1, 2]
    assert Path("work/00001.parquet").exists()
    monkeypatch.setattr(shards, "is_main_process", lambda: True)
    assert shards.list_shards(Path("work"), 3)[1] == [0, 1, 2]
    assert not Path("work/00001.parquet").exists()


def test_only_pending_shards_are_computed() -> None:
    complete = map_echo(2, 5)
    paths = sorted(Path("scratch").glob("generate/*/*.parquet"))
    paths[1].unlink()
    written = {path: path.stat().st_mtime_ns for path in paths if path.exists()}
    assert map_echo(2, 5).equals(complete)
    assert paths[1].exists()
    assert all(path.stat().st_mtime_ns == time for path, time in written.items())


@pytest.mark.slow
@pytest.mark.parametrize("before", [None, "3,5"])
def test_each_worker_sees_its_gpu_only(before: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if before:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", before)
    monkeypatch.setattr(shards, "list_devices", lambda **_: ["3", "5"])
    table = make_table(["One?", "Two?"])
    responses = shards.map_shards("generate", table, 1, workers.load_visible_device, (), schemas.RESPONSES, {})
    assert sorted(responses["responses"].to_pylist()) == [["3"], ["5"]]
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == before, "the stage's own environment stays as it was"


@pytest.mark.slow
def test_a_worker_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPPO_WORKERS", "2")
    with pytest.raises(StageError) as error:
        shards.map_shards("generate", make_table(["One?", "Two?"]), 1, workers.load_failure, (), schemas.RESPONSES, {})
    assert_message(str(error.value), "model: Permission denied", "check its permissions")


@pytest.mark.slow
def test_two_workers_write_the_same_shards_and_a_killed_one_costs_only_its_own(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    one = map_echo(2, 3)
    paths = sorted(Path("scratch").glob("generate/*/*.parquet"))
    whole = {path: path.read_bytes() for path in paths}
    for path in paths:
        path.unlink()
    monkeypatch.setenv("SPPO_WORKERS", "2")
    arguments = ("generate", make_table(STRANGE), 3)
    with pytest.raises(StageError) as error:
        shards.map_shards(*arguments, workers.load_death, (2, STRANGE[-1]), schemas.RESPONSES, {"samples": 2})
    assert_message(str(error.value), "of 2 was ended by signal 9 (out of memory?)", "re-run to resume")
    assert [path.exists() for path in paths] == [True] * (len(paths) - 1) + [False]
    assert map_echo(2, 3).equals(one)
    assert {path: path.read_bytes() for path in paths} == whole


def test_messages_name_shards_by_their_place_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    complete = map_echo(2, 5)
    names: list[str] = []

    @contextlib.contextmanager
    def start(load: Any, arguments: Any, devices: list[str], **_: Any) -> Iterator[Any]:
        def deal(tasks: list[pa.Table], describe: Callable[[int], str]) -> Iterator[tuple[int, pa.Table]]:
            for index in reversed(range(len(tasks))):
                names.append(describe(index))
                yield index, load(*arguments)(tasks[index])

        yield deal

    for path in sorted(Path("scratch").glob("generate/*/*.parquet"))[1::2]:
        path.unlink()
    monkeypatch.setattr("stages.runtime.workers.start", start)
    assert map_echo(2, 5).equals(complete)
    assert names == ["shard 4 of 4", "shard 2 of 4"]


@pytest.mark.parametrize("value", ["0", "-1", "two", ""])
def test_an_invalid_number_of_workers_is_rejected(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPPO_WORKERS", value)
    with pytest.raises(StageError) as error:
        map_echo(2, 5)
    assert_message(str(error.value), "SPPO_WORKERS", repr(value), "correct it or unset it")


def test_a_shard_does_not_take_the_whole_table_to_its_worker() -> None:
    table = pa.table({"prompt": [["some text"] * 3] * 10_000})
    shard = shards.copy_slice(table.slice(20, 4))
    assert shard.equals(table.slice(20, 4))
    assert len(pickle.dumps(shard)) < 10_000
