"""Chat templates come with a model: whatever they do, the stage goes on or ends with one line."""

import os
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.method import templates
from stages.miniature.policy import make_tokenizer
from stages.runtime.errors import StageError
from support.messages import assert_message

CONTENT = "{{ messages[0]['content'] }}"


@pytest.fixture(scope="module")
def shared_tokenizer() -> Any:
    return make_tokenizer([("What is 2 plus 2?", "The answer is 4.")] * 10, 300)


@pytest.fixture
def tokenizer(shared_tokenizer: Any) -> Iterator[Any]:
    """A tokenizer whose chat template a test may replace."""
    template = shared_tokenizer.chat_template
    yield shared_tokenizer
    shared_tokenizer.chat_template = template


def fail(tokenizer: Any, template: Any, prompts: list[str]) -> str:
    tokenizer.chat_template = template
    with pytest.raises(StageError) as raised:
        templates.render_prompts(tokenizer, prompts)
    return str(raised.value)


@pytest.mark.parametrize(
    ("template", "parts"),
    [
        pytest.param(
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}" + CONTENT,
            ["more than 1 s"],
            marks=pytest.mark.slow,
        ),
        pytest.param(  # one call of C code, which no exception interrupts
            "{{ 10 ** 99999999 }}" + CONTENT, ["more than 1 s"], marks=pytest.mark.slow
        ),
        ("{{ 'a' * 2 ** 33 }}" + CONTENT, ["memory"]),
        ("{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(40) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}", ["memory"]),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", ["RecursionError"]),
        ("{{ 1 // 0 }}", ["ZeroDivisionError"]),
        ("{{ 2.0 ** 99999 }}", ["OverflowError"]),
        ("{{ 'x'.index('y') }}", ["ValueError"]),
        ("{{ [][0].x.y }}", ["UndefinedError"]),
        ("{{ messages + 1 }}", ["TypeError"]),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", ["SecurityError"]),
        ("{% for", ["TemplateSyntaxError"]),
        ({"default": "{{ 1 // 0 }}"}, ["ZeroDivisionError"]),
        ({"rag": CONTENT}, ["ValueError"]),
        ("{{ raise_exception('no\nsystem\x1b[31m message') }}", ["no system", "message"]),
        ("{{ 'x' * 200000 }}" + CONTENT, ["100000 characters"]),
    ],
)
def test_a_template_that_fails_is_one_line(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, template: Any, parts: list[str]
) -> None:
    monkeypatch.setattr(templates, "SECONDS", 1)
    monkeypatch.setattr(templates, "MEMORY", 2**28)
    text = fail(tokenizer, template, ["Hi"])
    assert_message(text, "the chat template of", *parts, "fix the template", "another chat model")
    assert len(text.splitlines()) == 1


@pytest.mark.parametrize(
    "template",
    [
        "{{ bos_token }}user",
        "{% for part in messages[0]['content'] if part is mapping %}{{ part['text'] }}{% endfor %}",
        "{{ messages[0]['content'] | upper }}",
        "{{ messages[0]['content'] | truncate(9) }}",
        "{{ messages[0]['content'] | replace('1', 'l') }}",
        "{{ messages[1:] }}",
    ],
)
def test_a_template_that_loses_the_prompt_is_refused(tokenizer: Any, template: str) -> None:
    """Even if the prompt occurs in the template's own text."""
    assert_message(fail(tokenizer, template, ["user"]), "does not contain the prompt's", "fix the template")


def test_the_prompt_that_is_lost_is_named(tokenizer: Any) -> None:
    template = "{{ messages[0]['content'] | replace('&', '&amp;') }}"
    assert_message(fail(tokenizer, template, ["this", "this & that"]), "'this & that'", "fix the template")


def test_a_template_that_ends_its_process_is_one_line(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "_render", lambda tokenizer, prompt: os._exit(3))
    assert_message(fail(tokenizer, CONTENT, ["Hi"]), "exit code 3", "another chat model")


def test_a_lone_surrogate_is_one_line(tokenizer: Any) -> None:
    assert_message(fail(tokenizer, CONTENT, ["\ud800 Hi"]), "ud800", "chat template")


@pytest.mark.slow
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=5))
def test_prompts_are_rendered_in_order_and_whole(shared_tokenizer: Any, prompts: list[str]) -> None:
    texts = templates.render_prompts(shared_tokenizer, prompts)
    assert len(texts) == len(prompts)
    for prompt, text in zip(prompts, texts, strict=True):
        messages = [{"role": "user", "content": prompt}]
        assert text == shared_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def test_a_date_is_the_same_on_every_day_and_in_every_zone(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama 3.1's template reads it in this way."""
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y %H:%M %s') }}|" + CONTENT
    texts = set()
    for zone in ("UTC", "Asia/Tokyo", "America/New_York"):
        monkeypatch.setenv("TZ", zone)
        time.tzset()
        texts.update(templates.render_prompts(tokenizer, ["Hi"]))
    monkeypatch.undo()
    time.tzset()
    assert texts == {"26 Jul 2024 00:00 1721952000|Hi"}


def test_a_choice_at_random_is_the_same_in_every_run(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ range(99999) | list | random }}" * 3 + CONTENT
    first, again = (templates.render_prompts(tokenizer, prompts) for prompts in (["a", "b"], ["b", "a"]))
    assert first[0][:-1] == first[1][:-1]
    assert first == again[::-1]


def test_no_process_is_left_behind(tokenizer: Any) -> None:
    import multiprocessing

    before = multiprocessing.active_children()
    templates.render_prompts(tokenizer, ["Hi"])
    fail(tokenizer, "{{ 1 // 0 }}", ["Hi"] * 100)
    assert multiprocessing.active_children() == before
