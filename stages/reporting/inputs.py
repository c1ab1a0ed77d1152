"""Read and check the evaluation results and training logs that the report is made from."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from stages.artifacts import files, schemas
from stages.artifacts.answers import read_answers
from stages.artifacts.preferences import is_preference
from stages.reporting import paired, per_item
from stages.reporting.paired import WEIGHTED, Preferences, Scores
from stages.reporting.per_item import REMEDY as REMEDY  # shared with the other readers of this package
from stages.runtime.errors import StageError, quote
from stages.runtime.logs import log

ALPACA_METRICS = ["length_controlled_winrate", "lc_standard_error", "win_rate", "standard_error", "avg_length"]
COUNTS = ("avg_length", "n_total", "n_failed")
"""Keys of AlpacaEval's metrics that are counts."""
COUNT_LIMIT = 1e9
"""Upper limit of anything counted: instructions, or characters of an answer."""
TOLERANCE = 1e-3
"""Percent points by which rounding to six digits may move the mean of preferences or scores."""


@dataclass(frozen=True)
class Evaluations:
    """The evaluation results of all models, each by model name in the order of params.yaml."""

    alpaca: dict[str, dict[str, Any]]
    harness: dict[str, dict[str, dict[str, Any]]]
    """Model -> task -> value, standard_error, metric and shots; for MMLU also weighted and weighted_standard_error."""
    preferences: dict[str, Preferences]
    scores: dict[str, Scores]
    answers: dict[str, list[dict[str, Any]]]


def read_evaluations(
    data: Path, models: list[str], tasks: list[str], answered: Iterable[str] = (), rankers: Iterable[str] = ()
) -> Evaluations:
    """Read the evaluation results of models. Raises StageError; warns about results of other models.

    models: those that both AlpacaEval and the harness evaluated, the latter on `tasks`. answered: those
    of which only answers exist, so that the harness did not evaluate them; they follow the others. rankers: those
    whose results, which `read_comparison` reads, are among AlpacaEval's.
    """
    names = [*models, *answered]
    for folder, expected in (("alpaca_eval", [*names, *rankers]), ("harness", models)):
        for unknown in sorted({path.name for path in files.require(data / folder).iterdir()} - set(expected)):
            log.warning("%s does not belong to a model in params.yaml and is ignored: remove it", data / folder / unknown)
    alpaca = {name: read_alpaca(data / "alpaca_eval" / name) for name in names}
    harness = {name: read_harness(data / "harness" / name, tasks) for name in models}
    answers = read_answers(data / "answers", names)
    return Evaluations(
        alpaca=alpaca,
        harness=harness,
        preferences=read_preferences(data / "alpaca_eval", answers, alpaca),
        scores=read_scores(data / "harness", harness),
        answers=answers,
    )


def require_number(value: Any, where: str, highest: float = 100) -> None:
    """Raise StageError if a value is not a number from 0 to `highest`. where: file and key."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= highest:
        raise StageError(f"{where} is {quote(value)}, expected a number from 0 to {highest:g}: {REMEDY}")


def read_alpaca(folder: Path) -> dict[str, Any]:
    """Read metrics.json of evaluate-alpaca. Raises StageError if a key is missing or a value out of range."""
    path = folder / "metrics.json"
    metrics: dict[str, Any] = files.read_json(path)
    for key in ("win_rate", "standard_error", "avg_length", "n_total", "judge"):
        if not isinstance(metrics, dict) or key not in metrics:
            raise StageError(f"{path}: {key!r} is missing: {REMEDY}")
    for key in [*ALPACA_METRICS, *COUNTS]:
        if key in metrics:
            require_number(metrics[key], f"{path}: {key!r}", COUNT_LIMIT if key in COUNTS else 100)
    for key in ("judge", "length_controlled_absent"):
        if key in metrics and (not isinstance(metrics[key], str) or not metrics[key].strip()):
            raise StageError(f"{path}: {key!r} is {quote(metrics[key])}, expected text: {REMEDY}")
    return metrics


def read_harness(folder: Path, tasks: list[str]) -> dict[str, dict[str, Any]]:
    """Read these tasks from summary.json of evaluate-lm. Raises StageError if one or a key is missing or out of range."""
    path = folder / "summary.json"
    summary: dict[str, dict[str, Any]] = files.read_json(path)
    for task in tasks:
        result = summary.get(task) if isinstance(summary, dict) else None
        numbers = ["value", "standard_error", *(["weighted", "weighted_standard_error"] if task == WEIGHTED else [])]
        for key in (*numbers, "metric", "shots"):
            if not isinstance(result, dict) or key not in result:
                raise StageError(f"{path}: '{task}.{key}' is missing: {REMEDY}")
        for key in numbers:
            require_number(summary[task][key], f"{path}: '{task}.{key}'")
        if "cut" in summary[task]:
            require_number(summary[task].get("n"), f"{path}: '{task}.n'", COUNT_LIMIT)
            require_number(summary[task]["cut"], f"{path}: '{task}.cut'", summary[task]["n"])
    return {task: summary[task] for task in tasks}


def read_preferences(
    folder: Path, answers: dict[str, list[dict[str, Any]]], alpaca: dict[str, dict[str, Any]]
) -> dict[str, Preferences]:
    """Read model -> preferences, to six digits, from each model's annotations.json, in the order of the answers.

    alpaca: model -> metrics of evaluate-alpaca. Raises StageError if the annotations are of other instructions, a preference is
    neither null, 0 nor a number from 1 to 2, fewer than two instructions have a preference for every model, or the preferences
    do not give the win rate in the metrics.
    """
    preferences = {}
    for name, outputs in answers.items():
        path = folder / name / "annotations.json"
        rows = files.read_records(path, ["instruction"])
        if len(rows) != len(outputs):
            raise StageError(f"{path}: {len(rows)} annotations of {len(outputs)} answers: {REMEDY}")
        for index, (row, output) in enumerate(zip(rows, outputs, strict=True)):
            if row["instruction"] != output["instruction"]:
                raise StageError(f"{path}: record {index}: 'instruction' is not that of answer {index} of {name}: {REMEDY}")
        preferences[name] = [read_preference(row, f"{path}: record {index}") for index, row in enumerate(rows)]
    complete = sum(None not in row for row in zip(*preferences.values(), strict=True))
    if complete < 2:
        raise StageError(f"{folder}: {complete} instructions have a preference for every model, expected at least 2: {REMEDY}")
    for name, values in preferences.items():
        value, path = paired.estimate_preferences(values)[0] - 100, folder / name / "annotations.json"
        require_same(value, alpaca[name]["win_rate"], f"{path}: the mean 'preference'", "'win_rate' in metrics.json")
    return preferences


def read_preference(row: dict[str, Any], where: str) -> float | None:
    """Return an annotation's preference, to six digits, 1.5 for a tie, or None. Raises StageError. where: file and record."""
    value = row.get("preference", "missing")
    if not is_preference(value):
        raise StageError(f"{where}: 'preference' is {quote(value)}, expected null, 0 or a number from 1 to 2: {REMEDY}")
    return None if value is None else per_item.shorten(value or 1.5)


def require_same(value: float, expected: float, where: str, key: str) -> None:
    """Raise StageError if a mean of preferences or scores differs from the one under `key` in the file beside it.

    where: file and what its mean is of.
    """
    if abs(value - expected) > TOLERANCE:
        raise StageError(f"{where} gives {value:.4f} percent, but {key} is {expected:.4f}: {REMEDY}")


def read_scores(folder: Path, harness: dict[str, dict[str, dict[str, Any]]]) -> dict[str, Scores]:
    """Read model -> scores, to six digits, from each model's items.json; tasks in the summary's order, subtasks sorted.

    harness: model -> summary of evaluate-lm. Raises StageError if a task is missing, the models did not answer the same
    questions, a score is not a number from 0 to 1, or the scores do not give the values in the summary.
    """
    scores: dict[str, Scores] = {}
    for name, summary in harness.items():
        path = folder / name / "items.json"
        scores[name] = read_items(path, list(summary))
        sizes, first = (paired.count_questions(model) for model in (scores[name], next(iter(scores.values()))))
        different = [key for key in sizes | first if sizes.get(key, 0) != first.get(key, 0)]
        if different:
            key, counts = different[0], f"{sizes.get(different[0], 0)} questions, {first.get(different[0], 0)}"
            raise StageError(f"{path}: '{key}' has {counts} in that of {next(iter(scores))}: {REMEDY}")
        estimates = paired.estimate_scores(scores[name])
        for task, result in summary.items():
            where, key = f"{path}: the mean of '{task}'", f"'{task}.value' in summary.json"
            require_same(estimates[task][0], result["value"], where, key)
            if task == WEIGHTED:
                where, key = f"{path}: '{WEIGHTED}'", "'mmlu.weighted' in summary.json"
                require_same(estimates["mmlu_weighted"][0], result["weighted"], where, key)
    return scores


def read_items(path: Path, tasks: list[str]) -> Scores:
    """Read these tasks from items.json: task -> subtask -> score per question. Raises StageError."""
    items = files.read_json(path)
    scores: Scores = {}
    for task in tasks:
        subtasks = items.get(task) if isinstance(items, dict) else None
        if not isinstance(subtasks, dict) or not subtasks:
            raise StageError(f"{path}: '{task}' is missing or not a mapping of subtasks to scores: {REMEDY}")
        scores[task] = {}
        for name, values in sorted(subtasks.items()):
            if not re.fullmatch(r"\w+", name, re.ASCII):  # a spreadsheet would run some other texts in harness.csv
                raise StageError(f"{path}: '{task}' has a subtask {quote(name)}, expected letters, digits and '_': {REMEDY}")
            if not isinstance(values, list) or len(values) < 2:
                raise StageError(f"{path}: '{task}.{name}' is {quote(values)}, expected at least two scores: {REMEDY}")
            for question, value in enumerate(values):
                require_number(value, f"{path}: '{task}.{name}': question {question}", 1)
            scores[task][name] = [per_item.shorten(value) for value in values]
    return scores


def read_comparison(path: Path, models: list[str]) -> dict[str, Any]:
    """Read comparison.json. Raises StageError if its models are not these in this order or a value is out of range."""
    comparison: dict[str, Any] = files.read_json(path)
    keys = {"models", "win_rates", "standard_errors", "n"}
    if not isinstance(comparison, dict) or set(comparison) != keys:
        raise StageError(f"{path}: expected a JSON object with exactly the keys {', '.join(sorted(keys))}: {REMEDY}")
    if comparison["models"] != models:
        raise StageError(f"{path}: 'models' is {quote(comparison['models'])}, expected {', '.join(models)}: {REMEDY}")
    for key in ("win_rates", "standard_errors"):
        rows = comparison[key]
        lengths = [len(row) if isinstance(row, list) else 0 for row in rows] if isinstance(rows, list) else []
        if lengths != [len(models)] * len(models):
            raise StageError(f"{path}: {key!r} is not a {len(models)} x {len(models)} matrix: {REMEDY}")
        for model, row in zip(models, rows, strict=True):
            for opponent, value in zip(models, row, strict=True):
                require_number(value, f"{path}: {key!r} of {model} against {opponent}")
    require_number(comparison["n"], f"{path}: 'n'", COUNT_LIMIT)
    return comparison


def read_training_log(path: Path) -> pd.DataFrame:
    """Read a training log: the columns schemas.LOG_COLUMNS, finite numbers, steps counted from 1. Raises StageError."""
    try:
        table = pd.read_csv(files.require(path))
    except (ValueError, OSError) as error:
        raise StageError(f"{path}: not a readable CSV file ({error}): {REMEDY}") from error
    if list(table.columns) != schemas.LOG_COLUMNS or table.empty:
        raise StageError(f"{path}: expected at least one row with the columns {', '.join(schemas.LOG_COLUMNS)}: {REMEDY}")
    numbers: pd.DataFrame = table.apply(pd.to_numeric, errors="coerce")
    invalid = ~(numbers.abs() < math.inf) | (table.dtypes == "bool")
    invalid["step"] |= table["step"] != range(1, len(table) + 1)
    if invalid.any(axis=None):
        row, column = (int(index[0]) for index in np.nonzero(invalid))
        value, name = quote(table.iloc[:, column].tolist()[row]), schemas.LOG_COLUMNS[column]
        expected = row + 1 if name == "step" else "a finite number"
        raise StageError(f"{path}: row {row}: {name!r} is {value}, expected {expected}: {REMEDY}")
    return numbers


def read_contamination(iteration: str, path: Path) -> int:
    """Read how many prompts of an iteration are also in AlpacaEval, as counted by split. Raises StageError."""
    record = files.read_json(path)
    counts = record.get("contaminated") if isinstance(record, dict) else None
    if not isinstance(counts, dict) or not isinstance(counts.get(iteration), int):
        raise StageError(f"{path}: 'contaminated.{iteration}' is missing or not an integer: {REMEDY}")
    return int(counts[iteration])
