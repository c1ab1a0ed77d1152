"""Differences between models that were evaluated on the same instructions and questions, with their standard errors.

Two models that answer the same items are compared item by item: the difference is the mean of the items' differences, and its
standard error that of this mean. It is smaller than that of two independent evaluations wherever the models find the same items
easy or hard. It is the error of the evaluation only: with another seed, the same experiment trains another model.

Pure Python: `stages.tools diff` runs where only DVC is installed.
"""

import math
from typing import Any

from stages.reporting import markdown

Preferences = list[float | None]
"""alpaca-eval's preference for each instruction, from 1 (the reference wins) to 2 (the model wins); None: no preference."""
Scores = dict[str, dict[str, list[float]]]
"""Task -> subtask -> score of each question: 0, 1 or, for truthfulqa_mc2, a fraction."""
Estimate = tuple[float, float]
"""A mean or difference in percent (points), and its standard error."""

WEIGHTED = "mmlu"
"""The task with several subtasks. Its value is their plain mean; lm-evaluation-harness's own weights them by their sizes."""
BEYOND_ERROR = "beyond evaluation error"
"""Heading of the column that says whether a difference exceeds the error of the evaluation."""
LEADERBOARD = 6
"""Number of tasks of the Open LLM Leaderboard v1. `evaluate_lm.tasks` may select fewer."""
PUBLISHED_AS = {"mmlu": "mmlu_weighted", "average": "average_weighted"}
"""Published column -> our result to compare with it, where the names differ: lm-evaluation-harness's own MMLU is weighted."""


def list_comparisons(iterations: dict[str, str], base: str) -> list[tuple[str, str]]:
    """List (model, opponent): each iteration against the base policy and, if that is another, the model it started from."""
    return list(dict.fromkeys((name, other) for name, start in iterations.items() for other in (base, start)))


def estimate_mean(values: list[float]) -> Estimate:
    """Compute the mean of at least two values and its standard error, from the sample's deviation (ddof 1), in percent.

    alpaca-eval and lm-evaluation-harness compute the standard errors of their means in the same way.
    """
    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return 100 * mean, 100 * math.sqrt(variance / len(values))


def average(estimates: list[Estimate], weights: list[int] | None = None) -> Estimate:
    """Average independent estimates, with equal weights by default."""
    weights = weights or [1] * len(estimates)
    value = math.fsum(weight * value for weight, (value, _) in zip(weights, estimates, strict=True))
    error = math.hypot(*[weight * error for weight, (_, error) in zip(weights, estimates, strict=True)])
    return value / sum(weights), error / sum(weights)


def subtract_preferences(a: Preferences, b: Preferences) -> Preferences:
    """Subtract b from a, instruction by instruction; None where either is None. Raises ValueError if the lengths differ."""
    return [None if x is None or y is None else x - y for x, y in zip(a, b, strict=True)]


def subtract_scores(a: Scores, b: Scores) -> Scores:
    """Subtract b from a, question by question. Raises ValueError or KeyError if the questions differ."""
    return {
        task: {name: [x - y for x, y in zip(scores, b[task][name], strict=True)] for name, scores in subtasks.items()}
        for task, subtasks in a.items()
    }


def count_questions(scores: Scores) -> dict[str, int]:
    """Return the number of questions by task.subtask."""
    return {f"{task}.{name}": len(values) for task, subtasks in scores.items() for name, values in subtasks.items()}


def estimate_preferences(preferences: Preferences) -> Estimate:
    """Compute the mean of the preferences (or differences of preferences) that are not None, and its error, in percent."""
    return estimate_mean([value for value in preferences if value is not None])


def estimate_scores(scores: Scores) -> dict[str, Estimate]:
    """Map each task to the mean of its scores (or differences of scores) and the standard error, in percent.

    A task's value is the plain mean of its subtasks' means. Adds averages as `add_averages` does, with MMLU's subjects weighted
    by their sizes. Subtasks and tasks are independent.
    """
    subtasks = {task: [estimate_mean(values) for values in by_name.values()] for task, by_name in scores.items()}
    sizes = [len(values) for values in scores.get(WEIGHTED, {}).values()]
    weighted = average(subtasks[WEIGHTED], sizes) if sizes else None
    return add_averages({task: average(values) for task, values in subtasks.items()}, weighted)


def add_averages(tasks: dict[str, Estimate], weighted: Estimate | None) -> dict[str, Estimate]:
    """Add to the estimates of the tasks: `average`, their plain mean; `mmlu_weighted`, given as `weighted` (None: MMLU is not
    among the tasks); and `average_weighted`, the mean with it.

    With fewer tasks than LEADERBOARD, the names of the averages say so, see `name_average`; a single task has no average.
    """
    estimates = dict(tasks)
    if len(tasks) > 1:
        estimates[name_average("average", len(tasks))] = average(list(tasks.values()))
    if weighted is not None:
        estimates[f"{WEIGHTED}_weighted"] = weighted
        if len(tasks) > 1:
            both = tasks | {WEIGHTED: weighted}
            estimates[name_average("average_weighted", len(tasks))] = average(list(both.values()))
    return estimates


def name_average(name: str, tasks: int) -> str:
    """Return the name of an average over this many tasks: `average` or, of fewer than LEADERBOARD, `average_of_4_tasks`."""
    return name if tasks == LEADERBOARD else f"{name}_of_{tasks}_tasks"


def list_columns(estimates: dict[str, Estimate]) -> list[str]:
    """Return the names of the tasks and of their plain average among the results of `add_averages`."""
    return [name for name in estimates if "weighted" not in name]


def compare_preferences(a: Preferences, b: Preferences) -> dict[str, Any]:
    """Compare two models' preferences on the same instructions.

    Returns `difference` of a's win rate minus b's in percentage points, its `standard_error`, the bounds `lower` and `upper` of
    its 95% confidence interval, how often a's preference is higher (`wins`), lower (`losses`) and the same (`ties`), and the
    number of instructions left out because either preference is None (`omitted`).
    """
    pairs = subtract_preferences(a, b)
    differences = [value for value in pairs if value is not None]
    value, error = estimate_mean(differences)
    return {
        "difference": value,
        "standard_error": error,
        "lower": value - markdown.INTERVAL * error,
        "upper": value + markdown.INTERVAL * error,
        "wins": sum(difference > 0 for difference in differences),
        "losses": sum(difference < 0 for difference in differences),
        "ties": sum(difference == 0 for difference in differences),
        "omitted": len(pairs) - len(differences),
    }


def exceeds(difference: float, error: float | None) -> bool | None:
    """Return whether a difference is significant at the 5% level (two-sided z-test); None if its standard error is unknown."""
    return None if error is None else abs(difference) > markdown.INTERVAL * error


def exceeds_published(difference: float, error: float | None, published_error: float | None) -> bool | None:
    """Return whether a difference from a published value exceeds the error of the two evaluations, taken as independent.

    Where no standard error is published, ours is used in its place. None if ours is unknown.
    """
    if error is None:
        return None
    return exceeds(difference, math.hypot(error, error if published_error is None else published_error))
