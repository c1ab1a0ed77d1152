"""A dvc.lock of any content is read, or refused with one line; what is read can be compared without an exception."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from stages.runtime.errors import StageError
from stages.tools import locks, revisions
from support.messages import assert_message

SCALARS = st.none() | st.booleans() | st.integers(-1, 9) | st.floats() | st.text("ab/.\x1b\ud800", max_size=3)
ODD = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(SCALARS, inner, max_size=2), max_leaves=4
)


def or_odd(expected: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Draw the expected value or, one time in eight, anything."""
    return st.integers(0, 7).flatmap(lambda number: expected if number else ODD)


def draw_mapping(values: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[Any]:
    """Draw a mapping with some of the keys."""
    return st.fixed_dictionaries({}, optional={key: or_odd(value) for key, value in values.items()})


MD5 = st.sampled_from(["0" * 32, "1" * 32, "1" * 32 + ".dir", ""])
FILE = st.fixed_dictionaries({"path": or_odd(st.sampled_from(["data", "data/a", "data/a/1", "data/b"]))}).flatmap(
    lambda path: draw_mapping({"md5": MD5, "size": st.integers(), "nfiles": st.integers()}).map(
        lambda rest: path | rest if isinstance(rest, dict) else rest
    )
)
PARAMS = st.dictionaries(st.just("params.yaml"), or_odd(st.dictionaries(st.text("ab", max_size=2), ODD, max_size=2)))
ENTRY = draw_mapping(
    {"cmd": st.just("true"), "deps": st.lists(or_odd(FILE), max_size=3), "outs": st.lists(FILE, max_size=3)}
    | {"params": PARAMS}
)
STAGES = or_odd(st.dictionaries(st.sampled_from(["a", "b@1", "code"]) | SCALARS, or_odd(ENTRY), max_size=3))


@given(STAGES, STAGES)
def test_a_lock_of_any_content_is_compared_or_refused(before: Any, after: Any) -> None:
    try:
        stages = [revisions.read_stages({"stages": value}, "dvc.lock at HEAD") for value in (before, after)]
        locks.compare(*stages)
        locks.find_outdated(stages[0], {})
    except StageError as error:
        message = str(error)
    else:
        return
    assert_message(message, "dvc.lock", "dvc repro")
    assert message.isprintable()
