"""Win rates from PairRM's logits, one number at a time. tests/test_compare_answers.py has those of a whole run."""

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.engines import comparing

matrix = st.lists(st.lists(st.floats(-20, 20), min_size=3, max_size=3), min_size=3, max_size=3)


@settings(deadline=None)
@given(st.lists(matrix, min_size=2, max_size=6), st.floats(0.1, 2))
def test_win_rates_are_mean_debiased_probabilities(logits: list[list[list[float]]], scale: float) -> None:
    rates, errors = comparing.compute_win_rates([{"logits": one} for one in logits], scale)
    for i in range(3):
        for j in range(3):
            wins: list[Any] = [100 / (1 + math.exp((one[j][i] - one[i][j]) * scale)) for one in logits]
            mean = sum(wins) / len(wins)
            assert rates[i][j] == pytest.approx(mean)
            assert rates[i][j] + rates[j][i] == pytest.approx(100)
            deviation = math.sqrt(sum((win - mean) ** 2 for win in wins) / (len(wins) - 1))
            assert errors[i][j] == pytest.approx(deviation / math.sqrt(len(wins)), abs=1e-9)
