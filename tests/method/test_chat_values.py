from types import SimpleNamespace
from typing import Any

from stages.method import chat


class Tokenizer(SimpleNamespace):
    """Adds a BOS token of its own if asked to, as Llama 3's does; the template produces another one."""

    bos_token_id = 1

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, Any]:
        return {"input_ids": [1] * add_special_tokens + [1, 5, 6]}


def test_only_the_template_produces_a_bos_token() -> None:
    assert chat.text_ids(Tokenizer(), "text") == [1, 5, 6]
