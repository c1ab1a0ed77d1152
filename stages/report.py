"""Write the versioned reports: Markdown tables, metrics.json, the data of DVC's plots, and an HTML page."""

import argparse
from pathlib import Path
from typing import Any

import pandas as pd

from stages.artifacts import harness_sets
from stages.artifacts.schemas import model_names
from stages.reporting import answers, cards, headline, health, inputs, listings, pages, provenance, results
from stages.reporting.health import Health
from stages.reporting.page import Background
from stages.reporting.published import read_published
from stages.runtime import params


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this stage."""
    parser.add_argument("--data", type=Path, required=True, help="the folder of all other stages' outputs")
    parser.add_argument("--published", type=Path, required=True, help="published.yaml: the published results to compare with")
    parser.add_argument("--out", type=Path, required=True, help="folder of the reports")


def main(args: argparse.Namespace) -> None:
    """Read the outputs of all other stages and write the reports."""
    settings = params.load(
        "numerics",
        "seed",
        "eta",
        "iterations",
        "assets",
        "generate",
        "rank",
        "lengths",
        "train",
        "answer",
        "evaluate_lm.tasks",
        "evaluate_lm.dtype",
    )
    models, iterations = model_names(settings.iterations), settings.iterations
    published = read_published(args.published)
    evaluations = inputs.read_evaluations(args.data, models, harness_sets.select_tasks(settings.tasks))
    comparison = inputs.read_comparison(args.data / "comparison.json", models)
    training = {name: health.measure_health(name, args.data, settings.eta, settings.train) for name in iterations}
    wins, tasks = results.compare_models(evaluations, iterations)
    judged = answers.read_judged(args.data)
    sections = {
        "alpaca_eval": pages.format_alpaca_eval(evaluations.alpaca, wins, published)
        + pages.format_data_sets(evaluations.preferences, judged),
        "open_llm_leaderboard": pages.format_leaderboard(evaluations.harness, tasks, published),
        "ranker": pages.format_ranker(comparison),
        "health": health.format_health({name: result.metrics for name, result in training.items()}),
        "samples": pages.format_samples(evaluations.answers, settings.seed),
        "provenance": provenance.format_provenance(settings, args.data),
    }
    metrics = results.collect_metrics(evaluations, iterations, wins, tasks) | collect_metrics(comparison, training)
    tables = results.make_tables(evaluations) | make_tables(comparison, training)
    title = "SPPO: " + ", ".join(f"{name} from {start}" for name, start in iterations.items())
    background = Background(headline.list_facts(settings), published, judged)
    model_cards = cards.format_cards(settings, published, evaluations, (wins, tasks), training, args.data)
    results.write_reports(args.out, title, sections, evaluations, metrics, tables, background)
    cards.write_cards(model_cards, args.out / cards.FOLDER)
    listings.write_listings(args.data, listings.FOLDERS, args.out)


def collect_metrics(comparison: dict[str, Any], training: dict[str, Health]) -> dict[str, dict[str, Any]]:
    """Collect what metrics.json has in addition to the evaluation results. comparison: the content of comparison.json."""
    return {
        "ranker": results.summarize_comparison(comparison),
        "training": {name: result.metrics for name, result in training.items()},
    }


def make_tables(comparison: dict[str, Any], training: dict[str, Health]) -> dict[str, str]:
    """Make the CSV files that the plots of the ranker and of training are drawn from: name without suffix -> content."""
    models = comparison["models"]
    matrix = [
        {"model": name, "opponent": opponent, "win_rate": round(rate, 2)}
        for name, rates in zip(models, comparison["win_rates"], strict=True)
        for opponent, rate in zip(models, rates, strict=True)
    ]
    histograms = pd.concat([result.histogram for result in training.values()])
    logs = pd.concat([result.log for result in training.values()])
    return {
        "ranker": pd.DataFrame(matrix).to_csv(index=False),
        "probabilities": histograms.to_csv(index=False),
        "training": logs.to_csv(index=False, float_format="%.6g"),
    }
