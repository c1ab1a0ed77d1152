"""The ranker's training and its agreement with the gold rule, with one weight instead of a DeBERTa."""

import random
from typing import Any

import pytest
import torch

from stages.miniature import domain, ranker
from stages.runtime.params import MiniatureRanker


class OneWeight(torch.nn.Module):
    """Its logit is the weight times the difference in quality, left minus right."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(weight))


def score(model: OneWeight, _: Any, pairs: list[tuple[str, str, str]]) -> torch.Tensor:
    differences = [domain.quality(prompt, left) - domain.quality(prompt, right) for prompt, left, right in pairs]
    return model.weight * torch.tensor(differences)


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> list[ranker.Prompt]:
    monkeypatch.setattr(ranker, "pair_logits", score)
    return ranker.draw_prompts(random.Random(0), 60, 3)


def test_it_learns_to_prefer_the_better_response_on_the_left(prompts: list[ranker.Prompt]) -> None:
    model = OneWeight(0.0)
    size = MiniatureRanker(hidden_size=32, layers=1, prompts=60, candidates=3, noise=0.1, learning_rate=0.1)
    ranker.train(model, None, prompts, size, random.Random(0))
    assert model.weight.item() > 0.2


def test_agreement_is_the_share_of_pairs_ranked_like_the_gold_rule(prompts: list[ranker.Prompt]) -> None:
    assert ranker.measure_agreement(OneWeight(1.0), None, prompts) == 1
    assert ranker.measure_agreement(OneWeight(-1.0), None, prompts) == 0
