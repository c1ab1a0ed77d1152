import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.miniature import domain

seeds = st.integers(0, 2**32)


@given(seeds)
def test_the_gold_rule_tells_right_from_wrong(seed: int) -> None:
    prompt, question = next(domain.draw_prompts(random.Random(seed), "pretraining"))
    assert domain.is_right(prompt, question.right)
    assert not domain.is_right(prompt, question.wrong)
    assert domain.quality(prompt, question.right) == 2
    assert domain.quality(prompt, question.wrong) == 0


@given(seeds)
def test_quality_is_a_sum(seed: int) -> None:
    prompt, question = next(domain.draw_prompts(random.Random(seed), "evaluation"))
    assert domain.quality(prompt, f"Sure! {question.right} Have a nice day!") == pytest.approx(3.6)
    assert domain.quality(prompt, f"Ugh. {question.right}") == pytest.approx(0.8)
    assert domain.quality(prompt, f"{question.right} But I was thinking about soup.") == pytest.approx(1.2)
    assert domain.quality(prompt, question.wrong.removesuffix(".")) == pytest.approx(-1)
    assert domain.quality(prompt, question.right + " so" * 30 + ".") < 1.7
    assert domain.quality(prompt, "") == pytest.approx(-1)


@given(seeds, st.text(), st.text())
def test_preferences_of_both_orders_sum_to_one(seed: int, first: str, second: str) -> None:
    prompt, _ = next(domain.draw_prompts(random.Random(seed), "training"))
    assert domain.preference(prompt, first, second) + domain.preference(prompt, second, first) == pytest.approx(1)


@given(st.text())
def test_other_prompts_have_no_right_answer(prompt: str) -> None:
    assert not domain.is_right(prompt, "The answer is 4.")


def test_uses_share_no_prompt() -> None:
    uses = [set(domain.distinct_prompts("a", use, 500)) for use in ("pretraining", "training", "evaluation")]
    assert len(set().union(*uses)) == 1500


@pytest.mark.slow
def test_more_prompts_than_there_are_raise_an_error() -> None:
    with pytest.raises(ValueError, match=r"about \d+ prompts for evaluation, not 5000"):
        domain.distinct_prompts("a", "evaluation", 5000)


def test_mixed_answers_vary_in_quality() -> None:
    rng = random.Random(0)
    source = domain.draw_prompts(rng, "pretraining")
    scores = [
        domain.quality(prompt, domain.draw_mixed_answer(question, rng))
        for prompt, question in (next(source) for _ in range(2000))
    ]
    assert min(scores) < -2
    assert max(scores) == pytest.approx(3.6)
    assert 0 < sum(scores) / len(scores) < 1.5
