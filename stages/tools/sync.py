"""Update generated text: tables in README.md and docs/, the plots in dvc.yaml, and each recipe's dvc.yaml.

The pipeline of a recipe is a copy of one of two: of dvc.yaml in the root or, if the recipe evaluates existing models (`models`
in its params.yaml), of recipes/miniature-published/dvc.yaml.
"""

import argparse
import re
from pathlib import Path

from stages.artifacts import schemas
from stages.reporting import markdown
from stages.reporting.reproductions import format_reproductions
from stages.runtime import params
from stages.runtime.errors import StageError
from stages.runtime.paths import ROOT
from stages.tools import recipe
from stages.tools.planning import comparison, rates

TABLES = ["alpaca_eval", "open_llm_leaderboard"]
"""The reports whose tables are in README.md, each between comments with its name."""
PLOTS = "plots:  # written by make sync from stages/tools/plots.yaml\n"
"""The line of dvc.yaml below which everything is generated."""
EVALUATION = "recipes/miniature-published"
"""The recipe with the pipeline that evaluates existing models."""
EVALUATION_HEADER = """\
# Generated from ../miniature-published/dvc.yaml, which explains it, by `python -m stages.tools sync`: edit that file, not this
# one.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add no options: there is one repository to update."""


def main(args: argparse.Namespace) -> None:
    """Write the documents that are out of date, and print their names."""
    for path, text in documents(ROOT).items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            print(f"{path.relative_to(ROOT)} updated")


def documents(root: Path) -> dict[Path, str]:
    """Return the full text of each document with generated parts. Raises StageError if a document has no place for them."""
    readme, artifacts, pipeline = root / "README.md", root / "docs/artifacts.md", root / "dvc.yaml"
    reproductions, performance = root / "docs/reproductions.md", root / "docs/performance.md"
    text = readme.read_text(encoding="utf-8")
    for name in TABLES:
        report = (root / "reports" / f"{name}.md").read_text(encoding="utf-8")
        text = replace_block(text, name, re.sub(r"(?m)^#", "###", report), readme)
    generated = {
        readme: text,
        artifacts: replace_block(artifacts.read_text(encoding="utf-8"), "schemas", format_schemas(), artifacts),
        reproductions: replace_block(
            reproductions.read_text(encoding="utf-8"),
            "reproductions",
            format_reproductions(root / "reproductions"),
            reproductions,
        ),
        performance: replace_estimates(performance.read_text(encoding="utf-8"), root, performance),
        pipeline: replace_plots(
            pipeline.read_text(encoding="utf-8"), (root / "stages/tools/plots.yaml").read_text(encoding="utf-8"), pipeline
        ),
    }
    return generated | generate_pipelines(root, generated[pipeline])


def generate_pipelines(root: Path, training: str) -> dict[Path, str]:
    """Return the text of the dvc.yaml of every recipe but EVALUATION. training: that of the one in the root."""
    source = root / EVALUATION / "dvc.yaml"
    recipes = [path for path in sorted((root / "recipes").glob("*/params.yaml")) if path.parent != source.parent]
    pipelines = {}
    for path in recipes:
        pipeline = path.with_name("dvc.yaml")
        if params.is_evaluation(params.read(path)):
            body = recipe.generate_pipeline(source.read_text(encoding="utf-8")).removeprefix(recipe.PIPELINE_HEADER)
            pipelines[pipeline] = EVALUATION_HEADER + body
        else:
            pipelines[pipeline] = recipe.generate_pipeline(training)
    return pipelines


def replace_block(text: str, name: str, content: str, path: Path) -> str:
    """Replace the text between the comments `<!-- name -->` and `<!-- /name -->`. Raises StageError if one is missing.

    path: the document, for the message.
    """
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    head, found, rest = text.partition(begin)
    _, closed, tail = rest.partition(end)
    if not found or not closed:
        raise StageError(f"{path}: the comments {begin.strip()} and {end} are missing: add them where the table belongs")
    return head + begin + content.strip() + "\n" + end + tail


def replace_estimates(text: str, root: Path, path: Path) -> str:
    """Replace the tables of docs/performance.md that show what `plan` computes with, and its hours. path: the document."""
    table = markdown.table(["GPU", "rate", "value", "source"], rates.list_rates(), text=True)
    return replace_block(replace_block(text, "rates", table, path), "hours", comparison.format_comparison(root), path)


def format_schemas() -> str:
    """Format a table of the Parquet files, their columns and types."""
    rows = []
    for path, schema in schemas.ARTIFACTS.items():
        columns = [f"{field.name}: {str(field.type).replace('item: ', '')}" for field in schema]
        rows.append([path, "; ".join(columns)])
    return markdown.table(["path", "columns"], rows, text=True)


def replace_plots(pipeline: str, plots: str, path: Path) -> str:
    """Replace the plots at the end of dvc.yaml by the list in plots.yaml. Raises StageError if the line PLOTS is missing."""
    head, found, _ = pipeline.partition(PLOTS)
    if not found:
        raise StageError(f"{path}: the line {PLOTS.strip()!r} is missing: add it as the last one")
    listing = plots.splitlines(keepends=True)
    start = next(index for index, line in enumerate(listing) if line.startswith("-"))
    return head + PLOTS + "".join(listing[start:])
