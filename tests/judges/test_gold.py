from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.evaluate_alpaca import CONFIGS
from stages.judges import gold
from stages.miniature import domain
from stages.runtime.errors import StageError
from support.messages import assert_message

TEXTS = ("What is 1 plus 2?", "The answer is 3.", "Ugh.")


def fill_in(instruction: str, first: str, second: str) -> str:
    template = (CONFIGS / "gold" / "prompt.txt").read_text()
    return template.format(instruction=instruction, output_1=first, output_2=second)


def test_a_preference_is_2_minus_the_gold_probability() -> None:
    result = gold.complete([fill_in(*TEXTS), fill_in(TEXTS[0], TEXTS[1], TEXTS[1])])
    first, equal = (gold.parse_completion(completion) for completion in result["completions"])
    assert first == [2 - domain.preference(*TEXTS)]
    assert first[0] < 1.5
    assert equal == [1.5]
    assert result["price_per_example"] == [0, 0]


def test_a_text_that_contains_the_separator_is_refused() -> None:
    with pytest.raises(StageError) as error:
        gold.complete([fill_in("What?", f"a{gold.SEPARATOR}b", "c")])
    assert_message(str(error.value), "separator", "What?")


TOY = domain.distinct_prompts("any seed", "evaluation", 60)
REAL = [
    "What are the names of some famous actors that started their careers on Broadway?",
    "How do I take care of a wooden table?",
    "What is the opposite of entropy?",
    "Write a poem. What is 1 plus 2?",
    "What is 1 plus 2? Explain.",
    "Name three countries.",
    "",
]


@given(st.lists(st.sampled_from(TOY)), st.sampled_from(REAL) | st.text(), st.lists(st.sampled_from([*TOY, *REAL])))
def test_a_set_with_any_other_question_than_the_miniatures_is_refused(before: list[str], real: str, after: list[str]) -> None:
    gold.check_instructions(Path("set.json"), before)
    with pytest.raises(StageError) as error:
        gold.check_instructions(Path("set.json"), [*before, real, *after])
    assert_message(str(error.value), f"set.json: record {len(before)}: 'instruction'", "gold", "evaluate_alpaca.judge", "model")


@pytest.mark.parametrize("use", ["pretraining", "training", "evaluation"])
def test_every_question_of_the_miniature_is_known(use: domain.Use) -> None:
    gold.check_instructions(Path("set.json"), domain.distinct_prompts("another seed", use, 400))
