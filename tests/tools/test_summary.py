"""The top of the page of differences, as a reader sees it."""

from pathlib import Path
from typing import Any

import pytest

from stages.reporting.paired import Preferences
from stages.tools import summary
from stages.tools.changes import Key
from stages.tools.revisions import Revision
from support.comparisons import make_revision

OLD: Preferences = [1.10, 1.90, 1.50, 1.60, 1.30, 1.20]
NEW: Preferences = [1.20, 1.95, 1.65, 1.70, 1.45, 1.30]
"""Win rates of 43.33 and 54.17; the mean change is 10.83 ± 1.54, so that its 95% interval is 7.82 to 13.85."""
LIMITS = {"alpaca_eval.iter2.win_rate": 6.0}
KL: Key = ("training", "iter2", "kl")


def make(values: Any, title: str, **changed: Any) -> Revision:
    return make_revision({"base": OLD, "iter1": OLD, "iter2": values}, title, **changed)


def summarize(a: Revision, b: Revision, folder: str = "") -> list[str]:
    return summary.summarize(a, b, Path(folder)).splitlines()


def test_the_first_lines_say_whether_by_how_much_and_why() -> None:
    a, b = make(OLD, "main (abc)"), make(NEW, "workspace", limits=LIMITS, lock={"eta": 20})
    lines = summarize(a, b)
    assert lines[0] == "# Better: win rate of iter2 +10.83 points"
    for part in ("main (abc)", "workspace", "43.33% → 54.17%", "+7.82 to +13.85", "paired over 6", "This exceeds", "6.00"):
        assert part in lines[2]
    assert lines[4] == "Changed: eta 10 → 20."
    assert summarize(b, a)[0] == "# Worse: win rate of iter2 -10.83 points"
    assert summarize(a, b, "recipes/x")[0] == "# recipes/x: Better: win rate of iter2 +10.83 points"


@pytest.mark.parametrize(
    ("limits", "word", "sentence"),
    [
        ({"alpaca_eval.iter2.win_rate": 12.0}, "Within noise", "This does not exceed the noise between runs"),
        (None, "Better in these runs", "The noise between runs is not known."),
    ],
)
def test_the_noise_between_runs_is_part_of_the_verdict(limits: Any, word: str, sentence: str) -> None:
    lines = summarize(make(OLD, "a"), make(NEW, "b", limits=limits))
    assert lines[0] == f"# {word}: win rate of iter2 +10.83 points"
    assert sentence in lines[2]


def test_the_figures_are_in_a_table_with_a_verdict_each() -> None:
    length: Key = ("alpaca_eval", "iter2", "avg_length")
    a = make(OLD, "a", metrics={length: 50, KL: 0.02, ("ranker", "iter2"): 60.0})
    b = make(NEW, "b", metrics={length: 70, KL: 0.0523, ("ranker", "iter2"): 60.0}, limits=LIMITS | {"training.iter2.kl": 0.05})
    table = [line.replace("\u00a0", " ") for line in summarize(a, b) if line.startswith("| ")]
    assert [line.split(" | ")[0].strip("| ") for line in table[2:]] == [
        "win rate (%)",
        "answer length (characters)",
        "KL from the reference (nats)",
        "win rate over base, by the ranker (%)",
    ]
    assert [line.strip("| ").split(" | ")[1:] for line in table[2:]] == [
        ["43.33 → 54.17", "+10.83", "**▲ better**", "+7.82 to +13.85, paired", "±6.00"],
        ["50 → 70", "+20", "**? noise unknown**", "–", "–"],
        ["0.02 → 0.0523", "+0.0323", "**≈ within noise**", "–", "±0.05"],
        ["60.00 → 60.00", "+0.00", "**= same**", "–", "–"],
    ]


def test_no_more_than_five_figures_are_shown() -> None:
    names: list[Key] = [
        ("alpaca_eval", "iter2", "length_controlled_winrate"),
        ("alpaca_eval", "iter2", "avg_length"),
        ("open_llm_leaderboard", "iter2", "average"),
        ("ranker", "iter2"),
        KL,
    ]
    lines = summarize(make(OLD, "a", metrics=dict.fromkeys(names, 1.0)), make(NEW, "b", metrics=dict.fromkeys(names, 2.0)))
    table = [line for line in lines if line.startswith("| ")]
    assert len(table) == 2 + 5
    assert not [line for line in table if "ranker" in line]


def test_a_mixed_verdict_states_both_win_rates() -> None:
    lc: dict[Key, float] = {("alpaca_eval", "iter2", "lc_standard_error"): 0.5}
    key: Key = ("alpaca_eval", "iter2", "length_controlled_winrate")
    lines = summarize(make(OLD, "a", metrics=lc | {key: 30.0}), make(NEW, "b", metrics=lc | {key: 25.0}))
    assert lines[0] == "# Mixed: win rate of iter2 +10.83 points, length-controlled -5.00"


def test_another_judge_has_no_chart_and_no_interval() -> None:
    lines = summarize(make(OLD, "a"), make(NEW, "b", params={("evaluate_alpaca", "judge"): "<b>`x`"}))
    assert lines[0] == "# Not comparable: different judge (gold and &lt;b&gt;\\`x\\`)"
    assert "not win rates in the same evaluation" in lines[2]
    text = "\n".join(lines)
    assert "**not\u00a0comparable**" in text
    assert "paired" not in text
    assert "```" not in text


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"starts": {}}, "params.yaml at b names no models"),
        ({"starts": {"iter1": "base", "iter9": "iter1"}}, "no win rate of iter9 at b"),
    ],
)
def test_a_missing_verdict_has_a_reason(changed: Any, reason: str) -> None:
    assert summarize(make(OLD, "a"), make(NEW, "b", **changed))[0] == f"# No verdict: {reason}"


def test_an_experiment_that_never_ran_has_no_results() -> None:
    a, b = Revision("a", {}, None, None), Revision("b", {}, None, None)
    assert summarize(a, b, "recipes/x") == ["# recipes/x: No verdict: no results at a and b", "", "From a to b."]


def test_new_warnings_come_before_known_ones() -> None:
    clipped: dict[Key, float] = {("training", "iter1", "clipped_steps"): 1.0}
    more: dict[Key, float] = {("training", "iter2", "clipped_steps"): 1.0}
    lines = summarize(make(OLD, "a_b", metrics=clipped), make(NEW, "b", metrics=clipped | more))
    assert [line for line in lines if line.startswith("- ")] == [
        "- ⚠️ **The gradient was clipped at every step of iter2**",
        "- Already at a\\_b: the gradient was clipped at every step of iter1.",
    ]
    assert "- No new warnings." in summarize(make(OLD, "a"), make(NEW, "b"))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda lock: lock["train"]["params"]["params.yaml"].update(eta=20, beta="x|y"), 'eta 10 → 20, beta – → "x\\|y"'),
        (lambda lock: lock["code"]["outs"][-1].update(md5="d"), "code of train"),
        (lambda lock: lock["train"]["deps"].append({"path": "my.csv", "md5": "1"}), "my.csv"),
        (lambda lock: lock["train"]["outs"][0].update(md5="d"), "neither parameters nor code nor files"),
        (lambda lock: lock.update(more=lock["train"] | {"params": {}}), "neither parameters nor code nor files"),
    ],
)
def test_the_inputs_that_changed_are_named(change: Any, expected: str) -> None:
    a, b = make(OLD, "a"), make(NEW, "b")
    change(b.stages)
    (line,) = [line for line in summarize(a, b) if line.startswith("Changed: ")]
    assert expected in line


def test_many_changed_inputs_are_counted() -> None:
    a, b = make(OLD, "a"), make(NEW, "b")
    assert b.stages is not None
    b.stages["train"]["params"]["params.yaml"].update({f"x{index}": "y" * 200 for index in range(7)})
    (line,) = [line for line in summarize(a, b) if line.startswith("Changed: ")]
    assert line.endswith(", and 3 more.")
    assert len(line) < 4 * 100


def test_changes_and_win_rates_of_all_models_are_drawn() -> None:
    a, b = make(OLD, "main"), make(NEW, "b", limits=LIMITS)
    text = summary.summarize(a, b, Path())
    chart = text.partition("```text\n")[2].partition("```")[0].splitlines()
    assert [line.split()[:2] for line in chart[:-1]] == [["base", "+0.00"], ["iter1", "+0.00"], ["iter2", "+10.83"]]
    assert "noise between runs:" in text
    rates = summary.draw_win_rates(a, b).partition("```text\n")[2].splitlines()
    assert [line.split()[0] for line in rates[:6]] == ["base", "43.33", "iter1", "43.33", "iter2", "54.17"]
    assert [("○" in line, "●" in line) for line in rates[:6]] == [(True, False), (False, True)] * 3
    assert summary.draw_win_rates(a, a) == ""
    assert "```" not in summary.summarize(a, a, Path())
