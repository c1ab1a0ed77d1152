"""A small data folder for the report to read, and the tables of its pages."""

from pathlib import Path
from typing import Any

from stages.artifacts import files, schemas
from stages.artifacts import tables as parquet
from stages.reporting.published import TASKS
from support import tables

QUESTIONS = ["Why?", "Who?"]
ALPACA: dict[str, Any] = {
    "length_controlled_winrate": 23.0,
    "lc_standard_error": 0.9,
    "win_rate": 22.654321,
    "standard_error": 1.4,
    "avg_length": 1900,
    "n_total": 805,
    "judge": "gold",
}
HARNESS: dict[str, dict[str, Any]] = {
    task: {"value": 50.0, "standard_error": 1.0, "shots": 5, "metric": "acc"} for task in TASKS
}
HARNESS["mmlu"] |= {"weighted": 52.0, "weighted_standard_error": 2.0}
PREFERENCES = {"base": [1.1, 1.35308642], "iter1": [1.3, 1.15308642]}
"""Preferences for the answers of `write_evaluations`, with ALPACA's win rate."""
ITEMS: dict[str, dict[str, dict[str, list[float]]]] = {
    "base": {task: {task: [0, 1]} for task in TASKS[:-1]} | {"mmlu": {"mmlu_law": [0.8, 0], "mmlu_art": [1, 0.8, 0]}},
    "iter1": {task: {task: [0.25, 0.75]} for task in TASKS[:-1]} | {"mmlu": {"mmlu_law": [0.3, 0.5], "mmlu_art": [1, 0.8, 0]}},
}
"""Scores of single questions, with HARNESS's values."""
COMPARISON: dict[str, Any] = {
    "models": ["base", "iter1"],
    "win_rates": [[50, 40], [60, 50]],
    "standard_errors": [[0, 1], [1, 0]],
    "n": 9,
}
LOG = (
    "step,loss,learning_rate,gradient_norm,clipped,chosen_log_ratio,rejected_log_ratio,kl\n"
    "1,6.25,0,41,1,0,-3e-07,2e-13\n"
    "2,5.25,5e-05,39,0,0.5,-1.5,0.75\n"
)
UPDATE = {"steps": 2, "effective_steps": 1, "weights": 1000, "changed": 0.75, "survived": 0.875}
"""train's summary of the update of LOG's two steps, the first of which has a learning rate of 0."""
RECORD = {
    "python": "3.11",
    "tools": {"torch": "2.13.0", "alpaca-eval": "0.6.6"},
    "numerics": "fast",
    "device": {"kind": "a_gpu", "count": 8},
}


def read_rows(markdown: str) -> list[list[str]]:
    """Return the cells of all tables in a Markdown text, row by row, headers and rules included."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines() if line.startswith("|")]


def write_evaluations(data: Path) -> None:
    """Write the evaluation results of base and iter1."""
    for name in ("base", "iter1"):
        files.write_json(ALPACA, data / "alpaca_eval" / name / "metrics.json")
        annotations = [
            {"instruction": text, "preference": value} for text, value in zip(QUESTIONS, PREFERENCES[name], strict=True)
        ]
        files.write_json(annotations, data / "alpaca_eval" / name / "annotations.json")
        files.write_json(HARNESS, data / "harness" / name / "summary.json")
        files.write_json(ITEMS[name], data / "harness" / name / "items.json")
        answers = [{"instruction": text, "output": f"{name} says so."} for text in QUESTIONS]
        files.write_json(answers, data / "answers" / f"{name}.json")
    files.write_json(COMPARISON, data / "comparison.json")


def write_iteration(data: Path) -> None:
    """Write what health reads of iter1: two prompts, one of them with a tie, and two training steps."""
    parquet.write(tables.responses(), schemas.RESPONSES, data / "responses" / "iter1.parquet")
    parquet.write(tables.rankings(), schemas.RANKINGS, data / "rankings" / "iter1.parquet")
    parquet.write(tables.pairs()[1:], schemas.PAIRS, data / "pairs" / "iter1.parquet")
    (data / "logs").mkdir(parents=True)
    (data / "logs" / "iter1.csv").write_text(LOG)
    files.write_json(UPDATE, data / "logs" / "iter1.json")
    files.write_json({"contaminated": {"iter1": 7}}, data / "split" / "contamination.json")


def write_provenance(data: Path) -> None:
    """Write assets, and the records of three stages, one of them of an iteration that params.yaml does not have."""
    for name in ("models/base", "ranker", "alpaca_eval_set", "harness_sets"):
        (data / name).mkdir(parents=True)
        (data / name / "file").write_text(name)
    (data / "prompts.parquet").write_bytes(b"prompts")
    for name in ("split", "train@iter1", "train@dropped"):
        files.write_json(RECORD, data / "records" / f"{name}.json")
