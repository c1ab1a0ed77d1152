"""What all reports share; the values that report writes are tested in tests/test_report_values.py."""

from typing import Any

import pandas as pd
import pytest

from stages.reporting import results
from stages.reporting.inputs import Evaluations
from stages.tools import changes, revisions


def test_the_model_it_started_from_is_the_one_in_the_parameters() -> None:
    """iter3 starts from iter1, not from iter2."""
    preferences: dict[str, Any] = {"base": [1, 1, 1], "iter1": [1.5, 1.5, 1], "iter2": [1.2, 1.1, 1.3], "iter3": [2, 1.5, 1]}
    scores = {name: {"mmlu": {"mmlu_art": [value - 1 for value in values]}} for name, values in preferences.items()}
    summary = {"mmlu": {"value": 0, "standard_error": 0, "weighted": 0, "weighted_standard_error": 0}}
    evaluations = Evaluations({name: {} for name in scores}, dict.fromkeys(scores, summary), preferences, scores, {})
    iterations = {"iter1": "base", "iter2": "iter1", "iter3": "iter1"}
    metrics = results.collect_metrics(evaluations, iterations, *results.compare_models(evaluations, iterations))
    changes = metrics["alpaca_eval"]["iter3"]
    assert (changes["vs_previous"]["difference"], changes["vs_base"]["difference"]) == pytest.approx((50 / 3, 50))
    scores_of = metrics["open_llm_leaderboard"]["iter3"]
    assert scores_of["vs_previous"]["mmlu"]["difference"] == pytest.approx(50 / 3)
    assert scores_of["vs_base"]["mmlu"]["difference"] == pytest.approx(50)


def test_a_model_without_scores_is_compared_by_its_answers_only() -> None:
    """The harness cannot evaluate a model of which only the answers exist."""
    preferences: dict[str, Any] = {"base": [1, 1.5, 1], "iter1": [1.5, 1.5, 1], "theirs": [2, 1.5, 1]}
    scores = {name: {"gsm8k": {"gsm8k": [0.0, value]}} for name, value in (("base", 0.0), ("iter1", 1.0))}
    summary = {"gsm8k": {"value": 0, "standard_error": 0}}
    evaluations = Evaluations({name: {} for name in preferences}, dict.fromkeys(scores, summary), preferences, scores, {})
    starts = {"iter1": "base", "theirs": "iter1"}
    wins, tasks = results.compare_models(evaluations, starts)
    assert list(wins) == [("iter1", "base"), ("theirs", "base"), ("theirs", "iter1")]
    assert list(tasks) == [("iter1", "base")]
    metrics = results.collect_metrics(evaluations, starts, wins, tasks)
    assert metrics["alpaca_eval"]["theirs"]["vs_base"]["difference"] == pytest.approx(100 / 3)
    assert metrics["alpaca_eval"]["theirs"]["vs_previous"]["difference"] == pytest.approx(50 / 3)
    assert list(metrics["open_llm_leaderboard"]) == ["base", "iter1"]
    assert list(metrics["open_llm_leaderboard"]["iter1"]["vs_base"]) == ["gsm8k"]
    assert metrics["open_llm_leaderboard"]["iter1"]["vs_base"]["gsm8k"]["difference"] == 50


def test_metrics_hold_the_values_and_beside_them_their_standard_errors() -> None:
    values = results.split_errors({"mmlu": (28.0, 4.0), "average": (39.0, 2.0)})
    assert values == {"mmlu": 28.0, "average": 39.0, "standard_errors": {"mmlu": 4.0, "average": 2.0}}
    metrics: dict[str, Any] = {"open_llm_leaderboard": {"base": values}}
    assert changes.standard_error(revisions.flatten(metrics), ("open_llm_leaderboard", "base", "mmlu")) == 4


def test_the_interval_of_a_mean_length_is_that_of_its_standard_error() -> None:
    mean, error = results.average_length([{"output": "a" * length} for length in (2, 4, 6, 8)])
    assert (mean, error) == (5, pytest.approx(pd.Series([2, 4, 6, 8]).sem()))
    assert results.add_interval("base", "length", 5, 1) == {"model": "base", "length": 5, "lower": 3.04, "upper": 6.96}


def test_floats_are_rounded_to_six_digits_at_any_depth() -> None:
    assert results.round_numbers({"a": {"b": 1.23456789, "c": 5}, "d": "x"}) == {"a": {"b": 1.23457, "c": 5}, "d": "x"}
