"""Compare two revisions on one Markdown page: parameters, metrics, artifacts.

A revision is anything that DVC resolves: a commit, a branch, a tag, the name of an experiment, or `workspace` for the working
tree. As in `dvc metrics diff`, the defaults are HEAD and the workspace. Only files in Git are read: the tool needs neither the
data nor DVC's cache, and imports nothing heavier than DVC.
"""

import argparse
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dvc.fs import GitFileSystem
from dvc.scm import SCM, RevError, SCMError, resolve_rev
from ruamel.yaml import YAML

from stages.reporting import markdown, paired, per_item, seeds
from stages.reporting.markdown import WORDS
from stages.reporting.paired import BEYOND_ERROR
from stages.runtime import documents
from stages.runtime.errors import StageError, quote
from stages.runtime.paths import ROOT
from stages.tools import changes, options
from stages.tools.changes import NO_ITEMS, Change, Items, Published, standard_error
from stages.tools.changes import Flat as Flat  # part of this module's interface, as are the next two
from stages.tools.changes import Key as Key
from stages.tools.changes import is_error as is_error

WORKSPACE = "workspace"
PARAMS, METRICS, LOCK, PUBLISHED = "params.yaml", "reports/metrics.json", "dvc.lock", "published.yaml"
SEEDS = "reports/seeds.json"
REFERENCES = "data/reference_outputs.json"
PLOTS = ROOT / "stages/reporting/plots.yaml"
BEYOND_NOISE = "beyond run-to-run noise"
"""Heading of the column that says whether a change exceeds the noise between runs."""


@dataclass(frozen=True)
class Revision:
    """An experiment at one revision; None for a file that the revision lacks."""

    title: str
    params: Flat | None
    metrics: Flat | None
    stages: dict[str, Any] | None
    """The stages of dvc.lock."""
    items: Items = NO_ITEMS
    limits: dict[str, float] | None = None
    """Metric, its keys joined by dots -> the largest difference that noise explains, from seeds.json."""
    published: list[Published] = field(default_factory=list)
    """published.yaml's results."""


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


def read_revision(rev: str, folder: Path) -> Revision:
    """Read the experiment in `folder` (of dvc.yaml) at a revision.

    Raises StageError if the revision is unknown, the folder is not in its repository, or a file is not valid.
    """
    scm, commit = resolve(rev)
    root, inside = Path(scm.root_dir).resolve(), folder.resolve()
    if not inside.is_relative_to(root):
        raise StageError(
            f"{folder} is outside the Git repository {root}: name a folder in it with --recipe, or run this in the other one"
        )

    def read(name: str) -> bytes | None:
        path = inside / name
        return _read_file(path) if commit is None else _read_blob(scm, commit, path.relative_to(root))

    def read_mapping(name: str) -> dict[str, Any] | None:
        content = read(name)
        return None if content is None else documents.load_mapping(content, f"{folder / name} at {rev}")

    params, metrics, lock, runs = (read_mapping(name) for name in (PARAMS, METRICS, LOCK, SEEDS))
    stages = None if lock is None else read_stages(lock, f"{folder / LOCK} at {rev}")
    return Revision(
        title=rev if commit is None else commit[:7] if commit.startswith(rev) else f"{rev} ({commit[:7]})",
        params=None if params is None else flatten(params),
        metrics=None if metrics is None else read_metrics(metrics, f"{folder / METRICS} at {rev}"),
        stages=stages,
        items=read_items(read, f"{folder} at {rev}", params or {}, stages or {}),
        limits=None if runs is None else seeds.read_limits(runs, f"{folder / SEEDS} at {rev}"),
        published=changes.list_published(read_mapping(PUBLISHED) or {}, f"{folder / PUBLISHED} at {rev}"),
    )


def read_metrics(document: dict[str, Any], where: str) -> Flat:
    """Flatten the content of metrics.json. Raises StageError for a number that no metric can have.

    where: the file in messages, as in `read_stages`.
    """
    metrics = flatten(document)
    for key, value in metrics.items():
        if isinstance(value, int | float) and not abs(value) <= seeds.LARGEST:  # also for NaN
            name = ".".join(key)
            raise StageError(f"{where}: '{name}' is {quote(value)}, expected a number: {per_item.REMEDY}")
    return metrics


def read_stages(lock: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the stages of dvc.lock, none if it has no such key. Raises StageError if one has another structure than DVC's."""
    stages = lock.get("stages", {})
    if not isinstance(stages, dict):
        raise StageError(f"{where}: 'stages' is {quote(stages)}, expected a mapping: {per_item.REMEDY}")
    for name, entry in stages.items():
        if not isinstance(name, str) or not isinstance(entry, dict):
            raise StageError(f"{where}: stage {quote(name)} is {quote(entry)}, expected a mapping: {per_item.REMEDY}")
        for key in ("deps", "outs"):
            if not _is_file_list(entry.get(key, [])):
                raise StageError(f"{where}: '{key}' of stage {name} is not a list of paths and hashes: {per_item.REMEDY}")
        params = entry.get("params", {})
        if not isinstance(params, dict) or not all(isinstance(values, dict) for values in params.values()):
            raise StageError(f"{where}: 'params' of stage {name} is {quote(params)}, expected mappings: {per_item.REMEDY}")
    return stages


def _is_file_list(files: object) -> bool:
    return isinstance(files, list) and all(
        isinstance(file, dict) and isinstance(file.get("path"), str) and isinstance(file.get("md5", ""), str) for file in files
    )


def read_items(read: Callable[[str], bytes | None], where: str, params: dict[str, Any], stages: dict[str, Any]) -> Items:
    """Read a revision's results for each instruction and question.

    read: returns a file's content, None if there is none; where: the folder and the revision, for messages. Raises StageError.
    """
    preferences, scores = (read(f"reports/{name}") for name in (per_item.PREFERENCES, per_item.HARNESS))
    return Items(
        preferences=per_item.parse_preferences(decode(preferences), f"{per_item.PREFERENCES} in {where}")
        if preferences
        else {},
        scores=per_item.parse_scores(decode(scores), f"{per_item.HARNESS} in {where}") if scores else {},
        instructions=find_hash(stages, "data/alpaca_eval_set"),
        questions=find_hash(stages, "data/harness_sets"),
        starts=changes.read_starts(params, f"{PARAMS} in {where}"),
    )


def decode(content: bytes) -> str:
    """Decode a CSV file; what is not UTF-8 becomes characters that no number contains."""
    return content.decode(errors="replace")


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
    return json.dumps(leaves[key], ensure_ascii=False, default=str, skipkeys=True) if key in leaves else "–"


def compare(a: Revision, b: Revision, folder: Path) -> str:
    """Return the whole page. Its last line names the sections without changes."""
    place = "" if folder == Path() else f", {markdown.escape(folder.as_posix())}"
    sections = {
        "Parameters": compare_params(a, b),
        "Metrics": compare_metrics(a, b),
        "Comparison with published results": compare_published(b),
        "Plots": draw_charts(a, b),
        "Artifacts": compare_artifacts(a, b),
    }
    text = f"# From {markdown.escape(a.title)} to {markdown.escape(b.title)}{place}\n" + list_missing_files(a, b)
    for name, section in sections.items():
        if section:
            text += f"\n## {name}\n\n{section.lstrip()}"
    same = [
        name.lower() for name, section in sections.items() if not section and name in ("Parameters", "Metrics", "Artifacts")
    ]
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
    tasks = [key for key in known if key[0] == "open_llm_leaderboard" and key[-1] == "difference"]
    first = [key for key in keys if (key in known and key not in tasks) or (key[0] == "alpaca_eval" and len(key) == 3)]
    others = [key for key in keys if key not in first and key not in tasks]
    errors, (limits, _) = changes.find_paired_errors(a.items, b.items), find_limits(a, b)
    judged = {key: changes.judge_change(old, new, key, errors, limits) for key in keys}
    text = ""
    if first or tasks:
        text += format_changes(a, b, [judged[key] for key in first]) + explain_changes(a, b, [judged[key] for key in known])
    if tasks:
        table = format_changes(a, b, [judged[key] for key in tasks])
        text += collapse(f"{len(tasks)} paired differences of the harness's tasks", table)
    if others:
        rows = [[*_metric_row(old, new, key), WORDS[judged[key].beyond_noise]] for key in others]
        table = markdown.table(make_header("metric", a, b, "change", BEYOND_NOISE), rows)
        text += collapse(f"{len(others)} more, without standard errors", table)
    return text


def find_limits(a: Revision, b: Revision) -> tuple[dict[str, float], str]:
    """Return the limits of noise, and the title of the revision that has them: b if it does, or else a."""
    revision = a if b.limits is None else b
    return revision.limits or {}, revision.title


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
            "the ranker's win rates are always taken as independent.\n" + warn_of_other_causes(a, b)
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


def warn_of_other_causes(a: Revision, b: Revision) -> str:
    """Say what, besides the models, may have changed the win rates: the judge or the reference outputs."""
    causes = []
    judge = ("evaluate_alpaca", "judge")
    if (a.params or {}).get(judge) != (b.params or {}).get(judge):
        causes.append("the judge")
    if find_hash(a.stages or {}, REFERENCES) != find_hash(b.stages or {}, REFERENCES):
        causes.append("the reference outputs")
    verb = "differs" if causes == ["the judge"] else "differ"
    return f"\nWin rates also change because {' and '.join(causes)} {verb}.\n" if causes else ""


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
    header = ["metric", markdown.escape(revision.title), "published", "difference", BEYOND_ERROR, BEYOND_NOISE]
    return (
        f"{markdown.table(header, rows)}\nEvaluation error: the two evaluations are taken as independent; where no standard "
        f"error is published, ours is used in its place. Run-to-run noise: {SEEDS} at this revision; the published run is "
        "taken to be as noisy as ours.\n"
    )


def collapse(summary: str, text: str) -> str:
    """Put Markdown into a collapsed section with a summary to click on."""
    return f"\n<details><summary>{summary}</summary>\n\n{text}\n</details>\n"


def hash_outputs(entry: dict[str, Any]) -> dict[str, str]:
    """Return path -> hash for the outputs in a stage's dvc.lock entry."""
    return {out["path"]: out.get("md5", "") for out in entry.get("outs", [])}


def find_hash(stages: dict[str, Any], path: str) -> str | None:
    """Return the hash of an output in dvc.lock's stages, or None."""
    hashes = [hash_outputs(entry).get(path) for entry in stages.values()]
    return next((value for value in hashes if value), None)


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
