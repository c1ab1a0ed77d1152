import pytest

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
