import json
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.runtime import documents
from stages.runtime.errors import StageError
from support.messages import assert_message


@given(text=st.text(st.characters(min_codepoint=0x10000), min_size=1), inner=st.booleans())
def test_half_of_a_character_is_refused(text: str, inner: bool) -> None:
    """JSON escapes such a character as two halves, which YAML does not join; as UTF-8 it is what it is."""
    document = {"sections": [{"name": text}]} if inner else {text: 1}
    escaped, plain = (json.dumps(document, ensure_ascii=ascii) for ascii in (True, False))
    half = escaped[escaped.index("\\u") :][:6]
    with pytest.raises(StageError) as raised:
        documents.load_mapping(escaped.encode(), "params.yaml")
    assert_message(str(raised.value), "params.yaml", half, "in UTF-8")
    assert documents.load_mapping(plain.encode(), "params.yaml") == document


@pytest.mark.parametrize("nest", [lambda depth: "[" * depth, lambda depth: "{a: " * depth, lambda depth: "- " * depth])
@pytest.mark.parametrize("depth", [documents.DEEPEST, 10**5])
def test_what_is_nested_too_deeply_is_refused(nest: Callable[[int], str], depth: int) -> None:
    """The mapping itself is one level; a C parser without a limit ends the process, as does one that recurses into Python."""
    with pytest.raises(StageError) as raised:
        documents.load_mapping(f"a:\n  {nest(depth)}".encode(), "params.yaml")
    assert_message(str(raised.value), "params.yaml", str(documents.DEEPEST), "take some of them out")


def test_lists_may_be_nested() -> None:
    depth = documents.DEEPEST - 1
    document: object = documents.load_mapping(f"a: {'[' * depth}{']' * depth}".encode(), "params.yaml")["a"]
    for _ in range(depth - 1):
        assert isinstance(document, list)
        (document,) = document
    assert document == []


@pytest.mark.parametrize("content", ["[1]", "text", "", "null"])
def test_what_is_no_mapping_is_refused(content: str) -> None:
    with pytest.raises(StageError) as raised:
        documents.load_mapping(content.encode(), "params.yaml")
    assert_message(str(raised.value), "params.yaml", "mapping")
