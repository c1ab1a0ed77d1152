"""Paired differences, against pandas, scipy and alpaca-eval."""

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from stages.reporting import paired
from stages.runtime.params import HarnessAsset

SAMPLES = st.lists(st.tuples(st.floats(1, 2), st.floats(1, 2)), min_size=2, max_size=60)
NULLABLE = st.lists(st.tuples(*[st.none() | st.sampled_from([1.0, 1.25, 1.5, 1.9, 2.0])] * 2), min_size=2, max_size=60)
SUBJECTS = st.lists(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=9), min_size=2, max_size=5)


def draw(seed: int, size: int = 805) -> tuple[list[float], list[float]]:
    """Return the correlated preferences of two models, with ties."""
    generator = np.random.default_rng(seed)
    shared = generator.normal(size=size)
    a, b = (1 + np.round(1 / (1 + np.exp(-shared - generator.normal(size=size))), 2) for _ in range(2))
    return a.tolist(), b.tolist()


@given(SAMPLES)
def test_a_mean_has_pandas_standard_error(sample: list[tuple[float, float]]) -> None:
    values = pd.Series([value for value, _ in sample])
    mean, error = paired.estimate_mean(values.tolist())
    assert mean == pytest.approx(100 * values.mean())
    assert error == pytest.approx(100 * values.sem(), abs=1e-9)


def test_win_rates_and_their_errors_are_alpaca_evals() -> None:
    from alpaca_eval.metrics import get_winrate

    preferences, _ = draw(1)
    theirs = get_winrate([{"preference": value} for value in preferences])
    mean, error = paired.estimate_preferences([*preferences, None])
    assert mean - 100 == pytest.approx(theirs["win_rate"])
    assert error == pytest.approx(theirs["standard_error"])


@pytest.mark.parametrize("seed", range(3))
def test_a_difference_has_the_statistic_of_a_paired_t_test(seed: int) -> None:
    a, b = draw(seed)
    result, test = paired.compare_preferences(a, b), stats.ttest_rel(a, b)
    assert result["difference"] == pytest.approx(100 * (np.mean(a) - np.mean(b)))
    assert result["difference"] / result["standard_error"] == pytest.approx(test.statistic)
    interval = test.confidence_interval(0.95)  # with t's quantile instead of 1.96
    assert (result["lower"], result["upper"]) == pytest.approx((100 * interval.low, 100 * interval.high), abs=0.02)
    independent = math.hypot(100 * stats.sem(a), 100 * stats.sem(b))
    assert result["standard_error"] < 0.85 * independent  # their correlation is about a half


@given(NULLABLE)
def test_a_comparison_counts_wins_losses_ties_and_what_it_leaves_out(sample: list[tuple[float | None, float | None]]) -> None:
    frame = pd.DataFrame(sample, columns=["a", "b"], dtype=float).dropna()
    if len(frame) < 2:
        return
    result = paired.compare_preferences([a for a, _ in sample], [b for _, b in sample])
    assert result["wins"] == (frame["a"] > frame["b"]).sum()
    assert result["losses"] == (frame["a"] < frame["b"]).sum()
    assert result["ties"] == (frame["a"] == frame["b"]).sum()
    assert result["omitted"] == len(sample) - len(frame)
    differences = 100 * (frame["a"] - frame["b"])
    assert result["difference"] == pytest.approx(differences.mean(), abs=1e-9)
    assert result["standard_error"] == pytest.approx(differences.sem(), abs=1e-9)
    assert result["lower"] == pytest.approx(differences.mean() - 1.96 * differences.sem(), abs=1e-9)
    assert result["upper"] == pytest.approx(differences.mean() + 1.96 * differences.sem(), abs=1e-9)


@given(SAMPLES)
def test_the_opponents_comparison_is_the_mirror_image(sample: list[tuple[float, float]]) -> None:
    a, b = [first for first, _ in sample], [second for _, second in sample]
    one, other = paired.compare_preferences(a, b), paired.compare_preferences(b, a)
    assert (one["difference"], one["lower"]) == pytest.approx((-other["difference"], -other["upper"]))
    assert (one["wins"], one["losses"], one["ties"]) == (other["losses"], other["wins"], other["ties"])


@given(SUBJECTS)
def test_scores_are_averaged_over_subjects_and_tasks(subjects: list[list[tuple[float, float]]]) -> None:
    """MMLU with several subjects of different sizes, and two tasks, each with the first subject's questions."""

    def make_scores(model: int) -> dict[str, Any]:
        mmlu = {f"mmlu_{index}": [pair[model] for pair in pairs] for index, pairs in enumerate(subjects)}
        first = {"x": [pair[model] for pair in subjects[0]]}
        return {"arc": first, "gsm8k": first, "mmlu": mmlu}

    estimates = paired.estimate_scores(paired.subtract_scores(make_scores(0), make_scores(1)))
    groups = [100 * pd.Series([a - b for a, b in pairs]) for pairs in subjects]
    means, errors = np.array([group.mean() for group in groups]), np.array([group.sem() for group in groups])
    sizes = np.array([len(group) for group in groups])
    plain = means.mean(), np.sqrt((errors**2).sum()) / len(groups)
    pooled = pd.concat(groups).mean(), np.sqrt(((sizes * errors) ** 2).sum()) / sizes.sum()
    first = means[0], errors[0]
    expected = {
        "arc": first,
        "gsm8k": first,
        "mmlu": plain,
        "average_of_3_tasks": ((2 * first[0] + plain[0]) / 3, np.sqrt(2 * first[1] ** 2 + plain[1] ** 2) / 3),
        "mmlu_weighted": pooled,
        "average_weighted_of_3_tasks": ((2 * first[0] + pooled[0]) / 3, np.sqrt(2 * first[1] ** 2 + pooled[1] ** 2) / 3),
    }
    assert list(estimates) == list(expected)
    for name, estimate in expected.items():
        assert estimates[name] == pytest.approx(estimate, abs=1e-9), name


@pytest.mark.parametrize("count", range(1, 7))
@pytest.mark.parametrize("weighted", [None, (4.0, 0.5)])
def test_only_the_average_of_all_tasks_is_called_average(count: int, weighted: tuple[float, float] | None) -> None:
    """A published average is of six tasks, so another one must not be compared with it."""
    names = [*["arc", "truthfulqa", "winogrande", "gsm8k", "hellaswag"][: count - 1], "mmlu"]
    tasks = {name: (float(index), 1.0) for index, name in enumerate(names)}
    estimates = paired.add_averages(tasks, weighted)
    suffix = "" if count == len(HarnessAsset.model_fields) else f"_of_{count}_tasks"
    averages = {f"average{suffix}": ((count - 1) / 2, count**-0.5)} if count > 1 else {}
    if weighted:
        averages["mmlu_weighted"] = weighted
        if count > 1:
            mean = (sum(range(count - 1)) + 4) / count
            averages[f"average_weighted{suffix}"] = (mean, math.sqrt(count - 1 + 0.25) / count)
    assert list(estimates) == [*names, *averages]
    for name, expected in averages.items():
        assert estimates[name] == pytest.approx(expected)
    assert paired.list_columns(estimates) == [
        *names,
        *[name for name in averages if not name.startswith(("mmlu", "average_w"))],
    ]


def test_different_items_are_not_compared() -> None:
    with pytest.raises(ValueError, match="zip"):
        paired.compare_preferences([1.0, 2.0], [1.0, 2.0, 2.0])
    with pytest.raises(ValueError, match="zip"):
        paired.subtract_scores({"arc": {"arc": [0, 1]}}, {"arc": {"arc": [0, 1, 1]}})
    with pytest.raises(KeyError):
        paired.subtract_scores({"arc": {"arc": [0, 1]}}, {"arc": {"other": [0, 1]}})


def test_an_iteration_is_compared_with_base_and_with_the_model_it_started_from() -> None:
    pairs = paired.list_comparisons({"iter1": "base", "iter2": "iter1", "other": "iter1"}, "base")
    assert pairs == [("iter1", "base"), ("iter2", "base"), ("iter2", "iter1"), ("other", "base"), ("other", "iter1")]


@pytest.mark.parametrize(
    ("difference", "error", "beyond"),
    [(1.97, 1.0, True), (-1.97, 1.0, True), (1.95, 1.0, False), (0.0, 0.0, False), (0.1, 0.0, True), (5.0, None, None)],
)
def test_a_difference_exceeds_1_96_standard_errors(difference: float, error: float | None, beyond: bool | None) -> None:
    assert paired.exceeds(difference, error) is beyond


@pytest.mark.parametrize(
    ("error", "theirs", "difference", "beyond"),
    [
        (1.0, None, 2.7, False),
        (1.0, None, 2.8, True),
        (1.0, 0.0, 1.9, False),
        (1.0, 0.0, -2.0, True),
        (3.0, 4.0, 9.7, False),
        (3.0, 4.0, 9.9, True),
        (None, 1.0, 9.0, None),
    ],
)
def test_a_published_difference_is_judged_by_both_errors(
    error: float | None, theirs: float | None, difference: float, beyond: bool | None
) -> None:
    assert paired.exceeds_published(difference, error, theirs) is beyond
