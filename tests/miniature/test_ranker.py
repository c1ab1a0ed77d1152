import random

import pytest

from stages.miniature import domain, ranker
from stages.runtime.errors import StageError
from support.messages import assert_message


def test_prompts_and_responses_are_distinct_and_vary_in_quality() -> None:
    prompts = ranker.draw_prompts(random.Random(0), 300, 4)
    assert len({prompt for prompt, _ in prompts}) == 300
    assert {len(set(responses)) for _, responses in prompts} == {4}
    scores = [domain.quality(prompt, response) for prompt, responses in prompts for response in responses]
    assert min(scores) < -2
    assert max(scores) == pytest.approx(3.6)


def test_the_prompts_are_not_those_of_training_and_evaluation() -> None:
    prompts = {prompt for prompt, _ in ranker.draw_prompts(random.Random(0), 300, 2)}
    for use in ("training", "evaluation"):
        assert not prompts & set(domain.distinct_prompts("a", use, 500))  # type: ignore[arg-type]


@pytest.mark.slow
def test_more_prompts_than_there_are_raise_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(domain, "GREETINGS", [""])
    monkeypatch.setattr(domain, "REMARKS", [""])
    with pytest.raises(StageError) as error:
        ranker.draw_prompts(random.Random(0), 1200, 2)
    assert_message(str(error.value), "params.yaml", "assets.ranker.miniature.prompts is 1000", "lower it")
