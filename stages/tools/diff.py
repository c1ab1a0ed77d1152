"""Compare two revisions on one Markdown page: parameters, metrics, artifacts.

A revision is anything that DVC resolves: a commit, a branch, a tag, the name of an experiment, or `workspace` for the working
tree. As in `dvc metrics diff`, the defaults are HEAD and the workspace. Only files in Git are read: the tool needs neither the
data nor DVC's cache, and imports nothing heavier than DVC.
"""

import argparse
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dvc.fs import GitFileSystem
from dvc.scm import SCM, RevError, SCMError, resolve_rev
from ruamel.yaml import YAML

from stages.reporting import markdown
from stages.runtime import documents
from stages.runtime.errors import StageError
from stages.runtime.paths import ROOT
from stages.tools import options

WORKSPACE = "workspace"
PARAMS, METRICS, LOCK = "params.yaml", "reports/metrics.json", "dvc.lock"
ERRORS = {"win_rate": "standard_error", "length_controlled_winrate": "lc_standard_error"}
"""AlpacaEval metric -> the key of its standard error."""
NESTED_ERRORS = "standard_errors"
"""The key in metrics.json whose value maps the metrics beside it to their standard errors."""
PLOTS = ROOT / "stages/reporting/plots.yaml"
WORDS = {True: "yes", False: "no", None: "–"}

Key = tuple[str, ...]
"""The path to a leaf of nested mappings, one key per level."""
Flat = dict[Key, Any]
"""The leaves of nested mappings by their keys."""


@dataclass(frozen=True)
class Revision:
    """An experiment at one revision; None for a file that the revision lacks."""

    title: str
    params: Flat | None
    metrics: Flat | None
    stages: dict[str, Any] | None
    """The stages of dvc.lock."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", nargs="?", default="HEAD", metavar="REV_A", help="default: HEAD")
    parser.add_argument("b", nargs="?", default=WORKSPACE, metavar="REV_B", help="default: the workspace")
    options.add_recipe_option(parser)
    parser.add_argument("--out", type=Path, metavar="FILE", help="Markdown file to write (default: stdout)")


def main(args: argparse.Namespace) -> None:
    text = compare(read_revision(args.a, args.recipe), read_revision(args.b, args.recipe), args.recipe)
    if args.out:
        args.out.write_text(text)
    else:
        print(text, end="")


def read_revision(rev: str, folder: Path) -> Revision:
    """Read the experiment in `folder` (of dvc.yaml) at a revision.

    Raises StageError if the revision is unknown, the folder is not in its repository, or a file is not valid YAML.
    """
    scm, commit = resolve(rev)
    root, inside = Path(scm.root_dir).resolve(), folder.resolve()
    if not inside.is_relative_to(root):
        raise StageError(
            f"{folder} is outside the Git repository {root}: name a folder in it with --recipe, or run this in the other one"
        )
    files: dict[str, dict[str, Any] | None] = {}
    for name in (PARAMS, METRICS, LOCK):
        path = inside / name
        content = _read_file(path) if commit is None else _read_blob(scm, commit, path.relative_to(root))
        files[name] = None if content is None else documents.load_mapping(content, f"{folder / name} at {rev}")
    params, metrics, lock = files[PARAMS], files[METRICS], files[LOCK]
    return Revision(
        title=rev if commit is None else commit[:7] if commit.startswith(rev) else f"{rev} ({commit[:7]})",
        params=None if params is None else flatten(params),
        metrics=None if metrics is None else flatten(metrics),
        stages=None if lock is None else lock.get("stages", {}),
    )


def resolve(rev: str) -> tuple[Any, str | None]:
    """Return this folder's Git repository (a DVC SCM) and the revision's commit, None for the workspace. Raises StageError."""
    try:
        scm = SCM(".")
        return scm, None if rev == WORKSPACE else resolve_rev(scm, rev)
    except RevError as error:
        raise StageError(f"{rev!r} is not a revision: name a commit, branch, tag or experiment (`dvc exp show`)") from error
    except SCMError as error:
        raise StageError(f"{Path.cwd()} is not in a Git repository: go to the folder of dvc.yaml") from error


def _read_file(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _read_blob(scm: Any, commit: str, path: Path) -> bytes | None:
    fs, name = GitFileSystem(scm=scm, rev=commit), f"/{path.as_posix()}"
    content: bytes | None = fs.open(name, "rb").read() if fs.isfile(name) else None
    return content


def flatten(nested: dict[str, Any], path: Key = ()) -> Flat:
    """Flatten nested mappings; lists and empty mappings are leaves."""
    leaves: Flat = {}
    for key, value in nested.items():
        inner = (*path, str(key))
        leaves |= flatten(value, inner) if isinstance(value, dict) and value else {inner: value}
    return leaves


def find_changes(a: Flat, b: Flat) -> list[Key]:
    """Return the keys whose leaves differ, in the order of `a`, new keys last. 1 and 1.0 differ, as they do to DVC."""
    return [key for key in {**a, **b} if format_leaf(a, key) != format_leaf(b, key)]


def format_leaf(leaves: Flat, key: Key) -> str:
    """Format a leaf as JSON, or as a dash if there is none."""
    return json.dumps(leaves[key], ensure_ascii=False, default=str) if key in leaves else "–"


def compare(a: Revision, b: Revision, folder: Path) -> str:
    """Return the whole page. Its last line names the sections without changes."""
    place = "" if folder == Path() else f", {markdown.escape(folder.as_posix())}"
    sections = {
        "Parameters": compare_params(a, b),
        "Metrics": compare_metrics(a, b),
        "Plots": draw_charts(a, b),
        "Artifacts": compare_artifacts(a, b),
    }
    text = f"# From {markdown.escape(a.title)} to {markdown.escape(b.title)}{place}\n" + list_missing_files(a, b)
    for name, section in sections.items():
        if section:
            text += f"\n## {name}\n\n{section.lstrip()}"
    same = [name.lower() for name, section in sections.items() if not section and name != "Plots"]
    return text + (f"\nNo changes in {', '.join(same)}.\n" if same else "")


def list_missing_files(a: Revision, b: Revision) -> str:
    """List the files that one or both revisions lack."""
    text = ""
    for name, values in ((PARAMS, (a.params, b.params)), (METRICS, (a.metrics, b.metrics)), (LOCK, (a.stages, b.stages))):
        titles = [markdown.escape(rev.title) for rev, value in zip((a, b), values, strict=True) if value is None]
        text += f"\nNo {name} at {' and '.join(titles)}.\n" if titles else ""
    return text


def make_header(first: str, a: Revision, b: Revision, *others: str) -> list[str]:
    return [first, markdown.escape(a.title), markdown.escape(b.title), *others]


def compare_params(a: Revision, b: Revision) -> str:
    """Return a table of the parameters that changed, or an empty text."""
    old, new = a.params or {}, b.params or {}
    rows = [[".".join(key), format_leaf(old, key), format_leaf(new, key)] for key in find_changes(old, new)]
    return markdown.table(make_header("parameter", a, b), rows, text=True) if rows else ""


def is_error(key: Key) -> bool:
    """Return whether a metric is the standard error of another."""
    return NESTED_ERRORS in key or key[-1] in ERRORS.values()


def standard_error(metrics: Flat, key: Key) -> float | None:
    """Return the standard error of a metric according to metrics.json, or None."""
    *parents, last = key
    error = metrics.get((*parents, NESTED_ERRORS, last), metrics.get((*parents, ERRORS.get(last, ""))))
    return float(error) if isinstance(error, int | float) else None


def exceeds_noise(a: Flat, b: Flat, key: Key) -> bool | None:
    """Return whether a metric's change is significant at the 5% level (two-sided z-test of two independent estimates).

    None if a value or its standard error is unknown.
    """
    errors = standard_error(a, key), standard_error(b, key)
    if key not in a or key not in b or errors[0] is None or errors[1] is None:
        return None
    return bool(abs(b[key] - a[key]) > markdown.INTERVAL * math.hypot(errors[0], errors[1]))


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
    """Return tables of the metrics that changed: AlpacaEval's and all with standard errors, then the others, collapsed."""
    old, new = a.metrics or {}, b.metrics or {}
    keys = [key for key in find_changes(old, new) if not is_error(key)]
    known = [key for key in keys if standard_error(old, key) is not None or standard_error(new, key) is not None]
    first = [key for key in keys if key in known or key[0] == "alpaca_eval"]
    others = [key for key in keys if key not in first]
    noise = [exceeds_noise(old, new, key) for key in first]
    text = ""
    if first:
        header = make_header("metric", a, b, "change", "exceeds noise")
        rows = [[*_metric_row(old, new, key), WORDS[answer]] for key, answer in zip(first, noise, strict=True)]
        text += markdown.table(header, rows) + explain_noise(noise)
    if others:
        table = markdown.table(make_header("metric", a, b, "change"), [_metric_row(old, new, key) for key in others])
        text += collapse(f"{len(others)} more, without standard errors", table)
    return text


def _metric_row(old: Flat, new: Flat, key: Key) -> list[str]:
    return [".".join(key), format_metric(old, key), format_metric(new, key), format_change(old, new, key)]


def explain_noise(noise: list[bool | None]) -> str:
    """Explain the column "exceeds noise", or return an empty text if it is unknown for all metrics."""
    yes, no = noise.count(True), noise.count(False)
    if not yes + no:
        return ""
    return (
        f"\nMetric ± standard error. {yes} of {yes + no} changes exceed noise: they are larger than {markdown.INTERVAL} "
        "√(a² + b²), where a and b are the standard errors (two-sided 95% interval, the evaluations taken as independent). "
        "Without any real effect, one change in twenty would exceed it.\n"
    )


def collapse(summary: str, text: str) -> str:
    """Put Markdown into a collapsed section with a summary to click on."""
    return f"\n<details><summary>{summary}</summary>\n\n{text}\n</details>\n"


def hash_outputs(entry: dict[str, Any]) -> dict[str, str]:
    """Return path -> hash for the outputs in a stage's dvc.lock entry."""
    return {out["path"]: out.get("md5", "") for out in entry.get("outs", [])}


def compare_artifacts(a: Revision, b: Revision) -> str:
    """Return which stages of the two dvc.lock files differ, and a table of the artifacts with different hashes, collapsed."""
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
        text += collapse(f"{len(rows)} artifacts with different hashes", markdown.table(header, rows, text=True))
    return text


def draw_charts(a: Revision, b: Revision) -> str:
    """Draw win rates and lengths of the models that both revisions have, as Mermaid charts, which GitHub renders.

    Returns an empty text if nothing changed or there is only one model.
    """
    old, new = a.metrics or {}, b.metrics or {}
    charts = ""
    for name, label in (("win_rate", "win rate (%)"), ("avg_length", "characters")):
        keys = [key for key in old if key[0] == "alpaca_eval" and key[-1] == name and key in new]
        keys = [key for key in keys if all(isinstance(metrics[key], int | float) for metrics in (old, new))]
        if len(keys) > 1 and any(old[key] != new[key] for key in keys):
            highest = max(metrics[key] for metrics in (old, new) for key in keys)
            charts += draw_chart(keys, old, new, label, 100 if name == "win_rate" else math.ceil(1.1 * highest))
    if not charts:
        return ""
    titles = f"Bars: {markdown.escape(b.title)}, line: {markdown.escape(a.title)}."
    names = ", ".join(name for plot in YAML(typ="safe").load(PLOTS) for name in plot)
    return f"AlpacaEval win rates and average lengths. {titles}\n{charts}\n`dvc plots diff` draws all plots: {names}.\n"


def draw_chart(keys: list[Key], old: Flat, new: Flat, label: str, top: int) -> str:
    """Draw one metric: a bar per model for the new values, a line for the old ones; top: the maximum of the y axis."""
    # Mermaid has no escapes in quoted text and no exponents in numbers.
    models = ", ".join('"' + re.sub(r"[^A-Za-z0-9_.-]", "_", key[1]) + '"' for key in keys)
    return (
        f'\n```mermaid\nxychart-beta\n  x-axis [{models}]\n  y-axis "{label}" 0 --> {top}\n'
        f"  bar [{', '.join(f'{new[key]:.2f}' for key in keys)}]\n"
        f"  line [{', '.join(f'{old[key]:.2f}' for key in keys)}]\n```\n"
    )
