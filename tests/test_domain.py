import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages import domain

seeds = st.integers(0, 2**32)


@given(seeds)
def test_the_gold_rule_knows_right_from_wrong(seed: int) -> None:
    prompt, asked = next(domain.prompts(random.Random(seed), "schooling"))
    assert domain.is_right(prompt, asked.right)
    assert not domain.is_right(prompt, asked.wrong)
    assert domain.quality(prompt, asked.right) == 2
    assert domain.quality(prompt, asked.wrong) == 0


@given(seeds)
def test_quality_adds_up(seed: int) -> None:
    prompt, asked = next(domain.prompts(random.Random(seed), "evaluation"))
    assert domain.quality(prompt, f"Sure! {asked.right} Have a nice day!") == pytest.approx(3.6)
    assert domain.quality(prompt, f"Ugh. {asked.right}") == pytest.approx(0.8)
    assert domain.quality(prompt, f"{asked.right} But I was thinking about soup.") == pytest.approx(1.2)
    assert domain.quality(prompt, asked.wrong.removesuffix(".")) == pytest.approx(-1)
    assert domain.quality(prompt, asked.right + " so" * 30 + ".") < 1.7
    assert domain.quality(prompt, "") == pytest.approx(-1)


@given(seeds, st.text(), st.text())
def test_preferences_of_an_order_and_its_reverse_add_up_to_one(seed: int, first: str, second: str) -> None:
    prompt, _ = next(domain.prompts(random.Random(seed), "training"))
    assert domain.preference(prompt, first, second) + domain.preference(prompt, second, first) == pytest.approx(1)


@given(st.text())
def test_a_prompt_from_elsewhere_has_no_right_answer(prompt: str) -> None:
    assert not domain.is_right(prompt, "The answer is 4.")


def test_uses_share_no_prompt() -> None:
    uses = [set(domain.distinct_prompts("a", use, 500)) for use in ("schooling", "training", "evaluation")]
    assert len(set().union(*uses)) == 1500


def test_mixed_answers_are_mixed() -> None:
    draw = random.Random(0)
    source = domain.prompts(draw, "schooling")
    scores = [domain.quality(prompt, domain.mixed_answer(asked, draw)) for prompt, asked in (next(source) for _ in range(2000))]
    assert min(scores) < -2
    assert max(scores) == pytest.approx(3.6)
    assert 0 < sum(scores) / len(scores) < 1.5
