import json
import re
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tables import STRANGE

from stages import files, schemas
from stages.cli import StageError

GOOD = {"prompt_id": [schemas.prompt_id("What?"), schemas.prompt_id("Why?")], "prompt": ["What?", "Why?"]}


def _write(**columns: object) -> Callable[[Path], None]:
    return lambda path: pq.write_table(pa.table(columns), path)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "{path} is missing: "),
        (lambda path: path.write_text("prompt_id,prompt\n"), "{path}: not a readable Parquet file"),
        (lambda path: path.write_bytes(b""), "{path}: not a readable Parquet file"),
        (_write(prompt_id=["a"]), "{path}: lacks column 'prompt'"),
        (
            lambda path: pq.write_table(pa.table([["a"], ["b"], ["c"]], ["prompt_id", "prompt", "prompt"]), path),
            "{path}: has twice column 'prompt'",
        ),
        (
            _write(prompt_id=["a"], prompt=pa.array([b"\xff"]).view(pa.string())),
            "{path}: not a readable Parquet file (Column 1: In chunk 0: Invalid: Invalid UTF8",
        ),
        (_write(**GOOD, note=["x", "y"]), "{path}: has unknown column 'note'"),
        (_write(prompt_id=[1, 2], prompt=["x", "y"]), "{path}: column 'prompt_id' is int64, not string"),
        (_write(prompt_id=["a", "b"], prompt=["x", None]), "{path}: row 1: 'prompt' is None, which is no value"),
        (_write(prompt_id=pa.array([], pa.string()), prompt=pa.array([], pa.string())), "{path}: no rows"),
    ],
)
def test_a_table_that_is_not_as_agreed_is_refused(tmp_path: Path, write: Callable[[Path], None], message: str) -> None:
    path = tmp_path / "part.parquet"
    write(path)
    with pytest.raises(StageError) as error:
        files.read_table(path, schemas.PART)
    assert str(error.value).startswith(message.format(path=path))
    assert "\n" not in str(error.value)
    assert re.search("make (it|the file again)", str(error.value))


def test_a_table_comes_back_as_written_and_with_the_same_bytes(tmp_path: Path) -> None:
    rows = [
        {"prompt_id": schemas.prompt_id(prompt), "prompt": prompt, "part": part}
        for prompt, part in (("What?", None), ("Why?", "1"))
    ]
    for name in ("one.parquet", "two.parquet"):
        files.write_table(rows, schemas.PROMPTS, tmp_path / name)
    assert files.read_table(tmp_path / "one.parquet", schemas.PROMPTS).to_pylist() == rows
    assert (tmp_path / "one.parquet").read_bytes() == (tmp_path / "two.parquet").read_bytes()


def test_columns_are_read_in_the_order_of_the_schema(tmp_path: Path) -> None:
    pq.write_table(pa.table(dict(reversed(GOOD.items()))), tmp_path / "part.parquet")
    assert files.read_table(tmp_path / "part.parquet", schemas.PART).column_names == schemas.PART.names


def _fail_while_writing(path: Path, folder: bool) -> None:
    with files.replacing(path) as partial:
        if folder:
            partial.mkdir()
            partial = partial / "half"
        partial.write_text("half")
        raise KeyboardInterrupt


@pytest.mark.parametrize("folder", [False, True])
def test_an_output_is_there_whole_or_not_at_all(tmp_path: Path, folder: bool) -> None:
    path = tmp_path / "new" / "out"
    with pytest.raises(KeyboardInterrupt):
        _fail_while_writing(path, folder)
    assert list(path.parent.iterdir()) == []


def test_a_failure_leaves_the_older_output(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    files.write_json({"a": 1}, path)
    for value in (float("nan"), object()):
        with pytest.raises((ValueError, TypeError)):
            files.write_json(value, path)
    assert files.read_json(path) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_run_left_is_replaced(tmp_path: Path) -> None:
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "old").touch()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "older").touch()
    with files.replacing(tmp_path / "out") as partial:
        partial.mkdir()
        (partial / "new").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "new"]


def test_json_is_sorted_and_ends_in_a_line(tmp_path: Path) -> None:
    files.write_json({"b": "é", "a": [1]}, tmp_path / "x.json")
    assert (tmp_path / "x.json").read_text() == '{\n "a": [\n  1\n ],\n "b": "é"\n}\n'
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(StageError, match=r"x\.json: not JSON"):
        files.read_json(tmp_path / "x.json")


@pytest.mark.parametrize(
    "content",
    [b"{", b"\xff", b'["\\ud800"]', b"[" * 10**5, b"9" * 5000],
    ids=["cut", "no UTF-8", "half a surrogate pair", "deep", "a number of 5000 digits"],
)
def test_what_is_no_json_is_said_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(StageError) as error:
        files.read_json(path)
    assert re.fullmatch(r".*x\.json: not JSON \(.*\): check the path, or make the file again", str(error.value))


def test_text_of_every_kind_comes_back_from_json(tmp_path: Path) -> None:
    files.write_json(STRANGE, tmp_path / "x.json")
    assert files.read_json(tmp_path / "x.json") == STRANGE
    (tmp_path / "x.json").write_text(json.dumps(STRANGE))
    assert files.read_json(tmp_path / "x.json") == STRANGE


def test_a_message_is_one_line_whatever_it_quotes() -> None:
    assert str(StageError("a\nb\r\nc\u2028d\x85e")) == "a b c d e"


def test_a_digest_follows_names_and_bytes(tmp_path: Path) -> None:
    def folder(name: str, **contents: str) -> str:
        (tmp_path / name).mkdir()
        for file, text in contents.items():
            (tmp_path / name / file).write_text(text)
        return files.digest(tmp_path / name)

    first = folder("first", a="1", b="2")
    assert folder("same", a="1", b="2") == first
    assert len({first, folder("bytes", a="1", b="3"), folder("names", a="1", c="2"), folder("fewer", a="1")}) == 4
