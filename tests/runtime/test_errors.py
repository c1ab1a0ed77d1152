"""What users see of an error: one line, or a traceback for a bug."""

import errno

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
    ],
)
def test_what_the_user_can_fix_has_a_line(error: Exception, parts: tuple[str, ...]) -> None:
    assert_message(errors.user_message(error) or "", *parts)


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
