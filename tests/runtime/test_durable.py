"""Small files: either the earlier content or the new one, whatever happens, and set aside if they cannot be read."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stages.runtime import durable

SHARED_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
ODD = [b"", b"\0", b"\xff\xfe", b"[]", b"null", b"5", b'"step"', b'["step"]', b"{}", b'{"step": null}', b'{"step": [1]}']
ODD += [b"[" * 100_000, b"9" * 5000, b'{"step": NaN}', b'{"step": 1e999}', b'{"step": 1', b'{"st\xc3']
"""What is not the JSON of `check_step`."""


def check_step(value: Any) -> int:
    step = value["step"]
    if not isinstance(step, int):
        raise ValueError("not a step")
    return step


@SHARED_FOLDER
@given(text=st.text())
def test_what_is_written_is_read(text: str, tmp_path: Path) -> None:
    durable.write(tmp_path / "new/file.json", json.dumps({"text": text}))
    assert durable.read_json(tmp_path / "new/file.json", lambda value: str(value["text"])) == text
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file.json"]


@SHARED_FOLDER
@given(content=st.binary(max_size=20) | st.sampled_from(ODD))
def test_a_file_of_any_content_is_read_or_set_aside(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(content)
    step = durable.read_json(path, check_step)
    assert path.exists() == (step is not None)
    if step is None:
        assert (tmp_path / "file.json.unreadable").read_bytes() == content
    durable.write(path, '{"step": 3}')
    assert durable.read_json(path, check_step) == 3


@pytest.mark.parametrize("content", ODD, ids=lambda content: repr(content[:12]))
def test_an_odd_file_is_named_in_one_line(content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(content)
    assert durable.read_json(path, check_step) is None
    (line,) = caplog.messages
    assert len(line.splitlines()) == 1
    assert str(path) in line
    assert "file.json.unreadable" in line


def test_a_file_that_a_power_cut_shortened_is_set_aside(tmp_path: Path) -> None:
    whole = b'{"step": 12}'
    for length in range(len(whole)):
        (tmp_path / "file.json").write_bytes(whole[:length])
        assert durable.read_json(tmp_path / "file.json", check_step) is None, length


def test_a_missing_file_is_none_without_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert durable.read_json(tmp_path / "file.json", check_step) is None
    assert not caplog.messages


def make_other(path: Path, kind: str) -> None:
    """Make what is no file; whoever read the pipe would wait for ever, and the device never ends."""
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()


OTHERS = ["a pipe", "a device", "a folder"]


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_no_file_is_neither_read_nor_waited_for(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "file.json"
    make_other(path, kind)
    assert durable.read_json(path, check_step) is None
    (line,) = caplog.messages
    assert str(path) in line
    assert os.path.lexists(tmp_path / "file.json.unreadable")


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_no_file_is_not_in_the_way_of_a_new_one(kind: str, tmp_path: Path) -> None:
    for write, content in ((durable.write, "text"), (durable.append_line, "text\n")):
        make_other(tmp_path / "file", kind)
        write(tmp_path / "file", "text")
        assert (tmp_path / "file").read_text() == content
        (tmp_path / "file").unlink()


@pytest.mark.parametrize("before", ["nothing", "a file", "a folder"])
@pytest.mark.parametrize("kind", ["a file", "a folder"])
def test_what_is_set_aside_replaces_what_was_set_aside_before(before: str, kind: str, tmp_path: Path) -> None:
    def make(path: Path, what: str, text: str) -> None:
        if what == "a folder":
            path.mkdir()
            (path / "file").write_text(text)
        elif what == "a file":
            path.write_text(text, encoding="utf-8")

    make(tmp_path / "x.unreadable", before, "earlier")
    make(tmp_path / "x", kind, "later")
    assert durable.read_json(tmp_path / "x", check_step) is None
    aside = tmp_path / "x.unreadable"
    assert (aside / "file" if kind == "a folder" else aside).read_text() == "later"


@pytest.mark.parametrize("step", ["flush", "rename"])
def test_a_write_that_fails_leaves_the_earlier_file_and_nothing_else(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    durable.write(tmp_path / "file", "earlier")

    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(*((os, "fsync") if step == "flush" else (Path, "replace")), fail)
    with pytest.raises(OSError, match="Input/output"):
        durable.write(tmp_path / "file", "later")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "earlier"


def test_a_file_is_on_the_disk_before_it_gets_its_name_and_the_name_after_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    really_replace = Path.replace

    def replace(path: Path, target: Path) -> Path:
        steps.append("rename")
        return really_replace(path, target)

    monkeypatch.setattr(durable, "_fsync", lambda path: steps.append("folder" if path == tmp_path else "file"))
    monkeypatch.setattr(Path, "replace", replace)
    durable.write(tmp_path / "file", "text")
    assert steps == ["file", "rename", "folder"]


def test_everything_in_a_folder_is_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/file").touch()
    (tmp_path / "a/link").symlink_to("nowhere")
    flushed: set[str] = set()
    monkeypatch.setattr(durable, "_fsync", lambda path: flushed.add(path.relative_to(tmp_path).as_posix()))
    durable.flush(tmp_path / "a")
    assert flushed == {"a", "a/b", "a/b/file"}
    flushed.clear()
    durable.flush(tmp_path / "a/b/file")
    assert flushed == {"a/b/file"}


@pytest.mark.parametrize("number", durable.NOT_SUPPORTED)
def test_a_disk_that_has_nothing_to_flush_is_no_error(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: int) -> None:
        raise OSError(number, "not supported")

    monkeypatch.setattr(os, "fsync", refuse)
    durable.write(tmp_path / "file", "text")
    assert (tmp_path / "file").read_text() == "text"


@SHARED_FOLDER
@given(cut=st.binary(max_size=8), lines=st.lists(st.text(st.characters(exclude_characters="\n", codec="utf-8")), max_size=4))
def test_a_line_is_appended_on_its_own(cut: bytes, lines: list[str], tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_bytes(cut)
    for line in lines:
        durable.append_line(path, line)
    before = cut.removesuffix(b"\n").split(b"\n") if cut and lines else []
    found = path.read_bytes().split(b"\n")
    if lines:
        assert found == [*before, *(line.encode() for line in lines), b""]
