"""Write the versioned reports of existing models: Markdown tables, metrics.json, the data of DVC's plots, and an HTML page."""

import argparse
from pathlib import Path

from stages.artifacts import harness_sets
from stages.reporting import answers, headline, inputs, listings, pages, provenance, results
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
        "models",
        "answers",
        "rankers",
        "assets",
        "engine",
        "answer",
        "rank",
        "evaluate_alpaca",
        "evaluate_lm",
    )
    published = read_published(args.published)
    chosen = harness_sets.select_tasks(settings.evaluate_lm.tasks)
    evaluations = inputs.read_evaluations(args.data, list(settings.models), chosen, settings.answers, settings.rankers)
    names = [*settings.models, *settings.answers]
    comparisons = {
        name: inputs.read_comparison(args.data / "alpaca_eval" / name / "comparison.json", names) for name in settings.rankers
    }
    starts = dict(zip(names[1:], names, strict=False))  # model: the one before
    wins, tasks = results.compare_models(evaluations, starts)
    judged = answers.read_judged(args.data)
    sections = {
        "alpaca_eval": pages.format_alpaca_eval(evaluations.alpaca, wins, published)
        + pages.format_data_sets(evaluations.preferences, judged)
        + "".join(pages.format_existing_ranker(name, comparison) for name, comparison in comparisons.items()),
        "open_llm_leaderboard": pages.format_leaderboard(evaluations.harness, tasks, published, list(settings.answers)),
        "samples": pages.format_samples(evaluations.answers, settings.seed),
        "provenance": provenance.format_models_provenance(settings, args.data),
    }
    metrics = results.collect_metrics(evaluations, starts, wins, tasks)
    if comparisons:
        metrics["rankers"] = {name: results.summarize_comparison(comparison) for name, comparison in comparisons.items()}
    title = f"Evaluation of {', '.join(names)}"
    tables = results.make_tables(evaluations)
    background = Background(headline.list_model_facts(settings), published, judged)
    results.write_reports(args.out, title, sections, evaluations, metrics, tables, background)
    listings.write_listings(args.data, (*listings.FOLDERS, "models"), args.out)
