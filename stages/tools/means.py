"""Compute mean and standard deviation of every metric over several revisions, such as runs with several seeds."""

import argparse
import statistics

from stages.reporting import markdown
from stages.runtime.errors import StageError
from stages.tools import changes, options
from stages.tools.revisions import METRICS, Revision, read_revision

TABLES = ("alpaca_eval", "open_llm_leaderboard", "ranker")
"""The parts of metrics.json to average: evaluations, not the health of a single training."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("revisions", nargs="+", metavar="REV", help="commits, branches, tags or names of experiments")
    options.add_recipe_option(parser)


def main(args: argparse.Namespace) -> None:
    if len(args.revisions) < 2:
        raise StageError("a standard deviation needs at least two revisions: name another")
    print(format_means([read_revision(rev, args.recipe) for rev in args.revisions]), end="")


def format_means(runs: list[Revision]) -> str:
    """Format a Markdown table with a row for each metric of TABLES that all runs have.

    Raises StageError if a run has no metrics.
    """
    for revision in runs:
        if revision.metrics is None:
            raise StageError(f"{revision.title} has no {METRICS}: run it to completion with `dvc repro`, then commit it")
    metrics = [revision.metrics or {} for revision in runs]
    rows = []
    for key, first in metrics[0].items():
        included = key[0] in TABLES and isinstance(first, int | float) and not changes.is_error(key)
        if included and all(key in other for other in metrics):
            values = [float(other[key]) for other in metrics]
            mean, deviation = statistics.fmean(values), statistics.stdev(values)
            rows.append([" ".join(key), f"{mean:.2f}", f"{deviation:.2f}", ", ".join(f"{value:.2f}" for value in values)])
    titles = ", ".join(markdown.escape(revision.title) for revision in runs)
    header = ["metric", "mean", "standard deviation", "values"]
    return f"# Means over {len(runs)} runs\n\n{markdown.table(header, rows)}\nRuns, in this order: {titles}.\n"
