"""Say whether a run has the committed results and, if not, where they begin to differ and by how much.

The committed run is that of HEAD: its dvc.lock and reports/. Differences of metrics are compared with the noise between runs
according to its reports/seeds.json.
"""

import argparse
import textwrap
from pathlib import Path

from stages.tools import changes, git, locks, options, revisions

WIDTH = 80
LISTED = 5
"""Number of changed inputs to name."""
WIN_RATES = ("length_controlled_winrate", "win_rate")
"""Metrics of AlpacaEval to compare."""
WORDS = {False: "yes", True: "no", None: "unknown"}
"""Whether a difference exceeds noise -> whether it is noise."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_recipe_option(parser)


def main(args: argparse.Namespace) -> None:
    print(describe_drift(args.recipe))


def describe_drift(folder: Path) -> str:
    """Say whether the results of the run in `folder` (of dvc.yaml) are those of HEAD and, if not, how they differ.

    Raises StageError if there is no run, or no repository.
    """
    committed, current = revisions.read_revision("HEAD", folder), revisions.read_revision(revisions.WORKSPACE, folder)
    if current.stages is None:
        raise revisions.no_run(folder / revisions.LOCK)
    commit = git.head(folder)
    if committed.stages is None:
        return f"Nothing to compare this run with: commit {commit[:7]} has no {folder / revisions.LOCK}."
    comparison = locks.compare(committed.stages, current.stages)
    if comparison.first_difference is None:
        return f"OK: all {comparison.outputs} outputs are those of commit {commit[:7]}."
    table = format_figures(committed.metrics or {}, current.metrics or {}, committed.limits or {})
    return format_drift(comparison, commit) + table


def format_drift(comparison: locks.Comparison, commit: str) -> str:
    """Say which stage differed first and how many outputs differ, and what the cause may be."""
    inputs = comparison.changed_inputs
    if inputs:
        listed = ", ".join(inputs[:LISTED]) + (f", and {len(inputs) - LISTED} more" if len(inputs) > LISTED else "")
        cause = f"This is expected, because these have changed since then: {listed}."
    else:
        cause = "Code and parameters are the same, so the cause is this machine or its libraries: see docs/reproductions.md."
        if comparison.changed_records:
            cause += f" Versions, numerics or devices differ, first in {comparison.changed_records[0]}."
    text = (
        f"The results differ from those of commit {commit[:7]}: {comparison.differing} of {comparison.outputs} outputs, "
        f"first those of stage {comparison.first_difference}. {cause}"
    )
    return textwrap.fill(text, WIDTH, break_on_hyphens=False) + "\n"


def format_figures(committed: changes.Flat, current: changes.Flat, limits: dict[str, float]) -> str:
    """Format a table of the win rates that both runs have: both values, their difference, and whether noise explains it.

    limits: from `seeds.read_limits`.
    """
    keys = [key for key in committed if key[0] == "alpaca_eval" and len(key) == 3 and key[-1] in WIN_RATES]
    keys = [key for key in keys if all(isinstance(metrics.get(key), int | float) for metrics in (committed, current))]
    if not keys:
        return "There are no win rates to compare."
    lines = [f"\n{'metric':<36}{'committed':>10}{'this run':>10}{'difference':>12}{'noise':>10}"]
    for key in keys:
        name, change = " ".join(key[1:]).replace("_", " "), current[key] - committed[key]
        answer = WORDS[changes.exceeds_noise(change, limits.get(".".join(key)))]
        lines.append(f"{name[:35]:<36}{committed[key]:>10.2f}{current[key]:>10.2f}{change:>+12.2f}{answer:>10}")
    note = (
        "noise: whether two runs that differ only in the seed may differ as much (at most t sqrt(2) SD: see reports/seeds.md)"
        if limits
        else f"noise: unknown without {revisions.SEEDS}, which `make seeds` writes"
    )
    return "\n".join([*lines, "", textwrap.fill(note, WIDTH)])
