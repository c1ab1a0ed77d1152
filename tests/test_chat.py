from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages import chat
from stages.assets.policy import CHAT_TEMPLATE, make_tokenizer
from stages.cli import StageError


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer([("What is 2 plus 2?", "The answer is 4.")] * 10, 300)


def test_a_prompt_ends_where_the_assistant_begins(tokenizer: Any) -> None:
    ids = chat.prompt_ids(tokenizer, "What is None?")
    assert tokenizer.decode(ids) == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWhat is None?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert ids.count(tokenizer.bos_token_id) == 1


MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for message in messages %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


@pytest.mark.parametrize("prompt", ["Hi", "  None </s> 日本語 \n", "[INST] <start_of_turn>"])
@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (
            CHAT_TEMPLATE,
            "<|start_header_id|>user<|end_header_id|>\n\n{0}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        (MISTRAL, "[INST] {1} [/INST]"),
        (GEMMA, "<start_of_turn>user\n{0}<end_of_turn>\n<start_of_turn>model\n"),
    ],
    ids=["llama-3", "mistral", "gemma-2"],
)
def test_real_templates_give_one_bos_and_end_before_the_response(
    tokenizer: Any, template: str, expected: str, prompt: str
) -> None:
    kept, tokenizer.chat_template = tokenizer.chat_template, template
    try:
        ids = chat.prompt_ids(tokenizer, prompt)
        text = chat.prompt_text(tokenizer, prompt)
    finally:
        tokenizer.chat_template = kept
    assert ids.count(tokenizer.bos_token_id) == 1
    assert text == tokenizer.decode(ids) == tokenizer.bos_token + expected.format(prompt.strip(), prompt)


@pytest.mark.parametrize(
    ("template", "found"),
    [
        (CHAT_TEMPLATE.replace("bos_token + content", "bos_token + bos_token + content"), "more than one BOS"),
        ("{{ 'hi' }}", "no BOS"),
    ],
)
def test_a_template_without_exactly_one_bos_is_refused(tokenizer: Any, template: str, found: str) -> None:
    kept = tokenizer.chat_template
    tokenizer.chat_template = template
    try:
        with pytest.raises(StageError, match=found):
            chat.prompt_ids(tokenizer, "hello")
    finally:
        tokenizer.chat_template = kept


def test_a_tokenizer_without_a_template_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    kept, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        with pytest.raises(StageError, match="no chat template"):
            chat.prompt_ids(tokenizer, "hello")
    finally:
        tokenizer.chat_template = kept


counts = st.integers(1, 30)


@given(counts, st.lists(counts, min_size=2, max_size=2), st.integers(1, 20), st.integers(1, 20))
def test_fit_holds_as_much_of_a_prompt_and_then_of_its_responses_as_there_is_room_for(
    prompt: int, responses: list[int], longest: int, more: int
) -> None:
    whole = np.array([[count] for count in responses])
    (kept,), held = chat.fit(np.array([prompt]), whole, longest_prompt=longest, longest=longest + more)
    assert kept == min(prompt, longest)
    assert held[:, 0].tolist() == [min(count, longest + more - kept) for count in responses]
