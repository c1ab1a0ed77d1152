"""Evaluate a policy on tasks of the Open LLM Leaderboard with the unmodified lm-evaluation-harness 0.4.1."""

import argparse
import math
from pathlib import Path
from typing import Any

from stages.artifacts import files, harness_sets, models
from stages.engines.harness import TASKS, evaluate_tasks, read_score
from stages.runtime import params
from stages.runtime.errors import StageError
from stages.runtime.logs import log

MMLU_SUBJECTS = 57


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True, help="folder of the policy")
    parser.add_argument("--data-sets", type=Path, required=True, help="folder of the six data sets, from assets-harness")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder to write: the harness's results as one TASK.json per task, summary.json, and items.json with the score of "
        "every question",
    )


def main(args: argparse.Namespace) -> None:
    settings = params.load("evaluate_lm").evaluate_lm
    harness_sets.refuse_code(files.require(args.data_sets))
    tasks = harness_sets.select_tasks(settings.tasks)
    policy = models.check_policy(args.model)
    harness_sets.check_data_sets(args.data_sets, tasks)
    results = evaluate_tasks(policy, args.data_sets, tasks, settings.dtype, settings.batch_size)
    items = {task: result.pop("items") for task, result in results.items()}
    summary = summarize(results)
    with files.replacing(args.out) as partial:
        for task, result in results.items():
            files.write_json(result, partial / f"{task}.json")
        files.write_json(items, partial / "items.json")
        files.write_json(summary, partial / "summary.json")
    for task, row in summary.items():
        log.info("%s: %s %.1f +- %.1f on %d questions", task, row["metric"], row["value"], row["standard_error"], row["n"])
        if "cut" in row:
            log.warning(
                "%s: %d of %d prompts did not fit into the model and were cut off at the start", task, row["cut"], row["n"]
            )


def summarize(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Compute the Leaderboard's scores from the harness's results for each task.

    Returns task -> metric, shots, value and standard_error in percent, n: the number of questions, and, unless it is 0, cut:
    how many of these had a prompt that did not fit into the model. MMLU's value is the plain mean over its 57 subjects, its
    standard error that of a mean of independent values. Its `weighted` is the harness's own mean, weighted by the subjects'
    numbers of questions, and `weighted_standard_error` is sqrt(sum_i w_i^2 se_i^2), the error of that mean of independent
    values. The harness's own error is not used: for a group, lm-eval 0.4.1 (evaluator.evaluate) puts squared standard errors
    into the formula for the combined variance of samples, which gives about the standard deviation between the subjects instead
    of the standard error of their mean (0.144 for Mistral-7B; replaced in lm-evaluation-harness#1390).
    Raises StageError if a value is not a finite number or a subject is missing.
    """
    summary = {}
    for name, result in results.items():
        task, subtasks = TASKS[name], sorted(result["n"])
        if name == "mmlu" and len(subtasks) != MMLU_SUBJECTS:
            raise StageError(f"mmlu: {len(subtasks)} subjects instead of {MMLU_SUBJECTS}: reinstall lm-eval 0.4.1 (`make env`)")
        scores = result["results"]
        values, errors = zip(*(read_score(subtask, task, scores[subtask]) for subtask in subtasks), strict=True)
        summary[name] = {
            "metric": task.metric,
            "shots": task.shots,
            "value": 100 * math.fsum(values) / len(subtasks),
            "standard_error": 100 * math.hypot(*errors) / len(subtasks),
            "n": sum(result["n"].values()),
        }
        if "cut" in result:
            summary[name]["cut"] = sum(result["cut"].values())
        if name == "mmlu":
            sizes = [result["n"][subtask] for subtask in subtasks]
            weighted_errors = [size * error for size, error in zip(sizes, errors, strict=True)]
            summary[name]["weighted"] = 100 * scores[name][f"{task.metric},{task.filter}"]
            summary[name]["weighted_standard_error"] = 100 * math.hypot(*weighted_errors) / sum(sizes)
    return summary
