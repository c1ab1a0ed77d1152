"""Whether changes exceed the error of the evaluation and the noise between runs, against pandas and scipy."""

import dataclasses
import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from stages.reporting.published import read_published
from stages.runtime import documents, params
from stages.runtime.errors import StageError
from stages.runtime.paths import ROOT
from stages.tools import changes
from stages.tools.changes import Items
from support.messages import assert_message

WIN_RATE = ("alpaca_eval", "iter1", "win_rate")
STARTS = {"iter1": "base", "iter2": "iter1"}
TASKS = {"gsm8k": {"gsm8k": 20}, "mmlu": {"mmlu_art": 5, "mmlu_law": 12}}
"""Task -> subtask -> number of questions."""


def make_items(seed: int, **changed: Any) -> Items:
    """Return random results of base, iter1 and iter2 for 40 instructions and TASKS; those of two seeds are correlated."""
    shared, own = np.random.default_rng(0), np.random.default_rng(seed)

    def draw(size: int) -> list[float]:
        return np.clip(0.7 * shared.random(size) + 0.3 * own.random(size), 0, 1).tolist()

    models = ["base", "iter1", "iter2"]
    preferences = {model: [1 + value for value in draw(40)] for model in models}
    scores = {
        model: {task: {name: draw(size) for name, size in sizes.items()} for task, sizes in TASKS.items()} for model in models
    }
    return dataclasses.replace(Items(preferences, scores, "aaa", "bbb", STARTS), **changed)  # type: ignore[arg-type]


A, B = make_items(1), make_items(2)


def test_the_change_of_a_win_rate_has_the_error_of_a_paired_t_test() -> None:
    errors = changes.find_paired_errors(A, B)
    for model in ("base", "iter1", "iter2"):
        old, new = np.array(A.preferences[model]), np.array(B.preferences[model])
        statistic = stats.ttest_rel(new, old).statistic
        assert 100 * (new - old).mean() / errors["alpaca_eval", model, "win_rate"] == pytest.approx(statistic)


def test_the_change_of_a_difference_is_paired_over_both_models_and_both_revisions() -> None:
    errors = changes.find_paired_errors(A, B)
    for model, key, opponent in (
        ("iter1", "vs_base", "base"),
        ("iter1", "vs_previous", "base"),
        ("iter2", "vs_base", "base"),
        ("iter2", "vs_previous", "iter1"),
    ):
        old, new = (pd.Series(items.preferences[model]) - pd.Series(items.preferences[opponent]) for items in (A, B))
        expected = 100 * (new - old).sem()
        assert errors["alpaca_eval", model, key, "difference"] == pytest.approx(expected)
    assert ("alpaca_eval", "base", "vs_base", "difference") not in errors


def test_the_change_of_a_score_is_paired_within_each_subject() -> None:
    errors = changes.find_paired_errors(A, B)
    assert len([key for key in errors if key[0] == "open_llm_leaderboard"]) == (3 + 4) * 5  # models, differences; columns

    def subject_error(task: str, name: str, model: str, opponent: str | None = None) -> float:
        values = [np.array(items.scores[model][task][name]) for items in (A, B)]
        if opponent:
            values = [value - np.array(items.scores[opponent][task][name]) for value, items in zip(values, (A, B), strict=True)]
        return float(100 * pd.Series(values[1] - values[0]).sem())

    for opponent, place in ((None, ()), ("iter1", ("vs_previous",)), ("base", ("vs_base",))):
        tail = ("difference",) if place else ()
        gsm8k = subject_error("gsm8k", "gsm8k", "iter2", opponent)
        art, law = (subject_error("mmlu", name, "iter2", opponent) for name in TASKS["mmlu"])
        plain, weighted = math.sqrt(art**2 + law**2) / 2, math.sqrt((5 * art) ** 2 + (12 * law) ** 2) / 17
        expected = {
            "gsm8k": gsm8k,
            "mmlu": plain,
            "average_of_2_tasks": math.sqrt(gsm8k**2 + plain**2) / 2,
            "mmlu_weighted": weighted,
            "average_weighted_of_2_tasks": math.sqrt(gsm8k**2 + weighted**2) / 2,
        }
        for column, error in expected.items():
            assert errors["open_llm_leaderboard", "iter2", *place, column, *tail] == pytest.approx(error)


def test_instructions_without_a_preference_are_left_out() -> None:
    preferences = {"iter1": [None, *B.preferences["iter1"][1:]]}
    old, new = (pd.Series(items.preferences["iter1"][1:]) for items in (A, B))
    errors = changes.find_paired_errors(A, make_items(2, preferences=preferences))
    assert errors[WIN_RATE] == pytest.approx(100 * (new - old).sem())
    two = {"iter1": [*B.preferences["iter1"][:2], *[None] * 38]}
    first = pd.Series(B.preferences["iter1"][:2]) - pd.Series(A.preferences["iter1"][:2])
    assert changes.find_paired_errors(A, make_items(2, preferences=two))[WIN_RATE] == pytest.approx(100 * first.sem())
    nothing = {"iter1": [1.5, *[None] * 39]}
    assert WIN_RATE not in changes.find_paired_errors(A, make_items(2, preferences=nothing))


@pytest.mark.parametrize(
    ("changed", "lost"),
    [
        ({"instructions": "other"}, {"alpaca_eval"}),
        ({"questions": "other"}, {"open_llm_leaderboard"}),
        ({"preferences": {}}, {"alpaca_eval"}),
        ({"scores": {}}, {"open_llm_leaderboard"}),
        ({"preferences": {model: values[1:] for model, values in B.preferences.items()}}, {"alpaca_eval"}),
        ({"scores": {"iter1": {"gsm8k": {"gsm8k": [0, 1]}, "mmlu": {"mmlu_art": [0, 1]}}}}, {"open_llm_leaderboard"}),
    ],
)
def test_results_for_other_items_are_not_paired(changed: dict[str, Any], lost: set[str]) -> None:
    for one, other in ((A, make_items(2, **changed)), (make_items(1, **changed), B)):
        found = {key[0] for key in changes.find_paired_errors(one, other)}
        assert found == {"alpaca_eval", "open_llm_leaderboard"} - lost


def test_items_of_unknown_data_are_not_paired() -> None:
    unknown = {"instructions": None, "questions": None}
    assert changes.find_paired_errors(make_items(1, **unknown), make_items(2, **unknown)) == {}
    assert changes.find_paired_errors(changes.NO_ITEMS, changes.NO_ITEMS) == {}


def flat(value: float | None, error: float | None) -> changes.Flat:
    """Return a metrics.json with iter1's win rate and its standard error."""
    return {key: one for key, one in ((WIN_RATE, value), ((*WIN_RATE[:2], "standard_error"), error)) if one is not None}


@given(st.floats(-100, 100), st.floats(-100, 100), st.floats(0, 20), st.floats(0, 20))
def test_independent_errors_add_up_in_squares(old: float, new: float, se_old: float, se_new: float) -> None:
    change = changes.judge_change(flat(old, se_old), flat(new, se_new), WIN_RATE, {}, {})
    difference, limit = abs(new - old), 1.96 * math.sqrt(se_old**2 + se_new**2)
    assert not change.is_paired
    if abs(difference - limit) > 1e-9:
        assert change.beyond_error == (difference > limit)


def test_a_paired_error_replaces_the_independent_one() -> None:
    """A change of 2.5, with standard errors of 1 each: 1.77 independent ones, 2.5 paired ones."""
    old, new = flat(60, 1), flat(62.5, 1)
    independent = changes.judge_change(old, new, WIN_RATE, {}, {})
    together = changes.judge_change(old, new, WIN_RATE, {WIN_RATE: 1.0}, {})
    assert (independent.error, independent.is_paired, independent.beyond_error) == (pytest.approx(2**0.5), False, False)
    assert (together.error, together.is_paired, together.beyond_error) == (1.0, True, True)


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [(flat(1, 0.1), flat(9, None), None), (flat(1, 0.1), {}, None), ({}, flat(1, 0.1), None), (flat(1, 1), flat(9, 1), 0.5)],
)
def test_an_unknown_error_judges_nothing(old: changes.Flat, new: changes.Flat, error: float | None) -> None:
    change = changes.judge_change(old, new, WIN_RATE, {WIN_RATE: 0.5}, {"alpaca_eval.iter1.win_rate": 1.0})
    assert (change.error, change.is_paired) == (error, error is not None)
    assert (change.beyond_error is None) == (error is None)
    assert (change.beyond_noise is None) == (not old or not new)


@pytest.mark.parametrize(
    ("difference", "limit", "beyond"),
    [(5.5, 5.54, False), (5.6, 5.54, True), (-5.6, 5.54, True), (-5.5, 5.54, False), (5.6, None, None), (5.6, 0.0, None)],
)
def test_a_change_is_compared_with_the_limit_of_noise(difference: float, limit: float | None, beyond: bool | None) -> None:
    assert changes.exceeds_noise(difference, limit) is beyond
    limits = {"alpaca_eval.iter1.win_rate": limit} if limit is not None else {}
    change = changes.judge_change(flat(50, None), flat(50 + difference, None), WIN_RATE, {}, limits)
    assert change.beyond_noise is beyond


def test_standard_errors_are_beside_their_metrics_or_nested() -> None:
    metrics: changes.Flat = {
        ("alpaca_eval", "m", "length_controlled_winrate"): 20.0,
        ("alpaca_eval", "m", "lc_standard_error"): 0.9,
        ("alpaca_eval", "m", "vs_base", "difference"): 5.0,
        ("alpaca_eval", "m", "vs_base", "standard_error"): 0.7,
        ("alpaca_eval", "m", "vs_base", "lower"): 3.6,
        ("ranker", "m"): 60.0,
        ("ranker", "standard_errors", "m"): 1.5,
    }
    values = {key: changes.standard_error(metrics, key) for key in metrics if not changes.is_error(key)}
    assert list(values.values()) == [0.9, 0.7, 1.5]


def test_the_published_results_are_found_with_their_errors() -> None:
    path = ROOT / "recipes/llama-3-8b/published.yaml"
    published = read_published(path)
    assert published
    assert published.open_llm_leaderboard
    rows = changes.list_published(documents.load_mapping(path.read_bytes(), str(path)), str(path))
    found = {key: (value, error) for key, value, error in rows}
    assert len(found) == len(rows) == 4 * 3 + 4 * 7
    assert found["alpaca_eval", "iter3", "win_rate"] == (39.85, 1.42)
    assert found["alpaca_eval", "iter3", "length_controlled_winrate"] == (38.77, 0.87)
    assert found["alpaca_eval", "base", "win_rate"] == (22.57, None)
    board = published.open_llm_leaderboard.models["iter1"]
    assert found["open_llm_leaderboard", "iter1", "mmlu_weighted"] == (board["mmlu"], None)
    assert found["open_llm_leaderboard", "iter1", "average_weighted"] == (board["average"], None)
    assert found["open_llm_leaderboard", "iter1", "gsm8k"] == (board["gsm8k"], None)
    assert ("open_llm_leaderboard", "iter1", "mmlu") not in found


@pytest.mark.parametrize(
    ("document", "parts"),
    [
        ({"published": "text"}, ["'published' is 'text'"]),
        ({"published": {"alpaca_eval": [1]}}, ["published", "'alpaca_eval' is [1]"]),
        ({"published": {"alpaca_eval": {"models": "text"}}}, ["published.alpaca_eval", "'models' is 'text'"]),
        ({"published": {"alpaca_eval": {"models": {"iter1": 5}}}}, ["published.alpaca_eval.models", "'iter1' is 5"]),
        ({"published": {"alpaca_eval": {"models": {"iter1": {"win_rate": "5"}}}}}, ["models.iter1", "'win_rate' is '5'"]),
        ({"published": {"open_llm_leaderboard": {"models": {"m": {"mmlu": 10**400}}}}}, ["models.m", "'mmlu' is 1000"]),
        (
            {"published": {"alpaca_eval": {"models": {"m": {"win_rate": 5, "standard_error": "x"}}}}},
            ["'standard_error' is 'x'"],
        ),
    ],
)
def test_odd_published_results_are_named(document: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(StageError) as error:
        changes.list_published(document, "published.yaml at HEAD")
    assert_message(str(error.value), "published.yaml at HEAD", *parts, "correct")


@pytest.mark.parametrize(
    "document",
    [{}, {"published": None}, {"published": {"alpaca_eval": {"models": {"iter1": None, "base": {"win_rate": None}}}}}],
)
def test_what_is_null_is_not_published(document: dict[str, Any]) -> None:
    assert changes.list_published(document, "published.yaml") == []


@pytest.mark.parametrize("iterations", [None, ["iter1"], "iter1", {"iter1": None}, {"iter1": {}}, {1: "base"}])
def test_odd_iterations_are_named(iterations: Any) -> None:
    with pytest.raises(StageError) as error:
        changes.read_starts({"iterations": iterations}, "params.yaml at HEAD")
    assert_message(str(error.value), "params.yaml at HEAD", f"'iterations' is {iterations!r}", "correct")


def test_iterations_are_read() -> None:
    assert changes.read_starts({"iterations": STARTS}, "x") == STARTS
    assert changes.read_starts({}, "x") == {}


def test_an_existing_model_follows_the_one_before() -> None:
    models = {name: {"repo": "./x"} for name in ("base", "iter1", "iter2")}
    starts = {"iter1": "base", "iter2": "iter1", "gpt": "iter2"}
    assert changes.read_starts({"models": models, "answers": {"gpt": "x.json"}}, "x") == starts
    assert changes.read_starts({"models": models, "answers": None}, "x") == {"iter1": "base", "iter2": "iter1"}
    assert changes.read_starts({"models": 3, "answers": [1]}, "x") == {}


def test_the_base_policy_is_named_as_in_the_parameters() -> None:
    assert changes.BASE == params.BASE
