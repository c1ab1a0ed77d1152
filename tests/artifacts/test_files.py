"""Outputs appear whole or not at all, JSON is checked when it is read, and digests follow names and contents."""

import errno
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.artifacts import files
from stages.runtime import scratch
from stages.runtime.errors import StageError
from support.messages import assert_message
from support.tables import STRANGE


def interrupt_writing(path: Path, folder: bool) -> None:
    with files.replacing(path) as partial:
        if folder:
            partial.mkdir()
            partial = partial / "half"
        partial.write_text("half")
        raise KeyboardInterrupt


@pytest.mark.parametrize("folder", [False, True])
def test_an_interrupted_output_leaves_nothing_behind(tmp_path: Path, folder: bool) -> None:
    path = tmp_path / "new" / "out"
    with pytest.raises(KeyboardInterrupt):
        interrupt_writing(path, folder)
    assert list(path.parent.iterdir()) == []


def test_a_failure_keeps_the_previous_output(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    files.write_json({"a": 1}, path)
    for value in (float("nan"), object()):
        with pytest.raises((ValueError, TypeError)):
            files.write_json(value, path)
    assert files.read_json(path) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_leftovers_of_a_killed_run_are_replaced(tmp_path: Path) -> None:
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "old").touch()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "new").write_text("older")
    write_folder(tmp_path / "out", "new")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "new"]
    assert (tmp_path / "out" / "new").read_text() == "new"


def write_folder(path: Path, *names: str) -> None:
    """Write a folder as stages do, whose files contain their own names."""
    with files.replacing(path) as partial:
        partial.mkdir()
        for name in names:
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            (partial / name).write_text(name)


def list_contents(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


NAMES = st.lists(st.sampled_from(["a", "b", "notes.txt", "sub/a", "sub/c", "a.d/e", ".hidden", "x y"]), unique=True)


@given(NAMES, NAMES)
def test_only_an_output_with_nothing_else_in_it_is_replaced(before: list[str], after: list[str]) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "out"
        write_folder(path, *before)
        for file in before:
            (path / file).write_text("before")
        kept = list_contents(path)
        if set(before) <= set(after):
            write_folder(path, *after)
            assert {file: text for file, text in list_contents(path).items() if text is not None} == {
                file: file.encode() for file in after
            }
            return
        with pytest.raises(StageError) as error:
            write_folder(path, *after)
        assert_message(str(error.value), f"{path}", "not part of the output", "move it elsewhere")
        assert list_contents(path) == kept
        assert list(Path(name).iterdir()) == [path], "nothing half-written"


def make_folder(path: Path) -> None:
    path.mkdir()
    (path / "thesis.md").write_text("mine")


@pytest.mark.parametrize("folder", [False, True])
def test_an_output_of_another_kind_is_refused(folder: bool, tmp_path: Path) -> None:
    path = tmp_path / "mine"
    make_folder(path) if folder else path.write_text("mine")
    before = list_contents(tmp_path)
    with pytest.raises(StageError) as error:
        files.write_json({}, path) if folder else write_folder(path, "a")
    assert_message(str(error.value), f"{path} is a {'folder' if folder else 'file'}", "name another path")
    assert list_contents(tmp_path) == before


def test_an_empty_folder_and_a_link_are_replaced_and_not_followed(tmp_path: Path) -> None:
    make_folder(tmp_path / "mine")
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    (tmp_path / "empty").mkdir()
    for name in ("link", "empty"):
        write_folder(tmp_path / name, "a")
    assert list_contents(tmp_path) == {
        "mine": None,
        "mine/thesis.md": b"mine",
        "link": None,
        "link/a": b"a",
        "empty": None,
        "empty/a": b"a",
    }


OUTSIDE = ["", ".", "/", "/etc/passwd", "..", "../x", "a/../../x", "a/..", "a\0b", None, 5, ["a"], {"a": 1}, True]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_path_that_leads_elsewhere_is_not_inside(name: object) -> None:
    assert not files.is_inside(name)
    assert not files.is_file_name(name)


@given(st.lists(st.sampled_from(["a", "..", ".", "", "b c", "~", "..."])).map("/".join))
def test_what_is_inside_stays_below_the_folder(name: str) -> None:
    folder = Path("/folder")
    target = Path(os.path.normpath(folder / name))
    if files.is_inside(name):
        assert folder in target.parents
    if files.is_file_name(name):
        assert target == folder / name
        assert target.parent == folder


@pytest.mark.parametrize(("free", "named"), [(0, True), (2**30, False)])
def test_a_full_disk_is_blamed_only_if_it_is_the_output_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, named: bool
) -> None:
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(StageError if named else OSError) as error, files.replacing(tmp_path / "out"):
        raise full
    if named:
        assert_message(str(error.value), f"{tmp_path}/out", "no space left on the device", "free some space")
    else:
        assert error.value is full


def test_remove_unlinks_a_link_to_a_folder_and_not_its_contents(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    for name in ("link", "missing"):
        files.remove(tmp_path / name)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder"]
    files.remove(tmp_path / "folder")
    assert not list(tmp_path.iterdir())


def test_json_is_sorted_and_ends_in_a_newline(tmp_path: Path) -> None:
    files.write_json({"b": "é", "a": [1]}, tmp_path / "x.json")
    assert (tmp_path / "x.json").read_text() == '{\n "a": [\n  1\n ],\n "b": "é"\n}\n'


@pytest.mark.parametrize(
    "content",
    [b"{", b"\xff", b'["\\ud800"]', b"[" * 10**5, b"9" * 5000],
    ids=["truncated", "not UTF-8", "unpaired surrogate", "deeply nested", "5000 digits"],
)
def test_invalid_json_is_rejected(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(StageError) as error:
        files.read_json(path)
    assert_message(str(error.value), f"{path}: ", "JSON", "recreate the file")


def test_any_text_survives_json(tmp_path: Path) -> None:
    files.write_json(STRANGE, tmp_path / "x.json")
    assert files.read_json(tmp_path / "x.json") == STRANGE
    (tmp_path / "x.json").write_text(json.dumps(STRANGE))
    assert files.read_json(tmp_path / "x.json") == STRANGE


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        ({}, ["list of objects"]),
        ([], ["list of objects"]),
        ([{"a": "x"}, {"a": 1}], ["record 1", "'a'"]),
        ([{"a": "x"}, {"b": "x"}], ["record 1", "'a'"]),
        ([{"a": "x"}, "x"], ["record 1", "'a'"]),
    ],
)
def test_records_without_the_required_strings_are_rejected(tmp_path: Path, value: object, parts: list[str]) -> None:
    files.write_json(value, tmp_path / "x.json")
    with pytest.raises(StageError) as error:
        files.read_records(tmp_path / "x.json", ["a"])
    assert_message(str(error.value), f"{tmp_path}/x.json", *parts, "recreate the file")


def test_records_may_have_more_keys(tmp_path: Path) -> None:
    records = [{"a": "", "b": None}]
    files.write_json(records, tmp_path / "x.json")
    assert files.read_records(tmp_path / "x.json", ["a"]) == records


@pytest.mark.parametrize(
    ("path", "remedy"),
    [("data/x.json", "`dvc repro`"), ("x.json", "check the path"), (scratch.FOLDER / "rank/x.parquet", "re-run the stage")],
)
def test_the_remedy_for_a_missing_file_depends_on_its_place(path: Path, remedy: str) -> None:
    with pytest.raises(StageError) as error:
        files.require(Path(path))
    assert_message(str(error.value), f"{path} is missing", remedy)


def test_a_digest_follows_names_and_contents(tmp_path: Path) -> None:
    def digest(name: str, **contents: str) -> str:
        (tmp_path / name).mkdir()
        for file, text in contents.items():
            (tmp_path / name / file).write_text(text)
        return files.digest(tmp_path / name)

    first = digest("first", a="1", b="2")
    assert digest("same", a="1", b="2") == first
    assert len({first, digest("contents", a="1", b="3"), digest("names", a="1", c="2"), digest("fewer", a="1")}) == 4


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Files whose order by path differs from their order by name."""
    for name in ("b", "a/c", "a-b"):
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_text(name)
    return tmp_path / "out"


def test_the_md5_is_the_one_in_dvc_lock(folder: Path) -> None:
    from dvc_data.hashfile.build import build
    from dvc_data.hashfile.db import HashFileDB
    from dvc_objects.fs.local import LocalFileSystem

    file_system = LocalFileSystem()
    database = HashFileDB(file_system, str(folder.parent / "cache"))
    for path in (folder, folder / "b"):
        _, _, built = build(database, str(path), file_system, "md5")
        assert files.dvc_md5(path) == built.hash_info.value


def test_the_md5_of_a_folder_leaves_out_what_dvc_never_lists(folder: Path) -> None:
    digest = files.dvc_md5(folder)
    for name in files.NEVER_LISTED:
        (folder / name).mkdir()
        (folder / name / "config").write_text("x")
    assert files.dvc_md5(folder) == digest


def test_a_known_md5_is_not_computed_again(folder: Path) -> None:
    known: dict[files.Inode, str] = {}
    digest = files.dvc_md5(folder, known)
    assert len(known) == 3
    os.link(folder / "b", folder.parent / "link")
    (folder / "b").write_text("changed in place")
    assert files.dvc_md5(folder, known) == digest
    assert files.dvc_md5(folder.parent / "link", known) == known[(folder / "b").stat().st_dev, (folder / "b").stat().st_ino]
    assert files.dvc_md5(folder) != digest


def test_a_file_name_that_is_not_utf_8_is_hashed(tmp_path: Path) -> None:
    digests = set()
    for name in (b"\xff", b"\xfe", "é".encode()):
        folder = tmp_path / f"folder-{name.hex()}"
        folder.mkdir()
        (folder / os.fsdecode(name)).write_bytes(b"x")
        digests.add(files.digest(folder))
    assert len(digests) == 3
