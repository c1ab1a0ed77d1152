"""Shards of tables: all kinds of text and any number of responses go through, harmed shards do not."""

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pytest
import tables

from stages import files, schemas, scratch, shards
from stages.cli import StageError


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPPO_WORKERS", "1")
    yield tmp_path
    scratch.finish()


def load(samples: int) -> Callable[[pa.Table], pa.Table]:
    """A model that answers with the prompt, the same for every sample."""

    def answer(shard: pa.Table) -> pa.Table:
        rows = tables.answered(shard.to_pylist(), lambda prompt: [prompt] * samples)
        return pa.Table.from_pylist(rows, schema=schemas.RESPONSES)

    return answer


def mapped(samples: int, size: int, texts: list[str] = tables.STRANGE) -> pa.Table:
    part = pa.Table.from_pylist([{"prompt_id": schemas.prompt_id(text), "prompt": text} for text in texts], schema=schemas.PART)
    return shards.map_shards("test", part, size, load, (samples,), schemas.RESPONSES, {"samples": samples})


@pytest.mark.parametrize("samples", [1, 2, 8])
@pytest.mark.parametrize("size", [1, 5, 1000])
def test_texts_of_every_kind_and_identical_responses_come_through(samples: int, size: int) -> None:
    found = mapped(samples, size)
    assert found["prompt"].to_pylist() == tables.STRANGE
    assert found["responses"].to_pylist() == [[text] * samples for text in tables.STRANGE]
    files.write_table(found, schemas.RESPONSES, Path("responses.parquet"))
    assert files.read_table(Path("responses.parquet"), schemas.RESPONSES).equals(found)


def test_a_single_prompt_is_a_shard() -> None:
    assert mapped(5, 128, ["Why?"]).num_rows == 1


def test_a_harmed_shard_is_named_with_its_remedy() -> None:
    mapped(2, 5)
    path = sorted(Path("scratch").glob("test/*/*.parquet"))[1]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(StageError) as error:
        mapped(2, 5)
    assert str(error.value).startswith(f"{path}: not a readable Parquet file (")
    assert str(error.value).endswith(": remove it, and run the stage again")
    path.unlink()
    assert mapped(2, 5)["prompt"].to_pylist() == tables.STRANGE


@pytest.mark.parametrize("value", ["0", "-1", "two", ""])
def test_a_number_of_workers_that_is_none_is_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPPO_WORKERS", value)
    with pytest.raises(StageError, match=r"^SPPO_WORKERS is '.*' and must be a number of processes"):
        shards.devices()


def test_a_shard_does_not_take_the_whole_table_to_its_worker() -> None:
    table = pa.table({"prompt": [["some text"] * 3] * 10_000})
    shard = shards.own(table.slice(20, 4))
    assert shard.equals(table.slice(20, 4))
    assert len(pickle.dumps(shard)) < 10_000
