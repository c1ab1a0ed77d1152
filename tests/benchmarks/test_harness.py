from typing import Any

import pytest

from benchmarks import harness
from stages.engines.harness import TASKS

SCORES = {"hellaswag": 0.25, "arc_challenge": 0.5}


def make_results(task: str, score: float) -> dict[str, Any]:
    return {f"{TASKS[task].metric},none": score, f"{TASKS[task].metric}_stderr,none": 0.1, "acc,none": 0.75}


def test_the_metric_is_the_leaderboards() -> None:
    results = {task: {task: make_results(task, score)} for task, score in SCORES.items()}
    assert harness.read_scores(results) == SCORES


def test_scores_may_differ_by_rounding_only() -> None:
    harness.check_scores(SCORES, SCORES | {"hellaswag": 0.2500001})
    for other in (SCORES | {"hellaswag": 0.26}, {"hellaswag": 0.25}):
        with pytest.raises(AssertionError):
            harness.check_scores(SCORES, other)


def test_the_longest_task_is_first_and_dominates() -> None:
    assert list(harness.QUESTIONS) == [task for task in TASKS if task in harness.QUESTIONS]
    longest, *others = harness.QUESTIONS.values()
    assert longest > sum(others)
