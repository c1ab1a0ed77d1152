"""Documents, comments and messages refer to what exists: files, headings, commands and valid parameters."""

import itertools
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from dvc.utils.hydra import apply_overrides

from stages.runtime import catalog, params
from stages.runtime.paths import ROOT
from stages.tools import recipe, sync
from support.committed import read_committed
from support.documents import COMMANDS, DOCUMENTS

EXPERIMENTS = sorted({command for _, command in COMMANDS if command.startswith("dvc exp run")})
NEW_RECIPES = sorted({command for _, command in COMMANDS if command.startswith("python -m stages.tools recipe")})
FOLDERS = "stages|tests|recipes|docs|requirements|benchmarks|gpu_check|reports|data|.github|.devcontainer|.dvc"
MADE = (
    ".dvc/tmp/",
    "data/",
    "reports/",
    "docs/gpu/",
    "scratch/",
    "recipes/NEW",
    "recipes/new",
    "recipes/continued",
    "recipes/mistral-7b-dpo",
    "recipes/<",
)
"""Beginnings of paths that a run or a command makes."""


def tracked_texts() -> list[Path]:
    """Return the text files in which people read references: documents, code, configuration."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    kinds = (".py", ".md", ".yaml", ".yml", ".sh", ".toml", ".cff", ".in", ".j2", "Makefile")
    skipped = ("reports/", "benchmarks/results.md", "tests/")
    return [ROOT / name for name in names if name.endswith(kinds) and not name.startswith(skipped) and (ROOT / name).is_file()]


def slug(heading: str) -> str:
    """Return GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def headings(document: Path) -> list[str]:
    text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    return re.findall(r"^#+ +(.*)$", text, re.MULTILINE)


def test_generated_text_is_up_to_date() -> None:
    """README.md may also have the tables of the committed run, as after `make repro` on a machine whose results differ."""
    for path, expected in sync.documents(ROOT).items():
        text = path.read_text(encoding="utf-8")
        if path.name == "README.md" and text != expected:
            expected = text
            for name in sync.TABLES:
                report = re.sub(r"^#", "###", read_committed(f"reports/{name}.md"), flags=re.MULTILINE)
                expected = sync.replace_block(expected, name, report, path)
        assert text == expected, f"{path}: run `make sync`"


def test_the_readme_shows_the_published_results() -> None:
    """Of each recipe that trains."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| [") and line.count(" | ") == 5]
    shown = {name: [None if value == "–" else float(value) for value in values] for _, name, *values in rows}
    expected = {}
    for recipe_name in ("llama-3-8b", "mistral-7b", "gemma-2-9b"):
        published = params.read(ROOT / "recipes" / recipe_name / "published.yaml")["published"]
        averages = published.get("open_llm_leaderboard", {}).get("models", {})
        for model, name in published["models"].items():
            results = published["alpaca_eval"]["models"][model]
            values = [results.get(key) for key in ("length_controlled_winrate", "win_rate", "avg_length")]
            expected[name] = [*values, averages.get(model, {}).get("average")]
    assert len(expected) == 12
    assert shown == expected


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(document: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
        if "://" in link or link.startswith("mailto:"):
            continue
        name, _, anchor = link.partition("#")
        target = document.parent / name if name else document
        assert target.exists(), f"{document.name}: {link}"
        if anchor:
            assert anchor in [slug(heading) for heading in headings(target)], f"{document.name}: {link}"


def test_every_file_that_is_named_exists() -> None:
    """In documents, comments, docstrings and messages alike: paths with a folder of the repository, and *.md at its root."""
    pattern = re.compile(rf"(?<![\w/.$}}*-])((?:{FOLDERS})/[\w./@-]*\w|(?:README|CONTRIBUTING|SECURITY|CHANGELOG)\.md)")
    missing = []
    for path in tracked_texts():
        for name in pattern.findall(path.read_text()):
            places = [ROOT, path.parent, path.parent.parent]  # a recipe's README names the recipe's own files
            if not name.startswith(MADE) and not any((place / name).exists() for place in places):
                missing.append(f"{path.relative_to(ROOT)}: {name}")
    assert not missing


def test_every_heading_that_is_named_exists() -> None:
    """A reference such as: docs/method.md, "Why the miniature's eta is 10"."""
    pattern = re.compile(r"""((?:docs/)?[\w-]+\.md), ["“']([A-Z][^"”]+)["”']""")
    found = 0
    for path in tracked_texts():
        for name, heading in pattern.findall(path.read_text()):
            target = ROOT / name if (ROOT / name).exists() else path.parent / name
            assert target.exists(), f"{path}: {name}"
            assert slug(heading) in [slug(one) for one in headings(target)], f"{path}: {name}, {heading!r}"
            found += 1
    assert found


def test_every_command_and_target_that_is_named_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    tools = {path.stem for path in (ROOT / "stages/tools").glob("*.py")}
    texts = {path: path.read_text() for path in tracked_texts()}
    for path, text in texts.items():
        for target in re.findall(r"`make ([a-z-]+)`", text):
            assert target in targets, f"{path}: make {target}"
        for tool in re.findall(r"python -m stages\.tools ([a-z][a-z-]*)", text):
            assert tool in tools, f"{path}: stages.tools {tool}"
        for stage in re.findall(r"python -m stages ([a-z][a-z-]*)", text):
            assert stage in catalog.stage_modules(), f"{path}: stages {stage}"
        for module in re.findall(r"python -m (stages\.[a-z_.]+)", text):
            assert module == "stages.tools", f"{path}: {module}"
    for document, command in COMMANDS:
        if command.split()[0] == "make":
            assert command.split()[1] in targets, f"{document.name}: {command}"


@pytest.mark.parametrize("command", EXPERIMENTS)
def test_every_experiment_has_valid_parameters(command: str, tmp_path: Path) -> None:
    words = shlex.split(command)
    overrides = [following for word, following in itertools.pairwise(words) if word == "-S"]
    shutil.copyfile(ROOT / "params.yaml", tmp_path / "params.yaml")
    if "--queue" in words:  # one experiment for each of several values
        overrides = [override.partition(",")[0] for override in overrides]
    apply_overrides(tmp_path / "params.yaml", overrides)
    params.validate(tmp_path / "params.yaml")


@pytest.mark.parametrize("command", NEW_RECIPES)
def test_every_new_recipe_is_valid(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("recipes", "params.yaml", "dvc.yaml", "published.yaml"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile)(ROOT / name, tmp_path / name)
    monkeypatch.setattr(recipe, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    import argparse

    parser = argparse.ArgumentParser()
    recipe.add_arguments(parser)
    arguments = shlex.split(command)[4:]
    recipe.main(parser.parse_args(arguments))
    made = tmp_path / "recipes" / arguments[0]
    params.validate_unpinned(params.read(made / "params.yaml"), made / "params.yaml")


def test_every_statement_of_what_can_be_relied_on_has_a_test() -> None:
    text = (ROOT / "docs/trust.md").read_text(encoding="utf-8").partition("## What you cannot rely on")[0]
    statements = [line for line in text.splitlines() if line.startswith("- ")]
    assert len(statements) > 20
    files = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")]
    defined = {name for file in files for name in re.findall(r"^def (test_\w+)", file, re.MULTILINE)}
    for statement in statements:
        named = set(re.findall(r"`(test_\w+)`", statement))
        assert named, statement
        assert named <= defined
