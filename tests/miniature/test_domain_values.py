import math
import random

from stages.miniature import domain


def test_the_better_answer_is_preferred_by_the_sigmoid_of_the_difference() -> None:
    prompt, question = next(domain.draw_prompts(random.Random(1), "evaluation"))
    right, wrong = f"Sure! {question.right}", question.wrong  # 2.8 and 0
    assert math.isclose(domain.preference(prompt, right, wrong), 1 / (1 + math.exp(-2.8)))
    assert math.isclose(domain.preference(prompt, wrong, right), 1 / (1 + math.exp(2.8)))
