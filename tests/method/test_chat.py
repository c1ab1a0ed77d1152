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
        ("{{ messages[0]['content'] }}", "no BOS"),
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
cases = st.tuples(counts, st.lists(counts, min_size=2, max_size=2), st.integers(1, 20), st.integers(1, 20))
Case = tuple[int, list[int], int, int]
"""Tokens of a prompt and of its two responses, lengths.prompt, and by how much lengths.total exceeds it."""


def truncate(case: Case, rule: str) -> tuple[int, list[int]]:
    prompt, responses, max_prompt, more = case
    counts = np.array([[count] for count in responses])
    limits = {"max_prompt": max_prompt, "max_total": max_prompt + more}
    (kept_prompt,), kept = chat.truncate_lengths(np.array([prompt]), counts, rule, **limits)
    return int(kept_prompt), kept[:, 0].tolist()


def truncate_as_released(prompt: str, chosen: str, rejected: str, max_length: int, max_prompt_length: int) -> tuple[str, ...]:
    """The rule of tokenize_row in the released sppo/trainer.py, on texts whose characters are tokens."""
    longer = max(len(chosen), len(rejected))
    if len(prompt) + longer > max_length:
        prompt = prompt[-max_prompt_length:]
    if len(prompt) + longer > max_length:
        chosen, rejected = (text[: max_length - max_prompt_length] for text in (chosen, rejected))
    return prompt, chosen, rejected


def truncate_token_by_token(
    prompt: str, chosen: str, rejected: str, max_length: int, max_prompt_length: int
) -> tuple[str, ...]:
    """Remove one token after the other: from the prompt while it has more than its part, then from each response."""
    while len(prompt) + max(len(chosen), len(rejected)) > max_length and len(prompt) > max_prompt_length:
        prompt = prompt[1:]
    while len(prompt) + len(chosen) > max_length:
        chosen = chosen[:-1]
    while len(prompt) + len(rejected) > max_length:
        rejected = rejected[:-1]
    return prompt, chosen, rejected


@given(cases)
def test_released_truncation_is_the_released_codes(case: Case) -> None:
    prompt, responses, max_prompt, more = case
    expected = truncate_as_released("p" * prompt, *("r" * count for count in responses), max_prompt + more, max_prompt)
    assert truncate(case, "released") == (len(expected[0]), [len(text) for text in expected[1:]])


@given(cases)
def test_truncation_removes_no_token_that_fits(case: Case) -> None:
    prompt, responses, max_prompt, more = case
    expected = truncate_token_by_token("p" * prompt, *("r" * count for count in responses), max_prompt + more, max_prompt)
    assert truncate(case, "truncate") == (len(expected[0]), [len(text) for text in expected[1:]])


@given(cases, st.sampled_from(["truncate", "released"]))
def test_what_fits_is_kept_and_what_is_kept_fits(case: Case, rule: str) -> None:
    prompt, responses, max_prompt, more = case
    kept_prompt, kept = truncate(case, rule)
    assert kept_prompt + max(kept) <= max_prompt + more
    assert 1 <= kept_prompt <= prompt
    assert all(1 <= count <= whole for count, whole in zip(kept, responses, strict=True))
    fits = prompt + max(responses) <= max_prompt + more
    assert ((kept_prompt, kept) == (prompt, responses)) == fits
    counts = np.array([[count] for count in responses])
    assert chat.fit_lengths(np.array([prompt]), counts, max_prompt + more).tolist() == [fits]


@pytest.mark.parametrize(
    ("tokens", "truncated", "released"),
    [
        ((100, [1500, 950]), (100, [924, 924]), (100, [512, 512])),
        ((100, [1500, 300]), (100, [924, 300]), (100, [512, 300])),
        ((700, [100, 100]), (700, [100, 100]), (700, [100, 100])),
        ((700, [324, 100]), (700, [324, 100]), (700, [324, 100])),
        ((700, [325, 100]), (699, [325, 100]), (512, [325, 100])),
        ((700, [513, 100]), (512, [512, 100]), (512, [512, 100])),
        ((5000, [100, 1]), (924, [100, 1]), (512, [100, 1])),
    ],
)
def test_truncation_at_the_recipes_lengths(
    tokens: tuple[int, list[int]], truncated: tuple[int, list[int]], released: tuple[int, list[int]]
) -> None:
    assert truncate((*tokens, 512, 512), "truncate") == truncated
    assert truncate((*tokens, 512, 512), "released") == released


def test_several_prompts_are_truncated_independently() -> None:
    prompts, responses = np.array([700, 100, 5000]), np.array([[100, 1500, 100], [100, 950, 1]])
    kept, (chosen, rejected) = chat.truncate_lengths(prompts, responses, "released", max_prompt=512, max_total=1024)
    assert (kept.tolist(), chosen.tolist(), rejected.tolist()) == ([700, 100, 512], [100, 512, 100], [100, 512, 1])
    assert chat.fit_lengths(prompts, responses, 1024).tolist() == [True, False, False]
