"""Read and check the evaluation results and training logs that the report is made from."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from stages.artifacts import files, schemas
from stages.reporting.published import TASKS
from stages.runtime.errors import StageError, quote
from stages.runtime.logs import log
from stages.runtime.params import BASE

ALPACA_METRICS = ["length_controlled_winrate", "lc_standard_error", "win_rate", "standard_error", "avg_length"]
COUNT_LIMIT = 1e9
"""Upper limit of anything counted: instructions, or characters of an answer."""
REMEDY = "recreate it with `dvc repro`"


@dataclass(frozen=True)
class Evaluations:
    """The evaluation results of all models, each by model name in the order of params.yaml."""

    alpaca: dict[str, dict[str, Any]]
    harness: dict[str, dict[str, dict[str, Any]]]
    """Model -> task -> value, standard_error, metric and shots."""
    answers: dict[str, list[dict[str, Any]]]
    comparison: dict[str, Any]
    """comparison.json; its lists are in the order of the models."""


def read_evaluations(data: Path, models: list[str]) -> Evaluations:
    """Read the evaluation results of these models. Raises StageError; warns about results of other models."""
    for folder in ("alpaca_eval", "harness"):
        for unknown in sorted({path.name for path in files.require(data / folder).iterdir()} - set(models)):
            log.warning("%s does not belong to a model in params.yaml and is ignored: remove it", data / folder / unknown)
    return Evaluations(
        alpaca={name: read_alpaca(data / "alpaca_eval" / name) for name in models},
        harness={name: read_harness(data / "harness" / name) for name in models},
        answers=read_answers(data / "answers", models),
        comparison=read_comparison(data / "comparison.json", models),
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
    for key in [*ALPACA_METRICS, "n_total"]:
        if key in metrics:
            require_number(metrics[key], f"{path}: {key!r}", COUNT_LIMIT if key in ("avg_length", "n_total") else 100)
    return metrics


def read_harness(folder: Path) -> dict[str, dict[str, Any]]:
    """Read summary.json of evaluate-lm. Raises StageError if a task or key is missing or a value out of range."""
    path = folder / "summary.json"
    summary: dict[str, dict[str, Any]] = files.read_json(path)
    for task in TASKS:
        result = summary.get(task) if isinstance(summary, dict) else None
        for key in ("value", "standard_error", "metric", "shots"):
            if not isinstance(result, dict) or key not in result:
                raise StageError(f"{path}: '{task}.{key}' is missing: {REMEDY}")
        for key in ("value", "standard_error"):
            require_number(summary[task][key], f"{path}: '{task}.{key}'")
    return summary


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


def read_answers(folder: Path, models: list[str]) -> dict[str, list[dict[str, Any]]]:
    """Read model -> its answers. Raises StageError unless all models answer the same instructions in the same order."""
    answers = {name: files.read_records(folder / f"{name}.json", ["instruction", "output"]) for name in models}
    instructions = [row["instruction"] for row in answers[BASE]]
    for name, rows in answers.items():
        if [row["instruction"] for row in rows] != instructions:
            path = folder / f"{name}.json"
            raise StageError(f"{path}: its instructions or their order differ from {BASE}.json: {REMEDY}")
    return answers


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
