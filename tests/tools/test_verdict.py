"""Whether the verdict on two runs is right, against pandas and scipy."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from stages.reporting.paired import Preferences
from stages.tools import verdict
from stages.tools.changes import Key
from stages.tools.revisions import Revision
from stages.tools.verdict import AVERAGE, LC_WIN_RATE, LENGTH, WIN_RATE, Figure
from support.comparisons import REFERENCES, make_revision, replace_items

KL = ("training", "{model}", "kl")
LIMIT = "alpaca_eval.iter2.win_rate"
VALUE = st.integers(0, 100).map(lambda value: 1 + value / 100)
PREFERENCE = st.one_of(VALUE, VALUE, VALUE, st.none())
PAIRS = st.lists(st.tuples(PREFERENCE, PREFERENCE), min_size=6, max_size=40)


def make_run(values: Preferences, **changed: Any) -> Revision:
    """Return a run whose last model has these preferences; the others have none to speak of."""
    return make_revision({"iter1": [1.5, 1.4, *[1.3] * (len(values) - 2)], "iter2": values}, **changed)


def decide(a: Revision, b: Revision) -> str:
    return verdict.decide(verdict.list_figures(a, b))


@given(PAIRS, st.one_of(st.none(), st.floats(0.1, 60)))
def test_the_verdict_is_that_of_a_paired_test_and_of_the_noise(
    pairs: list[tuple[float | None, float | None]], limit: float | None
) -> None:
    frame = pd.DataFrame(pairs, columns=["old", "new"], dtype=float)
    assume(frame.count().min() > 1)
    assume(len(frame.dropna()) > 1)
    differences = 100 * (frame["new"] - frame["old"]).dropna()
    change, error = differences.mean(), stats.sem(differences)
    exceeds = [abs(change) > error * stats.norm.ppf(0.975)] + ([] if limit is None else [abs(change) > limit])
    for one in (error * stats.norm.ppf(0.975), limit or 1e9):
        assume(abs(abs(change) - one) > 1e-3 * (1 + error))
    word = "Better" if change > 0 else "Worse"
    expected = "Within noise" if not all(exceeds) else word if limit is not None else f"{word} in these runs"
    limits = {} if limit is None else {LIMIT: limit}
    a, b = (make_run(list(column), limits=limits) for column in zip(*pairs, strict=True))
    if abs(change) > 1e-9:
        assert decide(a, b) == expected
        opposite = {"Better": "Worse", "Worse": "Better"}
        assert decide(b, a) == " ".join(opposite.get(one, one) for one in expected.split())
    figure = verdict.list_figures(a, b)[WIN_RATE]
    assert figure.change == pytest.approx(change, abs=1e-9)
    assert figure.error == pytest.approx(error, abs=1e-9)
    assert figure.count == len(differences)


OLD: Preferences = [1.10, 1.90, 1.50, 1.60, 1.30, 1.20]
NEW: Preferences = [1.20, 1.95, 1.65, 1.70, 1.45, 1.30]
"""Better by 10.8 points; paired, the standard error is 1.5, independent, 16."""


def test_the_same_results_are_no_change() -> None:
    assert decide(make_run(OLD), make_run(OLD)) == "No change"
    assert decide(make_run(OLD), make_run(NEW)) == "Better in these runs"


@pytest.mark.parametrize(("limit", "word"), [(10.5, "Better"), (11.0, "Within noise"), (0.0, "Better in these runs")])
def test_the_noise_is_that_of_either_revision(limit: float, word: str) -> None:
    noisy = {"limits": {LIMIT: limit}}
    assert decide(make_run(OLD), make_run(NEW, **noisy)) == word
    assert decide(make_run(OLD, **noisy), make_run(NEW)) == word
    assert decide(make_run(OLD, limits={LIMIT: 0.1}), make_run(NEW, **noisy)) == word, "that of the second revision counts"


def test_without_preferences_the_evaluations_are_independent() -> None:
    a, b = make_run(OLD), replace_items(make_run(NEW), preferences={})
    figure = verdict.list_figures(a, b)[WIN_RATE]
    assert figure.error == pytest.approx(100 * np.hypot(stats.sem(OLD), stats.sem(NEW)))
    assert not figure.is_paired
    assert decide(a, b) == "Within noise"


@pytest.mark.parametrize(
    ("changed", "obstacle"),
    [
        ({"params": {verdict.JUDGE: "gpt-4o"}}, "different judge (gold and gpt-4o)"),
        ({"lock": {"assets_alpaca_eval": "other"}}, "different instructions"),
        ({"lock": {"answer_reference": "other"}}, "different reference outputs"),
        ({"lock": {"assets_alpaca_eval": "x", "answer_reference": "y"}}, "different instructions and reference outputs"),
        ({"lock": {"seed": 1, "assets_alpaca_eval": "other", "assets_harness": "harness42"}}, ""),
    ],
)
def test_results_of_another_evaluation_are_not_comparable(changed: dict[str, Any], obstacle: str) -> None:
    a, b = make_run(OLD), make_run(NEW, **changed)
    for figures in (verdict.list_figures(a, b), verdict.list_figures(b, a)):
        assert figures[WIN_RATE].obstacle in (obstacle, obstacle.replace("gold and gpt-4o", "gpt-4o and gold"))
        assert (verdict.decide(figures) == "Not comparable") == bool(obstacle)


def test_another_seed_draws_instructions_of_the_same_kind() -> None:
    a, b = make_run(OLD), make_run(NEW, lock={"seed": 7})
    figure = verdict.list_figures(a, b)[WIN_RATE]
    assert figure.error == pytest.approx(100 * np.hypot(stats.sem(OLD), stats.sem(NEW))), "these are other instructions"
    assert decide(a, b) == "Within noise"
    assert b.stages is not None
    b.stages["assets-model"]["params"]["params.yaml"]["layers"] = 3
    assert verdict.list_figures(a, b)[WIN_RATE].obstacle == "different reference outputs", "another base model wrote them"
    b.stages["assets-alpaca-eval"]["params"]["params.yaml"]["count"] = 100
    assert verdict.list_figures(a, b)[WIN_RATE].obstacle == "different instructions and reference outputs"


def test_evaluations_of_unknown_inputs_are_not_comparable() -> None:
    b = make_run(NEW)
    assert b.stages is not None
    del b.stages["answer-reference"]
    for figures in (verdict.list_figures(make_run(OLD), b), verdict.list_figures(b, make_run(OLD))):
        assert "reference outputs" in figures[WIN_RATE].obstacle
        assert verdict.decide(figures) == "Not comparable"
    assert verdict.select_upstream(b.stages, REFERENCES) == {}


def test_the_last_models_are_compared_under_their_own_names() -> None:
    """b has one more iteration; noise was measured for iter2."""
    before, after = np.array(OLD, dtype=float), np.array(NEW, dtype=float)
    four = {"iter1": OLD, "iter2": OLD, "iter3": NEW}
    starts = {"iter1": "base", "iter2": "iter1", "iter3": "iter2"}
    a, b = make_run(OLD, limits={LIMIT: 50.0}), make_revision(four, starts=starts, limits={LIMIT: 50.0})
    figure = verdict.list_figures(a, b)[WIN_RATE]
    assert figure.old == pytest.approx(100 * float(np.mean(before)) - 100)
    assert figure.new == pytest.approx(100 * float(np.mean(after)) - 100)
    assert (figure.count, figure.limit) == (6, None)
    assert figure.error == pytest.approx(100 * stats.sem(after - before))
    assert decide(a, b) == "Better in these runs"
    assert decide(b, a) == "Worse in these runs"
    assert a == make_run(OLD, limits={LIMIT: 50.0}), "the revision itself keeps its names"


@pytest.mark.parametrize(
    ("starts", "metrics"),
    [({}, {}), ({"iter1": "base", "iter9": "iter1"}, {}), (None, {("alpaca_eval", "iter2", "win_rate"): "x"})],
)
def test_missing_results_have_no_verdict(starts: dict[str, str] | None, metrics: dict[Key, Any]) -> None:
    changed: dict[str, Any] = {"metrics": metrics} | ({} if starts is None else {"starts": starts})
    assert decide(make_run(OLD), make_run(NEW, **changed)) == "No verdict"
    assert decide(make_run(NEW, **changed), make_run(OLD)) == "No verdict"


def make_lc(value: float, error: float = 0.5) -> dict[Key, float]:
    return {
        ("alpaca_eval", "iter2", "length_controlled_winrate"): value,
        ("alpaca_eval", "iter2", "lc_standard_error"): error,
    }


@pytest.mark.parametrize(
    ("change", "word"),
    [(5.0, "Better in these runs"), (1.0, "Better in these runs"), (-1.0, "Better in these runs"), (-5.0, "Mixed")],
)
def test_a_length_controlled_win_rate_that_falls_makes_the_verdict_mixed(change: float, word: str) -> None:
    """Its standard errors are independent: a change of 1.39 exceeds them."""
    a, b = make_run(OLD, metrics=make_lc(30)), make_run(NEW, metrics=make_lc(30 + change))
    assert decide(a, b) == word
    assert decide(b, a) == word.replace("Better", "Worse")


def test_the_figures_are_those_of_the_last_model() -> None:
    def make_metrics(shift: float) -> dict[Key, Any]:
        return {
            ("alpaca_eval", "iter1", "avg_length"): 1,
            ("alpaca_eval", "iter2", "avg_length"): 50 + shift,
            ("open_llm_leaderboard", "iter2", "average_of_4_tasks"): 40 + shift,
            ("open_llm_leaderboard", "iter2", "average_weighted_of_4_tasks"): 1,
            ("open_llm_leaderboard", "iter2", "standard_errors", "average_of_4_tasks"): 1.0,
            ("training", "iter2", "kl"): 1 + shift,
            ("training", "iter1", "kl"): 9,
        }

    limits = {"training.iter2.kl": 4.0, "alpaca_eval.iter2.avg_length": 2.0}
    a, b = make_run(OLD, metrics=make_metrics(0)), make_run(NEW, metrics=make_metrics(3), limits=limits)
    figures = verdict.list_figures(a, b)
    assert list(figures) == [WIN_RATE, AVERAGE, LENGTH, KL]
    assert {key: (figure.old, figure.new, figure.direction) for key, figure in figures.items() if key != WIN_RATE} == {
        AVERAGE: (40, 43, 1),
        LENGTH: (50, 53, 1),
        KL: (1, 4, 0),
    }
    assert LC_WIN_RATE not in figures


@pytest.mark.parametrize(
    ("change", "error", "limit", "obstacle", "direction"),
    [
        (3.0, 1.0, 2.0, "", 1),
        (-3.0, 1.0, 2.0, "", -1),
        (3.0, 2.0, 2.0, "", 0),
        (3.0, 1.0, 4.0, "", 0),
        (3.0, 1.0, None, "", 1),
        (3.0, None, 2.0, "", 1),
        (3.0, None, None, "", None),
        (0.0, None, None, "", 0),
        (3.0, 1.0, 2.0, "different judge", None),
        (None, 1.0, 2.0, "", None),
    ],
)
def test_a_change_must_exceed_every_known_limit(
    change: float | None, error: float | None, limit: float | None, obstacle: str, direction: int | None
) -> None:
    figure = Figure("x", ("worse", "better"), 1.0, 2.0, change, error, limit=limit, obstacle=obstacle)
    assert figure.direction == direction


def test_win_rates_of_all_models_keep_their_order() -> None:
    models = dict.fromkeys(["iter2", "iter1", "base"], OLD)
    figures = verdict.list_win_rates(make_revision(models), make_revision(models | {"iter1": NEW}, limits={LIMIT: 3.0}))
    assert list(figures) == ["base", "iter1", "iter2"]
    assert [round(figure.change or 0, 2) for figure in figures.values()] == [0, 10.83, 0]
    assert figures["iter2"].limit == 3
