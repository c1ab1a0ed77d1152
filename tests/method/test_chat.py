from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.method import chat
from stages.miniature.policy import CHAT_TEMPLATE, make_tokenizer
from stages.runtime.errors import StageError
from support.messages import assert_message

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


@pytest.fixture(scope="module")
def shared_tokenizer() -> Any:
    return make_tokenizer([("What is 2 plus 2?", "The answer is 4.")] * 10, 300)


@pytest.fixture
def tokenizer(shared_tokenizer: Any) -> Iterator[Any]:
    """A tokenizer whose chat template a test may replace."""
    template = shared_tokenizer.chat_template
    yield shared_tokenizer
    shared_tokenizer.chat_template = template


def test_a_prompt_ends_where_the_assistant_begins(tokenizer: Any) -> None:
    ids = chat.prompt_ids(tokenizer, "What is None?")
    assert tokenizer.decode(ids) == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWhat is None?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert ids.count(tokenizer.bos_token_id) == 1


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
    tokenizer.chat_template = template
    ids = chat.prompt_ids(tokenizer, prompt)
    assert ids.count(tokenizer.bos_token_id) == 1
    text = tokenizer.bos_token + expected.format(prompt.strip(), prompt)
    assert chat.prompt_text(tokenizer, prompt) == tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (CHAT_TEMPLATE.replace("bos_token + content", "bos_token + bos_token + content"), "more than one BOS"),
        ("{{ 'hi' }}", "no BOS"),
    ],
)
def test_a_template_without_exactly_one_bos_is_refused(tokenizer: Any, template: str, problem: str) -> None:
    tokenizer.chat_template = template
    with pytest.raises(StageError) as raised:
        chat.prompt_ids(tokenizer, "hello")
    assert_message(str(raised.value), "chat template", problem, "exactly one")


def test_a_tokenizer_without_a_template_is_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    with pytest.raises(StageError) as raised:
        chat.prompt_ids(tokenizer, "hello")
    assert_message(str(raised.value), "no chat template", "use a chat model")


def test_a_template_that_fails_is_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ raise_exception('a system message is required') }}"
    with pytest.raises(StageError) as raised:
        chat.prompt_ids(tokenizer, "hello")
    assert_message(str(raised.value), "chat template", "a system message is required", "use", "another chat model")


def test_prompts_with_special_tokens_of_their_own_are_counted(tokenizer: Any) -> None:
    prompts = ["hello", "hello <|eot_id|>", "<|eot_id|>", "<|eot_id"]
    ids = [chat.prompt_ids(tokenizer, prompt) for prompt in prompts]
    assert chat.count_special_tokens(tokenizer, ids) == 2


counts = st.integers(1, 30)


@given(counts, st.lists(counts, min_size=2, max_size=2), st.integers(1, 20), st.integers(1, 20))
def test_truncation_keeps_as_much_of_the_prompt_and_then_of_its_responses_as_fits(
    prompt: int, responses: list[int], max_prompt: int, more: int
) -> None:
    counts = np.array([[count] for count in responses])
    (kept_prompt,), kept = chat.truncate_lengths(np.array([prompt]), counts, max_prompt=max_prompt, max_total=max_prompt + more)
    assert kept_prompt == min(prompt, max_prompt)
    assert kept[:, 0].tolist() == [min(count, max_prompt + more - kept_prompt) for count in responses]
