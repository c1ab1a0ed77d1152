"""Compare two revisions on one Markdown page: parameters, metrics, artifacts.

A revision is anything that DVC resolves: a commit, a branch, a tag, the name of an experiment, or `workspace` for the working
tree. As in `dvc metrics diff`, the defaults are HEAD and the workspace. Only files in Git are read: the tool needs neither the
data nor DVC's cache, and imports nothing heavier than DVC.
"""

import argparse
from pathlib import Path

from stages.reporting import markdown, paired
from stages.reporting.markdown import WORDS
from stages.reporting.paired import BEYOND_ERROR
from stages.tools import changes, options, summary
from stages.tools.changes import Change, Flat, Key, is_error, standard_error
from stages.tools.revisions import (
    LOCK,
    METRICS,
    PARAMS,
    SEEDS,
    WORKSPACE,
    Revision,
    find_changes,
    find_limits,
    format_leaf,
    hash_outputs,
    read_revision,
)

BEYOND_NOISE = "beyond run-to-run noise"
"""Heading of the column that says whether a change exceeds the noise between runs."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", nargs="?", default="HEAD", metavar="REV_A", help="default: HEAD")
    parser.add_argument("b", nargs="?", default=WORKSPACE, metavar="REV_B", help="default: the workspace")
    options.add_recipe_option(parser)
    parser.add_argument("--out", type=Path, metavar="FILE", help="Markdown file to write (default: stdout)")


def main(args: argparse.Namespace) -> None:
    text = compare(read_revision(args.a, args.recipe), read_revision(args.b, args.recipe), args.recipe)
    if args.out:
        args.out.write_text(text, encoding="utf-8")
    else:
        print(text, end="")


def compare(a: Revision, b: Revision, folder: Path) -> str:
    """Return the whole page: the verdict with the figures that it rests on, then everything that changed, collapsed.

    folder: that of dvc.yaml, which the page names unless it is the current one. The last line names what did not change.
    """
    chart, artifacts = summary.draw_win_rates(a, b), compare_artifacts(a, b)
    text = summary.summarize(a, b, folder) + list_missing_files(a, b)
    text += compare_params(a, b) + compare_metrics(a, b) + compare_published(b)
    text += (collapse("Win rates of all models", chart) if chart else "") + artifacts
    changed = {
        "parameters": find_changes(a.params or {}, b.params or {}),
        "metrics": find_changes(a.metrics or {}, b.metrics or {}),
        "artifacts": artifacts,
    }
    same = [name for name, found in changed.items() if not found]
    return text + (f"\nNo changes in {', '.join(same)}.\n" if same else "")


def list_missing_files(a: Revision, b: Revision) -> str:
    """List the files that one or both revisions lack."""
    text = ""
    for name, values in ((PARAMS, (a.params, b.params)), (METRICS, (a.metrics, b.metrics)), (LOCK, (a.stages, b.stages))):
        titles = [rev.shown for rev, value in zip((a, b), values, strict=True) if value is None]
        text += f"\nNo {name} at {' and '.join(titles)}.\n" if titles else ""
    return text


def make_header(first: str, a: Revision, b: Revision, *others: str) -> list[str]:
    return [first, a.shown, b.shown, *others]


def compare_params(a: Revision, b: Revision) -> str:
    """Return a table of the parameters that changed, collapsed, or an empty text."""
    old, new = a.params or {}, b.params or {}
    rows = [[".".join(key), format_leaf(old, key), format_leaf(new, key)] for key in find_changes(old, new)]
    table = markdown.table(make_header("parameter", a, b), rows, text=True)
    return collapse(f"Parameters: {len(rows)} changed", table) if rows else ""


def format_metric(metrics: Flat, key: Key) -> str:
    """Format a metric, with its standard error if that is known."""
    value, error = metrics.get(key), standard_error(metrics, key)
    if not isinstance(value, int | float):
        return format_leaf(metrics, key)
    return f"{value:.6g}" if error is None else f"{value:.2f} ± {error:.2f}"


def format_change(a: Flat, b: Flat, key: Key) -> str:
    """Format the difference of a metric, or a dash if it is not a number in both revisions."""
    if not all(isinstance(metrics.get(key), int | float) for metrics in (a, b)):
        return "–"
    change = b[key] - a[key]
    return f"{change:+.4g}" if standard_error(a, key) is None and standard_error(b, key) is None else f"{change:+.2f}"


def compare_metrics(a: Revision, b: Revision) -> str:
    """Return collapsed tables of the metrics that changed: AlpacaEval's and all with standard errors, then the others."""
    old, new = a.metrics or {}, b.metrics or {}
    keys = [key for key in find_changes(old, new) if not is_error(key)]
    known = [key for key in keys if standard_error(old, key) is not None or standard_error(new, key) is not None]
    tasks = [key for key in known if key[0] == "open_llm_leaderboard" and key[-1] == "difference"]
    first = [key for key in keys if (key in known and key not in tasks) or (key[0] == "alpaca_eval" and len(key) == 3)]
    others = [key for key in keys if key not in first and key not in tasks]
    errors, (limits, _) = changes.find_paired_errors(a.items, b.items), find_limits(a, b)
    judged = {key: changes.judge_change(old, new, key, errors, limits) for key in keys}
    text = ""
    if first or tasks:
        table = format_changes(a, b, [judged[key] for key in first]) + explain_changes(a, b, [judged[key] for key in known])
        text += collapse(f"Metrics: {len(first)} changed, with standard errors if known", table)
    if tasks:
        table = format_changes(a, b, [judged[key] for key in tasks])
        text += collapse(f"Metrics: {len(tasks)} paired differences of the harness's tasks", table)
    if others:
        rows = [[*_metric_row(old, new, key), WORDS[judged[key].beyond_noise]] for key in others]
        table = markdown.table(make_header("metric", a, b, "change", BEYOND_NOISE), rows)
        text += collapse(f"Metrics: {len(others)} more, without standard errors", table)
    return text


def format_changes(a: Revision, b: Revision, judged: list[Change]) -> str:
    """Format a table of changes and whether they exceed the evaluation's error and the noise between runs."""
    rows = []
    for change in judged:
        how = "paired" if change.is_paired else "independent"
        error = "–" if change.error is None else f"{change.error:.2f} {how}"
        words = [WORDS[change.beyond_error], WORDS[change.beyond_noise]]
        rows.append([*_metric_row(a.metrics or {}, b.metrics or {}, change.key), error, *words])
    return markdown.table(make_header("metric", a, b, "change", "its standard error", BEYOND_ERROR, BEYOND_NOISE), rows)


def _metric_row(old: Flat, new: Flat, key: Key) -> list[str]:
    return [".".join(key), format_metric(old, key), format_metric(new, key), format_change(old, new, key)]


def explain_changes(a: Revision, b: Revision, judged: list[Change]) -> str:
    """Explain those columns of `format_changes` that are known for at least one change."""
    errors = [change.beyond_error for change in judged if change.beyond_error is not None]
    noise = [change.beyond_noise for change in judged if change.beyond_noise is not None]
    text = ""
    if errors:
        text += (
            f"\nMetric ± standard error. {sum(errors)} of {len(errors)} changes are beyond the evaluation's error: more than "
            f"{markdown.INTERVAL} times their standard error (two-sided 95% interval). This error says whether the two "
            "revisions' models would also differ on other questions of the same kind, not whether other runs of the same "
            "experiments would show the change. Paired: the error of the mean change per question, where both revisions have "
            "results for the same questions. Independent: √(a² + b²), where a and b are the two standard errors; it is usually "
            "too large if the questions are in fact the same. LC win rates, which are fitted to all instructions together, and "
            "the ranker's win rates are always taken as independent.\n"
        )
    if noise:
        text += (
            f"\n{sum(noise)} of {len(noise)} changes are beyond run-to-run noise: more than t √2 SD, the 95% limit of the "
            "difference between two runs. SD is the standard deviation between n runs that differ only in the seed "
            f"({SEEDS} at {markdown.escape(find_limits(a, b)[1])}), taken to be the same at both revisions; t is the 97.5% "
            "quantile of Student's t distribution with n − 1 degrees of freedom. A dash: not measured, or the same in all "
            "runs.\n"
        )
    elif errors:
        text += f"\nRun-to-run noise is not known: no {SEEDS} has these metrics at either revision.\n"
    return text


def compare_published(revision: Revision) -> str:
    """Compare a revision with the published results, taking the noise between runs into account.

    Returns an empty text if nothing is published or the noise is unknown; reports/ consider the evaluation's error only.
    """
    metrics, limits, rows = revision.metrics or {}, revision.limits or {}, []
    for key, reported, published_error in revision.published:
        value = metrics.get(key)
        if limits and isinstance(value, int | float):
            difference = value - reported
            beyond_error = paired.exceeds_published(difference, standard_error(metrics, key), published_error)
            beyond_noise = changes.exceeds_noise(difference, limits.get(".".join(key)))
            theirs = f"{reported:.2f}" if published_error is None else f"{reported:.2f} ± {published_error:.2f}"
            cells = [format_metric(metrics, key), theirs, f"{difference:+.2f}", WORDS[beyond_error], WORDS[beyond_noise]]
            rows.append([".".join(key), *cells])
    if not rows:
        return ""
    header = ["metric", revision.shown, "published", "difference", BEYOND_ERROR, BEYOND_NOISE]
    text = (
        f"{markdown.table(header, rows)}\nEvaluation error: the two evaluations are taken as independent; where no standard "
        f"error is published, ours is used in its place. Run-to-run noise: {SEEDS} at this revision; the published run is "
        "taken to be as noisy as ours.\n"
    )
    return collapse("Comparison with published results", text)


def collapse(title: str, text: str) -> str:
    """Put Markdown into a collapsed section with a title to click on."""
    return f"\n<details><summary>{title}</summary>\n\n{text}\n</details>\n"


def compare_artifacts(a: Revision, b: Revision) -> str:
    """Return which stages of two dvc.lock files differ, with a table of the artifacts with different hashes, collapsed."""
    old, new = a.stages or {}, b.stages or {}
    rows: list[list[str]] = []
    changed: list[str] = []
    same: list[str] = []
    for stage in {**old, **new}:
        before, after = hash_outputs(old.get(stage, {})), hash_outputs(new.get(stage, {}))
        paths = [path for path in {**before, **after} if before.get(path) != after.get(path)]
        rows += [[stage, path, before.get(path, "–")[:7], after.get(path, "–")[:7]] for path in paths]
        if stage in old and stage in new and old[stage] != new[stage]:
            (changed if paths else same).append(stage)
    text = ""
    for what, stages in (
        ("Stages with different artifacts", changed),
        ("New stages", [stage for stage in new if stage not in old]),
        ("Removed stages", [stage for stage in old if stage not in new]),
        ("Re-run with different code, parameters or inputs, but the same artifacts", same),
    ):
        if stages:
            text += f"\n{what}: {', '.join(markdown.escape(stage) for stage in stages)}.\n"
    if rows:
        header = ["stage", "artifact", *make_header("", a, b)[1:]]
        text += "\n" + markdown.table(header, rows, text=True, hashes=True)
    return collapse(f"Artifacts: {len(rows)} with different hashes", text.lstrip("\n")) if text else ""
