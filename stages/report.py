"""Write the versioned reports: Markdown tables, metrics.json, the data of DVC's plots, and an HTML page."""

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from stages.artifacts import files
from stages.artifacts.schemas import model_names
from stages.reporting import health, markdown, page, pages, paired, per_item, provenance
from stages.reporting.health import Health
from stages.reporting.inputs import ALPACA_METRICS, Evaluations, read_evaluations
from stages.reporting.pages import Comparisons
from stages.reporting.published import TASKS, read_published
from stages.runtime import params
from stages.runtime.params import BASE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this stage."""
    parser.add_argument("--data", type=Path, required=True, help="the folder of all other stages' outputs")
    parser.add_argument("--published", type=Path, required=True, help="published.yaml: the published results to compare with")
    parser.add_argument("--out", type=Path, required=True, help="folder of the reports")


def main(args: argparse.Namespace) -> None:
    """Read the outputs of all other stages and write the reports."""
    settings = params.load("numerics", "seed", "eta", "iterations", "assets", "generate", "rank", "lengths", "train")
    published = read_published(args.published)
    evaluations = read_evaluations(args.data, model_names(settings.iterations))
    training = {name: health.measure_health(name, args.data, settings.eta, settings.train) for name in settings.iterations}
    wins, tasks = compare_models(evaluations, settings.iterations)

    markdown_pages = {
        "alpaca_eval": pages.format_alpaca_eval(evaluations.alpaca, wins, published),
        "open_llm_leaderboard": pages.format_leaderboard(evaluations.harness, tasks, published),
        "ranker": pages.format_ranker(evaluations.comparison),
        "health": health.format_health({name: result.metrics for name, result in training.items()}),
        "samples": pages.format_samples(evaluations.answers, settings.seed),
        "provenance": provenance.format_provenance(settings, args.data),
    }
    for name, text in markdown_pages.items():
        write_text(text, args.out / f"{name}.md")
    for name, text in make_csv(evaluations, training).items():
        write_text(text, args.out / f"{name}.csv")
    write_text(per_item.format_preferences(evaluations.preferences), args.out / per_item.PREFERENCES)
    write_text(per_item.format_scores(evaluations.scores), args.out / per_item.HARNESS)
    metrics = collect_metrics(evaluations, training)
    add_differences(metrics, settings.iterations, wins, tasks)
    files.write_json(round_numbers(metrics), args.out / "metrics.json")

    title = "SPPO: " + ", ".join(f"{name} from {start}" for name, start in settings.iterations.items())
    # The page shows all answers, so it needs no samples.
    sections = {name.replace("_", "-"): text for name, text in markdown_pages.items() if name != "samples"}
    plots = page.draw_plots(args.out)
    write_text(page.render_html(title, sections, plots, join_answers(evaluations.answers)), args.out / "index.html")


def write_text(text: str, path: Path) -> None:
    """Write a text file atomically."""
    with files.replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def compare_models(evaluations: Evaluations, iterations: dict[str, str]) -> tuple[Comparisons, Comparisons]:
    """Compare each iteration with the base policy and with the model it started from, instruction by instruction.

    Returns the results of `paired.compare_preferences`, and those of `paired.estimate_scores` of the scores' differences.
    """
    pairs = paired.list_comparisons(iterations, BASE)
    preferences, scores = evaluations.preferences, evaluations.scores
    wins = {pair: paired.compare_preferences(preferences[pair[0]], preferences[pair[1]]) for pair in pairs}
    tasks = {pair: paired.estimate_scores(paired.subtract_scores(scores[pair[0]], scores[pair[1]])) for pair in pairs}
    return wins, tasks


def add_differences(metrics: dict[str, Any], iterations: dict[str, str], wins: Comparisons, tasks: Comparisons) -> None:
    """Add the paired differences to metrics.json's content, as `vs_base` and `vs_previous` (the model it started from)."""
    for name, start in iterations.items():
        for key, opponent in (("vs_base", BASE), ("vs_previous", start)):
            win_rates = {column: value for column, value in wins[name, opponent].items() if column != "omitted"}
            metrics["alpaca_eval"][name][key] = win_rates
            estimates = {task: tasks[name, opponent][task] for task in (*TASKS, "average")}
            metrics["open_llm_leaderboard"][name][key] = {
                task: {"difference": value, "standard_error": error} for task, (value, error) in estimates.items()
            }


def collect_metrics(evaluations: Evaluations, training: dict[str, Health]) -> dict[str, Any]:
    """Collect the content of metrics.json but for the paired differences."""
    comparison = evaluations.comparison
    ranker = {
        name: (rates[0], errors[0])  # against the base, the first model
        for name, rates, errors in zip(
            comparison["models"], comparison["win_rates"], comparison["standard_errors"], strict=True
        )
    }
    return {
        "alpaca_eval": {
            name: {key: metrics[key] for key in ALPACA_METRICS if key in metrics}
            for name, metrics in evaluations.alpaca.items()
        },
        "open_llm_leaderboard": {
            name: split_errors(pages.average_tasks(summary)) for name, summary in evaluations.harness.items()
        },
        "ranker": split_errors(ranker),
        "training": {name: result.metrics for name, result in training.items()},
    }


def split_errors(results: dict[str, tuple[float, float]]) -> dict[str, Any]:
    """Turn name -> (value, standard error) into name -> value, with the errors under `standard_errors`."""
    errors = {name: error for name, (_, error) in results.items()}
    return {name: value for name, (value, _) in results.items()} | {"standard_errors": errors}


def round_numbers(value: Any) -> Any:
    """Round the floats in nested mappings to six significant digits."""
    if isinstance(value, dict):
        return {key: round_numbers(inner) for key, inner in value.items()}
    return per_item.shorten(value) if isinstance(value, float) else value


def make_csv(evaluations: Evaluations, training: dict[str, Health]) -> dict[str, str]:
    """Make the CSV files that the plots are drawn from: name without suffix -> content."""
    win_rates = [
        add_interval(name, "win_rate", metrics["win_rate"], metrics["standard_error"])
        for name, metrics in evaluations.alpaca.items()
    ]
    lengths = [add_interval(name, "average_length", *average_length(outputs)) for name, outputs in evaluations.answers.items()]
    models = evaluations.comparison["models"]
    matrix = [
        {"model": name, "opponent": opponent, "win_rate": round(rate, 2)}
        for name, rates in zip(models, evaluations.comparison["win_rates"], strict=True)
        for opponent, rate in zip(models, rates, strict=True)
    ]
    histograms = pd.concat([result.histogram for result in training.values()])
    logs = pd.concat([result.log for result in training.values()])
    return {
        "win_rate": pd.DataFrame(win_rates).to_csv(index=False),
        "length": pd.DataFrame(lengths).to_csv(index=False),
        "ranker": pd.DataFrame(matrix).to_csv(index=False),
        "probabilities": histograms.to_csv(index=False),
        "training": logs.to_csv(index=False, float_format="%.6g"),
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


def join_answers(answers: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Turn model -> answers into a list of objects with `instruction` and `answers` (model -> answer)."""
    return [
        {"instruction": row["instruction"], "answers": {name: outputs[index]["output"] for name, outputs in answers.items()}}
        for index, row in enumerate(answers[BASE])
    ]
