"""One Markdown page of what changed between two revisions: parameters, metrics, artifacts.

A revision is whatever DVC resolves: a commit, a branch, a tag, the name of an experiment, or `workspace`, the working tree.
As in `dvc metrics diff`, the defaults are HEAD and the workspace. Everything is read from what Git versions, so that it needs
neither data nor DVC's cache, and nothing heavier is imported than DVC.
"""

import argparse
import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dvc.fs import GitFileSystem
from dvc.scm import SCM, RevError, SCMError, resolve_rev

from stages import documents, markdown
from stages.cli import StageError

WORKSPACE = "workspace"
FILES = ["params.yaml", "reports/metrics.json", "dvc.lock"]
ERRORS = {"win_rate": "standard_error", "length_controlled_winrate": "lc_standard_error"}
"""AlpacaEval's figures and its names of their standard errors."""
NESTED_ERRORS = "standard_errors"
"""In metrics.json the mapping, beside figures, of their names to their standard errors."""
PLOTS = "training loss, win rate and response length with 95 % intervals, ranker's win rates, win probabilities"
WORDS = {True: "yes", False: "no", None: "–"}

Flat = dict[tuple[str, ...], Any]
"""The leaves of nested mappings by the keys on the way to them."""


@dataclass
class Revision:
    """What one revision holds of an experiment; None where it lacks the file."""

    title: str
    params: Flat | None
    metrics: Flat | None
    stages: dict[str, Any] | None


def read(rev: str, folder: Path) -> Revision:
    """The experiment in `folder` (of dvc.yaml) at a revision. Raises StageError where it is unknown or a file is not YAML."""
    try:
        scm = SCM(".")
        sha = None if rev == WORKSPACE else resolve_rev(scm, rev)
    except RevError as error:
        raise StageError(f"{rev!r} is no revision: name a commit, branch, tag or experiment (`dvc exp show`)") from error
    except SCMError as error:
        raise StageError(f"{Path.cwd()} is in no Git repository: go where dvc.yaml is") from error
    root = Path(scm.root_dir).resolve()
    inside = folder.resolve()
    if not inside.is_relative_to(root):
        raise StageError(f"{folder} is outside the Git repository {root}")
    found: dict[str, Any] = {}
    for name in FILES:
        path = inside / name
        if sha is None:
            content = path.read_bytes() if path.is_file() else None
        else:
            fs, inner = GitFileSystem(scm=scm, rev=sha), f"/{path.relative_to(root).as_posix()}"
            content = fs.open(inner, "rb").read() if fs.isfile(inner) else None
        found[name] = None if content is None else documents.mapping(content, f"{folder / name} at {rev}")
    params, metrics, lock = found.values()
    return Revision(
        title=rev if sha is None else sha[:7] if sha.startswith(rev) else f"{rev} ({sha[:7]})",
        params=None if params is None else flat(params),
        metrics=None if metrics is None else flat(metrics),
        stages=None if lock is None else lock.get("stages", {}),
    )


def flat(nested: dict[str, Any], path: tuple[str, ...] = ()) -> Flat:
    """Nested mappings as one; a list is a leaf, and so is an empty mapping."""
    leaves: Flat = {}
    for key, value in nested.items():
        inner = (*path, str(key))
        leaves |= flat(value, inner) if isinstance(value, dict) and value else {inner: value}
    return leaves


def changed(a: Flat, b: Flat) -> list[tuple[str, ...]]:
    """The keys whose leaves differ, in the order of `a`, the new ones last. 1 and 1.0 differ, as they do to DVC."""
    return [key for key in {**a, **b} if written(a, key) != written(b, key)]


def written(leaves: Flat, key: tuple[str, ...]) -> str:
    """A leaf as JSON, a dash where there is none."""
    return json.dumps(leaves[key], ensure_ascii=False, default=str) if key in leaves else "–"


def header(first: str, a: Revision, b: Revision, *others: str) -> list[str]:
    return [first, markdown.escape(a.title), markdown.escape(b.title), *others]


def absences(a: Revision, b: Revision) -> str:
    """Which revisions lack which file."""
    text = ""
    for name, values in (
        ("params.yaml", (a.params, b.params)),
        ("reports/metrics.json", (a.metrics, b.metrics)),
        ("dvc.lock", (a.stages, b.stages)),
    ):
        lacking = [markdown.escape(rev.title) for rev, value in zip((a, b), values, strict=True) if value is None]
        text += f"\nNo {name} at {' and '.join(lacking)}.\n" if lacking else ""
    return text


def params_section(a: Revision, b: Revision) -> str:
    old, new = a.params or {}, b.params or {}
    rows = [[".".join(key), written(old, key), written(new, key)] for key in changed(old, new)]
    return markdown.table(header("parameter", a, b), rows, text=True) if rows else ""


def is_error(key: tuple[str, ...]) -> bool:
    """Whether a metric is the standard error of another."""
    return NESTED_ERRORS in key or key[-1] in ERRORS.values()


def standard_error(metrics: Flat, key: tuple[str, ...]) -> float | None:
    """The standard error that metrics.json gives for a figure, or None."""
    *parents, last = key
    found = metrics.get((*parents, NESTED_ERRORS, last), metrics.get((*parents, ERRORS.get(last, ""))))
    return float(found) if isinstance(found, int | float) else None


def figure(metrics: Flat, key: tuple[str, ...]) -> str:
    value, error = metrics.get(key), standard_error(metrics, key)
    if not isinstance(value, int | float):
        return written(metrics, key)
    return f"{value:.6g}" if error is None else f"{value:.2f} ± {error:.2f}"


def beyond_noise(a: Flat, b: Flat, key: tuple[str, ...]) -> bool | None:
    """Whether a figure's change is outside the two-sided 95 % of both standard errors; None where one is not known."""
    errors = standard_error(a, key), standard_error(b, key)
    if key not in a or key not in b or errors[0] is None or errors[1] is None:
        return None
    return bool(abs(b[key] - a[key]) > markdown.INTERVAL * math.hypot(errors[0], errors[1]))


def difference(a: Flat, b: Flat, key: tuple[str, ...]) -> str:
    if not all(isinstance(metrics.get(key), int | float) for metrics in (a, b)):
        return "–"
    change = b[key] - a[key]
    return f"{change:+.4g}" if standard_error(a, key) is None and standard_error(b, key) is None else f"{change:+.2f}"


def metrics_section(a: Revision, b: Revision) -> str:
    """The metrics that changed: AlpacaEval's and all with standard errors in sight, the others folded away."""
    text = ""
    old, new = a.metrics or {}, b.metrics or {}
    keys = [key for key in changed(old, new) if not is_error(key)]
    known = [key for key in keys if standard_error(old, key) is not None or standard_error(new, key) is not None]
    first = [key for key in keys if key in known or key[0] == "alpaca_eval"]
    noise = [beyond_noise(old, new, key) for key in first]
    if first:
        rows = [
            [".".join(key), figure(old, key), figure(new, key), difference(old, new, key), WORDS[beyond]]
            for key, beyond in zip(first, noise, strict=True)
        ]
        text += markdown.table(header("metric", a, b, "change", "more than noise"), rows)
    yes, no = noise.count(True), noise.count(False)
    if yes + no:
        text += (
            f"\nFigure ± standard error. {yes} of {yes + no} changes are more than noise: outside ±{markdown.INTERVAL} "
            "√(a² + b²), a and b being the standard errors, two-sided, 95 %, as if the evaluations were independent. Without "
            "any effect one change in twenty would be.\n"
        )
    others = [key for key in keys if key not in first]
    if others:
        rows = [[".".join(key), figure(old, key), figure(new, key), difference(old, new, key)] for key in others]
        text += folded(f"{len(others)} more, without standard errors", markdown.table(header("metric", a, b, "change"), rows))
    return text


def folded(summary: str, text: str) -> str:
    return f"\n<details><summary>{summary}</summary>\n\n{text}\n</details>\n"


def outs(entry: dict[str, Any]) -> dict[str, str]:
    """A stage's artifacts in dvc.lock and their hashes."""
    return {out["path"]: out.get("md5", "") for out in entry.get("outs", [])}


def artifacts_section(a: Revision, b: Revision) -> str:
    """What the two locks say that stages made."""
    text = ""
    old, new = a.stages or {}, b.stages or {}
    rows, remade, again = [], [], []
    for stage in {**old, **new}:
        before, after = outs(old.get(stage, {})), outs(new.get(stage, {}))
        paths = [path for path in {**before, **after} if before.get(path) != after.get(path)]
        rows += [[stage, path, before.get(path, "–")[:7], after.get(path, "–")[:7]] for path in paths]
        if stage in old and stage in new:
            if paths:
                remade.append(stage)
            elif old[stage] != new[stage]:
                again.append(stage)
    for what, stages in (
        ("Stages with other artifacts", remade),
        ("New stages", [stage for stage in new if stage not in old]),
        ("Vanished stages", [stage for stage in old if stage not in new]),
        ("Run again with other code, parameters or inputs, to the same artifacts", again),
    ):
        if stages:
            text += f"\n{what}: {', '.join(markdown.escape(stage) for stage in stages)}.\n"
    if rows:
        titles = ["stage", "artifact", *header("", a, b)[1:]]
        text += folded(f"{len(rows)} artifacts by their hashes", markdown.table(titles, rows, text=True))
    return text


def plots_section(a: Revision, b: Revision) -> str:
    """Win rate and length as charts that GitHub draws from text, of the models that both revisions have."""
    old, new = a.metrics or {}, b.metrics or {}
    charts = ""
    for name, label in (("win_rate", "win rate (%)"), ("avg_length", "characters")):
        keys = [key for key in old if key[0] == "alpaca_eval" and key[-1] == name and key in new]
        keys = [key for key in keys if all(isinstance(metrics[key], int | float) for metrics in (old, new))]
        if len(keys) > 1 and any(old[key] != new[key] for key in keys):
            # Mermaid's quotes know no escape and its numbers no exponent
            models = ", ".join('"' + re.sub(r"[^A-Za-z0-9_.-]", "_", key[1]) + '"' for key in keys)
            top = 100 if name == "win_rate" else math.ceil(1.1 * max(*(old[key] for key in keys), *(new[key] for key in keys)))
            charts += (
                f'\n```mermaid\nxychart-beta\n  x-axis [{models}]\n  y-axis "{label}" 0 --> {top}\n'
                f"  bar [{', '.join(f'{new[key]:.2f}' for key in keys)}]\n"
                f"  line [{', '.join(f'{old[key]:.2f}' for key in keys)}]\n```\n"
            )
    if not charts:
        return ""
    text = f"AlpacaEval's win rates and average lengths. Bars: {markdown.escape(b.title)}, line: {markdown.escape(a.title)}.\n"
    return text + charts + f"\n`dvc plots diff` of the two revisions draws all there is to draw: {PLOTS}.\n"


def page(a: Revision, b: Revision, folder: Path) -> str:
    """The whole page. What did not change is named in its last line."""
    place = "" if folder == Path() else f", {markdown.escape(folder.as_posix())}"
    sections = {
        "Parameters": params_section(a, b),
        "Metrics": metrics_section(a, b),
        "Plots": plots_section(a, b),
        "Artifacts": artifacts_section(a, b),
    }
    text = f"# From {markdown.escape(a.title)} to {markdown.escape(b.title)}{place}\n" + absences(a, b)
    for name, section in sections.items():
        if section:
            text += f"\n## {name}\n\n{section.lstrip()}"
    same = [name.lower() for name, section in sections.items() if not section and name != "Plots"]
    return text + (f"\nNo changes of {', '.join(same)}.\n" if same else "")


def main() -> None:
    parser = argparse.ArgumentParser("python -m stages.diff", description=__doc__)
    parser.add_argument("a", nargs="?", default="HEAD", metavar="REV_A", help="default: HEAD")
    parser.add_argument("b", nargs="?", default=WORKSPACE, metavar="REV_B", help="default: the workspace")
    parser.add_argument("--recipe", type=Path, default=Path(), help="folder of dvc.yaml, default: the root's")
    parser.add_argument("--out", type=Path, help="file to write, default: stdout")
    args = parser.parse_args()
    text = page(read(args.a, args.recipe), read(args.b, args.recipe), args.recipe)
    if args.out:
        args.out.write_text(text)
    else:
        print(text, end="")


if __name__ == "__main__":
    try:
        main()
    except StageError as error:  # not cli.run: this is no stage, and runs where there is no environment but DVC
        sys.exit(f"diff: error: {error}")
