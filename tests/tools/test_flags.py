"""What the page of differences warns of."""

from typing import Any

import pytest

from stages.reporting.paired import Preferences
from stages.tools import flags, verdict
from stages.tools.changes import Key
from stages.tools.flags import Flags
from stages.tools.revisions import Revision
from support.comparisons import make_revision, replace_items

OLD: Preferences = [1.10, 1.90, 1.50, 1.60, 1.30, 1.20]
NEW: Preferences = [1.20, 1.95, 1.65, 1.70, 1.45, 1.30]
MODELS = {"base": OLD, "iter1": OLD, "iter2": OLD}
BETTER = MODELS | {"iter2": NEW}
LENGTH, LC, LC_ERROR = (
    ("alpaca_eval", "iter2", name) for name in ("avg_length", "length_controlled_winrate", "lc_standard_error")
)
AVERAGE = ("open_llm_leaderboard", "iter2", "average")
AVERAGE_ERROR = ("open_llm_leaderboard", "iter2", "standard_errors", "average")


def find(a: Revision, b: Revision) -> Flags:
    return flags.find_flags(a, b, verdict.list_figures(a, b))


def make(metrics: dict[Key, float], preferences: Any = BETTER, **changed: Any) -> Revision:
    return make_revision(preferences, metrics=metrics, **changed)


def training(name: str, *values: float) -> dict[Key, float]:
    """Return a metric of iter1, iter2 and so on."""
    return {("training", f"iter{index + 1}", name): value for index, value in enumerate(values)}


def test_a_better_run_has_no_flags() -> None:
    healthy = training("kl", 0.7, 0.8) | training("chosen_log_ratio", 0.3, 0.4) | training("clipped_steps", 0.5, 0.99)
    assert find(make(healthy, MODELS), make(healthy | training("kl", 1.3, 1.5))) == Flags([], [])


@pytest.mark.parametrize(("name", "good", "bad"), [("chosen_log_ratio", 0.1, -0.1), ("clipped_steps", 0.9, 1)])
def test_what_went_wrong_in_training_is_new_or_known(name: str, good: float, bad: float) -> None:
    a, b = make(training(name, bad, good), MODELS), make(training(name, bad, bad, bad))
    found = find(a, b)
    assert [(len(found.new), len(found.known))] == [(1, 1)]
    assert found.new[0].endswith("iter2, iter3")
    assert found.known[0].endswith("iter1")
    assert find(b, a).new == []


@pytest.mark.parametrize(
    ("old", "new", "limit", "flagged"),
    [(1.0, 2.0, None, True), (1.0, 1.9, None, False), (1.0, 2.5, 2.0, False), (1.0, 2.5, 1.0, True), (0.0, 1.0, None, False)],
)
def test_a_kl_that_doubled_beyond_noise_is_named(old: float, new: float, limit: float | None, flagged: bool) -> None:
    limits = None if limit is None else {"training.iter2.kl": limit}
    a, b = make(training("kl", 5.0, old), MODELS), make(training("kl", 5.0, new), limits=limits)
    expected = [f"KL from the reference rose: iter2 {old:.2f} to {new:.2f} nats"] if flagged else []
    assert find(a, b).new == expected
    assert find(b, a).new == []


@pytest.mark.parametrize(
    ("old", "new", "limit", "words"),
    [
        (100, 111, None, "11% longer"),
        (100, 109, None, ""),
        (100, 88, None, "12% shorter"),
        (100, 111, 12.0, ""),
        (0, 9, None, ""),
    ],
)
def test_a_change_of_length_is_named(old: int, new: int, limit: float | None, words: str) -> None:
    limits = None if limit is None else {"alpaca_eval.iter2.avg_length": limit}
    found = find(make({LENGTH: old}, MODELS), make({LENGTH: new}, limits=limits)).new
    assert len(found) == bool(words)
    assert not words or (words in found[0] and "no length-controlled" in found[0])


@pytest.mark.parametrize(("change", "words"), [(5.0, ""), (1.0, "did not rise"), (-5.0, "fell (-5.00)")])
def test_a_gain_must_hold_under_length_control(change: float, words: str) -> None:
    """Two standard errors of 0.5: a change of 1.39 exceeds them."""
    a, b = make({LC: 30, LC_ERROR: 0.5}, MODELS), make({LC: 30 + change, LC_ERROR: 0.5})
    found = find(a, b).new
    assert len(found) == bool(words)
    assert not words or words in found[0]
    assert find(make({LC: 30, LC_ERROR: 0.5}, MODELS), make({LC: 30 + change, LC_ERROR: 0.5}, MODELS)).new == [], "no gain"


def test_a_leaderboard_that_fell_is_named() -> None:
    a, b = make({AVERAGE: 40.0, AVERAGE_ERROR: 1.0}, MODELS), make({AVERAGE: 35.0, AVERAGE_ERROR: 1.0})
    assert find(a, b).new == ["the leaderboard average fell (-5.00)"]
    assert find(b, a).new == []


def test_results_that_are_missing_are_named() -> None:
    a = make({}, MODELS)
    assert find(a, make_revision({"iter2": NEW})).new == ["no win rate of iter1: not evaluated"]
    assert find(a, make_revision(MODELS | {"iter1": [None, None, *OLD[2:]]})).new == [
        "the judge gave no preference for 2 answers of iter1"
    ]
    assert find(make_revision(MODELS | {"iter1": [None, *OLD[1:]]}), a).new == []


def with_answers(revision: Revision, md5: str) -> Revision:
    assert revision.stages is not None
    revision.stages["answer"] = {"outs": [{"path": "data/answers/iter1.json", "md5": md5}]}
    return revision


def test_a_judge_that_changed_its_mind_is_named() -> None:
    changed = MODELS | {"iter1": NEW}
    flag = "the judge's preferences changed on the same answers of iter1"
    for answers, preferences, expected in (("a", changed, [flag]), ("b", changed, []), ("a", MODELS, [])):
        a, b = with_answers(make_revision(MODELS), "a"), with_answers(make_revision(preferences), answers)
        assert find(a, b).new == expected
        assert find(a, replace_items(b, instructions="other")).new == [], "on other instructions"
