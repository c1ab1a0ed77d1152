import json

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


@pytest.mark.parametrize("content", ["[1]", "text", "", "null"])
def test_what_is_no_mapping_is_refused(content: str) -> None:
    with pytest.raises(StageError) as raised:
        documents.load_mapping(content.encode(), "params.yaml")
    assert_message(str(raised.value), "params.yaml", "mapping")
