"""What users see of an error: one line, or a traceback for a bug."""

import errno
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.runtime import errors
from stages.runtime.errors import StageError
from support.messages import assert_message


@given(st.text())
def test_a_message_is_one_line_whatever_it_quotes(text: str) -> None:
    assert len(str(StageError(f"file: {text}")).splitlines()) == 1


def test_line_breaks_of_every_kind_become_spaces() -> None:
    assert str(StageError("a\nb\r\nc\u2028d\x85e")) == "a b c d e"


@given(st.text())
def test_third_party_text_is_one_short_line(text: str) -> None:
    line = errors.one_line(text)
    assert len(line) <= 300
    assert len(line.splitlines()) <= 1


@given(st.text() | st.integers() | st.lists(st.text()))
def test_a_quoted_value_is_its_repr_or_the_beginning_of_it(value: object) -> None:
    quoted = errors.quote(value)
    assert len(quoted) <= 80
    assert quoted == repr(value) or (quoted.endswith("...") and repr(value).startswith(quoted[:-3]))


@pytest.mark.parametrize(
    ("error", "parts"),
    [
        (StageError("a.json: row 3"), ("a.json: row 3",)),
        (OSError(errno.ENOSPC, "No space left on device", "data/x"), (errors.DISK_FULL, "data/x", "re-run")),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "data/x"), (errors.DISK_FULL, "data/x", "re-run")),
        (RuntimeError("write failed: No space left on device"), (errors.DISK_FULL, "re-run")),
        (OSError(errno.EACCES, "Permission denied", "data/x"), ("data/x", "Permission denied", "permissions")),
        (OSError(errno.EROFS, "Read-only file system", "data/x"), ("data/x", "Read-only file system", "mounted")),
        (OSError(errno.EPERM, "Operation not permitted", "data/x"), ("data/x", "not permitted", "permissions")),
        (OSError(errno.EIO, "Input/output error"), ("Input/output error", "check the disk", "re-run")),
        (OSError(errno.ESTALE, "Stale file handle", "data/x"), ("data/x", "Stale file handle", "check the disk")),
        (OSError(errno.ENOTDIR, "Not a directory", "data/x/y"), ("data/x/y", "Not a directory", "check the path")),
        (OSError(errno.EISDIR, "Is a directory", "data/x"), ("data/x", "Is a directory", "check the path")),
        (OSError(errno.ELOOP, "Too many levels of symbolic links", "\x1bx"), ("\\x1bx", "check the path")),
        (MemoryError(), ("not enough memory", "MemoryError", "params.yaml", "re-run")),
        (MemoryError("Unable to allocate 8.00 EiB for an array"), ("not enough memory", "8.00 EiB", "params.yaml")),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), ("not enough memory", "params.yaml", "re-run")),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
            ("not enough memory", "params.yaml"),
        ),
        (OSError(errno.EMFILE, "Too many open files"), ("Too many open files", "ulimit -n")),
    ],
)
def test_what_the_user_can_fix_has_a_line(error: Exception, parts: tuple[str, ...]) -> None:
    assert_message(errors.user_message(error) or "", *parts)


@given(
    st.text(st.characters()) | st.sampled_from(["\x1b[31mred\x1b[0m", "\x1b]0;title\x07", "a\rb", "\u202egnp", "\ud800", "\0"])
)
def test_nothing_that_a_terminal_obeys_is_in_a_message(text: str) -> None:
    for line in (str(StageError(f"file: {text}")), errors.one_line(text), errors.quote(text)):
        assert not {unicodedata.category(char) for char in line} & {"Cc", "Cf", "Cs", "Zl", "Zp"}
        line.encode()


def test_text_that_can_be_printed_stays_as_it_is() -> None:
    text = "data/é/日本.parquet: row 3: '🙂' \u00a0 is not η"
    assert str(StageError(text)) == text
    assert str(StageError("\x1b[31mred")) == "\\x1b[31mred", "an escape says what was there"
    assert str(StageError(str(StageError("\x1b")))) == "\\x1b", "a worker's message, raised again"


@pytest.mark.parametrize("error", [KeyError("x"), OSError(errno.ENOENT, "No such file", "x"), AssertionError()])
def test_a_bug_has_none(error: Exception) -> None:
    assert errors.user_message(error) is None
    with pytest.raises(type(error)):
        errors.exit_with(error)


def test_the_exit_code_is_1_with_the_line_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        errors.exit_with(StageError("a.json: row 3"), "split: ")
    assert exit_.value.code == 1
    assert capsys.readouterr().err == "split: error: a.json: row 3\n"


def test_the_debug_variable_raises_every_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPPO_DEBUG", "1")
    with pytest.raises(StageError):
        errors.exit_with(StageError("a.json: row 3"))
