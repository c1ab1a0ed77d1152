"""Tables come back as written; files with other columns, types or contents are rejected."""

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.artifacts import schemas, tables
from stages.runtime.errors import StageError
from support.messages import assert_message

GOOD = {"prompt_id": [schemas.prompt_id("What?"), schemas.prompt_id("Why?")], "prompt": ["What?", "Why?"]}


def write(**columns: object) -> Callable[[Path], None]:
    return lambda path: pq.write_table(pa.table(columns), path)


@pytest.mark.parametrize(
    ("write", "parts"),
    [
        (lambda path: None, ["is missing"]),
        (lambda path: path.write_text("prompt_id,prompt\n"), ["not a readable Parquet file"]),
        (lambda path: path.write_bytes(b""), ["not a readable Parquet file"]),
        (write(prompt_id=["a"]), ["missing column 'prompt'"]),
        (
            lambda path: pq.write_table(pa.table([["a"], ["b"], ["c"]], ["prompt_id", "prompt", "prompt"]), path),
            ["duplicate column 'prompt'"],
        ),
        (
            write(prompt_id=["a"], prompt=pa.array([b"\xff"]).view(pa.string())),
            ["not a readable Parquet file", "Column 1", "Invalid UTF8"],
        ),
        (write(**GOOD, note=["x", "y"]), ["unknown column 'note'"]),
        (write(prompt_id=[1, 2], prompt=["x", "y"]), ["column 'prompt_id'", "int64", "string"]),
        (write(prompt_id=["a", "b"], prompt=["x", None]), ["row 1", "'prompt'", "None"]),
        (write(prompt_id=pa.array([], pa.string()), prompt=pa.array([], pa.string())), ["no rows"]),
    ],
)
def test_a_file_that_does_not_match_the_schema_is_rejected(
    tmp_path: Path, write: Callable[[Path], None], parts: list[str]
) -> None:
    path = tmp_path / "prompts.parquet"
    write(path)
    with pytest.raises(StageError) as error:
        tables.read(path, schemas.SPLIT)
    assert str(error.value).startswith(str(path))
    assert_message(str(error.value), *parts, "recreate the file")


def test_every_wrong_column_is_named(tmp_path: Path) -> None:
    write(prompt=["a"], note=["b"], comment=["c"])(tmp_path / "x.parquet")
    with pytest.raises(StageError) as error:
        tables.read(tmp_path / "x.parquet", schemas.SPLIT)
    assert_message(str(error.value), "missing column 'prompt_id'", "unknown column 'note'", "unknown column 'comment'")


def test_a_table_comes_back_as_written_and_with_the_same_bytes(tmp_path: Path) -> None:
    rows = [
        {"prompt_id": schemas.prompt_id(prompt), "prompt": prompt, "iteration": iteration}
        for prompt, iteration in (("What?", None), ("Why?", "iter1"))
    ]
    for name in ("one.parquet", "two.parquet"):
        tables.write(rows, schemas.PROMPTS, tmp_path / name)
    assert tables.read(tmp_path / "one.parquet", schemas.PROMPTS).to_pylist() == rows
    assert (tmp_path / "one.parquet").read_bytes() == (tmp_path / "two.parquet").read_bytes()


def test_more_rows_than_a_batch_come_back_in_order(tmp_path: Path) -> None:
    prompts = [f"What is {number}?" for number in range(2 * tables.BATCH + 1)]
    table = pa.table({"prompt_id": [schemas.prompt_id(prompt) for prompt in prompts], "prompt": prompts}, schema=schemas.SPLIT)
    tables.write(table, schemas.SPLIT, tmp_path / "x.parquet")
    assert tables.read(tmp_path / "x.parquet", schemas.SPLIT).equals(table)


def test_columns_are_read_in_the_order_of_the_schema(tmp_path: Path) -> None:
    pq.write_table(pa.table(dict(reversed(GOOD.items()))), tmp_path / "x.parquet")
    assert tables.read(tmp_path / "x.parquet", schemas.SPLIT).column_names == schemas.SPLIT.names
