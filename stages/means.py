"""Mean and standard deviation of the metrics of several revisions: of one experiment run with several seeds, say."""

import argparse
import statistics
import sys
from pathlib import Path

from stages import diff, markdown
from stages.cli import StageError

TABLES = ("alpaca_eval", "open_llm_leaderboard", "ranker")
"""What is compared: the training metrics are of each run alone."""


def page(revisions: list[diff.Revision]) -> str:
    """A Markdown table with a row for each metric that all revisions have. Raises StageError where one has none."""
    for revision in revisions:
        if revision.metrics is None:
            raise StageError(f"{revision.title} has no reports/metrics.json: run it to the end")
    metrics = [revision.metrics or {} for revision in revisions]
    rows = []
    for key, first in metrics[0].items():
        wanted = key[0] in TABLES and isinstance(first, int | float) and not diff.is_error(key)
        if wanted and all(key in other for other in metrics):
            values = [float(other[key]) for other in metrics]
            mean, deviation = statistics.fmean(values), statistics.stdev(values)
            rows.append([" ".join(key), f"{mean:.2f}", f"{deviation:.2f}", ", ".join(f"{value:.2f}" for value in values)])
    titles = ", ".join(markdown.escape(revision.title) for revision in revisions)
    header = ["metric", "mean", "standard deviation", "values"]
    return f"# Of {len(revisions)} runs\n\n{markdown.table(header, rows)}\nOver {titles}, in this order.\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m stages.means", description=__doc__)
    parser.add_argument("revisions", nargs="+", metavar="REV", help="commits, branches, tags or names of experiments")
    parser.add_argument("--recipe", type=Path, default=Path(), help="the folder of dvc.yaml (this one)")
    args = parser.parse_args()
    if len(args.revisions) < 2:
        raise StageError("a standard deviation is of two revisions at least: name another")
    print(page([diff.read(rev, args.recipe) for rev in args.revisions]), end="")


if __name__ == "__main__":
    try:
        main()
    except StageError as error:  # not cli.run: this is no stage
        sys.exit(f"means: error: {error}")
