"""The files that every report has, apart from its Markdown pages: metrics, items, the plots' data and the HTML page."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from stages.artifacts import files
from stages.reporting import markdown, page, pages, paired, per_item
from stages.reporting.inputs import ALPACA_METRICS, Evaluations
from stages.reporting.page import Background
from stages.reporting.pages import Comparisons
from stages.reporting.published import TASKS
from stages.runtime.params import BASE

SUMMARY = "summary.json"
"""The figures that DVC shows: dvc.yaml declares this file as the experiment's metrics."""


def write_reports(
    out: Path,
    title: str,
    sections: dict[str, str],
    evaluations: Evaluations,
    metrics: dict[str, Any],
    tables: dict[str, str],
    background: Background,
) -> None:
    """Write the reports to the folder `out`.

    sections: name -> Markdown page. metrics: the content of metrics.json. tables: name -> CSV, the data of the plots to draw.
    background: what only the HTML page shows.
    """
    for name, text in sections.items():
        write_text(text, out / f"{name}.md")
    for name, text in tables.items():
        write_text(text, out / f"{name}.csv")
    write_text(per_item.format_preferences(evaluations.preferences), out / per_item.PREFERENCES)
    write_text(per_item.format_scores(evaluations.scores), out / per_item.HARNESS)
    files.write_json(round_numbers(metrics), out / "metrics.json")
    write_text(json.dumps(summarize(metrics), indent=1) + "\n", out / SUMMARY)
    # The page shows all answers, so it needs no samples.
    bodies = {name.replace("_", "-"): text for name, text in sections.items() if name != "samples"}
    md5 = files.dvc_md5(out / "metrics.json")
    write_text(page.format_page(title, bodies, evaluations, metrics, tables, background, md5), out / "index.html")


def write_text(text: str, path: Path) -> None:
    """Write a text file atomically."""
    with files.replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def compare_models(evaluations: Evaluations, starts: dict[str, str]) -> tuple[Comparisons, Comparisons]:
    """Compare each model with the base policy and with the one it started from, or follows, item by item.

    starts: model -> the one it started from, or follows. Returns the results of `paired.compare_preferences`, and those of
    `paired.estimate_scores` of the scores' differences, for the pairs whose models both have preferences, or scores.
    """
    pairs = paired.list_comparisons(starts, BASE)
    preferences, scores = evaluations.preferences, evaluations.scores
    wins = {(a, b): paired.compare_preferences(preferences[a], preferences[b]) for a, b in pairs}
    tasks = {
        (a, b): paired.estimate_scores(paired.subtract_scores(scores[a], scores[b]))
        for a, b in pairs
        if a in scores and b in scores
    }
    return wins, tasks


def collect_metrics(
    evaluations: Evaluations, starts: dict[str, str], wins: Comparisons, tasks: Comparisons
) -> dict[str, dict[str, Any]]:
    """Collect the evaluation results for metrics.json, with the paired differences of `compare_models`, given its arguments and
    results, as `vs_base` and `vs_previous` (the model it started from, or follows)."""
    metrics: dict[str, dict[str, Any]] = {
        "alpaca_eval": {
            name: {key: values[key] for key in ALPACA_METRICS if key in values} for name, values in evaluations.alpaca.items()
        },
        "open_llm_leaderboard": {
            name: split_errors(pages.average_tasks(summary)) for name, summary in evaluations.harness.items()
        },
    }
    for name, start in starts.items():
        for key, opponent in (("vs_base", BASE), ("vs_previous", start)):
            win_rates = {column: value for column, value in wins[name, opponent].items() if column != "omitted"}
            metrics["alpaca_eval"][name][key] = win_rates
            if (name, opponent) in tasks:
                estimates = tasks[name, opponent]
                metrics["open_llm_leaderboard"][name][key] = {
                    task: {"difference": estimates[task][0], "standard_error": estimates[task][1]}
                    for task in paired.list_columns(estimates)
                }
    return metrics


def summarize(metrics: dict[str, Any]) -> dict[str, float]:
    """Select the figures of the last model that tell whether an experiment is better than another, for summary.json.

    metrics: the content of metrics.json, before rounding. Returns, in the order of DVC's columns, those that exist:
    `lc_win_rate` and `win_rate` (AlpacaEval, percent), `se` (the standard error of the latter), `vs_base` (the difference from
    the base policy's win rate, in percentage points), `kl` (from the reference, at the end of training, nats), `length`
    (average, characters) and `harness` (average of all six tasks, percent; none of fewer). Percentages have two decimals, as in
    the tables; kl has three significant digits.
    """
    model, alpaca = list(metrics["alpaca_eval"].items())[-1]
    harness = metrics["open_llm_leaderboard"].get(model, {})
    figures = {
        "lc_win_rate": alpaca.get("length_controlled_winrate"),
        "win_rate": alpaca["win_rate"],
        "se": alpaca["standard_error"],
        "vs_base": alpaca.get("vs_base", {}).get("difference"),
        "kl": metrics.get("training", {}).get(model, {}).get("kl"),
        "length": alpaca["avg_length"],
        "harness": harness.get("average") if harness.keys() >= set(TASKS) else None,
    }
    return {
        name: float(f"{value:.3g}") if name == "kl" else round(value, 2) for name, value in figures.items() if value is not None
    }


def summarize_comparison(comparison: dict[str, Any]) -> dict[str, Any]:
    """Return each model's win rate against the base, the first model, in percent, and the standard errors.

    comparison: the content of comparison.json.
    """
    rows = zip(comparison["models"], comparison["win_rates"], comparison["standard_errors"], strict=True)
    return split_errors({name: (rates[0], errors[0]) for name, rates, errors in rows})


def split_errors(results: dict[str, tuple[float, float]]) -> dict[str, Any]:
    """Turn name -> (value, standard error) into name -> value, with the errors under `standard_errors`."""
    errors = {name: error for name, (_, error) in results.items()}
    return {name: value for name, (value, _) in results.items()} | {"standard_errors": errors}


def round_numbers(value: Any) -> Any:
    """Round the floats in nested mappings to six significant digits."""
    if isinstance(value, dict):
        return {key: round_numbers(inner) for key, inner in value.items()}
    return per_item.shorten(value) if isinstance(value, float) else value


def make_tables(evaluations: Evaluations) -> dict[str, str]:
    """Make the CSV files that the plots of the evaluations are drawn from: name without suffix -> content."""
    win_rates = [
        add_interval(name, "win_rate", metrics["win_rate"], metrics["standard_error"])
        for name, metrics in evaluations.alpaca.items()
    ]
    lengths = [add_interval(name, "average_length", *average_length(outputs)) for name, outputs in evaluations.answers.items()]
    return {
        "win_rate": pd.DataFrame(win_rates).to_csv(index=False),
        "length": pd.DataFrame(lengths).to_csv(index=False),
    }


def add_interval(model: str, name: str, value: float, error: float) -> dict[str, Any]:
    """Make a plot's row: a model's value under `name`, and the bounds `lower` and `upper` of its 95% confidence interval."""
    margin = markdown.INTERVAL * error
    bounds = {name: value, "lower": value - margin, "upper": value + margin}
    return {"model": model} | {key: round(bound, 4) for key, bound in bounds.items()}


def average_length(outputs: list[dict[str, Any]]) -> tuple[float, float]:
    """Compute the mean length of answers in characters, and its standard error with ddof 1, as alpaca-eval's errors.

    alpaca-eval's avg_length is this mean without its decimals.
    """
    lengths = np.array([len(row["output"]) for row in outputs])
    return float(lengths.mean()), float(lengths.std(ddof=1)) / math.sqrt(len(lengths))
