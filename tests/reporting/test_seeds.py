"""Noise between runs: statistics against numbers computed by hand and with NumPy."""

import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from stages.reporting import seeds
from stages.runtime.errors import StageError
from stages.runtime.paths import ROOT
from support.messages import assert_message
from support.reports import read_rows

RATE = "alpaca_eval.iter1.win_rate"


def make_run(rate: float, **others: Any) -> dict[str, Any]:
    return {
        "alpaca_eval.base.win_rate": 50.0,
        "alpaca_eval.base.standard_error": 1.0,
        RATE: rate,
        "alpaca_eval.iter1.standard_error": 2.0,
        "alpaca_eval.iter1.vs_base.difference": rate - 50,
        "alpaca_eval.iter1.vs_base.standard_error": 0.5 + rate / 100,
        "open_llm_leaderboard.iter1.average": 30.0,
        "open_llm_leaderboard.iter1.standard_errors.average": 3.0,
        "training.iter1.kl": 0.0015,
        "training.iter1.tokens": 40000,
    } | others


DOCUMENT = seeds.collect_figures({1: make_run(60.0), 2: make_run(62.0), 42: make_run(67.0)})
"""Mean 63, deviations -3, -1, 4: squares 26, SD sqrt(26 / 2) = 3.6056."""


def test_the_values_of_all_runs_are_collected_in_the_order_of_the_seeds() -> None:
    runs = {7: {"a.b": 1, "a.c": 2.5, "a.d": "x", "a.e": True}, 3: {"a.c": 3.5, "a.b": 4, "a.d": "y", "a.e": False, "a.f": 1}}
    assert seeds.collect_figures(runs) == {"seeds": [7, 3], "figures": {"a.b": [1, 4], "a.c": [2.5, 3.5]}}


@pytest.mark.parametrize("runs", [{}, {1: make_run(60.0)}])
def test_one_run_has_no_deviation(runs: dict[int, Any]) -> None:
    with pytest.raises(StageError) as error:
        seeds.collect_figures(runs)
    assert_message(str(error.value), "two seeds", f"found {len(runs)}", "make seeds")


def test_the_limit_of_three_runs_by_hand() -> None:
    """Student's t with 2 degrees of freedom: 4.303; the variance is 26 / 2, and that of a difference twice as much."""
    limits = seeds.read_limits(DOCUMENT, "seeds.json")
    assert limits.keys() == make_run(0).keys()
    assert limits[RATE] == pytest.approx(4.303 * math.sqrt(26))
    assert limits["alpaca_eval.base.win_rate"] == 0


@pytest.mark.parametrize("freedom", range(1, 40))
def test_quantiles_are_students(freedom: int) -> None:
    expected = stats.t.ppf(0.975, freedom) if freedom <= 30 else stats.norm.ppf(0.975)
    assert seeds.student_quantile(freedom) == pytest.approx(expected, abs=0.0005)


@given(st.lists(st.lists(st.floats(-1e3, 1e3), min_size=3, max_size=3), min_size=2, max_size=6))
def test_limits_equal_numpys_and_scipys(rows: list[list[float]]) -> None:
    runs = {seed: dict(zip("abc", row, strict=True)) for seed, row in enumerate(rows)}
    limits = seeds.read_limits(seeds.collect_figures(runs), "x")
    expected = np.std(np.array(rows), axis=0, ddof=1) * 2**0.5 * stats.t.ppf(0.975, len(rows) - 1)
    assert list(limits.values()) == pytest.approx(expected.tolist(), rel=2e-4, abs=1e-9)


@pytest.mark.parametrize("count", [2, 3, 5, 10])
def test_two_runs_differ_by_more_than_the_limit_in_5_of_100_cases(count: int) -> None:
    """The limit is estimated from as few other runs as in practice; SD known exactly, 1.96 would do."""
    rng = np.random.default_rng(count)
    trials = 4000
    others, pairs = 10 + 2.5 * rng.standard_normal((trials, count)), 10 + 2.5 * rng.standard_normal((trials, 2))
    limits = [seeds.noise_limit(values) for values in others.tolist()]
    assert np.mean(np.abs(pairs[:, 0] - pairs[:, 1]) > limits) == pytest.approx(0.05, abs=0.012)


@pytest.mark.parametrize(
    ("document", "parts"),
    [
        ({}, ["'seeds' is None"]),
        ({"seeds": [1], "figures": {}}, ["'seeds' is [1]"]),
        ({"seeds": [1, 2]}, ["'figures' is None"]),
        ({"seeds": [1, 2], "figures": {"a.b": [1.0]}}, ["'figures.a.b' is [1.0]", "2 numbers"]),
        ({"seeds": [1, 2], "figures": {"a.b": [1.0, "x"]}}, ["'figures.a.b'", "2 numbers"]),
        ({"seeds": [1, 2], "figures": {"a.b": [1.0, math.nan]}}, ["'figures.a.b'"]),
        ({"seeds": [1, 2], "figures": {"a.b": [1.0, math.inf]}}, ["'figures.a.b'"]),
        ({"seeds": [1, 2], "figures": {"a.b": [10**400, 1]}}, ["'figures.a.b'"]),
        ({"seeds": [1, 2], "figures": {"a.b": [True, 1]}}, ["'figures.a.b'"]),
    ],
)
def test_an_invalid_file_is_named(document: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(StageError) as error:
        seeds.read_limits(document, "reports/seeds.json at HEAD")
    assert_message(str(error.value), "reports/seeds.json at HEAD", *parts, "`make seeds`")


def test_the_page_has_mean_deviation_range_and_the_mean_error_of_a_run() -> None:
    page = seeds.format_seeds(DOCUMENT)
    head, _, rest = page.partition("<details>")
    rows = {row[0]: row[1:] for row in read_rows(head)}
    assert rows["win rate of iter1"] == ["63.00", "3.61", "60.00 to 67.00", "2.00"]
    # (0.5 + 0.60) + (0.5 + 0.62) + (0.5 + 0.67) = 3.39
    assert rows["win rate of iter1 − base"] == ["13.00", "3.61", "10.00 to 17.00", "1.13"]
    assert rows["win rate of base"] == ["50.00", "0.00", "50.00 to 50.00", "1.00"]
    assert rows["leaderboard average of iter1"] == ["30.00", "0.00", "30.00 to 30.00", "3.00"]
    assert list(rows)[2:] == [
        "win rate of base",
        "win rate of iter1",
        "win rate of iter1 − base",
        "leaderboard average of iter1",
    ]
    others = {row[0]: row[1:] for row in read_rows(rest)[2:]}
    assert others == {
        "training.iter1.kl": ["0.0015", "0", "0.0015 to 0.0015"],
        "training.iter1.tokens": ["40000", "0", "40000 to 40000"],
    }
    assert "1, 2, 42" in head
    assert "about 50%" in head  # 1 / sqrt(2 (3 - 1))
    words = " ".join(rest.split()) + head
    assert "exceeds 4.303 √2 SD" in words
    assert "2 degrees of freedom" in words
    assert "The seed also draws the evaluation's questions" in words


def test_differences_from_the_previous_model_are_headlines_where_there_are_any() -> None:
    place = "alpaca_eval.iter2"
    added = {f"{place}.win_rate": 70.0, f"{place}.vs_previous.difference": 8.0, f"{place}.vs_previous.standard_error": 1.5}
    leaderboard = {"open_llm_leaderboard.iter2.vs_base.average.difference": 0.25}
    page = seeds.format_seeds(seeds.collect_figures({seed: make_run(60.0, **added, **leaderboard) for seed in (1, 2)}))
    rows = {row[0]: row[1:] for row in read_rows(page.partition("<details>")[0])}
    assert rows["win rate of iter2 − previous"] == ["8.00", "0.00", "8.00 to 8.00", "1.50"]
    assert rows["leaderboard average of iter2 − base"] == ["0.25", "0.00", "0.25 to 0.25", "–"]


def test_details_and_repeated_differences_are_not_shown() -> None:
    """iter1 started from the base policy; one of iter2's two differences is the same by chance."""
    figures = {f"alpaca_eval.iter{number}.win_rate": [60.0, 61.0] for number in (1, 2)}
    for opponent, shift in (("base", 0), ("previous", 1)):
        for key in ("difference", "lower", "upper", "wins", "losses", "ties"):
            figures[f"alpaca_eval.iter1.vs_{opponent}.{key}"] = [1.0, 2.0]
            figures[f"alpaca_eval.iter2.vs_{opponent}.{key}"] = [3.0 + shift, 4.0]
        figures[f"open_llm_leaderboard.iter1.vs_{opponent}.average.difference"] = [5.0, 6.0]
        figures[f"open_llm_leaderboard.iter2.vs_{opponent}.average.difference"] = [5.0, 6.0 - shift]
        figures[f"open_llm_leaderboard.iter2.vs_{opponent}.mmlu.difference"] = [0.0, 0.0]
    figures |= {"training.iter1.ties": [0.0, 1.0], "training.iter1.lower": [2.0, 3.0]}
    head, _, rest = seeds.format_seeds({"seeds": [1, 2], "figures": figures}).partition("<details>")
    assert [row[0] for row in read_rows(head)[2:]] == [
        "win rate of iter1",
        "win rate of iter2",
        "win rate of iter1 − base",
        "win rate of iter2 − base",
        "win rate of iter2 − previous",
        "leaderboard average of iter1 − base",
        "leaderboard average of iter2 − base",
        "leaderboard average of iter2 − previous",
    ]
    assert [row[0].replace("\\", "") for row in read_rows(rest)[2:]] == [
        "open_llm_leaderboard.iter2.vs_base.mmlu.difference",
        "open_llm_leaderboard.iter2.vs_previous.mmlu.difference",
        "training.iter1.ties",
        "training.iter1.lower",
    ]


def test_nothing_heavier_than_the_standard_library_is_imported() -> None:
    code = "import sys, stages.reporting.seeds; print({'numpy', 'pandas', 'pydantic', 'dvc', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
