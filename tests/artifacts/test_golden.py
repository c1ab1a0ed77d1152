from typing import Any

import pytest

from stages.artifacts.golden import check_golden
from stages.method import chat
from stages.miniature.policy import make_tokenizer
from stages.runtime.errors import StageError
from stages.runtime.params import GoldenChat
from support.messages import assert_message

KEY = "models.iter1.golden"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer([("What is 2 plus 2?", "The answer is 4.")] * 10, 300)


def make_golden(tokenizer: Any, text: str) -> dict[str, Any]:
    """Encode a chat in Llama 3's template, written out by hand."""
    parts = [f"<|start_header_id|>{role}<|end_header_id|>\n\n" for role in ("user", "assistant")]
    rendered = f"<|begin_of_text|>{parts[0]}{text.strip()}<|eot_id|>{parts[1]}"
    return {"text": text, "ids": tokenizer(rendered, add_special_tokens=False)["input_ids"]}


def test_a_tokenizer_agrees_with_golden_ids_that_are_its_own(tokenizer: Any) -> None:
    check_golden(tokenizer, [GoldenChat(**make_golden(tokenizer, text)) for text in ("What?", " 2  plus\n", "<|eot_id|>")], KEY)


@pytest.mark.parametrize("change", ["token", "shorter", "longer"])
@pytest.mark.parametrize("index", [0, 1])
def test_the_first_token_that_differs_is_named(tokenizer: Any, change: str, index: int) -> None:
    rows = [make_golden(tokenizer, text) for text in ("What?", "2 plus 2")]
    ids = rows[index]["ids"]
    place = {"token": 2, "shorter": len(ids) - 1, "longer": len(ids)}[change]
    found, expected = (ids[place] if place < len(ids) else None), {"token": 0, "shorter": None, "longer": 7}[change]
    rows[index]["ids"] = {"token": [*ids[:2], 0, *ids[3:]], "shorter": ids[:-1], "longer": [*ids, 7]}[change]
    assert ids[2] != 0
    with pytest.raises(StageError) as error:
        check_golden(tokenizer, [GoldenChat(**row) for row in rows], KEY)
    parts = (f"{KEY}.{index}", repr(rows[index]["text"]), f"token {place} is {found}, expected {expected}")
    assert_message(str(error.value), "params.yaml", *parts, "golden", "hub --pin")


def test_golden_ids_cover_the_chat_template(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    golden = [GoldenChat(**make_golden(tokenizer, " Hi "))]
    assert golden[0].ids == chat.prompt_ids(tokenizer, " Hi ")
    monkeypatch.setattr(tokenizer, "chat_template", tokenizer.chat_template.replace("| trim", "").replace("|trim", ""))
    with pytest.raises(StageError, match="golden"):
        check_golden(tokenizer, golden, KEY)
