import hashlib

from stages.assets import alpaca_eval
from stages.miniature import domain


def test_the_miniature_is_evaluated_on_prompts_that_nothing_is_trained_on() -> None:
    prompts = [row["instruction"] for row in alpaca_eval.make_instructions(42, 200)]
    assert len(set(prompts)) == 200
    assert {hashlib.sha256(prompt.encode()).digest()[0] % 8 for prompt in prompts} == {0}
    assert not set(prompts) & set(domain.distinct_prompts("42/prompts", "training", 500))
