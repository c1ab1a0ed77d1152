import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.reporting import pages
from stages.reporting.published import TASKS, Published, read_published
from stages.runtime.paths import ROOT
from support.reports import read_rows


@pytest.fixture(scope="module")
def published() -> Published:
    """The results published for Llama-3-8B."""
    published = read_published(ROOT / "recipes/llama-3-8b/published.yaml")
    assert published
    return published


@pytest.fixture(scope="module")
def gemma() -> Published:
    """The results published for Gemma-2-9B: no leaderboard, and no average length of the base model's answers."""
    published = read_published(ROOT / "recipes/gemma-2-9b/published.yaml")
    assert published
    return published


def alpaca(judge: str, published: Published) -> dict[str, dict[str, Any]]:
    """Return results of base, 0.1 above the published ones, and of iter1, 10 below."""
    shifts = {"base": 0.1, "iter1": -10.0}
    return {
        name: {
            "length_controlled_winrate": published.alpaca_eval.models[name].length_controlled_winrate + shift,
            "lc_standard_error": 0.9,
            "win_rate": published.alpaca_eval.models[name].win_rate + shift,
            "standard_error": 1.4,
            "avg_length": 1900,
            "n_total": 805,
            "judge": judge,
        }
        for name, shift in shifts.items()
    }


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 10)), min_size=6, max_size=6))
def test_the_average_is_unweighted_and_its_error_that_of_independent_tasks(values: list[tuple[float, float]]) -> None:
    summary = {task: {"value": v, "standard_error": e} for task, (v, e) in zip(TASKS, values, strict=True)}
    value, error = pages.average_tasks(summary)["average"]
    assert value == pytest.approx(sum(v for v, _ in values) / 6)
    assert error == pytest.approx(math.sqrt(sum(e * e for _, e in values)) / 6)


def test_our_results_stand_next_to_the_published_ones(published: Published) -> None:
    text = pages.format_alpaca_eval(alpaca("gpt-4-1106-preview", published), published)
    rows = read_rows(text)
    assert ["base", "Meta-Llama-3-8B-Instruct", "LC win rate", "23.02", "22.92", "0.10", "yes"] in rows
    assert ["iter1", "Llama-3-Instruct-8B-SPPO-Iter1", "win rate", "21.74", "31.74", "-10.00", "no"] in rows
    assert ["base", "Meta-Llama-3-8B-Instruct", "average length", "1900.00", "1899.00", "1.00", "–"] in rows
    assert not [row for row in rows if row[0] == "iter2"], "a model that was not trained has no row"
    assert "Different judge" not in text


def test_a_different_judge_is_named(published: Published) -> None:
    text = pages.format_alpaca_eval(alpaca("my-judge", published), published)
    assert "**Different judge**" in text
    assert "`my-judge`" in text.partition("**Different judge**")[2]


def test_a_page_without_published_results_says_so(published: Published) -> None:
    text = pages.format_alpaca_eval(alpaca("my-judge", published), None)
    assert pages.NOT_PUBLISHED in text
    assert pages.COMPARISON not in text


def test_the_reason_for_a_missing_lc_win_rate_is_stated(published: Published) -> None:
    metrics = alpaca("my-judge", published)
    for values in metrics.values():
        del values["length_controlled_winrate"], values["lc_standard_error"]
        values["length_controlled_absent"] = "the judge was away"
    text = pages.format_alpaca_eval(metrics, published)
    assert "the judge was away" in text
    assert ["base", "–", "–", "22.67", "1.40", "1900"] in read_rows(text)
    assert ["base", "Meta-Llama-3-8B-Instruct", "LC win rate", "–", "22.92", "–", "–"] in read_rows(text)


@pytest.mark.parametrize(
    ("error", "theirs", "difference", "within"),
    [(1.0, None, 2.7, "yes"), (1.0, None, 2.8, "no"), (1.0, 0.0, 1.9, "yes"), (1.0, 0.0, -2.0, "no"), (None, None, 1.0, "–")],
)
def test_a_difference_is_judged_by_both_errors(
    error: float | None, theirs: float | None, difference: float, within: str
) -> None:
    assert pages.judge_difference(error, theirs, difference) == within


def test_a_value_that_was_not_published_is_a_dash(published: Published, gemma: Published) -> None:
    rows = read_rows(pages.format_alpaca_eval(alpaca("gpt-4-1106-preview", published), gemma))
    assert ["base", "Gemma-2-9B-It", "average length", "1900.00", "–", "–", "–"] in rows
    assert ["iter1", "Gemma-2-9B-It-SPPO-Iter1", "average length", "1900.00", "1669.00", "231.00", "–"] in rows


def test_the_leaderboard_without_a_published_table_says_so(gemma: Published) -> None:
    summary = {task: {"value": 50.0, "standard_error": 1.0, "shots": 5, "metric": "acc"} for task in TASKS}
    text = pages.format_leaderboard({"base": summary}, gemma)
    assert text == pages.format_leaderboard({"base": summary}, None)
    assert pages.NOT_PUBLISHED in text


def test_the_leaderboard_marks_significant_differences(published: Published) -> None:
    assert published.open_llm_leaderboard
    theirs = published.open_llm_leaderboard.models["base"]
    summary = {
        task: {"value": theirs[task] + (9 if task == "gsm8k" else 1), "standard_error": 1.2, "shots": 5, "metric": "acc_norm"}
        for task in TASKS
    }
    rows = read_rows(pages.format_leaderboard({"base": summary}, published))
    differences = next(row[2:] for row in rows if row[1] == "difference")
    assert [cell.partition(" ")[0] for cell in differences] == ["+1.00", "+1.00", "+1.00", "+9.00", "+1.00", "+1.00", "+2.34"]
    assert [task for task, cell in zip([*TASKS, "average"], differences, strict=True) if "outside" in cell] == [
        "gsm8k",
        "average",
    ]


def test_the_matrix_has_a_row_and_a_column_for_every_model() -> None:
    comparison = {"models": ["base", "iter1"], "win_rates": [[50, 40], [60, 50]], "standard_errors": [[0, 1], [1, 0]], "n": 9}
    rows = read_rows(pages.format_ranker(comparison))
    assert rows[0][1:] == ["base", "iter1"]
    assert rows[2:] == [["base", "–", "40.0 ± 1.0"], ["iter1", "60.0 ± 1.0", "–"]]


def test_samples_are_drawn_with_the_seed() -> None:
    answers = {
        name: [{"instruction": f"Q{index}", "output": f"{name} {index}"} for index in range(50)] for name in ("base", "iter1")
    }
    rows = read_rows(pages.format_samples(answers, 1))[2:]
    assert len(rows) == pages.SAMPLES
    assert all(row == [f"Q{row[0][1:]}", f"base {row[0][1:]}", f"iter1 {row[0][1:]}"] for row in rows)
    assert read_rows(pages.format_samples(answers, 1))[2:] == rows
    assert read_rows(pages.format_samples(answers, 2))[2:] != rows
    assert len(read_rows(pages.format_samples({name: rows[:3] for name, rows in answers.items()}, 1))[2:]) == 3
